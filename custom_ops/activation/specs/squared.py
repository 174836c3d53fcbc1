"""The specs of `custom_ops.activation.squared`: references, samples and wrong calls."""

from __future__ import annotations

from torch import Tensor

from custom_ops.activation.specs._common import not_a_tensor, unary_samples
from custom_ops.activation.squared import SquaredReLU, squared_relu
from custom_ops.registry import OpInfo, register


def squared_relu_reference(x: Tensor) -> Tensor:
    return x.clamp_min(0) ** 2


register(
    OpInfo(
        name="squared_relu",
        summary="Squared ReLU in one pass",
        function=squared_relu,
        reference=squared_relu_reference,
        samples=unary_samples(0.0),
        modules=lambda: [(SquaredReLU(), {})],
        bad_calls=not_a_tensor,
    )
)
