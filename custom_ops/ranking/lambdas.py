"""LambdaLoss: pairs weighted by the change of a ranking metric if the two items were swapped."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from custom_ops import _checks
from custom_ops._enums import LabelUse, PairNormalization, PairWeighting, TopPairs
from custom_ops._leaf import leaf
from custom_ops.ranking._arguments import ListLossModule, documented, limit, list_loss
from custom_ops.ranking._gains import GAINS
from custom_ops.ranking._list_loss import list_op

WEIGHTINGS = PairWeighting.options()
_TOPK_MODES = TopPairs.options()
_NORMALIZATIONS = PairNormalization.options()


@list_op(weighted=True)
def lambda_pairs(
    weighting: int,
    k: int,
    top: int,
    exponential: bool,
    sigma: float,
    mu: float,
    scale: float,
    normalize: int,
    by_difference: bool,
) -> None:
    """Return ``scale`` times the sum of w log(1 + exp(-sigma (s_i - s_j))) over each list's pairs in the top k."""


@leaf
@documented
def lambda_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    item_weights: Tensor | None = None,
    reduction: str = "mean",
    weighting: str = "lambdarank",
    k: int | None = None,
    topk_mode: str = "or",
    gain: str = "exponential",
    sigma: float = 1.0,
    mu: float = 10.0,
    log_base: float = 2.0,
    normalize: bool | str = False,
    score_normalize: bool = False,
    empty: float | None = None,
) -> Tensor:
    """Return the sum of ``w_ij log_base(1 + exp(-sigma (s_i - s_j)))`` over pairs of items of each list.

    The pairs are those with ``y_i > y_j``. For "ndcg1" they are all i and j, including each item with itself (a
    constant).

    Let r be an item's rank by score from 1 (ties by position), ``D(r) = log2(1 + r)``, and G the item's gain over the
    best DCG@k of any order of the list. The weight of a pair depends on ``weighting``:

    - "ranknet": 1
    - "lambdarank": ``|G_i - G_j| |1 / D(r_i) - 1 / D(r_j)|``, the change of NDCG if the two were swapped
    - "ndcg1": ``G_i / D(r_i)``
    - "ndcg2": ``|G_i - G_j| |1 / D(a) - 1 / D(a + 1)|`` with ``a = |r_i - r_j|``
    - "ndcg2pp": ``mu`` times the weight of "ndcg2" plus that of "lambdarank"
    - "label_diff": ``y_i - y_j``

    The weights are constants in the derivatives, of which there are two. Gains are relative to the gain of the highest
    label, so no label is too large; a label below 0 has gain 0. A list doesn't contribute if it has no pair (it is
    empty, has one item, is all masked or, except for "ndcg1", all its labels are tied), or if its weights need gains
    and no gain is positive. Whether a list contributes depends on its labels only, not on the top k. Nothing of size
    n^2 is stored.

    The loss takes O(n log n + n min(k, n)) time on the CPU and O(n) memory.

    Args:
        weighting: one of the above.
        k: only pairs in the top k of the current ranking count, and DCG stops there; None for all.
        topk_mode: "or": one item of a pair is in the top k (the paper, LightGBM, XGBoost); "and": both are (allRank);
            "metric": the weight is the change of NDCG@k itself, as in rax and TensorFlow Ranking, where 1 / D is 0 for
            ranks beyond k; the weights of "ndcg2", for which all pairs count, are divided by 1 - 1 / D(r) if r, the
            lower of both ranks, is beyond k (Jagerman et al., "On Optimizing Top-K Metrics for Neural Ranking Models",
            SIGIR 2022).
        gain: "exponential", ``2^y - 1``, or "linear", ``y``; 0 for labels below 0.
        sigma: the steepness, a positive number.
        mu: the factor of "ndcg2" in "ndcg2pp".
        log_base: the base of the loss's logarithm, more than 1.
        normalize: "pairs" or True: divide each list's loss by its number of pairs in the top k. "lambdas": multiply it
            by ``log2(1 + S) / S``, a constant in the derivatives, where S is the sum over the items of the magnitudes
            of their pairs' gradients. LightGBM's ``lambdarank_norm`` is "lambdas" with ``score_normalize``.
        score_normalize: divide the weight of a pair by ``0.01 + |s_i - s_j|``, unless all scores of the list are
            equal. This is a constant in the derivatives.

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
    first = limit(k)
    _checks.is_one_of("topk_mode", topk_mode, _TOPK_MODES)
    _checks.is_one_of("gain", gain, GAINS)
    sigma = _checks.as_positive("sigma", sigma)
    mu, log_base = _checks.as_float("mu", mu), _checks.as_float("log_base", log_base)
    for name, value, least in (("mu", mu, -math.inf), ("log_base", log_base, 1)):
        if not least < value < math.inf:
            raise ValueError(f"{name}: expected a finite number of more than {least}, got {value}")
    if not isinstance(normalize, str):
        normalize = "pairs" if _checks.as_bool("normalize", normalize) else "none"
    _checks.is_one_of("normalize", normalize, _NORMALIZATIONS)
    score_normalize = _checks.as_bool("score_normalize", score_normalize)
    params = (
        WEIGHTINGS[weighting],
        first,
        _TOPK_MODES[topk_mode],
        gain == "exponential",
        sigma,
        mu,
        1 / (math.log(2) * math.log2(log_base)),  # Dynamo knows log2 of a symbolic number, but not log
        _NORMALIZATIONS[normalize],
        score_normalize,
    )
    use = {"ranknet": LabelUse.ORDER, "label_diff": LabelUse.DIFFERENCE}.get(weighting, GAINS[gain])
    given = (scores, labels, mask, lengths, cu_lengths, weights, item_weights, reduction, empty)
    return list_loss(lambda_pairs, params, use, *given)


class LambdaLoss(ListLossModule):
    """Apply `lambda_loss` as a layer.

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
        normalize: bool | str = False,
        score_normalize: bool = False,
        empty: float | None = None,
    ) -> None:
        own: dict[str, Any] = {"weighting": weighting, "k": k, "topk_mode": topk_mode, "gain": gain, "sigma": sigma}
        own |= {"mu": mu, "log_base": log_base, "normalize": normalize, "score_normalize": score_normalize}
        super().__init__(reduction, **own, empty=empty)
