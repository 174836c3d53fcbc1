"""The package can be imported only if Python, C++ and Triton agree on each enum that ops take as an integer."""

from __future__ import annotations

import re
import subprocess
import sys
from enum import IntEnum
from pathlib import Path

import pytest
import torch

from custom_ops import _native
from custom_ops._enums import Choice, Ties

ROOT = Path(__file__).parents[1]

# This module replaces custom_ops/_enums.py and has one enum that C++ lacks.
IMPORT = """
import importlib.util, sys

spec = importlib.util.spec_from_file_location("custom_ops._enums", sys.argv[1])
enums = importlib.util.module_from_spec(spec)
spec.loader.exec_module(enums)
enums.Flavour = enums.Choice("Flavour", ["SWEET", "SOUR"], start=0)
sys.modules[spec.name] = enums
import custom_ops
"""


def test_each_enum_of_cpp_is_compared() -> None:
    sources = "".join(path.read_text() for path in sorted((ROOT / "csrc").glob("*.[ch]*")))
    found = set(re.findall(r"^CUSTOM_OPS_ENUM\((\w+),", sources, re.MULTILINE))
    assert found == {choice.__name__ for choice in Choice.__subclasses__()}


@pytest.mark.parametrize(
    "names", ["INDEX SCORE", "INDEX SCORE BRESLOW LABEL", "SCORE INDEX BRESLOW", "ID SCORE BRESLOW"]
)
def test_other_members_are_an_error(names: str) -> None:
    with pytest.raises(ImportError, match="the enum Ties is `INDEX, SCORE, BRESLOW` in C[+][+]") as raised:
        _native.check_enum(IntEnum("Ties", names.split(), start=0))
    assert f"`{names.split()[0]} = 0, " in str(raised.value) and "rebuild" in str(raised.value)


def test_other_values_are_an_error() -> None:
    with pytest.raises(ImportError, match="the enum Ties .* `INDEX = 1, SCORE = 2, BRESLOW = 3`"):
        _native.check_enum(IntEnum("Ties", [*Ties.__members__], start=1))


def test_a_mismatch_stops_the_import() -> None:
    command = [sys.executable, "-c", IMPORT, str(ROOT / "custom_ops" / "_enums.py")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode != 0
    assert "ImportError: custom_ops: the enum Flavour is `missing` in C++" in run.stderr


@pytest.mark.parametrize("value", [-1, len(Ties)])
def test_an_op_takes_no_other_integer(value: int) -> None:
    scores = torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match=f"Ties: expected 0 to 2, got {value}"):
        torch.ops.custom_ops.list_mle(scores, scores, None, None, None, 0, 0, value, 0, 0)
