"""Evidence for `custom_ops.voxel.summing`: references, samples and wrong calls."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.registry import BadCall, OpInfo, Sample, register
from custom_ops.voxel.summing import _NOT_SHARDED, VoxelsSumming, VoxelsSummingLayer, voxels_summing


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
    )
)
