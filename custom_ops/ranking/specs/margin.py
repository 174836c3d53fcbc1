"""Evidence for `custom_ops.ranking.margin`: references, samples and wrong calls."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.ranking.margin import MarginRanking, MarginRankingLoss, margin_ranking_loss
from custom_ops.registry import BadCall, OpInfo, Sample, register


def margin_ranking_loss_reference(
    input1: Tensor, input2: Tensor, target: Tensor, margin: float = 0.0, reduction: str = "mean"
) -> Tensor:
    loss = (-target * (input1 - input2) + margin).clamp_min(0)
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    margin = 0.5

    def away_from_the_kink(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
        while True:
            draws = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
            hinge = -draws[2] * (draws[0] - draws[1]) + margin
            if (hinge.abs() > 0.05).all():
                return tuple(t.to(device, dtype).requires_grad_() for t in draws)

    scores = away_from_the_kink((3, 4), (3, 4), (3, 4))
    signs = (scores[0].detach(), scores[1], scores[2].detach().sign())
    return [
        Sample((*scores, margin, "mean"), dynamic={0: 0, 1: 0, 2: 0}),
        Sample((*scores, margin, "sum")),
        Sample((*scores, margin, "none")),
        Sample((*signs, margin)),
        Sample((*away_from_the_kink((3, 1), (4,), ()), margin)),
        Sample((*away_from_the_kink((0, 2), (0, 2), (0, 2)), margin, "sum")),
    ]


_two, _three = torch.ones(2), torch.ones(3)

register(
    OpInfo(
        name="margin_ranking_loss",
        not_fuzzed=dict.fromkeys(("fills", "outliers"), "their products and sums are beyond float32"),
        summary="Margin ranking loss, fused",
        function=margin_ranking_loss,
        reference=margin_ranking_loss_reference,
        apply=MarginRanking.apply,
        samples=_samples,
        modules=lambda: [
            (MarginRankingLoss(), {}),
            (MarginRankingLoss(0.5, "sum"), {"margin": 0.5, "reduction": "sum"}),
        ],
        bad_calls=lambda: [
            BadCall((1.0, _two, _two), "input1: expected a tensor, got float"),
            BadCall((_two, _two.int(), _two), "input2: expected one of float16"),
            BadCall((_two, _two, _two > 0), "target: expected real numbers, got bool"),
            BadCall((_two, _two, _two.to("meta")), "target: expected on cpu as input1, got meta"),
            BadCall((_two, _three, _two), r"input1, input2, target: expected shapes that broadcast, got \[2\]"),
            BadCall((_two, _two, _two, "1"), "margin: expected a number, got str"),
            BadCall((_two, _two, _two, True), "margin: expected a number, got bool"),
            BadCall((_two, _two, _two, 0.0, "avg"), "reduction: expected one of 'none', 'mean', 'sum', got 'avg'"),
        ],
    )
)
