"""Ranking metrics of batches of lists, in float64, without a gradient.

Items with tied scores have no order. ``ties="average"`` is the mean over all orders of the tied items, in closed form
(McSherry and Najork, 2008); "index" keeps them in their given order; "together" retrieves the tied items at once, at
the rank of the last of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from custom_ops import _checks
from custom_ops._enums import LabelUse, RankMetric, TiedScores
from custom_ops._leaf import leaf
from custom_ops._native import define
from custom_ops.ranking._arguments import checked, documented, integers, value_of_empty, with_empty
from custom_ops.ranking._gains import GAINS
from custom_ops.ranking._inputs import in_dtype
from custom_ops.ranking._lists import batch, per_list, shard

_TIES = TiedScores.options()
_ALL = 2**63 - 1  # the cutoff that lets all places count

Cutoff = int | Sequence[int | None] | None


@define
def rank_metric(
    scores: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    offsets: Tensor | None,
    cutoffs: Tensor,
    discounts: Tensor | None,
    metric: int,
    ties: int,
    exponential: bool,
) -> tuple[Tensor, Tensor]:
    """Return the metric [..., L, K] of each list at each of ``cutoffs`` [K], and whether it is defined [..., L].

    A cutoff of 2^63 - 1 lets all places count. The float64 ``labels`` are gains for DCG, and for ERR the probabilities
    that an item satisfies. ``discounts`` has the weight of each place for DCG and NDCG; None for 1 / log2(1 + rank).
    """
    active = torch.empty_like(per_list(scores, offsets), dtype=torch.bool)
    return labels.new_empty((*active.shape, *cutoffs.shape)), active


batch(rank_metric)
shard(rank_metric)

_ARGUMENTS = """
    scores: ``[..., n]``, of any real dtype. They get no gradient.
    labels: ``[..., n]``, of any real dtype. An item is relevant if its label is above 0.
    k: only the first k ranks count; None for all. Several at once, such as ``(1, 5, 10)``, give the result a last
        dimension, with one number for each.
    index: int ``[n]``, the query of each item, in any order, for ``scores [n]``: there is a list for each query, by
        ascending number. It isn't used together with ``lengths`` or ``cu_lengths``.
    ties: "average" over the orders of items tied in score, or "index" for their given order.
    empty: the value of a list for which the metric isn't defined, such as 0.0, 1.0 or ``math.nan``, which then is in
        the mean. With None such a list isn't in the mean, and its value is 0 for "none".
    weights: real ``[...]``, with ``cu_lengths`` or ``index`` ``[..., L]``: one for each list.
    reduction: "mean" over the lists (weighted by ``weights``; 0 if there is none), "sum", or "none" for one number
        for each list.
"""

_RETURNS = """Returns:
    A scalar, or for "none" one number for each list, and for several k one number for each; float64 for float64
    scores, else float32. NaN for a list with a NaN score or label.

The metric takes O(n log n) time and O(n) memory for n items in total, in lists of any lengths."""

_documented: Any = partial(documented, arguments=_ARGUMENTS, returns=_RETURNS)


def _evaluate(
    metric: RankMetric,
    scores: Tensor,
    labels: Tensor,
    k: Cutoff,
    mask: Tensor | None,
    lengths: Tensor | None,
    cu_lengths: Tensor | None,
    index: Tensor | None,
    weights: Tensor | None,
    ties: str,
    empty: float | None,
    reduction: str,
    choices: Collection[str] = ("average", "index"),
    gain: str | Callable[[Tensor], Tensor] = "linear",
    discount: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Check all arguments, and return the metric at each k, reduced over the lists."""
    several = _checks.listed(k) is not None
    each: list[Any] = _checks.listed(k) or ([] if several else [k])
    limits = [_checks.as_limit("k", one) for one in each]
    cutoffs = [_ALL if one is None else one for one in limits]
    _checks.is_tensor("labels", labels)
    _checks.is_one_of("ties", ties, choices)
    empty = value_of_empty(empty)
    if isinstance(scores, Tensor):
        scores = scores.detach()
    labels = labels.detach()
    if index is not None:
        scores, labels, mask, cu_lengths = _by_query(scores, labels, mask, lengths, cu_lengths, index)
    valid, offsets = checked(scores, labels, mask, lengths, cu_lengths, weights, reduction, _checks.REAL)
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    if not isinstance(gain, str):
        labels = _number_of_each("gain", gain, labels)
    discounts = None
    if discount is not None:
        ranks = torch.arange(1, scores.shape[-1] + 1, dtype=torch.float64, device=scores.device)
        discounts = _number_of_each("discount", discount, ranks)
    value, active = rank_metric(
        in_dtype(scores, dtype, valid, offsets, LabelUse.ORDER),
        labels.double(),
        valid,
        offsets,
        torch.tensor(cutoffs, dtype=torch.int64, device=scores.device),
        discounts,
        metric.value,
        _TIES[ties],
        gain == "exponential",
    )
    if offsets is None:
        value, active = value.squeeze(-2), active.squeeze(-1)
    value, active = with_empty(value, active.unsqueeze(-1), empty)
    value = value if several else value.squeeze(-1)
    active = active if several else active.squeeze(-1)
    if weights is not None:
        weights = weights.detach().double()
        weights = weights.unsqueeze(-1) if several else weights
        value = torch.where(weights == 0, 0, value)  # a list of weight 0 doesn't count, whatever its value is
    if reduction == "none":
        return (value if weights is None else value * weights).to(dtype)
    dims = tuple(range(value.dim() - several))
    share = active.double() if weights is None else active * weights
    total = (value * share).sum(dims) if dims else value * share
    if reduction == "mean":
        count = share.sum(dims) if dims else share
        total = total / torch.where(count == 0, 1, count)
    return total.to(dtype)


