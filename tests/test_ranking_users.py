"""What people pass to the list losses: fills, outliers and infinities beside ordinary scores, tiny and huge labels.

Every loss is compared, in value, gradient and Hessian times a vector, with its formula written out in loops over
numbers of 150 digits, of which derivatives are taken as differences.
"""

from __future__ import annotations

import math
import random

import mpmath
import pytest
import torch
from mpmath import mp, mpf
from torch import tensor

import custom_ops

DIGITS, STEP = 150, mpf(10) ** -40
pytestmark = pytest.mark.usefixtures("each_backend")
INF = math.inf
FILLS = (-1e4, -65504.0, -1e9, -3e38, -INF)


# ---------------------------------------------------------------- the formulas


def softplus(x):
    return mp.log1p(mp.exp(x)) if x < 0 else x + mp.log1p(mp.exp(-x))


def sigmoid(x):
    return 1 / (1 + mp.exp(-x))


def gains_of(y, gain="exponential"):
    return [(mpf(2) ** a - 1 if gain == "exponential" else a) if a > 0 else mpf(0) for a in y]


def discount(rank):
    return 1 / mp.log(1 + rank, 2)


def ideal_of(gains, k=None):
    return sum(g * discount(r) for r, g in enumerate(sorted(gains, reverse=True)[:k], 1))


def smooth_ranks(s, temperature, among=None):
    among = range(len(s)) if among is None else among
    return [1 + sum(sigmoid((s[j] - s[i]) / temperature) for j in among if j != i) for i in range(len(s))]


def approx_ndcg(s, y, temperature=0.1, gain="exponential"):
    g = gains_of(y, gain)
    ranks = smooth_ranks(s, temperature)
    return 1 - sum(a * discount(r) for a, r in zip(g, ranks) if a) / ideal_of(g)


def approx_mrr(s, y, temperature=0.1):
    return 1 - sum(a / r for a, r in zip(y, smooth_ranks(s, temperature)) if a > 0) / sum(a for a in y if a > 0)


def smooth_ap(s, y, temperature=0.01):
    relevant = [i for i, a in enumerate(y) if a > 0]
    ranks, own = smooth_ranks(s, temperature), smooth_ranks(s, temperature, relevant)
    return 1 - sum(own[i] / ranks[i] for i in relevant) / len(relevant)


def pairs_of(y):
    return [(i, j) for i in range(len(y)) for j in range(len(y)) if y[i] > y[j]]


def pairwise_loss(phi):
    return lambda s, y, **own: sum(phi(s[i] - s[j], **own) for i, j in pairs_of(y))


def hinge(d, margin=1.0, squared=False):
    return max(mpf(0), margin - d) ** (2 if squared else 1)


def pairwise_mse(s, y):
    return sum(((a - b) - (c - d)) ** 2 for a, c in zip(s, y) for b, d in zip(s, y))


def log_sum(s):
    top = max(s)
    return top if top == -mp.inf else top + mp.log(sum(mp.exp(x - top) for x in s))


def softmax_loss(s, y):
    return sum(a * (log_sum(s) - b) for a, b in zip(y, s) if a)


def list_net(s, y):
    return softmax_loss(s, [mp.exp(a - log_sum(y)) for a in y])


def list_mle(s, y, k=None, ties="index"):
    order = sorted(range(len(s)), key=lambda i: -y[i])
    total = mpf(0)
    for place, i in enumerate(order):
        after, weight = order[place:], int(k is None or place < k)
        if ties == "breslow":
            after = [j for j in order if y[j] <= y[i]]
            places = [p for p, j in enumerate(order) if y[j] == y[i]]
            weight = mpf(sum(k is None or p < k for p in places)) / len(places)
        total += weight * log_sum([mpf(0), *(s[j] - s[i] for j in after if j != i)]) if weight else 0
    return total


def unique_softmax(s, y, gain="exponential"):
    g = gains_of(y, gain)
    total = mpf(0)
    for i, a in enumerate(g):
        lower = [s[j] - s[i] for j in range(len(s)) if y[j] < y[i]] if a else []
        total += a / max(g) * softplus(log_sum(lower)) if lower else 0
    return total


def cosent(s, y, scale=20.0):
    return log_sum([mpf(0), *(scale * (s[j] - s[i]) for i, j in pairs_of(y))])


