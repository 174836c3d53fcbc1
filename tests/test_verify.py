"""The battery's own interface: reports, options, the command line, backends."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from custom_ops.verify import Cell, Report, Sample, backend, capabilities, main, verify
from custom_ops.verify._report import CAUSES


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def test_a_torch_function_passes() -> None:
    samples = [Sample((leaf(3, 2),), dynamic={0: 0})]
    report = verify(torch.sin, samples, reference=torch.sin, quick=True)
    report.raise_on_failure()
    assert report["opcheck"].status == "not applicable"
    assert report["opcheck"].detail == "reaches no registered op"


FINE = {
    "softmax": (lambda x: x.softmax(-1), [(4, 3)]),
    "matmul": (torch.matmul, [(4, 3), (3, 2)]),
    "cumsum": (lambda x: x.cumsum(-1), [(4, 3)]),
    "logsumexp": (lambda x: x.logsumexp(-1), [(4, 3)]),
}


@pytest.mark.parametrize("name", ["softmax", *(pytest.param(name, marks=pytest.mark.full) for name in list(FINE)[1:])])
def test_no_false_alarm(name: str) -> None:
    function, shapes = FINE[name]
    report = verify(function, [tuple(leaf(*shape) for shape in shapes)], reference=function, quick=True)
    report.raise_on_failure()


def test_outputs_whose_squares_have_a_constant_sum_are_no_fault() -> None:
    def circle(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.sin(), x.cos()

    assert verify(circle, [(leaf(4),)], reference=circle, quick=True, only=["func.hessian", "forward over forward"]).ok


def test_wrong_sharding_rules_of_torch_are_not_the_functions_fault() -> None:
    """For the last dimension counted from the end, torch 2.13 gives wrong sums of sharded DTensors; 2.10 refuses."""
    cell = verify(lambda x: x.cumsum(-1), [(leaf(4, 3),)], quick=True, only=["sharding"])["sharding"]
    refused = torch.__version__.startswith("2.10.") and cell.detail.startswith("refuses DTensors")
    assert cell.status == "pass" or refused or "only torch's own sharding rules, which are wrong" in cell.detail


def test_the_process_is_left_as_it_was() -> None:
    def seeded(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        torch.set_num_threads(threads + 1)
        return x.sin()

    x = leaf(4, 3)
    threads, state, hook = torch.get_num_threads(), torch.get_rng_state(), sys.excepthook
    report = verify(seeded, [(x,)], quick=True, only=["value", "sharding", "global state"])
    assert report["global state"].status == "fail"
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert sys.excepthook is hook


def test_the_threads_row_ends_though_a_pool_takes_a_busy_thread_for_an_idle_one(monkeypatch: Any) -> None:
    """Python's pool starts no thread for a task if it counts one as idle, and may count one that has a new task."""

    class Miscounting(ThreadPoolExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
            future = super().submit(*args, **kwargs)
            future.add_done_callback(lambda _: self._idle_semaphore.release())  # type: ignore[attr-defined]
            return future

    monkeypatch.setattr("custom_ops.verify._effects.ThreadPoolExecutor", Miscounting)
    assert verify(torch.sin, [(leaf(4),)], quick=True, only=["threads"]).ok


def test_samples_may_be_tuples_and_have_tensors_in_kwargs() -> None:
    def scaled(x: torch.Tensor, *, by: torch.Tensor) -> torch.Tensor:
        return x * by

    samples = [Sample((leaf(3),), {"by": leaf(3)}, dynamic={0: 0, "by": 0})]
    rows = ["value", "gradient", "vmap", "compile dynamic", "export", "forward AD", "zero size"]
    verify(scaled, samples, reference=scaled, quick=True, only=rows).raise_on_failure()
    assert verify(torch.sin, [(leaf(3),)], only=["gradcheck"]).ok


def test_what_does_not_apply_says_why() -> None:
    rows = ["value", "gradcheck", "modules", "apply"]
    report = verify(torch.sin, [(torch.ones(2),)], quick=True, only=rows, differentiable=False)
    assert {cell.capability: cell.detail for cell in report.cells} == {
        "value": "no reference given",
        "gradcheck": "not differentiable",
        "modules": "no module",
        "apply": "no Function.apply given",
    }
    assert report.ok


def test_what_the_samples_do_not_reach_is_not_ok() -> None:
    """The samples take no gradient, so the rows on derivatives are unchecked."""
    report = verify(torch.sin, [(torch.ones(2),)], quick=True, only=["gradcheck", "vmap", "forward AD"])
    assert [cell.capability for cell in report.unchecked] == ["gradcheck", "forward AD"]
    assert not report.ok and not report.failures
    assert report.summary == "1 pass, 0 fail, 0 not applicable, 2 of 3 not checked"
    with pytest.raises(
        AssertionError, match="not checked: gradcheck, forward AD: no sample has an input that requires"
    ):
        report.raise_on_failure()


def test_dynamic_dimensions_are_found() -> None:
    def third(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        assert x.shape[-1] == 3
        return x @ w

    rows = ["compile dynamic", "export", "zero size", "large"]
    assert verify(third, [(leaf(4, 3), leaf(3, 2))], reference=third, quick=True, only=rows).ok

    def scalar(x: torch.Tensor) -> torch.Tensor:
        assert x.shape == (2,)
        return x.sin()

    report = verify(scalar, [(leaf(2),)], reference=scalar, quick=True, only=rows)
    assert {cell.status for cell in report.cells} == {"not checked"}
    declared = dict.fromkeys(rows, "a point of the plane")
    assert verify(scalar, [(leaf(2),)], reference=scalar, quick=True, only=rows, not_applicable=declared).ok


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([torch.ones(2)], r"sample 0 is a Tensor, expected a Sample or a tuple of arguments: \[\(x,\)\], not \[x\]"),
        ([Sample((torch.ones(2),), dynamic={1: 0})], r"sample 0 has dynamic=\{1: 0\}, expected dimensions of its"),
        ([Sample((torch.ones(2),), dynamic={0: 1})], r"shapes are \{0: \[2\]\}"),
        ([Sample((torch.ones(2),), {"by": 2.0}, dynamic={"by": 0})], "sample 0 has dynamic"),
    ],
)
def test_wrong_samples_are_refused(samples: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verify(torch.sin, samples)


def test_samples_without_gradient() -> None:
    def twice(a: torch.Tensor) -> torch.Tensor:
        return a * 2

    samples = [Sample((torch.randn(3, 2),), dynamic={0: 0})]
    report = verify(twice, samples, reference=twice, quick=True, differentiable=False)
    report.raise_on_failure()
    assert report["vmap"].status == "pass"


def test_samples_may_be_a_generator() -> None:
    assert verify(torch.sin, (s for s in [(leaf(2),), (leaf(3),)]), reference=torch.sin, only=["value"]).ok


def test_samples_may_be_tuples_that_a_function_returns() -> None:
    report = verify(torch.sin, lambda device, dtype: [(leaf(2).to(dtype),)], reference=torch.sin, only=["float32"])
    assert report["float32"].status == "pass"


def test_declared_not_applicable() -> None:
    report = verify(torch.sin, [(leaf(2),)], only=["vmap"], not_applicable={"vmap": "because"})
    assert (report["vmap"].status, report["vmap"].detail) == ("not applicable", "because")


def test_declared_not_comparable() -> None:
    """An inapplicable second derivative has to raise; an incomparable one needn't."""
    for declared, status in (("not_applicable", "fail"), ("not_comparable", "not applicable")):
        report = verify(torch.sin, [(leaf(2),)], only=["func.hessian"], **{declared: {"func.hessian": "because"}})
        assert report["func.hessian"].status == status


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ["nothing"]}, "only: unknown capability 'nothing'"),
        ({"backend": "tpu"}, "backend: expected one of cpp, triton, ptx, cuda"),
        ({"not_applicable": {"nothing": ""}}, "not_applicable: unknown"),
        ({"not_comparable": {"nothing": ""}}, "not_comparable: unknown"),
        ({"sample_inputs": []}, "sample_inputs: expected at least one sample"),
        ({"sample_inputs": 3}, r"sample_inputs: expected a list of calls, as \[\(x,\)\], got int"),
        ({"sample_inputs": torch.ones(2)}, "sample_inputs: expected a list of calls.*got Tensor"),
        ({"sample_inputs": lambda a, b, c: []}, "sample_inputs: expected a function of a device and a dtype"),
        ({"sample_inputs": lambda a, b: a + b}, "sample_inputs: the function raises TypeError: unsupported"),
        ({"sample_inputs": lambda a, b: leaf(2)}, "sample_inputs: expected the function to return a list, got Tensor"),
        ({"reference": 3}, "reference: expected a function, got int"),
    ],
)
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verify(torch.sin, **{"sample_inputs": [(leaf(2),)], **options})


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (((torch.ones(2), 1), {}), "argument 0 of sample 1 is a tuple with tensors in it"),
        (([[torch.ones(2)]], {}), "argument 0 of sample 1 is a list"),
        ((1.0, {"by": {"x": torch.ones(2)}}), "argument 'by' of sample 1 is a dict"),
    ],
)
def test_tensors_within_arguments_are_refused(sample: tuple, message: str) -> None:
    first, named = sample
    samples = [Sample((leaf(2),)), Sample((first,), named)]
    with pytest.raises(ValueError, match=message):
        verify(torch.sin, samples)
    report = verify(torch.sin, lambda device, dtype: samples, only=["vmap"])
    assert message in report["vmap"].detail


