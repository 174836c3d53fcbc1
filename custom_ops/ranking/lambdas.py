"""LambdaLoss: pairs weighted by what swapping them would do to a ranking metric."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from custom_ops import _checks
from custom_ops.ranking._inputs import DIFFERENCE, EXPONENTIAL, ORDER, VALUE
from custom_ops.ranking._lists import ListLossModule, list_loss, list_op

WEIGHTINGS = ("ranknet", "lambdarank", "ndcg1", "ndcg2", "ndcg2pp", "label_diff")  # as the kernels number them
_TOPK_MODES = ("or", "and")
_GAINS = ("exponential", "linear")
_NO_LIMIT = 2**31 - 1


@list_op()
def lambda_pairs(
    weighting: int, k: int, both: bool, exponential: bool, sigma: float, mu: float, scale: float, normalize: bool
) -> None:
    """``scale`` times the sum of w log(1 + exp(-sigma (s_i - s_j))) over the pairs of each list in the top k."""


def lambda_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    weighting: str = "lambdarank",
    k: int | None = None,
    topk_mode: str = "or",
    gain: str = "exponential",
    sigma: float = 1.0,
    mu: float = 10.0,
    log_base: float = 2.0,
    normalize: bool = False,
) -> Tensor:
    """The sum of ``w_ij log_base(1 + exp(-sigma (s_i - s_j)))`` over pairs of items of each list.

    The pairs are those with ``y_i > y_j``; for "ndcg1" all i and j, each item with itself too (a constant).

    With r an item's rank by score from 1 (ties by position), ``D(r) = log2(1 + r)``, and G its gain over
    the best DCG@k that an order of the list can have, the weight of a pair is, for ``weighting``

    - "ranknet": 1
    - "lambdarank": ``|G_i - G_j| |1 / D(r_i) - 1 / D(r_j)|``, the change of NDCG if the two were swapped
    - "ndcg1": ``G_i / D(r_i)``
    - "ndcg2": ``|G_i - G_j| |1 / D(a) - 1 / D(a + 1)|`` with ``a = |r_i - r_j|``
    - "ndcg2pp": ``mu`` times that of "ndcg2" plus that of "lambdarank"
    - "label_diff": ``y_i - y_j``

    The weights are constants in the derivatives, of which there are two. Gains are taken relative to that
    of the highest label, so no label is too large; a label below 0 has gain 0. A list without a pair (empty, of
    one item, all masked; but for "ndcg1" all labels tied) or, where the weight has gains in it, without a positive
    gain has loss 0 and doesn't count in the mean; which lists count depends on the labels only, not on the top k.
    Nothing of size n^2 is kept.

    The arguments not described here, errors about them, and the result are those of
    `pairwise_logistic_loss`.

    Args:
        weighting: one of the above.
        k: only pairs in the top k of the current ranking count, and DCG is cut there; None for all.
        topk_mode: in the top k is "or" one of the two (the paper's), "and" both (allRank's).
        gain: "exponential", ``2^y - 1``, or "linear", ``y``; 0 for labels below 0.
        sigma: the steepness, a positive number.
        mu: the share of "ndcg2" in "ndcg2pp".
        log_base: of the loss; more than 1.
        normalize: divide each list's loss by its number of pairs in the top k.

    Raises:
        TypeError: ``k`` no integer; ``sigma``, ``mu`` or ``log_base`` no number; ``normalize`` no bool.
        ValueError: an unknown ``weighting``, ``topk_mode`` or ``gain``; a number out of range.

    O(n log n + n min(k, n)) time on the CPU, O(n) memory.

    Source: Wang et al., "The LambdaLoss Framework for Ranking Metric Optimization", CIKM 2018; Burges,
    "From RankNet to LambdaRank to LambdaMART", 2010.

    Example:
        >>> import torch, custom_ops
        >>> scores = torch.tensor([0.5, 1.5, 0.0], requires_grad=True)
        >>> loss = custom_ops.lambda_loss(scores, torch.tensor([2, 1, 0]))
        >>> loss.backward()
        >>> loss.detach(), scores.grad
        (tensor(0.4992), tensor([-0.2733,  0.1782,  0.0952]))
    """
    _checks.is_one_of("weighting", weighting, WEIGHTINGS)
    k = _checks.as_limit("k", k)
    _checks.is_one_of("topk_mode", topk_mode, _TOPK_MODES)
    _checks.is_one_of("gain", gain, _GAINS)
    sigma = _checks.as_positive("sigma", sigma)
    mu, log_base = _checks.as_float("mu", mu), _checks.as_float("log_base", log_base)
    for name, value, least in (("mu", mu, -math.inf), ("log_base", log_base, 1)):
        if not least < value < math.inf:
            raise ValueError(f"{name}: expected a finite number of more than {least}, got {value}")
    normalize = _checks.as_bool("normalize", normalize)
    params = (
        WEIGHTINGS.index(weighting),
        _NO_LIMIT if k is None else min(k, _NO_LIMIT),
        topk_mode == "and",
        gain == "exponential",
        sigma,
        mu,
        1 / math.log(log_base),
        normalize,
    )
    of_gains = EXPONENTIAL if gain == "exponential" else VALUE
    purpose = {"ranknet": ORDER, "label_diff": DIFFERENCE}.get(weighting, of_gains)
    return list_loss(lambda_pairs, scores, labels, params, mask, lengths, cu_lengths, weights, reduction, purpose)


class LambdaLoss(ListLossModule):
    """`lambda_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.LambdaLoss(k=2)(torch.tensor([0.5, 0.1, 0.9]), torch.tensor([2, 0, 1]))
        tensor(0.4216)
    """

    function = staticmethod(lambda_loss)

    def __init__(
        self,
        reduction: str = "mean",
        weighting: str = "lambdarank",
        k: int | None = None,
        topk_mode: str = "or",
        gain: str = "exponential",
        sigma: float = 1.0,
        mu: float = 10.0,
        log_base: float = 2.0,
        normalize: bool = False,
    ) -> None:
        own: dict[str, Any] = {"weighting": weighting, "k": k, "topk_mode": topk_mode, "gain": gain, "sigma": sigma}
        super().__init__(reduction, **own, mu=mu, log_base=log_base, normalize=normalize)
