"""The matrix as data, with failures and their likely causes first, and as JSON, Markdown, HTML and JUnit XML."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from html import escape
from xml.etree import ElementTree

__all__ = ["Cell", "Report"]

PASS, FAIL, NOT_APPLICABLE, NOT_CHECKED = "pass", "fail", "not applicable", "not checked"
_MARKS = {PASS: "✓", FAIL: "✗", NOT_APPLICABLE: "–", NOT_CHECKED: "?"}

_NUMBERS = ("no uninitialised memory", "deterministic", "inputs unmutated", "value")
_TRACED = ("fake kernel", "compile")
# For each row, the rows whose failure probably explains its own, the likeliest first.
CAUSES: dict[str, tuple[str, ...]] = {
    "no uninitialised memory": ("ops functional", "inputs unmutated"),
    "deterministic": ("no uninitialised memory",),
    "inputs unmutated": ("ops functional",),
    "outputs own memory": ("ops functional",),
    "value": _NUMBERS[:3],
    "gradient": _NUMBERS,
    "float32": (*_NUMBERS, "gradient"),
    "bfloat16": (*_NUMBERS, "gradient", "float32"),
    "float16": (*_NUMBERS, "gradient", "float32", "bfloat16"),
    "autocast": ("value", "gradient", "float32"),
    "input layouts": (*_NUMBERS, "large"),
    "gradient layouts": ("input layouts", "gradient", "second derivative", "forward AD"),
    "zero size": _NUMBERS,
    "large": (*_NUMBERS, "gradient", "float32"),
    "special values": (*_NUMBERS, "gradient"),
    "threads": ("deterministic", "inputs unmutated", "global state"),
    "forward AD": _NUMBERS,
    "second derivative": (*_NUMBERS, "gradient"),
    "gradcheck": (*_NUMBERS, "gradient", "forward AD", "vmap"),
    "gradgradcheck": ("gradient", "second derivative", "gradcheck", "forward AD", "vmap"),
    "batched grad": ("vmap", "gradient", "gradcheck"),
    "each input alone": ("gradient", "gradcheck"),
    "checkpoint": ("inputs unmutated", "gradient", "gradcheck"),
    "version check": ("inputs unmutated", "gradient", "gradcheck"),
    "func.grad": ("gradient", "gradcheck"),
    "func.vjp": ("gradient", "func.grad", "gradcheck"),
    "func.jvp": ("forward AD",),
    "func.jacrev": ("gradient", "func.grad", "vmap", "gradcheck"),
    "func.jacfwd": ("forward AD", "func.jvp", "vmap"),
    "func.hessian": ("gradient", "second derivative", "func.jacrev", "func.jacfwd", "gradgradcheck"),
    "forward over forward": (
        "forward AD",
        "func.jvp",
        "func.jacfwd",
        "gradient",
        "second derivative",
        "large",
        "func.hessian",
    ),
    "vmap(grad)": ("gradient", "vmap", "func.grad", "gradcheck"),
    "opcheck": ("ops functional", "inputs unmutated", "fake kernel"),
    "meta device": ("fake kernel",),
    "compile": ("fake kernel", "compiled composition", "ops functional"),
    "compiled composition": ("fake kernel",),
    "compile dynamic": _TRACED,
    "compile(grad)": ("func.grad", *_TRACED),
    "compile(vmap(grad))": ("func.grad", "vmap(grad)", "vmap", *_TRACED, "compile(grad)"),
    "compile(jvp)": ("forward AD", "func.jvp", *_TRACED),
    "export": (*_TRACED, "compile dynamic"),
    "AOTInductor": (*_TRACED, "export"),
    "modules": ("value",),
    "apply": ("func.grad", *_TRACED),
    "sharding": ("value", "gradient"),
}


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix. ``detail`` is a passing cell's remark, the failure, or the reason.

    ``status`` is "pass", "fail", "not applicable", or "not checked" if the samples don't reach the check.

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
    """The cells of one or several ops; ``ok`` is true if none of them failed or was left unchecked.

    Example:
        >>> import torch
        >>> from custom_ops.verify import verify
        >>> x = torch.ones(3, dtype=torch.float64, requires_grad=True)
        >>> report = verify(torch.sin, [(x,)], name="sine", only=["vmap", "modules"])
        >>> report.ok, report["modules"].detail
        (True, 'no module')
        >>> print(report.summary)
        1 pass, 0 fail, 1 not applicable, 0 of 2 not checked
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
        """Return whether no cell failed, and none was left unchecked without a declaration."""
        return not self.failures and not self.unchecked

    @property
    def failures(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.status == FAIL]

    @property
    def unchecked(self) -> list[Cell]:
        """Return the cells whose check the samples don't reach."""
        return [cell for cell in self.cells if cell.status == NOT_CHECKED]

    @property
    def causes(self) -> list[tuple[Cell, list[Cell]]]:
        """Return the failures that no other one explains, each with the failures that probably follow from it."""
        failed = {(cell.column, cell.capability): cell for cell in self.failures}

        def cause(cell: Cell) -> Cell:
            for row in CAUSES.get(cell.capability, ()):
                if (cell.column, row) in failed:
                    return cause(failed[cell.column, row])
            return cell

        roots: dict[tuple[str, str], Cell] = {}  # a row that raises the very error of a root follows from it, too
        for cell in self.failures:
            if cause(cell) is cell:
                roots.setdefault((cell.column, cell.detail), cell)
        groups: dict[tuple[str, str], tuple[Cell, list[Cell]]] = {}
        for cell in self.failures:
            root = roots.get((cell.column, cell.detail)) or cause(cell)
            key = root.column, root.detail
            root, followers = groups.setdefault(key, (roots[key], []))
            if cell is not root:
                followers.append(cell)
        return list(groups.values())

    @property
    def summary(self) -> str:
        """Return the number of cells of each status, in one line."""
        count = {status: sum(cell.status == status for cell in self.cells) for status in _MARKS}
        causes = len(self.causes)
        by = f" by {causes} likely cause{'s' * (causes > 1)}" if 0 < causes < count[FAIL] else ""
        return (
            f"{count[PASS]} pass, {count[FAIL]} fail{by}, {count[NOT_APPLICABLE]} not applicable, "
            f"{count[NOT_CHECKED]} of {len(self.cells)} not checked"
        )

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
        """Raise ``AssertionError`` with every failure's detail, causes first, or with what isn't checked."""
        if not self.ok:
            raise AssertionError("\n".join(self.lines()))

    def lines(self) -> Iterator[str]:
        """Yield each cause with the failures that follow from it, then the unchecked cells by reason."""
        for cell, followers in self.causes:
            yield f"{cell.column}, {cell.capability}: {cell.detail}"
            if followers:
                yield f"  likely for that reason also: {', '.join(other.capability for other in followers)}"
        yield from self.reasons(NOT_CHECKED)

    def reasons(self, status: str) -> Iterator[str]:
        """Yield each reason of the cells of this status once, with all its rows."""
        rows: dict[tuple[str, str], list[str]] = {}
        for cell in self.cells:
            if cell.status == status:
                rows.setdefault((cell.column, cell.detail), []).append(cell.capability)
        for (column, reason), names in rows.items():
            yield f"{column}, {status}: {', '.join(names)}: {reason}"

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

    def to_junit(self) -> str:
        """Return the cells as test cases in JUnit's XML: unchecked ones have failed, inapplicable ones are skipped."""
        suites = ElementTree.Element("testsuites")
        for column in self.columns:
            cells = [cell for cell in self.cells if cell.column == column]
            count = {status: sum(cell.status == status for cell in cells) for status in _MARKS}
            suite = ElementTree.SubElement(suites, "testsuite", name=column, tests=str(len(cells)))
            suite.set("failures", str(count[FAIL] + count[NOT_CHECKED]))
            suite.set("skipped", str(count[NOT_APPLICABLE]))
            suite.set("time", f"{sum(cell.seconds for cell in cells):.3f}")
            for cell in cells:
                case = ElementTree.SubElement(
                    suite, "testcase", classname=column, name=cell.capability, time=f"{cell.seconds:.3f}"
                )
                if cell.status in (FAIL, NOT_CHECKED):
                    first = _printable(cell.detail).splitlines() or [""]
                    message = first[0] if cell.status == FAIL else f"not checked: {first[0]}"
                    ElementTree.SubElement(case, "failure", message=message).text = _printable(cell.detail)
                elif cell.status == NOT_APPLICABLE:
                    ElementTree.SubElement(case, "skipped", message=_printable(cell.detail))
        ElementTree.indent(suites)
        return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"

    def to_html(self) -> str:
        """Return an HTML page: first the causes, then the table, whose cells show their remarks and reasons."""
        import torch

        from custom_ops import __version__
        from custom_ops.verify._run import capabilities

        meanings = capabilities()
        causes = "".join(
            f"<details open><summary><b>{escape(cell.capability)}</b> of {escape(cell.column)}"
            + (f", and likely for that reason {', '.join(escape(c.capability) for c in others)}" if others else "")
            + f"</summary><pre>{escape(cell.detail)}</pre></details>"
            for cell, others in self.causes
        )
        unchecked = "".join(f"<p class='not-checked'>{escape(line)}</p>" for line in self.reasons(NOT_CHECKED))
        head = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
        body = "".join(
            f"<tr><th>{escape(row)}<small>{escape(meanings.get(row, ''))}</small></th>"
            + "".join(_html_cell(cells.get(column)) for column in self.columns)
            + "</tr>"
            for row, cells in self.rows.items()
        )
        state = "pass" if self.ok else "fail"
        return (
            "<!doctype html><html lang='en'><meta charset='utf-8'>"
            "<meta name='viewport' content='width=device-width, initial-scale=1'>"
            f"<title>{escape(', '.join(self.columns))}: {self.summary}</title><style>{_STYLE}</style>"
            f"<h1>What composes, and what doesn't</h1><p class='{state}'>{self.summary}</p>"
            f"<p><small>torch {torch.__version__}, custom_ops {__version__}</small></p>{causes}{unchecked}"
            f"<table><thead><tr><th>capability</th>{head}</tr></thead><tbody>{body}</tbody></table></html>\n"
        )


