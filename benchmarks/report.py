"""A run's measurements, as tables on the terminal, as JSON and as CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import overhead
from benchmarks.environment import describe
from benchmarks.measure import OURS, Row, label


@dataclass
class Report:
    """A whole run. A row's ``size`` is a tuple in the registry and a list once it was read from a file."""

    command: str
    device: str
    memory: str
    machine: dict[str, Any]
    packages: dict[str, str] = field(default_factory=dict)  # {package of a peer: version}
    missing: dict[str, str] = field(default_factory=dict)  # {peer: the reason why it is missing}
    overhead: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)  # {"library" or "ops": microseconds}
    rows: list[Row] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def where(self) -> str:
        return describe(self.machine, self.device, self.memory)

    @property
    def tables(self) -> dict[tuple[str, str], list[Row]]:
        """Return {(op, table): rows}."""
        tables: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            tables.setdefault((row.op, row.table), []).append(row)
        return tables

    def write_json(self, path: Path) -> None:
        """Write one line for each field and, in "rows", one for each size of a table, with times to four digits."""
        fields_of_report = [f'"{f.name}": {_json(getattr(self, f.name))}' for f in fields(self) if f.name != "rows"]
        sizes: dict[str, list[Row]] = {}
        for row in self.rows:
            sizes.setdefault(_json([row.op, row.table, row.size]), []).append(row)
        lines = [_json([asdict(row) for row in rows]) for rows in sizes.values()]
        rows = '"rows": [\n' + ",\n".join(lines) + "\n]"
        path.write_text("{\n" + ",\n".join([*fields_of_report, rows]) + "\n}\n")

    def write_csv(self, path: Path) -> None:
        """Write one line per row and repeat the machine on each."""
        machine = {"device": self.device, "memory": self.memory}
        machine |= {f"machine.{name}": value for name, value in self.machine.items()}
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)] + list(machine))
            writer.writeheader()
            writer.writerows(asdict(row) | {"size": label(row.size)} | machine for row in self.rows)


def read_json(path: Path) -> Report:
    saved = json.loads(path.read_text())
    return Report(**saved | {"rows": [Row(**row) for size in saved["rows"] for row in size]})


def _json(value: Any) -> str:
    return json.dumps(_rounded(value), ensure_ascii=False)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def print_overhead(console: Console, report: Report) -> None:
    table = _table(f"one call on 16 elements ({report.where})", ("", "contender"), ("µs", "ours / this", "target"))
    for direction, times in report.overhead["library"].items():
        for name, microseconds in times.items():
            ratio = times["custom_ops.library"] / microseconds
            target = _verdict(ratio, overhead.TARGETS[direction]) if name == overhead.PEER else ""
            table.add_row(direction, name, f"{microseconds:.1f}", f"{ratio:.2f}", target)
    console.print(table)
    table = _table("forward+backward on each op's first sample", ("op", "contender"), ("µs", "ours / this", "target"))
    for op, times in report.overhead["ops"].items():
        for name, microseconds in times.items():
            ratio = times[OURS] / microseconds
            target = _verdict(ratio, overhead.OP_TARGET) if name == "native" else ""
            table.add_row(op if name == OURS else "", name, f"{microseconds:.1f}", f"{ratio:.2f}", target)
    console.print(table)


def print_rows(console: Console, rows: list[Row], where: str) -> None:
    """Print one of the report's tables."""
    table = _table(
        f"{rows[0].op}, by {rows[0].table} ({where})",
        ("size", "", "contender"),
        ("ms", "± IQR", "× floor", "GB/s", "peak MiB", "ours / this", "target"),
    )
    previous: tuple[str, str] = ("", "")
    for row in rows:
        at = (label(row.size), row.direction)
        if previous != ("", "") and at != previous:
            table.add_section()
        shown = ("" if at[0] == previous[0] else at[0], "" if at == previous else at[1])
        previous = at
        table.add_row(
            *shown,
            escape(row.contender) + (" [red](its answer differs)[/]" if row.note else ""),
            f"{row.milliseconds:.3g}",
            f"{row.spread:.0%}",
            f"{row.floors:.2f}",
            f"{row.gigabytes_per_second:.1f}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}",
            f"{row.ours_over_this:.3f}",
            "" if row.target is None else _verdict(row.ours_over_this, row.target),
        )
    console.print(table)


def print_remarks(console: Console, report: Report) -> None:
    for name, reason in report.missing.items():
        console.print(f"[yellow]not installed:[/] {escape(name)} ({escape(reason)})")
    for remark in report.remarks:
        console.print(f"[yellow]{escape(remark)}[/]")
    for wrong in report.wrong:
        console.print(f"[bold red]not timed, our answer is wrong:[/] {escape(wrong)}")


def _table(title: str, left: Iterable[str], right: Iterable[str]) -> Table:
    table = Table(title=escape(title), title_justify="left")
    for column in left:
        table.add_column(column)
    for column in right:
        table.add_column(column, justify="right")
    return table


def _verdict(ratio: float, target: float) -> str:
    return f"≤ {target:.3g} " + ("[green]met[/]" if ratio <= target else "[bold red]MISSED[/]")
