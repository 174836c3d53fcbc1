"""Reductions over segments of points, and maps of the points; see custom_ops/voxel/voxel_segments.py."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.library._torch import assert_async
from custom_ops.triton_kernels.common import FLOATING, accumulator, kernel, widen
from custom_ops.triton_kernels.voxel_grid import segment_of, sort_pairs

# A row of features is read in pieces of one of these widths, in tiles of _TILE elements.
_WIDTHS = (16, 64)
_TILE = 512

# Longer segments are reduced in chunks of so many points, so no program takes long.
_CHUNK = 128

# A program reduces up to so many segments, as most voxels of a grid are empty, where so many programs are left.
_EACH, _PROGRAMS = 16, 4096

_NOWHERE = tl.constexpr(2**31 - 1)  # an index after all rows

# The reductions: sums, the largest or the smallest row, sums of exponentials of the rows less a shift, and products.
_SUM, _MAX, _MIN, _EXP, _PROD = (tl.constexpr(kind) for kind in range(5))

# The maps: x less the mean, the softmax, and its adjoint.
_CENTER, _SOFTMAX, _ADJOINT = (tl.constexpr(kind) for kind in range(3))

# This is the segment of a point that perm lacks, or of all points if the boundaries descend; its gradient is NaN.
_UNKNOWN = tl.constexpr(-2)


def _width(columns: int) -> int:
    return next((w for w in _WIDTHS if w >= columns), _WIDTHS[-1])


# ---------------------------------------------------------------- geometry


@triton.jit
def _boundaries(indptr_ptr, segment, points):
    """Return a segment's bounds and whether they are valid; invalid bounds become empty, so no other memory is read."""
    start = tl.load(indptr_ptr + segment).to(tl.int64)
    stop = tl.load(indptr_ptr + segment + 1).to(tl.int64)
    right = (start >= 0) & (start <= stop) & (stop <= points)
    return tl.where(right, start, 0), tl.where(right, stop, 0), right


@triton.jit
def _point(perm_ptr, position, inside, points, PERM: tl.constexpr):
    """Return the point at a position, moved into range, and whether it was out of range."""
    if PERM:
        listed = tl.load(perm_ptr + position, mask=inside, other=0)
        point = tl.minimum(tl.maximum(listed, 0), points - 1)
        return point, inside & (point != listed)
    else:
        return position, inside & (position < 0)


# ---------------------------------------------------------------- reductions


@triton.jit
def _multiply(a, b):
    return a * b


