"""Listwise losses: cross entropies and likelihoods of whole rankings, in O(n) but for one sort."""

from __future__ import annotations

from torch import Tensor

from custom_ops import _checks
from custom_ops.ranking._inputs import DIFFERENCE, EXPONENTIAL, ORDER, VALUE
from custom_ops.ranking._lists import ListLossModule, list_loss, list_op

# As numbered in csrc/listwise.cpp and triton_kernels/listwise.py.
_TIES = {"index": 0, "score": 1, "breslow": 2}
_POSITION_WEIGHTS = {"uniform": 0, "exponential": 1, "discount": 2}
_GAINS = ("exponential", "linear")


# ---------------------------------------------------------------- ops


@list_op()
def list_softmax(softmax_labels: bool) -> None:
    """The sum of p_i (logsumexp(s) - s_i) for each list, p the labels or their softmax."""


@list_op()
def list_mle(ties: int, weighting: int, k: int) -> None:
    """The sum of w_i (logsumexp of s from the i-th item on - s_i), in label order; of k items unless k is 0."""


@list_op()
def unique_softmax(exponential: bool) -> None:
    """The sum of gain_i softplus(logsumexp of s at lower labels - s_i) for each list."""


@list_op()
def cosent(scale: float) -> None:
    """log(1 + sum of e^(scale (s_j - s_i)) over the pairs with y_i > y_j) for each list."""


# ---------------------------------------------------------------- public functions


def list_net_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """ListNet: the cross entropy of the scores' softmax relative to the labels'.

    ``sum_i softmax(y)_i (logsumexp(s) - s_i)``, convex in the scores.

    Differentiable twice and in forward mode. 16-bit scores are computed in float32.

    Args:
        scores: ``[..., n]``; float16, bfloat16, float32 or float64.
        labels: graded relevance ``[..., n]``, real numbers.
        mask: True where an item is valid; others are not read, and get a zero gradient.
        lengths: ``[...]``: of each list the first so many items are valid.
        cu_lengths: ``[L + 1]``: list l is the items from cu_lengths[l] to cu_lengths[l + 1].
        weights: of each list.
        reduction: "mean" over the lists that contribute, "sum" or "none".

    Returns:
        A scalar, or for "none" one loss for each list. A list whose labels are all equal (or that has less
        than two items) doesn't contribute: its loss and gradient are 0.

    Raises:
        TypeError: no tensor, or a wrong dtype.
        ValueError: shapes that don't match, several devices, labels that require a gradient, an
            unknown ``reduction``.

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
    return list_loss(list_softmax, scores, labels, (True,), mask, lengths, cu_lengths, weights, reduction, DIFFERENCE)


def softmax_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Softmax cross entropy with the labels as weights: ``sum_i y_i (logsumexp(s) - s_i)``.

    With one label of 1 and the others 0 it is the negative log-likelihood of that item. Arguments, errors,
    the lists that contribute, and costs are those of `list_net_loss`.

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
    return list_loss(list_softmax, scores, labels, (False,), mask, lengths, cu_lengths, weights, reduction, VALUE)


def list_mle_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    k: int | None = None,
    position_weights: str = "uniform",
    ties: str = "index",
) -> Tensor:
    """ListMLE: the negative log-likelihood of the labels' ranking under the Plackett-Luce model.

    ``sum_i w_i (logsumexp_{j >= i} s_j - s_i)`` over the items in descending order of their labels;
    convex in the scores.

    Arguments but for these, errors, and the lists that contribute are those of `list_net_loss`.

    Args:
        k: the likelihood of the first k places only.
        position_weights: w of place i of n: "uniform" 1, "exponential" (2^(n-i) - 1) / (2^(n-1) - 1),
            which is p-ListMLE's relative to the first place, "discount" 1 / log2(1 + i).
        ties: the order of equal labels: "index" as they come, "score" the higher score first (the ranking
            that is then most likely), "breslow" none: each competes with all the others of its label
            and below, as in Breslow's partial likelihood, and they share their places' weights.

    Raises:
        TypeError: also ``k`` no integer.
        ValueError: also ``k`` not positive, unknown ``position_weights`` or ``ties``.

    O(n) time but for the sort, O(n) memory.

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
    k = _checks.as_limit("k", k)
    _checks.is_one_of("position_weights", position_weights, _POSITION_WEIGHTS)
    _checks.is_one_of("ties", ties, _TIES)
    params = (_TIES[ties], _POSITION_WEIGHTS[position_weights], k or 0)
    return list_loss(list_mle, scores, labels, params, mask, lengths, cu_lengths, weights, reduction, ORDER)


