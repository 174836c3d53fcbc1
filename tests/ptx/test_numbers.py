"""The battery's rows about numbers, and shapes that take several blocks and tiles, on the emulated kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from custom_ops.registry import REGISTRY
from custom_ops.verify import backend, verify
from custom_ops.verify._case import Call, Case, check_close, describe, grads, randn_like
from custom_ops.verify._values import double, resized

SMOKE = ("relu", "pairwise_logistic_loss", "soft_rank")
TIMES = {"activation": 150, "shaping": 150, "ranking": 30, "voxel": 200}  # factors from the length of a sample


@pytest.mark.parametrize("op", [op if op in SMOKE else pytest.param(op, marks=pytest.mark.full) for op in REGISTRY])
def test_numbers(op: str) -> None:
    verify(REGISTRY[op], backend="ptx", quick=True).raise_on_failure()


def longer(call: Call, times: int) -> Call:
    """Return the call with rows that many times as long, of different numbers; lists keep their count."""
    generator = torch.Generator().manual_seed(0)
    row, tensors = call.tensors[0].shape[-1:], []
    for key, tensor in zip(call.keys, call.tensors):
        if key in ("lengths", "cu_lengths"):
            tensor = tensor * times
        elif tensor.shape[-1:] == row:
            long = tensor.detach().repeat_interleave(times, -1)
            if tensor.requires_grad:
                long = long + torch.randn(long.shape, generator=generator).to(long.dtype) / 10
            tensor = long.requires_grad_(tensor.requires_grad)
        tensors.append(tensor)
    return call.with_tensors(tensors)


def kinds(calls: list[Call]) -> Iterator[Call]:
    """Yield the first call of each set of argument names."""
    seen: set[tuple[Any, ...]] = set()
    for call in calls:
        given = tuple(name for name, value in call.sample.kwargs.items() if isinstance(value, torch.Tensor))
        if given not in seen and not call.is_empty:
            seen.add(given)
            yield call


@pytest.mark.sampled(3)
@pytest.mark.parametrize("op", REGISTRY)
def test_several_blocks(op: str) -> None:
    """Results are near the reference in double precision; long lists add up many approximate exponentials."""
    info, eps = REGISTRY[op], torch.finfo(torch.float32).eps
    with backend("ptx") as device:
        case = Case(info, device, quick=True)
        for call in kinds(case.calls(torch.float32)):
            long = resized(call, TIMES["voxel"]) if info.family == "voxel" else longer(call, TIMES[info.family])
            wide = case.reference(long.with_tensors([double(t) for t in long.tensors]))
            for actual, expected in zip(derivatives(long), derivatives(wide), strict=True):
                check_close(actual, expected, describe(long), 256 * eps, dtypes=False)


def derivatives(call: Call) -> list[torch.Tensor]:
    """Return values and gradients."""
    inputs = call.inputs
    outputs = call.with_tensors(inputs, call.input_keys).run()
    chosen = [y for y in outputs if y.requires_grad]
    return outputs + (grads(chosen, inputs, randn_like(chosen, seed=1)) if chosen else [])
