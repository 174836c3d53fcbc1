"""The matrix as tests of a project of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from custom_ops.verify._run import Samples, capabilities, verify


def matrix(
    op: Callable[..., Any], sample_inputs: Samples, *, quick: bool = True, **options: Any
) -> Callable[..., None]:
    """A parametrised test for pytest, a case for each capability: one line gives a project the whole matrix.

    The arguments are those of `verify`. What isn't applicable is skipped, with its reason; what isn't checked fails.

    Example:
        >>> import torch
        >>> from custom_ops.verify import matrix
        >>> x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        >>> test_sine = matrix(torch.sin, [(x,)], reference=torch.sin)  # in a file of tests
    """
    import pytest

    names = options.pop("only", None) or list(capabilities(quick))

    @pytest.mark.parametrize("capability", names)
    def test(capability: str) -> None:
        report = verify(op, sample_inputs, quick=quick, only=[capability], **options)
        report.raise_on_failure()
        if report[capability].status != "pass":
            pytest.skip(report[capability].detail)

    return test
