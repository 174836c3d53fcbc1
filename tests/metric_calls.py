"""Random calls of the metrics, and their definitions as loops over the items of one list in Python's floats."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import custom_ops
from custom_ops.ranking.specs._lists import list_samples, reference_of
from custom_ops.registry import OpInfo, Sample

Gains = list[float]


# ---------------------------------------------------------------- one list


def _groups(scores: Gains, gains: Gains, ties: str) -> Iterator[Gains]:
    """Yield the gains of the items tied in score, from the highest score on."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    by_place = itertools.groupby(order, key=lambda i: i if ties == "index" else scores[i])
    return ([gains[i] for i in group] for _, group in by_place)


def _sum_over_places(scores: Gains, gains: Gains, k: int, ties: str, discount: Callable[[int], float]) -> float:
    """Return the expected sum of gain times discount over the first k places."""
    total, place = 0.0, 0
    for group in _groups(scores, gains, ties):
        for _ in group:
            place += 1
            if place <= k and any(group):
                total += math.fsum(group) / len(group) * discount(place)
    return total


def _first_relevant(scores: Gains, relevant: Gains, k: int, ties: str, value: Callable[[int], float]) -> float:
    """Return the expected value at the place of the first relevant item, 0 beyond k."""
    place = 0
    for group in _groups(scores, relevant, ties):
        n, some = len(group), int(sum(group))
        if some and ties == "together":
            return value(place + n) if place + n <= k else 0.0
        if some:  # the first of them is at the place j of the group, and the others are behind it
            ways = {j: math.comb(n - j, some - 1) / math.comb(n, some) for j in range(1, n - some + 2)}
            return math.fsum(way * value(place + j) for j, way in ways.items() if place + j <= k)
        place += n
    return 0.0


def _precisions(scores: Gains, relevant: Gains, k: int, ties: str) -> float:
    """Return the expected sum, over the relevant items among the first k, of the precision at each one's place."""
    total, before, place = 0.0, 0.0, 0
    for group in _groups(scores, relevant, ties):
        n, some = len(group), sum(group)
        if ties == "together":
            total += some * (before + some) / (place + n) if place + n <= k else 0.0
        else:
            for j in range(n):
                others = j * (some - 1) / (n - 1) if n > 1 else 0.0
                total += some / n * (before + others + 1) / (place + j + 1) if place + j < k else 0.0
        before, place = before + some, place + n
    return total


def _gains(labels: Gains, gain: str, relative_to: float) -> Gains:
    if gain == "linear":
        return [max(y, 0.0) for y in labels]
    return [-math.expm1(-math.log(2) * y) * 2.0 ** (y - relative_to) if y > 0 else 0.0 for y in labels]


def _cascade(scores: Gains, labels: Gains, k: int, most: float) -> float:
    looks, total = 1.0, 0.0
    stops = [2.0 ** (min(max(y, 0.0), most) - most) - 2.0**-most for y in labels]
    for place, (stop,) in enumerate(_groups(scores, stops, "index"), 1):
        total += looks * stop / place if place <= k else 0.0
        looks *= 1 - stop
    return total


def _won(scores: Gains, relevant: Gains) -> float:
    """Return in how many pairs the relevant item has the higher score; ties count half."""
    high, low = ([s for s, r in zip(scores, relevant) if r == of] for of in (1, 0))
    return sum((a > b) + (a == b) / 2 for a in high for b in low)


def _discount(place: int) -> float:
    return 1 / math.log2(1 + place)


def of_one_list(
    metric: str,
    scores: Gains,
    labels: Gains,
    k: int | None = None,
    ties: str = "average",
    gain: str = "exponential",
    max_label: float = 0.0,
) -> float | None:
    """Return the metric of a list, or None where it isn't defined."""
    relevant = [float(y > 0) for y in labels]
    n, total = len(labels), sum(relevant)
    if any(map(math.isnan, [*scores, *labels])):
        return math.nan
    if not total or (metric == "auc" and total == n):
        return None
    places = n if k is None else k
    hits = partial(_sum_over_places, scores, relevant, ties=ties, discount=lambda place: 1.0)
    ideal, highest = sorted(labels, reverse=True), max(labels)
    values: dict[str, Callable[[], float]] = {
        "precision": lambda: hits(places) / places,
        "recall": lambda: hits(places) / total,
        "f1_score": lambda: 2 * hits(places) / (places + total),
        "r_precision": lambda: hits(int(total)) / total,
        "hit_rate": lambda: _first_relevant(scores, relevant, places, ties, lambda place: 1.0),
        "mrr": lambda: _first_relevant(scores, relevant, places, ties, lambda place: 1 / place),
        "average_precision": lambda: _precisions(scores, relevant, places, ties) / min(places, total),
        "dcg": lambda: _sum_over_places(scores, _gains(labels, gain, 0.0), places, ties, _discount),
        "ndcg": lambda: (
            _sum_over_places(scores, _gains(labels, gain, highest), places, ties, _discount)
            / _sum_over_places([*range(n, 0, -1)], _gains(ideal, gain, highest), places, ties, _discount)
        ),
        "err": lambda: _cascade(scores, labels, places, max_label),
        "auc": lambda: _won(scores, relevant) / (total * (n - total)),
    }
    try:
        return values[metric]()
    except OverflowError:  # a gain beyond float64
        return math.inf


# ---------------------------------------------------------------- many lists, and random calls of them


def _reference(metric: str, scores: Tensor, labels: Tensor, k: Any = None, **options: Any) -> Tensor:
    if options.get("mask") is None:
        options["mask"] = torch.ones_like(scores, dtype=torch.bool)

    def of_each(s: Tensor, y: Tensor, **own: Any) -> tuple[Tensor, bool]:
        value = of_one_list(metric, s.tolist(), y.tolist(), **own)
        return s.new_tensor(0.0 if value is None else value), value is not None

    of_lists = partial(reference_of(of_each), scores.detach().double(), labels.double(), **options)
    return torch.stack([of_lists(k=one) for one in k], -1) if isinstance(k, tuple) else of_lists(k=k)


def _samples(metric: str, device: torch.device, dtype: torch.dtype) -> list[Sample]:
    accepted = inspect.signature(getattr(custom_ops, metric)).parameters
    own = {"max_label": 2.0} if metric == "err" else {}
    choices: dict[str, list[Any]] = {
        "k": [1, 2, 7, (1, 3), (2, 1, 40)],
        "ties": ["index", "average", *["together"] * (metric in ("mrr", "average_precision"))],
        "gain": ["linear"],
        "empty": [1.0, math.nan],
        "max_label": [1.0, 4.0],
    }
    options = [own | {name: value} for name, values in choices.items() if name in accepted for value in values]
    samples = [
        replace(sample, kwargs={name: value for name, value in sample.kwargs.items() if name in accepted})
        for sample in list_samples(device, dtype, **own)
    ]
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(0, 4, (10, 2, 3, 6), generator=generator, device=device)
    kinds = itertools.product(
        (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64), (torch.bool, torch.uint8)
    )
    samples += [Sample((s.to(a), y.to(b)), own) for (s, y), (a, b) in zip(whole, kinds)]
    return [*samples, *(replace(samples[0], kwargs=each) for each in options)]


NAMES = "auc average_precision dcg err f1_score hit_rate mrr ndcg precision r_precision recall"
METRICS = {
    name: OpInfo(
        name=name,
        function=getattr(custom_ops, name),
        reference=partial(_reference, name),
        samples=partial(_samples, name),
        summary="A metric",
    )
    for name in NAMES.split()
}
