"""The demo, or the tests, on machines that this one isn't, made of it by environment variables: ``make machines``, or

    python tests/machines.py [--python PATH ...] [--quick] [--verify] [--tests [ARGUMENTS]] [--only ROW ...]

Each row changes one factor: the instructions that torch, oneDNN or this package's own kernels may use, the number of
threads, the seed, or, with ``--python``, the interpreter and thereby the torch version. Such an interpreter needs
torch, numpy, matplotlib, rich and scikit-learn; it uses the C++ library of this checkout as it is. With ``--tests`` a
row runs the tests instead of the demo, those that pytest's arguments select: ``--tests "tests/test_battery.py -n 2"``.
With ``--verify`` a row also runs the battery's numeric capabilities. No row may fail because of its machine: the script
writes a table, ``machines.json`` and each row's output into the folder ``--out``, and exits with status 1 if a row
failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
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

from custom_ops._native import isas

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = ("value", "gradient", "second derivative", "float32", "bfloat16", "float16", "deterministic", "large")
VERSIONS = "import platform, torch; print(f'{torch.__version__}, Python {platform.python_version()}')"


@dataclass
class Row:
    """One machine and its outcome: the exit status of each job."""

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)  # the demo's
    python: str = sys.executable
    torch: str = ""
    statuses: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def holds(self) -> bool:
        return not any(self.statuses.values())


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
        ("CUSTOM_OPS_ISA", isas()),
        ("OMP_NUM_THREADS", ("1", "2", "4")),
    ):
        found += [Row(f"{name}={value}", {name: value}) for value in values]
    found += [Row(f"--seed {seed}", arguments=["--seed", str(seed)]) for seed in (1, 2)]
    return found + [Row(f"--python {python}", python=python) for python in pythons]


def importable(folder: Path) -> Path:
    """Make a copy of this checkout, of links, from which any interpreter can import it without installing it."""
    package = folder / "custom_ops"
    package.mkdir()
    for path in (ROOT / "custom_ops").iterdir():
        (package / path.name).symlink_to(path)
    (package / "triton_kernels").symlink_to(ROOT / "triton_kernels")
    for path in ROOT.iterdir():
        if path.name != package.name:
            (folder / path.name).symlink_to(path)
    return folder


def run(row: Row, options: argparse.Namespace) -> None:
    """Run the row, record its outcome, and write the output to a file of the row's name."""
    start = time.perf_counter()
    out = options.out.resolve() / row.name.replace("/", "_").replace(" ", "_")
    out.mkdir(parents=True, exist_ok=True)
    jobs = {}
    if options.tests is None:
        jobs["demo"] = ["examples.demo", *(["--quick"] if options.quick else []), *row.arguments, "--out", str(out)]
    else:
        jobs["tests"] = ["pytest", *shlex.split(options.tests)]
    if options.verify:
        jobs["numbers"] = ["custom_ops", "verify", "--quick", "--only", *NUMBERS]
    with tempfile.TemporaryDirectory() as temporary, (out / "output.txt").open("w") as output:
        # The keys of the compile caches don't include all of these variables.
        own = {"PYTHONPATH": temporary, "TORCHINDUCTOR_CACHE_DIR": f"{temporary}/inductor"}
        environment = os.environ | own | row.environment
        # It doesn't run in the checkout, whose custom_ops/ folder alone isn't the whole package.
        cwd = importable(Path(temporary))
        found = subprocess.run([row.python, "-c", VERSIONS], env=environment, capture_output=True, text=True)
        row.torch = found.stdout.strip() or found.stderr.strip()[-200:]
        for name, arguments in jobs.items():
            command = [row.python, "-m", *arguments]
            done = subprocess.run(command, env=environment, cwd=cwd, stdout=output, stderr=subprocess.STDOUT)
            row.statuses[name] = done.returncode
    row.seconds = time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], metavar="PATH", help="one more interpreter, a row")
    parser.add_argument("--quick", action="store_true", help="a few steps of each part, without claims about quality")
    parser.add_argument("--verify", action="store_true", help="the battery's numbers on each row, too")
    parser.add_argument(
        "--tests", nargs="?", const="", metavar="ARGUMENTS", help="the tests in place of the demo; pytest's arguments"
    )
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows whose names contain one of these")
    parser.add_argument("--list", action="store_true", help="print the rows' names and run nothing")
    parser.add_argument("--out", type=Path, default=Path("out/machines"), help="default: %(default)s")
    options = parser.parse_args(argv)
    chosen = [row for row in rows(options.python) if not options.only or any(part in row.name for part in options.only)]
    if options.tests is not None:
        chosen = [row for row in chosen if "--seed" not in row.arguments]  # they have no seed to vary
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
            run(row, options)
            progress.update(task, advance=1)
    table = Table("machine", "torch", *chosen[0].statuses, "seconds")
    for row in chosen:
        words = ["holds" if status == 0 else f"FAILS ({status})" for status in row.statuses.values()]
        table.add_row(row.name, row.torch, *words, f"{row.seconds:.0f}")
    console.print(table)
    results = [asdict(row) | {"holds": row.holds} for row in chosen]
    (options.out / "machines.json").write_text(json.dumps(results, indent=1) + "\n")
    return 0 if all(row.holds for row in chosen) else 1


if __name__ == "__main__":
    raise SystemExit(main())
