"""Ranking metrics: torch's operations on the items in the order of their scores, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops._enums import RankMetric, TiedScores
from custom_ops.triton_kernels.lists import Lists, discount_of, relative_gains

_ALL = 2**63 - 1  # the cutoff that lets all places count


class _Ranked:
    """The items of all lists in the order of their scores, invalid ones last.

    `place`, `start` and `end` count from the beginning of the list. A group is a run of tied items, or one item under
    ``ties="index"``.
    """

    def __init__(self, lists: Lists, scores: Tensor, owned: Tensor, together: bool) -> None:
        self.lists, self.order = lists, lists.sort(scores)
        n, device = lists.items, scores.device
        at = torch.arange(n, device=device)
        place = at - lists.bounds[lists.places.clamp(0, lists.lists)] if lists.several else at
        self.place, self.valid = place.expand(scores.shape), owned.gather(-1, self.order)
        scores = scores.gather(-1, self.order)
        first = torch.ones_like(self.valid)
        if together:
            first[..., 1:] = scores[..., 1:] != scores[..., :-1]
            first = first | (self.place == 0) | ~self.valid
        self.begin = torch.where(first, at, 0).cummax(-1).values
        last = torch.ones_like(first)
        last[..., :-1] = first[..., 1:]
        end = torch.where(last, at + 1, n).flip(-1).cummin(-1).values.flip(-1)
        self.start, self.end = self.place - (at - self.begin), self.place + (end - at)
        self.size = (self.end - self.start).double()
        self.earlier = (self.place - self.start).double()

    def sum(self, x: Tensor) -> Tensor:
        return self.lists.sum(torch.where(self.valid, x, 0))

    def of_group(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums of x over each item's group, and over the earlier items of its list."""
        x = torch.where(self.valid, x, 0)
        sums = torch.nn.functional.pad(self.lists.scan(x), (1, 0))
        before = torch.where(self.start == 0, 0, sums.gather(-1, self.begin))
        return sums.gather(-1, self.begin + self.size.long()) - before, before

    def gain_of_group(self, x: Tensor) -> Tensor:
        """Return the sum of x over each item's group; sums of other groups don't take part in it."""
        x = torch.where(self.valid, x, 0)
        return torch.zeros_like(x).scatter_add_(-1, self.begin, x).gather(-1, self.begin)


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
    scores, labels = scores.contiguous(), labels.contiguous()
    lists = Lists(scores, valid, offsets)
    if labels.shape != scores.shape or labels.dtype != torch.float64 or cutoffs.dtype != torch.int64:
        raise RuntimeError("labels, cutoffs: expected float64 of the shape of the scores, and int64")
    owners, _ = lists.owners()
    owned = (owners >= 0).expand(scores.shape)
    nan = lists.sum((owned & (scores.isnan() | labels.isnan())).double()) > 0
    labels = labels.masked_fill(~owned | labels.isnan(), 0)
    items = lists.sum(owned.double())
    total = lists.sum((labels > 0).double())
    active = (total > 0) & (total < items) if metric == RankMetric.AUC else total > 0

    ranked = _Ranked(lists, scores, owned, ties != TiedScores.INDEX)
    in_order = labels.gather(-1, ranked.order)
    table = discount_of(torch.arange(lists.items, device=scores.device)) if discounts is None else discounts
    table = table[ranked.place]
    highest = lists.to_items(lists.largest(labels))
    ideal = None
    if metric in (RankMetric.DCG, RankMetric.NDCG):
        if metric == RankMetric.NDCG:
            best = labels.gather(-1, lists.sort(labels.masked_fill(~owned, -torch.inf)))
            ideal = relative_gains(best, highest, exponential)
            ideal = torch.where(ideal == 0, 0, ideal * table)
            in_order = relative_gains(in_order, highest, exponential)
        term = ranked.gain_of_group(in_order) / ranked.size
        term = torch.where(term == 0, 0, term * table)
    elif metric == RankMetric.ERR:
        stops = torch.where(ranked.valid, in_order, 0)
        left = torch.where(ranked.place == 0, 1, _look_further(lists, stops))
        term = left * stops / (ranked.place + 1)
    else:
        term = _relevance(ranked, (in_order > 0).double(), metric, ties)
    if metric == RankMetric.AUC:
        n = lists.to_items(items - total)
        relevant, before = ranked.of_group((in_order > 0).double())
        term = term * (n - ranked.start + before - (ranked.size - relevant) / 2)

    results = []
    for k in cutoffs:
        places = torch.where(k == _ALL, items, k.double())
        value = ranked.sum(torch.where(ranked.place < k, term, 0))
        if metric == RankMetric.PRECISION:
            value = value / places
        elif metric == RankMetric.RECALL:
            value = value / total
        elif metric == RankMetric.F1:
            value = 2 * value / (places + total)
        elif metric == RankMetric.R_PRECISION:
            value = ranked.sum(torch.where(ranked.place < lists.to_items(total), term, 0)) / total
        elif metric == RankMetric.AVERAGE_PRECISION:
            value = value / torch.minimum(places, total)
        elif metric == RankMetric.AUC:
            value = value / (total * (items - total))
        elif ideal is not None:
            best_sum = ranked.sum(torch.where(ranked.place < k, ideal, 0))
            value = torch.where(best_sum == 0, 0, value / best_sum)
        results.append(torch.where(active, value, 0).masked_fill(nan, torch.nan))
    shape = (*lists.batch, lists.lists)
    values = torch.stack(results, -1) if results else labels.new_empty((*shape, 0))
    return values.contiguous(), active | nan


def _relevance(ranked: _Ranked, relevant: Tensor, metric: int, ties: int) -> Tensor:
    """Return what is expected at each place, for the metrics of relevant items."""
    hits, before = ranked.of_group(relevant)
    rank, earlier, size = (ranked.place + 1).double(), ranked.earlier, ranked.size
    is_last = ranked.place + 1 == ranked.end
    if metric in (RankMetric.HIT_RATE, RankMetric.RECIPROCAL_RANK):
        if ties == TiedScores.TOGETHER:
            chance = is_last.double()
        else:
            # The first of `hits` among `size` tied items is at a place with the probability that none is at an earlier
            # place of the group, times that of a hit there.
            misses = size - hits
            none = torch.exp(_log_falling(misses, earlier) - _log_falling(size, earlier))
            chance = torch.where(earlier <= misses, none * hits / (size - earlier), 0)
        chance = torch.where((hits > 0) & (before == 0), chance, 0)
        return chance / rank if metric == RankMetric.RECIPROCAL_RANK else chance
    if metric == RankMetric.AVERAGE_PRECISION:
        if ties == TiedScores.TOGETHER:
            return torch.where(is_last, hits * (before + hits) / rank, 0)
        others = earlier * (hits - 1) / (size - 1).clamp(min=1)  # the expected number of relevant items before it
        return hits / size * (before + others + 1) / rank
    return hits / size


def _log_falling(n: Tensor, j: Tensor) -> Tensor:
    """Return the logarithm of n (n - 1) ... (n - j + 1), for j up to n."""
    return torch.lgamma(n + 1) - torch.lgamma((n - j).clamp(min=0) + 1)


def _look_further(lists: Lists, stops: Tensor) -> Tensor:
    """Return the product of 1 - x over the earlier items of each list."""
    rest = 1 - stops
    ended = torch.nn.functional.pad(lists.scan((rest == 0).double())[..., :-1], (1, 0))
    logs = torch.nn.functional.pad(lists.scan(torch.where(rest == 0, 1, rest).log())[..., :-1], (1, 0))
    return torch.where(ended == 0, logs.exp(), 0)
