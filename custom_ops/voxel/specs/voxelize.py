"""The specs of `custom_ops.voxel.voxelize`: references, samples and wrong calls."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.registry import BadCall, OpInfo, Sample, register
from custom_ops.voxel.specs.voxel_grid import voxel_csr_reference
from custom_ops.voxel.voxelize import _NOT_SHARDED, Voxels, hard_voxelize, voxelize


def voxelize_reference(rank: Tensor, max_voxels: int | None = None) -> Voxels:
    if rank.dim() > 1:
        examples = [voxelize_reference(example, max_voxels) for example in rank]
        return Voxels(*(torch.stack(parts) for parts in zip(*examples)))
    inside = rank >= 0
    ranks, number = rank[inside].long().unique(return_inverse=True)
    inverse = torch.full_like(rank, -1, dtype=torch.int64)
    inverse[inside] = number
    if max_voxels is not None:
        ranks = torch.nn.functional.pad(ranks[:max_voxels], (0, max(max_voxels - len(ranks), 0)), value=-1)
        inverse[inverse >= max_voxels] = -1
    perm, indptr = voxel_csr_reference(inverse, len(ranks))
    return Voxels(ranks, inverse, indptr.diff(), perm, indptr)


def hard_voxelize_reference(
    points: Tensor, rank: Tensor, max_points: int, max_voxels: int | None = None, padded: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Take one point after the other, as mmcv does."""
    if rank.dim() > 1:
        examples = [hard_voxelize_reference(p, r, max_points, max_voxels) for p, r in zip(points, rank)]
        voxels, ranks, counts = (torch.stack(parts) for parts in zip(*examples))
        return voxels, ranks, counts
    members: dict[int, list[int]] = {}
    for point, voxel in enumerate(rank.tolist()):
        known = voxel in members or max_voxels is None or len(members) < max_voxels
        if voxel >= 0 and known and len(members.setdefault(voxel, [])) < max_points:
            members[voxel].append(point)
    count = max_voxels if padded and max_voxels is not None else len(members)
    listed = [*members.values(), *[[]] * (count - len(members))]
    index = [row + [len(rank)] * (max_points - len(row)) for row in listed]  # an extra point of zeros
    rows = torch.cat([points, torch.zeros_like(points[:1]) if len(points) else points.new_zeros(1, points.shape[1])])
    at = torch.tensor(index, dtype=torch.int64, device=rank.device).view(count, max_points)
    ranks = torch.tensor([*members, *[-1] * (count - len(members))], dtype=torch.int64, device=rank.device)
    return rows[at], ranks, torch.tensor([len(row) for row in listed], dtype=torch.int64, device=rank.device)


def _ranks(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    rank = torch.randint(-2, 5, (2, 9), device=device)
    return [
        Sample((3 * rank[0],), dynamic={0: 0}),
        Sample((rank, 3)),
        Sample((rank[0].int(), 7)),
        Sample((rank[0] * 2**40,)),
        Sample((rank[0, :0],)),
        Sample((rank.clamp(max=-1), 2)),
    ]


def _points(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(device, dtype).requires_grad_()

    rank = torch.randint(-1, 4, (2, 9), device=device)
    return [
        Sample((leaf(9, 3), rank[0], 2, 5), dynamic={0: 0, 1: 0}),
        Sample((leaf(9, 2), 5 * rank[1], 3)),
        Sample((leaf(2, 9, 1), rank.int(), 2, 3)),
        Sample((leaf(2, 9, 2), rank, 4, 6)),
        Sample((leaf(9, 2), rank[0], 2, 3), {"padded": False}),
    ]


_rank, _x = torch.tensor([0, 1, -1]), torch.ones(3, 2)

register(
    OpInfo(
        name="voxelize",
        differentiable=False,
        summary="The voxels that have points, and the points of each",
        function=voxelize,
        reference=voxelize_reference,
        samples=_ranks,
        not_sharded=_NOT_SHARDED,
        bad_calls=lambda: [
            BadCall((None,), "rank: expected a tensor, got NoneType"),
            BadCall((_rank.float(),), "rank: expected one of int32, int64, got float32"),
            BadCall((_rank[0],), r"rank: expected \[..., N\], got a scalar"),
            BadCall((_rank[None],), r"max_voxels: expected a number for ranks of shape \[1, 3\]"),
            BadCall((_rank, -1), "max_voxels: expected at least 0, got -1"),
            BadCall((_rank, 1.5), "max_voxels: expected an integer, got float"),
        ],
    )
)

register(
    OpInfo(
        name="hard_voxelize",
        summary="A limited number of points of each voxel, in the order of points",
        function=hard_voxelize,
        reference=hard_voxelize_reference,
        samples=_points,
        not_sharded=_NOT_SHARDED,
        bad_calls=lambda: [
            BadCall((None, _rank, 2), "points: expected a tensor, got NoneType"),
            BadCall((_x.int(), _rank, 2), "points: expected one of float16"),
            BadCall((_x, _rank.float(), 2), "rank: expected one of int32, int64, got float32"),
            BadCall((_x, _rank[1:], 2), r"points: expected \[..., N, C\] with a rank for each point"),
            BadCall((_x, _rank, 0), "max_points: expected at least 1, got 0"),
            BadCall((_x, _rank, 2, -1), "max_voxels: expected at least 0, got -1"),
            BadCall((_x[None], _rank[None], 2, 3, False), "padded: expected True for ranks of shape"),
            BadCall((_x, _rank, 2, 3, 1), "padded: expected True or False, got 1"),
            BadCall((_x[None], _rank[None], 2), "max_voxels: expected a number for ranks of shape"),
            BadCall((_x, _rank.to("meta"), 2), "rank: expected on cpu as points, got meta"),
        ],
    )
)
