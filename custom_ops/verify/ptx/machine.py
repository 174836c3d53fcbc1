"""Runs a launch: the threads of a group of programs run in lockstep, and the groups run one after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from custom_ops.verify.ptx import arithmetic, transfers  # noqa: F401 (which register their instructions)
from custom_ops.verify.ptx.arithmetic import PREDICATE
from custom_ops.verify.ptx.decode import OF_WARPS, Decoder, Fetch, Run, decode, garbage
from custom_ops.verify.ptx.errors import (
    DeadlockError,
    PartialWarpError,
    PtxError,
)
from custom_ops.verify.ptx.memory import GlobalMemory, PrivateMemory, Threads
from custom_ops.verify.ptx.numbers import UNSIGNED, Array
from custom_ops.verify.ptx.program import Immediate, Instruction, Symbol, parse

WARP = 32
LANES = 1 << 13  # threads that run in lockstep, approximately
PATIENCE = 1 << 10  # reads of unchanged memory after which a waiting thread counts as deadlocked


@dataclass(frozen=True)
class Step:
    """A decoded instruction: ``run`` for its active threads, or the place that it branches to."""

    instruction: Instruction
    kind: str  # "bra", "exit", "bar", "warp" or ""
    run: Run | None
    to: int = -1
    guard: Fetch | None = None  # the predicate of the threads that execute it


class Kernel:
    """A decoded program that can be launched, with the narrowest access to each kind of memory."""

    def __init__(self, ptx: str) -> None:
        self.program = parse(ptx)
        self.steps = [self._named(self._guarded_step, instruction) for instruction in self.program.instructions]
        self.granules = {space: transfers.granule(self.program, space) for space in ("global", "shared", "local")}

    @property
    def name(self) -> str:
        return self.program.name

    def _guarded_step(self, instruction: Instruction) -> Step:
        step = self._step(instruction)
        if instruction.guard is None:
            return step
        return replace(step, guard=Decoder(instruction).fetch(instruction.guard, PREDICATE))

    def _step(self, instruction: Instruction) -> Step:
        name = instruction.name
        if name == "bra":
            (target,) = instruction.operands
            if not isinstance(target, Symbol) or set(instruction.modifiers) - {"uni"}:
                raise instruction.unknown()
            return Step(instruction, "bra", None, self.program.labels[target.name])
        if name in ("ret", "exit"):
            return Step(instruction, "exit", None)
        if name in ("bar", "barrier"):
            return self._barrier(instruction)
        return Step(instruction, "warp" if name in OF_WARPS else "", decode(instruction))

    def _barrier(self, instruction: Instruction) -> Step:
        which, *count = instruction.operands
        if instruction.modifiers == ("warp", "sync"):
            return Step(instruction, "warp", lambda m: m.pass_barrier(of_warps=True))
        counted = not count or count == [Immediate(self.program.threads)]
        if not instruction.modifiers[:1] == ("sync",) or which != Immediate(0) or not counted:
            raise instruction.unknown("barrier")
        return Step(instruction, "bar", None)

    def _named(self, make: Callable[[Instruction], Any], instruction: Instruction) -> Any:
        try:
            return make(instruction)
        except PtxError as error:
            raise blame(error, self, instruction) from None

    def launch(
        self,
        memory: GlobalMemory,
        parameters: Mapping[str, bytes],
        grid: tuple[int, int, int],
        shared: int,
        order: int,
        seed: int,
        strict: bool,
    ) -> None:
        """Run all programs in an order drawn from ``order``, with approximation errors drawn from ``seed``."""
        rng = np.random.default_rng(order)
        launch = Launch(self, memory, parameters, grid, shared, seed, rng, strict)
        programs = rng.permutation(grid[0] * grid[1] * grid[2])
        together = max(1, LANES // self.program.threads)
        for first in range(0, len(programs), together):
            Machine(launch, programs[first : first + together]).run()


def blame(error: PtxError, kernel: Kernel, instruction: Instruction) -> PtxError:
    error.kernel, error.instruction, error.source = kernel.name, instruction.text, instruction.source
    return error


@dataclass
class Launch:
    """The state that all programs of one launch share."""

    kernel: Kernel
    memory: GlobalMemory
    parameters: Mapping[str, bytes]
    grid: tuple[int, int, int]
    shared: int
    seed: int
    rng: np.random.Generator
    strict: bool
    time: int = 0  # the number of releases so far
    released: dict[int, dict[int, int]] = field(default_factory=dict)  # by address: what its acquirers learn
    known: dict[int, dict[int, int]] = field(default_factory=dict)  # by program: the last known times of the others

    def synchronise(self, programs: Array, places: Array, acquire: bool, release: bool) -> None:
        """Let each program that acquires a place learn of the accesses that others did before they released it."""
        for program, place in zip(programs.tolist(), places.tolist()):
            mine = self.known.setdefault(program, {})
            if acquire:
                _learn(mine, self.released.get(place, {}))
            if release:
                _learn(self.released.setdefault(place, {}), {**mine, program: self.time})
                self.time += 1


def _learn(mine: dict[int, int], theirs: dict[int, int]) -> None:
    for program, time in theirs.items():
        mine[program] = max(time, mine.get(program, -1))


class Machine:
    """The registers and shared memory of the programs that run together.

    ``lanes`` are the threads that execute the current instruction, or None for all of them. A register holds an array
    with one number for each thread, or a scalar if all threads have the same number.
    """

    def __init__(self, launch: Launch, programs: Array) -> None:
        program = launch.kernel.program
        self.launch, self.seed, self.rng = launch, launch.seed, launch.rng
        self.per_program, self.size = program.threads, program.threads * len(programs)
        self.programs = programs
        threads = np.arange(program.threads, dtype=np.uint32)
        self.thread = np.tile(threads, len(programs))
        self.place = np.repeat(np.arange(len(programs)), program.threads)  # each thread's program
        self.program = programs[self.place]
        self.number = (self.program * program.threads + self.thread).astype(np.int64)
        self.phase, self.warp_phase, self.meetings = (np.zeros(self.size, np.int32) for _ in range(3))
        self.registers: list[Array | None] = [None] * len(program.widths)
        self.lanes: Array | None = None
        self.live = np.ones(self.size, bool)
        self.spun = False  # True if threads may have waited in vain for writes
        self.local_symbols: dict[str, int] = {}
        self.arguments: dict[str, int] = {}  # arguments of the next call
        self.exchanges: dict[tuple[str, int, int], tuple[Array, Array]] = {}  # the source threads of each `shfl`
        granules = launch.kernel.granules
        self.shared = PrivateMemory(
            self._lay_out(program.shared, launch.shared), len(programs), granules["shared"], "shared", self.rng
        )
        self.local = PrivateMemory(self._lay_out(program.local, 0), self.size, granules["local"], "local", None)
        self._special = self._special_registers()

    def _lay_out(self, variables: Mapping[str, int], size: int) -> int:
        """Give each variable an address after the launch's own ``size`` bytes, and return the size of all."""
        for name, taken in variables.items():
            self.local_symbols[name] = size if taken else 0
            size += -(-taken // 16) * 16
        return max(size, 16)

    # ---------------------------------------------------------------- registers

    def write(self, index: int, bits: Array) -> None:
        """Write to a register of the active threads, if they are not all threads."""
        old = self.registers[index]
        if old is None or not old.ndim:
            width = self.launch.kernel.program.widths[index]
            whole = np.full(self.size, garbage(width) if old is None else old, UNSIGNED[width])
        else:
            whole = old.copy()
        whole[self.lanes] = bits
        self.registers[index] = whole

    def special(self, name: str) -> Array:
        value = self._special.get(name)
        if value is None:
            raise self.instruction.unknown(f"register {name}")
        return value if self.lanes is None or not value.ndim else value[self.lanes]

    def _special_registers(self) -> dict[str, Array]:
        x, y, _ = self.launch.grid
        at = np.stack([self.program % x, self.program // x % y, self.program // (x * y)]).astype(np.uint32)
        warp = np.uint32(WARP)
        scalars = {
            "%tid.y": 0, "%tid.z": 0, "%ntid.x": self.per_program, "%ntid.y": 1, "%ntid.z": 1,
            "%nwarpid": self.per_program // WARP, "%cluster_ctarank": 0, "%cluster_nctarank": 1,
            **{f"%nctaid.{axis}": size for axis, size in zip("xyz", self.launch.grid)},
        }  # fmt: skip
        return {
            "%tid.x": self.thread,
            "%laneid": self.thread % warp,
            "%warpid": self.thread // warp,
            **{f"%ctaid.{axis}": index for axis, index in zip("xyz", at)},
            **{name: np.asarray(np.uint32(value)) for name, value in scalars.items()},
        }

    def symbol(self, name: str) -> int:
        """Return the address of a variable."""
        found = self.launch.memory.symbols.get(name, self.local_symbols.get(name))
        if found is None:
            raise self.instruction.unknown(f"variable {name}")
        return found

    # ---------------------------------------------------------------- threads

    @property
    def count(self) -> int:
        """The number of active threads."""
        return self.size if self.lanes is None else len(self.lanes)

    def every(self, value: Array) -> Array:
        """Return one number for each active thread."""
        return value if np.ndim(value) else np.broadcast_to(value, self.count)

    def of(self, column: Array) -> Array:
        """Return the active threads' part of a column for all threads."""
        return column if self.lanes is None else column[self.lanes]

    def threads(self) -> Threads:
        knows = None
        if self.launch.known:
            mine = self.of(self.program)
            knows = lambda other, time: self._knows(mine, other, time)  # noqa: E731
        return Threads(
            self.of(self.number),
            self.of(self.phase),
            self.of(self.warp_phase),
            self.of(self.meetings),
            self.per_program,
            self.launch.time,
            knows,
            self.launch.strict,
        )

    def _knows(self, mine: Array, other: Array, time: Array) -> Array:
        mine = np.broadcast_to(mine if other.ndim == 1 else mine[:, None], other.shape)
        until = np.full(other.shape, -1)
        for program in np.unique(mine):
            for known, known_until in self.launch.known.get(int(program), {}).items():
                until[(mine == program) & (other == known)] = known_until
        return time <= until

    def pass_barrier(self, of_warps: bool = False) -> None:
        lanes = slice(None) if self.lanes is None else self.lanes
        self.warp_phase[lanes] += 1
        self.meetings[lanes] += 1
        if not of_warps:
            self.phase[lanes] += 1

    # ---------------------------------------------------------------- the scheduler

    def run(self) -> None:
        """Run until all threads have ended. The group of threads that is furthest back goes first."""
        self.ready: dict[int, Array] = {0: np.arange(self.size)}
        self.waiting: dict[int, Array] = {}  # threads that wait at a barrier
        self.stalled: dict[int, Array] = {}  # threads that wait for the rest of their warp
        last, vain, changes = -1, 0, 0
        with np.errstate(all="ignore"):
            while self.ready:
                behind = [at for at in self.ready if at > last] if self.spun else []
                at = min(behind or self.ready)
                self.spun, last = False, at
                lanes = self.ready.pop(at)
                self._advance(at, None if len(lanes) == self.size else lanes)
                before, changes = changes, self.launch.memory.changes + self.shared.changes
                vain = vain + 1 if self.spun and changes == before else 0
                if vain > PATIENCE:
                    fault = "threads wait for a value that no program which runs beside them writes"
                    raise self._located(DeadlockError(fault), at, lanes[:1])
        if self.stalled:
            at, lanes = next(iter(self.stalled.items()))
            raise self._located(PartialWarpError("only some threads of a warp reach this"), at, lanes[:1])
        if self.waiting:
            at, lanes = next(iter(self.waiting.items()))
            raise self._located(DeadlockError("only some threads of a program reach this barrier"), at - 1, lanes[:1])

    @property
    def instruction(self) -> Instruction:
        return self.launch.kernel.steps[self.at].instruction

    def _advance(self, at: int, lanes: Array | None) -> None:
        """Run these threads from an instruction on, until they diverge, meet others, wait or end."""
        steps: list[Step] = self.launch.kernel.steps
        stop = min((other for other in self.ready if other > at), default=len(steps))
        while True:
            step = steps[at]
            self.at, self.lanes = at, lanes
            active = lanes if step.guard is None else self._guarded(step.guard, lanes)
            self.lanes = active
            if step.kind == "bra":
                rest = self._rest(lanes, active)
                if active is None or len(active):
                    self._put(step.to, active)
                if len(rest):
                    self._put(at + 1, rest)
                return
            if step.kind == "exit":
                self.live[self._all(active)] = False
                rest = self._rest(lanes, active)
                if len(rest):
                    self._put(at + 1, rest)
                self._release()
                return
            if step.kind == "bar":
                if len(self._rest(lanes, active)):
                    raise self._located(
                        DeadlockError("a barrier for some threads only"), at, self._rest(lanes, active)[:1]
                    )
                if not self._arrive(at, active):
                    return
            elif step.kind == "warp" and (active is not None or step.guard is not None):
                rest = self._rest(lanes, active)
                whole = self._whole_warps(at, self._all(active))
                if len(whole):
                    self.lanes = None if len(whole) == self.size else whole
                    self._execute(step)
                lanes = np.sort(np.concatenate([whole, rest]))
                if not len(lanes):
                    return
                lanes = None if len(lanes) == self.size else lanes
            elif active is None or len(active):
                self._execute(step)
            at += 1
            if at == stop:
                self._put(at, lanes)
                return

    def _execute(self, step: Step) -> None:
        assert step.run is not None
        try:
            step.run(self)
            if step.kind == "warp":
                self.meetings[slice(None) if self.lanes is None else self.lanes] += 1
        except PtxError as error:
            lane = self._all(self.lanes)[error.thread or 0 : (error.thread or 0) + 1]
            raise self._located(error, self.at, lane) from None

    def _located(self, error: PtxError, at: int, lane: Array) -> PtxError:
        program = int(self.program[lane[0]])
        x, y, _ = self.launch.grid
        error.program = (program % x, program // x % y, program // (x * y))
        error.thread = int(self.thread[lane[0]])
        return blame(error, self.launch.kernel, self.launch.kernel.steps[at].instruction)

    def _guarded(self, guard: Fetch, lanes: Array | None) -> Array | None:
        """Return the threads whose predicate holds."""
        holds = guard(self)
        if holds.all():
            return lanes
        if not holds.ndim:
            return np.zeros(0, np.intp)
        return np.flatnonzero(holds) if lanes is None else lanes[holds]

    def _all(self, lanes: Array | None) -> Array:
        return np.arange(self.size) if lanes is None else lanes

    def _rest(self, lanes: Array | None, active: Array | None) -> Array:
        if active is lanes:
            return np.zeros(0, np.intp)
        return np.setdiff1d(self._all(lanes), self._all(active), assume_unique=True)

    def _put(self, at: int, lanes: Array | None) -> None:
        """Let the threads continue at that instruction, together with those that are there already."""
        lanes = self._all(lanes)
        there = self.ready.get(at)
        self.ready[at] = lanes if there is None else np.sort(np.concatenate([there, lanes]))

    def _arrive(self, at: int, lanes: Array | None) -> bool:
        """Take the threads to their program's barrier; return whether all of them may continue at once."""
        if lanes is None or self._complete(lanes).all():
            self.pass_barrier()
            return True
        self.waiting[at + 1] = np.sort(np.concatenate([self.waiting.get(at + 1, np.zeros(0, np.intp)), lanes]))
        self._release()
        return False

    def _complete(self, lanes: Array) -> Array:
        """Return for each of the threads whether all live threads of its program are among them."""
        programs = len(self.programs)
        here = np.bincount(self.place[lanes], minlength=programs)
        alive = np.bincount(self.place[self.live], minlength=programs)
        return (here == alive)[self.place[lanes]]

    def _release(self) -> None:
        """Let the threads continue whose whole program waits at a barrier."""
        if not self.waiting:
            return
        waiting = np.concatenate([*self.waiting.values()])
        free = np.zeros(self.size, bool)
        free[waiting[self._complete(waiting)]] = True
        for at, lanes in [*self.waiting.items()]:
            going, staying = lanes[free[lanes]], lanes[~free[lanes]]
            if len(going):
                self.lanes = going
                self.pass_barrier()
                self._put(at, going)
                del self.waiting[at]
                if len(staying):
                    self.waiting[at] = staying

    def _whole_warps(self, at: int, lanes: Array) -> Array:
        """Return the threads whose warps are complete; the others wait for the rest of their warp."""
        lanes = np.sort(np.concatenate([self.stalled.pop(at, np.zeros(0, np.intp)), lanes]))
        whole = np.bincount(lanes // WARP, minlength=self.size // WARP) == WARP
        complete = whole[lanes // WARP]
        if not complete.all():
            self.stalled[at] = lanes[~complete]
        return lanes[complete]
