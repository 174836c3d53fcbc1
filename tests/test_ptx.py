"""Runs the emulator's tests, in tests/ptx, in processes of their own, because Triton interprets in this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "tests" / "ptx").glob("test_*.py")))
def test_file(file: str, full: bool) -> None:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", f"tests/ptx/{file}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["TRITON_INTERPRET"] = "0"
    done = subprocess.run(
        [*command, *(["--full"] if full else [])],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
