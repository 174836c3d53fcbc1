"""The drop-in for FIERY's and Lift-Splat-Shoot's sum over sorted points."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops import _checks, shards
from custom_ops.registry import BadCall, Benchmark, OpInfo, Sample, Target, register
from custom_ops.voxel.voxel_grid import SIZES, at_most_checked, voxel_bounds
from custom_ops.voxel.voxel_segments import SegmentReduce, segment_reduce

__all__ = ["VoxelsSumming", "VoxelsSummingLayer", "voxels_summing"]


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
        ranks: voxel number ``[N]`` of each point in non-decreasing order, int32 or int64, or whole numbers in
            float32 or float64. A point with a negative rank is outside: it contributes nothing, even if its
            features are NaN, and its gradient is exactly zero.
        check_sorted: raise for unsorted ranks; without it each *run* of equal ranks is summed, and points
            outside must lie before and behind all others.

    Returns:
        ``(sums [M, C], voxels [M, k])`` for M distinct ranks of at least 0, in their order.

    Raises:
        TypeError: a wrong dtype, or no tensor.
        ValueError: a wrong shape, or tensors on several devices.
        RuntimeError: ``ranks`` are unsorted, not whole or so large that their dtype rounds them, or vmapped
            (the output's size would differ per example).

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
    """`voxels_summing` as a layer (the name VoxelsSumming belongs to the drop-in Function).

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


def voxels_summing_reference(
    x: Tensor, geometry: Tensor, ranks: Tensor, check_sorted: bool = True
) -> tuple[Tensor, Tensor]:
    inside = ranks >= 0
    x, geometry, ranks = x[inside], geometry[inside], ranks[inside]
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
        Sample((x, geometry, ranks.int() - 2)),  # the first points are outside
        Sample((x.detach().repeat(2, 1).requires_grad_(), geometry.repeat(2, 1), runs), {"check_sorted": False}),
    ]


_x, _geometry, _ranks = torch.ones(3, 2), torch.zeros(3, 3), torch.tensor([0, 1, 1])
register(
    OpInfo(
        name="voxels_summing",
        not_fuzzed=dict.fromkeys(("fills", "outliers"), "a sum of them keeps nothing of what is smaller"),
        summary="Sum of the features in each voxel, for points sorted by voxel",
        function=voxels_summing,
        reference=voxels_summing_reference,
        apply=VoxelsSumming.apply,
        samples=_samples,
        not_sharded=_NOT_SHARDED,
        modules=lambda: [(VoxelsSummingLayer(), {}), (VoxelsSummingLayer(False), {"check_sorted": False})],
        bad_calls=lambda: [
            BadCall((None, _geometry, _ranks), "x: expected a tensor, got NoneType"),
            BadCall((_x.int(), _geometry, _ranks), "x: expected one of float16"),
            BadCall((_x[0], _geometry, _ranks), r"x: expected \[N, C\], got shape \[2\]"),
            BadCall((_x, _geometry[0], _ranks), r"geometry: expected \[N, k\]"),
            BadCall((_x, _geometry[1:], _ranks), "geometry: expected 3 points as in x, got 2"),
            BadCall(
                (_x, _geometry, _ranks.half()), "ranks: expected one of int32, int64, float32, float64, got float16"
            ),
            BadCall((_x, _geometry, _ranks / 2), "ranks: expected whole numbers below 2\\^24 in float32"),
            BadCall((_x, _geometry, torch.tensor([1, -1, 1]), False), "ranks: expected the points outside"),
            BadCall((_x, _geometry, _ranks[1:]), "ranks: expected 3 points as in x, got 2"),
            BadCall((_x, _geometry, _ranks.to("meta")), "ranks: expected on cpu as x, got meta"),
            BadCall((_x, _geometry, _ranks, "no"), "check_sorted: expected True or False, got 'no'"),
            BadCall((_x, _geometry, _ranks.flip(0)), "ranks: expected non-decreasing values"),
        ],
        native=lambda x, geometry, ranks: torch.segment_reduce(
            x, "sum", lengths=ranks.unique_consecutive(return_counts=True)[1]
        ),
        benchmarks=[
            Benchmark(
                unit="points of 64 features, 8 to a voxel",
                sizes=SIZES,
                make=lambda n, device: _points(n, n // 8, 64, device, torch.float32),
                checked_at=at_most_checked,
                peers={
                    "FIERY's cumulative sum": "custom_ops.benchmarks.peers:cumulative_voxels_summing",
                    "index_add": "custom_ops.benchmarks.peers:index_add_voxels_summing",
                    "ours, unchecked": lambda x, geometry, ranks: voxels_summing(
                        x, geometry, ranks, check_sorted=False
                    ),
                },
                targets=[
                    Target(172_824, "FIERY's cumulative sum", 0.1),
                    Target(172_824, "FIERY's cumulative sum", 0.1, memory="warm"),
                ],
            )
        ],
    )
)
