"""Losses over a catalogue: torch multiplies blocks of rows with the words, and the kernels turn blocks of logits into
the rows' results or, in place, into their cotangents.

The products are in float32 for 16-bit arguments too, of which a part is widened at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.library._torch import assert_async
from custom_ops.ranking.catalogue import NONE_IGNORED
from custom_ops.triton_kernels.common import accumulator, kernel
from custom_ops.triton_kernels.lists import WIDE
from custom_ops.triton_kernels.pairwise import LOGISTIC, both_orders, pair_value, wrong_order

_BLOCK = 1024  # logits that a program reads at a time; with twice as many, some kernels spill registers
_TILE = 32  # rows and columns that a program reads at a time
_LOGITS = 1 << 26  # logits per block of rows, but at least _LEAST_ROWS rows
_LEAST_ROWS = 128
_WORDS = 1 << 14  # the words of a 16-bit catalogue that are widened at a time
_NARROW = "a row begins at any place, as the number of words needn't be a multiple of four"

# ---------------------------------------------------------------- rows


@triton.jit
def _shifted(x):
    """Return x and e^x for x <= 0, with finite numbers for minus infinity, so that x e^x is 0 there. e^0 is exact."""
    LOWEST: tl.constexpr = -750.0 if x.dtype == tl.float64 else -100.0
    low = x < LOWEST
    return tl.where(low, LOWEST, x), tl.where(low, 0.0, tl.where(x == 0, 1.0, tl.exp(x)))


@triton.jit
def _place(target_ptr, words, first, ignored):
    """Return whether this program's row counts, and the place of its target, which is negative if it isn't here."""
    target = tl.load(target_ptr + tl.program_id(0))
    at = target - first
    return target != ignored, tl.where(at < words, at, -1)


@kernel(
    "*T *i64 *u8 *i64 *i64 i32 i64",
    WIDE,
    {
        (masked, grouped): {"MASK": masked, "GROUP": grouped, "BLOCK": _BLOCK}
        for masked, grouped in ((False, True), (True, False), (True, True))
    },
    narrow=_NARROW,
)
@triton.jit(do_not_specialize=["words", "first"])
def catalogue_left_out_kernel(
    z_ptr,
    target_ptr,
    mask_ptr,
    row_group_ptr,
    word_group_ptr,
    words,
    first,
    MASK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Set the logits of a row to minus infinity for the words that are left out."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.load(target_ptr + row) - first
    for begin in range(0, words, BLOCK):
        v = begin + tl.arange(0, BLOCK)
        left_out = v < 0
        if GROUP:
            group = tl.load(word_group_ptr + v, mask=v < words, other=0)
            left_out = group == tl.load(row_group_ptr + row)
        if MASK:
            counts = tl.load(mask_ptr + row * words + v, mask=v < words, other=1)
            left_out = (counts == 0) | (left_out & (counts != 2))
        out = tl.full([BLOCK], float("-inf"), z_ptr.dtype.element_ty)
        tl.store(z_ptr + row * words + v, out, mask=(v < words) & left_out & (v != at))


@kernel(
    "*T *i64 *T *T *T *T i32 i64 i64",
    WIDE,
    {None: {"BLOCK": _BLOCK}},
    narrow=_NARROW,
)
@triton.jit(do_not_specialize=["words", "first", "ignored"])
def catalogue_rows_kernel(
    z_ptr,
    target_ptr,
    log_prob_ptr,
    entropy_ptr,
    lse_ptr,
    stats_ptr,
    words,
    first,
    ignored,
    BLOCK: tl.constexpr,
):
    """Store the results and the stats of a row of logits, which are 0 for an ignored row."""
    row = tl.program_id(0).to(tl.int64)
    counts, at = _place(target_ptr, words, first, ignored)
    if counts:
        none = float("-inf")
        best = tl.full([BLOCK], none, z_ptr.dtype.element_ty)
        undefined = tl.zeros([BLOCK], tl.int32)
        for begin in range(0, words, BLOCK):
            v = begin + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + row * words + v, mask=v < words, other=none)
            best = tl.where(z > best, z, best)
            undefined |= (z != z).to(tl.int32)
        top = tl.max(best)
        total, moment = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
        chosen = tl.zeros([BLOCK], z_ptr.dtype.element_ty)
        for begin in range(0, words, BLOCK):
            v = begin + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + row * words + v, mask=v < words, other=none)
            x, p = _shifted(z - top)
            total += tl.where(v < words, p, 0.0).to(tl.float64)
            moment += tl.where(v < words, p * x, 0.0).to(tl.float64)
            chosen = tl.where(v == at, z - top, chosen)
        whole = tl.sum(total)
        log_sum = tl.where(words > 0, tl.log(whole), 0.0)
        entropy = tl.where(words > 0, log_sum - tl.sum(moment) / whole, 0.0)
        log_sum, entropy = log_sum.to(top.dtype), entropy.to(top.dtype)
        log_prob = tl.where(at >= 0, tl.sum(chosen), -top) - log_sum
        infinite = ((top == none) | (top == -none)) & (tl.max(undefined) == 0)
        tl.store(log_prob_ptr + row, log_prob)
        tl.store(entropy_ptr + row, entropy)
        tl.store(lse_ptr + row, tl.where(infinite, top, top + log_sum))
        tl.store(stats_ptr + 3 * row, top)
        tl.store(stats_ptr + 3 * row + 1, log_sum)
        tl.store(stats_ptr + 3 * row + 2, entropy)
    else:
        nothing = 0.0
        tl.store(log_prob_ptr + row, nothing)
        tl.store(entropy_ptr + row, nothing)
        tl.store(lse_ptr + row, nothing)
        for i in tl.static_range(3):
            tl.store(stats_ptr + 3 * row + i, nothing)


@triton.jit
def _row(stats_ptr, of_ptr, row):
    """Return the stats of a row, and the cotangents of its log_prob, entropy and lse."""
    stats, of = stats_ptr + 3 * row, of_ptr + 3 * row
    top, log_sum, entropy = tl.load(stats), tl.load(stats + 1), tl.load(stats + 2)
    return top, log_sum, entropy, tl.load(of), tl.load(of + 1), tl.load(of + 2)


@kernel(
    "*T *i64 *T *T i32 i64 i64",
    WIDE,
    {None: {"BLOCK": _BLOCK}},
    narrow=_NARROW,
)
@triton.jit(do_not_specialize=["words", "first", "ignored"])
def catalogue_cotangent_kernel(z_ptr, target_ptr, stats_ptr, of_ptr, words, first, ignored, BLOCK: tl.constexpr):
    """Turn a row of logits into its cotangent."""
    row = tl.program_id(0).to(tl.int64)
    counts, at = _place(target_ptr, words, first, ignored)
    if counts:
        top, log_sum, entropy, of_log_prob, of_entropy, of_lse = _row(stats_ptr, of_ptr, row)
        for begin in range(0, words, BLOCK):
            v = begin + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + row * words + v, mask=v < words, other=0)
            log_p, p = _shifted(tl.where(z == -float("inf"), z, (z - top) - log_sum))
            bent = tl.where(of_entropy == 0, 0.0, of_entropy * (log_p + entropy))
            out = p * ((of_lse - of_log_prob) - bent) + tl.where(v == at, of_log_prob, 0.0)
            tl.store(z_ptr + row * words + v, out, mask=v < words)
    else:
        for begin in range(0, words, BLOCK):
            v = begin + tl.arange(0, BLOCK)
            tl.store(z_ptr + row * words + v, tl.zeros([BLOCK], z_ptr.dtype.element_ty), mask=v < words)


@kernel("*T *T *fp64 i32 i32 i32", WIDE, {None: {"ROWS": _TILE, "COLUMNS": _TILE}}, narrow=_NARROW)
@triton.jit(do_not_specialize=["words", "rows", "columns"])
def catalogue_columns_kernel(z_ptr, top_ptr, sum_ptr, words, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Add a block's rows to the largest logit and the sum of e^(z - top) of each of some columns."""
    v = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    none = float("-inf")
    top = tl.load(top_ptr + v, mask=v < columns, other=none)
    total = tl.load(sum_ptr + v, mask=v < columns, other=0)
    for begin in range(0, rows, ROWS):
        r = begin + tl.arange(0, ROWS)
        place = r.to(tl.int64)[:, None] * words + v[None, :]
        z = tl.load(z_ptr + place, mask=(r < rows)[:, None] & (v < columns)[None, :], other=none)
        best = tl.max(tl.where(z == z, z, none), 0)
        best = tl.where(top > best, top, best)
        # Where all words were left out so far, there is no largest logit yet.
        _, p = _shifted(z - tl.where(best == none, 0.0, best)[None, :])
        _, factor = _shifted(top - best)
        total = total * tl.where(top == best, 1.0, factor).to(tl.float64) + tl.sum(p, 0).to(tl.float64)
        top = best
    tl.store(top_ptr + v, top, mask=v < columns)
    tl.store(sum_ptr + v, total, mask=v < columns)


