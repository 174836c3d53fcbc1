"""The specs of `custom_ops.ranking.pairwise`: references, samples and wrong calls."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

from custom_ops.ranking._arguments import ListLossModule
from custom_ops.ranking.pairwise import (
    PairwiseExponentialLoss,
    PairwiseHingeLoss,
    PairwiseLogisticLoss,
    PairwiseMSELoss,
    PairwiseSoftZeroOneLoss,
    pairwise_exponential_loss,
    pairwise_hinge_loss,
    pairwise_logistic_loss,
    pairwise_mse_loss,
    pairwise_soft_zero_one_loss,
)
from custom_ops.ranking.specs._lists import list_bad_calls, list_samples, reference_of
from custom_ops.registry import BadCall, OpInfo, register


def reference_of_pairs(phi: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the reference of the sum of ``phi(s_i - s_j, **own)`` over the pairs."""

    def one_list(
        s: Tensor, y: Tensor, normalize: bool = False, w: Tensor | None = None, **own: float
    ) -> tuple[Tensor, Tensor]:
        weights = torch.ones_like(s[:, None] - s) if w is None else w[:, None] * w
        pairs = (y[:, None] > y) & (weights != 0)
        apart = torch.where(pairs, s[:, None] - s, 0)
        values = torch.where(pairs, weights * phi(apart, **own), 0).sum()
        total = torch.where(pairs, weights, 0).sum()
        return values / torch.where(total > 0, total, 1) if normalize else values, pairs.any()

    return reference_of(one_list, weightless_labels=False)


def _pairwise_mse_of_one_list(
    s: Tensor, y: Tensor, normalize: bool = False, w: Tensor | None = None
) -> tuple[Tensor, bool | Tensor]:
    n = len(s)
    if w is not None:
        weights = (w[:, None] * w) * ~torch.eye(n, dtype=torch.bool, device=s.device)
        apart = torch.where(w[:, None] * w != 0, (s[:, None] - s) - (y[:, None] - y), 0)
        values, total = (weights * apart.square()).sum(), weights.sum()
        return values / torch.where(total > 0, total, 1) if normalize else values, total > 0
    above = (s - s[:1]) - (y - y[:1])
    squares = (above - above.mean()).square().sum()
    return 2 * n * squares / (n * (n - 1) if normalize and n > 1 else 1), n > 1


_x, _y = torch.ones(2), torch.ones(2)

_pairwise_mse_reference = reference_of(_pairwise_mse_of_one_list, weightless_labels=False)


def _of_scaled(
    function: Callable[..., Tensor],
    module: type[ListLossModule],
    phi: Callable[..., Tensor],
    summary: str,
    *variants: OpInfo,
) -> OpInfo:
    """Return the entry of a loss of sigma times the difference."""
    return OpInfo(
        name=function.__name__,
        summary=summary,
        function=function,
        reference=reference_of_pairs(lambda d, sigma=1.0: phi(sigma * d)),
        samples=lambda device, dtype: [
            *list_samples(device, dtype),
            *list_samples(device, dtype, sigma=1.5, normalize=True)[:1],
        ],
        modules=lambda: [
            (module(), {}),
            (module("sum", sigma=2.0, normalize=True), {"reduction": "sum", "sigma": 2.0, "normalize": True}),
        ],
        bad_calls=lambda: [
            *list_bad_calls(),
            BadCall((_x, _y), "sigma: expected a number, got str", {"sigma": "1"}),
            BadCall((_x, _y), "sigma: expected a positive number, got 0", {"sigma": 0}),
            BadCall((_x, _y), "sigma: expected a positive number, got inf", {"sigma": math.inf}),
            BadCall((_x, _y), "normalize: expected True or False, got 1", {"normalize": 1}),
        ],
        variants=variants,
    )


_soft_zero_one = _of_scaled(
    pairwise_soft_zero_one_loss,
    PairwiseSoftZeroOneLoss,
    lambda d: (-d).sigmoid(),
    "Smooth count of the misordered pairs of a list",
)

_exponential = _of_scaled(
    pairwise_exponential_loss,
    PairwiseExponentialLoss,
    lambda d: (-d).exp(),
    "RankBoost's exponential loss of every pair of a list",
)

register(
    _of_scaled(
        pairwise_logistic_loss,
        PairwiseLogisticLoss,
        lambda d: softplus(-d, threshold=60),
        "RankNet's logistic loss of every pair of a list",
        _soft_zero_one,
        _exponential,
    )
)

register(
    OpInfo(
        name="pairwise_hinge_loss",
        summary="Hinge loss of every pair of a list, or its square, in O(n log n)",
        function=pairwise_hinge_loss,
        reference=reference_of_pairs(
            lambda d, margin=1.0, squared=False: (margin - d).relu().square() if squared else (margin - d).relu()
        ),
        samples=lambda device, dtype: [
            *list_samples(device, dtype),
            *list_samples(device, dtype, margin=0.5, squared=True, normalize=True)[:2],
        ],
        modules=lambda: [
            (PairwiseHingeLoss(), {}),
            (
                PairwiseHingeLoss("sum", 0.5, True, True),
                {"reduction": "sum", "margin": 0.5, "squared": True, "normalize": True},
            ),
        ],
        bad_calls=lambda: [
            *list_bad_calls(),
            BadCall((_x, _y), "margin: expected a number, got str", {"margin": "1"}),
            BadCall((_x, _y), "squared: expected True or False, got 1", {"squared": 1}),
            BadCall((_x, _y), "normalize: expected True or False, got 1", {"normalize": 1}),
        ],
    )
)

register(
    OpInfo(
        name="pairwise_mse_loss",
        summary="Squared error of all score differences of a list, in O(n)",
        function=pairwise_mse_loss,
        reference=_pairwise_mse_reference,
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
            BadCall((_x, _y), "normalize: expected True or False, got 1", {"normalize": 1}),
        ],
    )
)