def lambda_loss(s, y, weighting="lambdarank", sigma=1.0):
    g = gains_of(y)
    order = sorted(range(len(s)), key=lambda i: -s[i])
    rank = [order.index(i) + 1 for i in range(len(s))]

    def weight(i, j):
        if weighting == "label_diff":
            return y[i] - y[j]
        apart = abs(rank[i] - rank[j])
        swap = abs(discount(rank[i]) - discount(rank[j]))
        if weighting == "ndcg2":
            swap = discount(apart) - discount(apart + 1)
        return abs(g[i] - g[j]) / ideal_of(g) * swap

    terms = [(weight(i, j), sigma * (s[j] - s[i])) for i, j in pairs_of(y)]
    return sum(w * softplus(x) for w, x in terms if w) / mp.log(2)


def neural_sort_ndcg(s, y, temperature=1.0):
    n, g = len(s), gains_of(y)
    b = [sum(abs(x - z) for z in s) for x in s]
    found = mpf(0)
    for i in range(n):
        z = [((n - 1 - 2 * i) * s[j] - b[j]) / temperature for j in range(n)]
        e = [mp.exp(x - max(z)) for x in z]
        found += discount(i + 1) * sum(a * c for a, c in zip(e, g)) / sum(e)
    return 1 - found / ideal_of(g)


LOSSES = {
    "approx_ndcg": (custom_ops.approx_ndcg_loss, approx_ndcg, [{}, {"gain": "linear", "temperature": 1.0}]),
    "approx_mrr": (custom_ops.approx_mrr_loss, approx_mrr, [{}]),
    "smooth_ap": (custom_ops.smooth_ap_loss, smooth_ap, [{"temperature": 0.125}]),
    "logistic": (
        custom_ops.pairwise_logistic_loss,
        pairwise_loss(lambda d, sigma=1.0: softplus(-sigma * d)),
        [{}, {"sigma": 0.0625}],
    ),
    "soft_zero_one": (custom_ops.pairwise_soft_zero_one_loss, pairwise_loss(lambda d: sigmoid(-d)), [{}]),
    "exponential": (custom_ops.pairwise_exponential_loss, pairwise_loss(lambda d: mp.exp(-d)), [{}]),
    "hinge": (custom_ops.pairwise_hinge_loss, pairwise_loss(hinge), [{}, {"margin": 0.001}]),
    "squared_hinge": (custom_ops.pairwise_hinge_loss, pairwise_loss(hinge), [{"squared": True}]),
    "mse": (custom_ops.pairwise_mse_loss, pairwise_mse, [{}]),
    "softmax": (custom_ops.softmax_loss, softmax_loss, [{}]),
    "list_net": (custom_ops.list_net_loss, list_net, [{}]),
    "list_mle": (custom_ops.list_mle_loss, list_mle, [{}, {"k": 2, "ties": "breslow"}]),
    "unique_softmax": (custom_ops.unique_softmax_loss, unique_softmax, [{}, {"gain": "linear"}]),
    "cosent": (custom_ops.cosent_loss, cosent, [{}, {"scale": 1.0}]),
    "lambda": (
        custom_ops.lambda_loss,
        lambda_loss,
        [{}, {"weighting": "ndcg2", "sigma": 0.5}, {"weighting": "label_diff"}],
    ),
    "neural_sort": (custom_ops.neural_sort_ndcg_loss, neural_sort_ndcg, [{}]),
}


def derivatives(loss, s, v):
    """The loss, its gradient, and its Hessian times v, with numbers of many digits."""
    with mp.workdps(DIGITS):
        s, v = [mpf(x) for x in s], [mpf(x) for x in v]

        def at(*moves):
            moved = list(s)
            for direction, step in moves:
                moved = [x + step * d if mp.isfinite(x) else x for x, d in zip(moved, direction)]
            return loss(moved)

        gradient, product = [], []
        for i in range(len(s)):
            unit = [mpf(i == j) for j in range(len(s))]
            gradient.append((at((unit, STEP)) - at((unit, -STEP))) / (2 * STEP))
            corners = [a * b * at((unit, a * STEP), (v, b * STEP)) for a in (1, -1) for b in (1, -1)]
            product.append(sum(corners) / (4 * STEP * STEP))
        return loss(s), gradient, product


def computed(function, scores, labels, v, **own):
    scores = scores.clone().requires_grad_()
    loss = function(scores, labels, **own)
    (gradient,) = torch.autograd.grad(loss, scores, create_graph=True)
    product = torch.zeros_like(scores)
    if gradient.requires_grad:
        (product,) = torch.autograd.grad((gradient * v).sum(), scores)
    return loss.detach(), gradient.detach(), product