def test_triton_backend_wants_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"), backend("triton"):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_cuda_backend_wants_a_device() -> None:
    with pytest.raises(RuntimeError, match="no CUDA device"):
        verify(torch.sin, [(leaf(2),)], backend="cuda")


def test_report() -> None:
    cells = [
        Cell("f", "cpp", "value", "pass"),
        Cell("f", "cpp", "vmap", "fail", "differs"),
        Cell("f", "cpp", "apply", "not applicable", "no apply"),
    ]
    report = Report(cells)
    assert not report.ok
    with pytest.raises(AssertionError, match=r"f \(cpp\), vmap: differs"):
        report.raise_on_failure()
    assert [cell["status"] for cell in json.loads(report.to_json())["cells"]] == ["pass", "fail", "not applicable"]
    assert report.to_markdown().splitlines() == [
        "| | f (cpp) |",
        "|---|:-:|",
        "| value | ✓ |",
        "| vmap | ✗ (1) |",
        "| apply | – (2) |",
        "",
        "1. fail: differs",
        "2. not applicable: no apply",
    ]


def test_the_cause_comes_first() -> None:
    names = ["gradcheck", "func.grad", "vmap(grad)", "gradient", "vmap", "fake kernel"]
    status = dict.fromkeys(names, "fail") | {"vmap": "pass"}
    report = Report([Cell("f", "cpp", name, status[name], f"<{name}> is wrong") for name in names])
    found = [(cell.capability, [other.capability for other in others]) for cell, others in report.causes]
    assert found == [("gradient", ["gradcheck", "func.grad", "vmap(grad)"]), ("fake kernel", [])]
    assert report.summary == "1 pass, 5 fail by 2 likely causes, 0 not applicable, 0 of 6 not checked"
    lines = list(report.lines())
    assert lines[0] == "f (cpp), gradient: <gradient> is wrong"
    assert lines[1] == "  likely for that reason also: gradcheck, func.grad, vmap(grad)"
    page = report.to_html()
    assert page.index("&lt;gradient&gt; is wrong") < page.index("&lt;gradcheck&gt; is wrong")


