"""LambdaLoss: pairs weighted by the change of a ranking metric if the two items were swapped."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops._enums import PairNormalization, PairWeighting, TopPairs
from custom_ops.triton_kernels.common import constant, kernel
from custom_ops.triton_kernels.lists import (
    ANYWHERE,
    PAIRS,
    TILES,
    WIDE,
    Lists,
    columns,
    load_ranked,
    load_valid,
    reducing,
    relative_gain,
    share_of,
    sum_of_rows,
    tiled_columns,
)
from custom_ops.triton_kernels.pairwise import LOGISTIC, both_orders, pair_value, wrong_order

_ROWS, _COLUMNS = 16, 32
_BLOCK = 256  # items of a list at a time
_RANKNET = constant(PairWeighting.RANKNET)
_LAMBDARANK = constant(PairWeighting.LAMBDARANK)
_NDCG1 = constant(PairWeighting.NDCG1)
_NDCG2 = constant(PairWeighting.NDCG2)
_LABEL_DIFF = constant(PairWeighting.LABEL_DIFF)
_BOTH, _METRIC = constant(TopPairs.AND), constant(TopPairs.METRIC)
_PAIRS, _LAMBDAS = constant(PairNormalization.PAIRS), constant(PairNormalization.LAMBDAS)
_GAINLESS = (PairWeighting.RANKNET, PairWeighting.LABEL_DIFF)
# These are the bits of a list's mark.
_ACTIVE, _SOME_GAIN, _UNDEFINED, _ALIKE = (tl.constexpr(1 << bit) for bit in range(4))


@kernel(
    "*T *T *i64 *i64 *u8 *i64 *T *i32 *i32 *T *T *T *i32 i32 i32 i32 i32 i32 i32 i32",
    WIDE,
    {
        (gains, exponential): {"GAINS": gains, "EXPONENTIAL": exponential, "BLOCK": _BLOCK}
        for gains, exponential in ((False, False), (True, False), (True, True))
    },
    narrow=ANYWHERE,
    registers=96,
)
@triton.jit(do_not_specialize=["items", "lists", "masked", "k", "top", "every_rank", "every_pair"])
def lambda_rank_kernel(
    score_ptr,
    label_ptr,
    order_ptr,
    ideal_ptr,
    valid_ptr,
    bounds_ptr,
    sorted_ptr,
    owner_ptr,
    rank_ptr,
    gain_ptr,
    discount_ptr,
    far_ptr,
    mark_ptr,
    items,
    lists,
    masked,
    k,
    top,
    every_rank,
    every_pair,
    GAINS: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store what `lambda_pairs_kernel` reads of each item, and the mark of a list.

    ``order`` is that of the scores, ``ideal`` that of the labels, and ``sorted`` has room for the labels. The rank is
    negative in the top k, or always for `every_rank`. A list with two items is active if its labels differ, or for
    `every_pair`. Items below the top are left out like masked ones if both must be in it.
    """
    program = tl.program_id(0).to(tl.int64)
    index = program % lists
    start, stop = tl.load(bounds_ptr + index), tl.load(bounds_ptr + index + 1)
    base = program // lists * items
    none = float("-inf")
    high = tl.full([BLOCK], none, label_ptr.dtype.element_ty)
    low, best, worst = -high, high, -high
    undefined = tl.zeros([BLOCK], tl.int32)
    count = tl.zeros([1], tl.int32)
    limit = items if every_rank != 0 else k
    for first in range(start, stop, BLOCK):
        item, valid, rank, count = load_ranked(order_ptr + base, valid_ptr + base, stop, first, count, masked, BLOCK)
        exists = first + tl.arange(0, BLOCK) < stop
        y = tl.load(label_ptr + base + item, mask=valid, other=0)
        s = tl.load(score_ptr + base + item, mask=valid, other=0)
        high, low = tl.where(valid & (y > high), y, high), tl.where(valid & (y < low), y, low)
        best, worst = tl.where(valid & (s > best), s, best), tl.where(valid & (s < worst), s, worst)
        undefined |= (y != y).to(tl.int32)
        owned = valid & ((top != _BOTH) | (rank < k))
        tl.store(owner_ptr + base + item, tl.where(owned, index.to(tl.int32), -1), mask=exists)
        tl.store(rank_ptr + base + item, rank - limit, mask=valid)
        place = rank.to(tl.float64) + 2
        tl.store(
            far_ptr + base + item,
            tl.where((every_rank != 0) & (rank >= k), 1 / (1 - 1 / tl.log2(place)), 1.0),
            mask=valid,
        )
        if GAINS:
            discount = tl.where((top == _METRIC) & (rank >= k), 0.0, 1 / tl.log2(place))
            tl.store(discount_ptr + base + item, discount, mask=valid)
    if GAINS:  # the valid labels in descending order, wherever masked items lie between them
        count = tl.zeros([1], tl.int32)
        for first in range(start, stop, BLOCK):
            item, valid, place, count = load_ranked(
                ideal_ptr + base, valid_ptr + base, stop, first, count, masked, BLOCK
            )
            y = tl.load(label_ptr + base + item, mask=valid, other=0)
            tl.store(sorted_ptr + base + start + place, y, mask=valid)
        tl.debug_barrier()  # the next loads see what other threads stored
    valid_items, highest = tl.max(count), tl.maximum(tl.max(high).to(tl.float64), 0.0)
    mark = tl.where(tl.max(undefined) > 0, _UNDEFINED, 0) + tl.where(tl.max(best) == tl.min(worst), _ALIKE, 0)
    mark += tl.where((valid_items > 1) & ((every_pair != 0) | (tl.max(high) != tl.min(low))), _ACTIVE, 0)
    if GAINS:
        totals = tl.zeros([BLOCK], tl.float64)
        for first in range(0, tl.minimum(valid_items, k), BLOCK):
            place = first + tl.arange(0, BLOCK)
            counts = place < tl.minimum(valid_items, k)
            y = tl.load(sorted_ptr + base + start + place, mask=counts, other=0).to(tl.float64)
            totals += relative_gain(y, highest, EXPONENTIAL) / tl.log2(place.to(tl.float64) + 2)
        total = tl.sum(totals)
        for first in range(start, stop, BLOCK):
            item = base + first + tl.arange(0, BLOCK)
            inside = item < base + stop
            if masked != 0:
                inside = load_valid(valid_ptr, item, inside, True)
            y = tl.load(label_ptr + item, mask=inside, other=0).to(tl.float64)
            gain = relative_gain(y, highest, EXPONENTIAL) / total
            tl.store(gain_ptr + item, tl.where(total <= 0, 0.0, gain), mask=inside)
        mark += tl.where(total <= 0, 0, _SOME_GAIN)
    else:
        mark += _SOME_GAIN
    tl.store(mark_ptr + program, mark.to(tl.int32))


