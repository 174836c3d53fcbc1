"""List losses and metrics on labels, lengths and options at the limits of their domains, on each backend."""

from __future__ import annotations

import inspect
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import custom_ops as co
from benchmarks.memory import peak_bytes
from custom_ops.ranking._arguments import ListLossModule
from custom_ops.registry import FUNCTIONS

T = torch.tensor
LOSSES = sorted(
    n
    for n, info in FUNCTIONS.items()
    if "reduction" in (p := inspect.signature(info.function).parameters) and "cu_lengths" in p
)
METRICS = ["average_precision", "mrr", "ndcg"]
OF_ORDER = [
    "cosent_loss",
    "list_mle_loss",
    "spearman_loss",
    *(n for n in LOSSES if n.startswith("pairwise") and "mse" not in n),
]
OF_GAINS = ["approx_ndcg_loss", "lambda_loss", "neural_sort_ndcg_loss", "unique_softmax_loss"]
SCORES, LABELS = T([0.3, -0.2, 1.1, 0.4]), T([1, 0, 7, 0])

pytestmark = pytest.mark.usefixtures("each_backend")


def loss_and_gradient(name, scores, labels, **options):
    scores = scores.detach().clone().requires_grad_()
    loss = getattr(co, name)(scores, labels, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), scores)[0]


def same(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, equal_nan=True, **(tolerance or {"rtol": 1e-5, "atol": 1e-6}))


# ---------------------------------------------------------------- unsigned labels


@pytest.mark.parametrize("name", LOSSES)
def test_unsigned_labels_are_their_numbers(name):
    same(getattr(co, name)(SCORES, LABELS.to(torch.uint64)), getattr(co, name)(SCORES, LABELS))
    if name in OF_ORDER:
        large = T([2**63 + 3, 2**63 + 1, 2**64 - 1, 2**63 + 1], dtype=torch.uint64)
        same(getattr(co, name)(SCORES, large), getattr(co, name)(SCORES, T([1, 0, 2, 0])))


@pytest.mark.parametrize("name", LOSSES)
def test_an_undefined_list_of_weight_0_has_no_part_in_a_gradient(name):
    scores, labels = SCORES.repeat(3, 1), LABELS.float().repeat(3, 1)
    scores[1, 2] = labels[2, 2] = math.nan
    loss, gradient = loss_and_gradient(name, scores, labels, weights=T([1.0, 0.0, 0.0]))
    alone, of_alone = loss_and_gradient(name, SCORES, LABELS.float())
    same(loss, alone)
    same(gradient, torch.stack([of_alone, torch.zeros(4), torch.zeros(4)]))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("form", ["padded", "masked", "jagged"])
@pytest.mark.parametrize("name", LOSSES)
def test_an_undefined_list_of_weight_0_has_no_part_in_a_second_derivative(name, form):
    labels, v = LABELS.float().repeat(3, 1), T([0.5, -1.0, 2.0, 0.25])

    def second(x, function):
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x), x, create_graph=True)
        return torch.autograd.grad((gradient * v).sum(), x)[0]

    def weighted(x):
        where = {"mask": torch.ones(3, 4, dtype=torch.bool)} if form == "masked" else {}
        given = (x, labels)
        if form == "jagged":
            given, where = (x.flatten(), labels.flatten()), {"cu_lengths": T([0, 4, 8, 12])}
        return getattr(co, name)(*given, **where, weights=T([1.0, 0.0, 0.0]))

    alone = second(SCORES, lambda x: getattr(co, name)(x, LABELS.float()))
    for value in (math.nan, math.inf, -math.inf):
        scores = SCORES.repeat(3, 1)
        scores[1], labels[2, 2] = value, math.nan
        same(second(scores, weighted), torch.stack([alone, torch.zeros(4), torch.zeros(4)]))


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "pairwise_mse_loss"])  # tied labels count in it
def test_a_nan_score_in_a_list_that_does_not_contribute_is_not_read(name):
    scores, labels = SCORES.repeat(2, 1), torch.stack([LABELS.float(), torch.zeros(4)])
    scores[1, 2] = math.nan
    loss, gradient = loss_and_gradient(name, scores, labels, reduction="none")
    alone, of_alone = loss_and_gradient(name, SCORES, LABELS.float(), reduction="none")
    assert loss[1] == 0
    same(gradient, torch.stack([of_alone, torch.zeros(4)]))
    same(loss[0], alone)


