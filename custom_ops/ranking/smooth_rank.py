"""Losses of smooth ranks: a ranking metric with each rank replaced by a sum of sigmoids."""

from __future__ import annotations

from torch import Tensor

from custom_ops import _checks
from custom_ops.ranking._inputs import EXPONENTIAL, VALUE
from custom_ops.ranking._lists import ListLossModule, list_loss, list_op

# As numbered in csrc/smooth_rank.cpp and triton_kernels/smooth_rank.py.
_NDCG = {"exponential": 0, "linear": 1}
_MRR, _AVERAGE_PRECISION = 2, 3


@list_op()
def smooth_rank(temperature: float, metric: int) -> None:
    """1 less the metric of each list, at r_i = 1 + the sum over j != i of sigmoid((s_j - s_i) / temperature)."""


def approx_ndcg_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    temperature: float = 0.1,
    gain: str = "exponential",
) -> Tensor:
    """ApproxNDCG: 1 - NDCG at smooth ranks.

    ``1 - sum_i G_i / log2(1 + r_i) / ideal`` with ``r_i = 1 + sum_{j != i} sigmoid((s_j - s_i) / temperature)``,
    gains ``G = 2^y - 1`` or ``y``, and the ideal DCG: the sum of the sorted gains over ``log2(1 + rank)``.
    A label below 0 has no gain.

    Differentiable twice and in forward mode. 16-bit scores are computed in float32.

    Args:
        scores: ``[..., n]``; float16, bfloat16, float32 or float64.
        labels: graded relevance ``[..., n]``, real numbers.
        mask: True where an item is valid; others are not read, and get a zero gradient.
        lengths: ``[...]``: of each list the first so many items are valid.
        cu_lengths: ``[L + 1]``: list l is the items from cu_lengths[l] to cu_lengths[l + 1].
        weights: of each list.
        reduction: "mean" over the lists that contribute, "sum" or "none".
        temperature: of the sigmoids, in units of the scores: the smaller, the closer to NDCG and the
            steeper. 1 is allRank's default, 0.1 TensorFlow Ranking's.
        gain: "exponential" or "linear".

    Returns:
        A scalar, or for "none" one loss for each list; between 0 and 1. A list without a relevant item, or
        whose labels are all equal, doesn't contribute: its loss and gradient are 0.

    Raises:
        TypeError: no tensor, a wrong dtype, ``temperature`` no number.
        ValueError: shapes that don't match, several devices, labels that require a gradient,
            ``temperature`` not positive, an unknown ``gain`` or ``reduction``.

    O(relevant items x n) time and O(n) memory.

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
    return _smooth_rank(scores, labels, temperature, _NDCG[gain], mask, lengths, cu_lengths, weights, reduction)


def approx_mrr_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    temperature: float = 0.1,
) -> Tensor:
    """ApproxMRR: 1 - the mean of the relevant items' reciprocal smooth ranks, weighted with their labels.

    ``1 - sum_i y_i / r_i / sum_i y_i`` over the items with a label above 0, with the ranks of
    `approx_ndcg_loss`; all other arguments, errors and costs are that function's too.

    Source: the loss of TensorFlow Ranking, in the framework of Qin, Liu, Li, Information Retrieval 2010.

    Example:
        >>> import torch, custom_ops
        >>> scores = torch.tensor([0.3, 0.1, 0.2], requires_grad=True)
        >>> loss = custom_ops.approx_mrr_loss(scores, torch.tensor([0, 1, 0]))
        >>> loss.backward()
        >>> loss.detach(), scores.grad
        (tensor(0.6171), tensor([ 0.1539, -0.4421,  0.2882]))
    """
    return _smooth_rank(scores, labels, temperature, _MRR, mask, lengths, cu_lengths, weights, reduction)


def smooth_ap_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    temperature: float = 0.01,
) -> Tensor:
    """Smooth-AP: 1 - average precision at smooth ranks.

    ``1 - mean_i r+_i / r_i`` over the relevant items, those with a label above 0, with the ranks of
    `approx_ndcg_loss` among all items (r) and among the relevant ones (r+); all other arguments, errors
    and costs are that function's too. A list of relevant items only doesn't contribute. The default
    temperature is the paper's, for cosine similarities.

    Source: Brown, Xie, Kalogeiton, Zisserman, "Smooth-AP", ECCV 2020.

    Example:
        >>> import torch, custom_ops
        >>> scores = torch.tensor([0.3, 0.1, 0.2], requires_grad=True)
        >>> loss = custom_ops.smooth_ap_loss(scores, torch.tensor([0, 1, 1]), temperature=0.1)
        >>> loss.backward()
        >>> loss.detach(), scores.grad
        (tensor(0.3514), tensor([ 0.4451, -0.1860, -0.2591]))
    """
    return _smooth_rank(scores, labels, temperature, _AVERAGE_PRECISION, mask, lengths, cu_lengths, weights, reduction)


def _smooth_rank(
    scores: Tensor,
    labels: Tensor,
    temperature: float,
    metric: int,
    mask: Tensor | None,
    lengths: Tensor | None,
    cu_lengths: Tensor | None,
    weights: Tensor | None,
    reduction: str,
) -> Tensor:
    temperature = _checks.as_positive("temperature", temperature)
    params, purpose = (temperature, metric), EXPONENTIAL if metric == _NDCG["exponential"] else VALUE
    return list_loss(smooth_rank, scores, labels, params, mask, lengths, cu_lengths, weights, reduction, purpose)


class ApproxNDCGLoss(ListLossModule):
    """`approx_ndcg_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.ApproxNDCGLoss()(torch.tensor([0.5, 0.1, 0.9]), torch.tensor([2, 0, 1]))
        tensor(0.2069)
    """

    function = staticmethod(approx_ndcg_loss)

    def __init__(self, reduction: str = "mean", temperature: float = 0.1, gain: str = "exponential") -> None:
        super().__init__(reduction, temperature=temperature, gain=gain)


class ApproxMRRLoss(ListLossModule):
    """`approx_mrr_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.ApproxMRRLoss()(torch.tensor([0.5, 0.1, 0.9]), torch.tensor([2, 0, 1]))
        tensor(0.3393)
    """

    function = staticmethod(approx_mrr_loss)

    def __init__(self, reduction: str = "mean", temperature: float = 0.1) -> None:
        super().__init__(reduction, temperature=temperature)


class SmoothAPLoss(ListLossModule):
    """`smooth_ap_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.SmoothAPLoss()(torch.tensor([0.5, 0.1, 0.9]), torch.tensor([0, 1, 1]))
        tensor(0.1667)
    """

    function = staticmethod(smooth_ap_loss)

    def __init__(self, reduction: str = "mean", temperature: float = 0.01) -> None:
        super().__init__(reduction, temperature=temperature)


# ---------------------------------------------------------------- references


# ---------------------------------------------------------------- registry
