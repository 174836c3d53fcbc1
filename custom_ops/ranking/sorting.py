"""Soft ranks, soft sorting and Spearman's correlation: differentiable sorting by isotonic regression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from custom_ops import _checks, shards
from custom_ops._enums import GroupValue
from custom_ops._leaf import leaf
from custom_ops._native import define
from custom_ops._wide import under_autocast, wide
from custom_ops.library import Function
from custom_ops.ranking._arguments import (
    ListLossModule,
    checked,
    documented,
    not_nested,
    reduce,
    valid_items,
    value_of_empty,
    with_empty,
)
from custom_ops.ranking._inputs import in_order
from custom_ops.ranking._list_loss import is_differentiated
from custom_ops.ranking._lists import batch, list_dot, list_scale, shard

_REGULARIZATIONS = ("l2", "kl")


@define
def isotonic(
    x: Tensor, valid: Tensor | None, offsets: Tensor | None, strength: float, kl: bool, sort: bool
) -> tuple[Tensor, Tensor]:
    """Return the soft ranks (or, if ``sort``, the soft sort) of each list's items, and the groups that are pooled.

    ``groups`` has, for each place in a list's order (descending for ranks, ascending for ``sort``), the item of the row
    that it holds: i, or ~i where a group begins, or n, the row's length, after the last valid item and outside of all
    lists. At those places ``sort`` gives 0, as ranks do for invalid items. The results are float32 or float64.
    """
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.int32)


@define
def group_reduce(
    x: Tensor, groups: Tensor, offsets: Tensor | None, value: int, from_order: bool, to_order: bool, scale: float
) -> Tensor:
    """Return ``scale`` times each group's sum, its mean, or x minus its mean (``value``), for all members of the group.

    x is given by place in the order if ``from_order``, else by item, and likewise the result by ``to_order``.
    """
    return x.new_empty(x.shape)


@define
def group_share(v: Tensor, ranks: Tensor, groups: Tensor, offsets: Tensor | None, scale: float) -> Tensor:
    """Return ``scale`` times the ranks times (v minus its mean over the group, weighted by the ranks), by item.

    This is the derivative of the "kl" ranks without an exponential; the op has no derivative itself.
    """
    return v.new_empty(v.shape)


@define
def group_softmax(x: Tensor, groups: Tensor, offsets: Tensor | None, scale: float, weighted: bool) -> Tensor:
    """Return the softmax of scale x within each group, times the sum of the group's ranks if ``weighted``, by item."""
    return x.new_empty(x.shape)


def _softmax_derivative(
    v: Tensor, scale: float, weighted: bool, x: Tensor, groups: Tensor, offsets: Tensor | None
) -> Tensor:
    """Return the Jacobian of `group_softmax`, which is symmetric, times v."""
    softmax = group_softmax(x, groups, offsets, scale, False)
    v = torch.where(softmax == 0, 0, v)  # v may be NaN for an invalid item
    moved = v * (group_softmax(x, groups, offsets, scale, True) if weighted else softmax)
    return scale * (moved - softmax * group_reduce(moved, groups, offsets, GroupValue.SUM.value, False, False, 1.0))


class Isotonic(Function, op=isotonic):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, _, offsets, ctx.strength, ctx.kl, ctx.sort = inputs
        ctx.mark_non_differentiable(output[1])
        where = (x if ctx.kl else None, output[1], offsets)
        ctx.save_for_backward(*where, output[0] if ctx.kl and not ctx.sort else None)
        ctx.save_for_forward(*where)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        x, *where, ranks = ctx.saved_tensors
        if ctx.sort and ctx.kl:
            total = group_reduce(grad, *where, GroupValue.SUM.value, True, False, 1.0)
            of_x = total * group_softmax(x, *where, -1.0, False)
        elif ctx.sort:
            of_x = group_reduce(grad, *where, GroupValue.MEAN.value, True, False, 1.0)
        elif ctx.kl and not is_differentiated():
            of_x = group_share(grad, ranks, *where, 1 / ctx.strength)
        else:
            of_x = _rank_derivative(ctx, grad, x, *where)
        return of_x, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor, None]:
        x, *where = ctx.saved_tensors
        if ctx.sort and ctx.kl:
            softmax = group_softmax(x, *where, -1.0, False)
            return group_reduce(softmax * tangent, *where, GroupValue.SUM.value, False, True, 1.0), None
        if ctx.sort:
            return group_reduce(tangent, *where, GroupValue.MEAN.value, False, True, 1.0), None
        return _rank_derivative(ctx, tangent, x, *where), None


