"""Voxelisation: the voxels that have points, with all of their points or with a limited number of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from custom_ops import _checks, shards
from custom_ops._leaf import leaf
from custom_ops.voxel._geometry import Csr
from custom_ops.voxel.sums import csr_of
from custom_ops.voxel.voxel_grid import as_voxels, sizes_of, voxel_place, voxel_slots, voxel_unique
from custom_ops.voxel.voxel_segments import segment_spread

_NOT_SHARDED = "the voxels of each process would be numbered on their own"


class Voxels(NamedTuple):
    """The voxels that have points; the result of `voxelize`."""

    rank: Tensor
    inverse: Tensor
    counts: Tensor
    perm: Tensor
    indptr: Tensor

    @property
    def csr(self) -> Csr:
        """``(perm, indptr)``: what `voxel_csr` gives for ``inverse``."""
        return self.perm, self.indptr


def _has_ranks(rank: Tensor) -> None:
    _checks.has_dtype("rank", rank, _checks.INDEX)
    if shards.is_sharded(rank):
        raise NotImplementedError(f"rank: expected no DTensor, because {_NOT_SHARDED}")
    if rank.dim() < 1:
        raise ValueError("rank: expected [..., N], got a scalar")


def _limit_of(rank: Tensor, max_voxels: int | None, padded: bool = True) -> int:
    """Return the number of voxels, or -1 for no limit."""
    limit = -1 if max_voxels is None else as_voxels("max_voxels", max_voxels)
    if rank.dim() != 1 and (limit < 0 or not padded):
        name, expected = ("max_voxels", "a number") if limit < 0 else ("padded", "True")
        raise ValueError(
            f"{name}: expected {expected} for ranks of shape {list(rank.shape)}, whose examples may have different "
            "numbers of voxels"
        )
    return limit


@leaf
def voxelize(rank: Tensor, max_voxels: int | None = None) -> Voxels:
    """Find the voxels that have points, and the points of each.

    Points are numbered by their voxel first: by `voxel_rank` from their positions, or by `voxel_ravel` from integer
    coordinates. `voxel_unravel` gives the voxels' coordinates from their ranks.

    Args:
        rank: the voxel of each point, ``[N]``, int32 or int64; a point with a negative rank is in no voxel. With
            ``max_voxels`` also ``[..., N]``.
        max_voxels: the number M of voxels that are returned: those with the lowest ranks, and then voxels without
            points. A program that is compiled or exported then has results of a static size. If None, M is the number
            of voxels that have points.

    Returns:
        ``Voxels(rank, inverse, counts, perm, indptr)``, int64:

        - ``rank [..., M]``, increasing; -1 for a voxel without points;
        - ``inverse [..., N]``, the voxel of each point, an index of ``rank``; -1 for none;
        - ``counts [..., M]``, the number of points in each voxel;
        - ``perm [..., N]`` and ``indptr [..., M + 1]``, also as ``.csr``: the points sorted by voxel, which is
          ``voxel_csr(inverse, M)``. They are the segments of `segment_reduce` and `segment_softmax`.

    Raises:
        TypeError: a wrong dtype, or not a tensor.
        ValueError: a wrong shape or a negative ``max_voxels``.
        NotImplementedError: for a DTensor.

    The op takes O(N) time and memory (a radix sort), however large the grid is.

    Source: the dynamic voxelisation of Zhou et al., "End-to-End Multi-View Fusion for 3D Object Detection", CoRL 2019.

    Example:
        >>> import torch, custom_ops
        >>> voxels = custom_ops.voxelize(torch.tensor([70, 5, -1, 70]))
        >>> voxels.rank, voxels.inverse, voxels.counts
        (tensor([ 5, 70]), tensor([ 1,  0, -1,  1]), tensor([1, 2]))
        >>> x = torch.tensor([[1.0], [2.0], [4.0], [8.0]])
        >>> custom_ops.segment_reduce(x, voxels.indptr, "mean", voxels.perm).flatten()
        tensor([2.0000, 4.5000])
    """
    _has_ranks(rank)
    ranks, inverse, perm, indptr = voxel_unique(rank, _limit_of(rank, max_voxels))
    return Voxels(ranks, inverse, indptr.diff(), perm, indptr)


@leaf
def hard_voxelize(
    points: Tensor, rank: Tensor, max_points: int, max_voxels: int | None = None, padded: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Collect the first points of each voxel, in voxels that are numbered in the order of their first points.

    Args:
        points: features ``[..., N, C]``; float16, bfloat16, float32 or float64.
        rank: the voxel of each point, ``[..., N]``, as from `voxel_rank`; int32 or int64. A point with a negative rank
            is in no voxel.
        max_points: the number P of points that a voxel keeps; further ones are dropped.
        max_voxels: the largest number of voxels; points of further ones are dropped. If None, there is no limit, and
            ``rank`` is ``[N]``.
        padded: return ``max_voxels`` voxels even if fewer have points, so that the size of the result is static. If
            False, or without ``max_voxels``, M is the number of voxels that have points, and ``rank`` is ``[N]``.

    Returns:
        ``(voxels [..., M, P, C], rank [..., M], counts [..., M])``: the points of each voxel, then zeros; its rank, -1
        for a voxel without points; and its number of points, at most P. Differentiable to any order in ``points``; a
        dropped point has a gradient of zero.

    Raises:
        TypeError: a wrong dtype, or not a tensor.
        ValueError: a wrong shape or value, or tensors on several devices.
        NotImplementedError: for DTensors.

    The op takes O(N + M P C) time, however large the grid is.

    Source: Zhou & Tuzel, "VoxelNet", CVPR 2018; the deterministic form of ``Voxelization`` in OpenMMLab's mmcv.

    Example:
        >>> import torch, custom_ops
        >>> points = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
        >>> voxels, rank, counts = custom_ops.hard_voxelize(points, torch.tensor([70, 5, 70, 70]), max_points=2)
        >>> voxels[..., 0], rank, counts
        (tensor([[1., 3.],
                [2., 0.]]), tensor([70,  5]), tensor([2, 1]))
    """
    _checks.has_dtype("points", points, _checks.FLOATING)
    if shards.is_sharded(points):
        raise NotImplementedError(f"points: expected no DTensor, because {_NOT_SHARDED}")
    _has_ranks(rank)
    if points.dim() < 2 or points.shape[:-1] != rank.shape:
        raise ValueError(
            f"points: expected [..., N, C] with a rank for each point, got shapes {list(points.shape)} and "
            f"{list(rank.shape)}"
        )
    _checks.same_device(points=points, rank=rank)
    max_points = _checks.as_count("max_points", max_points, 1)
    padded = _checks.as_bool("padded", padded) and max_voxels is not None
    slot, ranks, counts = voxel_slots(rank, max_points, _limit_of(rank, max_voxels, padded), padded)
    voxels = voxel_place(points, slot, ranks.shape[-1] * max_points)
    return voxels.unflatten(-2, (ranks.shape[-1], max_points)), ranks, counts


