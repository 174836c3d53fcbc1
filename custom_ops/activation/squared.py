"""Squared ReLU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops import _checks, library
from custom_ops._bilinear import add
from custom_ops._layout import as_it_lies
from custom_ops._leaf import leaf
from custom_ops._native import define
from custom_ops.library import Function


@define
def squared_relu_forward(x: Tensor) -> Tensor:
    """Return max(x, 0)^2."""
    return x.new_empty(x.shape)


@define
def squared_relu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Return 2 max(x, 0) grad."""
    return x.new_empty(x.shape)


class SquaredReLUForward(Function, op=squared_relu_forward):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return SquaredReLUBackward.apply(grad, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return squared_relu_backward(tangent, *ctx.saved_tensors)


class SquaredReLUBackward(Function, op=squared_relu_backward):
    """The op is linear in grad; its derivative with respect to x is 2 grad where x is positive."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        grad, x = ctx.saved_tensors
        return squared_relu_backward(cotangent, x), _where_positive(x, 2 * grad * cotangent)

    @staticmethod
    def jvp(ctx: Any, of_grad: Tensor | None, of_x: Tensor | None) -> Tensor | None:
        grad, x = ctx.saved_tensors
        return add(
            None if of_grad is None else squared_relu_backward(of_grad, x),
            None if of_x is None else _where_positive(x, 2 * grad * of_x),
        )


def _where_positive(x: Tensor, value: Tensor) -> Tensor:
    return value.masked_fill(x <= 0, 0)


@library.vmap(squared_relu_forward)
def _(info: Any, in_dims: Any, x: Tensor) -> Any:
    return squared_relu_forward(x), in_dims[0]


@library.vmap(squared_relu_backward)
def _(info: Any, in_dims: Any, grad: Tensor, x: Tensor) -> Any:
    grad, x = (library.to_front(t, d, info.batch_size) for t, d in zip((grad, x), in_dims))
    return squared_relu_backward(grad, x), 0


@library.inductor(squared_relu_forward)
def _(x: Tensor) -> Tensor:
    kept = torch.where(x <= 0, 0, x)
    return (kept * kept).contiguous()


@library.inductor(squared_relu_backward)
def _(grad: Tensor, x: Tensor) -> Tensor:
    return torch.where(x <= 0, 0, 2 * grad * x).contiguous()


def _pointwise(*tensors: Any) -> Any:
    from torch.distributed.tensor import Replicate, Shard

    placements = [Replicate(), *(Shard(d) for d in range(tensors[0].ndim))]
    return [([p], [p] * len(tensors)) for p in placements]


library.sharding(squared_relu_forward)(_pointwise)
library.sharding(squared_relu_backward)(_pointwise)


@leaf
def squared_relu(x: Tensor) -> Tensor:
    """Return ``max(x, 0)^2`` in one pass, keeping only ``x`` for backward, where torch keeps relu(x) too.

    Backward needs ``x`` itself, as the slope isn't one of two numbers. The function is differentiable to any order and
    in forward mode; the second derivative is 2 where x is positive. Arguments, errors and layout are those of `relu`,
    but there is no ``inplace``, since backward needs the ``x`` that would be overwritten. The op takes O(n) time.

    Source: So et al., "Primer", NeurIPS 2021.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.squared_relu(torch.tensor([-1.0, 3.0]))
        tensor([0., 9.])
    """
    _checks.has_dtype("x", x, _checks.FLOATING)
    return as_it_lies(x, lambda rows, _: SquaredReLUForward.apply(rows))


class SquaredReLU(torch.nn.Module):
    """Apply `squared_relu` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.SquaredReLU()(torch.tensor([-1.0, 3.0]))
        tensor([0., 9.])
    """

    def forward(self, x: Tensor) -> Tensor:
        return squared_relu(x)
