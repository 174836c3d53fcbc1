"""The private names of torch that the package uses are all in one file, exist, and have a reason each.

This file doesn't import the package, which a missing name may make impossible.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "custom_ops" / "library" / "_torch.py"
PRIVATE = re.compile(r"torch\.(?:.*\.)?_(?!_)")
# These are attributes of objects, each with an object that has it.
ATTRIBUTES = {
    "_op": torch.ops.aten.relu.default,
    "_schema": torch.ops.aten.relu.default,
    "_destroy": torch.library.Library,
    "_version": torch.Tensor,
}


def names_of_torch(path: Path) -> dict[str, int]:
    """Return the dotted names of torch in a file with their lines: imports, and attributes of what is imported."""
    found: dict[str, int] = {}
    imported: dict[str, str] = {"torch": "torch"}
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                found[f"{node.module}.{alias.name}"] = node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    found[alias.name] = node.lineno
    for node in ast.walk(tree):
        parts: list[str] = []
        inner: ast.expr | ast.AST = node
        while isinstance(inner, ast.Attribute):
            parts.insert(0, inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name) and inner.id in imported:
            found[".".join([imported[inner.id], *parts])] = node.lineno
    return found


def private(path: Path) -> list[str]:
    return sorted(name for name in names_of_torch(path) if PRIVATE.match(name))


def find(name: str) -> object:
    parts = name.split(".")
    value: object = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], 2):
        if isinstance(value, types.ModuleType) and not hasattr(value, part):
            importlib.import_module(".".join(parts[:number]))
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", private(FILE))
def test_torch_still_has(name):
    try:
        find(name)
    except (AttributeError, ImportError) as error:
        raise AssertionError(f"torch {torch.__version__} has no {name} any more") from error


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_objects_of_torch_still_have(name):
    assert hasattr(ATTRIBUTES[name], name), f"torch {torch.__version__}: {ATTRIBUTES[name]} has no {name} any more"


def test_the_patterns_find_names():
    names = private(FILE)
    assert "torch._C._any_requires_grad" in names
    assert "torch.autograd.forward_ad._current_level" in names
    assert "torch._dynamo.callback.callback_handler.end_callbacks" in names


OTHERS = sorted({*ROOT.glob("custom_ops/**/*.py"), *ROOT.glob("triton_kernels/**/*.py")} - {FILE})


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_file_uses_a_private_name(path):
    assert not private(path)
    used = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert not used & {*ATTRIBUTES, "_opname", "_name"}


def test_each_private_name_has_its_reason():
    """An import has its reason in the comment above it, a function in its docstring."""
    lines = FILE.read_text().splitlines()
    for name, number in names_of_torch(FILE).items():
        if PRIVATE.match(name) and not lines[number - 1].startswith(" "):
            assert lines[number - 2].startswith("# "), name
    for node in ast.parse(FILE.read_text()).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


# Each of these names is in the headers of torch 2.10, the oldest that the C++ compiles against.
OF_TORCH_2_10 = {
    "AOTI_TORCH_SUCCESS", "STABLE_TORCH_LIBRARY_IMPL", "STD_TORCH_CHECK", "TORCH_BOX", "aoti_torch_cpu_addmm_out",
    "aoti_torch_device_type_cpu", "aoti_torch_empty_strided", "torch::headeronly::BFloat16", "torch::headeronly::Half",
    "torch::headeronly::ScalarType", "torch::headeronly::toString", "torch::stable::Tensor",
    "torch::stable::contiguous", "torch::stable::copy_", "torch::stable::get_num_threads", "torch::stable::narrow",
    "torch::stable::parallel_for", "torch::stable::select", "torch::stable::transpose", "torch::stable::zero_",
}  # fmt: skip
OF_TORCH = re.compile(r"\b(?:torch::(?:stable|headeronly)::\w+|aoti_torch_\w+(?=\()|(?:AOTI|STABLE|STD|TORCH)_[A-Z_]+)")


def test_the_kernels_use_names_of_the_oldest_torch():
    sources = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/*.h")]
    used = {name for path in sources for name in OF_TORCH.findall(path.read_text())}
    assert used == OF_TORCH_2_10
