"""NeuralNDCG: the rows of NeuralSort's matrix as softmaxes, and their sums by column, on lists by descending score."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.triton_kernels.common import ACCESS, kernel
from custom_ops.triton_kernels.lists import (
    ANYWHERE,
    PAIRS,
    WIDE,
    Lists,
    columns,
    load_list,
    load_ranked,
    reducing,
    relative_gain,
)

_ROWS, _COLUMNS = 16, 32
_BLOCK = 256  # items of a list at a time
# At these distances, in float32 and in float64, no row has terms on both sides.
_VANISHES, _VANISHES_IN_DOUBLE = tl.constexpr(86.0), tl.constexpr(745.0)
_LN2 = tl.constexpr(math.log(2))
_VARIANTS: dict[Any, dict[str, Any]] = {
    (several, tangent): {"SEVERAL": several, "TANGENT": tangent, "ROWS": _ROWS, "COLUMNS": _COLUMNS}
    for several in (False, True)
    for tangent in (False, True)
}


@triton.jit
def _of_places(where_ptr, step):
    """Return pointers to the segments, the items, the bounds of runs of equal scores, and the ends of segments."""
    item_ptr = where_ptr + step
    start_ptr = item_ptr + step
    return where_ptr, item_ptr, start_ptr, start_ptr + step, start_ptr + 2 * step


@triton.jit
def _load_runs(start_ptr, end_ptr, segment_ptr, last_ptr, at, mask):
    """Return the bounds of each place's run of equal scores, and those of its segment."""
    start, end = tl.load(start_ptr + at, mask=mask, other=0), tl.load(end_ptr + at, mask=mask, other=0)
    first, last = tl.load(segment_ptr + at, mask=mask, other=0), tl.load(last_ptr + at, mask=mask, other=0)
    return start, end, first, last


@triton.jit
def _opposed(through_ptr, begin, start, end, first, last, mask):
    """Return, for each place, the sum over the places below it in its segment minus the sum over those above it.

    ``through_ptr`` has the sums from the list's first place ``begin`` through each place.
    """
    below = tl.load(through_ptr + last - 1, mask=mask, other=0) - tl.load(through_ptr + end - 1, mask=mask, other=0)
    before_start = tl.load(through_ptr + start - 1, mask=mask & (start > begin), other=0)
    before_first = tl.load(through_ptr + first - 1, mask=mask & (first > begin), other=0)
    return below - (before_start - before_first)


