"""Peers that need a GPU: BEVFusion's interval kernel, rewritten in Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from benchmarks.peers import _bags, _outer

if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
    raise ImportError("it needs a CUDA device")


@triton.jit
def _sum_kernel(x_ptr, starts_ptr, lengths_ptr, rows_ptr, out_ptr, channels, BLOCK: tl.constexpr):
    interval, at = tl.program_id(0), tl.arange(0, BLOCK)
    start, length, row = (tl.load(p + interval) for p in (starts_ptr, lengths_ptr, rows_ptr))
    total = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
    for i in range(length):
        total += tl.load(x_ptr + (start + i) * channels + at, mask=at < channels, other=0)
    tl.store(out_ptr + row * channels + at, total, mask=at < channels)


@triton.jit
def _spread_kernel(grad_ptr, starts_ptr, lengths_ptr, rows_ptr, out_ptr, channels, BLOCK: tl.constexpr):
    interval, at = tl.program_id(0), tl.arange(0, BLOCK)
    start, length, row = (tl.load(p + interval) for p in (starts_ptr, lengths_ptr, rows_ptr))
    grad = tl.load(grad_ptr + row * channels + at, mask=at < channels, other=0)
    for i in range(length):
        tl.store(out_ptr + (start + i) * channels + at, grad, mask=at < channels)


class IntervalSum(torch.autograd.Function):
    """The sum over each interval of sorted rows; one program walks through the rows of one interval."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, starts: Tensor, lengths: Tensor, rows: Tensor, voxels: int) -> Tensor:
        ctx.save_for_backward(starts, lengths, rows)
        ctx.shape = x.shape
        out, channels = x.new_zeros(voxels, x.shape[1]), x.shape[1]
        block = triton.next_power_of_2(channels)
        _sum_kernel[(len(rows),)](x.contiguous(), starts, lengths, rows, out, channels, BLOCK=block)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        out, channels = grad.new_empty(ctx.shape), grad.shape[1]
        block = triton.next_power_of_2(channels)
        starts, lengths, rows = ctx.saved_tensors
        _spread_kernel[(len(rows),)](grad.contiguous(), starts, lengths, rows, out, channels, BLOCK=block)
        return out, None, None, None, None


_kept: Any = WeakTensorKeyDictionary()  # {ranks: {(batch, num_voxels): intervals}}


def _intervals(rank: Tensor, batch: int, num_voxels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    points, offsets = _bags(rank, batch, num_voxels)
    lengths = offsets.diff()
    rows = lengths.nonzero()[:, 0]
    return points, offsets[rows], lengths[rows], rows


def _sums(x: Tensor, rank: Tensor, flat: Tensor, num_voxels: int) -> Tensor:
    """Sum each voxel's points. As in BEVFusion, the intervals are kept per ``rank``, and each call sorts the points."""
    batch, kept = x.shape[:-2].numel(), _kept.setdefault(rank, {})
    if (batch, num_voxels) not in kept:
        kept[batch, num_voxels] = _intervals(flat, batch, num_voxels)
    points, *intervals = kept[batch, num_voxels]
    sums = IntervalSum.apply(x.flatten(0, -2)[points], *intervals, batch * num_voxels)
    return sums.view(*x.shape[:-2], num_voxels, -1)


def interval_voxel_sum(x: Tensor, rank: Tensor, num_voxels: int) -> Tensor:
    return _sums(x, rank, rank, num_voxels)


def interval_bev_pool(depth: Tensor, feat: Tensor, rank: Tensor, num_voxels: int, *_: Any) -> Tensor:
    return _sums(_outer(depth, feat), rank, rank.flatten(-4), num_voxels)
