"""The Triton launchers allocate and launch everything on the device of their (fake) CUDA tensors."""

from __future__ import annotations

import ctypes
import importlib
import os
import subprocess
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils import cpp_extension

from custom_ops import _native
from custom_ops.library._torch import fill_defaults
from custom_ops.registry import REGISTRY
from custom_ops.triton_kernels.common import Kernel
from custom_ops.verify._case import Case, flatten
from custom_ops.verify._tracing import Record, _recorded

LAUNCHERS = {
    op: getattr(importlib.import_module(f"custom_ops.triton_kernels.{family}"), op._opname)
    for op, family in _native.OPS.items()
}


GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {
struct Guard final : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}  // namespace c10::impl
"""


@pytest.fixture(autouse=True, scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Install a device guard that does nothing, because a CPU-only torch can't copy fake GPU tensors without one."""
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
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of the kernels instead of running them, as they need device memory."""
    names: list[str] = []

    def launch(self: Kernel, programs: int, *args: Any, variant: Any = None) -> None:
        self._checked_dtype(args)
        assert all(a.device.type == "cuda" for a in args if isinstance(a, Tensor)), self.name
        names.append(self.name)

    monkeypatch.setattr(Kernel, "__call__", launch)
    return names


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)])
@pytest.mark.parametrize("op", REGISTRY)
def test_launchers(op: str, dtype: torch.dtype, launched: list[str]) -> None:
    info = REGISTRY[op]
    if dtype not in info.dtypes:
        return
    records = [r for r in _recorded(Case(info, torch.device("cpu"), True), dtype, "").values() if r.op in LAUNCHERS]
    for record in records:
        try:
            outputs = on_the_device(record)
        except DataDependentOutputException:
            assert record.op._opname == "voxel_bounds"  # the number of voxels, its output's rows, is read on the host
            continue
        for actual, expected in zip(outputs, record.outputs, strict=True):
            assert actual.device.type == "cuda"
            assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
            if expected.numel() > 1:
                assert actual.stride() == expected.stride()
    assert bool(launched) == bool({record.op._opname for record in records} - {"voxel_sort"})  # torch's own sort


def on_the_device(record: Record) -> list[Tensor]:
    with FakeTensorMode(), torch.no_grad():
        fake = record.map(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda"))
        args, kwargs = fill_defaults(record.op._schema, fake.args, fake.kwargs)
        return flatten(LAUNCHERS[record.op](*args, **kwargs))
