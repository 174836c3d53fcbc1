"""What the listwise and smooth-rank losses promise beyond the battery: long, wide, tied, masked and empty lists."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

import custom_ops
from custom_ops.registry import REGISTRY

NAN = float("nan")
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
    """Across the tiles of the kernels, and where exponentials of score differences overflow."""
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


@losses
def test_padded_jagged_and_nested_lists_agree(name, own):
    lengths = torch.tensor([4, 0, 7, 1, 5, 2])
    scores, labels = lists(6, 7)
    padded = loss_and_slope(name, scores, labels, lengths=lengths, reduction="none", **own)
    valid = torch.arange(7) < lengths[:, None]
    masked = loss_and_slope(name, scores, labels, mask=valid, reduction="none", **own)
    nested = loss_and_slope(
        name, scores.view(2, 3, 7), labels.view(2, 3, 7), lengths=lengths.view(2, 3), reduction="none", **own
    )
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    flat, slope = loss_and_slope(name, scores[valid], labels[valid], cu_lengths=bounds, reduction="none", **own)
    torch.testing.assert_close(masked, padded, rtol=0, atol=0)
    torch.testing.assert_close([t.view_as(u) for t, u in zip(nested, padded)], list(padded), rtol=0, atol=0)
    torch.testing.assert_close(flat, padded[0], rtol=0, atol=0)
    torch.testing.assert_close(slope, padded[1][valid], rtol=0, atol=0)
    mean = call(name, scores, labels, lengths=lengths, **own)
    torch.testing.assert_close(mean, padded[0].sum() / (padded[0] != 0).sum())


@losses
def test_masked_items_may_hold_anything(name, own):
    scores, labels = lists(3, 6)
    mask = torch.tensor([[True, False, True, True, False, True]]).expand(3, 6)
    expected = loss_and_slope(name, scores[mask].view(3, 4), labels[mask].view(3, 4), **own)
    scores[:, 1], scores[:, 4], labels[:, 1] = NAN, math.inf, NAN
    loss, slope = loss_and_slope(name, scores, labels, mask=mask, **own)
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(slope[mask].view(3, 4), expected[1])
    assert (slope[~mask] == 0).all()


@losses
def test_a_valid_nan_propagates(name, own):
    scores, labels = lists(2, 12)
    scores[0, 2] = NAN
    loss, slope = loss_and_slope(name, scores, labels, reduction="none", **own)
    assert loss[0].isnan()
    assert slope[0].isnan().any()
    assert not loss[1].isnan()
    assert not slope[1].isnan().any()


@losses
@pytest.mark.parametrize("shape", [(2, 0), (2, 1), (0, 3), (2, 4)])
@pytest.mark.parametrize("label", [0.0, 2.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_to_rank_is_zero(name, own, shape, label, reduction):
    """No items, one, no lists, or all labels tied."""
    loss, slope = loss_and_slope(name, torch.randn(shape), torch.full(shape, label), reduction=reduction, **own)
    assert (loss == 0).all()
    assert (slope == 0).all()


@losses
def test_all_masked_is_zero_and_out_of_the_mean(name, own):
    scores, labels = lists(2, 5)
    mask = torch.tensor([[False], [True]]).expand(2, 5)
    loss, slope = loss_and_slope(name, scores, labels, mask=mask, **own)
    alone = call(name, scores[1], labels[1], **own)
    torch.testing.assert_close(loss, alone)
    assert (slope[0] == 0).all()


@losses
def test_tied_scores_have_finite_gradients(name, own):
    loss, slope = loss_and_slope(name, torch.zeros(6), torch.tensor([2.0, 0, 1, 0, 2, 1]), **own)
    assert loss > 0
    assert slope.isfinite().all()
    assert (slope != 0).any()


@losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scores_far_apart(name, own, dtype):
    far = 1e4 if dtype == torch.float32 else 1e3  # float16 couldn't hold some of the losses
    scores = torch.tensor([-far, far, 0, 1], dtype=dtype)
    loss, slope = loss_and_slope(name, scores, torch.tensor([3, 0, 2, 1]), **own)
    assert loss.isfinite()
    assert slope.isfinite().all()
    expected = REGISTRY[name].reference(scores.double(), torch.tensor([3, 0, 2, 1]), **own)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-3 if dtype == torch.float16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LISTWISE)
def test_a_pair_misordered_by_30_is_pushed(name):
    _, slope = loss_and_slope(name, torch.tensor([0.0, 30.0]), torch.tensor([1.0, 0.0]))
    assert slope[0] < -0.4
    assert slope[1] > 0.4


@pytest.mark.parametrize("name", SMOOTH)
def test_a_smooth_rank_30_away_still_has_a_gradient(name):
    _, slope = loss_and_slope(name, torch.tensor([0.0, 30.0]), torch.tensor([1.0, 0.0]), temperature=1.0)
    assert slope[0] < 0 < slope[1]


@pytest.mark.parametrize("name", ["approx_ndcg_loss", "neural_sort_ndcg_loss", "unique_softmax_loss"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_label_40_does_not_overflow(name, dtype):
    scores, labels = torch.tensor([0.5, 1.0, -1.0], dtype=dtype), torch.tensor([40, 39, 0])
    loss, slope = loss_and_slope(name, scores, labels)
    assert loss.isfinite()
    assert slope.isfinite().all()
    huge = loss_and_slope(name, scores, labels + 2000)
    assert huge[0].isfinite()


def test_list_mle_of_a_dominant_item():
    """allRank gives 52.95."""
    loss = custom_ops.list_mle_loss(torch.tensor([50.0, 0, 1]), torch.tensor([2, 1, 0]))
    torch.testing.assert_close(loss, torch.tensor(math.log1p(math.e)))


def test_list_net_of_a_confident_mistake():
    """allRank clamps probabilities, and gives 21.9."""
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


@pytest.mark.parametrize("name", [*LISTWISE, *SMOOTH, "neural_sort_ndcg_loss"])
def test_allocates_nothing_quadratic(name):
    """Forward, backward and double backward at (4, 4096) in a fresh process; one n x n matrix is 64 MiB."""
    code = f"""
