"""Losses of smooth ranks: two passes of sums over each item's pairs, and the metrics between them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops._enums import SmoothMetric
from custom_ops.triton_kernels.common import kernel
from custom_ops.triton_kernels.lists import (
    PAIRS,
    VARIANTS,
    WIDE,
    Lists,
    columns,
    load_list,
    load_valid,
    reducing,
    relative_gains,
)

_ROWS, _COLUMNS = 16, 32


def _variants(flag: str) -> dict[Any, dict[str, Any]]:
    return {
        (*key, on): {**variant, flag: on, "ROWS": _ROWS, "COLUMNS": _COLUMNS}
        for key, variant in VARIANTS.items()
        for on in (False, True)
    }


@triton.jit
def _rows(valid_ptr, ids_ptr, items, blocks, MASKED: tl.constexpr, SEVERAL: tl.constexpr, ROWS: tl.constexpr):
    """Return the program's items: the example's first one, places in the example, lists, and which are valid."""
    program = tl.program_id(0).to(tl.int64)
    base = program // blocks * items
    row = program % blocks * ROWS + tl.arange(0, ROWS)
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
    "*T *T *T *T *T *u8 *i32 *i64 fp64 i32 i32 i32", WIDE, _variants("MOVES"), narrow=PAIRS, registers=96, budget=168
)
@triton.jit(do_not_specialize=["items", "lists", "blocks"])
def smooth_rank_sum_kernel(
    halves_ptr,
    gain_ptr,
    v_ptr,
    all_ptr,
    relevant_ptr,
    valid_ptr,
    ids_ptr,
    bounds_ptr,
    scale: tl.float64,
    items,
    lists,
    blocks,
    MASKED: tl.constexpr,
    SEVERAL: tl.constexpr,
    MOVES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Store, for each item, the sums over the items of its list and over the relevant ones.

    The terms are sigmoid((s_j - s_i) scale) or, with MOVES, its derivative times v_j - v_i.
    """
    base, row, ids, valid = _rows(valid_ptr, ids_ptr, items, blocks, MASKED, SEVERAL, ROWS)
    s = tl.load(halves_ptr + base + row, mask=valid, other=0)
    factor = tl.full([1, 1], scale, s.dtype)
    v = tl.load(v_ptr + base + row, mask=valid & MOVES, other=0)
    start, stop = columns(bounds_ptr, ids, items, lists, SEVERAL)
    terms, among = tl.zeros([ROWS, COLUMNS], s.dtype), tl.zeros([ROWS, COLUMNS], s.dtype)
    for first in range(start, stop, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        column_ids = load_list(ids_ptr, column, column < stop, SEVERAL)
        exists = load_valid(valid_ptr, base + column, column_ids >= 0, MASKED)
        other = tl.load(halves_ptr + base + column, mask=exists, other=0)
        gain = tl.load(gain_ptr + base + column, mask=exists, other=0)
        p, q = _compare(s, other, factor)
        if MOVES:
            other_v = tl.load(v_ptr + base + column, mask=exists, other=0)
            p *= q * (other_v[None, :] - v[:, None])
        pair = (ids[:, None] == column_ids[None, :]) & exists[None, :]
        terms += tl.where(pair, p, 0.0)
        among += tl.where(pair & (gain != 0)[None, :], p, 0.0)
    tl.store(all_ptr + base + row, tl.sum(terms, axis=1), mask=valid)
    tl.store(relevant_ptr + base + row, tl.sum(among, axis=1), mask=valid)


@kernel(
    "*T *T *T *T *T *T *T *T *u8 *i32 *i64 fp64 i32 i32 i32",
    WIDE,
    _variants("PRODUCT"),
    narrow=PAIRS,
    registers=96,
    budget=252,
)
@triton.jit(do_not_specialize=["items", "lists", "blocks"])
def smooth_rank_give_kernel(
    halves_ptr,
    gain_ptr,
    v_ptr,
    of_all_ptr,
    of_relevant_ptr,
    moved_all_ptr,
    moved_relevant_ptr,
    out_ptr,
    valid_ptr,
    ids_ptr,
    bounds_ptr,
    scale: tl.float64,
    items,
    lists,
    blocks,
    MASKED: tl.constexpr,
    SEVERAL: tl.constexpr,
    PRODUCT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Store each item's slope: the contributions of all other items' ranks minus that of its own rank.

    of_all and of_relevant are the loss's derivatives with respect to the ranks. With PRODUCT the result is the tangent
    of the slope along v, which also needs the tangents of those derivatives.
    """
    base, row, ids, valid = _rows(valid_ptr, ids_ptr, items, blocks, MASKED, SEVERAL, ROWS)
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
    tl.store(out_ptr + base + row, tl.where(valid, tl.sum(terms, axis=1), 0.0), mask=row < items)


class _Ranks(NamedTuple):
    """Ranks among all and among the relevant items, or their tangents, or the loss's derivatives with respect to
    them.
    """

    all: Tensor
    relevant: Tensor


class _SmoothRank:
    """The metric's formulas and the launches, as in csrc/smooth_rank.cpp."""

    def __init__(
        self,
        scores: Tensor,
        labels: Tensor,
        valid: Tensor | None,
        offsets: Tensor | None,
        temperature: float,
        metric: int,
    ) -> None:
        if labels.shape != scores.shape or labels.dtype != scores.dtype:
            raise RuntimeError("labels: expected the shape and dtype of the scores")
        self.metric, self.scale = SmoothMetric(metric), 1 / temperature
        most = torch.finfo(scores.dtype).max
        # Differences of halves can't overflow, and infinite scores are larger than all others.
        self.halves = (scores / 2).clamp(-most, most).contiguous()
        self.lists = lists = Lists(self.halves, valid, offsets)
        exists = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
        if lists.several:
            exists = exists & (lists.ids >= 0)
        self.exists = exists
        labels = labels.contiguous().masked_fill(~exists, 0)
        ordered = labels.gather(-1, lists.sort(labels))
        starts = lists.bounds[:-1]
        count = lists.sum(exists.to(scores.dtype))
        last = (starts + count.long() - 1).clamp(0, lists.items - 1)
        top = ordered.gather(-1, starts.clamp_max(lists.items - 1).expand(count.shape))
        lowest = ordered.gather(-1, last)
        tied = lowest > 0 if metric == SmoothMetric.AVERAGE_PRECISION else top == lowest

        def gain_of(y: Tensor) -> Tensor:
            return relative_gains(y, lists.to_items(top), metric == SmoothMetric.NDCG)

        ideal = gain_of(ordered)
        if metric in (SmoothMetric.NDCG, SmoothMetric.NDCG_LINEAR):
            place = torch.arange(lists.items, device=scores.device) - lists.to_items(starts)
            ideal = ideal / (place + 2).double().log2()
        total = lists.sum(ideal)
        self.active = ~tied & (count > 0) & ~(total <= 0)
        per_gain = torch.where(self.active, 1 / total, 0)
        gain = lists.to_items(per_gain) * gain_of(labels)
        self.gain = gain.masked_fill(~exists, 0).to(scores.dtype).contiguous()
        self.undefined = torch.zeros_like(self.active)
        # A relevant item and another one at the same infinity have no order.
        for infinite in (scores == math.inf, scores == -math.inf):
            there = infinite & exists
            both = (lists.sum((there & (self.gain != 0)).double()) > 0) & (lists.sum(there.double()) > 1)
            self.undefined |= both & self.active
        sums = self._sum(self.halves, moves=False)
        # The item itself counts as 1, not as sigmoid(0).
        self.rank = _Ranks(sums.all + 0.5, sums.relevant + 0.5)

    def _launch(self, kernel: Any, variant: bool, *pointers: Tensor) -> None:
        lists = self.lists
        blocks = triton.cdiv(lists.items, _ROWS)
        where = (lists.valid, lists.ids, lists.bounds, self.scale, lists.items, lists.lists, blocks)
        kernel(lists.examples * blocks, *pointers, *where, variant=(*lists.variant, variant))

    def _sum(self, v: Tensor, moves: bool) -> _Ranks:
        out = _Ranks(torch.zeros_like(self.halves), torch.zeros_like(self.halves))
        self._launch(smooth_rank_sum_kernel, moves, self.halves, self.gain, v, *out)
        return out

    def _give(self, v: Tensor, weights: _Ranks, moved: _Ranks, product: bool) -> Tensor:
        out = torch.empty_like(self.halves)
        pointers = (self.halves, self.gain, v, *weights, *moved, out)
        self._launch(smooth_rank_give_kernel, product, *pointers)
        return out.masked_fill(self.lists.to_items(self.undefined) & self.exists, math.nan)

    def loss(self) -> Tensor:
        rank, relevant_rank = self.rank
        if self.metric == SmoothMetric.MRR:
            value = self.gain / rank
        elif self.metric == SmoothMetric.AVERAGE_PRECISION:
            value = self.gain * relevant_rank / rank
        else:
            value = self.gain * math.log(2) / rank.log1p()
        found = self.lists.sum(value.masked_fill(~self.exists, 0))
        return torch.where(self.active, 1 - found, 0).masked_fill(self.undefined, math.nan)

    def _derivative(self) -> _Ranks:
        rank, relevant_rank = self.rank
        if self.metric == SmoothMetric.AVERAGE_PRECISION:
            return _Ranks(self.gain * relevant_rank / rank.square(), -self.gain / rank)
        if self.metric == SmoothMetric.MRR:
            of_rank = self.gain / rank.square()
        else:
            of_rank = self.gain * math.log(2) / ((1 + rank) * rank.log1p().square())
        return _Ranks(of_rank, torch.zeros_like(rank))

    def _second(self, moves: _Ranks) -> _Ranks:
        """Return the tangent of the derivative along the ranks' tangent."""
        rank, relevant_rank = self.rank
        if self.metric == SmoothMetric.AVERAGE_PRECISION:
            of_rank = self.gain * (moves.relevant - 2 * relevant_rank / rank * moves.all) / rank.square()
            return _Ranks(of_rank, self.gain * moves.all / rank.square())
        if self.metric == SmoothMetric.MRR:
            of_rank = -2 * self.gain / rank.pow(3) * moves.all
        else:
            log = rank.log1p()
            of_rank = -self.gain * math.log(2) * (log + 2) / ((1 + rank).square() * log.pow(3)) * moves.all
        return _Ranks(of_rank, torch.zeros_like(rank))

    def slope(self) -> Tensor:
        weights = self._derivative()
        return self._give(self.halves, weights, weights, product=False)

    def product(self, v: Tensor) -> Tensor:
        v = v.contiguous()
        moves = self._sum(v, moves=True)
        moved = self._second(_Ranks(self.scale * moves.all, self.scale * moves.relevant))
        return self._give(v, self._derivative(), moved, product=True)


@reducing
def smooth_rank(
    scores: Tensor, labels: Tensor, valid: Tensor | None, offsets: Tensor | None, temperature: float, metric: int
) -> tuple[Tensor, Tensor, Tensor]:
    if scores.numel() == 0:
        loss = Lists(scores, valid, offsets).per_list(scores).zero_()
        return loss, scores.new_empty(scores.shape), loss.bool()
    ranks = _SmoothRank(scores, labels, valid, offsets, temperature, metric)
    return ranks.loss(), ranks.slope(), ranks.active


def smooth_rank_slope(
    scores: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    offsets: Tensor | None,
    v: Tensor | None,
    temperature: float,
    metric: int,
) -> Tensor:
    if scores.numel() == 0:
        return scores.new_empty(scores.shape)
    ranks = _SmoothRank(scores, labels, valid, offsets, temperature, metric)
    return ranks.slope() if v is None else ranks.product(v)
