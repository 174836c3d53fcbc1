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


def logsigmoid_bpr_loss(positive: Tensor, negative: Tensor) -> Tensor:
    return -torch.nn.functional.logsigmoid(positive - negative).mean()


compiled_bpr_loss = torch.compile(logsigmoid_bpr_loss)


def _pairs_of(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return scores[..., :, None] - scores[..., None, :], labels[..., :, None] > labels[..., None, :]


def pairwise_logistic_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """What one would write with PyTorch's own ops: the matrix of all pairs."""
    difference, pairs = _pairs_of(scores, labels)
    return torch.where(pairs, torch.nn.functional.softplus(-difference), 0).sum((-1, -2)).mean()


def pairwise_hinge_loss(scores: Tensor, labels: Tensor) -> Tensor:
    difference, pairs = _pairs_of(scores, labels)
    return torch.where(pairs, (1 - difference).relu(), 0).sum((-1, -2)).mean()


compiled_pairwise_logistic_loss = torch.compile(pairwise_logistic_loss)
