"""Packed masks, as csrc/bits.h and triton_kernels/common.py lay them out, for the fake kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def empty_mask(x: Tensor, batch_dims: int) -> Tensor:
    """One bit per element in [*batch, ceil(n / 8)] bytes; the first ``batch_dims`` dimensions are the batch."""
    torch._check(0 <= batch_dims <= x.dim(), lambda: f"batch_dims: expected 0 to {x.dim()}, got {batch_dims}")
    elements = math.prod(x.shape[batch_dims:])
    return x.new_empty((*x.shape[:batch_dims], (elements + 7) // 8), dtype=torch.uint8)
