"""The capability matrix: every registered op on every backend of this machine.

Each cell is one test, so a failure names op, backend and capability. `make test` takes the quick matrix, `make
test-full` the full one (Inductor throughout, AOTInductor). Triton cells that depend on no kernel take the quick form
there as well, and `make test` takes one in sixteen of them, and one in four of some others: see `one_in`. With
CUSTOM_OPS_CELLS=FILE every cell of the quick matrix is appended to that file as a line of JSON, for `make docs`.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch

import custom_ops  # noqa: F401 (registers the ops)
from custom_ops.registry import FUNCTIONS, REGISTRY
from custom_ops.verify._case import CAPABILITIES, Capability
from custom_ops.verify._run import run

CELLS = os.environ.get("CUSTOM_OPS_CELLS")

# Rows in which an op goes through machinery that all ops share: torch's compiler and transforms, other processes and
# threads, the rules for batches, layouts and memory.
SHARED = {
    "cpp": {
        "compile",
        "compile dynamic",
        "compiled composition",
        "compile(grad)",
        "compile(vmap(grad))",
        "compile(jvp)",
        "deterministic",
        "export",
        "forward over forward",
        "func.hessian",
        "gradient layouts",
        "inputs unmutated",
        "opcheck",
        "sharding",
        "threads",
        "vmap",
    },
    "triton": {
        "fake kernel",
        "gradient layouts",
        "input layouts",
        "inputs unmutated",
        "no uninitialised memory",
        "ops functional",
        "outputs own memory",
        "vmap",
        "vmap(grad)",
    },
}


@functools.lru_cache(maxsize=2)  # the tests of one op and backend run in a row
def kept(op: str, backend: str, quick: bool) -> dict[Any, Any]:
    """Return what the cells of one op and backend share."""
    return {}


def on_any_kernel(backend: str, row: Capability) -> bool:
    """Return whether no Triton kernel can fail the cell if the C++ kernel passes it."""
    # Triton's interpreter has one thread, so no other order of its sums.
    return backend == "triton" and (row.of_dispatch or row.name == "deterministic")


def one_in(backend: str, row: Capability) -> int:
    """Return for how many ops `make test` runs one such cell; consecutive ops reach every row."""
    return 16 if on_any_kernel(backend, row) else 4 if row.name in SHARED[backend] else 1


def cells() -> Iterator[Any]:
    """Yield all cells, and of the variants those that their op's cells leave out.

    These, and the cells that `one_in` leaves out, are left to `make test-full`.
    """
    places = {op: place for place, op in enumerate(REGISTRY)}
    for op in FUNCTIONS:
        for backend in ("cpp", "triton"):
            for number, row in enumerate(CAPABILITIES.values()):
                if (backend == "triton" and row.full_only) or (op not in REGISTRY and (row.of_variants or CELLS)):
                    continue
                left_out = (places.get(op, 0) + number) % one_in(backend, row) and not CELLS
                marks = [pytest.mark.full] if row.full_only or left_out or op not in REGISTRY else []
                yield pytest.param(op, backend, row.name, marks=marks)


@pytest.mark.parametrize(("op", "backend", "capability"), list(cells()))
def test_cell(op: str, backend: str, capability: str, full: bool) -> None:
    row = CAPABILITIES[capability]
    quick = not full or on_any_kernel(backend, row)
    report = run(FUNCTIONS[op], backend, quick, [row], kept(op, backend, quick))
    if CELLS:
        with open(CELLS, "a") as file:
            file.writelines(json.dumps(asdict(cell)) + "\n" for cell in report.cells)
    report.raise_on_failure()


def test_every_row_is_reached_on_both_backends() -> None:
    """Every quick row is reached on both backends even without `--full`, and the shared rows are rows."""
    assert {name for names in SHARED.values() for name in names} <= CAPABILITIES.keys()
    reached = {(backend, row) for _, backend, row in (cell.values for cell in cells() if not cell.marks)}
    quick = [row.name for row in CAPABILITIES.values() if not row.full_only]
    assert reached == {(backend, row) for backend in ("cpp", "triton") for row in quick}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("op", FUNCTIONS)
def test_on_cuda(op: str, full: bool) -> None:
    """The op passes on CUDA in a process without Triton's interpreter, which would keep kernels off the GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "custom_ops", "verify", "--backend", "cuda", "--op", op, "--json"]
    done = subprocess.run(
        [*command, *([] if full else ["--quick"])], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout, done.stderr
    failures = {
        cell["capability"]: cell["detail"] for cell in json.loads(done.stdout)["cells"] if cell["status"] == "fail"
    }
    assert not failures
    assert done.returncode == 0
