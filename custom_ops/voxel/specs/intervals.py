"""The specs of `custom_ops.voxel.intervals`: references, samples and wrong calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from custom_ops.registry import BadCall, OpInfo, Sample, Sharding, register
from custom_ops.voxel.intervals import bev_pool_v2


def bev_pool_v2_reference(
    depth: Tensor,
    feat: Tensor,
    ranks_depth: Tensor,
    ranks_feat: Tensor,
    ranks_bev: Tensor,
    bev_feat_shape: Sequence[int],
    interval_starts: Tensor,
    interval_lengths: Tensor,
) -> Tensor:
    """Sum interval after interval, as BEVDet's kernel does."""
    weights, pixels = depth.flatten(), feat.flatten(0, 3)
    sums = [pixels[:0]]
    for start, length in zip(interval_starts.tolist(), interval_lengths.tolist()):
        points = slice(start, start + length)
        sums.append((weights[ranks_depth[points], None] * pixels[ranks_feat[points]]).sum(0, keepdim=True))
    total = torch.cat(sums)
    out = total.new_zeros(math.prod(bev_feat_shape[:4]), feat.shape[4]).index_add(0, ranks_bev[interval_starts], total)
    return out.view(tuple(bev_feat_shape)).permute(0, 4, 1, 2, 3)


def interval_arrays(rank: Tensor, num_voxels: int) -> list[Tensor]:
    """Return BEVDet's five arrays, int32, for ranks ``[B, N, D, H, W]`` counted within each example."""
    plane, bins = rank.shape[3] * rank.shape[4], rank.shape[2]
    first = torch.arange(0, len(rank) * num_voxels, max(num_voxels, 1), device=rank.device).view(-1, 1, 1, 1, 1)
    voxel = torch.where(rank < 0, -1, rank + first).flatten()
    points = (voxel >= 0).nonzero()[:, 0]
    points = points[voxel[points].argsort(stable=True)]
    lengths = voxel[points].unique_consecutive(return_counts=True)[1]
    pixels = points // (bins * plane) * plane + points % plane
    return [t.int() for t in (points, pixels, voxel[points], lengths.cumsum(0) - lengths, lengths)]


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(device, dtype).requires_grad_()

    def call(shape: tuple[int, ...], columns: int, rank: Tensor, grid: tuple[int, ...]) -> tuple[Any, ...]:
        points, pixels, voxels, starts, lengths = interval_arrays(rank.view(shape), math.prod(grid))
        feat = leaf(*shape[:2], *shape[3:], columns)
        return leaf(*shape), feat, points, pixels, voxels, (shape[0], *grid, columns), starts, lengths

    rank = torch.randint(-1, 4, (8,), device=device)
    long = call((1, 2, 2, 1, 2), 1, rank, (1, 2, 2))
    # One depth is in two voxels, and one is in a voxel twice; some pixels are another's, the intervals are in any
    # order, and there are points between them.
    lists = ([3, 0, 1, 0, 3, 3, 2], [0, 1, 1, 0, 1, 0, 1], [2, 2, 0, 1, 1, 1, 0], [3, 0], [3, 2])
    depths, pixels, voxels, *intervals = (torch.tensor(values, device=device) for values in lists)
    return [
        Sample(call((2, 1, 2, 1, 2), 2, rank, (1, 2, 2))),
        Sample((*long[:2], *(t.long() for t in long[2:5]), long[5], *(t.long() for t in long[6:]))),
        Sample(call((1, 1, 2, 1, 2), 2, rank[:4].clamp(max=-1), (1, 1, 4))),  # no point lies in the grid
        Sample((leaf(1, 1, 2, 1, 2), leaf(1, 1, 1, 2, 3), depths, pixels, voxels, (1, 1, 1, 4, 3), *intervals)),
    ]


def _shardings() -> list[Sharding]:
    depth, feat = torch.rand(2, 3, 4, 1, 2, requires_grad=True), torch.randn(2, 3, 1, 2, 5, requires_grad=True)
    arrays = interval_arrays(torch.randint(-1, 4, depth.shape), 4)
    call = Sample((depth, feat, *arrays[:3], (2, 1, 2, 2, 5), *arrays[3:]))
    return [
        Sharding("examples", call, {0: 0, 1: 0}, "partial"),
        Sharding("cameras", call, {0: 1, 1: 1}, "partial"),
        Sharding("channels", call, {1: 4}, 1, {"all_reduce": 1}),
    ]


def _array(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _bad_calls() -> list[BadCall]:
    """Return calls with one wrong argument each, on points 1 and 0 of two bins of one pixel, in voxels 0 and 2."""
    right: dict[str, Any] = {
        "depth": torch.ones(1, 1, 2, 1, 1),
        "feat": torch.ones(1, 1, 1, 1, 2),
        "ranks_depth": _array(1, 0),
        "ranks_feat": _array(0, 0),
        "ranks_bev": _array(0, 2),
        "bev_feat_shape": (1, 1, 1, 3, 2),
        "interval_starts": _array(0, 1),
        "interval_lengths": _array(1, 1),
    }
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"depth": None}, "depth: expected a tensor, got NoneType"),
        ({"depth": torch.ones(1, 2, 1, 1)}, r"depth: expected \[B, N, D, H, W\]"),
        ({"feat": torch.ones(1, 1, 1, 1, 2).int()}, "feat: expected one of float16"),
        ({"feat": torch.ones(1, 1, 2, 1, 2)}, r"feat: expected shape \[1, 1, 1, 1, 'C'\] as depth"),
        ({"ranks_depth": torch.ones(2)}, "ranks_depth: expected one of int32, int64, got float32"),
        ({"ranks_feat": _array(0)}, r"ranks_feat: expected \[P\] as ranks_depth, got shape \[1\]"),
        ({"bev_feat_shape": (1, 1, 1, 3, 4)}, r"bev_feat_shape: expected \(B, Z, Y, X, C\) with B=1 and C=2"),
        ({"bev_feat_shape": (1, 1, -1, 3, 2)}, "bev_feat_shape: expected at least 0, got -1"),
        ({"interval_starts": _array(0, 1).view(2, 1)}, r"interval_starts: expected \[I\], got shape \[2, 1\]"),
        ({"interval_lengths": _array(1)}, r"interval_lengths: expected \[I\] as interval_starts, got shape \[1\]"),
        ({"interval_starts": _array(0, 1).to("meta")}, "interval_starts: expected on cpu as depth, got meta"),
    ]
    return [BadCall((), message, right | arguments) for arguments, message in wrong]


register(
    OpInfo(
        name="bev_pool_v2",
        not_applicable=dict.fromkeys(
            ("zero size", "large", "compile dynamic", "export", "AOTInductor"),
            "numbers give the result's shape, and they don't grow with the tensors",
        ),
        not_fuzzed=dict.fromkeys(("fills", "outliers"), "a sum of them keeps nothing of what is smaller"),
        summary="Depth-weighted pooling by BEVDet's five arrays",
        function=bev_pool_v2,
        reference=bev_pool_v2_reference,
        samples=_samples,
        shardings=_shardings,
        bad_calls=_bad_calls,
    )
)
