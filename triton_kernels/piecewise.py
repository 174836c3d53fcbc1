"""Piecewise-linear activations, whose backward needs one bit per element."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.triton_kernels.common import (
    BLOCK,
    FLOATING,
    MaskLayout,
    kernel,
    load_bits,
    locate,
    store_bits,
    tile,
    widen,
)


@kernel(
    "*T *T *T *u8 fp64 fp64 fp64 fp64 fp64 i32 i32 i32 i32 i32 i32",
    FLOATING,
    {biased: {"BIASED": biased, "BLOCK": BLOCK} for biased in (False, True)},
    streams=BLOCK,
)
@triton.jit(do_not_specialize=["nan_passes", "inner", "channels", "bytes", "blocks"])
def piecewise_linear_kernel(
    x_ptr,
    bias_ptr,
    y_ptr,
    mask_ptr,
    low: tl.float64,
    high: tl.float64,
    below: tl.float64,
    above: tl.float64,
    slope: tl.float64,
    nan_passes,
    inner,
    channels,
    elements,
    bytes,
    blocks,
    BIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    example, block = locate(blocks)
    index = tile(block * BLOCK, BLOCK)
    inside = index < elements
    at = example * elements + index
    v = widen(tl.load(x_ptr + at, mask=inside, other=0))
    if BIASED:
        channel = index // inner % channels
        v += widen(tl.load(bias_ptr + example * channels + channel, mask=inside, other=0))
    under = v <= tl.full([1, 1], low, v.dtype)
    over = v >= tl.full([1, 1], high, v.dtype)
    keep = inside & ~under & ~over & ((v == v) | (nan_passes != 0))
    flat = tl.where(under, tl.full([1, 1], below, v.dtype), tl.where(over, tl.full([1, 1], above, v.dtype), v))
    steep = tl.full([1, 1], slope, v.dtype)
    y = tl.where(keep, v, tl.where(steep != 0, v * steep, flat))
    tl.store(y_ptr + at, y, mask=inside)
    store_bits(mask_ptr + example * bytes, block * (BLOCK // 8), bytes, keep, BLOCK)


@kernel("*T *u8 *T fp64 fp64 i32 i32 i32", FLOATING, {None: {"BLOCK": BLOCK}}, streams=BLOCK)
@triton.jit(do_not_specialize=["bytes", "blocks"])
def apply_mask_kernel(
    x_ptr, mask_ptr, out_ptr, on: tl.float64, off: tl.float64, elements, bytes, blocks, BLOCK: tl.constexpr
):
    example, block = locate(blocks)
    index = tile(block * BLOCK, BLOCK)
    inside = index < elements
    at = example * elements + index
    keep = load_bits(mask_ptr + example * bytes, block * (BLOCK // 8), bytes, BLOCK)
    x = widen(tl.load(x_ptr + at, mask=inside, other=0))
    rest = tl.full([1, 1], off, x.dtype)
    masked = tl.where(keep, x * tl.full([1, 1], on, x.dtype), tl.where(rest != 0, x * rest, 0.0))
    tl.store(out_ptr + at, masked, mask=inside)


def piecewise_linear(
    x: Tensor,
    bias: Tensor | None,
    inner: int,
    low: float,
    high: float | None,
    below: float,
    above: float,
    slope: float,
    nan_passes: bool,
    batch_dims: int,
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    layout = MaskLayout.of(x, batch_dims)
    batch = x.shape[:batch_dims]
    channels = 1
    if bias is not None:
        bias, channels = bias.contiguous(), bias.shape[-1]
        if bias.dtype != x.dtype or bias.shape[:-1] != batch or layout.elements % max(1, channels * inner):
            raise RuntimeError("bias: expected x's dtype and one value for each of its channels")
    y = x.new_empty(x.shape)
    mask = x.new_empty((*batch, layout.bytes), dtype=torch.uint8)
    examples, elements, bytes = layout.flat() if bias is None else layout
    blocks = triton.cdiv(elements, BLOCK)
    levels = [float(math.nan if level is None else level) for level in (low, high, below, above, slope)]
    piecewise_linear_kernel(
        examples * blocks,
        *(x, x if bias is None else bias, y, mask, *levels),
        *(int(nan_passes), inner, channels, elements, bytes, blocks),
        variant=bias is not None,
    )
    return y, mask


def apply_mask(x: Tensor, mask: Tensor, on: float, off: float) -> Tensor:
    x, mask = x.contiguous(), mask.contiguous()
    layout = MaskLayout.of(x, mask.dim() - 1)
    layout.check(mask)
    out = x.new_empty(x.shape)
    examples, elements, bytes = layout.flat()
    blocks = triton.cdiv(elements, BLOCK)
    apply_mask_kernel(examples * blocks, x, mask, out, float(on), float(off), elements, bytes, blocks)
    return out


def apply_mask_and_sum(x: Tensor, mask: Tensor, inner: int, channels: int, off: float) -> tuple[Tensor, Tensor]:
    masked = apply_mask(x, mask, 1.0, off)
    batch = mask.shape[:-1]
    elements = math.prod(x.shape[len(batch) :])
    rows = elements // max(1, channels * inner)
    if channels < 0 or inner <= 0 or rows * channels * inner != elements:
        raise RuntimeError(f"channels, inner: expected divisors of {elements} elements, got {channels} and {inner}")
    return masked, masked.reshape(*batch, rows, channels, inner).sum((-3, -1))
