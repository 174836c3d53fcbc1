"""The matrix as data, as JSON and as Markdown."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

__all__ = ["Cell", "Report"]

PASS, FAIL, NOT_APPLICABLE = "pass", "fail", "not applicable"
_MARKS = {PASS: "✓", FAIL: "✗", NOT_APPLICABLE: "–"}


@dataclass(frozen=True)
class Cell:
    """A cell: ``status`` is "pass", "fail" or "not applicable"; ``detail`` is the remark, the failure or the reason.

    Example:
        >>> import torch
        >>> from custom_ops.verify import verify
        >>> x = torch.ones(3, dtype=torch.float64, requires_grad=True)
        >>> cell = verify(torch.sin, [(x,)], name="sine", only=["vmap"])["vmap"]
        >>> cell.column, cell.status, cell.mark
        ('sine (cpp)', 'pass', '✓')
    """

    op: str
    backend: str
    capability: str
    status: str
    detail: str = ""
    seconds: float = 0.0

    @property
    def column(self) -> str:
        return f"{self.op} ({self.backend})"

    @property
    def mark(self) -> str:
        return _MARKS[self.status]


@dataclass
class Report:
    """The cells of one or several ops; ``ok`` tells whether none of them failed.

    Example:
        >>> import torch
        >>> from custom_ops.verify import verify
        >>> x = torch.ones(3, dtype=torch.float64, requires_grad=True)
        >>> report = verify(torch.sin, [(x,)], name="sine", only=["vmap", "modules"])
        >>> report.ok, report["modules"].detail
        (True, 'no module')
        >>> print(report.to_markdown())
        | | sine (cpp) |
        |---|:-:|
        | vmap | ✓ |
        | modules | – (1) |
        <BLANKLINE>
        1. not applicable: no module
    """

    cells: list[Cell] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Return whether no cell failed."""
        return not self.failures

    @property
    def failures(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.status == FAIL]

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(cell.column for cell in self.cells))

    @property
    def rows(self) -> dict[str, dict[str, Cell]]:
        """Return the cells as ``{capability: {column: cell}}``."""
        rows: dict[str, dict[str, Cell]] = {}
        for cell in self.cells:
            rows.setdefault(cell.capability, {})[cell.column] = cell
        return rows

    def __getitem__(self, capability: str) -> Cell:
        """Return the first cell of a capability, which is the only one in the report of a single op."""
        return next(cell for cell in self.cells if cell.capability == capability)

    def raise_on_failure(self) -> None:
        """Raise ``AssertionError`` with every failure's detail."""
        if not self.ok:
            raise AssertionError("\n".join(f"{c.column}, {c.capability}: {c.detail}" for c in self.failures))

    def to_json(self) -> str:
        return json.dumps({"ok": self.ok, "cells": [asdict(cell) for cell in self.cells]}, indent=2)

    def to_markdown(self) -> str:
        """Return the matrix as a table, with a numbered note for every cell that isn't a pass."""
        notes: list[str] = []
        lines = [f"| | {' | '.join(self.columns)} |", f"|---|{':-:|' * len(self.columns)}"]
        for capability, cells in self.rows.items():
            shown = []
            for column in self.columns:
                cell = cells.get(column)
                if cell is None or cell.status == PASS:
                    shown.append(cell.mark if cell else "")
                    continue
                note = f"{cell.status}: {' '.join(cell.detail.split())}"
                if note not in notes:
                    notes.append(note)
                shown.append(f"{cell.mark} ({notes.index(note) + 1})")
            lines.append(f"| {capability} | {' | '.join(shown)} |")
        return "\n".join([*lines, "", *(f"{i}. {note}" for i, note in enumerate(notes, 1))])
