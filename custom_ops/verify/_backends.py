"""The backends of the battery: the C++ kernels, the Triton kernels interpreted or emulated, or a GPU."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from custom_ops.library._torch import opname

BACKENDS = {
    "cpp": "the registered CPU kernels",
    "triton": "the Triton kernels on the CPU, under TRITON_INTERPRET=1",
    "ptx": "the Triton kernels compiled for a GPU, in an emulator of its instructions on the CPU",
    "cuda": "the registered kernels of a GPU",
}
EMULATED = ("triton", "ptx")  # backends that run Triton kernels without a GPU


@contextmanager
def backend(name: str) -> Iterator[torch.device]:
    """Run the ops of this package on backend ``name`` within the context, which returns the samples' device.

    Raises ``RuntimeError`` if the machine or the process can't run that backend.

    Example:
        >>> from custom_ops.verify import backend
        >>> with backend("cpp") as device:
        ...     device
        device(type='cpu')
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError("backend cuda: this machine has no CUDA device (torch.cuda.is_available() is False)")
        if _interpreted():
            raise RuntimeError("backend cuda: unset TRITON_INTERPRET, under which Triton kernels don't run on the GPU")
        yield torch.device("cuda")
        return
    with ExitStack() as stack:
        if name == "triton" and not _interpreted():
            raise RuntimeError("backend triton: set TRITON_INTERPRET=1 before triton is imported")
        if name == "ptx":
            from custom_ops.verify.ptx import emulate

            stack.enter_context(emulate(strict=True))
        if name in EMULATED:
            from custom_ops import _native, library

            for op, family in _native.OPS.items():
                launchers = importlib.import_module(f"custom_ops.triton_kernels.{family}")
                stack.enter_context(library.override_kernel(op, "cpu", getattr(launchers, opname(op))))
        yield torch.device("cpu")


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
