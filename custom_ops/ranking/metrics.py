"""Metrics of a ranking: plain PyTorch on batches of lists, in double, without a gradient.

Items tied in score have no order of their own. ``ties="average"`` is the mean over all orders of the tied
items, in closed form (McSherry and Najork, 2008); "index" keeps them in the order they came in; "together"
retrieves the tied items at once, at the rank of the last of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops import _checks
from custom_ops.ranking._lists import checked, list_dot, relative_gains

_ALL_TIES = ("average", "index", "together")
_REAL = (*_checks.FLOATING, torch.uint8, torch.int8, torch.int16, *_checks.INDEX)


class _Ranked:
    """The items of all lists in the order of their scores, those that aren't valid last, and what a metric needs.

    The items of a list stay between its bounds, and of a place, `start` and `end` are counted from the list's begin. A
    group is a run of tied items, which under ``ties="index"`` is one item. All takes O(T log T) time and O(T) memory
    for T items, however they are spread over lists.
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
        self.k = _checks.as_limit("k", k)
        _checks.is_tensor("labels", labels)
        labels = labels.detach()
        valid, offsets = checked(scores, labels, mask, lengths, cu_lengths, None, reduction, _REAL)
        _checks.is_one_of("ties", ties, choices)
        scores, n = scores.detach(), scores.shape[-1]
        self.reduction = reduction
        self.dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
        self.offsets, self.is_one = offsets, offsets is None
        place = torch.arange(n, device=scores.device)
        self.list: Tensor | None = None
        if offsets is not None:
            self.bounds = offsets.clamp(0, n).cummax(0).values
            self.list = torch.searchsorted(self.bounds, place, right=True) - 1  # -1 before, L behind all lists
            place = place - self.bounds[self.list.clamp(min=0)]
        self.place = place.expand(scores.shape)
        self.valid = valid
        undefined = labels.isnan() | scores.isnan()
        self.undefined = self.total(undefined.double(), valid) > 0  # checks the offsets too

        order = self.order(scores)
        self.labels = labels.gather(-1, order)
        self.ranked = None if valid is None else valid.gather(-1, order)
        scores = scores.gather(-1, order)
        first = torch.ones_like(scores, dtype=torch.bool)
        if ties != "index":
            first[..., 1:] = scores[..., 1:] != scores[..., :-1]
            first = first | (self.place == 0)
        if self.ranked is not None:
            first = first | ~self.ranked
        at = torch.arange(n, device=scores.device)
        begin = torch.where(first, at, 0).cummax(-1).values  # of each item's group
        last = torch.ones_like(first)
        last[..., :-1] = first[..., 1:]
        end = torch.where(last, at + 1, n).flip(-1).cummin(-1).values.flip(-1)
        self.begin, self.start, self.end = begin, self.place - (at - begin), self.place + (end - at)

    def order(self, key: Tensor) -> Tensor:
        """Of the items of each list by descending key, ties by position, those that aren't valid last."""
        order = key.argsort(dim=-1, descending=True, stable=True)
        later = torch.zeros_like(order) if self.valid is None else (~self.valid).long()
        if self.list is not None:
            later = later + 2 * self.list
        if self.list is None and self.valid is None:
            return order
        return order.gather(-1, later.gather(-1, order).argsort(dim=-1, stable=True))

    def total(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """The sum of x over each list's valid items, [..., L]."""
        total: Tensor = list_dot(x, torch.ones_like(x), valid, self.offsets)
        return total

    def sum(self, x: Tensor) -> Tensor:
        """The same of what is in the order of the scores."""
        return self.total(x, self.ranked)

    def of_items(self, x: Tensor) -> Tensor:
        """For each item what x [..., L] says of its list; outside of all lists anything."""
        if self.list is None or x.shape[-1] == 0:
            return x[..., :1].expand(self.place.shape) if x.shape[-1] else x.new_zeros(self.place.shape)
        return x[..., self.list.clamp(0, x.shape[-1] - 1)]

    def relevant(self) -> Tensor:
        """1 for the valid items with a label above 0, by score, else 0."""
        relevant = self.labels > 0
        return (relevant if self.ranked is None else relevant & self.ranked).double()

    def over_group(self, count: Tensor) -> Tensor:
        """The sum of whole numbers over each item's group."""
        ends = self.begin + (self.end - self.start)
        return self.before(count, ends) - self.before(count, self.begin)

    def before_group(self, count: Tensor) -> Tensor:
        """The sum of whole numbers over the items of the list that come before each item's group."""
        return self.before(count, self.begin) - self.before(count, self.begin - self.start)

    @staticmethod
    def before(count: Tensor, at: Tensor) -> Tensor:
        """The sum of whole numbers over all items before those ``at``."""
        return torch.nn.functional.pad(count.cumsum(-1), (1, 0)).gather(-1, at)

    def within(self, place: Tensor) -> Tensor:
        """Whether places, counted from 0, are in the top k."""
        return torch.ones_like(place, dtype=torch.bool) if self.k is None else place < self.k

    def reduce(self, metric: Tensor, counts: Tensor) -> Tensor:
        """``metric`` where ``counts``, 0 for other lists; NaN for a list with a NaN among its scores or labels."""
        metric = torch.where(counts, metric, 0).masked_fill(self.undefined, torch.nan)
        counts = counts | self.undefined
        if self.is_one:
            metric, counts = metric.squeeze(-1), counts.squeeze(-1)
        if self.reduction == "sum":
            metric = metric.sum()
        elif self.reduction == "mean":
            metric = metric.sum() / counts.sum().clamp(min=1)
        return metric.to(self.dtype)


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
        scores: [..., n], of any real dtype. Without a gradient.
        labels: [..., n], of any real dtype; one below 0 has gain 0.
        k: only the first k ranks count; None for all.
        mask: [..., n], True for valid items: others are never read.
        lengths: [...], how many items of each list are valid, from the first on.
        cu_lengths: [L + 1], non-decreasing: list l is the items from cu_lengths[l] to before cu_lengths[l + 1] of
            the last dimension.
        gain: "exponential", 2^label - 1 (for labels of any size), or "linear", the label.
        ties: "average" over the orders of items tied in score, or "index", in the order they came in.
        reduction: "mean" over the lists that have a gain (0 if none does), "sum", or "none" for one number for
            each list, 0 where it has no gain.

    Returns:
        A scalar or [...], with ``cu_lengths`` [..., L]; float64 for float64 scores, else float32. NaN for a list with a
        NaN score or label.

    Raises:
        TypeError: no tensor, a wrong dtype, ``k`` no integer.
        ValueError: shapes that don't match, several devices, ``k`` less than 1, both ``lengths`` and ``cu_lengths``, an
            unknown option.
        RuntimeError: ``lengths`` or ``cu_lengths`` out of range or order, as `pairwise_logistic_loss` has it.

    O(n log n) time, O(n) memory for n items in all, in lists of any lengths.

    Source: Järvelin and Kekäläinen, 2002; exponential gains: Burges et al., 2005.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.ndcg(torch.tensor([0.1, 0.3, 0.2]), torch.tensor([2, 0, 1]), k=2)
        tensor(0.1738)
    """
    _checks.is_one_of("gain", gain, ("exponential", "linear"))
    ranked = _Ranked(scores, labels, k, mask, lengths, cu_lengths, ties, ("average", "index"), reduction)
    discounts = 1 / (torch.arange(scores.shape[-1], device=scores.device).double() + 2).log2()
    discounts = torch.where(ranked.within(torch.arange(len(discounts), device=scores.device)), discounts, 0)
    before = torch.nn.functional.pad(discounts.cumsum(0), (1, 0))
    labels = labels.detach().double().clamp(min=0)
    best = labels.gather(-1, ranked.order(labels))
    begins = ranked.place == 0
    largest = ranked.of_items(ranked.total(torch.where(begins, best, 0).nan_to_num(), None))

    in_group = (before[ranked.end] - before[ranked.start]) / (ranked.end - ranked.start)
    dcg = ranked.sum(relative_gains(ranked.labels.double(), largest, gain) * in_group)
    ideal = ranked.sum(relative_gains(best, largest, gain) * discounts[ranked.place])
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
        scores: [..., n], of any real dtype. Without a gradient.
        labels: [..., n], of any real dtype.
        k: 0 for a list whose first relevant item has a rank beyond k; None for no such limit.
        mask: [..., n], True for valid items: others are never read.
        lengths: [...], how many items of each list are valid, from the first on.
        cu_lengths: [L + 1], non-decreasing: list l is the items from cu_lengths[l] to before cu_lengths[l + 1] of
            the last dimension.
        ties: "average" over the orders of items tied in score; "index", in the order they came in; or
            "together", each at the last rank of the tied.
        reduction: "mean" over the lists that have a relevant item (0 if none does), "sum", or "none" for one
            number for each list, 0 where it has none.

    Returns:
        A scalar or [...], with ``cu_lengths`` [..., L]; float64 for float64 scores, else float32. NaN for a list with a
        NaN score or label.

    Raises:
        TypeError: no tensor, a wrong dtype, ``k`` no integer.
        ValueError: shapes that don't match, several devices, ``k`` less than 1, both ``lengths`` and ``cu_lengths``, an
            unknown option.
        RuntimeError: ``lengths`` or ``cu_lengths`` out of range or order, as `pairwise_logistic_loss` has it.

    O(n log n) time, O(n) memory for n items in all, in lists of any lengths.

    Source: Voorhees, 1999; ties: McSherry and Najork, 2008.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.mrr(torch.tensor([[0.1, 0.3, 0.2], [1.0, 1.0, 0.0]]), torch.tensor([[0, 0, 1], [1, 0, 0]]))
        tensor(0.6250)
    """
    ranked = _Ranked(scores, labels, k, mask, lengths, cu_lengths, ties, _ALL_TIES, reduction)
    relevant = ranked.relevant()
    hits = ranked.over_group(relevant)
    is_first = (hits > 0) & (ranked.before_group(relevant) == 0)  # the group of the first relevant item
    if ties == "together":
        share = (ranked.place == ranked.start) & ranked.within(ranked.end - 1)
        reciprocal = ranked.sum(torch.where(is_first & share, 1 / ranked.end.double(), 0))
    else:
        # The first of `hits` among `size` tied ones comes j places after the start: with the chance that none came
        # before times that of one there, hits / (size - j).
        size, j = (ranked.end - ranked.start).double(), (ranked.place - ranked.start).double()
        misses = size - hits
        none_before = torch.exp(_log_falling(misses, j) - _log_falling(size, j))
        chance = torch.where(j <= misses, none_before * hits / (size - j), 0)
        inside = is_first & ranked.within(ranked.place)
        reciprocal = ranked.sum(torch.where(inside, chance / (ranked.place + 1), 0))
    return ranked.reduce(reciprocal, ranked.sum(relevant) > 0)


def _log_falling(n: Tensor, j: Tensor) -> Tensor:
    """The logarithm of n (n - 1) ... (n - j + 1), for j up to n."""
    return torch.lgamma(n + 1) - torch.lgamma((n - j).clamp(min=0) + 1)


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
        scores: [..., n], of any real dtype. Without a gradient.
        labels: [..., n], of any real dtype.
        k: only the first k ranks count, and the sum is divided by the number of relevant items or by k, whichever
            is less, so that a perfect order has 1; None for all.
        mask: [..., n], True for valid items: others are never read.
        lengths: [...], how many items of each list are valid, from the first on.
        cu_lengths: [L + 1], non-decreasing: list l is the items from cu_lengths[l] to before cu_lengths[l + 1] of
            the last dimension.
        ties: "average" over the orders of items tied in score; "index", in the order they came in; or
            "together", each at the last rank of the tied.
        reduction: "mean" over the lists that have a relevant item (0 if none does), "sum", or "none" for one
            number for each list, 0 where it has none.

    Returns:
        A scalar or [...], with ``cu_lengths`` [..., L]; float64 for float64 scores, else float32. NaN for a list with a
        NaN score or label.

    Raises:
        TypeError: no tensor, a wrong dtype, ``k`` no integer.
        ValueError: shapes that don't match, several devices, ``k`` less than 1, both ``lengths`` and ``cu_lengths``, an
            unknown option.
        RuntimeError: ``lengths`` or ``cu_lengths`` out of range or order, as `pairwise_logistic_loss` has it.

    O(n log n) time, O(n) memory for n items in all, in lists of any lengths.

    Source: ties: McSherry and Najork, "Computing Information Retrieval Performance Measures Efficiently in the
    Presence of Tied Scores", 2008.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.average_precision(torch.tensor([0.9, 0.3, 0.2]), torch.tensor([1, 0, 1]))
        tensor(0.8333)
    """
    ranked = _Ranked(scores, labels, k, mask, lengths, cu_lengths, ties, _ALL_TIES, reduction)
    relevant = ranked.relevant()
    hits, before = ranked.over_group(relevant), ranked.before_group(relevant)
    if ties == "together":
        precision = (before + hits) / ranked.end
        share = torch.where(ranked.within(ranked.end - 1), relevant, 0)
    else:
        # At each place of the group: the chance of a relevant item there, and how many come before it if it is one.
        size = ranked.end - ranked.start
        others = (ranked.place - ranked.start) * (hits - 1) / (size - 1).clamp(min=1)
        precision = (before + others + 1) / (ranked.place + 1)
        share = torch.where(ranked.within(ranked.place), hits / size, 0)
    total = ranked.sum(relevant)
    found = ranked.sum(share * precision)
    return ranked.reduce(found / (total if ranked.k is None else total.clamp(max=ranked.k)), total > 0)
