"""The specs of `custom_ops.voxel.sums`: references, samples and wrong calls."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.registry import BadCall, OpInfo, Sample, Sharding, register
from custom_ops.voxel.sums import VoxelSum, voxel_sum
from custom_ops.voxel.voxelize import voxel_gather


def voxel_sum_reference(
    x: Tensor,
    rank: Tensor,
    num_voxels: int,
    reduce: str = "sum",
    mask: Tensor | None = None,
    csr: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    shape = torch.broadcast_shapes(x.shape[:-1], rank.shape, x.shape[:-1] if mask is None else mask.shape)
    x, rank = x.expand(*shape, x.shape[-1]), rank.expand(shape)
    inside = rank >= 0 if mask is None else (rank >= 0) & mask
    # Points outside go to an extra voxel at the end, which is dropped.
    at = torch.where(inside, rank, num_voxels).long()[..., None].expand(x.shape)
    zeros = x.new_zeros((*x.shape[:-2], num_voxels + 1, x.shape[-1]))
    if reduce == "max":
        # Only the first of the largest points gets the gradient; equal ones don't share it.
        largest = zeros.scatter_reduce(-2, at, x.detach(), "amax", include_self=False).gather(-2, at)
        points = torch.arange(x.shape[-2], device=x.device)[:, None].expand(x.shape)
        candidate = torch.where((x == largest) | x.isnan(), points, x.shape[-2])
        first = torch.full_like(at.new_empty(zeros.shape), x.shape[-2]).scatter_reduce(-2, at, candidate, "amin")
        return zeros.scatter_add(-2, at, x.where(points == first.gather(-2, at), 0))[..., :-1, :]
    sums = zeros.scatter_add(-2, at, x.where(inside[..., None], 0))
    if reduce == "mean":
        sums = sums / torch.zeros_like(sums).scatter_add(-2, at, torch.ones_like(x)).clamp_min(1)
    return sums[..., :-1, :]


def voxel_gather_reference(x: Tensor, rank: Tensor, csr: tuple[Tensor, Tensor] | None = None) -> Tensor:
    rank = rank.long().expand(*x.shape[:-2], rank.shape[-1])
    rows = torch.nn.functional.pad(x, (0, 0, 0, 1))  # an extra row of zeros
    at = torch.where(rank < 0, x.shape[-2], rank)[..., None]
    return rows.gather(-2, at.expand(*at.shape[:-1], x.shape[-1]))


def _gathers(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    rank = torch.randint(-1, 4, (2, 8), device=device)
    return [
        Sample((_leaf(device, dtype, 4, 3), rank[0]), dynamic={1: 0}),
        Sample((_leaf(device, dtype, 2, 5, 2), rank.int())),
        Sample((_leaf(device, dtype, 2, 4, 1), rank[1])),
    ]


def _sharded_gathers() -> list[Sharding]:
    call = Sample((torch.randn(2, 5, 4, requires_grad=True), torch.randint(-1, 5, (2, 9))))
    return [Sharding("examples", call, {0: 0, 1: 0}, 0), Sharding("columns", call, {0: 2}, 2)]


def _leaf(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(device, dtype).requires_grad_()


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(device, dtype).requires_grad_()

    rank = torch.randint(-1, 4, (2, 8), device=device)
    mask = torch.rand(2, 8, device=device) > 0.3
    return [
        Sample((leaf(8, 3), rank[0], 4), dynamic={0: 0, 1: 0}),
        Sample((leaf(8, 2), rank[1], 4, "mean"), dynamic={0: 0, 1: 0}),
        Sample((leaf(8, 2), rank[0].int(), 4, "max"), dynamic={0: 0, 1: 0}),
        Sample((leaf(2, 8, 1), rank, 5, "sum", mask)),
        Sample((leaf(2, 8, 1), rank[0], 4, "mean", mask)),
        Sample((leaf(2, 8, 2), rank, 4, "max", mask)),
        Sample((leaf(3, 2), rank[0, :3].clamp(min=0, max=0), 1)),
    ]


def _shardings() -> list[Sharding]:
    x, rank = torch.randn(2, 9, 4, requires_grad=True), torch.randint(-1, 5, (2, 9))
    alone, mask = x[0].detach().requires_grad_(), torch.rand(2, 9) > 0.3
    return [
        Sharding("points", Sample((alone, rank[0], 5)), {0: 0, 1: 0}, "partial"),
        Sharding("points, ranks whole", Sample((x, rank, 5, "sum", mask)), {0: 1}, "partial"),
        Sharding(
            "points, their mean", Sample((x, rank[0], 5, "mean", mask)), {0: 1, 1: 0}, "partial", {"all_reduce": 1}
        ),
        Sharding("examples", Sample((x, rank, 5, "mean", mask)), {0: 0, 1: 0, 4: 0}, 0),
        Sharding("examples, their maximum", Sample((x, rank, 5, "max")), {0: 0, 1: 0}, 0),
        Sharding("columns", Sample((x, rank[0], 5)), {0: 2}, 2),
        Sharding("columns, their maximum", Sample((alone, rank[0], 5, "max")), {0: 1}, 1),
    ]


_x, _rank = torch.ones(3, 2), torch.tensor([0, 1, -1])

_csr = (torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]))

register(
    OpInfo(
        name="voxel_sum",
        not_fuzzed=dict.fromkeys(("fills", "outliers"), "a sum of them keeps nothing of what is smaller"),
        summary="Sum, mean or maximum of the features in each voxel of a grid, for points in any order",
        function=voxel_sum,
        reference=voxel_sum_reference,
        samples=_samples,
        shardings=_shardings,
        modules=lambda: [
            (VoxelSum(4), {"num_voxels": 4}),
            (VoxelSum(6, "max"), {"num_voxels": 6, "reduce": "max"}),
        ],
        bad_calls=lambda: [
            BadCall((None, _rank, 2), "x: expected a tensor, got NoneType"),
            BadCall((_x.int(), _rank, 2, "mean"), "x: expected one of float16"),
            BadCall((_x > 0, _rank, 2), "x: expected one of float16"),
            BadCall((_x[0, 0], _rank, 2), r"x: expected \[..., N, C\], got shape \[\]"),
            BadCall((_x, _rank.float(), 2), "rank: expected one of int32, int64, got float32"),
            BadCall((_x, _rank[1:], 2), r"rank: expected shape \[3\], got \[2\]"),
            BadCall((_x, _rank, -1), "num_voxels: expected at least 0, got -1"),
            BadCall((_x, _rank, 2.0), "num_voxels: expected an integer, got float"),
            BadCall((_x, _rank, 2, "median"), "reduce: expected one of 'sum', 'mean', .*, got 'median'"),
            BadCall((_x, _rank, 2, "sum", _rank), "mask: expected one of bool, got int64"),
            BadCall((_x, _rank, 2, "sum", _rank[1:] > 0), r"mask: expected shape \[3\]"),
            BadCall((_x, _rank, 2, "sum", _rank > 0, _csr), "mask: expected None with csr"),
            BadCall(
                (_x, _rank, 2, "sum", None, _rank), r"csr: expected \(perm, indptr\) as from voxel_csr, got Tensor"
            ),
            BadCall((_x, _rank, 3, "sum", None, _csr), r"csr: expected perm \[3\] and indptr \[4\]"),
            BadCall((_x, _rank.to("meta"), 2), "rank: expected on cpu as x, got meta"),
        ],
        variants=(
            OpInfo(
                name="voxel_gather",
                summary="The features of each point's voxel",
                function=voxel_gather,
                reference=voxel_gather_reference,
                samples=_gathers,
                shardings=_sharded_gathers,
                bad_calls=lambda: [
                    BadCall((None, _rank), "x: expected a tensor, got NoneType"),
                    BadCall((_x, _rank.float()), "rank: expected one of int32, int64, got float32"),
                    BadCall((_x[0], _rank), r"x: expected \[..., V, C\], got shape \[2\]"),
                    BadCall(
                        (_x, _rank[None]), r"rank: expected \[..., N\] with the leading dimensions \[\] of x or none"
                    ),
                    BadCall((_x, _rank, _rank), r"csr: expected \(perm, indptr\) as from voxel_csr, got Tensor"),
                    BadCall((_x, _rank.to("meta")), "rank: expected on cpu as x, got meta"),
                ],
            ),
        ),
    )
)
