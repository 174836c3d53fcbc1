"""The specs of `custom_ops.ranking.contrastive`: references, samples and wrong calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops.ranking.contrastive import (
    InfoNCELoss,
    SigmoidContrastiveLoss,
    info_nce_loss,
    sigmoid_contrastive_loss,
)
from custom_ops.ranking.specs.catalogue import NOT_FUZZED, drawn_tensors
from custom_ops.registry import BadCall, OpInfo, Sample, Sharding, register


def info_nce_loss_reference(
    query: Tensor,
    key: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor,
    symmetric: bool = True,
    mask: Tensor | None = None,
    query_group: Tensor | None = None,
    key_group: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    own = torch.arange(len(query), device=query.device) if target is None else target.long()
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), torch.float32)
    divisor = torch.as_tensor(temperature, dtype=dtype, device=query.device)
    z = query.to(dtype) @ key.to(dtype).T / torch.where(divisor > 0, divisor, torch.nan)
    out = torch.zeros_like(z, dtype=torch.bool) if mask is None else ~mask
    if query_group is not None:
        out = out | (query_group.unsqueeze(1) == (query_group if key_group is None else key_group))
    is_own = own.unsqueeze(1) == torch.arange(len(key), device=query.device)
    loss = -z.masked_fill(out & ~is_own, -torch.inf).log_softmax(1).gather(1, own.unsqueeze(1)).squeeze(1)
    if symmetric:
        is_mine = torch.eye(len(query), dtype=torch.bool, device=query.device)
        turned = z[:, own].masked_fill(out[:, own] & ~is_mine, -torch.inf)
        loss = (loss - turned.log_softmax(0).diagonal()) / 2
    if reduction != "none":
        loss = loss.sum() / (max(len(query), 1) if reduction == "mean" else 1)
    return loss.to(torch.promote_types(query.dtype, key.dtype))


def sigmoid_contrastive_loss_reference(
    query: Tensor,
    key: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor,
    bias: float | Tensor = 0.0,
    positive: Tensor | None = None,
    mask: Tensor | None = None,
    query_group: Tensor | None = None,
    key_group: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), torch.float32)
    divisor, shift = (torch.as_tensor(number, dtype=dtype, device=query.device) for number in (temperature, bias))
    z = query.to(dtype) @ key.to(dtype).T / torch.where(divisor > 0, divisor, torch.nan) + shift
    if positive is None:
        own = torch.arange(len(query), device=query.device) if target is None else target.long()
        positive = own.unsqueeze(1) == torch.arange(len(key), device=query.device)
    out = torch.zeros_like(positive) if mask is None else ~mask
    if query_group is not None:
        out = out | (query_group.unsqueeze(1) == (query_group if key_group is None else key_group))
    of_pairs = -torch.nn.functional.logsigmoid(torch.where(positive, z, -z))
    loss = torch.where(out & ~positive, 0, of_pairs).sum(1)
    if reduction != "none":
        loss = loss.sum() / (max(len(query), 1) if reduction == "mean" else 1)
    return loss.to(torch.promote_types(query.dtype, key.dtype))


def _contrastive_shardings(symmetric: bool) -> list[Sharding]:
    """Return queries and keys that are sharded, alone and both in the same dimension of the mesh."""
    query, key, _, _ = drawn_tensors(torch.device("cpu"), torch.float32, (5,), 5, 3)
    options: dict[str, Any] = {"temperature": torch.tensor(0.75, requires_grad=True)}
    if not symmetric:
        options["bias"] = torch.tensor(-1.0, requires_grad=True)
    sample = Sample((query, key), options)
    alone = {"all_reduce": 5 if symmetric else 3}  # a number of each row, and gradients; both directions have theirs
    directions = 1 + int(symmetric)
    gathered = {"all_gather_into_tensor": directions, "reduce_scatter_tensor": directions, "all_reduce": 2}
    return [
        Sharding("queries", sample, {0: 0}, "partial", alone),
        Sharding("keys", sample, {1: 0}, "partial", alone),
        Sharding("both", sample, {0: 0, 1: 0}, "partial", gathered),
    ]


def _info_nce_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    query, key, _, _ = drawn_tensors(device, dtype, (4,), 4, 3)
    few, many, _, _ = drawn_tensors(device, dtype, (3,), 5, 2)
    temperature = torch.tensor(0.75, device=device, dtype=dtype).requires_grad_()
    group = torch.tensor([0, 1, 0, 2], device=device)
    places = torch.tensor([4, 0, 2], device=device, dtype=torch.int32)
    mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 0, 1], [0, 1, 1, 1, 1]], device=device) > 0
    groups = {"query_group": group[:3], "key_group": torch.tensor([1, 3, 0, 3, 0], device=device)}
    return [
        Sample((query, key), {"temperature": 0.5}, dynamic={0: 0, 1: 0}),
        Sample((few, many, places), {"temperature": temperature, "mask": mask, "reduction": "none"}),
        Sample((query, key), {"temperature": 1.5, "query_group": group, "reduction": "sum"}),
        Sample((few, many, places), {"temperature": temperature, "symmetric": False, **groups}),
        Sample((query[:1].detach().requires_grad_(), key[:1].detach()), {"temperature": 2.0}),
    ]


def _sigmoid_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    query, key, _, _ = drawn_tensors(device, dtype, (4,), 4, 3)
    few, many, _, _ = drawn_tensors(device, dtype, (3,), 5, 2)
    learnt = {
        name: torch.tensor(number, device=device, dtype=dtype).requires_grad_()
        for name, number in (("temperature", 0.75), ("bias", -1.5))
    }
    places = torch.tensor([4, 0, 2], device=device, dtype=torch.int32)
    mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 0, 1], [0, 1, 1, 1, 1]], device=device) > 0
    positive = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 0, 0, 1, 0]], device=device) > 0
    groups = {
        "query_group": torch.tensor([0, 1, 0], device=device),
        "key_group": torch.tensor([1, 0, 0, 3, 0], device=device),
    }
    return [
        Sample((query, key), {"temperature": 0.5}, dynamic={0: 0, 1: 0}),
        Sample((few, many, places), {**learnt, "mask": mask, "reduction": "none"}),
        Sample((few, many), {**learnt, "positive": positive, "mask": mask}),
        Sample((few, many), {"temperature": 1.5, "bias": -2.0, "positive": positive, "reduction": "sum", **groups}),
        Sample((query[:1].detach().requires_grad_(), key[:1].detach()), {"temperature": 2.0}),
    ]


_warm = {"temperature": 1.0}
_x, _weight, _target = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 3])

register(
    OpInfo(
        name="info_nce_loss",
        summary="InfoNCE with in-batch negatives, in one or both directions, without the matrix of similarities",
        function=info_nce_loss,
        reference=info_nce_loss_reference,
        samples=_info_nce_samples,
        shardings=lambda: _contrastive_shardings(True),
        not_fuzzed=NOT_FUZZED | {"tiny": "a quotient of two of them, whose difference is lost"},
        autocast=torch.float32,
        modules=lambda: [
            (InfoNCELoss(0.5), {"temperature": 0.5}),
            (InfoNCELoss(2.0, False, "sum"), {"temperature": 2.0, "symmetric": False, "reduction": "sum"}),
        ],
        bad_calls=lambda: [
            BadCall((None, _x), "query: expected a tensor, got NoneType", _warm),
            BadCall((_x, _x.int()), "key: expected one of float16", _warm),
            BadCall((_x[0], _x), r"query: expected \[N, D\]", _warm),
            BadCall((_x, _x[0]), r"key: expected \[M, D\]", _warm),
            BadCall((_x, _x[:, :2]), r"key: expected \[V, 3\] as query", _warm),
            BadCall((_x, _x[:1]), "key: expected one for each of 2 queries, got 1", _warm),
            BadCall((_x, _x, _target), r"target: expected 0 to 1($|, got)", _warm),
            BadCall((_x, _x, _target[:1]), r"target: expected shape \[2\], got \[1\]", _warm),
            BadCall((_x, _x), "temperature: expected a positive number, got 0", {"temperature": 0}),
            BadCall((_x, _x), "temperature: expected a positive number, got -1", {"temperature": -1}),
            BadCall((_x, _x), "temperature: expected scores times a number within", {"temperature": 1e-40}),
            BadCall((_x, _x), "temperature: expected one number", {"temperature": _x}),
            BadCall((_x, _x), "symmetric: expected True or False", {**_warm, "symmetric": 2}),
            BadCall((_x, _x), "mask: expected one of bool", {**_warm, "mask": _x}),
            BadCall((_x, _x), r"mask: expected shape \[2, 2\], got \[2, 3\]", {**_warm, "mask": _x > 0}),
            BadCall((_x, _x), r"query_group: expected shape \[2\]", {**_warm, "query_group": torch.arange(3)}),
            BadCall((_x, _weight), "key_group: expected one for 2 queries", {**_warm, "query_group": _target}),
            BadCall((_x, _x), "key_group: expected a query_group beside it", {**_warm, "key_group": _target}),
            BadCall((_x, _x), "reduction: expected one of", {**_warm, "reduction": "avg"}),
        ],
    )
)

register(
    OpInfo(
        name="sigmoid_contrastive_loss",
        summary="SigLIP: each pair of a query and a key is a binary problem, without the matrix of similarities",
        function=sigmoid_contrastive_loss,
        reference=sigmoid_contrastive_loss_reference,
        samples=_sigmoid_samples,
        shardings=lambda: _contrastive_shardings(False),
        not_fuzzed=NOT_FUZZED | {"tiny": "a quotient of two of them, whose difference is lost"},
        autocast=torch.float32,
        modules=lambda: [
            (SigmoidContrastiveLoss(0.5), {"temperature": 0.5}),
            (SigmoidContrastiveLoss(2.0, -1.0, "sum"), {"temperature": 2.0, "bias": -1.0, "reduction": "sum"}),
        ],
        bad_calls=lambda: [
            BadCall((None, _x), "query: expected a tensor, got NoneType", _warm),
            BadCall((_x, _x.int()), "key: expected one of float16", _warm),
            BadCall((_x[0], _x), r"query: expected \[N, D\]", _warm),
            BadCall((_x, _x[:, :2]), r"key: expected \[V, 3\] as query", _warm),
            BadCall((_x, _x[:1]), "key: expected one for each of 2 queries, got 1", _warm),
            BadCall((_x, _x, _target), r"target: expected 0 to 1($|, got)", _warm),
            BadCall((_x, _x), "temperature: expected a positive number, got 0", {"temperature": 0}),
            BadCall((_x, _x), "bias: expected a number, got str", {**_warm, "bias": "1"}),
            BadCall((_x, _x), "bias: expected one number", {**_warm, "bias": _x}),
            BadCall((_x, _x, _target), "positive: expected no target", {**_warm, "positive": torch.eye(2) > 0}),
            BadCall((_x, _x), "positive: expected one of bool", {**_warm, "positive": _x}),
            BadCall((_x, _x), r"positive: expected shape \[2, 2\], got \[2, 3\]", {**_warm, "positive": _x > 0}),
            BadCall((_x, _x), r"mask: expected shape \[2, 2\], got \[2, 3\]", {**_warm, "mask": _x > 0}),
            BadCall((_x, _x), r"query_group: expected shape \[2\]", {**_warm, "query_group": torch.arange(3)}),
            BadCall((_x, _x), "key_group: expected a query_group beside it", {**_warm, "key_group": _target}),
            BadCall((_x, _x), "reduction: expected one of", {**_warm, "reduction": "avg"}),
        ],
    )
)
