"""``bench --against RESULT.json``: what got slower, in ratios to the peers and to the bandwidth floor.

Times don't travel, not even between two runs on one machine; ratios to what ran beside ours do. Of each
op at each size and direction, the change is the median over all that were measured beside it both times.
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
    """The time of ours in units of its neighbours', now over then; ``doubt`` is what chance may explain."""

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
    """Of all places measured in both; ``noise`` is the least relative change that counts."""
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
    """Relative standard error, were the times normal: 1.253 σ / √n, and the interquartile range is 1.349 σ."""
    return 1.253 / 1.349 * row.spread / math.sqrt(row.rounds)
