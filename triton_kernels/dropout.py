"""Dropout of ReLU, with both masks merged into one bit per element."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.triton_kernels.common import BLOCK, FLOATING, MaskLayout, kernel, locate, store_bits, tile, widen


@triton.jit
def _draws(seed, first, BLOCK: tl.constexpr):
    """Return the draws of a `tile` of elements; each Philox counter gives those of four elements."""
    counter = first // 4 + tl.arange(0, BLOCK // 4)
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = low * 0
    a, b, c, d = tl.philox(seed, low, high, zero, zero)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK // 8, 8])


@kernel("*T *i64 *T *u8 i64 fp64 i32 i32 i32", FLOATING, {None: {"BLOCK": BLOCK}}, streams=BLOCK)
@triton.jit(do_not_specialize=["least", "bytes", "blocks"])
def relu_dropout_forward_kernel(
    x_ptr, seed_ptr, y_ptr, mask_ptr, least, scale: tl.float64, elements, bytes, blocks, BLOCK: tl.constexpr
):
    example, block = locate(blocks)
    index = tile(block * BLOCK, BLOCK)
    inside = index < elements
    at = example * elements + index
    v = widen(tl.load(x_ptr + at, mask=inside, other=0))
    drawn = _draws(tl.load(seed_ptr + example), block * BLOCK, BLOCK).to(tl.int64) >= least
    keep = inside & drawn & ~(v <= 0)
    y = tl.where(v != v, v, tl.where(keep, v * tl.full([1, 1], scale, v.dtype), 0.0))
    tl.store(y_ptr + at, y, mask=inside)
    store_bits(mask_ptr + example * bytes, block * (BLOCK // 8), bytes, keep, BLOCK)


def relu_dropout_forward(x: Tensor, seed: Tensor, p: float, batch_dims: int) -> tuple[Tensor, Tensor]:
    x, seed = x.contiguous(), seed.contiguous()
    layout = MaskLayout.of(x, batch_dims)
    batch = x.shape[:batch_dims]
    if seed.dtype != torch.int64 or seed.shape != batch:
        raise RuntimeError("seed: expected an int64 for each example")
    if not 0 <= p <= 1:
        raise RuntimeError(f"p: expected a probability, got {p}")
    y = x.new_empty(x.shape)
    mask = x.new_empty((*batch, layout.bytes), dtype=torch.uint8)
    blocks = triton.cdiv(layout.elements, BLOCK)
    scale = 1 / (1 - p) if p < 1 else 0.0
    relu_dropout_forward_kernel(
        layout.examples * blocks, x, seed, y, mask, round(p * 2**32), scale, layout.elements, layout.bytes, blocks
    )
    return y, mask
