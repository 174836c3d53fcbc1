"""The calls of other projects, with their arguments and results, and the layouts that their networks take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from custom_ops import _checks
from custom_ops._leaf import leaf
from custom_ops.voxel.segments import segment_reduce
from custom_ops.voxel.sums import voxel_sum
from custom_ops.voxel.voxel_grid import numbers_of, on_host, sizes_of, voxel_rank
from custom_ops.voxel.voxelize import hard_voxelize, voxel_ravel, voxel_unravel, voxelize


@leaf
def voxel_image(x: Tensor, grid_size: Sequence[int], layout: str = "cyx") -> Tensor:
    """Arrange the features of a grid's voxels as an image or a volume.

    Args:
        x: ``[..., V, C]``, as from `voxel_sum`, for V voxels that are numbered as by `voxel_rank`.
        grid_size: the numbers of voxels (X, Y, Z), whose product is V.
        layout: the order of the result's dimensions by their letters, "c" for features: any order of "c", "x" and "y",
            such as "cyx" or "cxy", where the Z layers are put one after the other in the features; or of "c", "x", "y"
            and "z".

    Returns:
        A view of x, ``[..., Z C, Y, X]`` for "cyx", or a copy if there are several layers to put into the features.

    Raises:
        TypeError: not a tensor.
        ValueError: a wrong shape or layout.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.voxel_image(torch.zeros(2, 12, 64), (4, 3, 1)).shape
        torch.Size([2, 64, 3, 4])
    """
    _checks.is_tensor("x", x)
    grid = sizes_of("grid_size", grid_size, 3)
    checked_layout(layout)
    voxels = grid[0] * grid[1] * grid[2]
    if x.dim() < 2 or x.shape[-2] != voxels:
        raise ValueError(f"x: expected [..., {voxels}, C] for a grid of {grid}, got shape {list(x.shape)}")
    image, axes = x.unflatten(-2, grid), "xyzc"
    if "z" not in layout:
        image, axes = image.flatten(-2), "xyc"
    lead = image.dim() - len(axes)
    return image.permute(*range(lead), *(lead + axes.index(axis) for axis in layout))


def checked_layout(layout: str) -> str:
    """Return the order of an image's or a volume's dimensions, if it is one."""
    if not isinstance(layout, str) or sorted(layout) not in (sorted("cxy"), sorted("cxyz")):
        raise ValueError(f'layout: expected an order of "cxy" or "cxyz", got {layout!r}')
    return layout


@leaf
def bevfusion_pool(feats: Tensor, coords: Tensor, B: int, D: int, H: int, W: int) -> Tensor:
    """Sum features into a volume, with the arguments and the result of BEVFusion's ``bev_pool``.

    Args:
        feats: ``[N, C]``; float16, bfloat16, float32 or float64.
        coords: the place of each point in H, W and D, and its example: int32 or int64 ``[N, 4]``. A point outside
            contributes nothing.
        B, D, H, W: the sizes of the result; as there, tensors on a GPU too, which are waited for.

    Returns:
        ``[B, C, D, H, W]``, contiguous. Differentiable to any order in ``feats``.

    Raises:
        TypeError: a wrong dtype, or not a tensor.
        ValueError: a wrong shape or value, or tensors on several devices.

    Source: Liu et al., "BEVFusion", ICRA 2023.

    Example:
        >>> import torch, custom_ops
        >>> coords = torch.tensor([[0, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]])
        >>> custom_ops.bevfusion_pool(torch.tensor([[1.0], [2.0], [4.0]]), coords, 1, 1, 2, 2)
        tensor([[[[[0., 3.],
                   [4., 0.]]]]])
    """
    _has_coordinates("coords", coords, "[N, 4]")
    _has_features("feats", feats, "coords", coords)
    shape = numbers_of("B, D, H, W", [on_host(size) for size in (B, D, H, W)], 4, _checks.as_count)
    rank = voxel_ravel(coords[:, [3, 2, 0, 1]], shape)
    out = voxel_sum(feats, rank, shape[0] * shape[1] * shape[2] * shape[3])
    return out.view(*shape, out.shape[-1]).permute(0, 4, 1, 2, 3).contiguous()


@leaf
def voxel_pooling_train(geom_xyz: Tensor, input_features: Tensor, voxel_num: Sequence[int]) -> Tensor:
    """Sum features into a bird's-eye view, with the arguments and the result of BEVDepth's function of that name.

    Args:
        geom_xyz: the voxel (x, y, z) of each point: int32 or int64 ``[B, ..., 3]``. A point outside of the grid
            contributes nothing; those at all heights z inside of it are added up.
        input_features: ``[B, ..., C]``; float16, bfloat16, float32 or float64.
        voxel_num: the numbers of voxels (X, Y, Z); as there, a tensor on a GPU too, which is waited for.

    Returns:
        ``[B, C, Y, X]``. Differentiable to any order in ``input_features``.

    Raises:
        TypeError: a wrong dtype, or not a tensor.
        ValueError: a wrong shape or value, or tensors on several devices.

    Source: Li et al., "BEVDepth", AAAI 2023.

    Example:
        >>> import torch, custom_ops
        >>> places = torch.tensor([[[0, 1, 0], [0, 1, 0], [5, 0, 0]]])
        >>> custom_ops.voxel_pooling_train(places, torch.tensor([[[1.0], [2.0], [4.0]]]), (2, 2, 1))
        tensor([[[[0., 0.],
                  [3., 0.]]]])
    """
    _checks.has_dtype("geom_xyz", geom_xyz, _checks.INDEX)
    _checks.has_dtype("input_features", input_features, _checks.FLOATING)
    if geom_xyz.dim() < 3 or geom_xyz.shape[-1] != 3:
        raise ValueError(f"geom_xyz: expected [B, ..., 3], got shape {list(geom_xyz.shape)}")
    if input_features.shape[:-1] != geom_xyz.shape[:-1]:
        expected = f"{[*geom_xyz.shape[:-1], 'C']} as geom_xyz"
        raise ValueError(f"input_features: expected {expected}, got shape {list(input_features.shape)}")
    _checks.same_device(geom_xyz=geom_xyz, input_features=input_features)
    grid = sizes_of("voxel_num", on_host(voxel_num), 3)
    rank = voxel_ravel(geom_xyz.flatten(1, -2), grid)
    rank = torch.where(rank < 0, -1, rank // max(grid[2], 1))
    return voxel_image(voxel_sum(input_features.flatten(1, -2), rank, grid[0] * grid[1]), (*grid[:2], 1))


@leaf
def dynamic_scatter(feats: Tensor, coors: Tensor, reduce_type: str = "max") -> tuple[Tensor, Tensor]:
    """Reduce the points of each voxel, with the arguments and the result of mmcv's function of that name.

    Args:
        feats: ``[N, C]``; float16, bfloat16, float32 or float64.
        coors: the voxel of each point: int32 or int64 ``[N, k]``. A point with a negative coordinate is dropped.
        reduce_type: "max", "sum" or "mean".

    Returns:
        The features ``[M, C]`` and coordinates ``[M, k]`` of the M voxels that have points, in the order of their
        coordinates. Differentiable to any order in ``feats``.

    Raises:
        TypeError: a wrong dtype, or not a tensor.
        ValueError: a wrong shape or value, or tensors on several devices.

    The extent of the grid is that of the coordinates. Reading it waits for a GPU and can't be traced: a program that is
    compiled or exported calls `voxelize` and `segment_reduce` with a grid of its own instead.

    Source: ``DynamicScatter`` in OpenMMLab's mmcv.

    Example:
        >>> import torch, custom_ops
        >>> coors = torch.tensor([[3, 1], [-1, -1], [0, 2], [3, 1]])
        >>> custom_ops.dynamic_scatter(torch.tensor([[1.0], [2.0], [4.0], [8.0]]), coors, "mean")
        (tensor([[4.0000],
                [4.5000]]), tensor([[0, 2],
                [3, 1]]))
    """
    _checks.is_one_of("reduce_type", reduce_type, ("max", "sum", "mean"))
    _has_coordinates("coors", coors, "[N, k]")
    _has_features("feats", feats, "coors", coors)
    grid = [max(int(n) + 1, 1) for n in coors.amax(0).tolist()] if len(coors) else [1] * coors.shape[1]
    voxels = voxelize(voxel_ravel(coors, grid))
    reduced = segment_reduce(feats, voxels.indptr, reduce_type, voxels.perm)
    return reduced, voxel_unravel(voxels.rank, grid).to(coors.dtype)


@leaf
def voxelization(
    points: Tensor,
    voxel_size: Sequence[float] | Tensor,
    coors_range: Sequence[float] | Tensor,
    max_points: int = 35,
    max_voxels: int = 20000,
    deterministic: bool = True,
) -> Any:
    """Voxelise points, with the arguments and the results of mmcv's function of that name.

    Args:
        points: ``[N, 3 + k]``, x, y and z first; float16, bfloat16, float32 or float64.
        voxel_size: the edges of a voxel, (x, y, z).
        coors_range: the corners of the grid, (x, y, z, x, y, z); half a voxel at its end counts as one.
        max_points: the number P of points that a voxel keeps, or -1.
        max_voxels: the largest number of voxels, or -1.
        deterministic: ignored; the result is always that of mmcv's deterministic form.

    Returns:
        The points ``[M, P, 3 + k]`` of the M voxels that have points, their coordinates (z, y, x), int32 ``[M, 3]``,
        and their numbers of points, int32 ``[M]``, as from `hard_voxelize`. If
        ``max_points`` or ``max_voxels`` is -1, only the coordinates (z, y, x) of each point, int32 ``[N, 3]``, -1
        outside of the grid.

    Raises:
        TypeError: a wrong dtype, or not a tensor.
        ValueError: a wrong shape or value.

    The number of voxels depends on the data, and reading it waits for a GPU. `hard_voxelize` can return a static one.

    Source: ``Voxelization`` in OpenMMLab's mmcv.

    Example:
        >>> import torch, custom_ops
        >>> points = torch.tensor([[0.5, 0.5, 0.5], [1.5, 0.5, 0.5], [0.2, 0.1, 0.0]])
        >>> voxels, coors, counts = custom_ops.voxelization(points, (1, 1, 1), (0, 0, 0, 2, 1, 1), 2)
        >>> coors.tolist(), counts.tolist()
        ([[0, 0, 0], [0, 0, 1]], [2, 1])
    """
    _checks.has_dtype("points", points, _checks.FLOATING)
    if points.dim() != 2 or points.shape[1] < 3:
        raise ValueError(f"points: expected [N, 3 + k], got shape {list(points.shape)}")
    _checks.as_bool("deterministic", deterministic)
    max_points = _checks.as_int("max_points", max_points)
    max_voxels = _checks.as_int("max_voxels", max_voxels)
    size = numbers_of("voxel_size", voxel_size, 3, _checks.as_positive)
    corners = numbers_of("coors_range", coors_range, 6, _checks.as_float)
    low, high = torch.tensor(corners, dtype=torch.float32, device="cpu").view(2, 3)
    extent = ((high - low) / torch.tensor(size, dtype=torch.float32, device="cpu")).tolist()  # in float32, as there
    if not all(0 <= edges < math.inf for edges in extent):
        raise ValueError(f"coors_range: expected the lower corner, then the upper one, got {corners}")
    grid = [math.floor(edges + 0.5) for edges in extent]
    rank = voxel_rank(points[:, :3], corners[:3], size, grid)
    if -1 in (max_points, max_voxels):
        return voxel_unravel(rank, grid).flip(-1).int()
    voxels, ranks, counts = hard_voxelize(points, rank, max_points, max_voxels, padded=False)
    return voxels, voxel_unravel(ranks, grid).flip(-1).int(), counts.int()


def _has_coordinates(name: str, coordinates: Tensor, layout: str) -> None:
    _checks.has_dtype(name, coordinates, _checks.INDEX)
    if coordinates.dim() != 2 or coordinates.shape[1] < 1 or ("4" in layout and coordinates.shape[1] != 4):
        raise ValueError(f"{name}: expected {layout}, got shape {list(coordinates.shape)}")


def _has_features(name: str, feats: Tensor, of: str, coordinates: Tensor) -> None:
    """Check the features of points whose coordinates have been checked."""
    _checks.has_dtype(name, feats, _checks.FLOATING)
    if feats.dim() != 2 or feats.shape[0] != coordinates.shape[0]:
        raise ValueError(f"{name}: expected [{coordinates.shape[0]}, C] as {of}, got shape {list(feats.shape)}")
    _checks.same_device(**{name: feats, of: coordinates})
