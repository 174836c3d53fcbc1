"""The specs of `custom_ops.voxel.segments`: references, samples and wrong calls."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.registry import BadCall, OpInfo, Sample, Sharding, register
from custom_ops.voxel.segments import segment_reduce, segment_softmax


def reduce_rows(x: Tensor, reduce: str) -> Tensor:
    """Reduce the rows [n, C] of one segment by torch's own ops."""
    if len(x) == 0:
        empty = {"logsumexp": float("-inf"), "prod": 1}.get(reduce, 0)
        return x.new_full(x.shape[1:], empty) + x.sum(0).where(torch.tensor(False, device=x.device), 0)
    if reduce in ("min", "max"):
        return (x.min(0) if reduce == "min" else x.max(0)).values
    if reduce in ("var", "std") and len(x) == 1:
        return 0 * x[0]
    if reduce == "logsumexp":
        # Beside large numbers torch's own derivative loses the logarithm of the number of equal ones.
        top = x.detach().amax(0)
        top = torch.where(top.isfinite(), top, 0)
        return top + (x - top).exp().sum(0).log()
    result: Tensor = getattr(x, reduce)(0)
    return result


def _examples(x: Tensor, indptr: Tensor, perm: Tensor | None) -> list[tuple[Tensor, Tensor, list[int]]]:
    """Return, for each example, its points [N, C], the places of those in segments, and the length of each segment."""
    shape, points = x.shape[:-2], x.shape[-2]
    order = torch.arange(points, device=x.device) if perm is None else perm.long()
    orders = order.expand(*shape, points).reshape(-1, points)
    bounds = indptr.expand(*shape, indptr.shape[-1]).reshape(-1, indptr.shape[-1])
    return [
        (example, order[ends[0] : ends[-1]], ends.diff().tolist())
        for example, order, ends in zip(x.reshape(-1, *x.shape[-2:]), orders, bounds)
    ]


