"""The specs of `custom_ops.ranking.preference`: references, samples and wrong calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from custom_ops.ranking.preference import BPRLoss, BradleyTerryLoss, DPOLoss, bpr_loss, bradley_terry_loss, dpo_loss
from custom_ops.ranking.specs._lists import rounded_off
from custom_ops.registry import BadCall, OpInfo, Sample, register


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    return loss if reduction == "none" else loss.sum() / (max(loss.numel(), 1) if reduction == "mean" else 1)


def bpr_loss_reference(
    positive: Tensor, negative: Tensor, reduction: str = "mean", *, mask: Tensor | None = None
) -> Tensor:
    loss = -torch.nn.functional.logsigmoid(positive - negative)
    if mask is None:
        return _reduced(loss, reduction)
    loss = torch.where(mask, loss, 0)
    return (
        _reduced(loss, "sum") / mask.expand(loss.shape).sum().clamp(min=1)
        if reduction == "mean"
        else _reduced(loss, reduction)
    )


def bradley_terry_loss_reference(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | float = 0.0,
    *,
    beta: float = 1.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    lead = torch.as_tensor(margin, dtype=chosen.dtype, device=chosen.device)
    return _reduced(_smoothed(beta * _sum(chosen, -rejected, -lead), label_smoothing), reduction)


def _sum(*terms: Tensor) -> Tensor:
    """Return the sum of the terms, without losing the small ones where large ones cancel."""
    total, rest = terms[0], terms[0].new_zeros(())
    for term in terms[1:]:
        rest = rest + rounded_off(total.detach(), -term.detach())
        total = total + term
    return total + rest


def _smoothed(z: Tensor, e: float) -> Tensor:
    log_sigmoid = torch.nn.functional.logsigmoid
    return -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z)


def dpo_loss_reference(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: float | Tensor = 0.1,
    loss_type: str | Sequence[str] = "sigmoid",
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    loss_weights: Sequence[float] | None = None,
    discopop_tau: float = 0.05,
) -> Tensor:
    references = (
        () if ref_chosen_logps is None or ref_rejected_logps is None else (-ref_chosen_logps, ref_rejected_logps)
    )
    d = _sum(chosen_logps, -rejected_logps, *references)
    c, r = _sum(chosen_logps, *references[:1]), _sum(rejected_logps, *(-x for x in references[1:]))
    e, z = label_smoothing, beta * d
    log_sigmoid = torch.nn.functional.logsigmoid
    losses = {
        "sigmoid": lambda: _smoothed(z, e),
        "robust": lambda: (_smoothed(z, 0.0) * (1 - e) - _smoothed(-z, 0.0) * e) / (1 - 2 * e),
        "hinge": lambda: torch.relu(1 - z),
        "ipo": lambda: (d - 1 / (2 * beta)) ** 2,
        "exo_pair": lambda: (
            z.sigmoid() * (log_sigmoid(z) - math.log1p(-e)) + (-z).sigmoid() * (log_sigmoid(-z) - math.log(e))
        ),
        "nca_pair": lambda: -log_sigmoid(beta * c) - log_sigmoid(-beta * c) / 2 - log_sigmoid(-beta * r) / 2,
        "bco_pair": lambda: -log_sigmoid(beta * c) - log_sigmoid(-beta * r),
        "apo_zero": lambda: 1 - (beta * c).sigmoid() + (beta * r).sigmoid(),
        "apo_down": lambda: (beta * c).sigmoid() + 1 - z.sigmoid(),
        "sppo_hard": lambda: (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2,
        "discopop": lambda: _blended(z, 1 / discopop_tau),
    }
    types = [loss_type] if isinstance(loss_type, str) else loss_type
    weights = loss_weights or [1.0] * len(types)
    return sum(
        (weight * _reduced(losses[one]() + 0 * d, reduction) for one, weight in zip(types, weights)), d.new_zeros(())
    )


def _dpo_size(
    *logps: Tensor,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    """Return the loss with the absolute value of each term."""
    types = [loss_type] if isinstance(loss_type, str) else loss_type
    weights = loss_weights or [1.0] * len(types)
    each = [dpo_loss_reference(*logps, loss_type=one, reduction="none", **options).abs() for one in types]
    return torch.stack([abs(weight) * _reduced(x, reduction) for weight, x in zip(weights, each)]).sum(0)


def _blended(z: Tensor, p: float) -> Tensor:
    low = torch.where(z < 0, z, 0)  # unlike clamp, it has no derivative at 0
    exponential = torch.where(z < 0, (p * low - low).exp() * (-p * z).sigmoid(), (low - z).exp() * (p * z).sigmoid())
    return (-p * z).sigmoid() * -torch.nn.functional.logsigmoid(z) + exponential


class _Draw:
    """A source of leaves with fresh random values."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
        draws = (torch.randn(shape, generator=self.generator, dtype=torch.float64) for shape in shapes)
        return tuple(x.to(self.device, self.dtype).requires_grad_() for x in draws)


