"""The specs of `custom_ops.ranking.sorting`: references, samples and wrong calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from custom_ops.ranking._arguments import valid_items
from custom_ops.ranking.sorting import SpearmanLoss, _tied, soft_rank, soft_sort, spearman_loss
from custom_ops.ranking.specs._lists import list_bad_calls, list_samples, reference_of
from custom_ops.registry import BadCall, OpInfo, Sample, register


def _pools(values: list[float], alpha: float, beta: float, kl: bool, sort: bool) -> list[int]:
    """Return where the pools begin, found by definition, one violation at a time. The values, descending, are
    multiplied by alpha and the places by beta. Sums are relative to the first item of a pool, so nothing cancels.
    """
    n = len(values)

    def log_total(terms: list[float]) -> float:
        return torch.tensor(terms, dtype=torch.float64).logsumexp(0).item()

    def up(p: int, q: int) -> tuple[float, float]:
        return 0.0 if values[p] == values[q] else (values[p] - values[q]) * alpha, (q - p) * beta

    def fit(first: int, end: int) -> float:
        """Return the fit of the items from first to end, relative to the first one."""
        below = [up(first, p) for p in range(first, end)]
        if kl and sort:
            return log_total([-w for _, w in below]) - log_total([-s for s, _ in below])
        if kl:
            return log_total([-s for s, _ in below]) - log_total([math.log(n - p) for p in range(first, end)])
        return sum(s - w if sort else w - s for s, w in below) / (end - first)

    begins: list[int] = []
    for place in range(n):
        begins.append(place)
        while len(begins) > 1:
            s, w = up(begins[-2], begins[-1])
            above = w - s if sort else s if kl else s - w
            if above > fit(begins[-1], place + 1) - fit(begins[-2], begins[-1]):
                break
            begins.pop()
    return begins


def _soft_row(x: Tensor, strength: float, kl: bool, sort: bool) -> Tensor:
    """Return the soft ranks or the soft sort of one list; given the pools, it is a formula in torch's own ops."""
    n = len(x)
    values, order = (-x if sort else x).sort(descending=True, stable=True)
    alpha, beta = (1.0, 1 / strength) if sort else (1 / strength, 1.0)
    begins = torch.tensor(_pools(values.tolist(), alpha, beta, kl, sort), dtype=torch.int64, device=x.device)
    pool = torch.zeros(n, dtype=torch.int64, device=x.device)
    pool[begins] = 1
    pool = pool.cumsum(0) - 1
    place = torch.arange(n, device=x.device)
    first = begins[pool]
    base = values[first]
    s = (values - base) * alpha
    w = (first - place).to(x) * beta

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(len(begins)).index_add(0, pool, values)[pool]

    def log_total(values: Tensor) -> Tensor:
        top = values.detach().new_full((len(begins),), -torch.inf).scatter_reduce(0, pool, values.detach(), "amax")
        return total((values - top[pool]).exp()).log() + top[pool]

    if sort:
        fit = log_total(w) - log_total(s) if kl else total(w - s) / total(torch.ones_like(s))
        return fit - w - base
    if kl:
        ranks = (s - (log_total(s) - log_total((n - place).to(x).log()))).exp()
    else:
        ranks = (n - first) + s - total(s - w) / total(torch.ones_like(s))
    return torch.zeros_like(ranks).index_add(0, order, ranks)


def _soft_reference(sort: bool) -> Callable[..., Tensor]:
    def reference(
        values: Tensor,
        regularization: str = "l2",
        regularization_strength: float = 1.0,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_lengths: Tensor | None = None,
    ) -> Tensor:
        valid, _ = valid_items("values", values, mask, lengths, cu_lengths)
        n = values.shape[-1]
        bounds = [0, n] if cu_lengths is None else cu_lengths.tolist()
        x = values.reshape(-1, n) if values.numel() else values.reshape(0, n)
        kept = torch.ones_like(x, dtype=torch.bool) if valid is None else valid.reshape(x.shape)
        rows = []
        for row, keep in zip(x, kept):
            result = torch.zeros_like(row)
            for start, stop in pairwise(bounds):
                at = start + keep[start:stop].nonzero().squeeze(-1)
                soft = _soft_row(row[at], regularization_strength, regularization == "kl", sort)
                result = result.index_add(0, torch.arange(len(at)).to(at) + start if sort else at, soft)
            rows.append(result)
        return torch.stack(rows).view(values.shape) if rows else values.clone()

    return reference


