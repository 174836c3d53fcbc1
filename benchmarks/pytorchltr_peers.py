"""pytorchltr's losses as peers (its 0.2.1: the folders loss and utils, and __init__.py, on the path)."""

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
    """Its logarithm is to base 2."""
    return _of_whole_lists(PairwiseLogisticLoss(), scores, labels) * math.log(2)
