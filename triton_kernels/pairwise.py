"""Pairwise losses."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.triton_kernels.lists import Lists, list_scale

# ---------------------------------------------------------------- mean squared error: no kernel of its own


def _centred(x: Tensor, lists: Lists, valid: Tensor | None, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """x minus the mean of its list, 0 where it isn't valid; and the number of valid items of each list."""
    ones = torch.ones_like(x)
    count = lists.sum(ones if valid is None else valid.to(x.dtype))
    mean = lists.sum(x if valid is None else x.masked_fill(~valid, 0)) / count.clamp_min(1)
    x = x - list_scale(mean, ones, valid, offsets)
    return list_scale((count > 1).to(x.dtype), x, valid, offsets), count


def pairwise_mse(
    scores: Tensor, labels: Tensor, valid: Tensor | None, offsets: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    lists = Lists(scores, valid, offsets)
    x, count = _centred(scores - labels, lists, valid, offsets)
    scale = 1 / (count - 1).clamp_min(1) if normalize else count
    return 2 * scale * lists.sum(x * x), list_scale(4 * scale, x, valid, offsets), count > 1


def pairwise_mse_slope(
    scores: Tensor, labels: Tensor, valid: Tensor | None, offsets: Tensor | None, v: Tensor | None, normalize: bool
) -> Tensor:
    lists = Lists(scores, valid, offsets)
    x, count = _centred(scores - labels if v is None else v, lists, valid, offsets)
    return list_scale(4 * (1 / (count - 1).clamp_min(1) if normalize else count), x, valid, offsets)
