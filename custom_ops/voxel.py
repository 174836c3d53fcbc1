"""Voxel summing: pooling the features of points that share a voxel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from custom_ops import _checks, library
from custom_ops._native import define
from custom_ops.library import Function
from custom_ops.registry import BadCall, Benchmark, OpInfo, Sample, Target, register

__all__ = ["VoxelsSumming", "VoxelsSummingLayer", "voxels_summing"]


@define
def voxel_bounds(ranks: Tensor, check_sorted: bool) -> tuple[Tensor, Tensor]:
    """The M runs of equal ``ranks``: where they begin and the number of points [M + 1], their last points [M]."""
    # One point makes one run: without it the tracer can't decide whether the result is empty.
    least = 1 if statically_known_true(ranks.shape[0] > 0) else 0
    runs = torch.library.get_ctx().new_dynamic_size(min=least)
    return ranks.new_empty((runs + 1,), dtype=torch.int64), ranks.new_empty((runs,), dtype=torch.int64)


@define
def segment_sum(x: Tensor, indptr: Tensor) -> Tensor:
    """out[..., m, c] = sum of x[..., n, c] over indptr[m] <= n < indptr[m + 1]."""
    return x.new_empty((*x.shape[:-2], indptr.shape[0] - 1, x.shape[-1]))


@define
def segment_gather(sums: Tensor, indptr: Tensor, points: int) -> Tensor:
    """The adjoint of `segment_sum`: each point gets its segment's row; 0 outside all segments."""
    return sums.new_empty((*sums.shape[:-2], points, sums.shape[-1]))


