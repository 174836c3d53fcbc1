"""``python -m benchmarks``: check every registered op's answers, then time it beside its peers."""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import overhead
from benchmarks.compare import changes
from benchmarks.environment import machine, trouble, versions
from benchmarks.measure import measure
from benchmarks.plan import Peers, Plan
from benchmarks.report import Report, print_overhead, print_remarks, print_rows, read_json
from benchmarks.scaling import Scaling
from benchmarks.table import TimedOp
from benchmarks.tables import TIMED

# These make the C library keep freed memory, so that outputs land on pages that are already mapped.
WARM = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "200000000000"}
QUICK_SECONDS = 130.0  # for all cells of a quick run together


def main(argv: list[str]) -> int:
    """Return 1 if one of our answers was wrong or, with ``--against``, something got slower, else 0."""
    parser = _parser()
    options = parser.parse_args(argv)
    infos = [info for info in TIMED.values() if _is_chosen(info, options)]
    if not infos:
        parser.error("--op, --family: no op is both")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: there is no CUDA device")
    if options.device == "cpu" and options.memory == "warm" and any(os.environ.get(k) != v for k, v in WARM.items()):
        return subprocess.call([sys.executable, "-m", "benchmarks", *argv], env=os.environ | WARM)
    try:  # checks the name before minutes of timing
        for path in filter(None, (options.json, options.csv)):
            path.open("a").close()
        if options.plots:
            options.plots.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--json, --csv, --plots: {error}")
    try:
        then = read_json(options.against) if options.against else None
    except (OSError, ValueError, TypeError, KeyError) as error:
        parser.error(f"--against: {options.against} can't be read as results of this command: {error}")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads: expected at least 1, got {options.threads}")
    torch.set_num_threads(options.threads or torch.get_num_threads())
    options.memory = options.memory if options.device == "cpu" else "cuda"
    here = (options.device, options.memory, torch.get_num_threads())
    if then and (then.device, then.memory, then.machine["threads"]) != here:
        parser.error(f"--against: {options.against} was measured elsewhere: {then.where}")

    plan = Scaling(infos) if options.scaling else Plan(infos, QUICK_SECONDS if options.quick else math.inf)
    if options.sizes:
        plan.keep(options.sizes)
        if not plan.cells:
            parser.error("--sizes: no table has any of these")

    command = " ".join(["python -m benchmarks", *argv])
    report = Report(command, options.device, options.memory, machine())
    report.remarks += filter(None, [trouble(report.machine)])
    _run(report, infos, plan, options)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    if report.overhead:
        print_overhead(console, report)
    for rows in report.tables.values():
        print_rows(console, rows, report.where)
    print_remarks(console, report)
    if options.json:
        report.write_json(options.json)
    if options.csv:
        report.write_csv(options.csv)
    if options.plots:
        from benchmarks.plots import write_plots

        for path in write_plots(report, options.plots):
            console.print(f"plot: {escape(str(path))}")
    slower = then is not None and _got_slower(console, report, then, options.noise)
    return int(bool(report.wrong) or slower)


def _parser() -> argparse.ArgumentParser:
    families = sorted({info.family for info in TIMED.values()})
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    several: dict[str, Any] = {"action": "extend", "nargs": "+"}
    parser.add_argument("--op", **several, choices=sorted(TIMED), metavar="NAME", help="only these ops")
    parser.add_argument(
        "--family", **several, choices=families, metavar="NAME", help=f"only these of {', '.join(families)}"
    )
    parser.add_argument("--sizes", **several, metavar="SIZE", help='only these, written as "1000" or "16x1024"')
    parser.add_argument("--quick", action="store_true", help="under 3 minutes: fewer rounds, no compiled peers")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--memory", choices=("fresh", "warm"), default="fresh", help="new pages or reused ones (CPU)")
    parser.add_argument("--threads", type=int, metavar="N", help="on the CPU (default: as torch has it)")
    parser.add_argument("--scaling", action="store_true", help="no peers, from small sizes to large ones")
    parser.add_argument("--peers", nargs="*", metavar="NAME", help="only peers with one of these in their name")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the timings there")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write one picture per table there")
    parser.add_argument("--against", type=Path, metavar="RESULT.json", help="say what got slower since; 1 if anything")
    parser.add_argument("--noise", type=float, default=0.15, help="the least change that counts (default: %(default)s)")
    return parser


def _is_chosen(info: TimedOp, options: argparse.Namespace) -> bool:
    return (not options.op or info.name in options.op) and (not options.family or info.family in options.family)


def _run(report: Report, infos: list[TimedOp], plan: Plan, options: argparse.Namespace) -> None:
    tables = [cell.benchmark for cell in plan.cells]
    peers = Peers(tables, [] if options.scaling else options.peers, options.quick)
    device, seconds = torch.device(options.device), 0.2 if options.quick else 1.0
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("overhead of a call", total=len(plan.cells) + (0 if options.scaling else len(infos)))
        if not options.scaling:
            report.overhead["library"] = overhead.of_library(seconds, device)
            report.overhead["ops"] = {}
            for info in infos:
                progress.update(bar, advance=1, description=f"overhead of {info.name}")
                report.overhead["ops"][info.name] = overhead.of_op(info, seconds, device)
        for cell in plan.cells:
            progress.update(bar, advance=1, description=str(cell))
            effort = plan.effort(cell)
            if effort is None:
                report.remarks.append(f"{cell}: skipped")
                continue
            result = measure(cell, peers.of(cell.benchmark), device, options.memory, effort)
            plan.done(cell, result)
            report.rows += result.rows
            report.remarks += result.remarks
            report.wrong += [result.wrong] if result.wrong else []
            if options.json:
                report.write_json(options.json)  # saves the measurements before anything later can fail
    report.missing, report.packages = peers.missing, versions(peers.modules)


def _got_slower(console: Console, now: Report, then: Report, noise: float) -> bool:
    found = changes(now, then, noise)
    slower = [change for change in found if change.slower]
    for change in slower:
        console.print(f"[bold red]slower:[/] {escape(str(change))}")
    for change in found:
        if change.faster:
            console.print(f"[green]faster:[/] {escape(str(change))}")
    console.print(f"{len(slower)} of {len(found)} got slower against the peers, compared with: {escape(then.command)}")
    return bool(slower)
