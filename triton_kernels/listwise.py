"""Listwise losses: sums of exponentials along each list, and pointwise formulas between them, in float64."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops._enums import PositionWeights, Ties
from custom_ops.triton_kernels.common import kernel
from custom_ops.triton_kernels.lists import ANYWHERE, WIDE, Lists, load_valid, reducing, relative_gains


@kernel(
    "*fp64 *fp64 *fp64 *fp64 *fp64 *fp64 *i64 fp64 i32 i32",
    ("fp64",),
    {reverse: {"REVERSE": reverse, "BLOCK": 32} for reverse in (False, True)},
    narrow="reads 32 numbers at a time, which are fewer than its threads",
)
@triton.jit(do_not_specialize=["items", "lists"])
def exponential_scan_kernel(
    x_ptr,
    a_ptr,
    b_ptr,
    top_ptr,
    sum_a_ptr,
    sum_b_ptr,
    bounds_ptr,
    scale: tl.float64,
    items,
    lists,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the running sums of a e^(scale (x - top)) and b e^(scale (x - top)) along a list, with top the running
    largest x.

    They run from the first item or from the last. At an infinite top the difference of x is 0.
    """
    program = tl.program_id(0).to(tl.int64)
    start = tl.load(bounds_ptr + program % lists)
    stop = tl.load(bounds_ptr + program % lists + 1)
    base = program // lists * items
    lane = tl.arange(0, BLOCK)
    before = (lane[None, :] <= lane[:, None]).to(tl.int1)
    none = float("-inf")
    carry_top = tl.full([1], none, tl.float64)
    carry_a, carry_b = tl.zeros([1], tl.float64), tl.zeros([1], tl.float64)
    for first in range(0, stop - start, BLOCK):
        place = first + lane
        inside = place < stop - start
        at = base + (stop - 1 - place if REVERSE else start + place)
        x = tl.load(x_ptr + at, mask=inside, other=none)
        a = tl.load(a_ptr + at, mask=inside, other=0)
        b = tl.load(b_ptr + at, mask=inside, other=0)
        top = tl.maximum(tl.max(tl.where(before, x[None, :], none), axis=1), carry_top)
        below = tl.where(x[None, :] == top[:, None], 0.0, (x[None, :] - top[:, None]) * scale)
        weight = tl.exp(tl.where(before, below, none))
        carried = tl.where(carry_top == top, 1.0, tl.exp((carry_top - top) * scale))
        sum_a = tl.sum(weight * a[None, :], axis=1) + carried * carry_a
        sum_b = tl.sum(weight * b[None, :], axis=1) + carried * carry_b
        tl.store(top_ptr + at, top, mask=inside)
        tl.store(sum_a_ptr + at, sum_a, mask=inside)
        tl.store(sum_b_ptr + at, sum_b, mask=inside)
        last = lane == BLOCK - 1
        carry_top = tl.max(tl.where(last, top, none), axis=0, keep_dims=True)
        carry_a = tl.sum(tl.where(last, sum_a, 0.0), axis=0, keep_dims=True)
        carry_b = tl.sum(tl.where(last, sum_b, 0.0), axis=0, keep_dims=True)


def _weigh(weight: Tensor, value: Tensor) -> Tensor:
    """Return weight * value, but 0 for a weight of 0 whatever the value is."""
    return torch.where(weight == 0, 0, weight * value)


class _Sums(NamedTuple):
    """The sums of a e^(scale x) and b e^(scale x), both divided by e^(scale top)."""

    top: Tensor
    a: Tensor
    b: Tensor

    @property
    def mean(self) -> Tensor:
        """Return the mean of b / a, weighted by a e^x, or 0 over no item."""
        return torch.where(self.a == 0, 0, self.b / self.a)

    def defined(self) -> _Sums:
        """Return the sums with NaN where several items, each with a = 1, are at an infinite top and have no
        difference.
        """
        return self._replace(a=self.a.masked_fill(self.top.isinf() & (self.a > 1), torch.nan))

    def above(self, score: Tensor, scale: float = 1.0) -> Tensor:
        """Return the logarithm of the first sum minus that of a score's exponential, or -inf over no item."""
        return torch.where(self.a == 0, -torch.inf, scale * (self.top - score) + self.a.log())

    def share(self, score: Tensor, scale: float = 1.0) -> Tensor:
        """Return the share of e^(scale score) in the first sum."""
        return torch.where(score == self.top, 1, (scale * (score - self.top)).exp()) / self.a


