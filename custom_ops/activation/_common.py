"""What the activations share: samples and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from custom_ops.registry import BadCall, Benchmark, Sample, Target


def away_from(kinks: tuple[float, ...], *shape: int) -> Tensor:
    """Normal numbers, none of them near a kink."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for kink in kinks:
        x = torch.where((x - kink).abs() < 0.1, x + 0.25, x)
    return x


def unary_samples(*kinks: float, parameters: tuple[Any, ...] = (), variant: tuple[Any, ...] | None = None) -> Any:
    """Samples of f(x, *parameters), with another ``variant`` of the parameters on one of them."""

    def samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
        def x(*shape: int) -> Tensor:
            return away_from(kinks, *shape).to(device, dtype).requires_grad_()

        channels_last = x(2, 3, 4, 5).detach().to(memory_format=torch.channels_last).requires_grad_()
        return [
            Sample((x(3, 7), *parameters), dynamic={0: 0}),
            Sample((x(), *parameters)),
            Sample((x(0, 4), *parameters)),
            Sample((x(37), *(parameters if variant is None else variant))),
            Sample((channels_last, *parameters)),
        ]

    return samples


def not_a_tensor(*parameters: Any) -> list[BadCall]:
    return [
        BadCall(([1.0], *parameters), "x: expected a tensor, got list"),
        BadCall((torch.ones(2, dtype=torch.int64), *parameters), "x: expected one of float16, .* got int64"),
    ]


def vector(n: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.randn(n, device=device, dtype=dtype, requires_grad=True),)


def against(
    peer: str,
    function: Callable[..., Tensor],
    *parameters: Any,
    make: Callable[[int, torch.device, torch.dtype], tuple[Any, ...]] = vector,
    unit: str = "elements",
    elements: int = 1,
) -> list[Benchmark]:
    """The dtypes, sizes and targets of every activation; ``elements`` make up a ``unit``."""
    small, middle, large = ((1 << bits) // elements for bits in (16, 20, 24))

    def of(dtype: torch.dtype) -> Callable[[int, torch.device], tuple[Any, ...]]:
        return lambda n, device: (*make(n, device, dtype), *parameters)

    return [
        Benchmark(
            unit=f"{str(dtype).removeprefix('torch.')} {unit}",
            sizes=(small, middle, large),
            make=of(dtype),
            peers={peer: function},
            targets=[
                Target(middle, peer, 1.0),
                Target(large, peer, 0.5),
                Target(large, peer, 0.8, memory="warm"),
            ],
            scaling=() if elements == 1 else (1, 10, 100, 1000),
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]
