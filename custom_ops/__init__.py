"""PyTorch custom ops that compose with all of PyTorch and whose every derivative is verified."""

from custom_ops import (
    _requirements,  # noqa: F401 (first: checks torch)
    activation,
    ranking,
    shaping,
    voxel,
)
from custom_ops.activation import *  # noqa: F403
from custom_ops.ranking import *  # noqa: F403
from custom_ops.shaping import *  # noqa: F403
from custom_ops.voxel import *  # noqa: F403

# These are former names.
MarginRanking = ranking.MarginRanking
GradientClipping = shaping.GradientClipping
GradientNormClipping = shaping.GradientNormClipping
GradientScaling = shaping.GradientScaling
StraightThroughEstimator = shaping.StraightThroughEstimator
SurrogateStep = shaping.SurrogateStep

__version__ = "0.1.0"

__all__: list[str] = []
__all__ += activation.__all__
__all__ += ranking.__all__
__all__ += shaping.__all__
__all__ += voxel.__all__
