"""Properties of the preference losses, which take one margin per pair, beyond the battery."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from fractions import Fraction

import pytest
import torch

import custom_ops
from custom_ops.ranking.specs.preference import dpo_loss_reference

DPO = [("sigmoid", 0.0), ("sigmoid", 0.2), ("robust", 0.2), ("hinge", 0.0), ("ipo", 0.0), ("exo_pair", 0.1)]
DPO += [("discopop", 0.0)]


def test_bpr_is_exact_where_the_naive_formula_saturates():
    """RecBole's -log(1e-10 + sigmoid(d)) stops growing at 23 and has no gradient beyond."""
    positive = torch.tensor([-30.0, -1e4, 1e4, 0.0], requires_grad=True)
    loss = custom_ops.bpr_loss(positive, torch.zeros(4), reduction="none")
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([30, 1e4, 0, math.log(2)], rel=1e-6)
    assert positive.grad.tolist() == [-1, -1, 0, -0.5]


def test_softplus_and_sigmoid_are_within_units_of_the_last_place():
    d = torch.cat([torch.linspace(-85, 85, 400_001), torch.linspace(-2, 2, 400_001)]).requires_grad_()
    loss = custom_ops.bpr_loss(d, torch.zeros(()), reduction="none")
    loss.sum().backward()
    exact = d.detach().double()
    assert _units(loss.detach(), torch.nn.functional.softplus(-exact, threshold=1e9)) <= 2
    assert _units(d.grad, -torch.sigmoid(-exact)) <= 2.5


def _units(got, exact):
    """Return the largest error in units of the last place of the exact result in got's dtype."""
    rounded = exact.abs().to(got.dtype)
    unit = torch.nextafter(rounded, torch.tensor(torch.inf)).double() - rounded.double()
    return ((got.double() - exact).abs() / unit).max()


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("loss_type", "options"),
    [*((t, {"label_smoothing": s}) for t, s in DPO), ("discopop", {"discopop_tau": 1.0})]
    + [(t, {}) for t in ("bco_pair", "sppo_hard", "nca_pair", "apo_zero", "apo_down")],
)
def test_dpo_at_infinity_is_its_limit(loss_type, options, sign):
    results = []
    for size in (1e30, torch.inf):
        chosen, zero = torch.tensor([sign * size], requires_grad=True), torch.zeros(1)
        loss = custom_ops.dpo_loss(chosen, zero, zero, zero, loss_type=loss_type, **options)
        (slope,) = torch.autograd.grad(loss, chosen, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, chosen)
        results.append((loss.clamp(-1e28, 1e28).item(), slope.clamp(-1e28, 1e28).item(), curvature.item()))
    assert results[0] == results[1]


@pytest.mark.parametrize(("loss_type", "label_smoothing"), DPO)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_gradients_and_curvature_of_dpo(loss_type, label_smoothing, dtype):
    torch.manual_seed(0)
    tensors = [(8 * torch.randn(1001)).to(dtype) for _ in range(4)]
    options = {"loss_type": loss_type, "label_smoothing": label_smoothing, "beta": 0.5, "reduction": "none"}
    results = []
    for function, cast in (
        (custom_ops.dpo_loss, dtype),
        (dpo_loss_reference, torch.float64),
    ):
        inputs = [t.to(cast).requires_grad_() for t in tensors]
        loss = function(*inputs, **options)
        first = torch.autograd.grad(loss.sum(), inputs, create_graph=True)
        second = torch.autograd.grad(first[0].sum(), inputs) if first[0].requires_grad else []
        results.append([t.detach().double() for t in (loss, *first, *second)])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for ours, exact in zip(*results):
        torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("large", [1e4, 1e9, 1e30, 3e38])