def _bpr_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    draw = _Draw(device, dtype)
    return [
        Sample(draw((3, 4), (3, 4)), dynamic={0: 0, 1: 0}),
        Sample((*draw((5,), (5,)), "sum")),
        Sample((*draw((2, 1), (2, 3)), "none")),
        Sample(draw((2, 1), (2, 3)), {"mask": torch.tensor([[True, False, True], [True, True, False]], device=device)}),
        Sample((*draw((0, 2), (0, 2)), "mean")),
    ]


def _bradley_terry_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    draw = _Draw(device, dtype)
    return [
        Sample(draw((3, 2), (3, 2), (3, 2)), {"beta": 0.5, "label_smoothing": 0.1}, dynamic={0: 0, 1: 0, 2: 0}),
        Sample((*draw((4,), (4,)), 0.3), {"beta": 2.0, "reduction": "sum"}),
        Sample(draw((4,), (1,)), {"reduction": "none"}),
        Sample(draw((0,), (0,), (0,))),
    ]


def _dpo_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    draw = _Draw(device, dtype)
    shapes = ((3,),) * 4

    def away_from_the_kink() -> tuple[Tensor, ...]:
        while True:
            tensors = draw(*shapes)
            c, r, oc, orr = (t.detach().double() for t in tensors)
            if ((1 - ((c - oc) - (r - orr))).abs() > 0.1).all():
                return tensors

    return [
        Sample(draw(*shapes), {"beta": 0.5}, dynamic=dict.fromkeys(range(4), 0)),
        Sample(draw(*shapes), {"beta": 0.7, "loss_type": "robust", "label_smoothing": 0.2}),
        Sample(away_from_the_kink(), {"beta": 1.0, "loss_type": "hinge", "reduction": "sum"}),
        Sample(draw(*shapes), {"beta": 0.4, "loss_type": "ipo", "reduction": "none"}),
        Sample(draw(*shapes), {"beta": 0.8, "loss_type": "exo_pair", "label_smoothing": 0.1}),
        Sample(draw(*shapes), {"beta": 0.6, "loss_type": "apo_down", "reduction": "none"}),
        Sample(
            (*draw(*shapes[:2]), *draw((1,), (1,))),
            {"beta": 0.9, "loss_type": ["nca_pair", "apo_zero", "sppo_hard"], "loss_weights": [1.0, 0.5, 0.25]},
        ),
        Sample(draw(*shapes), {"beta": torch.tensor([0.5, 1.0, 2.0], device=device, dtype=dtype)}),
        Sample(draw(*shapes), {"beta": 0.5, "loss_type": "discopop", "discopop_tau": 0.5, "reduction": "none"}),
        Sample(draw((2, 2), (2, 2)), {"label_smoothing": 0.3}),
        Sample(draw((0,), (0,))),
    ]


_two, _three = torch.ones(2), torch.ones(3)


_bpr_loss = OpInfo(
    name="bpr_loss",
    summary="Bayesian personalised ranking, exact at any difference",
    function=bpr_loss,
    reference=bpr_loss_reference,
    samples=_bpr_samples,
    modules=lambda: [(BPRLoss(), {}), (BPRLoss("sum"), {"reduction": "sum"})],
    bad_calls=lambda: [
        BadCall((1.0, _two), "positive: expected a tensor, got float"),
        BadCall((_two, _two.int()), "negative: expected one of float16"),
        BadCall((_two, _three), r"positive, negative: expected shapes that broadcast, got \[2\], \[3\]"),
        BadCall((_two, _two.to("meta")), "negative: expected on cpu as positive, got meta"),
        BadCall((_two, _two, "avg"), "reduction: expected one of 'none', 'mean', 'sum', got 'avg'"),
        BadCall((_two, _two), "mask: expected one of bool", {"mask": _two}),
    ],
)

