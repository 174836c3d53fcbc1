"""Lists so long that the C++ kernels divide their sorts and passes into parts, which threads share."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import custom_ops
from custom_ops.registry import FUNCTIONS

N = 70_001  # kLong in csrc/lists.h is 65,536
LOSSES: dict[str, Callable[..., Tensor]] = {
    "list_mle": custom_ops.list_mle_loss,
    "list_mle, score": lambda s, y, **own: custom_ops.list_mle_loss(
        s, y, ties="score", position_weights="discount", **own
    ),
    "list_mle, breslow": lambda s, y, **own: custom_ops.list_mle_loss(
        s, y, ties="breslow", position_weights="exponential", **own
    ),
    "list_net": custom_ops.list_net_loss,
    "softmax": custom_ops.softmax_loss,
    "unique_softmax": custom_ops.unique_softmax_loss,
    "cosent": custom_ops.cosent_loss,
    "hinge": lambda s, y, **own: custom_ops.pairwise_hinge_loss(s, y, squared=True, **own),
    "approx_ndcg": lambda s, y, **own: custom_ops.approx_ndcg_loss(s, _few(y), **own),
    "smooth_ap": lambda s, y, **own: custom_ops.smooth_ap_loss(s, _few(y), **own),
}
OTHERS: dict[str, Callable[..., Tensor]] = {
    "soft_rank": lambda s, y, **own: custom_ops.soft_rank(s, regularization_strength=3e-5, **own),
    "soft_rank, kl": lambda s, y, **own: custom_ops.soft_rank(s, "kl", **own),
    "soft_sort": lambda s, y, **own: custom_ops.soft_sort(s, regularization_strength=3e4, **own),
    "spearman": custom_ops.spearman_loss,
}
METRICS: dict[str, Callable[..., Tensor]] = {
    "ndcg": custom_ops.ndcg,
    "ndcg, index": lambda s, y, **own: custom_ops.ndcg(s, y, ties="index", **own),
    "auc": custom_ops.auc,
    "average_precision": custom_ops.average_precision,
    "mrr": custom_ops.mrr,
}


def _few(labels: Tensor) -> Tensor:
    """Return the labels with a gain for every thousandth item alone: smooth ranks take time for each of these."""
    return torch.where(torch.arange(labels.shape[-1]) % 1000 == 7, labels, 0)


def _draw(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return scores, labels and options of one list."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(N, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, 5, (N,), generator=generator).to(dtype)
    places = torch.randperm(N, generator=generator)
    if kind == "distinct":
        labels = places.to(dtype) / N
    elif kind == "ties":  # one value of half of the items, so that it spans buckets
        scores = (4 * scores).round().relu() / 4
        labels = (places // 100).to(dtype) / 7
    elif kind == "masked":
        return scores, labels, {"mask": places % 16 > 0}
    elif kind == "infinite":
        scores[places[:3000]] = -math.inf
        scores[places[-1]] = math.inf
    elif kind == "wide":
        scores *= 1e4
    elif kind == "nan":
        scores[places[:5]] = math.nan
    return scores, labels, {}


def _results(call: Callable[..., Tensor], scores: Tensor, labels: Tensor, options: dict[str, Tensor]) -> list[Tensor]:
    """Return the value, its slope, and the Hessian times a vector."""
    scores = scores.clone().requires_grad_()
    value = call(scores, labels, **options)
    if not value.requires_grad:
        return [value]
    vector = torch.linspace(-1, 1, N, dtype=scores.dtype)
    (slope,) = torch.autograd.grad((value * torch.linspace(1, 2, value.numel())).sum(), scores, create_graph=True)
    second = torch.autograd.grad(slope, scores, vector)[0] if slope.requires_grad else slope
    return [value.detach(), slope.detach(), second]


@pytest.mark.parametrize("kind", ["grades", "distinct", "ties", "masked", "weighted", "infinite", "wide", "nan"])
@pytest.mark.parametrize("name", [*LOSSES, *OTHERS, *METRICS])
def test_the_bits_do_not_depend_on_the_threads(name: str, kind: str) -> None:
    scores, labels, options = _draw(kind, torch.float32)
    if kind == "weighted":
        if name not in LOSSES:
            pytest.skip("these take no weights of items")
        options["item_weights"] = (torch.arange(N) % 7).float()
    if kind == "infinite" and name in OTHERS:
        pytest.skip("they refuse infinities")
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            found.append(_results({**LOSSES, **OTHERS, **METRICS}[name], scores, labels, options))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0, equal_nan=True)


def _label_order(s: Tensor, y: Tensor) -> Tensor:
    return s[y.sort(descending=True, stable=True).indices]


def _from(s: Tensor) -> Tensor:
    """Return the logarithms of the sums of e^s over each item and all later ones."""
    return s.flip(0).logcumsumexp(0).flip(0)


def _by_label(s: Tensor, y: Tensor) -> list[Tensor]:
    return [s[y == label] for label in y.unique().flip(0)]


def _unique_softmax(s: Tensor, y: Tensor) -> Tensor:
    levels, highest = _by_label(s, y), y.max()
    total = s.new_zeros(())
    for rank, level in enumerate(levels[:-1]):
        lower = torch.cat(levels[rank + 1 :]).logsumexp(0)
        gain = (2 ** y.unique().flip(0)[rank] - 1) / (2**highest - 1)
        total = total + gain * torch.nn.functional.softplus(lower - level).sum()
    return total


def _cosent(s: Tensor, y: Tensor) -> Tensor:
    levels = [20 * level for level in _by_label(s, y)]
    terms = [torch.cat(levels[r + 1 :]).logsumexp(0) + (-level).logsumexp(0) for r, level in enumerate(levels[:-1])]
    return torch.stack([s.new_zeros(()), *terms]).logsumexp(0)


def _approx_ndcg(s: Tensor, y: Tensor) -> Tensor:
    at = (y > 0).nonzero().squeeze(-1)
    ranks = 0.5 + torch.stack([((s - s[i]) / 0.1).sigmoid().sum() for i in at])
    ideal = ((2 ** y[at].sort(descending=True).values - 1) / (2.0 + torch.arange(len(at)).double()).log2()).sum()
    return 1 - ((2 ** y[at] - 1) / (1 + ranks).log2()).sum() / ideal


EXACT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "list_mle": lambda s, y: (_from(_label_order(s, y)) - _label_order(s, y)).sum(),
    "list_net": lambda s, y: -(y.softmax(0) * s.log_softmax(0)).sum(),
    "softmax": lambda s, y: -(y * s.log_softmax(0)).sum(),
    "unique_softmax": _unique_softmax,
    "cosent": _cosent,
    "approx_ndcg": _approx_ndcg,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["grades", "ties", "masked"])
@pytest.mark.parametrize("name", EXACT)
def test_losses_equal_their_formulas(name: str, kind: str, dtype: torch.dtype) -> None:
    scores, labels, options = _draw(kind, dtype)
    if kind == "ties":
        labels = labels.floor() % 9
    mask = options.get("mask", torch.ones(N, dtype=torch.bool))
    call = (lambda s, y, **own: LOSSES[name](s, y, temperature=0.1, **own)) if name == "approx_ndcg" else LOSSES[name]
    loss, slope = _results(call, scores, labels, options)[:2]
    exact = scores.double().requires_grad_()
    chosen = _few(labels) if name == "approx_ndcg" else labels
    expected = EXACT[name](exact[mask], chosen[mask].double())
    (of_scores,) = torch.autograd.grad(expected, exact)
    rounding = 1e-5 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=rounding, atol=rounding)
    torch.testing.assert_close(slope.double(), of_scores, rtol=rounding, atol=rounding * of_scores.abs().max().item())


@pytest.mark.parametrize(("name", "strength"), [("soft_rank", 1e-6), ("soft_sort", 1e3)])
def test_soft_ranks_equal_their_reference(name: str, strength: float) -> None:
    scores, _, options = _draw("masked", torch.float64)

    def of(function: Callable[..., Tensor] | None) -> list[Tensor]:
        assert function is not None
        return _results(lambda s, _: function(s, regularization_strength=strength, **options), scores, scores, {})[:2]

    info = FUNCTIONS[name]
    torch.testing.assert_close(of(info.function), of(info.reference), rtol=1e-9, atol=1e-9)
