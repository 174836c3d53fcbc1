"""Loads the C++ kernels and defines the package's own ops against them."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch._ops import OpOverload

from custom_ops import library
from custom_ops._enums import Choice

_PATH = Path(__file__).parent / "_C.abi3.so"

if not _PATH.exists():
    raise ImportError(
        f"custom_ops: the compiled kernels are missing ({_PATH}). Build them in the project's folder "
        "with `pip install --no-build-isolation -e .` (this needs a C++ compiler)."
    )
_REBUILD = "If the library is older than the Python code, rebuild it: `pip install --no-build-isolation -e .`"

torch.ops.load_library(str(_PATH))
_library = ctypes.CDLL(str(_PATH))


def _texts(name: str) -> Callable[..., str]:
    """A function of the library that takes texts and gives one."""
    try:
        function = getattr(_library, name)
    except AttributeError as error:
        raise ImportError(f"custom_ops: {_PATH} has no function {name}. {_REBUILD}") from error
    function.restype = ctypes.c_char_p
    return lambda *texts: str(function(*(text.encode() for text in texts)).decode())


_signature, _enumerators = _texts("custom_ops_signature"), _texts("custom_ops_enum")
_choose_isa, _isa, _isas = _texts("custom_ops_choose_isa"), _texts("custom_ops_isa"), _texts("custom_ops_isas")


def isa() -> str:
    """The instruction set that the C++ kernels use."""
    return _isa()


def isas() -> list[str]:
    """Those that they can use on this processor, from the least to the best."""
    return _isas().split()


def choose_isa(name: str) -> None:
    """From now on they use this one; the best for an empty name. For tests: no kernel may be running."""
    if refusal := _choose_isa(name):
        raise ImportError(f"custom_ops: {refusal}")


choose_isa(os.environ.get("CUSTOM_OPS_ISA", ""))


def check_enum(choice: type[IntEnum]) -> None:
    """``ImportError`` unless C++ has an enum of the same name with the same members."""
    kernels, expected = _enumerators(choice.__name__), ", ".join(choice.__members__)
    if kernels != expected or [*choice] != [*range(len(choice))]:
        raise ImportError(
            f"custom_ops: the enum {choice.__name__} is `{kernels or 'missing'}` in C++, counted from 0, and "
            f"`{', '.join(f'{member.name} = {member.value}' for member in choice)}` in custom_ops/_enums.py. {_REBUILD}"
        )


for _choice in Choice.__subclasses__():
    check_enum(_choice)

OPS: dict[OpOverload, str] = {}  # each op and its family, the module of its kernels


def define(fake: Callable[..., Any]) -> OpOverload:
    """`library.define` for this package: C++ kernel on the CPU, Triton launcher on CUDA.

    Both carry the name of the op; the launcher is looked up in the module of ``triton_kernels``
    named as the family's. A C++ kernel whose signature isn't the schema's is an error here, at import.
    """
    op = library.define(f"custom_ops::{fake.__name__}")(fake)
    kernel = _signature(op._opname)
    expected = _schema_signature(op)
    if kernel != expected:
        raise ImportError(
            f"custom_ops: the C++ kernel of {op._opname} is `{kernel or 'missing'}`, its schema says "
            f"`{expected}`. {_REBUILD}"
        )
    family = fake.__module__.rpartition(".")[2].removeprefix("_")
    library.kernel(op, "cuda")(f"custom_ops.triton_kernels.{family}:{op._opname}")
    OPS[op] = family
    return op


def _schema_signature(op: OpOverload) -> str:
    def side(values: Any) -> str:
        return ", ".join(re.sub(r"Optional\[(.*)\]", r"\1?", str(v.type)) for v in values)

    return f"{side(op._schema.arguments)} -> {side(op._schema.returns)}"
