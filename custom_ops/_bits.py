"""Packed masks, with the same layout as in csrc/bits.h and triton_kernels/common.py.

Packing and unpacking are written for Inductor on the CPU. A 64-bit word holds eight bytes of one bit each. The
conversion between bytes and booleans goes through floats, for which Inductor has vector instructions; it would convert
bytes to booleans one by one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from custom_ops.library._torch import check


def empty_mask(x: Tensor, batch_dims: int) -> Tensor:
    """Return an empty mask: one bit per element in [*batch, ceil(n / 8)] bytes, for ``batch_dims`` dimensions of
    batch.
    """
    check(0 <= batch_dims <= x.dim(), lambda: f"batch_dims: expected 0 to {x.dim()}, got {batch_dims}")
    elements = math.prod(x.shape[batch_dims:])
    return x.new_empty((*x.shape[:batch_dims], (elements + 7) // 8), dtype=torch.uint8)


def pack(keep: Tensor, batch_dims: int) -> Tensor:
    """Return the packed mask of booleans."""
    batch, n = keep.shape[:batch_dims], math.prod(keep.shape[batch_dims:])
    bits = F.pad(torch.where(keep, 1.0, 0.0).to(torch.uint8).reshape(*batch, n), (0, -n % 8))
    # The product moves the bits of a word into its highest byte.
    return ((bits.view(torch.int64) * 0x0102040810204080) >> 56).to(torch.uint8)


def unpack(mask: Tensor, x: Tensor) -> Tensor:
    """Return the booleans of the packed ``mask`` for the elements of x."""
    # The product copies the byte into all eight bytes of a word, and each copy then keeps another bit.
    words = (mask.to(torch.int64) * 0x0101010101010101) & (0x8040201008040201 - (1 << 64))
    n = math.prod(x.shape[mask.dim() - 1 :])
    return words.view(torch.uint8)[..., :n].reshape(x.shape).to(torch.float32) != 0
