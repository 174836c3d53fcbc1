"""Pairwise losses."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops._enums import PairFunction
from custom_ops.triton_kernels.common import constant, kernel
from custom_ops.triton_kernels.lists import (
    ANYWHERE,
    PAIRS,
    TILES,
    WIDE,
    Lists,
    columns,
    load_valid,
    reducing,
    share_of,
    sum_of_rows,
    tiled_columns,
)

_ROWS, _COLUMNS = 16, 32
_BLOCK = 256  # items of a list at a time

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


@kernel(
    "*fp64 *T *T *u8 *i64 *T *fp64 *u8 fp64 i32 i32",
    WIDE,
    {
        (masked, normalize): {"MASKED": masked, "NORMALIZE": normalize, "BLOCK": _BLOCK}
        for masked in (False, True)
        for normalize in (False, True)
    },
    narrow=ANYWHERE,
)
@triton.jit(do_not_specialize=["items", "lists"])
def pairwise_lists_kernel(
    value_ptr,
    count_ptr,
    label_ptr,
    valid_ptr,
    bounds_ptr,
    loss_ptr,
    weight_ptr,
    active_ptr,
    factor: tl.float64,
    items,
    lists,
    MASKED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store a list's loss, the weight of its items' slopes, and whether it has a pair or a NaN label."""
    program = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(bounds_ptr + program % lists), tl.load(bounds_ptr + program % lists + 1)
    base = program // lists * items
    values, counts = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    undefined = tl.zeros([BLOCK], tl.int32)
    for first in range(start, stop, BLOCK):
        item = first + tl.arange(0, BLOCK)
        values += tl.load(value_ptr + base + item, mask=item < stop, other=0)
        counts += tl.load(count_ptr + base + item, mask=item < stop, other=0)
        valid = load_valid(valid_ptr, base + item, item < stop, MASKED)
        label = tl.load(label_ptr + base + item, mask=valid, other=0)
        undefined |= (label != label).to(tl.int32)
    pairs, wrong = tl.sum(counts), tl.max(undefined) > 0
    share = 1.0 / tl.where(pairs > 0, pairs, 1.0) if NORMALIZE else pairs * 0 + 1
    loss = tl.where(wrong, float("nan"), tl.sum(values) * share)
    tl.store(loss_ptr + program, loss.to(label_ptr.dtype.element_ty))
    tl.store(weight_ptr + program, factor * share)
    tl.store(active_ptr + program, ((pairs > 0) | wrong).to(tl.uint8))


