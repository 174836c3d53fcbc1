"""The specs of `custom_ops.voxel.voxel_grid`: references, samples and wrong calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from custom_ops.registry import BadCall, OpInfo, Sample, Sharding, register
from custom_ops.voxel.voxel_grid import voxel_csr, voxel_rank


def voxel_rank_reference(
    points: Tensor,
    origin: Sequence[float] | Tensor,
    voxel_size: Sequence[float] | Tensor,
    grid_size: Sequence[int],
    batch: Tensor | None = None,
    rounding: str = "floor",
) -> Tensor:
    dtype = torch.float64 if points.dtype == torch.float64 else torch.float32
    origin, voxel_size = (torch.as_tensor(t, dtype=dtype, device=points.device) for t in (origin, voxel_size))
    position = (points.detach().to(dtype) - origin) / voxel_size
    cell = position.trunc() if rounding == "trunc" else position.floor()
    grid = torch.tensor(tuple(grid_size), device=points.device)
    inside = ((cell >= 0) & (cell < grid)).all(-1)
    x, y, z = cell.where(inside[..., None], 0).long().unbind(-1)
    rank = (x * grid[1] + y) * grid[2] + z
    if batch is not None:
        inside = inside & (batch >= 0)
        rank = rank + batch * grid.prod()
    return rank.where(inside, -1)


def voxel_csr_reference(rank: Tensor, num_voxels: int) -> tuple[Tensor, Tensor]:
    key = torch.where(rank < 0, num_voxels, rank.long())
    ordered, perm = key.sort(dim=-1, stable=True)
    edges = torch.arange(num_voxels + 1, device=rank.device).expand(*rank.shape[:-1], -1).contiguous()
    return perm, torch.searchsorted(ordered.contiguous(), edges)


def _points(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    points = (torch.rand(9, 3, dtype=torch.float64) * 6 - 1).to(device, dtype)
    points[0] = float("nan")
    points[1] = -0.25
    # Every dtype can represent these numbers, so the grid doesn't depend on their rounding.
    grid = ((-0.5, 0.0, -0.25), (1.5, 0.5, 2.0), (3, 7, 2))
    batch = torch.arange(9, device=device) % 4 - 1
    corner = [torch.tensor(t, dtype=torch.float64, device=device) for t in grid[:2]]
    return [
        Sample((points, *grid), dynamic={0: 0}),
        Sample((points, *grid, batch), dynamic={0: 0, 4: 0}),
        Sample((points.reshape(3, 3, 3), *grid), {"rounding": "trunc"}),
        Sample((points.reshape(3, 3, 3), *corner, grid[2], batch.reshape(3, 3).int()), {"rounding": "trunc"}),
    ]


def _ranks(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    rank = torch.randint(-2, 5, (2, 9), device=device)
    return [
        Sample((rank[0], 5), dynamic={0: 0}),
        Sample((rank, 6)),
        Sample((rank.int(), 5)),
        Sample((rank[:, :0], 3)),
        Sample((rank.clamp(max=-1), 0)),
        Sample((rank.clamp(min=0, max=0), 1)),
    ]


_p, _rank = torch.ones(2, 3), torch.tensor([0, 1, -1])

_one = (1, 1, 1)

register(
    OpInfo(
        name="voxel_rank",
        differentiable=False,
        summary="The number of the voxel that each point lies in",
        function=voxel_rank,
        reference=voxel_rank_reference,
        samples=_points,
        shardings=lambda: [
            Sharding("points", Sample((torch.rand(9, 3), (0, 0, 0), (0.5, 0.5, 0.5), (2, 2, 1))), {0: 0}, 0),
            Sharding(
                "points of examples",
                Sample((torch.rand(2, 9, 3), (0, 0, 0), (0.5, 0.5, 0.5), (2, 2, 1), torch.arange(9) % 3 - 1)),
                {0: 1},
                1,
            ),
        ],
        bad_calls=lambda: [
            BadCall(([1, 2, 3], _one, _one, _one), "points: expected a tensor, got list"),
            BadCall((_p.int(), _one, _one, _one), "points: expected one of float16"),
            BadCall((_p[:, :2], _one, _one, _one), r"points: expected \[..., 3\], got shape \[2, 2\]"),
            BadCall((_p, (0, 0), _one, _one), r"origin: expected 3 numbers, got \(0, 0\)"),
            BadCall((_p, _p, _one, _one), r"origin: expected 3 numbers, got shape \[2, 3\]"),
            BadCall((_p, _one, ("a", 1, 1), _one), "voxel_size: expected a number, got str"),
            BadCall((_p, _one, (1, 0, 1), _one), "voxel_size: expected positive numbers"),
            BadCall((_p, _one, _one, (1, 2)), "grid_size: expected 3 numbers"),
            BadCall((_p, _one, _one, (1, 2, -1)), "grid_size: expected at least 0, got -1"),
            BadCall((_p, _one, _one, (1, 2, 1.0)), "grid_size: expected an integer, got float"),
            BadCall((_p, _one, _one, _one, _p[:, 0]), "batch: expected one of int32, int64, got float32"),
            BadCall((_p, _one, _one, _one, torch.arange(3)), r"batch: expected a shape that broadcasts to \[2\]"),
            BadCall((_p, _one, _one, _one, None, "round"), "rounding: expected one of 'floor', 'trunc', got 'round'"),
            BadCall((_p, torch.ones(3).to("meta"), _one, _one), "origin: expected on cpu as points, got meta"),
        ],
    )
)

register(
    OpInfo(
        name="voxel_csr",
        differentiable=False,
        summary="Points sorted by voxel, reusable where the geometry is",
        function=voxel_csr,
        reference=voxel_csr_reference,
        samples=_ranks,
        bad_calls=lambda: [
            BadCall((None, 3), "rank: expected a tensor, got NoneType"),
            BadCall((_rank.float(), 3), "rank: expected one of int32, int64, got float32"),
            BadCall((_rank[0], 3), r"rank: expected \[..., N\], got a scalar"),
            BadCall((_rank, 1.5), "num_voxels: expected an integer, got float"),
            BadCall((_rank, -1), "num_voxels: expected at least 0, got -1"),
        ],
    )
)
