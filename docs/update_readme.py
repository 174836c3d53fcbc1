"""Writes the generated pages here (matrix, speed, cost, gpu, launches) and parts of README.md: ``make docs``.

The table of ops comes from the registry, the matrix from tests/test_battery.py, the timings from the result files in
benchmarks/results. With ``--matrix FILE`` the matrix is read from a saved run of the tests with
``CUSTOM_OPS_CELLS=FILE`` instead of being run, which takes minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from custom_ops.benchmarks.cost_page import write_page
from custom_ops.benchmarks.measure import FLOOR, OURS, Row, label
from custom_ops.benchmarks.plan import elements
from custom_ops.benchmarks.plots import file_name, write_plots
from custom_ops.benchmarks.report import Report, read_json
from custom_ops.registry import REGISTRY
from custom_ops.verify import Cell, capabilities
from custom_ops.verify import Report as Matrix

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MATRIX = ROOT / "docs" / "matrix.md"
PLOTS = ROOT / "docs" / "plots"  # of the tables on fresh memory
SPEED = ROOT / "docs" / "speed.md"
COST = ROOT / "docs" / "cost.md"
GPU = ROOT / "docs" / "gpu.md"
LAUNCHES = ROOT / "docs" / "launches.md"
BACKENDS = ("cpp", "triton")
RESULTS = ROOT / "benchmarks" / "results"


def families() -> dict[str, list[str]]:
    """{family: its ops}"""
    found: dict[str, list[str]] = {}
    for info in REGISTRY.values():
        found.setdefault(info.family, []).append(info.name)
    return found


def ops() -> str:
    rows = [
        f"| {family if i == 0 else ''} | `{name}` | {REGISTRY[name].summary} |"
        for family, names in families().items()
        for i, name in enumerate(names)
    ]
    return "\n".join(["| family | op | |", "|---|---|---|", *rows])


def summary(report: Matrix) -> str:
    """One column for each family: how many of its ops' cells pass, and how many don't apply."""
    groups = families()
    lines = [
        f"| | {' | '.join(f'{f} ({len(names)} ops)' for f, names in groups.items())} |",
        "|---|" + ":-:|" * len(groups),
    ]
    for capability, cells in report.rows.items():
        shown = []
        for names in groups.values():
            marks = [cell.mark for cell in cells.values() if cell.op in names]
            shown.append(" ".join(f"{marks.count(m)} {m}" for m in ("✓", "✗", "–") if m in marks))
        lines.append(f"| {capability} | {' | '.join(shown)} |")
    return "\n".join(lines)


def matrix(report: Matrix) -> str:
    """A table for each family; a cell has two marks where the backends differ."""
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


def speed() -> str:
    """docs/speed.md: of each result file the remarks, the overhead of a call, and all sizes of all tables."""
    blocks = ["# Timings", "Written by `make docs` from the files in benchmarks/results."]
    for path, report in _reports():
        remarks = "\n".join(f"- {remark}" for remark in report.remarks)
        missing = "\n".join(f"- not installed: {name}" for name in report.missing)
        blocks += [f"## {report.where}", _source(path, report), *filter(None, [remarks, missing]), _overhead(report)]
        for (op, table), rows in report.tables.items():
            picture = PLOTS / file_name(op, table)
            drawn = report.memory != "warm" and picture.exists()
            blocks += [_timings(op, table, rows), *([f"![{op}, by {table}](plots/{picture.name})"] if drawn else [])]
    return "\n\n".join(blocks) + "\n"


def draw() -> None:
    """A picture of each table on fresh memory, whose sizes may come from several runs."""
    reports = [report for _, report in _reports() if report.memory != "warm"]
    for where in dict.fromkeys(report.where for report in reports):
        same = [report for report in reports if report.where == where]
        rows = {(r.op, r.table, label(r.size), r.direction, r.contender): r for report in same for r in report.rows}
        write_plots(dataclasses.replace(same[0], rows=sorted(rows.values(), key=lambda row: elements(row.size))), PLOTS)


def fastest() -> str:
    """For the README: each op's first table at the largest size with a peer, beside the best; none on warm memory."""
    blocks = []
    for path, report in _reports():
        if report.memory == "warm":
            continue
        lines = ["| op | at | ours, ms | × floor | beside | ours / that |", "|---|---|--:|--:|---|--:|"]
        seen = set()
        for (op, table), rows in report.tables.items():
            peers = [row for row in rows if row.direction == rows[-1].direction and not row.note]
            peers = [row for row in peers if row.contender != FLOOR and not row.contender.startswith(("ours", OURS))]
            if op in seen or not peers:
                continue
            seen.add(op)
            last = [row for row in rows if (row.size, row.direction) == (peers[-1].size, peers[-1].direction)]
            ours = next(row for row in last if row.contender == OURS)
            peer = min((row for row in peers if row.size == ours.size), key=lambda row: row.milliseconds)
            at = f"{label(ours.size)} {table}, {ours.direction}"
            times = f"{ours.milliseconds:.3g} | {ours.floors:.2f} | {peer.contender} | {peer.ours_over_this:.2f}"
            lines.append(f"| `{op}` | {at} | {times} |")
        blocks += [f"**{report.where}**: {_source(path, report)}", "\n".join(lines)]
    return "\n\n".join(blocks) or "No results of this version are in benchmarks/results yet."


def _reports() -> list[tuple[Path, Report]]:
    return [(path, read_json(path)) for path in sorted(RESULTS.glob("*.json"))]


