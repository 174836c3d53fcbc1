"""The specs of `custom_ops.shaping.surrogate`: references, samples and wrong calls."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from custom_ops.registry import BadCall, OpInfo, Sample, register
from custom_ops.shaping.specs._common import NOT_FUZZED, OF_SHAPING, integers, leaf, two
from custom_ops.shaping.surrogate import _SHAPES, SurrogateGradient, SurrogateStep, surrogate_gradient


def surrogate_gradient_reference(x: Tensor, shape: str = "sigmoid", width: float = 1.0) -> Tensor:
    u = x / width
    inner = torch.where(u.abs() < 1, u, u.detach().clamp(-1, 1))  # at 1 the slope is that beyond 1
    smooth = {
        "sigmoid": u.sigmoid(),
        "atan": u.atan() / math.pi,
        "triangle": inner - inner * inner.abs() / 2,
        "boxcar": inner / 2,
    }[shape]
    return (x >= 0).to(x.dtype) + (smooth - smooth.detach())


def _surrogate_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    return [
        *(Sample((leaf(device, dtype, 3, 7), shape), dynamic={0: 0}) for shape in _SHAPES),
        Sample((leaf(device, dtype, 17),), {"width": 0.5}),
        Sample((leaf(device, dtype), "atan", 2)),
        Sample((leaf(device, dtype, 0, 4), "boxcar")),
    ]


register(
    OpInfo(
        name="surrogate_gradient",
        summary="A step that is differentiated as a smooth one",
        function=surrogate_gradient,
        not_fuzzed=NOT_FUZZED,
        reference=surrogate_gradient_reference,
        apply=SurrogateStep.apply,
        samples=_surrogate_samples,
        modules=lambda: [
            (SurrogateGradient(), {}),
            (SurrogateGradient("atan", 0.5), {"shape": "atan", "width": 0.5}),
        ],
        bad_calls=lambda: [
            BadCall(([1.0],), "x: expected a tensor, got list"),
            BadCall((integers,), "x: expected one of float16, .* got int64"),
            BadCall((two, "step"), "shape: expected one of 'sigmoid', 'atan', 'triangle', 'boxcar', got 'step'"),
            BadCall((two, "atan", "1"), "width: expected a number, got str"),
            BadCall((two, "atan", 0.0), "width: expected above 0, got 0.0"),
        ],
        not_comparable=OF_SHAPING,
    )
)
