"""PyTorch Scatter's reductions, called as the op they are compared with."""

from __future__ import annotations

import torch_scatter  # type: ignore[import-not-found]
from torch import Tensor

from benchmarks.peers import flat_rank, segment_of_point


def segment_csr_segment_sum(x: Tensor, indptr: Tensor) -> Tensor:
    return torch_scatter.segment_csr(x, indptr)


def segment_csr_segment_reduce(x: Tensor, indptr: Tensor, reduce: str) -> Tensor:
    return torch_scatter.segment_csr(x, indptr, reduce=reduce)


def scatter_segment_sum(x: Tensor, indptr: Tensor) -> Tensor:
    return torch_scatter.scatter(x, segment_of_point(indptr), dim=0, dim_size=len(indptr) - 1)


def trash_row_scatter(x: Tensor, rank: Tensor, num_voxels: int) -> Tensor:
    """Sum with ``scatter``; points outside of the grid go to an extra row that is cut off."""
    batch, columns = x.shape[:-2], x.shape[-1]
    rows = batch.numel() * num_voxels
    rank = flat_rank(rank, batch.numel(), num_voxels, outside=rows)
    sums = torch_scatter.scatter(x.reshape(-1, columns), rank, dim=0, dim_size=rows + 1)
    return sums[:-1].view(*batch, num_voxels, columns)