@kernel("*T *T *T i32 i32 i32", WIDE, {None: {"BLOCK": _BLOCK}}, narrow=_NARROW)
@triton.jit(do_not_specialize=["words", "columns", "begin_row"])
def catalogue_symmetric_kernel(z_ptr, stats_ptr, column_stats_ptr, words, columns, begin_row, BLOCK: tl.constexpr):
    """Turn a row of logits into the derivative of minus the targets' log_prob, in the row and in the columns."""
    row = tl.program_id(0).to(tl.int64)
    top, log_sum = tl.load(stats_ptr + 3 * row), tl.load(stats_ptr + 3 * row + 1)
    for begin in range(0, words, BLOCK):
        v = begin + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + row * words + v, mask=v < words, other=0)
        column_top = tl.load(column_stats_ptr + 3 * v, mask=v < columns, other=0)
        column_log_sum = tl.load(column_stats_ptr + 3 * v + 1, mask=v < columns, other=0)
        left_out = z == -float("inf")
        _, p = _shifted(tl.where(left_out, z, (z - top) - log_sum))
        _, q = _shifted(tl.where(left_out, z, (z - column_top) - column_log_sum))
        out = p + tl.where(v < columns, q, 0.0) - tl.where(v == begin_row + row, 2.0, 0.0)
        tl.store(z_ptr + row * words + v, out.to(top.dtype), mask=v < words)


