"""The voxel of each point, and the points of each voxel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.triton_kernels.common import BLOCK, FLOATING, INDEX, divide, kernel, locate, widen

# ---------------------------------------------------------------- bounds


_RANKS = (*INDEX, "fp32", "fp64")
_COUNTED = tl.constexpr(2 * BLOCK)


@triton.jit
def _runs(ranks_ptr, points, BLOCK: tl.constexpr):
    """Return the program's points, their ranks and the preceding ranks, and which points begin a voxel's run."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rank = tl.load(ranks_ptr + at, mask=at < points, other=-1)
    previous = tl.load(ranks_ptr + at - 1, mask=(at < points) & (at > 0), other=-1)
    return at, rank, previous, (rank >= 0) & (rank != previous)


@kernel("*T *i64 i32 i32", _RANKS, {None: {"BLOCK": BLOCK}}, streams=BLOCK)
@triton.jit(do_not_specialize=["blocks"])
def voxel_bounds_count_kernel(ranks_ptr, counts_ptr, points, blocks, BLOCK: tl.constexpr):
    at, rank, previous, begins = _runs(ranks_ptr, points, BLOCK)
    inside, block = rank >= 0, tl.program_id(0)
    descends = (at > 0) & (at < points) & (rank < previous)
    # Two counts of a block fit into one sum.
    tl.store(counts_ptr + block, tl.sum(begins.to(tl.int32) + inside.to(tl.int32) * _COUNTED))
    enters = inside & (previous < 0)
    tl.store(counts_ptr + blocks + block, tl.sum(enters.to(tl.int32) + descends.to(tl.int32) * _COUNTED))
    broken = 0
    if rank.dtype.is_floating():
        whole = (rank < (2**24 if rank.dtype == tl.float32 else 2**53)) & (tl.floor(rank) == rank)
        broken = tl.sum((~whole).to(tl.int32))
    tl.store(counts_ptr + 2 * blocks + block, broken)


@kernel("*T *i64 *i64 i32 i32", _RANKS, {None: {"BLOCK": BLOCK}}, streams=BLOCK)
@triton.jit(do_not_specialize=["blocks"])
def voxel_bounds_place_kernel(ranks_ptr, through_ptr, bounds_ptr, points, blocks, BLOCK: tl.constexpr):
    at, _, _, begins = _runs(ranks_ptr, points, BLOCK)
    block = tl.program_id(0)
    count = begins.to(tl.int32)
    through = tl.load(through_ptr + block)  # bounds in the blocks up to and including this one
    place = through - tl.sum(count) + tl.cumsum(count) - 1
    tl.store(bounds_ptr + place, at, mask=begins)


