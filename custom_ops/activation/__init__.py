"""One-bit activations."""

from custom_ops.activation import conversion, dropout, piecewise, squared
from custom_ops.activation.conversion import *  # noqa: F403
from custom_ops.activation.dropout import *  # noqa: F403
from custom_ops.activation.piecewise import *  # noqa: F403
from custom_ops.activation.squared import *  # noqa: F403

__all__: list[str] = []
__all__ += conversion.__all__
__all__ += dropout.__all__
__all__ += piecewise.__all__
__all__ += squared.__all__