class _Ordered:
    """The lists in float64, with their items in descending order of the labels, masked ones last."""

    def __init__(
        self,
        lists: Lists,
        scores: Tensor,
        labels: Tensor,
        item_weights: Tensor | None = None,
        by_score: bool = False,
        grouped: bool = True,
    ) -> None:
        given = (labels, item_weights)
        if any(x is not None and (x.shape != scores.shape or x.dtype != scores.dtype) for x in given):
            raise RuntimeError("labels, item_weights: expected the shape and dtype of the scores")
        self.dtype = scores.dtype
        self.lists = lists
        place = torch.arange(lists.items, device=scores.device)
        self.start, self.stop = lists.to_items(lists.bounds[:-1]), lists.to_items(lists.bounds[1:])
        exists = lists.valid != 0 if lists.masked else torch.ones_like(scores, dtype=torch.bool)
        if lists.several:
            exists = exists & (lists.ids >= 0)
        exists = exists.contiguous()
        scores, labels = (t.contiguous().masked_fill(~exists, 0).double() for t in (scores, labels))
        self.order = lists.sort(labels, scores if by_score else None).contiguous()
        self.s, self.y, self.exists = (t.gather(-1, self.order) for t in (scores, labels, exists))
        self.weight = torch.ones_like(self.s) if item_weights is None else self.sorted(item_weights)
        count = lists.sum(self.exists.double()).long()
        end = self.start + lists.to_items(count)  # the end of the valid items
        begins = self.exists.clone()
        if grouped:
            begins[..., 1:] &= (self.y[..., 1:] != self.y[..., :-1]) | (self.start == place)[1:]
        # The items' groups, those of equal label or each alone, reach from first to last.
        self.first = torch.where(begins, place, 0).cummax(-1).values
        following = torch.where(begins, place, lists.items).roll(-1, -1)
        following[..., -1] = lists.items
        self.last = following.flip(-1).cummin(-1).values.flip(-1).minimum(end) - 1
        self.final = self.last + 1 == end
        top, bottom = (self.per_list(self.y, at) for at in (lists.bounds[:-1], lists.bounds[:-1] + count - 1))
        self.top = top
        self.active = (count > 1) & ~(top == bottom)

    def per_list(self, x: Tensor, at: Tensor) -> Tensor:
        """Return, for each list, the item at a place of the example."""
        return x.gather(-1, at.clamp(0, self.lists.items - 1).expand((*self.lists.batch, self.lists.lists)))

    def sorted(self, v: Tensor) -> Tensor:
        return v.double().gather(-1, self.order).masked_fill(~self.exists, 0)

    def scan(self, x: Tensor, a: Tensor, b: Tensor, where: Tensor, scale: float = 1.0, reverse: bool = False) -> _Sums:
        """Return, at each item, the sums over all items up to it, or from it on if ``reverse``."""
        x = torch.where(where, x, -torch.inf).contiguous()
        a, b = (t.masked_fill(~where, 0).contiguous() for t in (a, b))
        out = _Sums(*(torch.zeros_like(x) for _ in range(3)))
        lists = self.lists
        arguments = (x, a, b, *out, lists.bounds, scale, lists.items, lists.lists)
        exponential_scan_kernel(lists.examples * lists.lists, *arguments, variant=reverse)
        return out

    def at(self, sums: _Sums, place: Tensor, none: Tensor) -> _Sums:
        """Return the sums at places, and empty sums where ``none``."""
        place = place.clamp(0, self.lists.items - 1)
        top, a, b = (t.gather(-1, place).masked_fill(none, 0) for t in sums)
        return _Sums(top, a, b)

    def result(self, slope: Tensor) -> Tensor:
        slope = torch.where(self.exists & self.lists.to_items(self.active), slope, 0)
        return torch.empty_like(slope).scatter_(-1, self.order, slope).to(self.dtype)

    def sum(self, terms: Tensor) -> Tensor:
        return self.lists.sum(terms.masked_fill(~self.exists, 0))

    def results(self, loss: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.where(self.active, loss, 0).to(self.dtype), self.result(slope), self.active


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
            "BLOCK": 256,
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
    return _softmax(Lists(scores, valid, offsets), scores, labels, v, softmax_labels)[1]


# ---------------------------------------------------------------- scans in label order


class _Competing(_Ordered):
    """Groups that each compete with all items from itself on; L is the logarithm of the sum of their e^(scale s)."""

    scale = 1.0
    exponents_are_weighted = False  # by the items' weights

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.exponents = self.weight if self.exponents_are_weighted else torch.ones_like(self.s)
        self.reach(torch.zeros_like(self.s))

    def reach(self, v: Tensor) -> None:
        sums = self.scan(self.s, self.exponents, self.exponents * v, self.exists, self.scale, reverse=True)
        self.own = self.at(sums, self.first, ~self.exists).defined()
        self.lower = self.at(sums, self.last + 1, self.final | ~self.exists)
        self.mean = self.own.mean
        self.share = self.own.share(self.s, self.scale)

    def earlier(self, of: _Sums, a: Tensor, b: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums of a and b over the earlier groups, each times e^(L - logarithm of the group's sum)."""
        sums = self.scan(-of.top, _weigh(a, 1 / of.a), _weigh(b, 1 / of.a), where)
        sums = self.at(sums, self.first - 1, (self.first == self.start) | ~self.exists)
        factor = torch.where(sums.top == -self.own.top, 1, (sums.top + self.own.top).exp())
        factor = _weigh(factor, self.own.a)
        return _weigh(sums.a, factor), _weigh(sums.b, factor)


class _ListMle(_Competing):
    def __init__(
        self,
        lists: Lists,
        scores: Tensor,
        labels: Tensor,
        item_weights: Tensor | None,
        ties: int,
        weights: int,
        k: int,
    ) -> None:
        ties, weights = Ties(ties), PositionWeights(weights)
        options = {"by_score": ties == Ties.SCORE, "grouped": ties == Ties.BRESLOW}
        super().__init__(lists, scores, labels, item_weights, **options)
        place = (torch.arange(self.lists.items, device=scores.device) - self.start).double()
        w = torch.ones_like(self.s)
        if weights == PositionWeights.EXPONENTIAL:
            last = torch.exp2(1 - self.lists.to_items(self.sum(w)))
            w = (torch.exp2(-place) - last) / (1 - last)
        elif weights == PositionWeights.DISCOUNT:
            w = w * (math.log(2) / (place + 2).log())
        w = w.masked_fill(place >= k, 0)
        self.w, self.whole = w, w
        if ties == Ties.BRESLOW:  # the group's items share the weights of their places
            through = self.lists.scan(w.masked_fill(~self.exists, 0))
            self.whole = through.gather(-1, self.last.clamp_min(0)) - through.gather(-1, self.first)
            self.whole = self.whole + w.gather(-1, self.first)
            self.w = self.whole / (self.last - self.first + 1).clamp_min(1)
            if item_weights is not None:
                self.w = self.w * self.weight
                through = self.lists.scan(self.w.masked_fill(~self.exists, 0))
                self.whole = through.gather(-1, self.last.clamp_min(0)) - through.gather(-1, self.first)
                self.whole = self.whole + self.w.gather(-1, self.first)
            self.miss = 1 - self.share
        else:
            self.w = self.whole = w * self.weight
            self.miss = _weigh(self.lower.a, self.own.share(self.lower.top))  # 1 - share, without cancellation

    def loss(self) -> Tensor:
        small = self.miss < 0.5
        near = -torch.where(small, -self.miss, 0).log1p()
        return self.sum(_weigh(self.w, torch.where(small, near, self.own.above(self.s))))

    def slope(self) -> Tensor:
        carry, _ = self.earlier(self.own, self.w, self.w, self.exists)
        return _weigh(carry + (self.whole - self.w), self.share) - _weigh(self.w, self.miss)

    def product(self, v: Tensor) -> Tensor:
        self.reach(v)
        carry, moved = self.earlier(self.own, self.w, _weigh(self.w, self.mean), self.exists)
        return _weigh(v * (carry + self.whole) - (moved + _weigh(self.whole, self.mean)), self.share)


class _UniqueSoftmax(_Competing):
    def __init__(
        self,
        lists: Lists,
        scores: Tensor,
        labels: Tensor,
        item_weights: Tensor | None,
        exponential: bool,
    ) -> None:
        super().__init__(lists, scores, labels, item_weights)
        self.active = self.active & ~(self.top <= 0)
        top = self.lists.to_items(self.top)
        self.w = relative_gains(self.y, top, exponential) / relative_gains(top, top, exponential) * self.weight
        self.x = self.lower.above(self.s)
        self.p = _weigh(self.w, self.x.sigmoid())

    def _pushed(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.earlier(self.lower, a, b, self.exists & ~self.final)

    def loss(self) -> Tensor:
        return self.sum(_weigh(self.w, -torch.nn.functional.logsigmoid(-self.x)))

    def slope(self) -> Tensor:
        return _weigh(self._pushed(self.p, self.p)[0], self.share) - self.p

    def product(self, v: Tensor) -> Tensor:
        self.reach(v)
        moves = _weigh(self.p, (-self.x).sigmoid() * (self.lower.mean - v))
        carry, moved = self._pushed(self.p, moves - _weigh(self.p, self.lower.mean))
        return _weigh(v * carry + moved, self.share) - moves


class _Term(NamedTuple):
    """The logarithm of a term: scale times a difference, kept as ``high`` and its rounding error, plus ``log``."""

    high: Tensor
    low: Tensor
    log: Tensor


def _term(worse: Tensor, better: Tensor, count: Tensor) -> _Term:
    high = worse - better
    subtracted = worse - high
    low = (worse - (high + subtracted)) + (subtracted - better)
    return _Term(high, torch.where(high.isfinite(), low, 0), count.log())


class _Cosent(_Competing):
    exponents_are_weighted = True

    def __init__(
        self,
        lists: Lists,
        scores: Tensor,
        labels: Tensor,
        item_weights: Tensor | None,
        scale: float,
    ) -> None:
        self.scale = scale
        super().__init__(lists, scores, labels, item_weights)
        self.most = _Term(*(self.lists.per_list(self.s).zero_() for _ in range(3)))
        term = _term(self.lower.top, self.s, self.lower.a * self.weight)
        some = self.exists & (self.lower.a != 0)
        place = torch.arange(self.lists.items, device=scores.device)
        for _ in range(2):  # the first pass finds the largest rounded exponent, which is near the largest
            exponent = torch.where(some, self._exponent(term), -torch.inf)
            most = self.lists.to_items(self.lists.largest(exponent))
            largest = self.lists.largest(torch.where(exponent == most, place, -1), -1)
            self.most = _Term(
                *(torch.where(largest < 0, m, self.per_list(t, largest)) for m, t in zip(self.most, term))
            )
        self.top = scale * self.most.high + self.most.log
        self.rest = self.sum(self._over(self.lower, term))
        self.whole = (-self.top).exp() + self.rest

    def _exponent(self, term: _Term) -> Tensor:
        """Return the exponent of a term relative to the largest."""
        high, low, log = (t - self.lists.to_items(most) for t, most in zip(term, self.most))
        return self.scale * (high + low) + log

    def _over(self, sums: _Sums, term: _Term) -> Tensor:
        """Return the term of these sums relative to the largest, or 0 for no item."""
        return torch.where(sums.a == 0, 0, self._exponent(term).exp())

    def reach(self, v: Tensor) -> None:
        super().reach(v)
        sums = self.scan(-self.s, self.exponents, self.exponents * v, self.exists, self.scale)
        self.higher = self.at(sums, self.first - 1, (self.first == self.start) | ~self.exists)

    def _shares(self) -> tuple[Tensor, Tensor]:
        """Return the shares of an item's pairs with items of lower and of higher labels."""
        whole = self.lists.to_items(self.whole)
        lower = _term(self.lower.top, self.s, self.lower.a * self.weight)
        higher = _term(self.s, -self.higher.top, self.higher.a * self.weight)
        return self._over(self.lower, lower) / whole, self._over(self.higher, higher) / whole

    def loss(self) -> Tensor:
        large = torch.where(self.top.isinf(), self.top, self.top + self.whole.log())
        return torch.where(self.top > 0, large, self.rest.log1p())

    def slope(self) -> Tensor:
        lower, higher = self._shares()
        return self.scale * (higher - lower)

    def product(self, v: Tensor) -> Tensor:
        self.reach(v)
        lower, higher = self._shares()
        mean = self.lists.to_items(self.sum((higher - lower) * v))
        moves = _weigh(higher, v - self.higher.mean - mean) - _weigh(lower, self.lower.mean - v - mean)
        return self.scale**2 * moves


# ---------------------------------------------------------------- launchers


def _loss(kind: Any, lists: Lists, scores: Tensor, labels: Tensor, *params: Any) -> tuple[Tensor, Tensor, Tensor]:
    if scores.numel() == 0:
        return lists.no_items(scores)
    ordered = kind(lists, scores, labels, *params)
    loss, slope, active = ordered.results(ordered.loss(), ordered.slope())
    lists.mark_undefined(labels, loss, active)
    return loss, slope, active


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
    if scores.numel() == 0:
        return scores.new_empty(scores.shape)
    ordered = kind(Lists(scores, valid, offsets), scores, labels, item_weights, *params)
    return ordered.result(ordered.slope() if v is None else ordered.product(ordered.sorted(v)))


list_mle, list_mle_slope = reducing(partial(_loss, _ListMle)), partial(_slope, _ListMle)
unique_softmax, unique_softmax_slope = reducing(partial(_loss, _UniqueSoftmax)), partial(_slope, _UniqueSoftmax)
cosent, cosent_slope = reducing(partial(_loss, _Cosent)), partial(_slope, _Cosent)