import resource, torch, custom_ops
def step(n):
    scores = torch.randn(4, n, requires_grad=True)
    loss = custom_ops.{name}(scores, torch.randint(0, 5, (4, n)))
    slope, = torch.autograd.grad(loss, scores, create_graph=True)
    slope.square().sum().backward()
step(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(4096)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    assert float(subprocess.check_output([sys.executable, "-c", code], text=True)) < 8


@pytest.mark.parametrize("name", [*LISTWISE, "neural_sort_ndcg_loss"])
def test_a_list_of_100_000_documents_trains(name):
    scores, labels = lists(100_000, dtype=torch.float32)
    own = {"scale": 1.0} if name == "cosent_loss" else {}
    loss, slope = loss_and_slope(name, scores, labels, **own)
    after, _ = loss_and_slope(name, scores - slope / slope.abs().max(), labels, **own)
    assert after < loss


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_ranks_of_100_000_documents_train(name):
    """Of which a few hundred are relevant: the cost is that of their rows."""
    scores, _ = lists(100_000, dtype=torch.float32)
    labels = (torch.rand(100_000, generator=torch.Generator().manual_seed(1)) < 0.003).float()
    loss, slope = loss_and_slope(name, scores, labels, temperature=1.0)
    after, _ = loss_and_slope(name, scores - slope / slope.abs().max(), labels, temperature=1.0)
    assert after < loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_neural_sort_of_tied_and_long_lists(dtype):
    """Lists whose rows are cut where they vanish, and which are cut into parts."""
    scores, labels = lists(1, 9000, dtype=dtype, spread=50.0)
    scores = scores.round()  # so that many are tied
    _, slope = loss_and_slope("neural_sort_ndcg_loss", scores, labels, k=300)
    s = scores.double()[0].requires_grad_()
    distances = (s[:, None] - s).abs().sum(1)
    rows = ((8999.0 - 2 * torch.arange(300.0, dtype=torch.float64))[:, None] * s - distances).softmax(1)
    gains, discounts = 2 ** labels[0].double() - 1, 1 / (torch.arange(300.0, dtype=torch.float64) + 2).log2()
    ideal = gains.sort(descending=True).values[:300] @ discounts
    (expected,) = torch.autograd.grad(1 - rows @ gains @ discounts / ideal, s)
    scale = expected.abs().max().item()
    torch.testing.assert_close(
        slope[0].double(), expected, rtol=1e-4, atol=(1e-10 if s.dtype == dtype else 1e-5) * scale
    )


def test_neural_sort_does_not_depend_on_the_number_of_threads():
    scores, labels = lists(1, 20_000, dtype=torch.float32)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(loss_and_slope("neural_sort_ndcg_loss", scores, labels))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))