@kernel(
    "*T *T *i64 *T *T *T *T *T i32 i64 i64",
    WIDE,
    {turned: {"TURNED": turned, "BLOCK": _BLOCK} for turned in (False, True)},
    narrow=_NARROW,
)
@triton.jit(do_not_specialize=["words", "first", "ignored"])
def catalogue_tangent_kernel(
    z_ptr,
    move_ptr,
    target_ptr,
    stats_ptr,
    of_ptr,
    log_prob_t_ptr,
    entropy_t_ptr,
    lse_t_ptr,
    words,
    first,
    ignored,
    TURNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the tangents of a row's results for the tangent ``move`` of its logits.

    If TURNED, the logits become their cotangent, and ``move`` the tangent of that.
    """
    row = tl.program_id(0).to(tl.int64)
    counts, at = _place(target_ptr, words, first, ignored)
    if counts:
        top, log_sum, entropy, of_log_prob, of_entropy, of_lse = _row(stats_ptr, of_ptr, row)
        total, product = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
        chosen = tl.zeros([BLOCK], z_ptr.dtype.element_ty)
        for begin in range(0, words, BLOCK):
            v = begin + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + row * words + v, mask=v < words, other=0)
            move = tl.load(move_ptr + row * words + v, mask=v < words, other=0)
            log_p, p = _shifted(tl.where(z == -float("inf"), z, (z - top) - log_sum))
            total += tl.where(v < words, p * move, 0.0).to(tl.float64)
            product += tl.where(v < words, p * log_p * move, 0.0).to(tl.float64)
            chosen = tl.where(v == at, move, chosen)
        mean = tl.sum(total)
        entropy_t = -(tl.sum(product) + entropy.to(tl.float64) * mean)
        mean, entropy_t = mean.to(top.dtype), entropy_t.to(top.dtype)
        tl.store(log_prob_t_ptr + row, tl.sum(chosen) - mean)
        tl.store(entropy_t_ptr + row, entropy_t)
        tl.store(lse_t_ptr + row, mean)
        if TURNED:
            for begin in range(0, words, BLOCK):
                v = begin + tl.arange(0, BLOCK)
                z = tl.load(z_ptr + row * words + v, mask=v < words, other=0)
                move = tl.load(move_ptr + row * words + v, mask=v < words, other=0)
                log_p, p = _shifted(tl.where(z == -float("inf"), z, (z - top) - log_sum))
                of = (of_lse - of_log_prob) - of_entropy * (log_p + entropy)
                change = move - mean
                tl.store(z_ptr + row * words + v, p * of + tl.where(v == at, of_log_prob, 0.0), mask=v < words)
                turned = p * (change * of - of_entropy * (change + entropy_t))
                tl.store(move_ptr + row * words + v, turned, mask=v < words)
    else:
        if TURNED:
            for begin in range(0, words, BLOCK):
                v = begin + tl.arange(0, BLOCK)
                nothing = tl.zeros([BLOCK], z_ptr.dtype.element_ty)
                tl.store(z_ptr + row * words + v, nothing, mask=v < words)
                tl.store(move_ptr + row * words + v, nothing, mask=v < words)


@kernel("*T *T *T *T *i64 *T *T *T *T i32 i64 i64", WIDE, {None: {"BLOCK": _BLOCK // 2}}, narrow=_NARROW)
@triton.jit(do_not_specialize=["words", "first", "ignored"])
def catalogue_curve_kernel(
    z_ptr,
    t_ptr,
    u_ptr,
    both_ptr,
    target_ptr,
    stats_ptr,
    log_prob_ptr,
    entropy_ptr,
    lse_ptr,
    words,
    first,
    ignored,
    BLOCK: tl.constexpr,
):
    """Store the second derivatives of a row's results along the tangents t and u of its logits, of which ``both`` is
    the second derivative along the same tangents.
    """
    row = tl.program_id(0).to(tl.int64)
    counts, at = _place(target_ptr, words, first, ignored)
    if counts:
        stats = stats_ptr + 3 * row
        top, log_sum, entropy = tl.load(stats), tl.load(stats + 1), tl.load(stats + 2)
        sum_t, sum_u = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
        sum_both = tl.zeros([BLOCK], tl.float64)
        chosen = tl.zeros([BLOCK], z_ptr.dtype.element_ty)
        for begin in range(0, words, BLOCK):
            v = begin + tl.arange(0, BLOCK)
            place = row * words + v
            z = tl.load(z_ptr + place, mask=v < words, other=-float("inf"))
            both = tl.load(both_ptr + place, mask=v < words, other=0)
            _, p = _shifted(tl.where(z == -float("inf"), z, (z - top) - log_sum))
            sum_t += (p * tl.load(t_ptr + place, mask=v < words, other=0)).to(tl.float64)
            sum_u += (p * tl.load(u_ptr + place, mask=v < words, other=0)).to(tl.float64)
            sum_both += (p * both).to(tl.float64)
            chosen = tl.where(v == at, both, chosen)
        mean_t, mean_u = tl.sum(sum_t).to(top.dtype), tl.sum(sum_u).to(top.dtype)
        mean = tl.sum(sum_both)
        mean_both = mean.to(top.dtype)
        covariance, bent = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
        for begin in range(0, words, BLOCK):
            v = begin + tl.arange(0, BLOCK)
            place = row * words + v
            z = tl.load(z_ptr + place, mask=v < words, other=-float("inf"))
            both = tl.load(both_ptr + place, mask=v < words, other=0)
            log_p, p = _shifted(tl.where(z == -float("inf"), z, (z - top) - log_sum))
            product = tl.load(t_ptr + place, mask=v < words, other=0) - mean_t
            product = product * (tl.load(u_ptr + place, mask=v < words, other=0) - mean_u)
            covariance += (p * product).to(tl.float64)
            bent += (p * (product * (log_p + entropy + 1) + log_p * (both - mean_both))).to(tl.float64)
        lse = (mean + tl.sum(covariance)).to(top.dtype)
        tl.store(log_prob_ptr + row, tl.sum(chosen) - lse)
        tl.store(entropy_ptr + row, (-tl.sum(bent)).to(top.dtype))
        tl.store(lse_ptr + row, lse)


# ---------------------------------------------------------------- binary rows


@triton.jit
def _right(mask_ptr, v, at, row, words, MASK: tl.constexpr):
    """Return which of the words ``v`` are right for the row."""
    right = v == at
    if MASK:
        right = right | (tl.load(mask_ptr + row * words + v, mask=v < words, other=0) == 2)
    return right


def _binary(block: int) -> dict[tuple[bool, bool], dict[str, Any]]:
    return {
        (turned, masked): {"TURNED": turned, "MASK": masked, "BLOCK": block}
        for turned in (False, True)
        for masked in (False, True)
    }


@kernel("*T *i64 *u8 *T *T i32 i64 i64", WIDE, _binary(_BLOCK), narrow=_NARROW)
@triton.jit(do_not_specialize=["words", "first", "ignored"])
def catalogue_binary_kernel(
    z_ptr,
    target_ptr,
    mask_ptr,
    of_ptr,
    log_prob_ptr,
    words,
    first,
    ignored,
    TURNED: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the log_prob of a row of binary problems and, if TURNED, turn the logits into their cotangent."""
    row = tl.program_id(0).to(tl.int64)
    counts, at = _place(target_ptr, words, first, ignored)
    if counts:
        of = tl.load(of_ptr + 3 * row)
        total = tl.zeros([BLOCK], tl.float64)
        for begin in range(0, words, BLOCK):
            v = begin + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + row * words + v, mask=v < words, other=0)
            right = _right(mask_ptr, v, at, row, words, MASK)
            d = tl.where(right, z, -z)
            total += tl.where(v < words, pair_value(d, LOGISTIC), 0.0).to(tl.float64)
            if TURNED:
                slope = of * wrong_order(d)
                tl.store(z_ptr + row * words + v, tl.where(right, slope, -slope), mask=v < words)
        tl.store(log_prob_ptr + row, -tl.sum(total).to(z_ptr.dtype.element_ty))
    else:
        if TURNED:
            for begin in range(0, words, BLOCK):
                v = begin + tl.arange(0, BLOCK)
                tl.store(z_ptr + row * words + v, tl.zeros([BLOCK], z_ptr.dtype.element_ty), mask=v < words)


