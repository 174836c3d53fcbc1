"""The geometry of BEVDet's pooling, which lists points by voxel."""

from __future__ import annotations

import torch
from torch import Tensor


def interval_ranks(
    ranks_depth: Tensor,
    ranks_feat: Tensor,
    ranks_bev: Tensor,
    interval_starts: Tensor,
    interval_lengths: Tensor,
    points: int,
    bins: int,
    plane: int,
    voxels: int,
) -> Tensor:
    """In PyTorch's own ops; what the C++ kernel raises for counts nowhere, so that nothing is waited for."""
    listed = ranks_depth.numel()
    rank = ranks_depth.new_full((points + 1,), -1)  # the last takes what counts nowhere
    if listed == 0 or interval_starts.numel() == 0 or points == 0:
        return rank[:points].clone()
    at = torch.arange(listed, device=rank.device)
    interval = (torch.searchsorted(interval_starts.contiguous(), at, right=True) - 1).clamp_min(0)
    begin = interval_starts[interval]
    voxel = ranks_bev[begin.clamp(0, listed - 1)]
    pixel = ranks_depth // (bins * plane) * plane + ranks_depth % plane
    counts = (begin <= at) & (at < begin + interval_lengths[interval]) & (voxel >= 0) & (voxel < voxels)
    counts &= (ranks_depth >= 0) & (ranks_depth < points) & (pixel == ranks_feat)
    # A point that is listed twice goes to the larger voxel, whichever is written last.
    place, voxel = torch.where(counts, ranks_depth, points), torch.where(counts, voxel, -1)
    return rank.scatter_reduce(0, place, voxel, "amax")[:points].clone()
