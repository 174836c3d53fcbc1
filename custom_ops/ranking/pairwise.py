"""Pairwise losses: sums of a function of the score difference over the pairs of a list.

A pair is two items i and j of one list with labels y_i > y_j. To add a function ``phi`` of their scores' difference,
define its value, slope and curvature in csrc/pairwise.cpp and triton_kernels/pairwise.py, and a public function here.
"""

from __future__ import annotations

from torch import Tensor

from custom_ops import _checks
from custom_ops._enums import LabelUse, PairFunction
from custom_ops._leaf import leaf
from custom_ops.ranking._arguments import ListLossModule, documented, list_loss
from custom_ops.ranking._list_loss import list_op


@list_op(weighted=True)
def pairwise(phi: int, sigma: float, normalize: bool) -> None:
    """Return the sum of phi(sigma (s_i - s_j)) over the pairs of each list, or its mean if ``normalize``."""


@list_op(third_is_zero=True, weighted=True)
def pairwise_hinge(margin: float, squared: bool, normalize: bool) -> None:
    """Return the sum of max(0, margin - (s_i - s_j)), or of its square, over the pairs of each list."""


@list_op(third_is_zero=True, weighted=True)
def pairwise_mse(normalize: bool) -> None:
    """Return the sum of the squares of (s_i - s_j) - (y_i - y_j) over the ordered pairs of each list."""


@leaf
@documented
def pairwise_logistic_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    item_weights: Tensor | None = None,
    reduction: str = "mean",
    sigma: float = 1.0,
    normalize: bool = False,
    empty: float | None = None,
) -> Tensor:
    """Return RankNet's loss: the sum of ``log(1 + exp(-sigma (s_i - s_j)))`` over each list's pairs with ``y_i > y_j``.

    Nothing of size n^2 is stored, and a pair has a gradient however far it is misordered. The loss is differentiable
    twice. A list without a pair (it is empty, has one item, is all masked, or all its labels are tied) doesn't
    contribute.

    The loss takes O(n^2) time, without an exponential per pair, and O(n) memory.

    Args:
        sigma: the steepness, a positive number.
        normalize: divide each list's loss by its number of pairs.

    Source: Burges et al., "Learning to Rank using Gradient Descent", ICML 2005.

    Example:
        >>> import torch, custom_ops
        >>> scores = torch.tensor([0.5, 1.5, 0.0], requires_grad=True)
        >>> loss = custom_ops.pairwise_logistic_loss(scores, torch.tensor([2, 1, 0]))
        >>> loss.backward()
        >>> loss.detach(), scores.grad
        (tensor(1.9888), tensor([-1.1086,  0.5486,  0.5600]))
    """
    sigma = _checks.as_positive("sigma", sigma)
    normalize = _checks.as_bool("normalize", normalize)
    given = (scores, labels, mask, lengths, cu_lengths, weights, item_weights, reduction, empty)
    return list_loss(pairwise, (PairFunction.LOGISTIC.value, sigma, normalize), LabelUse.ORDER, *given, of_pairs=True)


@leaf
@documented
def pairwise_soft_zero_one_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    item_weights: Tensor | None = None,
    reduction: str = "mean",
    sigma: float = 1.0,
    normalize: bool = False,
    empty: float | None = None,
) -> Tensor:
    """Return the sum of ``1 / (1 + exp(sigma (s_i - s_j)))`` over the pairs with ``y_i > y_j`` of each list.

    It is a smooth count of the misordered pairs: bounded, hence robust to wrong labels, and not convex. The cost and
    the lists that contribute are those of `pairwise_logistic_loss`.

    Args:
        sigma: the steepness, a positive number.
        normalize: divide each list's loss by its number of pairs.

    Source: TensorFlow Ranking's PairwiseSoftZeroOneLoss.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.pairwise_soft_zero_one_loss(torch.tensor([0.5, 1.5, 0.0]), torch.tensor([2, 1, 0]))
        tensor(1.2910)
    """
    sigma = _checks.as_positive("sigma", sigma)
    normalize = _checks.as_bool("normalize", normalize)
    given = (scores, labels, mask, lengths, cu_lengths, weights, item_weights, reduction, empty)
    return list_loss(
        pairwise, (PairFunction.SOFT_ZERO_ONE.value, sigma, normalize), LabelUse.ORDER, *given, of_pairs=True
    )


