"""Memory that records which bytes are mapped and written, and who accessed them when.

A granule is as wide as the program's narrowest access to this memory. Every access is aligned and covers a whole
number of granules. Each granule is mapped or not, written or not, and has a last writer and last readers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from custom_ops.verify.ptx.errors import (
    MisalignedError,
    OutOfBoundsError,
    ProgramRaceError,
    PtxError,
    RaceError,
    UninitializedError,
)
from custom_ops.verify.ptx.numbers import Array

POISON = np.frombuffer(np.uint64(0x7FF4B5E97FC5D3A7).tobytes(), np.uint8)  # NaN in float32 and float64
BASE = 1 << 40  # the first address of global memory
APART = 512  # unmapped bytes between two tensors; each tensor begins at a multiple of it

_NOBODY = np.int32(-1)
_ONE, _OF_A_WARP, _OF_A_PROGRAM, _OF_SEVERAL = range(4)  # how far apart the threads are that have read a granule


@dataclass
class Threads:
    """The threads that make an access, in the order of its rows.

    ``phase`` counts the whole program's barriers that each thread has passed, ``warp_phase`` these and its warp's own,
    and ``meetings`` also the instructions that its warp has executed together. No write is visible to a thread because
    of a meeting, but what the warp has read before is read.
    ``knows(program, time)`` says whether atomic operations order another program's access at that time before theirs.

    If a tile has fewer elements than its program has threads, several threads load each element, and the first of them
    stores it. The other threads' reads count only if ``strict``, as such races are mostly harmless. A scalar, which
    all threads read, always counts.
    """

    number: Array  # the threads' numbers in the launch
    phase: Array
    warp_phase: Array
    meetings: Array
    per_program: int
    time: int = 0
    knows: Callable[[Array, Array], Array] | None = None
    strict: bool = False

    def backwards(self) -> Threads:
        number, phase = self.number[::-1], self.phase[::-1]
        return replace(self, number=number, phase=phase, warp_phase=self.warp_phase[::-1], meetings=self.meetings[::-1])


class Accesses(NamedTuple):
    """The last threads that touched some granules, and when they did."""

    who: Array
    phase: Array
    warp_phase: Array  # for reads, the meetings
    time: Array


class Memory:
    """Bytes with access rules: ``mapped`` bytes may be touched, and ``written`` ones may be read.

    The methods take places in ``bytes``, one for each access, or -1 for an address outside. Threads that write
    different numbers to one place in one instruction race, except with ``rng``, which draws the winner. Shared memory
    has an ``rng``: there compilers let several threads store one sum, which fused multiply-adds may have rounded
    differently in each thread.
    """

    def __init__(self, size: int, granule: int, races: bool = True, rng: np.random.Generator | None = None) -> None:
        self.granule, self.rng = granule, rng
        self.bytes = np.full(-(-size // 16) * 2, POISON.view(np.uint64)).view(np.uint8)
        granules = self.bytes.size // granule
        self.mapped = np.zeros(granules, bool)
        self.written = np.zeros(granules, bool)
        self.shadow = _Shadow(granules) if races else None
        self.changes = 0  # stores that have changed a byte

    def describe(self, at: int) -> str:
        raise NotImplementedError

    def granules(self, at: Array, width: int, what: str) -> Array:
        """Return the granules of aligned, mapped accesses of ``width`` bytes; several of one access are a row."""
        misaligned = (at & (width - 1) != 0) & (at >= 0)
        if misaligned.any():
            place = self.describe(int(at[misaligned][0]))
            raise _of_lane(MisalignedError(f"{what} of {width} bytes at once that isn't aligned: {place}"), misaligned)
        outside = (at < 0) | (at > self.bytes.size - width)
        count = width // self.granule
        if not outside.any():
            found = at // self.granule
            if count > 1:
                found = found[:, None] + np.arange(count)
            outside = ~_every(self.mapped[found])
        if outside.any():
            place = self.describe(int(at[outside][0]))
            raise _of_lane(OutOfBoundsError(f"{what} of {width} bytes out of bounds: {place}"), outside)
        return found

    def load(self, at: Array, item: int, count: int, threads: Threads, strong: bool = False) -> Array:
        """Return ``count`` unsigned numbers of ``item`` bytes for each access. ``strong`` reads don't race atomics."""
        width = item * count
        granules = self.granules(at, width, "read")
        written = _every(self.written[granules])
        if not written.all():
            place = self.describe(int(at[~written][0]))
            raise _of_lane(UninitializedError(f"read of {width} bytes that nothing has written: {place}"), ~written)
        if self.shadow is not None:
            self.shadow.read(self, granules, threads, strong)
        return self._rows(at, width).view(f"u{item}")

    def store(self, at: Array, items: Array, threads: Threads, strong: bool = False) -> None:
        """Write rows of unsigned numbers. ``strong`` writes, which atomic operations make, don't race one another."""
        data = np.ascontiguousarray(items).view(np.uint8).reshape(len(at), -1)
        width = data.shape[1]
        granules = self.granules(at, width, "write")
        if self.shadow is not None:
            changed = self._rows(at, width) != data
            changed = changed.reshape(*granules.shape, -1).any(axis=-1) | ~self.written[granules]
            self.shadow.write(self, granules, threads, changed, strong)
            self.changes += bool(changed.any())
        self._put(at, data, width)
        if self.shadow is not None:
            lost = (self._rows(at, width) != data).reshape(*granules.shape, -1).any(axis=-1)
            if lost.any():
                if self.rng is not None:
                    order = self.rng.permutation(len(at))
                    self._put(at[order], data[order], width)
                else:
                    winner = self.shadow.writes.who[granules]
                    self.shadow.conflict(self, granules, threads, lost, winner, "write", "write")
        self.written[granules] = True

    def _put(self, at: Array, data: Array, width: int) -> None:
        self.bytes.view(f"V{width}")[at // width] = data.view(f"V{width}")[:, 0]

    def _rows(self, at: Array, width: int) -> Array:
        """Return the bytes of each access."""
        return self.bytes.view(f"V{width}")[at // width].reshape(-1, 1).view(np.uint8)


def _every(granules: Array) -> Array:
    return granules if granules.ndim == 1 else np.logical_and.reduce(granules, axis=1)


def _of_lane(error: PtxError, lanes: Array) -> PtxError:
    """Set the error's thread to the first of those lanes, counted among the threads that make the access."""
    error.thread = int(np.flatnonzero(lanes)[0])
    return error


class _Shadow:
    """The last writer and the last readers of each granule, and the times of their accesses."""

    def __init__(self, granules: int) -> None:
        def columns() -> Accesses:
            return Accesses(np.full(granules, _NOBODY), *(np.zeros(granules, np.int32) for _ in range(3)))

        self.writes, self.reads = columns(), columns()
        self.strong = np.zeros(granules, bool)  # True if the last write was strong
        self.spread = np.zeros(granules, np.int8)  # how far apart the last readers are

    @property
    def writer(self) -> Array:
        return self.writes.who

    def read(self, memory: Memory, granules: Array, threads: Threads, strong: bool) -> None:
        me = _rows_of(threads.number, granules)
        writer = self.writes.who[granules]
        suspect = (writer != _NOBODY) & (writer != me)
        if suspect.any():
            suspect &= ~self._ordered(self.writes, granules, threads, _ONE)
            if strong:
                suspect &= ~self.strong[granules]
            if suspect.any():
                self.conflict(memory, granules, threads, suspect, writer, "read", "write")
        if strong:
            return
        before, spread = self.reads.who[granules], self.spread[granules]
        kept = (before != _NOBODY) & ((before != me) | (spread != _ONE))
        if kept.any():
            kept &= ~self._ordered(self.reads, granules, threads, spread)
            spread = np.where(kept, np.maximum(spread, _distance(before, me, threads)), _ONE)
        # The rows go backwards, so that the first of several threads is recorded.
        self._record(self.reads, granules[::-1], threads.backwards())
        apart = _distance(self.reads.who[granules], me, threads)
        if apart.any() and not threads.strict:
            apart = np.where((apart == _OF_SEVERAL) | _same_for_all(granules, threads), apart, _ONE)
        spread = np.maximum(spread, apart)
        self.spread[granules] = _ONE
        if spread.any():
            np.maximum.at(self.spread, granules.ravel(), spread.ravel().astype(np.int8))

    def write(self, memory: Memory, granules: Array, threads: Threads, changed: Array, strong: bool) -> None:
        """Record a write. Equal writes don't race, since compilers let several threads store one value."""
        me = _rows_of(threads.number, granules)
        writer = self.writes.who[granules]
        suspect = (writer != _NOBODY) & (writer != me) & changed
        if suspect.any():
            suspect &= ~self._ordered(self.writes, granules, threads, _ONE)
            if strong:
                suspect &= ~self.strong[granules]
            if suspect.any():
                self.conflict(memory, granules, threads, suspect, writer, "write", "write")
        reader = self.reads.who[granules]
        suspect = (reader != _NOBODY) & changed
        if suspect.any():
            suspect &= ~self._ordered(self.reads, granules, threads, self.spread[granules])
            if suspect.any():
                self.conflict(memory, granules, threads, suspect, reader, "write", "read")
        self._record(self.writes, granules, threads)
        self.strong[granules] = strong
        self.reads.who[granules] = _NOBODY
        self.spread[granules] = _ONE

    def conflict(
        self,
        memory: Memory,
        granules: Array,
        threads: Threads,
        suspect: Array,
        other: Array,
        mine: str,
        theirs: str,
    ) -> None:
        """Raise the error of two unordered accesses to a granule."""
        where = tuple(int(i) for i in np.argwhere(suspect)[0])
        me = np.broadcast_to(_rows_of(threads.number, granules), granules.shape)[where]
        program, thread = divmod(int(me), threads.per_program)
        their_program, their_thread = divmod(int(other[where]), threads.per_program)
        place = memory.describe(int(granules[where]) * memory.granule)
        mine, theirs = f"{mine}s", f"{theirs}s"
        if program != their_program:
            fault = f"program {program} {mine} what program {their_program} {theirs} in the same launch"
            raise _of_lane(ProgramRaceError(f"{fault}: {place}"), np.arange(len(suspect)) == where[0])
        who = "another thread" if thread == their_thread else f"thread {their_thread}"
        fault = f"thread {thread} {mine} what {who} {theirs}, with no barrier between them"
        raise _of_lane(RaceError(f"{fault}: {place}"), np.arange(len(suspect)) == where[0])

    def _record(self, column: Accesses, granules: Array, threads: Threads) -> None:
        column.who[granules] = _rows_of(threads.number, granules)
        column.phase[granules] = _rows_of(threads.phase, granules)
        column.warp_phase[granules] = _rows_of(self._warp_phase(column, threads), granules)
        column.time[granules] = threads.time

    def _warp_phase(self, column: Accesses, threads: Threads) -> Array:
        return threads.meetings if column is self.reads else threads.warp_phase

    def _ordered(self, column: Accesses, granules: Array, threads: Threads, spread: Any) -> Array:
        """Return whether all earlier accesses, by threads that far apart, happened before those of ``threads``."""
        me, who = _rows_of(threads.number, granules), column.who[granules]
        distance = _distance(who, me, threads)
        ordered = (distance == _ONE) & (spread == _ONE)
        ordered |= (
            (distance <= _OF_A_WARP)
            & (spread <= _OF_A_WARP)
            & (column.warp_phase[granules] < _rows_of(self._warp_phase(column, threads), granules))
        )
        ordered |= (
            (distance <= _OF_A_PROGRAM)
            & (spread <= _OF_A_PROGRAM)
            & (column.phase[granules] < _rows_of(threads.phase, granules))
        )
        if threads.knows is not None:
            ordered |= (spread <= _OF_A_PROGRAM) & threads.knows(who // threads.per_program, column.time[granules])
        return ordered


def _same_for_all(granules: Array, threads: Threads) -> Array:
    """Return, for each access, whether all threads of a program make it."""
    _, first, program = np.unique(threads.number // threads.per_program, return_index=True, return_inverse=True)
    same = granules == granules[first[program]]
    rows = same if same.ndim == 1 else np.logical_and.reduce(same, axis=1)
    every: Array = np.bincount(program, ~rows)[program] == 0
    return _rows_of(every, granules)


def _rows_of(column: Array, granules: Array) -> Array:
    return column if granules.ndim == 1 else column[:, None]


def _distance(a: Array, b: Array, threads: Threads) -> Array:
    return np.where(
        a == b,
        _ONE,
        np.where(
            a >> 5 == b >> 5,
            _OF_A_WARP,
            np.where(a // threads.per_program == b // threads.per_program, _OF_A_PROGRAM, _OF_SEVERAL),
        ),
    )


# ---------------------------------------------------------------- the kinds of memory


class GlobalMemory(Memory):
    """Copies of the arguments' tensors and of the program's constants, with unmapped bytes between them.

    A tensor reaches from its first to its last element; tensors that overlap share their bytes. Bytes that
    `torch.empty` filled with `POISON` and nothing overwrote are unwritten.
    """

    def __init__(self, tensors: Mapping[str, Tensor], constants: Mapping[str, bytes], granule: int) -> None:
        spans = sorted(
            (tensor.data_ptr(), tensor.data_ptr() + _extent(tensor), name)
            for name, tensor in tensors.items()
            if tensor.numel()
        )
        self.regions: list[_Region] = []
        end = APART
        for first, last, name in spans:
            if self.regions and first < self.regions[-1].last:
                region = self.regions[-1]
                region.names.append((first, name))
                end += max(0, last - region.last)
                region.last = max(region.last, last)
                continue
            end = -(-end // APART) * APART + first % APART
            self.regions.append(_Region(first, last, end, [(first, name)]))
            end += last - first + APART
        self.symbols: dict[str, int] = {}
        for name, data in constants.items():
            end = -(-end // APART) * APART
            self.symbols[name] = BASE + end
            end += len(data) + APART
        super().__init__(end, granule)
        mapped, written = np.zeros(self.bytes.size, bool), np.zeros(self.bytes.size, bool)
        for region in self.regions:
            here = region.slice
            self.bytes[here] = region.bytes()
            mapped[here] = True
            written[here] = ~_poisoned(self.bytes[here], region.first)
        for name, data in constants.items():
            here = slice(self.symbols[name] - BASE, self.symbols[name] - BASE + len(data))
            self.bytes[here] = np.frombuffer(data, np.uint8)
            mapped[here] = written[here] = True
        self.mapped = _every(mapped.reshape(-1, granule))
        self.written = _every(written.reshape(-1, granule))

    def address(self, tensor: Tensor) -> int:
        """Return the address that a kernel gets for a tensor. An empty tensor's address may not be accessed."""
        for region in self.regions:
            if tensor.numel() and region.first <= tensor.data_ptr() < region.last:
                return BASE + region.at + tensor.data_ptr() - region.first
        return BASE

    def places(self, addresses: Array) -> Array:
        return addresses.view(np.int64) - BASE

    def describe(self, at: int) -> str:
        near = max((r for r in self.regions if r.at - APART // 2 <= at), key=lambda r: r.at, default=None)
        if near is None or at > near.at + near.last - near.first + APART:
            return f"address {BASE + at:#x} belongs to no tensor"
        first, name = max((n for n in near.names if n[0] - near.first <= max(at - near.at, 0)), default=near.names[0])
        return f"byte {at - near.at - (first - near.first)} of {name}, which has {near.last - first}"

    def text(self, address: int) -> str:
        """Return the zero-terminated string at an address."""
        return bytes(self.bytes[address - BASE :]).split(b"\0", 1)[0].decode()

    def copy_back(self) -> None:
        """Copy the bytes that the program has written into the tensors."""
        for region in self.regions:
            region.bytes()[:] = self.bytes[region.slice]


@dataclass
class _Region:
    first: int  # the address on the CPU
    last: int
    at: int  # the region's place among the bytes
    names: list[tuple[int, str]]  # the tensors' addresses and names

    @property
    def slice(self) -> slice:
        return slice(self.at, self.at + self.last - self.first)

    def bytes(self) -> Array:
        """Return the tensors' own memory."""
        return np.ctypeslib.as_array((ctypes.c_uint8 * (self.last - self.first)).from_address(self.first))


def _extent(tensor: Tensor) -> int:
    """Return the number of bytes from the first to the last element."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.element_size()


def _poisoned(data: Array, address: int) -> Array:
    """Return which bytes belong to aligned groups of eight that are `POISON`."""
    first, last = -address % 8, data.size - (address + data.size) % 8
    poisoned = np.zeros(data.size, bool)
    if first < last:
        words = data[first:last].copy().view(np.uint64) == POISON.view(np.uint64)
        poisoned[first:last] = np.repeat(words, 8)
    return poisoned


class PrivateMemory(Memory):
    """Memory of ``size`` bytes for each of several owners; ``name`` is the kind of memory."""

    def __init__(self, size: int, owners: int, granule: int, name: str, rng: np.random.Generator | None) -> None:
        self.size, self.stride, self.name = size, -(-size // 16) * 16, name
        super().__init__(self.stride * owners, granule, rng is not None, rng)
        self.mapped[:] = True

    def places(self, addresses: Array, owner: Array, width: int) -> Array:
        inside = (addresses >= 0) & (addresses <= self.size - width)
        return np.where(inside, addresses + owner * self.stride, -1)

    def describe(self, at: int) -> str:
        where = "outside" if at < 0 else f"byte {at % self.stride}"
        return f"{where} of the {self.size} bytes of {self.name} memory"
