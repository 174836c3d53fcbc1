"""Properties of all list losses at the edges of their domains, on the C++ and the Triton kernels.

A new loss is tested as soon as it is registered. Where a loss differs by definition, the test says so.
"""

from __future__ import annotations

import inspect
import math

import pytest
import torch

import custom_ops
from custom_ops.ranking.lambdas import WEIGHTINGS
from custom_ops.registry import FUNCTIONS
from custom_ops.verify._backends import backend

LOSSES = {
    name: info.function for name, info in FUNCTIONS.items() if "labels" in inspect.signature(info.function).parameters
}
OPTIONS = {
    "pairwise_hinge_loss": [{}, {"squared": True}],
    "lambda_loss": [*({"weighting": weighting} for weighting in WEIGHTINGS), {"k": 2}],
    "list_mle_loss": [
        {},
        {"ties": "score", "position_weights": "exponential"},
        {"ties": "breslow", "position_weights": "discount", "k": 5},
    ],
    "unique_softmax_loss": [{}, {"gain": "linear"}],
    "approx_ndcg_loss": [{"temperature": 1.0}, {"temperature": 1.0, "gain": "linear"}],
    "approx_mrr_loss": [{"temperature": 1.0}],
    "smooth_ap_loss": [{"temperature": 1.0}],
    "spearman_loss": [{}, {"regularization": "kl"}],
}
CASES = [(name, own) for name in LOSSES for own in OPTIONS.get(name, [{}])]
NAN, INF = math.nan, math.inf

# NumPy warns while it interprets a kernel
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
each_loss = pytest.mark.parametrize(
    ("name", "own"), CASES, ids=[" ".join([name, *map(str, own.values())]) for name, own in CASES]
)


@pytest.fixture(params=["cpp", "triton"])
def both(request):
    with backend(request.param):
        yield


on_both = pytest.mark.usefixtures("both")


def loss_and_slope(name, scores, labels, **options):
    """Return the losses of all lists, and the slope of their sum."""
    scores = scores.detach().clone().requires_grad_()
    loss = LOSSES[name](scores, labels, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), scores)[0]


def draw(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return scores, torch.randint(0, 5, shape, generator=generator)


def in_double(name, scores, labels, **options):
    """Return the reference's results in float64."""
    scores = scores.detach().double().requires_grad_()
    loss = FUNCTIONS[name].reference(scores, labels.double(), **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), scores)[0]


def close(ours, exact):
    """Compare up to the rounding of float32, or of a float16 result."""
    rounding = 2e-3 if ours.dtype == torch.float16 else 1e-5
    largest = max([1.0, *exact.abs().flatten().tolist()])
    torch.testing.assert_close(ours.double(), exact, rtol=rounding, atol=1e-6 * largest)


@pytest.mark.sampled(4)
@on_both
@each_loss
def test_padded_jagged_and_nested_lists_give_the_same(name, own):
    lengths = torch.tensor([6, 0, 4, 1, 2, 5])
    scores, labels = draw(6, 6)
    labels[:, :2] = 5 * (scores[:, :2] == scores[:, :2].amin(1, True))  # every list has a pair to learn from
    inside = torch.arange(6) < lengths[:, None]
    loss, slope = loss_and_slope(name, scores, labels, lengths=lengths, reduction="none", **own)
    assert loss[lengths > 1].all() and not slope[~inside].any()
    nested, of_nested = loss_and_slope(
        name, scores.view(2, 3, 6), labels.view(2, 3, 6), lengths=lengths.view(2, 3), reduction="none", **own
    )
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    flat, of_flat = loss_and_slope(name, scores[inside], labels[inside], cu_lengths=bounds, reduction="none", **own)
    same = [
        loss_and_slope(name, scores, labels, mask=inside, reduction="none", **own),
        loss_and_slope(name, scores, labels, mask=inside, lengths=lengths.int(), reduction="none", **own),
        (nested.flatten(), of_nested.view(6, 6)),
        (flat, torch.zeros_like(scores).masked_scatter(inside, of_flat)),
    ]
    for i in (0, 2, 5):
        alone, of_alone = loss_and_slope(name, scores[i, : lengths[i]], labels[i, : lengths[i]], **own)
        torch.testing.assert_close((alone, of_alone), (loss[i], slope[i, : lengths[i]]), rtol=1e-12, atol=1e-14)
    for others in same:
        torch.testing.assert_close(others, (loss, slope), rtol=1e-12, atol=1e-14)


