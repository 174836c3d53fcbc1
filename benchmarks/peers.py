"""Peers that no installable package provides, written from their published formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class CumulativeVoxelsSumming(torch.autograd.Function):
    """The cumulative-sum trick of Lift-Splat-Shoot and FIERY: differences of a running sum over all points."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, geometry: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
        last = torch.ones(len(ranks), dtype=torch.bool, device=x.device)
        last[:-1] = ranks[1:] != ranks[:-1]
        totals, geometry = x.cumsum(0)[last], geometry[last]
        ctx.save_for_backward(last)
        ctx.mark_non_differentiable(geometry)
        return torch.cat([totals[:1], totals[1:] - totals[:-1]]), geometry

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (last,) = ctx.saved_tensors
        voxel = last.cumsum(0)
        voxel[last] -= 1
        return grad[voxel], None, None


def cumulative_voxels_summing(x: Tensor, geometry: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    return CumulativeVoxelsSumming.apply(x, geometry, ranks)


def index_add_voxels_summing(x: Tensor, geometry: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """What one would write with PyTorch's own ops: number the runs, then scatter."""
    _, voxel, counts = torch.unique_consecutive(ranks, return_inverse=True, return_counts=True)
    return x.new_zeros(len(counts), x.shape[1]).index_add(0, voxel, x), geometry[counts.cumsum(0) - 1]


class SigmoidSurrogate(torch.autograd.Function):
    """A spike with the slope of a sigmoid, as libraries for spiking networks write it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x >= 0).to(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        s = ctx.saved_tensors[0].sigmoid()
        return grad * (1 - s) * s


def surrogate_gradient_function(x: Tensor) -> Tensor:
    return SigmoidSurrogate.apply(x)


def logsigmoid_bpr_loss(positive: Tensor, negative: Tensor) -> Tensor:
    return -torch.nn.functional.logsigmoid(positive - negative).mean()


compiled_bpr_loss = torch.compile(logsigmoid_bpr_loss)
