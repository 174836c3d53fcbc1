"""The timed ops: each entry of the registry with its tables of timings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from custom_ops.registry import OpInfo


class Unavailable(RuntimeError):
    """An error of a table's ``make`` whose data is missing: the run skips the table, and the report says so."""


@dataclass(frozen=True)
class Target:
    """An upper limit of the ratio of our time to that of ``peer`` at ``size``."""

    size: Any
    peer: str
    ratio: float
    direction: str = "forward+backward"  # the alternative is "forward"
    memory: str = "fresh"  # the alternatives are "warm", on the CPU, and "cuda"


@dataclass(frozen=True)
class Benchmark:
    """A table of timings: inputs of each size (a number, or a tuple such as a shape), and the op beside its peers.

    ``make(size, device)`` returns the arguments; tensors with ``requires_grad`` get a gradient. The peers, callables or
    "module:name" of one, are called with the same arguments. A module that can't be imported is listed as not
    installed, and ``--quick`` leaves out peers with "compile" in their name. The op and its reference get ``kwargs``,
    the peers don't.

    ``traffic(size)`` gives the least bytes ((read, written) in forward, (read, written) in backward) that any
    implementation must move. The default reads each argument once and writes each result once, which is wrong for an op
    that may skip most of an argument. ``checked_at(size)`` is the size at which the answers are checked, for a
    reference that needs too much memory or time at ``size`` itself. ``scaling`` lists the sizes of ``--scaling`` if
    they aren't the powers of ten.
    """

    sizes: Sequence[Any]
    make: Callable[[Any, torch.device], tuple[Any, ...]]
    peers: dict[str, Callable[..., Any] | str]
    unit: str
    targets: Sequence[Target] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    traffic: Callable[[Any], tuple[tuple[int, int], tuple[int, int]]] | None = None
    checked_at: Callable[[Any], Any] = lambda size: size
    scaling: Sequence[int] = ()

    @property
    def title(self) -> str:
        return ", ".join([self.unit, *(f"{name}={value}" for name, value in self.kwargs.items())])


@dataclass(frozen=True)
class TimedOp(OpInfo):
    """An op, its tables, and the nearest op of torch itself.

    ``native`` is called with the first sample's arguments, and the overhead of one call of ours is compared with it.
    """

    benchmarks: Sequence[Benchmark] = ()
    native: Callable[..., Any] | None = None


def timed(info: OpInfo, benchmarks: Sequence[Benchmark], native: Callable[..., Any] | None = None) -> TimedOp:
    return TimedOp(**{f.name: getattr(info, f.name) for f in fields(OpInfo)}, benchmarks=benchmarks, native=native)
