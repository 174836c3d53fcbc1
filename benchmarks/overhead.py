"""The fixed cost of a call: that of the bridge on 16 elements, and that of each op on its first sample.

The bridge is measured on an op that saves its input and whose backward is an op with a derivative of its own. It is
compared with the same op built with ``torch.library`` and with native torch ops. The factor 2 is left out of the
derivative of the square in all three.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.answers import first
from benchmarks.measure import OURS
from benchmarks.table import TimedOp
from benchmarks.timing import Call, interleave, median
from custom_ops import library
from custom_ops.registry import leaves

TARGETS = {"forward": 0.5, "forward+backward": 0.65}  # the allowed share of PEER's time
PEER = "torch.library.custom_op + register_autograd"
OP_TARGET = 2.5  # the allowed multiple of native torch's time
CALLS = 20  # calls per measurement; one is too short for the clock


def square(x: Tensor) -> Tensor:
    return x * x


def product(grad: Tensor, x: Tensor) -> Tensor:
    return grad * x


@cache
def _ours() -> Callable[[Tensor], Tensor]:
    @library.define("custom_ops_benchmark::square")
    def op(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    @library.define("custom_ops_benchmark::product")
    def slope(grad: Tensor, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    library.kernel(op, "cpu", "cuda")(square)
    library.kernel(slope, "cpu", "cuda")(product)

    class Square(library.Function, op=op):
        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return slope(grad, *ctx.saved_tensors)

    class Product(library.Function, op=slope):
        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            left, right = ctx.saved_tensors
            return slope(grad, right), slope(grad, left)

    return op


@cache
def _peer() -> Callable[[Tensor], Tensor]:
    def define(name: str, kernel: Callable[..., Tensor], backward: Callable[..., Any]) -> Any:
        op = torch.library.custom_op(f"custom_ops_benchmark::{name}_peer", kernel, mutates_args=())
        op.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
        return op

    def of_product(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        left, right = ctx.saved_tensors
        return slope(grad, right), slope(grad, left)

    slope = define("product", product, of_product)
    op: Callable[[Tensor], Tensor] = define("square", square, lambda ctx, grad: slope(grad, *ctx.saved_tensors))
    return op


def of_library(seconds: float, device: torch.device) -> dict[str, dict[str, float]]:
    """Return each contender's microseconds per call, for forward with gradient and for forward+backward."""
    x = torch.randn(16, device=device, requires_grad=True)
    grad = torch.ones_like(x)
    ops = {"custom_ops.library": _ours(), PEER: _peer(), "torch.square (native)": torch.square}

    def pair(op: Callable[[Tensor], Tensor]) -> None:
        torch.autograd.grad(op(x), x, grad)

    runs: dict[str, dict[str, Callable[[], Any]]] = {
        "forward": {name: partial(op, x) for name, op in ops.items()},
        "forward+backward": {name: partial(pair, op) for name, op in ops.items()},
    }
    return {direction: _microseconds(contenders, seconds, device) for direction, contenders in runs.items()}


def of_op(info: TimedOp, seconds: float, device: torch.device) -> dict[str, float]:
    """Return the microseconds of forward+backward (forward, if there is no backward) on the first sample."""
    sample = info.samples(device, torch.float32)[0]
    inputs = leaves([*sample.args, *sample.kwargs.values()])
    grad = torch.ones_like(first(info.function(*sample.args, **sample.kwargs)))

    def run(function: Callable[..., Any]) -> None:
        output = function(*sample.args, **sample.kwargs)
        if inputs:
            torch.autograd.grad(first(output), inputs, grad, allow_unused=True)

    functions = {OURS: info.function, "native": info.native, "reference": info.reference}
    return _microseconds({name: partial(run, f) for name, f in functions.items() if f}, seconds, device)


def _microseconds(runs: dict[str, Callable[[], Any]], seconds: float, device: torch.device) -> dict[str, float]:
    def loop(run: Callable[[], Any], state: None) -> None:
        for _ in range(CALLS):
            run()

    calls = {name: Call(partial(loop, run)) for name, run in runs.items()}
    times = interleave(calls, seconds, device, rounds=5, warm_ups=1)
    return {name: median(values) / CALLS * 1e6 for name, values in times.items()}
