"""``python -m benchmarks --against RESULT.json``: find what got slower, relative to the peers and to the bandwidth
floor.

Absolute times don't compare between two runs, not even on one machine; ratios to what ran in the same process do. For
each op, size and direction, the change is the median of its ratios to every contender measured in both runs.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from benchmarks.measure import OURS, Row, label
from benchmarks.report import Report

Place = tuple[str, str, str, str]


@dataclass(frozen=True)
class Change:
    """The ratio of our relative time now to that then; noise may explain a ratio of up to ``doubt``."""

    place: Place
    factor: float
    doubt: float

    @property
    def slower(self) -> bool:
        return self.factor > self.doubt

    @property
    def faster(self) -> bool:
        return self.factor < 1 / self.doubt

    def __str__(self) -> str:
        op, table, size, direction = self.place
        return f"{op}, {table}, {size}, {direction}: {self.factor:.2f}× as long (noise is up to {self.doubt:.2f}×)"


def changes(now: Report, then: Report, noise: float) -> list[Change]:
    """Return the change at every place that both reports measured; a relative change below ``noise`` doesn't count."""
    before, after = _by_place(then), _by_place(now)
    return [_change(place, after[place], before[place], noise) for place in after if place in before]


def _by_place(report: Report) -> dict[Place, dict[str, Row]]:
    places: dict[Place, dict[str, Row]] = {}
    for row in report.rows:
        places.setdefault((row.op, row.table, label(row.size), row.direction), {})[row.contender] = row
    return {place: rows for place, rows in places.items() if len(rows) > 1}


def _change(place: Place, now: dict[str, Row], then: dict[str, Row], noise: float) -> Change:
    both = [name for name in now if name in then and name != OURS]
    if not both:
        return Change(place, 1.0, math.inf)
    factor = statistics.median(now[name].ours_over_this / then[name].ours_over_this for name in both)
    errors = [_error_of_median(rows[OURS]) for rows in (now, then)]
    errors += [statistics.median(_error_of_median(rows[name]) for name in both) for rows in (now, then)]
    return Change(place, factor, max(1 + noise, math.exp(3 * math.hypot(*errors))))


def _error_of_median(row: Row) -> float:
    """Return a median's relative standard error for normal times: 1.253 σ / √n, with σ = interquartile range /
    1.349.
    """
    return 1.253 / 1.349 * row.spread / math.sqrt(row.rounds)
