"""One-bit activations."""

from __future__ import annotations

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

_VARIANTS = {None: {"BLOCK": BLOCK}}


@kernel("*T *T *u8 i32 i32 i32", FLOATING, _VARIANTS)
@triton.jit(do_not_specialize=["bytes", "blocks"])
def relu_forward_kernel(x_ptr, y_ptr, mask_ptr, elements, bytes, blocks, BLOCK: tl.constexpr):
    example, block = locate(blocks)
    index = tile(block * BLOCK, BLOCK)
    inside = index < elements
    at = example * elements + index
    x = tl.load(x_ptr + at, mask=inside, other=0)
    wide = widen(x)  # the interpreter compares bfloat16 as integers
    keep = (wide > 0) | (wide != wide)
    tl.store(y_ptr + at, tl.where(keep, x, 0), mask=inside)
    store_bits(mask_ptr + example * bytes, block * (BLOCK // 8), bytes, keep, BLOCK)


@kernel("*T *u8 *T i32 i32 i32", FLOATING, _VARIANTS)
@triton.jit(do_not_specialize=["bytes", "blocks"])
def apply_mask_kernel(x_ptr, mask_ptr, out_ptr, elements, bytes, blocks, BLOCK: tl.constexpr):
    example, block = locate(blocks)
    index = tile(block * BLOCK, BLOCK)
    inside = index < elements
    at = example * elements + index
    keep = load_bits(mask_ptr + example * bytes, block * (BLOCK // 8), bytes, BLOCK)
    x = tl.load(x_ptr + at, mask=inside, other=0)
    tl.store(out_ptr + at, tl.where(keep, x, 0), mask=inside)


def relu_forward(x: Tensor, batch_dims: int) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    layout = MaskLayout.of(x, batch_dims)
    y = x.new_empty(x.shape)
    mask = x.new_empty((*x.shape[:batch_dims], layout.bytes), dtype=torch.uint8)
    examples, elements, bytes = layout.flat()
    blocks = triton.cdiv(elements, BLOCK)
    relu_forward_kernel(examples * blocks, x, y, mask, elements, bytes, blocks)
    return y, mask


def apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    x, mask = x.contiguous(), mask.contiguous()
    layout = MaskLayout.of(x, mask.dim() - 1)
    layout.check(mask)
    out = x.new_empty(x.shape)
    examples, elements, bytes = layout.flat()
    blocks = triton.cdiv(elements, BLOCK)
    apply_mask_kernel(examples * blocks, x, mask, out, elements, bytes, blocks)
    return out
