"""The values that other projects publish in their tests, computed by our ops; docs/coming_from.md lists the
differences.
"""

from __future__ import annotations

import math
from math import e, exp, log, log2

import pytest
import torch

import custom_ops as co


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def logistic(x):
    return math.log1p(exp(-x))


def sigmoid(x):
    return 1 / (1 + exp(-x))


def softmax(values):
    total = sum(map(exp, values))
    return [exp(v) / total for v in values]


# ---------------------------------------------------------------- allRank 1.4.3, tests/losses

_THREE, _PADDED = t(0.5, 0.3, 0.5), t(0.5, 0.3, 0.5, 1.0)
_THREE_LABELS, _PADDED_LABELS = t(0.5, 0.3, 0.5), t(0.5, 0.3, 0.5, -1)
_LONG = t(0.5, 0.2, 0.1, 0.4, 1.0, -1.0, 0.63), t(1, 2, 2, 4, 1, 4, 3)
_ALLRANK = {
    "lambdaLoss, ndcgLoss1_scheme": (co.lambda_loss, {"weighting": "ndcg1", "topk_mode": "and"}, 2.9272110462),
    "lambdaLoss, ndcgLoss2PP_scheme": (co.lambda_loss, {"weighting": "ndcg2pp", "topk_mode": "and"}, 1.1244146823),
    "lambdaLoss, rankNet_scheme": (co.lambda_loss, {"weighting": "ranknet", "log_base": e}, 1.1962778568),
    "approxNDCGLoss, less 1": (co.approx_ndcg_loss, {"temperature": 1.0}, 1 - 0.8499219417),
}


@pytest.mark.parametrize("name", _ALLRANK)
def test_allrank_with_and_without_padding(name):
    loss, options, expected = _ALLRANK[name]
    assert float(loss(_THREE, _THREE_LABELS, **options)) == pytest.approx(expected, rel=1e-6)
    padded = loss(_PADDED, _PADDED_LABELS, mask=_PADDED_LABELS != -1, **options)
    assert float(padded) == pytest.approx(expected, rel=1e-6)


_of_differences = {"log_base": e, "normalize": True}
_ALLRANK_CALLS = [
    (lambda: co.list_mle_loss(t(0.5, 0.3), t(1, 0)), 0.5981389284133911),
    (
        lambda: co.list_net_loss(t(0.5, 0.2), t(1, 0)),
        -sum(p * log(q) for p, q in zip(softmax((1, 0)), softmax((0.5, 0.2)))),
    ),
    (lambda: co.softmax_loss(t(0.5, 0.2), t(1, 0)), -log(softmax((0.5, 0.2))[0])),  # allRank calls it binary_listNet
    (
        lambda: co.pairwise_logistic_loss(t(0.5, 0.2, 0.1), t(1, 0, 0), normalize=True),
        (logistic(0.3) + logistic(0.4)) / 2,
    ),
    (
        lambda: co.lambda_loss(t(0.5, 0.2, 0.1), t(2, 1, 0), weighting="label_diff", **_of_differences),
        (logistic(0.3) + 2 * logistic(0.4) + logistic(0.1)) / 3,
    ),
    (  # allRank's rankNet_weightByGTDiff_pow weights by the difference of the squared labels
        lambda: co.lambda_loss(t(0.5, 0.2, 0.1), t(2, 1, 0) ** 2, weighting="label_diff", **_of_differences),
        (3 * logistic(0.3) + 4 * logistic(0.4) + logistic(0.1)) / 3,
    ),
    (lambda: 1 - co.neural_sort_ndcg_loss(*_LONG, temperature=1e-3), float(co.ndcg(*_LONG))),
    (lambda: 1 - co.neural_sort_ndcg_loss(*_LONG, temperature=1e-3, k=3), float(co.ndcg(*_LONG, k=3))),
    (lambda: co.mrr(t(0.5, 0.2), t(0, 1)), 0.5),
    (lambda: co.mrr(t(0.5, 0.2), t(0, 1), k=1), 0.0),
    (lambda: co.mrr(t(0.5, 0.2, 1.0), t(0, 1, -1), mask=torch.tensor([True, True, False])), 0.5),
    (lambda: co.ndcg(t(0.5, 0.2), t(0, 1)), 1 / log2(3)),
    (lambda: co.ndcg(t(0.5, 0.2), t(0, 0)), 0.0),
    (lambda: co.ndcg(t(0.5, 0.2, 0.1), t(1, 0, 1), k=2), 1 / (1 + 1 / log2(3))),
    (lambda: co.ndcg(t(0.5, 0.2, 1.0), t(0, 1, -1), mask=torch.tensor([True, True, False])), 1 / log2(3)),
]

# ---------------------------------------------------------------- rax, losses_test.py and metrics_test.py

