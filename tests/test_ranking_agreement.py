"""The list losses equal values worked out by hand from the formulas, and other libraries' losses where those are
right.
"""

from __future__ import annotations

import inspect
from math import e as E
from math import exp, log, log2

import pytest
import torch

import custom_ops
from custom_ops.registry import REGISTRY

LIST_LOSSES = [name for name, info in REGISTRY.items() if "labels" in inspect.signature(info.function).parameters]

# ---------------------------------------------------------------- by hand

# The numbers e^s are 1, 2, 4, so item 0 is the best and ranked last. Its pairs are (0, 1), (0, 2) and (2, 1).
SCORES, LABELS = [0.0, log(2), log(4)], [2, 0, 1]
DISCOUNT = [1.0, 1 / log2(3), 1 / 2]  # of ranks 1, 2, 3
IDEAL = 3 * DISCOUNT[0] + 1 * DISCOUNT[1]  # the gains are 3 and 1
PHI = [log2(1 + 2), log2(1 + 4), log2(1 + 1 / 2)]  # the pairs' losses
STEP = [2 / 3, 4 / 5, 1 / 3]  # the negative slopes of ln 2 times PHI, e^-d / (1 + e^-d)
Z = exp(2) + 1 + E
RANKS = [1 + 2 / 3 + 4 / 5, 1 + 1 / 3 + 2 / 3, 1 + 1 / 5 + 1 / 3]  # the smooth ranks at temperature 1


def weighted(*weights: float) -> tuple[float, list[float]]:
    """Return the weighted sum of the pairs' logistic losses to base 2, and its gradient."""
    a, b, c = (w * step / log(2) for w, step in zip(weights, STEP))
    return sum(w * phi for w, phi in zip(weights, PHI)), [-a - b, a + c, b - c]


GAINS = [3 / IDEAL, 2 / IDEAL, 1 / IDEAL]  # differences of gains
LAMBDARANK = [g * (DISCOUNT[a] - DISCOUNT[b]) for g, a, b in zip(GAINS, (1, 0, 0), (2, 2, 1))]
NDCG2 = [g * (DISCOUNT[a - 1] - DISCOUNT[a]) for g, a in zip(GAINS, (1, 2, 1))]

