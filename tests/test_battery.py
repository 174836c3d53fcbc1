"""The whole capability matrix: every registered op, on every backend this machine has.

One test per cell, so that a failure names op, backend and capability. CUSTOM_OPS_FULL=1 takes the full matrix
(Inductor throughout, AOTInductor), otherwise the quick one. With CUSTOM_OPS_CELLS=FILE each cell is added to that
file as a line of JSON (`make docs`).
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import pytest
import torch

import custom_ops  # noqa: F401 (registers the ops)
from custom_ops.registry import REGISTRY
from custom_ops.verify import capabilities
from custom_ops.verify._case import CAPABILITIES
from custom_ops.verify._run import run

QUICK = not os.environ.get("CUSTOM_OPS_FULL")
CELLS = os.environ.get("CUSTOM_OPS_CELLS")


@functools.lru_cache(maxsize=1)  # the cells of a column come one after another
def kept(op: str, backend: str) -> dict[Any, Any]:
    """What one cell leaves to the next ones of its column."""
    return {}


@pytest.mark.parametrize("capability", capabilities(QUICK))
@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("op", REGISTRY)
def test_cell(op: str, backend: str, capability: str) -> None:
    report = run(REGISTRY[op], backend, QUICK, [CAPABILITIES[capability]], kept(op, backend))
    if CELLS:
        with open(CELLS, "a") as file:
            file.writelines(json.dumps(asdict(cell)) + "\n" for cell in report.cells)
    report.raise_on_failure()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("op", REGISTRY)
def test_on_cuda(op: str) -> None:
    """In a process of its own: Triton's interpreter, on in this one, keeps kernels off the GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "custom_ops", "verify", "--backend", "cuda", "--op", op, "--json"]
    done = subprocess.run(
        [*command, *(["--quick"] if QUICK else [])], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout, done.stderr
    cells = json.loads(done.stdout)["cells"]
    failures = {cell["capability"]: cell["detail"] for cell in cells if cell["status"] == "fail"}
    assert not failures
    assert done.returncode == 0
