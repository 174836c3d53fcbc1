"""The specs of `custom_ops.shaping.clipping`: references, samples and wrong calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from custom_ops.registry import BadCall, OpInfo, Sample, Sharding, register
from custom_ops.shaping.clipping import (
    ClipGradient,
    ClipGradientNorm,
    GradientClipping,
    GradientNormClipping,
    clip_gradient,
    clip_gradient_norm,
)
from custom_ops.shaping.specs._common import OF_SHAPING, VIEW, leaf, two


class _Clipped(torch.autograd.Function):
    """The reference needs a Function: clipping isn't linear in the gradient, so no composition of functions has it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, clip: Any) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.clip = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.clip(grad), None


def clip_gradient_reference(x: Tensor, min: float | None = None, max: float | None = None) -> Tensor:
    low, high = -math.inf if min is None else min, math.inf if max is None else max
    return _Clipped.apply(x, lambda g: torch.where(g < low, low, torch.where(g > high, high, g)))


def clip_gradient_norm_reference(x: Tensor, max_norm: float, dim: int | Sequence[int] | None = None) -> Tensor:
    def clip(grad: Tensor) -> Tensor:
        over = list(range(grad.dim())) if dim is None else [dim] if isinstance(dim, int) else list(dim)
        norm = grad.square().sum(over, keepdim=True).sqrt()
        return torch.where(norm > max_norm, max_norm * grad / norm, grad)

    return _Clipped.apply(x, clip)


def _clip_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    # The rows of a Jacobian come from gradients of 1, which pass these limits; random gradients are clipped.
    x = leaf(device, dtype, 3, 7)
    return [
        Sample((x, -0.5, 1.25), dynamic={0: 0}),
        Sample((x, None, 1.1), dynamic={0: 0}),
        Sample((x,), {"min": -0.25}, dynamic={0: 0}),
        Sample((leaf(device, dtype), -1, 1.5)),
        Sample((leaf(device, dtype, 0, 4), -1.0, 1.0)),
    ]


def _norm_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    x = leaf(device, dtype, 3, 7)
    return [
        Sample((x, 1.25, 1), dynamic={0: 0}),
        # a vector parallel to the gradient has derivative 0, which the varied elements avoid
        Sample((x, 3.5), dynamic={0: 0}),
        Sample((leaf(device, dtype, 2, 3, 4), 1.5, (0, -1))),
        Sample((leaf(device, dtype), 1.25)),
        Sample((leaf(device, dtype, 0, 4), 1.0)),
    ]


_BY_MODE = "by design a tangent passes unclipped, so the modes differ: tests/test_shaping.py has the closed forms"

_OF_CLIPPING = {**OF_SHAPING, "func.hessian": _BY_MODE, "forward over forward": _BY_MODE}

register(
    OpInfo(
        name="clip_gradient",
        summary="The identity, whose gradient is clamped",
        function=clip_gradient,
        reference=clip_gradient_reference,
        apply=GradientClipping.apply,
        samples=_clip_samples,
        modules=lambda: [(ClipGradient(-1, 0.5), {"min": -1, "max": 0.5}), (ClipGradient(max=1.0), {"max": 1.0})],
        bad_calls=lambda: [
            BadCall(([1.0], 0.0), "x: expected a tensor, got list"),
            BadCall((two, "0"), "min: expected a number, got str"),
            BadCall((two, 0.0, True), "max: expected a number, got bool"),
            BadCall((two,), "min, max: expected at least one limit, got None for both"),
            BadCall((two, 1.0, 0.5), "min: expected at most max = 0.5, got 1.0"),
        ],
        not_applicable=VIEW,
        not_comparable=_OF_CLIPPING,
    )
)

register(
    OpInfo(
        name="clip_gradient_norm",
        summary="The identity, whose gradient's norms are clipped",
        function=clip_gradient_norm,
        reference=clip_gradient_norm_reference,
        apply=GradientNormClipping.apply,
        samples=_norm_samples,
        shardings=lambda: [
            Sharding("rows", Sample((torch.randn(5, 3, requires_grad=True), 1.0, 1)), {0: 0}, 0),
            # Two sums of squares run over all rows: that of the gradient, and that for the factor.
            Sharding(
                "what the norm is of",
                Sample((torch.randn(5, 3, requires_grad=True), 1.0)),
                {0: 0},
                0,
                {"all_reduce": 2},
            ),
        ],
        modules=lambda: [
            (ClipGradientNorm(1.0), {"max_norm": 1.0}),
            (ClipGradientNorm(0.5, (0,)), {"max_norm": 0.5, "dim": (0,)}),
        ],
        bad_calls=lambda: [
            BadCall(([1.0], 1.0), "x: expected a tensor, got list"),
            BadCall((two, None), "max_norm: expected a number, got NoneType"),
            BadCall((two, -1.0), "max_norm: expected at least 0, got -1.0"),
            BadCall((two, 1.0, 1.5), "dim: expected an integer or several, got float"),
            BadCall((two, 1.0, False), "dim: expected an integer or several, got bool"),
            BadCall((two, 1.0, 1), "dim: expected within 1 dimensions, got 1"),
            BadCall((two, 1.0, (0, -1)), r"dim: expected different dimensions, got \(0, -1\)"),
            BadCall((two, 1.0, ()), "dim: expected at least one dimension, got none"),
        ],
        not_applicable=VIEW,
        not_comparable=_OF_CLIPPING,
    )
)