@kernel("*T *T *i64 *u8 *T *T i32 i64 i64", WIDE, _binary(_BLOCK // 2), narrow=_NARROW)
@triton.jit(do_not_specialize=["words", "first", "ignored"])
def catalogue_binary_tangent_kernel(
    z_ptr,
    move_ptr,
    target_ptr,
    mask_ptr,
    of_ptr,
    log_prob_t_ptr,
    words,
    first,
    ignored,
    TURNED: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the tangent of a row's log_prob for the tangent ``move`` of its logits.

    If TURNED, the logits become their cotangent, and ``move`` the tangent of that.
    """
    row = tl.program_id(0).to(tl.int64)
    counts, at = _place(target_ptr, words, first, ignored)
    if counts:
        of = tl.load(of_ptr + 3 * row)
        total = tl.zeros([BLOCK], tl.float64)
        for begin in range(0, words, BLOCK):
            v = begin + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + row * words + v, mask=v < words, other=0)
            move = tl.load(move_ptr + row * words + v, mask=v < words, other=0)
            right = _right(mask_ptr, v, at, row, words, MASK)
            d = tl.where(right, z, -z)
            slope = tl.where(right, wrong_order(d), -wrong_order(d))
            total += tl.where(v < words, slope * move, 0.0).to(tl.float64)
            if TURNED:
                tl.store(z_ptr + row * words + v, of * slope, mask=v < words)
                tl.store(move_ptr + row * words + v, -of * both_orders(d) * move, mask=v < words)
        tl.store(log_prob_t_ptr + row, tl.sum(total).to(z_ptr.dtype.element_ty))
    else:
        if TURNED:
            for begin in range(0, words, BLOCK):
                v = begin + tl.arange(0, BLOCK)
                nothing = tl.zeros([BLOCK], z_ptr.dtype.element_ty)
                tl.store(z_ptr + row * words + v, nothing, mask=v < words)
                tl.store(move_ptr + row * words + v, nothing, mask=v < words)


@kernel(
    "*T *T *T *T *i64 *u8 *T i32 i64 i64",
    WIDE,
    {masked: {"MASK": masked, "BLOCK": _BLOCK // 2} for masked in (False, True)},
    narrow=_NARROW,
)
@triton.jit(do_not_specialize=["words", "first", "ignored"])
def catalogue_binary_curve_kernel(
    z_ptr,
    t_ptr,
    u_ptr,
    both_ptr,
    target_ptr,
    mask_ptr,
    log_prob_ptr,
    words,
    first,
    ignored,
    MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the second derivative of a row's log_prob along two tangents, as `catalogue_curve_kernel`."""
    row = tl.program_id(0).to(tl.int64)
    counts, at = _place(target_ptr, words, first, ignored)
    if counts:
        total = tl.zeros([BLOCK], tl.float64)
        for begin in range(0, words, BLOCK):
            v = begin + tl.arange(0, BLOCK)
            place = row * words + v
            z = tl.load(z_ptr + place, mask=v < words, other=0)
            right = _right(mask_ptr, v, at, row, words, MASK)
            d = tl.where(right, z, -z)
            slope = tl.where(right, wrong_order(d), -wrong_order(d))
            product = tl.load(t_ptr + place, mask=v < words, other=0)
            product = product * tl.load(u_ptr + place, mask=v < words, other=0)
            moved = slope * tl.load(both_ptr + place, mask=v < words, other=0) - both_orders(d) * product
            total += moved.to(tl.float64)
        tl.store(log_prob_ptr + row, tl.sum(total).to(z_ptr.dtype.element_ty))


# ---------------------------------------------------------------- passes


@dataclass(frozen=True)
class _Catalogue:
    """The arguments that all ops share, checked."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    mask: Tensor | None
    row_group: Tensor | None
    word_group: Tensor | None
    scale: float
    ignored: int
    first: int
    total: int
    binary: bool

    @property
    def wide(self) -> torch.dtype:
        return accumulator(self.x.dtype)

    @cached_property
    def counts(self) -> Tensor:
        """Return which rows [B, N] aren't ignored."""
        return self.target != self.ignored

    @property
    def places(self) -> tuple[int, int, int]:
        return self.weight.shape[1], self.first, self.ignored

    def __post_init__(self) -> None:
        x, weight, target = self.x, self.weight, self.target
        examples, rows, dims = x.shape
        if weight.shape[::2] != (examples, dims) or target.shape != (examples, rows) or target.dtype != torch.int64:
            raise RuntimeError("x, weight, target: expected [B, N, D], [B, V, D] and int64 [B, N]")
        if self.bias is not None and (self.bias.shape != weight.shape[:2] or self.bias.dtype != self.wide):
            raise RuntimeError("bias: expected [B, V] in the wide dtype")
        if self.mask is not None and (
            self.mask.shape != (examples, rows, weight.shape[1]) or self.mask.dtype != torch.uint8
        ):
            raise RuntimeError("mask: expected uint8 [B, N, V]")
        if (self.row_group is None) != (self.word_group is None):
            raise RuntimeError("row_group, word_group: expected both or neither")
        if self.row_group is not None and self.word_group is not None:
            shapes = self.row_group.shape, self.word_group.shape
            if shapes != (target.shape, weight.shape[:2]) or self.row_group.dtype != self.word_group.dtype:
                raise RuntimeError("row_group, word_group: expected int64 [B, N] and [B, V]")
        inside = ((target >= 0) & (target < self.total)) | (target == self.ignored)
        ignored = "" if self.ignored == NONE_IGNORED else f" or ignore_index {self.ignored}"
        assert_async(inside.all(), f"target: expected 0 to {self.total - 1}{ignored}")

    def of_rows(self, *tail: int) -> Tensor:
        return self.x.new_zeros((*self.target.shape, *tail), dtype=self.wide)

    def weights(self, *of: Tensor | None) -> Tensor:
        """Return the cotangents of the rows' results [B, N, 3]; a missing one is 0."""
        return torch.stack([self.of_rows() if t is None else t for t in of], -1)

    def blocks_of(self, example: int) -> Iterator[tuple[int, slice]]:
        """Yield the example and its blocks of rows."""
        rows, block = self.x.shape[1], max(_LEAST_ROWS, _LOGITS // max(1, self.weight.shape[1]))
        for begin in range(0, rows, block):
            yield example, slice(begin, min(begin + block, rows))

    def blocks(self) -> Iterator[tuple[int, slice]]:
        """Yield all examples and their blocks of rows."""
        for example in range(len(self.x)):
            yield from self.blocks_of(example)

    def rows_of(self, matrix: Tensor, at: tuple[int, slice]) -> Tensor:
        """Return a block of rows in the wide dtype, with zeros for the ignored ones."""
        return torch.where(self.counts[at].unsqueeze(-1), matrix[at], 0).to(self.wide)

    def add_logits(self, z: Tensor, rows: Tensor, words: Tensor, fresh: bool = False) -> None:
        """Add the products of the rows and the words, times the scale, to z, or store them in a ``fresh`` z."""
        for part in _parts(words):
            z[:, part].addmm_(rows, words[part].to(z.dtype).t(), beta=0 if fresh else 1, alpha=self.scale)

    def mask_of(self, at: tuple[int, slice]) -> Tensor:
        """Return a block's mask, or any bytes if there is none."""
        return self.target.contiguous().view(torch.uint8) if self.mask is None else self.mask[at].contiguous()

    def logits(self, rows: Tensor, at: tuple[int, slice]) -> Tensor:
        """Return a block's logits, which are minus infinity for the words that are left out of a row."""
        z = rows.new_empty((rows.shape[0], self.weight.shape[1]))
        if self.bias is not None:
            z.copy_(self.bias[at[0]])
        self.add_logits(z, rows, self.weight[at[0]], fresh=self.bias is None)
        if self.mask is not None or self.row_group is not None:
            target = self.target[at].contiguous()
            groups = [target, target]
            if self.row_group is not None and self.word_group is not None:
                groups = [self.row_group[at].contiguous(), self.word_group[at[0]].contiguous()]
            variant = self.mask is not None, self.row_group is not None
            pointers = z, target, self.mask_of(at), *groups
            catalogue_left_out_kernel(len(z), *pointers, *self.places[:2], variant=variant)
        return z

    def moved_logits(
        self,
        rows: Tensor,
        at: tuple[int, slice],
        rows_t: Tensor | None,
        weight_t: Tensor | None,
        bias_t: Tensor | None,
    ) -> Tensor:
        """Return the tangent of a block's logits for those of its rows, the words and the bias."""
        shape = rows.shape[0], self.weight.shape[1]
        move = rows.new_zeros(shape) if bias_t is None else bias_t[at[0]].expand(shape).contiguous()
        if rows_t is not None:
            self.add_logits(move, rows_t, self.weight[at[0]])
        if weight_t is not None:
            self.add_logits(move, rows, weight_t[at[0]])
        return move


def _parts(words: Tensor) -> Iterator[slice]:
    whole = words.shape[0]
    step = max(1, whole) if words.dtype in (torch.float32, torch.float64) else _WORDS
    for begin in range(0, whole, step):
        yield slice(begin, min(begin + step, whole))


class _Sums:
    """The derivatives that a pass returns, for those of x, weight and bias for which they are wanted."""

    def __init__(self, catalogue: _Catalogue, of_x: bool, of_weight: bool, of_bias: bool) -> None:
        def zeros(like: Tensor, shape: tuple[int, ...], wanted: bool, dtype: torch.dtype) -> Tensor:
            return like.new_zeros(shape, dtype=dtype) if wanted else like.new_empty(0, dtype=dtype)

        self.catalogue = catalogue
        self.of_x, self.of_weight, self.of_bias = of_x, of_weight, of_bias
        x, weight = catalogue.x, catalogue.weight
        self.x = zeros(x, x.shape, of_x, catalogue.wide)
        self.weight = zeros(weight, weight.shape, of_weight, catalogue.wide)
        self.bias = zeros(x, weight.shape[:2], of_bias, torch.float64)

    @property
    def wanted(self) -> bool:
        return self.of_x or self.of_weight or self.of_bias

    def add_to_rows(self, at: tuple[int, slice], cotangent: Tensor, words: Tensor) -> None:
        if self.of_x:
            for part in _parts(words):
                self.x[at].addmm_(cotangent[:, part], words[part].to(cotangent.dtype), alpha=self.catalogue.scale)

    def add_to_words(self, at: tuple[int, slice], cotangent: Tensor, rows: Tensor) -> None:
        if self.of_weight:
            self.weight[at[0]].addmm_(cotangent.t(), rows, alpha=self.catalogue.scale)

    def add_to_bias(self, at: tuple[int, slice], cotangent: Tensor) -> None:
        if self.of_bias:
            self.bias[at[0]] += cotangent.sum(0)

    def finished(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums in the wide dtype. An ignored row's is 0, whatever words its zeros were multiplied with."""
        x = torch.where(self.catalogue.counts.unsqueeze(-1), self.x, 0) if self.of_x else self.x
        return x, self.weight, self.bias.to(self.catalogue.wide)

    def rounded(self) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, bias = self.finished()
        return x.to(self.catalogue.x.dtype), weight.to(self.catalogue.weight.dtype), bias


class _Results(NamedTuple):
    log_prob: Tensor
    entropy: Tensor
    lse: Tensor
    stats: Tensor

    @staticmethod
    def of(catalogue: _Catalogue) -> _Results:
        # The kernel of binary rows stores log_prob alone, and only of the rows that aren't ignored.
        make = catalogue.x.new_zeros if catalogue.binary else catalogue.x.new_empty
        shape = catalogue.target.shape
        return _Results(*(make(s, dtype=catalogue.wide) for s in (shape, shape, shape, (*shape, 3))))


def _first_order(
    catalogue: _Catalogue,
    sums: _Sums,
    of: Tensor,
    results: _Results,
    kept: Tensor | None = None,
    known: bool = False,
) -> None:
    """Store the results, unless they are known, and add the derivatives for the cotangents ``of`` [B, N, 3].

    Unless it is None, ``kept`` [B, N, V] gets e^(z - largest), or has it if the results are known.
    """
    for at in catalogue.blocks():
        rows, target = catalogue.rows_of(catalogue.x, at), catalogue.target[at].contiguous()
        block_of, found = of[at].contiguous(), [t[at].contiguous() for t in results]
        if known and kept is not None:
            z = _from_kept(catalogue, kept[at], found[-1], block_of, target)
        else:
            z = catalogue.logits(rows, at)
            if catalogue.binary:
                pointers = z, target, catalogue.mask_of(at), block_of, found[0]
                variant = sums.wanted, catalogue.mask is not None
                catalogue_binary_kernel(len(z), *pointers, *catalogue.places, variant=variant)
            elif not known:
                catalogue_rows_kernel(len(z), z, target, *found, *catalogue.places)
                if kept is not None:
                    top = found[-1][:, :1]
                    kept[at] = torch.where(z == -torch.inf, 0, (z - top).exp())
            if sums.wanted and not catalogue.binary:
                catalogue_cotangent_kernel(len(z), z, target, found[-1], block_of, *catalogue.places)
        if sums.wanted:
            sums.add_to_rows(at, z, catalogue.weight[at[0]])
            sums.add_to_words(at, z, rows)
            sums.add_to_bias(at, z)


def _from_kept(catalogue: _Catalogue, kept: Tensor, stats: Tensor, of: Tensor, target: Tensor) -> Tensor:
    """Return a block's cotangent, made of what forward has kept."""
    counts = (target != catalogue.ignored).unsqueeze(1)
    own = torch.arange(catalogue.first, catalogue.first + kept.shape[1], device=kept.device) == target.unsqueeze(1)
    factor = (of[:, 2:] - of[:, :1]) * (-stats[:, 1:2]).exp()
    return torch.where(counts, kept * factor + torch.where(own, of[:, :1], 0), 0)


def catalogue_log_prob(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    row_group: Tensor | None,
    word_group: Tensor | None,
    scale: float,
    ignore_index: int,
    first: int,
    total: int,
    binary: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    catalogue = _Catalogue(
        x, weight, bias, target, mask, row_group, word_group, scale, ignore_index, first, total, binary
    )
    results = _Results.of(catalogue)
    nothing = _Sums(catalogue, False, False, False)
    kept = catalogue.of_rows(weight.shape[1]) if keep else x.new_empty(0, dtype=catalogue.wide)
    _first_order(catalogue, nothing, results.stats, results, kept if keep else None)
    return *results, kept


def catalogue_backward(
    of_log_prob: Tensor | None,
    of_entropy: Tensor | None,
    of_lse: Tensor | None,
    stats: Tensor,
    kept: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    row_group: Tensor | None,
    word_group: Tensor | None,
    scale: float,
    ignore_index: int,
    first: int,
    total: int,
    binary: bool,
    of_x: bool,
    of_weight: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    catalogue = _Catalogue(
        x, weight, bias, target, mask, row_group, word_group, scale, ignore_index, first, total, binary
    )
    sums = _Sums(catalogue, of_x, of_weight, of_bias)
    of = catalogue.weights(of_log_prob, of_entropy, of_lse)
    kept = None if of_entropy is not None else kept
    _first_order(catalogue, sums, of, _Results.of(catalogue)._replace(stats=stats), kept, known=True)
    return sums.rounded()


def catalogue_second(
    of_log_prob: Tensor | None,
    of_entropy: Tensor | None,
    of_lse: Tensor | None,
    stats: Tensor,
    x_t: Tensor | None,
    weight_t: Tensor | None,
    bias_t: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    row_group: Tensor | None,
    word_group: Tensor | None,
    scale: float,
    ignore_index: int,
    first: int,
    total: int,
    binary: bool,
    of_x: bool,
    of_weight: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    catalogue = _Catalogue(
        x, weight, bias, target, mask, row_group, word_group, scale, ignore_index, first, total, binary
    )
    sums = _Sums(catalogue, of_x, of_weight, of_bias)
    of = catalogue.weights(of_log_prob, of_entropy, of_lse)
    moved = [catalogue.of_rows() for _ in range(3)]
    for at in catalogue.blocks():
        rows, block_target = catalogue.rows_of(x, at), target[at].contiguous()
        z = catalogue.logits(rows, at)
        rows_t = None if x_t is None else catalogue.rows_of(x_t, at)
        move = catalogue.moved_logits(rows, at, rows_t, weight_t, bias_t)
        block_of = of[at].contiguous()
        if catalogue.binary:
            binary = z, move, block_target, catalogue.mask_of(at), block_of, moved[0][at]
            variant = sums.wanted, mask is not None
            catalogue_binary_tangent_kernel(len(z), *binary, *catalogue.places, variant=variant)
        else:
            pointers = (z, move, block_target, stats[at].contiguous(), block_of, *(t[at] for t in moved))
            catalogue_tangent_kernel(len(z), *pointers, *catalogue.places, variant=sums.wanted)
        if sums.wanted:
            sums.add_to_rows(at, move, weight[at[0]])
            sums.add_to_words(at, move, rows)
            sums.add_to_bias(at, move)
            if weight_t is not None:
                sums.add_to_rows(at, z, weight_t[at[0]])
            if rows_t is not None:
                sums.add_to_words(at, z, rows_t)
    return moved[0], moved[1], moved[2], *sums.rounded()


def catalogue_curve(
    stats: Tensor,
    x_t: Tensor | None,
    weight_t: Tensor | None,
    bias_t: Tensor | None,
    x_u: Tensor | None,
    weight_u: Tensor | None,
    bias_u: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    row_group: Tensor | None,
    word_group: Tensor | None,
    scale: float,
    ignore_index: int,
    first: int,
    total: int,
    binary: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    where = x, weight, bias, target, mask, row_group, word_group
    catalogue = _Catalogue(*where, scale, ignore_index, first, total, binary)
    log_prob, entropy, lse = (catalogue.of_rows() for _ in range(3))
    for at in catalogue.blocks():
        rows, block_target = catalogue.rows_of(x, at), target[at].contiguous()
        rows_t, rows_u = (None if moved is None else catalogue.rows_of(moved, at) for moved in (x_t, x_u))
        z = catalogue.logits(rows, at)
        both = torch.zeros_like(z)
        for some, words in ((rows_t, weight_u), (rows_u, weight_t)):
            if some is not None and words is not None:
                catalogue.add_logits(both, some, words[at[0]])
        along_t = catalogue.moved_logits(rows, at, rows_t, weight_t, bias_t)
        along_u = catalogue.moved_logits(rows, at, rows_u, weight_u, bias_u)
        pointers = z, along_t, along_u, both, block_target
        if binary:
            found = catalogue.mask_of(at), log_prob[at]
            catalogue_binary_curve_kernel(len(z), *pointers, *found, *catalogue.places, variant=mask is not None)
        else:
            results = log_prob[at], entropy[at], lse[at]
            catalogue_curve_kernel(len(z), *pointers, stats[at].contiguous(), *results, *catalogue.places)
    return log_prob, entropy, lse


def catalogue_loss(
    of_log_prob: Tensor,
    of_lse: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    row_group: Tensor | None,
    word_group: Tensor | None,
    scale: float,
    ignore_index: int,
    first: int,
    total: int,
    binary: bool,
    of_x: bool,
    of_weight: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    catalogue = _Catalogue(
        x, weight, bias, target, mask, row_group, word_group, scale, ignore_index, first, total, binary
    )
    results = _Results.of(catalogue)
    sums = _Sums(catalogue, of_x, of_weight, of_bias)
    _first_order(catalogue, sums, catalogue.weights(of_log_prob, None, of_lse), results)
    terms = _weighed(of_log_prob, results.log_prob, catalogue)
    if of_lse is not None:
        terms = terms + _weighed(of_lse, results.lse, catalogue)
    loss = terms.sum(-1, dtype=torch.float64).to(catalogue.wide)
    return loss, results.stats, *sums.finished()


def catalogue_symmetric_loss(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    row_group: Tensor | None,
    word_group: Tensor | None,
    scale: float,
    of_x: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    columns, words = x.shape[1], weight.shape[1]
    target = torch.arange(columns, device=x.device).repeat(len(x), 1)
    catalogue = _Catalogue(x, weight, None, target, mask, row_group, word_group, scale, -1, 0, words, False)
    sums = _Sums(catalogue, of_x, of_weight, False)
    results, of_columns, own = _Results.of(catalogue), catalogue.of_rows(3), catalogue.of_rows()
    top, total = own - torch.inf, torch.zeros_like(own, dtype=torch.float64)
    for example in range(len(x)):
        blocks = list(catalogue.blocks_of(example))
        for at in blocks:
            z = catalogue.logits(catalogue.rows_of(x, at), at)
            catalogue_rows_kernel(len(z), z, target[at], *(t[at] for t in results), *catalogue.places)
            own[at] = z.diagonal(at[1].start)
            pointers = z, top[example], total[example]
            catalogue_columns_kernel(triton.cdiv(columns, _TILE), *pointers, words, len(z), columns)
        of_columns[example, :, 0], of_columns[example, :, 1] = top[example], total[example].log()
        for at in blocks if sums.wanted else ():
            rows = catalogue.rows_of(x, at)
            if len(blocks) > 1:
                z = catalogue.logits(rows, at)
            stats = results.stats[at], of_columns[example]
            catalogue_symmetric_kernel(len(z), z, *stats, words, columns, at[1].start)
            sums.add_to_rows(at, z, weight[example])
            sums.add_to_words(at, z, rows)
    terms = results.log_prob + ((own - top) - of_columns[..., 1])
    loss = 0 - terms.sum(-1, dtype=torch.float64).to(catalogue.wide)
    return loss, results.stats, of_columns, *sums.finished()[:2]


def _weighed(weight: Tensor, value: Tensor, catalogue: _Catalogue) -> Tensor:
    return torch.where(catalogue.counts & (weight != 0), weight * value, 0)