def _by_query(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    cu_lengths: Tensor | None,
    index: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return the items in the order of their queries, and the bounds of the queries."""
    if lengths is not None or cu_lengths is not None:
        raise ValueError("index: expected neither lengths nor cu_lengths beside it")
    _checks.has_dtype("scores", scores, _checks.REAL)
    index = integers("index", index, scores, unsigned=True)
    if scores.dim() != 1:
        raise ValueError(f"index: expected scores [n] beside it, got shape {list(scores.shape)}")
    given = {"index": index, "labels": labels} | ({} if mask is None else {"mask": mask})
    for name, tensor in given.items():
        _checks.is_tensor(name, tensor)
        if tensor.shape != scores.shape:
            raise ValueError(f"{name}: expected shape {list(scores.shape)}, got {list(tensor.shape)}")
    _checks.same_device(scores=scores, **given)
    queries, order = index.sort(stable=True)
    counts = torch.unique_consecutive(queries, return_counts=True)[1]
    bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return scores[order], labels[order], None if mask is None else mask[order], bounds


def _number_of_each(name: str, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return what the user's function gives for each element of x, in float64."""
    if not callable(function):
        raise TypeError(f"{name}: expected a function, got {type(function).__name__}")
    given = function(x)
    _checks.is_tensor(f"the result of {name}", given)
    if given.shape != x.shape or given.is_complex():
        raise ValueError(f"{name}: expected a real result of shape {list(x.shape)}, got {list(given.shape)}")
    return given.detach().double()


@leaf
@_documented
def precision(
    scores: Tensor,
    labels: Tensor,
    k: Cutoff = None,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    index: Tensor | None = None,
    weights: Tensor | None = None,
    ties: str = "average",
    empty: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the share of relevant items among the first k.

    It divides by k, also in a list of fewer items, as trec_eval does; for None by the number of items. It isn't defined
    for a list without a relevant item.

    Source: Manning, Raghavan, Schütze, "Introduction to Information Retrieval", 2008, chapter 8.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.precision(torch.tensor([0.9, 0.3, 0.2]), torch.tensor([1, 0, 1]), k=(1, 2))
        tensor([1.0000, 0.5000])
    """
    lists = (mask, lengths, cu_lengths, index, weights)
    return _evaluate(RankMetric.PRECISION, scores, labels, k, *lists, ties, empty, reduction)


@leaf
@_documented
def recall(
    scores: Tensor,
    labels: Tensor,
    k: Cutoff = None,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    index: Tensor | None = None,
    weights: Tensor | None = None,
    ties: str = "average",
    empty: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the share of the relevant items that are among the first k.

    It isn't defined for a list without a relevant item.

    Source: Manning, Raghavan, Schütze, "Introduction to Information Retrieval", 2008, chapter 8.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.recall(torch.tensor([0.9, 0.3, 0.2]), torch.tensor([1, 0, 1]), k=2)
        tensor(0.5000)
    """
    lists = (mask, lengths, cu_lengths, index, weights)
    return _evaluate(RankMetric.RECALL, scores, labels, k, *lists, ties, empty, reduction)


@leaf
@_documented
def f1_score(
    scores: Tensor,
    labels: Tensor,
    k: Cutoff = None,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    index: Tensor | None = None,
    weights: Tensor | None = None,
    ties: str = "average",
    empty: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the harmonic mean of `precision` and `recall` at k: 2 hits / (k + the number of relevant items).

    It isn't defined for a list without a relevant item.

    Source: van Rijsbergen, "Information Retrieval", 1979.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.f1_score(torch.tensor([0.9, 0.3, 0.2]), torch.tensor([1, 0, 1]), k=1)
        tensor(0.6667)
    """
    lists = (mask, lengths, cu_lengths, index, weights)
    return _evaluate(RankMetric.F1, scores, labels, k, *lists, ties, empty, reduction)


@leaf
@_documented
def hit_rate(
    scores: Tensor,
    labels: Tensor,
    k: Cutoff = None,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    index: Tensor | None = None,
    weights: Tensor | None = None,
    ties: str = "average",
    empty: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the share of the lists with a relevant item among the first k.

    With ties it is the probability of that over their orders. It isn't defined for a list without a relevant item.

    Source: Deshpande and Karypis, "Item-based top-N recommendation algorithms", TOIS 2004.

    Example:
        >>> import torch, custom_ops
        >>> scores = torch.tensor([[0.9, 0.3, 0.2], [0.1, 0.4, 0.3]])
        >>> custom_ops.hit_rate(scores, torch.tensor([[1, 0, 1], [1, 0, 0]]), k=[1, 3])
        tensor([0.5000, 1.0000])
    """
    lists = (mask, lengths, cu_lengths, index, weights)
    return _evaluate(RankMetric.HIT_RATE, scores, labels, k, *lists, ties, empty, reduction)


@leaf
@_documented
def r_precision(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    index: Tensor | None = None,
    weights: Tensor | None = None,
    ties: str = "average",
    empty: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return `precision` at the number of relevant items of each list, where it equals the recall.

    It isn't defined for a list without a relevant item.

    Source: Manning, Raghavan, Schütze, "Introduction to Information Retrieval", 2008, chapter 8.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.r_precision(torch.tensor([0.9, 0.3, 0.2]), torch.tensor([1, 0, 1]))
        tensor(0.5000)
    """
    lists = (mask, lengths, cu_lengths, index, weights)
    return _evaluate(RankMetric.R_PRECISION, scores, labels, None, *lists, ties, empty, reduction)


@leaf
@_documented
def dcg(
    scores: Tensor,
    labels: Tensor,
    k: Cutoff = None,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    index: Tensor | None = None,
    weights: Tensor | None = None,
    gain: str | Callable[[Tensor], Tensor] = "exponential",
    discount: Callable[[Tensor], Tensor] | None = None,
    ties: str = "average",
    empty: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return discounted cumulative gain: the sum of gain / log2(1 + rank).

    It isn't defined for a list without a gain. Exponential gains overflow beyond a label of 1023.

    Args:
        gain: "exponential", 2^label - 1, "linear", the label, or a function that returns the
            gain of each label. A gain below 0 counts as 0.
        discount: a function that returns the weight of each rank 1, 2, ..., n, given in float64; None for
            1 / log2(1 + rank).

    Source: Järvelin and Kekäläinen, 2002; exponential gains: Burges et al., 2005.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.dcg(torch.tensor([0.1, 0.3, 0.2]), torch.tensor([2, 0, 1]), k=2)
        tensor(0.6309)
    """
    if isinstance(gain, str):
        _checks.is_one_of("gain", gain, GAINS)
    _checks.is_tensor("labels", labels)
    gains = labels.double() if isinstance(gain, str) else _number_of_each("gain", gain, labels)
    if gain == "exponential":  # expm1 keeps labels near 0, and the other whole gains
        gains = torch.where(gains < 0.5, torch.expm1(math.log(2) * gains), torch.exp2(gains) - 1)
    gains = gains.clamp_min(0)
    lists = (mask, lengths, cu_lengths, index, weights)
    return _evaluate(RankMetric.DCG, scores, gains, k, *lists, ties, empty, reduction, discount=discount)


@leaf
@_documented
def ndcg(
    scores: Tensor,
    labels: Tensor,
    k: Cutoff = None,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    index: Tensor | None = None,
    weights: Tensor | None = None,
    gain: str | Callable[[Tensor], Tensor] = "exponential",
    discount: Callable[[Tensor], Tensor] | None = None,
    ties: str = "average",
    empty: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return normalised discounted cumulative gain: `dcg` over that of the ideal order.

    For ``gain="linear"`` it equals ``sklearn.metrics.ndcg_score``, whose ``ignore_ties`` is ``ties="index"`` up to the
    order that it gives tied items. It isn't defined for a list without a gain.

    Args:
        gain: "exponential", 2^label - 1 (for labels of any size), "linear", the label, or a function that returns the
            gain of each label. A gain below 0 counts as 0.
        discount: a function that returns the weight of each rank 1, 2, ..., n, given in float64; None for
            1 / log2(1 + rank).

    Source: Järvelin and Kekäläinen, 2002; exponential gains: Burges et al., 2005.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.ndcg(torch.tensor([0.1, 0.3, 0.2]), torch.tensor([2, 0, 1]), k=2)
        tensor(0.1738)
    """
    if isinstance(gain, str):
        _checks.is_one_of("gain", gain, GAINS)
    lists = (mask, lengths, cu_lengths, index, weights)
    return _evaluate(RankMetric.NDCG, scores, labels, k, *lists, ties, empty, reduction, gain=gain, discount=discount)


@leaf
@_documented
def err(
    scores: Tensor,
    labels: Tensor,
    k: Cutoff = None,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    index: Tensor | None = None,
    weights: Tensor | None = None,
    max_label: float,
    empty: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return expected reciprocal rank: of the item at which a user stops who goes down the list.

    An item satisfies the user with probability ``(2^label - 1) / 2^max_label``. The metric is the sum over the ranks r
    of 1 / r times the probability that the user stops there. Tied items keep their given order. It isn't defined for a
    list without a relevant item.

    Args:
        max_label: the highest label of the scale, such as 4 for labels 0 to 4, and 1 for binary ones. A label above it
            counts like it.

    Source: Chapelle, Metzler, Zhang, Grinspan, "Expected Reciprocal Rank for Graded Relevance", CIKM 2009.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.err(torch.tensor([0.1, 0.3, 0.2]), torch.tensor([2, 0, 1]), max_label=2)
        tensor(0.3125)
    """
    most = _checks.as_positive("max_label", max_label)
    _checks.is_tensor("labels", labels)
    grades = labels.double().clamp(0, most)
    stops = torch.exp2(grades - most) - 2.0**-most
    lists = (mask, lengths, cu_lengths, index, weights)
    return _evaluate(RankMetric.ERR, scores, stops, k, *lists, "index", empty, reduction)


@leaf
@_documented
def mrr(
    scores: Tensor,
    labels: Tensor,
    k: Cutoff = None,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    index: Tensor | None = None,
    weights: Tensor | None = None,
    ties: str = "average",
    empty: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the mean reciprocal rank: 1 over the rank of the first relevant item, whose label is above 0.

    With ``ties="together"`` and one relevant item per list it equals
    ``sklearn.metrics.label_ranking_average_precision_score``. It isn't defined for a list without a relevant item.

    Args:
        k: a list whose first relevant item has a rank beyond k counts 0; None for no limit. Several at once give the
            result a last dimension.
        ties: "average" over the orders of items tied in score; "index" for their given order; or
            "together", with each at the last rank of the tied items.

    Source: Voorhees, 1999; ties: McSherry and Najork, 2008.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.mrr(torch.tensor([[0.1, 0.3, 0.2], [1.0, 1.0, 0.0]]), torch.tensor([[0, 0, 1], [1, 0, 0]]))
        tensor(0.6250)
    """
    lists = (mask, lengths, cu_lengths, index, weights)
    return _evaluate(RankMetric.RECIPROCAL_RANK, scores, labels, k, *lists, ties, empty, reduction, choices=_TIES)


@leaf
@_documented
def average_precision(
    scores: Tensor,
    labels: Tensor,
    k: Cutoff = None,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    index: Tensor | None = None,
    weights: Tensor | None = None,
    ties: str = "average",
    empty: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the mean, over the relevant items (label above 0), of the precision at each one's rank.

    With ``ties="together"`` it equals ``sklearn.metrics.average_precision_score`` of each list. It isn't defined for a
    list without a relevant item.

    Args:
        k: only the first k ranks count, and the sum is divided by the number of relevant items or by k, whichever
            is less, so that a perfect order has 1; None for all. Several at once give the result a last dimension.
        ties: "average" over the orders of items tied in score; "index" for their given order; or
            "together", with each at the last rank of the tied items.

    Source: ties: McSherry and Najork, "Computing Information Retrieval Performance Measures Efficiently in the
    Presence of Tied Scores", 2008.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.average_precision(torch.tensor([0.9, 0.3, 0.2]), torch.tensor([1, 0, 1]))
        tensor(0.8333)
    """
    lists = (mask, lengths, cu_lengths, index, weights)
    return _evaluate(RankMetric.AVERAGE_PRECISION, scores, labels, k, *lists, ties, empty, reduction, choices=_TIES)


@leaf
@_documented
def auc(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    index: Tensor | None = None,
    weights: Tensor | None = None,
    empty: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the area under the ROC curve of each list.

    It is the share of the pairs of a relevant and an irrelevant item in which the relevant one has the higher score;
    tied scores count half. It equals ``sklearn.metrics.roc_auc_score`` of each list, and isn't defined for a list of
    which all items or none are relevant.

    Source: Hanley and McNeil, "The meaning and use of the area under a ROC curve", Radiology 1982.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.auc(torch.tensor([0.9, 0.3, 0.2]), torch.tensor([1, 0, 1]))
        tensor(0.5000)
    """
    lists = (mask, lengths, cu_lengths, index, weights)
    return _evaluate(RankMetric.AUC, scores, labels, None, *lists, "average", empty, reduction)
