"""The specs of `custom_ops.ranking.smooth_rank`: references, samples and wrong calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from custom_ops.ranking._arguments import ListLossModule
from custom_ops.ranking._gains import relative_gains
from custom_ops.ranking.smooth_rank import (
    ApproxMRRLoss,
    ApproxNDCGLoss,
    SmoothAPLoss,
    approx_mrr_loss,
    approx_ndcg_loss,
    smooth_ap_loss,
)
from custom_ops.ranking.specs._lists import list_bad_calls, list_samples, reference_of
from custom_ops.registry import BadCall, OpInfo, register


def _smooth_ranks(s: Tensor, y: Tensor, among: Tensor, temperature: float) -> Tensor:
    """Return the smooth rank of each relevant item, counted among the items ``among``."""
    others = (y > 0).unsqueeze(-1) & ~torch.eye(len(s), dtype=torch.bool, device=s.device)
    apart = torch.where(others, s - s.unsqueeze(-1), 0)
    return 1 + (torch.sigmoid(apart / temperature) * (others & among)).sum(-1)


def _contributes(y: Tensor) -> Tensor:
    return (y > 0).any() & (y != y[0]).any()


def _approx_ndcg_of_one_list(
    s: Tensor, y: Tensor, temperature: float = 0.1, gain: str = "exponential", w: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    g = relative_gains(y, y.max(), gain)
    y, g = (y, g) if w is None else (w * g, w * g)
    discounts = (torch.arange(len(y), device=y.device) + 2).to(y.dtype).log2()
    ideal = (g.sort(descending=True).values / discounts).sum()
    found = (g / (1 + _smooth_ranks(s, y, y == y, temperature)).log2()).sum()
    return 1 - found / torch.where(ideal > 0, ideal, 1), _contributes(y)


def _approx_mrr_of_one_list(
    s: Tensor, y: Tensor, temperature: float = 0.1, w: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    y = y if w is None else y * w
    g = relative_gains(y, y.max(), "linear")
    found = (g / _smooth_ranks(s, y, y == y, temperature)).sum()
    return 1 - found / torch.where(_contributes(y), g.sum(), 1), _contributes(y)


def _smooth_ap_of_one_list(
    s: Tensor, y: Tensor, temperature: float = 0.01, w: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    y = y if w is None else torch.where(y > 0, w, 0)
    all_ranks, ranks = (_smooth_ranks(s, y, among, temperature) for among in (y == y, y > 0))
    relevant = (y > 0).to(s.dtype)  # only this counts, so a list of relevant items only has nothing to rank
    gain = relevant if w is None else y
    total = torch.where(gain.sum() > 0, gain.sum(), 1)
    return 1 - (gain * ranks / all_ranks).sum() / total, _contributes(relevant)


def _bad_calls() -> list[BadCall]:
    x, y = torch.ones(2), torch.ones(2)
    return [
        *list_bad_calls(),
        BadCall((x, y), "temperature: expected a number, got str", {"temperature": "1"}),
        BadCall((x, y), "temperature: expected a positive number, got 0", {"temperature": 0}),
        BadCall((x, y), "temperature: expected a positive number, got nan", {"temperature": float("nan")}),
    ]


def _at_smooth_ranks(
    function: Callable[..., Tensor],
    module: type[ListLossModule],
    one_list: Callable[..., tuple[Tensor, Tensor]],
    summary: str,
    *variants: OpInfo,
    bad_calls: Sequence[BadCall] = (),
    not_fuzzed: dict[str, str] | None = None,
    **own: Any,
) -> OpInfo:
    return OpInfo(
        name=function.__name__,
        summary=summary,
        function=function,
        reference=reference_of(one_list, weightless_labels=False),
        samples=lambda device, dtype: [
            *list_samples(device, dtype, temperature=0.5),
            *list_samples(device, dtype, **own)[:1],
        ],
        modules=lambda: [(module(), {}), (module("sum", **own), {"reduction": "sum", **own})],
        bad_calls=lambda: [*_bad_calls(), *bad_calls],
        not_fuzzed=not_fuzzed or {},
        variants=variants,
    )


_AS_WEIGHTS = {"time stamps": "as weights they cancel"}

_approx_mrr = _at_smooth_ranks(
    approx_mrr_loss,
    ApproxMRRLoss,
    _approx_mrr_of_one_list,
    "Reciprocal rank at smooth ranks",
    not_fuzzed=_AS_WEIGHTS,
    temperature=1.0,
)

_smooth_ap = _at_smooth_ranks(
    smooth_ap_loss, SmoothAPLoss, _smooth_ap_of_one_list, "Average precision at smooth ranks", temperature=1.0
)

register(
    _at_smooth_ranks(
        approx_ndcg_loss,
        ApproxNDCGLoss,
        _approx_ndcg_of_one_list,
        "NDCG at smooth ranks",
        _approx_mrr,
        _smooth_ap,
        bad_calls=[
            BadCall((torch.ones(2), torch.ones(2)), "gain: expected one of 'exponential', 'linear'", {"gain": "log"})
        ],
        not_fuzzed=_AS_WEIGHTS,
        temperature=1.0,
        gain="linear",
    )
)