def test_no_fill_that_cancels_takes_the_others_with_it(each_backend, large):
    for places in itertools.permutations((large, large, 1.5, 0.25)):
        # The two large ones cancel where one is added and one subtracted: chosen and ref_rejected are added.
        chosen, ref_rejected, rejected, ref_chosen = (torch.tensor([x], requires_grad=True) for x in places)
        d = sum(map(Fraction, (places[0], places[1]))) - sum(map(Fraction, (places[2], places[3])))
        if abs(d) > 2:
            continue
        loss = custom_ops.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=1.0)
        loss.backward()
        assert loss.item() == pytest.approx(math.log1p(math.exp(-d)), rel=1e-6)
        assert chosen.grad.item() == pytest.approx(-1 / (1 + math.exp(d)), rel=1e-6)

    for chosen, rejected, margin in ((large, 0.75, large), (large, large, 0.75), (0.75, large, -large)):
        loss = custom_ops.bradley_terry_loss(*(torch.tensor([x]) for x in (chosen, rejected, margin)))
        d = Fraction(chosen) - Fraction(rejected) - Fraction(margin)
        assert loss.item() == pytest.approx(math.log1p(math.exp(-d)), rel=1e-6)


@pytest.mark.parametrize("kind", range(6))
def test_derivatives_to_third_order_and_no_further(kind):
    parameters = (kind, 0.1, 0.7, 0.4, 1.3, 1, False)
    d, zero = torch.linspace(-3, 3, 12, dtype=torch.float64).requires_grad_(), torch.zeros(12, dtype=torch.float64)
    ops = torch.ops.custom_ops
    below = ops.preference(d, zero, None, None, *parameters, 0)
    for order in (1, 2, 3):
        (slope,) = torch.autograd.grad(below.sum(), d, create_graph=True)
        torch.testing.assert_close(
            slope, ops.preference_slope(torch.ones_like(d), d, zero, None, None, order, *parameters)
        )
        below = slope
    with pytest.raises(NotImplementedError, match="up to the third, not of order 4"):
        torch.autograd.grad(below.sum(), d)


@pytest.mark.parametrize(("loss_type", "label_smoothing"), DPO)
def test_infinite_and_nan_scores_touch_only_their_own_pair(loss_type, label_smoothing):
    chosen = torch.tensor([1.0, math.inf, math.nan, -1e4], requires_grad=True)
    options = {"loss_type": loss_type, "label_smoothing": label_smoothing, "reduction": "none"}
    loss = custom_ops.dpo_loss(chosen, torch.zeros(4), **options)
    loss.sum().backward()
    assert loss[[0, 3]].isfinite().all() and chosen.grad[[0, 3]].isfinite().all()
    assert loss[2].isnan()
    if (loss_type, label_smoothing) in [("sigmoid", 0.0), ("hinge", 0.0)]:
        assert loss[1] == 0 and chosen.grad[1] == 0


def test_the_gradient_of_hinge_stops_at_its_kink():
    d = torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
    custom_ops.dpo_loss(d, torch.zeros(3), beta=1.0, loss_type="hinge", reduction="sum").backward()
    assert d.grad.tolist() == [-1, 0, 0]


def test_a_margin_as_number_and_as_tensor_are_the_same():
    torch.manual_seed(0)
    chosen, rejected = torch.randn(5), torch.randn(5)
    margin = torch.full((5,), 0.25, requires_grad=True)
    loss = custom_ops.bradley_terry_loss(chosen, rejected, margin, beta=2.0)
    assert torch.equal(loss, custom_ops.bradley_terry_loss(chosen, rejected, 0.25, beta=2.0))
    loss.backward()
    assert (margin.grad > 0).all()


def test_losses_of_16_bit_scores_are_rounded_once():
    """No 16-bit number is close to the difference of these scores."""
    positive, negative = torch.tensor([2048.0], dtype=torch.half), torch.tensor([2047.0], dtype=torch.half) / 2
    loss = custom_ops.bpr_loss(negative, positive)
    assert loss.item() == torch.tensor(2048 - 2047 / 2).half().item()
    many = torch.full((100_000,), 1.0, dtype=torch.bfloat16)
    mean = custom_ops.bpr_loss(many, -many)
    assert mean.item() == torch.tensor(math.log1p(math.exp(-2))).bfloat16().item()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_pair_gives_a_loss_of_zero_with_a_gradient(reduction):
    positive = torch.empty(0, 3, requires_grad=True)
    loss = custom_ops.bpr_loss(positive, torch.empty(0, 3), reduction)
    assert loss.sum() == 0
    loss.sum().backward()
    assert positive.grad.shape == (0, 3)


