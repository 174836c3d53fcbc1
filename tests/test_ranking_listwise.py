"""Properties of the listwise and smooth-rank losses that other list losses don't have."""

from __future__ import annotations

import math

import pytest
import torch

import custom_ops
from custom_ops.registry import REGISTRY

LISTWISE = ["list_mle_loss", "list_net_loss", "softmax_loss", "unique_softmax_loss", "cosent_loss"]
SMOOTH = ["approx_ndcg_loss", "approx_mrr_loss", "smooth_ap_loss"]
OPTIONS = [
    *((name, {}) for name in LISTWISE),
    *((name, {"temperature": 1.0}) for name in SMOOTH),
    ("list_mle_loss", {"ties": "score", "position_weights": "exponential"}),
    ("list_mle_loss", {"ties": "breslow", "position_weights": "discount", "k": 5}),
    ("unique_softmax_loss", {"gain": "linear"}),
    ("approx_ndcg_loss", {"gain": "linear", "temperature": 1.0}),
    ("neural_sort_ndcg_loss", {}),
    ("neural_sort_ndcg_loss", {"gain": "linear", "temperature": 0.1, "k": 5}),
]
losses = pytest.mark.parametrize(
    ("name", "own"), OPTIONS, ids=[" ".join([name, *map(str, own.values())]) for name, own in OPTIONS]
)


def call(name, scores, labels, **options):
    return getattr(custom_ops, name)(scores, labels, **options)


def loss_and_slope(name, scores, labels, **options):
    scores = scores.clone().requires_grad_()
    loss = call(name, scores, labels, **options)
    loss.sum().backward()
    return loss.detach(), scores.grad


def lists(*shape, dtype=torch.float64, spread=1.0):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(shape, generator=generator, dtype=torch.float64) * spread
    return scores.to(dtype), torch.randint(0, 5, shape, generator=generator).to(dtype)


@losses
@pytest.mark.parametrize(("n", "spread"), [(300, 1.0), (70, 40.0), (601, 3.0)])
def test_value_gradient_and_hessian_vector_product(name, own, n, spread):
    """Results equal the formula's across tiles of the kernels, and where exponentials of score differences overflow."""
    scores, labels = lists(2, n, spread=spread)
    v = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for function in (getattr(custom_ops, name), REGISTRY[name].reference):
        s = scores.clone().requires_grad_()
        loss = function(s, labels, **own)
        (slope,) = torch.autograd.grad(loss, s, create_graph=True)
        (product,) = torch.autograd.grad((slope * v).sum(), s)
        results.append((loss, slope, product))
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@losses
def test_float32_is_the_rounding_of_float64(name, own):
    scores, labels = lists(2, 2000, dtype=torch.float32, spread=4.0)
    wide = loss_and_slope(name, scores.double(), labels.double(), **own)
    for ours, expected in zip(loss_and_slope(name, scores, labels, **own), wide):
        scale = expected.abs().max().item()
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6 * scale)


def test_list_mle_of_a_dominant_item():
    """allRank gives 52.95 here."""
    loss = custom_ops.list_mle_loss(torch.tensor([50.0, 0, 1]), torch.tensor([2, 1, 0]))
    torch.testing.assert_close(loss, torch.tensor(math.log1p(math.e)))


def test_list_net_of_a_confident_mistake():
    """allRank clamps probabilities and gives 21.9 here."""
    scores, labels = torch.tensor([0.0, 40.0, 0.0]), torch.tensor([3.0, 0.0, 0.0])
    expected = -(labels.softmax(0) * scores.double().log_softmax(0)).sum()
    torch.testing.assert_close(custom_ops.list_net_loss(scores, labels), expected.float())


def test_list_mle_keeps_gradients_that_a_difference_from_1_would_lose():
    scores = torch.tensor([50.0, 0.0])
    _, slope = loss_and_slope("list_mle_loss", scores, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(slope, torch.tensor([-1.0, 1.0]) * math.exp(-50), rtol=1e-6, atol=0)


def test_breslow_does_not_depend_on_the_order_of_the_items():
    scores, labels = lists(20)
    options = {"ties": "breslow", "position_weights": "discount", "k": 7}
    loss, slope = loss_and_slope("list_mle_loss", scores, labels, **options)
    there = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    moved, moved_slope = loss_and_slope("list_mle_loss", scores[there], labels[there], **options)
    torch.testing.assert_close(moved, loss)
    torch.testing.assert_close(moved_slope, slope[there])


def test_ties_by_score_are_the_likeliest_of_all_orders():
    scores, labels = torch.tensor([0.3, 2.0, -1.0, 1.0]), torch.tensor([1, 1, 1, 0])
    by_score = custom_ops.list_mle_loss(scores, labels, ties="score")
    for order in ([0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]):
        there = torch.tensor([*order, 3])
        assert by_score <= custom_ops.list_mle_loss(scores[there], labels[there]) + 1e-6


def test_softmax_loss_is_cross_entropy():
    scores, _ = lists(4, 9)
    target = torch.tensor([3, 0, 8, 5])
    labels = torch.nn.functional.one_hot(target, 9).double()
    torch.testing.assert_close(
        custom_ops.softmax_loss(scores, labels), torch.nn.functional.cross_entropy(scores, target)
    )


@pytest.mark.parametrize("temperature", [1e-3, 0.01])
def test_cold_smooth_ranks_are_the_metrics(temperature):
    scores = torch.arange(8.0)[torch.randperm(8, generator=torch.Generator().manual_seed(0))]
    labels = torch.tensor([2, 0, 1, 0, 3, 0, 0, 1])
    ranks = 1 + (scores > scores[:, None]).sum(1)
    gains, relevant = 2.0**labels - 1, labels > 0
    ideal = (gains.sort(descending=True).values / (torch.arange(8) + 2).log2()).sum()
    ndcg = (gains / (1 + ranks).log2()).sum() / ideal
    mrr = (labels / ranks).sum() / labels.sum()
    precision = torch.tensor([(ranks[relevant] <= r).sum() / r for r in ranks[relevant]]).mean()
    metrics = {
        "approx_ndcg_loss": ndcg,
        "neural_sort_ndcg_loss": ndcg,
        "approx_mrr_loss": mrr,
        "smooth_ap_loss": precision,
    }
    for name, metric in metrics.items():
        torch.testing.assert_close(call(name, scores, labels, temperature=temperature), 1 - metric)
