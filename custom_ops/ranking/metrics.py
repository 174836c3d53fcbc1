"""Metrics of a ranking: plain PyTorch on batches of lists, in double, without a gradient.

Items tied in score have no order of their own. ``ties="average"`` is the mean over all orders of the tied
items, in closed form (McSherry and Najork, 2008); "index" keeps them in the order they came in; "together"
retrieves the tied items at once, at the rank of the last of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops import _checks
from custom_ops.ranking._lists import checked

__all__ = ["average_precision", "mrr", "ndcg"]

_ALL_TIES = ("average", "index", "together")


class _Ranked:
    """Lists in the order of their scores, the items that aren't valid last, and what a metric needs of them.

    A group is a run of tied items, which under ``ties="index"`` is one item.
    """

    def __init__(
        self,
        scores: Tensor,
        labels: Tensor,
        k: int | None,
        mask: Tensor | None,
        lengths: Tensor | None,
        cu_lengths: Tensor | None,
        ties: str,
        choices: tuple[str, ...],
        reduction: str,
    ) -> None:
        k = _checks.as_limit("k", k)
        _checks.is_tensor("labels", labels)
        valid = checked(scores, labels.detach(), mask, lengths, cu_lengths, None, reduction)
        _checks.is_one_of("ties", ties, choices)
        valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
        if cu_lengths is not None:
            scores, labels, valid = _by_list(scores, labels, valid, cu_lengths)
        n = scores.shape[-1]
        self.reduction, self.dtype = reduction, torch.promote_types(scores.dtype, torch.float32)
        scores, labels = scores.detach().double(), labels.detach().double()
        self.undefined = (scores.isnan() & valid).any(-1)
        self.values = labels.masked_fill(~valid, 0)
        self.valid = valid

        order = scores.argsort(dim=-1, descending=True, stable=True)
        order = order.gather(-1, (~valid).gather(-1, order).to(torch.uint8).argsort(dim=-1, stable=True))
        self.labels, self.ranked = self.values.gather(-1, order), valid.gather(-1, order)
        scores = scores.gather(-1, order)
        first = torch.ones_like(self.ranked)
        if ties != "index":
            first[..., 1:] = (scores[..., 1:] != scores[..., :-1]) | ~self.ranked[..., 1:]
        self.place = torch.arange(n, device=scores.device).expand(scores.shape)  # from 0
        self.start = torch.where(first, self.place, 0).cummax(-1).values  # of each item's group
        last = torch.ones_like(first)
        last[..., :-1] = first[..., 1:]
        self.end = torch.where(last, self.place + 1, n).flip(-1).cummin(-1).values.flip(-1)
        self.cut = n if k is None else min(k, n)

    def over_group(self, x: Tensor) -> Tensor:
        """The sum of x over each item's group."""
        return self.before(x, self.end) - self.before(x, self.start)

    @staticmethod
    def before(x: Tensor, place: Tensor) -> Tensor:
        """The sum of x over the items before ``place``."""
        return torch.nn.functional.pad(x.cumsum(-1), (1, 0)).gather(-1, place)

    def reduce(self, metric: Tensor, counts: Tensor) -> Tensor:
        """``metric`` where ``counts``, 0 for other lists; NaN for a list with a NaN among its scores."""
        metric = torch.where(counts, metric, 0).masked_fill(self.undefined, torch.nan)
        if self.reduction == "sum":
            metric = metric.sum()
        elif self.reduction == "mean":
            metric = metric.sum() / (counts | self.undefined).sum().clamp(min=1)
        return metric.to(self.dtype)


