"""The demo on machines that this one isn't, made of it by environment variables: ``make machines``, or

    python tests/machines.py [--python PATH ...] [--quick] [--verify] [--only ROW ...] [--out FOLDER]

Each row changes one factor: the instructions that torch, oneDNN or this package's own kernels may use, the number of
threads, the seed, or, with ``--python``, the interpreter and thereby the torch version. Such an interpreter needs
torch, numpy, matplotlib, rich and scikit-learn; it uses the C++ library of this checkout as it is. With ``--verify`` a
row also runs the battery's numeric capabilities. No row may fail because of its machine: the script writes a table,
``machines.json`` and each row's output into the folder, and exits with status 1 if a row failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = ("value", "gradient", "second derivative", "float32", "bfloat16", "float16", "deterministic", "large")
VERSIONS = "import platform, torch; print(f'{torch.__version__}, Python {platform.python_version()}')"


@dataclass
class Row:
    """One machine and its outcome: the exit status of the demo and of the battery, or None for a part that didn't
    run.
    """

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    python: str = sys.executable
    torch: str = ""
    demo: int | None = None
    verify: int | None = None
    seconds: float = 0.0

    @property
    def holds(self) -> bool:
        return self.demo == 0 and self.verify in (0, None)


def rows(pythons: Sequence[str]) -> list[Row]:
    """Return a row for this machine as it is, then one for each other value of each factor."""
    found = [Row("as it is")]
    levels = ["DEFAULT", "AVX2", "AVX512"]  # only those below the processor's own, as torch doesn't check this variable
    native = torch.backends.cpu.get_cpu_capability()
    for level in levels[: levels.index(native)] if native in levels else []:
        # Inductor of torch 2.13 writes C++ that doesn't compile at this level.
        eager = ["--eager"] if level == "DEFAULT" else []
        found.append(Row(f"ATEN_CPU_CAPABILITY={level.lower()}", {"ATEN_CPU_CAPABILITY": level.lower()}, eager))
    for name, values in (
        ("ONEDNN_MAX_CPU_ISA", ("SSE41", "AVX", "AVX2", "AVX512_CORE")),  # oneDNN caps it at what the processor has
        ("CUSTOM_OPS_ISA", ("portable",)),  # the other rows use the best one
        ("OMP_NUM_THREADS", ("1", "2", "4")),
    ):
        found += [Row(f"{name}={value}", {name: value}) for value in values]
    found += [Row(f"--seed {seed}", arguments=["--seed", str(seed)]) for seed in (1, 2)]
    return found + [Row(f"--python {python}", python=python) for python in pythons]


def importable(folder: Path) -> Path:
    """Make a folder from which any interpreter can import the package of this checkout without installing it."""
    package = folder / "custom_ops"
    package.mkdir()
    for path in (ROOT / "custom_ops").iterdir():
        (package / path.name).symlink_to(path)
    (package / "triton_kernels").symlink_to(ROOT / "triton_kernels")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


def run(row: Row, quick: bool, verify: bool, out: Path) -> None:
    """Run the row, record its outcome, and write the output to a file of the row's name."""
    start = time.perf_counter()
    folder = out.resolve() / row.name.replace("/", "_").replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, (folder / "output.txt").open("w") as output:
        # The keys of the compile caches don't include all of these variables.
        own = {"PYTHONPATH": str(importable(Path(temporary))), "TORCHINDUCTOR_CACHE_DIR": f"{temporary}/inductor"}
        environment = os.environ | own | row.environment

        def call(*arguments: str) -> int:
            command = [row.python, *arguments]
            # It doesn't run in the checkout, whose custom_ops/ folder alone isn't the whole package.
            return subprocess.run(
                command, env=environment, cwd=temporary, stdout=output, stderr=subprocess.STDOUT
            ).returncode

        found = subprocess.run([row.python, "-c", VERSIONS], env=environment, capture_output=True, text=True)
        row.torch = found.stdout.strip() or found.stderr.strip()[-200:]
        quickly = ["--quick"] if quick else []
        row.demo = call("-m", "examples.demo", *quickly, *row.arguments, "--out", str(folder))
        if verify:
            row.verify = call("-m", "custom_ops", "verify", "--quick", "--only", *NUMBERS)
    row.seconds = time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], metavar="PATH", help="one more interpreter, a row")
    parser.add_argument("--quick", action="store_true", help="a few steps of each part, without claims about quality")
    parser.add_argument("--verify", action="store_true", help="the battery's numbers on each row, too")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows whose names contain one of these")
    parser.add_argument("--list", action="store_true", help="print the rows' names and run nothing")
    parser.add_argument("--out", type=Path, default=Path("out/machines"), help="default: %(default)s")
    options = parser.parse_args(argv)
    chosen = [row for row in rows(options.python) if not options.only or any(part in row.name for part in options.only)]
    if not chosen:
        parser.error("--only: no row's name contains any of these; see --list")
    if options.list:
        print(*(row.name for row in chosen), sep="\n")
        return 0
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("Machines", total=len(chosen))
        for row in chosen:
            progress.update(task, description=row.name)
            run(row, options.quick, options.verify, options.out)
            progress.update(task, advance=1)
    table = Table("machine", "torch", "demo", *(["numbers"] if options.verify else []), "seconds")
    for row in chosen:
        statuses = [row.demo, *([row.verify] if options.verify else [])]
        words = ["holds" if status == 0 else f"FAILS ({status})" for status in statuses]
        table.add_row(row.name, row.torch, *words, f"{row.seconds:.0f}")
    console.print(table)
    results = [asdict(row) | {"holds": row.holds} for row in chosen]
    (options.out / "machines.json").write_text(json.dumps(results, indent=1) + "\n")
    return 0 if all(row.holds for row in chosen) else 1


if __name__ == "__main__":
    raise SystemExit(main())
