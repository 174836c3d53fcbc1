"""Writes docs/matrix.md and the generated parts of README.md: ``make docs``.

The table of ops comes from the registry, the matrix from `python -m custom_ops verify --quick --json`, the
timings from the result files in benchmarks/results. With ``--matrix FILE ...`` the matrix is read from
saved reports instead of being run, which takes minutes.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from custom_ops.registry import REGISTRY
from custom_ops.verify import Cell, Report, capabilities

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MATRIX = ROOT / "docs" / "matrix.md"
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


def summary(report: Report) -> str:
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


def matrix(report: Report) -> str:
    """A table for each family; a cell has two marks where the backends differ."""
    blocks = [
        "# The capability matrix",
        "Written by `make docs` from `python -m custom_ops verify --quick --backend cpp --backend triton`. One mark "
        "stands for both backends, two for C++ and Triton (under its interpreter); a number is a note below the table.",
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
    blocks = []
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        blocks += [_heading(path, result), _overhead(result["overhead"]), *map(_op, result["ops"].items())]
    return "\n\n".join(blocks)


def _heading(path: Path, result: dict[str, Any]) -> str:
    machine = result["machine"]
    where = machine.get("device") or f"{machine['cpu']}, {machine['threads']} threads"
    memory = f", {result['memory']} memory" if result["device"] == "cpu" else ""
    source = f"`{result['command']}`, [{path.name}]({path.relative_to(ROOT)})"
    return f"**{where}{memory}** (torch {machine['torch']}; {source})"


def _overhead(overhead: dict[str, dict[str, float]]) -> str:
    lines = ["| one call on 16 elements | µs | ours / this |", "|---|--:|--:|"]
    for direction, times in overhead.items():
        for name, microseconds in times.items():
            ratio = times["custom_ops.library"] / microseconds
            lines.append(f"| {direction}, {name} | {microseconds:.1f} | {ratio:.2f} |")
    return "\n".join(lines)


def _op(item: tuple[str, list[dict[str, Any]]]) -> str:
    name, rows = item
    lines = [f"| {name} | peer | ours, ms | peer, ms | ours / peer |", "|---|---|--:|--:|--:|"]
    ours = {(r["size"], r["direction"]): r["milliseconds"] for r in rows if r["contender"] == "custom_ops"}
    for row in rows:
        if row["contender"] != "custom_ops":
            mine = ours[row["size"], row["direction"]]
            lines.append(
                f"| {row['size']:,}, {row['direction']} | {row['contender']} "
                f"| {mine:.3g} | {row['milliseconds']:.3g} | {row['ours_over_this']:.2f} |"
            )
    return "\n".join(lines)


def replace(text: str, block: str, content: str) -> str:
    pattern = re.compile(rf"(<!-- {block}: [^\n]*-->\n).*?(<!-- /{block} -->)", re.DOTALL)
    assert pattern.search(text), f"README.md has no block {block}"
    return pattern.sub(lambda found: f"{found[1]}{content}\n{found[2]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--matrix", type=Path, nargs="+", help="reports of `verify --json`")
    options = parser.parse_args()
    if options.matrix:
        saved = [path.read_text() for path in options.matrix]
    else:
        command = [sys.executable, "-m", "custom_ops", "verify", "--quick", "--json", "--backend"]
        runs = [subprocess.Popen([*command, b], stdout=subprocess.PIPE, text=True) for b in BACKENDS]
        saved = [run.communicate()[0] for run in runs]
    report = Report([Cell(**cell) for text in saved for cell in json.loads(text)["cells"]])
    MATRIX.write_text(matrix(report))
    text = README.read_text()
    for block, content in (("ops", ops()), ("matrix", summary(report)), ("speed", speed())):
        text = replace(text, block, content)
    README.write_text(text)


if __name__ == "__main__":
    main()
