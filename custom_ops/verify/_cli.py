"""``python -m custom_ops verify``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from custom_ops.verify._backends import BACKENDS
from custom_ops.verify._report import PASS, Cell, Report


def main(argv: Sequence[str]) -> int:
    """Run the command line; 0 if nothing failed, 1 if something did, 2 if it can't run.

    Example:
        >>> from custom_ops.verify import main
        >>> main(["--op", "relu", "--only", "gradcheck", "vmap", "--markdown"])
        | | relu (cpp) |
        |---|:-:|
        | gradcheck | ✓ |
        | vmap | ✓ |
        <BLANKLINE>
        0
    """
    options = _parse(argv)
    from custom_ops.verify._run import capabilities, verify

    if options.list:
        for name, meaning in capabilities(options.quick).items():
            print(f"{name:26}{meaning}")
        return 0
    if "triton" in options.backend and "triton" not in sys.modules:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
    import custom_ops  # noqa: F401 (registers the ops)
    from custom_ops.registry import REGISTRY

    unknown = [name for name in options.op if name not in REGISTRY]
    if unknown:
        print(f"--op: expected some of {', '.join(REGISTRY)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    columns = [(REGISTRY[name], backend) for backend in options.backend for name in options.op or REGISTRY]
    rows = {backend: options.only or list(capabilities(options.quick, backend)) for backend in options.backend}
    report = Report()
    plain = options.json or options.markdown  # for machines: no bar, and rich isn't needed
    try:
        with nullcontext() if plain else _Progress(sum(len(rows[backend]) for _, backend in columns)) as progress:
            for info, backend in columns:
                of_column = verify(info, backend=backend, quick=options.quick, only=rows[backend], on_cell=progress)
                report.cells += of_column.cells
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        print(report.to_json())
    elif options.markdown:
        print(report.to_markdown())
    else:
        _print_table(report, options.verbose)
    return 0 if report.ok else 1


QUICK = """capture with aot_eager mostly, no AOTInductor; on the triton backend also two samples in most rows (value,
gradient, second derivative and the dtypes have all), three memory layouts, Jacobians and Hessians along two random
directions of each input, finite differences without undefined gradients, batches of two; on the ptx backend the rows
that compare numbers of every sample; smaller large inputs on every backend"""


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m custom_ops verify", description="Check every op against the capability matrix."
    )
    several: dict[str, Any] = {"action": "extend", "nargs": "+"}
    parser.add_argument("--op", **several, default=[], metavar="NAME", help="only these ops")
    parser.add_argument("--backend", **several, choices=BACKENDS, help="by default cpp")
    parser.add_argument("--only", **several, metavar="CAPABILITY", help="only these rows")
    parser.add_argument("--quick", action="store_true", help=QUICK)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--markdown", action="store_true", help="print the matrix as a Markdown table")
    parser.add_argument("--list", action="store_true", help="list the capabilities and what they mean")
    parser.add_argument("--verbose", action="store_true", help="print remarks and times of passes, too")
    options = parser.parse_args(argv)
    options.backend = options.backend or ["cpp"]
    return options


_COLUMNS = 4  # of one table: as many as fit a terminal


class _Progress:
    """A bar on the terminal."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self.task = self.bar.add_task("starting", total=total)

    def __enter__(self) -> _Progress:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def __call__(self, cell: Cell) -> None:
        self.bar.update(self.task, advance=1, description=f"{cell.column}: {cell.capability} {cell.mark}")


def _print_table(report: Report, verbose: bool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours = {"pass": "green", "fail": "bold red", "not applicable": "yellow"}
    console = Console()
    for first in range(0, len(report.columns), _COLUMNS):
        columns = report.columns[first : first + _COLUMNS]
        table = Table("capability")
        for column in columns:
            table.add_column(column, justify="center")
        for capability, cells in report.rows.items():
            shown = [cells.get(column) for column in columns]
            table.add_row(capability, *(f"[{colours[c.status]}]{c.mark}[/]" if c else "" for c in shown))
        console.print(table)
    for cell in report.cells:
        if cell.status != PASS or verbose:
            seconds = f" ({cell.seconds:.1f} s)" if verbose else ""
            head = f"{cell.column}, {cell.capability}: {cell.status}{seconds}"
            console.print(f"[{colours[cell.status]}]{escape(head)}[/]  {escape(cell.detail)}")
    passed = sum(cell.status == PASS for cell in report.cells)
    total = sum(cell.seconds for cell in report.cells)
    console.print(
        f"{passed} pass, {len(report.failures)} fail, "
        f"{len(report.cells) - passed - len(report.failures)} not applicable, {total:.0f} s"
    )
