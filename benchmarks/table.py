"""The ops that are timed: each entry of the registry with its tables of timings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from custom_ops.registry import OpInfo


class Unavailable(RuntimeError):
    """Raised by a table's ``make`` where its data can't be had: the table is skipped, and the report says so."""


@dataclass(frozen=True)
class Target:
    """The ratio of our time to ``peer``'s that must not be exceeded at ``size``."""

    size: Any
    peer: str
    ratio: float
    direction: str = "forward+backward"  # or "forward"
    memory: str = "fresh"  # or "warm", on the CPU; or "cuda"


@dataclass(frozen=True)
class Benchmark:
    """One table of timings: inputs of each size (a number, or a tuple such as a shape), and the op beside its peers.

    ``make(size, device)`` returns the arguments; tensors with ``requires_grad`` get a gradient. The
    peers, callables or "module:name" of one, are called with the same arguments; a module that can't be
    imported is listed as not installed, and one with "compile" in its name is left out by
    ``--quick``. ``kwargs`` go to the op and its reference, not to the peers.

    ``traffic(size)`` gives the least bytes ((read, written) in forward, (read, written) in backward) that
    any implementation must move. Without it each argument is read once and each result written once,
    which is wrong for an op that may leave most of an argument unread. ``checked_at(size)`` is the size
    to check the answers at, where the reference would need too much memory or time at ``size`` itself.
    ``scaling`` are the sizes of ``--scaling``, if they aren't the powers of ten.
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

    ``native`` is called with the first sample's arguments: what one call of ours on a few elements is compared with.
    """

    benchmarks: Sequence[Benchmark] = ()
    native: Callable[..., Any] | None = None


def timed(info: OpInfo, benchmarks: Sequence[Benchmark], native: Callable[..., Any] | None = None) -> TimedOp:
    return TimedOp(**{f.name: getattr(info, f.name) for f in fields(OpInfo)}, benchmarks=benchmarks, native=native)
