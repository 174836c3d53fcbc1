"""Gradient shaping: ops that leave a value as it is and change its gradient on the way back.

The four that are the identity return a view, so the forward pass copies nothing. For each of them:

* The first derivative is the one stated, not that of the value.
* Second and further derivatives are those of what backward computes, on a graph that contains the op
  again: every pass through it shapes what passes.
* The tangent, of forward mode, is what makes ``jvp`` the transpose of ``vjp``: the same linear map, applied
  from the other side. Only clipping isn't linear and so has no transpose: a tangent passes unclipped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from custom_ops import _checks, library
from custom_ops._layout import as_it_lies
from custom_ops._native import define
from custom_ops.library import Function
from custom_ops.registry import BadCall, Benchmark, OpInfo, Sample, Sharding, Target, register

__all__ = [
    "ClipGradient",
    "ClipGradientNorm",
    "GradientClipping",
    "GradientNormClipping",
    "GradientScaling",
    "ReverseGradient",
    "ScaleGradient",
    "StraightThrough",
    "StraightThroughEstimator",
    "SurrogateGradient",
    "SurrogateStep",
    "clip_gradient",
    "clip_gradient_norm",
    "reverse_gradient",
    "scale_gradient",
    "straight_through",
    "surrogate_gradient",
]

_SHAPES = ("sigmoid", "atan", "triangle", "boxcar")  # numbered alike in csrc and triton_kernels


# ---------------------------------------------------------------- scaling


@library.compose("custom_ops::gradient_scaling", view=True)
def gradient_scaling(x: Tensor, factor: float, scale: Tensor | None) -> Tensor:
    """x, whose gradient is multiplied by ``scale``, or by ``factor`` if there is none."""
    return x


class GradientScaling(Function, op=gradient_scaling):
    """``GradientScaling.apply(x, scale)`` is `scale_gradient`, in the idiom of ``torch.autograd.Function``.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.zeros(2, requires_grad=True)
        >>> custom_ops.GradientScaling.apply(x, 0.5).sum().backward()
        >>> x.grad
        tensor([0.5000, 0.5000])
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.factor, scale = inputs
        ctx.save_for_backward(scale)
        ctx.save_for_forward(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _scaled(grad, ctx.factor, *ctx.saved_tensors), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, *_: Any) -> Tensor | None:
        return None if tangent is None else _scaled(tangent, ctx.factor, *ctx.saved_tensors)

    @staticmethod
    def apply(*args: Any, **kwargs: Any) -> Tensor:
        return scale_gradient(*args, **kwargs)


def _scaled(grad: Tensor, factor: float, scale: Tensor | None) -> Tensor:
    return grad * factor if scale is None else (grad * scale).to(grad.dtype)


@library.vmap(gradient_scaling)
def _(info: Any, in_dims: Any, x: Tensor, factor: float, scale: Tensor | None) -> Any:
    x = library.to_front(x, in_dims[0], info.batch_size)
    if scale is not None and in_dims[2] is not None:
        scale = scale.movedim(in_dims[2], 0)
        scale = scale.view(scale.shape[0], *(1,) * (x.dim() - scale.dim()), *scale.shape[1:])
    return gradient_scaling(x, factor, scale), 0


def scale_gradient(x: Tensor, scale: float | Tensor) -> Tensor:
    """``x``, whose gradient is multiplied by ``scale`` on its way back.

    ``y = x``, ``dL/dx = scale * dL/dy``, and likewise the tangent ``dy = scale * dx``. With
    ``scale = 2 * x.detach()`` it is the layer ``y = x`` with the backward of ``x ** 2``.

    Args:
        x: any shape and strides; float16, bfloat16, float32 or float64.
        scale: a number, or a floating tensor that broadcasts to the shape of ``x``. It gets no gradient, as the
            value doesn't depend on it; in a double backward it does, as the gradient of ``x`` does.

    Returns:
        A view of ``x``: no copy is made. In-place writes to it raise where a gradient is recorded.

    Raises:
        TypeError: ``x`` is no tensor or of another dtype, ``scale`` neither a number nor a floating tensor.
        ValueError: ``scale`` doesn't broadcast to the shape of ``x``, or is on another device.

    O(1) forward, O(n) backward; ``scale`` is kept for backward.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        >>> custom_ops.scale_gradient(x, 2 * x.detach()).sum().backward()
        >>> x.grad
        tensor([2., 4., 6.])
    """
    _checks.has_dtype("x", x, _checks.FLOATING)
    _check_scale("scale", scale)
    if not isinstance(scale, Tensor):
        return gradient_scaling(x, float(scale), None)
    _checks.same_device(x=x, scale=scale)
    if scale.dim() > x.dim() or not all(s in (1, n) for s, n in zip(reversed(scale.shape), reversed(x.shape))):
        raise ValueError(f"scale: expected a shape that broadcasts to {list(x.shape)}, got {list(scale.shape)}")
    return gradient_scaling(x, 1.0, scale)


