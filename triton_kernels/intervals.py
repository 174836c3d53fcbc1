"""The geometry of BEVDet's pooling, which lists points by voxel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from custom_ops.triton_kernels.common import LANES, kernel

_BLOCK = 256
_ONCE = tl.constexpr(2**32)  # is more than the number of intervals


@kernel(
    "*i64 *i64 *i64 i32",
    ("i64",),
    {None: {"BLOCK": LANES}},
    num_warps=1,
    narrow="counts at the points of one interval",
)
@triton.jit(do_not_specialize=["listed"])
def interval_cover_kernel(starts_ptr, lengths_ptr, cover_ptr, listed, BLOCK: tl.constexpr):
    """Add _ONCE and the interval's number to each of its points, or after the last one if it isn't within the list.

    The sums are of integers, so their order doesn't matter.
    """
    interval = tl.program_id(0).to(tl.int64)
    start = tl.load(starts_ptr + interval)
    length = tl.load(lengths_ptr + interval)
    right = (start >= 0) & (length >= 0) & (length <= listed - start)
    start, length = tl.where(right, start, listed), tl.where(right, length, 1)
    for first in range(0, length, BLOCK):
        at = first + tl.arange(0, BLOCK)
        tl.atomic_add(cover_ptr + start + at, interval + _ONCE, mask=at < length, sem="relaxed")


@kernel(
    "*i64 *i64 *i64 *i64 *i64 *i64 i32 i32 i32 i32",
    ("i64",),
    {None: {"BLOCK": _BLOCK}},
    narrow="looks up each point's interval",
)
@triton.jit(do_not_specialize=["listed", "points", "pixels", "voxels"])
def interval_rank_kernel(
    depth_ptr,
    feat_ptr,
    bev_ptr,
    starts_ptr,
    cover_ptr,
    rank_ptr,
    listed,
    points,
    pixels,
    voxels,
    BLOCK: tl.constexpr,
):
    """Store the voxel of each point, -1 outside of all intervals, and ``voxels`` where the arrays are inconsistent."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < listed
    cover = tl.load(cover_ptr + at, mask=inside, other=0)
    broken = tl.load(cover_ptr + listed) != 0
    right = inside & (cover // _ONCE == 1)
    start = tl.load(starts_ptr + cover % _ONCE, mask=right, other=0)
    voxel = tl.load(bev_ptr + start, mask=right, other=-1)
    depth = tl.load(depth_ptr + at, mask=right, other=-1)
    feat = tl.load(feat_ptr + at, mask=right, other=-1)
    right &= (depth >= 0) & (depth < points) & (feat >= 0) & (feat < pixels)
    right &= (voxel >= 0) & (voxel < voxels) & (tl.load(bev_ptr + at, mask=right, other=-1) == voxel)
    rank = tl.where(cover == 0, -1, tl.where(right, voxel, voxels))
    tl.store(rank_ptr + at, tl.where(broken, voxels, rank), mask=inside)


def interval_ranks(
    ranks_depth: Tensor,
    ranks_feat: Tensor,
    ranks_bev: Tensor,
    interval_starts: Tensor,
    interval_lengths: Tensor,
    points: int,
    pixels: int,
    voxels: int,
) -> Tensor:
    """Return the ranks. Where the C++ kernel raises, the rank is past the grid, so nothing waits."""
    arrays = [t.contiguous() for t in (ranks_depth, ranks_feat, ranks_bev, interval_starts)]
    listed, starts = ranks_bev.numel(), arrays[-1]
    cover = ranks_bev.new_zeros(listed + 1)
    interval_cover_kernel(starts.numel(), starts, interval_lengths.contiguous(), cover, listed)
    rank = ranks_bev.new_empty(listed)
    interval_rank_kernel(triton.cdiv(listed, _BLOCK), *arrays, cover, rank, listed, points, pixels, voxels)
    return rank