@pytest.mark.sampled(4)
@on_both
@each_loss
def test_jagged_lists_need_not_cover_the_items(name, own):
    scores, labels = draw(2, 9)
    labels[:, 2:4] = torch.tensor([0, 5])
    where = {"reduction": "none", "mask": torch.arange(18).view(2, 9) % 7 != 6}
    loss, slope = loss_and_slope(name, scores, labels, cu_lengths=torch.tensor([2, 2, 5, 8, 8]), **where, **own)
    assert loss.shape == (2, 4) and loss[0, 1] > 0 and not loss[:, ::3].any()
    assert not slope[:, [0, 1, 8]].any()
    for k, (start, stop) in enumerate([(2, 5), (5, 8)], 1):
        mask = where["mask"][:, start:stop]
        alone = loss_and_slope(name, scores[:, start:stop], labels[:, start:stop], mask=mask, reduction="none", **own)
        torch.testing.assert_close((loss[:, k], slope[:, start:stop]), alone, rtol=1e-12, atol=1e-14)
    for bounds in ([0], [9], [0, 0], [9, 9], [4, 4, 4]):
        options = {"cu_lengths": torch.tensor(bounds, dtype=torch.int32), **own}
        loss, slope = loss_and_slope(name, scores, labels, reduction="none", **options)
        assert loss.shape == (2, len(bounds) - 1) and not loss.any() and not slope.any()
        assert LOSSES[name](scores, labels, **options) == 0


@pytest.mark.sampled(4)
@on_both
@each_loss
def test_the_mean_is_over_the_lists_that_contribute(name, own):
    scores, labels = draw(4, 6)
    labels[:, 0], labels[:, 1] = 5, 0
    lengths = torch.tensor([6, 1, 0, 5])
    losses = LOSSES[name](scores, labels, lengths=lengths, reduction="none", **own)
    mean = LOSSES[name](scores, labels, lengths=lengths, **own)
    torch.testing.assert_close(mean, (losses[0] + losses[3]) / 2)
    weights = torch.tensor([1.0, 5.0, 7.0, 3.0])
    weighted = LOSSES[name](scores, labels, lengths=lengths, weights=weights, **own)
    torch.testing.assert_close(weighted, (losses[0] + 3 * losses[3]) / 4)
    total = LOSSES[name](scores, labels, lengths=lengths, weights=weights, reduction="sum", **own)
    torch.testing.assert_close(total, losses[0] + 3 * losses[3])


@pytest.mark.sampled(6)
@on_both
@each_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_list_with_nothing_to_rank_is_zero_and_connected(name, own, reduction):
    own = {**own, "reduction": reduction}
    nothing = [(*draw(*shape), {}) for shape in ((0,), (1,), (2, 0), (0, 3), (2, 1))]
    scores, labels = draw(2, 3)
    nothing += [
        (scores, labels, {"mask": torch.zeros(2, 3, dtype=torch.bool)}),
        (scores.fill_(NAN), labels, {"lengths": torch.tensor([0, 0])}),
    ]
    if name != "pairwise_mse_loss":  # tied labels ask for equal scores in this loss
        tied = (0, -1) if own.get("weighting") == "ndcg1" else (0, 2, -1)  # "ndcg1" counts all ordered pairs
        nothing += [(draw(2, 3)[0], torch.full((2, 3), label), {}) for label in tied]
    for scores, labels, options in nothing:
        loss, slope = loss_and_slope(name, scores, labels, **options, **own)
        assert not loss.any() and not slope.any()  # any() is true for NaN