def _check_scale(name: str, scale: Any) -> None:
    if isinstance(scale, Tensor):
        _checks.has_dtype(name, scale, _checks.FLOATING)
    else:
        _checks.is_number(name, scale)


class ScaleGradient(torch.nn.Module):
    """`scale_gradient` as a layer. A tensor ``scale`` is a buffer: it moves and is saved with the layer.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.zeros(2, requires_grad=True)
        >>> custom_ops.ScaleGradient(0.5)(x).sum().backward()
        >>> x.grad
        tensor([0.5000, 0.5000])
    """

    scale: float | Tensor

    def __init__(self, scale: float | Tensor) -> None:
        super().__init__()
        _check_scale("scale", scale)
        if isinstance(scale, Tensor):
            self.register_buffer("scale", scale)
        else:
            self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return scale_gradient(x, self.scale)

    def extra_repr(self) -> str:
        return f"scale={list(self.scale.shape) if isinstance(self.scale, Tensor) else self.scale}"


def reverse_gradient(x: Tensor, lambda_: float | Tensor = 1.0) -> Tensor:
    """``x``, whose gradient is multiplied by ``-lambda_`` on its way back: `scale_gradient` by ``-lambda_``.

    What comes before it climbs the loss that what comes after it descends, as a feature extractor does
    against a domain classifier.

    Args:
        x: any shape and strides; float16, bfloat16, float32 or float64.
        lambda_: how strongly; a number, or a floating tensor that broadcasts to the shape of ``x``.

    Returns:
        A view of ``x``: no copy is made. In-place writes to it raise where a gradient is recorded.

    Raises:
        TypeError, ValueError: as `scale_gradient`.

    O(1) forward, O(n) backward.

    Source: Ganin and Lempitsky, "Unsupervised Domain Adaptation by Backpropagation", 2015.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> custom_ops.reverse_gradient(x, 0.5).sum().backward()
        >>> x.grad
        tensor([-0.5000, -0.5000])
    """
    _check_scale("lambda_", lambda_)
    return scale_gradient(x, -lambda_)


class ReverseGradient(torch.nn.Module):
    """`reverse_gradient` as a layer; set ``lambda_`` to follow a schedule.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.zeros(2, requires_grad=True)
        >>> custom_ops.ReverseGradient(0.5)(x).sum().backward()
        >>> x.grad
        tensor([-0.5000, -0.5000])
    """

    def __init__(self, lambda_: float = 1.0) -> None:
        super().__init__()
        _checks.is_number("lambda_", lambda_)
        self.lambda_ = lambda_

    def forward(self, x: Tensor) -> Tensor:
        return reverse_gradient(x, self.lambda_)

    def extra_repr(self) -> str:
        return f"lambda_={self.lambda_}"


# ---------------------------------------------------------------- clipping


@library.compose("custom_ops::gradient_clipping", view=True)
def gradient_clipping(x: Tensor, min: float | None, max: float | None) -> Tensor:
    """x, whose gradient is clamped to [min, max]."""
    return x


@library.compose("custom_ops::gradient_norm_clipping", view=True)
def gradient_norm_clipping(x: Tensor, max_norm: float, dim: Sequence[int]) -> Tensor:
    """x, whose gradient is scaled to at most ``max_norm`` over the dimensions ``dim``, counted from the last."""
    return x


class _Clipping(Function):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return tangent.clone()  # in-place ops on the output would write to it


class GradientClipping(_Clipping, op=gradient_clipping):
    """``GradientClipping.apply(x, min, max)`` is `clip_gradient`, in the idiom of ``torch.autograd.Function``.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.zeros(2, requires_grad=True)
        >>> (3 * custom_ops.GradientClipping.apply(x, None, 1.0)).sum().backward()
        >>> x.grad
        tensor([1., 1.])
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.min, ctx.max = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.clamp(ctx.min, ctx.max), None, None

    @staticmethod
    def apply(*args: Any, **kwargs: Any) -> Tensor:
        return clip_gradient(*args, **kwargs)


class GradientNormClipping(_Clipping, op=gradient_norm_clipping):
    """``GradientNormClipping.apply(x, max_norm, dim)`` is `clip_gradient_norm`, as a ``torch.autograd.Function``.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.zeros(2, requires_grad=True)
        >>> (custom_ops.GradientNormClipping.apply(x, 1.0, None) * torch.tensor([3.0, 4.0])).sum().backward()
        >>> x.grad
        tensor([0.6000, 0.8000])
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.max_norm, ctx.dim = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        wide = torch.promote_types(grad.dtype, torch.float32)
        norm = torch.linalg.vector_norm(grad, dim=ctx.dim, keepdim=True, dtype=wide)
        over = norm > ctx.max_norm
        factor = torch.where(over, ctx.max_norm / torch.where(over, norm, 1.0), 1.0)  # no 0 / 0, nor its derivative
        return (grad * factor).to(grad.dtype), None, None

    @staticmethod
    def apply(*args: Any, **kwargs: Any) -> Tensor:
        return clip_gradient_norm(*args, **kwargs)


