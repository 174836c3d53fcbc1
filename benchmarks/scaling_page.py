"""docs/sizes_and_threads.md, from runs of ``bench --scaling``: how cost grows with size and shrinks with threads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from custom_ops.benchmarks.measure import OURS, Row, label
from custom_ops.benchmarks.report import Report

Times = dict[tuple[str, str], dict[int, float]]  # {(op, table): {size: milliseconds}}


def write_page(reports: Sequence[Report], page: Path) -> None:
    """From one run for each number of threads; the pictures go beside the page."""
    reports = sorted(reports, key=lambda report: report.machine["threads"])
    if not reports:
        return
    threads = [report.machine["threads"] for report in reports]
    all_times = [_times(report.rows) for report in reports]
    lines = [
        "# Scaling",
        "",
        "Written by `make docs`. Milliseconds of forward+backward (forward, where there is no backward) from a hundred "
        "elements or points to a hundred million, or one list of up to a hundred thousand items, as far as ten "
        f"seconds a call and a quarter of the memory go; fresh memory, threads: {threads[-1]}. The last column is what "
        f"these gain against {threads[0]}, at the largest size.",
        "",
        *(f"- {report.where}: `{report.command}`" for report in reports),
    ]
    families: dict[str, list[tuple[str, str]]] = {}
    for row in reports[-1].rows:
        if (row.op, row.table) not in families.setdefault(row.family, []):
            families[row.family].append((row.op, row.table))
    for family, tables in families.items():
        sizes = sorted({size for table in tables for size in all_times[-1][table]})
        heads = " | ".join(map(label, sizes))
        lines += ["", f"## {family}", "", f"![{family}](scaling-{family}.png)", ""]
        lines += [f"| op | by | {heads} | gain |", f"|---|---|{'--:|' * (len(sizes) + 1)}"]
        for op, table in tables:
            times = all_times[-1][op, table]
            cells = [f"{times[size]:.3g}" if size in times else "" for size in sizes]
            lines.append(f"| `{op}` | {table} | {' | '.join(cells)} | {_speed_up(all_times, (op, table))} |")
        _figure(family, {table: all_times[-1][table] for table in tables}).savefig(
            page.parent / f"scaling-{family}.png", dpi=80
        )
    page.write_text("\n".join(lines) + "\n")


def _times(rows: Sequence[Row]) -> Times:
    times: Times = {}
    for row in rows:
        if row.contender == OURS and row.direction != "backward":
            times.setdefault((row.op, row.table), {})[row.size] = row.milliseconds  # forward+backward comes last
    return times


def _speed_up(all_times: Sequence[Times], table: tuple[str, str]) -> str:
    first, last = all_times[0].get(table, {}), all_times[-1][table]
    shared = [size for size in last if size in first]
    return f"{first[max(shared)] / last[max(shared)]:.2f}" if shared and len(all_times) > 1 else ""


def _figure(family: str, times: Times) -> Figure:
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots()
    for i, ((op, table), by_size) in enumerate(times.items()):
        style = {"color": f"C{i % 10}", "ls": ("-", "--", ":")[i // 10 % 3], "marker": "o", "ms": 3}
        nanoseconds = [1e6 * by_size[size] / size for size in by_size]
        axes.plot(list(by_size), nanoseconds, label=f"{op}, {table}", **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("size")
    axes.set_ylabel("ns for each, forward+backward")
    axes.set_title(f"{family}: cost per element")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7)
    return figure
