"""Pairwise losses: sums of a function of the score difference over the pairs of a list.

A pair is two items i and j of one list with labels y_i > y_j. A new function ``phi`` of their scores'
difference is its value, slope and curvature in csrc/pairwise.cpp and triton_kernels/pairwise.py, and a
public function here.
"""

from __future__ import annotations

from torch import Tensor

from custom_ops import _checks
from custom_ops.ranking._inputs import DIFFERENCE, ORDER
from custom_ops.ranking._lists import ListLossModule, list_loss, list_op

LOGISTIC, SOFT_ZERO_ONE, EXPONENTIAL = range(3)  # as the kernels number them


@list_op()
def pairwise(phi: int, sigma: float, normalize: bool) -> None:
    """The sum of phi(sigma (s_i - s_j)) over the pairs of each list, or its mean if ``normalize``."""


@list_op(third_is_zero=True)
def pairwise_hinge(margin: float, squared: bool, normalize: bool) -> None:
    """The sum of max(0, margin - (s_i - s_j)), or its square, over the pairs of each list."""


@list_op(third_is_zero=True)
def pairwise_mse(normalize: bool) -> None:
    """The sum of the squares of (s_i - s_j) - (y_i - y_j) over the ordered pairs of each list."""


def pairwise_logistic_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    sigma: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """RankNet: the sum of ``log(1 + exp(-sigma (s_i - s_j)))`` over the pairs with ``y_i > y_j`` of each list.

    Nothing of size n^2 is kept, and a pair misordered by any amount has its gradient. Differentiable
    twice. A list without a pair (empty, of one item, all masked, all labels tied) has loss 0 and doesn't
    count in the mean. 16-bit scores are computed in float32; under autocast the loss is float32.

    Args:
        scores: ``[..., n]``; float16, bfloat16, float32 or float64.
        labels: ``[..., n]``, any real dtype; the higher the better. They get no gradient.
        mask: bool ``[..., n]``, True for the items that count. The others are never read, NaN or not, and
            get a gradient of exactly 0.
        lengths: int ``[...]``: only the first ``lengths`` items count.
        cu_lengths: int ``[L + 1]``, non-decreasing: the last dimension holds L lists, of which l is the
            items from ``cu_lengths[l]`` to before ``cu_lengths[l + 1]``.
        weights: ``[...]`` (with ``cu_lengths`` ``[..., L]``): one for each list.
        reduction: "mean" over the lists that count (weighted by ``weights``), "sum" or "none".
        sigma: the steepness, a positive number.
        normalize: divide each list's loss by its number of pairs.

    Returns:
        A scalar, or for "none" one loss for each list; in the dtype of the scores.

    Raises:
        TypeError: no tensor, a wrong dtype, ``sigma`` no number, ``normalize`` no bool.
        ValueError: a wrong shape, several devices, labels that require a gradient, both ``lengths`` and
            ``cu_lengths``, ``sigma`` not positive, an unknown ``reduction``.
        RuntimeError: ``lengths`` out of range, ``cu_lengths`` out of order or out of range; on a GPU it is an
            assertion on the device.

    O(n^2) time without an exponential per pair, O(n) memory.

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
    params = (LOGISTIC, sigma, normalize)
    return list_loss(pairwise, scores, labels, params, mask, lengths, cu_lengths, weights, reduction, ORDER)


def pairwise_soft_zero_one_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    sigma: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """The sum of ``1 / (1 + exp(sigma (s_i - s_j)))`` over the pairs with ``y_i > y_j`` of each list.

    A smooth count of the misordered pairs: bounded, so robust to wrong labels, and not convex. Arguments,
    errors, result and cost are those of `pairwise_logistic_loss`.

    Source: TensorFlow Ranking's PairwiseSoftZeroOneLoss.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.pairwise_soft_zero_one_loss(torch.tensor([0.5, 1.5, 0.0]), torch.tensor([2, 1, 0]))
        tensor(1.2910)
    """
    sigma = _checks.as_positive("sigma", sigma)
    normalize = _checks.as_bool("normalize", normalize)
    params = (SOFT_ZERO_ONE, sigma, normalize)
    return list_loss(pairwise, scores, labels, params, mask, lengths, cu_lengths, weights, reduction, ORDER)


def pairwise_exponential_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    sigma: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """RankBoost: the sum of ``exp(-sigma (s_i - s_j))`` over the pairs with ``y_i > y_j`` of each list.

    It overflows to inf where a pair is misordered by more than its dtype's exponential can hold.
    Arguments, errors, result and cost are those of `pairwise_logistic_loss`.

    Source: Freund et al., "An Efficient Boosting Algorithm for Combining Preferences", JMLR 2003.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.pairwise_exponential_loss(torch.tensor([0.5, 1.5, 0.0]), torch.tensor([2, 1, 0]))
        tensor(3.5479)
    """
    sigma = _checks.as_positive("sigma", sigma)
    normalize = _checks.as_bool("normalize", normalize)
    params = (EXPONENTIAL, sigma, normalize)
    return list_loss(pairwise, scores, labels, params, mask, lengths, cu_lengths, weights, reduction, ORDER)


def pairwise_hinge_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    margin: float = 1.0,
    squared: bool = False,
    normalize: bool = False,
) -> Tensor:
    """The sum of ``max(0, margin - (s_i - s_j))`` over the pairs with ``y_i > y_j`` of each list.

    With ``squared`` of its square. In O(n log n) time on the CPU: the pairs are counted, not visited. At
    the kink the gradient is 0. Twice differentiable almost everywhere: the Hessian is 0, with ``squared``
    the matrix of the pairs within the margin. A NaN among a list's scores makes its loss and gradient NaN.

    The other arguments, errors and the result are those of `pairwise_logistic_loss`.

    Args:
        margin: by how much the better item should lead, in units of the scores.
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
    params = (margin, squared, normalize)
    return list_loss(pairwise_hinge, scores, labels, params, mask, lengths, cu_lengths, weights, reduction, ORDER)


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
    """The sum of ``((s_i - s_j) - (y_i - y_j))^2`` over all ordered pairs of each list.

    Pairs of tied labels count too: their scores should be equal. In O(n) time, as it is ``2 n`` times the
    sum of the squares of ``s - y`` about their mean. A list of fewer than two items doesn't count.

    The other arguments, errors and the result are those of `pairwise_logistic_loss`.

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
    params = (normalize,)
    return list_loss(pairwise_mse, scores, labels, params, mask, lengths, cu_lengths, weights, reduction, DIFFERENCE)


class PairwiseLogisticLoss(ListLossModule):
    """`pairwise_logistic_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.PairwiseLogisticLoss()(torch.tensor([0.5, 0.1, 0.9]), torch.tensor([2, 0, 1]))
        tensor(1.7971)
    """

    function = staticmethod(pairwise_logistic_loss)

    def __init__(self, reduction: str = "mean", sigma: float = 1.0, normalize: bool = False) -> None:
        super().__init__(reduction, sigma=sigma, normalize=normalize)


class PairwiseSoftZeroOneLoss(ListLossModule):
    """`pairwise_soft_zero_one_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.PairwiseSoftZeroOneLoss()(torch.tensor([0.5, 0.1, 0.9]), torch.tensor([2, 0, 1]))
        tensor(1.3100)
    """

    function = staticmethod(pairwise_soft_zero_one_loss)

    def __init__(self, reduction: str = "mean", sigma: float = 1.0, normalize: bool = False) -> None:
        super().__init__(reduction, sigma=sigma, normalize=normalize)


class PairwiseExponentialLoss(ListLossModule):
    """`pairwise_exponential_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.PairwiseExponentialLoss()(torch.tensor([0.5, 0.1, 0.9]), torch.tensor([2, 0, 1]))
        tensor(2.6115)
    """

    function = staticmethod(pairwise_exponential_loss)

    def __init__(self, reduction: str = "mean", sigma: float = 1.0, normalize: bool = False) -> None:
        super().__init__(reduction, sigma=sigma, normalize=normalize)


class PairwiseHingeLoss(ListLossModule):
    """`pairwise_hinge_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.PairwiseHingeLoss(margin=0.5)(torch.tensor([0.5, 0.1, 0.9]), torch.tensor([2, 0, 1]))
        tensor(1.)
    """

    function = staticmethod(pairwise_hinge_loss)

    def __init__(
        self, reduction: str = "mean", margin: float = 1.0, squared: bool = False, normalize: bool = False
    ) -> None:
        super().__init__(reduction, margin=margin, squared=squared, normalize=normalize)


class PairwiseMSELoss(ListLossModule):
    """`pairwise_mse_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.PairwiseMSELoss()(torch.tensor([0.5, 0.1, 0.9]), torch.tensor([2, 0, 1]))
        tensor(9.1200)
    """

    function = staticmethod(pairwise_mse_loss)

    def __init__(self, reduction: str = "mean", normalize: bool = False) -> None:
        super().__init__(reduction, normalize=normalize)


# ---------------------------------------------------------------- references and registry entries
