"""The specs of `custom_ops.shaping.scaling`: references, samples and wrong calls."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.registry import BadCall, OpInfo, Sample, register
from custom_ops.shaping.scaling import GradientScaling, ReverseGradient, ScaleGradient, reverse_gradient, scale_gradient
from custom_ops.shaping.specs._common import NOT_FUZZED, OF_SHAPING, VIEW, integers, leaf, two


def scale_gradient_reference(x: Tensor, scale: float | Tensor) -> Tensor:
    return x.detach() + (x - x.detach()) * scale


def reverse_gradient_reference(x: Tensor, lambda_: float | Tensor = 1.0) -> Tensor:
    return scale_gradient_reference(x, -lambda_)


def _scale_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    x, rows = leaf(device, dtype, 3, 7), leaf(device, dtype, 7, seed=1).detach()
    channels_last = leaf(device, dtype, 2, 3, 4, 2).detach().to(memory_format=torch.channels_last).requires_grad_()
    return [
        Sample((x, -0.5), dynamic={0: 0}),
        Sample((x, rows), dynamic={0: 0}),
        Sample((x, x.detach() * 2), dynamic={0: 0, 1: 0}),
        Sample((leaf(device, dtype), 3)),
        Sample((leaf(device, dtype, 0, 4), 2.0)),
        Sample((channels_last, rows[:3].view(3, 1, 1))),
    ]


register(
    OpInfo(
        name="scale_gradient",
        summary="The identity, whose gradient is scaled",
        function=scale_gradient,
        not_fuzzed=NOT_FUZZED,
        reference=scale_gradient_reference,
        apply=GradientScaling.apply,
        samples=_scale_samples,
        modules=lambda: [(ScaleGradient(2.0), {"scale": 2.0})],
        bad_calls=lambda: [
            BadCall(([1.0], 2.0), "x: expected a tensor, got list"),
            BadCall((integers, 2.0), "x: expected one of float16, .* got int64"),
            BadCall((two, "2"), "scale: expected a number, got str"),
            BadCall((two, integers), "scale: expected one of float16, .* got int64"),
            BadCall((two, torch.ones(3)), r"scale: expected a shape that broadcasts to \[2\], got \[3\]"),
            BadCall((two, torch.ones(2, 2)), r"scale: expected a shape that broadcasts to \[2\], got \[2, 2\]"),
            BadCall((two, two.to("meta")), "scale: expected on cpu as x, got meta"),
        ],
        not_applicable=VIEW,
        not_comparable=OF_SHAPING,
    )
)

register(
    OpInfo(
        name="reverse_gradient",
        summary="The identity, whose gradient is reversed",
        function=reverse_gradient,
        not_fuzzed=NOT_FUZZED,
        reference=reverse_gradient_reference,
        samples=lambda device, dtype: [
            Sample((leaf(device, dtype, 3, 7),), dynamic={0: 0}),
            Sample((leaf(device, dtype, 3, 7), leaf(device, dtype, 3, 1, seed=1).detach())),
            Sample((leaf(device, dtype), 0.5)),
            Sample((leaf(device, dtype, 0, 4),)),
        ],
        modules=lambda: [(ReverseGradient(), {}), (ReverseGradient(0.5), {"lambda_": 0.5})],
        bad_calls=lambda: [
            BadCall(([1.0],), "x: expected a tensor, got list"),
            BadCall((two, "1"), "lambda_: expected a number, got str"),
            BadCall((two, integers), "lambda_: expected one of float16, .* got int64"),
        ],
        not_applicable=VIEW,
        not_comparable=OF_SHAPING,
    )
)
