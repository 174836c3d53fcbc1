"""Checks of user-facing arguments: every message names the argument, what came and what was expected."""

from __future__ import annotations

from collections.abc import Collection
from functools import reduce
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX = (torch.int32, torch.int64)
REDUCTIONS = ("none", "mean", "sum")


def is_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested or value.is_quantized:
        kind = "a nested tensor" if value.is_nested else "a quantized one" if value.is_quantized else f"{value.layout}"
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")


def has_dtype(name: str, tensor: Tensor, dtypes: Collection[torch.dtype]) -> None:
    is_tensor(name, tensor)
    if tensor.dtype not in dtypes:
        expected = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: expected one of {expected}, got {str(tensor.dtype).removeprefix('torch.')}")


def has_dims(name: str, tensor: Tensor, layout: str) -> None:
    """``layout`` names the dimensions, as in "[N, C]"."""
    if tensor.dim() != layout.count(",") + 1:
        raise ValueError(f"{name}: expected {layout}, got shape {list(tensor.shape)}")


def same_device(**tensors: Tensor) -> None:
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != reference.device:
            raise ValueError(f"{name}: expected on {reference.device} as {first}, got {tensor.device}")


def is_one_of(name: str, value: Any, choices: Collection[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def is_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def is_number(name: str, value: Any) -> None:
    _is_real(name, value)
    if value != value:  # Dynamo can't trace math.isnan of a symbolic number
        raise ValueError(f"{name}: expected a number, got nan")


def _is_real(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if isinstance(value, int) and not torch.compiler.is_compiling():  # where it may be symbolic
        try:
            float(value)
        except OverflowError:
            raise ValueError(f"{name}: expected a number within the range of floats, got a larger integer") from None


def is_positive(name: str, value: Any) -> None:
    _is_real(name, value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a positive number, got {value!r}")


def is_limit(name: str, value: Any) -> None:
    """A number of items of at least 1, or None for no limit."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer or None, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    _is_long(name, value)


def broadcast(**tensors: Tensor) -> list[Tensor]:
    """The tensors on one device, in the dtype that torch promotes them to, expanded to one shape."""
    same_device(**tensors)
    values = list(tensors.values())
    try:
        if any(t.dtype != values[0].dtype for t in values):
            metas = [torch.empty_like(t, device="meta") for t in values]
            dtype = reduce(lambda a, b: a - b, metas).dtype
            values = [t.to(dtype) for t in values]
        same = all(t.shape == values[0].shape for t in values)
        return values if same else list(torch.broadcast_tensors(*values))
    except RuntimeError:
        shapes = ", ".join(str(list(t.shape)) for t in tensors.values())
        raise ValueError(f"{', '.join(tensors)}: expected shapes that broadcast, got {shapes}") from None


def is_integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")


def is_count(name: str, value: Any) -> None:
    is_integer(name, value)
    if value < 0:
        raise ValueError(f"{name}: expected at least 0, got {value}")
    _is_long(name, value)


def _is_long(name: str, value: Any) -> None:
    if isinstance(value, int) and value >= 2**63:  # a symbolic one is below
        raise ValueError(f"{name}: expected less than 2^63, got {value}")
