"""Tables of gradient shaping, each op beside the usual code: a hook or an autograd.Function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.table import Benchmark, Target
from custom_ops.registry import REGISTRY


def _beside_hook(hook: Callable[..., Tensor], *parameters: Any, reads: int = 1) -> list[Benchmark]:
    """Return the tables of an op beside ``hook(grad, *parameters)`` on a view of x; backward makes ``reads`` reads."""

    def run(x: Tensor, *parameters: Any) -> Tensor:
        y = x.view_as(x)
        y.register_hook(lambda grad: hook(grad, *parameters))
        return y

    return [
        Benchmark(
            unit="elements",
            sizes=(1 << 20, 1 << 24),
            make=lambda n, device: (torch.randn(n, device=device, requires_grad=True), *parameters),
            peers={"tensor hook": run},
            traffic=lambda n: ((0, 0), (reads * 4 * n, 4 * n)),
        )
    ]


def _clipped(grad: Tensor, max_norm: float) -> Tensor:
    return grad * (max_norm / grad.norm()).clamp_max(1)


TABLES: dict[str, list[Benchmark]] = {
    "clip_gradient": _beside_hook(torch.clamp, -1.0, 0.5),
    "clip_gradient_norm": _beside_hook(_clipped, 4.0, reads=2),
    "straight_through": [
        Benchmark(
            unit="elements",
            sizes=(1 << 20, 1 << 24),
            make=lambda n, device: (
                torch.ones(n, device=device),
                torch.randn(n, device=device, requires_grad=True),
            ),
            peers={"plain PyTorch": REGISTRY["straight_through"].reference},
            traffic=lambda n: ((0, 0), (0, 0)),
        )
    ],
    "scale_gradient": _beside_hook(torch.mul, 0.5),
    "reverse_gradient": _beside_hook(torch.neg),
    "surrogate_gradient": [
        Benchmark(
            unit="elements",
            sizes=(1 << 16, 1 << 20, 1 << 24),
            make=lambda n, device: (torch.randn(n, device=device, requires_grad=True),),
            peers={"autograd.Function": "benchmarks.peers:surrogate_gradient_function"},
            targets=[
                Target(1 << 20, "autograd.Function", 1.0),
                Target(1 << 24, "autograd.Function", 0.5),
            ],
        )
    ],
}
NATIVE: dict[str, Callable[..., Any]] = {
    "clip_gradient": torch.clamp,
    "clip_gradient_norm": lambda x, max_norm, dim: torch.renorm(x, 2, dim, max_norm),
    "straight_through": torch.add,
    "scale_gradient": torch.mul,
    "reverse_gradient": torch.neg,
    "surrogate_gradient": lambda x, shape: torch.sigmoid(x),
}
