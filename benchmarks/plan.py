"""The plan of a run: what is measured, in which order, and for how long."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from benchmarks import timing
from benchmarks.measure import Cell, Effort, Result
from benchmarks.table import Benchmark, TimedOp

FULL = Effort()
QUICK = Effort(seconds=0.5, rounds=3, warm_ups=1)


class Plan:
    """The cells in order. A quick run takes the small sizes of all tables first and divides its seconds among the
    cells.

    Each cell may take its share of the time left. A cell is skipped if its answers alone are expected to take an eighth
    of that time, judging by the number of elements and the previous size. (References that hold all pairs of a list
    take even longer.) A run therefore ends in time whatever the number of ops.
    """

    def __init__(self, infos: Iterable[TimedOp], seconds: float = math.inf) -> None:
        self.quick = math.isfinite(seconds)
        self.end = timing.clock() + seconds
        cells = [
            (place, Cell(info, benchmark, size))
            for info in infos
            for benchmark in info.benchmarks
            for place, size in enumerate(benchmark.sizes)
        ]
        self.cells = [cell for _, cell in (sorted(cells, key=lambda pair: pair[0]) if self.quick else cells)]
        self.left = len(self.cells)
        self._last: dict[int, tuple[Cell, float]] = {}

    def keep(self, sizes: list[str]) -> None:
        """Keep only the cells of these sizes, written as "16x1024"."""
        self.cells = [cell for cell in self.cells if _written(cell.size) in sizes]
        self.left = len(self.cells)

    def effort(self, cell: Cell) -> Effort | None:
        """Return the effort for the next cell, or None to skip it."""
        remaining, cells = self.end - timing.clock(), self.left
        self.left -= 1
        if not self.quick:
            return FULL
        before, preparation = self._last.get(id(cell.benchmark), (cell, 0.0))
        expected = preparation * elements(cell.size) / elements(before.size)
        return None if remaining <= 0 or expected > remaining / 8 else replace(QUICK, limit=remaining / cells)

    def done(self, cell: Cell, result: Result) -> None:
        self._last[id(cell.benchmark)] = cell, result.preparation


def elements(size: Any) -> float:
    """Return the product of the numbers in a size, from which the time is estimated."""
    if isinstance(size, (tuple, list)):
        return math.prod(map(elements, size))
    return max(float(size), 1.0) if isinstance(size, (int, float)) else 1.0


def _written(size: Any) -> str:
    return "x".join(map(_written, size)) if isinstance(size, (tuple, list)) else str(size)


class Peers:
    """The wanted and installed peers of each table; ``missing`` collects the others.

    All peers are looked up before anything is measured, so a misspelt name raises at once.
    """

    def __init__(self, tables: Iterable[Benchmark], wanted: list[str] | None, quick: bool) -> None:
        self.wanted, self.quick = wanted, quick
        self.missing: dict[str, str] = {}
        self.modules: set[str] = set()
        self._found = {id(table): self._look_up(table) for table in tables}

    def of(self, table: Benchmark) -> dict[str, Callable[..., Any]]:
        return self._found[id(table)]

    def _look_up(self, benchmark: Benchmark) -> dict[str, Callable[..., Any]]:
        found: dict[str, Callable[..., Any]] = {}
        for name, peer in benchmark.peers.items():
            if not self._is_wanted(name):
                continue
            if isinstance(peer, str):
                module, _, attribute = peer.partition(":")
                try:
                    peer = getattr(importlib.import_module(module), attribute)
                except ImportError as error:
                    self.missing[name] = str(error)
                    continue
                self.modules.add(module.partition(".")[0])
            found[name] = peer
        return found

    def _is_wanted(self, name: str) -> bool:
        if self.wanted is None:
            return not (self.quick and "compile" in name)
        return any(part.lower() in name.lower() for part in self.wanted)
