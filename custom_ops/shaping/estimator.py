"""The straight-through estimator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops import _checks, library
from custom_ops._leaf import leaf
from custom_ops.library import Function


@library.compose("custom_ops::straight_through_estimator", view=True)
def straight_through_estimator(value: Tensor, x: Tensor) -> Tensor:
    """Return ``value`` and send its gradient to x."""
    return value


class StraightThroughFunction(Function, op=straight_through_estimator):
    """``StraightThroughFunction.apply(forward_value, x)`` is `straight_through`, as a ``torch.autograd.Function``.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.tensor([0.4, 1.6], requires_grad=True)
        >>> custom_ops.StraightThroughFunction.apply(x.round(), x).sum().backward()
        >>> x.grad
        tensor([1., 1.])
    """

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor | None) -> Tensor | None:
        # Without a copy, in-place ops on the output would write to the tangent.
        return None if tangent is None else tangent.clone()

    @staticmethod
    def apply(*args: Any, **kwargs: Any) -> Tensor:
        return straight_through(*args, **kwargs)


@library.vmap(straight_through_estimator)
def _(info: Any, in_dims: Any, *args: Tensor) -> Any:
    value, x = (library.to_front(t, d, info.batch_size) for t, d in zip(args, in_dims))
    return straight_through_estimator(value, x), 0


@leaf
def straight_through(forward_value: Tensor, x: Tensor) -> Tensor:
    """Return ``forward_value`` and send its gradient to ``x`` unchanged: the straight-through estimator.

    ``y = forward_value``, ``dL/dx = dL/dy``, and ``forward_value`` gets no gradient. The tangent is ``dy = dx``, that
    of ``x``: in both modes the estimator takes the identity as the derivative of ``forward_value`` with respect to
    ``x``. The tangent of ``forward_value`` itself, usually 0, is ignored like its gradient. The derivative is constant,
    so it adds nothing to second derivatives.

    Args:
        forward_value: a function of ``x``, such as ``x.round()``, with the shape, dtype and device of ``x``.
        x: any shape and strides; float16, bfloat16, float32 or float64.

    Returns:
        A view of ``forward_value``: no copy is made. In-place writes to it raise if a gradient is recorded.

    Raises:
        TypeError: not a tensor, a wrong dtype, or different dtypes.
        ValueError: different shapes or devices.

    The op takes O(1) time and keeps neither a tensor nor the graph of ``forward_value`` for backward.

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
    """Apply `straight_through` as a layer, with two inputs.

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


# ---------------------------------------------------------------- reference and registry entry
