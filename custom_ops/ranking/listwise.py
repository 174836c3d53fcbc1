"""Listwise losses: cross entropies and likelihoods of whole rankings, in O(n) time plus one sort."""

from __future__ import annotations

from torch import Tensor

from custom_ops import _checks
from custom_ops._enums import LabelUse, PositionWeights, Ties
from custom_ops._leaf import leaf
from custom_ops.ranking._arguments import ListLossModule, documented, limit, list_loss
from custom_ops.ranking._gains import GAINS
from custom_ops.ranking._list_loss import list_op

_TIES, _POSITION_WEIGHTS = Ties.options(), PositionWeights.options()


# ---------------------------------------------------------------- ops


@list_op()
def list_softmax(softmax_labels: bool) -> None:
    """Return the sum of p_i (logsumexp(s) - s_i) for each list, where p is the labels or their softmax."""


@list_op(weighted=True)
def list_mle(ties: int, weighting: int, k: int) -> None:
    """Return the sum of w_i (logsumexp_{j >= i} s_j - s_i) over the first k items in label order."""


@list_op(weighted=True)
def unique_softmax(exponential: bool) -> None:
    """Return the sum of gain_i softplus(logsumexp of s at lower labels - s_i) for each list."""


@list_op(weighted=True)
def cosent(scale: float) -> None:
    """Return log(1 + sum of e^(scale (s_j - s_i)) over the pairs with y_i > y_j) for each list."""


# ---------------------------------------------------------------- public functions


@leaf
@documented
def list_net_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    item_weights: Tensor | None = None,
    reduction: str = "mean",
    empty: float | None = None,
) -> Tensor:
    """Return ListNet's loss: the cross entropy of the scores' softmax relative to the labels'.

    It is ``sum_i softmax(y)_i (logsumexp(s) - s_i)``, which is convex in the scores. A list whose labels are all equal,
    or with fewer than two items, doesn't contribute. The loss is differentiable twice and in forward mode, and takes
    O(n) time and memory.

    Source: Cao, Qin, Liu, Tsai, Li, "Learning to rank: from pairwise approach to listwise approach", ICML 2007.

    Example:
        >>> import torch, custom_ops
        >>> scores = torch.tensor([1.0, 0.0, 0.0], requires_grad=True)
        >>> loss = custom_ops.list_net_loss(scores, torch.tensor([0, 2, 1]))
        >>> loss.backward()
        >>> loss.detach(), scores.grad
        (tensor(1.4614), tensor([ 0.4861, -0.4533, -0.0328]))
    """
    given = (scores, labels, mask, lengths, cu_lengths, weights, item_weights, reduction, empty)
    return list_loss(list_softmax, (True,), LabelUse.DIFFERENCE, *given)


@leaf
@documented
def softmax_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    item_weights: Tensor | None = None,
    reduction: str = "mean",
    empty: float | None = None,
) -> Tensor:
    """Return the softmax cross entropy with the labels as weights: ``sum_i y_i (logsumexp(s) - s_i)``.

    With one label of 1 and the others 0 it is the negative log-likelihood of that item. The costs and the lists that
    contribute are those of `list_net_loss`.

    Source: Bruch, Wang, Bendersky, Najork, "An analysis of the softmax cross entropy loss for
    learning-to-rank with binary relevance", ICTIR 2019.

    Example:
        >>> import torch, custom_ops
        >>> scores = torch.tensor([1.0, 0.0, 0.0], requires_grad=True)
        >>> loss = custom_ops.softmax_loss(scores, torch.tensor([0, 1, 0]))
        >>> loss.backward()
        >>> loss.detach(), scores.grad
        (tensor(1.5514), tensor([ 0.5761, -0.7881,  0.2119]))
    """
    given = (scores, labels, mask, lengths, cu_lengths, weights, item_weights, reduction, empty)
    return list_loss(list_softmax, (False,), LabelUse.VALUE, *given)


@leaf
@documented
def list_mle_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    item_weights: Tensor | None = None,
    reduction: str = "mean",
    k: int | None = None,
    position_weights: str = "uniform",
    ties: str = "index",
    empty: float | None = None,
) -> Tensor:
    """Return ListMLE's loss: the negative log-likelihood of the labels' ranking under the Plackett-Luce model.

    It is ``sum_i w_i (logsumexp_{j >= i} s_j - s_i)`` over the items in descending order of their labels, which is
    convex in the scores. The lists that contribute are those of `list_net_loss`. The loss takes O(n) time plus the
    sort, and O(n) memory.

    Args:
        k: only the likelihood of the first k places counts; None for all.
        position_weights: the weight w of place i of n: "uniform" 1, "exponential" (2^(n-i) - 1) / (2^(n-1) - 1),
            which is p-ListMLE's relative to the first place, or "discount" 1 / log2(1 + i).
        ties: the order of equal labels: "index" by position, "score" by descending score (the ranking
            that is then most likely), or "breslow" none: each competes with all others of its label
            and below, as in Breslow's partial likelihood, and they share their places' weights.

    Source: Xia, Liu, Wang, Zhang, Li, "Listwise approach to learning to rank", ICML 2008; Lan, Zhu, Guo,
    Niu, Cheng, "Position-aware ListMLE", UAI 2014.

    Example:
        >>> import torch, custom_ops
        >>> scores = torch.tensor([50.0, 0.0, 1.0], requires_grad=True)
        >>> loss = custom_ops.list_mle_loss(scores, torch.tensor([2, 1, 0]))
        >>> loss.backward()
        >>> loss.detach(), scores.grad
        (tensor(1.3133), tensor([-7.1716e-22, -7.3106e-01,  7.3106e-01]))
    """
    first = limit(k)
    _checks.is_one_of("position_weights", position_weights, _POSITION_WEIGHTS)
    _checks.is_one_of("ties", ties, _TIES)
    given = (scores, labels, mask, lengths, cu_lengths, weights, item_weights, reduction, empty)
    return list_loss(list_mle, (_TIES[ties], _POSITION_WEIGHTS[position_weights], first), LabelUse.ORDER, *given)


