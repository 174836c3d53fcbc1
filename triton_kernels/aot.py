"""``python -m custom_ops.triton_kernels.aot [PART OF A NAME]``: compile every kernel ahead of time, without a GPU.

It prints the registers and memory of each kernel, the instructions of its innermost loop, and the time that its
compilation took. It exits with 1 if a kernel spills, uses local memory, loads less than 16 bytes at a time without a
reason, or has more instructions in its innermost loop than its budget, or shuffles or barriers there.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import custom_ops.triton_kernels as package
from custom_ops.triton_kernels.common import ACCESS, KERNELS, Kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MAIN = "sm_90"  # every variant is compiled for this target, which `occupancy` describes


@dataclass(frozen=True)
class Resources:
    """The resources of one thread and one program of a compiled kernel."""

    registers: int
    spilled: int  # registers; NVIDIA's tools report a spill as local memory
    local: int  # bytes per thread
    shared: int  # bytes per program
    load: int = 0  # bytes of the widest access of one thread to global memory
    store: int = 0
    loop: int = 0  # instructions of the longest innermost loop in NVIDIA's machine code
    waits: int = 0  # instructions among them that wait for other threads


@dataclass(frozen=True)
class Report:
    kernel: str
    dtype: str
    variant: str
    target: str
    warps: int
    resources: Resources
    seconds: float = 0.0  # CPU time of the compilation, 0 if Triton's cache had the kernel
    wide: bool = False  # it must load 16 bytes at a time
    budget: int = 0  # the instructions that its innermost loop may have, if that is limited

    @property
    def spills(self) -> bool:
        return bool(self.resources.spilled or self.resources.local)

    @property
    def narrow(self) -> bool:
        return self.wide and self.resources.load < ACCESS

    @property
    def slow(self) -> bool:
        return bool(self.budget and (self.resources.loop > self.budget or self.resources.waits))

    @property
    def ok(self) -> bool:
        return not self.spills and not self.narrow and not self.slow

    def __str__(self) -> str:
        r, name = self.resources, f"{self.kernel}[{self.dtype}] {self.variant}"
        verdict = "" if self.ok else "  SPILLS" if self.spills else "  NARROW" if self.narrow else "  OVER BUDGET"
        numbers = f"{r.registers:9} {r.spilled:7} {r.local:5} {r.shared:6} {r.loop:5} {self.seconds:7.2f}"
        return f"{self.target:7} {name:76} {numbers}{verdict}"


HEADING = f"{'target':7} {'kernel':76} registers spilled local shared  loop seconds"


def parse_cuobjdump(text: str) -> Resources:
    """Return the resources in the output of ``cuobjdump --dump-resource-usage`` for one kernel."""
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return Resources(found["REG"], 0, found["STACK"] + found["LOCAL"], found["SHARED"])


def parse_amdgcn(text: str) -> Resources:
    """Return the resources in the metadata at the end of the AMD assembly of one kernel."""
    found = {name: int(value) for name, value in re.findall(r"^\s*\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
    spilled = found["vgpr_spill_count"] + found["sgpr_spill_count"]
    return Resources(
        found["vgpr_count"],
        spilled,
        found["private_segment_fixed_size"],
        found["group_segment_fixed_size"],
        widest_of_amd(text, "load"),
        widest_of_amd(text, "store"),
    )


_WAITS = ("SHFL", "BAR", "WARPSYNC", "REDUX", "VOTE")


def innermost_loop(sass: str) -> tuple[int, int]:
    """Return the number of instructions in the longest loop without another one inside, and of those that wait."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", sass)
    place = {int(address, 16): i for i, (address, _, _) in enumerate(found)}
    loops = []
    for end, (_, name, operands) in enumerate(found):
        target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        begin = place.get(int(target[1], 16), end) if target else end
        # A span with an exit is no loop: it lies out of line and jumps back.
        if begin < end and not any(name.startswith("EXIT") for _, name, _ in found[begin:end]):
            loops.append((begin, end))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    begin, end = max(inner, key=lambda loop: loop[1] - loop[0], default=(0, -1))
    return end + 1 - begin, sum(name.split(".")[0] in _WAITS for _, name, _ in found[begin : end + 1])


