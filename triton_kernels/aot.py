"""Compile every kernel ahead of time, without a GPU: ``python -m custom_ops.triton_kernels.aot [PART OF A NAME]``.

Prints the registers and memory of each and exits with 1 if one spills or uses local memory.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import custom_ops.triton_kernels as package
from custom_ops.triton_kernels.common import KERNELS, Kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Resources:
    """What one thread and one program of a compiled kernel take."""

    registers: int
    spilled: int  # registers; NVIDIA's tools report a spill as local memory
    local: int  # bytes per thread
    shared: int  # bytes per program


@dataclass(frozen=True)
class Report:
    kernel: str
    dtype: str
    variant: str
    target: str
    resources: Resources

    @property
    def ok(self) -> bool:
        return not (self.resources.spilled or self.resources.local)

    def __str__(self) -> str:
        r, name = self.resources, f"{self.kernel}[{self.dtype}] {self.variant}"
        verdict = "" if self.ok else "  SPILLS"
        return f"{self.target:7} {name:76} {r.registers:9} {r.spilled:7} {r.local:5} {r.shared:6}{verdict}"


HEADING = f"{'target':7} {'kernel':76} registers spilled local shared"


def parse_cuobjdump(text: str) -> Resources:
    """The resources in the output of ``cuobjdump --dump-resource-usage`` for one kernel."""
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return Resources(found["REG"], 0, found["STACK"] + found["LOCAL"], found["SHARED"])


def parse_amdgcn(text: str) -> Resources:
    """The resources in the metadata at the end of the AMD assembly of one kernel."""
    found = {name: int(value) for name, value in re.findall(r"^\s*\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
    spilled = found["vgpr_spill_count"] + found["sgpr_spill_count"]
    return Resources(
        found["vgpr_count"], spilled, found["private_segment_fixed_size"], found["group_segment_fixed_size"]
    )


def kernels() -> list[Kernel]:
    """Every kernel of the package."""
    for module in pkgutil.iter_modules(package.__path__):
        if module.name != "aot":
            importlib.import_module(f"{package.__name__}.{module.name}")
    return KERNELS


def sources(kernel: Kernel) -> Iterator[tuple[str, str, ASTSource]]:
    """What ``kernel`` is compiled from, for each dtype and variant."""
    params = kernel.fn.params
    for dtype in kernel.dtypes:
        accumulator = "fp64" if dtype == "fp64" else "fp32"
        types = [a.replace("T", dtype).replace("A", accumulator) for a in kernel.arguments]
        for variant in kernel.variants.values():
            names = kernel.fn.arg_names
            assert set(names[len(types) :]) == set(variant), f"{kernel.name}: {names} against {types}, {variant}"
            signature = dict(zip(names, types)) | dict.fromkeys(variant, "constexpr")
            # As for a call with aligned tensors and sizes: the widest accesses, the most registers.
            aligned = {
                (i,): [["tt.divisibility", 16]]
                for i, t in enumerate(types)
                if t.startswith("*") or (t.startswith("i") and not params[i].do_not_specialize)
            }
            label = " ".join(f"{k}={v}" for k, v in variant.items())
            yield dtype, label, ASTSource(kernel.fn, signature, dict(variant), aligned)


def resources(compiled: Any) -> Resources:
    if "amdgcn" in compiled.asm:
        return parse_amdgcn(compiled.asm["amdgcn"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return parse_cuobjdump(text)


def compile_kernel(index: int, targets: Iterable[str]) -> list[Report]:
    kernel = kernels()[index]
    reports = []
    for target in targets:
        for dtype, variant, source in sources(kernel):
            compiled = triton.compile(source, target=TARGETS[target], options=dict(kernel.options))
            reports.append(Report(kernel.name, dtype, variant, target, resources(compiled)))
    return reports


def compile_all(targets: Iterable[str] = tuple(TARGETS), name: str = "") -> list[Report]:
    """Compile every kernel whose name contains ``name`` for every target, in as many processes as there are cores.

    Raises ``RuntimeError`` where Triton interprets instead of compiling.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("custom_ops.triton_kernels.aot: unset TRITON_INTERPRET, under it nothing is compiled")
    chosen = [index for index, kernel in enumerate(kernels()) if name in kernel.name]
    if not chosen:
        raise ValueError(f"name: no kernel's name contains {name!r}")
    tasks = [(index, [target]) for target in targets for index in chosen]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return [report for reports in pool.map(compile_kernel, *zip(*tasks)) for report in reports]


def main(name: str = "") -> int:
    reports = compile_all(name=name)
    print(HEADING, *reports, sep="\n")
    spilling = sum(not report.ok for report in reports)
    print(f"{len(reports)} compiled, {spilling} with spills or local memory")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
