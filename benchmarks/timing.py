"""Interleaved timing: the contenders take turns within one process, and their medians are compared.

Each turn begins with an untimed call, so that every contender meets its own caches and heap rather than those of the
contender before it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


def clock() -> float:
    """Return the time in seconds. The whole harness calls this function, so a test can replace the clock."""
    return time.perf_counter()


@dataclass(frozen=True)
class Call:
    """The timed call ``run(prepare())``; ``prepare`` isn't timed."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None

    def __call__(self) -> Any:
        return self.run(self.prepare())


def seconds_of(call: Call, device: torch.device) -> float:
    """Time one call: with the clock on the CPU, between two events on the stream of a CUDA device.

    The events don't include the time that the host takes to launch the call's kernels, since the device is kept busy
    until all of them are queued. A call that waits for the device is the exception: its time includes the host's.
    """
    state = call.prepare()
    if device.type == "cuda":
        return _seconds_on_cuda(call, state, device)
    begin = clock()
    result = call.run(state)
    elapsed = clock() - begin
    del result, state  # frees the memory, untimed, before the next call
    return elapsed


HEAD_START = 0.001  # seconds for which the device is busy at first while the host queues a call
_LONGEST = 0.1
_CYCLES = 2e9  # a GPU's clock cycles per second, roughly


def _seconds_on_cuda(call: Call, state: Any, device: torch.device) -> float:
    ahead = HEAD_START
    while True:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        torch.cuda._sleep(int(ahead * _CYCLES))
        start.record()
        result = call.run(state)
        end.record()
        queued = not start.query()
        end.synchronize()
        del result
        if queued or ahead >= _LONGEST:
            return float(start.elapsed_time(end)) / 1e3
        ahead *= 4
        state = call.prepare()


def host_seconds_of(call: Call, device: torch.device) -> float:
    """Time the host alone: how long it takes until the call's kernels are queued."""
    state = call.prepare()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = clock()
    result = call.run(state)
    elapsed = clock() - begin
    del result, state
    return elapsed


def interleave(
    contenders: dict[str, Call], seconds: float, device: torch.device, rounds: int = 7, warm_ups: int = 3
) -> dict[str, list[float]]:
    """Time the contenders in turns, for about ``seconds`` in total and for at least ``rounds`` turns.

    A few untimed rounds come first: on a virtual machine the first use of memory costs many times as much as any later
    use.
    """
    for call in [*contenders.values()] * warm_ups:
        call()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    start = clock()
    while len(times[names[0]]) < rounds or clock() - start < seconds:
        for name in names:
            contenders[name]()
            times[name].append(seconds_of(contenders[name], device))
        names.append(names.pop(0))
    return times


def median(values: list[float]) -> float:
    return statistics.median(values)


def spread(values: list[float]) -> float:
    """Return the interquartile range over the median."""
    quartiles = statistics.quantiles(values, n=4)
    return (quartiles[2] - quartiles[0]) / median(values)
