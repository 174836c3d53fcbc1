"""What list losses are given, in the form that their kernels read: lengths as a mask, labels in the scores' dtype."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops._enums import LabelUse
from custom_ops.triton_kernels.common import constant, kernel
from custom_ops.triton_kernels.lists import PAIRS, WIDE, Lists, columns, load_valid

_BLOCK, _ROWS, _COLUMNS = 512, 128, 16
_DIFFERENCE = constant(LabelUse.DIFFERENCE)
_VALUE = constant(LabelUse.VALUE)
_HIGHEST = tl.constexpr(2048.0)  # as in csrc/inputs.cpp


@triton.jit
def _double(label, FROM_DOUBLE: tl.constexpr):
    """The label as a double; one FROM_DOUBLE comes as the integer that is ordered as it is."""
    if FROM_DOUBLE:
        return _in_order(label, 63).to(tl.float64, bitcast=True)
    else:
        return label.to(tl.float64)


@triton.jit
def _in_order(bits, SIGN: tl.constexpr):
    """From the bits of a float to an integer that is ordered as it is, and back."""
    return tl.where(bits < 0, bits ^ ((1 << SIGN) - 1), bits)


@triton.jit
def _is_held(label, wide, FROM_DOUBLE: tl.constexpr):
    if FROM_DOUBLE:
        x = _double(label, True)
        return wide | (x.to(tl.float32).to(tl.float64) == x) | (x != x)
    else:
        exact = tl.where(wide, 1 << 53, 1 << 24)
        return (label >= -exact) & (label <= exact)


@kernel(
    "*i64 *T *u8 *i64 *i32 *i64 i32 i32",
    WIDE,
    {
        (masked, double): {"MASKED": masked, "FROM_DOUBLE": double, "BLOCK": _BLOCK}
        for masked in (False, True)
        for double in (False, True)
    },
    narrow="a list begins at any place",
)
@triton.jit(do_not_specialize=["items", "lists"])
def list_labels_test_kernel(
    label_ptr,
    out_ptr,
    valid_ptr,
    bounds_ptr,
    others_ptr,
    top_ptr,
    items,
    lists,
    MASKED: tl.constexpr,
    FROM_DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of each list: how many of its labels the output's dtype doesn't hold, and the highest label."""
    program = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(bounds_ptr + program % lists), tl.load(bounds_ptr + program % lists + 1)
    base = program // lists * items
    least: tl.constexpr = -(1 << 63)
    wide = out_ptr.dtype.element_ty == tl.float64
    others, top = tl.zeros([BLOCK], tl.int32), tl.full([BLOCK], least, tl.int64)
    for first in range(start, stop, BLOCK):
        item = first + tl.arange(0, BLOCK)
        valid = load_valid(valid_ptr, base + item, item < stop, MASKED)
        label = tl.load(label_ptr + base + item, mask=valid, other=0)
        others += (valid & ~_is_held(label, wide, FROM_DOUBLE)).to(tl.int32)
        top = tl.maximum(top, tl.where(valid, label, least))
    tl.store(others_ptr + program, tl.sum(others))
    tl.store(top_ptr + program, tl.max(top))


