"""Compiles every Triton kernel ahead of time and writes the page that shows what each takes: ``gpu_page.py FILE``.

The page has how many of each kernel's warps fit on a GPU, and how wide its accesses to memory are.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import triton

from custom_ops.triton_kernels import aot, common


def markdown(reports: Iterable[aot.Report]) -> str:
    """Return a table: for each kernel and dtype the worst of its variants on sm_90."""
    groups: dict[tuple[str, str], list[aot.Report]] = {}
    for report in reports:
        if report.target == aot.MAIN:
            groups.setdefault((report.kernel, report.dtype), []).append(report)
    lines = [
        "# The Triton kernels on paper",
        "",
        f"Written by `make docs` with Triton {triton.__version__}, of what `python -m custom_ops.triton_kernels.aot` "
        f"compiles for {', '.join(aot.TARGETS)}, none of it with a spill or local memory. Here {aot.MAIN}, of "
        "each kernel the worst of its variants: registers per thread, shared bytes per program, the share of a "
        "multiprocessor's warps that these leave room for, "
        "and the bytes of a thread's widest access to global memory in the "
        "PTX; where that is less than 16, why. Where it is 16, it is so on the other targets too, and there is room "
        "for at least half of the warps. The first launch of each variant compiles it, which takes one core less than "
        "10 seconds, and Triton's cache folder keeps it; [launches.md](launches.md) has how many an op needs.",
        "",
        "| kernel | | variants | warps | registers | shared | occupancy | load | store | |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    narrow = {kernel.name: kernel.narrow for kernel in common.KERNELS}
    for (kernel, dtype), group in groups.items():
        r = [report.resources for report in group]
        cells = [
            len(group), group[0].warps, max(x.registers for x in r), max(x.shared for x in r),
            f"{min(map(aot.occupancy, group)):.0%}", min(x.load for x in r), min(x.store for x in r),
            narrow[kernel],
        ]  # fmt: skip
        lines.append(f"| `{kernel}` | {dtype} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--quick", action="store_true", help="as that of custom_ops.triton_kernels.aot")
    options = parser.parse_args(argv)
    reports = aot.compile_all(quick=options.quick)
    options.file.write_text(markdown(reports))
    return aot.show(reports)


if __name__ == "__main__":
    raise SystemExit(main())
