"""NeuralNDCG: the NDCG of a softly sorted list."""

from __future__ import annotations

from torch import Tensor

from custom_ops import _checks
from custom_ops._leaf import leaf
from custom_ops.ranking._arguments import ListLossModule, documented, limit, list_loss
from custom_ops.ranking._gains import GAINS
from custom_ops.ranking._list_loss import list_op


@list_op()
def neural_sort(temperature: float, k: int, exponential: bool) -> None:
    """Return 1 - the NDCG of each list, where the gain at a rank is a mean weighted by a row of NeuralSort's matrix."""


@leaf
@documented
def neural_sort_ndcg_loss(
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
    temperature: float = 1.0,
    gain: str = "exponential",
    empty: float | None = None,
) -> Tensor:
    """Return NeuralNDCG: 1 - NDCG@k of the list, sorted softly by NeuralSort.

    ``1 - sum_{i <= k} g_i / log2(1 + i) / ideal`` with the gain at rank i ``g_i = sum_j P_ij G_j``, gains
    ``G = 2^y - 1`` or ``y``, the rows ``P_i = softmax_j(((n + 1 - 2 i) s_j - sum_k |s_j - s_k|) / temperature)``
    of a relaxed permutation matrix, and the ideal DCG@k. A label below 0 has no gain.

    The loss leaves out Sinkhorn's scaling of the columns: each row is a distribution over the items, but an item's gain
    may be counted more or less than once. allRank scales the columns by default.

    The loss is differentiable twice and in forward mode; for tied scores the derivative of \\|s_j - s_k\\| is 0. 16-bit
    scores are computed in float32.

    The loss takes at most O(n min(k, n)) time and O(n) memory. On the CPU a row is summed only where its terms don't
    vanish; for evenly spread scores the number of these items grows with the square root of n.

    Args:
        k: only the first k ranks count; None for all.
        temperature: in units of the scores. A smaller one is closer to sorting and steeper.
        gain: "exponential" or "linear".

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
    first = limit(k)
    temperature = _checks.as_positive("temperature", temperature)
    _checks.is_one_of("gain", gain, GAINS)
    given = (scores, labels, mask, lengths, cu_lengths, weights, item_weights, reduction, empty)
    return list_loss(neural_sort, (temperature, first, gain == "exponential"), GAINS[gain], *given)


class NeuralSortNDCGLoss(ListLossModule):
    """Apply `neural_sort_ndcg_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.NeuralSortNDCGLoss(k=2)(torch.tensor([0.5, 0.1, 0.9]), torch.tensor([2, 0, 1]))
        tensor(0.2846)
    """

    function = staticmethod(neural_sort_ndcg_loss)

    def __init__(
        self,
        reduction: str = "mean",
        k: int | None = None,
        temperature: float = 1.0,
        gain: str = "exponential",
        empty: float | None = None,
    ) -> None:
        super().__init__(reduction, k=k, temperature=temperature, gain=gain, empty=empty)
