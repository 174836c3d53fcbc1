"""FBGEMM's pooled embedding tables on the CPU, called as the op they are compared with."""

from __future__ import annotations

import functools
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import SparseType  # type: ignore[import-not-found]
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (  # type: ignore[import-not-found]
    DenseTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

from benchmarks.peers import all_points, bags_of_pixels


@functools.lru_cache(maxsize=1)
def _table(rows: int, columns: int) -> Any:
    return DenseTableBatchedEmbeddingBagsCodegen([(rows, columns)], use_cpu=True, output_dtype=SparseType.FP32)


def _pooled(x: Tensor, points: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the pooled rows of an embedding table whose rows are those of x."""
    return torch.func.functional_call(_table(*x.shape), {"weights": x.flatten()}, (points, offsets, weights))


def table_segment_sum(x: Tensor, indptr: Tensor) -> Tensor:
    return _pooled(x, all_points(indptr), indptr)


def table_bev_pool(depth: Tensor, feat: Tensor, rank: Tensor, num_voxels: int, *_: Any) -> Tensor:
    """Pool the pixels of each voxel as a weighted embedding bag; the indices are computed once for each ``rank``."""
    points, pixels, offsets = bags_of_pixels(rank, len(depth), num_voxels)
    bev = _pooled(feat.movedim(2, -1).flatten(0, -2), pixels, offsets, depth.flatten()[points])
    return bev.view(len(depth), num_voxels, -1)
