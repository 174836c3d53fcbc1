"""Voxel summing: sums over contiguous runs of points, and the gather that is their adjoint."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.triton_kernels.common import BLOCK, FLOATING, INDEX, accumulator, kernel, widen

# A row of features is read in pieces of one of these widths, by tiles of _TILE elements.
_WIDTHS = (16, 64)
_TILE = 512

# Longer segments are summed in chunks of as many points, so that no program is long.
_CHUNK = 128


# ---------------------------------------------------------------- bounds


@triton.jit
def _steps(ranks_ptr, points, BLOCK: tl.constexpr):
    """Where this program's points lie, which begin a run, and which descend."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < points
    follows = inside & (at > 0)
    rank = tl.load(ranks_ptr + at, mask=inside, other=0)
    previous = tl.load(ranks_ptr + at - 1, mask=follows, other=0)
    return at, inside & ((at == 0) | (rank != previous)), follows & (rank < previous)


@kernel("*T *i64 i32 i32", INDEX, {None: {"BLOCK": BLOCK}})
@triton.jit(do_not_specialize=["points", "blocks"])
def voxel_bounds_count_kernel(ranks_ptr, counts_ptr, points, blocks, BLOCK: tl.constexpr):
    _, begins, descends = _steps(ranks_ptr, points, BLOCK)
    block = tl.program_id(0)
    tl.store(counts_ptr + block, tl.sum(begins.to(tl.int32)))
    tl.store(counts_ptr + blocks + block, tl.sum(descends.to(tl.int32)))


@kernel("*T *i64 *i64 i32 i32", INDEX, {None: {"BLOCK": BLOCK}})
@triton.jit(do_not_specialize=["points", "blocks"])
def voxel_bounds_place_kernel(ranks_ptr, through_ptr, bounds_ptr, points, blocks, BLOCK: tl.constexpr):
    at, begins, _ = _steps(ranks_ptr, points, BLOCK)
    block = tl.program_id(0)
    through = tl.load(through_ptr + block)  # bounds in the blocks up to and with this one
    count = begins.to(tl.int32)
    place = through - tl.sum(count) + tl.cumsum(count) - 1
    tl.store(bounds_ptr + place, at, mask=begins)
    if block == blocks - 1:
        tl.store(bounds_ptr + through, points)


def voxel_bounds(ranks: Tensor, check_sorted: bool) -> tuple[Tensor, Tensor]:
    ranks = ranks.contiguous()
    points = ranks.numel()
    if points == 0:
        return ranks.new_zeros(1, dtype=torch.int64), ranks.new_zeros(0, dtype=torch.int64)
    blocks = triton.cdiv(points, BLOCK)
    counts = ranks.new_empty((2, blocks), dtype=torch.int64)
    voxel_bounds_count_kernel(blocks, ranks, counts, points, blocks)
    through = counts.cumsum(1)
    voxels, descents = through[:, -1].tolist()
    if check_sorted and descents:
        raise RuntimeError(
            "ranks: expected non-decreasing values, got an unsorted tensor; sort x, geometry and "
            "ranks by ranks first, or pass check_sorted=False to sum each run of equal ranks"
        )
    bounds = ranks.new_empty(voxels + 1, dtype=torch.int64)
    voxel_bounds_place_kernel(blocks, ranks, through, bounds, points, blocks)
    return bounds, bounds[1:] - 1


# ---------------------------------------------------------------- sum and gather


def _width(columns: int) -> int:
    return next((w for w in _WIDTHS if w >= columns), _WIDTHS[-1])


