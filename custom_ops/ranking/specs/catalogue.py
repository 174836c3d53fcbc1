"""The specs of `custom_ops.ranking.catalogue`: references, samples and wrong calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops.ranking.catalogue import (
    LinearCrossEntropy,
    LinearLogProb,
    linear_cross_entropy,
    linear_log_prob,
)
from custom_ops.registry import BadCall, OpInfo, Sample, Sharding, register

NOT_FUZZED = {
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


def drawn_tensors(device: torch.device, dtype: torch.dtype, rows: tuple[int, ...], words: int, dims: int) -> Any:
    generator = torch.Generator().manual_seed(sum(rows) + words)

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return drawn.to(device, dtype).requires_grad_()

    target = torch.randint(words, rows, generator=generator).to(device)
    return draw(*rows, dims), draw(words, dims), target, draw(words)


def _log_prob_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    x, weight, target, _ = drawn_tensors(device, dtype, (4,), 5, 3)
    y, words, chosen, bias = drawn_tensors(device, dtype, (2, 3), 6, 2)
    chosen[0, 1] = chosen[1, 2] = -1
    scale = torch.tensor(0.75, device=device, dtype=dtype).requires_grad_()
    one = drawn_tensors(device, dtype, (3,), 1, 2)
    return [
        Sample((x, weight, target), {"scale": 1.25}, dynamic={0: 0, 2: 0}),
        Sample((y, words, chosen.int()), {"bias": bias, "scale": scale, "ignore_index": -1}),
        Sample((one[0], one[1], torch.zeros_like(one[2])), {"bias": one[3]}),
        Sample((x, weight.detach(), torch.full_like(target, -100))),
    ]


def _shardings(one_result: bool) -> list[Sharding]:
    """Return rows and words that are sharded; one number is the mean of the rows' losses."""
    x, weight, _, bias = drawn_tensors(torch.device("cpu"), torch.float32, (5,), 5, 3)
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


def _cross_entropy_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    x, words, target, bias = drawn_tensors(device, dtype, (4,), 5, 3)
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


_x, _weight, _target = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 3])

register(
    OpInfo(
        name="linear_log_prob",
        summary="Log-probability, entropy and logsumexp of a linear layer's softmax, without its logits in memory",
        function=linear_log_prob,
        reference=linear_log_prob_reference,
        samples=_log_prob_samples,
        not_fuzzed=NOT_FUZZED,
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
            BadCall((_x, _weight, _target.float()), "target: expected integers, got float32"),
            BadCall((_x, _weight, _target[:1]), r"target: expected shape \[2\], got \[1\]"),
            BadCall((_x, _weight, _target + 1), "target: expected 0 to 3 or ignore_index -100"),
            BadCall((_x, _weight, _target - 1), "target: expected 0 to 3 or ignore_index -100"),
            BadCall((_x, _weight, _target), r"bias: expected shape \[4\], got \[3\]", {"bias": _x[0]}),
            BadCall((_x, _weight, _target), "bias: expected one of float16", {"bias": _target}),
            BadCall((_x, _weight, _target), "scale: expected a number, got str", {"scale": "1"}),
            BadCall((_x, _weight, _target), "scale: expected scores times a number within", {"scale": 1e300}),
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
        not_fuzzed=NOT_FUZZED,
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