@leaf
@documented
def pairwise_exponential_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    item_weights: Tensor | None = None,
    reduction: str = "mean",
    sigma: float = 1.0,
    normalize: bool = False,
    empty: float | None = None,
) -> Tensor:
    """Return RankBoost's loss: the sum of ``exp(-sigma (s_i - s_j))`` over each list's pairs with ``y_i > y_j``.

    It overflows to inf if a pair is misordered by more than the dtype's exponential can hold. The cost and the lists
    that contribute are those of `pairwise_logistic_loss`.

    Args:
        sigma: the steepness, a positive number.
        normalize: divide each list's loss by its number of pairs.

    Source: Freund et al., "An Efficient Boosting Algorithm for Combining Preferences", JMLR 2003.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.pairwise_exponential_loss(torch.tensor([0.5, 1.5, 0.0]), torch.tensor([2, 1, 0]))
        tensor(3.5479)
    """
    sigma = _checks.as_positive("sigma", sigma)
    normalize = _checks.as_bool("normalize", normalize)
    given = (scores, labels, mask, lengths, cu_lengths, weights, item_weights, reduction, empty)
    return list_loss(
        pairwise, (PairFunction.EXPONENTIAL.value, sigma, normalize), LabelUse.ORDER, *given, of_pairs=True
    )


@leaf
@documented
def pairwise_hinge_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    item_weights: Tensor | None = None,
    reduction: str = "mean",
    margin: float = 1.0,
    squared: bool = False,
    normalize: bool = False,
    empty: float | None = None,
) -> Tensor:
    """Return the sum of ``max(0, margin - (s_i - s_j))`` over the pairs with ``y_i > y_j`` of each list.

    With ``squared`` the terms are squared. The loss takes O(n log n) time on the CPU, where the pairs are counted
    rather than visited. At the kink the gradient is 0. The loss is twice differentiable almost everywhere: the Hessian
    is 0 or, with ``squared``, the matrix of the pairs within the margin. A NaN among a list's scores makes its loss and
    gradient NaN.

    Args:
        margin: the wanted lead of the better item, in units of the scores.
        squared: square each pair's term.
        normalize: divide each list's loss by its number of pairs.

    Source: Herbrich et al., "Large Margin Rank Boundaries for Ordinal Regression", 2000; Joachims,
    "Training Linear SVMs in Linear Time", KDD 2006, for the counting.

    Example:
        >>> import torch, custom_ops
        >>> scores = torch.tensor([0.5, 1.5, 0.0], requires_grad=True)
        >>> loss = custom_ops.pairwise_hinge_loss(scores, torch.tensor([2, 1, 0]))
        >>> loss.backward()
        >>> loss.detach(), scores.grad
        (tensor(2.5000), tensor([-2.,  1.,  1.]))
    """
    margin = _checks.as_float("margin", margin)
    squared = _checks.as_bool("squared", squared)
    normalize = _checks.as_bool("normalize", normalize)
    given = (scores, labels, mask, lengths, cu_lengths, weights, item_weights, reduction, empty)
    return list_loss(pairwise_hinge, (margin, squared, normalize), LabelUse.ORDER, *given, of_pairs=True)


