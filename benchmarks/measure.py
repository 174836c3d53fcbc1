"""The measurement of one cell: an op at one size of one of its tables, beside its peers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import goals, timing
from benchmarks.answers import Answer, difference, first, in_double, tolerance
from benchmarks.floor import Floor, least_traffic
from benchmarks.memory import peak_bytes
from benchmarks.table import Benchmark, TimedOp, Unavailable
from benchmarks.timing import Call, host_seconds_of, interleave, median, seconds_of, spread
from custom_ops.registry import leaves

OURS, FLOOR = "custom_ops", goals.FLOOR

Function = Callable[..., Any]


@dataclass(frozen=True)
class Cell:
    info: TimedOp
    benchmark: Benchmark
    size: Any

    def __str__(self) -> str:
        return f"{self.info.name}, {self.benchmark.title}, {label(self.size)}"

    @property
    def ours(self) -> Function:
        return functools.partial(self.info.function, **self.benchmark.kwargs)

    @property
    def reference(self) -> Function:
        if self.info.reference is None:
            raise ValueError(f"{self.info.name}: has no reference to check its answer against")
        return functools.partial(self.info.reference, **self.benchmark.kwargs)


@dataclass(frozen=True)
class Row:
    """The measurement of one contender in one direction; None marks what doesn't apply."""

    op: str
    family: str
    table: str
    size: Any
    direction: str
    contender: str
    milliseconds: float
    spread: float  # interquartile range over median
    rounds: int
    ours_over_this: float
    floors: float  # multiples of the bandwidth floor
    bytes: int  # the least traffic of any implementation
    gigabytes_per_second: float  # the bandwidth at which those bytes were moved
    peak_bytes: int | None = None  # peak of the extra memory; None for backward alone
    target: float | None = None
    note: str = ""
    host_milliseconds: float | None = None  # on a GPU: until the call's kernels are queued


@dataclass
class Result:
    rows: list[Row] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    wrong: str = ""  # the error in our answer, in which case nothing was timed
    preparation: float = 0.0  # seconds before the timing


@dataclass(frozen=True)
class Effort:
    """How long to measure: at least ``rounds`` of each contender and ``seconds`` per direction, and ``limit`` in
    total.
    """

    seconds: float = 3.0
    rounds: int = 7
    warm_ups: int = 3
    limit: float = math.inf
    whole: bool = False  # measure forward+backward alone, if there is a backward

    def affordable(self, once: dict[str, float], left: float) -> list[str]:
        """Return the contenders that fit into ``left`` seconds, given the seconds of one call of each, ours first."""
        chosen: list[str] = []
        for name in sorted(once, key=lambda name: (name != OURS, once[name])):
            left -= once[name] * 3 * (self.warm_ups + 2 * self.rounds)
            if left < 0:
                break
            chosen.append(name)
        return chosen


class Problem:
    """The arguments of one cell and the calls that are timed on them; ``function`` serves to find the output's
    shape.
    """

    def __init__(self, cell: Cell, size: Any, device: torch.device, function: Function) -> None:
        torch.manual_seed(0)
        self.args = cell.benchmark.make(size, device)
        self.inputs = leaves(self.args)
        output = function(*self.args)
        self.grad = torch.randn_like(first(output)) if self.inputs else None
        self.traffic = (cell.benchmark.traffic or (lambda _: least_traffic(self.args, output, self.inputs)))(size)

    @property
    def directions(self) -> tuple[str, ...]:
        return ("forward",) if self.grad is None else ("forward", "backward", "forward+backward")

    def call(self, function: Function, direction: str) -> Call:
        def forward(_: None = None) -> Any:
            return function(*self.args)

        def backward(output: Any) -> Any:
            return torch.autograd.grad(first(output), self.inputs, self.grad, allow_unused=True)

        if direction == "backward":
            return Call(backward, prepare=forward)
        return Call(forward if direction == "forward" else lambda _: backward(forward()))

    def seconds(self, function: Function, device: torch.device) -> float:
        """Estimate the seconds of one call in all directions: the shorter of two, since other work may disturb
        either.
        """
        call = self.call(function, self.directions[-1])
        return min(seconds_of(call, device) for _ in range(2))

    def floor(self, direction: str, device: torch.device) -> Floor:
        passes = {"forward": self.traffic[:1], "backward": self.traffic[1:]}.get(direction, self.traffic)
        return Floor(passes, device)


