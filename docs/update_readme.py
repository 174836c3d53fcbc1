"""Writes the generated parts of README.md: ``make docs``.

The table of ops comes from the registry, the matrix from `python -m custom_ops verify --json`, the
timings from the result files in benchmarks/results. With ``--matrix FILE`` the matrix is read from a
saved report instead of being run, which takes minutes.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from custom_ops.benchmarks.measure import FLOOR, OURS, Row, label
from custom_ops.benchmarks.report import Report, read_json
from custom_ops.registry import REGISTRY
from custom_ops.verify import Cell
from custom_ops.verify import Report as Matrix

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"


def ops() -> str:
    rows = [f"| `{info.name}` | {info.summary} |" for info in REGISTRY.values()]
    return "\n".join(["| op | |", "|---|---|", *rows])


def matrix(report: Matrix) -> str:
    return report.to_markdown()


def speed() -> str:
    """Of each result file the remarks, the overhead of a call, and forward+backward of each op at each size."""
    blocks = []
    for path in sorted(RESULTS.glob("*.json")):
        report = read_json(path)
        remarks = "\n".join(f"- {remark}" for remark in report.remarks)
        blocks += [_heading(path, report), *filter(None, [remarks]), _overhead(report)]
        blocks += [_timings(op, table, rows) for (op, table), rows in report.tables.items()]
    return "\n\n".join(blocks) or "No results of this version are in benchmarks/results yet."


def _heading(path: Path, report: Report) -> str:
    source = f"`{report.command}`, [{path.name}]({path.relative_to(ROOT)})"
    return f"**{report.where}** (torch {report.machine['torch']}; {source})"


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
    head = ["ours, ms", "× floor", "peak, MiB", *(f"ours / {peer}" for peer in peers)]
    lines = [f"| {op}, {last}, by {table} | {' | '.join(head)} |", f"|---|{'--:|' * len(head)}"]
    for size, by_name in sizes.items():
        ours = by_name[OURS]
        ratios = [
            f"{by_name[p].ours_over_this:.2f}{'*' * bool(by_name[p].note)}" if p in by_name else "" for p in peers
        ]
        cells = [f"{ours.milliseconds:.3g}", f"{ours.floors:.2f}", f"{(ours.peak_bytes or 0) / 2**20:.1f}", *ratios]
        lines.append(f"| {size} | {' | '.join(cells)} |")
    if any(row.note for row in rows):
        lines += ["", "\\* its answer differs from that of the reference in float64"]
    return "\n".join(lines)


def replace(text: str, block: str, content: str) -> str:
    pattern = re.compile(rf"(<!-- {block}: [^\n]*-->\n).*?(<!-- /{block} -->)", re.DOTALL)
    assert pattern.search(text), f"README.md has no block {block}"
    return pattern.sub(lambda found: f"{found[1]}{content}\n{found[2]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--matrix", type=Path, help="a report of `verify --json`")
    options = parser.parse_args()
    if options.matrix:
        saved = options.matrix.read_text()
    else:
        command = [sys.executable, "-m", "custom_ops", "verify", "--json", "--backend", "cpp", "--backend", "triton"]
        saved = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout
    report = Matrix([Cell(**cell) for cell in json.loads(saved)["cells"]])
    text = README.read_text()
    for block, content in (("ops", ops()), ("matrix", matrix(report)), ("speed", speed())):
        text = replace(text, block, content)
    README.write_text(text)


if __name__ == "__main__":
    main()
