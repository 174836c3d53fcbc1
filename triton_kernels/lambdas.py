"""LambdaLoss: pairs weighted by the change of a ranking metric if the two items were swapped."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops._enums import PairNormalization, PairWeighting, TopPairs
from custom_ops.triton_kernels.common import constant, kernel
from custom_ops.triton_kernels.lists import (
    PAIRS,
    TILES,
    WIDE,
    Lists,
    columns,
    reducing,
    relative_gains,
    share_of,
    sum_of_rows,
    tiled_columns,
)
from custom_ops.triton_kernels.pairwise import LOGISTIC, both_orders, pair_value, wrong_order

_ROWS, _COLUMNS = 16, 32
_RANKNET = constant(PairWeighting.RANKNET)
_LAMBDARANK = constant(PairWeighting.LAMBDARANK)
_NDCG1 = constant(PairWeighting.NDCG1)
_NDCG2 = constant(PairWeighting.NDCG2)
_LABEL_DIFF = constant(PairWeighting.LABEL_DIFF)


@kernel(
    "*T *T *T *T *T *i32 *T *T *T *i32 *i64 *fp64 *fp64 *T fp64 i32 i32 i32 i32 i32 i32",
    WIDE,
    {
        (weighting, hessian, weighted): {
            "WEIGHTING": weighting,
            "HESSIAN": hessian,
            "WEIGHTED": weighted,
            "ROWS": _ROWS,
            "COLUMNS": _COLUMNS // 2 if weighted or not hessian else _COLUMNS,  # more of them spill in float64
        }
        for weighting in map(int, PairWeighting)
        for hessian in (False, True)
        for weighted in (False, True)
    },
    narrow=PAIRS,
    registers=96,
    budget=400,
)
@triton.jit(do_not_specialize=["items", "stride", "lists", "blocks", "by_difference", "lambdas"])
def lambda_pairs_kernel(
    s_ptr,
    y_ptr,
    weight_ptr,
    far_ptr,
    v_ptr,
    rank_ptr,
    gain_ptr,
    discount_ptr,
    distance_ptr,
    owner_ptr,
    bounds_ptr,
    slope_ptr,
    value_ptr,
    count_ptr,
    sigma: tl.float64,
    items,
    stride,
    lists,
    blocks,
    by_difference,
    lambdas,
    WEIGHTING: tl.constexpr,
    HESSIAN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Store each item's slope, and the number and total value of its pairs with items that it should be above.

    WEIGHTED counts a pair by the product of its items' weights; that of this item is multiplied at the end. It also
    reads `far`, the factor of `distance` for the lower item, and these options: `by_difference` divides a pair's weight
    by 0.01 + |s_i - s_j|, and for `lambdas` the values are the magnitudes of the slopes instead.
    """
    program = tl.program_id(0).to(tl.int64)
    example = program // blocks * items
    owner_ptr += program // blocks * stride
    i = program % blocks * ROWS + tl.arange(0, ROWS)
    owner_i = tl.load(owner_ptr + i, mask=i < items, other=-1)
    valid_i = owner_i >= 0
    s_i = tl.load(s_ptr + example + i, mask=valid_i, other=0) * 0.5  # differences of halves can't overflow
    y_i = tl.load(y_ptr + example + i, mask=valid_i, other=0)
    rank_i = tl.load(rank_ptr + example + i, mask=valid_i, other=0)
    gain_i = tl.load(gain_ptr + example + i, mask=valid_i, other=0)
    discount_i = tl.load(discount_ptr + example + i, mask=valid_i, other=0)
    slope, value = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64)
    count = tl.zeros([ROWS], tl.float64 if WEIGHTED else tl.int32)
    if WEIGHTING == _NDCG1:  # each item with itself
        self_i = valid_i & (rank_i < 0)
        value = tl.where(self_i, gain_i * discount_i * 0.6931471805599453, 0.0).to(tl.float64)
        count = self_i.to(count.dtype)
        if WEIGHTED:
            own = tl.load(weight_ptr + example + i, mask=valid_i, other=0)
            value *= own
            count *= own
            value = tl.where(lambdas != 0, 0.0, tl.where(by_difference != 0, value * 100, value))
    if WEIGHTED:
        far_i = tl.load(far_ptr + example + i, mask=valid_i, other=0)
    if HESSIAN:
        v_i = tl.load(v_ptr + example + i, mask=valid_i, other=0)
    twice = tl.full([1, 1], 2.0 * sigma, s_i.dtype)
    start, stop = columns(bounds_ptr, owner_i, items, lists, True)
    for tiles in range(start, stop, TILES * COLUMNS):
        slopes, values = tl.zeros([ROWS, COLUMNS], s_i.dtype), tl.zeros([ROWS, COLUMNS], s_i.dtype)
        counts = tl.zeros([ROWS, COLUMNS], s_i.dtype if WEIGHTED else tl.int32)
        tiled = tiled_columns(tiles, stop, COLUMNS)
        for first in range(0, tiled, COLUMNS):
            place = first + tl.arange(0, COLUMNS)
            j = tiles + place
            owner_j = tl.load(owner_ptr + j, mask=place < tiled, other=-1)
            valid_j = owner_j >= 0
            s_j = tl.load(s_ptr + example + j, mask=valid_j, other=0) * 0.5
            y_j = tl.load(y_ptr + example + j, mask=valid_j, other=0)
            rank_j = tl.load(rank_ptr + example + j, mask=valid_j, other=0)
            in_top = tl.minimum(rank_i[:, None], rank_j[None, :]) < 0
            both = valid_i[:, None] & (owner_i[:, None] == owner_j[None, :]) & in_top
            if WEIGHTING == _NDCG1:  # all other pairs, in both orders
                above = both & (i[:, None] != j[None, :])
                below = above
            else:
                above = both & (y_i[:, None] > y_j[None, :])
                below = both & (y_i[:, None] < y_j[None, :])
            if WEIGHTING == _RANKNET:
                w = tl.full([ROWS, COLUMNS], 1.0, s_i.dtype)
            elif WEIGHTING == _LABEL_DIFF:
                w = tl.abs(y_i[:, None] - y_j[None, :])
            else:
                gain_j = tl.load(gain_ptr + example + j, mask=valid_j, other=0)
                discount_j = tl.load(discount_ptr + example + j, mask=valid_j, other=0)
                if WEIGHTING != _NDCG1:
                    w = tl.abs(discount_i[:, None] - discount_j[None, :])
                    if WEIGHTING != _LAMBDARANK:
                        a = tl.abs(rank_i[:, None] - rank_j[None, :])
                        by = tl.load(distance_ptr + a, mask=above | below, other=0)
                        if WEIGHTED:
                            far_j = tl.load(far_ptr + example + j, mask=valid_j, other=0)
                            by *= tl.where(rank_i[:, None] > rank_j[None, :], far_i[:, None], far_j[None, :])
                        w = by if WEIGHTING == _NDCG2 else w + by
                    w *= tl.abs(gain_i[:, None] - gain_j[None, :])
            if WEIGHTED:
                weight_j = tl.load(weight_ptr + example + j, mask=valid_j, other=0)[None, :]
            difference = s_i[:, None] - s_j[None, :]
            if WEIGHTING == _NDCG1:
                lead = difference * twice
                w_i, w_j = (gain_i * discount_i)[:, None], (gain_j * discount_j)[None, :]
                if WEIGHTED:
                    w_i, w_j = w_i * weight_j, w_j * weight_j
                w = w_i + w_j
            else:
                lead = tl.where(below, -difference, difference) * twice
                if WEIGHTED:
                    w *= weight_j
            if WEIGHTED:
                counts += tl.where(above, weight_j, 0.0)
                apart = tl.abs(difference) * 2
                apart = 0.01 + tl.where(apart == apart, apart, 0.0)  # NaN must not reach a weight of 0
                closeness = tl.where(by_difference != 0, 1 / apart, 1.0)
                w *= closeness
                if WEIGHTING == _NDCG1:
                    w_i, w_j = w_i * closeness, w_j * closeness
            else:
                counts += above.to(tl.int32)
            above &= w != 0  # infinite scores with weight 0 change nothing
            below &= w != 0
            if HESSIAN:
                v_j = tl.load(v_ptr + example + j, mask=valid_j, other=0)
                move = w * both_orders(lead) * (v_i[:, None] - v_j[None, :])
                slopes += tl.where(above | below, move, 0.0) * share_of(COLUMNS)
            else:
                if WEIGHTING == _NDCG1:
                    g = w_j * wrong_order(-lead) - w_i * wrong_order(lead)
                    slopes += tl.where(above, g, 0.0) * share_of(COLUMNS)
                    w = w_i
                    above &= w != 0
                else:
                    g = w * wrong_order(lead)
                    slopes += tl.where(above, -g, tl.where(below, g, 0.0)) * share_of(COLUMNS)
                wrong = tl.where(difference < 0, -difference * w * twice, 0.0)
                terms = w * pair_value(tl.abs(lead), LOGISTIC) + wrong
                if WEIGHTED:
                    terms = tl.where(lambdas != 0, w * wrong_order(lead), terms)
                values += tl.where(above, terms, 0.0) * share_of(COLUMNS)
        slope += sum_of_rows(slopes)
        value += sum_of_rows(values)
        count += tl.sum(counts, axis=1)
    if WEIGHTED:
        weight = tl.load(weight_ptr + example + i, mask=valid_i, other=0)
        slope = tl.where(weight == 0, 0.0, slope * weight)  # 0 even beside infinite scores
        value = tl.where(weight == 0, 0.0, value * weight)
        count *= weight
    tl.store(slope_ptr + example + i, slope, mask=i < items)
    tl.store(value_ptr + example + i, value, mask=i < items)
    tl.store(count_ptr + example + i, count.to(s_i.dtype), mask=i < items)


