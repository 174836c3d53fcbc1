"""The specs of `custom_ops.shaping.estimator`: references, samples and wrong calls."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.registry import BadCall, OpInfo, Sample, register
from custom_ops.shaping.estimator import StraightThrough, StraightThroughEstimator, straight_through
from custom_ops.shaping.specs._common import NOT_FUZZED, OF_SHAPING, VIEW, integers, leaf, two


def straight_through_reference(forward_value: Tensor, x: Tensor) -> Tensor:
    return forward_value.detach() + (x - x.detach())


def _straight_through_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    x = leaf(device, dtype, 3, 7)
    return [
        Sample((x.detach().round(), x), dynamic={0: 0, 1: 0}),
        Sample((torch.zeros((), device=device, dtype=dtype), leaf(device, dtype))),
        Sample((torch.zeros(0, 4, device=device, dtype=dtype), leaf(device, dtype, 0, 4))),
    ]


register(
    OpInfo(
        name="straight_through",
        summary="A value, whose gradient goes to what it was made of",
        function=straight_through,
        not_fuzzed=NOT_FUZZED,
        reference=straight_through_reference,
        apply=StraightThroughEstimator.apply,
        samples=_straight_through_samples,
        modules=lambda: [(StraightThrough(), {})],
        bad_calls=lambda: [
            BadCall((two, [1.0]), "x: expected a tensor, got list"),
            BadCall((integers, two), "forward_value: expected one of float32, got int64"),
            BadCall((torch.ones(3), two), r"forward_value: expected the shape of x, \[2\], got \[3\]"),
            BadCall((two.to("meta"), two), "forward_value: expected on cpu as x, got meta"),
        ],
        not_applicable=VIEW,
        not_comparable=OF_SHAPING,
    )
)
