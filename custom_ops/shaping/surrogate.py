"""A step function that is differentiated as a smooth step, for spiking networks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from custom_ops import _checks, library
from custom_ops._bilinear import add
from custom_ops._enums import SurrogateShape
from custom_ops._layout import as_it_lies
from custom_ops._leaf import leaf
from custom_ops._native import define
from custom_ops._wide import wide
from custom_ops.library import Function

_SHAPES = SurrogateShape.options()


@define
def surrogate_slope(grad: Tensor, x: Tensor, shape: int, width: float) -> Tensor:
    """Return ``grad`` times the slope at x of the smooth step numbered ``shape``, contiguous."""
    return x.new_empty(x.shape)


@define
def surrogate_step(x: Tensor, shape: int, width: float) -> Tensor:
    """Return 1 where x >= 0, else 0, contiguous; it is differentiated as the smooth step numbered ``shape``."""
    return x.new_empty(x.shape)


class SurrogateGradientFunction(Function, op=surrogate_step):
    """``SurrogateGradientFunction.apply(x, shape, width)`` is `surrogate_gradient`, as a ``torch.autograd.Function``.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.tensor([-0.5, 0.0], requires_grad=True)
        >>> custom_ops.SurrogateGradientFunction.apply(x, "triangle", 1.0).sum().backward()
        >>> x.grad
        tensor([0.5000, 1.0000])
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.shape, ctx.width = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return SurrogateSlope.apply(grad, *ctx.saved_tensors, ctx.shape, ctx.width), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return surrogate_slope(tangent, *ctx.saved_tensors, ctx.shape, ctx.width)

    @staticmethod
    def apply(*args: Any, **kwargs: Any) -> Tensor:
        return surrogate_gradient(*args, **kwargs)


