"""The parts that the site's build generates, and git doesn't hold: the API, the tables of timings, and the pictures.

A page asks for a block with ``<!-- generated: name argument -->``; `BLOCKS` lists the names.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(DOCS)]

import pictures  # noqa: E402
from wrong_calls import answers  # noqa: E402
from wrong_calls import markdown as wrong_calls_page  # noqa: E402

from benchmarks import cost_page, gpu_day, plots  # noqa: E402
from benchmarks.measure import FLOOR, OURS, Row, label  # noqa: E402
from benchmarks.plan import elements  # noqa: E402
from benchmarks.report import Report, read_json  # noqa: E402
from custom_ops.registry import REGISTRY  # noqa: E402
from examples import autograd_tour  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PICTURES = DOCS / "generated"  # ignored by git


def families() -> dict[str, dict[str, list[str]]]:
    """Return {family: {op: the names of it and its variants}}."""
    found: dict[str, dict[str, list[str]]] = {}
    for info in REGISTRY.values():
        found.setdefault(info.family, {})[info.name] = [function.name for function in info.functions]
    return found


def ops(family: str) -> str:
    """Return a table with a row for each op, in which its variants have a line each."""
    lines = ["| op | what it is |", "|---|---|"]
    for name in families()[family]:
        functions = REGISTRY[name].functions
        names, summaries = [f"`{f.name}`" for f in functions], [f.summary for f in functions]
        lines.append(f"| {'<br>'.join(names)} | {'<br>'.join(summaries)} |")
    return "\n".join(lines)


# -- API --


def api(module_name: str) -> str:
    """Return the API of a module and of everything in its ``__all__``; a function stands beside its layer."""
    module = importlib.import_module(module_name)
    shown_as = "custom_ops" if module_name.removeprefix("custom_ops.") in families() else module_name
    lines = [f".. automodule:: {module_name}", "   :no-members:", "", f".. py:currentmodule:: {shown_as}", ""]
    for name in sorted(module.__all__, key=lambda name: (name.replace("_", "").lower(), name[0].isupper())):
        lines += [*_member(shown_as, name, getattr(module, name)), ""]
    return "\n".join(["````{eval-rst}", *lines, "````"])


def _member(module: str, name: str, value: Any) -> list[str]:
    if inspect.isclass(value):
        members = ", ".join(_own_members(value))
        return [f".. autoclass:: {module}.{name}", *([f"   :members: {members}"] if members else [])]
    if isinstance(value, types.FunctionType):
        return [f".. autofunction:: {module}.{name}"]
    if hasattr(value, "fn"):  # autodoc doesn't recognise a function decorated with triton.jit
        words = inspect.cleandoc(value.fn.__doc__).replace("Example:", "**Example:**\n").splitlines()
        arguments = ", ".join(inspect.signature(value.fn).parameters)
        return [f".. py:function:: {name}({arguments})", "", *(f"   {line}".rstrip() for line in words)]
    shown = [f"   :value: {value!r}"] if isinstance(value, int | str) else []  # the repr of a dictionary has addresses
    return [f".. py:data:: {name}", *shown]


def _own_members(cls: type) -> list[str]:
    """Return the members that have docstrings, those of a private base included, but not those of torch's classes."""
    found = []
    for owner in cls.__mro__:
        if owner.__module__.startswith("custom_ops"):
            for name, value in vars(owner).items():
                inner = getattr(value, "fget", None) or getattr(value, "__func__", value)
                documented = (
                    callable(inner) and inner.__doc__ and not inspect.unwrap(inner).__module__.startswith("torch")
                )
                if documented and not name.startswith("_") and name not in [*found, "function"]:
                    found.append(name)
    return [] if issubclass(cls, Exception) or (dataclasses.is_dataclass(cls) and not found) else found


# -- Timings --


def reports() -> list[tuple[Path, Report]]:
    return [(path, read_json(path)) for path in sorted(RESULTS.glob("*.json"))]


def fastest(family: str) -> str:
    """Return a family's table: for each run on fresh memory, each op's first table beside the fastest peer."""
    lines = ["| op | at | ours, ms | beside | its ms | ours / that |", "|---|---|--:|---|--:|--:|"]
    loaded = False
    for _, report in reports():
        seen = set()
        for (op, table), _ in report.tables.items():
            if report.memory != "warm" and op in families()[family] and op not in seen:
                found = beside_best(report, op, table)
                if found is not None:
                    seen.add(op)
                    busy = "†" * was_loaded(report)
                    loaded |= bool(busy)
                    lines.append(f"| `{op}` | {found[0]} | {' | '.join(found[1:])}{busy} |")
    lines += ["", f"Times are medians ± the interquartile range; {reports()[0][1].where}."]
    lines += ["† Other work ran on the machine when that run began."] if loaded else []
    return "\n".join(lines)


