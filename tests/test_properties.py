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
from fuzz import main, property_of

import custom_ops
from custom_ops import registry
from custom_ops.registry import REGISTRY, Sample
from custom_ops.verify import VALUES, check, random_sample, script
from custom_ops.verify._fuzz import LABELS


@pytest.mark.parametrize("op", REGISTRY)
def test_equals_the_reference_on_random_calls(op, full):
    property_of(REGISTRY[op], 500 if full else 50, derandomize=True)()


@pytest.mark.parametrize("op", ["voxel_sum", "bev_pool"])
def test_random_geometries_are_taken_or_refused(op):
    """A csr of the call's ranks is accepted in any integer type, and one of other ranks or in another order is
    refused.
    """
    for number in range(100):
        draw = random.Random(number)
        sample = random_sample(REGISTRY[op], draw.choice)
        call = inspect.signature(REGISTRY[op].function).bind(*sample.args, **sample.kwargs).arguments
        call["rank"] = call["rank"].masked_fill(~call.pop("mask", torch.tensor(True)), -1)
        rank = call["rank"].flatten(-4) if op == "bev_pool" else call["rank"]
        voxels = call["num_voxels"]
        call["num_voxels"] = draw.choice((int, np.int64, torch.tensor))(voxels)
        index = draw.choice((torch.int32, torch.int64))
        csr = [t.to(index) for t in custom_ops.voxel_csr(rank, voxels)]
        check(REGISTRY[op], Sample((), {**call, "csr": csr}))
        generator = torch.Generator().manual_seed(number)
        drawn = torch.randint(-1, max(voxels, 1), rank.shape, generator=generator).clamp(max=voxels - 1)
        stale = torch.where(torch.rand(rank.shape, generator=generator) < draw.choice((0.1, 0.9)), drawn, rank)
        shuffled = csr[0][..., torch.randperm(rank.shape[-1], generator=generator)]
        for perm, indptr in (custom_ops.voxel_csr(stale, voxels), (shuffled, csr[1])):
            call["csr"] = (perm, indptr)
            if torch.equal(perm, csr[0].long()) and torch.equal(indptr, csr[1].long()):
                check(REGISTRY[op], Sample((), call))
                continue
            with pytest.raises(RuntimeError, match="^csr: expected voxel_csr"):
                REGISTRY[op].function(**call)


def test_kinds_of_values_not_tried_are_kinds_of_values():
    assert all(info.not_fuzzed.keys() < VALUES.keys() | LABELS.keys() for info in REGISTRY.values())


def _wrong(x, inplace=False):
    """Return relu, but 1 at zeros."""
    return torch.where(x == 0, 1, x.clamp_min(0)).to(x.dtype)


def test_a_failure_prints_a_script_that_repeats_it(monkeypatch, capsys, tmp_path):
    broken = replace(REGISTRY["relu"], function=_wrong)
    with pytest.raises(AssertionError) as failure:
        property_of(broken, 200, derandomize=True)()
    printed = str(failure.value)
    program = printed[printed.index("import torch") :]
    assert "dtype=torch." in program
    path = tmp_path / "repeat.py"
    path.write_text(program)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr  # the op itself is right
    monkeypatch.setitem(registry.REGISTRY, "relu", broken)
    with pytest.raises(AssertionError, match="output 0 of relu"):  # the planted fault is found again
        exec(program, {})
    times = itertools.count()
    # a hundred readings of the clock, whatever time they take
    monkeypatch.setattr("fuzz.time.monotonic", lambda: next(times))
    assert main(["--op", "relu", "--seconds", "100"]) == 1
    assert "check(REGISTRY['relu']" in capsys.readouterr().out


@pytest.mark.parametrize("op", ["relu", "segment_sum", "pairwise_hinge_loss"])
def test_a_script_makes_the_same_call(op, monkeypatch):
    """A printed script has the values, strides and dtypes of every tensor."""
    calls = []
    monkeypatch.setattr("custom_ops.verify.check", lambda info, sample: calls.append(sample))
    for number in range(20):
        sample = random_sample(REGISTRY[op], random.Random(number).choice)
        exec(script(REGISTRY[op], sample), {})
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
        check(REGISTRY[op], again)
