"""The battery's rows about numbers, and shapes that take several blocks and tiles, on the emulated kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from custom_ops.registry import REGISTRY
from custom_ops.verify import backend, capabilities, verify
from custom_ops.verify._case import Call, Case, describe
from custom_ops.verify._values import _check_rounded, resized

QUICK = ("value", "gradient", "float32")
TIMES = {"activation": 150, "shaping": 150, "ranking": 30, "voxel": 200}  # factors from the length of a sample


@pytest.mark.parametrize("op", REGISTRY)
def test_numbers(op: str, full: bool) -> None:
    rows = capabilities(quick=True, backend="ptx") if full else QUICK
    verify(REGISTRY[op], backend="ptx", quick=True, only=rows).raise_on_failure()


def longer(call: Call, times: int) -> Call:
    """Return the call with rows that many times as long, of different numbers; lists keep their count."""
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for key, tensor in zip(call.keys, call.tensors):
        if key == "cu_lengths":
            tensors.append(tensor * times)
            continue
        long = tensor.detach().repeat_interleave(times, -1)
        if tensor.requires_grad:
            long = long + torch.randn(long.shape, generator=generator).to(long.dtype) / 10
        tensors.append(long.requires_grad_(tensor.requires_grad))
    return call.with_tensors(tensors)


def kinds(calls: list[Call]) -> Iterator[Call]:
    """Yield the first call of each set of argument names."""
    seen: set[tuple[Any, ...]] = set()
    for call in calls:
        given = tuple(name for name, value in call.sample.kwargs.items() if isinstance(value, torch.Tensor))
        if given not in seen and not call.is_empty:
            seen.add(given)
            yield call


@pytest.mark.parametrize("op", REGISTRY)
def test_several_blocks(op: str) -> None:
    info = REGISTRY[op]
    with backend("ptx") as device:
        case = Case(info, device, quick=True)
        for call in kinds(case.calls(torch.float32)):
            if info.family == "voxel":
                grown = resized(call, TIMES["voxel"])
            else:
                grown = longer(call, TIMES[info.family])
            if max(t.numel() for t in grown.tensors) > 20:  # a voxel op without dynamic dimensions doesn't grow
                _check_rounded(case, grown, torch.float32)
            else:
                assert info.family == "voxel", describe(grown)
