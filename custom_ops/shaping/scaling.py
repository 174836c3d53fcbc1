"""Scaled and reversed gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops import _checks, library
from custom_ops._leaf import leaf
from custom_ops._wide import wide
from custom_ops.library import Function
from custom_ops.shaping._numbers import as_tensor


@library.compose("custom_ops::gradient_scaling", view=True)
def gradient_scaling(x: Tensor, factor: float, scale: Tensor | None) -> Tensor:
    """Return x with a gradient multiplied by ``scale``, or by ``factor`` if ``scale`` is None."""
    return x


class ScaleGradientFunction(Function, op=gradient_scaling):
    """``ScaleGradientFunction.apply(x, scale)`` is `scale_gradient`, called like a ``torch.autograd.Function``.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.zeros(2, requires_grad=True)
        >>> custom_ops.ScaleGradientFunction.apply(x, 0.5).sum().backward()
        >>> x.grad
        tensor([0.5000, 0.5000])
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.factor, scale = inputs
        ctx.save_for_backward(scale)
        ctx.save_for_forward(scale, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _scaled(grad, ctx.factor, *ctx.saved_tensors), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, *_: Any) -> Tensor:
        scale, x = ctx.saved_tensors
        return torch.zeros_like(x) if tangent is None else _scaled(tangent, ctx.factor, scale)

    @staticmethod
    def apply(*args: Any, **kwargs: Any) -> Tensor:
        return scale_gradient(*args, **kwargs)


def _scaled(grad: Tensor, factor: float, scale: Tensor | None) -> Tensor:
    if scale is not None:
        return (wide(grad) * scale if scale.dim() == 0 else grad * scale).to(grad.dtype)
    return -grad if factor == -1 else grad * factor  # negation gives the same in a third of the time on a few elements


@library.vmap(gradient_scaling)
def _(info: Any, in_dims: Any, x: Tensor, factor: float, scale: Tensor | None) -> Any:
    x = library.to_front(x, in_dims[0], info.batch_size)
    if scale is not None and in_dims[2] is not None:
        scale = scale.movedim(in_dims[2], 0)
        scale = scale.view(scale.shape[0], *(1,) * (x.dim() - scale.dim()), *scale.shape[1:])
    return gradient_scaling(x, factor, scale), 0


@leaf
def scale_gradient(x: Tensor, scale: float | Tensor) -> Tensor:
    """Return ``x`` and, in backward, multiply its gradient by ``scale``.

    ``y = x``, ``dL/dx = scale * dL/dy``, and likewise the tangent ``dy = scale * dx``. With ``scale = 2 * x.detach()``
    it is the layer ``y = x`` with the backward of ``x ** 2``.

    Args:
        x: any shape and strides; float16, bfloat16, float32 or float64.
        scale: a number, or a floating tensor that broadcasts to the shape of ``x``. It gets no gradient, as the
            value doesn't depend on it; in a double backward it does, as the gradient of ``x`` does.

    Returns:
        A view of ``x``: no copy is made. In-place writes to it raise if a gradient is recorded.

    Raises:
        TypeError: ``x`` isn't a tensor or has another dtype, or ``scale`` is neither a number nor a floating tensor.
        ValueError: ``scale`` doesn't broadcast to the shape of ``x``, or is on another device.

    The op takes O(1) time in forward and O(n) in backward; it keeps ``scale`` for backward.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        >>> custom_ops.scale_gradient(x, 2 * x.detach()).sum().backward()
        >>> x.grad
        tensor([2., 4., 6.])
    """
    _checks.has_dtype("x", x, _checks.FLOATING)
    scale = _scale("scale", scale)
    if not isinstance(scale, Tensor):
        if not torch.compiler.is_compiling():
            return gradient_scaling(x, scale, None)
        scale = as_tensor(scale, x)
    scale = _checks.beside(x, scale)
    _checks.same_device(x=x, scale=scale)
    if scale.dim() > x.dim() or not all(s in (1, n) for s, n in zip(reversed(scale.shape), reversed(x.shape))):
        raise ValueError(f"scale: expected a shape that broadcasts to {list(x.shape)}, got {list(scale.shape)}")
    return gradient_scaling(x, 1.0, scale)


def _scale(name: str, scale: Any) -> float | Tensor:
    if isinstance(scale, Tensor) and (scale.dim() > 0 or scale.is_floating_point()):
        _checks.has_dtype(name, scale, _checks.FLOATING)
        return scale
    return _checks.as_float(name, scale)


class ScaleGradient(torch.nn.Module):
    """Apply `scale_gradient` as a layer. A tensor ``scale`` is a buffer, so it moves and is saved with the layer.

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
        scale = _scale("scale", scale)
        if isinstance(scale, Tensor):
            self.register_buffer("scale", scale)
        else:
            self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return scale_gradient(x, self.scale)

    def extra_repr(self) -> str:
        return f"scale={list(self.scale.shape) if isinstance(self.scale, Tensor) else self.scale}"


@leaf
def reverse_gradient(x: Tensor, lambda_: float | Tensor = 1.0) -> Tensor:
    """Return ``x`` and, in backward, multiply its gradient by ``-lambda_``, as `scale_gradient` by ``-lambda_`` does.

    The layers before the op ascend the loss that the layers after it descend, like a feature extractor that is trained
    against a domain classifier.

    Args:
        x: any shape and strides; float16, bfloat16, float32 or float64.
        lambda_: the strength: a number, or a floating tensor that broadcasts to the shape of ``x``.

    Returns:
        A view of ``x``: no copy is made. In-place writes to it raise if a gradient is recorded.

    Raises:
        TypeError, ValueError: as in `scale_gradient`.

    The op takes O(1) time in forward and O(n) in backward.

    Source: Ganin and Lempitsky, "Unsupervised Domain Adaptation by Backpropagation", 2015.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> custom_ops.reverse_gradient(x, 0.5).sum().backward()
        >>> x.grad
        tensor([-0.5000, -0.5000])
    """
    _checks.has_dtype("x", x, _checks.FLOATING)
    lambda_ = _scale("lambda_", lambda_)
    if torch.compiler.is_compiling() and not isinstance(lambda_, Tensor):
        # as_tensor gets lambda_ and not -lambda_, for which torch 2.10 compiles each value anew.
        lambda_ = as_tensor(lambda_, x)
    return scale_gradient(x, -1.0 * lambda_)


class ReverseGradient(torch.nn.Module):
    """Apply `reverse_gradient` as a layer; set ``lambda_`` to follow a schedule.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.zeros(2, requires_grad=True)
        >>> custom_ops.ReverseGradient(0.5)(x).sum().backward()
        >>> x.grad
        tensor([-0.5000, -0.5000])
    """

    def __init__(self, lambda_: float = 1.0) -> None:
        super().__init__()
        self.lambda_ = _checks.as_float("lambda_", lambda_)

    def forward(self, x: Tensor) -> Tensor:
        return reverse_gradient(x, self.lambda_)

    def extra_repr(self) -> str:
        return f"lambda_={self.lambda_}"


# ---------------------------------------------------------------- reference and registry entry