# Each row has the name, the options, the loss, and the gradient where it was worked out.
BY_HAND = [
    ("pairwise_logistic_loss", {}, log(3 * 5 * 1.5), [-22 / 15, 1, 7 / 15]),
    ("pairwise_logistic_loss", {"normalize": True}, log(22.5) / 3, [-22 / 45, 1 / 3, 7 / 45]),
    ("pairwise_soft_zero_one_loss", {}, 9 / 5, [-2 / 9 - 4 / 25, 4 / 9, 4 / 25 - 2 / 9]),
    ("pairwise_exponential_loss", {}, 6.5, [-6, 2.5, 3.5]),
    ("pairwise_hinge_loss", {}, 3 + 2 * log(2), [-2, 2, 0]),
    ("pairwise_hinge_loss", {"margin": 0.0}, 3 * log(2), [-2, 1, 1]),
    (
        "pairwise_hinge_loss",
        {"squared": True},
        (1 + log(2)) ** 2 + (1 + log(4)) ** 2 + (1 - log(2)) ** 2,
        [-4 - 6 * log(2), 4, 6 * log(2)],
    ),
    (
        "pairwise_mse_loss",
        {},
        2 * ((2 + log(2)) ** 2 + (1 + log(4)) ** 2 + (1 - log(2)) ** 2),
        [-4 * (3 + 3 * log(2)), 4 * 3, 4 * 3 * log(2)],
    ),
    ("lambda_loss", {"weighting": "ranknet"}, *weighted(1, 1, 1)),
    ("lambda_loss", {"weighting": "label_diff"}, *weighted(2, 1, 1)),
    ("lambda_loss", {"weighting": "lambdarank"}, *weighted(*LAMBDARANK)),
    (  # over all pairs, with weights 3/2, 0 and 1 over the ideal, and each item with itself
        "lambda_loss",
        {"weighting": "ndcg1"},
        (3 / 2 * (log2(3) + log2(5) + 1) + log2(5 / 4) + log2(3 / 2) + 1) / IDEAL,
        [x / IDEAL / log(2) for x in (1 / 5 - 3 / 2 * (2 / 3 + 4 / 5), 1 + 1 / 3, 6 / 5 - 1 / 5 - 1 / 3)],
    ),
    ("lambda_loss", {"weighting": "ndcg2"}, *weighted(*NDCG2)),
    ("lambda_loss", {"weighting": "ndcg2pp"}, *weighted(*(10 * a + b for a, b in zip(NDCG2, LAMBDARANK)))),
    ("lambda_loss", {"weighting": "lambdarank", "k": 1}, *weighted(0, 2 / 2 / 3, (1 - DISCOUNT[1]) / 3)),
    ("lambda_loss", {"weighting": "ranknet", "k": 2, "topk_mode": "and"}, *weighted(0, 0, 1)),
    ("list_net_loss", {}, log(7) - (log(2) + E * log(4)) / Z, [1 / 7 - exp(2) / Z, 2 / 7 - 1 / Z, 4 / 7 - E / Z]),
    ("softmax_loss", {}, 3 * log(7) - log(4), [3 / 7 - 2, 6 / 7, 12 / 7 - 1]),
    ("list_mle_loss", {}, log(7) + log(6 / 4), [1 / 7 - 1, 2 / 7 + 1 / 3, 4 / 7 + 2 / 3 - 1]),
    ("list_mle_loss", {"k": 1}, log(7), [1 / 7 - 1, 2 / 7, 4 / 7]),
    ("list_mle_loss", {"position_weights": "exponential"}, log(7) + log(1.5) / 3, None),
    ("list_mle_loss", {"position_weights": "discount"}, log(7) + log(1.5) / log2(3), None),
    ("unique_softmax_loss", {}, log(7) + log(1.5) / 3, [-6 / 7, 2 / 7 + 1 / 9, 4 / 7 - 1 / 9]),
    ("unique_softmax_loss", {"gain": "linear"}, log(7) + log(1.5) / 2, [-6 / 7, 2 / 7 + 1 / 6, 4 / 7 - 1 / 6]),
    ("cosent_loss", {"scale": 1.0}, log(7.5), [-6 / 7.5, 2.5 / 7.5, 3.5 / 7.5]),
    ("approx_ndcg_loss", {"temperature": 1.0}, 1 - (3 / log2(1 + RANKS[0]) + 1 / log2(1 + RANKS[2])) / IDEAL, None),
    ("approx_mrr_loss", {"temperature": 1.0}, 1 - (2 / RANKS[0] + 1 / RANKS[2]) / 3, None),
    ("smooth_ap_loss", {"temperature": 1.0}, 1 - (1.8 / RANKS[0] + 1.2 / RANKS[2]) / 2, None),
    # NeuralSort's rows, the softmax of (n + 1 - 2i) s - B, are (1, 8, 16) / 25, (1, 2, 1) / 4 and (16, 8, 1) / 25.
    ("neural_sort_ndcg_loss", {}, 1 - (19 / 25 + DISCOUNT[1] + 49 / 25 / 2) / IDEAL, None),
    # Scores that differ by at least the strength have hard ranks. They are 1, 2, 3, and those of the labels 3, 1, 2.
    ("spearman_loss", {"regularization_strength": 0.5}, 1.5, [0, 0, 0]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "own", "loss", "gradient"),
    [case for case in BY_HAND if case[0] in REGISTRY],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_values_worked_out_by_hand(name, own, loss, gradient):
    scores = torch.tensor(SCORES, dtype=torch.float64, requires_grad=True)
    ours = getattr(custom_ops, name)(scores, torch.tensor(LABELS), **own)
    assert ours.item() == pytest.approx(loss, rel=1e-12)
    ours.backward()
    if gradient is not None:
        assert scores.grad.tolist() == pytest.approx(gradient, rel=1e-12, abs=1e-12)


def test_every_list_loss_has_a_value_worked_out_by_hand():
    assert set(LIST_LOSSES) <= {name for name, *_ in BY_HAND}


# ---------------------------------------------------------------- other libraries


@pytest.fixture
def allrank():
    pytest.importorskip("allrank", reason="allRank isn't here: python tests/peers.py")
    from benchmarks import allrank_peers

    return allrank_peers.losses


@pytest.fixture
def pytorchltr():
    remedy = "pytorchltr isn't here: python tests/peers.py"
    return pytest.importorskip("pytorchltr.loss", reason=remedy)


@pytest.fixture
def torchsort():
    return pytest.importorskip("torchsort", reason="torchsort isn't built: python tests/peers.py --compile")


def draw(*shape, distinct=False):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    if distinct:
        return scores, torch.rand(shape, generator=generator, dtype=torch.float64).argsort(-1).double()
    return scores, torch.randint(0, 5, shape, generator=generator).double()


def agree(scores, ours, theirs, tolerance=1e-6):
    """Compare value and gradient; the other library computes partly in float32."""
    theirs = theirs.double()
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    weight = torch.randn_like(ours)
    gradients = (torch.autograd.grad((loss * weight).sum(), scores)[0] for loss in (ours, theirs))
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


ALLRANK_SCHEMES = {
    "rankNet_scheme": "ranknet",
    "rankNetWeightedByGTDiff_scheme": "label_diff",
    "lambdaRank_scheme": "lambdarank",
    "ndcgLoss2_scheme": "ndcg2",
    "ndcgLoss2PP_scheme": "ndcg2pp",
}  # ndcgLoss1_scheme isn't here, as it also sums over the pairs in order and each item with itself


@pytest.mark.parametrize("scheme", ALLRANK_SCHEMES)
@pytest.mark.parametrize("k", [None, 5])
def test_lambda_loss_is_allranks(allrank, scheme, k):
    scores, labels = draw(6, 20)
    ours = custom_ops.lambda_loss(
        scores, labels, weighting=ALLRANK_SCHEMES[scheme], k=k, topk_mode="and", sigma=1.5, mu=4.0, reduction="sum"
    )
    agree(scores, ours, allrank.lambdaLoss(scores, labels, 0.0, weighing_scheme=scheme, k=k, sigma=1.5, mu=4.0))


def test_lambda_loss_of_padded_lists_is_allranks(allrank):
    scores, labels = draw(3, 9)
    lengths = torch.tensor([9, 4, 6])
    padded = labels.masked_fill(torch.arange(9) >= lengths[:, None], -1)
    theirs = allrank.lambdaLoss(scores, padded, weighing_scheme="lambdaRank_scheme", reduction_log="natural")
    agree(scores, custom_ops.lambda_loss(scores, labels, lengths=lengths, log_base=E, reduction="sum"), theirs)


def test_ranknet_is_allranks(allrank):
    """allRank's mean is over the pairs of all lists, so this compares one list."""
    scores, labels = draw(1, 12)
    agree(scores, custom_ops.pairwise_logistic_loss(scores, labels, normalize=True), allrank.rankNet(scores, labels))
    ours = custom_ops.lambda_loss(scores, labels, weighting="label_diff", log_base=E, normalize=True)
    agree(scores, ours, allrank.rankNet_weightByGTDiff(scores, labels))


@pytest.mark.parametrize("alpha", [1.0, 10.0])
def test_approx_ndcg_is_allranks(allrank, alpha):
    scores, labels = draw(6, 20)
    theirs = 1 + allrank.approxNDCGLoss(scores, labels, alpha=alpha)  # allRank returns -NDCG
    agree(scores, custom_ops.approx_ndcg_loss(scores, labels, temperature=1 / alpha), theirs)


def test_list_net_and_list_mle_are_allranks(allrank):
    scores, labels = draw(6, 20, distinct=True)  # allRank's ListMLE shuffles tied items
    agree(scores, custom_ops.list_mle_loss(scores, labels), allrank.listMLE(scores, labels))
    agree(scores, custom_ops.list_net_loss(scores, labels), allrank.listNet(scores, labels))


def test_allranks_own_faults(allrank):
    """allRank still has the faults that ours are tested to be free of; a fixed release fails here."""
    scores = torch.tensor([[0.0, 30.0]], requires_grad=True)
    allrank.lambdaLoss(scores, torch.tensor([[1.0, 0.0]]), weighing_scheme="rankNet_scheme").backward()
    assert not scores.grad.any()
    far = torch.tensor([[50.0, 0.0, 1.0]])
    assert allrank.listMLE(far, torch.tensor([[2.0, 1.0, 0.0]])).item() == pytest.approx(52.95, abs=0.01)
    confident = torch.tensor([[0.0, 40.0, 0.0]])
    assert allrank.listNet(confident, torch.tensor([[3.0, 0.0, 0.0]])).item() < 22
    assert allrank.rankNet(far, torch.ones(1, 3)).isnan()


LTR_LENGTHS = torch.tensor([11, 3, 8, 1])


def test_pairwise_losses_are_pytorchltrs(pytorchltr):
    scores, labels = draw(4, 11)
    options = {"lengths": LTR_LENGTHS, "reduction": "none"}
    hinge = pytorchltr.PairwiseHingeLoss()(scores, labels, LTR_LENGTHS)
    agree(scores, custom_ops.pairwise_hinge_loss(scores, labels, **options), hinge)
    logistic = pytorchltr.PairwiseLogisticLoss(sigma=1.5)(scores, labels, LTR_LENGTHS) * log(2)
    agree(scores, custom_ops.pairwise_logistic_loss(scores, labels, sigma=1.5, **options), logistic)
    # pytorchltr's LambdaNDCGLoss2 takes the discounts of the next distance and its LambdaNDCGLoss1 all pairs, so
    # neither is compared.
    by_label = pytorchltr.LambdaARPLoss2(sigma=1.5)(scores, labels, LTR_LENGTHS)
    agree(scores, custom_ops.lambda_loss(scores, labels, weighting="label_diff", sigma=1.5, **options), by_label)


def test_pytorchltrs_own_faults(pytorchltr):
    scores = torch.tensor([[0.0, 200.0]], requires_grad=True)
    loss = pytorchltr.PairwiseLogisticLoss()(scores, torch.tensor([[1, 0]]), torch.tensor([2])).sum()
    assert loss.isinf()
    loss.backward()
    assert scores.grad.isnan().any()


@pytest.mark.parametrize("name", ["soft_rank", "soft_sort"])
@pytest.mark.parametrize("regularization", ["l2", "kl"])
@pytest.mark.parametrize("strength", [0.3, 1.0, 20.0])
def test_soft_ranks_are_torchsorts(torchsort, name, regularization, strength):
    values, _ = draw(5, 30)
    options = {"regularization": regularization, "regularization_strength": strength}
    agree(values, getattr(custom_ops, name)(values, **options), getattr(torchsort, name)(values, **options))


def test_torchsorts_own_faults(torchsort):
    values = torch.randn(4, 100, generator=torch.Generator().manual_seed(0), requires_grad=True)
    torchsort.soft_rank(values, regularization="kl", regularization_strength=0.01).square().sum().backward()
    assert not values.grad.isfinite().all()
