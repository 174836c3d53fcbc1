"""Where 16-bit numbers are computed in more than 16 bits."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor


@overload
def wide(x: Tensor) -> Tensor: ...
@overload
def wide(x: None) -> None: ...
def wide(x: Tensor | None) -> Tensor | None:
    """x in float32, if it has fewer bits."""
    return None if x is None else x.to(torch.promote_types(x.dtype, torch.float32))


def under_autocast(x: Tensor) -> bool:
    """Whether autocast is on where x lies; the meta device has none."""
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)
