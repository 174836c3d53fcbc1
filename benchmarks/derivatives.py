"""``python -m benchmarks.derivatives``: run the battery over public functions, and say where derivatives are wrong.

Each function has small samples in float64. It is compared with a reference in plain PyTorch where there is one, and
otherwise with finite differences and its own reverse mode. A row of the battery that fails has either raised an
error or returned wrong numbers without one. The page lists the wrong numbers only if lines of plain PyTorch, which
don't use the battery, show them too in the same run. ``--write PAGE`` writes the page, and ``--only WORD`` selects
functions.
"""

from __future__ import annotations

import argparse
import importlib
import io
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.public_functions import CONFIRMATIONS, PUBLIC, Public
from custom_ops.registry import OpInfo
from custom_ops.verify import Cell, Report, script, verify

ROWS = (
    "value",
    "gradient",
    "gradcheck",
    "second derivative",
    "gradgradcheck",
    "forward AD",
    "batched grad",
    "func.grad",
    "func.jvp",
    "func.hessian",
    "forward over forward",
    "vmap",
    "vmap(grad)",
)
COMPILED = "compile"  # torch's own functions don't run this row, since torch.compile is tested with them
WRONG, ROUNDED, SLOW, RAISED = "silently wrong", "float32 accuracy", "loops under vmap", "raises"
FLOAT32 = 1e-4  # a relative difference that rounding to float32 explains

HEAD = """# Silent gradients

Written by `python -m benchmarks.derivatives --write docs/silent_gradients.md`, which runs rows of
[the battery](verification.md) over public functions of PyTorch and of packages that extend it, on a CPU and with small
float64 inputs. A row that fails has either *raised* an error, which tells the user that the derivative isn't there, or
returned wrong numbers *silently*. The page is about the latter. Each of them is shown by lines of plain PyTorch, which
were run for this page and don't use the battery; what they print follows them. Most of these functions are meant for
first-order training in reverse mode, where they are right; a package may document that it supports no more.

Rows: {rows}; for functions outside PyTorch also {compiled}.
"""


@dataclass
class Finding:
    """The result of the battery for one function; the failed rows are sorted by how they failed."""

    public: Public
    release: str
    report: Report
    failed: dict[str, list[Cell]] = field(default_factory=dict)
    shown: tuple[str, str] | None = None  # the confirming lines, and what they print
    program: str = ""

    @property
    def silent(self) -> bool:
        return bool(self.failed.get(WRONG))


def kind(cell: Cell) -> str:
    """Return how the cell failed: by a wrong number, rounding to float32, vmap's slow loop or an error."""
    if "vmap fallback" in cell.detail:
        return SLOW
    raised = re.search(r"\(at \S+, line \d+ of [^)]*\)$", cell.detail)
    if raised and not re.match(r"GradcheckError: .*mismatch", cell.detail):
        return RAISED
    if "no output does" in cell.detail:
        return RAISED  # backward raises for an output that doesn't require grad
    relative = re.search(r"relative difference: (\S+)", cell.detail)
    if "float32, expected float64" in cell.detail:
        return ROUNDED
    return ROUNDED if relative and float(relative[1]) < FLOAT32 else WRONG


def examine(public: Public, function: Callable[..., Any], rows: Sequence[str]) -> Finding:
    samples = public.samples()
    options = {"reference": public.reference, "not_comparable": public.not_comparable, "name": public.path}
    check = partial(verify, function, dtypes=[torch.float64], quick=True, **options)
    finding = Finding(public, version(public.package), check(samples, only=rows))
    for cell in finding.report.failures:
        finding.failed.setdefault(kind(cell), []).append(cell)
    if finding.silent:
        wrong = [cell.capability for cell in finding.failed[WRONG]]
        first = wrong[:1]
        failing = [s for s in samples if any(kind(c) == WRONG for c in check([s], only=first).failures)]
        smallest = min(failing or samples, key=lambda s: sum(a.numel() for a in s.args if isinstance(a, Tensor)))
        info = OpInfo(public.path, function, public.reference, lambda device, dtype: [smallest], "")
        finding.program = script(info, smallest, first)
        finding.shown = confirm(public.path)
    return finding


