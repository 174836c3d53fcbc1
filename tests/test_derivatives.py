"""The report on public functions: an error isn't called wrong, and plain PyTorch shows what is called wrong."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from benchmarks import derivatives
from benchmarks.derivatives import RAISED, WRONG, confirm, examine, find, main, page
from benchmarks.public_functions import CONFIRMATIONS, PUBLIC, Public
from custom_ops.registry import OpInfo, Sample
from custom_ops.verify import script, verify


def leaf() -> torch.Tensor:
    return torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)


class Cube(torch.autograd.Function):
    """The cube; its backward uses a number that the graph doesn't know, so that the second derivative lacks a term."""

    @staticmethod
    def forward(ctx, x):
        ctx.slope = 3 * x * x
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.slope


@pytest.fixture
def cube(monkeypatch):
    module = types.ModuleType("cube_module")
    module.cube = Cube.apply
    monkeypatch.setitem(sys.modules, "cube_module", module)
    return Public("cube_module.cube", lambda: [Sample((leaf(),))], reference=lambda x: x * x * x)


def test_a_wrong_second_derivative_is_told_from_an_error(cube, monkeypatch):
    finding = examine(cube, Cube.apply, ["value", "second derivative", "func.grad", "forward AD"])
    failed = {how: [cell.capability for cell in cells] for how, cells in finding.failed.items()}
    assert failed == {WRONG: ["second derivative"], RAISED: ["func.grad", "forward AD"]}
    assert "cube_module.cube" in page([finding], []) and "not confirmed" in page([finding], [])

    lines = "import torch\ngot, right = torch.zeros(1), torch.ones(1)\nprint('six')"
    monkeypatch.setitem(CONFIRMATIONS, cube.path, lines)
    assert confirm(cube.path) == (lines, "six")
    monkeypatch.setitem(CONFIRMATIONS, cube.path, lines.replace("zeros", "ones"))
    assert confirm(cube.path) is None
    monkeypatch.setitem(CONFIRMATIONS, cube.path, "raise RuntimeError('an honest refusal')")
    assert confirm(cube.path) is None


def test_the_script_of_another_function_fails_as_verify_does(cube):
    sample = cube.samples()[0]
    info = OpInfo(cube.path, Cube.apply, None, lambda device, dtype: [sample], "")
    with pytest.raises(AssertionError, match=r"Jacobian mismatch|not close"):
        exec(script(info, sample, ["gradgradcheck"]), {})


def test_an_assertion_of_the_op_itself_is_reported_with_its_place():
    def refuses(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("no derivative")

    (cell,) = verify(refuses, [(leaf(),)], only=["gradcheck"]).cells
    assert cell.detail.startswith("AssertionError: no derivative\n(at refuses")
    assert derivatives.kind(cell) == RAISED


def test_the_command_finds_nothing_wrong_with_plain_functions(tmp_path, capsys, monkeypatch):
    names = ("torch.matmul", "torch.cumsum", "torch.logsumexp", "torch.nn.functional.softmax")
    monkeypatch.setattr(derivatives, "PUBLIC", [*(p for p in PUBLIC if p.path in names), Public("nowhere.f", list)])
    assert main(["--write", str(tmp_path / "page.md")]) == 0
    assert capsys.readouterr().out.count("passes") == len(names)
    text = (tmp_path / "page.md").read_text()
    assert f"## Silently wrong: 0 of {len(names)} functions" in text and "Not installed" in text


def test_the_functions_of_torch_are_there():
    here = [p for p in PUBLIC if p.package == "torch" and find(p.path)]
    assert len(here) > 60
    assert CONFIRMATIONS.keys() <= {p.path for p in PUBLIC}