def widest(ptx: str, instruction: str) -> int:
    """Return the bytes of the widest of these instructions on global memory, ld or st, in NVIDIA's PTX."""
    found = re.findall(rf"\b{instruction}\.global(?:\.[\w:]+?)*?(?:\.v(\d))?\.[a-z]+(\d+)\b", ptx)
    return max((int(count or 1) * int(bits) // 8 for count, bits in found), default=0)


def widest_of_amd(assembly: str, instruction: str) -> int:
    """Return the bytes of the widest of these instructions, load or store, in AMD's assembly."""
    found = re.findall(rf"\b(?:global|buffer|flat)_{instruction}_[us]?(byte|short|dword)(?:x(\d))?", assembly)
    return max(({"byte": 1, "short": 2, "dword": 4}[unit] * int(count or 1) for unit, count in found), default=0)


def kernels() -> list[Kernel]:
    """Return every kernel of the package."""
    for module in pkgutil.iter_modules(package.__path__):
        if module.name != "aot":
            importlib.import_module(f"{package.__name__}.{module.name}")
    return KERNELS


def sources(kernel: Kernel) -> Iterator[tuple[str, str, ASTSource]]:
    """Yield the source that ``kernel`` is compiled from, for each dtype and variant."""
    params = kernel.fn.params
    for dtype in kernel.dtypes:
        accumulator = "fp64" if dtype == "fp64" else "fp32"
        types = [a.replace("T", dtype).replace("A", accumulator) for a in kernel.arguments]
        for variant in kernel.variants.values():
            names = kernel.fn.arg_names
            assert set(names[len(types) :]) == set(variant), f"{kernel.name}: {names} against {types}, {variant}"
            signature = dict(zip(names, types)) | dict.fromkeys(variant, "constexpr")
            # Tensors and sizes are declared aligned, which gives the widest accesses and the most registers.
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
        usage, sass = (
            subprocess.run(
                [triton.knobs.nvidia.cuobjdump.path, option, file.name], check=True, capture_output=True, text=True
            ).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    ptx, (loop, waits) = compiled.asm["ptx"], innermost_loop(sass)
    return replace(parse_cuobjdump(usage), load=widest(ptx, "ld"), store=widest(ptx, "st"), loop=loop, waits=waits)


def compile_one(kernel: Kernel, target: str, dtype: str, variant: str, source: ASTSource) -> Report:
    begin = _core_seconds()
    options = kernel.options(dtype, TARGETS[target].warp_size)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    seconds = _core_seconds() - begin
    found, wide = resources(compiled), not kernel.narrow
    budget = kernel.budget if dtype == "fp32" and target == MAIN else 0
    return Report(kernel.name, dtype, variant, target, options["num_warps"], found, seconds, wide, budget)


def _core_seconds() -> float:
    """Return the CPU time of this process and of its finished children, such as the assembler."""
    return sum(os.times()[:4])


def compile_kernel(index: int, quick: bool) -> list[Report]:
    kernel = kernels()[index]
    dtypes = (kernel.dtypes[-(index % 2)],) if quick else kernel.dtypes
    chosen = [found for found in sources(kernel) if found[0] in dtypes]
    others = [target for target in TARGETS if target != MAIN]
    if quick:
        turn = index % (3 * len(others))
        chosen, others = [chosen[index % len(chosen)]], others[turn : turn + 1]
    return [compile_one(kernel, target, *source) for target in (MAIN, *others) for source in chosen]


def compile_all(name: str = "", quick: bool = False) -> list[Report]:
    """Compile every kernel whose name contains ``name``, in as many processes as there are cores.

    ``quick`` compiles one variant for one dtype, in turn the first and the last, for sm_90, and every third of these
    for one other target, in turn too. Raises ``RuntimeError`` if Triton interprets instead of compiling.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("custom_ops.triton_kernels.aot: unset TRITON_INTERPRET, under it nothing is compiled")
    chosen = [index for index, kernel in enumerate(kernels()) if name in kernel.name]
    if not chosen:
        raise ValueError(f"name: no kernel's name contains {name!r}")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return [report for reports in pool.map(partial(compile_kernel, quick=quick), chosen) for report in reports]


def occupancy(report: Report) -> float:
    """Return the share of an sm_90 multiprocessor's 64 warps that fit into 64 K registers, 227 KiB and 32 programs."""
    of_warp = -(-report.resources.registers * 32 // 256) * 256  # registers are allocated in units of 256
    by_registers = 4 * (65536 // 4 // of_warp) // report.warps  # each quarter of a multiprocessor has its own registers
    by_shared = 227 * 1024 // (report.resources.shared + 1024)
    return min(32, by_registers, by_shared, 64 // report.warps) * report.warps / 64


def show(reports: list[Report]) -> int:
    """Print the reports and return the exit status, which is 1 if one of them isn't ok."""
    print(HEADING, *reports, sep="\n")
    spilling, slowest = sum(report.spills for report in reports), max(report.seconds for report in reports)
    print(f"{len(reports)} compiled, {spilling} with spills or local memory, in {slowest:.1f} s each or less")
    return 0 if all(report.ok for report in reports) else 1


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m custom_ops.triton_kernels.aot", description=__doc__)
    parser.add_argument("name", nargs="?", default="", help="only kernels with this in their name")
    parser.add_argument(
        "--quick", action="store_true", help="one variant of one dtype of each kernel, for sm_90 and some for others"
    )
    options = parser.parse_args(argv)
    return show(compile_all(options.name, options.quick))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