@kernel(
    "*T *T *i64 *u8 *i64 *T *i32 *fp64 *T *T *u8 *i32 fp64 i32 i32 i32 i32 i32 i32",
    WIDE,
    {
        (exponential, tangent): {"EXPONENTIAL": exponential, "TANGENT": tangent, "BLOCK": _BLOCK}
        for exponential in (False, True)
        for tangent in (False, True)
    },
    narrow=ANYWHERE,
    registers=168,
)
@triton.jit(do_not_specialize=["total", "items", "lists", "masked", "k"])
def neural_sort_order_kernel(
    key_ptr,
    v_ptr,
    order_ptr,
    valid_ptr,
    bounds_ptr,
    gain_ptr,
    where_ptr,
    number_ptr,
    loss_ptr,
    out_ptr,
    active_ptr,
    mark_ptr,
    temperature: tl.float64,
    stride,
    total,
    items,
    lists,
    masked,
    k,
    EXPONENTIAL: tl.constexpr,
    TANGENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store what the next kernels read of each place in the order of a list's scores, and the results without a loss.

    The keys are the ``total`` scores and then the labels, and ``order`` has the order of each. A list is divided into
    segments, as in csrc/neural_sort.cpp; a segment's number is its first place, or -1 where there is no item.
    ``where`` and ``number`` hold the integers and numbers of a place, each in a row of ``stride`` elements. The marks
    of a list are the number of its items, 0 unless its loss depends on the scores, and the number of programs that
    are done with it, for now 0.
    """
    program = tl.program_id(0)
    bounds_ptr += program % lists
    begin, stop = tl.load(bounds_ptr).to(tl.int32), tl.load(bounds_ptr + 1).to(tl.int32)
    base = (program // lists).to(tl.int64) * items
    order_ptr, valid_ptr, score_ptr = order_ptr + base, valid_ptr + base, key_ptr + base
    label_ptr = score_ptr + total
    step = tl.full([], stride, tl.int64)
    where_ptr, number_ptr = where_ptr + base, number_ptr + base
    item_ptr, run_ptr = where_ptr + step, where_ptr + 5 * step + begin
    discount_ptr = number_ptr + 4 * step
    own_ptr = discount_ptr + step
    high = tl.full([BLOCK], float("-inf"), label_ptr.dtype.element_ty)
    low = -high
    nan, wrong = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    count = tl.zeros([1], tl.int32)
    for block in range(begin, stop, BLOCK):
        item, valid, rank, count = load_ranked(order_ptr, valid_ptr, stop, block, count, masked, BLOCK)
        y = tl.load(label_ptr + item, mask=valid, other=0)
        s = tl.load(score_ptr + item, mask=valid, other=0)
        high, low = tl.where(valid & (y > high), y, high), tl.where(valid & (y < low), y, low)
        nan |= (y != y).to(tl.int32)
        wrong |= (s != s).to(tl.int32)
        tl.store(item_ptr + begin + rank, item.to(tl.int32), mask=valid)
        tl.store(out_ptr + base + item, tl.zeros_like(high), mask=block + tl.arange(0, BLOCK) < stop)
    count = tl.zeros([1], tl.int32)
    for block in range(begin, stop, BLOCK):
        item, valid, rank, count = load_ranked(order_ptr + total, valid_ptr, stop, block, count, masked, BLOCK)
        tl.store(run_ptr + rank, item.to(tl.int32), mask=valid)
    there, top = tl.max(count), tl.max(high)
    until, highest = begin + there, top.to(tl.float64)
    active = (there > 0) & (top > tl.min(low)) & (top > 0)
    for block in range(0, there, BLOCK):
        rank = block + tl.arange(0, BLOCK)
        discount = tl.where(rank < k, _LN2 / tl.log(rank.to(tl.float64) + 2), 0.0)
        tl.store(discount_ptr + begin + rank, discount, mask=rank < there)
    tl.debug_barrier()  # the next loads see what other threads stored
    for block in range(begin, until, BLOCK):
        place = block + tl.arange(0, BLOCK)
        item = tl.load(item_ptr + place, mask=place < until, other=0)
        y = tl.load(label_ptr + item, mask=place < until, other=0).to(tl.float64)
        tl.store(own_ptr + item, relative_gain(y, highest, EXPONENTIAL), mask=place < until)
    tl.debug_barrier()
    totals = tl.zeros([BLOCK], tl.float64)
    for block in range(begin, until, BLOCK):
        place = block + tl.arange(0, BLOCK)
        item = tl.load(run_ptr + place - begin, mask=place < until, other=0)
        gain = tl.load(own_ptr + item, mask=place < until, other=0)
        totals += gain * tl.load(discount_ptr + place, mask=place < until, other=0)
    ideal = tl.sum(totals)

    tl.debug_barrier()  # runs replace the items
    segment_ptr, item_ptr, start_ptr, end_ptr, last_ptr = _of_places(where_ptr, step)
    part_ptr, gain_ptr = run_ptr + step, gain_ptr + base
    vanishes = _VANISHES if high.dtype == tl.float32 else _VANISHES_IN_DOUBLE
    runs, parts = tl.zeros([1], tl.int32), tl.zeros([1], tl.int32)
    for block in range(begin, until, BLOCK):
        place = block + tl.arange(0, BLOCK)
        inside, follows = place < until, (place < until) & (place > begin)
        item = tl.load(item_ptr + place, mask=inside, other=0)
        above = tl.load(item_ptr + place - 1, mask=follows, other=0)
        s, y = tl.load(score_ptr + item, mask=inside, other=0), tl.load(label_ptr + item, mask=inside, other=0)
        s_above = tl.load(score_ptr + above, mask=follows, other=0)
        y_above = tl.load(label_ptr + above, mask=follows, other=0)
        same = follows & (s == s_above)
        # Items with different gains at the same infinity have no order. A label below 0 has no gain.
        differ = tl.where(y > 0, y, 0) != tl.where(y_above > 0, y_above, 0)
        wrong |= (same & differ & (tl.abs(s) == float("inf"))).to(tl.int32)
        gain = tl.load(own_ptr + item, mask=inside, other=0) / ideal
        tl.store(gain_ptr + place, tl.where(active, gain, 0.0).to(high.dtype), mask=inside)
        opens = inside & ~same
        parted = opens & ((place == begin) | ((s_above.to(tl.float64) - s) / temperature > vanishes))
        run, part = runs - 1 + tl.cumsum(opens.to(tl.int32)), parts - 1 + tl.cumsum(parted.to(tl.int32))
        tl.store(start_ptr + place, run, mask=inside)
        tl.store(segment_ptr + place, part, mask=inside)
        tl.store(run_ptr + run, place, mask=opens)
        tl.store(part_ptr + part, place, mask=parted)
        runs += tl.sum(opens.to(tl.int32), axis=0, keep_dims=True)
        parts += tl.sum(parted.to(tl.int32), axis=0, keep_dims=True)

    undefined = (tl.max(nan) > 0) | (active & (tl.max(wrong) > 0))
    used = tl.where(active & ~undefined, there, 0)
    tl.store(loss_ptr + program, tl.where(undefined, float("nan"), 0.0).to(high.dtype))
    tl.store(active_ptr + program, (active | undefined).to(tl.uint8))
    mark_ptr += 2 * program.to(tl.int64)
    tl.store(mark_ptr, used)
    tl.store(mark_ptr + 1, 0)
    tl.debug_barrier()
    for block in range(begin, tl.where(undefined, until, begin), BLOCK):
        place = block + tl.arange(0, BLOCK)
        item = tl.load(item_ptr + place, mask=place < until, other=0)
        tl.store(out_ptr + base + item, tl.full([BLOCK], float("nan"), high.dtype), mask=place < until)
    ahead_ptr = own_ptr + step
    through = tl.zeros([1], tl.float64)
    for block in range(begin, stop, BLOCK):
        place = block + tl.arange(0, BLOCK)
        inside, kept = place < stop, place < begin + used
        run, part = tl.load(start_ptr + place, mask=kept, other=0), tl.load(segment_ptr + place, mask=kept, other=0)
        start, first = tl.load(run_ptr + run, mask=kept, other=0), tl.load(part_ptr + part, mask=kept, other=0)
        end = tl.load(run_ptr + run + 1, mask=kept & (run + 1 < runs), other=0)
        end = tl.where(run + 1 < runs, end, until)
        last = tl.load(part_ptr + part + 1, mask=kept & (part + 1 < parts), other=0)
        last = tl.where(part + 1 < parts, last, until)
        item, of_first = tl.load(item_ptr + place, mask=kept, other=0), tl.load(item_ptr + first, mask=kept, other=0)
        s = tl.load(score_ptr + item, mask=kept, other=0).to(tl.float64)
        head = tl.load(score_ptr + of_first, mask=kept, other=0).to(tl.float64)
        x = tl.where(kept & (s != head), (s - head) / temperature, 0.0)
        tl.store(number_ptr + place, x, mask=kept)
        tl.store(number_ptr + 2 * step + place, (last - place - 1 + first - place).to(tl.float64), mask=kept)
        tl.store(number_ptr + 3 * step + place, (last - end - (start - first)).to(tl.float64), mask=kept)
        tl.store(start_ptr + place, start, mask=kept)
        tl.store(end_ptr + place, end, mask=kept)
        tl.store(segment_ptr + place, tl.where(kept, first, -1), mask=inside)
        tl.store(last_ptr + place, last, mask=kept)
        tl.store(own_ptr + place, through + tl.cumsum(x), mask=kept)
        through += tl.sum(x, axis=0, keep_dims=True)
    if TANGENT:
        through = tl.zeros([1], tl.float64)
        for block in range(begin, begin + used, BLOCK):
            place = block + tl.arange(0, BLOCK)
            kept = place < begin + used
            item = tl.load(item_ptr + place, mask=kept, other=0)
            u = tl.load(v_ptr + base + item, mask=kept, other=0).to(tl.float64) / temperature
            tl.store(ahead_ptr + step + place, u, mask=kept)
            tl.store(ahead_ptr + place, through + tl.cumsum(u), mask=kept)
            through += tl.sum(u, axis=0, keep_dims=True)
    tl.debug_barrier()
    for block in range(begin, begin + used, BLOCK):
        place = block + tl.arange(0, BLOCK)
        kept = place < begin + used
        start, end, first, last = _load_runs(start_ptr, end_ptr, segment_ptr, last_ptr, place, kept)
        x = tl.load(number_ptr + place, mask=kept, other=0)
        lead = (last - end - (start - first)).to(tl.float64)
        b = lead * x - _opposed(own_ptr, begin, start, end, first, last, kept)
        tl.store(number_ptr + step + place, b, mask=kept)
        if TANGENT:
            q = _opposed(ahead_ptr, begin, start, end, first, last, kept)
            tl.store(ahead_ptr + 2 * step + place, q, mask=kept)


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
    "*fp64 *fp64 *fp64 *fp64 *fp64 *fp64 *T *i32 *fp64 *T *T *T *T *i32 *i64 i32 i32 i32",
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
    discount_ptr,
    share_ptr,
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
    """Store each row's share, its discount over the sum of its terms, and its mean gain and, with TANGENT, the mean
    tangent and the mean gain's tangent.
    """
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
    share = tl.load(discount_ptr + base + row, mask=kept, other=0) / tl.where(kept, terms, 1.0).to(tl.float64)
    tl.store(share_ptr + base + row, share.to(terms.dtype), mask=inside)
    tl.store(found_ptr + base + row, found, mask=inside)
    if TANGENT:
        mean = tl.sum(moved, axis=1) * inverse
        tl.store(moved_ptr + base + row, mean, mask=inside)
        tl.store(of_found_ptr + base + row, tl.sum(both, axis=1) * inverse - found * mean, mask=inside)


@triton.jit
def _finish(
    example_list,
    base,
    begin,
    segment_ptr,
    discount_ptr,
    found_ptr,
    own_ptr,
    ahead_ptr,
    mark_ptr,
    loss_ptr,
    out_ptr,
    temperature,
    stride,
    BLOCK: tl.constexpr,
):
    """Store the loss and the slopes of a list that has items."""
    until = begin + tl.load(mark_ptr + 2 * example_list)
    where = _of_places(segment_ptr + base, tl.full([], stride, tl.int64))
    segment_ptr, item_ptr, start_ptr, end_ptr, last_ptr = where
    own_ptr += base
    found, through = tl.zeros([BLOCK], tl.float64), tl.zeros([1], tl.float64)
    for block in range(begin, until, BLOCK):
        place = block + tl.arange(0, BLOCK)
        own = tl.load(own_ptr + place, mask=place < until, other=0)
        tl.store(own_ptr + place, through + tl.cumsum(own), mask=place < until)
        through += tl.sum(own, axis=0, keep_dims=True)
        share = tl.load(found_ptr + base + place, mask=place < until, other=0).to(tl.float64)
        found += share * tl.load(discount_ptr + base + place, mask=place < until, other=0)
    tl.debug_barrier()  # the next loads see what other threads stored
    for block in range(begin, until, BLOCK):
        place = block + tl.arange(0, BLOCK)
        kept = place < until
        start, end, first, last = _load_runs(start_ptr, end_ptr, segment_ptr, last_ptr, place, kept)
        slope = tl.load(ahead_ptr + base + place, mask=kept, other=0)
        slope += _opposed(own_ptr, begin, start, end, first, last, kept)
        item = tl.load(item_ptr + place, mask=kept, other=0)
        tl.store(out_ptr + base + item, (slope / temperature).to(out_ptr.dtype.element_ty), mask=kept)
    loss = (1.0 - tl.sum(found)).to(loss_ptr.dtype.element_ty)
    tl.store(loss_ptr + example_list, loss, mask=until > begin)


@kernel(
    "*fp64 *fp64 *fp64 *fp64 *fp64 *fp64 *T *i32 *T *T *T *T *fp64 *fp64 *i32 *i64 *fp64"
    " *i32 *T *T fp64 i32 i32 i32 i32",
    WIDE,
    {key: {**variant, "BLOCK": _BLOCK // 2} for key, variant in _VARIANTS.items()},
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
    discount_ptr,
    mark_ptr,
    loss_ptr,
    out_ptr,
    temperature: tl.float64,
    stride,
    items,
    lists,
    blocks,
    SEVERAL: tl.constexpr,
    TANGENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store, for each column j, the sums over rows i of w_ij and of w_ij (lead of j - slope of row i); the last program
    to do so in a list then stores the list's loss and slopes.

    w_ij is minus the derivative of the loss with respect to z_ij or, with TANGENT, its tangent. For ``segment`` and
    the marks see `neural_sort_order_kernel`.
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
    first_list, last_list = base * 0, base * 0
    if SEVERAL:
        first_list, last_list = tl.min(tl.where(ids < 0, lists, ids)).to(tl.int64), tl.max(ids).to(tl.int64)
    example = tl.program_id(0).to(tl.int64) // blocks
    for index in range(first_list, last_list + 1):
        begin, end = tl.load(bounds_ptr + index), tl.load(bounds_ptr + index + 1)
        if end > begin:
            tl.debug_barrier()  # the threads' stores come before their program's arrival
            arrived = tl.atomic_add(mark_ptr + 2 * (example * lists + index) + 1, 1)
            tl.debug_barrier()
            if arrived == (end - 1) // ROWS - begin // ROWS:
                _finish(
                    example * lists + index, base, begin, segment_ptr, discount_ptr, found_ptr, own_ptr, ahead_ptr,
                    mark_ptr, loss_ptr, out_ptr, temperature, stride, BLOCK,
                )  # fmt: skip


def _losses(
    lists: Lists, scores: Tensor, labels: Tensor, v: Tensor | None, temperature: float, k: int, exponential: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses, the slope or its tangent along v, and the marks, as in csrc/neural_sort.cpp."""
    if scores.numel() == 0 or lists.lists == 0:
        return lists.no_items(scores)
    scores, labels, vector = lists.operands(scores, labels, v)
    loss, slope, active = lists.results(scores)
    gain, share, found = (torch.empty_like(scores) for _ in range(3))
    stride = triton.cdiv(scores.numel(), ACCESS) * ACCESS  # aligns all rows
    where = torch.empty((7, stride), dtype=torch.int32, device=scores.device)
    numbers = torch.empty((7 if v is None else 9, stride), dtype=torch.float64, device=scores.device)
    x, b, of_row, lead, discount, own, ahead, *moving = numbers.unbind()
    u, q = moving or (x, x)
    moved, of_found = (share, share) if v is None else (torch.empty_like(share), torch.empty_like(share))
    marks = torch.empty((*loss.shape, 2), dtype=torch.int32, device=scores.device)
    sizes = (lists.items, lists.lists)
    keys = torch.stack((scores, labels))
    given = (keys, vector, lists.order(keys), lists.valid, lists.bounds)
    outputs = (gain, where, numbers, loss, slope, active.view(torch.uint8), marks)
    options = (temperature, stride, scores.numel(), *sizes, int(lists.masked), k)
    neural_sort_order_kernel(loss.numel(), *given, *outputs, *options, variant=(exponential, v is not None))
    blocks = triton.cdiv(lists.items, _ROWS)
    programs, variant = lists.examples * blocks, (lists.several, v is not None)
    shared, of_rows = (x, b, of_row, lead, u, q, gain, where), (share, found, moved, of_found)
    bounds = (lists.ids, lists.bounds)
    neural_sort_rows_kernel(programs, *shared, discount, *of_rows, *bounds, *sizes, blocks, variant=variant)
    rest = (own, ahead, *bounds, discount, marks, loss, slope, temperature, stride, *sizes, blocks)
    neural_sort_columns_kernel(programs, *shared, *of_rows, *rest, variant=variant)
    return loss, slope, active


@reducing
def neural_sort(
    lists: Lists, scores: Tensor, labels: Tensor, temperature: float, k: int, exponential: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _losses(lists, scores, labels, None, temperature, k, exponential)


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
    return lists.moved(_losses(lists, scores, labels, v, temperature, k, exponential)[1], v)
