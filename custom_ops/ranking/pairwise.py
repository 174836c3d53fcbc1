"""Pairwise losses: sums of a function of the score difference over the pairs of a list."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops import _checks
from custom_ops._native import define
from custom_ops.ranking._lists import (
    ListLossModule,
    attach,
    empty_loss,
    list_bad_calls,
    list_loss,
    list_samples,
    reference_of,
)
from custom_ops.registry import BadCall, OpInfo, register

__all__ = ["PairwiseMSELoss", "pairwise_mse_loss"]


@define
def pairwise_mse(
    scores: Tensor, labels: Tensor, valid: Tensor | None, offsets: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the squares of (s_i - s_j) - (y_i - y_j) over the ordered pairs of each list."""
    return empty_loss(scores, offsets)


@define
def pairwise_mse_slope(
    scores: Tensor, labels: Tensor, valid: Tensor | None, offsets: Tensor | None, v: Tensor | None, normalize: bool
) -> Tensor:
    return scores.new_empty(scores.shape)


attach(pairwise_mse, pairwise_mse_slope, third_is_zero=True)


def pairwise_mse_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    _checks.is_bool("normalize", normalize)
    return list_loss(pairwise_mse, scores, labels, (normalize,), mask, lengths, cu_lengths, weights, reduction)


class PairwiseMSELoss(ListLossModule):
    """`pairwise_mse_loss` as a layer."""

    function = staticmethod(pairwise_mse_loss)

    def __init__(self, reduction: str = "mean", normalize: bool = False) -> None:
        super().__init__(reduction, normalize=normalize)


def _pairwise_mse_of_one_list(s: Tensor, y: Tensor, normalize: bool = False) -> tuple[Tensor, bool]:
    n = len(s)
    squares = (s - y - (s - y).mean()).square().sum()
    return 2 * n * squares / (n * (n - 1) if normalize and n > 1 else 1), n > 1


register(
    OpInfo(
        name="pairwise_mse_loss",
        summary="Squared error of all score differences of a list, in O(n)",
        function=pairwise_mse_loss,
        reference=reference_of(_pairwise_mse_of_one_list),
        samples=lambda device, dtype: [
            *list_samples(device, dtype, grow_items=True),
            *list_samples(device, dtype, normalize=True)[:1],
        ],
        modules=lambda: [
            (PairwiseMSELoss(), {}),
            (PairwiseMSELoss("sum", True), {"reduction": "sum", "normalize": True}),
        ],
        bad_calls=lambda: [
            *list_bad_calls(),
            BadCall((torch.ones(2), torch.ones(2)), "normalize: expected True or False, got 1", {"normalize": 1}),
        ],
    )
)