def measure(cell: Cell, peers: dict[str, Function], device: torch.device, memory: str, effort: Effort) -> Result:
    """Check the answers, then time the contenders in turns in each direction."""
    begin = timing.clock()
    result = Result()
    contenders = {OURS: cell.ours} | peers
    try:
        wrong = _check(cell, contenders, device)
    except Unavailable as error:
        return Result(remarks=[f"{cell}: skipped: {str(error).splitlines()[0]}"])
    if wrong[OURS]:
        return Result(wrong=f"{cell}: {wrong[OURS]}")
    result.remarks += [f"{cell}: {name}: {what}" for name, what in wrong.items() if what]

    problem = Problem(cell, cell.size, device, cell.ours)
    if math.isfinite(effort.limit):
        once = {name: problem.seconds(contenders[name], device) for name in contenders if _runs(wrong[name])}
        chosen = effort.affordable(once, effort.limit - (timing.clock() - begin))
        if len(chosen) < len(once):
            result.remarks.append(f"{cell}: no time for {', '.join(name for name in once if name not in chosen)}")
        wrong = {name: what for name, what in wrong.items() if name in chosen}
    contenders = {name: contenders[name] for name, what in wrong.items() if _runs(what)}
    result.preparation = timing.clock() - begin
    directions = problem.directions[-1:] if effort.whole else problem.directions
    for number, direction in enumerate(directions if contenders else ()):
        left = (effort.limit - (timing.clock() - begin)) / (len(directions) - number)
        calls = {name: problem.call(function, direction) for name, function in contenders.items()}
        floor = problem.floor(direction, device)
        times = interleave(
            calls | {FLOOR: Call(floor)}, min(effort.seconds, left / 2), device, effort.rounds, effort.warm_ups
        )
        for name, values in times.items():
            host = [
                host_seconds_of(calls[name], device) for _ in range(7 if name in calls and device.type == "cuda" else 0)
            ]
            row = Row(
                op=cell.info.name,
                family=cell.info.family,
                table=cell.benchmark.title,
                size=cell.size,
                direction=direction,
                contender=name,
                milliseconds=median(values) * 1e3,
                spread=spread(values),
                rounds=len(values),
                ours_over_this=median(times[OURS]) / median(values),
                floors=median(values) / median(times[FLOOR]),
                bytes=floor.bytes,
                gigabytes_per_second=floor.bytes / median(values) / 1e9,
                peak_bytes=None if direction == "backward" or name == FLOOR else peak_bytes(calls[name], device),
                target=_target(cell, name, direction, memory),
                note=wrong.get(name, ""),
                host_milliseconds=median(host) * 1e3 if host else None,
            )
            result.rows.append(row)
    return result


def label(size: Any) -> str:
    if isinstance(size, (tuple, list)):
        return " × ".join(map(label, size))
    return f"{size:,}" if isinstance(size, int) else str(size)


def _check(cell: Cell, contenders: dict[str, Function], device: torch.device) -> dict[str, str]:
    """Return the error in each contender's answer: "" for none, a difference, or "raised ..."."""
    problem = Problem(cell, cell.benchmark.checked_at(cell.size), device, cell.reference)
    grad = problem.grad
    truth = Answer(cell.reference, in_double(problem.args), None if grad is None else grad.double())
    wrong = {}
    for name, function in contenders.items():
        try:
            answer = Answer(function, problem.args, grad)
            wrong[name] = difference(answer, truth, tolerance(problem.args), main_only=name != OURS)
        except Exception as error:  # a peer may raise anything
            wrong[name] = f"raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return wrong


def _runs(wrong: str) -> bool:
    return not wrong.startswith("raised ")


def _target(cell: Cell, peer: str, direction: str, memory: str) -> float | None:
    wanted = goals.targets(cell.info.name, cell.size) if cell.size == cell.benchmark.sizes[-1] else []
    for target in [*cell.benchmark.targets, *wanted]:
        if (target.size, target.peer, target.direction, target.memory) == (cell.size, peer, direction, memory):
            return target.ratio
    return None
