"""Parses PTX text into a list of instructions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from custom_ops.verify.ptx.errors import UnknownInstructionError

WIDTHS = {"pred": 1, "8": 8, "16": 16, "32": 32, "64": 64, "128": 128}


@dataclass(frozen=True)
class Register:
    """A register of the program, by its place in the register file. ``negated`` is that of a predicate ``!%p1``."""

    index: int
    width: int
    negated: bool = False


@dataclass(frozen=True)
class Special:
    """A register that the hardware sets, such as ``%tid.x``."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A constant as two's-complement bits; a floating-point constant has the bits of its own width."""

    bits: int


@dataclass(frozen=True)
class Symbol:
    """The name of a parameter, a variable in memory or a label."""

    name: str


@dataclass(frozen=True)
class Address:
    """An address, written ``[base + offset]``."""

    base: Operand
    offset: int


@dataclass(frozen=True)
class Vector:
    """A vector operand, written ``{a, b}``; None stands for ``_``."""

    parts: tuple[Operand | None, ...]


Operand = Register | Special | Immediate | Symbol | Address | Vector


@dataclass(frozen=True)
class Instruction:
    """One statement, such as ``@%p1 ld.global.v2.b32 {%r1, %r2}, [%rd1+8];``."""

    name: str  # such as ld
    modifiers: tuple[str, ...]  # such as global, v2, b32
    guard: Register | None
    operands: tuple[Operand | None, ...]
    text: str
    source: str

    def unknown(self, what: str = "instruction") -> UnknownInstructionError:
        return UnknownInstructionError(f"the emulator knows no such {what}: {self.text}")


@dataclass
class Program:
    """A kernel: its instructions, parameters and variables."""

    name: str
    instructions: list[Instruction]
    labels: dict[str, int]  # the index of the instruction after each label
    parameters: list[tuple[str, int]]  # names and bytes
    widths: list[int]  # the width of each register, in bits
    threads: int  # threads of a program
    shared: dict[str, int] = field(default_factory=dict)  # bytes of static variables in shared memory
    local: dict[str, int] = field(default_factory=dict)  # bytes of variables in each thread's own memory
    constants: dict[str, bytes] = field(default_factory=dict)  # initialised variables in global memory


_STATEMENT = re.compile(
    r"""\s*(?:
      \.loc\s+(?P<at>\d+\s+\d+\s+\d+)(?P<inlined>[^\n]*)\n
    | (?P<label>[$\w]+):(?!:)
    | (?P<brace>[{}])
    | (?P<statement>[^;{}\s](?:[^;{}]|\{[^;{}]*\})*);
    )""",
    re.VERBOSE,
)
_VARIABLE = re.compile(
    r"\.(?P<space>global|const|shared|local)\s+(?:\.align\s+(?P<align>\d+)\s+)?\.[a-z](?P<bits>\d+)\s+"
    r"(?P<name>[$\w]+)(?:\[(?P<count>\d*)\])?(?:\s*=\s*\{(?P<values>[^}]*)\})?"
)
_IMMEDIATE = re.compile(r"-?(?:0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+|\d+)U?$")