def beside_best(report: Report, op: str, table: str) -> tuple[str, str, str, str, str] | None:
    """Return, for the largest size with a peer: the size, our time, the fastest peer, its time and the ratio."""
    rows = [row for row in report.tables[op, table] if row.direction == report.tables[op, table][-1].direction]
    peers = [r for r in rows if r.contender != FLOOR and not r.contender.startswith(("ours", OURS)) and not r.note]
    if not peers:
        return None
    peer = min((row for row in peers if row.size == peers[-1].size), key=lambda row: row.milliseconds)
    ours = next(row for row in rows if (row.size, row.contender) == (peer.size, OURS))
    times = [f"{milliseconds(row)} ± {row.spread:.0%}" for row in (ours, peer)]
    at = f"{label(ours.size)} {table}, {ours.direction}"
    return at, times[0], peer.contender, times[1], f"{peer.ours_over_this:.2g}"


def milliseconds(row: Row) -> str:
    return f"{row.milliseconds:.3g}" if row.milliseconds < 1000 else f"{row.milliseconds:,.0f}"


def was_loaded(report: Report) -> bool:
    return any("the load was" in remark for remark in report.remarks)


def speed() -> str:
    """Return all tables of every op and of its variants, from all result files, each with the number of its run."""
    blocks = []
    for family, names in families().items():
        blocks.append(f"## {family.capitalize()}")
        for op, functions in names.items():
            for name in functions:
                blocks += [f"{'###' if name == op else '####'} `{name}`", *_tables_of(name, reports(), name == op)]
    return "\n\n".join(blocks)


def runs() -> str:
    blocks = []
    for number, (_, report) in enumerate(reports(), 1):
        notes = [f"    - {remark}" for remark in report.remarks]
        notes += [f"    - not installed: {name}" for name in report.missing]
        about = f"{number}. {report.where}, torch {report.machine['torch']}: `{report.command}`"
        blocks.append("\n".join([about, *notes]))
    return "\n\n".join(blocks)


def _tables_of(op: str, runs: list[tuple[Path, Report]], with_pictures: bool) -> Iterator[str]:
    drawn = set()
    for number, (_, report) in enumerate(runs, 1):
        for (of, table), rows in report.tables.items():
            if of == op:
                yield f"By {table}; {report.memory} memory, run {number}."
                yield _timings(rows)
                picture = PICTURES / plots.file_name(op, table)
                if with_pictures and report.memory != "warm" and picture not in drawn:
                    drawn.add(picture)
                    yield f"![{op}, by {table}](generated/{picture.name})"
    if not any(of == op for _, report in runs for of, _ in report.tables):
        yield "No committed run has a table of it."


def _timings(rows: list[Row]) -> str:
    last = rows[-1].direction
    sizes: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.direction == last:
            sizes.setdefault(label(row.size), {})[row.contender] = row
    peers = dict.fromkeys(name for by_name in sizes.values() for name in by_name if name not in (OURS, FLOOR))
    head = ["ours, ms", "± IQR", "× floor", "GB/s", "peak, MiB", *(f"ours / {peer}" for peer in peers)]
    lines = [f"| {last} | {' | '.join(head)} |", f"|---|{'--:|' * len(head)}"]
    for size, by_name in sizes.items():
        ours = by_name[OURS]
        ratios = [
            f"{by_name[p].ours_over_this:.2f}{'*' * bool(by_name[p].note)}" if p in by_name else "" for p in peers
        ]
        cells = [milliseconds(ours), f"{ours.spread:.0%}", f"{ours.floors:.2f}"]
        cells += [f"{ours.gigabytes_per_second:.1f}", f"{(ours.peak_bytes or 0) / 2**20:.1f}", *ratios]
        lines.append(f"| {size} | {' | '.join(cells)} |")
    if any(row.note for row in rows):
        lines += ["", "\\* its answer differs from that of the reference in float64"]
    return "\n".join(lines)


def overhead() -> str:
    """Return the table of the fixed cost of one call."""
    lines = ["| run | call | ours, µs | beside | ours / that |", "|--:|---|--:|---|--:|"]
    for number, (_, report) in enumerate(reports(), 1):
        calls = [(f"16 elements, {d}", "custom_ops.library", t) for d, t in report.overhead.get("library", {}).items()]
        calls += [(f"`{op}`, first sample", OURS, times) for op, times in report.overhead.get("ops", {}).items()]
        for title, ours, times in calls:
            for name in [name for name in times if name != ours]:
                cells = f"{times[ours]:.1f} | {name} | {times[ours] / times[name]:.2f}"
                lines.append(f"| {number} | {title} | {cells} |")
    return "\n".join(lines)


