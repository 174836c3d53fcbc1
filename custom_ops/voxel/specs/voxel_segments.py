"""Evidence for `custom_ops.voxel.voxel_segments`: references, samples and wrong calls."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.registry import BadCall, OpInfo, Sample, Sharding, register
from custom_ops.voxel.voxel_segments import segment_sum


def segment_sum_reference(
    x: Tensor, indptr: Tensor, perm: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    shape, points = x.shape[:-2], x.shape[-2]
    examples = x.reshape(-1, points, x.shape[-1])
    indptr = indptr.expand(*shape, indptr.shape[-1]).reshape(-1, indptr.shape[-1])
    order = torch.arange(points, device=x.device) if perm is None else perm
    order = order.expand(*shape, points).reshape(-1, points)
    values = examples if weight is None else weight.expand(x.shape[:-1]).reshape(-1, points, 1) * examples
    out = values.new_zeros(len(examples), indptr.shape[-1] - 1, x.shape[-1])
    sums = []
    for e in range(len(examples)):
        counts = indptr[e].diff()
        segment = torch.arange(len(counts), device=x.device).repeat_interleave(counts)
        chosen = order[e, indptr[e, 0] : indptr[e, -1]]
        sums.append(out[e].index_add(0, segment, values[e].index_select(0, chosen)))
    return torch.stack(sums).view(*shape, *out.shape[1:]) if sums else out.view(*shape, *out.shape[1:])


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(device, dtype).requires_grad_()

    indptr = torch.tensor([0, 3, 3, 5, 6], device=device)
    perm = torch.stack([torch.randperm(7) for _ in range(2)]).to(device)
    both = torch.stack([indptr, torch.tensor([0, 0, 0, 7, 7], device=device)])
    return [
        Sample((leaf(7, 3), indptr, perm[0], leaf(7))),
        Sample((leaf(7, 3), indptr), dynamic={1: 0}),
        Sample((leaf(2, 7, 1), both, perm)),
        Sample((leaf(2, 7, 2), indptr, None, leaf(2, 7))),
        Sample((leaf(7, 1).detach(), indptr, perm[1]), {"weight": leaf(7)}),
    ]


def _shardings() -> list[Sharding]:
    x = torch.randn(2, 9, 4, requires_grad=True)
    indptr, perm = torch.tensor([0, 3, 3, 8, 9]), torch.stack([torch.randperm(9) for _ in range(2)])
    alone = x[0].detach().requires_grad_()
    weight = torch.randn(2, 9, requires_grad=True)
    weighted = Sample((x, indptr.expand(2, 5).contiguous(), perm, weight))
    return [
        Sharding("points", Sample((alone, indptr)), {0: 0}, "partial"),
        Sharding("points in any order", Sample((alone, indptr, perm[0])), {0: 0}, "partial"),
        Sharding("points of examples", weighted, {0: 1, 3: 1}, "partial"),
        Sharding("examples", weighted, {0: 0, 3: 0}, 0),
        Sharding("columns", weighted, {0: 2}, 2, {"all_reduce": 1}),
    ]


_x, _indptr, _perm = torch.ones(3, 2), torch.tensor([0, 1, 3]), torch.tensor([2, 0, 1])

register(
    OpInfo(
        name="segment_sum",
        not_fuzzed=dict.fromkeys(("fills", "outliers"), "a sum of them keeps nothing of what is smaller"),
        summary="Weighted sums over segments of points in any order",
        function=segment_sum,
        reference=segment_sum_reference,
        samples=_samples,
        shardings=_shardings,
        bad_calls=lambda: [
            BadCall((None, _indptr), "x: expected a tensor, got NoneType"),
            BadCall((_x[0, 0], _indptr), r"x: expected \[..., N, C\], got shape \[\]"),
            BadCall((_x, _indptr.float()), "indptr: expected one of int32, int64, got float32"),
            BadCall((_x, _indptr[:0]), "indptr: expected at least one boundary"),
            BadCall((_x, _indptr.expand(2, 3)), r"indptr: expected \[..., V \+ 1\] with the leading dimensions \[\]"),
            BadCall((_x, _indptr, _perm[1:]), "perm: expected 3 points as in x, got 2"),
            BadCall((_x, _indptr, _perm.expand(2, 3)), "perm: expected"),
            BadCall(
                (_x, _indptr, _perm, _perm), "weight: expected one of float16, bfloat16, float32, float64, got int64"
            ),
            BadCall((_x, _indptr, _perm, _x), r"weight: expected shape \[3\]"),
            BadCall((_x, _indptr.to("meta")), "indptr: expected on cpu as x, got meta"),
        ],
    )
)
