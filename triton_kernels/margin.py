"""Margin ranking loss of pairs of scores, elementwise."""

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
    accumulator,
    kernel,
    load_bits,
    locate,
    store_bits,
    tile,
    widen,
)


# Fusion is off, so v is rounded as in the C++ kernel and in torch; a fused multiply-add would move the kink.
@kernel(
    "*T *T *T *T *A *u8 fp64 i32 i32 i32",
    FLOATING,
    {reduce: {"REDUCE": reduce, "BLOCK": BLOCK} for reduce in (False, True)},
    streams=BLOCK,
    enable_fp_fusion=False,
)
@triton.jit(do_not_specialize=["bytes", "blocks"])
def margin_ranking_kernel(
    input1_ptr,
    input2_ptr,
    target_ptr,
    loss_ptr,
    partial_ptr,
    mask_ptr,
    margin: tl.float64,
    elements,
    bytes,
    blocks,
    REDUCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    example, block = locate(blocks)
    index = tile(block * BLOCK, BLOCK)
    inside = index < elements
    at = example * elements + index
    x1 = widen(tl.load(input1_ptr + at, mask=inside, other=0))
    x2 = widen(tl.load(input2_ptr + at, mask=inside, other=0))
    t = widen(tl.load(target_ptr + at, mask=inside, other=0))
    v = tl.full([1, 1], margin, t.dtype) - t * (x1 - x2)
    store_bits(mask_ptr + example * bytes, block * (BLOCK // 8), bytes, inside & (v >= 0), BLOCK)
    loss = tl.where(v < 0, 0.0, v)
    if REDUCE:
        tl.store(partial_ptr + example * blocks + block, tl.sum(tl.where(inside, loss, 0.0)))
    else:
        tl.store(loss_ptr + at, loss, mask=inside)


@kernel(
    "*A *T fp64 i32",
    FLOATING,
    {None: {"BLOCK": BLOCK}},
    narrow="reads one number for 1,024 pairs, each example's from any place",
)
@triton.jit(do_not_specialize=["blocks"])
def margin_ranking_total_kernel(partial_ptr, loss_ptr, weight: tl.float64, blocks, BLOCK: tl.constexpr):
    example = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + example * blocks + block, mask=block < blocks, other=0)
    loss = tl.sum(total) * weight
    tl.store(loss_ptr + example, loss.to(partial_ptr.dtype.element_ty))


@kernel(
    "*T *T *T *T *u8 *T *T *T fp64 i32 i32 i32",
    FLOATING,
    {
        (reduce, of_target): {"REDUCE": reduce, "OF_TARGET": of_target, "BLOCK": BLOCK}
        for reduce in (False, True)
        for of_target in (False, True)
    },
    streams=BLOCK,
)
@triton.jit(do_not_specialize=["bytes", "blocks"])
def margin_ranking_backward_kernel(
    grad_ptr,
    input1_ptr,
    input2_ptr,
    target_ptr,
    mask_ptr,
    grad1_ptr,
    grad2_ptr,
    grad_target_ptr,
    weight: tl.float64,
    elements,
    bytes,
    blocks,
    REDUCE: tl.constexpr,
    OF_TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    example, block = locate(blocks)
    index = tile(block * BLOCK, BLOCK)
    inside = index < elements
    at = example * elements + index
    keep = load_bits(mask_ptr + example * bytes, block * (BLOCK // 8), bytes, BLOCK)
    t = widen(tl.load(target_ptr + at, mask=inside, other=0))
    if REDUCE:
        g = widen(tl.load(grad_ptr + example)) * tl.full([1, 1], weight, t.dtype)
    else:
        g = widen(tl.load(grad_ptr + at, mask=inside, other=0))
    slope = tl.where(keep, t * g, 0.0)
    # Triton may write -slope as 0 - slope, which gives 0 instead of -0
    tl.store(grad1_ptr + at, tl.where(keep, slope * -1.0, 0.0), mask=inside)
    tl.store(grad2_ptr + at, slope, mask=inside)
    if OF_TARGET:
        x1 = widen(tl.load(input1_ptr + at, mask=inside, other=0))
        x2 = widen(tl.load(input2_ptr + at, mask=inside, other=0))
        tl.store(grad_target_ptr + at, tl.where(keep, (x2 - x1) * g, 0.0), mask=inside)


def _weight(divisor: int) -> float:
    return 1.0 / divisor if divisor else math.inf


def _check_alike(input1: Tensor, input2: Tensor, target: Tensor) -> None:
    for x in (input1, input2):
        if x.shape != target.shape or x.dtype != target.dtype:
            raise RuntimeError("input1, input2, target: expected the same shape and dtype")


def margin_ranking(
    input1: Tensor, input2: Tensor, target: Tensor, margin: float, divisor: int, reduce: bool, batch_dims: int
) -> tuple[Tensor, Tensor]:
    _check_alike(input1, input2, target)
    input1, input2, target = input1.contiguous(), input2.contiguous(), target.contiguous()
    layout = MaskLayout.of(target, batch_dims)
    batch = target.shape[:batch_dims]
    loss = target.new_empty(batch if reduce else target.shape)
    mask = target.new_empty((*batch, layout.bytes), dtype=torch.uint8)
    examples, elements, bytes = layout if reduce else layout.flat()
    blocks = triton.cdiv(elements, BLOCK)
    partial = target.new_empty(examples * blocks if reduce else 0, dtype=accumulator(target.dtype))
    pointers = (input1, input2, target, loss, partial, mask)
    margin_ranking_kernel(examples * blocks, *pointers, float(margin), elements, bytes, blocks, variant=reduce)
    if reduce:
        margin_ranking_total_kernel(examples, partial, loss, _weight(divisor), blocks)
    return loss, mask


def margin_ranking_backward(
    grad: Tensor, input1: Tensor | None, input2: Tensor | None, target: Tensor, mask: Tensor, divisor: int, reduce: bool
) -> tuple[Tensor, Tensor, Tensor]:
    of_target = input1 is not None
    if of_target != (input2 is not None):
        raise RuntimeError("input1, input2: expected both or neither")
    if input1 is None or input2 is None:
        input1 = input2 = target  # a placeholder that isn't read
    _check_alike(input1, input2, target)
    grad, input1, input2, target, mask = (t.contiguous() for t in (grad, input1, input2, target, mask))
    layout = MaskLayout.of(target, mask.dim() - 1)
    layout.check(mask)
    if grad.numel() != (layout.examples if reduce else target.numel()) or grad.dtype != target.dtype:
        raise RuntimeError("grad: expected the shape and dtype of the loss")
    grad1, grad2 = target.new_empty(target.shape), target.new_empty(target.shape)
    grad_target = target.new_empty(target.shape if of_target else (0,))
    examples, elements, bytes = layout if reduce else layout.flat()
    blocks = triton.cdiv(elements, BLOCK)
    pointers = (grad, input1, input2, target, mask, grad1, grad2, grad_target)
    weight = _weight(divisor)
    margin_ranking_backward_kernel(
        examples * blocks, *pointers, weight, elements, bytes, blocks, variant=(reduce, of_target)
    )
    return grad1, grad2, grad_target
