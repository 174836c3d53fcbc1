"""Voxels: which points share one, and pooling their features."""

from custom_ops.voxel import lift_splat, pooling, summing, sums, voxel_grid, voxel_segments
from custom_ops.voxel.lift_splat import *  # noqa: F403
from custom_ops.voxel.pooling import *  # noqa: F403
from custom_ops.voxel.summing import *  # noqa: F403
from custom_ops.voxel.sums import *  # noqa: F403
from custom_ops.voxel.voxel_grid import *  # noqa: F403
from custom_ops.voxel.voxel_segments import *  # noqa: F403

__all__: list[str] = []
__all__ += lift_splat.__all__
__all__ += pooling.__all__
__all__ += summing.__all__
__all__ += sums.__all__
__all__ += voxel_grid.__all__
__all__ += voxel_segments.__all__
