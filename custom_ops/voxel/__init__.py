"""Voxels: assign points to voxels and pool the points' features."""

from custom_ops.voxel import decompositions as _decompositions  # noqa: F401 (registers what the ops are made of)
from custom_ops.voxel.adapters import (
    bevfusion_pool,
    dynamic_scatter,
    voxel_image,
    voxel_pooling_train,
    voxelization,
)
from custom_ops.voxel.intervals import bev_pool_v2
from custom_ops.voxel.lift_splat import LiftSplat
from custom_ops.voxel.pooling import BEVPool, bev_pool
from custom_ops.voxel.segments import segment_reduce, segment_softmax
from custom_ops.voxel.summing import VoxelsSumming, VoxelsSummingLayer, voxels_summing
from custom_ops.voxel.sums import VoxelSum, voxel_softmax, voxel_sum
from custom_ops.voxel.voxel_grid import voxel_csr, voxel_rank
from custom_ops.voxel.voxel_segments import segment_sum
from custom_ops.voxel.voxelize import hard_voxelize, voxel_gather, voxel_ravel, voxel_unravel, voxelize

# The names are spelled out, as mypy can't follow `__all__ += module.__all__` through two levels and would see none of
# them.
__all__ = [
    "BEVPool",
    "LiftSplat",
    "VoxelSum",
    "VoxelsSumming",
    "VoxelsSummingLayer",
    "bev_pool",
    "bev_pool_v2",
    "bevfusion_pool",
    "dynamic_scatter",
    "hard_voxelize",
    "segment_reduce",
    "segment_softmax",
    "segment_sum",
    "voxel_csr",
    "voxel_gather",
    "voxel_image",
    "voxel_pooling_train",
    "voxel_rank",
    "voxel_ravel",
    "voxel_softmax",
    "voxel_sum",
    "voxel_unravel",
    "voxelization",
    "voxelize",
    "voxels_summing",
]