@library.vmap(gradient_clipping)
def _(info: Any, in_dims: Any, x: Tensor, min: float | None, max: float | None) -> Any:
    return gradient_clipping(x, min, max), in_dims[0]


@library.vmap(gradient_norm_clipping)
def _(info: Any, in_dims: Any, x: Tensor, max_norm: float, dim: Sequence[int]) -> Any:
    return gradient_norm_clipping(x.movedim(in_dims[0], 0), max_norm, dim), 0


def clip_gradient(x: Tensor, min: float | None = None, max: float | None = None) -> Tensor:
    """``x``, whose gradient is clamped to ``[min, max]`` element by element on its way back.

    ``y = x``, ``dL/dx = clamp(dL/dy, min, max)``; a NaN stays. In a double backward the clamp has its own
    derivative, 0 where it was active, and clips what passes again. The tangent isn't clipped, ``dy = dx``: limits
    for gradients say nothing of it, and as clipping isn't linear there is no transpose. So ``jvp`` and ``vjp``
    differ where the clamp is active, and so do forward-over-reverse and reverse-over-reverse.

    Args:
        x: any shape and strides; float16, bfloat16, float32 or float64.
        min, max: the limits, at least one of them.

    Returns:
        A view of ``x``: no copy is made. In-place writes to it raise where a gradient is recorded.

    Raises:
        TypeError: ``x`` is no tensor or of another dtype, a limit is no number.
        ValueError: no limit at all, or ``min`` above ``max``.

    O(1) forward, O(n) backward; nothing is kept for backward.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        >>> custom_ops.clip_gradient(x, -1, 1).backward(torch.tensor([-5.0, 0.5, 5.0]))
        >>> x.grad
        tensor([-1.0000,  0.5000,  1.0000])
    """
    _checks.has_dtype("x", x, _checks.FLOATING)
    low, high = _check_limits(min, max)
    return gradient_clipping(x, low, high)


def _check_limits(min: float | None, max: float | None) -> tuple[float | None, float | None]:
    for name, limit in (("min", min), ("max", max)):
        if limit is not None:
            _checks.is_number(name, limit)
    if min is None and max is None:
        raise ValueError("min, max: expected at least one limit, got None for both")
    if min is not None and max is not None and not min <= max:
        raise ValueError(f"min: expected at most max = {max}, got {min}")
    return None if min is None else float(min), None if max is None else float(max)


class ClipGradient(torch.nn.Module):
    """`clip_gradient` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> (3 * custom_ops.ClipGradient(max=1.0)(x)).sum().backward()
        >>> x.grad
        tensor([1., 1.])
    """

    def __init__(self, min: float | None = None, max: float | None = None) -> None:
        super().__init__()
        self.min, self.max = _check_limits(min, max)

    def forward(self, x: Tensor) -> Tensor:
        return clip_gradient(x, self.min, self.max)

    def extra_repr(self) -> str:
        return f"min={self.min}, max={self.max}"


