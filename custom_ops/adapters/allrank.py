"""Losses for allRank's ``fit``, tested with allRank 1.4.3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def loss_function(loss: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """Return a list loss as allRank calls it: ``f(y_pred, y_true, padded_value_indicator=-1)``.

    Args:
        loss: a list loss such as ``custom_ops.lambda_loss``.
        options: its own options. ``empty=0.0`` counts lists without a relevant item, as most of allRank's losses do.

    Example:
        >>> import torch, custom_ops
        >>> from custom_ops.adapters import allrank
        >>> loss = allrank.loss_function(custom_ops.lambda_loss, weighting="ndcg2pp", k=10)
        >>> loss(torch.tensor([[0.5, 0.1, 0.9]]), torch.tensor([[2.0, 0.0, -1.0]]))  # the last item is padding
        tensor(3.0047)
    """

    def padded(y_pred: Tensor, y_true: Tensor, padded_value_indicator: float = -1) -> Tensor:
        return loss(y_pred, y_true, mask=y_true != padded_value_indicator, **options)

    return padded
