"""The geometry of BEVDet's pooling, which lists points by voxel."""

from __future__ import annotations

from torch import Tensor


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
    """Compute the ranks by PyTorch's own ops. Where the C++ kernel raises, the rank is past the grid, so nothing
    waits.
    """
    listed = ranks_bev.numel()
    right = (interval_starts >= 0) & (interval_lengths >= 0) & (interval_lengths <= listed - interval_starts)
    used = right & (interval_lengths > 0)
    begins = interval_starts.where(used, listed)
    ends = (interval_starts + interval_lengths).where(used, listed)
    ones = begins.new_ones(begins.shape)
    steps = begins.new_zeros(listed + 1).scatter_add(0, begins, ones).scatter_add(0, ends, -ones)
    cover = steps.cumsum(0)[:listed]  # the number of intervals that contain each point
    begin = begins.new_full((listed + 1,), -1).scatter(0, begins, begins)[:listed].cummax(0).values.clamp_min(0)
    voxel = ranks_bev[begin]
    inside = (ranks_depth >= 0) & (ranks_depth < points) & (ranks_feat >= 0) & (ranks_feat < pixels)
    inside &= (ranks_bev == voxel) & (voxel >= 0) & (voxel < voxels) & (cover == 1)
    rank = ranks_bev.where(inside, voxels).where(cover > 0, -1)
    return rank.where(right.all(), voxels)
