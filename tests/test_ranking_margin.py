"""Properties of the margin ranking loss beyond the battery: it equals torch's exactly, without temporaries."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn.functional import margin_ranking_loss as torchs

import custom_ops


def compare(input1, input2, target, **options):
    ours, theirs = ([t.clone().requires_grad_() for t in (input1, input2, target)] for _ in range(2))
    loss, expected = custom_ops.margin_ranking_loss(*ours, **options), torchs(*theirs, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0, equal_nan=True)
    loss.sum().backward()
    expected.sum().backward()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("n", [1, 7, 8, 513, 40_000])
def test_equals_torchs(n, reduction):
    torch.manual_seed(0)
    compare(torch.randn(n), torch.randn(n), torch.randn(n), margin=0.3, reduction=reduction)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_the_gradient_passes_exactly_at_the_kink(margin):
    input1 = torch.tensor([1.0, 1.0, 1.0, 0.1 + 0.2])
    input2 = input1 - margin
    input2[1] = torch.nextafter(input2[1], torch.tensor(9.0))
    input2[2] = torch.nextafter(input2[2], torch.tensor(-9.0))
    compare(input1, input2, torch.ones(4), margin=margin, reduction="none")


def test_rounds_as_torch_does_beside_the_kink():
    """A fused multiply-add would round once instead of twice and move the kink for some of these."""
    torch.manual_seed(0)
    input1, target = torch.randn(200_000), torch.randn(200_000)
    input2 = input1 - 0.3 / target
    compare(input1, input2, target, margin=0.3, reduction="none")


def test_infinities_saturate_and_nan_propagates_to_its_own_element():
    inf, nan = float("inf"), float("nan")
    input1 = torch.tensor([inf, -inf, nan, 1.0])
    loss = custom_ops.margin_ranking_loss(input1, torch.zeros(4), torch.ones(4), reduction="none")
    assert loss[:2].tolist() == [0, inf]
    assert loss[2].isnan()
    assert loss[3] == 0


@pytest.mark.parametrize("shapes", [((3, 1), (4,), ()), ((1,), (5, 1, 2), (3, 1)), ((2, 3), (2, 3), (1,))])
def test_broadcasts(shapes):
    torch.manual_seed(0)
    tensors = [torch.randn(s, dtype=torch.float64) for s in shapes]
    whole = [t.contiguous() for t in torch.broadcast_tensors(*tensors)]
    ours = custom_ops.margin_ranking_loss(*tensors, 0.2)
    torch.testing.assert_close(ours, torchs(*whole, 0.2))


@pytest.mark.parametrize("target", [torch.tensor([1, -1, 1]), torch.tensor([1.0, -1, 1], dtype=torch.float64)])
def test_dtypes_promote_as_in_torch(target):
    scores = torch.randn(3), torch.randn(3)
    ours, theirs = custom_ops.margin_ranking_loss(*scores, target), torchs(*scores, target)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs)


def test_a_zero_dimensional_target_does_not_promote():
    scores = torch.randn(3), torch.randn(3)
    assert custom_ops.margin_ranking_loss(*scores, torch.tensor(1.0, dtype=torch.float64)).dtype == torch.float32


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_empty_as_in_torch(reduction):
    compare(torch.empty(0), torch.empty(0), torch.empty(0), reduction=reduction)


def test_sums_in_16_bits_are_accumulated_in_32():
    ones = torch.ones(100_000, dtype=torch.bfloat16)
    assert custom_ops.margin_ranking_loss(-ones, ones, ones).item() == 2
    assert custom_ops.margin_ranking_loss(-ones.half(), ones.half(), ones.half()).item() == 2


def test_no_temporaries():
    """Forward and backward on 64 MB inputs allocate the two gradients, the packed mask, and nothing else of size."""
    code = """
import resource, torch, custom_ops
n = 16 << 20
tensors = [torch.ones(n, requires_grad=i < 2) for i in range(3)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
custom_ops.margin_ranking_loss(*tensors, 0.5).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (4 * n))
"""
    tensors_worth = float(subprocess.check_output([sys.executable, "-c", code], text=True))
    assert tensors_worth < 2.3  # torch's own loss takes more than 5