def _rank_derivative(ctx: Any, v: Tensor, x: Tensor, groups: Tensor, offsets: Tensor | None) -> Tensor:
    """Return the Jacobian of the ranks, which is symmetric, times v."""
    if ctx.kl:
        return _softmax_derivative(v, 1 / ctx.strength, True, x, groups, offsets)
    return group_reduce(v, groups, offsets, GroupValue.CENTRED.value, False, False, 1 / ctx.strength)


class GroupReduce(Function, op=group_reduce):
    """The op is linear; its adjoint exchanges the orders of input and output."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, groups, offsets, *ctx.options = inputs
        ctx.save_for_backward(groups, offsets)
        ctx.save_for_forward(groups, offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        value, from_order, to_order, scale = ctx.options
        return group_reduce(grad, *ctx.saved_tensors, value, to_order, from_order, scale), *[None] * 6

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return group_reduce(tangent, *ctx.saved_tensors, *ctx.options)


class GroupSoftmax(Function, op=group_softmax):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.scale, ctx.weighted = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_x = _softmax_derivative(grad, ctx.scale, ctx.weighted, *ctx.saved_tensors)
        return of_x, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _softmax_derivative(tangent, ctx.scale, ctx.weighted, *ctx.saved_tensors)


for _op in (isotonic, group_reduce, group_share, group_softmax):
    batch(_op)
    shard(_op)


def _regularization(regularization: str, strength: float) -> tuple[float, bool]:
    """Return the strength and whether the regularization is "kl"."""
    _checks.is_one_of("regularization", regularization, _REGULARIZATIONS)
    return _checks.as_positive("regularization_strength", strength), regularization == "kl"


def _soft(
    values: Tensor,
    regularization: str,
    strength: float,
    mask: Tensor | None,
    lengths: Tensor | None,
    cu_lengths: Tensor | None,
    sort: bool,
) -> Tensor:
    not_nested("values", values)
    _checks.has_dtype("values", values, _checks.FLOATING)
    if values.dim() == 0:
        raise ValueError("values: expected [..., n], got a single number")
    options = _regularization(regularization, strength)
    where = valid_items("values", values, mask, lengths, cu_lengths)
    return _fitted(wide(values), *where, *options, sort).to(values.dtype)


def _fitted(x: Tensor, valid: Tensor | None, offsets: Tensor | None, *options: Any) -> Tensor:
    return _by_lists(lambda *lists: isotonic(*lists, *options)[0], x, valid, offsets)


def _by_lists(run: Callable[..., Tensor], x: Tensor, valid: Tensor | None, offsets: Tensor | None) -> Tensor:
    """Return ``run(x, valid, offsets)``; with DTensors each process runs its own lists."""
    if not shards.is_sharded(x):
        return run(x, valid, offsets)
    lists = shards.batch_labels(x.dim() - 1) + "N"
    return shards.in_shards(run, f"{lists},{lists},L->{lists}", x, valid, offsets)


@leaf
@documented
def soft_rank(
    values: Tensor,
    regularization: str = "l2",
    regularization_strength: float = 1.0,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
) -> Tensor:
    """Return ranks from 1 (the least value) to n (the greatest) as a continuous function of the values.

    They are the projection of values / e, in the Euclidean norm or for "kl" in relative entropy, onto the convex hull
    of the permutations of 1..n, where e is ``regularization_strength``. A smaller e gives results closer to the hard
    ranks. Values that are at least e apart from their neighbours have their hard ranks, closer ones share theirs, and
    tied ones share them equally. For "l2" the ranks are piecewise linear, with second derivative 0 except at the kinks;
    for "kl" they are differentiable to any order between the kinks. Both work in forward mode too.

    The op takes O(n log n) time and O(n) memory; on a GPU the regression of each list is sequential.

    Args:
        values: ``[..., n]``; float16, bfloat16, float32 or float64.
        regularization: "l2" or "kl".
        regularization_strength: e > 0.

    Returns:
        ``[..., n]`` in the values' dtype, computed in double and rounded once; 0 for values that don't count.

    Source: Blondel et al., "Fast Differentiable Sorting and Ranking", ICML 2020; torchsort.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.tensor([2.9, -0.4, 3.1], requires_grad=True)
        >>> ranks = custom_ops.soft_rank(x, regularization_strength=0.5)
        >>> ranks.detach()
        tensor([2.3000, 1.0000, 2.7000])
        >>> ranks[0].backward()
        >>> x.grad
        tensor([ 1.,  0., -1.])
    """
    return _soft(values, regularization, regularization_strength, mask, lengths, cu_lengths, sort=False)


@leaf
@documented
def soft_sort(
    values: Tensor,
    regularization: str = "l2",
    regularization_strength: float = 1.0,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
) -> Tensor:
    """Return the values in ascending order, as a function that is continuous and almost everywhere differentiable.

    The result is the projection of (1..n) / e onto the convex hull of the permutations of the values, where e is
    ``regularization_strength``. For e near 0 it is the sorted values; a larger e draws them towards their mean. For
    "l2" it is piecewise linear, with second derivative 0 except at the kinks; for "kl" it is differentiable to any
    order between the kinks. Both work in forward mode too. The costs are those of `soft_rank`.

    Args:
        values: ``[..., n]``; float16, bfloat16, float32 or float64.
        regularization: "l2" or "kl".
        regularization_strength: e > 0.

    Returns:
        ``[..., n]`` in the values' dtype, computed in double and rounded once. With ``cu_lengths`` each list is sorted
        within its own bounds. The values that count come first, then 0.

    Source: Blondel et al., "Fast Differentiable Sorting and Ranking", ICML 2020; torchsort.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.soft_sort(torch.tensor([2.9, -0.4, 3.1]), regularization_strength=0.1)
        tensor([-0.4000,  2.9000,  3.1000])
    """
    return _soft(values, regularization, regularization_strength, mask, lengths, cu_lengths, sort=True)


@leaf
@documented
def spearman_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    item_weights: Tensor | None = None,
    reduction: str = "mean",
    regularization: str = "l2",
    regularization_strength: float = 1.0,
    empty: float | None = None,
) -> Tensor:
    """Return 1 - Spearman's rank correlation, of the soft ranks of the scores with the ranks of the labels.

    It is 1 - the Pearson correlation of `soft_rank` with the labels' ranks, where tied labels share theirs; with
    ``item_weights`` it is the weighted correlation of the same ranks. It is 0 for
    the same order and 2 for the reverse. A list whose labels are all tied, or with fewer than two items, doesn't
    contribute; if all scores are tied, the correlation counts as 0, without a gradient. The derivatives are those of
    `soft_rank`. The loss takes O(n log n) time and O(n) memory.

    Args:
        regularization, regularization_strength: those of `soft_rank`.

    Source: Blondel et al., "Fast Differentiable Sorting and Ranking", ICML 2020.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.spearman_loss(torch.tensor([1.0, 5.0, 9.0]), torch.tensor([1, 3, 2]))
        tensor(0.5000)
    """
    where = checked(scores, labels, mask, lengths, cu_lengths, weights, reduction, item_weights=item_weights)
    options = *_regularization(regularization, regularization_strength), False
    if weights is not None:
        where = _without_weightless(scores, labels, *where, weights)
    ranks = _fitted(wide(scores), *where, *options).double()
    wanted = _by_lists(_ranks, labels.detach(), *where).masked_fill(labels.isnan(), torch.nan)
    ones = torch.ones_like(wanted)
    count = list_dot(ones, ones, *where)
    if item_weights is None:
        mean = list_scale((count + 1) / 2, ones, *where)  # the mean of both kinds of ranks
        ours, theirs = ranks - mean, wanted - mean
        shared = theirs
        spread = list_dot(ours, ours, *where)
    else:
        total = list_dot(item_weights.double(), ones, *where)
        share = list_scale(torch.where(total > 0, count / total, 0), item_weights.double(), *where)
        size = torch.where(count > 0, count, 1)
        ours, theirs = (x - list_scale(list_dot(share, x, *where) / size, ones, *where) for x in (ranks, wanted))
        shared = share * theirs
        spread = list_dot(ours, share * ours, *where)
    of_labels = list_dot(theirs, shared, *where)
    active = ~_tied(of_labels, count)  # weighted means are rounded
    defined = active & ~(_tied(spread, count) & (of_labels > 0))  # NaN labels give NaN even if the scores are tied
    scale = torch.where(defined, spread * of_labels, 1).rsqrt()
    loss = torch.where(active, 1 - torch.where(defined, list_dot(ours, shared, *where) * scale, 0), 0)
    if cu_lengths is None:
        loss, active = loss.squeeze(-1), active.squeeze(-1)
    loss, active = with_empty(loss, active, value_of_empty(empty))
    loss = reduce(loss, active, weights, reduction)
    return loss.float() if under_autocast(scores) else loss.to(scores.dtype)


def _without_weightless(
    scores: Tensor, labels: Tensor, valid: Tensor | None, offsets: Tensor | None, weights: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return valid items without those of undefined lists of weight 0, and the bounds of the lists.

    Otherwise 0 times the undefined derivative of such a list would be its gradient.
    """
    ones = torch.ones_like(scores, dtype=torch.float64)
    undefined = list_dot((scores.isnan() | labels.isnan()).double(), ones, valid, offsets) > 0
    weightless = (weights if offsets is not None else weights.unsqueeze(-1)) == 0
    stays = list_scale((undefined & weightless).double(), ones, valid, offsets) == 0
    return stays if valid is None else stays & valid, offsets


