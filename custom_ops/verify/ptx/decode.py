"""Decodes an instruction's text into functions that fetch its operands and write its results.

A builder, registered with `builds`, turns an `Instruction` into a function for a `Machine` to run. It takes each
modifier that it knows from its `Decoder`; a modifier that is left over makes the instruction unknown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from custom_ops.verify.ptx.numbers import UNSIGNED, Array, Type, flush
from custom_ops.verify.ptx.program import Address, Immediate, Instruction, Operand, Register, Special, Symbol, Vector

if TYPE_CHECKING:
    from custom_ops.verify.ptx.machine import Machine

_GARBAGE = 0x7FF4DEAD7FC0BEEF  # the value of registers that nothing has written


def garbage(width: int) -> Any:
    return UNSIGNED[width].type(_GARBAGE & ((1 << width) - 1))


Run = Callable[["Machine"], None]
Fetch = Callable[["Machine"], Array]
Put = Callable[["Machine", Array], None]
Builder = Callable[["Decoder"], Run]

BUILDERS: dict[str, Builder] = {}
CONTROL = {"bra", "ret", "exit", "bar", "barrier"}  # instructions that the machine's scheduler runs itself
OF_WARPS = {"shfl", "redux", "vote", "ldmatrix", "stmatrix", "elect", "mma", "match", "activemask"}


def builds(*names: str) -> Callable[[Builder], Builder]:
    """Register the decorated function for instructions of these names."""

    def register(builder: Builder) -> Builder:
        BUILDERS.update(dict.fromkeys(names, builder))
        return builder

    return register


def decode(instruction: Instruction) -> Run:
    """Return the function that a machine runs for this instruction; raise if the instruction is unknown."""
    builder = BUILDERS.get(instruction.name)
    if builder is None:
        raise instruction.unknown()
    decoder = Decoder(instruction)
    run = builder(decoder)
    if decoder.modifiers:
        raise instruction.unknown(f"modifier .{decoder.modifiers[0]}")
    return run


class Decoder:
    """An instruction whose modifiers are taken one after another."""

    def __init__(self, instruction: Instruction) -> None:
        self.instruction = instruction
        self.name = instruction.name
        self.modifiers = list(instruction.modifiers)

    def take(self, *names: str) -> str:
        """Remove and return the first modifier with one of these names, or return ""."""
        for modifier in self.modifiers:
            if modifier in names:
                self.modifiers.remove(modifier)
                return modifier
        return ""

    def drop(self, *prefixes: str) -> None:
        """Remove modifiers that change no result, such as cache hints."""
        self.modifiers = [m for m in self.modifiers if not m.startswith(prefixes)]

    def type(self) -> Type:
        """Remove the last modifier and return it as a type."""
        found = Type.of(self.modifiers[-1]) if self.modifiers else None
        if found is None:
            raise self.instruction.unknown("type")
        self.modifiers.pop()
        return found

    def operand(self, place: int) -> Operand | None:
        try:
            return self.instruction.operands[place]
        except IndexError:
            raise self.instruction.unknown("number of operands") from None

    def source(self, place: int, type_: Type) -> Fetch:
        return self.fetch(self.operand(place), type_)

    def sources(self, type_: Type, first: int = 1) -> list[Fetch]:
        return [self.fetch(operand, type_) for operand in self.instruction.operands[first:]]

    def target(self, type_: Type, place: int = 0) -> Put:
        return self.put(self.operand(place), type_)

    def flushing(self, type_: Type, *fetches: Fetch) -> list[Fetch]:
        """Return the same operands with subnormal numbers flushed to zero, if the instruction has ``.ftz``."""
        if not self.take("ftz") or type_.dtype != np.float32:
            return [*fetches]
        return [_flushed(fetch) for fetch in fetches]

    def fetch(self, operand: Operand | None, type_: Type) -> Fetch:
        """Return a function that reads an operand as numbers of a type."""
        if isinstance(operand, Register):
            return self._fetch_register(operand, type_)
        if isinstance(operand, Immediate):
            number = type_.read(np.array(operand.bits & ((1 << type_.bits) - 1), UNSIGNED[type_.bits]))
            constant = number[()]
            return lambda m: constant
        if isinstance(operand, Special):
            name, read = operand.name, type_.read
            return lambda m: read(m.special(name))
        if isinstance(operand, Symbol):
            name, dtype = operand.name, UNSIGNED[type_.bits]
            return lambda m: dtype.type(m.symbol(name))
        if isinstance(operand, Address) and isinstance(operand.base, Symbol):
            name, dtype, offset = operand.base.name, UNSIGNED[type_.bits], operand.offset
            return lambda m: dtype.type(m.symbol(name) + offset)
        if isinstance(operand, Vector):
            parts = [self.fetch(part, Type(type_.kind, type_.bits // len(operand.parts))) for part in operand.parts]
            return lambda m: _join(np.broadcast_arrays(*(part(m) for part in parts)), type_.bits)
        raise self.instruction.unknown("operand")

    def _fetch_register(self, register: Register, type_: Type) -> Fetch:
        if type_.bits > register.width:
            raise self.instruction.unknown("operand: a register too narrow")
        index, undefined = register.index, np.asarray(garbage(register.width))

        def bits(m: Machine) -> Array:
            held = m.registers[index]
            if held is None:  # LLVM's undefined value may be any value
                return undefined
            return held if m.lanes is None or not held.ndim else held[m.lanes]

        if register.negated:
            return lambda m: ~bits(m)
        if type_.lanes == 1 and type_.bits == register.width and type_.kind != "bf":
            dtype = type_.dtype
            return bits if dtype.kind in "bu" else lambda m: bits(m).view(dtype)
        read = type_.read
        return lambda m: read(bits(m))

    def put(self, operand: Operand | None, type_: Type) -> Put:
        """Return a function that writes numbers of a type to a register or to a vector's parts, lowest bits first."""
        if operand is None:
            return lambda m, numbers: None
        if isinstance(operand, Register):
            index, width, write = operand.index, operand.width, type_.write
            dtype, unsigned = type_.dtype, UNSIGNED[width]
            simple = type_.lanes == 1 and type_.bits == width and type_.kind != "bf"

            def put_register(m: Machine, numbers: Array) -> None:
                bits = numbers.view(unsigned) if simple and numbers.dtype == dtype else write(numbers, width)
                if m.lanes is None:
                    m.registers[index] = bits
                else:
                    m.write(index, bits)

            return put_register
        if isinstance(operand, Vector):
            part = type_.bits // len(operand.parts)
            puts = [self.put(one, Type("b", part)) for one in operand.parts]

            def run(m: Machine, numbers: Array) -> None:
                bits = type_.write(numbers, type_.bits)
                for place, put in enumerate(puts):
                    put(m, (bits >> bits.dtype.type(part * place)).astype(UNSIGNED[part]))

            return run
        raise self.instruction.unknown("target")

    def address(self, place: int) -> Fetch:
        """Return a function that computes ``base + offset`` as signed numbers."""
        operand = self.operand(place)
        if not isinstance(operand, Address):
            raise self.instruction.unknown("address")
        offset = operand.offset
        if isinstance(operand.base, Register):
            base = self.fetch(operand.base, Type("b", operand.base.width))
        else:
            base = self.fetch(operand.base, Type("b", 64))
        return lambda m: m.every(base(m).astype(np.int64) + offset)


def _flushed(fetch: Fetch) -> Fetch:
    return lambda m: flush(fetch(m))


def _join(parts: Any, bits: int) -> Array:
    dtype = UNSIGNED[bits]
    width = bits // len(parts)
    joined = parts[0].astype(dtype)
    for place, part in enumerate(parts[1:], 1):
        joined = joined | (part.astype(dtype) << dtype.type(width * place))
    return joined