_RAX = t(0, 3, 1, 2), t(0, 0, 1, 1)
_RAX_TWO = t(0, 3, 1, 2, 1, 4, 3, 2).view(2, 4), t(0, 0, 1, 1, 2, 0, 0, 1).view(2, 4)
_rax_total = sum(map(exp, (0, 3, 1, 2)))
_RAX_CALLS = [
    (lambda: co.softmax_loss(*_RAX), -log(exp(2) / _rax_total) - log(exp(1) / _rax_total)),
    (
        lambda: co.list_mle_loss(*_RAX),
        -log(exp(1) / _rax_total) - log(exp(2) / (exp(2) + exp(0) + exp(3))) - log(1 / (1 + exp(3))),
    ),
    (
        lambda: co.unique_softmax_loss(*_RAX),
        -log(exp(2) / (1 + exp(3) + exp(2))) - log(exp(1) / (1 + exp(3) + exp(1))),
    ),
    (lambda: co.pairwise_hinge_loss(*_RAX), (3 - 1 + 1) + (3 - 2 + 1)),
    (lambda: co.pairwise_logistic_loss(*_RAX), logistic(1) + logistic(-2) + logistic(-1) + logistic(2)),
    (lambda: co.pairwise_soft_zero_one_loss(*_RAX), sigmoid(-1) + sigmoid(2) + sigmoid(1) + sigmoid(-2)),
    (lambda: co.pairwise_mse_loss(*_RAX), 2 * (3**2 + 0 + 1 + (2 + 1) ** 2 + (1 + 1) ** 2 + 1)),
    (lambda: co.pairwise_logistic_loss(_RAX[0], t(0, 0, 0, 0)), 0.0),
    (lambda: co.unique_softmax_loss(_RAX[0], t(0, 0, 0, 0)), 0.0),
    (lambda: co.mrr(*_RAX), 1 / 2),
    (lambda: co.average_precision(*_RAX), (1 / 2 + 2 / 3) / 2),
    (lambda: co.ndcg(*_RAX), (1 / log2(3) + 1 / log2(4)) / (1 + 1 / log2(3))),
    (lambda: co.mrr(*_RAX_TWO), (1 / 2 + 1 / 3) / 2),
    (lambda: co.average_precision(*_RAX_TWO), ((1 / 2 + 2 / 3) / 2 + (1 / 3 + 1 / 2) / 2) / 2),
    (lambda: co.ndcg(*_RAX_TWO, reduction="none")[1], (1 / log2(4) + 3 / log2(5)) / (3 + 1 / log2(3))),
]

# ---------------------------------------------------------------- TensorFlow Ranking, losses_test.py

_TF_SCORES, _TF_LABELS = t(1, 3, 2, 1, 2, 3).view(2, 3), t(0, 0, 1, 0, 0, 2).view(2, 3)
_tf_softmax = softmax((1, 3, 2)), softmax((1, 2, 3))
_TF_RANKS = t(1.4, -2.8, -0.4, 0, 1.8, 10.2, 1, 1.2, -3.2).view(3, 3)
_TF_GRADES, _TF_RELEVANT = t(0, 2, 1, 1, 0, 3, 0, 0, 0).view(3, 3), t(0, 0, 1, 1, 0, 1, 0, 0, 0).view(3, 3)
_MLE = t(0, log(3), log(2), 0, log(2), log(3)).view(2, 3), t(0, 2, 1, 1, 0, 2).view(2, 3)
_TF_NDCG = (3 / log(4) + 1 / log(3)) / (3 / log(2) + 1 / log(3)) + (7 / log(2) + 1 / log(4)) / (7 / log(2) + 1 / log(3))
_TF_CALLS = [
    (lambda: co.pairwise_hinge_loss(_TF_SCORES[0], _TF_LABELS[0], normalize=True), (0 + 2) / 2),
    (lambda: co.pairwise_logistic_loss(_TF_SCORES[0], _TF_LABELS[0], normalize=True), (logistic(1) + logistic(-1)) / 2),
    (
        lambda: co.pairwise_soft_zero_one_loss(_TF_SCORES[1], _TF_LABELS[1], normalize=True),
        (sigmoid(-2) + sigmoid(-1)) / 2,
    ),
    (lambda: co.pairwise_mse_loss(_TF_SCORES, _TF_LABELS, normalize=True), (4 + 0 + 4 + 1 + 0 + 1) / 6),
    (lambda: co.softmax_loss(_TF_SCORES, _TF_LABELS), -(log(_tf_softmax[0][2]) + 2 * log(_tf_softmax[1][2])) / 2),
    (
        lambda: (
            co.unique_softmax_loss(_TF_SCORES, t(0, 0, 1, 0, 1, 2).view(2, 3), weights=t(1, 3), reduction="sum") / 2
        ),
        -(log(_tf_softmax[0][2]) + log(softmax((1, 2))[1]) + 3 * log(_tf_softmax[1][2])) / 2,
    ),
    (lambda: co.list_mle_loss(*_MLE), -(log(3 / 6) + log(2 / 3) + log(3 / 6) + log(1 / 3)) / 2),
    (lambda: co.approx_ndcg_loss(_TF_RANKS, _TF_GRADES, reduction="sum") - 2, -_TF_NDCG),
    (lambda: co.neural_sort_ndcg_loss(_TF_RANKS, _TF_GRADES, temperature=0.1, reduction="sum") - 2, -_TF_NDCG),
    (lambda: co.approx_mrr_loss(_TF_RANKS, _TF_RELEVANT, reduction="sum") - 2, -(1 / 2 + (1 / 3 + 1) / 2)),
    (
        lambda: co.approx_mrr_loss(_TF_RANKS, _TF_RELEVANT, weights=t(2, 1, 1), reduction="sum") - 3,
        -(1 + (1 / 3 + 1) / 2),
    ),
]