def parse(ptx: str) -> Program:
    """Return the kernel of a PTX module that Triton has written."""
    text = re.sub(r"// begin inline asm.*?// end inline asm", _one_place, ptx, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    entry = re.search(r"\.visible\s+\.entry\s+([$\w]+)\s*\(([^)]*)\)(.*?)\{", text, re.DOTALL)
    if entry is None:
        raise UnknownInstructionError("no kernel in this PTX: expected '.visible .entry'")
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", entry[3])
    if threads is None:
        raise UnknownInstructionError("no number of threads in this PTX: expected '.reqntid'")
    program = Program(
        name=entry[1],
        instructions=[],
        labels={},
        parameters=[_parameter(declared) for declared in entry[2].split(",") if declared.strip()],
        widths=[],
        threads=int(threads[1]) * int(threads[2] or 1) * int(threads[3] or 1),
    )
    for declared in _VARIABLE.finditer(text[: entry.start()]):
        _declare(declared, program)
    _Body(program, _files(text)).read(text, entry.end())
    return program


def _one_place(block: re.Match[str]) -> str:
    """LLVM takes each line of inline assembly for another line of Python: only the first is where it says."""
    first, *rest = re.split(r"(?m)^(?=\s*\.loc\b)", block[0])
    kept = rest[:1] + [re.sub(r"^\s*\.loc[^\n]*\n", "", part) for part in rest[1:]]
    return "".join([first, *kept])


def _files(text: str) -> dict[str, str]:
    found = re.findall(r'\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?', text)
    return {number: f"{first}/{second}" if second else first for number, first, second in found}


def _parameter(declared: str) -> tuple[str, int]:
    array = re.search(r"\.b8\s+([$\w]+)\[(\d+)\]", declared)
    if array:
        return array[1], int(array[2])
    single = re.search(r"\.param\s+\.[a-z](\d+)\b.*?([$\w]+)\s*$", declared.strip(), re.DOTALL)
    if single is None:
        raise UnknownInstructionError(f"the emulator knows no such parameter: {declared.strip()}")
    return single[2], int(single[1]) // 8


def _declare(declared: re.Match[str], program: Program) -> None:
    item, name = int(declared["bits"]) // 8, declared["name"]
    size = item * int(declared["count"] or 0 if declared["count"] is not None else 1)
    if declared["space"] == "shared":
        program.shared[name] = size  # zero for global_smem, whose size is known at the launch
    elif declared["space"] == "local":
        program.local[name] = size
    else:
        values = [int(value, 0) for value in (declared["values"] or "").replace("U", "").split(",") if value.strip()]
        data = b"".join((value & ((1 << 8 * item) - 1)).to_bytes(item, "little") for value in values)
        program.constants[name] = data.ljust(size, b"\0")


class _Body:
    """Reads the statements between a kernel's braces."""

    def __init__(self, program: Program, files: dict[str, str]) -> None:
        self.program, self.files = program, files
        self.scopes: list[dict[str, Register]] = [{}]
        self.source = ""
        self.callers: dict[tuple[str, ...], tuple[str, ...] | None] = {}

    def read(self, text: str, at: int) -> None:
        while True:
            found = _STATEMENT.match(text, at)
            if found is None:
                raise UnknownInstructionError(f"the emulator can't read this PTX: {text[at : at + 80].strip()}")
            at = found.end()
            if found["at"]:
                self.locate(found["at"], found["inlined"])
            elif found["label"]:
                self.program.labels[found["label"]] = len(self.program.instructions)
            elif found["brace"] == "{":
                self.scopes.append({})
            elif found["brace"] == "}":
                self.scopes.pop()
                if not self.scopes:
                    return
            else:
                self.statement(" ".join(found["statement"].split()))

    def locate(self, at: str, inlined: str) -> None:
        """Set the source line of the next instructions, and the calls that led there."""
        place: tuple[str, ...] | None = tuple(at.split())
        caller = re.search(r"inlined_at\s+(\d+\s+\d+\s+\d+)", inlined)
        self.callers[tuple(at.split())] = tuple(caller[1].split()) if caller else None
        places: list[str] = []
        while place is not None:
            file, line, _ = place
            name = f"{self.files.get(file, file)}:{line}"
            if name in places:
                break
            places.append(name)
            place = self.callers.get(place)
        self.source = ", called from ".join(places)

    def statement(self, text: str) -> None:
        if text.startswith(".reg"):
            for name, register in self.registers(text):
                self.scopes[-1][name] = register
        elif text.startswith(".param"):
            pass  # a call's parameter, which the next `st.param` writes
        elif text.startswith("."):
            declared = _VARIABLE.match(text)
            if declared is not None:
                _declare(declared, self.program)
            elif not text.startswith(".pragma"):
                raise UnknownInstructionError(f"the emulator knows no such directive: {text}")
        else:
            self.program.instructions.append(self.instruction(text))

    def registers(self, text: str) -> Iterator[tuple[str, Register]]:
        _, type_, names = text.split(None, 2)
        width = 1 if type_ == ".pred" else int(re.sub(r"\D", "", type_))
        for name in names.split(","):
            many = re.fullmatch(r"\s*([%$\w]+)<(\d+)>\s*", name)
            every = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]
            for one in every:
                yield one, Register(len(self.program.widths), width)
                self.program.widths.append(width)

    def instruction(self, text: str) -> Instruction:
        found = re.fullmatch(r"(?:@(!?)([%$\w]+)\s+)?([\w.:]+)\s*(.*)", text)
        if found is None:
            raise UnknownInstructionError(f"the emulator can't read this statement: {text}")
        negated, guard, name, rest = found.groups()
        first, *modifiers = name.split(".")
        register = self.operand(negated + guard) if guard else None
        assert register is None or isinstance(register, Register)
        operands = tuple(self.operand(part) for part in _split(rest))
        return Instruction(first, tuple(modifiers), register, operands, text, self.source)

    def operand(self, text: str) -> Operand | None:
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        if text[0] == "!":
            register = self.operand(text[1:])
            if isinstance(register, Register):
                return Register(register.index, register.width, negated=True)
        if text == "_":
            return None
        if text[0] in "{(":
            return Vector(tuple(self.operand(part) for part in _split(text[1:-1])))
        if "|" in text:
            return Vector(tuple(self.operand(part.strip()) for part in text.split("|")))
        if text[0] == "[":
            parts = _split(text[1:-1])
            found = re.fullmatch(r"\s*([%$\w]+)\s*(?:\+\s*(-?\d+)\s*)?", parts[0])
            if len(parts) != 1 or found is None:
                raise UnknownInstructionError(f"the emulator knows no such address: {text}")
            base = self.operand(found[1])
            assert base is not None
            return Address(base, int(found[2] or 0))
        if _IMMEDIATE.match(text):
            return Immediate(_bits(text))
        if text[0] == "%":
            return Special(text)
        if re.fullmatch(r"[$\w]+", text):
            return Symbol(text)
        found = re.fullmatch(r"([$\w]+)\+(\d+)", text)
        if found:
            return Address(Symbol(found[1]), int(found[2]))
        raise UnknownInstructionError(f"the emulator knows no such operand: {text}")


def _bits(text: str) -> int:
    text = text.rstrip("U")
    if text[:2].lower() in ("0f", "0d"):
        return int(text[2:], 16)
    return int(text, 0)


def _split(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    if not any(bracket in text for bracket in "{[("):
        return [part.strip() for part in text.split(",")] if text else []
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and not depth:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return [*parts, current.strip()] if current.strip() else parts
