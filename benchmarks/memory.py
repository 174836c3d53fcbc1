"""The peak extra memory of a call: the most that torch's allocator has handed out and not got back.

On the CPU the profiler records each allocation and release, so the number is exact and the same on every run. It
doesn't see memory that bypasses the allocator (scratch of a C++ kernel, NumPy arrays).
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    run()  # allocates what is kept between calls, which isn't counted
    return _peak_on_cuda(run, device) if device.type == "cuda" else _peak_on_cpu(run)


def _peak_on_cuda(run: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(run: Callable[[], Any]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler prints two lines to stderr otherwise
    collecting = gc.isenabled()
    gc.disable()  # the collector would free unrelated tensors during the profile
    try:
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            run()
    finally:
        if collecting:
            gc.enable()
    results: Any = profile.kineto_results
    assert results is not None
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    peak = now = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak
