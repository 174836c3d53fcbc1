"""Every public function with every kind of wrong argument: see tests/wrong_calls.py."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from wrong_calls import KINDS, OTHERS, PAGE, answers, markdown

import custom_ops
from custom_ops.registry import REGISTRY, Sample
from custom_ops.verify import check

ANSWERS = list(answers())


@pytest.fixture(scope="module", params=list(dict.fromkeys(a.function for a in ANSWERS)))
def of_one_function(request):
    return [a for a in ANSWERS if a.function == request.param]


def test_every_public_function_is_tried():
    functions = {name for name in custom_ops.__all__ if not inspect.isclass(getattr(custom_ops, name))}
    assert functions == {a.function for a in ANSWERS} == functions & {*REGISTRY, *OTHERS}
    assert {a.kind for a in ANSWERS} == KINDS.keys()


def test_a_wrong_argument_is_named(of_one_function):
    raised = [a for a in of_one_function if a.error is not None]
    assert not [f"{a.argument}, {a.kind}: {a.error!r}" for a in raised if not a.is_clear]


def test_some_are_never_taken(of_one_function):
    taken = [a.argument for a in of_one_function if a.kind in ("type", "device", "overlap", "NaN") and a.error is None]
    assert not taken


def test_what_is_taken_is_what_the_reference_takes(of_one_function):
    for answer in of_one_function:
        if answer.error is None and answer.function in REGISTRY and answer.kind != "gradient":
            check(REGISTRY[answer.function], Sample((), answer.arguments))


def test_nothing_is_written_beside_a_tensor(of_one_function):
    assert not [(a.argument, a.kind) for a in of_one_function if a.overwritten]


def test_the_page_is_current():
    assert PAGE.read_text() == markdown(ANSWERS), "python tests/wrong_calls.py"


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
@pytest.mark.parametrize("wrong", [2**40, -(2**40), 64])
@pytest.mark.parametrize("which", [0, 1])
def test_a_corrupted_csr_reaches_no_foreign_memory(which, wrong, reduce):
    """It is probed only, so that one wrong number may get through: whatever then is read must be in the tensors."""
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
