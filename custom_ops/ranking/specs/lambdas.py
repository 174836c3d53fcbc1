"""The specs of `custom_ops.ranking.lambdas`: references, samples and wrong calls."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from custom_ops.ranking._gains import relative_gains
from custom_ops.ranking.lambdas import LambdaLoss, lambda_loss
from custom_ops.ranking.specs._lists import list_bad_calls, list_samples, reference_of
from custom_ops.registry import BadCall, OpInfo, Sample, register


def _lambda_loss_of_one_list(
    s: Tensor,
    y: Tensor,
    weighting: str = "lambdarank",
    k: int | None = None,
    topk_mode: str = "or",
    gain: str = "exponential",
    sigma: float = 1.0,
    mu: float = 10.0,
    log_base: float = 2.0,
    normalize: bool | str = False,
    score_normalize: bool = False,
    w: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    n = len(s)
    at = torch.arange(1, n + 1, device=s.device, dtype=s.dtype)
    order = s.detach().sort(dim=-1, descending=True, stable=True).indices
    rank = (order[:, None] == at - 1).to(s.dtype).T @ at
    limit = n if k is None else min(k, n)
    gains = relative_gains(y, y.max(), gain)
    ideal = (gains.sort(dim=-1, descending=True).values[:limit] / torch.log2(1 + at[:limit])).sum()
    g, inverse = gains / torch.where(ideal > 0, ideal, 1), 1 / torch.log2(1 + rank)
    lower = torch.maximum(rank[:, None], rank)
    far = torch.ones_like(lower)
    if topk_mode == "metric":
        far = torch.where(lower > limit, 1 / (1 - 1 / torch.log2(1 + lower.clamp_min(2))), 1)
        inverse = torch.where(rank > limit, 0, inverse)
    distance = (rank[:, None] - rank).abs()
    swap = (g[:, None] - g).abs()
    lambdarank = swap * (inverse[:, None] - inverse).abs()
    ndcg2 = far * swap * (1 / torch.log2(1 + distance.clamp_min(1)) - 1 / torch.log2(2 + distance.clamp_min(1)))
    weight = {
        "ranknet": torch.ones_like(swap),
        "lambdarank": lambdarank,
        "ndcg1": (g * inverse)[:, None].expand(n, n),
        "ndcg2": ndcg2,
        "ndcg2pp": mu * ndcg2 + lambdarank,
        "label_diff": (y[:, None] - y).abs(),
    }[weighting]
    top = rank <= (n if topk_mode == "metric" and weighting in ("ndcg2", "ndcg2pp") else limit)
    paired = torch.ones_like(swap, dtype=torch.bool) if weighting == "ndcg1" else y[:, None] > y
    pairs = paired & (top[:, None] | top if topk_mode != "and" else top[:, None] & top)
    others = at[:, None] != at
    if weighting == "ndcg1":  # each item with itself counts only if it is in the top
        pairs = pairs & (top[:, None] | others)
    of_items = torch.ones_like(swap) if w is None else w[:, None] * w
    counted = pairs & others & (of_items * weight != 0)
    apart = torch.where(counted, s[:, None] - s, 0)
    of_pairs = of_items * weight / math.log(log_base)
    if score_normalize:
        of_pairs = of_pairs / torch.where((s == s[0]).all(), 1, 0.01 + apart.detach().abs())
    values = torch.where(pairs, of_pairs * softplus(-sigma * apart, threshold=60), 0).sum()
    if normalize == "lambdas":
        lambdas = 2 * sigma * torch.where(counted, of_pairs * (-sigma * apart.detach()).sigmoid(), 0).sum()
        values = values * torch.where(lambdas > 0, torch.log2(1 + lambdas) / torch.where(lambdas > 0, lambdas, 1), 1)
    total = torch.where(pairs, of_items, 0).sum()
    loss = values / torch.where(total > 0, total, 1) if normalize in (True, "pairs") else values
    contributes = (y != y[0]).any() if weighting != "ndcg1" else torch.tensor(n > 1, device=s.device)
    return loss, contributes & (ideal > 0 if weighting not in ("ranknet", "label_diff") else True)


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    samples = list_samples(device, dtype)
    options: tuple[dict[str, Any], ...] = (
        {"weighting": "label_diff"},
        {"weighting": "ndcg1", "k": 2, "gain": "linear", "log_base": math.e, "sigma": 2.0},
        {"weighting": "ndcg2pp", "k": 3, "topk_mode": "and", "mu": 2.0, "normalize": True},
        {"weighting": "ndcg2pp", "k": 2, "topk_mode": "metric", "normalize": "pairs"},
    )
    for own in options:
        samples += list_samples(device, dtype, **own)[:1]
    return samples


_x, _y = torch.ones(2), torch.ones(2)

register(
    OpInfo(
        name="lambda_loss",
        not_fuzzed={"time stamps": "as gains y they are rounded to float32"},
        summary="LambdaRank, NDCG-Loss 1, 2 and 2++: pairs weighted by their effect on NDCG",
        function=lambda_loss,
        reference=reference_of(_lambda_loss_of_one_list),
        samples=_samples,
        modules=lambda: [
            (LambdaLoss(), {}),
            (
                LambdaLoss("sum", "ndcg2pp", 2, "and", "linear", 2.0, 5.0, math.e, True),
                {"reduction": "sum", "weighting": "ndcg2pp", "k": 2, "topk_mode": "and", "gain": "linear"}
                | {"sigma": 2.0, "mu": 5.0, "log_base": math.e, "normalize": True},
            ),
        ],
        bad_calls=lambda: [
            *list_bad_calls(),
            BadCall((_x, _y), "weighting: expected one of 'ranknet', .* got 'ndcg'", {"weighting": "ndcg"}),
            BadCall((_x, _y), "k: expected an integer or None, got float", {"k": 1.0}),
            BadCall((_x, _y), "k: expected at least 1, got 0", {"k": 0}),
            BadCall((_x, _y), "topk_mode: expected one of 'or', 'and', 'metric', got 'xor'", {"topk_mode": "xor"}),
            BadCall((_x, _y), "gain: expected one of 'exponential', 'linear', got 'log'", {"gain": "log"}),
            BadCall((_x, _y), "sigma: expected a positive number, got -1", {"sigma": -1}),
            BadCall((_x, _y), "mu: expected a number, got str", {"mu": "1"}),
            BadCall((_x, _y), "log_base: expected a finite number of more than 1, got 1", {"log_base": 1}),
            BadCall((_x, _y), "mu: expected a finite number", {"mu": math.inf}),
            BadCall((_x, _y), "normalize: expected True or False, got 1", {"normalize": 1}),
            BadCall((_x, _y), "normalize: expected one of 'none', 'pairs', 'lambdas'", {"normalize": "lists"}),
            BadCall((_x, _y), "score_normalize: expected True or False, got 1", {"score_normalize": 1}),
        ],
    )
)
