"""Helpers for computing 16-bit numbers in more than 16 bits."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor


@overload
def wide(x: Tensor) -> Tensor: ...
@overload
def wide(x: None) -> None: ...
def wide(x: Tensor | None) -> Tensor | None:
    """Return x, in float32 if it has fewer bits."""
    return None if x is None else x.to(torch.promote_types(x.dtype, torch.float32))


def to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in that dtype. ``Tensor.to`` takes 2 microseconds even if it has nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def under_autocast(x: Tensor) -> bool:
    """Return whether autocast is on for x's device; the meta device has no autocast state."""
    # Dynamo of torch 2.10 can't trace torch.amp.is_autocast_available.
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)