def clip_gradient_norm(x: Tensor, max_norm: float, dim: int | Sequence[int] | None = None) -> Tensor:
    """``x``, whose gradient is scaled down to a norm of at most ``max_norm`` on its way back.

    ``y = x``, ``dL/dx = dL/dy * min(1, max_norm / ||dL/dy||)`` with the Euclidean norm over ``dim``, for 16-bit
    gradients computed in float32; a NaN or an infinity makes its whole norm's worth NaN or 0, as it does in
    ``torch.nn.utils.clip_grad_norm_``. Second derivatives and the tangent are as in `clip_gradient`: the
    tangent isn't clipped.

    Args:
        x: any shape and strides; float16, bfloat16, float32 or float64.
        max_norm: the largest norm allowed, not negative.
        dim: over which dimensions each norm is taken, one or several; by default over all.

    Returns:
        A view of ``x``: no copy is made. In-place writes to it raise where a gradient is recorded.

    Raises:
        TypeError: ``x`` is no tensor or of another dtype, ``max_norm`` no number, ``dim`` not of integers.
        ValueError: ``max_norm`` negative; ``dim`` out of range, repeated or empty.

    O(1) forward, O(n) backward; nothing is kept for backward.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.zeros(2, 2, requires_grad=True)
        >>> custom_ops.clip_gradient_norm(x, 1.0, dim=1).backward(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
        >>> x.grad
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])
    """
    _checks.has_dtype("x", x, _checks.FLOATING)
    _check_norm(max_norm, dim)
    if x.dim() == 0:
        return clip_gradient_norm(x[None], max_norm, dim)[0]
    chosen = range(x.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
    if any(not -x.dim() <= d < x.dim() for d in chosen):
        raise ValueError(f"dim: expected within {x.dim()} dimensions, got {dim}")
    from_last = [d if d < 0 else d - x.dim() for d in chosen]
    if len(set(from_last)) < len(from_last):
        raise ValueError(f"dim: expected different dimensions, got {dim}")
    return gradient_norm_clipping(x, float(max_norm), from_last)


def _check_norm(max_norm: Any, dim: Any) -> None:
    _checks.is_number("max_norm", max_norm)
    if not max_norm >= 0:
        raise ValueError(f"max_norm: expected at least 0, got {max_norm}")
    if dim is None:
        return
    dims = [dim] if isinstance(dim, int) else dim
    if not isinstance(dims, Sequence) or any(isinstance(d, bool) or not isinstance(d, int) for d in dims):
        raise TypeError(f"dim: expected an integer or several, got {dim!r}")
    if not dims:
        raise ValueError("dim: expected at least one dimension, got none")


class ClipGradientNorm(torch.nn.Module):
    """`clip_gradient_norm` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.zeros(2, requires_grad=True)
        >>> (custom_ops.ClipGradientNorm(1.0)(x) * torch.tensor([3.0, 4.0])).sum().backward()
        >>> x.grad
        tensor([0.6000, 0.8000])
    """

    def __init__(self, max_norm: float, dim: int | Sequence[int] | None = None) -> None:
        super().__init__()
        _check_norm(max_norm, dim)
        self.max_norm, self.dim = max_norm, dim

    def forward(self, x: Tensor) -> Tensor:
        return clip_gradient_norm(x, self.max_norm, self.dim)

    def extra_repr(self) -> str:
        return f"max_norm={self.max_norm}, dim={self.dim}"


# ---------------------------------------------------------------- straight through


@library.compose("custom_ops::straight_through_estimator", view=True)
def straight_through_estimator(value: Tensor, x: Tensor) -> Tensor:
    """``value``, whose gradient goes to x."""
    return value


class StraightThroughEstimator(Function, op=straight_through_estimator):
    """``StraightThroughEstimator.apply(forward_value, x)`` is `straight_through`, as a ``torch.autograd.Function``.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.tensor([0.4, 1.6], requires_grad=True)
        >>> custom_ops.StraightThroughEstimator.apply(x.round(), x).sum().backward()
        >>> x.grad
        tensor([1., 1.])
    """

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor | None) -> Tensor | None:
        return None if tangent is None else tangent.clone()  # in-place ops on the output would write to it

    @staticmethod
    def apply(*args: Any, **kwargs: Any) -> Tensor:
        return straight_through(*args, **kwargs)


@library.vmap(straight_through_estimator)
def _(info: Any, in_dims: Any, *args: Tensor) -> Any:
    value, x = (library.to_front(t, d, info.batch_size) for t, d in zip(args, in_dims))
    return straight_through_estimator(value, x), 0


def straight_through(forward_value: Tensor, x: Tensor) -> Tensor:
    """``forward_value``, whose gradient goes to ``x`` as if it were ``x``: the straight-through estimator.

    ``y = forward_value``, ``dL/dx = dL/dy``, nothing to ``forward_value``. The tangent is ``dy = dx``, that of ``x``:
    the estimator takes the identity for the derivative of ``forward_value`` in ``x``, in either mode; what tangent
    ``forward_value`` has itself, mostly 0, is left out just as its gradient is. The derivative is constant, so it adds
    nothing to second derivatives.

    Args:
        forward_value: what was made of ``x``, such as ``x.round()``; of the shape, dtype and device of ``x``.
        x: any shape and strides; float16, bfloat16, float32 or float64.

    Returns:
        A view of ``forward_value``: no copy is made. In-place writes to it raise where a gradient is recorded.

    Raises:
        TypeError: no tensor, a wrong dtype, or two different ones.
        ValueError: different shapes or devices.

    O(1); nothing is kept for backward, nor the graph of ``forward_value``.

    Source: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.tensor([0.2, 0.7, 1.6], requires_grad=True)
        >>> y = custom_ops.straight_through(x.round(), x)
        >>> (y * y).sum().backward()
        >>> y.detach(), x.grad
        (tensor([0., 1., 2.]), tensor([0., 2., 4.]))
    """
    _checks.has_dtype("x", x, _checks.FLOATING)
    _checks.has_dtype("forward_value", forward_value, (x.dtype,))
    if forward_value.shape != x.shape:
        raise ValueError(f"forward_value: expected the shape of x, {list(x.shape)}, got {list(forward_value.shape)}")
    _checks.same_device(x=x, forward_value=forward_value)
    return straight_through_estimator(forward_value.detach(), x)


class StraightThrough(torch.nn.Module):
    """`straight_through` as a layer of two inputs.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.tensor([0.4, 1.6], requires_grad=True)
        >>> y = custom_ops.StraightThrough()(x.round(), x)
        >>> y.sum().backward()
        >>> y.detach(), x.grad
        (tensor([0., 2.]), tensor([1., 1.]))
    """

    def forward(self, forward_value: Tensor, x: Tensor) -> Tensor:
        return straight_through(forward_value, x)


