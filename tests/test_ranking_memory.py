"""The list losses allocate nothing of size n^2, even for lists of 100,000 documents."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from test_ranking_lists import LOSSES

import custom_ops
from benchmarks.memory import peak_bytes
from custom_ops.verify._backends import backend

CPU = torch.device("cpu")
# Their time grows with the rows of relevant items.
FEW_RELEVANT = ("approx_ndcg_loss", "approx_mrr_loss", "smooth_ap_loss")
OPTIONS = {**{name: {"temperature": 1.0} for name in FEW_RELEVANT}, "cosent_loss": {"scale": 1.0}}

# NumPy warns while it interprets a kernel
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
each_loss = pytest.mark.parametrize("name", LOSSES)


def squared(soft, regularization):
    return lambda values, _: soft(values, regularization).square().sum()


OTHERS = {
    f"{soft.__name__} {regularization}": squared(soft, regularization)
    for soft in (custom_ops.soft_rank, custom_ops.soft_sort)
    for regularization in ("l2", "kl")
}
each_of_all = pytest.mark.parametrize("name", [*LOSSES, *OTHERS])


def lists(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).requires_grad_(), torch.randint(0, 5, shape, generator=generator)


def peak(name, *shape):
    """Return the peak memory of forward, backward and second derivative."""
    scores, labels = lists(*shape)
    function, own = {**LOSSES, **OTHERS}[name], OPTIONS.get(name, {})

    def run():
        (slope,) = torch.autograd.grad(function(scores, labels, **own), scores, create_graph=True)
        torch.autograd.grad(slope.square().sum(), scores)

    return peak_bytes(run, CPU)


@pytest.mark.sampled(2)
@each_of_all
def test_four_lists_of_4096_take_a_mebibyte_at_most(name):
    """One n x n matrix of one list would take 64 MiB. The extra KiB is for the few numbers that each list has."""
    assert peak(name, 4, 4096) <= (1 << 20) + (1 << 10)


def test_the_kernels_own_memory_is_small_too():
    """The C++ kernels use little memory besides torch's: a fresh process grows little, over all losses."""
    code = f"""
import resource, torch, custom_ops
def step(name, n):
    scores = torch.randn(4, n, requires_grad=True)
    loss = getattr(custom_ops, name)(scores, torch.randint(0, 5, (4, n)), **options.get(name, {{}}))
    slope, = torch.autograd.grad(loss, scores, create_graph=True)
    torch.autograd.grad(slope.square().sum(), scores)
names, options = {list(LOSSES)}, {OPTIONS}
for name in names:
    step(name, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in names:
    step(name, 4096)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    assert float(subprocess.check_output([sys.executable, "-c", code], text=True)) < 8


@pytest.mark.parametrize("metric", [custom_ops.ndcg, custom_ops.mrr, custom_ops.average_precision])
def test_metrics_take_memory_in_proportion_to_n(metric):
    small, large = (peak_bytes(lambda n=n: metric(*lists(4, n)), CPU) for n in (2048, 4096))
    assert large <= 2.1 * small


@pytest.mark.sampled(4)
@each_of_all
def test_the_triton_launchers_allocate_in_proportion_to_n(name):
    with backend("triton"):
        small, large = (peak(name, 1, n) for n in (32, 64))
    assert large <= 2.05 * small  # one byte for each pair would make it at least 2.07


@pytest.mark.sampled(2)
@each_loss
def test_a_list_of_100_000_documents_trains(name):
    scores, labels = lists(100_000)
    if name in FEW_RELEVANT:
        labels = (torch.rand(100_000, generator=torch.Generator().manual_seed(1)) < 0.003).long()
    own = {"k": 100} if name == "lambda_loss" else OPTIONS.get(name, {})
    loss = LOSSES[name](scores, labels, **own)
    (slope,) = torch.autograd.grad(loss, scores)
    assert slope.isfinite().all()
    with torch.no_grad():
        assert LOSSES[name](scores - slope / slope.abs().max(), labels, **own) < loss
