"""Samples of the gradient-shaping ops, and the battery's rows that can't see a shaped derivative.

The references are plain PyTorch with the same shaped derivatives of any order and in any mode, by means of x -
x.detach(), which is 0 and has slope 1. Only clipping needs a Function, as it isn't linear in the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def leaf(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Return a leaf whose elements are away from 0, 1 and 2 in size."""
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = torch.where((draw.abs() - draw.abs().round()).abs() < 0.05, draw + 0.15, draw)
    return x.to(device, dtype).requires_grad_()


NOT_THE_VALUES = "finite differences see the value's derivative, not the shaped one: `second derivative` checks that"
OF_SHAPING = {"gradcheck": NOT_THE_VALUES, "gradgradcheck": NOT_THE_VALUES}
VIEW = {"outputs own memory": "by design the output is a view of the input; in-place writes to it raise"}
two, integers = torch.ones(2), torch.ones(2, dtype=torch.int64)
NOT_FUZZED = dict.fromkeys(("NaN", "infinite"), "the reference subtracts them from themselves")