# ---------------------------------------------------------------- labels below 0


@pytest.mark.parametrize("name", OF_GAINS)
@pytest.mark.parametrize("gain", ["exponential", "linear"])
def test_a_label_below_0_has_no_gain(name, gain):
    if name == "lambda_loss":
        for weighting in ("ndcg1", "lambdarank", "ndcg2", "ndcg2pp"):
            raised = co.lambda_loss(SCORES, T([2, -3, 1, -3]), weighting=weighting, gain=gain, k=3)
            same(raised, co.lambda_loss(SCORES, T([2, 0, 1, 0]), weighting=weighting, gain=gain, k=3))
        return
    same(*(loss_and_gradient(name, SCORES, T(y), gain=gain)[0] for y in ([2, -3, 1, -3], [2, 0, 1, 0])))


def test_lambda_loss_of_padding_labels():
    assert float(co.lambda_loss(torch.zeros(5), T([1, -1, -1, -1, -1]))) == pytest.approx(2.0515, abs=1e-4)


@pytest.mark.parametrize("name", METRICS)
def test_metrics_of_padding_labels_lie_between_0_and_1(name):
    metric = getattr(co, name)
    assert float(co.ndcg(torch.arange(6.0), T([1, -1, -1, -1, -1, -1]))) == pytest.approx(0.3562, abs=1e-4)
    for labels in ([1, -1, -5, 2], [-1, -1, -1, -1], [3, -1, 0, -2]):
        same(metric(SCORES, T(labels)), metric(SCORES, T(labels).clamp_min(0)))
        assert 0 <= float(metric(SCORES, T(labels))) <= 1


# ---------------------------------------------------------------- the order of labels


@pytest.mark.parametrize("gain", ["exponential", "linear", lambda y: y - 0.5])
def test_dcg_of_labels_below_0_and_near_0(gain):
    scores, labels = T([0.4, 0.3, 0.2, 0.1]), T([1.0, -1.0, 0.0, -2.5])
    same(co.dcg(scores, labels, gain=gain), co.dcg(scores, labels.clamp_min(0), gain=gain))
    if gain == "exponential":
        same(co.dcg(scores.double(), 1e-17 * labels.double()), 1e-17 * T(math.log(2)).double(), rtol=1e-6, atol=0)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", OF_ORDER)
@pytest.mark.parametrize(
    "labels",
    [
        T([1700000001, 1700000000, 1700000007, 1700000000]),
        T([2**60 + 1, 2**60, 2**60 + 2, 2**60]),
        T([-(2**62), -(2**62) - 1, 2**62, -(2**62) - 1]),
        T([1e-60, 0.0, 1.0, 0.0], dtype=torch.float64),
        T([1 + 1e-12, 1.0, 2.0, 1.0], dtype=torch.float64),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_the_order_of_labels_is_exact(name, labels, dtype):
    scores = SCORES.to(dtype)
    same(loss_and_gradient(name, scores, labels), loss_and_gradient(name, scores, LABELS), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["list_net_loss", "pairwise_mse_loss"])
def test_the_differences_of_time_stamps_are_exact(name):
    later = LABELS + 1_700_000_000
    for labels in (later, later.double()):
        same(loss_and_gradient(name, SCORES, labels), loss_and_gradient(name, SCORES, LABELS))


@pytest.mark.parametrize("name", OF_GAINS)
def test_exponential_gains_of_time_stamps_are_relative_to_the_highest(name):
    """For labels far above 1, only their distances from the highest label count."""
    for labels in (LABELS + 1_700_000_000, LABELS.double() + 1_700_000_000, LABELS + 2**40):
        same(loss_and_gradient(name, SCORES, labels), loss_and_gradient(name, SCORES, LABELS + 1000))


def test_linear_gains_of_time_stamps_keep_their_groups():
    labels = LABELS + 1_700_000_000
    same(
        co.unique_softmax_loss(SCORES, labels, gain="linear"),
        co.unique_softmax_loss(SCORES, labels.double(), gain="linear"),
    )
    assert co.softmax_loss(SCORES, labels) > 0


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "softmax_loss"])
def test_lists_of_ordinary_labels_beside_time_stamps(name):
    """Each list is read independently, whether lists are padded, given by lengths, or concatenated."""
    scores = torch.stack([SCORES, SCORES.flip(0)])
    labels = torch.stack([T([2, 0, 1, 0]), T([1700000001, 1700000000, 1700000007, 1])])
    each = torch.stack([getattr(co, name)(s, y) for s, y in zip(scores, labels)])
    same(getattr(co, name)(scores, labels, reduction="none"), each)
    flat = getattr(co, name)(scores.flatten(), labels.flatten(), cu_lengths=[0, 4, 4, 8], reduction="none")
    same(flat[[0, 2]], each)
    first = torch.stack([getattr(co, name)(s[:3], y[:3]) for s, y in zip(scores, labels)])
    same(getattr(co, name)(scores, labels, lengths=[3, 3], reduction="none"), first)


