"""The specs of `custom_ops.ranking.catalogue`: references, samples and wrong calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops.ranking.catalogue import (
    InfoNCELoss,
    LinearCrossEntropy,
    LinearLogProb,
    SigmoidContrastiveLoss,
    info_nce_loss,
    linear_cross_entropy,
    linear_log_prob,
    sigmoid_contrastive_loss,
)
from custom_ops.registry import BadCall, OpInfo, Sample, Sharding, register

_NOT_FUZZED = {
    "infinite": "inf - inf",
    **dict.fromkeys(("fills", "outliers", "large"), "a sum of their products keeps nothing of what is smaller"),
}


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float | Tensor, counts: Tensor) -> Tensor:
    """Return the logits, in float32 for 16-bit arguments, with 0 in the rows that don't count."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    rows = torch.where(counts.unsqueeze(-1), x.to(dtype), 0)
    z = torch.as_tensor(scale, dtype=dtype, device=x.device) * rows @ weight.to(dtype).T
    return z if bias is None else z + bias.to(dtype)


def linear_log_prob_reference(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    counts = target != ignore_index
    z = _logits(x, weight, bias, scale, counts)
    log_p = z.log_softmax(-1)
    at = torch.where(counts, target, 0).long().unsqueeze(-1)
    entropy = -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)
    found = log_p.gather(-1, at).squeeze(-1), entropy, z.logsumexp(-1)
    log_prob, entropy, lse = (torch.where(counts, t, 0) for t in found)
    return log_prob, entropy, lse


def linear_cross_entropy_reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    scale: float | Tensor = 1.0,
) -> Tensor:
    ignored = -100 if ignore_index is None else ignore_index
    z = _logits(input, linear_weight, linear_bias, scale, target != ignored)
    options: dict[str, Any] = {"ignore_index": ignored, "label_smoothing": label_smoothing}
    if weight is not None:
        options["weight"] = weight.to(z.dtype)
    mean = reduction == "mean" and not bool((target != ignored).any())  # torch's is NaN
    options["reduction"] = "sum" if mean else reduction
    loss = torch.nn.functional.cross_entropy(z.flatten(0, -2), target.long().flatten(), **options)
    dtype = torch.promote_types(input.dtype, linear_weight.dtype)
    return loss.to(dtype).reshape(target.shape if reduction == "none" else ())


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


def _tensors(device: torch.device, dtype: torch.dtype, rows: tuple[int, ...], words: int, dims: int) -> Any:
    generator = torch.Generator().manual_seed(sum(rows) + words)

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return drawn.to(device, dtype).requires_grad_()

    target = torch.randint(words, rows, generator=generator).to(device)
    return draw(*rows, dims), draw(words, dims), target, draw(words)


def _log_prob_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    x, weight, target, _ = _tensors(device, dtype, (4,), 5, 3)
    y, words, chosen, bias = _tensors(device, dtype, (2, 3), 6, 2)
    chosen[0, 1] = chosen[1, 2] = -1
    scale = torch.tensor(0.75, device=device, dtype=dtype).requires_grad_()
    one = _tensors(device, dtype, (3,), 1, 2)
    return [
        Sample((x, weight, target), {"scale": 1.25}, dynamic={0: 0, 2: 0}),
        Sample((y, words, chosen.int()), {"bias": bias, "scale": scale, "ignore_index": -1}),
        Sample((one[0], one[1], torch.zeros_like(one[2])), {"bias": one[3]}),
        Sample((x, weight.detach(), torch.full_like(target, -100))),
    ]


def _shardings(one_result: bool) -> list[Sharding]:
    """Return rows and words that are sharded; one number is the mean of the rows' losses."""
    x, weight, _, bias = _tensors(torch.device("cpu"), torch.float32, (5,), 5, 3)
    target = torch.tensor([4, 0, -100, 2, 3])
    sample = Sample((x, weight, target), {"linear_bias" if one_result else "bias": bias})
    counted = int(one_result)
    words: dict[int | str, int] = {1: 0, "linear_bias" if one_result else "bias": 0}
    found = [
        Sharding("rows", sample, {0: 0, 2: 0}, "partial" if one_result else 0, {"all_reduce": 2 + counted}),
        Sharding("words", sample, words, "replicated", {"all_reduce": 2}),
    ]
    if one_result:
        factors = {"weight": torch.tensor([1.0, 0.5, 2.0, 0.0, 1.5]), "label_smoothing": 0.25}
        weighted = Sample((x, weight, target), {"linear_bias": bias, **factors})
        found += [
            Sharding("rows, weighted", weighted, {0: 0, 2: 0}, "partial", {"all_reduce": 4}),
            Sharding("words, weighted", weighted, {**words, "weight": 0}, "replicated", {"all_reduce": 2}),
        ]
    return found


def _contrastive_shardings(symmetric: bool) -> list[Sharding]:
    """Return queries and keys that are sharded, alone and both in the same dimension of the mesh."""
    query, key, _, _ = _tensors(torch.device("cpu"), torch.float32, (5,), 5, 3)
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


def _cross_entropy_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    x, words, target, bias = _tensors(device, dtype, (4,), 5, 3)
    some = target.clone()
    some[1] = -100
    weight = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.5], device=device, dtype=dtype)
    return [
        Sample((x, words, target), dynamic={0: 0, 2: 0}),
        Sample((x, words, some), {"linear_bias": bias, "reduction": "sum", "scale": 0.5}),
        Sample((x, words, some.int()), {"linear_bias": bias, "weight": weight, "label_smoothing": 0.25}),
        Sample((x, words, target), {"label_smoothing": 0.5, "reduction": "none", "ignore_index": int(target[0])}),
        Sample((x, words.detach(), torch.full_like(target, -100))),
    ]


