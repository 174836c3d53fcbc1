"""The specs of `custom_ops.ranking.neural_sort`: references, samples and wrong calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops.ranking._gains import relative_gains
from custom_ops.ranking.neural_sort import NeuralSortNDCGLoss, neural_sort_ndcg_loss
from custom_ops.ranking.specs._lists import list_bad_calls, list_samples, reference_of
from custom_ops.registry import BadCall, OpInfo, register


def neural_sort_matrix(s: Tensor, temperature: float) -> Tensor:
    """Return NeuralSort's relaxed permutation matrix of scores [..., n]; row i selects the item of rank i."""
    n = s.shape[-1]
    distances = (s.unsqueeze(-1) - s.unsqueeze(-2)).abs().sum(-1)
    slopes = torch.arange(n - 1, -n, -2, device=s.device).to(s.dtype)
    return ((slopes.unsqueeze(-1) * s.unsqueeze(-2) - distances.unsqueeze(-2)) / temperature).softmax(-1)


def _nearer(s: Tensor, gap: float) -> Tensor:
    """Return scores with the same differences up to ``gap``, in which no neighbours are farther apart than ``gap``."""
    ordered, order = s.detach().sort(stable=True)
    steps = torch.where(ordered[1:] == ordered[:-1], 0, ordered.diff())
    begins = torch.nn.functional.pad(steps > gap, (1, 0), value=True)
    # `first` is the first item of each run without a larger gap.
    first = torch.where(begins, torch.arange(len(s), device=s.device), 0).cummax(0).values
    moved = torch.nn.functional.pad(steps.clamp(max=gap), (1, 0)).cumsum(0)
    from_first = s - ordered.gather(0, first.gather(0, order.argsort()))
    return torch.where(s.isinf(), 0, from_first) + moved.gather(0, first).gather(0, order.argsort())


def _neural_sort_ndcg_of_one_list(
    s: Tensor,
    y: Tensor,
    k: int | None = None,
    temperature: float = 1.0,
    gain: str = "exponential",
    w: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    g = relative_gains(y, y.max(), gain)
    y, g = (y, g) if w is None else (w * g, w * g)
    discounts = 1 / (torch.arange(len(y), device=y.device) + 2).to(y.dtype).log2()
    discounts = discounts * (torch.arange(len(y), device=y.device) < (k or len(y)))
    ideal = (g.sort(descending=True).values * discounts).sum()
    found = (neural_sort_matrix(_nearer(s, 800 * temperature), temperature) @ g * discounts).sum()
    gaining = y.clamp_min(0)
    undefined = (s.isinf().unsqueeze(-1) & (s == s.unsqueeze(-1)) & (gaining != gaining.unsqueeze(-1))).any()
    found = torch.where(undefined, torch.nan, found)
    return 1 - found / torch.where(ideal > 0, ideal, 1), (y > 0).any() & (y != y[0]).any()


_options: dict[str, Any] = {"k": 2, "temperature": 0.5, "gain": "linear"}

_x = torch.ones(2)

register(
    OpInfo(
        name="neural_sort_ndcg_loss",
        not_fuzzed={"time stamps": "as weights they cancel"},
        summary="NDCG of a list sorted softly by NeuralSort",
        function=neural_sort_ndcg_loss,
        reference=reference_of(_neural_sort_ndcg_of_one_list, weightless_labels=False),
        samples=lambda device, dtype: [*list_samples(device, dtype), *list_samples(device, dtype, **_options)[:2]],
        modules=lambda: [
            (NeuralSortNDCGLoss(), {}),
            (NeuralSortNDCGLoss("sum", **_options), {"reduction": "sum", **_options}),
        ],
        bad_calls=lambda: [
            *list_bad_calls(),
            BadCall((_x, _x), "k: expected an integer or None, got float", {"k": 1.0}),
            BadCall((_x, _x), "k: expected at least 1, got 0", {"k": 0}),
            BadCall((_x, _x), "temperature: expected a number, got str", {"temperature": "1"}),
            BadCall((_x, _x), "temperature: expected a positive number, got 0", {"temperature": 0}),
            BadCall((_x, _x), "gain: expected one of 'exponential', 'linear', got 'log'", {"gain": "log"}),
        ],
    )
)
