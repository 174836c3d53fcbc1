"""Margin ranking loss of pairs of scores, elementwise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from custom_ops import _checks, library, shards
from custom_ops._bits import empty_mask
from custom_ops._leaf import leaf
from custom_ops._native import define
from custom_ops._wide import wide
from custom_ops.library import Function
from custom_ops.library.function import untraced


@define
def margin_ranking(
    input1: Tensor, input2: Tensor, target: Tensor, margin: float, divisor: int, reduce: bool, batch_dims: int
) -> tuple[Tensor, Tensor]:
    """Return the loss of each problem in a batch, and one bit per element that tells whether its gradient passes.

    The first ``batch_dims`` dimensions are the batch. ``reduce`` sums over the others and divides by ``divisor``, which
    the caller gives because the elements may be sharded. The mask has shape ``[*batch, ceil(n / 8)]`` for n elements
    per problem.
    """
    mask = empty_mask(target, batch_dims)
    return target.new_empty(mask.shape[:-1] if reduce else target.shape), mask


@define
def margin_ranking_backward(
    grad: Tensor, input1: Tensor | None, input2: Tensor | None, target: Tensor, mask: Tensor, divisor: int, reduce: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``grad`` times the loss's derivatives in input1, input2 and target (empty without the inputs).

    Let b be the mask's bit, and divide grad by ``divisor`` if the loss was reduced. The derivatives are then -b t grad,
    b t grad and -b (x1 - x2) grad.
    """
    of_target = target.new_empty(target.shape if input1 is not None else (0,))
    return target.new_empty(target.shape), target.new_empty(target.shape), of_target


def _contract(moves: Sequence[Tensor | None], slopes: Sequence[Tensor], reduce: bool, batch_dims: int) -> Tensor:
    """Return the sum of move times slope, over all but the batch dimensions if ``reduce``."""
    total = sum(wide(move) * slope for move, slope in zip(moves, slopes) if move is not None)
    assert isinstance(total, Tensor)
    dims = tuple(range(batch_dims, total.dim()))
    return total.sum(dims) if reduce and dims else total


class MarginRankingLossFunction(Function, op=margin_ranking):
    """``MarginRankingLossFunction.apply`` is `margin_ranking_loss`, called like a ``torch.autograd.Function``.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.MarginRankingLossFunction.apply(torch.tensor([1.0]), torch.tensor([1.5]), torch.ones(1), 0.25)
        tensor(0.7500)
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input1, input2, target, _, ctx.divisor, ctx.reduce, ctx.batch_dims = inputs
        mask = output[1]
        ctx.mark_non_differentiable(mask)
        # Only the target's gradient needs the inputs.
        scores = (input1, input2) if ctx.needs_input_grad[2] else (None, None)
        ctx.save_for_backward(*scores, target, mask)
        ctx.save_for_forward(input1, input2, target, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        grad1, grad2, grad_target = MarginRankingBackward.apply(grad, *ctx.saved_tensors, ctx.divisor, ctx.reduce)
        return grad1, grad2, grad_target if ctx.needs_input_grad[2] else None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None]:
        *tensors, mask = ctx.saved_tensors
        input1, input2, target = map(wide, tensors)
        ones = target.new_ones(target.shape[: ctx.batch_dims] if ctx.reduce else target.shape)
        slopes = margin_ranking_backward(ones, input1, input2, target, mask, ctx.divisor, ctx.reduce)
        return _contract(tangents[:3], slopes, ctx.reduce, ctx.batch_dims).to(tensors[2].dtype), None

    @staticmethod
    def apply(*args: Any, **kwargs: Any) -> Tensor:
        return margin_ranking_loss(*args, **kwargs)


class MarginRankingBackward(Function, op=margin_ranking_backward):
    """The op is linear in grad, and linear and self-adjoint in (input1, input2, target)."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.divisor, ctx.reduce = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, input1, input2, target, mask = ctx.saved_tensors
        if input1 is None:  # the third output is empty then
            cotangents = (*cotangents[:2], None)
        ones = torch.ones_like(wide(grad))
        slopes = margin_ranking_backward(ones, *map(wide, (input1, input2, target)), mask, ctx.divisor, ctx.reduce)
        of_grad = _contract(cotangents, slopes, ctx.reduce, mask.dim() - 1).to(grad.dtype)
        v1, v2, v3 = (torch.zeros_like(target) if v is None else v for v in cotangents)
        of_input1, of_input2, of_target = margin_ranking_backward(grad, v1, v2, v3, mask, ctx.divisor, ctx.reduce)
        if input1 is None:
            of_input1 = of_input2 = None
        return of_grad, of_input1, of_input2, of_target, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        grad, input1, _, target, mask = ctx.saved_tensors
        grad_t, *moves = tangents[:4]
        outputs = []
        if grad_t is not None:
            outputs.append(margin_ranking_backward(grad_t, *ctx.saved_tensors[1:], ctx.divisor, ctx.reduce))
        if any(move is not None for move in moves):
            t1, t2, t3 = (torch.zeros_like(target) if move is None else move for move in moves)
            if input1 is None:
                t1 = t2 = None
            outputs.append(margin_ranking_backward(grad, t1, t2, t3, mask, ctx.divisor, ctx.reduce))
        return tuple(sum(parts[1:], parts[0]) for parts in zip(*outputs))


