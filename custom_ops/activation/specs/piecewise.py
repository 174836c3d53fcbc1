"""The specs of `custom_ops.activation.piecewise`: references, samples and wrong calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops.activation.piecewise import (
    CustomReLU,
    Hardtanh,
    LeakyReLU,
    ReLU,
    ReLU6,
    Threshold,
    bias_leaky_relu,
    bias_relu,
    hardtanh,
    leaky_relu,
    relu,
    relu6,
    threshold,
)
from custom_ops.activation.specs._common import away_from, not_a_tensor, unary_samples
from custom_ops.registry import BadCall, OpInfo, Sample, register


def relu_reference(x: Tensor, inplace: bool = False) -> Tensor:
    return torch.where(x <= 0, torch.zeros_like(x), x)


def leaky_relu_reference(x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    return torch.where(x > 0, x, negative_slope * x)


def hardtanh_reference(x: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    return torch.where(x <= min_val, min_val, torch.where(x >= max_val, max_val, x))


def relu6_reference(x: Tensor, inplace: bool = False) -> Tensor:
    return hardtanh_reference(x, 0.0, 6.0)


def threshold_reference(x: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    return torch.where(x <= threshold, value, x)


def _with_bias(x: Tensor, bias: Tensor, dim: int) -> Tensor:
    return x + bias.reshape(-1, *[1] * (x.dim() - 1 - dim % x.dim()))


def bias_relu_reference(x: Tensor, bias: Tensor, dim: int = 1, inplace: bool = False) -> Tensor:
    return relu_reference(_with_bias(x, bias, dim))


def bias_leaky_relu_reference(
    x: Tensor, bias: Tensor, negative_slope: float = 0.01, dim: int = 1, inplace: bool = False
) -> Tensor:
    return leaky_relu_reference(_with_bias(x, bias, dim), negative_slope)


def _bias_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    def make(dim: int, *shape: int) -> tuple[Tensor, Tensor]:
        bias = torch.linspace(-1, 1, shape[dim], dtype=torch.float64)
        x = _with_bias(away_from((0.0,), *shape), -bias, dim)
        return x.to(device, dtype).requires_grad_(), bias.to(device, dtype).requires_grad_()

    x, bias = make(1, 2, 3, 2, 5)
    channels_last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    return [
        Sample(make(1, 3, 7), dynamic={0: 0}),
        Sample((x, bias)),
        Sample((channels_last, bias)),
        Sample(make(-1, 2, 3, 5), {"dim": -1}),
        Sample(make(0, 4), {"dim": 0}),
        Sample(make(1, 0, 3)),
    ]


def _unary(
    name: str,
    summary: str,
    function: Any,
    reference: Any,
    kinks: tuple[float, ...],
    parameters: tuple[Any, ...] = (),
    variant: tuple[Any, ...] | None = None,
    **info: Any,
) -> None:
    """Register f(x, *parameters), which torch.nn.functional has under the same name."""
    register(
        OpInfo(
            name=name,
            summary=summary,
            function=function,
            reference=reference,
            samples=unary_samples(*kinks, parameters=parameters, variant=variant),
            **info,
        )
    )


_x = torch.ones(2, 3)

_unary(
    "relu",
    "ReLU that keeps one bit per element for backward",
    relu,
    relu_reference,
    kinks=(0.0,),
    apply=CustomReLU.apply,
    modules=lambda: [(ReLU(), {})],
    bad_calls=lambda: [
        *not_a_tensor(),
        BadCall((_x.clone().requires_grad_(), True), "leaf Variable that requires grad"),
        BadCall((_x, 1), "inplace: expected True or False, got 1"),
        BadCall((_x[:1].expand(2, 3), True), r"x: expected elements with memory of their own .* strides \[0, 1\]"),
    ],
)

_unary(
    "leaky_relu",
    "Leaky ReLU that keeps one bit per element for backward",
    leaky_relu,
    leaky_relu_reference,
    kinks=(0.0,),
    parameters=(0.1,),
    variant=(-0.5,),
    modules=lambda: [(LeakyReLU(), {}), (LeakyReLU(0.3), {"negative_slope": 0.3})],
    bad_calls=lambda: [*not_a_tensor(), BadCall((_x, "steep"), "negative_slope: expected a number, got str")],
)

_unary(
    "hardtanh",
    "Clamp that keeps one bit per element for backward",
    hardtanh,
    hardtanh_reference,
    kinks=(-0.5, 0.75),
    parameters=(-0.5, 0.75),
    modules=lambda: [(Hardtanh(), {}), (Hardtanh(-2.0, 0.5), {"min_val": -2.0, "max_val": 0.5})],
    bad_calls=lambda: [
        *not_a_tensor(),
        BadCall((_x, 1.0, -1.0), "min_val: expected at most max_val, got 1.0 and -1.0"),
        BadCall((_x, float("nan")), "min_val: expected a number, got nan"),
        BadCall((_x, -1.0, None), "max_val: expected a number, got NoneType"),
    ],
)

_unary(
    "relu6",
    "ReLU6 that keeps one bit per element for backward",
    relu6,
    relu6_reference,
    kinks=(0.0, 6.0),
    modules=lambda: [(ReLU6(), {})],
    bad_calls=not_a_tensor,
)

_unary(
    "threshold",
    "Threshold that keeps one bit per element for backward",
    threshold,
    threshold_reference,
    kinks=(0.5,),
    parameters=(0.5, -3.0),
    modules=lambda: [(Threshold(0.5, -3.0), {"threshold": 0.5, "value": -3.0})],
    bad_calls=lambda: [
        *not_a_tensor(0.0, 0.0),
        BadCall((_x, "0", 0.0), "threshold: expected a number, got str"),
        BadCall((_x, 0.0, None), "value: expected a number, got NoneType"),
    ],
)

_BAD_BIASES = [
    BadCall((1.0, _x), "x: expected a tensor, got float"),
    BadCall((_x, [1.0]), "bias: expected a tensor, got list"),
    BadCall((_x, torch.ones(3).double()), "bias: expected one of float32, got float64"),
    BadCall((_x, torch.ones(2)), "bias: expected 3 channels as in x, got 2"),
    BadCall((_x, torch.ones(1, 3)), r"bias: expected \[C\], got shape \[1, 3\]"),
    BadCall((_x, torch.ones(3, device="meta")), "bias: expected on cpu as x, got meta"),
    BadCall((_x, torch.ones(3)), "dim: expected a dimension of x", {"dim": 2}, IndexError),
    BadCall((_x, torch.ones(3)), "dim: expected an integer, got float", {"dim": 1.0}),
]

register(
    OpInfo(
        name="bias_relu",
        summary="ReLU of x + bias in one pass, one bit per element for backward",
        function=bias_relu,
        reference=bias_relu_reference,
        samples=_bias_samples,
        bad_calls=lambda: _BAD_BIASES,
    )
)

register(
    OpInfo(
        name="bias_leaky_relu",
        summary="Leaky ReLU of x + bias in one pass, one bit per element for backward",
        function=bias_leaky_relu,
        reference=bias_leaky_relu_reference,
        samples=_bias_samples,
        bad_calls=lambda: [
            *_BAD_BIASES,
            BadCall((_x, torch.ones(3), None), "negative_slope: expected a number, got NoneType"),
        ],
    )
)