def test_relevance_is_not_rounded_away():
    labels = T([1e-60, 0.0, 0.0, 0.0], dtype=torch.float64)
    same(co.smooth_ap_loss(SCORES, labels), co.smooth_ap_loss(SCORES, T([1, 0, 0, 0])))
    for name in METRICS[:2]:
        same(getattr(co, name)(SCORES, labels), getattr(co, name)(SCORES, T([1, 0, 0, 0])))


# ---------------------------------------------------------------- NaN labels


@pytest.mark.parametrize("name", LOSSES)
def test_a_nan_label_makes_its_list_nan_and_is_not_read_behind_the_mask(name):
    loss = getattr(co, name)
    labels = T([[1, torch.nan, 0, 2], [1, 0, 0, 2]])
    scores = torch.stack([SCORES, SCORES])
    for labels_ in (labels, labels.double()):
        losses = loss(scores, labels_, reduction="none")
        assert losses.isnan().tolist() == [True, False]
        same(losses[1], loss(SCORES, labels_[1]))
        assert loss(scores, labels_).isnan()
        keep = T([True, False, True, True])
        masked = loss_and_gradient(name, SCORES, labels_[0], mask=keep)
        kept = loss_and_gradient(name, SCORES[keep], labels_[0][keep])
        same(masked[0], kept[0])
        same(masked[1][keep], kept[1])
    flat = loss(scores.flatten(), labels.flatten(), cu_lengths=[0, 4, 8], reduction="none")
    assert flat.isnan().tolist() == [True, False]
    assert loss(SCORES, T([torch.nan] * 4)).isnan() and loss(SCORES * 0, labels[0]).isnan()


@pytest.mark.parametrize("name", METRICS)
def test_a_nan_label_makes_the_metric_nan(name):
    metric = getattr(co, name)
    scores, labels = torch.stack([SCORES, SCORES]), T([[1, torch.nan, 0, 2], [1, 0, 0, 2]])
    assert metric(scores, labels, reduction="none").isnan().tolist() == [True, False]
    flat = metric(scores.flatten(), labels.flatten(), cu_lengths=[0, 4, 8], reduction="none")
    assert flat.isnan().tolist() == [True, False]
    same(flat[1], metric(SCORES, labels[1]))
    keep = T([True, False, True, True])
    same(metric(SCORES, labels[0], mask=keep), metric(SCORES[keep], labels[0][keep]))


# ---------------------------------------------------------------- which lists count


@pytest.mark.parametrize("weighting", ["ranknet", "lambdarank", "ndcg1", "ndcg2", "ndcg2pp", "label_diff"])
def test_the_mean_counts_the_same_lists_whatever_the_scores(weighting):
    labels = T([[1, 0, 0, 0], [1, 0, 0, 2], [1, 1, 1, 1]])
    options = {"weighting": weighting, "k": 2, "topk_mode": "and"}
    losses = co.lambda_loss(torch.stack([SCORES.flip(0)] * 3), labels, reduction="none", **options)
    last = T([0.0, 3.0, 2.0, 1.0])  # the top 2 items are irrelevant
    scores = torch.stack([last, SCORES.flip(0), SCORES.flip(0)])
    assert co.lambda_loss(last, labels[0], **options) == 0
    count = 3 if weighting == "ndcg1" else 2
    same(co.lambda_loss(scores, labels, **options), losses[1:].sum() / count)
    flat = co.lambda_loss(scores.flatten(), labels.flatten(), cu_lengths=[0, 4, 8, 12], **options)
    same(flat, losses[1:].sum() / count)