@library.vmap(margin_ranking)
def _(info: Any, in_dims: Any, *args: Any) -> Any:
    *tensors, margin, divisor, reduce, batch_dims = args
    tensors = [library.to_front(t, d, info.batch_size) for t, d in zip(tensors, in_dims)]
    return margin_ranking(*tensors, margin, divisor, reduce, batch_dims + 1), (0, 0)


@library.vmap(margin_ranking_backward)
def _(info: Any, in_dims: Any, *args: Any) -> Any:
    *tensors, divisor, reduce = args
    tensors = [None if t is None else library.to_front(t, d, info.batch_size) for t, d in zip(tensors, in_dims)]
    out_dims = (0, 0, None if tensors[1] is None else 0)
    return margin_ranking_backward(*tensors, divisor, reduce), out_dims


library.autocast(margin_ranking, torch.float32)


@leaf
def margin_ranking_loss(
    input1: Tensor, input2: Tensor, target: Tensor, margin: float = 0.0, reduction: str = "mean"
) -> Tensor:
    """Return ``max(0, -target (input1 - input2) + margin)``: input1 should score higher where target is 1.

    It is an exact drop-in for ``torch.nn.functional.margin_ranking_loss`` in one pass without temporaries, which keeps
    ``target`` and one bit per element for backward. As in torch, the gradient passes at the kink, the target has a
    gradient too, and the mean over no element is NaN. Unlike in torch, an unsigned target isn't wrapped around. The
    loss is differentiable to any order and in forward mode. 16-bit inputs are computed in float32 and rounded once;
    under autocast the loss is float32.

    Args:
        input1, input2: scores; float16, bfloat16, float32 or float64.
        target: 1 or -1 (another number scales the loss), floating or integer. The three shapes broadcast.
        margin: the wanted lead of the right one, in units of the scores.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or for "none" a tensor of the broadcast shape; in the promoted dtype.

    Raises:
        TypeError: not a tensor, a wrong dtype, or ``margin`` isn't a number.
        ValueError: shapes that don't broadcast, several devices, an unknown ``reduction``.

    The loss takes O(n) time and memory. An expanded input is copied in full.

    Source: torch.nn.MarginRankingLoss.

    Example:
        >>> import torch, custom_ops
        >>> better = torch.tensor([0.2, 0.9], requires_grad=True)
        >>> loss = custom_ops.margin_ranking_loss(better, torch.tensor([0.5, 0.1]), torch.ones(2), margin=0.1)
        >>> loss.backward()
        >>> loss, better.grad
        (tensor(0.2000, grad_fn=<MarginRankingLossFunctionBackward>), tensor([-0.5000,  0.0000]))
    """
    _checks.has_dtype("input1", input1, _checks.FLOATING)
    _checks.has_dtype("input2", input2, _checks.FLOATING)
    _checks.is_tensor("target", target)
    integers = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
    if not integers and target.dtype not in _checks.FLOATING:
        raise TypeError(f"target: expected real numbers, got {str(target.dtype).removeprefix('torch.')}")
    margin = _checks.as_float("margin", margin)
    _checks.is_one_of("reduction", reduction, _checks.REDUCTIONS)
    if shards.is_sharded(input1, input2, target):
        return _in_shards((input1, input2, target), margin, reduction)
    tensors = _checks.broadcast(input1=input1, input2=input2, target=target)
    divisor = tensors[0].numel() if reduction == "mean" else 1
    return margin_ranking(*untraced(margin_ranking, *tensors, margin, divisor, reduction != "none", 0))[0]


def _in_shards(tensors: tuple[Tensor, ...], margin: float, reduction: str) -> Tensor:
    """Broadcast within each process, so a smaller tensor's gradient is summed before it is exchanged."""
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    divisor = math.prod(shape) if reduction == "mean" else 1

    def run(*tensors: Tensor) -> Tensor:
        parts = _checks.broadcast(**dict(zip(("input1", "input2", "target"), tensors)))
        return margin_ranking(*parts, margin, divisor, reduction != "none", 0)[0]

    names = shards.batch_labels(len(shape))
    labels = []
    for t in tensors:
        sizes = zip(names[len(shape) - t.dim() :], t.shape, shape[len(shape) - t.dim() :])
        labels.append("".join(name if size == of_all else "X" for name, size, of_all in sizes))
    return shards.in_shards(run, f"{','.join(labels)}->{names if reduction == 'none' else ''}", *tensors)


class MarginRankingLoss(torch.nn.Module):
    """Apply `margin_ranking_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.MarginRankingLoss(margin=0.25)(torch.tensor([1.0]), torch.tensor([1.5]), torch.ones(1))
        tensor(0.7500)
    """

    def __init__(self, margin: float = 0.0, reduction: str = "mean") -> None:
        super().__init__()
        _checks.is_one_of("reduction", reduction, _checks.REDUCTIONS)
        self.margin, self.reduction = _checks.as_float("margin", margin), reduction

    def forward(self, input1: Tensor, input2: Tensor, target: Tensor) -> Tensor:
        return margin_ranking_loss(input1, input2, target, self.margin, self.reduction)

    def extra_repr(self) -> str:
        return f"margin={self.margin}, reduction={self.reduction!r}"