@kernel(
    "*T *T *T *T *T *i32 *T *T *T *i32 *i64 *fp64 *fp64 *T fp64 i32 i32 i32 i32 i32",
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
@triton.jit(do_not_specialize=["items", "lists", "blocks", "by_difference", "lambdas"])
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
    owner_ptr += example
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


@kernel(
    "*fp64 *fp64 *fp64 *T *i32 *i64 *T *T *u8 fp64 fp64 fp64 i32 i32 i32 i32",
    WIDE,
    {None: {"BLOCK": _BLOCK}},
    narrow=ANYWHERE,
    registers=96,
)
@triton.jit(do_not_specialize=["normalize", "by_difference", "items", "lists"])
def lambda_scale_kernel(
    sum_ptr,
    value_ptr,
    magnitude_ptr,
    count_ptr,
    mark_ptr,
    bounds_ptr,
    loss_ptr,
    slope_ptr,
    active_ptr,
    scale: tl.float64,
    sigma: tl.float64,
    steepness: tl.float64,
    normalize,
    by_difference,
    items,
    lists,
    BLOCK: tl.constexpr,
):
    """Store a list's normalised loss and slopes, and whether it contributes, from the sums over its items' pairs."""
    program = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(bounds_ptr + program % lists), tl.load(bounds_ptr + program % lists + 1)
    base = program // lists * items
    mark = tl.load(mark_ptr + program)
    some, alike = mark & _SOME_GAIN != 0, mark & _ALIKE != 0
    values, counts = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    magnitudes = tl.zeros([BLOCK], tl.float64)
    for first in range(start, stop, BLOCK):
        item = base + first + tl.arange(0, BLOCK)
        inside = item < base + stop
        values += tl.load(value_ptr + item, mask=inside, other=0)
        counts += tl.load(count_ptr + item, mask=inside, other=0)
        if normalize == _LAMBDAS:
            magnitudes += tl.load(magnitude_ptr + item, mask=inside, other=0)
    factor = tl.full([1], scale, tl.float64)
    if by_difference != 0:  # the pairs were divided by 0.01 where all scores are equal
        factor = tl.where(alike, factor * 0.01, factor)
    pairs, lambdas = tl.sum(counts), tl.sum(magnitudes) * 2.0 * sigma * factor
    if normalize == _PAIRS:
        factor /= tl.where(some & (pairs > 0), pairs, 1.0)
    if normalize == _LAMBDAS:
        factor *= tl.where(some & (lambdas > 0), tl.log2(1 + lambdas) / lambdas, 1.0)
    contributes = some & (mark & _ACTIVE != 0)
    loss = tl.sum(tl.where(contributes, tl.sum(values) * factor, 0.0))
    undefined = mark & _UNDEFINED != 0
    tl.store(loss_ptr + program, tl.where(undefined, float("nan"), loss).to(loss_ptr.dtype.element_ty))
    tl.store(active_ptr + program, (contributes | undefined).to(tl.uint8))
    factor *= steepness
    for first in range(start, stop, BLOCK):
        item = base + first + tl.arange(0, BLOCK)
        slope = tl.load(sum_ptr + item, mask=item < base + stop, other=0)
        tl.store(slope_ptr + item, slope * factor, mask=item < base + stop)


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
    if scores.numel() == 0:
        return lists.no_items(scores)
    by_distance = weighting in (PairWeighting.NDCG2, PairWeighting.NDCG2PP)
    every_rank = top == TopPairs.METRIC and by_distance
    by_lambdas = normalize == PairNormalization.LAMBDAS
    special = item_weights is not None or by_difference or by_lambdas or every_rank
    given_weights = torch.ones_like(scores) if special and item_weights is None else item_weights
    scores, labels, weights, vector = lists.operands(scores, labels, given_weights, v)
    gains, k = weighting not in _GAINLESS, min(k, lists.items)
    distance = scores  # a placeholder that isn't read
    if by_distance:  # by distance of the ranks; distance 0 isn't read
        ranks = torch.arange(1, lists.items + 2, dtype=torch.float64, device=scores.device)
        factor = mu if weighting == PairWeighting.NDCG2PP else 1.0
        distance = torch.diff(-factor / torch.log2(ranks)).to(scores.dtype)

    order = lists.order(scores)
    ideal = lists.order(labels) if gains else order
    rank, owner = (torch.empty_like(scores, dtype=torch.int32) for _ in range(2))
    if lists.several:
        owner.fill_(-1)  # items in no list
    gain, discount, far, count = (torch.empty_like(scores) for _ in range(4))
    loss, slope, active = lists.results(scores)
    mark = torch.empty_like(loss, dtype=torch.int32)
    sizes = (lists.items, lists.lists)
    given = (scores, labels, order, ideal, lists.valid, lists.bounds)
    outputs = (count, owner, rank, gain, discount, far, mark)  # the labels are sorted in what later has the counts
    every_pair = weighting == PairWeighting.NDCG1
    options = (int(lists.masked), k, top, int(every_rank), int(every_pair))
    lambda_rank_kernel(loss.numel(), *given, *outputs, *sizes, *options, variant=(gains, gains and exponential))

    sums, values, magnitudes = (torch.empty_like(scores, dtype=torch.float64) for _ in range(3))
    blocks = triton.cdiv(lists.items, _ROWS)
    pointers = (scores, labels, weights, far, vector, rank, gain, discount, distance, owner, lists.bounds)
    if by_lambdas:
        outputs = (sums, magnitudes, count, sigma, *sizes, blocks, int(by_difference), 1)
        lambda_pairs_kernel(lists.examples * blocks, *pointers, *outputs, variant=(weighting, False, special))
    outputs = (sums, values, count, sigma, *sizes, blocks, int(by_difference), 0)
    lambda_pairs_kernel(lists.examples * blocks, *pointers, *outputs, variant=(weighting, v is not None, special))
    pointers = (sums, values, magnitudes, count, mark, lists.bounds, loss, slope, active.view(torch.uint8))
    factors = (scale, sigma, sigma if v is None else sigma * sigma)
    lambda_scale_kernel(loss.numel(), *pointers, *factors, normalize, int(by_difference), *sizes)
    return loss, slope, active


@reducing
def lambda_pairs(
    lists: Lists,
    scores: Tensor,
    labels: Tensor,
    item_weights: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return _pairs(lists, scores, labels, item_weights, None, *options)


def lambda_pairs_slope(
    scores: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    offsets: Tensor | None,
    item_weights: Tensor | None,
    v: Tensor | None,
    *options: Any,
) -> Tensor:
    lists = Lists(scores, valid, offsets)
    return lists.moved(_pairs(lists, scores, labels, item_weights, v, *options)[1], v)