def cost() -> str:
    page = (PICTURES / "cost.txt").read_text()
    return page.partition("\n")[2].replace("](cost-", "](generated/cost-").strip()


def networks() -> str:
    """Return the memory saved by one-bit activations, from the result files of benchmarks.networks."""
    blocks = []
    for path in sorted((RESULTS / "networks").glob("*.json")):
        result = json.loads(path.read_text())
        batch, size = result["batch"], result["size"]
        lines = [
            f"| peak memory of a training step, batch {batch}, {size} × {size} | torch | ours | torch, in place |",
            "|---|--:|--:|--:|",
        ]
        steps: dict[str, dict[str, float]] = {}
        for row in result["steps"]:
            steps.setdefault(f"{row['network']}, {row['mode']}", {})[row["activations"]] = row["mebibytes"]
        for network, peaks in steps.items():
            shown = [
                f"{peaks[a]:.0f} MiB ({peaks[a] / peaks['torch'] - 1:+.0%})" for a in ("custom_ops", "torch, in place")
            ]
            lines.append(f"| {network} | {peaks['torch']:.0f} MiB | {' | '.join(shown)} |")
        lines += [
            "",
            "| compiled linear → bias → activation → residual | ours, ms | torch, ms | ours / torch |",
            "|---|--:|--:|--:|",
        ]
        for row in result["chains"]:
            times = f"{row['custom_ops']:.3g} | {row['torch']:.3g} | {row['ours_over_torch']:.2f}"
            lines.append(f"| {row['activation']} | {times} |")
        blocks += [f"`{result['command']}` (torch {result['machine']['torch']})", "\n".join(lines)]
    return "\n\n".join(blocks)


# -- Pages that a module of the repository writes --


def _body(page: str) -> str:
    """Return the page without its title, since the page that includes it has one."""
    return page.partition("\n")[2].strip()


def errors() -> str:
    return _body(wrong_calls_page(list(answers())))


def tour() -> str:
    return _body(autograd_tour.markdown()).replace("\n\n```\n", "\n```\n")


def gpu_report() -> str:
    """Return the report of a day on a GPU if one is committed, but not that of a rehearsal."""
    path = RESULTS / "gpu" / "gpu_day.json"
    report = json.loads(path.read_text()) if path.exists() else {"rehearsal": True}
    if report["rehearsal"]:
        return "**There is no report yet:** nothing has been run on a GPU."
    return "\n".join(gpu_day.tables(report))


BLOCKS: dict[str, Callable[..., str]] = {
    "api": api,
    "cost": cost,
    "errors": errors,
    "fastest": fastest,
    "gpu_report": gpu_report,
    "networks": networks,
    "ops": ops,
    "overhead": overhead,
    "runs": runs,
    "speed": speed,
    "tour": tour,
}


def fill(page: str) -> str:
    """Return the page with its generated blocks filled in."""
    return re.sub(r"<!-- generated: (\w+) ?([\w.]*) -->", lambda f: BLOCKS[f[1]](*filter(None, [f[2]])), page)


# -- Pictures --


def draw() -> None:
    """Draw the pictures that are older than their sources."""
    PICTURES.mkdir(exist_ok=True)
    for name, picture in pictures.PICTURES.items():
        if _is_old(PICTURES / name, [Path(pictures.__file__)]):
            picture().savefig(PICTURES / name, dpi=100)
    scaling = sorted((RESULTS / "scaling").glob("*.json"))
    if _is_old(PICTURES / "cost.txt", [Path(cost_page.__file__), *scaling]):
        cost_page.write_page([read_json(path) for path in scaling], PICTURES / "cost.txt")
    if _is_old(PICTURES / "timings", [Path(plots.__file__), *RESULTS.glob("*.json")]):
        _draw_timings()
        (PICTURES / "timings").touch()


def _is_old(made: Path, sources: list[Path]) -> bool:
    return not made.exists() or any(source.stat().st_mtime > made.stat().st_mtime for source in sources)


def _draw_timings() -> None:
    """Draw a picture of each table of an op on fresh memory; its sizes may come from several runs."""
    fresh = [report for _, report in reports() if report.memory != "warm"]
    for where in dict.fromkeys(report.where for report in fresh):
        same = [report for report in fresh if report.where == where]
        rows = {
            (r.op, r.table, label(r.size), r.direction, r.contender): r
            for report in same
            for r in report.rows
            if r.op in REGISTRY
        }
        plots.write_plots(
            dataclasses.replace(same[0], rows=sorted(rows.values(), key=lambda r: elements(r.size))), PICTURES
        )
