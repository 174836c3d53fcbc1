"""The commands of the first day on a GPU, with made-up processes: whatever fails, the report is written."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_day
from benchmarks.gpu_day import PARTS, ROWS, main, run_part, tables

OPS = ("relu", "voxel_sum", "softmax_loss")
ROW = {"op": "relu", "at": "8", "contender": "custom_ops", "ms": 1.0, "host": 0.5, "floors": 1.25}


class Processes:
    """Replaces `subprocess.run`: steps of ``wrong`` ops fail, those of ``slow`` ones run out of time."""

    def __init__(self, wrong: str = "", slow: str = "", unstartable: str = "") -> None:
        self.wrong, self.slow, self.unstartable = wrong, slow, unstartable
        self.commands: list[str] = []
        self.environments: list[dict[str, str]] = []

    def __call__(self, command: list[str], timeout: float, env: dict[str, str], **_: Any) -> Any:
        line = " ".join(command)
        self.commands.append(line)
        self.environments.append(env)
        if self.unstartable and self.unstartable in line:
            raise FileNotFoundError(self.unstartable)
        if self.slow and self.slow in line:
            raise subprocess.TimeoutExpired(command, timeout, b"begun ")
        failed = bool(self.wrong) and self.wrong in line and "--backend ptx" not in line
        return subprocess.CompletedProcess(command, failed, f"said something\n{ROWS}{json.dumps([ROW])}\n")


def run(part: str, folder: Path, processes: Processes, limit: float = 100, device: str = "cuda") -> dict[str, str]:
    run_part(part, device, folder, OPS, 2, limit, processes)
    report = json.loads((folder / "gpu_day.json").read_text())
    assert "\n".join(tables(report)) + "\n" == (folder / "gpu_day.md").read_text()
    return {outcome["step"]: outcome["result"] for outcome in report["outcomes"] if outcome["part"] == part}


def test_everything_passes(tmp_path: Path) -> None:
    for part in PARTS:
        found = run(part, tmp_path, Processes())
        assert all(result == "passed" or result.startswith("left out: there is no ") for result in found.values())
    report = json.loads((tmp_path / "gpu_day.json").read_text())
    assert {outcome["part"] for outcome in report["outcomes"]} == PARTS.keys()  # a part keeps what others have found
    assert "| `relu` | 8 | custom_ops | 1 | 0.5 | 1.25 |" in (tmp_path / "gpu_day.md").read_text()
    assert "said something" in (tmp_path / "correctness" / "relu.txt").read_text()


def test_a_failure_is_tried_again_with_another_compiler_and_on_the_emulator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_day.shutil, "which", lambda name: "/cuda/ptxas" if name == "ptxas" else None)
    processes = Processes(wrong="voxel_sum")
    found = run("correctness", tmp_path, processes)
    assert found["voxel_sum"] == found["voxel_sum, /cuda/ptxas"] == "failed"
    assert found["voxel_sum, emulated"] == found["relu"] == found["softmax_loss"] == "passed"
    assert {env.get("TRITON_PTXAS_PATH") for env in processes.environments} == {None, "/cuda/ptxas"}
    assert "TRITON_INTERPRET" not in processes.environments[0]


def test_slow_and_missing_steps_stop_nothing(tmp_path: Path) -> None:
    found = run("correctness", tmp_path, Processes(slow="voxel_sum", unstartable="softmax_loss"))
    assert (found["relu"], found["voxel_sum"], found["softmax_loss"]) == ("passed", "out of time", "failed")
    assert "begun " in (tmp_path / "correctness" / "voxel_sum.txt").read_text()
    assert {*run("numbers", tmp_path, Processes(), limit=0).values()} <= {
        "left out: no time",
        "left out: there is no ncu",
    }


def test_a_rehearsal_says_so_and_runs_nothing_on_a_gpu(tmp_path: Path) -> None:
    processes = Processes()
    for part in PARTS:
        run(part, tmp_path, processes, device="cpu")
    assert not any("--backend cuda" in line or "sanitizer" in line for line in processes.commands)
    assert (tmp_path / "gpu_day.md").read_text().startswith("A rehearsal without a GPU")
    assert json.loads((tmp_path / "gpu_day.json").read_text())["rehearsal"]


def test_the_commands_exist(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The rows, tests and tables that the steps name are there, and so are the sizes that are timed."""
    from benchmarks.tables import TIMED
    from custom_ops.verify import capabilities

    steps = [step for part in PARTS.values() for step in part("cuda", list(gpu_day.REGISTRY))]
    for step in steps:
        if "--only" in step.command:
            assert {*step.command[step.command.index("--only") + 1 :]} <= {*capabilities(True), "AOTInductor"}, (
                step.name
            )
    for op, sizes in gpu_day.TIMED.items():
        assert {*sizes} <= {*TIMED[op].benchmarks[0].sizes, 1 << 27}, op
    monkeypatch.setattr(gpu_day.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["numbers"])
    assert "--device cpu rehearses without one" in capsys.readouterr().err


def test_one_cell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_day, "cell", lambda op, size, device: [ROW | {"op": op, "at": size}])
    assert main(["--cell", "relu", "64", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out.removeprefix(ROWS)) == [ROW | {"at": "64"}]