def _pairs(
    lists: Lists,
    scores: Tensor,
    labels: Tensor,
    item_weights: Tensor | None,
    v: Tensor | None,
    phi: int,
    factor: float,
    shift: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, slope (or Hessian times v) and contribution of the sum of phi(factor (s_i - s_j) + shift)."""
    scores, labels, weights, vector = lists.operands(scores, labels, item_weights, v)
    slope, value = (torch.empty_like(scores, dtype=torch.float64) for _ in range(2))
    count = torch.empty_like(scores)
    blocks = triton.cdiv(lists.items, _ROWS)
    owners, stride = lists.owners()
    pointers = (scores, labels, weights, vector, owners, lists.bounds, slope, value, count)
    sizes = (lists.items, stride, lists.lists, blocks)
    variant = (phi, v is not None, item_weights is not None)
    pairwise_kernel(lists.examples * blocks, *pointers, factor, shift, *sizes, variant=variant)
    loss = lists.per_list(scores)
    weight, active = (torch.empty_like(loss, dtype=dtype) for dtype in (torch.float64, torch.bool))
    pairwise_lists_kernel(
        loss.numel(),
        *(value, count, labels, lists.valid, lists.bounds, loss, weight, active.view(torch.uint8)),
        *(factor if v is None else factor * factor, lists.items, lists.lists),
        variant=(lists.masked, normalize),
    )
    return loss, lists.scale(weight, slope).to(scores.dtype), active


@reducing
def pairwise(
    lists: Lists,
    scores: Tensor,
    labels: Tensor,
    item_weights: Tensor | None,
    phi: int,
    sigma: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _pairs(lists, scores, labels, item_weights, None, PairFunction(phi), sigma, 0.0, normalize)


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
    lists = Lists(scores, valid, offsets)
    slope = _pairs(lists, scores, labels, item_weights, v, PairFunction(phi), sigma, 0.0, normalize)[1]
    return lists.moved(slope, v)


# ---------------------------------------------------------------- hinge


@reducing
def pairwise_hinge(
    lists: Lists,
    scores: Tensor,
    labels: Tensor,
    item_weights: Tensor | None,
    margin: float,
    squared: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    phi = SQUARED_HINGE.value if squared else HINGE.value
    return _pairs(lists, scores, labels, item_weights, None, phi, 1.0, -margin, normalize)


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
    lists = Lists(scores, valid, offsets)
    return lists.moved(_pairs(lists, scores, labels, item_weights, v, phi, 1.0, -margin, normalize)[1], v)


# ---------------------------------------------------------------- squared error: sums over the items


@triton.jit
def _error(s_ptr, y_ptr, v_ptr, at, valid, first_s, first_y, HESSIAN: tl.constexpr):
    """Return score minus label, both relative to an item of the list, which keeps the digits far from 0; or v."""
    if HESSIAN:
        return tl.load(v_ptr + at, mask=valid, other=0).to(tl.float64)
    else:
        s = tl.load(s_ptr + at, mask=valid, other=0).to(tl.float64) - first_s
        return s - (tl.load(y_ptr + at, mask=valid, other=0).to(tl.float64) - first_y)


@triton.jit
def _weight(weight_ptr, at, valid, WEIGHTED: tl.constexpr):
    if WEIGHTED:
        return tl.load(weight_ptr + at, mask=valid, other=0).to(tl.float64)
    else:
        return valid.to(tl.float64)


@kernel(
    "*T *T *T *T *u8 *i64 *T *T *u8 i32 i32",
    WIDE,
    {
        (masked, weighted, hessian, normalize): {
            "MASKED": masked,
            "WEIGHTED": weighted,
            "HESSIAN": hessian,
            "NORMALIZE": normalize,
            "BLOCK": _BLOCK,
        }
        for masked in (False, True)
        for weighted in (False, True)
        for hessian in (False, True)
        for normalize in (False, True)
    },
    narrow=ANYWHERE,
    registers=96,
)
@triton.jit(do_not_specialize=["items", "lists"])
def pairwise_mse_kernel(
    s_ptr,
    y_ptr,
    weight_ptr,
    v_ptr,
    valid_ptr,
    bounds_ptr,
    loss_ptr,
    slope_ptr,
    active_ptr,
    items,
    lists,
    MASKED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HESSIAN: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store a list's loss, whether it contributes, and its slope, or the product of its Hessian and v."""
    program = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(bounds_ptr + program % lists), tl.load(bounds_ptr + program % lists + 1)
    base = program // lists * items
    begin = tl.full([BLOCK], 0, tl.int64) + stop
    count, undefined = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    weights, squares = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for first in range(start, stop, BLOCK):
        item = first + tl.arange(0, BLOCK)
        valid = load_valid(valid_ptr, base + item, item < stop, MASKED)
        y = tl.load(y_ptr + base + item, mask=valid, other=0)
        w = _weight(weight_ptr, base + item, valid, WEIGHTED)
        undefined |= (y != y).to(tl.int32)
        begin = tl.where(valid & (item < begin), item, begin)
        count += valid.to(tl.int32)
        weights += w
        squares += w * w
    some = tl.min(begin)
    first_s = tl.load(s_ptr + base + some, mask=some < stop, other=0).to(tl.float64)
    first_y = tl.load(y_ptr + base + some, mask=some < stop, other=0).to(tl.float64)
    several, wrong, total = tl.sum(count) > 1, tl.max(undefined) > 0, tl.sum(weights)
    errors = tl.zeros([BLOCK], tl.float64)
    for first in range(start, stop, BLOCK):
        item = first + tl.arange(0, BLOCK)
        valid = load_valid(valid_ptr, base + item, item < stop, MASKED)
        w = _weight(weight_ptr, base + item, valid, WEIGHTED)
        x = _error(s_ptr, y_ptr, v_ptr, base + item, valid, first_s, first_y, HESSIAN)
        errors += tl.where(w == 0, 0.0, w * x)
    mean = tl.sum(errors) / tl.where(total == 0, 1.0, total)
    scale = total
    if NORMALIZE:
        scale = total / tl.where(several, total * total - tl.sum(squares), 1.0)
    terms = tl.zeros([BLOCK], tl.float64)
    for first in range(start, stop, BLOCK):
        item = first + tl.arange(0, BLOCK)
        valid = load_valid(valid_ptr, base + item, item < stop, MASKED)
        w = _weight(weight_ptr, base + item, valid, WEIGHTED)
        x = _error(s_ptr, y_ptr, v_ptr, base + item, valid, first_s, first_y, HESSIAN) - mean
        counts = valid & several & (w != 0)
        terms += tl.where(counts, w * x * x, 0.0)
        slope = tl.where(counts, 4.0 * scale * (w * x), 0.0)
        tl.store(slope_ptr + base + item, slope.to(s_ptr.dtype.element_ty), mask=item < stop)
    loss = tl.where(wrong, float("nan"), 2.0 * scale * tl.sum(terms))
    tl.store(loss_ptr + program, loss.to(s_ptr.dtype.element_ty))
    tl.store(active_ptr + program, (several | wrong).to(tl.uint8))


def _squares(
    lists: Lists, scores: Tensor, labels: Tensor, item_weights: Tensor | None, v: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    given = lists.operands(scores, labels, item_weights, v)
    loss, slope, active = lists.results(scores)
    pointers = (*given, lists.valid, lists.bounds, loss, slope, active.view(torch.uint8))
    variant = (lists.masked, item_weights is not None, v is not None, normalize)
    pairwise_mse_kernel(loss.numel(), *pointers, lists.items, lists.lists, variant=variant)
    return loss, slope, active


@reducing
def pairwise_mse(
    lists: Lists, scores: Tensor, labels: Tensor, item_weights: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _squares(lists, scores, labels, item_weights, None, normalize)


def pairwise_mse_slope(
    scores: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    offsets: Tensor | None,
    item_weights: Tensor | None,
    v: Tensor | None,
    normalize: bool,
) -> Tensor:
    lists = Lists(scores, valid, offsets)
    return lists.moved(_squares(lists, scores, labels, item_weights, v, normalize)[1], v)
