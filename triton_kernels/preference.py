"""Losses of one margin per pair of a preferred and a rejected item."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops._enums import PreferenceLoss
from custom_ops.triton_kernels.common import BLOCK, FLOATING, accumulator, constant, kernel, locate, widen

LOGISTIC = constant(PreferenceLoss.LOGISTIC)
HINGE = constant(PreferenceLoss.HINGE)
SQUARED = constant(PreferenceLoss.SQUARED)
SIGMOID = constant(PreferenceLoss.SIGMOID)
BLEND = constant(PreferenceLoss.BLEND)


@triton.jit
def log1p_unit(u):
    """Return log(1 + u) for 0 <= u <= 1 as 2 artanh(u / (2 + u)), which is accurate for small u too."""
    TERMS: tl.constexpr = 17 if u.dtype == tl.float64 else 8
    s = u / (2 + u)
    q = s * s
    y = q * 0 + 2.0 / (2 * TERMS - 1)
    for k in tl.static_range(TERMS - 2, -1, -1):
        y = y * q + 2.0 / (2 * k + 1)
    return y * s


@triton.jit
def weigh(weight, value):
    """Return weight * value, but 0 for a weight of 0 whatever the value is."""
    return tl.where(weight == 0, 0.0, weight * value)


@triton.jit
def derivative(d, beta, p, q, KIND: tl.constexpr, ORDER: tl.constexpr):
    """Return the derivative of a loss with respect to d, as in csrc/preference.cpp."""
    z = beta * d
    if KIND == HINGE:
        if ORDER == 0:
            return tl.where(1 - z < 0, 0.0, 1 - z)
        elif ORDER == 1:
            return tl.where(1 - z <= 0, 0.0, -beta)
        else:
            return tl.where(d == d, 0.0, d)
    elif KIND == SQUARED:
        if ORDER == 0:
            return (d - p) * (d - p)
        elif ORDER == 1:
            return 2 * (d - p)
        elif ORDER == 2:
            return tl.where(d == d, 2.0, d)
        else:
            return tl.where(d == d, 0.0, d)
    else:
        u = tl.exp(tl.where(z < 0, z, -z))
        whole = 1 / (1 + u)
        up = tl.where(z < 0, u * whole, whole)
        down = tl.where(z < 0, whole, u * whole)
        both = up * down
        if ORDER == 0:
            rest = log1p_unit(u)
            low = tl.where(z < 0, -z, 0.0) + rest
            high = tl.where(z < 0, 0.0, z) + rest
        if KIND == LOGISTIC:
            if ORDER == 0:
                return weigh(p, low) + weigh(q, high)
            elif ORDER == 1:
                return beta * (q * up - p * down)
            elif ORDER == 2:
                return beta * beta * (p + q) * both
            else:
                return beta * beta * beta * (p + q) * (both * (down - up))
        elif KIND == SIGMOID:
            slope = down - up
            if ORDER == 0:
                return p * down + q * up
            elif ORDER == 1:
                return beta * (q - p) * both
            elif ORDER == 2:
                return beta * beta * (q - p) * (both * slope)
            else:
                return beta * beta * beta * (q - p) * (both * (slope * slope - 2 * both))
        elif KIND == BLEND:
            v = tl.exp(-tl.abs(p * z))
            own = tl.where(z < 0, v, 1.0) / (1 + v)
            other = tl.where(z < 0, 1.0, v) / (1 + v)
            exponential = tl.exp(tl.where(z < 0, weigh(p - 1, z), -z)) * tl.where(z < 0, other, own)
            if ORDER > 0:  # low, which the other losses need for their values only
                low = tl.where(z < 0, -z, 0.0) + log1p_unit(u)
            m = p * (own * other)
            turn = p * (other - own)
            g = p * other - 1
            if ORDER == 0:
                return weigh(other, low) + exponential
            elif ORDER == 1:
                return beta * (exponential * g - other * down - weigh(m, low))
            elif ORDER == 2:
                moved = other * both + 2 * down * m - weigh(m * turn, low)
                return beta * beta * (moved + exponential * (g * g - p * m))
            else:
                moved = other * (both * (down - up)) - 3 * both * m + 3 * down * (m * turn)
                moved -= weigh(m * (turn * turn - 2 * p * m), low)
                return beta * beta * beta * (moved + exponential * (g * (g * g - 3 * p * m) - p * (m * turn)))
        else:
            beyond = z - (q - p)
            slope = down - up
            if ORDER == 0:
                return weigh(up, p - low) + weigh(down, q - high)
            elif ORDER == 1:
                return beta * weigh(both, beyond)
            elif ORDER == 2:
                return beta * beta * weigh(both, slope * beyond + 1)
            else:
                return beta * beta * beta * weigh(both, (slope * slope - 2 * both) * beyond + 2 * slope)


@triton.jit
def add_exactly(total, x, rest):
    """Return total + x, and ``rest`` plus the rounding error of that sum."""
    sum = total + x
    added = sum - total
    return sum, rest + ((total - (sum - added)) + (x - added))


@triton.jit
def value_at(
    chosen_ptr,
    rejected_ptr,
    chosen_offset_ptr,
    rejected_offset_ptr,
    at,
    inside,
    chosen_offset,
    rejected_offset,
    margin,
    beta,
    p,
    q,
    KIND: tl.constexpr,
    ORDER: tl.constexpr,
):
    """Return the derivative at chosen - rejected - chosen_offset + rejected_offset - margin; an offset may be missing.

    The rounding error of each sum is added at the end, and sums of quarters can't overflow.
    """
    c = widen(tl.load(chosen_ptr + at, mask=inside, other=0))
    r = widen(tl.load(rejected_ptr + at, mask=inside, other=0))
    co = widen(tl.load(chosen_offset_ptr + at, mask=tl.where(chosen_offset != 0, inside, False), other=0))
    ro = widen(tl.load(rejected_offset_ptr + at, mask=tl.where(rejected_offset != 0, inside, False), other=0))
    total, rest = add_exactly(0.25 * c, -0.25 * r, c * 0)
    total, rest = add_exactly(total, -0.25 * co, rest)
    total, rest = add_exactly(total, 0.25 * ro, rest)
    total, rest = add_exactly(total, tl.full([1], -0.25 * margin, c.dtype), rest)
    whole = total + rest
    d = 4 * tl.where(whole == whole, whole, total)  # `rest` is NaN if a term is infinite
    beta, p, q = tl.full([1], beta, c.dtype), tl.full([1], p, c.dtype), tl.full([1], q, c.dtype)
    return derivative(d, beta, p, q, KIND, ORDER)


# Fusion is off, so 1 - beta d is rounded as in the C++ kernel; a fused multiply-add would move the hinge's kink.
@kernel(
    "*T *T *T *T *T *A fp64 fp64 fp64 fp64 i32 i32 i32 i32",
    FLOATING,
    {
        (kind, reduce): {"KIND": kind, "REDUCE": reduce, "BLOCK": BLOCK}
        for kind in map(int, PreferenceLoss)
        for reduce in (False, True)
    },
    streams=BLOCK,
    enable_fp_fusion=False,
)
@triton.jit(do_not_specialize=["chosen_offset", "rejected_offset", "blocks"])
def preference_kernel(
    chosen_ptr,
    rejected_ptr,
    chosen_offset_ptr,
    rejected_offset_ptr,
    loss_ptr,
    partial_ptr,
    margin: tl.float64,
    beta: tl.float64,
    p: tl.float64,
    q: tl.float64,
    chosen_offset,
    rejected_offset,
    elements,
    blocks,
    KIND: tl.constexpr,
    REDUCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    example, block = locate(blocks)
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < elements
    at = example * elements + index
    pointers = (chosen_ptr, rejected_ptr, chosen_offset_ptr, rejected_offset_ptr)
    loss = value_at(*pointers, at, inside, chosen_offset, rejected_offset, margin, beta, p, q, KIND, 0)
    if REDUCE:
        tl.store(partial_ptr + example * blocks + block, tl.sum(tl.where(inside, loss, 0.0)))
    else:
        tl.store(loss_ptr + at, loss, mask=inside)


@kernel(
    "*T *T *T *T *T *T fp64 fp64 fp64 fp64 fp64 i32 i32 i32 i32 i32",
    FLOATING,
    {
        (kind, order): {"KIND": kind, "ORDER": order, "BLOCK": BLOCK}
        for kind in map(int, PreferenceLoss)
        for order in (1, 2, 3)
    },
    streams=BLOCK,
    enable_fp_fusion=False,
)
@triton.jit(do_not_specialize=["chosen_offset", "rejected_offset", "reduce", "blocks"])
def preference_slope_kernel(
    weight_ptr,
    chosen_ptr,
    rejected_ptr,
    chosen_offset_ptr,
    rejected_offset_ptr,
    slope_ptr,
    scale: tl.float64,
    margin: tl.float64,
    beta: tl.float64,
    p: tl.float64,
    q: tl.float64,
    chosen_offset,
    rejected_offset,
    reduce,
    elements,
    blocks,
    KIND: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    example, block = locate(blocks)
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < elements
    at = example * elements + index
    pointers = (chosen_ptr, rejected_ptr, chosen_offset_ptr, rejected_offset_ptr)
    slope = value_at(*pointers, at, inside, chosen_offset, rejected_offset, margin, beta, p, q, KIND, ORDER)
    if reduce != 0:
        w = tl.full([BLOCK], widen(tl.load(weight_ptr + example)), slope.dtype)
    else:
        w = widen(tl.load(weight_ptr + at, mask=inside, other=0))
    tl.store(slope_ptr + at, w * tl.full([1], scale, w.dtype) * slope, mask=inside)


def _prepared(
    chosen: Tensor, rejected: Tensor, chosen_offset: Tensor | None, rejected_offset: Tensor | None
) -> tuple[Tensor, ...]:
    """Return the four tensors as the kernels take them; a missing one isn't read."""
    given = [chosen if t is None else t for t in (chosen, rejected, chosen_offset, rejected_offset)]
    if any(t.shape != chosen.shape or t.dtype != chosen.dtype for t in given):
        raise RuntimeError("chosen, rejected and their offsets: expected the same shape and dtype")
    return tuple(t.contiguous() for t in given)


