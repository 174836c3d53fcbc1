"""Activations that keep one bit per element for backward."""

from custom_ops.activation.conversion import Conversion, ConvertedActivation, convert_activations
from custom_ops.activation.dropout import ReLUDropout, relu_dropout
from custom_ops.activation.piecewise import (
    BiasLeakyReLU,
    BiasReLU,
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
from custom_ops.activation.squared import SquaredReLU, squared_relu

# The names are spelled out, as mypy can't follow `__all__ += module.__all__` through two levels and would see none of
# them.
__all__ = [
    "BiasLeakyReLU",
    "BiasReLU",
    "Conversion",
    "ConvertedActivation",
    "CustomReLU",
    "Hardtanh",
    "LeakyReLU",
    "ReLU",
    "ReLU6",
    "ReLUDropout",
    "SquaredReLU",
    "Threshold",
    "bias_leaky_relu",
    "bias_relu",
    "convert_activations",
    "hardtanh",
    "leaky_relu",
    "relu",
    "relu6",
    "relu_dropout",
    "squared_relu",
    "threshold",
]