def _source(path: Path, report: Report) -> str:
    return f"torch {report.machine['torch']}, `{report.command}`, {path.relative_to(ROOT)}"


def _overhead(report: Report) -> str:
    tables = [(f"one call on 16 elements, {d}", "custom_ops.library", t) for d, t in report.overhead["library"].items()]
    tables += [(f"{op}, first sample", OURS, times) for op, times in report.overhead["ops"].items()]
    lines = ["| overhead of a call | ours, µs | other | ours / other |", "|---|--:|---|--:|"]
    for title, ours, times in tables:
        for name in [name for name in times if name != ours]:
            lines.append(f"| {title} | {times[ours]:.1f} | {name} | {times[ours] / times[name]:.2f} |")
    return "\n".join(lines)


def _timings(op: str, table: str, rows: list[Row]) -> str:
    last = rows[-1].direction
    sizes: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.direction == last:
            sizes.setdefault(label(row.size), {})[row.contender] = row
    peers = dict.fromkeys(name for by_name in sizes.values() for name in by_name if name not in (OURS, FLOOR))
    head = ["ours, ms", "± IQR", "× floor", "GB/s", "peak, MiB", *(f"ours / {peer}" for peer in peers)]
    lines = [f"| {op}, {last}, by {table} | {' | '.join(head)} |", f"|---|{'--:|' * len(head)}"]
    for size, by_name in sizes.items():
        ours = by_name[OURS]
        ratios = [
            f"{by_name[p].ours_over_this:.2f}{'*' * bool(by_name[p].note)}" if p in by_name else "" for p in peers
        ]
        cells = [f"{ours.milliseconds:.3g}", f"{ours.spread:.0%}", f"{ours.floors:.2f}"]
        cells += [f"{ours.gigabytes_per_second:.1f}", f"{(ours.peak_bytes or 0) / 2**20:.1f}", *ratios]
        lines.append(f"| {size} | {' | '.join(cells)} |")
    if any(row.note for row in rows):
        lines += ["", "\\* its answer differs from that of the reference in float64"]
    return "\n".join(lines)


def networks() -> str:
    """What one-bit activations save in whole networks, from the result files of benchmarks.networks."""
    blocks = []
    for path in sorted((RESULTS / "networks").glob("*.json")):
        result = json.loads(path.read_text())
        batch, size = result["batch"], result["size"]
        lines = [
            f"| peak memory of a training step, batch {batch}, {size} × {size} | torch | ours | torch, in place |",
            "|---|--:|--:|--:|",
        ]
        steps: dict[str, dict[str, float]] = {}
        for row in result["steps"]:
            steps.setdefault(f"{row['network']}, {row['mode']}", {})[row["activations"]] = row["mebibytes"]
        for network, peaks in steps.items():
            shown = [
                f"{peaks[a]:.0f} MiB ({peaks[a] / peaks['torch'] - 1:+.0%})" for a in ("custom_ops", "torch, in place")
            ]
            lines.append(f"| {network} | {peaks['torch']:.0f} MiB | {' | '.join(shown)} |")
        lines += [
            "",
            "| compiled linear → bias → activation → residual | ours, ms | torch, ms | ours / torch |",
            "|---|--:|--:|--:|",
        ]
        for row in result["chains"]:
            times = f"{row['custom_ops']:.3g} | {row['torch']:.3g} | {row['ours_over_torch']:.2f}"
            lines.append(f"| {row['activation']} | {times} |")
        blocks += [f"`{result['command']}` (torch {result['machine']['torch']})", "\n".join(lines)]
    return "\n\n".join(blocks)


def replace(text: str, block: str, content: str) -> str:
    pattern = re.compile(rf"(<!-- {block}: [^\n]*-->\n).*?(<!-- /{block} -->)", re.DOTALL)
    assert pattern.search(text), f"README.md has no block {block}"
    return pattern.sub(lambda found: f"{found[1]}{content}\n{found[2]}", text)


def _cells() -> Path:
    """The cells of the battery, run on two processes."""
    path = ROOT / "build" / "cells.jsonl"
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    battery = [sys.executable, "-m", "pytest", "-n", "2", str(ROOT / "tests" / "test_battery.py")]
    subprocess.run(battery, cwd=ROOT, env=os.environ | {"CUSTOM_OPS_CELLS": str(path)}, check=False)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--matrix", type=Path, help="the cells of a run of tests/test_battery.py")
    options = parser.parse_args()
    report = Matrix([Cell(**json.loads(line)) for line in (options.matrix or _cells()).read_text().splitlines()])
    order = list(capabilities(quick=True))
    report.cells.sort(key=lambda cell: order.index(cell.capability))
    MATRIX.write_text(matrix(report))
    draw()
    SPEED.write_text(speed())
    write_page([read_json(path) for path in (RESULTS / "scaling").glob("*.json")], COST)
    text = README.read_text()
    for block, content in (("ops", ops()), ("matrix", summary(report)), ("speed", fastest()), ("networks", networks())):
        text = replace(text, block, content)
    README.write_text(text)
    compile_all = [sys.executable, "-m", "custom_ops.triton_kernels.aot", "--report", str(GPU)]
    subprocess.run(compile_all, check=True, stdout=subprocess.DEVNULL)
    trace_all = [sys.executable, "-m", "custom_ops.benchmarks.launches", "--write", str(LAUNCHES)]
    subprocess.run(trace_all, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
