"""The gains of labels, for losses and metrics that have an option ``gain``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from custom_ops._enums import LabelUse

GAINS = {"exponential": LabelUse.EXPONENTIAL, "linear": LabelUse.VALUE}  # the gains 2^y - 1 and y


def relative_gains(labels: Tensor, highest: Tensor, gain: str) -> Tensor:
    """Return 2^label - 1 over 2^highest, or label over highest, by ``gain``; a label of at most 0 has no gain."""
    if gain == "exponential":
        gains = -torch.expm1(-math.log(2) * labels) * torch.exp2(labels - highest)
    else:
        gains = labels / highest
    return torch.where(labels <= 0, 0, gains)
