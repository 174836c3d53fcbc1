"""Soft ranks and soft sorting."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops._enums import GroupValue
from custom_ops.triton_kernels.common import constant, kernel
from custom_ops.triton_kernels.lists import ANYWHERE, WIDE, Lists, latest, load_valid, sum_of_group

_BLOCK = 32  # places of a list at a time
_PLACES = 16  # the same in a running sum, which compares all of them
_REDUCE, _SHARE, _SOFTMAX = (tl.constexpr(form) for form in range(3))
_SUM, _CENTRED = constant(GroupValue.SUM), constant(GroupValue.CENTRED)


@triton.jit
def _logaddexp(x, y):
    return tl.maximum(x, y) + tl.log(1 + tl.exp(-tl.abs(x - y)))


# The regression of a list is sequential, so a list has one program of one warp.
@kernel(
    "*T *i64 *u8 *i64 *fp64 *fp64 *fp64 *i32 *T *i32 fp64 fp64 i32 i32 i32",
    WIDE,
    {(kl, sort): {"KL": kl, "SORT": sort, "BLOCK": _BLOCK} for kl in (False, True) for sort in (False, True)},
    num_warps=1,
    narrow=ANYWHERE,
)
@triton.jit(do_not_specialize=["items", "lists", "masked"])
def pool_adjacent_violators_kernel(
    x_ptr,
    order_ptr,
    valid_ptr,
    bounds_ptr,
    value_ptr,
    pool_a_ptr,
    pool_b_ptr,
    pool_begin_ptr,
    out_ptr,
    groups_ptr,
    alpha: tl.float64,
    beta: tl.float64,
    items,
    lists,
    masked,
    KL: tl.constexpr,
    SORT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the soft ranks, or soft sort, of each list's valid items and their groups; see csrc/sorting.cpp.

    ``order`` has the items of a list by descending value, or ascending for SORT, with the masked ones last. Weights of
    places are read from ``pool_b`` before a pool replaces them.
    """
    program = tl.program_id(0).to(tl.int64)
    base = program // lists * items
    start, stop = tl.load(bounds_ptr + program % lists), tl.load(bounds_ptr + program % lists + 1)
    at = base + start
    x_ptr += base
    counts = tl.zeros([BLOCK], tl.int32)
    for block in range(start, stop, BLOCK):
        item = block + tl.arange(0, BLOCK)
        valid = item < stop
        if masked != 0:
            valid = load_valid(valid_ptr + base, item, valid, True)
        counts += valid.to(tl.int32)
    m = tl.sum(counts)
    for block in range(0, m, BLOCK):
        place = block + tl.arange(0, BLOCK)
        item = tl.load(order_ptr + at + place, mask=place < m, other=0)
        x = tl.load(x_ptr + item, mask=place < m, other=0).to(tl.float64)
        tl.store(value_ptr + at + place, -x if SORT else x, mask=place < m)
        if KL and not SORT:
            left = tl.maximum(m - place, 1).to(tl.float64)
            tl.store(pool_b_ptr + at + place, tl.log(left), mask=place < m)
    tl.debug_barrier()  # the next loads see what other threads stored
    count = m * 0
    for p in range(m):
        value = tl.load(value_ptr + at + p)
        if KL and not SORT:
            b = tl.load(pool_b_ptr + at + p)
        else:
            b = tl.full([], 0 if KL else 1, tl.float64)
        a = tl.full([], 0, tl.float64)
        begin = p + m * 0
        merging = count > 0
        while merging:
            before_a = tl.load(pool_a_ptr + at + count - 1)
            before_b = tl.load(pool_b_ptr + at + count - 1)
            before_begin = tl.load(pool_begin_ptr + at + count - 1)
            before_value = tl.load(value_ptr + at + before_begin)
            values = tl.where(before_value == value, 0.0, before_value - value) * alpha
            places = (begin - before_begin).to(tl.float64) * beta
            if KL and SORT:
                merging = places - values <= (a - b) - (before_a - before_b)
                merged_a = _logaddexp(before_a, a - places)
                merged_b = _logaddexp(before_b, b - values)
            elif KL:
                merging = values <= (a - b) - (before_a - before_b)
                merged_a = _logaddexp(before_a, a - values)
                merged_b = _logaddexp(before_b, b)
            else:
                above = places - values if SORT else values - places
                merging = above <= a / b - before_a / before_b
                merged_a = before_a + (a - b * above)
                merged_b = before_b + b
            a = tl.where(merging, merged_a, a)
            b = tl.where(merging, merged_b, b)
            begin = tl.where(merging, before_begin, begin)
            value = tl.where(merging, before_value, value)
            count = tl.where(merging, count - 1, count)
            merging = merging & (count > 0)
        tl.debug_barrier()  # one thread stores, after all threads have loaded what it overwrites
        tl.store(pool_a_ptr + at + count, a)
        tl.store(pool_b_ptr + at + count, b)
        tl.store(pool_begin_ptr + at + count, begin)
        tl.debug_barrier()  # the next loads see the stores
        count += 1
    for block in range(0, m, BLOCK):
        place = block + tl.arange(0, BLOCK)
        inside = place < m
        pool, last = tl.zeros_like(place), tl.zeros_like(place) + (count - 1)
        while tl.max(last - pool) > 0:
            middle = (pool + last + 1) // 2
            begun = tl.load(pool_begin_ptr + at + middle) <= place
            pool, last = tl.where(begun, middle, pool), tl.where(begun, last, middle - 1)
        begin = tl.load(pool_begin_ptr + at + pool)
        a, b = tl.load(pool_a_ptr + at + pool), tl.load(pool_b_ptr + at + pool)
        value = tl.load(value_ptr + at + place, mask=inside, other=0)
        first = tl.load(value_ptr + at + begin)
        below = tl.where(first == value, 0.0, first - value) * alpha
        if KL:
            fit = a - b
        else:
            fit = a / b
        if SORT:
            found = -first + (fit + (place - begin).to(tl.float64) * beta)
        elif KL:
            found = tl.exp(-below - fit)
        else:
            found = (m - begin).to(tl.float64) - (below + fit)
        item = tl.load(order_ptr + at + place, mask=inside, other=0)
        to = start + place if SORT else item
        tl.store(out_ptr + base + to, found.to(out_ptr.dtype.element_ty), mask=inside)
        entry = item.to(tl.int32)
        tl.store(groups_ptr + at + place, tl.where(place == begin, ~entry, entry), mask=inside)


