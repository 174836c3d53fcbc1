"""The code that every kernel file shares: declared kernels, packed masks, accumulators.

`FLOATING` and `INDEX` are the types that kernels are compiled for, in Triton's notation. `BLOCK` is the number of
elements per program of a pointwise kernel, and `LANES` the number of threads per warp.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "ACCESS",
    "BLOCK",
    "FLOATING",
    "INDEX",
    "LANES",
    "Kernel",
    "MaskLayout",
    "accumulator",
    "constant",
    "divide",
    "kernel",
    "load_bits",
    "locate",
    "store_bits",
    "tile",
    "widen",
]

# ---------------------------------------------------------------- kernels

NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
FLOATING = ("fp32", "bf16", "fp16", "fp64")
INDEX = ("i32", "i64")

BLOCK = 1024  # elements per program of a pointwise kernel
LANES = 64 if torch.version.hip else 32
ACCESS = 16  # bytes of a thread's widest memory access
_BYTES = {name: dtype.itemsize for dtype, name in NAMES.items()}

KERNELS: list[Kernel] = []


class Kernel:
    """A ``@triton.jit`` function with everything that it is compiled with.

    Launches and the compilation ahead of time (``aot``) use the same variants and options. `kernel` makes it.

    Example:
        >>> from custom_ops.triton_kernels.squared import squared_relu_forward_kernel
        >>> squared_relu_forward_kernel.arguments, squared_relu_forward_kernel.dtypes
        (['*T', '*T', 'i32'], ('fp32', 'bf16', 'fp16', 'fp64'))
    """

    def __init__(
        self,
        fn: Any,
        arguments: str,
        dtypes: Sequence[str],
        variants: Mapping[Any, Mapping[str, Any]],
        num_warps: int,
        streams: int,
        narrow: str,
        enable_fp_fusion: bool,
        registers: int,
        budget: int,
    ) -> None:
        self.fn, self.dtypes, self.variants, self.narrow, self.budget = fn, dtypes, variants, narrow, budget
        self._num_warps, self._streams, self._enable_fp_fusion = num_warps, streams, enable_fp_fusion
        self._registers = registers
        self._seen: dict[Any, dict[str, Any]] = {}  # the options of a launch by its dtypes, once they were checked
        self.name: str = fn.__name__
        self.arguments = arguments.split()
        taken = len(inspect.signature(fn.fn).parameters) - len(next(iter(variants.values())))
        if len(self.arguments) != taken:
            raise TypeError(f"{self.name}: declares {len(self.arguments)} argument types, takes {taken} arguments")
        KERNELS.append(self)

    def options(self, dtype: str, lanes: int = LANES) -> dict[str, Any]:
        """Return the options that Triton compiles it with, for elements of ``dtype`` and warps of ``lanes`` threads."""
        warps = self._streams * _BYTES[dtype] // (ACCESS * lanes) if self._streams else self._num_warps
        options = {"num_warps": warps, "enable_fp_fusion": self._enable_fp_fusion}
        if self._registers and lanes == 32:  # AMD's compiler has no such option
            options["maxnreg"] = 255 if dtype == "fp64" else self._registers
        return options

    def _checked_dtype(self, args: Sequence[Any]) -> str:
        """Return T after checking that the tensors have the declared types, which were compiled ahead of time."""
        given = [_triton_name(a) for a in args]
        common = next((g[1:] for g, declared in zip(given, self.arguments) if declared == "*T"), "")
        wide = "fp64" if common == "fp64" else "fp32"
        expected = [a.replace("T", common).replace("A", wide) if a.startswith("*") else "" for a in self.arguments]
        if given != expected:
            raise TypeError(f"{self.name}: expected tensors of {expected}, got {given}")
        return common

    def __call__(self, programs: int, *args: Any, variant: Any = None) -> None:
        """Launch over a one-dimensional grid, on the device of the first argument."""
        key = (variant, *[a.dtype if isinstance(a, Tensor) else None for a in args])
        options = self._seen.get(key)
        if options is None:
            options = self._seen[key] = {**self.variants[variant], **self.options(self._checked_dtype(args))}
        if programs:
            device = args[0].device
            elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
            with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
                self.fn[(programs,)](*args, **options)


def _triton_name(value: Any) -> str:
    return "*" + NAMES[value.dtype] if isinstance(value, Tensor) else ""


def kernel(
    arguments: str,
    dtypes: Sequence[str],
    variants: Mapping[Any, Mapping[str, Any]],
    num_warps: int = 4,
    streams: int = 0,
    narrow: str = "",
    enable_fp_fusion: bool = True,
    registers: int = 0,
    budget: int = 0,
) -> Callable[[Any], Kernel]:
    """Declare the decorated ``@triton.jit`` function as a kernel.

    ``arguments`` are the types of its arguments before the compile-time ones, in Triton's notation: T stands for each
    of ``dtypes``, A for T's accumulator. ``variants`` are the compile-time arguments. If a program ``streams`` a number
    of elements, it has as many warps as give each thread 16 bytes of them, whatever the dtype; otherwise it has
    ``num_warps``. ``narrow`` is the reason why no load is that wide. A thread may take so many ``registers`` on
    NVIDIA's GPUs, or all of them in float64; by default their assembler chooses, and may spill what an outer loop
    needs. ``budget`` is the largest number of instructions in the innermost loop on sm_90 for float32, which `aot`
    checks; such a loop may not wait for other threads.

    Example:
        >>> import torch, triton
        >>> import triton.language as tl
        >>> from custom_ops.triton_kernels.common import BLOCK, FLOATING, kernel, widen
        >>> @kernel("*T *T i32", FLOATING, {None: {"BLOCK": BLOCK}}, streams=BLOCK)
        ... @triton.jit
        ... def negate(x_ptr, y_ptr, elements, BLOCK: tl.constexpr):
        ...     at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        ...     x = widen(tl.load(x_ptr + at, mask=at < elements, other=0))
        ...     tl.store(y_ptr + at, -x, mask=at < elements)
        >>> x, y = torch.ones(3), torch.empty(3)
        >>> negate(1, x, y, 3)
        >>> y
        tensor([-1., -1., -1.])
    """
    return lambda fn: Kernel(
        fn, arguments, dtypes, variants, num_warps, streams, narrow, enable_fp_fusion, registers, budget
    )


def constant(member: IntEnum) -> tl.constexpr:
    """Return an enum's member as a ``tl.constexpr``, the only global value that a Triton kernel may read.

    Example:
        >>> from custom_ops._enums import Reduction
        >>> from custom_ops.triton_kernels.common import constant
        >>> constant(Reduction.SUM).value
        2
    """
    return tl.constexpr(int(member))


# ---------------------------------------------------------------- accumulators


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which numbers of ``dtype`` are computed.

    Example:
        >>> import torch
        >>> from custom_ops.triton_kernels.common import accumulator
        >>> accumulator(torch.bfloat16)
        torch.float32
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


@triton.jit
def widen(x):
    """Return x in its accumulator's dtype."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def divide(x, y):
    """Return x / y rounded as on the CPU; Triton's own division is approximate in single precision."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


# ---------------------------------------------------------------- packed masks


class MaskLayout(NamedTuple):
    """The layout of ``examples`` masks of ``elements`` bits in ``bytes`` bytes each, as in csrc/bits.h.

    Example:
        >>> import torch
        >>> from custom_ops.triton_kernels.common import MaskLayout
        >>> MaskLayout.of(torch.empty(2, 3, 5), batch_dims=1)
        MaskLayout(examples=2, elements=15, bytes=2)
    """

    examples: int
    elements: int
    bytes: int

    @staticmethod
    def of(x: Tensor, batch_dims: int) -> MaskLayout:
        if not 0 <= batch_dims <= x.dim():
            raise RuntimeError(f"batch_dims: expected 0 to {x.dim()}, got {batch_dims}")
        elements = math.prod(x.shape[batch_dims:])
        return MaskLayout(math.prod(x.shape[:batch_dims]), elements, (elements + 7) // 8)

    def flat(self) -> MaskLayout:
        """Return the layout of one example with the same bits, unless examples have padding."""
        if self.elements % 8 == 0:
            return MaskLayout(1, self.examples * self.elements, self.examples * self.bytes)
        return self

    def check(self, mask: Tensor) -> None:
        if mask.dtype != torch.uint8 or mask.numel() != self.examples * self.bytes:
            raise RuntimeError(f"mask: expected {self.bytes} bytes for each of {self.examples} examples")


@triton.jit
def locate(blocks):
    """Return the example of this program, and the program's block in that example."""
    program = tl.program_id(0)
    return (program // blocks).to(tl.int64), (program % blocks).to(tl.int64)


@triton.jit
def tile(first, BLOCK: tl.constexpr):
    """Return BLOCK consecutive indices from ``first``, with one row for each byte of a mask."""
    return first + tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def store_bits(mask_ptr, first, bytes, keep, BLOCK: tl.constexpr):
    """Pack a `tile` of booleans into the bytes from ``first``; those past the end must be False."""
    packed = tl.sum(keep.to(tl.int32) << tl.arange(0, 8)[None, :], axis=1)
    at = first + tl.arange(0, BLOCK // 8)
    tl.store(mask_ptr + at, packed.to(tl.uint8), mask=at < bytes)


@triton.jit
def load_bits(mask_ptr, first, bytes, BLOCK: tl.constexpr):
    """Unpack what `store_bits` has packed."""
    at = first + tl.arange(0, BLOCK // 8)
    packed = tl.load(mask_ptr + at, mask=at < bytes, other=0).to(tl.int32)
    return (packed[:, None] >> tl.arange(0, 8)[None, :]) & 1 != 0
