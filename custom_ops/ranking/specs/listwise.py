"""The specs of `custom_ops.ranking.listwise`: references, samples and wrong calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from custom_ops.ranking._arguments import ListLossModule
from custom_ops.ranking._gains import relative_gains
from custom_ops.ranking.listwise import (
    CoSENTLoss,
    ListMLELoss,
    ListNetLoss,
    SoftmaxLoss,
    UniqueSoftmaxLoss,
    cosent_loss,
    list_mle_loss,
    list_net_loss,
    softmax_loss,
    unique_softmax_loss,
)
from custom_ops.ranking.specs._lists import list_bad_calls, list_samples, reference_of, rounded_off
from custom_ops.registry import BadCall, OpInfo, register


def _contributes(y: Tensor) -> Tensor:
    return (y != y[0]).any()


def _list_net_of_one_list(s: Tensor, y: Tensor, w: Tensor | None = None) -> tuple[Tensor, Tensor]:
    target = y.softmax(0) if w is None else w * y.softmax(0) / (w * y.softmax(0)).sum()
    return -(target * s.log_softmax(0)).sum(), _contributes(y if w is None else y + w.log())


def _softmax_terms(s: Tensor, y: Tensor) -> Tensor:
    return -torch.where(y == 0, 0, y * s.log_softmax(0))


def _softmax_of_one_list(s: Tensor, y: Tensor, w: Tensor | None = None) -> tuple[Tensor, Tensor]:
    y = y if w is None else y * w
    return _softmax_terms(s, y).sum(), _contributes(y)


def _softmax_size_of_one_list(s: Tensor, y: Tensor, w: Tensor | None = None) -> tuple[Tensor, Tensor]:
    y = y if w is None else y * w
    return _softmax_terms(s, y).abs().sum(), _contributes(y)


def _logsumexp_among(s: Tensor, among: Tensor) -> Tensor:
    """Return logsumexp of s over the items ``among`` in each row, minus the row's own s; a row must have one item.

    It isn't torch's logsumexp, whose derivative loses the terms that equal large numbers add, and it subtracts only
    similar scores from each other.
    """
    top = torch.where(among, s.detach(), -torch.inf).amax(-1, keepdim=True)
    below = torch.where(among & (s.detach() != top), s - top, s - s.detach())
    rest = torch.where(among, below, -torch.inf).exp().sum(-1).log()
    apart = top.squeeze(-1) - s
    return rest + apart


def _list_mle_of_one_list(
    s: Tensor,
    y: Tensor,
    k: int | None = None,
    position_weights: str = "uniform",
    ties: str = "index",
    w: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    n = len(s)
    of_items = torch.ones_like(s) if w is None else w
    place = torch.arange(1, n + 1, device=s.device).to(s.dtype)
    if position_weights == "exponential":
        w = (2 ** (n - place) - 1) / max(2.0 ** (n - 1) - 1, 1)
    else:
        w = torch.ones_like(place) if position_weights == "uniform" else 1 / (1 + place).log2()
    w = w * (place <= (k or n))
    if ties == "score":
        order = s.detach().sort(descending=True, stable=True).indices
        s, y, of_items = s[order], y[order], of_items[order]
    order = y.sort(descending=True, stable=True).indices
    s, y, of_items = s[order], y[order], of_items[order]
    if ties == "breslow":
        same = (y == y.unsqueeze(-1)).to(s.dtype)
        w = (same @ w) / same.sum(-1)
        among = y <= y.unsqueeze(-1)
    else:
        among = place >= place.unsqueeze(-1)
    w = w * of_items
    return torch.where(w == 0, 0, w * _logsumexp_among(s, among)).sum(), _contributes(y)


def _unique_softmax_of_one_list(
    s: Tensor, y: Tensor, gain: str = "exponential", w: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    g = relative_gains(y, y.max(), gain)
    among = y < y.unsqueeze(-1)
    some = among.any(-1)
    lower = _logsumexp_among(s, among | ~some.unsqueeze(-1))
    of_items = g if w is None else g * w
    terms = torch.where(some & (of_items > 0), of_items * -torch.nn.functional.logsigmoid(-lower), 0)
    most = g.max()
    return terms.sum() / torch.where(most > 0, most, 1), _contributes(y) & (most > 0)


def _cosent_of_one_list(s: Tensor, y: Tensor, scale: float = 20.0, w: Tensor | None = None) -> tuple[Tensor, Tensor]:
    weights = torch.ones_like(s.unsqueeze(-1) - s) if w is None else w.unsqueeze(-1) * w
    lower, fixed = (y.unsqueeze(-1) > y) & (weights != 0), s.detach()
    high = s - s.unsqueeze(-1)
    low = rounded_off(fixed, fixed.unsqueeze(-1))
    first = torch.where(lower, high.detach(), 0).amax()
    # `then` is the largest rounding error among the differences that round to the largest.
    then = torch.where(lower & (high == first), low, -torch.inf).amax()
    then = torch.where(then.isfinite(), then, 0)
    terms = (weights * torch.where(lower, scale * ((high - first) + (low - then)), -torch.inf).exp()).sum()
    return scale * first + (terms + (-scale * first).exp()).log(), lower.any()


def _listwise(
    function: Callable[..., Tensor],
    module: type[ListLossModule],
    one_list: Callable[..., tuple[Tensor, Tensor]],
    summary: str,
    *owns: dict[str, Any],
    base: dict[str, Any] | None = None,
    bad: tuple[tuple[str, Any], ...] = (),
    size_of_one_list: Callable[..., tuple[Tensor, Tensor]] | None = None,
    weightless_labels: bool = True,
    not_fuzzed: dict[str, str] | None = None,
    variants: tuple[OpInfo, ...] = (),
) -> OpInfo:
    """Register a loss; each of ``owns`` has a sample's own arguments, and ``base`` those of the common samples.

    The first of ``owns`` also makes the module. ``bad`` has messages with values of the arguments that they name.
    """
    x = torch.ones(2)
    base, own = base or {}, owns[0] if owns else {}
    return OpInfo(
        name=function.__name__,
        summary=summary,
        function=function,
        reference=reference_of(one_list, weightless_labels),
        term_size=None if size_of_one_list is None else reference_of(size_of_one_list, weightless_labels),
        not_fuzzed={"infinite": "inf - inf", **(not_fuzzed or {})},
        samples=lambda device, dtype: [
            *list_samples(device, dtype, **base),
            *(list_samples(device, dtype, **own)[0] for own in owns),
        ],
        modules=lambda: [(module(), {}), (module("sum", **own), {"reduction": "sum", **own})],
        bad_calls=lambda: [
            *list_bad_calls(),
            *(BadCall((x, x), message, {message.split(":")[0]: value}) for message, value in bad),
        ],
        variants=variants,
    )


_list_net = _listwise(
    list_net_loss, ListNetLoss, _list_net_of_one_list, "Cross entropy of the softmax of scores and labels"
)

register(
    _listwise(
        softmax_loss,
        SoftmaxLoss,
        _softmax_of_one_list,
        "Softmax cross entropy weighted with the labels",
        size_of_one_list=_softmax_size_of_one_list,
        weightless_labels=False,
        not_fuzzed={"time stamps": "as weights they cancel"},
        variants=(_list_net,),
    )
)

register(
    _listwise(
        list_mle_loss,
        ListMLELoss,
        _list_mle_of_one_list,
        "Plackett-Luce likelihood of the ranking by labels",
        {"k": 2, "position_weights": "discount", "ties": "breslow"},
        {"position_weights": "exponential", "ties": "score"},
        bad=(
            ("k: expected an integer or None, got float", 1.0),
            ("k: expected at least 1, got 0", 0),
            ("position_weights: expected one of 'uniform', 'exponential', 'discount', got 'x'", "x"),
            ("ties: expected one of 'index', 'score', 'breslow', got 'x'", "x"),
        ),
    )
)

register(
    _listwise(
        unique_softmax_loss,
        UniqueSoftmaxLoss,
        _unique_softmax_of_one_list,
        "Softmax of each item against those of lower label",
        {"gain": "linear"},
        bad=(("gain: expected one of 'exponential', 'linear', got 'log'", "log"),),
    )
)

register(
    _listwise(
        cosent_loss,
        CoSENTLoss,
        _cosent_of_one_list,
        "Smooth maximum over all misordered pairs",
        {"scale": 5.0},
        base={"scale": 2.0},
        weightless_labels=False,
        bad=(("scale: expected a positive number, got 0", 0),),
    )
)