def test_rows_with_the_same_error_have_one_cause() -> None:
    error = {"vmap": "no rule", "global state": "no rule", "gradient layouts": "no rule", "gradient": "differs"}
    report = Report([Cell("f", "cpp", name, "fail", detail) for name, detail in error.items()])
    found = {cell.capability: [other.capability for other in others] for cell, others in report.causes}
    assert found == {"vmap": ["global state", "gradient layouts"], "gradient": []}


def test_causes_are_rows_and_no_row_is_its_own() -> None:
    def above(row: str) -> set[str]:
        return {row} | {name for cause in CAUSES.get(row, ()) for name in above(cause)}

    assert {*CAUSES, *(cause for causes in CAUSES.values() for cause in causes)} <= set(capabilities())
    for row, causes in CAUSES.items():
        assert row not in {name for cause in causes for name in above(cause)}, row


def test_junit() -> None:
    statuses = ["pass", "fail", "not applicable", "not checked"]
    cells = [Cell("f", "cpp", f"row {i}", status, "a < b\x00") for i, status in enumerate(statuses)]
    (suite,) = ElementTree.fromstring(Report(cells).to_junit().split("\n", 1)[1])
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("4", "2", "1")
    assert [[child.tag for child in case] for case in suite] == [[], ["failure"], ["skipped"], ["failure"]]
    assert [child.get("message") for case in suite for child in case] == ["a < b", "a < b", "not checked: a < b"]


