"""The voxel of each point, the points of each voxel, and rows that are moved to and from their places in voxels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from custom_ops import _checks, library, shards
from custom_ops._leaf import leaf
from custom_ops._native import define

_ROUNDINGS = ("floor", "trunc")


@define
def voxel_bounds(ranks: Tensor, check_sorted: bool) -> tuple[Tensor, Tensor]:
    """Return the bounds [M + 1] of the M runs of equal ``ranks`` of at least 0, and the last point of each [M]."""
    runs = library.dynamic_size()
    return ranks.new_empty((runs + 1,), dtype=torch.int64), ranks.new_empty((runs,), dtype=torch.int64)


@define
def voxel_index(points: Tensor, frame: Tensor, x_cells: int, y_cells: int, z_cells: int, truncate: bool) -> Tensor:
    """Return the number of the voxel of each of ``points`` [..., 3], or -1 outside of the grid.

    ``frame`` holds the origin and the size of a voxel, [2, 3], or [E, 2, 3] with one for each index of points' first
    dimension; it is float64 for float64 points, else float32.
    """
    return points.new_empty(points.shape[:-1], dtype=torch.int64)


@define
def voxel_sort(rank: Tensor, voxels: int) -> tuple[Tensor, Tensor]:
    """Return the points [..., N] sorted by rank, and the offset at which each voxel's points begin [..., V + 1]."""
    indptr = rank.new_empty((*rank.shape[:-1], voxels + 1), dtype=torch.int64)
    return torch.empty_like(rank, dtype=torch.int64, memory_format=torch.contiguous_format), indptr


@define
def voxel_match(rank: Tensor, perm: Tensor, indptr: Tensor) -> Tensor:
    """Return a copy of ``indptr`` if (perm, indptr) is `voxel_sort` of ``rank``: every point and boundary counts.

    Otherwise it raises on the CPU. On a GPU an error would have to be waited for, so that example's boundaries are -1,
    and every reduction over them and every gradient is NaN.
    """
    return torch.empty_like(indptr, memory_format=torch.contiguous_format)