@leaf
def voxel_gather(x: Tensor, rank: Tensor, csr: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Give each point the features of its voxel: the adjoint of `voxel_sum`.

    ``out[..., n, :] = x[..., rank[..., n], :]``, and 0 for a negative rank.

    Args:
        x: features of the voxels, ``[..., V, C]``; float16, bfloat16, float32 or float64.
        rank: the voxel of each point ``[..., N]``, or ``[N]`` for all examples alike; int32 or int64, as from
            `voxel_rank`, or the ``inverse`` of `voxelize`.
        csr: ``voxel_csr(rank, V)``, or the ``csr`` of `voxelize`, computed once for several calls.

    Returns:
        ``[..., N, C]``. Differentiable to any order in ``x``. The gradient is a `voxel_sum`, and as deterministic.

    Raises:
        TypeError: a wrong dtype, or not a tensor.
        ValueError: a wrong shape, or tensors on several devices.
        RuntimeError: on the CPU, a rank of V or more, or a ``csr`` of other ranks; on a GPU, where an error would wait
            for the device, that example's result is NaN.

    DTensors may be sharded by leading dimensions and by columns.

    The op takes O(N C + V) time.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.voxel_gather(torch.tensor([[1.0], [2.0]]), torch.tensor([1, -1, 0])).flatten()
        tensor([2., 0., 1.])
    """
    _checks.has_dtype("x", x, _checks.FLOATING)
    _checks.has_dtype("rank", rank, _checks.INDEX)
    if x.dim() < 2:
        raise ValueError(f"x: expected [..., V, C], got shape {list(x.shape)}")
    if rank.dim() < 1 or rank.shape[:-1] not in (x.shape[:-2], ()):
        raise ValueError(
            f"rank: expected [..., N] with the leading dimensions {list(x.shape[:-2])} of x or none, "
            f"got shape {list(rank.shape)}"
        )
    if shards.is_sharded(x):

        def run(x: Tensor, rank: Tensor, perm: Tensor | None, indptr: Tensor | None) -> Tensor:
            return voxel_gather(x, rank, None if perm is None or indptr is None else (perm, indptr))

        lead = shards.batch_labels(x.dim() - 2)
        own = lead if rank.dim() > 1 else ""
        labels = f"{lead}Vc,{own}N,{own}N,{own}W->{lead}Nc"
        return shards.in_shards(run, labels, x, rank, *(csr or (None, None)))
    _checks.same_device(x=x, rank=rank)
    perm, indptr = csr_of(rank, x.shape[-2], csr)
    return segment_spread(x, None, None, indptr, perm, rank.shape[-1], False, 1, 1, True)[0]


def _grid_of(grid_size: Sequence[int], count: int) -> tuple[int, ...]:
    grid = sizes_of("grid_size", grid_size, count)
    _checks.as_count("grid_size", math.prod(grid))
    return grid


@leaf
def voxel_ravel(coordinates: Tensor, grid_size: Sequence[int]) -> Tensor:
    """Return the number of the voxel with the given coordinates, or -1 outside of the grid.

    Args:
        coordinates: int32 or int64 ``[..., k]``.
        grid_size: the k numbers of voxels along each axis; a first one may be the number of examples.

    Returns:
        int64 ``[...]``, as `voxel_rank` numbers voxels: ``((b X + x) Y + y) Z + z`` for coordinates (b, x, y, z).

    Raises:
        TypeError: a wrong dtype, or not a tensor.
        ValueError: a wrong shape or value.

    It is ``numpy.ravel_multi_index``, but for what is outside.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.voxel_ravel(torch.tensor([[1, 2], [0, 3], [-1, 0]]), (2, 3))
        tensor([ 5, -1, -1])
    """
    _checks.has_dtype("coordinates", coordinates, _checks.INDEX)
    if coordinates.dim() < 1 or coordinates.shape[-1] < 1:
        raise ValueError(f"coordinates: expected [..., k], got shape {list(coordinates.shape)}")
    axes = coordinates.long().unbind(-1)
    rank = torch.zeros_like(axes[0])
    inside = torch.ones_like(rank, dtype=torch.bool)
    for axis, cells in zip(axes, _grid_of(grid_size, len(axes))):
        inside = inside & (axis >= 0) & (axis < cells)
        rank = rank * cells + axis.where(inside, 0)
    return rank.where(inside, -1)


@leaf
def voxel_unravel(rank: Tensor, grid_size: Sequence[int]) -> Tensor:
    """Return the coordinates of the voxels with the given numbers: the inverse of `voxel_ravel` and of `voxel_rank`.

    Args:
        rank: int32 or int64 ``[...]``.
        grid_size: the k numbers of voxels along each axis; a first one may be the number of examples.

    Returns:
        int64 ``[..., k]``; -1 for all coordinates of a negative rank or of one past the grid.

    Raises:
        TypeError: a wrong dtype, or not a tensor.
        ValueError: a wrong value of ``grid_size``.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.voxel_unravel(torch.tensor([5, -1]), (2, 3))
        tensor([[ 1,  2],
                [-1, -1]])
    """
    _checks.has_dtype("rank", rank, _checks.INDEX)
    grid = _grid_of(grid_size, len(grid_size)) if hasattr(grid_size, "__len__") else _grid_of(grid_size, 1)
    rank = rank.long()
    inside = (rank >= 0) & (rank < math.prod(grid))
    axes: list[Any] = []
    for cells in reversed(grid):
        axes.insert(0, torch.where(inside, rank % max(cells, 1), -1))
        rank = rank // max(cells, 1)
    return torch.stack(axes, -1)
