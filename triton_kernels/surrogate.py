"""The spike that is differentiated as a smooth step."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from custom_ops._enums import SurrogateShape
from custom_ops.triton_kernels.common import BLOCK, FLOATING, constant, divide, kernel, widen

SIGMOID = constant(SurrogateShape.SIGMOID)
ATAN = constant(SurrogateShape.ATAN)
TRIANGLE = constant(SurrogateShape.TRIANGLE)


@kernel("*T *T i32", FLOATING, {None: {"BLOCK": BLOCK}}, streams=BLOCK)
@triton.jit
def surrogate_step_kernel(x_ptr, y_ptr, elements, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    x = widen(tl.load(x_ptr + at, mask=inside, other=0))
    tl.store(y_ptr + at, (x >= 0).to(x.dtype), mask=inside)


@kernel(
    "*T *T *T fp64 i32",
    FLOATING,
    {shape: {"SHAPE": shape, "BLOCK": BLOCK} for shape in map(int, SurrogateShape)},
    streams=BLOCK,
)
@triton.jit
def surrogate_slope_kernel(
    grad_ptr, x_ptr, out_ptr, width: tl.float64, elements, SHAPE: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    x = widen(tl.load(x_ptr + at, mask=inside, other=0))
    wide = tl.full([1], width, x.dtype)
    u = divide(x, wide)  # 1 at x = width, where triangle and boxcar end
    if SHAPE == SIGMOID:
        e = tl.exp(-tl.abs(u))
        slope = e / ((1 + e) * (1 + e))
    elif SHAPE == ATAN:
        slope = 0.31830988618379067 / (1 + u * u)
    elif SHAPE == TRIANGLE:
        slope = 1 - tl.abs(u)
        slope = tl.where(slope < 0, 0.0, slope)
    else:
        slope = tl.where(tl.abs(u) < 1, 0.5, 0.0)
    grad = widen(tl.load(grad_ptr + at, mask=inside, other=0))
    tl.store(out_ptr + at, grad * (slope / wide), mask=inside)


def surrogate_step(x: Tensor, shape: int, width: float) -> Tensor:
    x = x.contiguous()
    y = x.new_empty(x.shape)
    surrogate_step_kernel(triton.cdiv(x.numel(), BLOCK), x, y, x.numel())
    return y


def surrogate_slope(grad: Tensor, x: Tensor, shape: int, width: float) -> Tensor:
    grad, x = grad.contiguous(), x.contiguous()
    if grad.shape != x.shape:
        raise RuntimeError("grad: expected the shape of x")
    out = x.new_empty(x.shape)
    programs = triton.cdiv(x.numel(), BLOCK)
    surrogate_slope_kernel(programs, grad, x, out, width, x.numel(), variant=shape)
    return out
