"""A comparison of two formulas along one training: on the same weights and the same batch, within a bound.

Two separate trainings can't be compared. Training amplifies any rounding, and rounding differs between processors:
after some hundred steps two correct formulas are as far apart as two wrong ones. Two formulas can be compared on one
state, in the loss and in the gradient that the next step would follow.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from examples.report import Check

OPERATIONS = 16  # roundings of a term, including the error of an exponential or a logarithm
AMPLIFIED = 100.0
CONFIDENCE = 8.0  # the probability is 1 - 2 exp(-8² / 2), so one sum in 10^13 exceeds the bound


def bound(dtype: torch.dtype, terms: int | Tensor) -> float | Tensor:
    """Bound the difference between two sums of ``terms`` numbers in ``dtype``, in units of the sum of their magnitudes.

    Each of the n roundings that a term undergoes changes it by a factor of at most 1 + u, with u = eps / 2. If all
    errors had the same sign, they would sum up to n u. Their signs vary, whatever the order of the summation, so the
    error of the sum stays within λ √n u except with a probability of 2 exp(-λ² / 2) (Higham and Mary, "A New Approach
    to Probabilistic Rounding Error Analysis", 2019). Both sums round, which doubles the bound.
    """
    return CONFIDENCE * (terms + OPERATIONS) ** 0.5 * torch.finfo(dtype).eps


class Agreement:
    """All comparisons of one claim, and the largest gap in units of its bound."""

    def __init__(self, claim: str) -> None:
        self.claim, self.worst = claim, 0.0

    def compare(self, ours: Tensor, theirs: Tensor, terms: int | Tensor, magnitude: Tensor | None = None) -> None:
        """Record the gap between two results of ``terms`` terms; ``magnitude`` is the sum of their magnitudes (else the
        result).
        """
        magnitude = (theirs if magnitude is None else magnitude).detach().double().abs()
        gap = (ours.detach().double() - theirs.detach().double()).abs()
        limit = bound(ours.dtype, terms) * magnitude + torch.finfo(ours.dtype).tiny
        self.worst = float(np.maximum(self.worst, (gap / limit).max().item()))  # keeps a NaN

    def compare_networks(
        self, ours: tuple[Tensor, Sequence[Tensor]], theirs: tuple[Tensor, Sequence[Tensor]], terms: int
    ) -> None:
        """Compare loss and gradients of two forms of a network, with all gradients in units of the largest element.

        The layers amplify earlier roundings, which a count of terms doesn't cover. ``AMPLIFIED`` bounds that
        amplification; float64 leaves room for it.
        """
        largest = torch.stack([g.abs().max() for g in theirs[1]]).max()
        self.compare(ours[0], theirs[0], terms, AMPLIFIED * theirs[0])
        for a, b in zip(ours[1], theirs[1]):
            self.compare(a, b, terms, AMPLIFIED * largest)

    def check(self) -> Check:
        return Check(f"{self.claim}: largest gap, in units of its bound", self.worst, 1.0)