@triton.jit
def _sum_rows(x_ptr, start, stop, columns, column, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The sums over rows start to stop, for WIDTH columns, in the accumulator's dtype."""
    first = tl.arange(0, ROWS)
    total = widen(tl.zeros([ROWS, WIDTH], x_ptr.dtype.element_ty))
    for begin in range(start, stop, ROWS):
        row = begin + first
        inside = (row < stop)[:, None] & (column < columns)[None, :]
        total += widen(tl.load(x_ptr + row[:, None] * columns + column[None, :], mask=inside, other=0))
    return tl.sum(total, axis=0)


@triton.jit
def _boundary(indptr_ptr, segment, points):
    """Kept within the points, so that a corrupted indptr can't reach memory outside x."""
    return tl.minimum(tl.maximum(tl.load(indptr_ptr + segment).to(tl.int64), 0), points)


@triton.jit
def _segment_of(indptr_ptr, boundaries, steps, point):
    """The last segment that starts at or before ``point``, by binary search; -1 before all of them."""
    low = point * 0
    high = low + boundaries
    for _ in range(steps):
        searching = low < high
        middle = (low + high) >> 1
        begun = searching & (tl.load(indptr_ptr + middle, mask=searching, other=0) <= point)
        low = tl.where(begun, middle + 1, low)
        high = tl.where(begun, high, middle)
    return low - 1


_SUM_VARIANTS = {width: {"ROWS": _TILE // width, "WIDTH": width, "CHUNK": _CHUNK} for width in _WIDTHS}


# A segment of more than CHUNK points starts in one chunk and reaches into the next. So a chunk has
# at most one that started before it and at most one that starts in it: parts 0 and 1 of partial.
@kernel("*T *i64 *A i32 i32 i32 i32 i32 i32", FLOATING, _SUM_VARIANTS, num_warps=1)
@triton.jit(do_not_specialize=["points", "segments", "pieces", "chunks", "steps"])
def segment_sum_chunks_kernel(
    x_ptr,
    indptr_ptr,
    partial_ptr,
    points,
    segments,
    columns,
    pieces,
    chunks,
    steps,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    program = tl.program_id(0)
    column = program % pieces * WIDTH + tl.arange(0, WIDTH)
    out_row = (program // pieces).to(tl.int64)
    chunk = out_row % chunks
    starts_here = out_row // chunks % 2 == 1
    example = out_row // chunks // 2
    first = chunk * CHUNK
    end = tl.minimum(first + CHUNK, points)
    segment = _segment_of(indptr_ptr, segments + 1, steps, tl.where(starts_here, end - 1, first))
    if (segment >= 0) & (segment < segments):
        start = _boundary(indptr_ptr, segment, points)
        stop = _boundary(indptr_ptr, segment + 1, points)
        if (stop - start > CHUNK) & ((start >= first) == starts_here):
            x_ptr += example * points * columns
            begin, stop = tl.maximum(start, first), tl.minimum(stop, end)
            total = _sum_rows(x_ptr, begin, stop, columns, column, ROWS, WIDTH)
            tl.store(partial_ptr + out_row * columns + column, total, mask=column < columns)


@kernel("*T *i64 *A *T i32 i32 i32 i32 i32", FLOATING, _SUM_VARIANTS, num_warps=1)
@triton.jit(do_not_specialize=["points", "segments", "pieces", "chunks"])
def segment_sum_kernel(
    x_ptr,
    indptr_ptr,
    partial_ptr,
    out_ptr,
    points,
    segments,
    columns,
    pieces,
    chunks,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    program = tl.program_id(0)
    column = program % pieces * WIDTH + tl.arange(0, WIDTH)
    out_row = (program // pieces).to(tl.int64)
    example, segment = out_row // segments, out_row % segments
    start = _boundary(indptr_ptr, segment, points)
    stop = _boundary(indptr_ptr, segment + 1, points)
    if stop - start <= CHUNK:
        x_ptr += example * points * columns
        total = _sum_rows(x_ptr, start, stop, columns, column, ROWS, WIDTH)
    else:
        before = partial_ptr + example * 2 * chunks * columns
        starting = before + (chunks + start // CHUNK) * columns
        total = tl.load(starting + column, mask=column < columns, other=0)
        total += _sum_rows(before, start // CHUNK + 1, (stop - 1) // CHUNK + 1, columns, column, ROWS, WIDTH)
    tl.store(out_ptr + out_row * columns + column, total, mask=column < columns)


@kernel(
    "*T *i64 *T i32 i32 i32 i32 i32",
    FLOATING,
    {width: {"POINTS": 4 * _TILE // width, "WIDTH": width} for width in _WIDTHS},
)
@triton.jit(do_not_specialize=["points", "segments", "blocks", "steps"])
def segment_gather_kernel(
    sums_ptr,
    indptr_ptr,
    out_ptr,
    points,
    segments,
    columns,
    blocks,
    steps,
    POINTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0)
    example = (program // blocks).to(tl.int64)
    point = (program % blocks).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    segment = _segment_of(indptr_ptr, segments + 1, steps, point)
    inside = point < points
    found = inside & (segment >= 0) & (segment < segments)
    sums_row = (example * segments + segment) * columns
    out_row = (example * points + point) * columns
    for first in range(0, columns, WIDTH):
        column = first + tl.arange(0, WIDTH)
        exists = (column < columns)[None, :]
        sums = tl.load(sums_ptr + sums_row[:, None] + column[None, :], mask=found[:, None] & exists, other=0)
        tl.store(out_ptr + out_row[:, None] + column[None, :], sums, mask=inside[:, None] & exists)


def _segments(indptr: Tensor) -> tuple[Tensor, int, int]:
    """The boundaries, the number of segments, and the steps of a search among the boundaries."""
    if indptr.dim() != 1 or indptr.shape[0] < 1 or indptr.dtype != torch.int64:
        raise RuntimeError("indptr: expected a 1-d int64 tensor of at least one boundary")
    boundaries = indptr.shape[0]
    return indptr.contiguous(), boundaries - 1, boundaries.bit_length()


def segment_sum(x: Tensor, indptr: Tensor) -> Tensor:
    x = x.contiguous()
    indptr, segments, steps = _segments(indptr)
    *batch, points, columns = x.shape
    out = x.new_empty((*batch, segments, columns))
    if out.numel() == 0:
        return out
    examples, width = math.prod(batch), _width(columns)
    pieces = triton.cdiv(columns, width)
    chunks = triton.cdiv(points, _CHUNK) if points > _CHUNK else 0
    partial = x.new_empty((examples, 2, chunks, columns), dtype=accumulator(x.dtype))
    segment_sum_chunks_kernel(
        examples * 2 * chunks * pieces,
        *(x, indptr, partial, points, segments, columns, pieces, chunks, steps),
        variant=width,
    )
    segment_sum_kernel(
        examples * segments * pieces,
        *(x, indptr, partial, out, points, segments, columns, pieces, chunks),
        variant=width,
    )
    return out


def segment_gather(sums: Tensor, indptr: Tensor, points: int) -> Tensor:
    sums = sums.contiguous()
    indptr, segments, steps = _segments(indptr)
    *batch, rows, columns = sums.shape
    if rows != segments:
        raise RuntimeError(f"sums: expected {segments} segments, got {rows}")
    out = sums.new_empty((*batch, points, columns))
    if out.numel() == 0:
        return out
    width = _width(columns)
    blocks = triton.cdiv(points, segment_gather_kernel.variants[width]["POINTS"])
    segment_gather_kernel(
        math.prod(batch) * blocks,
        *(sums, indptr, out, points, segments, columns, blocks, steps),
        variant=width,
    )
    return out
