"""Every public function with every kind of wrong argument, from tests/wrong_calls.py."""

from __future__ import annotations

import inspect
import re
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from wrong_calls import KINDS, OTHERS, _has_gradient, answers, functions, markdown

import custom_ops
from custom_ops.registry import FUNCTIONS, Sample
from custom_ops.verify import check

ANSWERS = list(answers())


@pytest.fixture(scope="module", params=list(dict.fromkeys(a.function for a in ANSWERS)))
def of_one_function(request):
    return [a for a in ANSWERS if a.function == request.param]


def test_every_public_function_is_tried():
    functions = {name for name in custom_ops.__all__ if not inspect.isclass(getattr(custom_ops, name))}
    assert functions == {a.function for a in ANSWERS} == functions & {*FUNCTIONS, *OTHERS}
    assert {a.kind for a in ANSWERS} == KINDS.keys()


def test_a_wrong_argument_is_named(of_one_function):
    raised = [a for a in of_one_function if a.error is not None]
    assert not [f"{a.argument}, {a.kind}: {a.error!r}" for a in raised if not a.is_clear]


def test_some_are_never_taken(of_one_function):
    taken = {a.argument for a in of_one_function if a.kind in ("type", "device", "overlap") and a.error is None}
    taken |= {a.argument for a in of_one_function if a.kind == "NaN" and a.error is None} - {"empty"}
    assert not taken


def test_what_is_taken_is_what_the_reference_takes(of_one_function):
    for answer in of_one_function:
        if answer.error is None and answer.function in FUNCTIONS and answer.kind != "gradient":
            check(FUNCTIONS[answer.function], Sample((), answer.arguments))


@pytest.mark.sampled(2)
@pytest.mark.filterwarnings("ignore:torch.quantize")
@pytest.mark.parametrize("function", sorted({a.function for a in ANSWERS} - {"convert_activations"}))
def test_what_comes_from_elsewhere_is_named(function):
    """None, lists, NumPy arrays, quantized tensors, 8-bit floats and integers beyond any float are refused by name."""
    run, call = functions()[function][0]
    call = {name: v.detach() if isinstance(v, torch.Tensor) else v for name, v in call.items()}
    unclear = []
    for argument, value in call.items():
        wrong = [None, [1], np.array([1, 2]), 10**400, -(10**400)]
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            wrong += [
                torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8),
                value.abs().to(torch.float8_e8m0fnu),
            ]
        for other in wrong:
            try:
                run(**{**call, argument: other})
            except Exception as error:
                if not re.search(rf"\b{argument}\b.*expected", str(error)):
                    unclear.append(f"{argument}={other}: {error!r}")
    assert not unclear


def test_nothing_is_written_beside_a_tensor(of_one_function):
    assert not [(a.argument, a.kind) for a in of_one_function if a.overwritten]


def test_the_page_has_every_function():
    page = markdown(ANSWERS)
    assert all(f"\n## {name}\n" in page for name in {a.function for a in ANSWERS if a.error is not None})


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
@pytest.mark.parametrize("wrong", [2**40, -(2**40), 64])
@pytest.mark.parametrize("which", [0, 1])
def test_a_corrupted_csr_reaches_no_foreign_memory(which, wrong, reduce):
    """A csr is checked only in part, so one wrong number may pass. Every read then still stays within the tensors."""
    rank = torch.arange(64) // 2
    for place in range(64 if which == 0 else 33):
        csr = [t.clone() for t in custom_ops.voxel_csr(rank, 32)]
        csr[which][place] = wrong
        x = torch.ones(64, 3, requires_grad=True)
        try:
            custom_ops.voxel_sum(x, rank, 32, reduce, csr=tuple(csr)).sum().backward()
        except RuntimeError as error:
            assert re.search("csr|perm|indptr", str(error))  # noqa: PT017
        else:
            assert wrong == 64 and which == 1


def _corrupted(saved, place, wrong):
    if saved.dtype not in (torch.int32, torch.int64) or not saved.numel():
        return saved
    limits = torch.iinfo(saved.dtype)
    spoiled = saved.clone(memory_format=torch.contiguous_format)
    spoiled.view(-1)[place % saved.numel()] = max(limits.min, min(limits.max, wrong))
    return spoiled


@pytest.mark.parametrize("op", [op for op, info in FUNCTIONS.items() if info.differentiable])
@pytest.mark.parametrize("wrong", [2**40, -(2**40)])
def test_indices_corrupted_between_the_passes_reach_no_foreign_memory(op, wrong):
    """Corrupting any integer saved for a derivative, where autograd's version check doesn't see it, never leads
    outside.
    """
    info = FUNCTIONS[op]
    for sample, place in product(info.samples(torch.device("cpu"), torch.float32), range(9)):
        inputs = [t for t in (*sample.args, *sample.kwargs.values()) if _has_gradient(t)]
        with torch.autograd.graph.saved_tensors_hooks(
            lambda saved: saved, partial(_corrupted, place=place, wrong=wrong)
        ):
            outputs = info.function(*sample.args, **sample.kwargs)
            outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y.requires_grad]
            try:
                first = torch.autograd.grad([y.sum() for y in outputs], inputs, create_graph=True)
                twice = [g.square().sum() for g in first if g.requires_grad]
                torch.autograd.grad(twice, inputs, allow_unused=True) if twice else None
            except (RuntimeError, IndexError) as error:
                assert re.search("expected|out of bounds", str(error))  # noqa: PT017
