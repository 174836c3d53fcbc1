"""Properties of soft ranks, soft sorting and the loss on them beyond the battery."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import spearmanr

import custom_ops
from custom_ops.verify._backends import backend

BOTH = [custom_ops.soft_rank, custom_ops.soft_sort]


def projection(z, w):
    """Return the point nearest to z in the convex hull of the permutations of w, by the Frank-Wolfe method."""
    point = w.sort().values[z.argsort().argsort()].clone()
    for _ in range(20_000):
        gradient = point - z
        vertex = w.sort(descending=True).values[gradient.argsort().argsort()]
        step = vertex - point
        length = -(gradient @ step) / (step @ step).clamp(min=1e-300)
        if length <= 1e-12:
            break
        point = point + step * length.clamp(max=1)
    return point


@pytest.mark.parametrize("strength", [0.3, 1.0, 3.0])
def test_are_projections_onto_the_permutahedron(strength):
    torch.manual_seed(0)
    x = torch.randn(5, dtype=torch.float64)
    integers = torch.arange(1.0, 6, dtype=torch.float64)
    ranks = custom_ops.soft_rank(x, regularization_strength=strength)
    torch.testing.assert_close(ranks, projection(x / strength, integers), rtol=0, atol=1e-3)
    ordered = custom_ops.soft_sort(x, regularization_strength=strength)
    torch.testing.assert_close(ordered, projection(integers / strength, x), rtol=0, atol=1e-3)


@pytest.mark.parametrize("regularization", ["l2", "kl"])
def test_become_the_hard_ones(regularization):
    torch.manual_seed(0)
    x = torch.randperm(50).double()
    torch.testing.assert_close(
        custom_ops.soft_rank(x, regularization, 1e-3), x.argsort().argsort() + 1.0, check_dtype=False
    )
    torch.testing.assert_close(custom_ops.soft_sort(x, regularization, 1e-3), x.sort().values)


@pytest.mark.parametrize("regularization", ["l2", "kl"])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_tied_values_share_their_ranks(regularization, scale):
    x = scale * torch.tensor([2.0, 2.0, -3.0, 2.0])
    ranks = custom_ops.soft_rank(x, regularization, 0.01)
    torch.testing.assert_close(ranks, torch.tensor([3.0, 3.0, 1.0, 3.0]))
    assert custom_ops.soft_rank(torch.full((7,), scale), regularization, 1e-3).tolist() == [4.0] * 7


def test_kl_has_finite_gradients_at_a_small_strength():
    """torchsort's gradients are NaN here."""
    torch.manual_seed(0)
    x = torch.randn(4, 100, requires_grad=True)
    for function in BOTH:
        (grad,) = torch.autograd.grad(function(x, "kl", 0.01).square().sum(), x)
        assert grad.isfinite().all()


def test_ranks_of_a_long_list_in_float32_are_as_exact_as_float32():
    torch.manual_seed(0)
    x = torch.randn(4096)
    exact = custom_ops.soft_rank(x.double(), regularization_strength=0.1)
    error = (custom_ops.soft_rank(x, regularization_strength=0.1) - exact).abs().max()
    assert error < 5e-4  # torchsort's error is 5e-3


@pytest.mark.parametrize("regularization", ["l2", "kl"])
@pytest.mark.parametrize("function", BOTH)
def test_masked_values_are_never_read(function, regularization):
    torch.manual_seed(0)
    x = torch.randn(3, 6, dtype=torch.float64)
    lengths = torch.tensor([6, 2, 0])
    mask = torch.arange(6) < lengths[:, None]
    padded = torch.where(mask, x, math.nan).requires_grad_()
    for options in ({"mask": mask}, {"lengths": lengths}):
        soft = function(padded, regularization, 0.5, **options)
        for row, of_row, n in zip(x, soft, lengths):
            torch.testing.assert_close(of_row[:n], function(row[:n], regularization, 0.5))
        assert (soft[~mask] == 0).all()
        (grad,) = torch.autograd.grad(soft.square().sum(), padded)
        assert grad.isfinite().all() and (grad[~mask] == 0).all()


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy warns while it interprets a kernel
@pytest.mark.parametrize("kernels", ["cpp", "triton"])
@pytest.mark.parametrize("regularization", ["l2", "kl"])
@pytest.mark.parametrize("function", BOTH)
def test_jagged_lists_are_those_alone(function, regularization, kernels):
    torch.manual_seed(0)
    x = torch.randn(2, 9, dtype=torch.float64)
    mask = torch.arange(18).view(2, 9) % 5 != 3
    bounds = torch.tensor([1, 5, 5, 8])
    v = torch.randn_like(x)

    def derivatives(x, v, **options):
        def soft(x):
            return function(x, regularization, 0.5, **options)

        x = x.detach().requires_grad_()
        y = soft(x)
        (slope,) = torch.autograd.grad(y.square().sum() / 2, x, create_graph=True)
        second = torch.autograd.grad(slope, x, v)[0]
        (once,) = torch.autograd.grad(soft(x), x, v)
        return y, slope, second, once, *torch.func.jvp(soft, (x.detach(),), (v,))

    with backend(kernels):
        for keep in (None, mask):
            flat = derivatives(x, v, cu_lengths=bounds, mask=keep)
            for start, stop in ((1, 5), (5, 8)):
                part = slice(start, stop)
                options = {} if keep is None else {"mask": keep[:, part]}
                alone = derivatives(x[:, part], v[:, part], **options)
                for whole, of_part in zip(flat, alone, strict=True):
                    torch.testing.assert_close(whole[:, part], of_part, rtol=1e-12, atol=1e-12)
            assert not torch.stack(flat)[..., [0, 8]].any()


