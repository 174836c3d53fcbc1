"""Gradient shaping: ops that leave a value as it is and change its gradient in backward.

Four of the ops are the identity and return a view, so the forward pass copies nothing. These rules hold for each:

* The first derivative is the one stated, not that of the value.
* Second and further derivatives are those of the backward computation, whose graph contains the op again, so
  every pass through the op shapes the gradient.
* The tangent of forward mode makes ``jvp`` the transpose of ``vjp``: the same linear map, applied from the other
  side. Only clipping isn't linear and so has no transpose: a tangent passes unclipped.
"""

from custom_ops.shaping.clipping import (
    ClipGradient,
    ClipGradientFunction,
    ClipGradientNorm,
    ClipGradientNormFunction,
    clip_gradient,
    clip_gradient_norm,
)
from custom_ops.shaping.estimator import (
    StraightThrough,
    StraightThroughFunction,
    straight_through,
)
from custom_ops.shaping.scaling import (
    ReverseGradient,
    ScaleGradient,
    ScaleGradientFunction,
    reverse_gradient,
    scale_gradient,
)
from custom_ops.shaping.surrogate import (
    SurrogateGradient,
    SurrogateGradientFunction,
    surrogate_gradient,
)

__all__ = [
    "ClipGradient",
    "ClipGradientFunction",
    "ClipGradientNorm",
    "ClipGradientNormFunction",
    "ReverseGradient",
    "ScaleGradient",
    "ScaleGradientFunction",
    "StraightThrough",
    "StraightThroughFunction",
    "SurrogateGradient",
    "SurrogateGradientFunction",
    "clip_gradient",
    "clip_gradient_norm",
    "reverse_gradient",
    "scale_gradient",
    "straight_through",
    "surrogate_gradient",
]

# These are former names.
GradientClipping = ClipGradientFunction
GradientNormClipping = ClipGradientNormFunction
GradientScaling = ScaleGradientFunction
StraightThroughEstimator = StraightThroughFunction
SurrogateStep = SurrogateGradientFunction