@triton.jit
def _group_terms(x_ptr, rank_ptr, groups_ptr, place, stop, carry, items, from_order, scale, FORM: tl.constexpr):
    """Return the items of a block of a list's places, which places hold one, their x, the two numbers of each that its
    group sums, and the group's first place with the next block's carry.
    """
    entry = tl.load(groups_ptr + place, mask=place < stop, other=items)
    item, holds = tl.where(entry < 0, ~entry, entry), entry != items
    first, carry = latest(place, entry < 0, carry)
    x = tl.load(x_ptr + tl.where(from_order != 0, place, item), mask=holds, other=0).to(tl.float64)
    one = tl.where(holds, 1.0, 0.0).to(tl.float64)
    if FORM == _REDUCE:
        a, b = x, one
    else:
        head = ~tl.load(groups_ptr + first, mask=holds, other=-1)
        above = tl.load(x_ptr + head, mask=holds, other=0).to(tl.float64)
        if FORM == _SHARE:
            x -= above  # makes the result of an item alone 0
            b = tl.load(rank_ptr + item, mask=holds, other=0).to(tl.float64)
            a = b * x
        else:  # in the order of `isotonic` a group's first item is the top
            a = one
            b = tl.where(holds, tl.exp(scale * tl.where(x == above, 0.0, x - above)), 0.0)
    return item, holds, x, a, b, first, carry