def confirm(path: str) -> tuple[str, str] | None:
    """Run the lines of plain PyTorch on a function, and return them with what they print if they show the fault.

    The lines leave the function's numbers in ``got`` and the right ones in ``right``.
    """
    if path not in CONFIRMATIONS:
        return None
    lines = CONFIRMATIONS[path].strip("\n")
    names: dict[str, Any] = {}
    with redirect_stdout(io.StringIO()) as printed:
        try:
            exec(compile(lines, path, "exec"), names)
        except Exception as error:  # this version raises where another one is silently wrong
            print(f"{path}: the confirming lines raise {type(error).__name__}: {error}", file=sys.stderr)
            return None
    got, right = names["got"].double(), names["right"].double()
    if got.shape == right.shape and torch.allclose(got, right, rtol=1e-4, atol=1e-8):
        return None
    return lines, printed.getvalue().rstrip()


def find(path: str) -> Callable[..., Any] | None:
    """Return the function of that dotted name, or None if its package isn't installed."""
    parts = path.split(".")
    for i in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:i]))
        except ImportError:
            continue
        for part in parts[i:]:
            found = getattr(found, part, None)
        return found  # type: ignore[no-any-return]
    return None


def page(findings: Sequence[Finding], missing: Sequence[str]) -> str:
    """Return the page: what is silently wrong, with evidence, then all functions, then those that didn't run."""
    releases = dict.fromkeys(f"{f.public.package} {f.release}" for f in findings)
    blocks = [HEAD.format(rows=", ".join(ROWS), compiled=COMPILED), f"Versions: {', '.join(releases)}."]
    silent = [f for f in findings if f.shown]
    blocks.append(f"## Silently wrong: {len(silent)} of {len(findings)} functions")
    for f in silent:
        assert f.shown is not None
        blocks += [
            f"### {f.public.path}",
            f"{f.public.package} {f.release}. Wrong without an error: {_names(f, WRONG)}. "
            f"Raises: {_names(f, RAISED)}. {f.public.remark}".rstrip(),
            f"```py\n{f.shown[0]}\n```",
            f"```text\n{f.shown[1]}\n```",
            f"The same by the battery:\n\n```py\n{f.program.rstrip()}\n```",
        ]
    blocks.append("## All functions")
    lines = [f"| function | | passes | {RAISED} | {SLOW} | {ROUNDED} | {WRONG} |", "|---|---|--:|---|---|---|---|"]
    for f in findings:
        passes = sum(cell.status == "pass" for cell in f.report.cells)
        wrong = _names(f, WRONG) + " (not confirmed)" * (f.silent and f.shown is None)
        cells = [f"`{f.public.path}`", f"{f.public.package} {f.release}", str(passes)]
        cells += [*(_names(f, how) for how in (RAISED, SLOW, ROUNDED)), wrong]
        lines.append(f"| {' | '.join(cells)} |")
    blocks.append("\n".join(lines))
    if missing:
        names = ", ".join(f"`{path}`" for path in missing)
        blocks.append(f"Not installed, or lacking a package that they need: {names}.")
    return "\n\n".join(blocks) + "\n"


def _names(finding: Finding, how: str) -> str:
    return ", ".join(cell.capability for cell in finding.failed.get(how, [])) or "–"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="functions with a word in their name")
    parser.add_argument("--rows", nargs="+", metavar="CAPABILITY", help="other rows of the battery")
    parser.add_argument("--write", type=Path, metavar="PAGE")
    options = parser.parse_args(argv)
    findings, missing = [], []
    for public in PUBLIC:
        if not any(word in public.path for word in options.only):
            continue
        function = find(public.path)
        if function is None:
            missing.append(public.path)
            print(f"{public.path}: not installed", flush=True)
            continue
        rows = options.rows or [*ROWS, *([] if public.package == "torch" else [COMPILED])]
        finding = examine(public, function, rows)
        lacking = next((c.detail for c in finding.report.failures if "No module named" in c.detail), None)
        if lacking:  # this is the fault of the installation, not of the function
            missing.append(public.path)
            print(f"{public.path}: {lacking.splitlines()[0]}", flush=True)
            continue
        findings.append(finding)
        failed = "; ".join(f"{how}: {_names(finding, how)}" for how in finding.failed)
        print(f"{public.path}: {failed or 'passes'}{' (confirmed)' * bool(finding.shown)}", flush=True)
    if options.write:
        options.write.write_text(page(findings, missing))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