class VoxelsSumming(Function, op=segment_sum):
    """``VoxelsSumming.apply(x, geometry, ranks)`` is `voxels_summing`, a drop-in for FIERY's class."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        x, indptr = inputs
        ctx.points = x.shape[-2]
        ctx.save_for_backward(indptr)
        ctx.save_for_forward(indptr)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return segment_gather(grad, *ctx.saved_tensors, ctx.points), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return segment_sum(tangent, *ctx.saved_tensors)

    @staticmethod
    def apply(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return voxels_summing(*args, **kwargs)


class SegmentGather(Function, op=segment_gather):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        _, indptr, ctx.points = inputs
        ctx.save_for_backward(indptr)
        ctx.save_for_forward(indptr)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return segment_sum(grad, *ctx.saved_tensors), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return segment_gather(tangent, *ctx.saved_tensors, ctx.points)


@library.vmap(voxel_bounds)
def _(info: Any, in_dims: Any, ranks: Tensor, check_sorted: bool) -> Any:
    raise RuntimeError(
        "ranks: can't be vmapped, because each example would have another number of voxels; vmap over x alone"
    )


def _concatenated(indptr: Tensor, points: int) -> Tensor:
    """The boundaries [B, M + 1] of a batch over all its points; the segments between examples are dropped again."""
    offsets = torch.arange(indptr.shape[0], device=indptr.device)[:, None] * points
    return (indptr + offsets).flatten()


@library.vmap(segment_sum)
def _(info: Any, in_dims: Any, x: Tensor, indptr: Tensor) -> Any:
    x = library.to_front(x, in_dims[0], info.batch_size)
    if in_dims[1] is None:
        return segment_sum(x, indptr), 0
    indptr = indptr.movedim(in_dims[1], 0)
    x = x.movedim(0, -3)
    sums = segment_sum(x.flatten(-3, -2), _concatenated(indptr, x.shape[-2]))
    sums = torch.nn.functional.pad(sums, (0, 0, 0, 1)).unflatten(-2, indptr.shape)
    return sums[..., :-1, :], x.dim() - 3


@library.vmap(segment_gather)
def _(info: Any, in_dims: Any, sums: Tensor, indptr: Tensor, points: int) -> Any:
    sums = library.to_front(sums, in_dims[0], info.batch_size)
    if in_dims[1] is None:
        return segment_gather(sums, indptr, points), 0
    indptr = indptr.movedim(in_dims[1], 0)
    sums = torch.nn.functional.pad(sums.movedim(0, -3), (0, 0, 0, 1)).flatten(-3, -2)
    rows = segment_gather(sums[..., :-1, :], _concatenated(indptr, points), info.batch_size * points)
    return rows.unflatten(-2, (info.batch_size, points)), rows.dim() - 2


def _shard_all_but_points(x: Any, *others: Any) -> Any:
    from torch.distributed.tensor import Replicate, Shard

    rest = [None if isinstance(other, int) else Replicate() for other in others]
    free = [Replicate(), *(Shard(d) for d in range(x.ndim) if d != x.ndim - 2)]
    return [([placement], [placement, *rest]) for placement in free]


library.sharding(segment_sum)(_shard_all_but_points)
library.sharding(segment_gather)(_shard_all_but_points)


@library.sharding(voxel_bounds)
def _(ranks: Any, check_sorted: bool) -> Any:
    raise NotImplementedError("ranks: the number of voxels depends on the data, which DTensor can't express")


def voxels_summing(x: Tensor, geometry: Tensor, ranks: Tensor, check_sorted: bool = True) -> tuple[Tensor, Tensor]:
    """Sum the features of the points of each voxel; a drop-in for FIERY's and Lift-Splat-Shoot's.

    With a boolean mask that marks the last point of each run of equal ranks, voxel m is the run that
    ends at the m-th mark: ``sums[m] = sum of x[n] over its points``, ``voxels[m] = geometry`` at the
    mark. In backward each point gets its voxel's gradient; geometry and ranks have none.

    The cumulative sum of the original is replaced by one sum per voxel: no voxel's rounding error,
    NaN or inf reaches another.

    Args:
        x: point features ``[N, C]``; float16, bfloat16, float32 or float64. Sums of 16-bit features
            are accumulated in float32.
        geometry: voxel coordinates ``[N, k]`` of each point, any dtype.
        ranks: voxel number ``[N]`` of each point, int32 or int64, in non-decreasing order.
        check_sorted: raise for unsorted ranks; without it each *run* of equal ranks is summed.

    Returns:
        ``(sums [M, C], voxels [M, k])`` for M distinct ranks, in their order.

    Raises:
        TypeError: a wrong dtype, or no tensor.
        ValueError: a wrong shape, or tensors on several devices.
        RuntimeError: ``ranks`` are unsorted, or vmapped (the output's size would differ per example).

    O(N C) time; M + 1 integers kept for backward.

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
    _checks.has_dims("x", x, "[N, C]")
    _checks.is_tensor("geometry", geometry)
    _checks.has_dims("geometry", geometry, "[N, k]")
    _checks.has_dtype("ranks", ranks, _checks.INDEX)
    _checks.has_dims("ranks", ranks, "[N]")
    _checks.same_device(x=x, geometry=geometry, ranks=ranks)
    _checks.is_bool("check_sorted", check_sorted)
    for name, tensor in (("geometry", geometry), ("ranks", ranks)):
        if tensor.shape[0] != x.shape[0]:
            raise ValueError(f"{name}: expected {x.shape[0]} points as in x, got {tensor.shape[0]}")
    indptr, last = voxel_bounds(ranks, check_sorted)
    return segment_sum(x, indptr), geometry.detach().index_select(0, last)


class VoxelsSummingLayer(torch.nn.Module):
    """`voxels_summing` as a layer (the name VoxelsSumming belongs to the drop-in Function)."""

    def __init__(self, check_sorted: bool = True) -> None:
        super().__init__()
        _checks.is_bool("check_sorted", check_sorted)
        self.check_sorted = check_sorted

    def forward(self, x: Tensor, geometry: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
        return voxels_summing(x, geometry, ranks, self.check_sorted)

    def extra_repr(self) -> str:
        return f"check_sorted={self.check_sorted}"


def voxels_summing_reference(
    x: Tensor, geometry: Tensor, ranks: Tensor, check_sorted: bool = True
) -> tuple[Tensor, Tensor]:
    last = torch.ones_like(ranks, dtype=torch.bool)
    last[:-1] = ranks[1:] != ranks[:-1]
    voxel = last.cumsum(0) - last.long()
    return x.new_zeros(int(last.sum()), x.shape[1]).index_add(0, voxel, x), geometry[last]


def _points(points: int, voxels: int, columns: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(points)
    ranks = torch.randint(0, max(voxels, 1), (points,), generator=generator).sort().values
    x = torch.randn(points, columns, generator=generator).to(device, dtype).requires_grad_()
    return x, torch.stack([ranks // 100, ranks % 100], 1).to(device), ranks.to(device)


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    x, geometry, ranks = _points(8, 4, 3, device, dtype)
    runs = ranks.flip(0).repeat(2)
    return [
        Sample((x, geometry, ranks), dynamic={0: 0, 1: 0, 2: 0}),
        Sample(_points(0, 0, 3, device, dtype)),
        Sample(_points(9, 1, 1, device, dtype)),
        Sample((x, geometry, ranks.int())),
        Sample((x.detach().repeat(2, 1).requires_grad_(), geometry.repeat(2, 1), runs), {"check_sorted": False}),
    ]


_x, _geometry, _ranks = torch.ones(3, 2), torch.zeros(3, 3), torch.tensor([0, 1, 1])
register(
    OpInfo(
        name="voxels_summing",
        summary="Sum of the features in each voxel, for points sorted by voxel",
        function=voxels_summing,
        reference=voxels_summing_reference,
        apply=VoxelsSumming.apply,
        samples=_samples,
        modules=lambda: [(VoxelsSummingLayer(), {}), (VoxelsSummingLayer(False), {"check_sorted": False})],
        bad_calls=lambda: [
            BadCall((None, _geometry, _ranks), "x: expected a tensor, got NoneType"),
            BadCall((_x.int(), _geometry, _ranks), "x: expected one of float16"),
            BadCall((_x[0], _geometry, _ranks), r"x: expected \[N, C\], got shape \[2\]"),
            BadCall((_x, _geometry[0], _ranks), r"geometry: expected \[N, k\]"),
            BadCall((_x, _geometry[1:], _ranks), "geometry: expected 3 points as in x, got 2"),
            BadCall((_x, _geometry, _ranks.float()), "ranks: expected one of int32, int64, got float32"),
            BadCall((_x, _geometry, _ranks[1:]), "ranks: expected 3 points as in x, got 2"),
            BadCall((_x, _geometry, _ranks.to("meta")), "ranks: expected on cpu as x, got meta"),
            BadCall((_x, _geometry, _ranks, "no"), "check_sorted: expected True or False, got 'no'"),
            BadCall((_x, _geometry, _ranks.flip(0)), "ranks: expected non-decreasing values"),
        ],
        benchmarks=[
            Benchmark(
                unit="points of 64 features, 8 to a voxel",
                sizes=(10_000, 172_824, 1_000_000),
                make=lambda n, device: _points(n, n // 8, 64, device, torch.float32),
                peers={
                    "FIERY's cumulative sum": "custom_ops.benchmarks.peers:cumulative_voxels_summing",
                    "index_add": "custom_ops.benchmarks.peers:index_add_voxels_summing",
                    "ours, unchecked": lambda x, geometry, ranks: voxels_summing(
                        x, geometry, ranks, check_sorted=False
                    ),
                },
                targets=[Target(172_824, "FIERY's cumulative sum", 0.1)],
            )
        ],
    )
)
