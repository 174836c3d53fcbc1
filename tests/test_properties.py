"""Property tests of every op, with the same calls each time; `make fuzz` makes new ones (tests/fuzz.py)."""

from __future__ import annotations

import inspect
import itertools
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from fuzz import FUZZED, main, property_of

import custom_ops
from custom_ops import registry
from custom_ops.registry import FUNCTIONS, Sample
from custom_ops.verify import VALUES, check, random_sample, script
from custom_ops.verify._fuzz import LABELS


@pytest.mark.sampled(2)
@pytest.mark.parametrize("op", FUZZED)
def test_equals_the_reference_on_random_calls(op, full):
    property_of(FUZZED[op], 500 if full else 50, derandomize=True)()


@pytest.mark.parametrize("op", ["voxel_sum", "bev_pool"])
def test_random_geometries_are_taken_or_refused(op):
    """A csr of the call's ranks is accepted in any integer type, and one of other ranks or in another order is
    refused.
    """
    for number in range(100):
        draw = random.Random(number)
        sample = random_sample(FUNCTIONS[op], draw.choice)
        call = inspect.signature(FUNCTIONS[op].function).bind(*sample.args, **sample.kwargs).arguments
        call["rank"] = call["rank"].masked_fill(~call.pop("mask", torch.tensor(True)), -1)
        rank = call["rank"].flatten(-4) if op == "bev_pool" else call["rank"]
        voxels = call["num_voxels"]
        call["num_voxels"] = draw.choice((int, np.int64, torch.tensor))(voxels)
        index = draw.choice((torch.int32, torch.int64))
        csr = [t.to(index) for t in custom_ops.voxel_csr(rank, voxels)]
        check(FUNCTIONS[op], Sample((), {**call, "csr": csr}))
        generator = torch.Generator().manual_seed(number)
        drawn = torch.randint(-1, max(voxels, 1), rank.shape, generator=generator).clamp(max=voxels - 1)
        stale = torch.where(torch.rand(rank.shape, generator=generator) < draw.choice((0.1, 0.9)), drawn, rank)
        shuffled = csr[0][..., torch.randperm(rank.shape[-1], generator=generator)]
        for perm, indptr in (custom_ops.voxel_csr(stale, voxels), (shuffled, csr[1])):
            call["csr"] = (perm, indptr)
            if torch.equal(perm, csr[0].long()) and torch.equal(indptr, csr[1].long()):
                check(FUNCTIONS[op], Sample((), call))
                continue
            with pytest.raises(RuntimeError, match="^csr: expected voxel_csr"):
                FUNCTIONS[op].function(**call)


def test_kinds_of_values_not_tried_are_kinds_of_values():
    assert all(info.not_fuzzed.keys() < VALUES.keys() | LABELS.keys() for info in FUNCTIONS.values())


def _wrong(x, inplace=False):
    """Return relu, but 1 at zeros."""
    return torch.where(x == 0, 1, x.clamp_min(0)).to(x.dtype)


def test_a_failure_prints_a_script_that_repeats_it(monkeypatch, capsys, tmp_path):
    broken = replace(FUNCTIONS["relu"], function=_wrong)
    with pytest.raises(AssertionError) as failure:
        property_of(broken, 200, derandomize=True)()
    printed = str(failure.value)
    program = printed[printed.index("import torch") :]
    assert "dtype=torch." in program
    path = tmp_path / "repeat.py"
    path.write_text(program)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr  # the op itself is right
    for found_in in (registry.FUNCTIONS, FUZZED):
        monkeypatch.setitem(found_in, "relu", broken)
    with pytest.raises(AssertionError, match="output 0 of relu"):  # the planted fault is found again
        exec(program, {})
    times = itertools.count()
    # The clock is read a hundred times, whatever time that takes.
    monkeypatch.setattr("fuzz.time.monotonic", lambda: next(times))
    assert main(["--op", "relu", "--seconds", "100"]) == 1
    assert "check(FUNCTIONS['relu']" in capsys.readouterr().out


def test_terms_that_cancel_hide_no_other_fault():
    """A sum of terms of 1e9 is compared relative to them, and the loss of another list relative to its own."""
    scores = torch.tensor([[1e9, -1e9, 1.5, 0.5], [0.25, -1.0, 1.5, 0.5]], requires_grad=True)
    labels = torch.tensor([[-1, -1, 2, 0], [-1, 0, 2, 1]])
    info, sample = FUNCTIONS["softmax_loss"], Sample((scores, labels), {"reduction": "none"})
    check(info, sample)
    with pytest.raises(AssertionError, match="output 0"):
        check(replace(info, term_size=None), sample)
    wrong = replace(info, function=lambda *args, **own: info.function(*args, **own) + torch.tensor([0, 1e-3]))
    with pytest.raises(AssertionError, match="output 0"):
        check(wrong, sample)


