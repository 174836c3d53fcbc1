"""The pictures, one per table: time and memory against size, and throughput under the bandwidth roof."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, NullLocator

from benchmarks.measure import FLOOR, OURS, Row, label
from benchmarks.report import Report

MARKERS = "osv^Ddp*"


def write_plots(report: Report, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for (op, title), rows in report.tables.items():
        path = folder / file_name(op, title)
        _figure(rows, report.where).savefig(path, dpi=80)
        paths.append(path)
    return paths


def file_name(op: str, table: str) -> str:
    return f"{op}-{re.sub('[^a-z0-9]+', '-', table.lower()).strip('-')}.png"


def _figure(rows: list[Row], where: str) -> Figure:
    figure = Figure(figsize=(12, 8.5), layout="constrained")
    axes = figure.subplots(2, 2)
    figure.suptitle(f"{rows[0].op}, by {rows[0].table}\n{where}", fontsize=11)
    last = rows[-1].direction
    (time, both), (memory, roof) = axes
    _against_size(time, rows, "forward", "milliseconds", "forward, ms")
    if last == "forward":
        both.axis("off")
    else:
        _against_size(both, rows, last, "milliseconds", f"{last}, ms")
    _against_size(memory, rows, last, "peak_bytes", f"peak extra memory of {last}")
    _roofline(roof, [row for row in rows if row.direction == last], last)
    handles, labels = time.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    return figure


def _against_size(axes: Any, rows: list[Row], direction: str, quantity: str, title: str) -> None:
    sizes = list(dict.fromkeys(label(row.size) for row in rows))
    numbers = {label(row.size): row.size for row in rows}
    numeric = all(isinstance(size, int) for size in numbers.values())
    for name, style in _styles(rows).items():
        mine = [r for r in rows if r.contender == name and r.direction == direction]
        mine = [r for r in mine if getattr(r, quantity) is not None]
        if mine:
            at = [r.size if numeric else sizes.index(label(r.size)) for r in mine]
            axes.plot(at, [getattr(r, quantity) for r in mine], label=name, **style)
    if numeric:
        axes.set_xscale("log")
    _ticks(axes, [numbers[size] if numeric else i for i, size in enumerate(sizes)], sizes)
    axes.set_yscale("log", base=2 if quantity == "peak_bytes" else 10)
    axes.yaxis.set_major_formatter((lambda value, _: _bytes(value)) if quantity == "peak_bytes" else "{x:g}")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(rows[0].table, fontsize=9)


def _roofline(axes: Any, rows: list[Row], direction: str) -> None:
    """Draw the throughput below the roof, which is the speed of moving these bytes without computing."""
    if not any(r.bytes for r in rows):
        axes.axis("off")
        return
    for name, style in _styles(rows).items():
        mine = [r for r in rows if r.contender == name]
        axes.plot([r.bytes for r in mine], [r.gigabytes_per_second for r in mine], label=name, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    # plain numbers on an axis that spans less than a decade
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))
    moved = sorted({r.bytes for r in rows})
    _ticks(axes, moved, list(map(_bytes, moved)))
    axes.set_title(f"{direction}, GB/s of the least bytes to be moved", fontsize=10)
    axes.set_xlabel("least bytes to be moved", fontsize=9)


def _ticks(axes: Any, at: list[Any], labels: list[str]) -> None:
    axes.set_xticks(at, labels, rotation=15, fontsize=8)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)


def _styles(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """Return the line styles: ours is thick, the floor dashed and grey, and each peer has its own colour and marker."""
    styles: dict[str, dict[str, Any]] = {}
    names = list(dict.fromkeys(row.contender for row in rows))
    for i, name in enumerate(name for name in names if name not in (OURS, FLOOR)):
        styles[name] = {"color": f"C{(i + 1) % 10}", "marker": MARKERS[(i + 1) % len(MARKERS)], "lw": 1.3, "ms": 5}
    return {
        OURS: {"color": "C0", "marker": MARKERS[0], "lw": 2.6},
        **styles,
        FLOOR: {"color": "0.45", "ls": "--", "lw": 1.5},
    }


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} GiB"