def preference(
    chosen: Tensor,
    rejected: Tensor,
    chosen_offset: Tensor | None,
    rejected_offset: Tensor | None,
    kind: int,
    margin: float,
    beta: float,
    p: float,
    q: float,
    divisor: int,
    reduce: bool,
    batch_dims: int,
) -> Tensor:
    pointers = _prepared(chosen, rejected, chosen_offset, rejected_offset)
    batch = chosen.shape[:batch_dims]
    examples, elements = (math.prod(batch), math.prod(chosen.shape[batch_dims:])) if reduce else (1, chosen.numel())
    loss = chosen.new_empty(batch if reduce else chosen.shape)
    blocks = triton.cdiv(elements, BLOCK)
    partial = chosen.new_empty((*batch, blocks if reduce else 0), dtype=accumulator(chosen.dtype))
    offsets = (int(t is not None) for t in (chosen_offset, rejected_offset))
    parameters = (margin, beta, p, q, *offsets, elements, blocks)
    preference_kernel(examples * blocks, *pointers, loss, partial, *parameters, variant=(kind, reduce))
    if reduce:
        total = partial.sum(-1, dtype=torch.float64) / max(divisor, 1)
        loss = total.to(partial.dtype).to(chosen.dtype)
    return loss


def preference_slope(
    weight: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    chosen_offset: Tensor | None,
    rejected_offset: Tensor | None,
    order: int,
    kind: int,
    margin: float,
    beta: float,
    p: float,
    q: float,
    divisor: int,
    reduce: bool,
) -> Tensor:
    pointers = _prepared(chosen, rejected, chosen_offset, rejected_offset)
    if weight.shape != chosen.shape[: weight.dim()] or weight.dtype != chosen.dtype:
        raise RuntimeError("weight: expected the shape and dtype of the loss")
    if not reduce and weight.dim() != chosen.dim():
        raise RuntimeError("weight: expected one for each element")
    slope = chosen.new_empty(chosen.shape)
    examples = weight.numel() if reduce else 1
    elements = math.prod(chosen.shape[weight.dim() :]) if reduce else chosen.numel()
    blocks = triton.cdiv(elements, BLOCK)
    numbers = (1.0 / max(divisor, 1), margin, beta, p, q)
    offsets = (int(t is not None) for t in (chosen_offset, rejected_offset))
    sizes = (*offsets, int(reduce), elements, blocks)
    tensors = (weight.contiguous(), *pointers, slope)
    preference_slope_kernel(examples * blocks, *tensors, *numbers, *sizes, variant=(kind, order))
    return slope