def test_ndcg_loss_1_is_over_all_pairs():
    """NDCG-Loss1 sums over all pairs, as in the paper and in allRank, whose test has this value."""
    scores = T([0.5, 0.3, 0.5])
    same(co.lambda_loss(scores, scores, weighting="ndcg1"), T(2.9272110462))
    with pytest.raises(AssertionError):  # tied labels are pairs too
        same(co.lambda_loss(scores, torch.ones(3), weighting="ndcg1"), T(0.0))


# ---------------------------------------------------------------- weights, lengths, cu_lengths


def test_a_weight_of_0_leaves_out_an_infinite_loss():
    scores = T([[0.0, 3e38], [0.0, 1.0]])
    labels, weights = T([[1, 0], [1, 0]]), T([0.0, 2.0])
    for reduction in ("mean", "sum", "none"):
        options = {"weights": weights, "reduction": reduction}
        loss, gradient = loss_and_gradient("pairwise_exponential_loss", scores, labels, **options)
        alone, its_gradient = loss_and_gradient(
            "pairwise_exponential_loss", scores[1:], labels[1:], weights=weights[1:], reduction=reduction
        )
        same(loss[1:] if reduction == "none" else loss, alone)
        assert reduction != "none" or loss[0] == 0
        same(gradient, torch.cat([torch.zeros(1, 2), its_gradient]))
    weights.requires_grad_()
    co.pairwise_logistic_loss(scores[1:].expand(2, 2), labels, weights=weights, reduction="sum").backward()
    same(weights.grad, co.pairwise_logistic_loss(scores[1:].expand(2, 2), labels, reduction="none"))


def test_labels_and_boundaries_of_any_strides_do_not_warn():
    always, cu_lengths = torch.is_warn_always_enabled(), torch.tensor([0, -1, 2, -1, 5])[::2]
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            co.spearman_loss(torch.randn(4, 5), torch.randn(5, 4).T)
            co.spearman_loss(torch.randn(5), torch.randn(5), cu_lengths=cu_lengths)
            co.ndcg(torch.randn(5), torch.rand(5), cu_lengths=cu_lengths)
    finally:
        torch.set_warn_always(always)


@pytest.mark.parametrize("name", [*LOSSES, *METRICS, "soft_rank", "soft_sort"])
def test_lengths_out_of_range(name):
    function = getattr(co, name)
    args = (SCORES.repeat(2, 1),) if name.startswith("soft_") else (SCORES.repeat(2, 1), LABELS.repeat(2, 1))
    for lengths in ([5, 1], [-1, 2], T([5, 1]), T([4, 9], dtype=torch.int32)):
        with pytest.raises(RuntimeError, match="lengths: expected values from 0 to 4"):
            function(*args, lengths=lengths)
        if name in ("pairwise_logistic_loss", "ndcg"):
            compiled = torch.compile(lambda n: function(*args, lengths=n), backend="aot_eager", fullgraph=True)
            with pytest.raises(RuntimeError, match="lengths: expected values from 0 to 4"):
                compiled(torch.as_tensor(lengths))
    same(function(*args, lengths=[4, 2]), function(*args, lengths=T([4, 2])))
    same(function(*args, lengths=np.array([4, 2])), function(*args, lengths=T([4, 2])))
    with pytest.raises(TypeError, match="lengths: expected integers, got float32"):
        function(*args, lengths=[1.0, 2.0])


@pytest.mark.parametrize("name", [*LOSSES, *METRICS])
@pytest.mark.parametrize("bounds", [[0, 5], [2, 1], [-1, 3]])
def test_wrong_cu_lengths_raise_one_type_of_error(name, bounds):
    with pytest.raises(RuntimeError, match="cu_lengths: expected non-decreasing values from 0 to 4"):
        getattr(co, name)(SCORES, LABELS, cu_lengths=bounds)