_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1c2430;background:#fff}
h1{font-size:1.6rem}table{border-collapse:collapse;width:100%}pre{white-space:pre-wrap;background:#f4f5f7;padding:.8rem}
th,td{padding:.3rem .7rem;border-bottom:1px solid #dde1e7;text-align:left;vertical-align:top}
small{color:#5b6675;font-weight:400}td small,th small{display:block;overflow-wrap:anywhere}details{margin:1rem 0}
tbody th{min-width:16rem;max-width:26rem}
thead th{position:sticky;top:0;background:#fff}.pass{color:#14713d}.fail,.not-checked{color:#b3261e;font-weight:600}
.not-applicable{color:#5b6675}
@media(prefers-color-scheme:dark){body,thead th{background:#14181f;color:#e4e8ee}pre{background:#1f2630}
th,td{border-color:#313a47}small,.not-applicable{color:#9aa6b5}.pass{color:#5fd38d}.fail,.not-checked{color:#ff8a80}}
"""


_LONG = 400  # characters of a detail; the causes above the table have all of theirs


def _html_cell(cell: Cell | None) -> str:
    if cell is None:
        return "<td></td>"
    name = cell.status.replace(" ", "-")
    short = cell.detail if len(cell.detail) < _LONG else f"{cell.detail[:_LONG]} …"
    detail = f"<small>{escape(short)}</small>" if short else ""
    return f"<td><span class='{name}'>{cell.mark} {cell.status}</span>{detail}</td>"


def _printable(text: str) -> str:
    """Return the text without the characters that XML can't hold."""
    return "".join(c for c in text if c in "\n\t" or c.isprintable())
