"""Tables of the activations, each beside torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.table import Benchmark, Target


def _vector(n: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.randn(n, device=device, dtype=dtype, requires_grad=True),)


def _against(
    peer: str,
    function: Callable[..., Tensor],
    *parameters: Any,
    make: Callable[[int, torch.device, torch.dtype], tuple[Any, ...]] = _vector,
    unit: str = "elements",
    elements: int = 1,
) -> list[Benchmark]:
    """Return the tables of an activation, one for each dtype; ``elements`` make up a ``unit``."""
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


def _against_sums(peer: str, activation: Any) -> list[Benchmark]:
    def images(n: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        shapes = (n, 64, 32, 32), (64,)
        return tuple(torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes)

    def of_sum(x: Tensor, bias: Tensor) -> Any:
        return activation(x + bias.view(-1, 1, 1))

    return _against(peer, of_sum, make=images, unit="images of 64 channels, 32 x 32", elements=64 * 32 * 32)


def _dropout_inputs(n: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    return (*_vector(n, device, dtype), 0.5, True, torch.ones((), dtype=torch.int64, device=device))


_PARAMETERS: dict[str, tuple[float, ...]] = {
    "relu": (),
    "leaky_relu": (0.1,),
    "hardtanh": (-0.5, 0.75),
    "relu6": (),
    "threshold": (0.5, -3.0),
}
TABLES: dict[str, list[Benchmark]] = {
    name: _against(f"F.{name}", getattr(F, name), *parameters) for name, parameters in _PARAMETERS.items()
} | {
    "bias_relu": _against_sums("torch: relu(x + bias)", torch.relu),
    "bias_leaky_relu": _against_sums("torch: leaky_relu(x + bias)", F.leaky_relu),
    "relu_dropout": _against(
        "torch: dropout(relu(x))",
        lambda x, p, training, _: F.dropout(torch.relu(x), p, training),
        make=_dropout_inputs,
    ),
    "squared_relu": _against("torch: relu(x) ** 2", lambda x: torch.relu(x) ** 2),
}
NATIVE: dict[str, Callable[..., Any]] = {name: getattr(F, name) for name in _PARAMETERS} | {
    "bias_relu": lambda x, bias: torch.relu(x + bias),
    "bias_leaky_relu": lambda x, bias: F.leaky_relu(x + bias),
    "relu_dropout": lambda x, p, training: F.dropout(torch.relu(x), p, training),
    "squared_relu": lambda x: torch.relu(x) ** 2,
}
