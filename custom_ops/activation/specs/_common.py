"""Samples and wrong calls that the activations share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops.registry import BadCall, Sample


def away_from(kinks: tuple[float, ...], *shape: int) -> Tensor:
    """Return normal numbers, none of them near a kink."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for kink in kinks:
        x = torch.where((x - kink).abs() < 0.1, x + 0.25, x)
    return x


def unary_samples(*kinks: float, parameters: tuple[Any, ...] = (), others: tuple[Any, ...] | None = None) -> Any:
    """Return samples of an elementwise f(x, *parameters), one of them with the parameters ``others``."""

    def samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
        def x(*shape: int) -> Tensor:
            return away_from(kinks, *shape).to(device, dtype).requires_grad_()

        channels_last = x(2, 3, 4, 5).detach().to(memory_format=torch.channels_last).requires_grad_()
        return [
            Sample((x(3, 7), *parameters), dynamic={0: 0}),
            Sample((x(), *parameters)),
            Sample((x(0, 4), *parameters)),
            Sample((x(37), *(parameters if others is None else others))),
            Sample((channels_last, *parameters)),
        ]

    return samples


def not_a_tensor(*parameters: Any) -> list[BadCall]:
    return [
        BadCall(([1.0], *parameters), "x: expected a tensor, got list"),
        BadCall((torch.ones(2, dtype=torch.int64), *parameters), "x: expected one of float16, .* got int64"),
    ]