def test_several_negatives_for_each_positive():
    torch.manual_seed(0)
    positive, negative = torch.randn(4, 1, requires_grad=True), torch.randn(4, 7)
    loss = custom_ops.bpr_loss(positive, negative, "none")
    torch.testing.assert_close(loss, torch.nn.functional.softplus(negative - positive))
    loss.sum().backward()
    assert positive.grad.shape == (4, 1)


def test_promotes_dtypes():
    assert custom_ops.bpr_loss(torch.ones(2), torch.ones(2, dtype=torch.float64)).dtype == torch.float64
    assert custom_ops.bpr_loss(torch.ones(2), torch.ones((), dtype=torch.float64)).dtype == torch.float32


def test_no_temporaries():
    """Forward and backward on 64 MB inputs allocate the two gradients and nothing else of size."""
    code = """
import resource, torch, custom_ops
n = 16 << 20
tensors = [torch.ones(n, requires_grad=True) for i in range(2)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
custom_ops.bpr_loss(*tensors).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (4 * n))
"""
    assert float(subprocess.check_output([sys.executable, "-c", code], text=True)) < 2.3


PAIRWISE = {
    "bpr_loss": custom_ops.bpr_loss,
    "dpo_loss": custom_ops.dpo_loss,
    "bradley_terry_loss": custom_ops.bradley_terry_loss,
    "margin_ranking_loss": lambda a, b, **own: custom_ops.margin_ranking_loss(a, b, torch.ones_like(a), **own),
}


@pytest.mark.parametrize("loss", PAIRWISE.values(), ids=PAIRWISE.keys())
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_tangent_of_many_pairs_of_16_bits_is_rounded_once(loss, reduction):
    """Each pair's share of a mean over a million pairs is too small for float16."""
    torch.manual_seed(0)
    first, second = torch.randn(2, 1_000_000).half()
    moves = first.clone(), (second if reduction == "mean" else first - 2**-8 * second)  # the terms cancel in the sum

    def tangent(dtype):
        scores, along = ([t.to(dtype) for t in ts] for ts in ((first, second), moves))
        forward = torch.func.jvp(lambda *s: loss(*s, reduction=reduction), tuple(scores), tuple(along))[1]
        leaves = [s.requires_grad_() for s in scores]
        output = loss(*leaves, reduction=reduction)
        seed = torch.ones_like(output, requires_grad=True)
        gradients = torch.autograd.grad(output, leaves, seed, create_graph=True)
        return forward.double(), torch.autograd.grad(gradients, seed, along)[0].double()

    for ours, exact in zip(tangent(torch.float16), tangent(torch.float64)):
        torch.testing.assert_close(ours, exact, rtol=2**-9, atol=0)


@pytest.mark.parametrize("loss_type", ["sigmoid", "nca_pair", "apo_zero", "discopop"])
def test_a_beta_of_each_pair_is_as_exact_as_one_of_all(loss_type):
    """Log probabilities of thousands differ from those of the reference by a hundredth at most."""
    generator = torch.Generator().manual_seed(0)
    policy = [-3000 + 10 * torch.rand(64, generator=generator) for _ in range(2)]
    reference = [logps + 0.01 * torch.rand(64, generator=generator) - 0.005 for logps in policy]
    logps = [t.requires_grad_() for t in (*policy, *reference)]
    for beta in (0.1, 10.0):
        found = []
        for given in (beta, torch.full((64,), beta)):
            loss = custom_ops.dpo_loss(*logps, beta=given, loss_type=loss_type, reduction="none")
            found.append([loss, *torch.autograd.grad(loss.sum(), logps)])
        torch.testing.assert_close(*found, rtol=2e-5, atol=2e-6)


def test_a_compiled_beta_of_one_number_is_that_of_each_call():
    logps = [torch.linspace(-k, k, 4) for k in (1, 2, 3, 4)]
    compiled = torch.compile(custom_ops.dpo_loss, fullgraph=True, backend="aot_eager")
    for beta in 0.1, 0.3:
        torch.testing.assert_close(compiled(*logps, beta=torch.tensor(beta)), custom_ops.dpo_loss(*logps, beta=beta))