def _by_list(scores: Tensor, labels: Tensor, valid: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The items [..., T] of lists between bounds [L + 1] as [..., L, n] of the longest list."""
    lengths, total = bounds.diff(), scores.shape[-1]
    if bool((lengths < 0).any()) or int(bounds[0]) < 0 or int(bounds[-1]) > total:
        raise ValueError(f"cu_lengths: expected non-decreasing values from 0 to {total}, got {bounds.tolist()}")
    place = torch.arange(int(lengths.max()) if len(lengths) else 0, device=scores.device)
    at = (bounds[:-1, None] + place).clamp_max(max(total - 1, 0))
    return scores[..., at], labels[..., at], valid[..., at] & (place < lengths[:, None])


def ndcg(
    scores: Tensor,
    labels: Tensor,
    k: int | None = None,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    gain: str = "exponential",
    ties: str = "average",
    reduction: str = "mean",
) -> Tensor:
    """Normalised discounted cumulative gain: the sum of gain / log2(1 + rank), over that of the ideal order.

    Equal to ``sklearn.metrics.ndcg_score`` for ``gain="linear"``; its ``ignore_ties`` is ``ties="index"``,
    but for the order that it gives tied items.

    Args:
        scores: [..., n]; float16, bfloat16, float32 or float64. Without a gradient.
        labels: [..., n], at least 0, of any real dtype.
        k: only the first k ranks count; None for all.
        mask: [..., n], True for valid items: others are never read.
        lengths: [...], how many items of each list are valid, from the first on.
        cu_lengths: [L + 1], non-decreasing: list l is the items from cu_lengths[l] to before cu_lengths[l + 1] of
            the last dimension. Memory is then that of the lists padded to the longest.
        gain: "exponential", 2^label - 1 (for labels of any size), or "linear", the label.
        ties: "average" over the orders of items tied in score, or "index", in the order they came in.
        reduction: "mean" over the lists that have a gain (0 if none does), "sum", or "none" for one number for
            each list, 0 where it has no gain.

    Returns:
        A scalar or [...], with ``cu_lengths`` [..., L]; float64 for float64 scores, else float32. NaN for a list with a
        NaN score.

    Raises:
        TypeError: no tensor, a wrong dtype, ``k`` no integer.
        ValueError: shapes that don't match, several devices, ``k`` less than 1, ``cu_lengths`` out of order or range
            or with ``lengths``, an unknown option.

    O(n log n) time, O(n) memory.

    Source: Järvelin and Kekäläinen, 2002; exponential gains: Burges et al., 2005.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.ndcg(torch.tensor([0.1, 0.3, 0.2]), torch.tensor([2, 0, 1]), k=2)
        tensor(0.1738)
    """
    _checks.is_one_of("gain", gain, ("exponential", "linear"))
    ranked = _Ranked(scores, labels, k, mask, lengths, cu_lengths, ties, ("average", "index"), reduction)
    if ranked.place.shape[-1] == 0:
        return ranked.reduce(*_nothing(ranked))
    discount = 1 / (ranked.place.double() + 2).log2()
    discount = torch.where(ranked.place < ranked.cut, discount, 0)
    largest = ranked.values.amax(-1, keepdim=True)

    def gains(y: Tensor) -> Tensor:
        """Relative to the largest, so that they are finite."""
        return torch.exp2(y - largest) - torch.exp2(-largest) if gain == "exponential" else y

    in_group = ranked.over_group(discount) / (ranked.end - ranked.start)
    dcg = (torch.where(ranked.ranked, gains(ranked.labels), 0) * in_group).sum(-1)
    best = torch.where(ranked.valid, gains(ranked.values), 0).sort(dim=-1, descending=True).values
    ideal = (best * discount).sum(-1)
    return ranked.reduce(dcg / ideal, ideal != 0)


def mrr(
    scores: Tensor,
    labels: Tensor,
    k: int | None = None,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    ties: str = "average",
    reduction: str = "mean",
) -> Tensor:
    """Mean reciprocal rank: 1 over the rank of the first relevant item, of label > 0.

    With ``ties="together"`` and one relevant item in each list equal to
    ``sklearn.metrics.label_ranking_average_precision_score``.

    Args:
        scores: [..., n]; float16, bfloat16, float32 or float64. Without a gradient.
        labels: [..., n], of any real dtype.
        k: 0 for a list whose first relevant item has a rank beyond k; None for no such limit.
        mask: [..., n], True for valid items: others are never read.
        lengths: [...], how many items of each list are valid, from the first on.
        cu_lengths: [L + 1], non-decreasing: list l is the items from cu_lengths[l] to before cu_lengths[l + 1] of
            the last dimension. Memory is then that of the lists padded to the longest.
        ties: "average" over the orders of items tied in score; "index", in the order they came in; or
            "together", each at the last rank of the tied.
        reduction: "mean" over the lists that have a relevant item (0 if none does), "sum", or "none" for one
            number for each list, 0 where it has none.

    Returns:
        A scalar or [...], with ``cu_lengths`` [..., L]; float64 for float64 scores, else float32. NaN for a list with a
        NaN score.

    Raises:
        TypeError: no tensor, a wrong dtype, ``k`` no integer.
        ValueError: shapes that don't match, several devices, ``k`` less than 1, ``cu_lengths`` out of order or range
            or with ``lengths``, an unknown option.

    O(n log n) time, O(n) memory.

    Source: Voorhees, 1999; ties: McSherry and Najork, 2008.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.mrr(torch.tensor([[0.1, 0.3, 0.2], [1.0, 1.0, 0.0]]), torch.tensor([[0, 0, 1], [1, 0, 0]]))
        tensor(0.6250)
    """
    ranked = _Ranked(scores, labels, k, mask, lengths, cu_lengths, ties, _ALL_TIES, reduction)
    relevant = (ranked.labels > 0).double()
    counts = relevant.sum(-1) > 0
    if ranked.place.shape[-1] == 0:
        return ranked.reduce(*_nothing(ranked))
    first = relevant.argmax(-1, keepdim=True)
    start, end, hits = (x.gather(-1, first) for x in (ranked.start, ranked.end, ranked.over_group(relevant)))
    if ties == "together":
        return ranked.reduce(torch.where(end <= ranked.cut, 1 / end.double(), 0).squeeze(-1), counts)
    # The first of `hits` among the tied comes j places after the start: with the chance that none came before.
    left = end - ranked.place
    chance = torch.where(left > hits, (left - hits) / left.double(), 0)
    chance = torch.where((ranked.place >= start) & (ranked.place < end), chance, 1)
    survival = torch.nn.functional.pad(chance.cumprod(-1)[..., :-1], (1, 0), value=1)
    inside = (ranked.place >= start) & (ranked.place < end) & (ranked.place < ranked.cut)
    reciprocal = torch.where(inside, survival * (1 - chance) / (ranked.place + 1), 0)
    return ranked.reduce(reciprocal.sum(-1), counts)


def average_precision(
    scores: Tensor,
    labels: Tensor,
    k: int | None = None,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_lengths: Tensor | None = None,
    ties: str = "average",
    reduction: str = "mean",
) -> Tensor:
    """The mean, over the relevant items (label > 0), of the precision at each one's rank.

    With ``ties="together"`` equal to ``sklearn.metrics.average_precision_score`` of each list.

    Args:
        scores: [..., n]; float16, bfloat16, float32 or float64. Without a gradient.
        labels: [..., n], of any real dtype.
        k: only the first k ranks count, and the sum is divided by the number of relevant items or by k, whichever
            is less, so that a perfect order has 1; None for all.
        mask: [..., n], True for valid items: others are never read.
        lengths: [...], how many items of each list are valid, from the first on.
        cu_lengths: [L + 1], non-decreasing: list l is the items from cu_lengths[l] to before cu_lengths[l + 1] of
            the last dimension. Memory is then that of the lists padded to the longest.
        ties: "average" over the orders of items tied in score; "index", in the order they came in; or
            "together", each at the last rank of the tied.
        reduction: "mean" over the lists that have a relevant item (0 if none does), "sum", or "none" for one
            number for each list, 0 where it has none.

    Returns:
        A scalar or [...], with ``cu_lengths`` [..., L]; float64 for float64 scores, else float32. NaN for a list with a
        NaN score.

    Raises:
        TypeError: no tensor, a wrong dtype, ``k`` no integer.
        ValueError: shapes that don't match, several devices, ``k`` less than 1, ``cu_lengths`` out of order or range
            or with ``lengths``, an unknown option.

    O(n log n) time, O(n) memory.

    Source: ties: McSherry and Najork, "Computing Information Retrieval Performance Measures Efficiently in the
    Presence of Tied Scores", 2008.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.average_precision(torch.tensor([0.9, 0.3, 0.2]), torch.tensor([1, 0, 1]))
        tensor(0.8333)
    """
    ranked = _Ranked(scores, labels, k, mask, lengths, cu_lengths, ties, _ALL_TIES, reduction)
    relevant = (ranked.labels > 0).double()
    hits = ranked.over_group(relevant)
    before = ranked.before(relevant, ranked.start)
    if ties == "together":
        precision = (before + hits) / ranked.end
        share = torch.where(ranked.end <= ranked.cut, relevant, 0)
    else:
        # At each place of the group: the chance of a relevant item there, and how many come before it if it is one.
        size = ranked.end - ranked.start
        others = (ranked.place - ranked.start) * (hits - 1) / (size - 1).clamp(min=1)
        precision = (before + others + 1) / (ranked.place + 1)
        share = torch.where(ranked.place < ranked.cut, hits / size, 0)
    total = relevant.sum(-1)
    return ranked.reduce((share * precision).sum(-1) / total.clamp(max=ranked.cut), total > 0)


def _nothing(ranked: _Ranked) -> tuple[Tensor, Tensor]:
    none = torch.zeros_like(ranked.undefined)
    return none.double(), none