@on_both
@each_loss
def test_without_a_gain_nothing_is_lost(name, own):
    """With an ideal DCG of 0, or without a relevant item, losses of gains are 0 and all others are as usual."""
    gained = name in ("unique_softmax_loss", "approx_ndcg_loss", "approx_mrr_loss", "smooth_ap_loss")
    gained |= name == "neural_sort_ndcg_loss"
    gained |= name == "lambda_loss" and own.get("weighting") not in ("ranknet", "label_diff")
    for labels in (torch.tensor([0, -1, -2]), torch.tensor([0.0, 0.0, -0.5])):
        loss, slope = loss_and_slope(name, torch.tensor([0.3, -0.2, 0.1]), labels, **own)
        assert loss.isfinite() and slope.isfinite().all()
        if gained:
            assert loss == 0 and not slope.any()


@on_both
@each_loss
def test_tied_scores_have_their_gradient(name, own):
    labels = torch.tensor([2, 0, 1, 0, 2, 1])
    loss, slope = loss_and_slope(name, torch.zeros(6), labels, **own)
    assert loss > 0 and slope.isfinite().all()
    if name == "spearman_loss":  # tied scores are a stationary point of this loss
        assert loss == 1 and not slope.any()
    else:
        assert slope[0] < 0 < slope[1]


@on_both
@each_loss
def test_a_pair_misordered_by_thirty_is_pushed_apart(name, own):
    loss, slope = loss_and_slope(name, torch.tensor([0.0, 30.0]), torch.tensor([1, 0]), **own)
    assert loss > 0 and slope.isfinite().all()
    if name == "spearman_loss":
        assert loss == 2 and not slope.any()  # the ranks are hard at this distance
        return
    if name == "neural_sort_ndcg_loss":  # its rows may round to permutations
        assert slope[0] <= 1e-12 and slope[1] >= -1e-12
        return
    assert slope[0] < 0 < slope[1]
    bounded = ("pairwise_soft_zero_one_loss", "approx_ndcg_loss", "approx_mrr_loss", "smooth_ap_loss")
    if name not in bounded:  # the bounded losses saturate by definition
        assert slope[0] < -0.2


@on_both
@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scores_far_apart(name, own, dtype):
    far = 1e4 if dtype == torch.float32 else 1e3
    scores, labels = torch.tensor([-far, far, 0, 1], dtype=dtype), torch.tensor([3, 0, 2, 1])
    loss, slope = loss_and_slope(name, scores, labels, **own)
    if name == "pairwise_exponential_loss":  # this loss overflows by definition
        assert loss == INF
        return
    expected, of_scores = in_double(name, scores, labels, **own)
    for ours, exact in ((loss, expected), (slope, of_scores)):
        fits = exact.abs() <= torch.finfo(dtype).max
        assert (ours[~fits] == exact[~fits].sign() * INF).all()
        close(ours[fits], exact[fits])


@pytest.mark.sampled(6)
@on_both
@each_loss
@pytest.mark.parametrize("junk", [NAN, INF, -INF])
def test_masked_items_are_not_read(name, own, junk):
    scores, labels = draw(2, 6, dtype=torch.float32)
    labels = labels.float()
    mask = torch.tensor([[True, True, False, True, True, False], [True] * 6])
    expected, of_scores = loss_and_slope(name, scores, labels, mask=mask, **own)
    dirty, dirty_labels = scores.masked_fill(~mask, junk), labels.masked_fill(~mask, junk)
    loss, slope = loss_and_slope(name, dirty, dirty_labels, mask=mask, **own)
    assert torch.equal(loss, expected) and torch.equal(slope, of_scores) and not slope[~mask].any()

    def of(s):
        return LOSSES[name](s, dirty_labels, mask=mask, **own)

    tangent = torch.ones_like(dirty).masked_fill(~mask, junk)
    slope_along, hessian_v = (torch.func.jvp(f, (dirty,), (tangent,))[1] for f in (of, torch.func.grad(of)))
    assert slope_along.isfinite() and hessian_v.isfinite().all() and not hessian_v[~mask].any()


@on_both
@each_loss
def test_a_valid_nan_spoils_its_own_list_only(name, own):
    scores, labels = draw(2, 5, dtype=torch.float32)
    labels[:] = torch.tensor([0, 1, 2, 3, 0])
    scores[0, 1] = NAN
    loss, slope = loss_and_slope(name, scores, labels, reduction="none", **own)
    assert loss.isnan().tolist() == [True, False]
    assert slope[0].isnan().any() and slope[1].isfinite().all()


