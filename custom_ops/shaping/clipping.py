"""Clipped gradients.

Clipping isn't linear, so it has no transpose: a tangent passes unclipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from custom_ops import _checks, library
from custom_ops._leaf import leaf
from custom_ops.library import Function
from custom_ops.shaping._numbers import as_tensor


@library.compose("custom_ops::gradient_clipping", view=True)
def gradient_clipping(
    x: Tensor, min: float | None, max: float | None, low: Tensor | None, high: Tensor | None
) -> Tensor:
    """Return x with a gradient clamped to [min, max], or to [low, high] where these are given."""
    return x


@library.compose("custom_ops::gradient_norm_clipping", view=True)
def gradient_norm_clipping(x: Tensor, max_norm: float, dim: Sequence[int], limit: Tensor | None) -> Tensor:
    """Return x with a gradient scaled to a norm of at most ``limit``, or ``max_norm`` if ``limit`` is None.

    The norm is taken over the dimensions ``dim``, counted from the last.
    """
    return x


class _Clipping(Function):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return tangent.clone()  # without a copy, in-place ops on the output would write to the tangent


class ClipGradientFunction(_Clipping, op=gradient_clipping):
    """``ClipGradientFunction.apply(x, min, max)`` is `clip_gradient`, called like a ``torch.autograd.Function``.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.zeros(2, requires_grad=True)
        >>> (3 * custom_ops.ClipGradientFunction.apply(x, None, 1.0)).sum().backward()
        >>> x.grad
        tensor([1., 1.])
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.min, ctx.max, *limits = inputs
        ctx.save_for_backward(*limits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        low, high = (None if limit is None else limit.to(grad.dtype) for limit in ctx.saved_tensors)
        if low is None and high is None:
            return grad.clamp(ctx.min, ctx.max), *[None] * 4
        return torch.clamp(grad, low, high), *[None] * 4

    @staticmethod
    def apply(*args: Any, **kwargs: Any) -> Tensor:
        return clip_gradient(*args, **kwargs)


class ClipGradientNormFunction(_Clipping, op=gradient_norm_clipping):
    """``ClipGradientNormFunction.apply(x, max_norm, dim)`` is `clip_gradient_norm`, as a ``torch.autograd.Function``.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.zeros(2, requires_grad=True)
        >>> (custom_ops.ClipGradientNormFunction.apply(x, 1.0, None) * torch.tensor([3.0, 4.0])).sum().backward()
        >>> x.grad
        tensor([0.6000, 0.8000])
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.max_norm, ctx.dim, limit = inputs
        ctx.save_for_backward(limit)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (limit,) = ctx.saved_tensors
        max_norm = ctx.max_norm if limit is None else limit
        wide = torch.promote_types(grad.dtype, torch.float32)
        norm = _norm_over(grad, ctx.dim, wide)
        over = norm > max_norm
        factor = torch.where(over, max_norm / torch.where(over, norm, 1.0), 1.0)  # avoids 0 / 0 and its derivative
        return (grad * factor).to(grad.dtype), None, None, None

    @staticmethod
    def apply(*args: Any, **kwargs: Any) -> Tensor:
        return clip_gradient_norm(*args, **kwargs)


def _norm_over(grad: Tensor, dim: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the norm over ``dim``, which is kept."""
    whole = grad.numel() // _BLOCK * _BLOCK
    if len(dim) == grad.dim() and whole and grad.is_cpu and grad.is_contiguous():
        # On the CPU torch adds up in order, so that 2^24 squares in float32 lose the fourth digit.
        blocks = torch.linalg.vector_norm(grad.view(-1)[:whole].view(-1, _BLOCK), dim=1, dtype=dtype)
        rest = torch.linalg.vector_norm(grad.view(-1)[whole:], dtype=dtype)
        return torch.linalg.vector_norm(torch.cat([blocks, rest[None]])).view([1] * grad.dim())
    return torch.linalg.vector_norm(grad, dim=dim, keepdim=True, dtype=dtype)


_BLOCK = 1 << 14


@library.vmap(gradient_clipping)
def _(info: Any, in_dims: Any, x: Tensor, *limits: Any) -> Any:
    return gradient_clipping(x, *limits), in_dims[0]


@library.vmap(gradient_norm_clipping)
def _(info: Any, in_dims: Any, x: Tensor, *rest: Any) -> Any:
    return gradient_norm_clipping(x.movedim(in_dims[0], 0), *rest), 0


@leaf
def clip_gradient(x: Tensor, min: float | None = None, max: float | None = None) -> Tensor:
    """Return ``x`` and, in backward, clamp its gradient to ``[min, max]`` element by element.

    ``y = x``, ``dL/dx = clamp(dL/dy, min, max)``; a NaN stays. In a double backward the clamp has its own derivative, 0
    where it was active, and the gradient through ``x`` is clamped again. The tangent isn't clipped, ``dy = dx``: limits
    for gradients don't apply to tangents, and clipping isn't linear, so it has no transpose. ``jvp`` and ``vjp``
    therefore differ where the clamp is active, and so do forward-over-reverse and reverse-over-reverse.

    ``torch.amp.GradScaler`` multiplies all gradients by its scale until its step: multiply the limits, too, by
    ``scaler.get_scale()``.

    Args:
        x: any shape and strides; float16, bfloat16, float32 or float64.
        min, max: the limits, at least one of them.

    Returns:
        A view of ``x``: no copy is made. In-place writes to it raise if a gradient is recorded.

    Raises:
        TypeError: ``x`` isn't a tensor or has another dtype, or a limit isn't a number.
        ValueError: no limit at all, or ``min`` above ``max``.

    The op takes O(1) time in forward and O(n) in backward and keeps nothing for backward.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        >>> custom_ops.clip_gradient(x, -1, 1).backward(torch.tensor([-5.0, 0.5, 5.0]))
        >>> x.grad
        tensor([-1.0000,  0.5000,  1.0000])
    """
    _checks.has_dtype("x", x, _checks.FLOATING)
    low, high = _check_limits(min, max)
    if torch.compiler.is_compiling():
        return gradient_clipping(x, None, None, *(None if n is None else as_tensor(n, x) for n in (low, high)))
    return gradient_clipping(x, low, high, None, None)


def _check_limits(min: float | None, max: float | None) -> tuple[float | None, float | None]:
    low = None if min is None else _checks.as_float("min", min)
    high = None if max is None else _checks.as_float("max", max)
    if low is None and high is None:
        raise ValueError("min, max: expected at least one limit, got None for both")
    if low is not None and high is not None and not low <= high:
        raise ValueError(f"min: expected at most max = {max}, got {min}")
    return low, high


class ClipGradient(torch.nn.Module):
    """Apply `clip_gradient` as a layer.

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


@leaf
def clip_gradient_norm(x: Tensor, max_norm: float, dim: int | Sequence[int] | None = None) -> Tensor:
    """Return ``x`` and, in backward, scale its gradient down to a norm of at most ``max_norm``.

    ``y = x``, ``dL/dx = dL/dy * min(1, max_norm / ||dL/dy||)`` with the Euclidean norm over ``dim``, which is computed
    in float32 for 16-bit gradients. A NaN or an infinity makes all elements under the same norm NaN or 0, and so does a
    norm whose square is beyond the dtype (1.8e19 in float32), as in ``torch.nn.utils.clip_grad_norm_``.
    Second derivatives and the tangent are those of `clip_gradient`: the tangent isn't clipped. Multiply ``max_norm`` by
    the scale of a ``GradScaler``, as described there.

    Args:
        x: any shape and strides; float16, bfloat16, float32 or float64.
        max_norm: the largest norm allowed, not negative.
        dim: the dimensions over which each norm is taken, one or several; by default all.

    Returns:
        A view of ``x``: no copy is made. In-place writes to it raise if a gradient is recorded.

    Raises:
        TypeError: ``x`` isn't a tensor or has another dtype, ``max_norm`` isn't a number, or ``dim`` not integers.
        ValueError: ``max_norm`` negative; ``dim`` out of range, repeated or empty.

    The op takes O(1) time in forward and O(n) in backward and keeps nothing for backward.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.zeros(2, 2, requires_grad=True)
        >>> custom_ops.clip_gradient_norm(x, 1.0, dim=1).backward(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
        >>> x.grad
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])
    """
    _checks.has_dtype("x", x, _checks.FLOATING)
    max_norm, dims = _norm(max_norm, dim)
    if x.dim() == 0:
        return clip_gradient_norm(x[None], max_norm, dim)[0]
    chosen = range(x.dim()) if dims is None else dims
    if any(not -x.dim() <= d < x.dim() for d in chosen):
        raise ValueError(f"dim: expected within {x.dim()} dimensions, got {dim}")
    from_last = [d if d < 0 else d - x.dim() for d in chosen]
    if len(set(from_last)) < len(from_last):
        raise ValueError(f"dim: expected different dimensions, got {dim}")
    if torch.compiler.is_compiling():
        return gradient_norm_clipping(x, 0.0, from_last, as_tensor(max_norm, x))
    return gradient_norm_clipping(x, max_norm, from_last, None)


def _norm(max_norm: Any, dim: Any) -> tuple[float, list[int] | None]:
    norm = _checks.as_float("max_norm", max_norm)
    if not norm >= 0:
        raise ValueError(f"max_norm: expected at least 0, got {max_norm}")
    if dim is None:
        return norm, None
    several = _checks.listed(dim)
    dims = [_checks.as_int("dim", d, "an integer or several") for d in ([dim] if several is None else several)]
    if not dims:
        raise ValueError("dim: expected at least one dimension, got none")
    return norm, dims


class ClipGradientNorm(torch.nn.Module):
    """Apply `clip_gradient_norm` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.zeros(2, requires_grad=True)
        >>> (custom_ops.ClipGradientNorm(1.0)(x) * torch.tensor([3.0, 4.0])).sum().backward()
        >>> x.grad
        tensor([0.6000, 0.8000])
    """

    def __init__(self, max_norm: float, dim: int | Sequence[int] | None = None) -> None:
        super().__init__()
        self.max_norm, dims = _norm(max_norm, dim)
        self.dim = dims[0] if dims is not None and _checks.listed(dim) is None else dims

    def forward(self, x: Tensor) -> Tensor:
        return clip_gradient_norm(x, self.max_norm, self.dim)

    def extra_repr(self) -> str:
        return f"max_norm={self.max_norm}, dim={self.dim}"


# ---------------------------------------------------------------- reference and registry entry
