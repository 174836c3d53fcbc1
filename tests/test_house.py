"""The laws of the house: what the package may name, and what importing it may do."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import custom_ops
from custom_ops import activation, ranking, shaping, voxel

ROOT = Path(__file__).resolve().parents[1]
# What only a checkout has: as a module, as a path, as a command.
CHECKOUT = re.compile(r"\b(benchmarks|examples|docs)(\.\w|/)|(-m|import|from) (benchmarks|examples|docs)\b")
FAMILIES = (activation, ranking, shaping, voxel)


@pytest.mark.parametrize("folder", ["custom_ops", "triton_kernels", "csrc"])
def test_the_package_names_nothing_that_is_only_in_a_checkout(folder: str) -> None:
    sources = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp", ".h")]
    assert len(sources) > 10
    for path in sources:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not CHECKOUT.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def test_each_public_name_is_listed_once() -> None:
    for family in FAMILIES:
        assert sorted(family.__all__) == list(dict.fromkeys(sorted(family.__all__)))
        for path in Path(str(family.__file__)).parent.glob("*.py"):
            assert path.name == "__init__.py" or "__all__" not in path.read_text(), path
    assert sorted(custom_ops.__all__) == sorted(name for family in FAMILIES for name in family.__all__)


def test_evidence_is_imported_by_who_asks_for_it() -> None:
    program = """
import sys, custom_ops, custom_ops.verify
assert not [name for name in sys.modules if ".specs" in name]
from custom_ops.registry import REGISTRY
assert len(REGISTRY) > 30 and [name for name in sys.modules if ".specs" in name]
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)
