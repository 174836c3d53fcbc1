"""Packed masks, laid out as in csrc/bits.h and triton_kernels/common.py."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def empty_mask(x: Tensor, batch_dims: int) -> Tensor:
    """One bit per element in [*batch, ceil(n / 8)] bytes; the first ``batch_dims`` dimensions are the batch."""
    torch._check(0 <= batch_dims <= x.dim(), lambda: f"batch_dims: expected 0 to {x.dim()}, got {batch_dims}")
    elements = math.prod(x.shape[batch_dims:])
    return x.new_empty((*x.shape[:batch_dims], (elements + 7) // 8), dtype=torch.uint8)


def pack(keep: Tensor, batch_dims: int) -> Tensor:
    """The packed mask of booleans."""
    batch, n = keep.shape[:batch_dims], math.prod(keep.shape[batch_dims:])
    bits = F.pad(keep.reshape(*batch, n).to(torch.uint8), (0, -n % 8))
    # Eight bytes of 0 or 1 are a 64-bit word; the product moves their bits into its highest byte.
    return ((bits.view(torch.int64) * 0x0102040810204080) >> 56).to(torch.uint8)


def unpack(mask: Tensor, x: Tensor) -> Tensor:
    """The booleans of the packed ``mask`` for the elements of x."""
    bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1 != 0
    n = math.prod(x.shape[mask.dim() - 1 :])
    return bits.reshape(*mask.shape[:-1], mask.shape[-1] * 8)[..., :n].reshape(x.shape)