# ---------------------------------------------------------------- surrogate


@define
def surrogate_slope(grad: Tensor, x: Tensor, shape: int, width: float) -> Tensor:
    """``grad`` times the slope at x of the smooth step numbered ``shape``, contiguous."""
    return x.new_empty(x.shape)


@define
def surrogate_step(x: Tensor, shape: int, width: float) -> Tensor:
    """1 where x >= 0, else 0, contiguous; differentiated as the smooth step numbered ``shape``."""
    return x.new_empty(x.shape)


class SurrogateStep(Function, op=surrogate_step):
    """``SurrogateStep.apply(x, shape, width)`` is `surrogate_gradient`, in the idiom of ``torch.autograd.Function``.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.tensor([-0.5, 0.0], requires_grad=True)
        >>> custom_ops.SurrogateStep.apply(x, "triangle", 1.0).sum().backward()
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
        return surrogate_slope(grad, *ctx.saved_tensors, ctx.shape, ctx.width), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return surrogate_slope(tangent, *ctx.saved_tensors, ctx.shape, ctx.width)

    @staticmethod
    def apply(*args: Any, **kwargs: Any) -> Tensor:
        return surrogate_gradient(*args, **kwargs)


class SurrogateSlope(Function, op=surrogate_slope):
    """Linear in grad; its derivative in x is stated in torch's ops, so that the third and so on exist too."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, x, ctx.shape, ctx.width = inputs
        ctx.save_for_backward(grad, x)
        ctx.save_for_forward(grad, x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        grad, x = ctx.saved_tensors
        of_grad = surrogate_slope(cotangent, x, ctx.shape, ctx.width) if ctx.needs_input_grad[0] else None
        of_x = cotangent * grad * _curvature(x, ctx.shape, ctx.width) if ctx.needs_input_grad[1] else None
        return of_grad, of_x, None, None

    @staticmethod
    def jvp(ctx: Any, grad_tangent: Tensor | None, x_tangent: Tensor | None, *_: None) -> Tensor:
        grad, x = ctx.saved_tensors
        parts = []
        if grad_tangent is not None:
            parts.append(surrogate_slope(grad_tangent, x, ctx.shape, ctx.width))
        if x_tangent is not None:
            parts.append(x_tangent * grad * _curvature(x, ctx.shape, ctx.width))
        return sum(parts[1:], parts[0])


def _curvature(x: Tensor, shape: int, width: float) -> Tensor:
    """The derivative of the slope."""
    u = x / width
    match = _SHAPES[shape]
    if match == "sigmoid":
        s = u.sigmoid()
        value = s * (1 - s) * (1 - 2 * s)
    elif match == "atan":
        value = -2 / math.pi * u / (1 + u * u) ** 2
    elif match == "triangle":
        value = torch.where(u.abs() < 1, -u.sign(), 0.0)
    else:
        value = torch.zeros_like(u)
    return value / width**2


@library.inductor(surrogate_step)
def _(x: Tensor, shape: int, width: float) -> Tensor:
    return torch.where(x >= 0, 1.0, 0.0).to(x.dtype).contiguous()


@library.inductor(surrogate_slope)
def _(grad: Tensor, x: Tensor, shape: int, width: float) -> Tensor:
    u = x.to(torch.promote_types(x.dtype, torch.float32)) / width
    match = _SHAPES[shape]
    if match == "sigmoid":
        s = torch.sigmoid(-u.abs())
        slope = s * (1 - s)
    elif match == "atan":
        slope = 1 / (math.pi * (1 + u * u))
    elif match == "triangle":
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
def _(x: Any, shape: int, width: float) -> Any:
    from torch.distributed.tensor import Replicate, Shard

    return [([p], [p, None, None]) for p in (Replicate(), *(Shard(d) for d in range(x.ndim)))]


@library.sharding(surrogate_slope)
def _(grad: Any, x: Any, shape: int, width: float) -> Any:
    from torch.distributed.tensor import Replicate, Shard

    return [([p], [p, p, None, None]) for p in (Replicate(), *(Shard(d) for d in range(x.ndim)))]


def surrogate_gradient(x: Tensor, shape: str = "sigmoid", width: float = 1.0) -> Tensor:
    """A spike: 1 where ``x >= 0``, else 0, whose derivative is that of a smooth step.

    ``dL/dx = dL/dy * slope(x / width) / width``, where the slope at u is

    * "sigmoid": ``s (1 - s)`` with ``s = 1 / (1 + exp(-u))``, the slope of the logistic function;
    * "atan": ``1 / (pi (1 + u^2))``, that of the arc tangent, with the longest reach;
    * "triangle": ``max(0, 1 - |u|)``;
    * "boxcar": 1/2 where ``|u| < 1``, else 0.

    Each integrates to 1: it belongs to a step from 0 to 1 that is ``width`` wide. The tangent is ``dy = slope dx``,
    of the same step; second derivatives and on are those of the slope, so all of them agree with the smooth
    step's, to which only the value is not equal. (That of "triangle" jumps, that of "boxcar" is 0.)

    Args:
        x: any shape and strides; float16, bfloat16, float32 or float64; a neuron's potential above its threshold.
        shape: "sigmoid", "atan", "triangle" or "boxcar".
        width: of the smooth step, above 0. The narrower, the larger its slope: 1 / (4 width) at most for
            "sigmoid", 1 / (pi width), 1 / width, 1 / (2 width).

    Returns:
        Zeros and ones in the dtype of ``x``; at NaN 0, as ``torch.heaviside``.

    Raises:
        TypeError: ``x`` is no tensor or of another dtype, ``width`` no number.
        ValueError: an unknown ``shape``, ``width`` not above 0.

    O(n); ``x`` is kept for backward, which is one pass.

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
    _check_step(shape, width)
    return as_it_lies(x, lambda rows, _: surrogate_step(rows, _SHAPES.index(shape), float(width)))


def _check_step(shape: Any, width: Any) -> None:
    _checks.is_one_of("shape", shape, _SHAPES)
    _checks.is_number("width", width)
    if not width > 0:
        raise ValueError(f"width: expected above 0, got {width}")


class SurrogateGradient(torch.nn.Module):
    """`surrogate_gradient` as a layer.

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
        _check_step(shape, width)
        self.shape, self.width = shape, width

    def forward(self, x: Tensor) -> Tensor:
        return surrogate_gradient(x, self.shape, self.width)

    def extra_repr(self) -> str:
        return f"shape={self.shape!r}, width={self.width}"


# ---------------------------------------------------------------- references
#
# Plain PyTorch with the same shaped derivatives of any order and in any mode: x - x.detach() is 0 with slope 1.


def scale_gradient_reference(x: Tensor, scale: float | Tensor) -> Tensor:
    return x.detach() + (x - x.detach()) * scale


def reverse_gradient_reference(x: Tensor, lambda_: float | Tensor = 1.0) -> Tensor:
    return scale_gradient_reference(x, -lambda_)


def straight_through_reference(forward_value: Tensor, x: Tensor) -> Tensor:
    return forward_value.detach() + (x - x.detach())


def surrogate_gradient_reference(x: Tensor, shape: str = "sigmoid", width: float = 1.0) -> Tensor:
    u = x / width
    inner = torch.where(u.abs() < 1, u, u.detach().clamp(-1, 1))  # its slope at 1 is that beyond
    smooth = {
        "sigmoid": u.sigmoid(),
        "atan": u.atan() / math.pi,
        "triangle": inner - inner * inner.abs() / 2,
        "boxcar": inner / 2,
    }[shape]
    return (x >= 0).to(x.dtype) + (smooth - smooth.detach())


class _Clipped(torch.autograd.Function):
    """Clipping isn't linear in the gradient, so no composition of differentiable functions does it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, clip: Any) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.clip = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.clip(grad), None


def clip_gradient_reference(x: Tensor, min: float | None = None, max: float | None = None) -> Tensor:
    low, high = -math.inf if min is None else min, math.inf if max is None else max
    return _Clipped.apply(x, lambda g: torch.where(g < low, low, torch.where(g > high, high, g)))


def clip_gradient_norm_reference(x: Tensor, max_norm: float, dim: int | Sequence[int] | None = None) -> Tensor:
    def clip(grad: Tensor) -> Tensor:
        over = list(range(grad.dim())) if dim is None else [dim] if isinstance(dim, int) else list(dim)
        norm = grad.square().sum(over, keepdim=True).sqrt()
        return torch.where(norm > max_norm, max_norm * grad / norm, grad)

    return _Clipped.apply(x, clip)


# ---------------------------------------------------------------- registry


def _leaf(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Away from 0, and from 1 and 2 in size."""
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = torch.where((draw.abs() - draw.abs().round()).abs() < 0.05, draw + 0.15, draw)
    return x.to(device, dtype).requires_grad_()


def _scale_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    x, rows = _leaf(device, dtype, 3, 7), _leaf(device, dtype, 7, seed=1).detach()
    channels_last = _leaf(device, dtype, 2, 3, 4, 2).detach().to(memory_format=torch.channels_last).requires_grad_()
    return [
        Sample((x, -0.5), dynamic={0: 0}),
        Sample((x, rows), dynamic={0: 0}),
        Sample((x, x.detach() * 2), dynamic={0: 0, 1: 0}),
        Sample((_leaf(device, dtype), 3)),
        Sample((_leaf(device, dtype, 0, 4), 2.0)),
        Sample((channels_last, rows[:3].view(3, 1, 1))),
    ]


def _clip_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    # The rows of a Jacobian are made with gradients of 1, which pass here; random ones are clipped.
    x = _leaf(device, dtype, 3, 7)
    return [
        Sample((x, -0.5, 1.25), dynamic={0: 0}),
        Sample((x, None, 1.1), dynamic={0: 0}),
        Sample((x,), {"min": -0.25}, dynamic={0: 0}),
        Sample((_leaf(device, dtype), -1, 1.5)),
        Sample((_leaf(device, dtype, 0, 4), -1.0, 1.0)),
    ]


def _norm_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    x = _leaf(device, dtype, 3, 7)
    return [
        Sample((x, 1.25, 1), dynamic={0: 0}),
        Sample((x, 3.5), dynamic={0: 0}),  # what is parallel to the gradient has derivative 0: not with all alike
        Sample((_leaf(device, dtype, 2, 3, 4), 1.5, (0, -1))),
        Sample((_leaf(device, dtype), 1.25)),
        Sample((_leaf(device, dtype, 0, 4), 1.0)),
    ]


def _straight_through_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    x = _leaf(device, dtype, 3, 7)
    return [
        Sample((x.detach().round(), x), dynamic={0: 0, 1: 0}),
        Sample((torch.zeros((), device=device, dtype=dtype), _leaf(device, dtype))),
        Sample((torch.zeros(0, 4, device=device, dtype=dtype), _leaf(device, dtype, 0, 4))),
    ]


def _surrogate_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    return [
        *(Sample((_leaf(device, dtype, 3, 7), shape), dynamic={0: 0}) for shape in _SHAPES),
        Sample((_leaf(device, dtype, 17),), {"width": 0.5}),
        Sample((_leaf(device, dtype), "atan", 2)),
        Sample((_leaf(device, dtype, 0, 4), "boxcar")),
    ]


_NOT_THE_VALUES = "finite differences see the value's derivative, not the shaped one: `second derivative` checks that"
_OF_SHAPING = {"gradcheck": _NOT_THE_VALUES, "gradgradcheck": _NOT_THE_VALUES}
_VIEW = {"outputs own memory": "by design the output is a view of the input; in-place writes to it raise"}
_BY_MODE = "by design a tangent passes unclipped, so the modes differ: tests/test_shaping.py has the closed forms"
_OF_CLIPPING = {**_OF_SHAPING, "func.hessian": _BY_MODE, "forward over forward": _BY_MODE}
_two, _integers = torch.ones(2), torch.ones(2, dtype=torch.int64)

_NOT_FUZZED = dict.fromkeys(("NaN", "infinite"), "the reference subtracts them from themselves")

register(
    OpInfo(
        name="scale_gradient",
        summary="The identity, whose gradient is scaled",
        function=scale_gradient,
        not_fuzzed=_NOT_FUZZED,
        reference=scale_gradient_reference,
        native=torch.mul,
        apply=GradientScaling.apply,
        samples=_scale_samples,
        modules=lambda: [(ScaleGradient(2.0), {"scale": 2.0})],
        bad_calls=lambda: [
            BadCall(([1.0], 2.0), "x: expected a tensor, got list"),
            BadCall((_integers, 2.0), "x: expected one of float16, .* got int64"),
            BadCall((_two, "2"), "scale: expected a number, got str"),
            BadCall((_two, _integers), "scale: expected one of float16, .* got int64"),
            BadCall((_two, torch.ones(3)), r"scale: expected a shape that broadcasts to \[2\], got \[3\]"),
            BadCall((_two, torch.ones(2, 2)), r"scale: expected a shape that broadcasts to \[2\], got \[2, 2\]"),
            BadCall((_two, _two.to("meta")), "scale: expected on cpu as x, got meta"),
        ],
        not_applicable=_VIEW,
        not_comparable=_OF_SHAPING,
    )
)
register(
    OpInfo(
        name="reverse_gradient",
        summary="The identity, whose gradient is reversed",
        function=reverse_gradient,
        not_fuzzed=_NOT_FUZZED,
        reference=reverse_gradient_reference,
        native=torch.neg,
        samples=lambda device, dtype: [
            Sample((_leaf(device, dtype, 3, 7),), dynamic={0: 0}),
            Sample((_leaf(device, dtype, 3, 7), _leaf(device, dtype, 3, 1, seed=1).detach())),
            Sample((_leaf(device, dtype), 0.5)),
            Sample((_leaf(device, dtype, 0, 4),)),
        ],
        modules=lambda: [(ReverseGradient(), {}), (ReverseGradient(0.5), {"lambda_": 0.5})],
        bad_calls=lambda: [
            BadCall(([1.0],), "x: expected a tensor, got list"),
            BadCall((_two, "1"), "lambda_: expected a number, got str"),
            BadCall((_two, _integers), "lambda_: expected one of float16, .* got int64"),
        ],
        not_applicable=_VIEW,
        not_comparable=_OF_SHAPING,
    )
)
register(
    OpInfo(
        name="clip_gradient",
        summary="The identity, whose gradient is clamped",
        function=clip_gradient,
        reference=clip_gradient_reference,
        native=torch.clamp,
        apply=GradientClipping.apply,
        samples=_clip_samples,
        modules=lambda: [(ClipGradient(-1, 0.5), {"min": -1, "max": 0.5}), (ClipGradient(max=1.0), {"max": 1.0})],
        bad_calls=lambda: [
            BadCall(([1.0], 0.0), "x: expected a tensor, got list"),
            BadCall((_two, "0"), "min: expected a number, got str"),
            BadCall((_two, 0.0, True), "max: expected a number, got bool"),
            BadCall((_two,), "min, max: expected at least one limit, got None for both"),
            BadCall((_two, 1.0, 0.5), "min: expected at most max = 0.5, got 1.0"),
        ],
        not_applicable=_VIEW,
        not_comparable=_OF_CLIPPING,
    )
)
register(
    OpInfo(
        name="clip_gradient_norm",
        summary="The identity, whose gradient's norms are clipped",
        function=clip_gradient_norm,
        reference=clip_gradient_norm_reference,
        apply=GradientNormClipping.apply,
        samples=_norm_samples,
        shardings=lambda: [
            Sharding("rows", Sample((torch.randn(5, 3, requires_grad=True), 1.0, 1)), {0: 0}, 0),
            # Two sums of squares over all rows: of the gradient, and for the factor.
            Sharding(
                "what the norm is of",
                Sample((torch.randn(5, 3, requires_grad=True), 1.0)),
                {0: 0},
                0,
                {"all_reduce": 2},
            ),
        ],
        modules=lambda: [
            (ClipGradientNorm(1.0), {"max_norm": 1.0}),
            (ClipGradientNorm(0.5, (0,)), {"max_norm": 0.5, "dim": (0,)}),
        ],
        bad_calls=lambda: [
            BadCall(([1.0], 1.0), "x: expected a tensor, got list"),
            BadCall((_two, None), "max_norm: expected a number, got NoneType"),
            BadCall((_two, -1.0), "max_norm: expected at least 0, got -1.0"),
            BadCall((_two, 1.0, 1.5), "dim: expected an integer or several, got 1.5"),
            BadCall((_two, 1.0, False), "dim: expected an integer or several, got False"),
            BadCall((_two, 1.0, 1), "dim: expected within 1 dimensions, got 1"),
            BadCall((_two, 1.0, (0, -1)), r"dim: expected different dimensions, got \(0, -1\)"),
            BadCall((_two, 1.0, ()), "dim: expected at least one dimension, got none"),
        ],
        native=lambda x, max_norm, dim: torch.renorm(x, 2, dim, max_norm),
        not_applicable=_VIEW,
        not_comparable=_OF_CLIPPING,
    )
)
register(
    OpInfo(
        name="straight_through",
        summary="A value, whose gradient goes to what it was made of",
        function=straight_through,
        not_fuzzed=_NOT_FUZZED,
        reference=straight_through_reference,
        native=torch.add,
        apply=StraightThroughEstimator.apply,
        samples=_straight_through_samples,
        modules=lambda: [(StraightThrough(), {})],
        bad_calls=lambda: [
            BadCall((_two, [1.0]), "x: expected a tensor, got list"),
            BadCall((_integers, _two), "forward_value: expected one of float32, got int64"),
            BadCall((torch.ones(3), _two), r"forward_value: expected the shape of x, \[2\], got \[3\]"),
            BadCall((_two.to("meta"), _two), "forward_value: expected on cpu as x, got meta"),
        ],
        not_applicable=_VIEW,
        not_comparable=_OF_SHAPING,
    )
)
register(
    OpInfo(
        name="surrogate_gradient",
        summary="A step that is differentiated as a smooth one",
        function=surrogate_gradient,
        not_fuzzed=_NOT_FUZZED,
        reference=surrogate_gradient_reference,
        native=lambda x, shape: torch.sigmoid(x),
        apply=SurrogateStep.apply,
        samples=_surrogate_samples,
        modules=lambda: [
            (SurrogateGradient(), {}),
            (SurrogateGradient("atan", 0.5), {"shape": "atan", "width": 0.5}),
        ],
        bad_calls=lambda: [
            BadCall(([1.0],), "x: expected a tensor, got list"),
            BadCall((_integers,), "x: expected one of float16, .* got int64"),
            BadCall((_two, "step"), "shape: expected one of 'sigmoid', 'atan', 'triangle', 'boxcar', got 'step'"),
            BadCall((_two, "atan", "1"), "width: expected a number, got str"),
            BadCall((_two, "atan", 0.0), "width: expected above 0, got 0.0"),
        ],
        benchmarks=[
            Benchmark(
                unit="elements",
                sizes=(1 << 16, 1 << 20, 1 << 24),
                make=lambda n, device: (torch.randn(n, device=device, requires_grad=True),),
                peers={"autograd.Function": "custom_ops.benchmarks.peers:surrogate_gradient_function"},
                targets=[
                    Target(1 << 20, "autograd.Function", 1.0),
                    Target(1 << 24, "autograd.Function", 0.5),
                ],
            )
        ],
        not_comparable=_OF_SHAPING,
    )
)
