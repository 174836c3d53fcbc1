"""Losses of smooth ranks: two passes of sums over each item's pairs, and the metrics between them."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops._enums import SmoothMetric
from custom_ops.triton_kernels.common import constant, kernel
from custom_ops.triton_kernels.lists import (
    ANYWHERE,
    PAIRS,
    VARIANTS,
    WIDE,
    Lists,
    columns,
    load_list,
    load_valid,
    reducing,
    relative_gain,
)

_ROWS, _COLUMNS = 16, 32
_BLOCK = 256  # items of a list at a time
_DISCOUNTED = (SmoothMetric.NDCG, SmoothMetric.NDCG_LINEAR)
_NDCG = constant(SmoothMetric.NDCG)
_MRR, _AVERAGE_PRECISION = constant(SmoothMetric.MRR), constant(SmoothMetric.AVERAGE_PRECISION)
_LN2 = tl.constexpr(math.log(2))


def _variants(flag: str) -> dict[Any, dict[str, Any]]:
    return {
        (*key, on): {**variant, flag: on, "ROWS": _ROWS, "COLUMNS": _COLUMNS}
        for key, variant in VARIANTS.items()
        for on in (False, True)
    }


@triton.jit
def _rows(block, valid_ptr, ids_ptr, items, blocks, MASKED: tl.constexpr, SEVERAL: tl.constexpr, ROWS: tl.constexpr):
    """Return the items of a block: the example's first one, places in the example, lists, and which are valid."""
    base = block // blocks * items
    row = block % blocks * ROWS + tl.arange(0, ROWS)
    ids = load_list(ids_ptr, row, row < items, SEVERAL)
    return base, row, ids, load_valid(valid_ptr, base + row, ids >= 0, MASKED)


@triton.jit
def _compare(own, other, scale):
    """Return sigmoid((other - own) * scale) and 1 minus that, for all pairs of scores given as halves."""
    d = (other[None, :] - own[:, None]) * scale
    d += d
    e = tl.exp(-tl.abs(d))
    inverse = 1.0 / (1.0 + e)
    return tl.where(d < 0, e, 1.0) * inverse, tl.where(d < 0, 1.0, e) * inverse