def _pairs(
    lists: Lists,
    scores: Tensor,
    labels: Tensor,
    item_weights: Tensor | None,
    v: Tensor | None,
    weighting: int,
    k: int,
    top: int,
    exponential: bool,
    sigma: float,
    mu: float,
    scale: float,
    normalize: int,
    by_difference: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    every_rank = top == TopPairs.METRIC and weighting in (PairWeighting.NDCG2, PairWeighting.NDCG2PP)
    by_lambdas = normalize == PairNormalization.LAMBDAS
    special = item_weights is not None or by_difference or by_lambdas or every_rank
    given_weights = torch.ones_like(scores) if special and item_weights is None else item_weights
    scores, labels, weights, vector = lists.operands(scores, labels, given_weights, v)
    owners, stride = lists.owners()
    by_item = owners.reshape(lists.examples if stride else 1, lists.items)
    by_item = by_item.expand(lists.examples, lists.items).reshape(scores.shape)
    owned = by_item >= 0
    rank = lists.ranks(scores)
    both = top == TopPairs.AND
    if both:  # items below the top are left out like masked ones
        owners, stride = torch.where(rank < k, by_item, -1), lists.items
    gain, discount = scores, scores  # a placeholder that isn't read
    distance = discount_of(torch.arange(-1, lists.items, device=scores.device))
    distance = (distance[:-1] - distance[1:]) * (mu if weighting == PairWeighting.NDCG2PP else 1.0)
    distance = distance.to(scores.dtype)  # by distance of the ranks; distance 0 isn't read
    some = active = None
    if both or special:  # True for a list with a pair, be it in the top or below
        if weighting == PairWeighting.NDCG1:
            active = lists.sum(owned.to(scores.dtype)) > 1
        else:
            highest = lists.largest(labels.masked_fill(~owned, -math.inf), -math.inf)
            differs = owned & (labels != lists.to_items(highest))
            active = lists.sum(differs.to(scores.dtype)) > 0
    if weighting not in (PairWeighting.RANKNET, PairWeighting.LABEL_DIFF):
        labels_in = labels.double().masked_fill(~owned, 0)
        ones = labels_in.new_ones((*lists.batch, lists.lists))
        gains = relative_gains(labels_in, lists.to_items(lists.largest(labels_in)), exponential)
        place = lists.ranks(labels)
        best = discount_of(place).masked_fill(place >= k, 0)
        most = lists.sum((gains * best).masked_fill(~owned, 0))
        some = ~(most <= 0)
        gain = lists.scale(torch.where(some, ones / most, 0), gains).to(scores.dtype)
        discount = discount_of(rank).to(scores.dtype)
        if top == TopPairs.METRIC:
            discount = discount.masked_fill(rank >= k, 0)
    far = torch.ones_like(scores) if special else scores
    if every_rank:
        far = torch.where(rank >= k, 1 / (1 - discount_of(rank.clamp(min=1))), 1).to(scores.dtype)
    slope, value = (torch.empty_like(scores, dtype=torch.float64) for _ in range(2))
    count = torch.empty_like(scores)
    blocks = triton.cdiv(lists.items, _ROWS)
    from_top = (rank - (lists.items if every_rank else min(k, lists.items))).to(torch.int32)  # negative in the top k
    pointers = (scores, labels, weights, far, vector, from_top, gain, discount, distance, owners, lists.bounds)
    sizes = (lists.items, stride, lists.lists, blocks, int(by_difference))

    def launch(hessian: bool, lambdas: bool) -> None:
        outputs = (slope, value, count, sigma)
        variant = (weighting, hessian, special)
        lambda_pairs_kernel(lists.examples * blocks, *pointers, *outputs, *sizes, int(lambdas), variant=variant)

    share = torch.ones(1, dtype=torch.float64, device=scores.device)
    if by_difference:  # the kernel divides by 0.01 where all scores are equal
        highest, lowest = (lists.largest(x.masked_fill(~owned, -math.inf), -math.inf) for x in (scores, -scores))
        share = torch.where(highest == -lowest, 0.01, share)
    if by_lambdas:
        launch(False, True)
        lambdas = lists.sum(value) * (2 * scale * sigma) * share
        if some is not None:
            lambdas = torch.where(some, lambdas, 0)
        share = share * torch.where(lambdas > 0, torch.log2(1 + lambdas) / lambdas, 1)
    launch(v is not None, False)
    pairs = lists.sum(count)
    active = pairs > (1 if weighting == PairWeighting.NDCG1 else 0) if active is None else active
    if some is not None:
        pairs, active = torch.where(some, pairs, 0), active & some
    factor = torch.full_like(pairs, scale, dtype=torch.float64) * share
    if normalize == PairNormalization.PAIRS:
        factor = factor / torch.where(pairs > 0, pairs, 1)
    moved = lists.scale(factor * (sigma if v is None else sigma * sigma), slope)
    loss = torch.where(active, lists.sum(value) * factor, 0)
    return loss.to(scores.dtype), moved.to(scores.dtype), active


def discount_of(rank: Tensor) -> Tensor:
    """Return 1 / log2(1 + r) in float64, where ``rank`` is r - 1."""
    return 1 / torch.log2(rank.double() + 2)


@reducing
def lambda_pairs(
    lists: Lists,
    scores: Tensor,
    labels: Tensor,
    item_weights: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, slope, active = _pairs(lists, scores, labels, item_weights, None, *options)
    lists.mark_undefined(labels, loss, active)
    return loss, slope, active


def lambda_pairs_slope(
    scores: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    offsets: Tensor | None,
    item_weights: Tensor | None,
    v: Tensor | None,
    *options: Any,
) -> Tensor:
    return _pairs(Lists(scores, valid, offsets), scores, labels, item_weights, v, *options)[1]