@pytest.mark.parametrize("name", ["softmax_loss", "ndcg", "soft_rank"])
def test_lengths_may_be_integers_of_any_size(name):
    function = getattr(co, name)
    args = (SCORES.repeat(2, 1),) if name == "soft_rank" else (SCORES.repeat(2, 1), LABELS.repeat(2, 1))
    lengths, bounds = T([4, 2]), T([0, 1, 4])
    expected = function(*args, lengths=lengths), function(*args, cu_lengths=bounds)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32, torch.int32):
        for form in (lambda t: t, lambda t: t.numpy()):
            same(function(*args, lengths=form(lengths.to(dtype))), expected[0])
            same(function(*args, cu_lengths=form(bounds.to(dtype))), expected[1])


@pytest.mark.parametrize("name", ["lambda_loss", "softmax_loss", "spearman_loss"])
def test_weights_of_any_size_give_their_mean(name):
    """In float32 the product of a loss and the smallest weight is 0 or another multiple of that weight."""
    scores, labels = torch.stack([SCORES, SCORES.flip(0)]), torch.stack([LABELS, LABELS + 1])
    expected = loss_and_gradient(name, scores, labels)
    for weight in (1e-45, 1e-38, 1e38, 3e38):
        same(loss_and_gradient(name, scores, labels, weights=T([weight, weight])), expected)


# ---------------------------------------------------------------- jagged metrics


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", METRICS)
def test_jagged_metrics_take_the_memory_of_their_items(name):
    """One long list among many short ones, which would be 5 million items if padded, takes the memory of its items."""
    lengths = T([2] * 500 + [10_000])
    bounds = torch.cat([T([0]), lengths.cumsum(0)])
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(9, (int(bounds[-1]),), generator=generator).float()
    labels = torch.randint(-1, 3, scores.shape, generator=generator)
    metric = getattr(co, name)
    got = metric(scores, labels, cu_lengths=bounds, reduction="none")
    for i in (0, 1, 377, 500):
        same(got[i], metric(scores[bounds[i] : bounds[i + 1]], labels[bounds[i] : bounds[i + 1]]))
    if name == "ndcg":  # ndcg needs the most
        peak = peak_bytes(lambda: metric(scores, labels, cu_lengths=bounds), scores.device)
        assert peak < 200 * len(scores)


@pytest.mark.parametrize("name", METRICS)
def test_jagged_metrics_compile_to_one_graph(name):
    metric = getattr(co, name)
    compiled = torch.compile(metric, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (4, 3):
        args = SCORES.repeat(n), LABELS.repeat(n)
        bounds = T([0, 1, 3 * n, 4 * n])
        same(compiled(*args, 2, cu_lengths=bounds), metric(*args, 2, cu_lengths=bounds))


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("k", "two"),
    [
        (np.int64(2), np.float32(2)),
        (np.uint8(2), np.float64(2)),
        (T(2), np.int32(2)),
        (T(2, dtype=torch.int32), T(2.0)),
        (np.array(2), T(2)),
        (2, Fraction(2)),
        (2, 2),
    ],
)
def test_numbers_of_any_kind(k, two):
    options = {"k": k, "sigma": two, "mu": two, "log_base": two, "normalize": np.bool_(True)}
    expected = co.lambda_loss(SCORES, LABELS, k=2, sigma=2.0, mu=2.0, log_base=2.0, normalize=True)
    same(co.lambda_loss(SCORES, LABELS, **options), expected)
    layer = co.LambdaLoss(**options)
    same(layer(SCORES, LABELS), expected)
    same(torch.compile(layer, backend="aot_eager", fullgraph=True)(SCORES, LABELS), expected)
    for name, option in (
        ("pairwise_hinge_loss", "margin"),
        ("pairwise_soft_zero_one_loss", "sigma"),
        ("cosent_loss", "scale"),
        ("approx_ndcg_loss", "temperature"),
        ("spearman_loss", "regularization_strength"),
    ):
        loss = getattr(co, name)
        same(loss(SCORES, LABELS, **{option: two}), loss(SCORES, LABELS, **{option: 2.0}))
    for name in ("list_mle_loss", "neural_sort_ndcg_loss", *METRICS):
        same(getattr(co, name)(SCORES, LABELS, k=k), getattr(co, name)(SCORES, LABELS, k=2))
    for name in METRICS:
        for several in ([k, 1], (k, T(1)), np.array([2, 1]), T([2, 1])):
            same(getattr(co, name)(SCORES, LABELS, k=several), getattr(co, name)(SCORES, LABELS, k=[2, 1]))