def assert_right(name, scores, labels, v, **own):
    function, formula, _ = LOSSES[name]
    v = v.to(scores.dtype)
    with mp.workdps(DIGITS):
        y = [mpf(x) for x in labels.tolist()]
        expected = derivatives(lambda s: formula(s, y, **own), scores.tolist(), v.tolist())
    rtol, atol = (1e-4, 1e-5) if scores.dtype == torch.float32 else (1e-9, 1e-10)
    for what, a, e in zip(("value", "gradient", "product"), computed(function, scores, labels, v, **own), expected):
        wanted = tensor([float(x) for x in (e if isinstance(e, list) else [e])], dtype=torch.float64).to(a.dtype)
        torch.testing.assert_close(
            a.reshape(-1),
            wanted,
            rtol=rtol,
            atol=atol,
            msg=lambda m: f"{what} of {name} {own} at {scores}, {labels}, v {v}: {a}, expected {wanted}\n{m}",
        )


# ---------------------------------------------------------------- fills and outliers


def fill_in(name, value):
    """Scores and labels in which the item of that score has no weight: it is the least relevant, and the last."""
    labels = tensor([3, 0, 1, 2]) if name == "list_mle" else tensor([2, 0, 0, 1])
    return [0.3, value, 1.1, 0.4], labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("mse", "list_net")])
def test_a_fill_is_as_good_as_another(name, dtype):
    """R1, R4 and R7: of an item without weight only the order counts."""
    v = tensor([1.0, -2.0, 0.5, 0.25])
    for own in LOSSES[name][2]:
        moderate, labels = fill_in(name, -4000.0)
        expected = computed(LOSSES[name][0], tensor(moderate, dtype=dtype), labels, v.to(dtype), **own)
        for fill in (*FILLS, torch.finfo(dtype).min):
            scores = tensor(fill_in(name, fill)[0], dtype=dtype)
            for a, e in zip(computed(LOSSES[name][0], scores, labels, v.to(dtype), **own), expected):
                torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-7, msg=lambda m: f"{name} {own} {fill}: {m}")
        if name != "exponential":
            assert_right(name, tensor(moderate, dtype=dtype), labels, v, **own)


def _scores(choose, n):
    """Ordinary ones, some tied, and a few fills and outliers of any finite size that float32 has."""
    sizes = (1e-30, 1e-3, 30.0, 100.0, 1e4, 65504.0, 1e9, 1e17, 3e38)
    scores = [choose.choice((round(choose.gauss(0, 1), 3), choose.randrange(-8, 8) / 8)) for _ in range(n)]
    base = choose.choice((0.0, 0.0, 0.0, 4096.0, -1e9, 2.0**100))
    scores = [base + x for x in scores]
    for _ in range(choose.choice((0, 1, 1, 2))):
        scores[choose.randrange(n)] = choose.choice((-1, -1, 1)) * choose.choice(sizes)
    return tensor(scores, dtype=torch.float32)


def _labels(choose, n):
    kind = choose.choice((lambda: choose.randrange(4), lambda: choose.choice((0, 1)), lambda: 50 * choose.random()))
    scale = choose.choice((1.0, 1.0, 1e-17, 1e-3, 20.0))
    return tensor([scale * kind() for _ in range(n)], dtype=torch.float32)


@pytest.mark.parametrize("name", LOSSES)
def test_outliers_of_any_size_beside_ordinary_scores(name):
    """The value, gradient and second derivative against loops over numbers of 150 digits."""
    choose = random.Random(name)
    checked = 0
    while checked < 12:
        n = choose.randrange(2, 7)
        scores, labels = _scores(choose, n), _labels(choose, n)
        if len(set(labels.tolist())) == 1 or (name == "smooth_ap" and (labels > 0).all()):
            continue
        own = choose.choice(LOSSES[name][2])
        leads = {a - b for a in scores.double().tolist() for b in scores.double().tolist()}
        kink = {"hinge": own.get("margin", 1.0), "squared_hinge": 1.0}.get(name)
        if kink in leads or (name in ("lambda", "neural_sort") and len(set(scores.tolist())) < n):
            continue
        with mp.workdps(DIGITS):
            value = LOSSES[name][1]([mpf(x) for x in scores.tolist()], [mpf(x) for x in labels.tolist()], **own)
        if not value < 1e15:
            continue  # of which the derivatives by differences, or squares, are beyond float32
        assert_right(name, scores, labels, tensor([round(choose.gauss(0, 1), 2) for _ in range(n)]), **own)
        assert_right(name, scores.double(), labels, tensor([round(choose.gauss(0, 1), 2) for _ in range(n)]), **own)
        checked += 1
