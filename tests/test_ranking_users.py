"""The list losses on what people pass to them: fills, outliers and infinities among ordinary scores, tiny and huge
labels.

The value, the gradient and the Hessian times a vector of every loss are compared with its formula, written as loops
over numbers of 150 digits and differentiated by finite differences.
"""

from __future__ import annotations

import itertools
import math
import random

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
    """Return the loss, its gradient and its Hessian times v, computed with many digits."""
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
    tolerance = (1e-4, 1e-5) if scores.dtype == torch.float32 else (1e-9, 1e-10)
    call = f"{name} {own} at {scores}, {labels}, v {v}"
    for what, a, e in zip(("value", "gradient", "product"), computed(function, scores, labels, v, **own), expected):
        wanted = tensor([float(x) for x in (e if isinstance(e, list) else [e])], dtype=torch.float64).to(a.dtype)
        close(a.reshape(-1), wanted, *tolerance, f"{what} of {call}: {a}, expected {wanted}")


def close(actual, expected, rtol, atol, what):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, msg=lambda text: f"{what}\n{text}")


# ---------------------------------------------------------------- fills and outliers


def fill_in(name, value):
    """Return scores and labels in which the item with that score has no weight: it is the least relevant and ranked
    last.
    """
    labels = tensor([3, 0, 1, 2]) if name == "list_mle" else tensor([2, 0, 0, 1])
    return [0.3, value, 1.1, 0.4], labels


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("mse", "list_net")])
def test_a_fill_is_as_good_as_another(name, dtype):
    """For an item without weight, only its place in the order counts (R1, R4 and R7)."""
    v = tensor([1.0, -2.0, 0.5, 0.25])
    for own in LOSSES[name][2]:
        moderate, labels = fill_in(name, -4000.0)
        expected = computed(LOSSES[name][0], tensor(moderate, dtype=dtype), labels, v.to(dtype), **own)
        for fill in (*FILLS, torch.finfo(dtype).min):
            scores = tensor(fill_in(name, fill)[0], dtype=dtype)
            for a, e in zip(computed(LOSSES[name][0], scores, labels, v.to(dtype), **own), expected):
                close(a, e, 1e-6, 1e-7, f"{name} {own} {fill}")
        if name != "exponential":
            assert_right(name, tensor(moderate, dtype=dtype), labels, v, **own)


def test_cosent_of_differences_that_round_alike():
    """The largest pair is found, and others are measured against it, by what the rounding of differences leaves out."""
    for scores in ([0.0, -1e9, 1e30], [-1e30, 1e9, 0.0], [-1e30, 1e9, -1e9], [1e30, 1e30, -1.0, 1.0]):
        for order in itertools.permutations(range(len(scores))):
            leaf = tensor(scores).requires_grad_()
            loss = custom_ops.cosent_loss(leaf, tensor(order), scale=1.0)
            (gradient,) = torch.autograd.grad(loss, leaf)
            with mp.workdps(DIGITS):
                value, expected, _ = derivatives(
                    lambda s, y=order: cosent(s, y, 1.0), leaf.tolist(), [0.0] * len(order)
                )
            close(loss.double(), tensor(float(value)).double(), 1e-5, 1e-5, f"{scores} {order}")
            close(gradient, tensor([float(x) for x in expected]), 1e-5, 1e-5, f"gradient of {scores} {order}")


def _scores(choose, n):
    """Draw ordinary scores, some of them tied, and a few fills and outliers of any size that float32 can hold."""
    sizes = (1e-30, 1e-3, 30.0, 100.0, 1e4, 65504.0, 1e9, 1e17, 3e38)
    scores = [choose.choice((round(choose.gauss(0, 1), 3), choose.randrange(-8, 8) / 8)) for _ in range(n)]
    base = choose.choice((0.0, 0.0, 0.0, 4096.0, -1e9, 2.0**100))
    scores = [base + x for x in scores]
    for _ in range(choose.choice((0, 1, 1, 2))):
        scores[choose.randrange(n)] = choose.choice((-1, -1, 1)) * choose.choice(sizes)
    for _ in range(choose.choice((0, 0, 1, 2))):
        scores[choose.randrange(n)] = choose.choice(scores)
    return tensor(scores, dtype=torch.float32)


def _labels(choose, n):
    kind = choose.choice((lambda: choose.randrange(4), lambda: choose.choice((0, 1)), lambda: 50 * choose.random()))
    scale = choose.choice((1.0, 1.0, 1e-17, 1e-3, 20.0))
    return tensor([scale * kind() for _ in range(n)], dtype=torch.float32)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", LOSSES)
