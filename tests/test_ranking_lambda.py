"""LambdaLoss: each weighting equals the dense formula, and the options of gains and ranks work."""

from __future__ import annotations

import math

import pytest
import torch
from test_ranking_pairwise import draw, value_and_gradient
from torch.nn.functional import softplus

from custom_ops import lambda_loss, pairwise_logistic_loss
from custom_ops.ranking.lambdas import WEIGHTINGS
from custom_ops.registry import FUNCTIONS


def dense(s, y, weighting, k=None, topk_mode="or", mu=10.0):
    """Compute the loss pair by pair from the formulas."""
    n = len(s)
    rank = {i: r + 1 for r, i in enumerate(sorted(range(n), key=lambda i: (-s[i].item(), i)))}
    k = n if k is None else k
    best = sum((2**g - 1) / math.log2(r + 2) for r, g in enumerate(sorted(y.tolist(), reverse=True)[:k]))
    gain = [(2 ** y[i].item() - 1) / best for i in range(n)]
    every_pair = weighting == "ndcg1"
    total = 0 * s.sum()
    for i in range(n):
        for j in range(n):
            in_top = (min if topk_mode == "or" else max)(rank[i], rank[j]) <= k
            if not ((every_pair or y[i] > y[j]) and in_top):
                continue
            swap, a = gain[i] - gain[j], abs(rank[i] - rank[j]) or 1
            lambdarank = swap * abs(1 / math.log2(1 + rank[i]) - 1 / math.log2(1 + rank[j]))
            ndcg2 = swap * abs(1 / math.log2(1 + a) - 1 / math.log2(2 + a))
            weight = {
                "ranknet": 1,
                "lambdarank": lambdarank,
                "ndcg1": gain[i] / math.log2(1 + rank[i]),
                "ndcg2": ndcg2,
                "ndcg2pp": mu * ndcg2 + lambdarank,
                "label_diff": (y[i] - y[j]).item(),
            }[weighting]
            total = total + weight * softplus(s[j] - s[i], threshold=60) / math.log(2)
    return total


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(("k", "topk_mode"), [(None, "or"), (3, "or"), (3, "and"), (100, "and")])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_weights_are_those_of_the_formulas(weighting, k, topk_mode, scale):
    scores, labels = draw(13)
    scores = (scores.detach() * scale).requires_grad_()
    v = torch.randn_like(scores)
    results = []
    for loss in (
        lambda_loss(scores, labels, weighting=weighting, k=k, topk_mode=topk_mode),
        dense(scores, labels, weighting, k, topk_mode),
    ):
        gradient = torch.autograd.grad(loss, scores, create_graph=True)[0]
        results.append((loss, gradient, torch.autograd.grad(gradient, scores, v)[0]))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_long_lists_in_float32(weighting):
    """A list that spans several tiles of rows and columns is accurate."""
    scores, labels = draw(1500, dtype=torch.float32)
    for k in (None, 70):
        loss, gradient = value_and_gradient(lambda_loss, scores, labels, weighting=weighting, k=k)
        exact, exact_gradient = value_and_gradient(lambda_loss, scores.double(), labels, weighting=weighting, k=k)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
        scale = float(exact_gradient.abs().max())
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-5 * scale)


def test_ranknet_is_the_logistic_loss():
    scores, labels = draw(4, 200)
    ours = lambda_loss(scores, labels, weighting="ranknet", log_base=math.e, sigma=1.5)
    torch.testing.assert_close(ours, pairwise_logistic_loss(scores, labels, sigma=1.5))
    ours = lambda_loss(scores, labels, weighting="ranknet", log_base=math.e, normalize=True)
    torch.testing.assert_close(ours, pairwise_logistic_loss(scores, labels, normalize=True))


def test_without_a_positive_gain_the_list_does_not_count():
    scores = torch.tensor([[0.3, -0.2, 0.1], [0.5, 0.1, 0.7]])
    labels = torch.tensor([[0, -1, -2], [0, 1, 2]])
    losses, gradient = value_and_gradient(lambda_loss, scores, labels, reduction="none")
    assert losses[0] == 0 and not gradient[0].any()
    assert lambda_loss(scores, labels) == losses[1]
    assert lambda_loss(scores, labels, weighting="ranknet", reduction="none")[0] > 0
    assert lambda_loss(scores, torch.zeros(2, 3)) == 0


def test_tied_scores_are_ranked_by_position():
    scores, labels = torch.zeros(4, dtype=torch.float64, requires_grad=True), torch.tensor([0, 2, 1, 2])
    ours = lambda_loss(scores, labels, weighting="ndcg2pp")
    torch.testing.assert_close(ours, dense(scores, labels, "ndcg2pp"))


@pytest.mark.parametrize("weighting", ["lambdarank", "ndcg1", "ndcg2pp", "ranknet"])
@pytest.mark.parametrize("weighted", [False, True])
def test_normalisations_are_constants_in_the_derivatives(each_backend, weighting, weighted):
    """The battery can't try these options, because finite differences move their constants."""
    scores, labels = draw(2, 6)
    given = {"item_weights": torch.linspace(0, 2, 12, dtype=torch.float64).view(2, 6)} if weighted else {}
    for own in (
        {"normalize": "lambdas", "score_normalize": True, "log_base": math.e, "sigma": 2.0},
        {"normalize": "lambdas", "k": 3, "topk_mode": "metric"},
        {"normalize": "pairs", "score_normalize": True, "reduction": "sum"},
    ):
        results = []
        for loss_fn in (lambda_loss, FUNCTIONS["lambda_loss"].reference):
            loss = loss_fn(scores, labels, weighting=weighting, **own, **given)
            gradient = torch.autograd.grad(loss, scores, create_graph=True)[0]
            results.append((loss, gradient, torch.autograd.grad(gradient, scores, scores.detach() + 1)[0]))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_score_normalisation_without_a_difference(each_backend):
    """Equal scores aren't divided by, as in LightGBM; an item of weight 0 with an infinite score changes nothing."""
    labels, scores = torch.tensor([2.0, 0.0, 1.0]), torch.zeros(3, requires_grad=True)
    for normalize in ("none", "lambdas"):
        loss = lambda_loss(scores, labels, normalize=normalize, score_normalize=True)
        torch.testing.assert_close(loss, lambda_loss(scores, labels, normalize=normalize))
    some = torch.tensor([1.0, 0.5, 1.0, 0.0])
    padded = torch.tensor([0.3, 0.1, -0.2, math.inf], requires_grad=True)
    own = {"score_normalize": True, "normalize": "lambdas", "weighting": "ranknet"}
    loss = lambda_loss(padded, torch.tensor([2.0, 0.0, 1.0, 0.0]), item_weights=some, **own)
    loss.backward()
    torch.testing.assert_close(loss, lambda_loss(padded[:3], labels, item_weights=some[:3], **own))
    assert padded.grad.isfinite().all()
