"""The guide to the emulator shows what its examples really print."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "emulator.md").read_text()


def block(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.parametrize(("interpret", "name"), [("1", "interpreted"), ("0", "emulated")])
def test_the_example(interpret: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "race.py").write_text(block("run: race.py"))
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "race.py"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    shown = block(f"output: {name}")
    output = (done.stdout + done.stderr).replace(f"{tmp_path}/", "")
    assert re.sub(r"%\w+", "%r", shown) in re.sub(r"%\w+", "%r", output)
