"""Interleaved timing: the contenders take turns within one process, medians are compared.

Each turn begins with an untimed call, so that every contender meets its own caches and heap and not
what the one before it left there.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def interleave(contenders: dict[str, Callable[[], Any]], seconds: float, rounds: int = 7) -> dict[str, list[float]]:
    """Seconds of each call, taking turns for about ``seconds`` in all but at least ``rounds`` times.

    A few rounds come before, untimed: on a virtual machine the first use of memory costs many times
    what all later uses do.
    """
    for run in [*contenders.values()] * 3:
        run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    start = time.perf_counter()
    while len(times[names[0]]) < rounds or time.perf_counter() - start < seconds:
        for name in names:
            contenders[name]()
            synchronise()
            begin = time.perf_counter()
            result = contenders[name]()
            synchronise()
            times[name].append(time.perf_counter() - begin)
            del result  # its memory goes back before the next call
        names.append(names.pop(0))
    return times


def per_call(run: Callable[[], Any], calls: int) -> Callable[[], None]:
    """``run`` repeated: for calls too short to be timed singly."""

    def repeated() -> None:
        for _ in range(calls):
            run()

    return repeated


def median(values: list[float]) -> float:
    return statistics.median(values)


def spread(values: list[float]) -> float:
    """The interquartile range over the median."""
    quartiles = statistics.quantiles(values, n=4)
    return (quartiles[2] - quartiles[0]) / median(values)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> dict[str, Any]:
    """Versions and hardware, for every result file."""
    info = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu": _cpu_name(),
        "isa": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        import triton

        info |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "triton": triton.__version__}
    return info


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
