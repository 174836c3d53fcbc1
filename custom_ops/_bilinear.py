"""Tangents of ops that are linear in each of two tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def add(*parts: Tensor | None) -> Tensor | None:
    """Return the sum of the parts that aren't None, or None if all are."""
    given = [part for part in parts if part is not None]
    return sum(given[1:], given[0]) if given else None


def bilinear(op: Callable[..., Any]) -> tuple[Any, Any]:
    """Return ``setup_context`` and ``jvp`` of an op that is linear in its first and in its second tensor.

    The op's other arguments are tensors without a derivative, or None.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    def jvp(ctx: Any, x_t: Tensor | None, y_t: Tensor | None, *_: None) -> Tensor | None:
        x, y, *others = ctx.saved_tensors
        return add(
            None if x_t is None else op(x_t, y, *others),
            None if y_t is None else op(x, y_t, *others),
        )

    return staticmethod(setup_context), staticmethod(jvp)
