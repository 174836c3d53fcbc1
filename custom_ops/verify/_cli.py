"""The command ``python -m custom_ops verify``."""

from __future__ import annotations

import argparse
import importlib
import inspect
import operator
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from custom_ops.verify._backends import BACKENDS
from custom_ops.verify._report import NOT_APPLICABLE, PASS, Cell, Report


def main(argv: Sequence[str]) -> int:
    """Run the command line, and return 0 if nothing failed, 1 if something failed, or 2 if it can't run.

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
    from custom_ops.verify._run import capabilities

    if options.list:
        for name, meaning in capabilities(options.quick).items():
            print(f"{name:26}{meaning}")
        return 0
    if "triton" in options.backend and "triton" not in sys.modules:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it at import
    try:
        functions = _functions(options)
        for path in filter(None, (options.html, options.junit)):
            _check_writable(path)
        columns = [(function, backend) for backend in options.backend for function in functions]
        rows = {backend: options.only or list(capabilities(options.quick, backend)) for backend in options.backend}
        report = Report()
        plain = options.json or options.markdown  # machine-readable output has no progress bar and doesn't need rich
        with nullcontext() if plain else _Progress(sum(len(rows[backend]) for _, backend in columns)) as progress:
            for function, backend in columns:
                found = function(backend=backend, quick=options.quick, only=rows[backend], on_cell=progress)
                report.cells += found.cells
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        print(report.to_json())
    elif options.markdown:
        print(report.to_markdown())
    else:
        _print_table(report, options.verbose)
    for path, text in ((options.html, report.to_html), (options.junit, report.to_junit)):
        if path:
            Path(path).write_text(text())
    return 0 if report.ok else 1


def _functions(options: argparse.Namespace) -> list[Callable[..., Report]]:
    """Return `verify` for the named callable, or for ops of this package."""
    from custom_ops.verify._run import verify

    if options.function:
        if options.op:
            raise ValueError(f"--op: expected no op beside the function {options.function}")
        if not options.samples:
            raise ValueError("--samples: expected module:name of the calls to make, or of what makes them")
        function, reference, samples = (
            _named(name, option)
            for name, option in (
                (options.function, OWN),
                (options.reference, "--reference"),
                (options.samples, "--samples"),
            )
        )
        if callable(samples) and not inspect.signature(samples).parameters:
            samples = samples()
        return [partial(verify, function, samples, reference=reference, name=options.function.partition(":")[2])]
    import custom_ops  # noqa: F401 (registers the ops)
    from custom_ops.registry import FUNCTIONS, REGISTRY

    unknown = [name for name in options.op if name not in FUNCTIONS]
    if unknown:
        raise ValueError(f"--op: expected some of {', '.join(FUNCTIONS)}, got {', '.join(unknown)}")
    return [partial(verify, FUNCTIONS[name]) for name in options.op or REGISTRY]


OWN = "MODULE:FUNCTION"


def _named(name: str | None, option: str) -> Any:
    """Return the object called "module:name", whose module may be in the working directory."""
    if name is None:
        return None
    module, _, attributes = name.partition(":")
    if not attributes:
        raise ValueError(f"{option}: expected module:name, got {name!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return operator.attrgetter(attributes)(importlib.import_module(module))
    except (AttributeError, ModuleNotFoundError) as error:
        raise ValueError(f"{option}: {name}: {error}") from None


def _check_writable(path: str) -> None:
    """Raise before the work if the report couldn't be written after it."""
    try:
        with open(path, "a"):
            pass
    except OSError as error:
        raise ValueError(f"--html, --junit: {error}") from None


QUICK = """capture with aot_eager mostly, no AOTInductor; on the triton backend also two samples in most rows (value,
gradient, second derivative and the dtypes have all), three memory layouts, Jacobians and Hessians along two random
directions of each input, finite differences without undefined gradients, batches of two over all tensors and over those
differentiated in; on the ptx backend the rows that compare numbers of every sample; smaller large inputs on every
backend"""


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m custom_ops verify",
        description="Check every op of this package, or any function of tensors, against the capability matrix.",
    )
    parser.add_argument("function", nargs="?", metavar=OWN, help="a function of your own; needs --samples")
    named = "MODULE:NAME"
    parser.add_argument(
        "--samples", metavar=named, help="the function's calls, as `verify` takes them, or a function that returns them"
    )
    parser.add_argument("--reference", metavar=named, help="the same function in plain PyTorch")
    several: dict[str, Any] = {"action": "extend", "nargs": "+"}
    parser.add_argument("--op", **several, default=[], metavar="NAME", help="only these ops")
    parser.add_argument("--backend", **several, choices=BACKENDS, help="by default cpp")
    parser.add_argument("--only", **several, metavar="CAPABILITY", help="only these rows")
    parser.add_argument("--quick", action="store_true", help=QUICK)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--markdown", action="store_true", help="print the matrix as a Markdown table")
    parser.add_argument("--html", metavar="FILE", help="write a page that shows the report")
    parser.add_argument("--junit", metavar="FILE", help="write JUnit's XML, for CI")
    parser.add_argument("--list", action="store_true", help="list the capabilities and what they mean")
    parser.add_argument("--verbose", action="store_true", help="print remarks and times of passes, too")
    options = parser.parse_args(argv)
    options.backend = options.backend or ["cpp"]
    return options


_COLUMNS = 4  # columns per table, so that it fits a terminal


class _Progress:
    """A progress bar on the terminal."""

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

    colours = {"pass": "green", "fail": "bold red", "not applicable": "yellow", "not checked": "bold yellow"}
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
    for cell in report.cells if verbose else ():
        if cell.status == PASS:
            head = f"{cell.column}, {cell.capability}: pass ({cell.seconds:.1f} s)"
            console.print(f"[green]{escape(head)}[/]  {escape(cell.detail)}", soft_wrap=True)
    for line in report.reasons(NOT_APPLICABLE):
        console.print(f"[yellow]{escape(line)}[/]", soft_wrap=True)
    for line in report.lines():
        console.print(f"[bold red]{escape(line)}[/]", soft_wrap=True)
    console.print(f"{report.summary}, {sum(cell.seconds for cell in report.cells):.0f} s")
