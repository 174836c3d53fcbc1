"""What the documentation shows is run, and its generated parts are those of today."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import sys
import types
from pathlib import Path

import pytest

import custom_ops
from custom_ops.examples import autograd_tour, rank_mslr
from custom_ops.registry import REGISTRY
from custom_ops.verify import capabilities

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


FAMILIES = {info.function.__module__ for info in REGISTRY.values()}


@pytest.mark.parametrize("module", [*sorted(FAMILIES), "custom_ops.verify._run"])
def test_examples_of_docstrings(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0
    assert result.failed == 0


def test_examples_of_the_readme(monkeypatch):
    # In a module of their own, in which torch.compile looks up the names that it guards.
    module = types.ModuleType("readme_examples")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    test = doctest.DocTestParser().get_doctest(README, {}, "README.md", "README.md", 0)
    test.globs = module.__dict__
    result = doctest.DocTestRunner().run(test, clear_globs=False)
    assert result.attempted > 0
    assert result.failed == 0


def test_examples_of_the_tour():
    page = ROOT / "docs" / "autograd_tour.md"
    assert page.read_text() == autograd_tour.markdown(), "python -m custom_ops.examples.autograd_tour --markdown"
    result = doctest.testfile(str(page), module_relative=False)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_page_on_ranking_losses_names_each_and_its_examples_hold():
    page = ROOT / "docs" / "choosing_a_ranking_loss.md"
    text = page.read_text()
    assert all(f"| `{name}` |" in text for name in rank_mslr.LIST_LOSSES if name in REGISTRY)
    assert (page.parent / "ranking_gradients.png").stat().st_size < 150_000
    result = doctest.testfile(str(page), module_relative=False)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_readme_shows_how_to_define_an_op_that_works():
    source = README.split("## Your own op")[1].split("```python\n")[1].split("```")[0]
    names: dict = {}
    # The schema is inferred from annotations, which need a module of their own to be looked up in.
    exec(compile("import torch\n" + source, "README.md", "exec"), names)
    x = names["torch"].ones(3, requires_grad=True)
    assert names["torch"].func.grad(lambda x: names["Scale"].apply(x, 2.0).sum())(x).tolist() == [2, 2, 2]


def test_generated_parts_of_the_readme_are_current():
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "docs" / "update_readme.py")
    update = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(update)
    assert update.ops() in README, "run `make docs`"
    assert update.fastest() in README, "run `make docs`"
    assert update.speed() == update.SPEED.read_text(), "run `make docs`"
    assert update.networks() in README, "run `make docs`"
    table = README.split("<!-- matrix")[1].split("<!-- /matrix")[0]
    matrix = update.MATRIX.read_text()
    assert all(f"| {capability} |" in text for capability in capabilities(quick=True) for text in (table, matrix))
    assert all(f"`{op}`" in matrix for op in REGISTRY), "run `make docs`"
    assert "✗" not in table + matrix


def test_every_public_name_is_documented():
    for name in custom_ops.__all__:
        assert getattr(custom_ops, name).__doc__, name
