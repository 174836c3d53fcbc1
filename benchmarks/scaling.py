"""``python -m benchmarks --scaling``: time each op alone, from small to large, as far as memory and time allow.

For a list loss the length of one list grows instead, from 32 to 100,000 items.

To see how an op scales with threads, run it again with ``--threads 1`` and divide.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from benchmarks.measure import OURS, Cell, Effort, Result
from benchmarks.plan import Plan
from benchmarks.table import Benchmark, TimedOp

SIZES = tuple(10**k for k in range(2, 9))
LENGTHS = (32, 100, 320, 1000, 3200, 10_000, 32_000, 100_000)  # the lengths of one list
CHECKED = 100_000  # larger sizes are checked at this one, as a reference may need a hundred times the memory
CHECKED_LENGTH = 3200  # the reference of a list loss holds all pairs
SECONDS = 10.0  # a longer call isn't made
BRIEF = Effort(seconds=0.1, rounds=3, warm_ups=1, whole=True)
BRIEFEST = Effort(seconds=0.0, rounds=2, warm_ups=0, whole=True)  # for calls that are too long for noise to matter
LONG = 0.3  # seconds of a long call


def scaled(info: TimedOp) -> TimedOp:
    """Return the op with its tables over one number, at common sizes or the table's own, and its tables over lists."""
    by_number = [_scaled(table) for table in info.benchmarks if all(isinstance(size, int) for size in table.sizes)]
    by_lists = [_of_one_list(table) for table in info.benchmarks if info.family == "ranking" and _by_lists(table)]
    return replace(info, benchmarks=by_number + by_lists)


def _scaled(table: Benchmark) -> Benchmark:
    sizes = table.scaling or SIZES
    # a table's own sizes may count something large, and then the smallest is checked
    most = CHECKED if sizes[-1] > CHECKED else sizes[0]

    def checked_at(n: int) -> Any:
        return table.checked_at(min(n, most))

    return replace(table, sizes=sizes, targets=(), checked_at=checked_at)


def _by_lists(table: Benchmark) -> bool:
    return all(isinstance(size, tuple) and len(size) == 2 for size in table.sizes)


def _of_one_list(table: Benchmark) -> Benchmark:
    return replace(
        table,
        unit=f"one list of {table.unit}",
        sizes=LENGTHS,
        make=lambda n, device: table.make((1, n), device),
        checked_at=lambda n: min(n, CHECKED_LENGTH),
        targets=(),
        traffic=None,
    )


class Scaling(Plan):
    """A plan that takes the next size until a call would take too long or move a quarter of the machine's memory.

    Both are estimated from the two previous sizes: time grows at least as fast as it did between them.
    """

    def __init__(self, infos: Iterable[TimedOp]) -> None:
        super().__init__(map(scaled, infos))
        self._costs: dict[int, list[tuple[float, int, int]]] = {}

    def effort(self, cell: Cell) -> Effort | None:
        costs = self._costs.get(id(cell.benchmark), [])
        if costs:
            (before, _, _), (seconds, moved, size) = costs[-2:] if len(costs) > 1 else [costs[-1], costs[-1]]
            growth = cell.size / size
            expected = seconds * max(seconds / before, growth)
            if expected > SECONDS or moved * growth > _memory() / 4:
                return None
            return BRIEFEST if expected > LONG else BRIEF
        return BRIEF

    def done(self, cell: Cell, result: Result) -> None:
        ours = [row for row in result.rows if row.contender == OURS]
        if ours:
            cost = ours[-1].milliseconds / 1e3, ours[-1].bytes, cell.size
            self._costs.setdefault(id(cell.benchmark), []).append(cost)


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
