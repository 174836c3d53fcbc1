"""Runs Triton's launches on the emulator, with Triton's own compiler and argument binder and our driver below them."""

from __future__ import annotations

import functools
import importlib
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from custom_ops.verify.ptx.errors import OrderError, UnknownInstructionError
from custom_ops.verify.ptx.machine import Kernel
from custom_ops.verify.ptx.memory import POISON, GlobalMemory
from custom_ops.verify.ptx.numbers import Array

_SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}  # bytes for each program
_FIRST_DEVICE = 1000  # device numbers that no GPU has, because Triton caches its kernels by the device's number


@contextmanager
def emulate(
    seed: int = 0,
    arch: int = 90,
    *,
    orders: int = 1,
    strict: bool = False,
    every_config: bool = False,
    edit: Callable[[str], str] | None = None,
) -> Iterator[None]:
    """Run every Triton kernel that is launched within the context on the CPU, as compiled for an NVIDIA GPU.

    Triton compiles it to PTX, and an emulator executes the PTX on CPU tensors: all threads, in programs that run in
    random order. It raises a `PtxError` for faults that a GPU may hide: misaligned accesses or accesses out of bounds,
    reads of unwritten memory (`torch.empty` included), races within and between programs, and barriers and warp-wide
    instructions that only some threads reach. Approximate instructions get a random error within the bounds that
    NVIDIA documents. An instruction that the emulator doesn't know is an `UnknownInstructionError`.

    Args:
        seed: the seed of the order of programs, and of the errors of approximate instructions.
        arch: the compute capability times ten, such as 80, 90 or 100. The emulator has no tensor cores.
        orders: how many orders each launch runs in. Results that differ in any bit are an `OrderError`.
        strict: whether a thread that only holds a copy of a tile's element counts as its reader. If so, a kernel that
            works in place on tiles with fewer elements than threads races, mostly without consequence.
        every_config: run an autotuned kernel in all of its configurations instead of the first one only.
        edit: a function from the PTX of each kernel to the PTX that runs instead, for planting faults.

    Raises:
        RuntimeError: under ``TRITON_INTERPRET=1``, where Triton compiles nothing.
        PtxError: if a launch has a fault, see above.

    Example:
        >>> from custom_ops.verify.ptx import emulate
        >>> def launch_twice(kernel, x, out):
        ...     with emulate(seed=1, orders=2):
        ...         kernel[(4,)](x, out, x.numel(), BLOCK=1024)
    """
    triton: Any = importlib.import_module("triton")
    active: Any = importlib.import_module("triton.runtime.driver").driver
    if triton.knobs.runtime.interpret:
        raise RuntimeError("emulate: unset TRITON_INTERPRET, under which Triton compiles no kernel")
    emulator = Driver(_Options(seed, arch, orders, strict, every_config, edit))
    with ExitStack() as stack:
        stack.enter_context(triton.knobs.cache.scope())
        triton.knobs.cache.dir = os.path.join(triton.knobs.cache.dir, "ptx")
        stack.enter_context(patch.object(triton.knobs.runtime, "add_stages_inspection_hook", _stop_at_ptx))
        stack.enter_context(patch.object(active, "_active", emulator))
        stack.enter_context(_poisoned_allocations())
        yield


@dataclass(frozen=True)
class _Options:
    seed: int
    arch: int
    orders: int
    strict: bool
    every_config: bool
    edit: Callable[[str], str] | None


def _stop_at_ptx(*args: Any) -> Any:
    """Replace Triton's machine code by the PTX, so that Triton doesn't need the assembler."""
    if not args:
        return "ptx", "ptx"  # a part of the cache's key
    _, stages, *_ = args
    stages["cubin"] = lambda ptx, metadata: ptx.encode()
    return None


