"""The examples' common parts: arguments, progress, measurements, checks, tables and figures."""

from __future__ import annotations

import argparse
import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.box import HORIZONTALS
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.timing import Call, interleave, median
from examples.data import DataError, fetch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, THEIRS, NEUTRAL = "#1f6fb4", "#e07b39", "#9aa3ab"


@dataclass(frozen=True)
class Check:
    """A claim of the example; the command fails if it doesn't hold."""

    claim: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        # Both comparisons are False for a NaN.
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(frozen=True)
class Gain:
    """A row of the closing table: the milliseconds ("ms") or the memory ("MiB") of ours and of the replaced formula."""

    what: str
    unit: str
    ours: float
    theirs: float
    group: str

    @property
    def row(self) -> tuple[str, str, str, str]:
        measured = "time" if self.unit == "ms" else "peak memory"
        ratio = self.theirs / self.ours
        numbers = shown(self.ours, self.unit), shown(self.theirs, self.unit)
        return f"{self.what}: {measured}", *numbers, f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:.1f}x"


def shown(value: float, unit: str) -> str:
    """Format with three digits, or with all digits of a whole number from 100 on."""
    if unit == "MiB" and value < 1:
        value, unit = 1024 * value, "KiB"
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


@dataclass
class Report:
    """One part's outcome: a table, checks, pictures, rows of the closing table and panels of the summary's picture."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    gains: list[Gain] = field(default_factory=list)
    panels: list[Callable[[Axes], object]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def holds(self) -> bool:
        return all(check.holds for check in self.checks)

    def show(self, console: Console) -> None:
        table = Table(*self.columns, title=f"{self.title} ({self.seconds:.0f} s)", title_justify="left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
        for check in self.checks:
            mark = "[green]holds[/]" if check.holds else "[bold red]FAILS[/]"
            sign = ">=" if check.at_least else "<="
            console.print(f"  {mark}  {check.claim}: {check.value:.3g} {sign} {check.limit:.3g}", highlight=False)
        for picture in self.pictures:
            console.print(f"  wrote {picture}", highlight=False, soft_wrap=True)
        console.print()


@dataclass(frozen=True)
class Options:
    """Options of a run; ``quick`` takes a few steps only, to test that everything runs, and drops claims about
    quality.
    """

    quick: bool
    compiled: bool
    seed: int
    out: Path
    console: Console

    def progress(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        return Progress(*columns, TextColumn("{task.fields[note]}"), console=self.console)


@dataclass(frozen=True)
class Part:
    """A part that ``--only`` selects; `data.fetch` gets the names in ``data`` before the first part starts."""

    run: Callable[[Options], Report]
    data: tuple[str, ...] = ()


def run(
    parts: Mapping[str, Part], prog: str, description: str, argv: Sequence[str] | None, summary: str | None = None
) -> int:
    """Run the parts one after another, print their tables, and return 0 if every claim holds.

    ``summary`` is the title of a picture made of the panels of all parts.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--only", nargs="+", choices=[*parts], default=[*parts], help="these parts; all by default")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that everything runs")
    parser.add_argument("--eager", action="store_true", help="leave out what torch.compile compiles")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and scenes (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures (default: out)")
    arguments = parser.parse_args(argv)
    options = Options(arguments.quick, not arguments.eager, arguments.seed, arguments.out, Console())
    console = options.console
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    start = time.perf_counter()
    chosen = {name: part for name, part in parts.items() if name in arguments.only}
    try:
        for name in dict.fromkeys(name for part in chosen.values() for name in part.data):
            fetch(name)
    except DataError as error:
        console.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        if without := [name for name, part in parts.items() if not part.data]:
            console.print(f"No data are needed by: --only {' '.join(without)}", highlight=False, soft_wrap=True)
        return 2
    console.print(f"Set-up: the data were fetched in {time.perf_counter() - start:.0f} s", highlight=False)
    reports = []
    start, cpu = time.perf_counter(), cpu_seconds()
    for part in chosen.values():
        began = time.perf_counter()
        report = part.run(options)
        report.seconds = time.perf_counter() - began
        reports.append(report)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    for report in reports:
        report.show(console)
    panels = [panel for report in reports for panel in report.panels]
    if summary and panels:
        console.print(f"wrote {draw_summary(panels, summary, options.out / 'summary.png')}", highlight=False)
    show_gains(console, [gain for report in reports for gain in report.gains])
    holds = all(report.holds for report in reports)
    verdict = "every claim holds" if holds else "[bold red]a claim FAILS, see above[/]"
    console.print(f"After set-up: {seconds:.0f} s, {cpu:.0f} s of processor time; {verdict}", highlight=False)
    return 0 if holds else 1


def show_gains(console: Console, gains: Sequence[Gain]) -> None:
    """Print the closing table, which is at most 80 columns wide."""
    if not gains:
        return
    table = Table(title="Ours beside theirs, forward and backward", title_justify="left", box=HORIZONTALS)
    for column in ("what", "ours", "theirs", "ratio"):
        table.add_column(column, justify="left" if column == "what" else "right", no_wrap=column != "what")
    for group, rows in groupby(gains, lambda gain: gain.group):
        table.add_section()
        table.add_row(f"[bold]{group}[/]")
        for gain in rows:
            table.add_row(*gain.row)
    console.print(table, width=min(80, console.width))


def draw_summary(panels: Sequence[Callable[[Axes], object]], title: str, path: Path) -> Path:
    columns = min(3, len(panels))
    figure = new_figure(columns, math.ceil(len(panels) / columns), width=5.2, height=4.4, title=title)
    for axis, panel in zip(figure.axes, panels):
        panel(axis)
    for axis in figure.axes[len(panels) :]:
        axis.remove()
    figure.savefig(path)
    return path


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its finished children, such as compilers."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def milliseconds(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median time of each; they take turns."""
    contenders = {name: Call(lambda _, run=run: run()) for name, run in runs.items()}
    times = interleave(contenders, 0.0, torch.device("cpu"), rounds, warm_ups=0)
    return {name: 1e3 * median(values) for name, values in times.items()}


def new_figure(columns: int, rows: int = 1, width: float = 5.0, height: float = 4.2, title: str = "") -> Figure:
    """Return a figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=13)
    return figure


def draw_pairs(axis: Axes, names: Sequence[str], pairs: Sequence[tuple[float, float]], unit: str, whose: str) -> None:
    """Draw two bars for each name: ours and theirs."""
    for which, (colour, label) in enumerate(((OURS, "custom_ops"), (THEIRS, whose))):
        bars = axis.bar([i + 0.4 * which - 0.2 for i in range(len(pairs))], [p[which] for p in pairs], 0.4,
                        color=colour, label=label)  # fmt: skip
        axis.bar_label(bars, [shown(pair[which], unit) for pair in pairs], padding=2)
    axis.set(ylabel=unit)
    axis.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names])
    axis.margins(y=0.35)  # leaves room for the numbers and the legend
    axis.legend(frameon=False, loc="upper right")