def voxel_bounds(ranks: Tensor, check_sorted: bool) -> tuple[Tensor, Tensor]:
    ranks = ranks.contiguous()
    points = ranks.numel()
    if points == 0:
        return ranks.new_zeros(1, dtype=torch.int64), ranks.new_zeros(0, dtype=torch.int64)
    blocks = triton.cdiv(points, BLOCK)
    counts = ranks.new_empty((3, blocks), dtype=torch.int64)
    voxel_bounds_count_kernel(blocks, ranks, counts, points, blocks)
    counts = torch.cat([counts % _COUNTED.value, counts[:2] // _COUNTED.value])
    through = counts.cumsum(1)
    voxels, parts, broken, inside, descents = through[:, -1].tolist()
    if broken:
        raise RuntimeError("ranks: expected whole numbers below 2^24 in float32 and 2^53 in float64, got others")
    if check_sorted and descents:
        raise RuntimeError(
            "ranks: expected non-decreasing values, got an unsorted tensor; sort x, geometry and "
            "ranks by ranks first, or pass check_sorted=False to sum each run of equal ranks"
        )
    if parts > 1:
        raise RuntimeError(
            "ranks: expected the points outside, of negative ranks, before and behind all others, got some "
            "between them; sort x, geometry and ranks by ranks first"
        )
    bounds = ranks.new_zeros(voxels + 1, dtype=torch.int64)
    voxel_bounds_place_kernel(blocks, ranks, through, bounds, points, blocks)
    if voxels:
        bounds[-1:] = bounds[:1] + inside
    return bounds, bounds[1:] - 1


# ---------------------------------------------------------------- points to voxels


@triton.jit
def _cell(points_ptr, frame_ptr, at, inside, axis: tl.constexpr, cells, TRUNCATE: tl.constexpr):
    """Return the cell of each point along an axis, and whether it is in the grid; a NaN isn't."""
    x = widen(tl.load(points_ptr + at * 3 + axis, mask=inside, other=0))
    position = divide(x - tl.load(frame_ptr + axis), tl.load(frame_ptr + 3 + axis))
    whole = tl.floor(position)
    if TRUNCATE:
        whole = tl.where(position < 0, tl.ceil(position), whole)
    found = (whole >= 0) & (whole < cells)
    return tl.where(found, whole, 0).to(tl.int64), found


@kernel(
    "*T *A *i64 i32 i32 i32 i32 i32",
    FLOATING,
    {truncate: {"TRUNCATE": truncate, "BLOCK": BLOCK} for truncate in (False, True)},
    num_warps=8,
    narrow="points are rows of three numbers",
    enable_fp_fusion=False,
)
@triton.jit(do_not_specialize=["x_cells", "y_cells", "z_cells", "blocks"])
def voxel_index_kernel(
    points_ptr,
    frame_ptr,
    out_ptr,
    x_cells,
    y_cells,
    z_cells,
    points,
    blocks,
    TRUNCATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    example, block = locate(blocks)
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < points
    at = example * points + index
    frame_ptr += example * 6
    x, in_x = _cell(points_ptr, frame_ptr, at, inside, 0, x_cells, TRUNCATE)
    y, in_y = _cell(points_ptr, frame_ptr, at, inside, 1, y_cells, TRUNCATE)
    z, in_z = _cell(points_ptr, frame_ptr, at, inside, 2, z_cells, TRUNCATE)
    rank = tl.where(in_x & in_y & in_z, (x * y_cells + y) * z_cells + z, -1)
    tl.store(out_ptr + at, rank, mask=inside)


def voxel_index(points: Tensor, frame: Tensor, x_cells: int, y_cells: int, z_cells: int, truncate: bool) -> Tensor:
    points, frame = points.contiguous(), frame.contiguous()
    if points.dim() < 1 or points.shape[-1] != 3:
        raise RuntimeError("points: expected [..., 3]")
    frames = frame.numel() // 6
    if frame.numel() != 6 * frames or (frames != 1 and (points.dim() < 2 or frames != points.shape[0])):
        raise RuntimeError("frame: expected 6 numbers, for all points or for each example")
    out = points.new_empty(points.shape[:-1], dtype=torch.int64)
    of_frame = out.numel() // max(frames, 1)
    blocks = triton.cdiv(of_frame, BLOCK)
    sizes = (x_cells, y_cells, z_cells, of_frame, blocks)
    voxel_index_kernel(frames * blocks, points, frame, out, *sizes, variant=truncate)
    return out


# ---------------------------------------------------------------- voxels to points


@triton.jit
def segment_of(indptr_ptr, boundaries, steps, position):
    """Return the last segment that starts at or before ``position``, by binary search, or -1 before all of them."""
    low = position * 0
    high = low + boundaries
    for _ in range(steps):
        searching = low < high
        middle = (low + high) >> 1
        begun = searching & (tl.load(indptr_ptr + middle, mask=searching, other=0) <= position)
        low = tl.where(begun, middle + 1, low)
        high = tl.where(begun, high, middle)
    return low - 1


@kernel(
    "*i64 *i64 *T i32 i32 i32",
    INDEX,
    {paired: {"PAIRED": paired, "BLOCK": BLOCK} for paired in (False, True)},
    streams=BLOCK,
)
@triton.jit(do_not_specialize=["voxels", "rows"])
def voxel_key_kernel(rank_ptr, row_ptr, key_ptr, points, voxels, rows, PAIRED: tl.constexpr, BLOCK: tl.constexpr):
    """Store each point's rank, ``voxels`` for one in no voxel, and one more if its rank or row is past the end."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < points
    rank = tl.load(rank_ptr + at, mask=inside, other=0)
    past = rank >= voxels
    if PAIRED:
        row = tl.load(row_ptr + at, mask=inside, other=0)
        past |= row >= rows
        rank = tl.where(row < 0, -1, rank)
    tl.store(key_ptr + at, tl.where(past, voxels + 1, tl.where(rank < 0, voxels, rank)), mask=inside)


@kernel(
    "*T *i64 i32 i32 i32 i32",
    INDEX,
    {None: {"BLOCK": 256}},
    narrow="searches each voxel's first point",
)
@triton.jit(do_not_specialize=["points", "voxels", "blocks", "steps"])
def voxel_edges_kernel(key_ptr, indptr_ptr, points, voxels, blocks, steps, BLOCK: tl.constexpr):
    """Store how many of the sorted keys are below each voxel, or -1 if one is past ``voxels``."""
    example, block = locate(blocks)
    edge = block * BLOCK + tl.arange(0, BLOCK)
    inside = edge <= voxels
    key_ptr += example * points
    below = segment_of(key_ptr, points, steps, edge - 1) + 1
    last = tl.load(key_ptr + points - 1, mask=points > 0, other=0)
    tl.store(indptr_ptr + example * (voxels + 1) + edge, tl.where(last > voxels, -1, below), mask=inside)


def sort_pairs(rank: Tensor, row: Tensor | None, voxels: int, rows: int) -> tuple[Tensor, Tensor]:
    """Sort points by voxel as `voxel_sort` does; with ``row``, those of a negative row are in no voxel, and a row past
    the end is like a rank past the grid.
    """
    rank = rank.long().contiguous()
    narrow = torch.int32 if voxels < 2**31 - 2 else torch.int64  # takes half as many passes
    keys = torch.empty_like(rank, dtype=narrow)
    row = rank if row is None else row.contiguous()
    voxel_key_kernel(
        triton.cdiv(rank.numel(), BLOCK), rank, row, keys, rank.numel(), voxels, rows, variant=row is not rank
    )
    keys, perm = keys.sort(dim=-1, stable=True)
    indptr = rank.new_empty((*rank.shape[:-1], voxels + 1))
    points, blocks = rank.shape[-1], triton.cdiv(voxels + 1, 256)
    voxel_edges_kernel(
        indptr.numel() // (voxels + 1) * blocks, keys, indptr, points, voxels, blocks, points.bit_length()
    )
    return perm, indptr


def voxel_sort(rank: Tensor, voxels: int) -> tuple[Tensor, Tensor]:
    """Sort by a stable radix sort, which needs no atomics; points in no voxel come last.

    The boundaries of an example with a rank past the grid are -1, so every reduction over them is NaN.
    """
    return sort_pairs(rank, None, voxels, 0)


@kernel("*T *i64 *i64 *i32 i32 i32 i32", INDEX, {None: {"BLOCK": BLOCK}}, streams=BLOCK)
@triton.jit(do_not_specialize=["voxels", "blocks"])
def voxel_match_kernel(rank_ptr, perm_ptr, indptr_ptr, wrong_ptr, points, voxels, blocks, BLOCK: tl.constexpr):
    """Store how many positions of a block hold another point than a stable sort puts there."""
    example, block = locate(blocks)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < points
    perm_ptr += example * points
    indptr_ptr += example * (voxels + 1)
    point = tl.load(perm_ptr + at, mask=inside, other=0)
    before = tl.load(perm_ptr + at - 1, mask=inside & (at > 0), other=-1)
    exists = inside & (point >= 0) & (point < points)
    rank = tl.load(rank_ptr + example * points + point, mask=exists, other=0).to(tl.int64)
    voxel = tl.where(rank < 0, voxels, tl.minimum(rank, voxels))
    first = tl.load(indptr_ptr + voxel, mask=exists, other=0)
    last = tl.load(indptr_ptr + voxel + 1, mask=exists & (voxel < voxels), other=points)
    right = exists & (rank < voxels) & (first <= at) & (at < last) & ((at == first) | (before < point))
    tl.store(wrong_ptr + example * blocks + block, tl.sum((inside & ~right).to(tl.int32)))


def voxel_match(rank: Tensor, perm: Tensor, indptr: Tensor) -> Tensor:
    """Return boundaries of -1 for an example that doesn't match, since an error would have to be waited for."""
    if perm.shape != rank.shape or indptr.dim() != rank.dim() or indptr.shape[:-1] != rank.shape[:-1]:
        raise RuntimeError("csr: expected (perm, indptr), int64, of the shapes that voxel_csr gives for rank")
    rank, perm, indptr = rank.contiguous(), perm.contiguous(), indptr.contiguous()
    points, voxels = rank.shape[-1], indptr.shape[-1] - 1
    blocks = triton.cdiv(points, BLOCK)
    wrong = rank.new_empty((*rank.shape[:-1], blocks), dtype=torch.int32)
    voxel_match_kernel(wrong.numel(), rank, perm, indptr, wrong, points, voxels, blocks)
    wrong_ends = (indptr[..., :1] != 0) | (indptr[..., -1:] > points)
    matches = ~wrong_ends & (indptr.diff() >= 0).all(-1, keepdim=True) & (wrong == 0).all(-1, keepdim=True)
    return torch.where(matches, indptr, -1)


def _sorted_runs(rank: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Sort by rank; return the sorted ranks, their points, the number of each's voxel, and how many voxels there are.

    Negative ranks come last, and their numbers, and those of voxels past ``size``, aren't below ``size``.
    """
    if rank.dim() < 1 or (rank.dim() > 1 and size < 0):
        raise RuntimeError("rank: expected [N], or [..., N] with a number of voxels")
    ordered, perm = rank.long().masked_fill(rank < 0, 2**63 - 1).sort(dim=-1, stable=True)
    begins = ordered != ordered.roll(1, -1)
    begins[..., :1] = True
    inside = rank.gather(-1, perm) >= 0
    begins &= inside
    number = begins.cumsum(-1) - 1
    count = int(begins.sum()) if size < 0 else size  # waits for the device, as the result's size depends on it
    return ordered, perm, number.where(inside, count), count


def _scattered(size: int, at: Tensor, values: Tensor | int, otherwise: int) -> Tensor:
    """Return [..., size] with ``values`` at the places below ``size``; equal places must have equal values."""
    out = at.new_full((*at.shape[:-1], size + 1), otherwise)
    return out.scatter(-1, at.clamp_max(size), values)[..., :size].contiguous()


def voxel_unique(rank: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ordered, perm, number, count = _sorted_runs(rank, size)
    kept = number < count
    # Points that are in no voxel follow in their order.
    inverse = torch.empty_like(perm).scatter(-1, perm, number.where(kept, -1))
    perm = inverse.masked_fill(inverse < 0, count).sort(dim=-1, stable=True).indices
    ranks = _scattered(count, number, ordered, -1)
    edges = torch.arange(count + 1, device=rank.device).expand(*rank.shape[:-1], count + 1).contiguous()
    return ranks, inverse, perm, torch.searchsorted(number.clamp_max(count), edges)


def voxel_slots(rank: Tensor, max_points: int, size: int, padded: bool) -> tuple[Tensor, Tensor, Tensor]:
    if max_points < 1:
        raise RuntimeError(f"max_points: expected at least 1, got {max_points}")
    if padded and size < 0:
        raise RuntimeError("size: expected a number of voxels")
    points = rank.shape[-1]
    ordered, perm, number, found = _sorted_runs(rank, points if padded else -1)
    count = size if padded else found if size < 0 else min(found, size)
    outside = rank.gather(-1, perm) < 0
    place = torch.arange(points, device=rank.device) - torch.searchsorted(number, number)
    # A voxel's number in the order of first points is the rank of its first point among all first points.
    first = (place == 0) & ~outside
    of_point = torch.zeros_like(perm).scatter(-1, perm, first.long()).cumsum(-1) - 1
    start = torch.arange(points, device=rank.device) - place
    voxel = of_point.gather(-1, perm.gather(-1, start)).masked_fill(outside, count).clamp_max(count)
    kept = (voxel < count) & (place < max_points)
    slot = torch.empty_like(perm).scatter(-1, perm, (voxel * max_points + place).where(kept, -1))
    ranks = _scattered(count, voxel, ordered, -1)
    counts = voxel.new_zeros((*rank.shape[:-1], count + 1)).scatter_add(-1, voxel, kept.long())
    return slot, ranks, counts[..., :count].contiguous()


def _check_places(x: Tensor, place: Tensor, dims: int) -> None:
    if x.dim() < 2 or place.dim() != x.dim() - 1 or place.shape[:dims] != x.shape[:dims] or place.dtype != torch.int64:
        raise RuntimeError("place: expected an int64 tensor [..., N] with the leading dimensions of x")


def voxel_place(x: Tensor, place: Tensor, rows: int) -> Tensor:
    _check_places(x, place, x.dim() - 1)
    at = torch.where(place < 0, rows, place)[..., None].expand(x.shape)  # dropped rows go to an extra one at the end
    return x.new_zeros((*x.shape[:-2], rows + 1, x.shape[-1])).scatter(-2, at, x)[..., :rows, :].contiguous()


def voxel_take(x: Tensor, place: Tensor) -> Tensor:
    _check_places(x, place, x.dim() - 2)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 1))
    at = torch.where(place < 0, x.shape[-2], place)[..., None]
    return padded.gather(-2, at.expand(*place.shape, x.shape[-1]))