@kernel(
    "*i64 *T *i32 *i32 *i32 *i64 i32 i32 i32 i32",
    WIDE,
    {double: {"FROM_DOUBLE": double, "ROWS": _ROWS, "COLUMNS": _COLUMNS} for double in (False, True)},
    narrow=PAIRS,
)
@triton.jit(do_not_specialize=["items", "stride", "lists", "blocks"])
def list_labels_kernel(
    label_ptr,
    out_ptr,
    above_ptr,
    others_ptr,
    owner_ptr,
    bounds_ptr,
    items,
    stride,
    lists,
    blocks,
    FROM_DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Each label, or less the number of those above it in lists that the output's dtype doesn't hold."""
    program = tl.program_id(0).to(tl.int64)
    batch = program // blocks
    owner_ptr += batch * stride
    i = program % blocks * ROWS + tl.arange(0, ROWS)
    owner_i = tl.load(owner_ptr + i, mask=i < items, other=-1)
    others = tl.load(others_ptr + batch * lists + owner_i, mask=owner_i >= 0, other=0)
    label_i = tl.load(label_ptr + batch * items + i, mask=owner_i >= 0, other=0)
    above = tl.zeros([ROWS], tl.int32)
    start, stop = columns(bounds_ptr, owner_i, items, lists, True)
    for first in range(start, tl.where(tl.max(others) > 0, stop, start), COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        owner_j = tl.load(owner_ptr + j, mask=j < stop, other=-1)
        label_j = tl.load(label_ptr + batch * items + j, mask=owner_j >= 0, other=0)
        higher = (owner_i[:, None] == owner_j[None, :]) & (label_j[None, :] > label_i[:, None])
        above += tl.sum((higher & (owner_j >= 0)[None, :]).to(tl.int32), axis=1)
    held = _double(label_i, FROM_DOUBLE)
    nan = held != held
    out = tl.where((others > 0) & ~nan, -above.to(tl.float64), held)
    tl.store(out_ptr + batch * items + i, out.to(out_ptr.dtype.element_ty), mask=i < items)
    tl.store(above_ptr + batch * items + i, above, mask=i < items)


@triton.jit
def _rounded(label, top, like_ptr, USE: tl.constexpr):
    if USE == _VALUE:
        x = label.to(tl.float64)
    else:
        highest = tl.minimum(top.to(tl.float64), _HIGHEST)
        if USE == _DIFFERENCE:
            highest = highest * 0
        x = highest - (top - label).to(tl.uint64, bitcast=True).to(tl.float64)
    return x.to(like_ptr.dtype.element_ty)


@kernel(
    "*i64 *T *i32 *i32 *i64 *i32 *i64 i32 i32 i32 i32",
    WIDE,
    {
        use: {"USE": int(use), "ROWS": _ROWS, "COLUMNS": _COLUMNS}
        for use in (LabelUse.DIFFERENCE, LabelUse.EXPONENTIAL, LabelUse.VALUE)
    },
    narrow=PAIRS,
)
@triton.jit(do_not_specialize=["items", "stride", "lists", "blocks"])
def list_labels_round_kernel(
    label_ptr,
    out_ptr,
    above_ptr,
    others_ptr,
    top_ptr,
    owner_ptr,
    bounds_ptr,
    items,
    stride,
    lists,
    blocks,
    USE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """In lists that the output's dtype doesn't hold: rounded, and moved down by the least that keeps the order."""
    program = tl.program_id(0).to(tl.int64)
    batch = program // blocks
    owner_ptr += batch * stride
    i = program % blocks * ROWS + tl.arange(0, ROWS)
    owner_i = tl.load(owner_ptr + i, mask=i < items, other=-1)
    others = tl.load(others_ptr + batch * lists + owner_i, mask=owner_i >= 0, other=0)
    label_i = tl.load(label_ptr + batch * items + i, mask=owner_i >= 0, other=0)
    above_i = tl.load(above_ptr + batch * items + i, mask=owner_i >= 0, other=0)
    if out_ptr.dtype.element_ty == tl.float64:
        SIGN: tl.constexpr = 63
        integer: tl.constexpr = tl.int64
    else:
        SIGN: tl.constexpr = 31
        integer: tl.constexpr = tl.int32
    most: tl.constexpr = (1 << SIGN) - 1
    least = tl.full([ROWS], most, integer)
    start, stop = columns(bounds_ptr, owner_i, items, lists, True)
    for first in range(start, tl.where(tl.max(others) > 0, stop, start), COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        owner_j = tl.load(owner_ptr + j, mask=j < stop, other=-1)
        label_j = tl.load(label_ptr + batch * items + j, mask=owner_j >= 0, other=0)
        above_j = tl.load(above_ptr + batch * items + j, mask=owner_j >= 0, other=0)
        top_j = tl.load(top_ptr + batch * lists + owner_j, mask=owner_j >= 0, other=0)
        rounded = _rounded(label_j, top_j, out_ptr, USE)
        bits = _in_order(rounded.to(integer, bitcast=True), SIGN) + above_j.to(integer)
        counts = (owner_i[:, None] == owner_j[None, :]) & (owner_j >= 0)[None, :]
        counts &= label_j[None, :] >= label_i[:, None]
        least = tl.minimum(least, tl.min(tl.where(counts, bits[None, :], most), axis=1))
    bits = _in_order(least - above_i.to(integer), SIGN)
    tl.store(
        out_ptr + batch * items + i,
        bits.to(out_ptr.dtype.element_ty, bitcast=True),
        mask=(i < items) & (others > 0),
    )


def list_valid(lengths: Tensor, n: int) -> Tensor:
    inside = (lengths >= 0) & (lengths <= n)
    torch._assert_async(inside.all(), f"lengths: expected values from 0 to {n}")
    return torch.arange(n, device=lengths.device) < lengths.unsqueeze(-1)


def list_labels(labels: Tensor, valid: Tensor | None, offsets: Tensor | None, wide: bool, use: int) -> Tensor:
    from_double = labels.dtype == torch.float64
    if labels.dtype != torch.int64 and not (from_double and use == LabelUse.ORDER):
        raise RuntimeError("labels: expected int64, or float64 for their order only")
    out = torch.empty(labels.shape, dtype=torch.float64 if wide else torch.float32, device=labels.device)
    labels = labels.contiguous()
    if from_double:
        bits = (labels + 0.0).view(torch.int64)  # -0 as 0
        labels = torch.where(bits < 0, bits ^ (2**63 - 1), bits)
    lists = Lists(labels, valid, offsets)
    owners, stride = lists.owners()
    above = torch.empty_like(labels, dtype=torch.int32)
    others, top = lists.per_list(above), lists.per_list(labels)
    list_labels_test_kernel(
        lists.examples * lists.lists,
        *(labels, out, lists.valid, lists.bounds, others, top, lists.items, lists.lists),
        variant=(lists.masked, from_double),
    )
    blocks = triton.cdiv(lists.items, _ROWS)
    sizes = (lists.items, stride, lists.lists, blocks)
    tensors = (labels, out, above, others)
    list_labels_kernel(lists.examples * blocks, *tensors, owners, lists.bounds, *sizes, variant=from_double)
    if use != LabelUse.ORDER:
        where = (top, owners, lists.bounds)
        list_labels_round_kernel(lists.examples * blocks, *tensors, *where, *sizes, variant=use)
    return out