def unique_softmax_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    gain: str = "exponential",
) -> Tensor:
    """Unique softmax: each item against those of lower label, weighted with its gain.

    ``sum_i G_i softplus(logsumexp_{y_j < y_i} s_j - s_i)``, with the gains ``2^y - 1`` or ``y`` relative to the
    list's largest one; convex in the scores. An item whose label isn't above 0 has no gain of its own.

    Arguments but for ``gain`` ("exponential" or "linear"), and errors, are those of `list_net_loss`. A list
    whose labels are all equal, or none above 0, doesn't contribute. O(n) time but for the sort, O(n) memory.

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
    _checks.is_one_of("gain", gain, _GAINS)
    params, purpose = (gain == "exponential",), EXPONENTIAL if gain == "exponential" else VALUE
    return list_loss(unique_softmax, scores, labels, params, mask, lengths, cu_lengths, weights, reduction, purpose)


def cosent_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    scale: float = 20.0,
) -> Tensor:
    """CoSENT: a smooth maximum over all pairs of how far they are misordered.

    ``log(1 + sum_{y_i > y_j} exp(scale (s_j - s_i)))``, convex in the scores, for similarities as scores: the
    batch of pairs of sentences is one list.

    Arguments but for ``scale``, a positive number, errors, and the lists that contribute are those of
    `list_net_loss`. O(n) time but for the sort, O(n) memory.

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
    return list_loss(cosent, scores, labels, (scale,), mask, lengths, cu_lengths, weights, reduction, ORDER)


# ---------------------------------------------------------------- modules


class ListNetLoss(ListLossModule):
    """`list_net_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.ListNetLoss()(torch.tensor([0.5, 0.1, 0.9]), torch.tensor([2, 0, 1]))
        tensor(1.0894)
    """

    function = staticmethod(list_net_loss)

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__(reduction)


class SoftmaxLoss(ListLossModule):
    """`softmax_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.SoftmaxLoss()(torch.tensor([0.5, 0.1, 0.9]), torch.tensor([2, 0, 1]))
        tensor(3.0538)
    """

    function = staticmethod(softmax_loss)

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__(reduction)


class ListMLELoss(ListLossModule):
    """`list_mle_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.ListMLELoss(ties="breslow")(torch.tensor([0.5, 0.1, 0.9]), torch.tensor([2, 0, 1]))
        tensor(1.5224)
    """

    function = staticmethod(list_mle_loss)

    def __init__(
        self, reduction: str = "mean", k: int | None = None, position_weights: str = "uniform", ties: str = "index"
    ) -> None:
        super().__init__(reduction, k=k, position_weights=position_weights, ties=ties)


class UniqueSoftmaxLoss(ListLossModule):
    """`unique_softmax_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.UniqueSoftmaxLoss()(torch.tensor([0.5, 0.1, 0.9]), torch.tensor([2, 0, 1]))
        tensor(1.2750)
    """

    function = staticmethod(unique_softmax_loss)

    def __init__(self, reduction: str = "mean", gain: str = "exponential") -> None:
        super().__init__(reduction, gain=gain)


class CoSENTLoss(ListLossModule):
    """`cosent_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.CoSENTLoss(scale=5.0)(torch.tensor([0.3, 0.1, 0.25]), torch.tensor([0.1, 0.9, 0.5]))
        tensor(1.9628)
    """

    function = staticmethod(cosent_loss)

    def __init__(self, reduction: str = "mean", scale: float = 20.0) -> None:
        super().__init__(reduction, scale=scale)


# ---------------------------------------------------------------- references


# ---------------------------------------------------------------- registry
