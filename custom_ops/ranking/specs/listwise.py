"""Evidence for `custom_ops.ranking.listwise`: references, samples and wrong calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from custom_ops.ranking._lists import ListLossModule, relative_gains
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
from custom_ops.ranking.specs._lists import list_bad_calls, list_samples, reference_of
from custom_ops.registry import BadCall, OpInfo, register


def _contributes(y: Tensor) -> Tensor:
    return (y != y[0]).any()


def _list_net_of_one_list(s: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return -(y.softmax(0) * s.log_softmax(0)).sum(), _contributes(y)


def _softmax_of_one_list(s: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return -torch.where(y == 0, 0, y * s.log_softmax(0)).sum(), _contributes(y)


def _logsumexp_among(s: Tensor, among: Tensor) -> Tensor:
    """logsumexp of s over the items of each row that are ``among``, less the row's own s; a row must have one.

    Not torch's, whose derivative loses what equal large numbers add; and only of differences of similar scores.
    """
    top = torch.where(among, s.detach(), -torch.inf).amax(-1, keepdim=True)
    below = torch.where(among & (s.detach() != top), s - top, s - s.detach())
    rest = torch.where(among, below, -torch.inf).exp().sum(-1).log()
    apart = top.squeeze(-1) - s
    return rest + apart


def _list_mle_of_one_list(
    s: Tensor, y: Tensor, k: int | None = None, position_weights: str = "uniform", ties: str = "index"
) -> tuple[Tensor, Tensor]:
    n = len(s)
    place = torch.arange(1, n + 1, device=s.device).to(s.dtype)
    if position_weights == "exponential":
        w = (2 ** (n - place) - 1) / max(2.0 ** (n - 1) - 1, 1)
    else:
        w = torch.ones_like(place) if position_weights == "uniform" else 1 / (1 + place).log2()
    w = w * (place <= (k or n))
    if ties == "score":
        order = s.detach().sort(descending=True, stable=True).indices
        s, y = s[order], y[order]
    order = y.sort(descending=True, stable=True).indices
    s, y = s[order], y[order]
    if ties == "breslow":
        same = (y == y.unsqueeze(-1)).to(s.dtype)
        w = (same @ w) / same.sum(-1)
        among = y <= y.unsqueeze(-1)
    else:
        among = place >= place.unsqueeze(-1)
    return torch.where(w == 0, 0, w * _logsumexp_among(s, among)).sum(), _contributes(y)


def _unique_softmax_of_one_list(s: Tensor, y: Tensor, gain: str = "exponential") -> tuple[Tensor, Tensor]:
    g = relative_gains(y, y.max(), gain)
    among = y < y.unsqueeze(-1)
    some = among.any(-1)
    lower = _logsumexp_among(s, among | ~some.unsqueeze(-1))
    terms = torch.where(some & (g > 0), g * -torch.nn.functional.logsigmoid(-lower), 0)
    most = g.max()
    return terms.sum() / torch.where(most > 0, most, 1), _contributes(y) & (most > 0)


def _cosent_of_one_list(s: Tensor, y: Tensor, scale: float = 20.0) -> tuple[Tensor, Tensor]:
    lower, fixed = y.unsqueeze(-1) > y, s.detach()
    high = s - s.unsqueeze(-1)
    low = _rounded_off(fixed, fixed.unsqueeze(-1))
    first = torch.where(lower, high.detach(), 0).amax()
    # Of those that round to the same largest difference, the largest one.
    then = torch.where(lower & (high == first), low, -torch.inf).amax()
    then = torch.where(then.isfinite(), then, 0)
    terms = torch.where(lower, scale * ((high - first) + (low - then)), -torch.inf).exp().sum()
    return scale * first + (terms + (-scale * first).exp()).log(), _contributes(y)


def _rounded_off(a: Tensor, b: Tensor) -> Tensor:
    """What the rounding of a - b leaves out."""
    difference = a - b
    subtracted = a - difference
    return torch.where(difference.isfinite(), (a - (difference + subtracted)) + (subtracted - b), 0)


def _register(
    function: Callable[..., Tensor],
    module: type[ListLossModule],
    one_list: Callable[..., tuple[Tensor, Tensor]],
    summary: str,
    *owns: dict[str, Any],
    base: dict[str, Any] | None = None,
    bad: tuple[tuple[str, Any], ...] = (),
) -> None:
    """Each of ``owns`` are a sample's own arguments, ``base`` those of the samples common to all losses.

    The first of ``owns`` also makes the module. ``bad``: messages, and values of the argument they name.
    """
    x = torch.ones(2)
    base, own = base or {}, owns[0] if owns else {}
    reference = reference_of(one_list)
    register(
        OpInfo(
            name=function.__name__,
            summary=summary,
            function=function,
            reference=reference,
            not_fuzzed={
                "infinite": "inf - inf",
                **({"time stamps": "as weights they cancel"} if function is softmax_loss else {}),
            },
            samples=lambda device, dtype: [
                *list_samples(device, dtype, **base),
                *(list_samples(device, dtype, **own)[0] for own in owns),
            ],
            modules=lambda: [(module(), {}), (module("sum", **own), {"reduction": "sum", **own})],
            bad_calls=lambda: [
                *list_bad_calls(),
                *(BadCall((x, x), message, {message.split(":")[0]: value}) for message, value in bad),
            ],
        )
    )


_register(
    list_net_loss,
    ListNetLoss,
    _list_net_of_one_list,
    "Cross entropy of the softmax of scores and labels",
)

_register(softmax_loss, SoftmaxLoss, _softmax_of_one_list, "Softmax cross entropy weighted with the labels")

_register(
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

_register(
    unique_softmax_loss,
    UniqueSoftmaxLoss,
    _unique_softmax_of_one_list,
    "Softmax of each item against those of lower label",
    {"gain": "linear"},
    bad=(("gain: expected one of 'exponential', 'linear', got 'log'", "log"),),
)

_register(
    cosent_loss,
    CoSENTLoss,
    _cosent_of_one_list,
    "Smooth maximum over all misordered pairs",
    {"scale": 5.0},
    base={"scale": 2.0},
    bad=(("scale: expected a positive number, got 0", 0),),
)
