"""Losses of smooth ranks: a ranking metric in which a sum of sigmoids replaces each rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops import _checks
from custom_ops._enums import LabelUse, SmoothMetric
from custom_ops._leaf import leaf
from custom_ops.ranking._arguments import ListLossModule, documented, list_loss
from custom_ops.ranking._list_loss import list_op

_NDCG = {"exponential": SmoothMetric.NDCG.value, "linear": SmoothMetric.NDCG_LINEAR.value}


@list_op()
def smooth_rank(temperature: float, metric: int) -> None:
    """Return 1 - the metric of each list at r_i = 1 + the sum over j != i of sigmoid((s_j - s_i) / temperature)."""


@leaf
@documented
def approx_ndcg_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    item_weights: Tensor | None = None,
    reduction: str = "mean",
    temperature: float = 0.1,
    gain: str = "exponential",
    empty: float | None = None,
) -> Tensor:
    """Return ApproxNDCG's loss: 1 - NDCG at smooth ranks.

    It is ``1 - sum_i G_i / log2(1 + r_i) / ideal`` with ``r_i = 1 + sum_{j != i} sigmoid((s_j - s_i) / temperature)``,
    gains ``G = 2^y - 1`` or ``y``, and the ideal DCG, which is the sum of the sorted gains over ``log2(1 + rank)``. A
    label below 0 has no gain. The loss is between 0 and 1. A list without a relevant item, or whose labels are all
    equal, doesn't contribute. The loss is differentiable twice and in forward mode, and takes O(relevant items x n)
    time and O(n) memory.

    Args:
        temperature: the temperature of the sigmoids, in units of the scores. A smaller one is closer to NDCG and
            steeper. 1 is allRank's default, 0.1 TensorFlow Ranking's.
        gain: "exponential" or "linear".

    Source: Qin, Liu, Li, "A general approximation framework for direct optimization of information
    retrieval measures", Information Retrieval 2010.

    Example:
        >>> import torch, custom_ops
        >>> scores = torch.tensor([0.3, 0.1, 0.2], requires_grad=True)
        >>> loss = custom_ops.approx_ndcg_loss(scores, torch.tensor([0, 2, 1]))
        >>> loss.backward()
        >>> loss.detach(), scores.grad
        (tensor(0.3803), tensor([ 0.2046, -0.1863, -0.0183]))
    """
    _checks.is_one_of("gain", gain, _NDCG)
    given = (scores, labels, mask, lengths, cu_lengths, weights, item_weights, reduction, empty)
    return _smooth_rank(_NDCG[gain], temperature, *given)


@leaf
@documented
def approx_mrr_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    item_weights: Tensor | None = None,
    reduction: str = "mean",
    temperature: float = 0.1,
    empty: float | None = None,
) -> Tensor:
    """Return ApproxMRR's loss: 1 - the mean of the relevant items' reciprocal smooth ranks, weighted by their labels.

    It is ``1 - sum_i y_i / r_i / sum_i y_i`` over the items with a label above 0, with the ranks of `approx_ndcg_loss`;
    the cost and the lists that contribute are also those of that function.

    Args:
        temperature: the temperature of the sigmoids, in units of the scores.

    Source: the loss of TensorFlow Ranking, in the framework of Qin, Liu, Li, Information Retrieval 2010.

    Example:
        >>> import torch, custom_ops
        >>> scores = torch.tensor([0.3, 0.1, 0.2], requires_grad=True)
        >>> loss = custom_ops.approx_mrr_loss(scores, torch.tensor([0, 1, 0]))
        >>> loss.backward()
        >>> loss.detach(), scores.grad
        (tensor(0.6171), tensor([ 0.1539, -0.4421,  0.2882]))
    """
    given = (scores, labels, mask, lengths, cu_lengths, weights, item_weights, reduction, empty)
    return _smooth_rank(SmoothMetric.MRR.value, temperature, *given)


@leaf
@documented
def smooth_ap_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    item_weights: Tensor | None = None,
    reduction: str = "mean",
    temperature: float = 0.01,
    empty: float | None = None,
) -> Tensor:
    """Return Smooth-AP's loss: 1 - average precision at smooth ranks.

    It is ``1 - mean_i r+_i / r_i`` over the relevant items, those with a label above 0. r and r+ are the ranks of
    `approx_ndcg_loss` among all items and among the relevant ones; the cost is that of that function. A list without a
    relevant item, or of relevant items only, doesn't contribute.

    Args:
        temperature: the temperature of the sigmoids, in units of the scores. The default is the paper's, for cosine
            similarities.

    Source: Brown, Xie, Kalogeiton, Zisserman, "Smooth-AP", ECCV 2020.

    Example:
        >>> import torch, custom_ops
        >>> scores = torch.tensor([0.3, 0.1, 0.2], requires_grad=True)
        >>> loss = custom_ops.smooth_ap_loss(scores, torch.tensor([0, 1, 1]), temperature=0.1)
        >>> loss.backward()
        >>> loss.detach(), scores.grad
        (tensor(0.3514), tensor([ 0.4451, -0.1860, -0.2591]))
    """
    given = (scores, labels, mask, lengths, cu_lengths, weights, item_weights, reduction, empty)
    return _smooth_rank(SmoothMetric.AVERAGE_PRECISION.value, temperature, *given)


def _smooth_rank(metric: int, temperature: float, scores: Tensor, labels: Tensor, *given: Any) -> Tensor:
    use = LabelUse.EXPONENTIAL if metric == SmoothMetric.NDCG else LabelUse.VALUE
    if metric == SmoothMetric.AVERAGE_PRECISION:  # every relevant item has the gain 1
        _checks.is_tensor("labels", labels)
        if not labels.is_complex():
            labels = labels if labels.dtype in (torch.int64, torch.float64) else labels.float()
            labels = torch.where(labels.isnan(), labels, labels.sign())  # the sign of NaN is 0
    params = _checks.as_positive("temperature", temperature), metric
    return list_loss(smooth_rank, params, use, scores, labels, *given)


class ApproxNDCGLoss(ListLossModule):
    """Apply `approx_ndcg_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.ApproxNDCGLoss()(torch.tensor([0.5, 0.1, 0.9]), torch.tensor([2, 0, 1]))
        tensor(0.2069)
    """

    function = staticmethod(approx_ndcg_loss)

    def __init__(
        self, reduction: str = "mean", temperature: float = 0.1, gain: str = "exponential", empty: float | None = None
    ) -> None:
        super().__init__(reduction, temperature=temperature, gain=gain, empty=empty)


class ApproxMRRLoss(ListLossModule):
    """Apply `approx_mrr_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.ApproxMRRLoss()(torch.tensor([0.5, 0.1, 0.9]), torch.tensor([2, 0, 1]))
        tensor(0.3393)
    """

    function = staticmethod(approx_mrr_loss)

    def __init__(self, reduction: str = "mean", temperature: float = 0.1, empty: float | None = None) -> None:
        super().__init__(reduction, temperature=temperature, empty=empty)


class SmoothAPLoss(ListLossModule):
    """Apply `smooth_ap_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.SmoothAPLoss()(torch.tensor([0.5, 0.1, 0.9]), torch.tensor([0, 1, 1]))
        tensor(0.1667)
    """

    function = staticmethod(smooth_ap_loss)

    def __init__(self, reduction: str = "mean", temperature: float = 0.01, empty: float | None = None) -> None:
        super().__init__(reduction, temperature=temperature, empty=empty)


# ---------------------------------------------------------------- references


# ---------------------------------------------------------------- registry