@triton.jit
def _sum_rows(
    x_ptr,
    weight_ptr,
    perm_ptr,
    index_ptr,
    start,
    stop,
    points,
    rows,
    columns,
    bins,
    plane,
    column,
    shift,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PERM: tl.constexpr,
    WEIGHT: tl.constexpr,
    INDEX: tl.constexpr,
    KIND: tl.constexpr,
):
    """Return the sums, or the products, over the points from start to stop, for WIDTH columns, in the accumulator's
    dtype.
    """
    first = tl.arange(0, ROWS)
    empty: tl.constexpr = 1.0 if KIND == _PROD else 0.0
    total = widen(tl.full([ROWS, WIDTH], empty, x_ptr.dtype.element_ty))
    for begin in range(0, stop - start, ROWS):
        position = start + begin + first
        inside = position < stop
        row, stray = _point(perm_ptr, position, inside, points, PERM)
        if WEIGHT:
            weight = widen(tl.load(weight_ptr + row, mask=inside & ~stray, other=float("nan")))
            if INDEX:
                row, past = _point(index_ptr, row, inside, rows, True)
                weight = tl.where(past, float("nan"), weight)
            else:
                narrow = row.to(tl.int32)  # a division of 64 bits takes about ten times as many instructions
                row = (narrow // plane // bins * plane + narrow % plane).to(tl.int64)
        exists = inside[:, None] & (column < columns)[None, :]
        value = widen(tl.load(x_ptr + row[:, None] * columns + column[None, :], mask=exists, other=empty))
        if WEIGHT:
            value = tl.where(inside[:, None], weight[:, None] * value, 0)
        elif PERM:
            value = tl.where(stray[:, None], float("nan"), value)
        if KIND == _EXP:
            value = tl.where(exists, tl.exp(value - shift[None, :]), 0)
        if KIND == _PROD:
            total *= value
        else:
            total += value
    if KIND == _PROD:
        return tl.reduce(total, 0, _multiply)
    else:
        return tl.sum(total, axis=0)


@triton.jit
def _shift(shift_ptr, row, columns, column, EXP: tl.constexpr):
    """Return what a segment's rows are reduced by before they are exponents, if they are."""
    if EXP:
        return widen(tl.load(shift_ptr + row * columns + column, mask=column < columns, other=0))
    else:
        return column


@triton.jit
def _max_rows(
    x_ptr,
    perm_ptr,
    start,
    stop,
    points,
    columns,
    column,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PERM: tl.constexpr,
    NEGATED: tl.constexpr,
):
    """Return the largest value from start to stop, for WIDTH columns, and the first position that has it, or -1 for
    none; the largest of the NEGATED values is that of the smallest.

    A NaN is larger than all numbers.
    """
    first = tl.arange(0, ROWS)
    best = widen(tl.full([ROWS, WIDTH], float("-inf"), x_ptr.dtype.element_ty))
    # Positions count from start, since 64 bits take twice the registers. A row starts at its first one, in case all
    # values are -inf.
    where = tl.broadcast_to(first[:, None], [ROWS, WIDTH])
    for begin in range(0, stop - start, ROWS):
        position = start + begin + first
        inside = position < stop
        row, stray = _point(perm_ptr, position, inside, points, PERM)
        exists = inside[:, None] & (column < columns)[None, :]
        at = row[:, None] * columns + column[None, :]
        if NEGATED:
            value = -widen(tl.load(x_ptr + at, mask=exists, other=float("inf")))
        else:
            value = widen(tl.load(x_ptr + at, mask=exists, other=float("-inf")))
        if PERM:
            value = tl.where(stray[:, None], float("nan"), value)
        above = (best == best) & ~(value <= best)
        best = tl.where(above, value, best)
        where = tl.where(above, (begin + first).to(tl.int32)[:, None], where)
    nan = best != best
    first_nan = tl.min(tl.where(nan, where, _NOWHERE), axis=0)
    largest = tl.max(tl.where(nan, float("-inf"), best), axis=0)
    first = tl.min(tl.where(best == largest[None, :], where, _NOWHERE), axis=0)
    has_nan = first_nan < _NOWHERE
    first = tl.where(has_nan, first_nan, first)
    return tl.where(has_nan, float("nan"), largest), tl.where(start < stop, start + first, -1)


# Each reduction is listed with the order, weights and rows that it may have: (PERM, WEIGHT, INDEX, KIND).
_MODES = [
    (False, False, False, _SUM.value),
    (True, False, False, _SUM.value),
    (True, True, False, _SUM.value),
    (True, True, True, _SUM.value),
    (True, False, False, _MAX.value),
    (True, False, False, _MIN.value),
    (True, False, False, _EXP.value),
    (True, False, False, _PROD.value),
]
_REDUCE_VARIANTS = {
    (width, *mode): {
        "ROWS": _TILE // width,
        "WIDTH": width,
        "CHUNK": _CHUNK,
        "PERM": mode[0],
        "WEIGHT": mode[1],
        "INDEX": mode[2],
        "KIND": mode[3],
    }
    for width in _WIDTHS
    for mode in _MODES
}


# A segment of more than CHUNK points starts in one chunk and reaches into the next. A chunk therefore has at most one
# such segment that started before it and at most one that starts in it: parts 0 and 1 of partial.
@kernel(
    "*T *T *i64 *i64 *i64 *T *A *i64 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32",
    FLOATING,
    _REDUCE_VARIANTS,
    streams=_TILE,
)
@triton.jit(do_not_specialize=["points", "rows", "segments", "bins", "plane", "pieces", "chunks", "steps", "own"])
def segment_reduce_chunks_kernel(
    x_ptr,
    weight_ptr,
    indptr_ptr,
    perm_ptr,
    index_ptr,
    shift_ptr,
    partial_ptr,
    partial_at_ptr,
    points,
    rows,
    segments,
    columns,
    bins,
    plane,
    pieces,
    chunks,
    steps,
    own,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    PERM: tl.constexpr,
    WEIGHT: tl.constexpr,
    INDEX: tl.constexpr,
    KIND: tl.constexpr,
):
    program = tl.program_id(0)
    column = program % pieces * WIDTH + tl.arange(0, WIDTH)
    out_row = (program // pieces).to(tl.int64)
    chunk = out_row % chunks
    starts_here = out_row // chunks % 2 == 1
    example = out_row // chunks // 2
    indptr_ptr += example * own * (segments + 1)
    first = chunk * CHUNK
    end = tl.minimum(first + CHUNK, points)
    segment = segment_of(indptr_ptr, segments + 1, steps, tl.where(starts_here, end - 1, first))
    if (segment >= 0) & (segment < segments):
        start, stop, _ = _boundaries(indptr_ptr, segment, points)
        if (stop - start > CHUNK) & ((start >= first) == starts_here):
            x_ptr += example * rows * columns
            weight_ptr += example * points
            perm_ptr += example * own * points
            index_ptr += example * own * points
            begin, stop = tl.maximum(start, first), tl.minimum(stop, end)
            if (KIND == _MAX) | (KIND == _MIN):
                total, where = _max_rows(
                    x_ptr, perm_ptr, begin, stop, points, columns, column, ROWS, WIDTH, PERM, KIND == _MIN
                )
                tl.store(partial_at_ptr + out_row * columns + column, where, mask=column < columns)
            else:
                total = _sum_rows(
                    x_ptr,
                    weight_ptr,
                    perm_ptr,
                    index_ptr,
                    begin,
                    stop,
                    points,
                    rows,
                    columns,
                    bins,
                    plane,
                    column,
                    _shift(shift_ptr, example * segments + segment, columns, column, KIND == _EXP),
                    ROWS,
                    WIDTH,
                    PERM,
                    WEIGHT,
                    INDEX,
                    KIND,
                )
            tl.store(partial_ptr + out_row * columns + column, total, mask=column < columns)


@kernel(
    "*T *T *i64 *i64 *i64 *T *A *i64 *T *i64 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32",
    FLOATING,
    _REDUCE_VARIANTS,
    streams=_TILE,
)
@triton.jit(
    do_not_specialize=["points", "rows", "segments", "bins", "plane", "pieces", "chunks", "mean", "own", "each"]
)
def segment_reduce_kernel(
    x_ptr,
    weight_ptr,
    indptr_ptr,
    perm_ptr,
    index_ptr,
    shift_ptr,
    partial_ptr,
    partial_at_ptr,
    out_ptr,
    argmax_ptr,
    points,
    rows,
    segments,
    columns,
    bins,
    plane,
    pieces,
    chunks,
    mean,
    own,
    each,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    PERM: tl.constexpr,
    WEIGHT: tl.constexpr,
    INDEX: tl.constexpr,
    KIND: tl.constexpr,
):
    program = tl.program_id(0)
    column = program % pieces * WIDTH + tl.arange(0, WIDTH)
    exists = column < columns
    blocks = tl.cdiv(segments, each)
    example, first = (program // pieces // blocks).to(tl.int64), program // pieces % blocks * each
    indptr_ptr += example * own * (segments + 1)
    perm_ptr += example * own * points
    index_ptr += example * own * points
    x_ptr += example * rows * columns
    weight_ptr += example * points
    before = example * 2 * chunks * columns
    for segment in range(first, tl.minimum(first + each, segments)):
        out_row = example * segments + segment
        start, stop, right = _boundaries(indptr_ptr, segment, points)
        # The parts of a long segment are the one where it starts, then, row by row, those where it continues.
        starting = before + (chunks + start // CHUNK) * columns + column
        begin, end = start // CHUNK + 1, (stop - 1) // CHUNK + 1
        if (KIND == _MAX) | (KIND == _MIN):
            if start == stop:
                total = tl.zeros([WIDTH], partial_ptr.dtype.element_ty)
                where = tl.full([WIDTH], -1, tl.int64)
            elif stop - start <= CHUNK:
                total, where = _max_rows(
                    x_ptr, perm_ptr, start, stop, points, columns, column, ROWS, WIDTH, PERM, KIND == _MIN
                )
            else:
                total, chunk = _max_rows(
                    partial_ptr + before, perm_ptr, begin, end, points, columns, column, ROWS, WIDTH, False, False
                )
                starts = tl.load(partial_ptr + starting, mask=exists, other=0)
                earlier = (starts >= total) | (starts != starts)
                total = tl.where(earlier, starts, total)
                at = tl.where(earlier, starting, before + chunk * columns + column)
                where = tl.load(partial_at_ptr + at, mask=exists, other=-1)
            filled = (where >= 0) & (where < points)  # a corrupted indptr may give any place
            point, _ = _point(perm_ptr, where, filled, points, PERM)
            tl.store(argmax_ptr + out_row * columns + column, tl.where(filled, point, -1), mask=exists)
            total = tl.where(filled, -total if KIND == _MIN else total, 0)
        else:
            if start == stop:
                total = tl.full([WIDTH], 1.0 if KIND == _PROD else 0.0, partial_ptr.dtype.element_ty)
            elif stop - start <= CHUNK:
                total = _sum_rows(
                    x_ptr,
                    weight_ptr,
                    perm_ptr,
                    index_ptr,
                    start,
                    stop,
                    points,
                    rows,
                    columns,
                    bins,
                    plane,
                    column,
                    _shift(shift_ptr, out_row, columns, column, KIND == _EXP),
                    ROWS,
                    WIDTH,
                    PERM,
                    WEIGHT,
                    INDEX,
                    KIND,
                )
            else:
                total = _sum_rows(
                    partial_ptr + before,
                    partial_ptr,
                    perm_ptr,
                    index_ptr,
                    begin,
                    end,
                    points,
                    rows,
                    columns,
                    bins,
                    plane,
                    column,
                    column,
                    ROWS,
                    WIDTH,
                    False,
                    False,
                    False,
                    _PROD if KIND == _PROD else _SUM,
                )
                starts = tl.load(partial_ptr + starting, mask=exists, other=0)
                total = total * starts if KIND == _PROD else total + starts
            if mean != 0:
                total = total / tl.maximum((stop - start).to(tl.int32), 1)
        total = tl.where(right, total, float("nan"))
        tl.store(out_ptr + out_row * columns + column, total, mask=exists)


# ---------------------------------------------------------------- adjoints


@kernel(
    "*i64 *i64 *i64 i32 i32 i32 i32",
    ("i64",),
    {perm: {"PERM": perm, "BLOCK": 256} for perm in (False, True)},
    narrow="searches each point's segment among the boundaries",
)
@triton.jit(do_not_specialize=["points", "segments", "blocks", "steps"])
def segment_rank_kernel(
    indptr_ptr, perm_ptr, rank_ptr, points, segments, blocks, steps, PERM: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    example = (program // blocks).to(tl.int64)
    position = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = position < points
    indptr_ptr += example * (segments + 1)
    segment = segment_of(indptr_ptr, segments + 1, steps, position)
    point, stray = _point(perm_ptr + example * points, position, inside, points, PERM)
    within = (segment >= 0) & (segment < segments)
    stop = tl.load(indptr_ptr + segment + 1, mask=inside & within, other=0)
    ordered = tl.where(within, position < stop, tl.load(indptr_ptr + segments) >= 0)
    rank = tl.where(within, segment, -1)
    tl.store(rank_ptr + example * points + point, tl.where(ordered, rank, _UNKNOWN), mask=inside & ~stray)


@triton.jit
def _points_of(program, blocks, rows, bins, plane, POINTS: tl.constexpr):
    """Return the program's example and rows of x, which of them exist, and the first point of each."""
    example = (program // blocks).to(tl.int64)
    row = (program % blocks).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    return example, row, row < rows, row // plane * (bins - 1) * plane + row


@triton.jit
def _share(indptr_ptr, segment, found, T: tl.constexpr):
    """Return one over the number of the segment's points."""
    first = tl.load(indptr_ptr + segment, mask=found, other=0)
    last = tl.load(indptr_ptr + segment + 1, mask=found, other=1)
    count = tl.maximum(last - first, 1).to(T)
    return 1.0 / count if tl.float64 == T else tl.div_rn(1.0, count)


_SPREAD_TILE = 2 * _TILE
_SPREAD = {width: {"POINTS": _SPREAD_TILE // width, "WIDTH": width} for width in _WIDTHS}


@kernel(
    "*T *T *i64 *i64 *T i32 i32 i32 i32 i32 i32 i32 i32 i32",
    FLOATING,
    {(width, weight): {**_SPREAD[width], "WEIGHT": weight} for width in _WIDTHS for weight in (False, True)},
    streams=_SPREAD_TILE,
)
@triton.jit(do_not_specialize=["segments", "rows", "bins", "plane", "pieces", "blocks", "mean", "own"])
def segment_spread_rows_kernel(
    sums_ptr,
    weight_ptr,
    indptr_ptr,
    rank_ptr,
    out_ptr,
    segments,
    rows,
    columns,
    bins,
    plane,
    pieces,
    blocks,
    mean,
    own,
    POINTS: tl.constexpr,
    WIDTH: tl.constexpr,
    WEIGHT: tl.constexpr,
):
    program = tl.program_id(0)
    column = program % pieces * WIDTH + tl.arange(0, WIDTH)
    example, row, inside, first = _points_of(program // pieces, blocks, rows, bins, plane, POINTS)
    points, plane = rows * bins.to(tl.int64), plane.to(tl.int64)
    rank_ptr += example * own * points
    indptr_ptr += example * own * (segments + 1)
    weight_ptr += example * points
    sums_ptr += example * segments * columns
    exists = (column < columns)[None, :]
    total = widen(tl.zeros([POINTS, WIDTH], sums_ptr.dtype.element_ty))
    for d in range(bins):
        point = first + d * plane
        segment = tl.load(rank_ptr + point, mask=inside, other=-1)
        found = segment >= 0
        sums = widen(
            tl.load(sums_ptr + segment[:, None] * columns + column[None, :], mask=found[:, None] & exists, other=0)
        )
        if WEIGHT:
            sums *= widen(tl.load(weight_ptr + point, mask=found, other=0))[:, None]
        if mean != 0:
            # The shares here and below are in float64, as ptxas would use local memory for sums.dtype.
            sums = sums * _share(indptr_ptr, segment, found, tl.float64).to(sums.dtype)[:, None]
        total += tl.where((segment == _UNKNOWN)[:, None], float("nan"), sums)
    at = (example * rows + row)[:, None] * columns + column[None, :]
    tl.store(out_ptr + at, total, mask=inside[:, None] & exists)


@kernel("*T *T *i64 *i64 *T i32 i32 i32 i32 i32 i32 i32 i32", FLOATING, _SPREAD, streams=_SPREAD_TILE)
@triton.jit(do_not_specialize=["segments", "rows", "bins", "plane", "blocks", "mean", "own"])
def segment_spread_dots_kernel(
    sums_ptr,
    x_ptr,
    indptr_ptr,
    rank_ptr,
    out_ptr,
    segments,
    rows,
    columns,
    bins,
    plane,
    blocks,
    mean,
    own,
    POINTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0)
    example, row, inside, first = _points_of(program, blocks, rows, bins, plane, POINTS)
    points, plane = rows * bins.to(tl.int64), plane.to(tl.int64)
    rank_ptr += example * own * points
    indptr_ptr += example * own * (segments + 1)
    sums_ptr += example * segments * columns
    x_ptr += example * rows * columns
    for d in range(bins):
        point = first + d * plane
        segment = tl.load(rank_ptr + point, mask=inside, other=-1)
        found = segment >= 0
        total = widen(tl.zeros([POINTS], sums_ptr.dtype.element_ty))
        for begin in range(0, columns, WIDTH):
            column = begin + tl.arange(0, WIDTH)[None, :]
            exists = found[:, None] & (column < columns)
            sums = widen(tl.load(sums_ptr + segment[:, None] * columns + column, mask=exists, other=0))
            x = widen(tl.load(x_ptr + row[:, None] * columns + column, mask=exists, other=0))
            total += tl.sum(sums * x, axis=1)
        if mean != 0:
            total = total * _share(indptr_ptr, segment, found, tl.float64).to(total.dtype)
        total = tl.where(segment == _UNKNOWN, float("nan"), total)
        tl.store(out_ptr + example * points + point, total, mask=inside)


@kernel("*T *T *i64 *i64 *T i32 i32 i32 i32 i32 i32", FLOATING, _SPREAD, streams=_SPREAD_TILE)
@triton.jit(do_not_specialize=["points", "segments", "rows", "blocks", "own"])
def pair_dots_kernel(
    sums_ptr,
    x_ptr,
    rank_ptr,
    index_ptr,
    out_ptr,
    points,
    segments,
    rows,
    columns,
    blocks,
    own,
    POINTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    example, point, inside, _ = _points_of(tl.program_id(0), blocks, points, 1, 1, POINTS)
    segment = tl.load(rank_ptr + example * own * points + point, mask=inside, other=-1)
    row = tl.load(index_ptr + example * own * points + point, mask=inside, other=-1)
    past = (segment >= segments) | (row >= rows)
    found = (segment >= 0) & (row >= 0) & ~past
    sums_ptr += example * segments * columns
    x_ptr += example * rows * columns
    total = widen(tl.zeros([POINTS], sums_ptr.dtype.element_ty))
    for begin in range(0, columns, WIDTH):
        column = begin + tl.arange(0, WIDTH)[None, :]
        exists = found[:, None] & (column < columns)
        sums = widen(tl.load(sums_ptr + segment[:, None] * columns + column, mask=exists, other=0))
        x = widen(tl.load(x_ptr + row[:, None] * columns + column, mask=exists, other=0))
        total += tl.sum(sums * x, axis=1)
    tl.store(out_ptr + example * points + point, tl.where(past, float("nan"), total), mask=inside)


# ---------------------------------------------------------------- recurrences

_SCANS = {
    (width, perm, terms): {"WIDTH": width, "CHUNK": _CHUNK, "PERM": perm, "TERMS": terms}
    for width in _WIDTHS
    for perm in (False, True)
    for terms in (False, True)
}
_ONE_AFTER_ANOTHER = "takes one row after the other, as each depends on the one before"


# A program takes a chunk of points and writes their rows; or, in a first pass, for a segment that goes on in the next
# chunk, the row at the chunk's end if it begins with 0, and the product of the factors.
@kernel(
    "*T *T *i64 *i64 *T *T *T *T i32 i32 i32 i32 i32 i32 i32",
    ("fp32", "fp64"),
    _SCANS,
    num_warps=1,
    narrow=_ONE_AFTER_ANOTHER,
)
@triton.jit(do_not_specialize=["points", "pieces", "chunks", "own", "backwards", "writes"])
def segment_scan_kernel(
    factors_ptr,
    terms_ptr,
    perm_ptr,
    rank_ptr,
    first_ptr,
    product_ptr,
    last_ptr,
    out_ptr,
    points,
    columns,
    pieces,
    chunks,
    own,
    backwards,
    writes,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    PERM: tl.constexpr,
    TERMS: tl.constexpr,
):
    program = tl.program_id(0)
    column = program % pieces * WIDTH + tl.arange(0, WIDTH)
    exists, written = column < columns, columns * writes
    part = (program // pieces).to(tl.int64)
    example, chunk = part // chunks, part % chunks
    perm_ptr += example * own * points
    rank_ptr += example * own * points
    begin = chunk * CHUNK
    end = tl.minimum(begin + CHUNK, points)
    before = tl.where(backwards != 0, end, begin - 1)
    follows = (before >= 0) & (before < points)
    point, stray = _point(perm_ptr, before, follows, points, PERM)
    segment = tl.load(rank_ptr + point, mask=follows & ~stray, other=-1)
    at = part * columns + column
    row = tl.load(first_ptr + at, mask=column < tl.where(segment >= 0, written, 0), other=0)
    product = row * 0 + 1
    for step in range(end - begin):
        position = tl.where(backwards != 0, end - 1 - step, begin + step)
        point, stray = _point(perm_ptr, position, position < end, points, PERM)
        of_point = tl.load(rank_ptr + point, mask=~stray, other=0)
        of_point = tl.where(stray, segment, of_point)
        begins = of_point != segment
        segment = of_point
        row = tl.where(begins, 0.0 if TERMS else 1.0, row)
        product = tl.where(begins, 1.0, product)
        place = (example * points + point) * columns + column
        outside = tl.where(segment == _UNKNOWN, float("nan"), 0.0)
        tl.store(out_ptr + place, tl.where(segment >= 0, row, outside), mask=column < tl.where(stray, 0, written))
        factor = tl.load(factors_ptr + place, mask=column < tl.where(stray, 0, columns), other=float("nan"))
        row = row * factor
        if TERMS:
            row += tl.load(terms_ptr + place, mask=exists, other=0)
        product = product * factor
    tl.store(product_ptr + at, product, mask=column < columns - written)
    tl.store(last_ptr + at, row, mask=column < columns - written)


@kernel(
    "*T *T *T *i64 i32 i32 i32 i32 i32 i32 i32",
    ("fp32", "fp64"),
    {width: {"WIDTH": width, "CHUNK": _CHUNK} for width in _WIDTHS},
    num_warps=1,
    narrow=_ONE_AFTER_ANOTHER,
)
@triton.jit(do_not_specialize=["points", "segments", "pieces", "chunks", "own", "backwards"])
def segment_scan_chunks_kernel(
    product_ptr,
    last_ptr,
    first_ptr,
    indptr_ptr,
    points,
    segments,
    columns,
    pieces,
    chunks,
    own,
    backwards,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Store the row that each chunk begins with, for a segment of several chunks."""
    program = tl.program_id(0)
    column = program % pieces * WIDTH + tl.arange(0, WIDTH)
    exists = column < columns
    out_row = (program // pieces).to(tl.int64)
    example, segment = out_row // segments, out_row % segments
    start, stop, _ = _boundaries(indptr_ptr + example * own * (segments + 1), segment, points)
    begin, end = start // CHUNK, (stop - 1) // CHUNK
    row = widen(tl.zeros([WIDTH], last_ptr.dtype.element_ty))
    for step in range(end - begin):
        chunk = example * chunks + tl.where(backwards != 0, end - step, begin + step)
        last = tl.load(last_ptr + chunk * columns + column, mask=exists, other=0)
        product = tl.load(product_ptr + chunk * columns + column, mask=exists, other=0)
        row = tl.where(step == 0, last, product * row + last)  # where the segment begins, the row isn't one from 0
        following = tl.where(backwards != 0, chunk - 1, chunk + 1)
        tl.store(first_ptr + following * columns + column, row, mask=exists)


# ---------------------------------------------------------------- maps


@kernel(
    "*T *T *T *i64 *T i32 i32 i32 i32 i32 i32",
    ("fp32", "fp64"),
    {
        (width, kind.value): {**_SPREAD[width], "KIND": kind.value}
        for width in _WIDTHS
        for kind in (_CENTER, _SOFTMAX, _ADJOINT)
    },
    streams=_SPREAD_TILE,
)
@triton.jit(do_not_specialize=["points", "segments", "pieces", "blocks", "own"])
def segment_map_kernel(
    x_ptr,
    statistic_ptr,
    other_ptr,
    rank_ptr,
    out_ptr,
    points,
    segments,
    columns,
    pieces,
    blocks,
    own,
    POINTS: tl.constexpr,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
):
    """Map each point by a statistic of its segment; ``other`` has a factor of each segment (softmax) or of each point
    (its adjoint).
    """
    program = tl.program_id(0)
    column = program % pieces * WIDTH + tl.arange(0, WIDTH)
    example, point, inside, _ = _points_of(program // pieces, blocks, points, 1, 1, POINTS)
    segment = tl.load(rank_ptr + example * own * points + point, mask=inside, other=-1)
    found = (segment >= 0)[:, None] & (column < columns)[None, :]
    at = (example * points + point)[:, None] * columns + column[None, :]
    of_segment = (example * segments + segment)[:, None] * columns + column[None, :]
    value = tl.load(x_ptr + at, mask=found, other=0) - tl.load(statistic_ptr + of_segment, mask=found, other=0)
    if KIND == _SOFTMAX:
        value = tl.exp(value) * tl.load(other_ptr + of_segment, mask=found, other=0)
    elif KIND == _ADJOINT:
        value *= tl.load(other_ptr + at, mask=found, other=0)
    value = tl.where((segment == _UNKNOWN)[:, None], float("nan"), value)
    tl.store(out_ptr + at, value, mask=inside[:, None] & (column < columns)[None, :])


# ---------------------------------------------------------------- launchers


class _Segments:
    """The geometry of a batch, in the form that the kernels take."""

    def __init__(self, indptr: Tensor, perm: Tensor | None, batch: torch.Size, points: int) -> None:
        if indptr.dim() < 1 or indptr.shape[-1] < 1 or indptr.dtype != torch.int64:
            raise RuntimeError("indptr: expected an int64 tensor [..., V + 1]")
        if indptr.shape[:-1] not in (batch, ()):
            raise RuntimeError("indptr: expected the leading dimensions of x, or none")
        if perm is not None and (perm.shape != (*indptr.shape[:-1], points) or perm.dtype != torch.int64):
            raise RuntimeError(
                f"perm: expected an int64 tensor of {points} points, with the leading dimensions of indptr"
            )
        self.indptr = indptr.contiguous()
        self.ordered = perm is not None
        self.perm = self.indptr if perm is None else perm.contiguous()
        self.own = int(indptr.dim() > 1)  # 1 if each example has its own geometry
        self.geometries = math.prod(batch) if self.own else 1
        self.count, self.points = indptr.shape[-1] - 1, points
        self.steps = indptr.shape[-1].bit_length()

    def ranks(self) -> Tensor:
        """Return the segment of each point, or -1 for none."""
        rank = self.indptr.new_full((self.geometries, self.points), _UNKNOWN.value)
        blocks = triton.cdiv(self.points, 256)
        segment_rank_kernel(
            self.geometries * blocks,
            *(self.indptr, self.perm, rank, self.points, self.count, blocks, self.steps),
            variant=self.ordered,
        )
        return rank


def _rows(points: int, bins: int, plane: int) -> int:
    if bins < 1 or plane < 1 or points % (bins * plane):
        raise RuntimeError(f"bins, plane: expected divisors of {points} points, got {bins} and {plane}")
    return points // bins


def _check_like(name: str, tensor: Tensor, like: Tensor, *shape: int) -> Tensor:
    if tensor.shape != shape or tensor.dtype != like.dtype:
        raise RuntimeError(f"{name}: expected a tensor that fits the others in shape and dtype")
    return tensor.contiguous()


def _reduce(
    x: Tensor,
    weight: Tensor | None,
    segments: _Segments,
    mean: bool,
    bins: int,
    plane: int,
    kind: tl.constexpr = _SUM,
    index: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    *batch, rows, columns = x.shape
    points, count = segments.points, segments.count
    out = x.new_empty((*batch, count, columns))
    extreme, sums = kind in (_MAX, _MIN), kind == _SUM
    argmax = segments.indptr.new_empty(out.shape if extreme else (0,))
    if out.numel() == 0:
        return out, argmax
    perm, ordered = segments.perm, segments.ordered
    if (weight is not None or not sums) and not ordered:
        perm = torch.arange(points, device=x.device).expand(segments.geometries, points).contiguous()
    examples, width = math.prod(batch), _width(columns)
    pieces = triton.cdiv(columns, width)
    chunks = triton.cdiv(points, _CHUNK) if points > _CHUNK else 0
    partial = x.new_empty((examples, 2, chunks, columns), dtype=accumulator(x.dtype))
    partial_at = argmax.new_empty(partial.shape if extreme else (0,))
    variant = (width, ordered or weight is not None or not sums, weight is not None, index is not None, kind.value)
    geometry = (segments.indptr, perm, perm if index is None else index)
    tensors = (x, x if weight is None else weight, *geometry, x if shift is None else shift, partial, partial_at)
    sizes = (points, rows, count, columns, bins, plane, pieces, chunks)
    own = segments.own
    segment_reduce_chunks_kernel(examples * 2 * chunks * pieces, *tensors, *sizes, segments.steps, own, variant=variant)
    each = min(_EACH, max(1, examples * count * pieces // _PROGRAMS))
    programs = examples * triton.cdiv(count, each) * pieces
    segment_reduce_kernel(programs, *tensors, out, argmax, *sizes, int(mean), own, each, variant=variant)
    return out, argmax


def segment_reduce(
    x: Tensor, weight: Tensor | None, indptr: Tensor, perm: Tensor | None, mean: bool, bins: int, plane: int
) -> Tensor:
    x = x.contiguous()
    *batch, rows, _ = x.shape
    points = rows * bins
    _rows(points, bins, plane)
    if x.dtype == torch.int64:
        return _reduce_integers(x, _Segments(indptr, perm, x.shape[:-2], points), "sum")
    if weight is not None:
        weight = _check_like("weight", weight, x, *batch, points)
    elif bins > 1:  # the kernels share rows among weighted points only
        weight = x.new_ones((*batch, points))
    return _reduce(x, weight, _Segments(indptr, perm, x.shape[:-2], points), mean, bins, plane)[0]


def segment_extreme(x: Tensor, indptr: Tensor, perm: Tensor | None, largest: bool) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    segments = _Segments(indptr, perm, x.shape[:-2], x.shape[-2])
    if x.dtype != torch.int64:
        return _reduce(x, None, segments, False, 1, 1, _MAX if largest else _MIN)
    values = _reduce_integers(x, segments, "amax" if largest else "amin")
    rank = _ranks_of_rows(x, segments)
    has_it = (rank >= 0) & (x == values.gather(-2, rank.clamp_min(0))) if segments.count else rank >= 0
    positions = torch.arange(segments.points, device=x.device)
    if segments.ordered:
        positions = torch.empty_like(segments.perm).scatter(-1, segments.perm, positions.expand_as(segments.perm))
    first = _reduce_integers(positions[..., None].where(has_it, segments.points), segments, "amin")
    index = first.clamp_max(segments.points - 1)
    if segments.ordered:
        index = segments.perm[..., None].expand(x.shape).gather(-2, index) if segments.points else first
    return values, index.where(segments.indptr.diff()[..., None] > 0, -1)


def _ranks_of_rows(x: Tensor, segments: _Segments) -> Tensor:
    rank = segments.ranks().view(*segments.indptr.shape[:-1], segments.points)
    valid = (segments.indptr[..., -1] <= segments.points).all() & (rank != _UNKNOWN.value).all()
    assert_async(valid, "indptr, perm: expected valid segments, as integers have no NaN")
    return rank.expand(x.shape[:-1])[..., None].expand(x.shape)


def segment_prod(x: Tensor, indptr: Tensor, perm: Tensor | None) -> Tensor:
    x = x.contiguous()
    segments = _Segments(indptr, perm, x.shape[:-2], x.shape[-2])
    if x.dtype == torch.int64:
        return _reduce_integers(x, segments, "prod")
    return _reduce(x, None, segments, False, 1, 1, _PROD)[0]


def segment_scan(factors: Tensor, terms: Tensor | None, indptr: Tensor, perm: Tensor | None, backwards: bool) -> Tensor:
    *batch, points, columns = factors.shape
    segments = _Segments(indptr, perm, factors.shape[:-2], points)
    a = factors.contiguous().to(accumulator(factors.dtype))
    b = a if terms is None else _check_like("terms", terms, factors, *factors.shape).to(a.dtype)
    out = a.new_full(a.shape, math.nan) if segments.ordered else torch.empty_like(a)  # perm may lack points
    examples, width = math.prod(batch), _width(columns)
    pieces, chunks = triton.cdiv(columns, width), triton.cdiv(points, _CHUNK)
    first = a.new_full((examples, chunks, columns), math.nan)
    product, last = torch.empty_like(first), torch.empty_like(first)
    tensors = (a, b, segments.perm, segments.ranks(), first, product, last, out)
    sizes = (points, columns, pieces, chunks, segments.own, int(backwards))
    variant = (width, segments.ordered, terms is not None)
    if chunks > 1:
        segment_scan_kernel(examples * chunks * pieces, *tensors, *sizes, 0, variant=variant)
        segment_scan_chunks_kernel(
            examples * segments.count * pieces,
            *(product, last, first, segments.indptr, points, segments.count, *sizes[1:]),
            variant=width,
        )
    segment_scan_kernel(examples * chunks * pieces, *tensors, *sizes, 1, variant=variant)
    return out.to(factors.dtype)


def _reduce_integers(x: Tensor, segments: _Segments, reduce: str) -> Tensor:
    """Reduce int64 numbers, whose atomic operations are deterministic; an empty segment gives 0, or 1."""
    rank = _ranks_of_rows(x, segments)
    at = rank.where(rank >= 0, segments.count)  # others go to an extra row at the end
    out = x.new_full((*x.shape[:-2], segments.count + 1, x.shape[-1]), int(reduce == "prod"))
    return out.scatter_reduce(-2, at, x, reduce, include_self=reduce in ("sum", "prod"))[..., :-1, :].contiguous()


def _exponential_sums(x: Tensor, segments: _Segments) -> tuple[Tensor, Tensor, Tensor]:
    """Return each segment's largest x, the same but 0 instead of -inf, and the sum of e^(x - that)."""
    largest, _ = _reduce(x, None, segments, False, 1, 1, _MAX)
    top = largest.masked_fill(largest == float("-inf"), 0)
    return largest, top, _reduce(x, None, segments, False, 1, 1, _EXP, shift=top)[0]


def segment_logsumexp(x: Tensor, indptr: Tensor, perm: Tensor | None) -> Tensor:
    wide = x.contiguous().to(accumulator(x.dtype))
    largest, top, total = _exponential_sums(wide, _Segments(indptr, perm, x.shape[:-2], x.shape[-2]))
    return torch.where(largest == float("inf"), largest, top + total.log()).to(x.dtype)


def _map(x: Tensor, statistic: Tensor, other: Tensor, segments: _Segments, kind: tl.constexpr) -> Tensor:
    *batch, points, columns = x.shape
    out = torch.empty_like(x)
    width = _width(columns)
    pieces, blocks = triton.cdiv(columns, width), triton.cdiv(points, _SPREAD[width]["POINTS"])
    sizes = (points, segments.count, columns, pieces, blocks, segments.own)
    programs = math.prod(batch) * blocks * pieces
    segment_map_kernel(programs, x, statistic, other, segments.ranks(), out, *sizes, variant=(width, kind.value))
    return out


def segment_softmax(x: Tensor, indptr: Tensor, perm: Tensor | None) -> Tensor:
    wide, segments = x.contiguous().to(accumulator(x.dtype)), _Segments(indptr, perm, x.shape[:-2], x.shape[-2])
    _, top, total = _exponential_sums(wide, segments)
    return _map(wide, top, total.reciprocal().masked_fill(total == 0, 0), segments, _SOFTMAX).to(x.dtype)


def segment_softmax_adjoint(grad: Tensor, y: Tensor, indptr: Tensor, perm: Tensor | None) -> Tensor:
    grad = grad.contiguous()
    y = _check_like("y", y, grad, *grad.shape)
    segments = _Segments(indptr, perm, grad.shape[:-2], grad.shape[-2])
    g, wide = grad.to(accumulator(grad.dtype)), y.to(accumulator(grad.dtype))
    dots, _ = _reduce(g * wide, None, segments, False, 1, 1)
    return _map(g, dots, wide, segments, _ADJOINT).to(grad.dtype)


def segment_center(x: Tensor, indptr: Tensor, perm: Tensor | None) -> Tensor:
    wide, segments = x.contiguous().to(accumulator(x.dtype)), _Segments(indptr, perm, x.shape[:-2], x.shape[-2])
    mean, _ = _reduce(wide, None, segments, True, 1, 1)
    return _map(wide, mean, wide, segments, _CENTER).to(x.dtype)


def segment_spread(
    sums: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    indptr: Tensor,
    perm: Tensor | None,
    points: int,
    mean: bool,
    bins: int,
    plane: int,
    of_x: bool,
) -> tuple[Tensor, Tensor]:
    sums = sums.contiguous()
    *batch, count, columns = sums.shape
    segments = _Segments(indptr, perm, sums.shape[:-2], points)
    if count != segments.count:
        raise RuntimeError(f"sums: expected {segments.count} segments, got {count}")
    rows = _rows(points, bins, plane)
    if x is not None:
        x = _check_like("x", x, sums, *batch, rows, columns)
    if weight is not None:
        weight = _check_like("weight", weight, sums, *batch, points)
    grad_x = sums.new_empty((*batch, rows, columns) if of_x else (0,))
    grad_weight = sums.new_empty((0,) if x is None else (*batch, points))
    width = _width(columns)
    pieces, blocks = triton.cdiv(columns, width), triton.cdiv(rows, _SPREAD[width]["POINTS"])
    programs = math.prod(batch) * blocks
    if programs == 0 or (not of_x and x is None):
        return grad_x, grad_weight
    rank = segments.ranks()
    geometry, sizes = (segments.indptr, rank), (count, rows, columns, bins, plane)
    if of_x:
        segment_spread_rows_kernel(
            programs * pieces,
            *(sums, sums if weight is None else weight, *geometry, grad_x, *sizes, pieces, blocks),
            *(int(mean), segments.own),
            variant=(width, weight is not None),
        )
    if x is not None:
        segment_spread_dots_kernel(
            programs, *(sums, x, *geometry, grad_weight, *sizes, blocks, int(mean), segments.own), variant=width
        )
    return grad_x, grad_weight


def pair_reduce(x: Tensor, weight: Tensor, rows: Tensor, ranks: Tensor, segments: int) -> Tensor:
    """Reduce the pairs; an example with a rank or row past the end is NaN."""
    x, rows = x.contiguous(), rows.contiguous()
    perm, indptr = sort_pairs(ranks, rows, segments, x.shape[-2])
    weight = _check_like("weight", weight, x, *x.shape[:-2], rows.shape[-1])
    geometry = _Segments(indptr, perm, x.shape[:-2], rows.shape[-1])
    return _reduce(x, weight, geometry, False, 1, 1, index=rows)[0]


def pair_dots(sums: Tensor, x: Tensor, ranks: Tensor, rows: Tensor) -> Tensor:
    sums, ranks, rows = sums.contiguous(), ranks.contiguous(), rows.contiguous()
    *batch, segments, columns = sums.shape
    x = _check_like("x", x, sums, *batch, x.shape[-2], columns)
    points, width = rows.shape[-1], _width(columns)
    out = sums.new_empty((*batch, points))
    blocks = triton.cdiv(points, _SPREAD[width]["POINTS"])
    sizes = (points, segments, x.shape[-2], columns, blocks, int(rows.dim() > 1))
    pair_dots_kernel(math.prod(batch) * blocks, sums, x, ranks, rows, out, *sizes, variant=width)
    return out
