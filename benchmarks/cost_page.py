"""The writer of docs/cost.md from runs of ``python -m benchmarks --scaling``: cost against size and threads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.measure import FLOOR, OURS, Row, label
from benchmarks.report import Report

LEAST_GAIN = 1.8  # the speedup expected of two threads over one
LARGE = 1_000_000  # the bytes moved, from which on LEAST_GAIN is expected

Place = tuple[str, str]  # an op and one of its tables


@dataclass
class Run:
    """The measurements taken with one number of threads, in one process or in several."""

    rows: dict[tuple[str, Place], dict[int, Row]] = field(default_factory=dict)  # {(contender, place): {size: row}}

    def add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            if row.direction != "backward":  # a forward row comes first, and a forward+backward row replaces it
                self.rows.setdefault((row.contender, (row.op, row.table)), {})[row.size] = row


@dataclass(frozen=True)
class Gain:
    """The speedup from the fewest threads to the most, at the largest size that was measured with both."""

    ours: float
    floor: float
    bytes: int

    @property
    def mark(self) -> str:
        """Return "*" for a speedup that is too low because memory gains no more, and "†" where memory gains more."""
        if self.bytes < LARGE or self.ours >= LEAST_GAIN:
            return ""
        return "\\*" if self.ours >= 0.9 * self.floor else "†"


def write_page(reports: Sequence[Report], page: Path) -> None:
    """Write the page from one or more reports per number of threads; the pictures go into the same folder."""
    if not reports:
        return
    reports = sorted(reports, key=lambda report: (report.machine["threads"], report.command))
    runs: dict[int, Run] = {}
    for report in reports:
        runs.setdefault(report.machine["threads"], Run()).add(report.rows)
    fewest, most = min(runs), max(runs)
    families: dict[str, list[Place]] = {}
    for row in (row for report in reports if report.machine["threads"] == most for row in report.rows):
        if (row.op, row.table) not in families.setdefault(row.family, []):
            families[row.family].append((row.op, row.table))
    gains = {place: _gain(runs[fewest], runs[most], place) for places in families.values() for place in places}
    lines = [
        "# Cost by size and threads",
        "",
        "Milliseconds of forward+backward (forward, where there is no backward) from a hundred "
        "elements or points to a hundred million, or one list of up to a hundred thousand items, as far as ten "
        f"seconds a call and a quarter of the memory go; fresh memory, threads: {most}.",
        "",
        *([_about(gains, fewest, most), ""] if fewest != most else []),
        *(f"- {report.where}: `{report.command}`" for report in reports),
    ]
    for family, places in families.items():
        times = {place: {n: row.milliseconds for n, row in runs[most].rows[OURS, place].items()} for place in places}
        sizes = sorted({size for place in places for size in times[place]})
        lines += ["", f"## {family}", "", f"![{family}](cost-{family}.png)", ""]
        lines += [f"| op | by | {' | '.join(map(label, sizes))} | gain | of the floor |"]
        lines += [f"|---|---|{'--:|' * (len(sizes) + 2)}"]
        for place in places:
            cells = [f"{times[place][size]:.3g}" if size in times[place] else "" for size in sizes]
            gain = gains[place] if fewest != most else None
            cells += [f"{gain.ours:.2f}{gain.mark}", f"{gain.floor:.2f}"] if gain else ["", ""]
            lines.append(f"| `{place[0]}` | {place[1]} | {' | '.join(cells)} |")
        _figure(family, times).savefig(page.parent / f"cost-{family}.png", dpi=80)
    page.write_text("\n".join(lines) + "\n")


def _gain(one: Run, several: Run, place: Place) -> Gain | None:
    runs = [(run.rows.get((OURS, place), {}), run.rows.get((FLOOR, place), {})) for run in (one, several)]
    shared = set.intersection(*(set(rows) for pair in runs for rows in pair))
    if not shared:
        return None
    (ours, floor), (ours_after, floor_after) = ([rows[max(shared)] for rows in pair] for pair in runs)
    gain = floor.milliseconds / floor_after.milliseconds
    return Gain(ours.milliseconds / ours_after.milliseconds, gain, ours.bytes)


def _about(gains: dict[Place, Gain | None], fewest: int, most: int) -> str:
    large = [gain for gain in gains.values() if gain and gain.bytes >= LARGE]
    marks = [gain.mark for gain in large]
    return (
        f"*Gain* is what {most} threads gain against {fewest} at the largest size measured with both, *of the floor* "
        "what they gain in moving the same bytes without computing. Of the "
        f"{len(large)} tables that move a megabyte or more {marks.count('')} gain {LEAST_GAIN} or more. "
        f"{len(large) - marks.count('') - marks.count('†')} marked \\* gain less, but as much as memory does: one core "
        "takes most of the bandwidth that all share; "
        f"{marks.count('†')} marked † gain less than memory does."
    )


def _figure(family: str, times: dict[Place, dict[int, float]]) -> Figure:
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
