"""PyTorch Scatter's sums, called as the op that they stand beside."""

from __future__ import annotations

import torch_scatter  # type: ignore[import-not-found]
from torch import Tensor

from custom_ops.benchmarks.peers import _flat_rank, _segment_of_point


def scatter_segment_sum(x: Tensor, indptr: Tensor) -> Tensor:
    return torch_scatter.scatter(x, _segment_of_point(indptr), 0, dim_size=len(indptr) - 1, reduce="sum")


def segment_csr_segment_sum(x: Tensor, indptr: Tensor) -> Tensor:
    return torch_scatter.segment_csr(x, indptr, reduce="sum")


def scatter_voxel_sum(x: Tensor, rank: Tensor, num_voxels: int) -> Tensor:
    """Points outside of the grid go to a row that is cut off."""
    batch = x.shape[:-2]
    rows = batch.numel() * num_voxels
    rank = _flat_rank(rank, batch.numel(), num_voxels, outside=rows)
    sums = torch_scatter.scatter(x.flatten(0, -2), rank, 0, dim_size=rows + 1, reduce="sum")
    return sums[:-1].view(*batch, num_voxels, -1)
