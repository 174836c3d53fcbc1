"""The specs of `custom_ops.voxel.pooling`: references, samples and wrong calls."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.registry import BadCall, OpInfo, Sample, Sharding, register
from custom_ops.voxel.pooling import BEVPool, bev_pool
from custom_ops.voxel.specs.sums import voxel_sum_reference


def bev_pool_reference(
    depth: Tensor,
    feat: Tensor,
    rank: Tensor,
    num_voxels: int,
    csr: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    rank = rank if mask is None else rank.masked_fill(~mask.expand(depth.shape), -1)
    frustum = depth[:, :, :, None] * feat[:, :, None]  # [B, N, D, C, H, W]
    points = frustum.movedim(3, -1).flatten(1, 4)
    return voxel_sum_reference(points, rank.flatten(-4).expand(points.shape[:-1]), num_voxels)


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(device, dtype).requires_grad_()

    rank = torch.randint(-1, 5, (2, 2, 3, 1, 2), device=device)
    wide = torch.randint(-1, 5, (2, 1, 3, 1, 4), device=device)
    return [
        Sample((leaf(2, 1, 3, 1, 4), leaf(2, 1, 5, 1, 4), wide, 5), dynamic={0: 0, 1: 0, 2: 0}),
        Sample((leaf(2, 2, 3, 1, 2), leaf(2, 2, 1, 1, 2), rank[0].int(), 6)),
        Sample((leaf(1, 1, 3, 1, 2), leaf(1, 1, 1, 1, 2).detach(), rank[0, :1], 5), {"mask": rank[0, :1] != 1}),
        Sample((leaf(1, 1, 3, 1, 2).detach(), leaf(1, 1, 1, 1, 2), rank[:1, :1], 5)),
    ]


def _shardings() -> list[Sharding]:
    depth, feat = torch.rand(2, 3, 4, 1, 2, requires_grad=True), torch.randn(2, 3, 5, 1, 2, requires_grad=True)
    rank = torch.randint(-1, 5, depth.shape)
    call = Sample((depth, feat, rank, 5))
    return [
        Sharding("examples", call, {0: 0, 1: 0, 2: 0}, 0),
        Sharding("cameras", call, {0: 1, 1: 1, 2: 1}, "partial"),
        Sharding("cameras, all examples alike", Sample((depth, feat, rank[0], 5)), {0: 1, 1: 1}, "partial"),
        Sharding("depths", call, {0: 2}, "partial", {"all_reduce": 1}),
        Sharding("cameras, masked", Sample((*call.args, None, depth > 0.3)), {0: 1, 1: 1, 2: 1, 5: 1}, "partial"),
        Sharding("channels", call, {1: 2}, 2, {"all_reduce": 1}),
    ]


_depth, _feat, _rank = torch.ones(1, 2, 3, 1, 2), torch.ones(1, 2, 4, 1, 2), torch.zeros(2, 3, 1, 2, dtype=torch.int64)

register(
    OpInfo(
        name="bev_pool",
        not_fuzzed=dict.fromkeys(("fills", "outliers"), "a sum of them keeps nothing of what is smaller"),
        summary="Depth-weighted pooling of image features into a grid, fused",
        function=bev_pool,
        reference=bev_pool_reference,
        samples=_samples,
        shardings=_shardings,
        modules=lambda: [(BEVPool(5), {"num_voxels": 5})],
        bad_calls=lambda: [
            BadCall((None, _feat, _rank, 2), "depth: expected a tensor, got NoneType"),
            BadCall((_depth.int(), _feat, _rank, 2), "depth: expected one of float16"),
            BadCall((_depth[0], _feat, _rank, 2), r"depth: expected \[B, N, D, H, W\], got shape"),
            BadCall((_depth, _feat[0], _rank, 2), r"feat: expected \[B, N, C, H, W\], got shape"),
            BadCall((_depth, _feat[..., 1:], _rank, 2), r"feat: expected shape \[1, 2, 'C', 1, 2\] as depth"),
            BadCall((_depth, _feat, _rank.float(), 2), "rank: expected one of int32, int64, got float32"),
            BadCall((_depth, _feat, _rank[0], 2), r"rank: expected shape \[1, 2, 3, 1, 2\] or \[2, 3, 1, 2\], got"),
            BadCall((_depth, _feat, _rank, -2), "num_voxels: expected at least 0, got -2"),
            BadCall((_depth, _feat, _rank, 2, 3), r"csr: expected \(perm, indptr\) as from voxel_csr, got int"),
            BadCall((_depth, _feat, _rank, 2, None, _rank), "mask: expected one of bool, got int64"),
            BadCall(
                (_depth, _feat, _rank, 2, None, _rank[..., :0] > 0),
                r"mask: expected a shape that broadcasts to \[1, 2, 3, 1, 2\], got \[2, 3, 1, 0\]",
            ),
            BadCall((_depth, _feat, _rank, 2, (_rank, _rank), _rank > 0), "mask: expected None with csr"),
            BadCall((_depth, _feat.to("meta"), _rank, 2), "feat: expected on cpu as depth, got meta"),
        ],
    )
)
