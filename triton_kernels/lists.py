"""The code that the list losses share: the positions of the lists, sums over each, and the two ops that scale them.

A kernel of pairs has a program for each block of items of an example (see `rows`) and loops over the columns of the
lists that the block overlaps (`columns`). It doesn't depend on the form in which the lists came.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops._enums import Reduction
from custom_ops.library._torch import assert_async
from custom_ops.triton_kernels.common import kernel

WIDE = ("fp32", "fp64")  # the dtypes of list losses
_BLOCK = 512
# A kernel of pairs adds up so many tiles of pairs before it sums their rows, which takes shuffles between threads.
TILES = tl.constexpr(32)
# These are the reasons why some kernels have no wide loads (see `kernel`).
PAIRS = "computes on pairs: reads n numbers, which caches hold, for n² of them"
ANYWHERE = "a list begins at any place, on which its sums may not depend"


class Lists:
    """``examples`` rows of ``items``, each with ``lists`` lists between the same ``bounds``.

    Bounds out of order or range raise without waiting for the device, and no kernel reads foreign memory for them.
    """

    def __init__(self, x: Tensor, valid: Tensor | None, offsets: Tensor | None) -> None:
        self.batch = x.shape[:-1]
        self.examples, self.items = math.prod(self.batch), x.shape[-1]
        if valid is not None and (valid.dtype != torch.bool or valid.shape != x.shape):
            raise RuntimeError("mask: expected bool of the shape of the scores")
        self.masked, self.device = valid is not None, x.device
        # It isn't read without a mask.
        self.valid = x.new_empty(1, dtype=torch.uint8) if valid is None else valid.contiguous().view(torch.uint8)
        if offsets is None:
            n = self.items
            self.bounds = (
                torch.arange(0, n + 1, n, device=x.device) if n else torch.zeros(2, dtype=torch.int64, device=x.device)
            )
            self.lists, self.several = 1, False
        else:
            if offsets.dim() != 1 or offsets.shape[0] < 1 or offsets.dtype != torch.int64:
                raise RuntimeError("cu_lengths: expected a 1-d int64 tensor of at least one element")
            self.bounds = offsets.clamp(0, self.items).cummax(0).values
            expected = f"cu_lengths: expected non-decreasing values from 0 to {self.items}"
            assert_async((self.bounds == offsets).all(), expected)
            self.lists, self.several = offsets.shape[0] - 1, True

    @cached_property
    def places(self) -> Tensor:
        """Return the list [T] of each item of several lists: -1 before all lists, L after them."""
        return torch.searchsorted(self.bounds, torch.arange(self.items, device=self.device), right=True) - 1

    @cached_property
    def ids(self) -> Tensor:
        """Return the list [T] of each item, or -1 outside of all. With a single list nothing reads it."""
        if not self.several:
            return self.bounds.new_empty(1, dtype=torch.int32)
        return torch.where(self.places < self.lists, self.places, -1).to(torch.int32)

    @property
    def variant(self) -> tuple[bool, bool]:
        return self.masked, self.several

    def owners(self) -> tuple[Tensor, int]:
        """Return each item's list (-1 if it isn't valid or in no list), and the distance between examples in that
        tensor.
        """
        ids = self.ids if self.several else self.bounds.new_zeros(self.items, dtype=torch.int32)
        if self.masked:
            ids = torch.where(self.valid != 0, ids, -1)
        return ids, self.items if self.masked else 0

    def operands(self, scores: Tensor, labels: Tensor, *optional: Tensor | None) -> list[Tensor]:
        """Return the tensors for a kernel. The scores stand for one that is missing, which the kernel doesn't read."""
        given = [scores if x is None else x for x in (labels, *optional)]
        if any(x.shape != scores.shape or x.dtype != scores.dtype for x in given):
            raise RuntimeError("labels, item_weights, v: expected the shape and dtype of the scores")
        return [x.contiguous() for x in (scores, *given)]

    def results(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return room for the losses, the slope and the marks of a kernel that writes the items of all lists."""
        loss = self.per_list(scores)
        slope = (torch.zeros if self.several else torch.empty)(scores.shape, dtype=scores.dtype, device=scores.device)
        return loss, slope, torch.empty_like(loss, dtype=torch.bool)

    def per_list(self, x: Tensor) -> Tensor:
        return x.new_empty((*self.batch, self.lists))

    def no_items(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the results of a loss of lists without items."""
        loss = self.per_list(x).zero_()
        return loss, torch.zeros_like(x), loss.bool()

    def to_items(self, x: Tensor) -> Tensor:
        """Return for each item [..., T] the value that x [..., L] has for its list; an item in no list gets an
        arbitrary value.
        """
        if not self.several:
            return x.expand(*x.shape[:-1], self.items)
        if self.lists == 0:
            return x.new_zeros(*x.shape[:-1], self.items)
        return x[..., self.places.clamp(0, self.lists - 1)]

    def sum(self, x: Tensor) -> Tensor:
        """Return the sums [..., L] of x [..., T] over the lists, masked items included."""
        out = self.per_list(x)
        list_sum_kernel(self.examples * self.lists, x.contiguous(), out, self.bounds, self.items, self.lists)
        return out

    def scale(self, weight: Tensor, x: Tensor) -> Tensor:
        """Return x [..., T] times its list's weight [..., L], or 0 where that is 0 and for an item of no list."""
        out = x.new_empty(x.shape)
        blocks = triton.cdiv(self.items, _BLOCK)
        pointers = (weight.contiguous(), x.contiguous(), out, self.valid, self.ids)
        sizes = (self.items, self.lists, blocks)
        list_scale_kernel(self.examples * blocks, *pointers, *sizes, variant=self.variant)
        return out

    def moved(self, slope: Tensor, v: Tensor | None) -> Tensor:
        """Return the slope or, given ``v``, the Hessian times it: 0 in a list where v is 0, even if a score is infinite
        or NaN.
        """
        if v is None or slope.numel() == 0:
            return slope
        size = (v.abs() if not self.masked else torch.where(self.valid.view(v.shape) != 0, v.abs(), 0)).contiguous()
        return self.scale((self.largest(size) != 0).to(slope.dtype), slope)

    def largest(self, x: Tensor, least: float = 0) -> Tensor:
        """Return the largest [..., L] of ``least`` and x [..., T] over each list, masked items included."""
        if not self.several:
            return torch.nn.functional.pad(x, (0, 1), value=least).amax(-1, keepdim=True)
        top = x.new_full((*self.batch, self.lists + 2), least)
        return top.scatter_reduce(-1, (self.places + 1).expand(x.shape), x, "amax")[..., 1:-1]

    def scan(self, x: Tensor) -> Tensor:
        """Return the running sums of x [..., T] along each list, in float64, and 0 outside of all lists.

        `torch.cumsum` isn't used: on a GPU it may add in another order each time, and in it a NaN spreads from list to
        list.
        """
        out = torch.zeros_like(x, memory_format=torch.contiguous_format)
        list_scan_kernel(self.examples * self.lists, x.contiguous(), out, self.bounds, self.items, self.lists)
        return out

    def sort(self, key: Tensor, then: Tensor | None = None) -> Tensor:
        """Return the order [..., T] of each list by descending key, ties by ``then`` and position, masked items
        last. Several keys are stacked in the first dimension.
        """
        order = None if then is None else _then_by(None, then)
        if not self.masked and not self.several:
            return _then_by(order, key)
        if key.dtype == torch.float64:
            order = _then_by(order, key)
        keys = torch.empty_like(key, dtype=torch.int64, memory_format=torch.contiguous_format)
        blocks = triton.cdiv(self.items, _BLOCK)
        places = self.places if self.several else self.bounds
        pointers = (key.contiguous(), keys if order is None else order.contiguous(), self.valid, places, keys)
        variant = (*self.variant, order is not None)
        programs = key.numel() // self.items * blocks if self.items else 0
        list_key_kernel(programs, *pointers, self.examples, self.items, blocks, variant=variant)
        rest = keys.sort(dim=-1, stable=True).indices
        return rest if order is None else order.gather(-1, rest)

    def order(self, key: Tensor) -> Tensor:
        """Return the order of each list by descending key; a single list has its masked items anywhere."""
        return self.sort(key) if self.several else _then_by(None, key)


def _then_by(order: Tensor | None, key: Tensor) -> Tensor:
    """Return the order by descending key, ties by ``order``."""
    if order is None:
        return key.sort(dim=-1, descending=True, stable=True).indices
    return order.gather(-1, key.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices)


def discount_of(rank: Tensor) -> Tensor:
    """Return 1 / log2(1 + r) in float64, where ``rank`` is r - 1."""
    return 1 / torch.log2(rank.double() + 2)


def relative_gains(labels: Tensor, highest: Tensor, exponential: bool) -> Tensor:
    """Return 2^label - 1 over 2^highest, or label over highest, in float64; a label of at most 0 has no gain."""
    labels, highest = labels.double(), highest.double()
    gains = -torch.expm1(-math.log(2) * labels) * torch.exp2(labels - highest) if exponential else labels / highest
    return gains.masked_fill(labels <= 0, 0)


@triton.jit
def relative_gain(label, highest, EXPONENTIAL: tl.constexpr):
    """Return what `relative_gains` does, in a kernel."""
    if EXPONENTIAL:
        x = label * -0.693147180559945309
        u = tl.exp2(-label)  # e^x - 1 = (u - 1) x / log u, in which the error of u cancels
        less = tl.where(u == 1, x, tl.where(u - 1 == -1, -1.0, (u - 1) * x / tl.log(u)))
        gain = -less * tl.exp2(label - highest)
    else:
        gain = label / highest
    return tl.where(label <= 0, 0.0, gain)


VARIANTS: dict[Any, dict[str, Any]] = {
    (masked, several): {"MASKED": masked, "SEVERAL": several} for masked in (False, True) for several in (False, True)
}


@triton.jit
def load_valid(valid_ptr, at, inside, MASKED: tl.constexpr):
    """Return whether the items at ``at`` are valid; items that aren't ``inside`` are not."""
    if MASKED:
        return inside & (tl.load(valid_ptr + at, mask=inside, other=0) != 0)
    else:
        return inside


@triton.jit
def load_ranked(order_ptr, valid_ptr, stop, first, before, masked, BLOCK: tl.constexpr):
    """Return a block of a list's items in their order, which of them are valid, their ranks among the valid ones, and
    the number of valid items so far.
    """
    at = first + tl.arange(0, BLOCK)
    item = tl.load(order_ptr + at, mask=at < stop, other=0)
    valid = at < stop
    if masked != 0:
        valid = load_valid(valid_ptr, item, valid, True)
    counts = valid.to(tl.int32)
    return item, valid, before + tl.cumsum(counts) - counts, before + tl.sum(counts, axis=0, keep_dims=True)


@triton.jit
def load_list(ids_ptr, item, inside, SEVERAL: tl.constexpr):
    """Return the list of each item, or -1 outside of all lists."""
    if SEVERAL:
        return tl.load(ids_ptr + item, mask=inside, other=-1)
    else:
        return tl.where(inside, 0, -1)


@triton.jit
def latest(place, marked, carry):
    """Return for each lane the last marked place up to it, or the carry, and the next carry."""
    lane = tl.arange(0, place.shape[0])
    marked = tl.where(marked, place, -1)
    found = tl.max(tl.where(lane[None, :] <= lane[:, None], marked[None, :], -1), axis=1)
    return tl.maximum(found, carry), tl.maximum(tl.max(marked, axis=0, keep_dims=True), carry)


@triton.jit
def sum_of_group(x, first, carry_first, carry):
    """Return the running sums of x along each item's group, which begins at ``first``, and the carry in float64."""
    lane = tl.arange(0, x.shape[0])
    among = (first[None, :] == first[:, None]) & (lane[None, :] <= lane[:, None])
    sums = tl.sum(tl.where(among, x[None, :], 0.0), axis=1) + tl.where(first == carry_first, carry, 0.0).to(x.dtype)
    latest = tl.max(first, axis=0, keep_dims=True)
    total = tl.sum(tl.where(first == latest, x, 0.0), axis=0, keep_dims=True).to(tl.float64)
    return sums, total + tl.where(latest == carry_first, carry, 0.0)


@triton.jit
def columns(bounds_ptr, ids, items, lists, SEVERAL: tl.constexpr):
    """Return the first and the last item of the lists with these ``ids``."""
    if SEVERAL:
        first = tl.min(tl.where(ids < 0, lists, ids))
        last = tl.max(ids)
        some = last >= 0
        start = tl.load(bounds_ptr + first, mask=some, other=0)
        stop = tl.load(bounds_ptr + last + 1, mask=some, other=0)
        return start, stop
    else:
        return (items * 0).to(tl.int64), items.to(tl.int64)


@triton.jit
def tiled_columns(first, stop, COLUMNS: tl.constexpr):
    """Return the number of columns from ``first`` that TILES tiles cover; 32 bits leave registers to a loop over
    them.
    """
    return tl.minimum(stop - first, TILES * COLUMNS).to(tl.int32)


@triton.jit
def share_of(COLUMNS: tl.constexpr):
    """Return the share of a pair's term that is added up over TILES tiles: the sum of the shares can't overflow."""
    return 1 / (TILES * COLUMNS)


@triton.jit
def sum_of_rows(shares):
    """Return the rows' sums in float64 of the terms whose shares were added up over TILES tiles [ROWS, COLUMNS]."""
    return tl.sum(shares, axis=1).to(tl.float64) * (TILES * shares.shape[1])


@kernel(
    "*T *i64 *u8 *i64 *i64 i32 i32 i32",
    WIDE,
    {
        (*key, ordered): {**variant, "ORDERED": ordered, "BLOCK": _BLOCK}
        for key, variant in VARIANTS.items()
        for ordered in (False, True)
    },
    narrow="gathers the keys in their order",
)
@triton.jit(do_not_specialize=["examples", "items", "blocks"])
def list_key_kernel(
    key_ptr,
    order_ptr,
    valid_ptr,
    places_ptr,
    out_ptr,
    examples,
    items,
    blocks,
    MASKED: tl.constexpr,
    SEVERAL: tl.constexpr,
    ORDERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store integers whose order is that of the lists, then that of valid before masked items and, in float32, then the
    descending one of the keys, as in torch's sort with NaN first. An item is the one at its place in ``order``.
    """
    program = tl.program_id(0).to(tl.int64)
    base, example = program // blocks * items, program // blocks % examples
    at = program % blocks * BLOCK + tl.arange(0, BLOCK)
    item, inside = at, at < items
    if ORDERED:
        item = tl.load(order_ptr + base + at, mask=inside, other=0)
    out = tl.zeros([BLOCK], tl.int64)
    if SEVERAL:
        out += tl.load(places_ptr + item, mask=inside, other=0)
    if MASKED:
        out = 2 * out + (tl.load(valid_ptr + example * items + item, mask=inside, other=0) == 0).to(tl.int64)
    if key_ptr.dtype.element_ty == tl.float32:
        key = tl.load(key_ptr + base + item, mask=inside, other=0)
        key = tl.where(key == key, tl.where(key == 0, 0.0, key), float("nan"))  # one zero and one NaN, a positive one
        bits = key.to(tl.int32, bitcast=True)
        ascending = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
        out = (out << 32) + (0x7FFFFFFF - ascending)
    tl.store(out_ptr + base + at, out, mask=inside)


@kernel("*T *T *i64 i32 i32", WIDE, {None: {"BLOCK": _BLOCK}}, narrow=ANYWHERE)
@triton.jit(do_not_specialize=["items", "lists"])
def list_sum_kernel(x_ptr, out_ptr, bounds_ptr, items, lists, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    example, index = program // lists, program % lists
    start, stop = tl.load(bounds_ptr + index), tl.load(bounds_ptr + index + 1)
    x_ptr += example * items
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(start, stop, BLOCK):
        item = first + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + item, mask=item < stop, other=0)
    tl.store(out_ptr + program, tl.sum(total).to(x_ptr.dtype.element_ty))


@kernel("*fp64 *fp64 *i64 i32 i32", ("fp64",), {None: {"BLOCK": _BLOCK}}, narrow=ANYWHERE)
@triton.jit(do_not_specialize=["items", "lists"])
def list_scan_kernel(x_ptr, out_ptr, bounds_ptr, items, lists, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(bounds_ptr + program % lists), tl.load(bounds_ptr + program % lists + 1)
    base = program // lists * items
    carry = tl.zeros([1], tl.float64)
    for first in range(start, stop, BLOCK):
        item = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + base + item, mask=item < stop, other=0)
        tl.store(out_ptr + base + item, carry + tl.cumsum(x), mask=item < stop)
        carry += tl.sum(x, axis=0, keep_dims=True)


@kernel(
    "*T *T *T *u8 *i64 i32 i32",
    WIDE,
    {masked: {"MASKED": masked, "BLOCK": _BLOCK} for masked in (False, True)},
    narrow=ANYWHERE,
)
@triton.jit(do_not_specialize=["items", "lists"])
def list_dot_kernel(
    x_ptr, y_ptr, out_ptr, valid_ptr, bounds_ptr, items, lists, MASKED: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    example, index = program // lists, program % lists
    start, stop = tl.load(bounds_ptr + index), tl.load(bounds_ptr + index + 1)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(start, stop, BLOCK):
        item = first + tl.arange(0, BLOCK)
        at = example * items + item
        valid = load_valid(valid_ptr, at, item < stop, MASKED)
        x, y = tl.load(x_ptr + at, mask=valid, other=0), tl.load(y_ptr + at, mask=valid, other=0)
        total += x.to(tl.float64) * y.to(tl.float64)
    tl.store(out_ptr + program, tl.sum(total).to(x_ptr.dtype.element_ty))


@kernel(
    "*T *T *T *u8 *i32 i32 i32 i32",
    WIDE,
    {key: {**variant, "BLOCK": _BLOCK} for key, variant in VARIANTS.items()},
    streams=_BLOCK,
)
@triton.jit(do_not_specialize=["lists", "blocks"])
def list_scale_kernel(
    weight_ptr,
    x_ptr,
    out_ptr,
    valid_ptr,
    ids_ptr,
    items,
    lists,
    blocks,
    MASKED: tl.constexpr,
    SEVERAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    example = program // blocks
    item = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = item < items
    ids = load_list(ids_ptr, item, inside, SEVERAL)
    at = example * items + item
    valid = load_valid(valid_ptr, at, inside, MASKED) & (ids >= 0)
    weight = tl.load(weight_ptr + example * lists + ids, mask=valid, other=0)
    # This reads invalid items too, as a mask of single elements would forbid wide loads.
    x = tl.load(x_ptr + at, mask=inside, other=0)
    tl.store(out_ptr + at, tl.where(valid & (weight != 0), weight * x, 0.0), mask=inside)


def list_scale(weight: Tensor, x: Tensor, valid: Tensor | None, offsets: Tensor | None) -> Tensor:
    lists = Lists(x, valid, offsets)
    if weight.shape != (*lists.batch, lists.lists):
        raise RuntimeError("weight: expected one for each list")
    return lists.scale(weight, x)


def list_dot(x: Tensor, y: Tensor, valid: Tensor | None, offsets: Tensor | None) -> Tensor:
    x, y = x.contiguous(), y.contiguous()
    lists = Lists(x, valid, offsets)
    if y.shape != x.shape:
        raise RuntimeError("y: expected the shape of x")
    out = lists.per_list(x)
    pointers = (x, y, out, lists.valid, lists.bounds)
    list_dot_kernel(lists.examples * lists.lists, *pointers, lists.items, lists.lists, variant=lists.masked)
    return out


def list_total(loss: Tensor, active: Tensor, mean: bool, batch_dims: int) -> Tensor:
    dims = tuple(range(batch_dims, loss.dim()))
    total = loss.sum(dims, dtype=torch.float64) if dims else loss.double()
    return _over_active(total, active, mean, dims).to(loss.dtype)


def list_share(grad: Tensor, active: Tensor, mean: bool) -> Tensor:
    dims = tuple(range(grad.dim(), active.dim()))
    share = _over_active(grad.double(), active, mean, dims).to(grad.dtype)
    return share.view((*grad.shape, *[1] * len(dims))).expand(active.shape).clone(memory_format=torch.contiguous_format)


def _over_active(x: Tensor, active: Tensor, mean: bool, dims: tuple[int, ...]) -> Tensor:
    return x / (active.sum(dims) if dims else active.long()).clamp_min(1) if mean else x


def reducing(launch: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Return the launcher of a list loss, made of one that takes `Lists` and returns the loss of each list.

    Weights of the items come before the reduction.
    """

    def run(
        scores: Tensor, labels: Tensor, valid: Tensor | None, offsets: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = 0 if isinstance(rest[0], int) else 1
        reduction, batch_dims, *params = rest[given:]
        loss, slope, active = launch(Lists(scores, valid, offsets), scores, labels, *rest[:given], *params)
        if reduction == Reduction.NONE:
            return loss, slope, active
        dims = tuple(range(batch_dims, active.dim()))
        total = loss.sum(dims, dtype=torch.float64) if dims else loss.double()
        if Reduction(reduction) == Reduction.MEAN:
            count = (active.sum(dims, keepdim=True) if dims else active.long()).clamp_min(1)
            total, slope = total / count.view(total.shape), (slope / count).to(slope.dtype)
        return total.to(loss.dtype), slope, active

    return run
