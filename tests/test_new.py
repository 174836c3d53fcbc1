"""The package that ``python -m custom_ops new`` writes is built, and its tests pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from custom_ops.__main__ import main

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.full  # tests/test_packaging.py builds the op of CONTRIBUTING, which is alike
def test_a_new_package_passes_its_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new", "mylib"]) == 0
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    build = ("-W", "ignore", "setup.py", "-q", "build_ext", "--inplace")
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no")
    for command in (build, tests):
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path / "mylib", env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "2 passed" in done.stdout
