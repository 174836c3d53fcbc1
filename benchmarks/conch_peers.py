"""Conch's Triton kernels for pooling sorted points on a GPU, called as the op they are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import kept_bags, once

if not torch.cuda.is_available():
    raise ImportError("conch needs a GPU")

from conch.ops.vision.bev_pool import bev_pool, bev_pool_backward  # type: ignore[import-not-found]


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *geometry: Any) -> Tensor:
        ctx.geometry = geometry[:3]
        return bev_pool(x, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return bev_pool_backward(grad.contiguous(), *ctx.geometry), *[None] * 7


@once
def _intervals(rank: Tensor, batch: int, num_voxels: int) -> tuple[Tensor, ...]:
    """Return the points sorted by voxel, each point's place (x, y, z, example), and the start and length of each
    voxel's run.
    """
    points, offsets = kept_bags(rank, batch, num_voxels)
    lengths = offsets.diff()
    voxel, filled = torch.arange(len(lengths), device=rank.device).repeat_interleave(lengths), lengths > 0
    place = torch.zeros(len(points), 4, dtype=torch.int32, device=rank.device)
    place[:, 0], place[:, 3] = voxel % num_voxels, voxel // num_voxels
    return points, place, offsets[:-1][filled].int(), lengths[filled].int()


def cached_bev_pool_voxel_sum(x: Tensor, rank: Tensor, num_voxels: int) -> Tensor:
    """Sum the points of each voxel with Conch's kernel, whose indices are computed once for each ``rank``."""
    batch = x.shape[:-2]
    points, *geometry = _intervals(rank, batch.numel(), num_voxels)
    sums = _Pool.apply(x.flatten(0, -2)[points], *geometry, batch.numel(), 1, num_voxels, 1)
    return sums.view(*batch, num_voxels, -1)