@leaf
@documented
def unique_softmax_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    item_weights: Tensor | None = None,
    reduction: str = "mean",
    gain: str = "exponential",
    empty: float | None = None,
) -> Tensor:
    """Return the unique softmax loss: each item competes with those of lower label, weighted by its gain.

    It is ``sum_i G_i softplus(logsumexp_{y_j < y_i} s_j - s_i)`` with the gains ``2^y - 1`` or ``y`` relative to the
    largest gain of the list, and it is convex in the scores. An item whose label isn't above 0 has no gain. A list
    whose labels are all equal, or none of them above 0, doesn't contribute. The loss takes O(n) time plus the sort, and
    O(n) memory.

    Args:
        gain: "exponential" or "linear".

    Source: Zhu & Klabjan, "Listwise learning to rank by exploring unique ratings", WSDM 2020. TensorFlow
    Ranking's loss is this one times the largest gain.

    Example:
        >>> import torch, custom_ops
        >>> scores = torch.tensor([1.0, 0.0, 0.0], requires_grad=True)
        >>> loss = custom_ops.unique_softmax_loss(scores, torch.tensor([0, 2, 1]))
        >>> loss.backward()
        >>> loss.detach(), scores.grad
        (tensor(1.9892), tensor([ 0.8198, -0.7881, -0.0317]))
    """
    _checks.is_one_of("gain", gain, GAINS)
    given = (scores, labels, mask, lengths, cu_lengths, weights, item_weights, reduction, empty)
    return list_loss(unique_softmax, (gain == "exponential",), GAINS[gain], *given)


@leaf
@documented
def cosent_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    item_weights: Tensor | None = None,
    reduction: str = "mean",
    scale: float = 20.0,
    empty: float | None = None,
) -> Tensor:
    """Return CoSENT's loss: a smooth maximum, over all pairs, of how far each is misordered.

    It is ``log(1 + sum_{y_i > y_j} exp(scale (s_j - s_i)))``, which is convex in the scores. The scores are
    similarities, and the batch of pairs of sentences is one list. The lists that contribute are those of
    `list_net_loss`. The loss takes O(n) time plus the sort, and O(n) memory.

    Args:
        scale: the sharpness of the maximum, a positive number.

    Source: Su, "CoSENT", 2022; the CoSENTLoss of Sentence Transformers.

    Example:
        >>> import torch, custom_ops
        >>> scores = torch.tensor([0.3, 0.1, 0.25], requires_grad=True)
        >>> loss = custom_ops.cosent_loss(scores, torch.tensor([0.1, 0.9, 0.5]), scale=5.0)
        >>> loss.backward()
        >>> loss.detach(), scores.grad
        (tensor(1.9628), tensor([ 2.8109, -3.3959,  0.5850]))
    """
    scale = _checks.as_positive("scale", scale)
    given = (scores, labels, mask, lengths, cu_lengths, weights, item_weights, reduction, empty)
    return list_loss(cosent, (scale,), LabelUse.ORDER, *given, of_pairs=True)


# ---------------------------------------------------------------- modules


class ListNetLoss(ListLossModule):
    """Apply `list_net_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.ListNetLoss()(torch.tensor([0.5, 0.1, 0.9]), torch.tensor([2, 0, 1]))
        tensor(1.0894)
    """

    function = staticmethod(list_net_loss)

    def __init__(self, reduction: str = "mean", empty: float | None = None) -> None:
        super().__init__(reduction, empty=empty)


class SoftmaxLoss(ListLossModule):
    """Apply `softmax_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.SoftmaxLoss()(torch.tensor([0.5, 0.1, 0.9]), torch.tensor([2, 0, 1]))
        tensor(3.0538)
    """

    function = staticmethod(softmax_loss)

    def __init__(self, reduction: str = "mean", empty: float | None = None) -> None:
        super().__init__(reduction, empty=empty)


class ListMLELoss(ListLossModule):
    """Apply `list_mle_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.ListMLELoss(ties="breslow")(torch.tensor([0.5, 0.1, 0.9]), torch.tensor([2, 0, 1]))
        tensor(1.5224)
    """

    function = staticmethod(list_mle_loss)

    def __init__(
        self,
        reduction: str = "mean",
        k: int | None = None,
        position_weights: str = "uniform",
        ties: str = "index",
        empty: float | None = None,
    ) -> None:
        super().__init__(reduction, k=k, position_weights=position_weights, ties=ties, empty=empty)


class UniqueSoftmaxLoss(ListLossModule):
    """Apply `unique_softmax_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.UniqueSoftmaxLoss()(torch.tensor([0.5, 0.1, 0.9]), torch.tensor([2, 0, 1]))
        tensor(1.2750)
    """

    function = staticmethod(unique_softmax_loss)

    def __init__(self, reduction: str = "mean", gain: str = "exponential", empty: float | None = None) -> None:
        super().__init__(reduction, gain=gain, empty=empty)


class CoSENTLoss(ListLossModule):
    """Apply `cosent_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.CoSENTLoss(scale=5.0)(torch.tensor([0.3, 0.1, 0.25]), torch.tensor([0.1, 0.9, 0.5]))
        tensor(1.9628)
    """

    function = staticmethod(cosent_loss)

    def __init__(self, reduction: str = "mean", scale: float = 20.0, empty: float | None = None) -> None:
        super().__init__(reduction, scale=scale, empty=empty)


# ---------------------------------------------------------------- references


# ---------------------------------------------------------------- registry