@leaf
@documented
def pairwise_mse_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    item_weights: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    empty: float | None = None,
) -> Tensor:
    """Return the sum of ``((s_i - s_j) - (y_i - y_j))^2`` over all ordered pairs of each list.

    Pairs with tied labels count too: their scores should be equal. The loss takes O(n) time, since it is ``2 n`` times
    the sum of the squares of ``s - y`` about their mean. A list of fewer than two items doesn't count.

    Args:
        normalize: divide each list's loss by its number of ordered pairs, n (n - 1).

    Source: TensorFlow Ranking's PairwiseMSELoss.

    Example:
        >>> import torch, custom_ops
        >>> scores = torch.tensor([0.5, 1.5, 0.0], requires_grad=True)
        >>> loss = custom_ops.pairwise_mse_loss(scores, torch.tensor([2, 1, 0]))
        >>> loss.backward()
        >>> loss.detach(), scores.grad
        (tensor(13.), tensor([-14.,  10.,   4.]))
    """
    normalize = _checks.as_bool("normalize", normalize)
    given = (scores, labels, mask, lengths, cu_lengths, weights, item_weights, reduction, empty)
    return list_loss(pairwise_mse, (normalize,), LabelUse.DIFFERENCE, *given, of_pairs=True)


class PairwiseLogisticLoss(ListLossModule):
    """Apply `pairwise_logistic_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.PairwiseLogisticLoss()(torch.tensor([0.5, 0.1, 0.9]), torch.tensor([2, 0, 1]))
        tensor(1.7971)
    """

    function = staticmethod(pairwise_logistic_loss)

    def __init__(
        self, reduction: str = "mean", sigma: float = 1.0, normalize: bool = False, empty: float | None = None
    ) -> None:
        super().__init__(reduction, sigma=sigma, normalize=normalize, empty=empty)


class PairwiseSoftZeroOneLoss(ListLossModule):
    """Apply `pairwise_soft_zero_one_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.PairwiseSoftZeroOneLoss()(torch.tensor([0.5, 0.1, 0.9]), torch.tensor([2, 0, 1]))
        tensor(1.3100)
    """

    function = staticmethod(pairwise_soft_zero_one_loss)

    def __init__(
        self, reduction: str = "mean", sigma: float = 1.0, normalize: bool = False, empty: float | None = None
    ) -> None:
        super().__init__(reduction, sigma=sigma, normalize=normalize, empty=empty)


class PairwiseExponentialLoss(ListLossModule):
    """Apply `pairwise_exponential_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.PairwiseExponentialLoss()(torch.tensor([0.5, 0.1, 0.9]), torch.tensor([2, 0, 1]))
        tensor(2.6115)
    """

    function = staticmethod(pairwise_exponential_loss)

    def __init__(
        self, reduction: str = "mean", sigma: float = 1.0, normalize: bool = False, empty: float | None = None
    ) -> None:
        super().__init__(reduction, sigma=sigma, normalize=normalize, empty=empty)


class PairwiseHingeLoss(ListLossModule):
    """Apply `pairwise_hinge_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.PairwiseHingeLoss(margin=0.5)(torch.tensor([0.5, 0.1, 0.9]), torch.tensor([2, 0, 1]))
        tensor(1.)
    """

    function = staticmethod(pairwise_hinge_loss)

    def __init__(
        self,
        reduction: str = "mean",
        margin: float = 1.0,
        squared: bool = False,
        normalize: bool = False,
        empty: float | None = None,
    ) -> None:
        super().__init__(reduction, margin=margin, squared=squared, normalize=normalize, empty=empty)


class PairwiseMSELoss(ListLossModule):
    """Apply `pairwise_mse_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.PairwiseMSELoss()(torch.tensor([0.5, 0.1, 0.9]), torch.tensor([2, 0, 1]))
        tensor(9.1200)
    """

    function = staticmethod(pairwise_mse_loss)

    def __init__(self, reduction: str = "mean", normalize: bool = False, empty: float | None = None) -> None:
        super().__init__(reduction, normalize=normalize, empty=empty)


# ---------------------------------------------------------------- references and registry entries
