"""``python tests/peers.py``: put other libraries' losses into build/peers for tests/test_ranking_agreement.py.

They come without their dependencies, and of each library only the folders with its losses. ``--compile`` also builds
torchsort, which takes a minute. The script names what it can't get, and the tests that need it are reported as not run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "build" / "peers"
PARTS = {
    "allrank==1.4.3": ["allrank"],
    "lightning-utilities==0.15.3": ["lightning_utilities"],
    "torchmetrics==1.9.0": ["torchmetrics"],
    "pytorchltr==0.2.1": ["pytorchltr/__init__.py", "pytorchltr/loss", "pytorchltr/utils"],
}
COMPILED = "torchsort==0.1.10"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
OPTIONS = ["-q", "--no-deps", "--no-build-isolation"]


def unpack(requirement: str, parts: list[str], temporary: Path) -> None:
    """Download the distribution without installing it, and extract these parts of it."""
    subprocess.run([*PIP, "download", *OPTIONS, "-d", temporary, requirement], check=True)
    (archive,) = temporary.iterdir()
    root = temporary / "unpacked"
    if archive.suffix == ".whl":
        shutil.unpack_archive(archive, root, "zip")
    else:
        shutil.unpack_archive(archive, root, filter="data")
        (root,) = root.iterdir()
    for part in parts:
        target = FOLDER / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if (root / part).is_dir():
            shutil.copytree(root / part, target, dirs_exist_ok=True)
        else:
            shutil.copy(root / part, target)


def main(argv: list[str]) -> None:
    for requirement, parts in PARTS.items():
        if all((FOLDER / part).exists() for part in parts):
            continue
        with tempfile.TemporaryDirectory() as temporary:
            try:
                unpack(requirement, parts, Path(temporary))
            except subprocess.CalledProcessError:
                print(f"{requirement} could not be fetched: its tests won't be run", file=sys.stderr)
    if "--compile" in argv and not (FOLDER / "torchsort").exists():
        # torchsort compiles for CUDA if it finds nvcc, so nvcc's folder is left out of PATH.
        folders = os.environ["PATH"].split(os.pathsep)
        path = os.pathsep.join(folder for folder in folders if not Path(folder, "nvcc").exists())
        build = [*PIP, "install", *OPTIONS, "--target", FOLDER, COMPILED]
        if subprocess.run(build, env=os.environ | {"PATH": path}, check=False).returncode:
            print(f"{COMPILED} could not be built: its tests won't be run", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
