"""pytorchltr's losses as peers (put the folders loss and utils and __init__.py of its 0.2.1 on the path)."""

from __future__ import annotations

import math

import torch
from pytorchltr.loss import PairwiseHingeLoss, PairwiseLogisticLoss
from torch import Tensor


def _of_whole_lists(loss: torch.nn.Module, scores: Tensor, labels: Tensor) -> Tensor:
    each: Tensor = loss(scores, labels, torch.full((len(scores),), scores.shape[-1]))
    return each.mean()


def hinge(scores: Tensor, labels: Tensor) -> Tensor:
    return _of_whole_lists(PairwiseHingeLoss(), scores, labels)


def logistic(scores: Tensor, labels: Tensor) -> Tensor:
    """Return pytorchltr's logistic loss, whose logarithm is to base 2, in nats."""
    return _of_whole_lists(PairwiseLogisticLoss(), scores, labels) * math.log(2)