register(
    OpInfo(
        name="bradley_terry_loss",
        summary="Bradley-Terry loss of a reward model, with margin and label smoothing",
        function=bradley_terry_loss,
        not_fuzzed={"infinite": "inf - inf"},
        reference=bradley_terry_loss_reference,
        samples=_bradley_terry_samples,
        modules=lambda: [
            (BradleyTerryLoss(), {}),
            (BradleyTerryLoss(0.5, 0.1, "sum"), {"beta": 0.5, "label_smoothing": 0.1, "reduction": "sum"}),
        ],
        bad_calls=lambda: [
            BadCall((_two, 1.0), "rejected: expected a tensor, got float"),
            BadCall((_two, _two, _two.int()), "margin: expected one of float16"),
            BadCall((_two, _two, "1"), "margin: expected a number, got str"),
            BadCall((_two, _two, _three), "chosen, rejected, margin: expected shapes that broadcast"),
            BadCall((_two, _two), "beta: expected a positive number, got 0", {"beta": 0}),
            BadCall((_two, _two), "label_smoothing: expected at least 0 and less than 1", {"label_smoothing": 1.0}),
            BadCall((_two, _two), "reduction: expected one of", {"reduction": "avg"}),
        ],
        variants=(_bpr_loss,),
    )
)

register(
    OpInfo(
        name="dpo_loss",
        summary="Direct preference optimisation: eleven losses of TRL, by name",
        function=dpo_loss,
        not_fuzzed={"infinite": "inf - inf"},
        reference=dpo_loss_reference,
        term_size=_dpo_size,
        samples=_dpo_samples,
        modules=lambda: [
            (DPOLoss(), {}),
            (DPOLoss(0.3, "robust", 0.1, "sum"), _dpo_options("robust", 0.1, "sum")),
            (DPOLoss(0.3, "ipo"), _dpo_options("ipo", 0.0, "mean")),
        ],
        bad_calls=lambda: [
            BadCall((_two, _two.int()), "rejected_logps: expected one of float16"),
            BadCall((_two, _two, _two), "ref_chosen_logps, ref_rejected_logps: expected both or neither"),
            BadCall((_two, _two, _two, 1.0), "ref_rejected_logps: expected a tensor, got float"),
            BadCall((_two, _two, _three, _two), r"expected shapes that broadcast, got \[2\], \[2\], \[3\], \[2\]"),
            BadCall((_two, _two), "beta: expected a number, got str", {"beta": "1"}),
            BadCall((_two, _two), "loss_type: expected one of 'sigmoid', .* got 'kto'", {"loss_type": "kto"}),
            BadCall((_two, _two), "label_smoothing: .* less than 0.5", {"loss_type": "robust", "label_smoothing": 0.5}),
            BadCall((_two, _two), "label_smoothing: expected 0, 'ipo'", {"loss_type": "ipo", "label_smoothing": 0.1}),
            BadCall((_two, _two), "label_smoothing: expected more than 0", {"loss_type": "exo_pair"}),
            BadCall((_two, _two), "discopop_tau: expected at most 1, got 2", {"discopop_tau": 2.0}),
            BadCall((_two, _two), "loss_type: expected at least one type, got none", {"loss_type": []}),
            BadCall((_two, _two), "loss_weights: expected one for each of 1 types, got 2", {"loss_weights": [1, 2]}),
            BadCall(
                (_two, _two), "beta: expected a number for 'ipo', got a tensor", {"loss_type": "ipo", "beta": _two}
            ),
            BadCall((_two, _two), "beta: expected one of float16", {"beta": torch.ones(2, dtype=torch.int64)}),
            BadCall((_two, _two), "reduction: expected one of", {"reduction": "avg"}),
        ],
    )
)


def _dpo_options(loss_type: str, label_smoothing: float, reduction: str) -> dict[str, Any]:
    return {"beta": 0.3, "loss_type": loss_type, "label_smoothing": label_smoothing, "reduction": reduction}
