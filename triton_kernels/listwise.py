"""Listwise losses: softmax cross entropies, and sums of exponentials along each list in the order of its labels."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops._enums import PositionWeights, Ties
from custom_ops.triton_kernels.common import Kernel, constant, kernel
from custom_ops.triton_kernels.lists import (
    ANYWHERE,
    WIDE,
    Lists,
    discount_of,
    latest,
    load_valid,
    reducing,
    relative_gain,
    sum_of_group,
)
from custom_ops.triton_kernels.pairwise import log1p_unit

_BLOCK = 256  # items of a list at a time
_PLACES = 16  # the same in a running sum, which compares all of them
_UNIFORM, _EXPONENTIAL = constant(PositionWeights.UNIFORM), constant(PositionWeights.EXPONENTIAL)


# ---------------------------------------------------------------- softmax cross entropy


@triton.jit
def _below(x, top):
    """Return e^(x - top), which is 1 at an infinite top."""
    return tl.where(x == top, 1.0, tl.exp(x - top))


@triton.jit
def _defined(top, mass):
    """Return a sum of e^(x - top), or NaN where several items are at an infinite top and have no difference."""
    return tl.where((tl.abs(top) == float("inf")) & (mass > 1), float("nan"), mass)


@kernel(
    "*T *T *T *u8 *i64 *T *T *u8 i32 i32",
    WIDE,
    {
        (masked, softmax_labels, product): {
            "MASKED": masked,
            "SOFTMAX_LABELS": softmax_labels,
            "PRODUCT": product,
            "BLOCK": _BLOCK,
        }
        for masked in (False, True)
        for softmax_labels in (False, True)
        for product in (False, True)
    },
    narrow=ANYWHERE,
)
@triton.jit(do_not_specialize=["items", "lists"])
def list_softmax_kernel(
    score_ptr,
    label_ptr,
    v_ptr,
    valid_ptr,
    bounds_ptr,
    loss_ptr,
    slope_ptr,
    active_ptr,
    items,
    lists,
    MASKED: tl.constexpr,
    SOFTMAX_LABELS: tl.constexpr,
    PRODUCT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store a list's loss, whether it contributes, and its slope, or the product of its Hessian and v."""
    program = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(bounds_ptr + program % lists), tl.load(bounds_ptr + program % lists + 1)
    base = program // lists * items
    none = float("-inf")
    best = tl.full([BLOCK], none, score_ptr.dtype.element_ty)
    high, low = best, -best
    count, undefined = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for first in range(start, stop, BLOCK):
        at = base + first + tl.arange(0, BLOCK)
        valid = load_valid(valid_ptr, at, at < base + stop, MASKED)
        s = tl.load(score_ptr + at, mask=valid, other=none)
        y = tl.load(label_ptr + at, mask=valid, other=0)
        best = tl.where(s > best, s, best)
        high = tl.where(valid & (y > high), y, high)
        low = tl.where(valid & (y < low), y, low)
        undefined |= (y != y).to(tl.int32)
        count += valid.to(tl.int32)
    top, highest = tl.max(best), tl.max(high)
    wrong = tl.max(undefined) > 0
    contributes = (tl.sum(count) > 1) & (wrong | (highest != tl.min(low)))

    masses, labels = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for first in range(start, stop, BLOCK):
        at = base + first + tl.arange(0, BLOCK)
        valid = load_valid(valid_ptr, at, at < base + stop, MASKED)
        s = tl.load(score_ptr + at, mask=valid, other=none)
        y = tl.load(label_ptr + at, mask=valid, other=0)
        masses += tl.where(valid, _below(s, top), 0.0).to(tl.float64)
        if SOFTMAX_LABELS:
            labels += tl.where(valid, _below(y, highest), 0.0).to(tl.float64)
        else:
            labels += y.to(tl.float64)
    mass, total = _defined(top, tl.sum(masses)), tl.sum(labels)
    divisor = mass.to(top.dtype)
    whole = divisor  # the sum of the labels' exponentials
    if SOFTMAX_LABELS:
        whole = _defined(highest, total).to(top.dtype)
        total = total / total
    means, terms = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    if PRODUCT:
        for first in range(start, stop, BLOCK):
            at = base + first + tl.arange(0, BLOCK)
            valid = load_valid(valid_ptr, at, at < base + stop, MASKED)
            s = tl.load(score_ptr + at, mask=valid, other=none)
            v = tl.load(v_ptr + at, mask=valid, other=0)
            means += tl.where(valid, _below(s, top) / divisor * v, 0.0).to(tl.float64)
    mean, weight = tl.sum(means).to(top.dtype), total.to(top.dtype)
    for first in range(start, stop, BLOCK):
        at = base + first + tl.arange(0, BLOCK)
        valid = load_valid(valid_ptr, at, at < base + stop, MASKED)
        s = tl.load(score_ptr + at, mask=valid, other=none)
        q = _below(s, top) / divisor
        if PRODUCT:
            slope = weight * q * (tl.load(v_ptr + at, mask=valid, other=0) - mean)
        else:
            p = tl.load(label_ptr + at, mask=valid, other=0)
            if SOFTMAX_LABELS:
                p = _below(p, highest) / whole
            half = tl.where(s == top, 0.0, 0.5 * top - 0.5 * s)  # halves can't overflow
            terms += tl.where(valid & (p != 0), p * half, 0.0).to(tl.float64)
            slope = weight * q - p
        tl.store(slope_ptr + at, tl.where(valid & contributes, slope, 0.0), mask=at < base + stop)
    if not PRODUCT:
        loss = 2.0 * tl.sum(terms) + total * tl.log(mass)
        loss = tl.where(wrong, float("nan"), tl.where(contributes, loss, 0.0))
        tl.store(loss_ptr + program, loss.to(top.dtype))
        tl.store(active_ptr + program, (contributes | wrong).to(tl.uint8))


