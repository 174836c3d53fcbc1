"""Tests of the matrix of machines: which rows it has, and that a failing row is reported."""

from __future__ import annotations

import json
from pathlib import Path

import machines
import pytest


def interpreter(folder: Path, name: str, script: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_each_row_changes_one_thing() -> None:
    found = machines.rows(["/some/python"])
    assert len({row.name for row in found}) == len(found)
    plain = [row.name for row in found if not row.environment and not row.arguments]
    assert plain == ["as it is", "--python /some/python"]
    for row in found:
        assert len(row.environment) + ("--seed" in row.arguments) + (row.python == "/some/python") <= 1
    factors = {name for row in found for name in row.environment}
    assert {"ONEDNN_MAX_CPU_ISA", "CUSTOM_OPS_ISA", "OMP_NUM_THREADS"} <= factors
    for row in found:  # only the level for which Inductor's code doesn't compile runs without compilation
        assert ("--eager" in row.arguments) == (row.environment.get("ATEN_CPU_CAPABILITY") == "default")


def test_a_row_that_fails_fails_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = interpreter(tmp_path, "right", "echo $*; exit 0")
    wrong = interpreter(tmp_path, "wrong", 'case "$*" in *verify*) echo a cell fails; exit 1;; esac')
    arguments = ["--python", right, "--python", wrong, "--only", str(tmp_path), "--out", str(tmp_path / "out")]
    assert machines.main(arguments) == 0
    assert machines.main([*arguments, "--verify", "--quick"]) == 1
    assert "FAILS (1)" in capsys.readouterr().out
    results = {row["name"]: row for row in json.loads((tmp_path / "out" / "machines.json").read_text())}
    assert results[f"--python {right}"]["holds"] and not results[f"--python {wrong}"]["holds"]
    assert (results[f"--python {wrong}"]["demo"], results[f"--python {wrong}"]["verify"]) == (0, 1)
    (output,) = (tmp_path / "out").glob("*right/output.txt")
    assert output.read_text().startswith("-m examples.demo --quick --out")
    assert "-m custom_ops verify --quick --only value gradient" in output.read_text()