# ---------------------------------------------------------------- XGBoost, tests/cpp/metric/test_rank_metric.h

_XGB = t(0.1, 0.9, 0.1, 0.9), t(0, 0, 1, 1)
_XGB_CALLS = [
    (lambda: co.ndcg(*_XGB, ties="index"), 0.6509),
    (lambda: co.ndcg(*_XGB, k=2, ties="index"), 0.3868),
    (lambda: co.average_precision(*_XGB, ties="index"), 0.5),
    (lambda: co.average_precision(*_XGB, k=2, ties="index"), 0.25),
    (lambda: co.ndcg(t(0.1, 0.2, 0.3, 4, 70), t(10, 0, 0, 1, 5)), 0.409738),
    (  # XGBoost counts a list without a relevant item as 1, and we don't count it
        lambda: (
            (
                co.average_precision(
                    t(0.1, 0.9, 0.2, 0.8, 0.4, 1.7), t(1, 1, 1, 0, 1, 0), cu_lengths=[0, 2, 5, 6], reduction="sum"
                )
                + 1
            )
            / 3
        ),
        0.8611,
    ),
]

# ---------------------------------------------------------------- torchsort, README; TRL, tests/invariant

_SORT = t(8, 0, 5, 3, 2, 1, 6, 7, 9)
_OTHER_CALLS = [
    (lambda: co.soft_sort(_SORT), [x + 0.5556 for x in range(9)]),
    (lambda: co.soft_sort(_SORT, regularization_strength=0.1), [0, 1, 2, 3, 5, 6, 7, 8, 9]),
    (lambda: co.soft_rank(_SORT), [8, 1, 5, 4, 3, 2, 6, 7, 9]),
    (lambda: co.dpo_loss(*[t(-12.5)] * 4), 0.6931471824645996),
]


@pytest.mark.parametrize(("call", "expected"), [*_ALLRANK_CALLS, *_RAX_CALLS, *_TF_CALLS, *_XGB_CALLS, *_OTHER_CALLS])
def test_published_values(call, expected):
    torch.testing.assert_close(
        call(), t(*expected) if isinstance(expected, list) else t(expected).squeeze(0), rtol=1e-4, atol=1e-4
    )


def test_torchsort_spearman():
    """torchsort's README ranks the target softly too; ours takes the target's hard ranks and averages those of ties."""
    pred, target = t(1, 2, 3, 4, 5), t(5, 6, 7, 8, 7)
    theirs = [co.soft_rank(x) - 3 for x in (pred, target)]
    expected = (theirs[0] * theirs[1]).sum() / (theirs[0].norm() * theirs[1].norm())
    torch.testing.assert_close(expected, t(0.8321).squeeze(), rtol=0, atol=1e-4)
    torch.testing.assert_close(1 - co.spearman_loss(pred, target), t(0.8208).squeeze(), rtol=0, atol=1e-4)


def test_xgboost_lambdas():
    """Our gradient with XGBoost's two normalisations equals rank:ndcg in tests/cpp/objective/test_lambdarank_obj.cc."""
    scores, labels = t(0, 0.1).requires_grad_(), t(0, 1)
    co.lambda_loss(scores, labels, log_base=e).backward()
    by_score = scores.grad / (0.1 + 0.01)
    total = by_score.abs().sum()
    theirs = 2.0 * by_score * (1 + total).log2() / total
    torch.testing.assert_close(theirs, t(2.06611, -2.06611), rtol=1e-5, atol=0)


def test_lightgbm_lambdas():
    """Our gradient equals the formula of lambdarank with lambdarank_norm=False, as LightGBM publishes no value."""
    scores, labels, k, sigma = t(0.3, -0.2, 1.1, 0.4, 0.9), t(2, 3, 0, 1, 0), 2, 1.5
    order = scores.argsort(descending=True).tolist()
    gains = [2 ** float(labels[i]) - 1 for i in order]
    best = sum(g / log2(r + 2) for r, g in enumerate(sorted(gains, reverse=True)[:k]))
    lambdas = [0.0] * 5
    for a in range(k):
        for b in range(a + 1, 5):
            if gains[a] == gains[b]:
                continue
            high, low = (a, b) if gains[a] > gains[b] else (b, a)
            change = (gains[high] - gains[low]) * abs(1 / log2(a + 2) - 1 / log2(b + 2)) / best
            slope = sigma * change * sigmoid(-sigma * float(scores[order[high]] - scores[order[low]]))
            lambdas[order[high]] -= slope
            lambdas[order[low]] += slope
    scores.requires_grad_()
    co.lambda_loss(scores, labels, k=k, sigma=sigma, log_base=e).backward()
    torch.testing.assert_close(scores.grad, t(*lambdas))