class SurrogateSlope(Function, op=surrogate_slope):
    """The op is linear in grad. Its derivative with respect to x uses torch's ops, so higher derivatives exist too."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, x, ctx.shape, ctx.width = inputs
        ctx.save_for_backward(grad, x)
        ctx.save_for_forward(grad, x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        grad, x = ctx.saved_tensors
        of_grad = surrogate_slope(cotangent, x, ctx.shape, ctx.width) if ctx.needs_input_grad[0] else None
        of_x = _bent(cotangent, grad, x, ctx.shape, ctx.width) if ctx.needs_input_grad[1] else None
        return of_grad, of_x, None, None

    @staticmethod
    def jvp(ctx: Any, grad_tangent: Tensor | None, x_tangent: Tensor | None, *_: None) -> Tensor | None:
        grad, x = ctx.saved_tensors
        return add(
            None if grad_tangent is None else surrogate_slope(grad_tangent, x, ctx.shape, ctx.width),
            None if x_tangent is None else _bent(x_tangent, grad, x, ctx.shape, ctx.width),
        )


def _bent(v: Tensor, grad: Tensor, x: Tensor, shape: int, width: float) -> Tensor:
    """Return ``v`` times ``grad`` times the derivative of the slope, rounded once."""
    u = wide(x) / width
    if shape == SurrogateShape.SIGMOID:
        s, rest = u.sigmoid(), (-u).sigmoid()
        value = s * rest * (rest - s)
    elif shape == SurrogateShape.ATAN:
        value = -2 / math.pi * u / (1 + u * u) ** 2
    elif shape == SurrogateShape.TRIANGLE:
        value = torch.where(u.abs() < 1, -u.sign(), 0.0)
    else:
        value = torch.zeros_like(u)
    return (wide(v) * wide(grad) * value / width**2).to(x.dtype)


@library.inductor(surrogate_step)
def _(x: Tensor, shape: int, width: float) -> Tensor:
    return torch.where(x >= 0, 1.0, 0.0).to(x.dtype).contiguous()


@library.inductor(surrogate_slope)
def _(grad: Tensor, x: Tensor, shape: int, width: float) -> Tensor:
    u = wide(x) / width
    if shape == SurrogateShape.SIGMOID:
        s = torch.sigmoid(-u.abs())
        slope = s * (1 - s)
    elif shape == SurrogateShape.ATAN:
        slope = 1 / (math.pi * (1 + u * u))
    elif shape == SurrogateShape.TRIANGLE:
        slope = (1 - u.abs()).clamp_min(0)
    else:
        slope = torch.where(u.abs() < 1, 0.5, torch.zeros_like(u))
    return (grad * (slope / width)).to(x.dtype).contiguous()


@library.vmap(surrogate_step)
def _(info: Any, in_dims: Any, x: Tensor, shape: int, width: float) -> Any:
    return surrogate_step(x, shape, width), in_dims[0]


@library.vmap(surrogate_slope)
def _(info: Any, in_dims: Any, grad: Tensor, x: Tensor, shape: int, width: float) -> Any:
    grad, x = (library.to_front(t, d, info.batch_size) for t, d in zip((grad, x), in_dims))
    return surrogate_slope(grad, x, shape, width), 0


@library.sharding(surrogate_step)
@library.sharding(surrogate_slope)
def _(*args: Any) -> Any:
    from torch.distributed.tensor import Replicate, Shard

    *tensors, _, _ = args
    placements = (Replicate(), *(Shard(d) for d in range(tensors[0].ndim)))
    return [([p], [*[p] * len(tensors), None, None]) for p in placements]


@leaf
def surrogate_gradient(x: Tensor, shape: str = "sigmoid", width: float = 1.0) -> Tensor:
    """Return a spike, 1 where ``x >= 0`` and else 0, whose derivative is that of a smooth step.

    ``dL/dx = dL/dy * slope(x / width) / width``, where the slope at u is one of these:

    * "sigmoid": ``s (1 - s)`` with ``s = 1 / (1 + exp(-u))``, the slope of the logistic function;
    * "atan": ``1 / (pi (1 + u^2))``, that of the arc tangent, with the longest reach;
    * "triangle": ``max(0, 1 - |u|)``;
    * "boxcar": 1/2 where ``|u| < 1``, else 0.

    Each slope integrates to 1, so it belongs to a step from 0 to 1 that is ``width`` wide. The tangent has the same
    slope, ``dy = slope dx``; second and higher derivatives are those of the slope. So all derivatives agree with those
    of the smooth step, and only the value differs. (The derivative of "triangle" jumps, that of "boxcar" is 0.)

    Args:
        x: any shape and strides; float16, bfloat16, float32 or float64; a neuron's potential above its threshold.
        shape: "sigmoid", "atan", "triangle" or "boxcar".
        width: the width of the smooth step, above 0. A narrow step has a large slope: at most 1 / (4 width) for
            "sigmoid", then 1 / (pi width), 1 / width and 1 / (2 width).

    Returns:
        Zeros and ones in the dtype of ``x``; NaN gives 0, as in ``torch.heaviside``.

    Raises:
        TypeError: ``x`` isn't a tensor or has another dtype, or ``width`` isn't a number.
        ValueError: an unknown ``shape``, ``width`` not above 0.

    The op takes O(n) time; it keeps ``x`` for backward, which is one pass.

    Source: Neftci et al., "Surrogate Gradient Learning in Spiking Neural Networks", 2019.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.tensor([-2.0, -0.5, 0.0, 0.5], requires_grad=True)
        >>> y = custom_ops.surrogate_gradient(x, "triangle")
        >>> y.sum().backward()
        >>> y.detach(), x.grad
        (tensor([0., 0., 1., 1.]), tensor([0.0000, 0.5000, 1.0000, 0.5000]))
    """
    _checks.has_dtype("x", x, _checks.FLOATING)
    width = _step_width(shape, width)
    return as_it_lies(x, lambda rows, _: surrogate_step(rows, _SHAPES[shape], width))


def _step_width(shape: Any, width: Any) -> float:
    _checks.is_one_of("shape", shape, _SHAPES)
    number = _checks.as_float("width", width)
    if not number > 0:
        raise ValueError(f"width: expected above 0, got {width}")
    return number


class SurrogateGradient(torch.nn.Module):
    """Apply `surrogate_gradient` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.tensor([-1.0, 0.0], requires_grad=True)
        >>> spikes = custom_ops.SurrogateGradient("triangle")(x)
        >>> spikes.sum().backward()
        >>> spikes.detach(), x.grad
        (tensor([0., 1.]), tensor([0., 1.]))
    """

    def __init__(self, shape: str = "sigmoid", width: float = 1.0) -> None:
        super().__init__()
        self.shape, self.width = shape, _step_width(shape, width)

    def forward(self, x: Tensor) -> Tensor:
        return surrogate_gradient(x, self.shape, self.width)

    def extra_repr(self) -> str:
        return f"shape={self.shape!r}, width={self.width}"


# ---------------------------------------------------------------- reference and registry entry
