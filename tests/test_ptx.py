"""Runs the emulator's tests, in tests/ptx, in two processes of their own, because Triton interprets in this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NUMBERS = "test_numbers.py"
FILES = {
    "numbers": [NUMBERS],
    "others": sorted(path.name for path in (ROOT / "tests" / "ptx").glob("test_*.py") if path.name != NUMBERS),
}


@pytest.mark.parametrize("files", FILES.values(), ids=FILES)
def test_files(files: list[str], full: bool) -> None:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider"]
    command += ["--full"] if full else []
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["TRITON_INTERPRET"] = "0"
    done = subprocess.run(
        [*command, *(f"tests/ptx/{file}" for file in files)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_is_loaded_on_demand() -> None:
    code = "import sys, custom_ops.verify; assert not {'custom_ops.verify.ptx', 'triton'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
