"""What the examples share: arguments, progress, checks, tables and figures."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from custom_ops.examples.data import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS, THEIRS, NEUTRAL = "#1f6fb4", "#e07b39", "#9aa3ab"


@dataclass(frozen=True)
class Check:
    """A claim that the example makes; the command fails if it doesn't hold."""

    claim: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        # A NaN fulfils neither.
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass
class Report:
    """One example's outcome: a table, mostly of (what, ours, theirs, remark), checks and pictures."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
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
    """``quick`` is for tests: a few steps, to see that everything runs; claims about quality are dropped."""

    quick: bool
    out: Path
    console: Console

    def progress(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        return Progress(*columns, TextColumn("{task.fields[note]}"), console=self.console)


Example = Callable[[Options], Report]


def run(examples: Sequence[Example], prog: str, description: str, argv: Sequence[str] | None) -> int:
    """Run the examples one after another and print their tables; 0 if every claim holds."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that everything runs")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures (default: out)")
    arguments = parser.parse_args(argv)
    options = Options(arguments.quick, arguments.out, Console())
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    reports = []
    for example in examples:
        start = time.perf_counter()
        try:
            report = example(options)
        except DataError as error:
            options.console.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
            return 2
        report.seconds = time.perf_counter() - start
        reports.append(report)
    for report in reports:
        report.show(options.console)
    return 0 if all(report.holds for report in reports) else 1


def new_figure(columns: int, rows: int = 1, width: float = 5.0, height: float = 4.2, title: str = "") -> Figure:
    """A figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=13)
    return figure
