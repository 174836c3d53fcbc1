"""Pairwise losses."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops._enums import PairFunction
from custom_ops.triton_kernels.common import constant, kernel
from custom_ops.triton_kernels.lists import (
    PAIRS,
    TILES,
    WIDE,
    Lists,
    columns,
    list_scale,
    reducing,
    share_of,
    sum_of_rows,
    tiled_columns,
)

_ROWS, _COLUMNS = 16, 32

# These are the functions of a pair's difference d, in `pairwise` and in `pairwise_hinge`, whose d has the margin
# subtracted.
LOGISTIC = constant(PairFunction.LOGISTIC)
SOFT_ZERO_ONE = constant(PairFunction.SOFT_ZERO_ONE)
EXPONENTIAL = constant(PairFunction.EXPONENTIAL)
HINGE = tl.constexpr(len(PairFunction))
SQUARED_HINGE = tl.constexpr(len(PairFunction) + 1)


@triton.jit
def pair_value(d, PHI: tl.constexpr):
    if PHI == LOGISTIC:  # log(1 + exp(-d))
        return log1p_unit(tl.exp(-tl.abs(d))) + tl.maximum(-d, 0.0)
    elif PHI == SOFT_ZERO_ONE:
        return wrong_order(d)
    elif PHI == EXPONENTIAL:
        return tl.exp(-d)
    elif PHI == HINGE:
        return -at_most_zero(d)
    else:
        return at_most_zero(d) * at_most_zero(d)


@triton.jit
def pair_slope(d, PHI: tl.constexpr):
    if PHI == LOGISTIC:
        return -wrong_order(d)
    elif PHI == SOFT_ZERO_ONE:
        return -both_orders(d)
    elif PHI == EXPONENTIAL:
        return -tl.exp(-d)
    elif PHI == HINGE:
        return tl.where(d < 0, -1.0, at_most_zero(d))
    else:
        return 2.0 * at_most_zero(d)


@triton.jit
def pair_curvature(d, PHI: tl.constexpr):
    if PHI == LOGISTIC:
        return both_orders(d)
    elif PHI == SOFT_ZERO_ONE:
        u = tl.exp(-tl.abs(d))
        t = 1.0 + u
        return tl.where(d < 0, u - 1.0, 1.0 - u) * u / (t * t * t)
    elif PHI == EXPONENTIAL:
        return tl.exp(-d)
    elif PHI == HINGE:
        return tl.where(d == d, 0.0, d)
    else:
        return tl.where(d < 0, 2.0, 0.0)


@triton.jit
def wrong_order(d):
    """Return 1 / (1 + exp(d)) without overflow."""
    u = tl.exp(-tl.abs(d))
    return tl.where(d < 0, 1.0, u) / (1.0 + u)


@triton.jit
def both_orders(d):
    """Return `wrong_order` of d times that of -d."""
    u = tl.exp(-tl.abs(d))
    t = 1.0 + u
    return u / (t * t)


@triton.jit
def at_most_zero(d):
    """Return the smaller of d and 0, or NaN for NaN."""
    return tl.minimum(d, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def log1p_unit(u):
    """Return log(1 + u) for u from 0 to 1, with a small relative error."""
    if u.dtype == tl.float64:  # the rounding error of 1 + u is added to first order
        t = 1.0 + u
        return tl.log(t) + (u - (t - 1.0)) / t
    else:  # u times the polynomial of degree 8 with the least relative error, 3e-8
        y = u * 0.00523269426 - 0.0295052388
        y = y * u + 0.0782259519
        y = y * u - 0.136632458
        y = y * u + 0.191060068
        y = y * u - 0.248429822
        y = y * u + 0.333190968
        y = y * u - 0.499994931
        y = y * u + 0.99999997
        return y * u


@kernel(
    "*T *T *T *T *i32 *i64 *fp64 *fp64 *T fp64 fp64 i32 i32 i32 i32",
    WIDE,
    {
        (phi, hessian, weighted): {
            "PHI": phi,
            "HESSIAN": hessian,
            "WEIGHTED": weighted,
            "ROWS": _ROWS,
            "COLUMNS": _COLUMNS // 2 if weighted else _COLUMNS,  # more of them spill in float64
        }
        for phi in range(len(PairFunction) + 2)
        for hessian in (False, True)
        for weighted in (False, True)
    },
    narrow=PAIRS,
    registers=96,
    budget=248,
)
@triton.jit(do_not_specialize=["items", "stride", "lists", "blocks"])
def pairwise_kernel(
    s_ptr,
    y_ptr,
    weight_ptr,
    v_ptr,
    owner_ptr,
    bounds_ptr,
    slope_ptr,
    value_ptr,
    count_ptr,
    factor: tl.float64,
    shift: tl.float64,
    items,
    stride,
    lists,
    blocks,
    PHI: tl.constexpr,
    HESSIAN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Store each item's slope, and the number and total value of its pairs with items that it should be above.

    WEIGHTED counts a pair by the product of its items' weights.
    """
    program = tl.program_id(0).to(tl.int64)
    example = program // blocks * items
    owner_ptr += program // blocks * stride
    i = program % blocks * ROWS + tl.arange(0, ROWS)
    owner_i = tl.load(owner_ptr + i, mask=i < items, other=-1)
    valid_i = owner_i >= 0
    s_i = tl.load(s_ptr + example + i, mask=valid_i, other=0) * 0.5  # differences of halves can't overflow
    y_i = tl.load(y_ptr + example + i, mask=valid_i, other=0)
    slope, value = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64)
    count = tl.zeros([ROWS], tl.float64 if WEIGHTED else tl.int32)
    if HESSIAN:
        v_i = tl.load(v_ptr + example + i, mask=valid_i, other=0)
    twice = tl.full([1, 1], 2.0 * factor, s_i.dtype)
    offset = tl.full([1, 1], shift, s_i.dtype)
    start, stop = columns(bounds_ptr, owner_i, items, lists, True)
    for tiles in range(start, stop, TILES * COLUMNS):
        slopes, values = tl.zeros([ROWS, COLUMNS], s_i.dtype), tl.zeros([ROWS, COLUMNS], s_i.dtype)
        counts = tl.zeros([ROWS, COLUMNS], s_i.dtype if WEIGHTED else tl.int32)
        tiled = tiled_columns(tiles, stop, COLUMNS)
        for first in range(0, tiled, COLUMNS):
            place = first + tl.arange(0, COLUMNS)
            j = tiles + place
            owner_j = tl.load(owner_ptr + j, mask=place < tiled, other=-1)
            valid_j = owner_j >= 0
            s_j = tl.load(s_ptr + example + j, mask=valid_j, other=0) * 0.5
            y_j = tl.load(y_ptr + example + j, mask=valid_j, other=0)
            together = valid_i[:, None] & (owner_i[:, None] == owner_j[None, :])
            above = together & (y_i[:, None] > y_j[None, :])
            below = together & (y_i[:, None] < y_j[None, :])
            difference = s_i[:, None] - s_j[None, :]
            d = tl.where(below, -difference, difference) * twice + offset
            if WEIGHTED:
                w = tl.load(weight_ptr + example + j, mask=valid_j, other=0)[None, :]
                counts += tl.where(above, w, 0.0)
            else:
                counts += above.to(tl.int32)
            if HESSIAN:
                v_j = tl.load(v_ptr + example + j, mask=valid_j, other=0)
                move = pair_curvature(d, PHI) * (v_i[:, None] - v_j[None, :])
                if WEIGHTED:
                    move *= w
                slopes += tl.where(above | below, move, 0.0) * share_of(COLUMNS)
            else:
                g = pair_slope(d, PHI)
                worth = pair_value(d, PHI)
                if WEIGHTED:
                    g *= w
                    worth *= w
                slopes += tl.where(above, g, tl.where(below, -g, 0.0)) * share_of(COLUMNS)
                values += tl.where(above, worth, 0.0) * share_of(COLUMNS)
        slope += sum_of_rows(slopes)
        value += sum_of_rows(values)
        count += tl.sum(counts, axis=1)
    if WEIGHTED:
        w_i = tl.load(weight_ptr + example + i, mask=valid_i, other=0)
        slope *= w_i
        value *= w_i
        count *= w_i
    tl.store(slope_ptr + example + i, slope, mask=i < items)
    tl.store(value_ptr + example + i, value, mask=i < items)
    tl.store(count_ptr + example + i, count.to(s_i.dtype), mask=i < items)