def test_any_function_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_function.py").write_text(
        "import torch\n"
        "samples = [(torch.randn(3, dtype=torch.float64, requires_grad=True),)]\n"
        "def twice(x): return 2 * x\n"
        "def thrice(x): return 3 * x\n"
        "def made(): return samples\n"
    )
    monkeypatch.chdir(tmp_path)
    own = ["own_function:twice", "--only", "value", "gradient", "--reference"]
    assert main([*own, "own_function:twice", "--samples", "own_function:samples"]) == 0
    assert "2 pass, 0 fail" in capsys.readouterr().out
    files = ["--html", "report.html", "--junit", "report.xml"]
    assert main([*own, "own_function:thrice", "--samples", "own_function:made", *files]) == 1
    assert "likely for that reason also: gradient" in capsys.readouterr().out
    assert Path("report.html").read_text().startswith("<!doctype html>")
    assert 'failures="2"' in Path("report.xml").read_text()
    capsys.readouterr()
    for wrong, said in (
        ([*own, "own_function:twice"], "--samples: expected module:name of the calls"),
        (
            ["own_function", "--samples", "own_function:made"],
            "MODULE:FUNCTION: expected module:name, got 'own",
        ),
        (["own_function:no", "--samples", "own_function:made"], "MODULE:FUNCTION: own_function:no: module"),
        (["own_function:twice", "--samples", "no:made"], "--samples: no:made: No module named 'no'"),
        ([*own, "own_function:twice", "--samples", "own_function:made", "--html", "no/a.html"], "--html, --junit: "),
    ):
        assert main(wrong) == 2
        assert capsys.readouterr().err.startswith(said)


def test_one_line_gives_pytest_the_matrix(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text(
        "import torch\n"
        "from custom_ops.verify import matrix\n"
        "x = torch.randn(3, dtype=torch.float64, requires_grad=True)\n"
        'test_sine = matrix(torch.sin, [(x,)], reference=torch.cos, only=["value", "vmap", "modules"])\n'
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "test_own.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "1 failed, 1 passed, 1 skipped" in done.stdout, done.stdout
    assert "test_sine[value]" in done.stdout and "no module" in done.stdout


def test_every_capability_says_what_it_means() -> None:
    assert all(len(meaning) > 10 for meaning in capabilities().values())
    assert set(capabilities()) - set(capabilities(quick=True)) == {"AOTInductor"}


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert "gradgradcheck" in capsys.readouterr().out
    assert main(["--op", "relu", "--only", "value", "--only", "func.jvp", "--json"]) == 0
    assert [cell["capability"] for cell in json.loads(capsys.readouterr().out)["cells"]] == ["value", "func.jvp"]
    assert main(["--op", "relu", "--only", "value", "--markdown"]) == 0
    assert "| value | ✓ |" in capsys.readouterr().out
    assert main(["--op", "relu", "--only", "value"]) == 0
    assert "1 pass, 0 fail" in capsys.readouterr().out
    assert main(["--op", "relu6", "--only", "value", "compile(jvp)", "--markdown"]) == 0  # a variant, by itself
    assert "| | relu6 (cpp) |" in capsys.readouterr().out
    assert main(["--op", "nothing"]) == 2
    assert main(["--op", "relu", "--only", "nothing"]) == 2


def test_command_line_as_a_module_fails_where_an_op_does() -> None:
    faulty = (
        "import sys, torch, custom_ops.registry as r; from custom_ops.verify import main\n"
        "s = lambda device, dtype: [r.Sample((torch.ones(2, dtype=dtype),))]\n"
        "r.register(r.OpInfo('faulty', torch.sin, torch.cos, s, ''))\n"
        "sys.exit(main(['--op', 'faulty', '--only', 'value']))"
    )
    done = subprocess.run([sys.executable, "-c", faulty], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "fail" in done.stdout


def test_nothing_compiled_comes_from_a_cache():
    """A cache may hold what an earlier version of the op did."""
    settings = []

    def f(x):
        settings.append((torch._functorch.config.enable_autograd_cache, torch._inductor.config.fx_graph_cache))
        return x.sin()

    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert verify(f, [Sample((x,), dynamic={0: 0})], only=["vmap"]).ok
    assert set(settings) == {(False, False)}


def test_an_empty_sample_with_a_dynamic_dimension_does_not_grow() -> None:
    x = torch.zeros(0, 2, dtype=torch.float64, requires_grad=True)
    report = verify(torch.sin, [Sample((x,), dynamic={0: 0})], reference=torch.sin, only=["deterministic", "large"])
    assert report.ok
