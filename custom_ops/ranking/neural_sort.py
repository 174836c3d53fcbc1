"""NeuralNDCG: the NDCG of a list that is sorted softly."""

from __future__ import annotations

from torch import Tensor

from custom_ops import _checks
from custom_ops.ranking._inputs import EXPONENTIAL, VALUE
from custom_ops.ranking._lists import ListLossModule, list_loss, list_op

_GAINS = ("exponential", "linear")
_NO_LIMIT = 2**31 - 1


@list_op()
def neural_sort(temperature: float, k: int, exponential: bool) -> None:
    """1 less the NDCG of each list, with the gain at each rank a mean by a row of NeuralSort's matrix."""


def neural_sort_ndcg_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    k: int | None = None,
    temperature: float = 1.0,
    gain: str = "exponential",
) -> Tensor:
    """NeuralNDCG: 1 - NDCG@k of the list sorted softly by NeuralSort.

    ``1 - sum_{i <= k} g_i / log2(1 + i) / ideal`` with the gain at rank i ``g_i = sum_j P_ij G_j``, gains
    ``G = 2^y - 1`` or ``y``, the rows ``P_i = softmax_j(((n + 1 - 2 i) s_j - sum_k |s_j - s_k|) / temperature)``
    of a relaxed permutation matrix, and the ideal DCG@k. A label below 0 has no gain.

    This is the loss without Sinkhorn's scaling of the columns: each row is a distribution over the items, but the
    gain of an item may be counted more or less than once. allRank scales the columns by default.

    Differentiable twice and in forward mode; among tied scores the derivative of \\|s_j - s_k\\| is 0. 16-bit scores
    are computed in float32.

    Args:
        scores: ``[..., n]``; float16, bfloat16, float32 or float64.
        labels: graded relevance ``[..., n]``, real numbers.
        mask: True where an item is valid; others are not read, and get a zero gradient.
        lengths: ``[...]``: of each list the first so many items are valid.
        cu_lengths: ``[L + 1]``: list l is the items from cu_lengths[l] to cu_lengths[l + 1].
        weights: of each list.
        reduction: "mean" over the lists that contribute, "sum" or "none".
        k: only the first k ranks count; None for all.
        temperature: in units of the scores: the smaller, the closer to sorting and the steeper.
        gain: "exponential" or "linear".

    Returns:
        A scalar, or for "none" one loss for each list. A list without a relevant item, or whose labels are all
        equal, doesn't contribute: its loss and gradient are 0. NaN if a valid score isn't finite.

    Raises:
        TypeError: no tensor, a wrong dtype, ``temperature`` no number, ``k`` no integer.
        ValueError: shapes that don't match, several devices, labels that require a gradient,
            ``temperature`` not positive, ``k`` less than 1, an unknown ``gain`` or ``reduction``.

    O(n min(k, n)) time at most, O(n) memory. On the CPU a row is summed only where its terms don't vanish, in a
    number of items that grows with the square root of n for scores spread alike.

    Source: Pobrotyn, Białobrzeski, "NeuralNDCG: Direct Optimisation of a Ranking Metric via Differentiable Relaxation
    of Sorting", 2021; Grover et al., "Stochastic Optimization of Sorting Networks via Continuous Relaxations",
    ICLR 2019.

    Example:
        >>> import torch, custom_ops
        >>> scores = torch.tensor([0.3, 0.1, 0.2], requires_grad=True)
        >>> loss = custom_ops.neural_sort_ndcg_loss(scores, torch.tensor([0, 2, 1]))
        >>> loss.backward()
        >>> loss.detach(), scores.grad
        (tensor(0.2496), tensor([-0.1159, -0.4163,  0.5322]))
    """
    k = _checks.as_limit("k", k)
    temperature = _checks.as_positive("temperature", temperature)
    _checks.is_one_of("gain", gain, _GAINS)
    params = (temperature, _NO_LIMIT if k is None else min(k, _NO_LIMIT), gain == "exponential")
    purpose = EXPONENTIAL if gain == "exponential" else VALUE
    return list_loss(neural_sort, scores, labels, params, mask, lengths, cu_lengths, weights, reduction, purpose)


class NeuralSortNDCGLoss(ListLossModule):
    """`neural_sort_ndcg_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.NeuralSortNDCGLoss(k=2)(torch.tensor([0.5, 0.1, 0.9]), torch.tensor([2, 0, 1]))
        tensor(0.2846)
    """

    function = staticmethod(neural_sort_ndcg_loss)

    def __init__(
        self, reduction: str = "mean", k: int | None = None, temperature: float = 1.0, gain: str = "exponential"
    ) -> None:
        super().__init__(reduction, k=k, temperature=temperature, gain=gain)


# ---------------------------------------------------------------- reference


# ---------------------------------------------------------------- registry