@define
def voxel_unique(rank: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the different ranks in order, the place of each point's rank among them, and their `voxel_sort`.

    There are ``size`` of them, [..., size], where the first are kept, and -1 stands for the missing; or, if it is -1,
    as many as there are. A negative rank, or one that isn't kept, has the place -1.
    """
    count = size if size >= 0 else library.dynamic_size()
    points, batch = torch.empty_like(rank, dtype=torch.int64, memory_format=torch.contiguous_format), rank.shape[:-1]
    ranks, indptr = (rank.new_empty((*batch, n), dtype=torch.int64) for n in (count, count + 1))
    return ranks, points, torch.empty_like(points), indptr


@define
def voxel_slots(rank: Tensor, max_points: int, size: int, padded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return each point's place in its voxel, plus the voxel's number times ``max_points``; the voxels' ranks and
    numbers of points.

    Voxels are numbered, and have places, in the order of points. A point past ``max_points`` of its voxel, or in a
    voxel past ``size`` of them, gets -1, like a negative rank; a ``size`` of -1 is no limit. The result has ``size``
    voxels if it is ``padded``, with the ranks -1, or else as many as there are.
    """
    count = size if padded else library.dynamic_size()
    slot = torch.empty_like(rank, dtype=torch.int64, memory_format=torch.contiguous_format)
    ranks, counts = (rank.new_empty((*rank.shape[:-1], count), dtype=torch.int64) for _ in range(2))
    return slot, ranks, counts


@define
def voxel_place(x: Tensor, place: Tensor, rows: int) -> Tensor:
    """Return [..., rows, C] with the rows of x at their places [..., N], which all differ, or at none for -1; else
    0.
    """
    return x.new_empty((*x.shape[:-2], rows, x.shape[-1]))


@define
def voxel_take(x: Tensor, place: Tensor) -> Tensor:
    """Return the row of x at each place [..., N], or 0 for -1: the adjoint of `voxel_place`."""
    return x.new_empty((*place.shape, x.shape[-1]))


class VoxelPlace(library.Function, op=voxel_place):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, place, ctx.rows = inputs
        ctx.save_for_backward(place)
        ctx.save_for_forward(place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return voxel_take(grad, *ctx.saved_tensors), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return voxel_place(tangent, *ctx.saved_tensors, ctx.rows)


class VoxelTake(library.Function, op=voxel_take):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, place = inputs
        ctx.rows = x.shape[-2]
        ctx.save_for_backward(place)
        ctx.save_for_forward(place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return voxel_place(grad, *ctx.saved_tensors, ctx.rows), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return voxel_take(tangent, *ctx.saved_tensors)


def _batch_of_places(op: Any) -> None:
    @library.vmap(op)
    def _(info: Any, in_dims: Any, x: Tensor, place: Tensor, *rows: int) -> Any:
        return op(*(library.to_front(t, d, info.batch_size) for t, d in zip((x, place), in_dims)), *rows), 0


_batch_of_places(voxel_place)
_batch_of_places(voxel_take)


def _check_batch(static: bool) -> None:
    if not static:
        raise RuntimeError(
            "rank: can't be vmapped without max_voxels, because each example would have another number of voxels"
        )


@library.vmap(voxel_unique)
def _(info: Any, in_dims: Any, rank: Tensor, size: int) -> Any:
    _check_batch(size >= 0)
    return voxel_unique(library.to_front(rank, in_dims[0], info.batch_size), size), (0,) * 4


@library.vmap(voxel_slots)
def _(info: Any, in_dims: Any, rank: Tensor, max_points: int, size: int, padded: bool) -> Any:
    _check_batch(padded)
    return voxel_slots(library.to_front(rank, in_dims[0], info.batch_size), max_points, size, padded), (0,) * 3


@library.vmap(voxel_bounds)
def _(info: Any, in_dims: Any, ranks: Tensor, check_sorted: bool) -> Any:
    raise RuntimeError(
        "ranks: can't be vmapped, because each example would have another number of voxels; vmap over x alone"
    )


@library.vmap(voxel_index)
def _(info: Any, in_dims: Any, points: Tensor, frame: Tensor, *args: Any) -> Any:
    points = library.to_front(points, in_dims[0], info.batch_size)
    if in_dims[1] is None and frame.dim() == 2:
        return voxel_index(points, frame, *args), 0
    frame = library.to_front(frame, in_dims[1], info.batch_size)
    if frame.dim() == 3:
        return voxel_index(points, frame, *args), 0
    inner = points.shape[:2]
    return voxel_index(points.flatten(0, 1), frame.flatten(0, 1), *args).unflatten(0, inner), 0


@library.vmap(voxel_sort)
def _(info: Any, in_dims: Any, rank: Tensor, voxels: int) -> Any:
    return voxel_sort(library.to_front(rank, in_dims[0], info.batch_size), voxels), (0, 0)


@library.vmap(voxel_match)
def _(info: Any, in_dims: Any, *tensors: Tensor) -> Any:
    return voxel_match(*(library.to_front(t, d, info.batch_size) for t, d in zip(tensors, in_dims))), 0


Number = TypeVar("Number", int, float)


def as_voxels(name: str, value: Any) -> int:
    """Return ``value`` as a number of voxels for whose boundaries memory has addresses."""
    voxels = _checks.as_count(name, value)
    if isinstance(voxels, int) and voxels >= 2**59:  # a symbolic number isn't larger
        raise ValueError(f"{name}: expected less than 2^59, as many as there is memory for, got {voxels}")
    return voxels


def numbers_of(name: str, value: Any, count: int, convert: Callable[[str, Any], Number]) -> tuple[Number, ...]:
    """Return the ``count`` numbers of a sequence, an array or a tensor on the CPU."""
    shape = getattr(value, "shape", None)
    numbers = value if isinstance(value, Sequence) or (shape is not None and len(shape) == 1) else ()
    if len(numbers) != count:
        raise ValueError(f"{name}: expected {count} numbers, got {value if shape is None else f'shape {list(shape)}'}")
    return tuple(convert(name, number) for number in numbers)


def sizes_of(name: str, value: Any, count: int) -> tuple[int, ...]:
    """Return the ``count`` sizes of a grid: integers, or whole numbers in a floating tensor or array, as BEVDet's."""
    dtype = getattr(value, "dtype", None)
    floating = dtype.is_floating_point if isinstance(dtype, torch.dtype) else getattr(dtype, "kind", "") == "f"

    def size(name: str, number: Any) -> int:
        return _checks.as_count(name, int(number) if floating and float(number).is_integer() else number)

    return numbers_of(name, value, count, size)


def on_host(value: Any) -> Any:
    """Return a tensor on a GPU as one on the CPU, which waits for it, and anything else as it is."""
    on_gpu = isinstance(value, Tensor) and value.device.type not in ("cpu", "meta")
    return value.cpu() if on_gpu else value


def _triple(name: str, value: Any, like: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Tensor) and value.shape == (3,):
        if value.device.type != "cpu":
            _checks.same_device(points=like, **{name: value})
        return value.detach().to(like.device, dtype)
    return torch.tensor(numbers_of(name, value, 3, _checks.as_float), dtype=dtype, device=like.device)


@leaf
def voxel_rank(
    points: Tensor,
    origin: Sequence[float] | Tensor,
    voxel_size: Sequence[float] | Tensor,
    grid_size: Sequence[int],
    batch: Tensor | None = None,
    rounding: str = "floor",
) -> Tensor:
    """Return the number of the voxel that each point lies in, or -1 outside of the grid.

    With ``i = floor((p - origin) / voxel_size)`` along each axis and a grid of X by Y by Z voxels, the
    rank is ``((batch X + i_x) Y + i_y) Z + i_z``. Points outside the grid or with a NaN, and those with a
    negative ``batch``, get -1. The result is an integer and has no gradient.

    Args:
        points: ``[..., 3]``; float16, bfloat16, float32 or float64. Computed in float64 for float64
            points, else in float32.
        origin: the lower corner of the grid: 3 numbers, or a tensor ``[3]``.
        voxel_size: the edges of a voxel, in the same forms; positive.
        grid_size: the number of voxels along each axis.
        batch: int32 or int64, broadcastable to ``[...]``: the example that each point belongs to.
        rounding: "floor", or "trunc" as in Lift-Splat-Shoot, with which points up to one voxel below the
            origin count as inside of the grid.

    Returns:
        int64 ``[...]``.

    Raises:
        TypeError: a wrong dtype, or not a tensor.
        ValueError: a wrong shape or value, or tensors on several devices. A voxel size is checked
            if it isn't a tensor.

    The op takes O(N) time in one pass.

    Source: Philion & Fidler, "Lift, Splat, Shoot", ECCV 2020.

    Example:
        >>> import torch, custom_ops
        >>> points = torch.tensor([[0.5, 0.5, 0.5], [1.5, 0.2, 0.0], [-0.1, 0.0, 0.0]])
        >>> custom_ops.voxel_rank(points, (0, 0, 0), (1, 1, 1), (2, 2, 1))
        tensor([ 0,  2, -1])
        >>> custom_ops.voxel_rank(points, (0, 0, 0), (1, 1, 1), (2, 2, 1), rounding="trunc")
        tensor([0, 2, 0])
    """
    if shards.is_sharded(points):

        def run(points: Tensor, batch: Tensor | None) -> Tensor:
            return voxel_rank(points, origin, voxel_size, grid_size, batch, rounding)

        lead = shards.batch_labels(points.dim() - 1)
        own = "" if batch is None else lead[len(lead) - batch.dim() :]
        return shards.in_shards(run, f"{lead}X,{own}->{lead}", points, batch)
    _checks.has_dtype("points", points, _checks.FLOATING)
    if points.dim() < 1 or points.shape[-1] != 3:
        raise ValueError(f"points: expected [..., 3], got shape {list(points.shape)}")
    _checks.is_one_of("rounding", rounding, _ROUNDINGS)
    x, y, z = sizes_of("grid_size", grid_size, 3)
    _checks.as_count("grid_size", x * y * z)
    dtype = torch.float64 if points.dtype == torch.float64 else torch.float32
    frame = [_triple(name, value, points, dtype) for name, value in (("origin", origin), ("voxel_size", voxel_size))]
    if not isinstance(voxel_size, Tensor) and not all(size > 0 for size in voxel_size):
        raise ValueError(f"voxel_size: expected positive numbers, got {voxel_size!r}")
    rank = voxel_index(points.detach(), torch.stack(frame), x, y, z, rounding == "trunc")
    if batch is None:
        return rank
    _checks.has_dtype("batch", batch, _checks.INDEX)
    _checks.same_device(points=points, batch=batch)
    try:
        batch = batch.expand_as(rank)
    except RuntimeError:
        raise ValueError(
            f"batch: expected a shape that broadcasts to {list(rank.shape)}, got {list(batch.shape)}"
        ) from None
    # int64 can't hold the ranks of examples past ``largest``. Clamping keeps such ranks past any grid, instead of
    # letting them wrap around into it.
    largest = (2**63 - 1) // max(x * y * z, 1) - 1
    return torch.where((rank >= 0) & (batch >= 0), rank + batch.long().clamp_max(largest) * (x * y * z), -1)


@leaf
def voxel_csr(rank: Tensor, num_voxels: int) -> tuple[Tensor, Tensor]:
    """Sort points by voxel with a stable counting sort, reusable over layers and frames of the same geometry.

    The points of voxel v are ``perm[..., indptr[..., v] : indptr[..., v + 1]]``, in their original order. Points with a
    negative rank are in no voxel and come last in ``perm``.

    Args:
        rank: voxel number of each point ``[..., N]``, int32 or int64, as from `voxel_rank`.
        num_voxels: the number V of voxels.

    Returns:
        ``(perm [..., N], indptr [..., V + 1])``, int64.

    Raises:
        TypeError: a wrong dtype, or not a tensor.
        ValueError: a wrong shape, or a negative ``num_voxels``.
        RuntimeError: on the CPU, a rank of ``num_voxels`` or more; on a GPU, where finding out would wait
            for the device, the boundaries of that example are -1, and all that is pooled by them is NaN.

    The op takes O(N + V) time and memory.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.voxel_csr(torch.tensor([2, -1, 0, 2]), 3)
        (tensor([2, 0, 3, 1]), tensor([0, 1, 1, 3]))
    """
    _checks.has_dtype("rank", rank, _checks.INDEX)
    if rank.dim() < 1:
        raise ValueError("rank: expected [..., N], got a scalar")
    num_voxels = as_voxels("num_voxels", num_voxels)
    if shards.is_sharded(rank):
        lead = shards.batch_labels(rank.dim() - 1)
        return shards.in_shards(lambda rank: voxel_csr(rank, num_voxels), f"{lead}N->{lead}N,{lead}V", rank)
    return voxel_sort(rank, num_voxels)