@kernel(
    "*T *T *i64 *u8 *i64 *T *T *u8 *u8 i32 i32",
    WIDE,
    {
        (metric, masked): {
            "METRIC": metric,
            "DISCOUNTED": metric in _DISCOUNTED,
            "MASKED": masked,
            "BLOCK": _BLOCK,
        }
        for metric in map(int, SmoothMetric)
        for masked in (False, True)
    },
    narrow=ANYWHERE,
    registers=96,
)
@triton.jit(do_not_specialize=["items", "lists"])
def smooth_rank_gain_kernel(
    score_ptr,
    label_ptr,
    order_ptr,
    valid_ptr,
    bounds_ptr,
    half_ptr,
    gain_ptr,
    active_ptr,
    undefined_ptr,
    items,
    lists,
    METRIC: tl.constexpr,
    DISCOUNTED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store halves of a list's scores, its gains over the total of the ideal ranking, and whether it contributes.

    A list is undefined by a NaN label, or by a relevant item and another one at the same infinity, which have no order.
    ``order`` is that of the labels; only metrics with a discount read it.
    """
    program = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(bounds_ptr + program % lists), tl.load(bounds_ptr + program % lists + 1)
    base = program // lists * items
    none = float("-inf")
    high = tl.full([BLOCK], none, label_ptr.dtype.element_ty)
    low = -high
    count, wrong = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for first in range(start, stop, BLOCK):
        item = first + tl.arange(0, BLOCK)
        valid = load_valid(valid_ptr, base + item, item < stop, MASKED)
        y = tl.load(label_ptr + base + item, mask=valid, other=0)
        high = tl.where(valid & (y > high), y, high)
        low = tl.where(valid & (y < low), y, low)
        wrong |= (y != y).to(tl.int32)
        count += valid.to(tl.int32)
    top, lowest, there, nan = tl.max(high), tl.min(low), tl.sum(count), tl.max(wrong) > 0
    highest = top.to(tl.float64)
    totals = tl.zeros([BLOCK], tl.float64)
    for first in range(start, stop, BLOCK):
        item = first + tl.arange(0, BLOCK)
        if DISCOUNTED:
            exists = item < start + there  # the valid items come first in the order
            at = tl.load(order_ptr + base + item, mask=exists, other=0)
            y = tl.load(label_ptr + base + at, mask=exists, other=0)
            gain = relative_gain(y.to(tl.float64), highest, METRIC == _NDCG)
            totals += gain / tl.log2((item - start + 2).to(tl.float64))
        else:
            valid = load_valid(valid_ptr, base + item, item < stop, MASKED)
            y = tl.load(label_ptr + base + item, mask=valid, other=0)
            totals += relative_gain(y.to(tl.float64), highest, False)
    total = tl.sum(totals)
    ranks = top != lowest
    if METRIC == _AVERAGE_PRECISION:
        ranks = lowest <= 0
    active = (there > 0) & (ranks | nan) & ((total > 0) | (total != total))
    most = tl.full([1], 1.7976931348623157e308 if top.dtype == tl.float64 else 3.4028234663852886e38, top.dtype)
    above, relevant_above = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    below, relevant_below = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for first in range(start, stop, BLOCK):
        item = first + tl.arange(0, BLOCK)
        valid = load_valid(valid_ptr, base + item, item < stop, MASKED)
        y = tl.load(label_ptr + base + item, mask=valid, other=0).to(tl.float64)
        gain = tl.where(valid & active, relative_gain(y, highest, METRIC == _NDCG) / total, 0.0).to(top.dtype)
        s = tl.load(score_ptr + base + item, mask=valid, other=0)
        s = tl.where(active, s, 0)  # in another list no score counts, not even NaN
        above += (s == -none).to(tl.int32)
        below += (s == none).to(tl.int32)
        relevant_above += ((s == -none) & (gain != 0)).to(tl.int32)
        relevant_below += ((s == none) & (gain != 0)).to(tl.int32)
        # Differences of halves can't overflow, and infinite scores are larger than all others.
        half = tl.where(s == -none, most, tl.where(s == none, -most, 0.5 * s))
        tl.store(half_ptr + base + item, half, mask=item < stop)
        tl.store(gain_ptr + base + item, gain, mask=item < stop)
    conflict = (tl.sum(above) > 1) & (tl.sum(relevant_above) > 0)
    conflict |= (tl.sum(below) > 1) & (tl.sum(relevant_below) > 0)
    tl.store(active_ptr + program, (active | nan).to(tl.uint8))
    tl.store(undefined_ptr + program, (nan | (active & conflict)).to(tl.uint8))


@triton.jit
def _first_order(rank, relevant_rank, gain, METRIC: tl.constexpr):
    """Return an item's share of the metric, and the loss's derivatives with respect to its ranks."""
    share = gain / rank
    if METRIC == _MRR:
        return share, share / rank, tl.zeros_like(share)
    elif METRIC == _AVERAGE_PRECISION:
        return share * relevant_rank, share * relevant_rank / rank, -share
    else:
        log = tl.log(1.0 + rank)
        share = gain * _LN2 / log
        return share, share / ((1.0 + rank) * log), tl.zeros_like(share)


@triton.jit
def _second_order(rank, relevant_rank, gain, moved, moved_relevant, METRIC: tl.constexpr):
    """Return the tangents of the derivatives along the ranks' tangents."""
    share = gain / rank
    if METRIC == _MRR:
        return -2.0 * share / (rank * rank) * moved, tl.zeros_like(share)
    elif METRIC == _AVERAGE_PRECISION:
        return share / rank * (moved_relevant - 2.0 * relevant_rank / rank * moved), share / rank * moved
    else:
        log = tl.log(1.0 + rank)
        share = gain * _LN2 / log
        return -share * (log + 2.0) / ((1.0 + rank) * log) / ((1.0 + rank) * log) * moved, tl.zeros_like(share)


@kernel(
    "*T *T *T *T *T *T *T *T *u8 *i32 *i64 fp64 i32 i32 i32",
    WIDE,
    {
        (metric, *key): {"METRIC": metric, **variant}
        for metric in map(int, SmoothMetric)
        for key, variant in _variants("MOVES").items()
    },
    narrow=PAIRS,
    registers=96,
    budget=176,
)
@triton.jit(do_not_specialize=["items", "lists", "blocks"])
def smooth_rank_sum_kernel(
    halves_ptr,
    gain_ptr,
    v_ptr,
    share_ptr,
    of_all_ptr,
    of_relevant_ptr,
    moved_all_ptr,
    moved_relevant_ptr,
    valid_ptr,
    ids_ptr,
    bounds_ptr,
    scale: tl.float64,
    items,
    lists,
    blocks,
    METRIC: tl.constexpr,
    MASKED: tl.constexpr,
    SEVERAL: tl.constexpr,
    MOVES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Store each item's share of the metric, and the loss's derivatives with respect to its ranks among all items and
    among the relevant ones.

    A rank is a sum of sigmoid((s_j - s_i) scale). With MOVES also the derivatives' tangents along v are stored.
    """
    program = tl.program_id(0).to(tl.int64)
    base, row, ids, valid = _rows(program, valid_ptr, ids_ptr, items, blocks, MASKED, SEVERAL, ROWS)
    s = tl.load(halves_ptr + base + row, mask=valid, other=0)
    factor = tl.full([1, 1], scale, s.dtype)
    v = tl.load(v_ptr + base + row, mask=valid & MOVES, other=0)
    start, stop = columns(bounds_ptr, ids, items, lists, SEVERAL)
    terms, among = tl.zeros([ROWS, COLUMNS], s.dtype), tl.zeros([ROWS, COLUMNS], s.dtype)
    moves, moves_among = tl.zeros([ROWS, COLUMNS], s.dtype), tl.zeros([ROWS, COLUMNS], s.dtype)
    for first in range(start, stop, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        column_ids = load_list(ids_ptr, column, column < stop, SEVERAL)
        exists = load_valid(valid_ptr, base + column, column_ids >= 0, MASKED)
        other = tl.load(halves_ptr + base + column, mask=exists, other=0)
        gain = tl.load(gain_ptr + base + column, mask=exists, other=0)
        p, q = _compare(s, other, factor)
        pair = (ids[:, None] == column_ids[None, :]) & exists[None, :]
        relevant = pair & (gain != 0)[None, :]
        terms += tl.where(pair, p, 0.0)
        among += tl.where(relevant, p, 0.0)
        if MOVES:
            other_v = tl.load(v_ptr + base + column, mask=exists, other=0)
            move = p * q * (other_v[None, :] - v[:, None])
            moves += tl.where(pair, move, 0.0)
            moves_among += tl.where(relevant, move, 0.0)
    own = tl.load(gain_ptr + base + row, mask=valid, other=0)
    # The item itself counts as 1, not as sigmoid(0).
    rank, relevant_rank = tl.sum(terms, axis=1) + 0.5, tl.sum(among, axis=1) + 0.5
    share, of_all, of_relevant = _first_order(rank, relevant_rank, own, METRIC)
    tl.store(share_ptr + base + row, share, mask=valid)
    tl.store(of_all_ptr + base + row, of_all, mask=valid)
    tl.store(of_relevant_ptr + base + row, of_relevant, mask=valid)
    if MOVES:
        unit = tl.full([1], scale, s.dtype)
        moved, moved_relevant = unit * tl.sum(moves, axis=1), unit * tl.sum(moves_among, axis=1)
        moved, moved_relevant = _second_order(rank, relevant_rank, own, moved, moved_relevant, METRIC)
        tl.store(moved_all_ptr + base + row, moved, mask=valid)
        tl.store(moved_relevant_ptr + base + row, moved_relevant, mask=valid)


@triton.jit
def _loss(
    example_list,
    share_ptr,
    active_ptr,
    undefined_ptr,
    valid_ptr,
    bounds_ptr,
    loss_ptr,
    items,
    lists,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store 1 minus the sum of a list's shares."""
    start, stop = tl.load(bounds_ptr + example_list % lists), tl.load(bounds_ptr + example_list % lists + 1)
    base = example_list // lists * items
    shares = tl.zeros([BLOCK], tl.float64)
    for first in range(start, stop, BLOCK):
        item = first + tl.arange(0, BLOCK)
        valid = load_valid(valid_ptr, base + item, item < stop, MASKED)
        shares += tl.load(share_ptr + base + item, mask=valid, other=0)
    loss = tl.where(tl.load(active_ptr + example_list) != 0, 1.0 - tl.sum(shares), 0.0)
    loss = tl.where(tl.load(undefined_ptr + example_list) != 0, float("nan"), loss)
    tl.store(loss_ptr + example_list, loss.to(share_ptr.dtype.element_ty))


@kernel(
    "*T *T *T *T *T *T *T *T *T *T *u8 *u8 *u8 *i32 *i64 fp64 i32 i32 i32 i32",
    WIDE,
    {key: {**variant, "BLOCK": _BLOCK} for key, variant in _variants("PRODUCT").items()},
    narrow=PAIRS,
    registers=104,
    budget=252,
)
@triton.jit(do_not_specialize=["items", "lists", "blocks", "losses"])
def smooth_rank_give_kernel(
    halves_ptr,
    gain_ptr,
    v_ptr,
    of_all_ptr,
    of_relevant_ptr,
    moved_all_ptr,
    moved_relevant_ptr,
    out_ptr,
    share_ptr,
    loss_ptr,
    active_ptr,
    undefined_ptr,
    valid_ptr,
    ids_ptr,
    bounds_ptr,
    scale: tl.float64,
    items,
    lists,
    blocks,
    losses,
    MASKED: tl.constexpr,
    SEVERAL: tl.constexpr,
    PRODUCT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store each item's slope: the contributions of all other items' ranks minus that of its own rank; the first
    programs store the ``losses`` of that many lists.

    of_all and of_relevant are the loss's derivatives with respect to the ranks. With PRODUCT the result is the tangent
    of the slope along v, which also needs the tangents of those derivatives.
    """
    program = tl.program_id(0).to(tl.int64)
    if program < losses:
        _loss(
            program, share_ptr, active_ptr, undefined_ptr, valid_ptr, bounds_ptr, loss_ptr, items, lists, MASKED, BLOCK
        )
        return
    block = program - losses
    base, row, ids, valid = _rows(block, valid_ptr, ids_ptr, items, blocks, MASKED, SEVERAL, ROWS)
    s = tl.load(halves_ptr + base + row, mask=valid, other=0)
    relevant = tl.load(gain_ptr + base + row, mask=valid, other=0) != 0
    w_all = tl.load(of_all_ptr + base + row, mask=valid, other=0)
    w_relevant = tl.load(of_relevant_ptr + base + row, mask=valid, other=0)
    v = tl.load(v_ptr + base + row, mask=valid & PRODUCT, other=0)
    m_all = tl.load(moved_all_ptr + base + row, mask=valid & PRODUCT, other=0)
    m_relevant = tl.load(moved_relevant_ptr + base + row, mask=valid & PRODUCT, other=0)
    factor = tl.full([1, 1], scale, s.dtype)
    start, stop = columns(bounds_ptr, ids, items, lists, SEVERAL)
    terms = tl.zeros([ROWS, COLUMNS], s.dtype)
    for first in range(start, stop, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        column_ids = load_list(ids_ptr, column, column < stop, SEVERAL)
        exists = load_valid(valid_ptr, base + column, column_ids >= 0, MASKED)
        other = tl.load(halves_ptr + base + column, mask=exists, other=0)
        other_relevant = tl.load(gain_ptr + base + column, mask=exists, other=0) != 0
        other_all = tl.load(of_all_ptr + base + column, mask=exists, other=0)
        other_among = tl.load(of_relevant_ptr + base + column, mask=exists, other=0)
        q, p = _compare(s, other, factor)  # p: this item's share in the rank of the other
        got = other_all[None, :] + tl.where(relevant[:, None], other_among[None, :], 0.0)
        given = w_all[:, None] + tl.where(other_relevant[None, :], w_relevant[:, None], 0.0)
        net = got - given
        if PRODUCT:
            other_v = tl.load(v_ptr + base + column, mask=exists, other=0)
            other_m = tl.load(moved_all_ptr + base + column, mask=exists, other=0)
            other_m_among = tl.load(moved_relevant_ptr + base + column, mask=exists, other=0)
            net *= factor * (q - p) * (v[:, None] - other_v[None, :])
            net += other_m[None, :] + tl.where(relevant[:, None], other_m_among[None, :], 0.0)
            net -= m_all[:, None] + tl.where(other_relevant[None, :], m_relevant[:, None], 0.0)
        pair = (ids[:, None] == column_ids[None, :]) & exists[None, :]
        terms += tl.where(pair, factor * p * q * net, 0.0)
    owner = block // blocks * lists + ids
    undefined = tl.load(undefined_ptr + owner, mask=valid, other=0) != 0
    slope = tl.where(undefined, float("nan"), tl.where(valid, tl.sum(terms, axis=1), 0.0))
    tl.store(out_ptr + base + row, slope, mask=row < items)


def _losses(
    lists: Lists, scores: Tensor, labels: Tensor, v: Tensor | None, temperature: float, metric: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses, the slope or its tangent along v, and the marks, as in csrc/smooth_rank.cpp."""
    scores, labels, vector = lists.operands(scores, labels, v)
    loss, slope, active = lists.results(scores)
    undefined = torch.empty_like(active, dtype=torch.uint8)
    marks = (active.view(torch.uint8), undefined)
    halves, gain, share, *derivatives = (torch.empty_like(scores) for _ in range(7))
    order = lists.sort(labels) if metric in _DISCOUNTED else lists.bounds  # or a placeholder
    sizes, moves = (lists.items, lists.lists), v is not None
    pointers = (scores, labels, order, lists.valid, lists.bounds, halves, gain, *marks)
    smooth_rank_gain_kernel(loss.numel(), *pointers, *sizes, variant=(metric, lists.masked))
    blocks = triton.cdiv(lists.items, _ROWS)
    where = (lists.valid, lists.ids, lists.bounds, 1 / temperature, *sizes, blocks)
    pointers = (halves, gain, vector, share, *derivatives, *where)
    smooth_rank_sum_kernel(lists.examples * blocks, *pointers, variant=(metric, *lists.variant, moves))
    losses = 0 if moves else loss.numel()
    pointers = (halves, gain, vector, *derivatives, slope, share, loss, *marks, *where, losses)
    smooth_rank_give_kernel(losses + lists.examples * blocks, *pointers, variant=(*lists.variant, moves))
    return loss, slope, active


@reducing
def smooth_rank(
    lists: Lists, scores: Tensor, labels: Tensor, temperature: float, metric: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _losses(lists, scores, labels, None, temperature, metric)


def smooth_rank_slope(
    scores: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    offsets: Tensor | None,
    v: Tensor | None,
    temperature: float,
    metric: int,
) -> Tensor:
    lists = Lists(scores, valid, offsets)
    return lists.moved(_losses(lists, scores, labels, v, temperature, metric)[1], v)