@pytest.mark.parametrize("nan_in", ["labels", "scores"])
@pytest.mark.parametrize("op", ["softmax_loss", "pairwise_hinge_loss"])
def test_a_nan_gradient_counts_where_its_loss_is_a_number(op, nan_in):
    scores, labels = torch.tensor([[0.5, 1.0, 2.0]] * 2), torch.tensor([[0.0, 1.0, 2.0]] * 2)
    (labels if nan_in == "labels" else scores)[0, 1] = torch.nan
    info, sample = FUNCTIONS[op], Sample((scores.requires_grad_(), labels), {"reduction": "none"})
    check(info, sample)

    class NaNGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.new_zeros(2)

        @staticmethod
        def backward(ctx, grad):
            return torch.full((2, 3), torch.nan)

    def spoilt(scores, labels, **own):
        return info.function(scores, labels, **own) + NaNGradient.apply(scores)

    with pytest.raises(AssertionError, match="gradient 0"):
        check(replace(info, function=spoilt), sample)


def test_labels_and_weights_of_random_calls():
    """Time stamps keep their differences beside weights of the items, and a NaN label makes its list's loss NaN."""
    scores, stamps = torch.tensor([0.5, 0.25, 0.0, 1.0]), 1_700_000_000 + torch.tensor([0, 3, 1, 2])
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0])
    expected = custom_ops.list_net_loss(scores, stamps - 1_700_000_000, item_weights=weights)
    for dtype in (torch.float32, torch.float64):
        found = custom_ops.list_net_loss(scores.to(dtype), stamps, item_weights=weights)
        torch.testing.assert_close(found, expected.to(dtype), rtol=1e-6, atol=0)
    weights = torch.tensor([1.0, 1.5], dtype=torch.float64)
    assert custom_ops.spearman_loss(scores[:2], torch.ones(2), item_weights=weights) == 0
    undefined = torch.tensor([1.0, 0.0, torch.nan, 0.0])
    assert custom_ops.smooth_ap_loss(scores, undefined).isnan()
    assert not custom_ops.smooth_ap_loss(scores, undefined, item_weights=torch.tensor([1.0, 1, 0, 1])).isnan()


@pytest.mark.parametrize("op", ["relu", "segment_sum", "pairwise_hinge_loss"])
def test_a_script_makes_the_same_call(op, monkeypatch):
    """A printed script has the values, strides and dtypes of every tensor."""
    calls = []
    monkeypatch.setattr("custom_ops.verify.check", lambda info, sample: calls.append(sample))
    for number in range(6):
        sample = random_sample(FUNCTIONS[op], random.Random(number).choice)
        exec(script(FUNCTIONS[op], sample), {})
        again = calls.pop()
        pairs = zip([*sample.args, *sample.kwargs.values()], [*again.args, *again.kwargs.values()], strict=True)
        for before, after in pairs:
            if isinstance(before, torch.Tensor):
                torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
                assert (after.stride(), after.dtype, after.requires_grad) == (
                    before.stride(),
                    before.dtype,
                    before.requires_grad,
                )
            else:
                assert after == before
        check(FUNCTIONS[op], again)


def test_a_gradient_of_the_temperature_that_cancels_is_0_up_to_the_rounding_of_its_terms():
    """With equal keys it is 0; its terms are some thousands."""
    query = torch.tensor([[1.3638172, 0.2610123], [2.2184114, 0.4486923], [-1.6355003, -0.1954338]]).requires_grad_()
    key = torch.tensor([-0.8226508]).expand(5, 2).detach().requires_grad_()
    temperature, target = torch.tensor(0.0135736).requires_grad_(), torch.tensor([4, 0, 2])
    groups = {"query_group": torch.tensor([0, 1, 0]), "key_group": torch.tensor([1, 3, 0, 3, 0])}
    info, options = FUNCTIONS["info_nce_loss"], {"temperature": temperature, "symmetric": False, **groups}
    check(info, Sample((query, key, target), options))

    def wrong(*args, temperature, **kwargs):
        detached = temperature.detach()
        return info.function(*args, temperature=detached, **kwargs) + 0.1 * (temperature / detached - 1)

    with pytest.raises(AssertionError, match="gradient 2 of info_nce_loss"):
        check(replace(info, function=wrong), Sample((query, key, target), options))
