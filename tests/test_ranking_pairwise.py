"""Properties of the pairwise losses that other list losses don't have, and of the code that all of them share."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from torch.nn.functional import softplus

import custom_ops
from custom_ops.ranking._lists import list_dot, list_scale
from custom_ops.verify._backends import backend

LOSSES = {
    "logistic": (custom_ops.pairwise_logistic_loss, lambda d: softplus(-d, threshold=60)),
    "soft zero-one": (custom_ops.pairwise_soft_zero_one_loss, lambda d: (-d).sigmoid()),
    "exponential": (custom_ops.pairwise_exponential_loss, lambda d: (-d).exp()),
    "hinge": (custom_ops.pairwise_hinge_loss, lambda d: (1 - d).relu()),
    "squared hinge": (
        lambda *a, **k: custom_ops.pairwise_hinge_loss(*a, squared=True, **k),
        lambda d: (1 - d).relu() ** 2,
    ),
    "mse": (custom_ops.pairwise_mse_loss, None),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def dense(name, scores, labels):
    """Compute the loss of one list from the n x n matrix of its pairs."""
    difference, labels = scores[:, None] - scores, labels.to(scores.dtype)
    if name == "mse":
        return (difference - (labels[:, None] - labels)).square().sum()
    return torch.where(labels[:, None] > labels, LOSSES[name][1](difference), 0).sum()


def draw(*shape, levels=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return scores, torch.randint(0, levels, shape, generator=generator)


def value_and_gradient(function, scores, *args, **kwargs):
    scores = scores.detach().requires_grad_()
    loss = function(scores, *args, **kwargs)
    return loss.detach(), torch.autograd.grad(loss.sum(), scores)[0]


@each_loss
@pytest.mark.parametrize(("n", "levels"), [(2, 2), (7, 3), (33, 40), (300, 2), (700, 5)])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_value_gradient_and_hessian_are_those_of_the_dense_formula(name, n, levels, scale):
    """A scale of 300 is beyond the range in which exponentials of single scores can be used."""
    if name == "exponential" and scale > 1:
        scale = 100.0
    scores, labels = draw(n, levels=levels)
    labels[0] = labels[1] + 1
    scores = (scores.detach() * scale).requires_grad_()
    v = torch.randn_like(scores)
    results = []
    for loss in (LOSSES[name][0](scores, labels), dense(name, scores, labels)):
        gradient = torch.autograd.grad(loss, scores, create_graph=True)[0]
        hessian_v = torch.autograd.grad(gradient, scores, v)[0] if gradient.requires_grad else torch.zeros_like(v)
        results.append((loss, gradient, hessian_v))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10 * max(1, float(theirs.detach().abs().max())))


@each_loss
def test_float32_is_accurate(name):
    scores, labels = draw(2000, dtype=torch.float32)
    loss, gradient = value_and_gradient(LOSSES[name][0], scores, labels)
    exact, exact_gradient = value_and_gradient(LOSSES[name][0], scores.double(), labels)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    scale = float(exact_gradient.abs().max())
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-6, atol=1e-6 * scale)


def test_small_losses_count_in_full():
    """For pairs far in the right order, each term q would be lost in the rounding of 1 + q."""
    scores = torch.linspace(0, 60, 4).repeat_interleave(8)
    labels = torch.arange(4).repeat_interleave(8)
    loss = custom_ops.pairwise_logistic_loss(scores, labels)
    expected = dense("logistic", scores.double(), labels)
    assert expected < 1e-6
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_misordered_by_thirty_and_scores_of_ten_thousand():
    scores, labels = torch.tensor([0.0, 30.0]), torch.tensor([1, 0])
    loss, gradient = value_and_gradient(custom_ops.pairwise_logistic_loss, scores, labels)
    assert loss == 30 and gradient.tolist() == [-1, 1]
    loss, gradient = value_and_gradient(custom_ops.pairwise_logistic_loss, torch.tensor([-1e4, 1e4]), labels)
    assert loss == 2e4 and gradient.tolist() == [-1, 1]
    loss, gradient = value_and_gradient(custom_ops.pairwise_logistic_loss, torch.tensor([1e4, -1e4]), labels)
    assert loss == 0 and gradient.tolist() == [0, 0]


def test_minus_infinity_as_a_score_far_below():
    scores, labels = torch.tensor([2.0, 1.0, -float("inf")]), torch.tensor([1, 2, 0])
    for function in (custom_ops.pairwise_logistic_loss, custom_ops.pairwise_hinge_loss):
        loss, gradient = value_and_gradient(function, scores, labels)
        torch.testing.assert_close(loss, function(scores[:2], labels[:2]))
        assert gradient[2] == 0 and gradient.isfinite().all()


def test_mean_is_over_the_lists_that_contribute():
    scores, labels = draw(3, 4)
    labels[1] = 2
    weights = torch.tensor([1.0, 5.0, 3.0])
    losses = custom_ops.pairwise_logistic_loss(scores, labels, reduction="none")
    assert losses[1] == 0
    torch.testing.assert_close(custom_ops.pairwise_logistic_loss(scores, labels), (losses[0] + losses[2]) / 2)
    weighted = custom_ops.pairwise_logistic_loss(scores, labels, weights=weights)
    torch.testing.assert_close(weighted, (losses[0] + 3 * losses[2]) / 4)


def test_a_third_derivative_raises_rather_than_being_wrong():
    scores, labels = draw(4)
    gradient = torch.autograd.grad(custom_ops.pairwise_logistic_loss(scores, labels), scores, create_graph=True)[0]
    second = torch.autograd.grad(gradient.square().sum(), scores, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="no third derivative"):
        torch.autograd.grad(second.sum(), scores)


@pytest.mark.parametrize("bounds", [[0, 7], [3, 2], [-1, 3], [0, 2, 1]])
def test_lists_out_of_bounds_raise(bounds):
    scores, labels = draw(6)
    with pytest.raises(RuntimeError, match="cu_lengths: expected non-decreasing values from 0 to 6"):
        custom_ops.pairwise_logistic_loss(scores, labels, cu_lengths=torch.tensor(bounds))


def test_items_outside_of_all_lists_get_zero():
    x, offsets = torch.ones(2, 6), torch.tensor([1, 3, 3, 5])
    scaled = list_scale(torch.tensor([[1.0, 2, 3], [4, 5, 6]]), x, None, offsets)
    assert scaled.tolist() == [[0, 1, 1, 3, 3, 0], [0, 4, 4, 6, 6, 0]]
    assert list_dot(x, scaled, None, offsets).tolist() == [[2, 0, 6], [8, 0, 12]]


def test_vmap_over_cu_lengths_says_why_not():
    scores, labels = draw(6)
    with pytest.raises(RuntimeError, match="cu_lengths: can't be vmapped"):
        torch.vmap(lambda c: custom_ops.pairwise_mse_loss(scores, labels, cu_lengths=c))(torch.tensor([[0, 6], [0, 3]]))


INFINITE = list(itertools.product((-math.inf, 0.5, math.inf), repeat=4))


@pytest.mark.sampled(2)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy warns while it interprets a kernel
@pytest.mark.parametrize("kernels", ["cpp", "triton"])
@pytest.mark.parametrize("name", [*(name for name in LOSSES if name != "mse"), "lambda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinite_scores_are_those_of_the_formula_at_each_pair(name, dtype, kernels):
    """The inf - inf of a pair makes the loss NaN; that of items which are no pair doesn't matter."""
    ours, phi = LOSSES[name] if name in LOSSES else (partial(custom_ops.lambda_loss, weighting="label_diff"), None)
    labels = torch.tensor([2, 1, 1, 0])
    better, worse = (labels[:, None] > labels).nonzero().unbind(1)
    scores = torch.tensor(INFINITE, dtype=dtype, requires_grad=True)
    exact = torch.tensor(INFINITE, dtype=torch.float64, requires_grad=True)
    difference = exact[:, better] - exact[:, worse]
    if phi is None:
        terms = (labels[better] - labels[worse]) * softplus(-difference, threshold=60) / math.log(2)
    else:
        terms = phi(difference)
    expected = terms.sum(-1)
    with backend(kernels):
        loss = ours(scores, labels.expand(len(scores), -1), reduction="none")
        (slope,) = torch.autograd.grad(loss.sum(), scores)
    torch.testing.assert_close(loss.double(), expected, equal_nan=True)
    defined = ~expected.isnan()
    (of_exact,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(slope.double()[defined], of_exact[defined], equal_nan=True)
