"""Writes the sdist and the manylinux wheel into dist/, audits the wheel and tries it: ``make dist``.

The wheel is for every CPython from 3.10 and every torch from the one that setup.py names. It takes libtorch from the
torch that is installed, and its manylinux tag from the oldest glibc and libstdc++ that its symbols need. It is tried
in a new environment that holds torch (by links to this one's) and the tools of ``verify``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
PROVIDED = ("libtorch.so", "libtorch_cpu.so", "libc10.so")  # by torch


def run(*command: str | Path, **options: object) -> str:
    print("+", *command, flush=True)
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, text=True, check=False, **options)
    if done.returncode:
        sys.exit(f"{done.stdout}\n{' '.join(map(str, command))} failed")
    return done.stdout


def main() -> None:
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-c", "import setuptools.build_meta as b; b.build_sdist('dist')", cwd=ROOT)
    (sdist,) = DIST.glob("*.tar.gz")
    with tempfile.TemporaryDirectory() as folder:
        # From the sdist, not from this folder: what isn't in it would be missed here.
        run(sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", folder, sdist)
        (built,) = Path(folder).glob("*.whl")
        exclude = [word for name in PROVIDED for word in ("--exclude", name)]
        run(sys.executable, "-m", "auditwheel", "repair", *exclude, "-w", DIST, built)
    (wheel,) = DIST.glob("*.whl")
    assert re.search(r"-cp310-abi3-manylinux_\w+\.whl$", wheel.name), wheel.name
    print(run(sys.executable, "-m", "auditwheel", "show", wheel))
    print(run(sys.executable, "-m", "abi3audit", "--strict", "--verbose", wheel))
    try_out(wheel)
    print(*sorted(DIST.iterdir()), sep="\n")


def try_out(wheel: Path) -> None:
    """In an environment of its own, whose torch is this one's."""
    import importlib.util

    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        python = Path(folder) / "bin" / "python"
        installed = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        env = {"PATH": "/usr/bin:/bin"}
        run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel, env=env)
        spec = importlib.util.find_spec("torch")
        assert spec is not None and spec.origin is not None
        # Behind its own packages; this environment's editable installation isn't seen, as its finder isn't loaded.
        (Path(installed) / "torch.pth").write_text(f"{Path(spec.origin).parents[1]}\n")
        verify = "import custom_ops, sys; from custom_ops.verify import main; print(custom_ops.__file__); "
        verify += "sys.exit(main(['--quick']))"
        print(run(python, "-W", "ignore", "-c", verify, cwd=folder, env=env)[-2000:])


if __name__ == "__main__":
    main()
