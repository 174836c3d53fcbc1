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
from typing import Any

from custom_ops.registry import REGISTRY
from custom_ops.verify import Cell, Report

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"


def ops() -> str:
    rows = [f"| `{info.name}` | {info.summary} |" for info in REGISTRY.values()]
    return "\n".join(["| op | |", "|---|---|", *rows])


def matrix(report: Report) -> str:
    return report.to_markdown()


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
    parser.add_argument("--matrix", type=Path, help="a report of `verify --json`")
    options = parser.parse_args()
    if options.matrix:
        saved = options.matrix.read_text()
    else:
        command = [sys.executable, "-m", "custom_ops", "verify", "--json", "--backend", "cpp", "--backend", "triton"]
        saved = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout
    report = Report([Cell(**cell) for cell in json.loads(saved)["cells"]])
    text = README.read_text()
    for block, content in (("ops", ops()), ("matrix", matrix(report)), ("speed", speed())):
        text = replace(text, block, content)
    README.write_text(text)


if __name__ == "__main__":
    main()