@pytest.mark.parametrize("half", [np.float16(0.5), T(0.5), Fraction(1, 2), np.array(0.5)])
def test_numbers_of_any_kind_elsewhere(half):
    x = T([-1.0, 0.3, 2.0], requires_grad=True)
    same(co.leaky_relu(x, half), co.leaky_relu(x, 0.5))
    same(co.hardtanh(x, -half, half), co.hardtanh(x, -0.5, 0.5))
    same(co.threshold(x, half, half), co.threshold(x, 0.5, 0.5))
    same(co.surrogate_gradient(x, width=half), co.surrogate_gradient(x, width=0.5))
    for ours, plain in (
        (co.scale_gradient(x, half), co.scale_gradient(x, 0.5)),
        (co.reverse_gradient(x, half), co.reverse_gradient(x, 0.5)),
        (co.clip_gradient(x, max=half), co.clip_gradient(x, max=0.5)),
        (co.clip_gradient_norm(x, half, dim=np.int64(0)), co.clip_gradient_norm(x, 0.5, dim=0)),
    ):
        same(*(torch.autograd.grad(y.sum(), x)[0] for y in (ours, plain)))
    same(co.margin_ranking_loss(x, -x, x.sign(), half), co.margin_ranking_loss(x, -x, x.sign(), 0.5))
    same(co.bradley_terry_loss(x, -x, half, beta=half), co.bradley_terry_loss(x, -x, 0.5, beta=0.5))
    same(co.dpo_loss(x, -x, beta=half, label_smoothing=half), co.dpo_loss(x, -x, beta=0.5, label_smoothing=0.5))
    for layer in (co.MarginRankingLoss(half), co.DPOLoss(half), co.BradleyTerryLoss(half), co.ReLUDropout(half)):
        assert "0.5" in repr(layer) and "np." not in repr(layer) and "tensor" not in repr(layer)


def test_arrays_where_lists_are_taken():
    x = torch.tensor([[3.0, 4.0], [1.0, 2.0]], requires_grad=True)
    for dim in (np.array([0, 1]), T([0, 1]), range(2)):
        y, expected = co.clip_gradient_norm(x, 1.0, dim=dim), co.clip_gradient_norm(x, 1.0, dim=[0, 1])
        same(*(torch.autograd.grad((z * x.detach()).sum(), x)[0] for z in (y, expected)))
    assert repr(co.ClipGradientNorm(1.0, dim=np.array([0, 1]))) == "ClipGradientNorm(max_norm=1.0, dim=[0, 1])"
    options = {"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0, 0.5]}
    arrays = {name: np.array(value) for name, value in options.items()}
    for given in (arrays, options | {"loss_weights": T([1.0, 0.5])}, options | {"loss_weights": (1, 0.5)}):
        same(co.dpo_loss(x, -x, **given), co.dpo_loss(x, -x, **options))
        same(co.DPOLoss(**given)(x, -x), co.dpo_loss(x, -x, **options))
    assert "np." not in repr(co.DPOLoss(**arrays))
    queries = np.array([1, 0, 1, 0])
    same(co.ndcg(SCORES, LABELS, index=queries), co.ndcg(SCORES, LABELS, index=T(queries)))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("layer", ListLossModule.__subclasses__())
def test_an_option_of_a_layer_may_be_set_later(layer):
    """Each option is an attribute, as a schedule of temperatures or cutoffs needs it."""
    others = {"k": 1, "normalize": True, "empty": 0.5, "gain": "linear", "ties": "score", "squared": True}
    others |= {"weighting": "ndcg2pp", "topk_mode": "and", "position_weights": "discount", "regularization": "kl"}
    others |= {"score_normalize": True, "reduction": "sum"}
    scores, labels = SCORES.repeat(2, 1), torch.stack([LABELS, torch.zeros_like(LABELS)])
    changed = layer()
    compiled = torch.compile(changed, backend="aot_eager", fullgraph=True)
    own = {}
    for name in inspect.signature(layer).parameters:
        own[name] = others.get(name, 3.0)
        assert getattr(changed, name) != own[name]
        setattr(changed, name, own[name])
        same(changed(scores, labels), layer(**own)(scores, labels))
    same(compiled(scores, labels), changed(scores, labels))
    assert repr(changed) == repr(layer(**own))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (T([2.0]), r"a tensor of shape \[1\]"),
        (np.array([2.0]), r"an array of shape \[1\]"),
        (T(2.0, requires_grad=True), "a tensor that requires a gradient"),
        (T(2.0, device="meta"), "a tensor on meta"),
        (np.bool_(True), "bool"),
        (2j, "complex"),
        ("2", "str"),
    ],
)
def test_what_is_no_number(value, told):
    with pytest.raises(TypeError, match=f"sigma: expected a number, got {told}"):
        co.pairwise_logistic_loss(SCORES, LABELS, sigma=value)
    with pytest.raises(TypeError, match="k: expected an integer or None, got"):
        co.ndcg(SCORES, LABELS, k=value)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_metrics_of_integer_scores(name, dtype):
    metric = getattr(co, name)
    scores = T([3, 1, 2, 1])
    same(metric(scores.to(dtype), LABELS), metric(scores.float(), LABELS))
    if dtype == torch.int64:  # the labels keep their exact order
        same(metric(scores + 2**60, LABELS), metric(scores.float(), LABELS))


