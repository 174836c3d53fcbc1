"""``make docs``: write the generated parts of README.md and the pages of the site that take minutes to generate.

The pages are the capability matrix, from tests/test_battery.py, and the facts about the Triton kernels that need no
GPU. ``--matrix FILE`` reads the matrix from a saved run of the tests (``CUSTOM_OPS_CELLS=FILE``) instead of running
them. docs/generated.py makes what the site's build generates itself.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from generated import RESULTS, ROOT, beside_best, families, was_loaded

from benchmarks.report import read_json
from custom_ops.registry import REGISTRY
from custom_ops.verify import Cell, capabilities
from custom_ops.verify import Report as Matrix

README = ROOT / "README.md"
MATRIX = ROOT / "docs" / "matrix.md"
GPU = ROOT / "docs" / "gpu.md"
LAUNCHES = ROOT / "docs" / "launches.md"
BACKENDS = ("cpp", "triton")

# The README shows eight timings: a file of benchmarks/results, an op in it, and one of its tables. Our op loses two of
# them.
TIMINGS = (
    ("cpu-ranking-pairwise-fresh", "pairwise_logistic_loss", "scores, of five labels"),
    ("cpu-ranking-lambdarank-fresh", "lambda_loss", "scores, of five labels, weighting=lambdarank"),
    ("cpu-ranking-margin-fresh", "soft_rank", "lists, items, regularization=l2"),
    ("cpu-voxel-sums-fresh", "voxel_sum", "points of 64 features in any order, 8 to a voxel"),
    ("cpu-voxel-segments-fresh", "voxels_summing", "points of 64 features, 8 to a voxel"),
    ("cpu-activation-relu-16M-fresh", "leaky_relu", "float32 elements"),
    ("cpu-activation-fresh", "relu", "float32 elements"),
    ("cpu-ranking-margin-fresh", "bpr_loss", "pairs"),
)


def totals(report: Matrix) -> str:
    marks = [cell.mark for cell in report.cells]
    return (
        f"{len(REGISTRY)} ops, {len(report.rows)} rows, C++ and Triton kernels: **{marks.count('✓'):,} cells pass**, "
        f"{marks.count('–'):,} don't apply, {marks.count('✗'):,} fail."
    )


def timings() -> str:
    """Return the README's table: forward and backward beside the fastest peer with the right answer."""
    lines = ["| forward + backward | at | ours, ms | beside | its ms | ours / that |", "|---|---|--:|---|--:|--:|"]
    runs = {name: read_json(RESULTS / f"{name}.json") for name, *_ in TIMINGS}
    for name, op, table in TIMINGS:
        found = beside_best(runs[name], op, table)
        assert found is not None, f"{op} has no peer in {name}"
        at, *cells = found
        busy = "†" * was_loaded(runs[name])
        lines.append(f"| `{op}` | {at.removesuffix(', forward+backward')} | {' | '.join(cells)}{busy} |")
    first = next(iter(runs.values()))
    about = f"Medians ± the interquartile range, of {first.where}, torch {first.machine['torch']}"
    assert {run.where for run in runs.values()} == {first.where}
    loaded = ". † Other work ran on the machine when that run began" if any(map(was_loaded, runs.values())) else ""
    files = ", ".join(dict.fromkeys(f"`{name}`" for name, *_ in TIMINGS))
    return "\n".join(
        [*lines, "", f"{about}{loaded}. The runs, with their commands, are in `benchmarks/results`: {files}."]
    )


def matrix(report: Matrix) -> str:
    """Return a table for each family; a cell has two marks if the backends differ."""
    blocks = [
        "# The capability matrix",
        "Written by `make docs`: what `python -m custom_ops verify --quick --backend cpp --backend triton` checks. "
        "One mark stands for both backends, two for C++ and Triton (under its interpreter); "
        "a number is a note below the table.",
    ]
    for family, names in families().items():
        notes: list[str] = []
        lines = [f"| | {' | '.join(f'`{name}`' for name in names)} |", "|---|" + ":-:|" * len(names)]
        for capability in capabilities(quick=True):
            cells = {(c.op, c.backend): c for c in report.cells if c.capability == capability}
            shown = [_marks([cells[name, b] for b in BACKENDS if (name, b) in cells], notes) for name in names]
            lines.append(f"| {capability} | {' | '.join(shown)} |")
        blocks += [f"## {family}", "\n".join(lines), "\n".join(f"{i}. {note}" for i, note in enumerate(notes, 1))]
    return "\n\n".join(filter(None, blocks)) + "\n"


def _marks(cells: list[Cell], notes: list[str]) -> str:
    marks = []
    for cell in cells:
        note = f"{cell.status}: {' '.join(cell.detail.split())}"
        if cell.status != "pass" and note not in notes:
            notes.append(note)
        marks.append(cell.mark if cell.status == "pass" else f"{cell.mark} ({notes.index(note) + 1})")
    return " ".join(dict.fromkeys(marks))


def replace(text: str, block: str, content: str) -> str:
    pattern = re.compile(rf"(<!-- {block}: [^\n]*-->\n).*?(<!-- /{block} -->)", re.DOTALL)
    assert pattern.search(text), f"README.md has no block {block}"
    return pattern.sub(lambda found: f"{found[1]}{content}\n{found[2]}", text)


def _cells() -> Path:
    """Run the cells of the battery on two processes and return the file with the results."""
    path = ROOT / "build" / "cells.jsonl"
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    battery = [sys.executable, "-m", "pytest", "-n", "2", str(ROOT / "tests" / "test_battery.py")]
    subprocess.run(battery, cwd=ROOT, env=os.environ | {"CUSTOM_OPS_CELLS": str(path)}, check=False)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--matrix", type=Path, help="the cells of a run of tests/test_battery.py")
    parser.add_argument("--timings", action="store_true", help="only those of the README, which takes a second")
    options = parser.parse_args()
    blocks = {"timings": timings()}
    if not options.timings:
        cells = (options.matrix or _cells()).read_text().splitlines()
        report = Matrix([Cell(**json.loads(line)) for line in cells])
        order = list(capabilities(quick=True))
        report.cells.sort(key=lambda cell: order.index(cell.capability))
        MATRIX.write_text(matrix(report))
        blocks["matrix"] = totals(report)
        _write_pages_of_the_kernels()
    text = README.read_text()
    for block, content in blocks.items():
        text = replace(text, block, content)
    README.write_text(text)


def _write_pages_of_the_kernels() -> None:
    subprocess.run([sys.executable, ROOT / "docs" / "gpu_page.py", GPU], check=True, stdout=subprocess.DEVNULL)
    trace_all = [sys.executable, "-m", "benchmarks.launches", "--write", str(LAUNCHES)]
    subprocess.run(trace_all, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
