"""Instructions that move data: loads, stores, atomic operations, and exchanges within a warp."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from custom_ops.verify.ptx.arithmetic import PREDICATE, U32, WINDOWS, extremum
from custom_ops.verify.ptx.decode import Decoder, Run, builds
from custom_ops.verify.ptx.errors import TrapError
from custom_ops.verify.ptx.memory import GlobalMemory, Memory
from custom_ops.verify.ptx.numbers import UNSIGNED, Array, Type
from custom_ops.verify.ptx.program import Address, Instruction, Operand, Program, Symbol, Vector

if TYPE_CHECKING:
    from custom_ops.verify.ptx.machine import Machine

SPACES = ("global", "shared", "shared::cta", "local", "param", "const")
STRONG = ("volatile", "relaxed", "acquire", "release", "acq_rel", "weak")
SCOPES = ("cta", "cluster", "gpu", "sys")
HINTS = ("L1::", "L2::")
CACHES = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc")
_VECTORS = {"v2": 2, "v4": 4, "v8": 8}
_ROW = 16  # bytes of a row of a matrix


def granule(program: Program, space: str) -> int:
    """Return the width in bytes of the narrowest access to a kind of memory."""
    widths = [
        width
        for instruction in program.instructions
        for where, width in accesses(instruction)
        if where in (space, "generic")
    ]
    return min(widths, default=16)


def accesses(instruction: Instruction) -> list[tuple[str, int]]:
    """Return the kinds of memory that an instruction touches, with the bytes of each access."""
    if instruction.name in ("ldmatrix", "stmatrix"):
        return [("shared", 2 if "trans" in instruction.modifiers else 4)]
    if instruction.name not in ("ld", "st", "atom", "red"):
        return []
    space = next((m for m in instruction.modifiers if m in SPACES), "generic").removesuffix("::cta")
    type_ = next(t for m in reversed(instruction.modifiers) if (t := Type.of(m)) is not None)
    count = next((n for v, n in _VECTORS.items() if v in instruction.modifiers), 1)
    return [(space.replace("const", "global"), type_.bits // 8 * count)]


def locate(m: Machine, space: str, address: Array, width: int) -> tuple[Memory, Array]:
    """Return the memory of one kind, and the places of the active threads' addresses in it."""
    if space == "generic":
        window = int(address[0]) >> 60
        space = {0: "global", 1: "shared", 2: "local"}[window]
        address = address - WINDOWS[space]
    if space == "shared":
        return m.shared, m.shared.places(address, m.of(m.place), width)
    if space == "local":
        return m.local, m.local.places(address, np.arange(m.size) if m.lanes is None else m.lanes, width)
    memory: GlobalMemory = m.launch.memory
    return memory, memory.places(address)


def _space(d: Decoder) -> str:
    return d.take(*SPACES).removesuffix("::cta").replace("const", "global") or "generic"


def _parts(d: Decoder, operand: Operand | None) -> tuple[Operand | None, ...]:
    return operand.parts if isinstance(operand, Vector) else (operand,)


def _hints(d: Decoder) -> None:
    d.take(*CACHES)
    d.take(*SCOPES)
    d.drop(*HINTS)


@builds("ld")
def _load(d: Decoder) -> Run:
    type_, space, strength = d.type(), _space(d), d.take(*STRONG)
    _hints(d)
    count = _VECTORS.get(d.take(*_VECTORS), 1)
    if space == "param":
        return _load_parameter(d, type_)
    parts = _parts(d, d.operand(0))
    if len(parts) != count:
        raise d.instruction.unknown("vector")
    puts = [d.put(part, type_) for part in parts]
    address, item = d.address(1), type_.bits // 8
    strong = strength in ("volatile", "relaxed", "acquire")

    def run(m: Machine) -> None:
        memory, places = locate(m, space, address(m), item * count)
        rows = memory.load(places, item, count, m.threads(), strong)
        if strength == "acquire":
            _synchronise(m, places, acquire=True, release=False)
        m.spun |= strong
        for column, put in enumerate(puts):
            put(m, type_.read(np.ascontiguousarray(rows[:, column])))

    return run


