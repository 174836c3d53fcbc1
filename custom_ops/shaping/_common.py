"""What the gradient-shaping ops share: samples, and which rows of the battery can't see a shaped derivative.

Their references are plain PyTorch with the same shaped derivatives of any order and in any mode: x - x.detach() is 0
with slope 1. Only clipping, which isn't linear in the gradient, needs a Function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from custom_ops.registry import Benchmark


def leaf(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Away from 0, and from 1 and 2 in size."""
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = torch.where((draw.abs() - draw.abs().round()).abs() < 0.05, draw + 0.15, draw)
    return x.to(device, dtype).requires_grad_()


def as_tensor(number: float, x: Tensor) -> Tensor:
    """``number`` for x, under compilation: there each value of an op's float argument is another program.

    It isn't rounded to 16 bits, as a number isn't either where it meets a tensor. A product is among the few things
    that Inductor makes of a number without compiling anew.
    """
    return number * torch.ones((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def beside_hook(hook: Callable[..., Tensor], *parameters: Any, reads: int = 1) -> Benchmark:
    """Beside what one would write instead: a view of x with ``hook(grad, *parameters)`` on its gradient.

    Only backward moves anything. It ``reads`` the gradient so many times.
    """

    def run(x: Tensor, *parameters: Any) -> Tensor:
        y = x.view_as(x)
        y.register_hook(lambda grad: hook(grad, *parameters))
        return y

    return Benchmark(
        unit="elements",
        sizes=(1 << 20, 1 << 24),
        make=lambda n, device: (torch.randn(n, device=device, requires_grad=True), *parameters),
        peers={"tensor hook": run},
        traffic=lambda n: ((0, 0), (reads * 4 * n, 4 * n)),
    )


NOT_THE_VALUES = "finite differences see the value's derivative, not the shaped one: `second derivative` checks that"
OF_SHAPING = {"gradcheck": NOT_THE_VALUES, "gradgradcheck": NOT_THE_VALUES}
VIEW = {"outputs own memory": "by design the output is a view of the input; in-place writes to it raise"}
two, integers = torch.ones(2), torch.ones(2, dtype=torch.int64)
NOT_FUZZED = dict.fromkeys(("NaN", "infinite"), "the reference subtracts them from themselves")