# ---------------------------------------------------------------- errors that help


def test_a_nested_tensor_is_told_what_to_pass():
    nested = torch.nested.nested_tensor([SCORES, SCORES[:2]])
    for name in (*LOSSES, *METRICS):
        with pytest.raises(TypeError, match=r"scores: .* nested tensor; pass its values\(\) with cu_lengths"):
            getattr(co, name)(nested, LABELS)
    with pytest.raises(TypeError, match=r"values: .* nested tensor; pass its values\(\) with cu_lengths"):
        co.soft_rank(nested)


def test_a_loss_beyond_float16_is_told_of():
    scores = torch.zeros(1000, dtype=torch.float16)
    with pytest.warns(UserWarning, match="float16.*normalize=True"):
        assert co.pairwise_hinge_loss(scores, torch.arange(1000)).isinf()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert co.pairwise_hinge_loss(scores, torch.arange(1000), normalize=True) == 1
        co.pairwise_hinge_loss(scores.float(), torch.arange(1000))


def test_a_program_of_float16_is_traced():
    """The warning isn't in it, because it would read the loss."""
    scores = SCORES.half()
    program = make_fx(lambda s: co.lambda_loss(s, LABELS))(scores)
    same(program(-scores), co.lambda_loss(-scores, LABELS))


# ---------------------------------------------------------------- through torch


@pytest.mark.parametrize("name", ["pairwise_logistic_loss", "list_net_loss", "lambda_loss", "spearman_loss", "ndcg"])
def test_integer_labels_and_lengths_compose(name):
    function = getattr(co, name)
    scores = torch.stack([SCORES, SCORES.flip(0), SCORES + 1])
    labels = T([[1700000001, 1700000000, 1700000007, 1], [0, 1, 2, 0], [3, 1, 0, 0]])
    lengths = T([4, 3, 2])
    expected = function(scores, labels, lengths=lengths, reduction="none")
    mapped = torch.func.vmap(lambda s, y, n: function(s, y, lengths=n))(scores, labels, lengths)
    same(mapped, expected)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    same(compiled(scores, labels, lengths=lengths, reduction="none"), expected)
    if name == "ndcg":
        return
    gradient = loss_and_gradient(name, scores, labels, lengths=lengths, reduction="sum")[1]
    same(torch.func.vmap(torch.func.grad(lambda s, y, n: function(s, y, lengths=n)))(scores, labels, lengths), gradient)
    tangent = torch.func.jvp(lambda s: function(s, labels, lengths=lengths, reduction="sum"), (scores,), (scores,))[1]
    same(tangent, (gradient * scores).sum())
