"""Two formulas beside each other along one training: on the same weights and the same batch, within a bound.

Two trainings can't be compared so. Training amplifies any rounding, and another processor rounds otherwise: after some
hundred steps two right formulas are as far apart as two wrong ones. What can be compared is what each says of one
state: the loss, and the gradient that the next step would follow.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from examples.report import Check

OPERATIONS = 16  # roundings within a term, and what an exponential or a logarithm adds to them
AMPLIFIED = 100.0
CONFIDENCE = 8.0  # 1 - 2 exp(-8² / 2): one sum in 10^13 is further off


def bound(dtype: torch.dtype, terms: int | Tensor) -> float | Tensor:
    """How far two ways to add up ``terms`` numbers in ``dtype`` may be apart, in units of the sum of their magnitudes.

    Each of the n roundings on the way of a term into the sum changes it by a factor of at most 1 + u, with
    u = eps / 2. If all went in one direction, that would be n u. They go in either, whatever the order of the
    summation, so that the sum of n stays within λ √n u but for a probability of 2 exp(-λ² / 2) (Higham and Mary, "A
    New Approach to Probabilistic Rounding Error Analysis", 2019). Either way rounds, which makes it twice as much.
    """
    return CONFIDENCE * (terms + OPERATIONS) ** 0.5 * torch.finfo(dtype).eps


class Agreement:
    """All comparisons of one claim, and the gap of the worst, in units of its bound."""

    def __init__(self, claim: str) -> None:
        self.claim, self.worst = claim, 0.0

    def compare(self, ours: Tensor, theirs: Tensor, terms: int | Tensor, magnitude: Tensor | None = None) -> None:
        """Two results of ``terms`` terms; the sum of their magnitudes is ``magnitude``, else the result."""
        magnitude = (theirs if magnitude is None else magnitude).detach().double().abs()
        gap = (ours.detach().double() - theirs.detach().double()).abs()
        limit = bound(ours.dtype, terms) * magnitude + torch.finfo(ours.dtype).tiny
        self.worst = float(np.maximum(self.worst, (gap / limit).max().item()))  # a NaN stays

    def compare_networks(
        self, ours: tuple[Tensor, Sequence[Tensor]], theirs: tuple[Tensor, Sequence[Tensor]], terms: int
    ) -> None:
        """Loss and gradients of two forms of one network: all gradients in units of the largest element of any.

        The layers amplify what was rounded before them, which no count of terms knows of: by no more than a factor of
        ``AMPLIFIED``, that is. In float64 there is room for it.
        """
        largest = torch.stack([g.abs().max() for g in theirs[1]]).max()
        self.compare(ours[0], theirs[0], terms, AMPLIFIED * theirs[0])
        for a, b in zip(ours[1], theirs[1]):
            self.compare(a, b, terms, AMPLIFIED * largest)

    def check(self) -> Check:
        return Check(f"{self.claim}: largest gap, in units of its bound", self.worst, 1.0)