@pytest.mark.parametrize("bounds", [[0, 7], [3, 2], [-1, 3], [0, 2, 1]])
def test_lists_out_of_bounds_raise(bounds):
    x = torch.ones(6)
    for call in (
        custom_ops.soft_rank,
        custom_ops.soft_sort,
        lambda x, **where: custom_ops.spearman_loss(x, x, **where),
    ):
        with pytest.raises(RuntimeError, match="cu_lengths: expected non-decreasing values from 0 to 6"):
            call(x, cu_lengths=torch.tensor(bounds))


def test_spearman_takes_infinite_labels_beside_masked_ones():
    scores, labels = torch.tensor([[3.0, 1.0, 2.0, 9.0]]), torch.tensor([[math.inf, -math.inf, 0.0, math.inf]])
    assert custom_ops.spearman_loss(scores, labels, lengths=torch.tensor([3])).abs() < 1e-6


def test_a_list_of_a_hundred_thousand():
    torch.manual_seed(0)
    x = torch.randn(100_000, requires_grad=True)
    custom_ops.spearman_loss(x, torch.randn(100_000)).backward()
    assert x.grad.isfinite().all() and x.grad.any()


def test_groups_out_of_range_raise():
    x = torch.ones(1, 3)
    for bad in ([0, 1, 7], [-9, 1, 2]):
        groups = torch.tensor([bad], dtype=torch.int32)
        with pytest.raises(RuntimeError, match="groups: expected items from 0 to 2"):
            torch.ops.custom_ops.group_reduce(x, groups, None, 0, False, False, 1.0)
        with pytest.raises(RuntimeError, match="groups: expected items from 0 to 2"):
            torch.ops.custom_ops.group_softmax(x, groups, None, 1.0, False)


@pytest.mark.parametrize("levels", [3, 1000])
def test_spearman_equals_scipys_where_scores_lie_far_apart(levels):
    torch.manual_seed(0)
    scores = torch.randperm(30).double()
    labels = torch.randint(levels, (30,))
    loss = custom_ops.spearman_loss(scores, labels)
    assert loss.item() == pytest.approx(1 - spearmanr(scores, labels).statistic, rel=1e-12)


def test_spearman_of_tied_short_and_empty_lists():
    scores = torch.randn(3, 4, requires_grad=True)
    loss = custom_ops.spearman_loss(scores, torch.ones(3, 4), reduction="none")
    assert loss.tolist() == [0, 0, 0]
    loss.sum().backward()
    assert (scores.grad == 0).all()
    tied = torch.ones(4, requires_grad=True)
    loss = custom_ops.spearman_loss(tied, torch.arange(4))
    loss.backward()
    assert loss == 1 and (tied.grad == 0).all()
    for lengths in ([0, 0, 0], [1, 1, 0]):
        assert custom_ops.spearman_loss(scores, torch.rand(3, 4), lengths=torch.tensor(lengths)) == 0
    assert custom_ops.spearman_loss(scores[:, :0], torch.ones(3, 0)) == 0


def test_spearman_means_over_the_lists_whose_labels_differ():
    torch.manual_seed(0)
    scores, labels = torch.randn(3, 5), torch.randn(3, 5)
    labels[1] = 2
    each = custom_ops.spearman_loss(scores, labels, reduction="none")
    torch.testing.assert_close(custom_ops.spearman_loss(scores, labels), each.sum() / 2)


def test_half_is_rounded_once():
    torch.manual_seed(0)
    x = torch.randn(3, 40).half()
    for function in BOTH:
        assert torch.equal(function(x), function(x.double()).half())


@pytest.mark.parametrize("regularization", ["l2", "kl"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_spearman_of_tied_scores_has_no_gradient(regularization, dtype):
    """With "kl" the soft ranks of tied scores are equal only up to rounding."""
    scores = torch.full((9,), 0.3, dtype=dtype, requires_grad=True)
    loss = custom_ops.spearman_loss(scores, torch.arange(9), regularization=regularization)
    loss.backward()
    assert loss.item() == 1
    assert scores.grad.tolist() == [0] * 9


@pytest.mark.parametrize("value", [2.8e-309, 1e-38, -3e-30])
def test_items_alone_in_their_pools_keep_values_far_below_a_rounding_error(value):
    """The constant of such a pool is exactly 0, where the logarithm of a quotient near 1 was 1e-16."""
    x = torch.full((17,), value, dtype=torch.float64)
    torch.testing.assert_close(custom_ops.soft_sort(x, "kl", 0.5), x, rtol=1e-12, atol=0)


def test_sorted_values_in_float64_are_exact(each_backend):
    found = custom_ops.soft_sort(torch.tensor([-0.25, 6.0, 0.25]).double(), "l2", 0.3)
    torch.testing.assert_close(found, torch.tensor([-3, 17.5, 57.5]).double() / 12, rtol=1e-14, atol=0)