@kernel(
    "*T *T *i32 *i64 *fp64 *fp64 *T fp64 i32 i32 i32 i32 i32",
    WIDE,
    {form.value: {"FORM": form.value, "BLOCK": _PLACES} for form in (_REDUCE, _SHARE, _SOFTMAX)},
    num_warps=1,
    narrow=ANYWHERE,
)
@triton.jit(do_not_specialize=["value", "from_order", "to_order", "items", "lists"])
def group_kernel(
    x_ptr,
    rank_ptr,
    groups_ptr,
    bounds_ptr,
    sum_a_ptr,
    sum_b_ptr,
    out_ptr,
    scale: tl.float64,
    value,
    from_order,
    to_order,
    items,
    lists,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum over the groups of each list, store the sums at the first place of each, and the results of its places."""
    program = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(bounds_ptr + program % lists), tl.load(bounds_ptr + program % lists + 1)
    base = program // lists * items
    x_ptr, rank_ptr, groups_ptr, out_ptr = x_ptr + base, rank_ptr + base, groups_ptr + base, out_ptr + base
    sum_a_ptr, sum_b_ptr = sum_a_ptr + base, sum_b_ptr + base
    carry = tl.full([1], -1, tl.int64)
    carry_a, carry_b = tl.zeros([1], tl.float64), tl.zeros([1], tl.float64)
    counts = tl.zeros([BLOCK], tl.int32)
    for block in range(start, stop, BLOCK):
        place = block + tl.arange(0, BLOCK)
        _, holds, _, a, b, first, next_carry = _group_terms(
            x_ptr, rank_ptr, groups_ptr, place, stop, carry, items, from_order, scale, FORM
        )
        a, carry_a = sum_of_group(a, first, carry, carry_a)
        b, carry_b = sum_of_group(b, first, carry, carry_b)
        carry = next_carry
        after = tl.load(groups_ptr + place + 1, mask=place + 1 < stop, other=items)
        closes = holds & ((after < 0) | (after == items))
        tl.store(sum_a_ptr + first, a, mask=closes)
        tl.store(sum_b_ptr + first, b, mask=closes)
        counts += holds.to(tl.int32)
    count = tl.sum(counts)
    tl.debug_barrier()  # the next loads see what other threads stored
    carry = tl.full([1], -1, tl.int64)
    for block in range(start, start + count, BLOCK):
        place = block + tl.arange(0, BLOCK)
        item, holds, x, _, b, first, carry = _group_terms(
            x_ptr, rank_ptr, groups_ptr, place, stop, carry, items, from_order, scale, FORM
        )
        sum_a = tl.load(sum_a_ptr + first, mask=holds, other=0)
        sum_b = tl.load(sum_b_ptr + first, mask=holds, other=1)
        if FORM == _REDUCE:
            shared = tl.where(value == _SUM, sum_a, sum_a / sum_b)
            result = scale * tl.where(value == _CENTRED, x - shared, shared)
        elif FORM == _SHARE:
            result = scale * b * (x - sum_a / sum_b)
        else:
            ranks = sum_a * (2 * (count - first + start) - sum_a + 1) / 2  # the sum of the group's ranks
            result = b / sum_b * tl.where(value != 0, ranks, 1.0)
        to = tl.where(to_order != 0, place, item)
        tl.store(out_ptr + to, result.to(out_ptr.dtype.element_ty), mask=holds)


def _check_wide(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"x: expected float32 or float64, got {x.dtype}")


def isotonic(
    x: Tensor, valid: Tensor | None, offsets: Tensor | None, strength: float, kl: bool, sort: bool
) -> tuple[Tensor, Tensor]:
    _check_wide(x)
    x = x.contiguous()  # as must be the order
    lists = Lists(x, valid, offsets)
    n = lists.items
    out, groups = x.new_zeros(x.shape), x.new_full(x.shape, n, dtype=torch.int32)
    if x.numel() == 0 or lists.lists == 0:
        return out, groups
    order = lists.sort(-x if sort else x)
    numbers = [x.new_empty(x.shape, dtype=torch.float64) for _ in range(3)]
    begins = torch.empty_like(groups)
    alpha, beta = (1.0, 1 / strength) if sort else (1 / strength, 1.0)
    pointers = (x, order, lists.valid, lists.bounds, *numbers, begins, out, groups)
    sizes = (n, lists.lists, int(lists.masked))
    pool_adjacent_violators_kernel(lists.examples * lists.lists, *pointers, alpha, beta, *sizes, variant=(kl, sort))
    return out, groups


def _by_group(
    form: tl.constexpr,
    x: Tensor,
    ranks: Tensor,
    groups: Tensor,
    offsets: Tensor | None,
    scale: float,
    value: int = 0,
    from_order: bool = False,
    to_order: bool = False,
) -> Tensor:
    _check_wide(x)
    if groups.dtype != torch.int32 or groups.shape != x.shape:
        raise RuntimeError("groups: expected int32 of the shape of x")
    if ranks.dtype != x.dtype or ranks.shape != x.shape:
        raise RuntimeError("ranks: expected the shape and dtype of v")
    lists = Lists(x, None, offsets)
    out = x.new_zeros(x.shape)
    if x.numel() == 0:
        return out
    sums = [x.new_empty(x.shape, dtype=torch.float64) for _ in range(2)]
    pointers = (x.contiguous(), ranks.contiguous(), groups.contiguous(), lists.bounds, *sums, out)
    options = (scale, int(value), int(from_order), int(to_order), lists.items, lists.lists)
    group_kernel(lists.examples * lists.lists, *pointers, *options, variant=form.value)
    return out


def group_reduce(
    x: Tensor, groups: Tensor, offsets: Tensor | None, value: int, from_order: bool, to_order: bool, scale: float
) -> Tensor:
    return _by_group(_REDUCE, x, x, groups, offsets, scale, value, from_order, to_order)


def group_share(v: Tensor, ranks: Tensor, groups: Tensor, offsets: Tensor | None, scale: float) -> Tensor:
    return _by_group(_SHARE, v, ranks, groups, offsets, scale)


def group_softmax(x: Tensor, groups: Tensor, offsets: Tensor | None, scale: float, weighted: bool) -> Tensor:
    return _by_group(_SOFTMAX, x, x, groups, offsets, scale, int(weighted))