@pytest.mark.sampled(4)
@on_both
@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_computed_in_32_and_rounded_once(name, own, dtype):
    scores, labels = draw(3, 12, dtype=dtype)
    loss, slope = loss_and_slope(name, scores, labels, **own)
    wide, of_wide = loss_and_slope(name, scores.float(), labels, **own)
    assert loss.dtype == slope.dtype == dtype
    assert torch.equal(loss, wide.to(dtype)) and torch.equal(slope, of_wide.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert LOSSES[name](scores, labels, **own).dtype == torch.float32


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "spearman_loss"])
def test_no_derivative_in_the_labels_is_left_out_in_silence(name):
    """A derivative in the labels raises, except for Spearman's loss, which sees only their ranks (derivative 0)."""
    scores, labels = draw(4)
    labels, loss = labels.double(), LOSSES[name]
    calls = [
        lambda y: torch.func.jvp(loss, (scores, y), (scores, y)),
        lambda y: torch.func.jvp(lambda y: loss(scores, y), (y,), (y,)),
        lambda y: torch.func.jacrev(loss, 1)(scores, y),
        lambda y: torch.func.jacrev(torch.func.grad(loss), 1)(scores, y),
        lambda y: torch.func.jacfwd(torch.func.grad(loss), 1)(scores, y),
        lambda y: loss(scores, y.requires_grad_()),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="labels: expected a tensor without gradient"):
            call(labels.clone())


@each_loss
def test_labels_of_any_real_dtype(name, own):
    scores, labels = draw(3, 6)
    expected = loss_and_slope(name, scores, labels.double() % 2, **own)
    for dtype in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.half, torch.float):
        torch.testing.assert_close(loss_and_slope(name, scores, (labels % 2).to(dtype), **own), expected)


@on_both
@each_loss
def test_labels_of_forty_and_two_thousand(name, own):
    """Gains are relative to the largest: 2^40 would overflow float16, and 2^2000 float64."""
    labels = torch.tensor([40, 39, 0, 40])
    for dtype in (torch.float16, torch.float32):
        scores = torch.tensor([0.5, 1.0, -1.0, 0.25], dtype=dtype)
        loss, slope = loss_and_slope(name, scores, labels, **own)
        expected, of_scores = in_double(name, scores, labels, **own)
        close(loss, expected)
        close(slope, of_scores)
    loss, slope = loss_and_slope(name, scores.float(), 50 * labels, **own)
    assert loss.isfinite() and slope.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_module_refuses_the_options_that_its_function_refuses(name):
    module = type(FUNCTIONS[name].modules()[0][0])
    options = inspect.signature(module).parameters
    wrong = [call for call in FUNCTIONS[name].bad_calls() if call.kwargs and call.kwargs.keys() <= options.keys()]
    assert {argument for call in wrong for argument in call.kwargs} == options.keys()
    for call in wrong:
        with pytest.raises(call.error, match=call.message):
            module(**call.kwargs)


@pytest.mark.parametrize("name", LOSSES)
def test_a_long_list_gives_the_same_bits_with_any_number_of_threads(name):
    torch.manual_seed(0)
    scores, labels = torch.randn(2, 2000), torch.randint(0, 5, (2, 2000))
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(loss_and_slope(name, scores[:1], labels[:1], reduction="none"))
    finally:
        torch.set_num_threads(threads)
    found.append(tuple(x[:1] for x in loss_and_slope(name, scores, labels, reduction="none")))
    for loss, slope in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(slope, found[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sort_of_a_long_list_is_stable(dtype):
    """From 65,536 items on the sort runs in parts; ties and NaN keep their order, whatever the number of threads."""
    n = 70_001
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(-500, 500, (n,), generator=generator).to(dtype) / 7
    scores = torch.randn(n, generator=generator, dtype=dtype)
    places = torch.arange(n, 0, -1, dtype=dtype)
    threads, losses = torch.get_num_threads(), []
    ordered = labels.sort(descending=True, stable=True).indices
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            losses.append(custom_ops.list_mle_loss(scores, labels))
    finally:
        torch.set_num_threads(threads)
    assert losses[0] == losses[1] == custom_ops.list_mle_loss(scores[ordered], places)