def segment_reduce_reference(
    x: Tensor, indptr: Tensor, reduce: str = "sum", perm: Tensor | None = None, return_indices: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    examples = _examples(x, indptr, perm)
    rows = [reduce_rows(part, reduce) for e, order, lengths in examples for part in e[order].split(lengths)]
    shape = (*x.shape[:-2], indptr.shape[-1] - 1, x.shape[-1])
    values = torch.stack(rows).view(shape) if rows else x.sum(-2, keepdim=True)[..., :0, :].expand(shape)
    if not return_indices:
        return values
    parts = [
        pair
        for e, order, lengths in examples
        for pair in zip(e[order].split(lengths), order.split(lengths), strict=True)
    ]
    places = [
        points[((part == value) | part.isnan()).int().argmax(0)] if len(points) else points.new_full(value.shape, -1)
        for (part, points), value in zip(parts, rows)
    ]
    return values, torch.stack(places).view(shape)


def _softmax(x: Tensor) -> Tensor:
    dead = (x == float("-inf")).all(0)
    return x.where(~dead, 0).softmax(0).where(~dead, 0)


def segment_softmax_reference(x: Tensor, indptr: Tensor, perm: Tensor | None = None) -> Tensor:
    results = []
    for example, order, lengths in _examples(x, indptr, perm):
        of_points = torch.cat([example[:0], *map(_softmax, example[order].split(lengths))])
        outside = example.where(torch.tensor(False, device=x.device), 0)
        results.append(outside.index_copy(0, order, of_points))
    return torch.stack(results).view(x.shape) if results else x.clone()


def _leaf(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(device, dtype).requires_grad_()


def _zeros(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Return points of which one and two are 0 in the first segments of two examples."""
    x = torch.randn(shape, dtype=torch.float64)
    x[0, 1, 0] = x[0, :2, 1] = x[1, 3:5] = 0
    return x.to(device, dtype).requires_grad_()


def _geometry(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return boundaries, the same for two examples, and orders of 7 points in each."""
    indptr = torch.tensor([0, 3, 3, 5, 6], device=device)
    both = torch.stack([indptr, torch.tensor([0, 0, 1, 7, 7], device=device)])
    return indptr, both, torch.stack([torch.randperm(7) for _ in range(2)]).to(device)


def _reductions(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    indptr, both, perm = _geometry(device)
    filled = torch.tensor([0, 3, 5, 7], device=device)
    return [
        Sample((_leaf(device, dtype, 7, 2), indptr, "min", perm[0])),
        Sample((_leaf(device, dtype, 7, 3), filled, "logsumexp"), dynamic={0: 0}),
        Sample((_leaf(device, dtype, 2, 7, 1), both, "max", perm), {"return_indices": True}),
        Sample((_leaf(device, dtype, 2, 7, 2), filled, "std")),
        Sample((_leaf(device, dtype, 7, 2), indptr.int(), "var", perm[1].int())),
        Sample((_zeros(device, dtype, 2, 7, 2), indptr, "prod"), dynamic={1: 0}),
        Sample((_leaf(device, dtype, 2, 7, 1), both, "prod", perm)),
        Sample((_leaf(device, dtype, 2, 7, 1), both, "mean", perm)),
    ]


def _softmaxes(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    indptr, both, perm = _geometry(device)
    return [
        Sample((_leaf(device, dtype, 7, 3), indptr, perm[0])),
        Sample((_leaf(device, dtype, 7, 2), indptr), dynamic={0: 0}),
        Sample((_leaf(device, dtype, 2, 7, 1), both, perm)),
        Sample((_leaf(device, dtype, 2, 7, 2), indptr)),
    ]


def _shardings(op: str) -> list[Sharding]:
    x = torch.randn(2, 9, 4, requires_grad=True)
    both = torch.tensor([[0, 3, 4, 8], [0, 1, 8, 9]])
    perm = torch.stack([torch.randperm(9) for _ in range(2)])
    call = Sample((x, both, "max", perm) if op == "reduce" else (x, both, perm))
    return [Sharding("examples", call, {0: 0}, 0), Sharding("columns", call, {0: 2}, 2)]


def _same_bad_calls(*between: str) -> list[BadCall]:
    """Return the wrong calls of both ops; ``between`` stand before ``perm``."""
    x, indptr, perm = torch.ones(3, 2), torch.tensor([0, 1, 3]), torch.tensor([2, 0, 1])
    return [
        BadCall((None, indptr, *between), "x: expected a tensor, got NoneType"),
        BadCall((x[0, 0], indptr, *between), r"x: expected \[..., N, C\], got shape \[\]"),
        BadCall((x, indptr.float(), *between), "indptr: expected one of int32, int64, got float32"),
        BadCall((x, indptr[:0], *between), "indptr: expected at least one boundary"),
        BadCall((x, indptr, *between, perm[1:]), "perm: expected 3 points as in x, got 2"),
        BadCall((x, indptr.to("meta"), *between), "indptr: expected on cpu as x, got meta"),
    ]


_x, _indptr = torch.ones(3, 2), torch.tensor([0, 1, 3])

register(
    OpInfo(
        name="segment_reduce",
        not_fuzzed=dict.fromkeys(("fills", "outliers"), "a sum of them keeps nothing of what is smaller"),
        summary="Mean, product, minimum, maximum, logarithm of a sum of exponentials, or variance over segments",
        function=segment_reduce,
        reference=segment_reduce_reference,
        samples=_reductions,
        shardings=lambda: _shardings("reduce"),
        bad_calls=lambda: [
            *_same_bad_calls("max"),
            BadCall((_x, _indptr, "median"), "reduce: expected one of 'sum', 'mean', 'prod', 'min', 'max'"),
            BadCall((_x.int(), _indptr, "mean"), "x: expected one of float16"),
            BadCall(
                (_x, _indptr, "mean", None, True), "return_indices: expected False, as no single point has the mean"
            ),
            BadCall((_x, _indptr, "max", None, "yes"), "return_indices: expected True or False, got 'yes'"),
        ],
    )
)

register(
    OpInfo(
        name="segment_softmax",
        summary="Softmax over segments of points in any order",
        function=segment_softmax,
        reference=segment_softmax_reference,
        samples=_softmaxes,
        shardings=lambda: _shardings("softmax"),
        bad_calls=lambda: [*_same_bad_calls(), BadCall((_x.int(), _indptr), "x: expected one of float16")],
    )
)