def _spearman_of_one_list(
    s: Tensor,
    y: Tensor,
    regularization: str = "l2",
    regularization_strength: float = 1.0,
    w: Tensor | None = None,
) -> tuple[Tensor, bool]:
    below, above = (y[:, None] > y).sum(1), (y[:, None] < y).sum(1)
    theirs = (below - above).to(s) / 2
    ours = _soft_row(s, regularization_strength, regularization == "kl", False) - (len(s) + 1) / 2
    w = torch.ones_like(s) if w is None else w * len(s) / w.sum()
    differ = torch.where(w > 0, theirs, -torch.inf).amax() > torch.where(w > 0, theirs, torch.inf).amin()
    ours, theirs = (x - (w * x).mean() for x in (ours, theirs))
    spread = (w * ours.pow(2)).sum()
    defined = differ & ~_tied(spread, len(s))
    scale = torch.where(defined, spread * (w * theirs.pow(2)).sum(), 1)
    return 1 - torch.where(defined, (w * ours * theirs).sum() / scale.sqrt(), 0), bool(differ)


def spearman_loss_reference(scores: Tensor, labels: Tensor, *, mask: Tensor | None = None, **options: Any) -> Tensor:
    """Compute with a mask in any case, as the pools can't be found under ``vmap``."""
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    return reference_of(_spearman_of_one_list)(scores, labels, mask=mask, **options)


def _draw(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Return values of which some are close together and some far apart, away from the kinks of the samples below."""
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.to(device, dtype).requires_grad_()


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    mask = torch.tensor([[True, False, True, True]], device=device)
    lengths = torch.tensor([3, 0], device=device)
    return [
        Sample((_draw(device, dtype, 2, 3),), dynamic={0: 0}),
        Sample((_draw(device, dtype, 4), "kl", 0.5)),
        Sample((_draw(device, dtype, 1, 4), "l2", 0.3), {"mask": mask}),
        Sample((_draw(device, dtype, 2, 3), "kl"), {"lengths": lengths}),
        Sample((_draw(device, dtype, 6), "kl", 0.5), {"cu_lengths": torch.tensor([1, 3, 3, 6], device=device)}),
        Sample((_draw(device, dtype, 2, 0),)),
    ]


def _spearman_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    kl: dict[str, Any] = {"regularization": "kl", "regularization_strength": 0.5}
    return [*list_samples(device, dtype), list_samples(device, dtype, **kl)[0]]


def _bad_calls() -> list[BadCall]:
    x, two = torch.ones(2, 3), torch.tensor([1, 2])
    return [
        BadCall(([1.0],), "values: expected a tensor, got list"),
        BadCall((x.int(),), "values: expected one of float16"),
        BadCall((x[0, 0],), r"values: expected \[..., n\], got a single number"),
        BadCall((x, "l1"), "regularization: expected one of 'l2', 'kl', got 'l1'"),
        BadCall((x, "l2", 0), "regularization_strength: expected a positive number, got 0"),
        BadCall((x,), "mask: expected one of bool", {"mask": x}),
        BadCall((x,), r"mask: expected shape \[2, 3\], got \[3\]", {"mask": x[0] > 0}),
        BadCall((x,), r"lengths: expected shape \[2\], got \[1\]", {"lengths": two[:1]}),
        BadCall((x,), "lengths, cu_lengths: expected at most one", {"lengths": two, "cu_lengths": two}),
        BadCall((x,), r"cu_lengths: expected \[L \+ 1\]", {"cu_lengths": two[None]}),
    ]


_NOT_FUZZED = {
    "NaN": "they have no place in the order",
    "infinite": "inf - inf",
}


register(
    OpInfo(
        name="soft_rank",
        summary="Differentiable ranks, by projection onto the permutahedron",
        function=soft_rank,
        reference=_soft_reference(sort=False),
        not_fuzzed=_NOT_FUZZED,
        samples=_samples,
        bad_calls=_bad_calls,
    )
)

register(
    OpInfo(
        name="soft_sort",
        summary="Differentiable sorting, by projection onto the permutahedron",
        function=soft_sort,
        reference=_soft_reference(sort=True),
        not_fuzzed=_NOT_FUZZED,
        samples=_samples,
        bad_calls=_bad_calls,
    )
)

register(
    OpInfo(
        name="spearman_loss",
        summary="1 - Spearman's rank correlation, with soft ranks",
        function=spearman_loss,
        reference=spearman_loss_reference,
        not_fuzzed={**_NOT_FUZZED, "tiny": "in float32 ranks that hardly differ lose their differences"},
        samples=_spearman_samples,
        modules=lambda: [
            (SpearmanLoss(), {}),
            (
                SpearmanLoss("sum", "kl", 0.5),
                {"reduction": "sum", "regularization": "kl", "regularization_strength": 0.5},
            ),
        ],
        bad_calls=lambda: [
            *list_bad_calls(),
            BadCall((torch.ones(2), torch.ones(2)), "regularization: expected one of", {"regularization": "l1"}),
            BadCall(
                (torch.ones(2), torch.ones(2)),
                "regularization_strength: expected a positive number, got 0",
                {"regularization_strength": 0},
            ),
        ],
    )
)
