"""Commands that fail for an external reason print one line with that reason and no traceback."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import pytest

FULL = Path("/dev/full")
ROOT = Path(__file__).parent.parent
# All other commands belong to `python -m custom_ops`.
OWN = {"benchmarks": "benchmarks.__main__", "demo": "examples.demo"}


def called(name: str, *arguments: str) -> tuple[str, list[str]]:
    """Return the module of the command ``name`` and the arguments for it."""
    return (OWN[name], [*arguments]) if name in OWN else ("custom_ops.__main__", [name, *arguments])


def run(*command: str, stdout: IO[str] | int = subprocess.DEVNULL, **env: str) -> tuple[int, str]:
    """Return status and stderr."""
    module, arguments = called(*command)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *arguments],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | env,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.sampled(3)
@pytest.mark.parametrize("arguments", [["verify", "--list"], ["benchmarks", "--help"], ["--help"]])
def test_a_closed_pipe(arguments: Sequence[str]) -> None:
    """A pipe whose reader has gone, as in `... | head -1`, ends the command quietly."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        assert run(*arguments, stdout=pipe) == (141, "")


@pytest.mark.sampled(2)
@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("arguments", [["--list"], ["--op", "relu", "--only", "value", "--json"]])
def test_a_full_disk(arguments: Sequence[str]) -> None:
    with FULL.open("w") as disk:
        assert run("verify", *arguments, stdout=disk) == (1, "verify: [Errno 28] No space left on device\n")


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "arguments", [["verify", "--op", "lambda_loss"], ["benchmarks", "--op", "relu"], ["demo"]], ids=lambda a: a[0]
)
def test_an_interruption(arguments: Sequence[str]) -> None:
    """A command that is interrupted two seconds after its import says so."""
    module, given = called(*arguments)
    program = f"""if True:
        import os, signal, sys, threading
        from {module} import main
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
        threading.Timer(2, os.kill, (os.getpid(), signal.SIGINT)).start()
        sys.exit(main({given!r}))"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (130, f"{arguments[0]}: interrupted")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["nothing"], 2, "unknown command 'nothing'"),
        (["verify", "--op", "nothing"], 2, "--op: expected some of relu, "),
        (["verify", "--op", "relu", "--only", "nothing"], 2, "unknown capability 'nothing', expected some of value, "),
        (["verify", "--backend", "tpu"], 2, "--backend: invalid choice: 'tpu'"),
        (["verify", "--op"], 2, "--op: expected at least one argument"),
        (["new", "My-Op"], 2, "name: expected an identifier in lower case that is free, got 'My-Op'"),
        (["new", "tests"], 2, "name: tests exists already"),
        (
            ["benchmarks", "--json", "/dev/null/a.json"],
            2,
            "--json, --csv, --plots: .*Not a directory: '/dev/null/a.json'",
        ),
        (["demo", "--out", "/dev/null/out"], 2, "--out: .*Not a directory: '/dev/null/out'"),
    ],
)
def test_a_wrong_option(arguments: Sequence[str], status: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    module, given = called(*arguments)
    try:
        found: object = importlib.import_module(module).main(given)
    except SystemExit as by_argparse:
        found = by_argparse.code
    assert found == status
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("arguments", "module"),
    [
        (["verify", "--op", "relu", "--only", "value"], "rich"),
        (["verify", "--op", "relu", "--only", "value", "--backend", "triton", "--json"], "triton"),
        (["demo"], "numpy"),
    ],
)
def test_a_missing_extra(arguments: Sequence[str], module: str, tmp_path: Path) -> None:
    """A command names the missing module, simulated by a broken one earlier on the path, and the extra to install."""
    (tmp_path / f"{module}.py").write_text(f"raise ModuleNotFoundError({module!r}, name={module!r})")
    extra = "gpu" if module == "triton" else "tools"
    said = f"`{arguments[0]}` needs {module}: pip install 'custom_ops[{extra}]'\n"
    assert run(*arguments, PYTHONPATH=str(tmp_path)) == (1, said)
