"""NeuralNDCG: the rows of NeuralSort's matrix as softmaxes, and their sums by column, on lists by descending score."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.triton_kernels.common import kernel
from custom_ops.triton_kernels.lists import PAIRS, WIDE, Lists, columns, load_list, reducing, relative_gains

_ROWS, _COLUMNS = 16, 32
_VANISHES = {torch.float32: 86.0, torch.float64: 745.0}  # at this distance no row has terms on both sides
_VARIANTS: dict[Any, dict[str, Any]] = {
    (several, tangent): {"SEVERAL": several, "TANGENT": tangent, "ROWS": _ROWS, "COLUMNS": _COLUMNS}
    for several in (False, True)
    for tangent in (False, True)
}


@triton.jit
def _places(ids_ptr, items, blocks, SEVERAL: tl.constexpr, ROWS: tl.constexpr):
    """Return the program's places: the example's first one, the places within the example, and their lists."""
    program = tl.program_id(0).to(tl.int64)
    place = program % blocks * ROWS + tl.arange(0, ROWS)
    return program // blocks * items, place, load_list(ids_ptr, place, place < items, SEVERAL)


@triton.jit
def _terms(x, b, slope, other_x, other_b, like):
    """Return exp(z_ij - z_ii) for rows [:, None] or [None, :]; the differences are in float64, the exponential
    isn't.
    """
    return tl.exp((slope * (other_x - x) - (other_b - b)).to(like.dtype))


@triton.jit
def _tangents(slope, lead, u, q, other_lead, other_u, other_q, like):
    """Return the tangent of z_ij - z_ii."""
    return ((slope - other_lead) * other_u - (slope - lead) * u + (other_q - q)).to(like.dtype)


@kernel(
    "*fp64 *fp64 *fp64 *fp64 *fp64 *fp64 *T *i32 *T *T *T *T *i32 *i64 i32 i32 i32",
    WIDE,
    _VARIANTS,
    narrow=PAIRS,
    registers=128,
    budget=190,
)
@triton.jit(do_not_specialize=["items", "lists", "blocks"])
def neural_sort_rows_kernel(
    x_ptr,
    b_ptr,
    slope_ptr,
    lead_ptr,
    u_ptr,
    q_ptr,
    gain_ptr,
    segment_ptr,
    sum_ptr,
    found_ptr,
    moved_ptr,
    of_found_ptr,
    ids_ptr,
    bounds_ptr,
    items,
    lists,
    blocks,
    SEVERAL: tl.constexpr,
    TANGENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Store each row's sum of terms and mean gain and, with TANGENT, the mean tangent and the mean gain's tangent."""
    base, row, ids = _places(ids_ptr, items, blocks, SEVERAL, ROWS)
    segment = tl.load(segment_ptr + base + row, mask=ids >= 0, other=-1)
    kept = segment >= 0
    x = tl.load(x_ptr + base + row, mask=kept, other=0)[:, None]
    b = tl.load(b_ptr + base + row, mask=kept, other=0)[:, None]
    slope = tl.load(slope_ptr + base + row, mask=kept, other=0)[:, None]
    if TANGENT:
        lead = tl.load(lead_ptr + base + row, mask=kept, other=0)[:, None]
        u = tl.load(u_ptr + base + row, mask=kept, other=0)[:, None]
        q = tl.load(q_ptr + base + row, mask=kept, other=0)[:, None]
    total = tl.zeros([ROWS, COLUMNS], gain_ptr.dtype.element_ty)
    gained, moved, both = tl.zeros_like(total), tl.zeros_like(total), tl.zeros_like(total)
    start, stop = columns(bounds_ptr, ids, items, lists, SEVERAL)
    for first in range(start, stop, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        column_ids = load_list(ids_ptr, column, column < stop, SEVERAL)
        column_segment = tl.load(segment_ptr + base + column, mask=column_ids >= 0, other=-1)
        exists = column_segment >= 0
        gain = tl.load(gain_ptr + base + column, mask=exists, other=0)
        other_x = tl.load(x_ptr + base + column, mask=exists, other=0)[None, :]
        other_b = tl.load(b_ptr + base + column, mask=exists, other=0)[None, :]
        pair = (segment[:, None] == column_segment[None, :]) & kept[:, None]
        e = tl.where(pair, _terms(x, b, slope, other_x, other_b, gain), 0.0)
        total += e
        gained += tl.where(pair, e * gain[None, :], 0.0)  # another list's gain may be NaN
        if TANGENT:
            other_lead = tl.load(lead_ptr + base + column, mask=exists, other=0)[None, :]
            other_u = tl.load(u_ptr + base + column, mask=exists, other=0)[None, :]
            other_q = tl.load(q_ptr + base + column, mask=exists, other=0)[None, :]
            e = tl.where(pair, e * _tangents(slope, lead, u, q, other_lead, other_u, other_q, gain), 0.0)
            moved += e
            both += tl.where(pair, e * gain[None, :], 0.0)
    terms = tl.sum(total, axis=1)
    inverse = 1.0 / tl.where(kept, terms, 1.0)
    found = tl.sum(gained, axis=1) * inverse
    inside = row < items
    tl.store(sum_ptr + base + row, terms, mask=inside)
    tl.store(found_ptr + base + row, found, mask=inside)
    if TANGENT:
        mean = tl.sum(moved, axis=1) * inverse
        tl.store(moved_ptr + base + row, mean, mask=inside)
        tl.store(of_found_ptr + base + row, tl.sum(both, axis=1) * inverse - found * mean, mask=inside)


@kernel(
    "*fp64 *fp64 *fp64 *fp64 *fp64 *fp64 *T *i32 *T *T *T *T *fp64 *fp64 *i32 *i64 i32 i32 i32",
    WIDE,
    _VARIANTS,
    narrow=PAIRS,
    registers=128,
    budget=220,
)
@triton.jit(do_not_specialize=["items", "lists", "blocks"])
def neural_sort_columns_kernel(
    x_ptr,
    b_ptr,
    slope_ptr,
    lead_ptr,
    u_ptr,
    q_ptr,
    gain_ptr,
    segment_ptr,
    share_ptr,
    found_ptr,
    moved_ptr,
    of_found_ptr,
    own_ptr,
    ahead_ptr,
    ids_ptr,
    bounds_ptr,
    items,
    lists,
    blocks,
    SEVERAL: tl.constexpr,
    TANGENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Store, for each column j, the sums over rows i of w_ij and of w_ij (lead of j - slope of row i).

    w_ij is minus the derivative of the loss with respect to z_ij or, with TANGENT, its tangent. The share of a row is
    its discount over the sum of its terms.
    """
    base, column, ids = _places(ids_ptr, items, blocks, SEVERAL, ROWS)
    segment = tl.load(segment_ptr + base + column, mask=ids >= 0, other=-1)
    exists = segment >= 0
    gain = tl.load(gain_ptr + base + column, mask=exists, other=0)
    x = tl.load(x_ptr + base + column, mask=exists, other=0)[:, None]
    b = tl.load(b_ptr + base + column, mask=exists, other=0)[:, None]
    lead = tl.load(lead_ptr + base + column, mask=exists, other=0)[:, None]
    if TANGENT:
        u = tl.load(u_ptr + base + column, mask=exists, other=0)[:, None]
        q = tl.load(q_ptr + base + column, mask=exists, other=0)[:, None]
    own, ahead = tl.zeros([ROWS, COLUMNS], tl.float64), tl.zeros([ROWS, COLUMNS], tl.float64)
    start, stop = columns(bounds_ptr, ids, items, lists, SEVERAL)
    for first in range(start, stop, COLUMNS):
        row = first + tl.arange(0, COLUMNS)
        row_ids = load_list(ids_ptr, row, row < stop, SEVERAL)
        row_segment = tl.load(segment_ptr + base + row, mask=row_ids >= 0, other=-1)
        kept = row_segment >= 0
        row_x = tl.load(x_ptr + base + row, mask=kept, other=0)[None, :]
        row_b = tl.load(b_ptr + base + row, mask=kept, other=0)[None, :]
        slope = tl.load(slope_ptr + base + row, mask=kept, other=0)[None, :]
        share = tl.load(share_ptr + base + row, mask=kept, other=0)
        found = tl.load(found_ptr + base + row, mask=kept, other=0)
        pair = (segment[:, None] == row_segment[None, :]) & exists[:, None]
        w = _terms(row_x, row_b, slope, x, b, gain) * share[None, :]
        beyond = gain[:, None] - found[None, :]
        if TANGENT:
            row_lead = tl.load(lead_ptr + base + row, mask=kept, other=0)[None, :]
            row_u = tl.load(u_ptr + base + row, mask=kept, other=0)[None, :]
            row_q = tl.load(q_ptr + base + row, mask=kept, other=0)[None, :]
            moved = tl.load(moved_ptr + base + row, mask=kept, other=0)
            of_found = tl.load(of_found_ptr + base + row, mask=kept, other=0)
            t = _tangents(slope, row_lead, row_u, row_q, lead, u, q, gain)
            w *= (t - moved[None, :]) * beyond - of_found[None, :]
        else:
            w *= beyond
        wide = tl.where(pair, w, 0.0).to(tl.float64)
        own += wide
        ahead += wide * (lead - slope)
    tl.store(own_ptr + base + column, tl.sum(own, axis=1), mask=column < items)
    tl.store(ahead_ptr + base + column, tl.sum(ahead, axis=1), mask=column < items)


class _NeuralSort:
    """The lists by descending score, masked items last, and the launches, as in csrc/neural_sort.cpp."""

    def __init__(
        self,
        lists: Lists,
        scores: Tensor,
        labels: Tensor,
        temperature: float,
        k: int,
        exponential: bool,
    ) -> None:
        if labels.shape != scores.shape or labels.dtype != scores.dtype:
            raise RuntimeError("labels: expected the shape and dtype of the scores")
        self.temperature, self.dtype = temperature, scores.dtype
        self.lists = lists
        exists = lists.valid != 0 if lists.masked else torch.ones_like(scores, dtype=torch.bool)
        if lists.several:
            exists = exists & (lists.ids >= 0)
        first = lists.to_items(lists.bounds[:-1].clamp_max(lists.items - 1))
        scores = scores.double().masked_fill(~exists, 0)
        labels = labels.double().masked_fill(~exists, 0)
        self.count = lists.sum(exists.double())
        place = torch.arange(lists.items, device=scores.device) - first
        self.kept = place < lists.to_items(self.count)  # in sorted lists
        if lists.several:
            self.kept &= lists.ids >= 0

        # A NaN has no place, and items with different gains at the same infinity have no order.
        self.order = lists.sort(scores)
        wrong, ordered = scores.isnan(), scores.gather(-1, self.order)
        relevance = labels.gather(-1, self.order).clamp_min(0)  # a label below 0 has no gain
        same = self._like_before(ordered, place) & (relevance.diff(dim=-1, prepend=relevance[..., :1]) != 0)
        self.undefined = lists.sum((wrong | (same & ordered.isinf())).double()) > 0
        ordered = ordered.masked_fill(lists.to_items(self.undefined), 0)

        best = labels.gather(-1, lists.sort(labels))
        ends = (lists.bounds[:-1] + self.count.long() - 1).clamp(0, lists.items - 1)
        top = best.gather(-1, lists.bounds[:-1].clamp_max(lists.items - 1).expand(ends.shape))
        self.active = (top > best.gather(-1, ends)) & (top > 0) & (self.count > 0)

        def gain_of(y: Tensor) -> Tensor:
            return relative_gains(y, lists.to_items(top), exponential)

        self.discount = torch.where(self.kept & (place < k), math.log(2) / (place + 2.0).double().log(), 0)
        ideal = lists.sum(torch.where(self.kept, gain_of(best), 0) * self.discount)
        gain = gain_of(relevance) * lists.to_items(torch.where(self.active, 1 / ideal, 0))
        self.gain = torch.where(self.kept, gain, 0).to(self.dtype)

        at = torch.arange(lists.items, device=scores.device)
        start = ~self._like_before(ordered, place)
        apart = -ordered.diff(dim=-1, prepend=ordered[..., :1]) / temperature
        first = (place == 0) | ~self.kept | (apart > _VANISHES[self.dtype])
        self.start, self.end = self._runs(start, at)  # bounds of the items with the same score
        self.first, self.last = self._runs(first, at)  # bounds of the segments, as in csrc/neural_sort.cpp
        self.segment = torch.where(self.kept, self.first, -1).to(torch.int32)
        top = ordered.gather(-1, self.first)
        self.x = torch.where(self.kept & (ordered != top), (ordered - top) / temperature, 0)
        self.slope_of_row = (self.last + self.first - 1 - 2 * at).double()
        self.lead = (self.last - self.end - (self.start - self.first)).double()
        self.b = self.lead * self.x - self.opposed(self.x)

    def _like_before(self, ordered: Tensor, place: Tensor) -> Tensor:
        """Return whether an item has the same score as the one before it in its list."""
        same = self.kept & (place > 0)
        same[..., 1:] &= ordered[..., 1:] == ordered[..., :-1]
        return same

    def _runs(self, begins: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first item of each item's run, and the end of the run."""
        ends = torch.nn.functional.pad(begins[..., 1:], (0, 1), value=True)
        end = torch.where(ends, at + 1, self.lists.items).flip(-1).cummin(-1).values.flip(-1)
        return torch.where(begins, at, 0).cummax(-1).values, end

    def opposed(self, t: Tensor) -> Tensor:
        """Return, for each item, the sum of t over the items below it in its segment minus the sum over those above
        it.
        """
        through = self.lists.scan(t)
        before = through - t
        below = through.gather(-1, self.last - 1) - through.gather(-1, self.end - 1)
        return below - (before.gather(-1, self.start) - before.gather(-1, self.first))

    def rows(self, u: Tensor, q: Tensor, tangent: bool) -> tuple[Tensor, ...]:
        """Return each row's sum of terms and mean gain, and the means of the tangents."""
        total, found = torch.empty_like(self.gain), torch.empty_like(self.gain)
        moved, of_found = (torch.empty_like(self.gain) if tangent else total for _ in range(2))
        self._launch(neural_sort_rows_kernel, tangent, u, q, total, found, moved, of_found)
        return total, found, moved, of_found

    def _launch(self, kernel: Any, tangent: bool, u: Tensor, q: Tensor, *pointers: Tensor) -> None:
        lists = self.lists
        blocks = triton.cdiv(lists.items, _ROWS)
        items = (self.x, self.b, self.slope_of_row, self.lead, u, q, self.gain, self.segment)
        where = (lists.ids, lists.bounds, lists.items, lists.lists, blocks)
        kernel(lists.examples * blocks, *items, *pointers, *where, variant=(lists.several, tangent))

    def loss(self, found: Tensor) -> Tensor:
        loss = torch.where(self.active, 1 - self.lists.sum(found.double() * self.discount), 0)
        return loss.masked_fill(self.active & self.undefined, torch.nan).to(self.dtype)

    def slope(self, rows: tuple[Tensor, ...], u: Tensor, q: Tensor, tangent: bool) -> Tensor:
        total, *of_rows = rows
        share = torch.where(self.kept, self.discount / total.double(), 0).to(self.dtype)
        own, ahead = torch.empty_like(self.x), torch.empty_like(self.x)
        self._launch(neural_sort_columns_kernel, tangent, u, q, share, *of_rows, own, ahead)
        slope = torch.where(self.kept, (ahead + self.opposed(own)) / self.temperature, 0)
        slope = slope.masked_fill(self.lists.to_items(self.active & self.undefined) & self.kept, torch.nan)
        return torch.zeros_like(slope).scatter_(-1, self.order, slope).to(self.dtype)

    def tangents(self, v: Tensor) -> tuple[Tensor, Tensor]:
        u = torch.where(self.kept, v.double().gather(-1, self.order), 0) / self.temperature
        return u, self.opposed(u)


@reducing
def neural_sort(
    lists: Lists, scores: Tensor, labels: Tensor, temperature: float, k: int, exponential: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if scores.numel() == 0 or lists.lists == 0:
        return lists.no_items(scores)
    ordered = _NeuralSort(lists, scores, labels, temperature, k, exponential)
    rows = ordered.rows(ordered.x, ordered.x, tangent=False)
    loss, slope = ordered.loss(rows[1]), ordered.slope(rows, ordered.x, ordered.x, tangent=False)
    lists.mark_undefined(labels, loss, ordered.active)
    return loss, slope, ordered.active


def neural_sort_slope(
    scores: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    offsets: Tensor | None,
    v: Tensor | None,
    temperature: float,
    k: int,
    exponential: bool,
) -> Tensor:
    lists = Lists(scores, valid, offsets)
    if scores.numel() == 0 or lists.lists == 0:
        return torch.zeros_like(scores)
    ordered = _NeuralSort(lists, scores, labels, temperature, k, exponential)
    u, q = (ordered.x, ordered.x) if v is None else ordered.tangents(v)
    return lists.moved(ordered.slope(ordered.rows(u, q, v is not None), u, q, v is not None), v)
