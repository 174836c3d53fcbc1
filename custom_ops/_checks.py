"""Checks of user-facing arguments; every message names the argument, what came and what was expected."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from custom_ops._enums import Reduction

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX = (torch.int32, torch.int64)
INTEGER = (torch.uint8, torch.int8, torch.int16, *INDEX)
IN_INT64 = (*INTEGER, torch.uint16, torch.uint32)  # all whose numbers an int64 holds
REAL = (*FLOATING, *IN_INT64, torch.uint64)
REDUCTIONS = Reduction.options()


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


def is_integer(name: str, tensor: Tensor) -> None:
    """Check that a tensor has integers, of any dtype whose numbers an int64 holds."""
    is_tensor(name, tensor)
    if tensor.dtype not in IN_INT64:
        raise TypeError(f"{name}: expected integers, got {str(tensor.dtype).removeprefix('torch.')}")


def has_dims(name: str, tensor: Tensor, layout: str) -> None:
    """Check the number of dimensions; ``layout`` names them, as in "[N, C]"."""
    if tensor.dim() != layout.count(",") + 1:
        raise ValueError(f"{name}: expected {layout}, got shape {list(tensor.shape)}")


def same_device(**tensors: Tensor) -> None:
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != reference.device:
            raise ValueError(f"{name}: expected on {reference.device} as {first}, got {tensor.device}")


def beside(x: Tensor, value: Tensor) -> Tensor:
    """Return ``value``, moved to x's device if it is a single number on the CPU, which torch accepts too."""
    is_single = value.dim() == 0 and value.device.type == "cpu" and x.device.type != "meta"
    return value.to(x.device) if is_single and value.device != x.device else value


def is_one_of(name: str, value: Any, choices: Collection[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def plain(value: Any) -> Any:
    """Return the Python number of a numpy scalar or of a 0-dim tensor on the CPU, and any other value as it is."""
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):  # Dynamo can't ask a symbolic number for more
        return value
    if isinstance(value, Tensor):
        holds_number = value.dim() == 0 and value.device.type == "cpu" and not value.requires_grad
    else:
        holds_number = getattr(value, "ndim", None) == 0
    return value.item() if holds_number else value


def listed(value: Any) -> list[Any] | None:
    """Return the elements of a sequence, an array or a 1-d tensor on the CPU; None if ``value`` is none of these."""
    if value is None or isinstance(value, (str, int, float, torch.SymInt, torch.SymFloat)):
        return None  # Dynamo can't ask a symbolic number for more
    if isinstance(value, Sequence):
        return list(value)
    is_array = hasattr(value, "__array__") and (not isinstance(value, Tensor) or value.device.type == "cpu")
    return list(value) if is_array and getattr(value, "ndim", 0) == 1 else None


def as_bool(name: str, value: Any) -> bool:
    given, value = value, plain(value)
    if not isinstance(value, bool):
        raise TypeError(
            f"{name}: expected True or False, got {_told(given) if isinstance(given, Tensor) else repr(given)}"
        )
    return value


def as_int(name: str, value: Any, expected: str = "an integer") -> int:
    """Convert an int, a numpy integer, a 0-dim integer tensor on the CPU, or anything else with ``__index__``."""
    value = plain(value)
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    if not _converts(value, "__index__"):
        raise TypeError(f"{name}: expected {expected}, got {_told(value)}")
    return operator.index(value)


def as_count(name: str, value: Any, least: int = 0, expected: str = "an integer") -> int:
    """Convert an integer that is at least ``least`` and fits into an int64."""
    value = as_int(name, value, expected)
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    if isinstance(value, int) and value >= 2**63:  # a symbolic number is smaller
        raise ValueError(f"{name}: expected less than 2^63, got {value}")
    return value


def as_limit(name: str, value: Any) -> int | None:
    """Convert a number of items of at least 1, or None for no limit."""
    return None if value is None else as_count(name, value, 1, "an integer or None")


def as_float(name: str, value: Any) -> float:
    """Convert a number, a numpy scalar, a 0-dim tensor on the CPU, or anything else with ``__float__``, but not NaN."""
    value = _real(name, value)
    if value != value:  # Dynamo can't trace math.isnan of a symbolic number
        raise ValueError(f"{name}: expected a number, got nan")
    return value


def as_positive(name: str, value: Any) -> float:
    """Convert like `as_float` and check that the number is positive and finite."""
    number = _real(name, value)
    if not 0 < number < float("inf"):
        raise ValueError(f"{name}: expected a positive number, got {plain(value)!r}")
    return number


def _real(name: str, value: Any) -> float:
    value = plain(value)
    if isinstance(value, (float, torch.SymFloat)):
        return value  # type: ignore[return-value]
    if not _converts(value, "__float__") and not _converts(value, "__index__"):
        raise TypeError(f"{name}: expected a number, got {_told(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number within the range of floats, got a larger integer") from None


def _converts(value: Any, method: str) -> bool:
    is_array = isinstance(value, Tensor) or getattr(value, "ndim", 0) > 0
    return not is_array and not isinstance(value, bool) and hasattr(type(value), method)


def _told(value: Any) -> str:
    """Describe a value that isn't a number."""
    kind = "a tensor" if isinstance(value, Tensor) else "an array"
    if getattr(value, "ndim", 0) > 0:
        return f"{kind} of shape {list(value.shape)}"
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.device.type != "cpu":
        return f"a tensor on {value.device}, which to read would wait for the device"
    return "a tensor that requires a gradient" if value.requires_grad else f"a tensor of {value.dtype}"


def broadcast(**tensors: Tensor) -> list[Tensor]:
    """Return the tensors on one device, in the dtype that torch promotes them to, expanded to one shape."""
    values = list(tensors.values())
    shape, dtype, device = values[0].shape, values[0].dtype, values[0].device
    if all(t.shape == shape and t.dtype == dtype and t.device == device for t in values):
        return values
    first = next((t for t in values if t.dim() > 0), None)
    if first is not None:
        tensors = {name: beside(first, t) for name, t in tensors.items()}
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
