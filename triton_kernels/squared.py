"""Squared ReLU."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from custom_ops.triton_kernels.common import BLOCK, FLOATING, kernel, widen

_VARIANTS = {None: {"BLOCK": BLOCK}}


@kernel("*T *T i32", FLOATING, _VARIANTS, streams=BLOCK)
@triton.jit
def squared_relu_forward_kernel(x_ptr, y_ptr, elements, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    v = widen(tl.load(x_ptr + at, mask=inside, other=0))
    tl.store(y_ptr + at, tl.where(v <= 0, 0.0, v * v), mask=inside)


@kernel("*T *T *T i32", FLOATING, _VARIANTS, streams=BLOCK)
@triton.jit
def squared_relu_backward_kernel(grad_ptr, x_ptr, out_ptr, elements, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    v = widen(tl.load(x_ptr + at, mask=inside, other=0))
    grad = widen(tl.load(grad_ptr + at, mask=inside, other=0))
    tl.store(out_ptr + at, tl.where(v <= 0, 0.0, 2 * grad * v), mask=inside)


def squared_relu_forward(x: Tensor) -> Tensor:
    x = x.contiguous()
    y = x.new_empty(x.shape)
    squared_relu_forward_kernel(triton.cdiv(x.numel(), BLOCK), x, y, x.numel())
    return y


def squared_relu_backward(grad: Tensor, x: Tensor) -> Tensor:
    grad, x = grad.contiguous(), x.contiguous()
    if grad.shape != x.shape or grad.dtype != x.dtype:
        raise RuntimeError("grad: expected the shape and dtype of x")
    out = x.new_empty(x.shape)
    squared_relu_backward_kernel(triton.cdiv(x.numel(), BLOCK), grad, x, out, x.numel())
    return out