def test_outliers_of_any_size_beside_ordinary_scores(name):
    """Value, gradient and second derivative equal those of loops over numbers of 150 digits."""
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
            continue  # finite differences, or squares, of such a loss exceed float32
        assert_right(name, scores, labels, tensor([round(choose.gauss(0, 1), 2) for _ in range(n)]), **own)
        assert_right(name, scores.double(), labels, tensor([round(choose.gauss(0, 1), 2) for _ in range(n)]), **own)
        checked += 1


# ---------------------------------------------------------------- soft ranks


def pools_of(u, fit):
    """Return where the pools of the non-increasing fit of u begin; fit(first, end) is the value of one pool."""
    begins = []
    for place in range(len(u)):
        begins.append(place)
        while len(begins) > 1 and fit(begins[-2], begins[-1]) <= fit(begins[-1], place + 1):
            begins.pop()
    return begins


def soft(x, strength, kl, sort):
    n = len(x)
    order = sorted(range(n), key=lambda i: x[i] if sort else -x[i])
    s = [-x[i] if sort else x[i] / strength for i in order]
    w = [mpf(n - p) / (strength if sort else 1) for p in range(n)]
    a, b = (w, s) if sort else (s, [mp.log(c) for c in w] if kl else w)

    def fit(first, end):
        if kl:
            return log_sum(a[first:end]) - log_sum(b[first:end])
        return sum(a[p] - b[p] for p in range(first, end)) / (end - first)

    begins = pools_of(a, fit)
    out = [mpf(0)] * n
    for first, end in zip(begins, [*begins[1:], n]):
        for p in range(first, end):
            if sort:
                out[p] = fit(first, end) - w[p]
            else:
                out[order[p]] = mp.exp(s[p] - fit(first, end)) if kl else s[p] - fit(first, end)
    return out


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("kl", [False, True])
def test_soft_ranks_beside_outliers(kl, sort):
    """Soft ranks are right even where exponentials would overflow (R7)."""
    choose = random.Random(f"{kl}{sort}")
    function = custom_ops.soft_sort if sort else custom_ops.soft_rank
    for _ in range(40):
        n = choose.randrange(1, 7)
        x, strength = _scores(choose, n), choose.choice((0.5, 1.0, 0.1))
        for values in (x, x.double()):
            with mp.workdps(DIGITS):
                expected = tensor([float(y) for y in soft([mpf(y) for y in x.tolist()], strength, kl, sort)])
            got = function(values, "kl" if kl else "l2", strength)
            if sort:  # outliers of both signs cancel within a pool
                size = max(abs(y) for y in x.tolist()) * (1e-7 if values.dtype == torch.float32 else 1e-15)
            torch.testing.assert_close(got.float(), expected, rtol=1e-5, atol=size if sort else 1e-6)


@pytest.mark.parametrize("kl", [False, True])
def test_soft_ranks_beside_fills(kl):
    for dtype in (torch.float32, torch.float64):
        x = tensor([2.9, -0.4, 3.1, 1e17], dtype=dtype, requires_grad=True)
        ranks = custom_ops.soft_rank(x, "kl" if kl else "l2", 0.5)
        if not kl:
            torch.testing.assert_close(ranks.detach(), tensor([2.3, 1, 2.7, 4], dtype=dtype))
        for fill in (*FILLS, torch.finfo(dtype).min):
            y = tensor([2.9, fill, 3.1, 1e17], dtype=dtype, requires_grad=True)
            again = custom_ops.soft_rank(y, "kl" if kl else "l2", 0.5)
            torch.testing.assert_close(again, ranks, rtol=1e-6, atol=1e-6)
            expected, got = (torch.autograd.grad(r[0], z, retain_graph=True)[0] for r, z in ((ranks, x), (again, y)))
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_spearman_beside_a_fill():
    labels = tensor([2, 0, 1, 3])
    expected = custom_ops.spearman_loss(tensor([2.9, -50.0, 3.1, 60.0]), labels)
    for low in FILLS:
        for high in (1e9, 3e38, INF):
            torch.testing.assert_close(custom_ops.spearman_loss(tensor([2.9, low, 3.1, high]), labels), expected)


# ---------------------------------------------------------------- what was found


