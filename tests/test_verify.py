"""The battery's own interface: reports, options, the command line, backends."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from custom_ops.verify import Cell, Report, Sample, backend, capabilities, main, verify


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def test_a_torch_function_passes() -> None:
    samples = [Sample((leaf(3, 2),), dynamic={0: 0})]
    report = verify(torch.sin, samples, reference=torch.sin, quick=True)
    report.raise_on_failure()
    assert report["opcheck"].status == "not applicable"
    assert report["opcheck"].detail == "reaches no registered op"


def test_samples_may_be_tuples_and_have_tensors_in_kwargs() -> None:
    def scaled(x: torch.Tensor, *, by: torch.Tensor) -> torch.Tensor:
        return x * by

    samples = [Sample((leaf(3),), {"by": leaf(3)}, dynamic={0: 0, "by": 0})]
    rows = ["value", "gradient", "vmap", "compile dynamic", "export", "forward AD", "zero size"]
    verify(scaled, samples, reference=scaled, quick=True, only=rows).raise_on_failure()
    assert verify(torch.sin, [(leaf(3),)], only=["gradcheck"]).ok


def test_what_does_not_apply_says_why() -> None:
    rows = ["value", "gradcheck", "export", "modules", "apply"]
    report = verify(torch.sin, [(torch.ones(2),)], quick=True, only=rows)
    assert {cell.capability: cell.detail for cell in report.cells} == {
        "value": "no reference given",
        "gradcheck": "no sample has an input that requires grad",
        "export": "no sample names a dynamic dimension",
        "modules": "no module",
        "apply": "no Function.apply given",
    }
    assert report.ok


def test_samples_without_gradient() -> None:
    def twice(a: torch.Tensor) -> torch.Tensor:
        return a * 2

    report = verify(twice, [Sample((torch.randn(3, 2),), dynamic={0: 0})], reference=twice, quick=True)
    report.raise_on_failure()
    assert report["vmap"].status == "pass"


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
        ({"backend": "tpu"}, "backend: expected one of cpp, triton, cuda"),
        ({"not_applicable": {"nothing": ""}}, "not_applicable: unknown"),
        ({"not_comparable": {"nothing": ""}}, "not_comparable: unknown"),
        ({"sample_inputs": []}, "sample_inputs: expected at least one sample"),
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

    assert verify(f, [(torch.randn(3, dtype=torch.float64, requires_grad=True),)], only=["vmap"]).ok
    assert set(settings) == {(False, False)}