def _tied(spread: Tensor, n: int | Tensor) -> Tensor:
    """Return whether n soft ranks, whose squared distances from the mean sum to ``spread``, are equal up to
    rounding.
    """
    rounding = 64 * torch.finfo(torch.float64).eps * n
    return spread <= n * rounding * rounding


def _ranks(x: Tensor, valid: Tensor | None, offsets: Tensor | None) -> Tensor:
    """Return ascending ranks from 1 of each list's valid items, with those of ties averaged, in float64."""

    def places(x: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many items of the row are less than each, and how many aren't greater."""
        x = x.contiguous()
        ordered = x.sort(dim=-1).values
        below, through = (torch.searchsorted(ordered, x, side=side, out_int32=True) for side in ("left", "right"))
        return below, through

    below, through = places(in_order(x))
    start: Any = 0
    n = x.shape[-1]
    if valid is not None:
        below = below.masked_fill(~valid, n)  # invalid items come last
    if offsets is not None:
        item = torch.arange(n, device=x.device)
        place = torch.searchsorted(offsets.contiguous(), item, right=True) - 1
        below, start = below + place * (n + 1), offsets[place]
    if valid is not None or offsets is not None:
        below, through = places(below)
    return (below + through + 1).double() / 2 - start


class SpearmanLoss(ListLossModule):
    """Apply `spearman_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> loss = custom_ops.SpearmanLoss(regularization_strength=0.1)
        >>> loss(torch.tensor([0.5, 0.1, 0.9]), torch.tensor([2, 0, 1]))
        tensor(0.5000)
    """

    function = staticmethod(spearman_loss)

    def __init__(
        self,
        reduction: str = "mean",
        regularization: str = "l2",
        regularization_strength: float = 1.0,
        empty: float | None = None,
    ) -> None:
        super().__init__(
            reduction, regularization=regularization, regularization_strength=regularization_strength, empty=empty
        )
