"""The matrix as tests of a user's project."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from custom_ops.verify._run import Samples, capabilities, verify


def matrix(
    op: Callable[..., Any], sample_inputs: Samples, *, quick: bool = True, **options: Any
) -> Callable[..., None]:
    """Return a parametrised test for pytest with a case for each capability: one line adds the whole matrix.

    The arguments are those of `verify`. An inapplicable case is skipped with its reason; an unchecked one fails.

    Example:
        >>> import torch
        >>> from custom_ops.verify import matrix
        >>> x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        >>> test_sine = matrix(torch.sin, [(x,)], reference=torch.sin)  # in a test file
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
