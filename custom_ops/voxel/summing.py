"""The drop-in for FIERY's and Lift-Splat-Shoot's sum over sorted points."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops import _checks, shards
from custom_ops._leaf import leaf
from custom_ops.voxel.voxel_grid import voxel_bounds
from custom_ops.voxel.voxel_segments import SegmentReduce, segment_reduce

_NOT_SHARDED = "the number of voxels depends on the data"


class VoxelsSumming(SegmentReduce):
    """``VoxelsSumming.apply(x, geometry, ranks)`` is `voxels_summing`, a drop-in for FIERY's class.

    Example:
        >>> import torch, custom_ops
        >>> x, geometry = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[0, 0], [0, 0], [0, 1]])
        >>> sums, voxels = custom_ops.VoxelsSumming.apply(x, geometry, torch.tensor([0, 0, 1]))
        >>> sums.flatten(), voxels.tolist()
        (tensor([3., 4.]), [[0, 0], [0, 1]])
    """

    @staticmethod
    def apply(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return voxels_summing(*args, **kwargs)


@leaf
def voxels_summing(x: Tensor, geometry: Tensor, ranks: Tensor, check_sorted: bool = True) -> tuple[Tensor, Tensor]:
    """Sum the features of the points of each voxel; a drop-in for FIERY's and Lift-Splat-Shoot's functions.

    With a boolean mask that marks the last point of each run of equal ranks, voxel m is the run that ends at the m-th
    mark: ``sums[m] = sum of x[n] over its points``, and ``voxels[m] = geometry`` at the mark. In backward each point
    gets its voxel's gradient; geometry and ranks have none.

    One sum per voxel replaces the cumulative sum of the original, so a voxel's rounding error, NaN or inf doesn't
    affect another voxel.

    Args:
        x: point features ``[N, C]``; float16, bfloat16, float32 or float64. Sums of 16-bit features
            are accumulated in float32.
        geometry: voxel coordinates ``[N, k]`` of each point, any dtype.
        ranks: voxel number ``[N]`` of each point in non-decreasing order, int32 or int64, or whole numbers in
            float32 or float64. A point with a negative rank is outside: it contributes nothing, even if its
            features are NaN, and its gradient is exactly zero.
        check_sorted: raise for unsorted ranks; without it each *run* of equal ranks is summed, and points
            outside must lie before or after all others.

    Returns:
        ``(sums [M, C], voxels [M, k])`` for M distinct ranks of at least 0, in their order.

    Raises:
        TypeError: a wrong dtype, or not a tensor.
        ValueError: a wrong shape, or tensors on several devices.
        RuntimeError: ``ranks`` are unsorted, not whole or so large that their dtype rounds them, or vmapped
            (the output's size would differ per example).

    The op takes O(N C) time and keeps M + 1 integers for backward.

    Source: QuickCumsum of Philion & Fidler, "Lift, Splat, Shoot", ECCV 2020; VoxelsSumming of Hu et
    al., "FIERY", ICCV 2021.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.tensor([[1.0], [2.0], [4.0]])
        >>> geometry = torch.tensor([[0, 0], [0, 0], [0, 1]])
        >>> custom_ops.voxels_summing(x, geometry, ranks=torch.tensor([0, 0, 1]))
        (tensor([[3.],
                [4.]]), tensor([[0, 0],
                [0, 1]]))
    """
    _checks.has_dtype("x", x, _checks.FLOATING)
    if shards.is_sharded(x, ranks):
        raise NotImplementedError(f"x: expected no DTensor, because {_NOT_SHARDED}; voxel_sum's grid has a static size")
    _checks.has_dims("x", x, "[N, C]")
    _checks.is_tensor("geometry", geometry)
    _checks.has_dims("geometry", geometry, "[N, k]")
    _checks.has_dtype("ranks", ranks, (*_checks.INDEX, torch.float32, torch.float64))
    _checks.has_dims("ranks", ranks, "[N]")
    _checks.same_device(x=x, geometry=geometry, ranks=ranks)
    check_sorted = _checks.as_bool("check_sorted", check_sorted)
    for name, tensor in (("geometry", geometry), ("ranks", ranks)):
        if tensor.shape[0] != x.shape[0]:
            raise ValueError(f"{name}: expected {x.shape[0]} points as in x, got {tensor.shape[0]}")
    indptr, last = voxel_bounds(ranks, check_sorted)
    return segment_reduce(x, None, indptr, None, False, 1, 1), geometry.detach().index_select(0, last)


class VoxelsSummingLayer(torch.nn.Module):
    """Apply `voxels_summing` as a layer (the name VoxelsSumming belongs to the drop-in Function).

    Example:
        >>> import torch, custom_ops
        >>> x, geometry = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[0, 0], [0, 0], [0, 1]])
        >>> sums, voxels = custom_ops.VoxelsSummingLayer()(x, geometry, torch.tensor([0, 0, 1]))
        >>> sums.flatten(), voxels.tolist()
        (tensor([3., 4.]), [[0, 0], [0, 1]])
    """

    def __init__(self, check_sorted: bool = True) -> None:
        super().__init__()
        self.check_sorted = _checks.as_bool("check_sorted", check_sorted)

    def forward(self, x: Tensor, geometry: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
        return voxels_summing(x, geometry, ranks, self.check_sorted)

    def extra_repr(self) -> str:
        return f"check_sorted={self.check_sorted}"
