"""The metrics equal scikit-learn's, and the mean over all orders of tied items."""

from __future__ import annotations

import doctest
import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, label_ranking_average_precision_score, ndcg_score

import custom_ops

METRICS = [custom_ops.ndcg, custom_ops.mrr, custom_ops.average_precision]


def draw(batch, n, seed=0, levels=None):
    """Return scores, of ``levels`` values if given, and labels 0 to 2 with at least one relevant item."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, n, generator=generator, dtype=torch.float64)
    if levels:
        scores = torch.randint(levels, (batch, n), generator=generator).double()
    labels = torch.randint(3, (batch, n), generator=generator)
    labels[:, 0] = 1
    return scores, labels


@pytest.mark.parametrize("k", [None, 1, 3, 100])
@pytest.mark.parametrize("levels", [None, 3])
def test_ndcg_equals_scikit_learns(k, levels):
    scores, labels = draw(7, 20, levels=levels)
    expected = ndcg_score(labels.numpy(), scores.numpy(), k=k)
    assert custom_ops.ndcg(scores, labels, k, gain="linear").item() == pytest.approx(expected, rel=1e-12)
    exponential = ndcg_score(2.0 ** labels.numpy() - 1, scores.numpy(), k=k)
    assert custom_ops.ndcg(scores, labels, k).item() == pytest.approx(exponential, rel=1e-12)
    if levels is None:
        assert custom_ops.ndcg(scores, labels, k, ties="index").item() == pytest.approx(exponential, rel=1e-12)


@pytest.mark.parametrize("levels", [None, 3])
def test_average_precision_equals_scikit_learns(levels):
    scores, labels = draw(7, 20, levels=levels)
    expected = [average_precision_score(y > 0, s) for s, y in zip(scores.numpy(), labels.numpy())]
    ours = custom_ops.average_precision(scores, labels, ties="together", reduction="none")
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


@pytest.mark.parametrize("levels", [None, 3])
def test_mrr_equals_scikit_learns_label_ranking_average_precision(levels):
    scores, _ = draw(7, 20, levels=levels)
    labels = torch.nn.functional.one_hot(torch.arange(7) * 2, 20)
    expected = label_ranking_average_precision_score(labels.numpy(), scores.numpy())
    assert custom_ops.mrr(scores, labels, ties="together").item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("k", [None, 1, 2, 4])
@pytest.mark.parametrize("metric", METRICS)
def test_tie_averaging_is_the_mean_over_all_orders_of_the_tied(metric, k):
    for seed in range(6):
        scores, labels = draw(1, 6, seed, levels=2)
        orders = [list(order) for order in itertools.permutations(range(6))]
        every = metric(scores[0, orders], labels[0, orders], k, ties="index", reduction="none")
        assert metric(scores, labels, k).item() == pytest.approx(every.mean().item(), rel=1e-12)


def test_ties_by_index_keep_the_order_they_came_in():
    scores, labels = torch.zeros(4), torch.tensor([0, 0, 1, 0])
    assert custom_ops.mrr(scores, labels, ties="index").item() == pytest.approx(1 / 3)
    assert custom_ops.average_precision(scores, labels, ties="index").item() == pytest.approx(1 / 3)
    assert custom_ops.ndcg(scores, labels, ties="index").item() == pytest.approx(0.5)
    assert custom_ops.mrr(scores, labels, 2, ties="index") == 0
    assert custom_ops.mrr(scores, labels, ties="together").item() == pytest.approx(1 / 4)


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("ties", ["average", "index"])
@pytest.mark.parametrize("metric", METRICS)
def test_padding_by_mask_or_lengths_changes_nothing(metric, ties, k):
    scores, labels = draw(5, 8, levels=3)
    lengths = torch.tensor([8, 3, 1, 0, 5])
    mask = torch.arange(8) < lengths[:, None]
    alone = [metric(s[:n], y[:n], k, ties=ties) for s, y, n in zip(scores, labels, lengths)]
    scores[~mask], labels[~mask] = math.nan, 9
    for options in ({"mask": mask}, {"lengths": lengths}, {"mask": mask, "lengths": lengths}):
        ours = metric(scores, labels, k, ties=ties, reduction="none", **options)
        torch.testing.assert_close(ours, torch.stack(alone))
    shuffled = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    if ties == "average":
        scattered = metric(scores[:, shuffled], labels[:, shuffled], k, mask=mask[:, shuffled], reduction="none")
        torch.testing.assert_close(scattered, torch.stack(alone))
    torch.testing.assert_close(metric(scores, labels, k, mask=mask, ties=ties), sum(alone) / 4)


@pytest.mark.parametrize("metric", METRICS)
def test_a_valid_score_of_minus_infinity_is_not_padding(metric):
    scores, labels = torch.tensor([1.0, -math.inf, -math.inf]), torch.tensor([0, 0, 1])
    mask = torch.tensor([True, False, True])
    assert metric(scores, labels, mask=mask) == metric(torch.tensor([1.0, 0.0]), torch.tensor([0, 1]))


@pytest.mark.parametrize("metric", METRICS)
def test_lists_without_a_relevant_item_count_for_nothing(metric):
    scores, labels = draw(3, 5)
    labels[1] = 0
    each = metric(scores, labels, reduction="none")
    assert each[1] == 0
    torch.testing.assert_close(metric(scores, labels), each.sum() / 2)
    assert metric(scores, labels * 0) == 0
    assert metric(scores[:, :0], labels[:, :0], reduction="none").tolist() == [0, 0, 0]
    assert metric(scores[:0], labels[:0]) == 0


@pytest.mark.parametrize("metric", METRICS)
def test_nan_scores_show(metric):
    scores, labels = draw(3, 5)
    scores[2, 3] = math.nan
    assert metric(scores, labels, reduction="none").isnan().tolist() == [False, False, True]
    assert metric(scores, labels).isnan()


@pytest.mark.parametrize("metric", METRICS)
def test_shapes_dtypes_and_no_gradient(metric):
    scores, labels = draw(6, 5)
    expected = metric(scores, labels, reduction="none")
    shaped = metric(scores.view(2, 3, 5), labels.view(2, 3, 5), reduction="none")
    torch.testing.assert_close(shaped, expected.view(2, 3))
    half = metric(scores.half().requires_grad_(), labels, reduction="none")
    assert half.dtype == torch.float32 and not half.requires_grad
    torch.testing.assert_close(half, expected.float())


def test_exponential_gains_of_any_label_are_finite():
    value = custom_ops.ndcg(torch.tensor([1.0, 2.0]), torch.tensor([2000, 1999]))
    assert value.item() == pytest.approx((0.5 + 1 / math.log2(3)) / (1 + 0.5 / math.log2(3)))


def test_perfect_and_reversed_orders():
    scores, labels = torch.arange(5.0), torch.tensor([0, 0, 0, 1, 1])
    for metric in METRICS:
        assert metric(scores, labels).item() == pytest.approx(1)
        assert metric(scores, labels, 1).item() == pytest.approx(1)
        assert metric(-scores, labels, 2) == 0


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_jagged_lists_are_the_padded_ones(metric, reduction):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([4, 0, 7, 1, 5])
    scores, labels = torch.randn(5, 7, generator=generator), torch.randint(0, 3, (5, 7), generator=generator)
    valid = torch.arange(7) < lengths[:, None]
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    flat = metric(scores[valid], labels[valid], 3, cu_lengths=bounds, reduction=reduction)
    torch.testing.assert_close(flat, metric(scores, labels, 3, lengths=lengths, reduction=reduction))
    none = metric(scores[valid], labels[valid], cu_lengths=bounds[:1], reduction=reduction)
    assert none.shape == ((0,) if reduction == "none" else ())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": torch.ones(2).bool()}, "scores: expected one of float16"),
        ({"scores": torch.tensor(1.0)}, r"scores: expected \[..., n\]"),
        ({"labels": [1, 0]}, "labels: expected a tensor, got list"),
        ({"labels": torch.ones(3)}, r"labels: expected shape \[2\], got \[3\]"),
        ({"labels": torch.ones(2, device="meta")}, "labels: expected on cpu as scores, got meta"),
        ({"k": 0}, "k: expected at least 1, got 0"),
        ({"mask": torch.ones(2)}, "mask: expected one of bool"),
        ({"lengths": torch.ones(2).int()}, r"lengths: expected shape \[\], got \[2\]"),
        ({"cu_lengths": torch.tensor([[0, 2]])}, r"cu_lengths: expected \[L \+ 1\]"),
        ({"cu_lengths": torch.tensor([0, 3])}, "cu_lengths: expected non-decreasing values from 0 to 2"),
        ({"cu_lengths": torch.tensor([0, 2, 1])}, "cu_lengths: expected non-decreasing values"),
        ({"cu_lengths": torch.tensor([0]), "lengths": torch.tensor(1)}, "expected at most one of them"),
        ({"ties": "random"}, "ties: expected one of 'average', 'index'.* got 'random'"),
        ({"reduction": "avg"}, "reduction: expected one of"),
    ],
)
def test_wrong_calls(metric, options, message):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        metric(**{"scores": torch.ones(2), "labels": torch.ones(2), **options})


def test_examples_of_docstrings():
    result = doctest.testmod(custom_ops.ranking.metrics)
    assert (result.attempted, result.failed) == (6, 0)
