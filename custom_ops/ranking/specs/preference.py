"""Evidence for `custom_ops.ranking.preference`: references, samples and wrong calls."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from custom_ops.ranking.preference import BPRLoss, BradleyTerryLoss, DPOLoss, bpr_loss, bradley_terry_loss, dpo_loss
from custom_ops.registry import BadCall, OpInfo, Sample, register


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    return loss if reduction == "none" else loss.sum() / (max(loss.numel(), 1) if reduction == "mean" else 1)


def bpr_loss_reference(positive: Tensor, negative: Tensor, reduction: str = "mean") -> Tensor:
    return _reduced(-torch.nn.functional.logsigmoid(positive - negative), reduction)


def bradley_terry_loss_reference(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | float = 0.0,
    *,
    beta: float = 1.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    return _reduced(_smoothed(beta * (chosen - rejected - margin), label_smoothing), reduction)


def _smoothed(z: Tensor, e: float) -> Tensor:
    log_sigmoid = torch.nn.functional.logsigmoid
    return -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z)


def dpo_loss_reference(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    d = chosen_logps - rejected_logps
    if ref_chosen_logps is not None and ref_rejected_logps is not None:
        d = d - (ref_chosen_logps - ref_rejected_logps)
    e, z = label_smoothing, beta * d
    if loss_type == "sigmoid":
        loss = _smoothed(z, e)
    elif loss_type == "robust":
        loss = (_smoothed(z, 0.0) * (1 - e) - _smoothed(-z, 0.0) * e) / (1 - 2 * e)
    elif loss_type == "hinge":
        loss = torch.relu(1 - z)
    elif loss_type == "ipo":
        loss = (d - 1 / (2 * beta)) ** 2
    else:
        log_sigmoid = torch.nn.functional.logsigmoid
        loss = z.sigmoid() * (log_sigmoid(z) - math.log1p(-e)) + (-z).sigmoid() * (log_sigmoid(-z) - math.log(e))
    return _reduced(loss, reduction)


class _Draw:
    """Tensors to differentiate in, each of other values."""

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
        Sample(draw((2, 2), (2, 2)), {"label_smoothing": 0.3}),
        Sample(draw((0,), (0,))),
    ]


_two, _three = torch.ones(2), torch.ones(3)


register(
    OpInfo(
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
        ],
    )
)

register(
    OpInfo(
        name="bradley_terry_loss",
        summary="Bradley-Terry loss of a reward model, with margin and label smoothing",
        function=bradley_terry_loss,
        not_fuzzed={"infinite": "inf - inf"}
        | dict.fromkeys(("fills", "outliers"), "a margin that cancels the difference leaves its rounding"),
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
    )
)

register(
    OpInfo(
        name="dpo_loss",
        summary="Direct preference optimisation: sigmoid, robust, hinge, IPO, EXO",
        function=dpo_loss,
        not_fuzzed={
            "infinite": "inf - inf",
            "fills": "the order of the three differences matters",
            "outliers": "the order of the three differences matters",
        },
        reference=dpo_loss_reference,
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
            BadCall((_two, _two), "reduction: expected one of", {"reduction": "avg"}),
        ],
    )
)


def _dpo_options(loss_type: str, label_smoothing: float, reduction: str) -> dict[str, Any]:
    return {"beta": 0.3, "loss_type": loss_type, "label_smoothing": label_smoothing, "reduction": reduction}
