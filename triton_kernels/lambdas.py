"""LambdaLoss: pairs weighted by what swapping them would do to the ranking."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops._enums import PairWeighting
from custom_ops.triton_kernels.common import constant, kernel
from custom_ops.triton_kernels.lists import PAIRS, WIDE, Lists, columns, list_scale, reducing, relative_gains
from custom_ops.triton_kernels.pairwise import LOGISTIC, pair_value, wrong_order

_ROWS, _COLUMNS = 32, 16
_RANKNET = constant(PairWeighting.RANKNET)
_LAMBDARANK = constant(PairWeighting.LAMBDARANK)
_NDCG1 = constant(PairWeighting.NDCG1)
_NDCG2 = constant(PairWeighting.NDCG2)
_LABEL_DIFF = constant(PairWeighting.LABEL_DIFF)


@kernel(
    "*T *T *T *i32 *T *T *T *i32 *i64 *T *T *T fp64 i32 i32 i32 i32",
    WIDE,
    {
        (weighting, hessian): {"WEIGHTING": weighting, "HESSIAN": hessian, "ROWS": _ROWS, "COLUMNS": _COLUMNS}
        for weighting in map(int, PairWeighting)
        for hessian in (False, True)
    },
    narrow=PAIRS,
)
@triton.jit(do_not_specialize=["items", "stride", "lists", "blocks"])
def lambda_pairs_kernel(
    s_ptr,
    y_ptr,
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
    WEIGHTING: tl.constexpr,
    HESSIAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Per item: its slope, the sum of its pairs' values over those it should be above, and their number."""
    program = tl.program_id(0).to(tl.int64)
    example = program // blocks * items
    owner_ptr += program // blocks * stride
    i = program % blocks * ROWS + tl.arange(0, ROWS)
    owner_i = tl.load(owner_ptr + i, mask=i < items, other=-1)
    valid_i = owner_i >= 0
    s_i = tl.load(s_ptr + example + i, mask=valid_i, other=0) * 0.5  # of halves no difference overflows
    y_i = tl.load(y_ptr + example + i, mask=valid_i, other=0)
    rank_i = tl.load(rank_ptr + example + i, mask=valid_i, other=0)
    gain_i = tl.load(gain_ptr + example + i, mask=valid_i, other=0)
    discount_i = tl.load(discount_ptr + example + i, mask=valid_i, other=0)
    slope = tl.full([ROWS], 0.0, s_i.dtype)
    value, count = slope, slope
    if WEIGHTING == _NDCG1:  # each item with itself
        self_i = valid_i & (rank_i < 0)
        value = tl.where(self_i, gain_i * discount_i * 0.6931471805599453, 0.0).to(s_i.dtype)
        count = tl.where(self_i, 1.0, 0.0).to(s_i.dtype)
    if HESSIAN:
        v_i = tl.load(v_ptr + example + i, mask=valid_i, other=0)
    twice = tl.full([1, 1], 2.0 * sigma, s_i.dtype)
    start, stop = columns(bounds_ptr, owner_i, items, lists, True)
    for first in range(start, stop, COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        owner_j = tl.load(owner_ptr + j, mask=j < stop, other=-1)
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
                    w = by if WEIGHTING == _NDCG2 else w + by
                w *= tl.abs(gain_i[:, None] - gain_j[None, :])
        difference = s_i[:, None] - s_j[None, :]
        if WEIGHTING == _NDCG1:
            lead = difference * twice
            w_i, w_j = (gain_i * discount_i)[:, None], (gain_j * discount_j)[None, :]
            w = w_i + w_j
        else:
            lead = tl.where(below, -difference, difference) * twice
        count += tl.sum(tl.where(above, 1.0, 0.0), axis=1)
        above &= w != 0  # infinite scores of no weight change nothing
        below &= w != 0
        if HESSIAN:
            v_j = tl.load(v_ptr + example + j, mask=valid_j, other=0)
            move = w * wrong_order(lead) * wrong_order(-lead) * (v_i[:, None] - v_j[None, :])
            slope += tl.sum(tl.where(above | below, move, 0.0), axis=1)
        else:
            if WEIGHTING == _NDCG1:
                g = w_i * wrong_order(lead) - w_j * wrong_order(-lead)
                slope -= tl.sum(tl.where(above, g, 0.0), axis=1)
                w = w_i
                above &= w != 0
            else:
                g = w * wrong_order(lead)
                slope += tl.sum(tl.where(above, -g, tl.where(below, g, 0.0)), axis=1)
            wrong = tl.where(difference < 0, -difference * w * twice, 0.0)
            value += tl.sum(tl.where(above, w * pair_value(tl.abs(lead), LOGISTIC) + wrong, 0.0), axis=1)
    tl.store(slope_ptr + example + i, slope, mask=i < items)
    tl.store(value_ptr + example + i, value, mask=i < items)
    tl.store(count_ptr + example + i, count, mask=i < items)


def _pairs(
    scores: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    offsets: Tensor | None,
    v: Tensor | None,
    weighting: int,
    k: int,
    both: bool,
    exponential: bool,
    sigma: float,
    mu: float,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    scores, labels = scores.contiguous(), labels.contiguous()
    lists = Lists(scores, valid, offsets)
    if any(x is not None and (x.shape != scores.shape or x.dtype != scores.dtype) for x in (labels, v)):
        raise RuntimeError("labels, v: expected the shape and dtype of the scores")
    owners, stride = lists.owners()
    by_item = owners.reshape(lists.examples if stride else 1, lists.items)
    by_item = by_item.expand(lists.examples, lists.items).reshape(scores.shape)
    owned = by_item >= 0
    rank = lists.ranks(scores)
    if both:  # the items below the top are left out, as if they were masked
        owners, stride = torch.where(rank < k, by_item, -1), lists.items
    gain, discount = scores, scores  # not read
    distance = discount_of(torch.arange(-1, lists.items, device=scores.device))
    distance = (distance[:-1] - distance[1:]) * (mu if weighting == PairWeighting.NDCG2PP else 1.0)
    distance = distance.to(scores.dtype)  # by how far the ranks are apart; that of 0 isn't read
    some = active = None
    if both:  # whether there is a pair at all, be it in the top or below
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
        best = discount_of(lists.ranks(labels)).masked_fill(lists.ranks(labels) >= k, 0)
        most = lists.sum((gains * best).masked_fill(~owned, 0))
        some = ~(most <= 0)
        gain = list_scale(torch.where(some, ones / most, 0), gains, valid, offsets).to(scores.dtype)
        discount = discount_of(rank).to(scores.dtype)
    slope, value, count = (torch.empty_like(scores) for _ in range(3))
    blocks = triton.cdiv(lists.items, _ROWS)
    vector = scores if v is None else v.contiguous()  # not read
    from_top = (rank - min(k, lists.items)).to(torch.int32)  # negative in the top k
    lambda_pairs_kernel(
        lists.examples * blocks,
        *(scores, labels, vector, from_top, gain, discount, distance, owners, lists.bounds),
        *(slope, value, count, sigma, lists.items, stride, lists.lists, blocks),
        variant=(weighting, v is not None),
    )
    pairs = lists.sum(count)
    active = pairs > (1 if weighting == PairWeighting.NDCG1 else 0) if active is None else active
    if some is not None:
        pairs, active = torch.where(some, pairs, 0), active & some
    factor = scale / pairs.clamp_min(1) if normalize else torch.full_like(pairs, scale)
    moved = list_scale(factor * (sigma if v is None else sigma * sigma), slope, valid, offsets)
    return torch.where(active, lists.sum(value) * factor, 0), moved, active


def discount_of(rank: Tensor) -> Tensor:
    """1 / log2(1 + r) of ranks r counted from 1, here given from 0; in double."""
    return 1 / torch.log2(rank.double() + 2)


@reducing
def lambda_pairs(
    scores: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    offsets: Tensor | None,
    weighting: int,
    k: int,
    both: bool,
    exponential: bool,
    sigma: float,
    mu: float,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _pairs(scores, labels, valid, offsets, None, weighting, k, both, exponential, sigma, mu, scale, normalize)


def lambda_pairs_slope(
    scores: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    offsets: Tensor | None,
    v: Tensor | None,
    weighting: int,
    k: int,
    both: bool,
    exponential: bool,
    sigma: float,
    mu: float,
    scale: float,
    normalize: bool,
) -> Tensor:
    return _pairs(scores, labels, valid, offsets, v, weighting, k, both, exponential, sigma, mu, scale, normalize)[1]