def test_rows_of_what_was_found():
    labels = tensor([2, 0, 0, 1])
    for m in (-60, -1e7, -1e9, -3e38):
        assert custom_ops.approx_ndcg_loss(tensor([0.3, m, 1.1, 0.4]), labels).item() == pytest.approx(
            0.40381, abs=1e-5
        )
    assert custom_ops.softmax_loss(tensor([0.3, -INF, 1.1]), tensor([1, 0, 0])).item() == pytest.approx(
        1.1711, abs=1e-4
    )
    assert custom_ops.softmax_loss(tensor([3e38, -3e38, 1.1]), tensor([1, 0, 0])).item() == 0
    assert custom_ops.softmax_loss(tensor([INF, -1.0, 1.1]), tensor([1, 0, 0])).item() == 0


def test_many_fills_at_the_lowest_float_have_a_finite_loss(each_backend):
    """Each of them has a share of the labels' softmax, and the sum over their scores is finite only with that share."""
    scores, labels = torch.zeros(100), torch.zeros(100)
    scores[1:] = torch.finfo(torch.float32).min
    labels[0] = 2
    exact = custom_ops.list_net_loss(scores.double(), labels)
    torch.testing.assert_close(custom_ops.list_net_loss(scores, labels), exact.float())


def test_infinite_scores_of_no_order_are_nan():
    """The result is NaN where no limit exists: two items at the same infinity that are to be ranked."""
    for function in (custom_ops.approx_ndcg_loss, custom_ops.list_mle_loss, custom_ops.neural_sort_ndcg_loss):
        for infinite in (INF, -INF):
            loss = function(
                tensor([[infinite, 0.5, infinite], [0.1, 0.2, 0.3]]), tensor([1, 2, 0]).expand(2, 3), reduction="none"
            )
            assert loss.isnan().tolist() == [True, False], (function, infinite)
    alike = custom_ops.neural_sort_ndcg_loss(tensor([-INF, 0.5, 0.25, -INF]), tensor([0, 2, 1, 0]))
    assert (
        alike.item() == custom_ops.neural_sort_ndcg_loss(tensor([-900, 0.5, 0.25, -900]), tensor([0, 2, 1, 0])).item()
    )


def test_fills_of_items_that_no_term_reads():
    """Several items at -inf are fine where no term reads them: beyond the first k, without a gain, or below the
    rest.
    """
    scores, labels = tensor([0.3, -INF, 1.1, -INF]), tensor([2, 0, 1, 0])
    moderate = scores.clamp_min(-4000.0)
    for function, own in (
        (custom_ops.list_mle_loss, {"k": 2}),
        (custom_ops.list_mle_loss, {"k": 2, "ties": "breslow"}),
        (custom_ops.softmax_loss, {}),
        (custom_ops.unique_softmax_loss, {}),
        (custom_ops.cosent_loss, {}),
        (custom_ops.approx_ndcg_loss, {}),
        (custom_ops.lambda_loss, {"k": 2}),
        (custom_ops.pairwise_logistic_loss, {}),
        (custom_ops.pairwise_hinge_loss, {"squared": True}),
        (custom_ops.neural_sort_ndcg_loss, {}),
    ):
        v = tensor([1.0, 1.0, 0.5, 1.0])
        for a, e in zip(computed(function, scores, labels, v, **own), computed(function, moderate, labels, v, **own)):
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("score", [math.nan, INF, -INF])
def test_scores_of_items_of_weight_0(score):
    """A score that no term of weight above 0 reads may be NaN or infinite; NaN comes first in the order."""
    moderate = -4000.0 if score < 0 else 4000.0
    labels, own = tensor([0.0, 2.0, 1.0, 2.0]), {"item_weights": tensor([1.0, 0.0, 1.0, 0.5])}
    for function, options in (
        (custom_ops.lambda_loss, {}),
        (custom_ops.lambda_loss, {"weighting": "ndcg1", "k": 2}),
        (custom_ops.lambda_loss, {"weighting": "ndcg2pp", "normalize": True}),
        (custom_ops.unique_softmax_loss, {}),
    ):
        found, expected = (
            computed(function, tensor([0.4, s, 0.9, -0.3]), labels, tensor([1.0, 0, 0.5, -1]), **own, **options)
            for s in (score, moderate)
        )
        for a, e in zip(found, expected):
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-7, msg=f"{function} {options}")