def _load_parameter(d: Decoder, type_: Type) -> Run:
    operand = d.operand(1)
    if not isinstance(operand, Address) or not isinstance(operand.base, Symbol):
        raise d.instruction.unknown("parameter")
    name, first, bytes_ = operand.base.name, operand.offset, type_.bits // 8
    if name.startswith("retval"):  # the call's return value is the number of printed characters
        put = d.target(type_)
        return lambda m: put(m, np.asarray(type_.dtype.type(0)))
    parts = _parts(d, d.operand(0))
    puts = [d.put(part, type_) for part in parts]

    def run(m: Machine) -> None:
        data = m.launch.parameters.get(name, b"")
        for column, put in enumerate(puts):
            at = first + column * bytes_
            bits = np.frombuffer(data[at : at + bytes_], UNSIGNED[type_.bits])[0]
            put(m, type_.read(np.asarray(bits)))

    return run


@builds("st")
def _store(d: Decoder) -> Run:
    type_, space, strength = d.type(), _space(d), d.take(*STRONG)
    _hints(d)
    count = _VECTORS.get(d.take(*_VECTORS), 1)
    parts = _parts(d, d.operand(1))
    if len(parts) != count:
        raise d.instruction.unknown("vector")
    bits = Type("b", type_.bits)
    if space == "param":
        return _store_parameter(d, bits)
    fetches = [d.fetch(part, bits) for part in parts]
    address = d.address(0)
    strong = strength in ("volatile", "relaxed", "release")

    def run(m: Machine) -> None:
        memory, places = locate(m, space, address(m), bits.bits // 8 * count)
        rows = np.stack([m.every(fetch(m)) for fetch in fetches], axis=1)
        if strength == "release":
            _synchronise(m, places, acquire=False, release=True)
        memory.store(places, rows, m.threads(), strong)

    return run


def _store_parameter(d: Decoder, bits: Type) -> Run:
    """Set an argument of the next call."""
    operand, fetch = d.operand(0), d.source(1, bits)
    if not isinstance(operand, Address) or not isinstance(operand.base, Symbol) or operand.offset:
        raise d.instruction.unknown("parameter")
    name = operand.base.name

    def run(m: Machine) -> None:
        m.arguments[name] = int(m.every(fetch(m))[0])

    return run


@builds("call")
def _call(d: Decoder) -> Run:
    """Run one of the functions that every program can call: a failed assertion raises, and printed text is dropped."""
    d.take("uni")
    names = [operand.name for operand in d.instruction.operands if isinstance(operand, Symbol)]
    *_, given = d.instruction.operands
    assert isinstance(given, Vector)
    passed = [operand.name for operand in given.parts if isinstance(operand, Symbol)]
    if names == ["vprintf"]:
        return lambda m: None
    if names != ["__assertfail"]:
        raise d.instruction.unknown("function")

    def run(m: Machine) -> None:
        message, file = (m.launch.memory.text(m.arguments[name]) for name in passed[:2])
        raise TrapError(f"assertion failed: {message} ({file}:{m.arguments[passed[2]]})")

    return run


def _synchronise(m: Machine, places: Array, acquire: bool, release: bool) -> None:
    """Acquire or release for each program, if one of its threads does; accesses of several threads order nothing."""
    programs = m.of(m.program)
    if len(np.unique(programs)) == len(programs):
        m.launch.synchronise(programs, places, acquire, release)


# ---------------------------------------------------------------- atomic operations


def _atomic(name: str, type_: Type) -> Callable[..., Array] | None:
    """Return the function of the old value and the operands that an operation stores."""
    functions: dict[str, Any] = {
        "add": np.add,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "exch": lambda old, new: new,
        "cas": lambda old, expected, new: np.where(old == expected, new, old),
        "inc": lambda old, limit: np.where(old >= limit, old.dtype.type(0), old + old.dtype.type(1)),
        "dec": lambda old, limit: np.where((old == 0) | (old > limit), limit, old - old.dtype.type(1)),
        "min": np.minimum,
        "max": np.maximum,
    }
    if type_.floating and name in ("min", "max"):
        return lambda old, new: extremum(old, new, name == "min", with_nan=False)
    return functions.get(name)


@builds("atom", "red")
def _atom(d: Decoder) -> Run:
    type_, space, strength = d.type(), _space(d), d.take(*STRONG)
    _hints(d)
    d.take("noftz")
    function = _atomic(d.take("add", "and", "or", "xor", "exch", "cas", "inc", "dec", "min", "max"), type_)
    if function is None or d.modifiers:
        raise d.instruction.unknown()
    returns = d.name == "atom"
    put = d.target(type_) if returns else lambda m, numbers: None
    address = d.address(int(returns))
    fetches = d.sources(type_, 1 + returns)
    bits = Type("b", type_.bits)
    acquire, release = strength in ("acquire", "acq_rel"), strength in ("release", "acq_rel")

    def run(m: Machine) -> None:
        memory, places = locate(m, space, address(m), type_.bits // 8)
        operands = [m.every(fetch(m)) for fetch in fetches]
        lanes, threads = m._all(m.lanes), m.threads()
        found = np.zeros(len(places), UNSIGNED[type_.bits])
        for turn in _turns(places, m.rng):
            m.lanes = lanes[turn]
            threads = m.threads()
            old = memory.load(places[turn], type_.bits // 8, 1, threads, strong=True)[:, 0]
            found[turn] = old
            new = function(type_.read(old), *(operand[turn] for operand in operands))
            _synchronise(m, places[turn], acquire, release)
            memory.store(places[turn], type_.write(new, bits.bits)[:, None], m.threads(), strong=True)
        m.lanes = None if len(lanes) == m.size else lanes
        m.spun = True
        put(m, type_.read(found))

    return run


def _turns(places: Array, rng: np.random.Generator) -> list[Array]:
    """Return the accesses in random order, in turns that each hold no two accesses to the same place."""
    order = rng.permutation(len(places))
    order = order[np.argsort(places[order], kind="stable")]
    sorted_places = places[order]
    first = np.flatnonzero(np.r_[True, sorted_places[1:] != sorted_places[:-1]])
    turn = np.arange(len(order)) - np.repeat(first, np.diff(np.r_[first, len(order)]))
    return [np.sort(order[turn == i]) for i in range(int(turn.max(initial=-1)) + 1)]


# ---------------------------------------------------------------- warps


def _check_mask(d: Decoder, place: int) -> Callable[[Machine], None]:
    """Return a check that all threads of a warp take part; the emulator knows no other exchange."""
    mask = d.source(place, U32)

    def check(m: Machine) -> None:
        if (mask(m) != np.uint32(0xFFFFFFFF)).any():
            raise d.instruction.unknown("mask of a warp")

    return check


@builds("shfl")
def _shuffle(d: Decoder) -> Run:
    d.take("sync")
    kind = d.take("up", "down", "bfly", "idx")
    type_ = d.type()
    check = _check_mask(d, 4)
    targets = _parts(d, d.operand(0))
    puts = [d.put(targets[0], type_), *(d.put(target, PREDICATE) for target in targets[1:])]
    value, by, clamp = d.source(1, type_), d.source(2, U32), d.source(3, U32)

    def sources(m: Machine, b: Array, c: Array) -> tuple[Array, Array]:
        """Return the active thread that each one reads from, and whether it lies within the segment."""
        lane = m.special("%laneid").astype(np.int64)
        b, c = b.astype(np.int64) & 31, c.astype(np.int64)
        segments = (c >> 8) & 31
        limit, low = (lane & segments) | (c & 31 & ~segments), lane & segments
        source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": low | (b & ~segments)}[kind]
        inside = source >= limit if kind == "up" else source <= limit
        return np.arange(m.count) - lane + np.where(inside, source, lane), inside

    def run(m: Machine) -> None:
        check(m)
        b, c = by(m), clamp(m)
        if m.lanes is None and not np.ndim(b) and not np.ndim(c):
            key = (kind, int(b), int(c))
            if key not in m.exchanges:
                m.exchanges[key] = sources(m, b, c)
            moved, inside = m.exchanges[key]
        else:
            moved, inside = sources(m, b, c)
        puts[0](m, m.every(value(m))[moved])
        for put in puts[1:]:
            put(m, inside)

    return run


@builds("redux")
def _reduce(d: Decoder) -> Run:
    d.take("sync")
    type_ = d.type()
    name = d.take("add", "min", "max", "and", "or", "xor")
    absolute, with_nan = d.take("abs"), bool(d.take("NaN"))
    check = _check_mask(d, 2)
    value, put = d.source(1, type_), d.target(type_)
    functions: dict[str, Any] = {
        "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
        "min": np.minimum, "max": np.maximum,
    }  # fmt: skip
    if type_.floating:
        functions = {"min": np.minimum if with_nan else np.fmin, "max": np.maximum if with_nan else np.fmax}
    if name not in functions:
        raise d.instruction.unknown()
    function = functions[name]

    def run(m: Machine) -> None:
        check(m)
        rows = m.every(value(m)).reshape(-1, 32)
        result = function.reduce(np.abs(rows) if absolute else rows, axis=1, dtype=rows.dtype)
        put(m, np.repeat(result, 32))

    return run


@builds("vote")
def _vote(d: Decoder) -> Run:
    d.take("sync")
    name = d.take("all", "any", "uni", "ballot")
    type_ = d.type()
    check = _check_mask(d, 2)
    value, put = d.source(1, PREDICATE), d.target(type_)

    def run(m: Machine) -> None:
        check(m)
        rows = m.every(value(m)).reshape(-1, 32)
        if name == "ballot":
            result: Array = np.packbits(rows, axis=1, bitorder="little").view(np.uint32)[:, 0]
        else:
            every, some = np.logical_and.reduce(rows, axis=1), np.logical_or.reduce(rows, axis=1)
            result = {"all": every, "any": some, "uni": every | ~some}[name]
        put(m, np.repeat(result, 32))

    return run


@builds("activemask")
def _active(d: Decoder) -> Run:
    put = d.target(d.type())
    return lambda m: put(m, np.asarray(np.uint32(0xFFFFFFFF)))


@builds("elect")
def _elect(d: Decoder) -> Run:
    d.take("sync")
    check = _check_mask(d, 1)
    leader, chosen = _parts(d, d.operand(0))
    put_leader, put_chosen = d.put(leader, U32), d.put(chosen, PREDICATE)

    def run(m: Machine) -> None:
        check(m)
        put_leader(m, np.asarray(np.uint32(0)))
        put_chosen(m, m.special("%laneid") == 0)

    return run


@builds("ldmatrix", "stmatrix")
def _matrices(d: Decoder) -> Run:
    """Load or store 8 x 8 matrices of 16-bit numbers; thread 8 i + j of a warp has the address of row j of matrix i."""
    for expected in ("sync", "aligned", "m8n8", "b16"):
        if not d.take(expected):
            raise d.instruction.unknown()
    count = {"x1": 1, "x2": 2, "x4": 4}[d.take("x1", "x2", "x4")]
    transposed = bool(d.take("trans"))
    d.take("shared", "shared::cta")
    loads = d.name == "ldmatrix"
    address, b32 = d.address(int(loads)), Type("b", 32)
    parts = _parts(d, d.operand(int(not loads)))
    ports: list[Any] = [d.put(p, b32) if loads else d.fetch(p, b32) for p in parts]
    if len(parts) != count:
        raise d.instruction.unknown("vector")

    def places(m: Machine, matrix: int) -> tuple[Array, int]:
        """Return the places of each thread's two numbers: adjacent, or one below the other if transposed."""
        lane = m.special("%laneid").astype(np.int64)
        base = np.arange(m.count) - lane + 8 * matrix
        addresses = address(m)
        if not transposed:
            return m.shared.places(addresses[base + lane // 4], m.of(m.place), _ROW) + lane % 4 * 4, 4
        rows = [addresses[base + lane % 4 * 2 + half] for half in (0, 1)]
        found = [m.shared.places(row, m.of(m.place), _ROW) + lane // 4 * 2 for row in rows]
        return np.stack(found, axis=1), 2

    def load(m: Machine) -> None:
        for matrix, put in enumerate(ports):
            at, width = places(m, matrix)
            if width == 4:
                put(m, np.ascontiguousarray(m.shared.load(at, 4, 1, m.threads())[:, 0]))
            else:
                halves = [m.shared.load(at[:, half], 2, 1, m.threads())[:, 0].astype(np.uint32) for half in (0, 1)]
                put(m, halves[0] | (halves[1] << np.uint32(16)))

    def store(m: Machine) -> None:
        for matrix, fetch in enumerate(ports):
            at, width = places(m, matrix)
            bits = m.every(fetch(m))
            if width == 4:
                m.shared.store(at, bits[:, None], m.threads())
            else:
                for half in (0, 1):
                    part = (bits >> np.uint32(16 * half)).astype(np.uint16)
                    m.shared.store(np.ascontiguousarray(at[:, half]), part[:, None], m.threads())

    return load if loads else store


# ---------------------------------------------------------------- what only orders, hints or stops


@builds(
    "membar", "fence", "prefetch", "prefetchu", "discard", "applypriority", "nanosleep", "griddepcontrol", "setmaxnreg"
)
def _nothing(d: Decoder) -> Run:
    d.modifiers.clear()
    return lambda m: None


@builds("createpolicy")
def _policy(d: Decoder) -> Run:
    d.modifiers.clear()
    put = d.target(Type("b", 64))
    return lambda m: put(m, np.asarray(np.uint64(0)))


@builds("trap")
def _trap(d: Decoder) -> Run:
    def run(m: Machine) -> None:
        raise TrapError("the kernel stops here")

    return run
