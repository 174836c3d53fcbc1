"""Our launches reach Triton's compiler with the declared types, hints and options."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch

from custom_ops import _native
from custom_ops.library._torch import fill_defaults
from custom_ops.registry import REGISTRY
from custom_ops.triton_kernels.common import KERNELS
from custom_ops.verify._case import Case
from custom_ops.verify._tracing import Record, _recorded
from custom_ops.verify.ptx import emulate

jit: Any = importlib.import_module("triton.runtime.jit")
LAUNCHERS = {
    op: getattr(importlib.import_module(f"custom_ops.triton_kernels.{family}"), op._opname)
    for op, family in _native.OPS.items()
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Compiled:
    """A stand-in for a compiled kernel, which does nothing when it runs."""

    function = packed_metadata = None

    def launch_metadata(self, *args: Any) -> None:
        pass

    def run(self, *args: Any) -> None:
        pass


def recorded(op: str) -> Iterator[Record]:
    """Yield each call of our operators in the samples' forward, backward, tangent and second derivative."""
    info = REGISTRY[op]
    for dtype in DTYPES:
        if dtype in info.dtypes:
            for record in _recorded(Case(info, torch.device("cpu"), True), dtype, "").values():
                if record.op in LAUNCHERS:
                    yield record


@contextmanager
def zeros() -> Iterator[None]:
    """Memory that no kernel writes is zero, as the host reads some of it."""
    with (
        patch.object(torch, "empty", torch.zeros),
        patch.object(torch, "empty_like", torch.zeros_like),
        patch.object(torch.Tensor, "new_empty", torch.Tensor.new_zeros),
    ):
        yield


def launch(record: Record) -> Any:
    args, kwargs = fill_defaults(record.op._schema, record.args, record.kwargs)
    with torch.no_grad():
        return LAUNCHERS[record.op](*args, **kwargs)


@pytest.mark.parametrize("op", REGISTRY)
def test_what_is_launched_is_what_is_compiled_ahead_of_time(op: str) -> None:
    seen: list[tuple[Any, dict[str, Any], Any]] = []

    def compiles(
        self: Any, key: Any, signature: Any, device: Any, constexprs: Any, options: Any, *rest: Any
    ) -> Compiled:
        found = next(kernel for kernel in KERNELS if kernel.fn is self)
        seen.append((found, dict(signature), options))
        return Compiled()

    records = [*recorded(op)]
    with emulate(), patch.object(jit.JITFunction, "_do_compile", compiles), zeros():
        for record in records:
            launch(record)
    for kernel, signature, options in seen:
        declared = dict(zip(kernel.fn.arg_names, kernel.arguments))
        elements = {
            signature[name].removeprefix("*") for name, type_ in declared.items() if type_ == "*T" and name in signature
        }
        assert len(elements) <= 1
        (dtype,) = elements or {kernel.dtypes[0]}
        accumulator = "fp64" if dtype == "fp64" else "fp32"
        for name, type_ in declared.items():
            expected = {type_.replace("T", dtype).replace("A", accumulator)}
            if type_ in ("i32", "i64"):
                expected = {"i32", "i64", "constexpr"}  # the number decides; 1 is a constant
            elif type_.startswith("*"):
                expected.add("constexpr")  # the type of None
            assert signature[name] in expected, (kernel.name, name, signature)
        want, have = kernel.options(dtype), options if isinstance(options, dict) else vars(options)
        assert {name: have[name] for name in want} == want, kernel.name
    assert bool(seen) == bool({record.op._opname for record in records} - {"voxel_sort"})  # torch's own sort
