"""Soft ranks and soft sorting."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops._enums import GroupValue
from custom_ops.triton_kernels.common import kernel
from custom_ops.triton_kernels.lists import Lists

_BLOCK = 32


@triton.jit
def _logaddexp(x, y):
    return tl.maximum(x, y) + tl.log(1 + tl.exp(-tl.abs(x - y)))


# The regression of a list is sequential, so a list has one program of one warp.
@kernel(
    "*fp64 *fp64 *i64 *i64 *fp64 *fp64 *i32 *fp64 *u8 fp64 fp64 i32 i32",
    ("fp64",),
    {(kl, sort): {"KL": kl, "SORT": sort} for kl in (False, True) for sort in (False, True)},
    num_warps=1,
    narrow="reads one number after the other",
)
@triton.jit(do_not_specialize=["items", "lists"])
def pool_adjacent_violators_kernel(
    value_ptr,
    b_ptr,
    count_ptr,
    bounds_ptr,
    pool_a_ptr,
    pool_b_ptr,
    pool_begin_ptr,
    fit_ptr,
    begins_ptr,
    alpha: tl.float64,
    beta: tl.float64,
    items,
    lists,
    KL: tl.constexpr,
    SORT: tl.constexpr,
):
    """Store the pools of each list's first ``count`` values, and where each pool begins; see csrc/sorting.cpp."""
    program = tl.program_id(0).to(tl.int64)
    at = program // lists * items + tl.load(bounds_ptr + program % lists)
    m = tl.load(count_ptr + program).to(tl.int32)
    count = m * 0
    for p in range(m):
        value = tl.load(value_ptr + at + p)
        b = tl.load(b_ptr + at + p)
        a = b * 0.0
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
    for k in range(count):
        begin = tl.load(pool_begin_ptr + at + k)
        a = tl.load(pool_a_ptr + at + k)
        b = tl.load(pool_b_ptr + at + k)
        if KL:
            fit = a - b
        else:
            fit = a / b
        tl.store(fit_ptr + at + begin, fit)
        tl.store(begins_ptr + at + begin, begin * 0 + 1)


@kernel(
    "*fp64 *i64 *i64 *fp64 i32 i32",
    ("fp64",),
    {None: {"BLOCK": _BLOCK}},
    narrow="reads 32 numbers at a time, which are fewer than its threads",
)
@triton.jit(do_not_specialize=["n", "blocks"])
def group_sum_kernel(x_ptr, start_ptr, end_ptr, sum_ptr, n, blocks, BLOCK: tl.constexpr):
    """Store, for each place, the sum of x over the places from the place's ``start`` to its ``end``."""
    program = tl.program_id(0)
    at = (program // blocks).to(tl.int64) * n
    place = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    start = tl.load(start_ptr + at + place, mask=inside, other=n)
    end = tl.load(end_ptr + at + place, mask=inside, other=0)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(tl.min(start), tl.max(end), BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at + column, mask=column < n, other=0)
        member = (column[None, :] >= start[:, None]) & (column[None, :] < end[:, None])
        total += tl.sum(tl.where(member, x[None, :], 0.0), axis=1)
    tl.store(sum_ptr + at + place, total, mask=inside)


def _wide(x: Tensor) -> Tensor:
    if x.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"x: expected float32 or float64, got {x.dtype}")
    return x.double()


class _Order(NamedTuple):
    """The groups of rows [rows, n]: for each place its item, whether it holds one, and the bounds of its group."""

    item: Tensor
    holds: Tensor
    place: Tensor
    start: Tensor
    end: Tensor

    @staticmethod
    def of(groups: Tensor, x: Tensor) -> _Order:
        if groups.dtype != torch.int32 or groups.shape != x.shape:
            raise RuntimeError("groups: expected int32 of the shape of x")
        n = x.shape[-1]
        groups = groups.reshape(-1, n).long()
        item = torch.where(groups < 0, ~groups, groups)
        holds = item < n
        first = (groups < 0) | ~holds
        place = torch.arange(n, device=x.device).expand(groups.shape)
        start = torch.where(first, place, 0).cummax(-1).values
        last = torch.nn.functional.pad(first[:, 1:], (0, 1), value=True)
        end = torch.where(last, place + 1, n).flip(-1).cummin(-1).values.flip(-1)
        return _Order(item, holds, place, start, end)

    def read(self, x: Tensor) -> Tensor:
        """Return the items of x in order, and 0 after the last one."""
        found = x.reshape(self.item.shape).gather(-1, self.item.clamp(max=x.shape[-1] - 1))
        return torch.where(self.holds, found, 0)

    def write(self, x: Tensor) -> Tensor:
        """Invert `read`; an item in no place gets 0."""
        rows, n = x.shape
        return x.new_zeros(rows, n + 1).scatter_(-1, self.item.clamp(max=n), x)[:, :n]

    def sum(self, x: Tensor) -> Tensor:
        """Return, for each place, the sum over its group."""
        rows, n = x.shape
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        blocks = triton.cdiv(n, _BLOCK)
        bounds = (self.start.contiguous(), self.end.contiguous())
        group_sum_kernel(rows * blocks, x.contiguous(), *bounds, out, n, blocks)
        return out


