"""Triton's interpreter: the package patches nothing of it, and what the tests patch is restored."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

STATE = """
import contextlib, importlib, sys, types

import torch
import custom_ops
from custom_ops.verify import backend

interpreter = importlib.import_module("triton.runtime.interpreter")
language = importlib.import_module("triton.language")


def state():
    # The one builder that there is, so that what it holds is compared, not which object it is.
    found = {"options": interpreter.interpreter_builder.options}
    for owner in (interpreter, language, language.tensor, language.block_type, type(interpreter.interpreter_semantic)):
        found.update({(str(owner), name): value for name, value in vars(owner).items()})
    return found


def changed():
    now = state()
    return sorted(str(key) for key in {**now, **before} if now.get(key) is not before.get(key))


with backend("triton"):
    custom_ops.relu(torch.ones(3))  # imports what it needs
before = state()
"""

PACKAGE = """
with backend("triton"):
    custom_ops.relu(torch.ones(3))
    assert not changed(), changed()
assert not changed(), changed()
"""

TESTS = """
from interpreter import patched_once

with patched_once():
    custom_ops.relu(torch.ones(3))
    with backend("triton"):
        custom_ops.relu(torch.ones(3))
    assert language.load is not before[(str(language), "load")]
    # No check is lost with this one: its answer is dropped unless kernels are compiled for debugging.
    assert before["options"].sanitize_overflow and not before["options"].debug
    one, other = (language.block_type(language.int32, shape) for shape in ([2, 4], (2, 4)))
    assert one == other != language.block_type(language.int32, [4, 2])
    try:
        language.block_type(language.int32, [3])
    except ValueError as error:
        assert "must be a power of 2" in str(error)
    else:
        raise AssertionError("3 is no power of 2")
assert not changed(), changed()
"""


@pytest.mark.parametrize("code", [PACKAGE, TESTS], ids=["package", "tests"])
def test_nothing_stays_patched(code: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run([sys.executable, "-c", STATE + code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
