"""The launchers without their kernels: on Triton's own launch path, and on fake tensors of a CUDA device."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils import cpp_extension

from custom_ops import _native
from custom_ops.library._torch import fill_defaults
from custom_ops.registry import REGISTRY
from custom_ops.triton_kernels.common import KERNELS, Kernel
from custom_ops.verify._case import Case, flatten
from custom_ops.verify._tracing import Record, _recorded
from custom_ops.verify.ptx import emulate

jit: Any = importlib.import_module("triton.runtime.jit")
LAUNCHERS = {
    op: getattr(importlib.import_module(f"custom_ops.triton_kernels.{family}"), op._opname)
    for op, family in _native.OPS.items()
}
EACH_DTYPE = pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        *(pytest.param(other, marks=pytest.mark.full) for other in (torch.float64, torch.bfloat16, torch.float16)),
    ],
)
EACH_OP = pytest.mark.parametrize("op", REGISTRY)
WITHOUT_KERNEL = {"voxel_unique", "voxel_slots", "voxel_place", "voxel_take"}  # torch sorts and copies
SIZED_BY_DATA = {"voxel_bounds", "voxel_unique", "voxel_slots"}  # the number of voxels is read on the host


@functools.cache
def recorded(op: str, dtype: torch.dtype) -> list[Record]:
    """Each call of one of our operators in forward, backward, tangent and second derivative of the samples."""
    info = REGISTRY[op]
    if dtype not in info.dtypes:
        return []
    records = _recorded(Case(info, torch.device("cpu"), True), dtype, "").values()
    return [record for record in records if record.op in LAUNCHERS]


def launch(record: Record) -> list[Tensor]:
    args, kwargs = fill_defaults(record.op._schema, record.args, record.kwargs)
    with torch.no_grad():
        return flatten(LAUNCHERS[record.op](*args, **kwargs))


def launches(records: list[Record]) -> bool:
    return bool({record.op._opname for record in records} - WITHOUT_KERNEL)


# ---------------------------------------------------------------- Triton's launch path


class Compiled:
    """Stands for a compiled kernel, and does nothing when it runs."""

    function = packed_metadata = None

    def launch_metadata(self, *args: Any) -> None:
        pass

    def run(self, *args: Any) -> None:
        pass


@contextmanager
def zeros() -> Iterator[None]:
    """Memory that no kernel writes is zero, as the host reads some of it."""
    with (
        patch.object(torch, "empty", torch.zeros),
        patch.object(torch, "empty_like", torch.zeros_like),
        patch.object(Tensor, "new_empty", Tensor.new_zeros),
    ):
        yield


@pytest.mark.sampled(2)
@EACH_DTYPE
@EACH_OP
def test_what_is_launched_is_what_is_compiled_ahead_of_time(op: str, dtype: torch.dtype) -> None:
    """The types, hints and options that each launch has when it comes to the compiler."""
    seen: list[tuple[Kernel, dict[str, Any], Any]] = []

    def compiles(self: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, *rest: Any) -> Any:
        found = next(kernel for kernel in KERNELS if kernel.fn is self)
        seen.append((found, dict(signature), options))
        return Compiled()

    with emulate(), patch.object(jit.JITFunction, "_do_compile", compiles), zeros():
        for record in recorded(op, dtype):
            launch(record)
    for kernel, signature, options in seen:
        declared = dict(zip(kernel.fn.arg_names, kernel.arguments))
        elements = {signature[name][1:] for name, type_ in declared.items() if type_ == "*T" and name in signature}
        (element,) = elements or {kernel.dtypes[0]}
        accumulator = "fp64" if element == "fp64" else "fp32"
        for name, type_ in declared.items():
            expected = {type_.replace("T", element).replace("A", accumulator)}
            if type_ in ("i32", "i64"):
                expected = {"i32", "i64", "constexpr"}  # the number decides; 1 is a constant
            elif type_.startswith("*"):
                expected.add("constexpr")  # None
            assert signature[name] in expected, (kernel.name, name, signature)
        want, have = kernel.options(element), options if isinstance(options, dict) else vars(options)
        assert {name: have[name] for name in want} == want, kernel.name
    assert bool(seen) == launches(recorded(op, dtype))


# ---------------------------------------------------------------- fake tensors

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {
struct Guard final : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}  // namespace c10::impl
"""


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A device guard that does nothing, without which a torch for CPUs alone can't copy fake tensors of a GPU."""
    if torch.version.cuda is not None:
        return
    folder = tmp_path_factory.mktemp("guard")
    (folder / "guard.cpp").write_text(GUARD)
    flags = [f"-I{path}" for path in cpp_extension.include_paths()]
    flags += [f"-L{path}" for path in cpp_extension.library_paths()] + ["-lc10"]
    compiler = [*os.environ.get("CXX", "c++").split(), "-std=c++20", "-shared", "-fPIC"]
    subprocess.run([*compiler, "guard.cpp", "-o", "guard.so", *flags], cwd=folder, check=True)
    ctypes.CDLL(str(folder / "guard.so"))


@pytest.fixture
def launched(guard: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that would run, which need memory of the device."""
    names: list[str] = []

    def launch(self: Kernel, programs: int, *args: Any, variant: Any = None) -> None:
        self._checked_dtype(args)
        assert all(a.device.type == "cuda" for a in args if isinstance(a, Tensor)), self.name
        names.append(self.name)

    monkeypatch.setattr(Kernel, "__call__", launch)
    return names


@pytest.mark.sampled(2)
@EACH_DTYPE
@EACH_OP
def test_everything_is_on_the_device(op: str, dtype: torch.dtype, launched: list[str]) -> None:
    for record in recorded(op, dtype):
        with FakeTensorMode():
            fake = record.map(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda"))
            try:
                outputs = launch(fake)
            except DataDependentOutputException:
                assert record.op._opname in SIZED_BY_DATA
                continue
        for actual, expected in zip(outputs, record.outputs, strict=True):
            assert actual.device.type == "cuda"
            assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
            if expected.numel() > 1:
                assert actual.stride() == expected.stride()
    assert bool(launched) == launches(recorded(op, dtype))
