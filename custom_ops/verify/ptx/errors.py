"""The faults that the emulator finds, one class for each kind."""

from __future__ import annotations


class PtxError(RuntimeError):
    """A fault of a kernel as compiled; its message names kernel, instruction, source line, program and thread.

    Attributes:
        fault: a description of the fault.
        kernel: the kernel's name.
        instruction: the text of the PTX instruction.
        source: ``file:line`` of its Python source, then of the callers that it was inlined into.
        program: the three-dimensional index of the program, if a program made the fault.
        thread: the number of the thread within its program, if a thread made the fault.

    Example:
        >>> from custom_ops.verify.ptx import PtxError, RaceError
        >>> issubclass(RaceError, PtxError), RaceError("threads 3 and 64 write 4 bytes").fault
        (True, 'threads 3 and 64 write 4 bytes')
    """

    def __init__(self, fault: str) -> None:
        super().__init__(fault)
        self.fault = fault
        self.kernel = self.instruction = self.source = ""
        self.program: tuple[int, int, int] | None = None
        self.thread: int | None = None

    def __str__(self) -> str:
        where = [f"in kernel {self.kernel}"] if self.kernel else []
        if self.program is not None:
            where.append(f"program {self.program}")
        if self.thread is not None:
            where.append(f"thread {self.thread}")
        lines = [self.fault, ", ".join(where)]
        lines += [f"at {self.instruction}"] if self.instruction else []
        lines += [f"compiled from {self.source}"] if self.source else []
        return "\n  ".join(line for line in lines if line)


class UnknownInstructionError(PtxError):
    """The emulator doesn't know the instruction, or one of its modifiers or operands."""


class OutOfBoundsError(PtxError):
    """An access to memory that belongs to no argument, or lies outside of the shared memory."""


class MisalignedError(PtxError):
    """An access at an address that isn't a multiple of its width."""


class UninitializedError(PtxError):
    """A read of memory that nothing has written."""


class RaceError(PtxError):
    """Two threads of one program touch the same bytes, one of them writing, and nothing orders them."""


class ProgramRaceError(RaceError):
    """Two programs of one launch touch the same bytes, one of them writing, and nothing orders them."""


class OrderError(PtxError):
    """The result depends on the order in which the programs run."""


class PartialWarpError(PtxError):
    """A warp-wide instruction that not all threads of its mask reach together."""


class DeadlockError(PtxError):
    """Threads wait at a barrier, or for a value, that the others never bring."""


class TrapError(PtxError):
    """A device-side assertion that failed, or a trap."""
