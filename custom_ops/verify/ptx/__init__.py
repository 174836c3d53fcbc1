"""An emulator for Triton kernels: what is compiled for a GPU runs on the CPU, and faults that a GPU hides are named.

    >>> from custom_ops.verify.ptx import RaceError, emulate

It takes any ``@triton.jit`` kernel, launched as ever within `emulate`, on tensors of the CPU. Each kind of fault is an
exception of its own, of the class `PtxError`.
"""

from custom_ops.verify.ptx.driver import emulate
from custom_ops.verify.ptx.errors import (
    DeadlockError,
    MisalignedError,
    OrderError,
    OutOfBoundsError,
    PartialWarpError,
    ProgramRaceError,
    PtxError,
    RaceError,
    TrapError,
    UninitializedError,
    UnknownInstructionError,
)

__all__ = [
    "DeadlockError",
    "MisalignedError",
    "OrderError",
    "OutOfBoundsError",
    "PartialWarpError",
    "ProgramRaceError",
    "PtxError",
    "RaceError",
    "TrapError",
    "UninitializedError",
    "UnknownInstructionError",
    "emulate",
]