def isotonic(
    x: Tensor, valid: Tensor | None, offsets: Tensor | None, strength: float, kl: bool, sort: bool
) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    lists = Lists(x, valid, offsets)
    n = lists.items
    out, groups = x.new_zeros(x.shape), x.new_full(x.shape, n, dtype=torch.int32)
    if x.numel() == 0 or lists.lists == 0:
        return out, groups
    key = -wide if sort else wide
    order = lists.sort(key)
    count = lists.sum(torch.ones_like(wide) if valid is None else valid.double()).long()
    start = lists.to_items(lists.bounds[:-1].clamp_max(n - 1))
    place = torch.arange(n, device=x.device)
    left = lists.to_items(count) - (place - start)  # the number of the list's items from this place on
    holds = (left > 0) & (lists.ids >= 0) if lists.several else left > 0
    s = torch.where(holds, key.gather(-1, order), 0).contiguous()
    alpha, beta = (1.0, 1 / strength) if sort else (1 / strength, 1.0)
    if kl:
        b = torch.zeros_like(s) if sort else torch.where(holds, left, 1).double().log()
    else:
        b = torch.ones_like(s)
    pools: Any = (torch.empty_like(s), torch.empty_like(s), s.new_empty(s.shape, dtype=torch.int32))
    fit, begins = torch.zeros_like(s), s.new_zeros(s.shape, dtype=torch.uint8)
    arguments = (s, b.contiguous(), count, lists.bounds, *pools, fit, begins, alpha, beta, n, lists.lists)
    pool_adjacent_violators_kernel(lists.examples * lists.lists, *arguments, variant=(kl, sort))
    begun = begins != 0
    begin = torch.where(begun, place, 0).cummax(-1).values
    fit, first = fit.gather(-1, begin), s.gather(-1, begin)
    below = torch.where(first == s, 0, first - s) * alpha
    if sort:
        found = -first + (fit + (place - begin).double() * beta)  # torch would multiply integers in float32
    elif kl:
        found = (-below - fit).exp()
    else:
        found = left.gather(-1, begin) - (below + fit)
    found = torch.where(holds, found, 0)
    out.copy_(found if sort else torch.zeros_like(found).scatter_(-1, order, found))
    groups.copy_(torch.where(holds, torch.where(begun, ~order, order), n))
    return out, groups


def group_reduce(
    x: Tensor, groups: Tensor, offsets: Tensor | None, value: int, from_order: bool, to_order: bool, scale: float
) -> Tensor:
    out = x.new_empty(x.shape)
    wide = _wide(x)
    if x.numel() == 0:
        return out
    order = _Order.of(groups, x)
    values = torch.where(order.holds, wide.reshape(order.item.shape), 0) if from_order else order.read(wide)
    shared = order.sum(values)
    if GroupValue(value) != GroupValue.SUM:
        shared = shared / (order.end - order.start)
    own = torch.where(order.holds, scale * (values - shared if value == GroupValue.CENTRED else shared), 0)
    return out.copy_((own if to_order else order.write(own)).view(x.shape))


def group_share(v: Tensor, ranks: Tensor, groups: Tensor, offsets: Tensor | None, scale: float) -> Tensor:
    out = v.new_empty(v.shape)
    if v.numel() == 0:
        return out
    order = _Order.of(groups, v)
    values, weights = order.read(_wide(v)), order.read(_wide(ranks))
    values = values - values.gather(-1, order.start)  # makes the result of an item alone 0
    mean = order.sum(weights * values) / order.sum(weights)
    share = torch.where(order.holds, scale * weights * (values - mean), 0)
    return out.copy_(order.write(share).view(v.shape))


def group_softmax(x: Tensor, groups: Tensor, offsets: Tensor | None, scale: float, weighted: bool) -> Tensor:
    out = x.new_zeros(x.shape)
    wide = _wide(x)
    lists = Lists(x, None, offsets)
    if x.numel() == 0 or lists.lists == 0:
        return out
    order = _Order.of(groups, x)
    values = order.read(wide)
    top = values.gather(-1, order.start)  # in the order of `isotonic` a group's first item is the top
    exponential = torch.where(order.holds, (scale * torch.where(values == top, 0, values - top)).exp(), 0)
    softmax = exponential / order.sum(exponential)
    if weighted:
        count = lists.to_items(lists.sum(order.holds.view(x.shape).double())).reshape(softmax.shape)
        first, last = (at - lists.to_items(lists.bounds[:-1]) for at in (order.start, order.end))
        softmax = softmax * (last - first) * (2 * count - first - last + 1) / 2
    softmax = torch.where(order.holds, softmax, 0)
    return out.copy_(order.write(softmax).reshape(x.shape))
