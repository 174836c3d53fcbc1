"""The comparison of an op's answer and gradients with those of the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from custom_ops.registry import leaves

# A tolerance is relative to the largest element: the rounding of the inputs' dtype, with room for the order of
# summation.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


class Answer:
    """The tensors that a call returns, and the gradients that ``grad`` of its main output gives."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], grad: Tensor | None) -> None:
        self.values = [t for t in tree_leaves(function(*args)) if isinstance(t, Tensor)]
        self.gradients: list[Tensor] = []
        if grad is not None:
            inputs = leaves(args)
            found = torch.autograd.grad(first(self.values), inputs, grad, allow_unused=True)
            self.gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found)]


def first(values: Any) -> Tensor:
    """Return the output to differentiate: the first that requires a gradient, else the first."""
    tensors = [t for t in tree_leaves(values) if isinstance(t, Tensor)]
    return next((t for t in tensors if t.requires_grad), tensors[0])


def in_double(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        a.detach().double().requires_grad_(a.requires_grad) if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in args
    )


def tolerance(args: tuple[Any, ...]) -> float:
    return max((TOLERANCE[a.dtype] for a in args if isinstance(a, Tensor) and a.is_floating_point()), default=1e-9)


def difference(got: Answer, truth: Answer, tolerance: float, main_only: bool = False) -> str:
    """Return how two answers differ, in words ("" if they agree); ``main_only`` compares one output and the
    gradients.
    """
    values = [(first(got.values), first(truth.values))] if main_only else list(zip(got.values, truth.values))
    if not main_only and len(got.values) != len(truth.values):
        return f"{len(got.values)} outputs, not {len(truth.values)}"
    named = [("output", *pair) for pair in values]
    named += [("gradient", *pair) for pair in zip(got.gradients, truth.gradients)]
    for name, mine, theirs in named:
        wrong = _difference(mine, theirs, tolerance)
        if wrong:
            return f"{name}: {wrong}"
    return ""


def _difference(got: Tensor, truth: Tensor, tolerance: float) -> str:
    if got.shape != truth.shape:
        return f"shape {list(got.shape)}, not {list(truth.shape)}"
    if not truth.is_floating_point():
        unequal = int((got != truth).sum())
        return f"{unequal} of {got.numel()} elements differ" if unequal else ""
    got, truth = got.detach().double(), truth.detach().double()
    scale = float(truth.nan_to_num(0, 0, 0).abs().max()) if truth.numel() else 0.0
    close = torch.isclose(got, truth, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
    wrong = got.numel() - int(close.sum())
    # Within rounding of a kink, either slope is right. About one in ten million random elements lies there.
    if wrong <= got.numel() // 1_000_000:
        return ""
    worst = float((got - truth).abs().nan_to_num(float("inf")).max())
    return f"{wrong} of {got.numel()} elements are off by up to {worst:.2g}, the largest being {scale:.2g}"