def test_padding_at_minus_infinity_with_labels_below_0():
    """Labels below 0 are alike in having no gain, and pairs without a gain have no weight."""
    scores, v = tensor([0.5, -INF, 0.25, -INF]), tensor([1.0, 0.0, -1.0, 0.5])
    for function in (custom_ops.neural_sort_ndcg_loss, custom_ops.approx_ndcg_loss):
        found, expected = (computed(function, scores, tensor([2.0, a, 1.0, 0.0]), v) for a in (-1.0, 0.0))
        for a, e in zip(found, expected):
            torch.testing.assert_close(a, e, rtol=0, atol=0)
    low, labels = torch.full((5,), -INF), tensor([-1.0, -1.0, 0.0, 1.0, 2.0])
    assert custom_ops.lambda_loss(low, labels, k=3, topk_mode="and") == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_labels_of_any_size(dtype):
    """Gains of tiny labels are as exact as others, and gains of huge labels are finite (R9)."""
    scores = tensor([0.1, 0.2, 0.25], dtype=dtype)
    for function in (custom_ops.approx_ndcg_loss, custom_ops.neural_sort_ndcg_loss, custom_ops.unique_softmax_loss):
        smallest = 1e-300 if dtype == torch.float64 else 1e-37
        tiny = [function(scores, scale * tensor([1.0, 0, 2], dtype=dtype)) for scale in (1e-10, 1e-17, smallest)]
        linear = function(scores, tensor([1.0, 0, 2], dtype=dtype), gain="linear")
        for loss in tiny:
            torch.testing.assert_close(loss, linear, rtol=1e-6, atol=1e-7)
        huge = torch.finfo(dtype).max * tensor([0.5, 0, 1], dtype=dtype)
        torch.testing.assert_close(function(scores, huge, gain="linear"), linear)
        assert function(scores, huge).isfinite()
    for ties in ("average", "index"):
        best = [
            custom_ops.ndcg(scores, x * tensor([1.0, 0, 0], dtype=dtype), ties=ties).item() for x in (1, 1e-16, 1e-30)
        ]
        assert best == pytest.approx([0.5] * 3, rel=1e-6)
    for weighting in ("lambdarank", "ndcg1", "ndcg2", "ndcg2pp"):
        one = custom_ops.lambda_loss(scores, tensor([1.0, 0, 0], dtype=dtype), weighting=weighting)
        tiny = custom_ops.lambda_loss(scores, tensor([1e-20, 0, 0], dtype=dtype), weighting=weighting)
        torch.testing.assert_close(tiny, one)


@pytest.mark.parametrize("loss", ["bpr_loss", "dpo_loss", "margin_ranking_loss"])
def test_preferences_without_bound(loss):
    """A term of weight 0 doesn't turn an infinite difference into NaN."""
    if loss == "margin_ranking_loss":
        x = tensor([3e38, -INF], requires_grad=True)
        assert custom_ops.margin_ranking_loss(
            x, tensor([-3e38, 1.0]), tensor([1.0, 1.0]), reduction="none"
        ).tolist() == [0, INF]
        return
    x = tensor([1e4, 3e38, INF], requires_grad=True)
    zero = torch.zeros(3)
    function = getattr(custom_ops, loss)
    value = function(x, zero) if loss == "bpr_loss" else function(x, zero, zero, zero)
    (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    assert value.sum().item() == 0 and gradient.tolist() == [0, 0, 0] and second.tolist() == [0, 0, 0]


# ---------------------------------------------------------------- means of large terms


@pytest.mark.parametrize("name", ["logistic", "hinge", "exponential", "lambda"])
def test_a_mean_over_pairs_is_finite_where_their_sum_is_not(name):
    largest = torch.finfo(torch.float32).max
    function, _, _ = LOSSES[name]
    lead = {"exponential": math.log(largest) - 1, "lambda": largest / 4}.get(name, largest / 2)
    scores = (tensor([-0.5] * 40 + [0.5] * 40) * lead).requires_grad_()
    options = {"weighting": "ranknet", "log_base": math.e} if name == "lambda" else {}
    loss = function(scores, tensor([1] * 40 + [0] * 40), normalize=True, **options)
    (gradient,) = torch.autograd.grad(loss, scores)
    value = math.exp(lead) if name == "exponential" else lead
    close(loss / largest, tensor(value / largest), 1e-4, 0, f"{name}")
    slope = (value if name == "exponential" else 1) / 40
    signs = tensor([-1.0] * 40 + [1.0] * 40)
    close(gradient / slope, signs, 1e-4, 0, f"gradient of {name}")
