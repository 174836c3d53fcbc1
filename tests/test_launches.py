"""The launches on a GPU, as far as a CPU can tell: no call waits for the device, and new sizes compile little."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.launches import AIMS, SIZES, resized, row, samples, trace_of
from custom_ops.registry import FUNCTIONS, REGISTRY, Sample
from custom_ops.verify import backend

PAGE = Path(__file__).parent.parent / "docs" / "launches.md"
WAITING = {
    "voxels_summing": {"tolist"},  # the number of voxels is the output's length, which the host must know
    "voxel_rank": {"tensor"},  # a grid given as numbers is copied from the host; a grid given as tensors isn't
}


@pytest.fixture(autouse=True, scope="module")
def triton():
    with backend("triton"):  # opened once for all tests
        yield


@pytest.mark.sampled(2)
@pytest.mark.parametrize("op", FUNCTIONS)
def test_no_call_waits_for_the_device(op):
    """No call waits for the device or copies from the host, so that each can be captured in a CUDA graph."""
    waits = set()
    for sample in samples(FUNCTIONS[op]):
        for trace in trace_of(FUNCTIONS[op], sample):
            waits |= trace.waits
    assert waits == WAITING.get(op, set())


ALONE = ("relu", "leaky_relu", "bias_relu", "relu_dropout", "squared_relu", "margin_ranking_loss", "surrogate_gradient")


@pytest.mark.parametrize("op", ALONE)
def test_pointwise_ops_launch_nothing_but_their_own_kernels(op):
    """Beside our kernels, forward calls no op of torch that runs a kernel, and backward at most three."""
    forward, backward = trace_of(REGISTRY[op], samples(REGISTRY[op])[0])
    assert forward.launches and not forward.calls
    assert backward.launches and len(backward.calls) <= 3


SORTED = (
    "soft_rank",
    "soft_sort",
    "list_mle_loss",
    "unique_softmax_loss",
    "cosent_loss",
    "lambda_loss",
    "neural_sort_ndcg_loss",
)
FEW = (
    "softmax_loss",
    "list_net_loss",
    *SORTED,
    "approx_ndcg_loss",
    "approx_mrr_loss",
    "smooth_ap_loss",
    *(op for op in FUNCTIONS if op.startswith("pairwise") and "mse" not in op),
)


@pytest.mark.parametrize("op", FEW)
def test_list_losses_are_few_kernels(op):
    """Forward of a padded batch is at most 3 launches of our kernels and 15 of torch's; ``empty`` costs more."""
    for sample in samples(FUNCTIONS[op]):
        if not {"cu_lengths", "empty"} & sample.kwargs.keys():
            forward, _ = trace_of(FUNCTIONS[op], sample)
            masked = op == "approx_ndcg_loss" and "mask" in sample.kwargs  # then the sort's keys are one launch more
            assert len(forward.launches) <= 3 + masked and len(forward.calls) <= 15, forward.calls


SUMS = [("voxel_sum", 4, 3), ("bev_pool", 3, 4), ("bev_pool_v2", 6, 17)]


@pytest.mark.parametrize(("op", "launches", "calls"), SUMS)
def test_sums_over_voxels_are_few_kernels(op, launches, calls):
    """Forward casts and checks in few calls of torch and sorts in one; backward of one level has at most 7 of each."""
    for sample in samples(FUNCTIONS[op]):
        forward, backward = trace_of(FUNCTIONS[op], sample)
        assert len(forward.launches) <= launches and len(forward.calls) <= calls, forward.calls
        assert len(backward.launches) <= 7 and len(backward.calls) <= 7, backward.calls


@pytest.mark.sampled(2)
@pytest.mark.parametrize("op", FUNCTIONS)
def test_new_sizes_compile_nothing(op):
    """Each kernel has at most three variants: for size 1, for multiples of 16 and for all other sizes."""
    sample = next((s for s in samples(FUNCTIONS[op]) if s.dynamic), None)
    if sample is None:
        return
    compiled = set()
    for times in SIZES:
        for trace in trace_of(FUNCTIONS[op], resized(sample, times)):
            compiled |= {launch.compiled for launch in trace.launches}
    kernels = [(name, variant, *(seen[0] for seen in args if seen)) for name, variant, *args in compiled]
    for kernel in kernels:
        assert kernels.count(kernel) <= 3, [launch for launch in compiled if launch[0] == kernel[0]]


def off_alignment(value):
    """Return a copy of the tensor that begins one element after a multiple of 16 bytes."""
    if not isinstance(value, torch.Tensor) or value.is_sparse:
        return value
    moved = torch.empty(value.numel() + 1, dtype=value.dtype)[1:].view(value.shape)
    return moved.copy_(value.detach()).requires_grad_(value.requires_grad)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_a_slice_compiles_once_more_at_most(op):
    """An unaligned slice adds at most one variant, the one without 16-byte loads."""
    sample = samples(FUNCTIONS[op])[0]
    args, kwargs = tuple(map(off_alignment, sample.args)), {k: off_alignment(v) for k, v in sample.kwargs.items()}
    compiled = set()
    for given in (sample, Sample(args, kwargs, sample.dynamic)):
        for trace in trace_of(FUNCTIONS[op], given):
            compiled |= {launch.compiled for launch in trace.launches}
    # The sizes are equal. Triton specialises a size of 1, so launches with one have a variant of their own.
    kernels = [(name, variant, *(s for s in seen if not s[:1] or s[0][0] != "*")) for name, variant, *seen in compiled]
    for kernel in kernels:
        assert kernels.count(kernel) <= 2, [launch for launch in compiled if launch[0] == kernel[0]]


def test_the_page_is_current(full):
    """The page's rows are up to date, for some ops, or for all of them in `make test-full`."""
    page = PAGE.read_text().splitlines()
    some = ("relu", "softmax_loss", "margin_ranking_loss", "voxels_summing")
    lines = [row(REGISTRY[op]) for op in (REGISTRY if full else some)]
    assert {line for line in lines if line} | {*AIMS} <= {*page}, "run `make docs`"
