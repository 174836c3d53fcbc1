"""An emulator for Triton kernels: it runs their compiled GPU code on the CPU, and names faults that a GPU hides.

    >>> from custom_ops.verify.ptx import RaceError, emulate

It takes any ``@triton.jit`` kernel that is launched as usual within `emulate`, on CPU tensors. Each kind of fault is
an exception of its own, a subclass of `PtxError`.
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