def _info_nce_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    query, key, _, _ = _tensors(device, dtype, (4,), 4, 3)
    few, many, _, _ = _tensors(device, dtype, (3,), 5, 2)
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
    query, key, _, _ = _tensors(device, dtype, (4,), 4, 3)
    few, many, _, _ = _tensors(device, dtype, (3,), 5, 2)
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
        name="linear_log_prob",
        summary="Log-probability, entropy and logsumexp of a linear layer's softmax, without its logits in memory",
        function=linear_log_prob,
        reference=linear_log_prob_reference,
        samples=_log_prob_samples,
        not_fuzzed=_NOT_FUZZED,
        shardings=lambda: _shardings(False),
        autocast=torch.float32,
        modules=lambda: [(LinearLogProb(), {}), (LinearLogProb(0.5, 2), {"scale": 0.5, "ignore_index": 2})],
        bad_calls=lambda: [
            BadCall((None, _weight, _target), "x: expected a tensor, got NoneType"),
            BadCall((_x.int(), _weight, _target), "x: expected one of float16"),
            BadCall((_x[0, 0], _weight, _target), r"x: expected \[..., D\], got a single number"),
            BadCall((_x, _weight.long(), _target), "weight: expected one of float16"),
            BadCall((_x, _weight[0], _target), r"weight: expected \[V, D\]"),
            BadCall((_x, _weight[:, :2], _target), r"weight: expected \[V, 3\] as x, got \[4, 2\]"),
            BadCall((_x, _weight.to("meta"), _target), "weight: expected on cpu as x, got meta"),
            BadCall((_x, _weight, _target.float()), "target: expected one of int32, int64, got float32"),
            BadCall((_x, _weight, _target[:1]), r"target: expected shape \[2\], got \[1\]"),
            BadCall((_x, _weight, _target + 1), "target: expected 0 to 3 or ignore_index -100"),
            BadCall((_x, _weight, _target - 1), "target: expected 0 to 3 or ignore_index -100"),
            BadCall((_x, _weight, _target), r"bias: expected shape \[4\], got \[3\]", {"bias": _x[0]}),
            BadCall((_x, _weight, _target), "bias: expected one of float16", {"bias": _target}),
            BadCall((_x, _weight, _target), "scale: expected a number, got str", {"scale": "1"}),
            BadCall((_x, _weight, _target), r"scale: expected one number, got shape \[2, 3\]", {"scale": _x}),
            BadCall((_x, _weight, _target), "ignore_index: expected an integer, got float", {"ignore_index": 0.5}),
        ],
    )
)

register(
    OpInfo(
        name="linear_cross_entropy",
        summary="Cross entropy of a linear layer, without its logits in memory",
        function=linear_cross_entropy,
        reference=linear_cross_entropy_reference,
        samples=_cross_entropy_samples,
        not_fuzzed=_NOT_FUZZED,
        shardings=lambda: _shardings(True),
        autocast=torch.float32,
        modules=lambda: [
            (LinearCrossEntropy(), {}),
            (
                LinearCrossEntropy("sum", 1, 0.1, 2.0),
                {"reduction": "sum", "ignore_index": 1, "label_smoothing": 0.1, "scale": 2.0},
            ),
        ],
        bad_calls=lambda: [
            BadCall((_x.int(), _weight, _target), "input: expected one of float16"),
            BadCall((_x, _weight[0], _target), r"linear_weight: expected \[V, D\]"),
            BadCall((_x, _weight, _target), "linear_bias: expected one of float16", {"linear_bias": _target}),
            BadCall((_x, _weight, _target), r"weight: expected shape \[4\], got \[3\]", {"weight": _x[0]}),
            BadCall((_x, _weight, _target), "weight: .* without gradient", {"weight": torch.ones(4).requires_grad_()}),
            BadCall((_x, _weight, _target), "reduction: expected one of", {"reduction": "avg"}),
            BadCall((_x, _weight, _target), "label_smoothing: expected 0 to 1, got 2", {"label_smoothing": 2}),
            BadCall((_x, _weight, _target + 1), "target: expected 0 to 3 or ignore_index -100"),
        ],
    )
)

register(
    OpInfo(
        name="info_nce_loss",
        summary="InfoNCE with in-batch negatives, in one or both directions, without the matrix of similarities",
        function=info_nce_loss,
        reference=info_nce_loss_reference,
        samples=_info_nce_samples,
        shardings=lambda: _contrastive_shardings(True),
        not_fuzzed=_NOT_FUZZED | {"tiny": "a quotient of two of them, whose difference is lost"},
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
            BadCall((_x, _x, _target), "target: expected 0 to 1", _warm),
            BadCall((_x, _x, _target[:1]), r"target: expected shape \[2\], got \[1\]", _warm),
            BadCall((_x, _x), "temperature: expected a positive number, got 0", {"temperature": 0}),
            BadCall((_x, _x), "temperature: expected a positive number, got -1", {"temperature": -1}),
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
        not_fuzzed=_NOT_FUZZED | {"tiny": "a quotient of two of them, whose difference is lost"},
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
            BadCall((_x, _x, _target), "target: expected 0 to 1", _warm),
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