def _softmax(
    lists: Lists, scores: Tensor, labels: Tensor, v: Tensor | None, softmax_labels: bool
) -> tuple[Tensor, Tensor, Tensor]:
    given = lists.operands(scores, labels, v)
    loss, slope, active = lists.results(scores)
    pointers = (*given, lists.valid, lists.bounds, loss, slope, active.view(torch.uint8))
    variant = (lists.masked, softmax_labels, v is not None)
    list_softmax_kernel(loss.numel(), *pointers, lists.items, lists.lists, variant=variant)
    return loss, slope, active


@reducing
def list_softmax(lists: Lists, scores: Tensor, labels: Tensor, softmax_labels: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _softmax(lists, scores, labels, None, softmax_labels)


def list_softmax_slope(
    scores: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    offsets: Tensor | None,
    v: Tensor | None,
    softmax_labels: bool,
) -> Tensor:
    lists = Lists(scores, valid, offsets)
    return lists.moved(_softmax(lists, scores, labels, v, softmax_labels)[1], v)


# ---------------------------------------------------------------- scans in label order
#
# A program has one list and takes its items in the order of their labels, a block at a time: first from the last item
# to the first, storing the sums of exponentials over each item and all later ones, and then from the first item on.
# Scores are halved, as differences of halves can't overflow. The second derivative is computed in float64, because its
# terms cancel.


def _variants(sums: int, *flags: str) -> dict[tuple[bool, ...], dict[str, Any]]:
    """Return the variants by all values of the flags; the kernel keeps so many ``sums`` for each place."""
    every = itertools.product((False, True), repeat=len(flags))
    return {values: {**dict(zip(flags, values)), "SUMS": sums, "BLOCK": _PLACES} for values in every}


@triton.jit
def _ranked(order_ptr, label_ptr, valid_ptr, start, stop, masked, BLOCK: tl.constexpr = _BLOCK):
    """Return the number of a list's valid items, which come first in the order, and the highest and the lowest label.

    NaN is the highest label, if there is one.
    """
    count = (stop - start).to(tl.int32)
    if masked != 0:
        counts = tl.zeros([BLOCK], tl.int32)
        for first in range(start, stop, BLOCK):
            item = first + tl.arange(0, BLOCK)
            counts += load_valid(valid_ptr, item, item < stop, True).to(tl.int32)
        count = tl.sum(counts)
    some = count > 0
    high = tl.load(label_ptr + tl.load(order_ptr, mask=some, other=0), mask=some, other=0)
    low = tl.load(label_ptr + tl.load(order_ptr + count - 1, mask=some, other=0), mask=some, other=0)
    return count, high, low


@triton.jit
def _power(scale, x, y):
    """Return e^(scale (x - y)), or 1 where both are equal, as infinities may be."""
    return tl.where(x == y, 1.0, tl.exp((x - y) * scale))


@triton.jit
def _weigh(weight, value):
    """Return weight * value, but 0 for a weight of 0 whatever the value is."""
    return tl.where(weight == 0, 0.0, weight * value)


@triton.jit
def _log_sum(near, u, ahead, total):
    """Return log(1 + u) where ``near``, which says that u is at most 1, and elsewhere ``ahead`` + log(total)."""
    if u.dtype == tl.float64:  # with one logarithm for both, as in `log1p_unit`
        t = tl.where(near, 1.0 + u, total)
        return tl.log(t) + tl.where(near, (u - (t - 1.0)) / t, ahead)
    else:
        return tl.where(near, log1p_unit(u), ahead + tl.log(total))


@triton.jit
def _running_sums(x, a, b, carry_top, carry_a, carry_b, scale, INCLUSIVE: tl.constexpr):
    """Return the running sums of a e^(scale (x - top)) and b e^(scale (x - top)), with top the running largest x of the
    items with a != 0, and the next carry, whose sums are in float64.
    """
    x, a = tl.where((a != 0) & (x == x), x, float("-inf")), tl.where(x == x, a, x)
    lane = tl.arange(0, x.shape[0])
    before = lane[None, :] <= lane[:, None] if INCLUSIVE else lane[None, :] < lane[:, None]
    top = tl.maximum(tl.max(tl.where(before, x[None, :], float("-inf")), axis=1), carry_top)
    weight = _power(scale, x[None, :], top[:, None])
    carried = _power(scale, carry_top, top)
    sum_a = tl.sum(tl.where(before, weight * a[None, :], 0.0), axis=1) + carried * carry_a.to(a.dtype)
    sum_b = tl.sum(tl.where(before, weight * b[None, :], 0.0), axis=1) + carried * carry_b.to(b.dtype)
    next_top = tl.maximum(tl.max(x, axis=0, keep_dims=True), carry_top)
    weight = _power(scale, x, next_top)
    carried = _power(scale, carry_top, next_top)
    carry_a = carried * carry_a + tl.sum(weight * a, axis=0, keep_dims=True).to(tl.float64)
    carry_b = carried * carry_b + tl.sum(weight * b, axis=0, keep_dims=True).to(tl.float64)
    return top, sum_a, sum_b, next_top, carry_a, carry_b


@triton.jit
def _store_sums(sum_ptr, place, exists, top, a, b, PRODUCT: tl.constexpr, SUMS: tl.constexpr):
    """Store the first three of a place's SUMS numbers."""
    sum_ptr += place.to(tl.int64) * SUMS
    tl.store(sum_ptr, top, mask=exists)
    tl.store(sum_ptr + 1, a, mask=exists)
    if PRODUCT:
        tl.store(sum_ptr + 2, b, mask=exists)


@triton.jit
def _store_later_sums(
    order_ptr,
    score_ptr,
    label_ptr,
    weight_ptr,
    v_ptr,
    sum_ptr,
    last_ptr,
    count,
    scale,
    GROUPED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PRODUCT: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store for each place the top, the sum of e^(scale (s - top)) and, with PRODUCT, that of v e^(scale (s - top)) of
    its item and all later ones, and the last place of its group of items with equal labels.
    """
    dtype: tl.constexpr = sum_ptr.dtype.element_ty
    carry_top = tl.full([1], float("-inf"), dtype)
    carry_a, carry_b = tl.zeros([1], tl.float64), tl.zeros([1], tl.float64)
    carry_last = tl.full([1], -1, tl.int32)
    for first in range(0, count, BLOCK):
        back = first + tl.arange(0, BLOCK)
        place = count - 1 - back
        inside = place >= 0
        item = tl.load(order_ptr + place, mask=inside, other=0)
        s = tl.load(score_ptr + item, mask=inside, other=0).to(dtype) * 0.5
        a = tl.where(inside, tl.full([1], 1, dtype), 0)
        if WEIGHTED:
            a = tl.load(weight_ptr + item, mask=inside, other=0).to(dtype)
        b = a
        if PRODUCT:
            b = tl.where(a == 0, 0.0, a * tl.load(v_ptr + item, mask=inside, other=0).to(dtype))
        top, a, b, carry_top, carry_a, carry_b = _running_sums(s, a, b, carry_top, carry_a, carry_b, scale, True)
        _store_sums(sum_ptr, place, inside, top, a, b, PRODUCT, SUMS)
        if GROUPED:
            next_item = tl.load(order_ptr + place + 1, mask=inside & (back > 0), other=0)
            y = tl.load(label_ptr + item, mask=inside, other=0)
            next_y = tl.load(label_ptr + next_item, mask=inside, other=0)
            last, carry_last = latest(back, (back == 0) | (y != next_y), carry_last)
            tl.store(last_ptr + place, count - 1 - last, mask=inside)


@triton.jit
def _load_sums(sum_ptr, place, exists, PRODUCT: tl.constexpr, SUMS: tl.constexpr):
    """Return the top, the sum and the mean of v that were stored for a place, or those of no item."""
    sum_ptr += place.to(tl.int64) * SUMS
    top = tl.load(sum_ptr, mask=exists, other=float("-inf"))
    a = tl.load(sum_ptr + 1, mask=exists, other=0)
    mean = tl.zeros_like(a)
    if PRODUCT:
        mean = tl.where(a == 0, 0.0, tl.load(sum_ptr + 2, mask=exists, other=0) / a)
    return top, a, mean


@triton.jit
def _group(last_ptr, place, inside, carry):
    """Return the first and the last place of each item's group; the carry is the first place of the item before."""
    last = tl.load(last_ptr + place, mask=inside, other=0)
    before = tl.load(last_ptr + place - 1, mask=inside & (place > 0), other=-1)
    first, carry = latest(place, before == place - 1, carry)
    return first, last, carry


@triton.jit
def _place_weight(table_ptr, place, count, k, weighting, dtype: tl.constexpr):
    """Return the weight of each of ``count`` places; those from ``k`` on have none."""
    weight = tl.where(place < k, tl.full([1], 1, dtype), 0)
    if weighting != _UNIFORM:
        weight = tl.load(table_ptr + place, mask=place < tl.minimum(k, count), other=0).to(dtype)
    if weighting == _EXPONENTIAL:
        least = tl.load(table_ptr + count - 1).to(dtype)
        weight = tl.where(place < k, (weight - least) / (1 - least), 0.0)
    return weight


@triton.jit
def _fill(slope_ptr, order_ptr, count, valid, stop, undefined, BLOCK: tl.constexpr = _BLOCK):
    """Store a slope of 0 for the items after the first ``count``, or of NaN for valid ones of an undefined list."""
    slope = tl.where(undefined, float("nan"), 0.0)
    for first in range(count, stop, BLOCK):
        place = first + tl.arange(0, BLOCK)
        item = tl.load(order_ptr + place, mask=place < stop, other=0)
        tl.store(slope_ptr + item, tl.where(place < valid, slope, 0.0), mask=place < stop)


@triton.jit
def _store_loss(loss_ptr, active_ptr, program, loss, contributes, undefined):
    loss = tl.where(undefined, float("nan"), tl.where(contributes, tl.sum(loss), 0.0))
    tl.store(loss_ptr + program, loss.to(loss_ptr.dtype.element_ty))
    tl.store(active_ptr + program, (contributes | undefined).to(tl.uint8))


@kernel(
    "*T *T *T *T *i64 *u8 *i64 *u8 *i32 *T *T *u8 *T i32 i32 i32 i32 i32",
    WIDE,
    _variants(5, "GROUPED", "WEIGHTED", "PRODUCT"),
    num_warps=2,
    narrow=ANYWHERE,
    registers=128,
)
@triton.jit(do_not_specialize=["items", "lists", "masked", "weighting", "k"])
def list_mle_kernel(
    score_ptr,
    label_ptr,
    weight_ptr,
    v_ptr,
    order_ptr,
    valid_ptr,
    bounds_ptr,
    sum_ptr,
    last_ptr,
    loss_ptr,
    slope_ptr,
    active_ptr,
    table_ptr,
    weighting,
    k,
    items,
    lists,
    masked,
    GROUPED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PRODUCT: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store a list's loss, whether it contributes, and its slope, or the product of its Hessian and v.

    Each item, or GROUPED each group of items with equal labels, competes with all items from there on.
    """
    dtype: tl.constexpr = tl.float64 if PRODUCT else score_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(bounds_ptr + program % lists), tl.load(bounds_ptr + program % lists + 1)
    base = program // lists * items
    score_ptr, label_ptr, weight_ptr, v_ptr = score_ptr + base, label_ptr + base, weight_ptr + base, v_ptr + base
    valid_ptr, slope_ptr, order_ptr = valid_ptr + base, slope_ptr + base, order_ptr + base + start
    last_ptr, sum_ptr = last_ptr + base + start, sum_ptr.to(tl.pointer_type(dtype)) + (base + start) * SUMS
    valid, highest, lowest = _ranked(order_ptr, label_ptr, valid_ptr, start, stop, masked)
    undefined = highest != highest
    contributes = (valid > 1) & (highest != lowest) & (highest == highest)
    count = tl.where(contributes, valid, 0)
    _store_later_sums(
        order_ptr,
        score_ptr,
        label_ptr,
        weight_ptr,
        v_ptr,
        sum_ptr,
        last_ptr,
        count,
        2.0,
        GROUPED,
        False,
        PRODUCT,
        SUMS,
        BLOCK,
    )
    tl.debug_barrier()  # the next loads see what other threads stored
    if GROUPED:  # the items of a group share the weights of their places
        carry_first = tl.full([1], -1, tl.int32)
        carry_placed, carry_weighed = tl.zeros([1], tl.float64), tl.zeros([1], tl.float64)
        for first in range(0, count, BLOCK):
            place = first + tl.arange(0, BLOCK)
            inside = place < count
            begin, _, next_first = _group(last_ptr, place, inside, carry_first)
            placed = _place_weight(table_ptr, place, count, k, weighting, dtype)
            placed, carry_placed = sum_of_group(placed, begin, carry_first, carry_placed)
            tl.store(sum_ptr + place.to(tl.int64) * SUMS + 3, placed, mask=inside)
            if WEIGHTED:
                item = tl.load(order_ptr + place, mask=inside, other=0)
                weighed = tl.load(weight_ptr + item, mask=inside, other=0).to(dtype)
                weighed, carry_weighed = sum_of_group(weighed, begin, carry_first, carry_weighed)
                tl.store(sum_ptr + place.to(tl.int64) * SUMS + 4, weighed, mask=inside)
            carry_first = next_first
        tl.debug_barrier()
    loss = tl.zeros([1], tl.float64)
    carry_first = tl.full([1], -1, tl.int32)
    carry_top = tl.full([1], float("-inf"), dtype)
    carry_a, carry_b = tl.zeros([1], tl.float64), tl.zeros([1], tl.float64)
    for first in range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = place < count
        item = tl.load(order_ptr + place, mask=inside, other=0)
        s = tl.load(score_ptr + item, mask=inside, other=0).to(dtype) * 0.5
        weight = tl.full([BLOCK], 1, dtype)
        if WEIGHTED:
            weight = tl.load(weight_ptr + item, mask=inside, other=0).to(dtype)
        if GROUPED:
            begin, last, carry_first = _group(last_ptr, place, inside, carry_first)
            whole = tl.load(sum_ptr + last.to(tl.int64) * SUMS + 3, mask=inside, other=0)
            w = whole / (last - begin + 1).to(dtype)
            if WEIGHTED:
                whole = w * tl.load(sum_ptr + last.to(tl.int64) * SUMS + 4, mask=inside, other=0)
                w *= weight
        else:
            begin, last = place, place
            w = _place_weight(table_ptr, place, count, k, weighting, dtype) * weight
            whole = w
        top, a, mean = _load_sums(sum_ptr, begin, inside, PRODUCT, SUMS)
        a = _defined(top, a)
        share = _power(2.0, s, top) / a
        if GROUPED:
            miss = 1 - share
        else:  # without cancellation
            lower_top, lower_a, _ = _load_sums(sum_ptr, place + 1, place + 1 < count, False, SUMS)
            miss = tl.where(lower_a == 0, 0.0, _power(2.0, lower_top, top) * lower_a / a)
        # The earlier groups' weights over their sums; a group's is at its last item.
        of_group = tl.where(inside & (place == last) & (whole != 0), whole / a, 0.0)
        moved = of_group
        if PRODUCT:
            moved = tl.where(of_group == 0, 0.0, of_group * mean)
        before_top, before_a, before_b, carry_top, carry_a, carry_b = _running_sums(
            -top, of_group, moved, carry_top, carry_a, carry_b, 2.0, False
        )
        pushed = _power(2.0, before_top, -s)
        if PRODUCT:
            v = tl.load(v_ptr + item, mask=inside, other=0).to(dtype)
            slope = _weigh(v * before_a - before_b, pushed) + _weigh(whole * (v - mean), share)
        else:
            slope = _weigh(before_a, pushed) + _weigh(whole - w, share) - _weigh(w, miss)
            term = _weigh(w, _log_sum(miss < 0.5, miss / share, 2.0 * (top - s), a))
            loss += tl.sum(tl.where(inside, term, 0.0), axis=0, keep_dims=True).to(tl.float64)
        tl.store(slope_ptr + item, slope, mask=inside)
    _fill(slope_ptr, order_ptr, count, valid, (stop - start).to(tl.int32), undefined)
    if not PRODUCT:
        _store_loss(loss_ptr, active_ptr, program, loss, contributes, undefined)


@kernel(
    "*T *T *T *T *i64 *u8 *i64 *u8 *i32 *T *T *u8 i32 i32 i32",
    WIDE,
    _variants(4, "EXPONENTIAL", "WEIGHTED", "PRODUCT"),
    num_warps=2,
    narrow=ANYWHERE,
    registers=128,
)
@triton.jit(do_not_specialize=["items", "lists", "masked"])
def unique_softmax_kernel(
    score_ptr,
    label_ptr,
    weight_ptr,
    v_ptr,
    order_ptr,
    valid_ptr,
    bounds_ptr,
    sum_ptr,
    last_ptr,
    loss_ptr,
    slope_ptr,
    active_ptr,
    items,
    lists,
    masked,
    EXPONENTIAL: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PRODUCT: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store a list's loss, whether it contributes, and its slope, or the product of its Hessian and v.

    Each item competes with all items of lower label.
    """
    dtype: tl.constexpr = tl.float64 if PRODUCT else score_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(bounds_ptr + program % lists), tl.load(bounds_ptr + program % lists + 1)
    base = program // lists * items
    score_ptr, label_ptr, weight_ptr, v_ptr = score_ptr + base, label_ptr + base, weight_ptr + base, v_ptr + base
    valid_ptr, slope_ptr, order_ptr = valid_ptr + base, slope_ptr + base, order_ptr + base + start
    last_ptr, sum_ptr = last_ptr + base + start, sum_ptr.to(tl.pointer_type(dtype)) + (base + start) * SUMS
    valid, highest, lowest = _ranked(order_ptr, label_ptr, valid_ptr, start, stop, masked)
    undefined = highest != highest
    contributes = (valid > 1) & (highest != lowest) & (highest > 0)
    count = tl.where(contributes, valid, 0)
    _store_later_sums(
        order_ptr,
        score_ptr,
        label_ptr,
        weight_ptr,
        v_ptr,
        sum_ptr,
        last_ptr,
        count,
        2.0,
        True,
        False,
        PRODUCT,
        SUMS,
        BLOCK,
    )
    most = tl.zeros([1], dtype) + highest.to(dtype)
    for first in range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)
        item = tl.load(order_ptr + place, mask=place < count, other=0)
        y = tl.load(label_ptr + item, mask=place < count, other=0).to(dtype)
        w = relative_gain(y, most, EXPONENTIAL) / relative_gain(most, most, EXPONENTIAL)
        if WEIGHTED:
            w *= tl.load(weight_ptr + item, mask=place < count, other=0).to(dtype)
        tl.store(sum_ptr + place.to(tl.int64) * SUMS + 3, w, mask=place < count)
    tl.debug_barrier()  # the next loads see what other threads stored
    loss = tl.zeros([1], tl.float64)
    carry_first = tl.full([1], -1, tl.int32)
    carry_p, carry_moved = tl.zeros([1], tl.float64), tl.zeros([1], tl.float64)
    carry_top = tl.full([1], float("-inf"), dtype)
    carry_a, carry_b = tl.zeros([1], tl.float64), tl.zeros([1], tl.float64)
    for first in range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = place < count
        item = tl.load(order_ptr + place, mask=inside, other=0)
        s = tl.load(score_ptr + item, mask=inside, other=0).to(dtype) * 0.5
        w = tl.load(sum_ptr + place.to(tl.int64) * SUMS + 3, mask=inside, other=0)
        begin, last, next_first = _group(last_ptr, place, inside, carry_first)
        some = inside & (last + 1 < count)
        top, a, mean = _load_sums(sum_ptr, last + 1, some, PRODUCT, SUMS)
        lead = 2 * (top - s)  # the items of lower label have lower / own times this item's share
        e = tl.exp(-tl.abs(lead))
        lower, own = tl.where(lead < 0, a * e, a), tl.where(lead < 0, 1.0, e)
        p = tl.where(some, _weigh(w, lower / (lower + own)), 0.0)
        moves = p
        if PRODUCT:
            v = tl.load(v_ptr + item, mask=inside, other=0).to(dtype)
            moves = _weigh(p, own / (lower + own) * (mean - v))
        # The earlier groups' p over the sums that they compete with; a group's is at its last item.
        of_group, carry_p = sum_of_group(p, begin, carry_first, carry_p)
        of_group = tl.where(some & (place == last) & (of_group != 0), of_group / a, 0.0)
        moved = of_group
        if PRODUCT:
            moved, carry_moved = sum_of_group(moves - _weigh(p, mean), begin, carry_first, carry_moved)
            moved = tl.where(of_group == 0, 0.0, moved / a)
        carry_first = next_first
        before_top, before_a, before_b, carry_top, carry_a, carry_b = _running_sums(
            -top, of_group, moved, carry_top, carry_a, carry_b, 2.0, False
        )
        pushed = _power(2.0, before_top, -s)
        if PRODUCT:
            slope = _weigh(v * before_a + before_b, pushed) - moves
        else:
            slope = _weigh(before_a, pushed) - p
            term = _weigh(w, _log_sum(lower <= own, lower / own, tl.maximum(lead, 0.0), lower + own))
            loss += tl.sum(tl.where(some, term, 0.0), axis=0, keep_dims=True).to(tl.float64)
        tl.store(slope_ptr + item, slope, mask=inside)
    _fill(slope_ptr, order_ptr, count, valid, (stop - start).to(tl.int32), undefined)
    if not PRODUCT:
        _store_loss(loss_ptr, active_ptr, program, loss, contributes, undefined)


@triton.jit
def _difference(a, b):
    """Return a - b, and its rounding error unless it is infinite, so that differences of differences are exact."""
    high = a - b
    subtracted = a - high
    low = (a - (high + subtracted)) + (subtracted - b)
    return high, tl.where(tl.abs(high) < float("inf"), low, 0.0)


@triton.jit
def _over(high, low, most_high, most_low, scale):
    """Return e^(scale d) for the difference d of two differences."""
    return tl.exp(scale * (tl.where(high == most_high, 0.0, high - most_high) + (low - most_low)))


@triton.jit
def _pairs_of(
    s,
    weight,
    sum_ptr,
    last_ptr,
    first_ptr,
    place,
    count,
    most_high,
    most_low,
    whole,
    scale,
    PRODUCT: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Return the shares of the items' pairs with items of lower and of higher labels in the sum over all pairs, and the
    means of v over those items.
    """
    inside = place < count
    begin = tl.load(first_ptr + place, mask=inside, other=0)
    last = tl.load(last_ptr + place, mask=inside, other=0)
    top, a, lower_mean = _load_sums(sum_ptr, last + 1, inside & (last + 1 < count), PRODUCT, SUMS)
    high, low = _difference(top, s)
    lower = tl.where(a == 0, 0.0, a * weight * _over(high, low, most_high, most_low, scale) / whole)
    top, a, higher_mean = _load_sums(sum_ptr + 3, begin - 1, inside & (begin > 0), PRODUCT, SUMS)
    high, low = _difference(s, -top)
    higher = tl.where(a == 0, 0.0, a * weight * _over(high, low, most_high, most_low, scale) / whole)
    return lower, higher, lower_mean, higher_mean


@kernel(
    "*T *T *T *T *i64 *u8 *i64 *u8 *i32 *T *T *u8 *i32 fp64 i32 i32 i32",
    WIDE,
    _variants(6, "WEIGHTED", "PRODUCT"),
    num_warps=2,
    narrow=ANYWHERE,
    registers=128,
)
@triton.jit(do_not_specialize=["items", "lists", "masked"])
def cosent_kernel(
    score_ptr,
    label_ptr,
    weight_ptr,
    v_ptr,
    order_ptr,
    valid_ptr,
    bounds_ptr,
    sum_ptr,
    last_ptr,
    loss_ptr,
    slope_ptr,
    active_ptr,
    first_ptr,
    scale: tl.float64,
    items,
    lists,
    masked,
    WEIGHTED: tl.constexpr,
    PRODUCT: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store a list's loss, whether it contributes, and its slope, or the product of its Hessian and v.

    The terms of all pairs are relative to the largest exponential, whose exponent is kept as a difference of scores.
    Products of weights need the range of float64.
    """
    dtype: tl.constexpr = tl.float64 if PRODUCT or WEIGHTED else score_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(bounds_ptr + program % lists), tl.load(bounds_ptr + program % lists + 1)
    base = program // lists * items
    score_ptr, label_ptr, weight_ptr, v_ptr = score_ptr + base, label_ptr + base, weight_ptr + base, v_ptr + base
    valid_ptr, slope_ptr, order_ptr = valid_ptr + base, slope_ptr + base, order_ptr + base + start
    last_ptr, sum_ptr = last_ptr + base + start, sum_ptr.to(tl.pointer_type(dtype)) + (base + start) * SUMS
    valid, highest, lowest = _ranked(order_ptr, label_ptr, valid_ptr, start, stop, masked)
    undefined = highest != highest
    contributes = (valid > 1) & (highest != lowest) & (highest == highest)
    count = tl.where(contributes, valid, 0)
    first_ptr += base + start
    twice = tl.full([1], 2.0 * scale, dtype)
    _store_later_sums(
        order_ptr,
        score_ptr,
        label_ptr,
        weight_ptr,
        v_ptr,
        sum_ptr,
        last_ptr,
        count,
        twice,
        True,
        WEIGHTED,
        PRODUCT,
        SUMS,
        BLOCK,
    )
    tl.debug_barrier()  # the next loads see what other threads stored
    most_high, most_low, rest = tl.zeros([1], dtype), tl.zeros([1], dtype), tl.zeros([1], tl.float64)
    carry_first = tl.full([1], -1, tl.int32)
    carry_top = tl.full([1], float("-inf"), dtype)
    carry_a, carry_b = tl.zeros([1], tl.float64), tl.zeros([1], tl.float64)
    for first in range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = place < count
        item = tl.load(order_ptr + place, mask=inside, other=0)
        s = tl.load(score_ptr + item, mask=inside, other=0).to(dtype) * 0.5
        weight = tl.where(inside, tl.full([1], 1, dtype), 0)
        if WEIGHTED:
            weight = tl.load(weight_ptr + item, mask=inside, other=0).to(dtype)
        begin, last, carry_first = _group(last_ptr, place, inside, carry_first)
        tl.store(first_ptr + place, begin, mask=inside)
        top, a, _ = _load_sums(sum_ptr, last + 1, inside & (last + 1 < count), False, SUMS)
        a *= weight
        high, low = _difference(top, s)
        known = (a != 0) & (high == high)
        next_high = tl.maximum(most_high, tl.max(tl.where(known, high, float("-inf")), axis=0, keep_dims=True))
        next_low = tl.max(tl.where(known & (high == next_high), low, float("-inf")), axis=0, keep_dims=True)
        next_low = tl.where(most_high == next_high, tl.maximum(most_low, next_low), next_low)
        terms = tl.where(a == 0, 0.0, a * _over(high, low, next_high, next_low, twice))
        rest *= _over(most_high, most_low, next_high, next_low, twice)
        rest += tl.sum(terms, axis=0, keep_dims=True).to(tl.float64)
        most_high, most_low = next_high, next_low
        moved = weight
        if PRODUCT:
            moved = _weigh(weight, tl.load(v_ptr + item, mask=inside, other=0).to(dtype))
        top, a, b, carry_top, carry_a, carry_b = _running_sums(
            -s, weight, moved, carry_top, carry_a, carry_b, twice, True
        )
        _store_sums(sum_ptr + 3, place, inside, top, a, b, PRODUCT, SUMS)
    tl.debug_barrier()
    exponent = 2.0 * scale * (most_high.to(tl.float64) + most_low.to(tl.float64))
    wide = rest + tl.exp(-exponent)
    whole, factor = wide.to(dtype), tl.full([1], scale, dtype)
    mean = tl.zeros([1], tl.float64)
    if PRODUCT:
        for first in range(0, count, BLOCK):
            place = first + tl.arange(0, BLOCK)
            inside = place < count
            item = tl.load(order_ptr + place, mask=inside, other=0)
            s = tl.load(score_ptr + item, mask=inside, other=0).to(dtype) * 0.5
            v = tl.load(v_ptr + item, mask=inside, other=0).to(dtype)
            weight = tl.full([1], 1, dtype)
            if WEIGHTED:
                weight = tl.load(weight_ptr + item, mask=inside, other=0).to(dtype)
            lower, higher, _, _ = _pairs_of(
                s,
                weight,
                sum_ptr,
                last_ptr,
                first_ptr,
                place,
                count,
                most_high,
                most_low,
                whole,
                twice,
                True,
                SUMS,
            )
            mean += tl.sum(_weigh(higher - lower, v), axis=0, keep_dims=True)
    for first in range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = place < count
        item = tl.load(order_ptr + place, mask=inside, other=0)
        s = tl.load(score_ptr + item, mask=inside, other=0).to(dtype) * 0.5
        weight = tl.full([1], 1, dtype)
        if WEIGHTED:
            weight = tl.load(weight_ptr + item, mask=inside, other=0).to(dtype)
        lower, higher, lower_mean, higher_mean = _pairs_of(
            s,
            weight,
            sum_ptr,
            last_ptr,
            first_ptr,
            place,
            count,
            most_high,
            most_low,
            whole,
            twice,
            PRODUCT,
            SUMS,
        )
        if PRODUCT:
            v = tl.load(v_ptr + item, mask=inside, other=0).to(dtype)
            slope = _weigh(higher, v - higher_mean - mean) - _weigh(lower, lower_mean - v - mean)
            slope *= factor * factor
        else:
            slope = (higher - lower) * factor
        tl.store(slope_ptr + item, slope, mask=inside)
    _fill(slope_ptr, order_ptr, count, valid, (stop - start).to(tl.int32), undefined)
    if not PRODUCT:
        sum_of_pairs = rest * tl.exp(exponent)
        loss = tl.where(sum_of_pairs <= 1, log1p_unit(sum_of_pairs), exponent + tl.log(wide))
        _store_loss(loss_ptr, active_ptr, program, loss, contributes, undefined)


# ---------------------------------------------------------------- launchers


def _scan(
    kernel: Kernel,
    lists: Lists,
    scores: Tensor,
    labels: Tensor,
    item_weights: Tensor | None,
    v: Tensor | None,
    *params: Any,
    wide: bool = False,
    by_score: bool = False,
    variant: tuple[bool, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses, the slope or its product with v, and the marks. The kernel keeps sums of each item, in float64
    if ``wide``.
    """
    if scores.numel() == 0:
        return lists.no_items(scores)
    given = lists.operands(scores, labels, item_weights, v)
    loss, slope, active = lists.results(scores)
    order = lists.sort(given[1], given[0] if by_score else None)
    dtype = torch.float64 if wide or v is not None else scores.dtype
    variant = (*variant, item_weights is not None, v is not None)
    sums = scores.new_empty((scores.numel(), kernel.variants[variant]["SUMS"]), dtype=dtype).view(torch.uint8)
    last = torch.empty_like(scores, dtype=torch.int32)
    pointers = (*given, order, lists.valid, lists.bounds, sums, last, loss, slope, active.view(torch.uint8))
    kernel(loss.numel(), *pointers, *params, lists.items, lists.lists, int(lists.masked), variant=variant)
    return loss, slope, active


def _list_mle(
    lists: Lists,
    scores: Tensor,
    labels: Tensor,
    item_weights: Tensor | None,
    v: Tensor | None,
    ties: int,
    weights: int,
    k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    grouped, table = ties == Ties.BRESLOW, scores
    if weights != PositionWeights.UNIFORM:
        place = torch.arange(lists.items, dtype=torch.float64, device=scores.device)
        table = (discount_of(place) if weights == PositionWeights.DISCOUNT else torch.exp2(-place)).to(scores.dtype)
    given = (scores, labels, item_weights, v, table, weights, min(k, lists.items))
    return _scan(list_mle_kernel, lists, *given, by_score=ties == Ties.SCORE, variant=(grouped,))


def _unique_softmax(
    lists: Lists, scores: Tensor, labels: Tensor, item_weights: Tensor | None, v: Tensor | None, exponential: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _scan(unique_softmax_kernel, lists, scores, labels, item_weights, v, variant=(exponential,))


def _cosent(
    lists: Lists, scores: Tensor, labels: Tensor, item_weights: Tensor | None, v: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    given = (scores, labels, item_weights, v, torch.empty_like(scores, dtype=torch.int32), scale)
    return _scan(cosent_kernel, lists, *given, wide=item_weights is not None)


def _loss(kind: Any, lists: Lists, scores: Tensor, labels: Tensor, item_weights: Tensor | None, *params: Any) -> Any:
    return kind(lists, scores, labels, item_weights, None, *params)


def _slope(
    kind: Any,
    scores: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    offsets: Tensor | None,
    item_weights: Tensor | None,
    v: Tensor | None,
    *params: Any,
) -> Tensor:
    lists = Lists(scores, valid, offsets)
    return lists.moved(kind(lists, scores, labels, item_weights, v, *params)[1], v)


list_mle, list_mle_slope = reducing(partial(_loss, _list_mle)), partial(_slope, _list_mle)
unique_softmax, unique_softmax_slope = reducing(partial(_loss, _unique_softmax)), partial(_slope, _unique_softmax)
cosent, cosent_slope = reducing(partial(_loss, _cosent)), partial(_slope, _cosent)