def _pairs(
    scores: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    offsets: Tensor | None,
    item_weights: Tensor | None,
    v: Tensor | None,
    phi: int,
    factor: float,
    shift: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, slope (or Hessian times v) and number of pairs of the sum of phi(factor (s_i - s_j) + shift)."""
    scores, labels = scores.contiguous(), labels.contiguous()
    lists = Lists(scores, valid, offsets)
    given = (labels, item_weights, v)
    if any(x is not None and (x.shape != scores.shape or x.dtype != scores.dtype) for x in given):
        raise RuntimeError("labels, item_weights, v: expected the shape and dtype of the scores")
    slope, value = (torch.empty_like(scores, dtype=torch.float64) for _ in range(2))
    count = torch.empty_like(scores)
    blocks = triton.cdiv(lists.items, _ROWS)
    weights, vector = (scores if x is None else x.contiguous() for x in (item_weights, v))  # or a placeholder
    owners, stride = lists.owners()
    pointers = (scores, labels, weights, vector, owners, lists.bounds, slope, value, count)
    sizes = (lists.items, stride, lists.lists, blocks)
    variant = (phi, v is not None, item_weights is not None)
    pairwise_kernel(lists.examples * blocks, *pointers, factor, shift, *sizes, variant=variant)
    pairs = lists.sum(count)
    loss, weight = lists.sum(value), torch.ones_like(pairs, dtype=torch.float64)
    if normalize:
        weight = weight / torch.where(pairs > 0, pairs, 1)
    slope = list_scale((factor if v is None else factor * factor) * weight, slope, valid, offsets)
    return (loss * weight).to(scores.dtype), slope.to(scores.dtype), pairs


@reducing
def pairwise(
    scores: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    offsets: Tensor | None,
    item_weights: Tensor | None,
    phi: int,
    sigma: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, slope, pairs = _pairs(
        scores, labels, valid, offsets, item_weights, None, PairFunction(phi), sigma, 0.0, normalize
    )
    return loss, slope, pairs > 0


def pairwise_slope(
    scores: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    offsets: Tensor | None,
    item_weights: Tensor | None,
    v: Tensor | None,
    phi: int,
    sigma: float,
    normalize: bool,
) -> Tensor:
    return _pairs(scores, labels, valid, offsets, item_weights, v, PairFunction(phi), sigma, 0.0, normalize)[1]


# ---------------------------------------------------------------- hinge


@reducing
def pairwise_hinge(
    scores: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    offsets: Tensor | None,
    item_weights: Tensor | None,
    margin: float,
    squared: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    phi = SQUARED_HINGE.value if squared else HINGE.value
    loss, slope, pairs = _pairs(scores, labels, valid, offsets, item_weights, None, phi, 1.0, -margin, normalize)
    return loss, slope, pairs > 0


def pairwise_hinge_slope(
    scores: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    offsets: Tensor | None,
    item_weights: Tensor | None,
    v: Tensor | None,
    margin: float,
    squared: bool,
    normalize: bool,
) -> Tensor:
    phi = SQUARED_HINGE.value if squared else HINGE.value
    return _pairs(scores, labels, valid, offsets, item_weights, v, phi, 1.0, -margin, normalize)[1]


# ---------------------------------------------------------------- squared error: no kernel of its own


def _centred(
    x: Tensor, w: Tensor, lists: Lists, valid: Tensor | None, offsets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x minus the weighted mean of its list (0 for invalid items), the sum of the weights, and which lists have
    several items.
    """
    ones = torch.ones_like(x)
    count = lists.sum(ones if valid is None else valid.to(x.dtype))
    total = lists.sum(w)
    mean = lists.sum(torch.where(w == 0, 0, w * x)) / torch.where(total == 0, 1, total)
    x = x - list_scale(mean, ones, valid, offsets)
    return list_scale((count > 1).to(x.dtype), x, valid, offsets), total, count > 1


def _above_first(x: Tensor, lists: Lists, valid: Tensor | None) -> Tensor:
    """Return x minus a valid item of its list, in float64, which keeps the digits of items far from 0."""
    x = x.double()
    if x.numel() == 0:
        return x
    first = lists.sort(torch.zeros_like(x)).gather(
        -1, lists.to_items(lists.bounds[:-1].clamp_max(lists.items - 1)).expand(x.shape)
    )
    return x - x.gather(-1, first)


def _squares(
    scores: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    offsets: Tensor | None,
    item_weights: Tensor | None,
    v: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    lists = Lists(scores, valid, offsets)
    w = torch.ones_like(scores, dtype=torch.float64) if item_weights is None else item_weights.double()
    w = w if valid is None else w.masked_fill(~valid, 0)
    x = _above_first(scores, lists, valid) - _above_first(labels, lists, valid) if v is None else v.double()
    x, total, several = _centred(x, w, lists, valid, offsets)
    scale = total
    if normalize:
        pairs = total * total - lists.sum(w * w)
        scale = total / torch.where(several, pairs, 1)
    slope = list_scale(4 * scale, w * x, valid, offsets)
    return (2 * scale * lists.sum(w * x * x)).to(scores.dtype), slope.to(scores.dtype), several


@reducing
def pairwise_mse(
    scores: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    offsets: Tensor | None,
    item_weights: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _squares(scores, labels, valid, offsets, item_weights, None, normalize)


def pairwise_mse_slope(
    scores: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    offsets: Tensor | None,
    item_weights: Tensor | None,
    v: Tensor | None,
    normalize: bool,
) -> Tensor:
    return _squares(scores, labels, valid, offsets, item_weights, v, normalize)[1]