class Driver:
    """The methods that Triton's runtime calls on a driver."""

    def __init__(self, options: _Options) -> None:
        self.options = options
        self.device = _FIRST_DEVICE + options.arch
        self.utils = self
        self.launches = 0

    def get_current_device(self) -> int:
        return self.device

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> Any:
        return importlib.import_module("triton.backends.compiler").GPUTarget("cuda", self.options.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_device_properties(self, device: int) -> dict[str, int]:
        shared = _SHARED.get(self.options.arch, min(_SHARED.values()))
        return {
            "max_shared_mem": shared,
            "multiprocessor_count": 132,
            "max_num_regs": 65536,
            "warpSize": 32,
            "sm_clock_rate": 1_755_000,
            "mem_clock_rate": 2_619_000,
            "mem_bus_width": 5120,
        }

    def map_python_to_cpp_type(self, type_: str) -> str:
        return type_

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def once(call: Callable[[], Any], quantiles: Any = None, **options: Any) -> list[float]:
            if self.options.every_config:
                call()
            return [1.0] * len(quantiles or (0,))

        return once

    def get_empty_cache_for_benchmark(self) -> Tensor:
        return torch.zeros(1)

    def clear_cache(self, cache: Tensor) -> None:
        pass

    def unload_module(self, module: Any) -> None:
        pass

    def load_binary(self, name: str, ptx: bytes, shared: int, device: int) -> tuple[None, str, int, int, int]:
        """Return the module, the function, registers and spills, and the largest number of threads in a program."""
        return None, ptx.decode(), 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Launcher:
        return Launcher(source, metadata)


_kernel = functools.lru_cache(maxsize=1024)(Kernel)


class Launcher:
    """The launches of one compiled kernel, on the active emulator."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.metadata = metadata
        self.signature: dict[str, Any] = dict(source.signature)
        if getattr(metadata, "num_ctas", 1) != 1:
            raise UnknownInstructionError("the emulator knows no clusters of programs: num_ctas is more than 1")

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        ptx: str,
        packed: Any,
        launch_metadata: Any,
        enter: Any,
        leave: Any,
        *arguments: Any,
    ) -> None:
        if not x * y * z:
            return
        driver: Driver = importlib.import_module("triton.runtime.driver").driver.active
        options = driver.options
        kernel = _kernel(options.edit(ptx) if options.edit else ptx)
        values = [pair for item in zip(self.signature.items(), arguments) for pair in _flat(*item[0], item[1])]
        programs = x * y * z
        for scratch in ("global_scratch", "profile_scratch"):
            size = getattr(self.metadata, f"{scratch}_size", 0) or 0
            values.append((scratch, "*i8", torch.empty(programs * size, dtype=torch.uint8) if size else None))
        tensors = {name: value for name, _, value in values if isinstance(value, Tensor)}
        for name, tensor in tensors.items():
            if tensor.device.type != "cpu":
                raise RuntimeError(f"emulate: expected tensors of the CPU, got {name} on {tensor.device}")
        results: list[GlobalMemory] = []
        for order in range(options.orders):
            memory = GlobalMemory(tensors, kernel.program.constants, kernel.granules["global"])
            parameters = {
                declared: _encoded(type_, value, size, memory)
                for (declared, size), (_, type_, value) in zip(kernel.program.parameters, values)
            }
            seed = hash((options.seed, driver.launches, order)) & 0xFFFFFFFF
            kernel.launch(memory, parameters, (x, y, z), self.metadata.shared, seed, options.seed, options.strict)
            results.append(memory)
        driver.launches += 1
        for memory in results[1:]:
            _compare(kernel, results[0], memory)
        results[0].copy_back()


def _flat(name: str, type_: Any, value: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield the arguments that a kernel has parameters for; a tuple gives one for each of its parts."""
    if isinstance(type_, tuple | list):
        for place, (one, part) in enumerate(zip(type_, value)):
            yield from _flat(f"{name}[{place}]", one, part)
    elif str(type_).startswith("tensordesc"):
        raise UnknownInstructionError(f"the emulator knows no tensor descriptors: {name}")
    elif type_ != "constexpr":
        yield name, type_, value


_FORMATS = {"fp16": "e", "fp32": "f", "f32": "f", "fp64": "d"}


def _encoded(type_: str, value: Any, size: int, memory: GlobalMemory) -> bytes:
    """Return an argument as the bytes of its parameter."""
    if isinstance(value, Tensor):
        return memory.address(value).to_bytes(8, "little")
    if type_.startswith("*"):
        return int(value.data_ptr() if hasattr(value, "data_ptr") else value or 0).to_bytes(8, "little")
    if type_ in _FORMATS:
        return struct.pack(_FORMATS[type_], value).ljust(size, b"\0")
    if type_ == "bf16":
        return struct.pack("f", value)[2:]
    return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def _compare(kernel: Kernel, one: GlobalMemory, other: GlobalMemory) -> None:
    different: Array = np.flatnonzero(one.bytes != other.bytes)
    if len(different):
        error = OrderError(
            "the result depends on the order of the programs: "
            f"{len(different)} bytes differ, first {one.describe(int(different[0]))}"
        )
        error.kernel = kernel.name
        raise error


# ---------------------------------------------------------------- what nothing has written


@contextmanager
def _poisoned_allocations() -> Iterator[None]:
    """Fill memory that PyTorch allocates uninitialised with `POISON`, which marks it as unwritten."""
    with ExitStack() as stack:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (Tensor, "new_empty"),
            (Tensor, "new_empty_strided"),
        ):
            stack.enter_context(patch.object(owner, name, _poisoning(getattr(owner, name))))
        yield


def _poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    word = int(POISON.view(np.int64)[0])

    def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.layout is torch.strided:
            try:
                storage = tensor.untyped_storage()
            except NotImplementedError:  # torch.func's wrappers have no storage; their tensors come here, too
                return tensor
            if storage.nbytes() >= 8:
                whole = torch.tensor((), dtype=torch.uint8).set_(storage)
                whole[: storage.nbytes() // 8 * 8].view(torch.int64).fill_(word)
        return tensor

    return allocate_poisoned
