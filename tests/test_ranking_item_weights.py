"""A weight of 2 counts like two items, a weight of 0 like none, and inverse propensities unbias clicks."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

import custom_ops
from custom_ops.registry import FUNCTIONS

WEIGHTED = [name for name, info in FUNCTIONS.items() if "item_weights" in inspect.signature(info.function).parameters]
# A pair of copies has tied labels and doesn't count in these losses.
COPIES = [
    ("pairwise_logistic_loss", {}),
    ("pairwise_logistic_loss", {"normalize": True}),
    ("pairwise_soft_zero_one_loss", {}),
    ("pairwise_exponential_loss", {"normalize": True}),
    ("pairwise_hinge_loss", {}),
    ("pairwise_hinge_loss", {"squared": True, "normalize": True}),
    ("cosent_loss", {"scale": 2.0}),
    ("lambda_loss", {"weighting": "ranknet", "normalize": True}),
    ("lambda_loss", {"weighting": "label_diff"}),
]


@pytest.mark.parametrize(
    ("name", "options", "scale"),
    [
        (name, options, scale)
        for name, options in COPIES
        for scale in ((1.0,) if name == "pairwise_exponential_loss" else (1.0, 400.0))
    ],
)
def test_a_pair_counts_by_the_product_of_its_items_copies(each_backend, name, options, scale):
    """The scores are near each other, or so far apart that no exponential of an item is a number."""
    generator = torch.Generator().manual_seed(0)
    loss = getattr(custom_ops, name)
    scores = scale * torch.randn(2, 7, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[2, 0, 1, 1, 0, 2, 3], [0, 0, 1, 0, 0, 7, 0]])
    copies = torch.tensor([[1, 2, 3, 1, 0, 2, 1], [2, 1, 2, 0, 1, 1, 3]])
    weighted = scores.clone().requires_grad_()
    ours = loss(weighted, labels, item_weights=copies.double(), reduction="none", **options)
    (slope,) = torch.autograd.grad(ours.sum(), weighted, create_graph=True)
    if slope.requires_grad:
        (curved,) = torch.autograd.grad(slope.square().sum(), weighted)
    for row in range(2):
        repeated = scores[row].clone().requires_grad_()
        each = repeated.repeat_interleave(copies[row])
        expected = loss(each, labels[row].repeat_interleave(copies[row]), reduction="none", **options)
        torch.testing.assert_close(ours[row], expected)
        (of_each,) = torch.autograd.grad(expected, repeated, create_graph=True)
        torch.testing.assert_close(slope[row], of_each)
        if slope.requires_grad:
            (curved_each,) = torch.autograd.grad(of_each.square().sum(), repeated)
            torch.testing.assert_close(curved[row], curved_each)


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_of_1_change_nothing_and_all_of_0_leave_no_list(each_backend, name):
    generator = torch.Generator().manual_seed(0)
    loss = getattr(custom_ops, name)
    scores = torch.randn(2, 6, generator=generator, requires_grad=True)
    labels = torch.tensor([[2, 0, 1, 1, 0, 2], [0, 0, 1, 0, 0, 1]])
    plain = loss(scores, labels, reduction="none")
    torch.testing.assert_close(loss(scores, labels, item_weights=torch.ones(2, 6), reduction="none"), plain)
    nothing = loss(scores, labels, item_weights=torch.zeros(2, 6))
    (slope,) = torch.autograd.grad(nothing, scores)
    assert nothing == 0 and not slope.any()
    with pytest.raises(ValueError, match="item_weights: expected a tensor without gradient"):
        loss(scores, labels, item_weights=torch.ones(2, 6, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
@pytest.mark.parametrize("name", [*WEIGHTED, "ndcg", "softmax_loss"])
def test_weights_may_be_counts(name, dtype):
    generator = torch.Generator().manual_seed(0)
    function, scores = getattr(custom_ops, name), torch.randn(2, 6, generator=generator)
    labels, counts = torch.randint(0, 3, (2, 6), generator=generator), torch.tensor([2, 1, 0, 3, 1, 1]).to(dtype)
    for given in [{"weights": counts[1:3]}, {"item_weights": counts.expand(2, 6)}]:
        if name in WEIGHTED or "weights" in given:
            expected = function(scores, labels, **{key: value.float() for key, value in given.items()})
            torch.testing.assert_close(function(scores, labels, **given), expected)


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy warns while it interprets a kernel
def test_no_nan_arises_in_the_backward_pass_of_an_empty_list(each_backend, name):
    """Anomaly detection raises for a NaN that no result shows, too."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(8, generator=generator, requires_grad=True)
    labels = torch.tensor([2, 0, 1, 1, 0, 2, 0, 1])
    mask = torch.arange(8) < 6  # the last list has items, none of which counts
    with torch.autograd.detect_anomaly():
        where = {"cu_lengths": torch.tensor([0, 0, 6, 6, 8]), "mask": mask, "item_weights": torch.full((8,), 0.5)}
        loss = getattr(custom_ops, name)(scores, labels, **where)
        (slope,) = torch.autograd.grad(loss, scores, create_graph=True)
        if slope.requires_grad:
            slope.square().sum().backward()


def test_the_gain_of_a_high_label_is_weighted_without_overflow(each_backend):
    scores, labels = torch.tensor([0.1, 0.3, 0.2]), torch.tensor([2000.0, 1999.0, 0.0])
    weights = torch.tensor([1.0, 4.0, 1.0])
    for name in ("approx_ndcg_loss", "neural_sort_ndcg_loss"):
        loss = getattr(custom_ops, name)
        ours = loss(scores, labels, item_weights=weights)
        torch.testing.assert_close(ours, loss(scores, torch.tensor([1.0, 2.0, 0.0]), gain="linear"))


def test_inverse_propensities_unbias_clicks():
    """The mean gradient over simulated clicks on the shown order, weighted by 1 / the chance that a place is looked at,
    is that of the relevance itself.
    """
    generator = torch.Generator().manual_seed(0)
    scores = torch.tensor([0.2, -0.1, 0.4, 0.0], dtype=torch.float64, requires_grad=True)
    relevance = torch.tensor([0.2, 0.9, 0.1, 0.6], dtype=torch.float64)
    looked_at = 1 / torch.arange(1.0, 5.0, dtype=torch.float64)
    clicks = (torch.rand(200_000, 4, generator=generator, dtype=torch.float64) < looked_at * relevance).double()
    weights = (1 / looked_at).expand(clicks.shape)

    def slope(labels, **options):
        # A list in which all or none were clicked would be left out, so each has another item that never is.
        shown = torch.nn.functional.pad(scores.expand(labels.shape), (0, 1), value=-math.inf)
        padded = torch.nn.functional.pad(labels, (0, 1))
        loss = custom_ops.softmax_loss(shown, padded, reduction="sum", **options) / len(labels)
        return torch.autograd.grad(loss, scores)[0]

    wanted = slope(relevance[None])
    unbiased = slope(clicks, item_weights=torch.nn.functional.pad(weights, (0, 1), value=1.0))
    naive = slope(clicks)
    torch.testing.assert_close(unbiased, wanted, rtol=0, atol=0.01)
    assert (naive - wanted).abs().max() > 0.1
