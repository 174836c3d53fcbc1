"""What one call of a registered op costs, on 16 elements: ours, ``torch.library``'s and native torch.

The op saves its input, and its backward is an op with a backward of its own, on both sides; so the
factor 2 is left out of the derivative of the square.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from custom_ops import library
from custom_ops.benchmarks.timing import interleave, median, per_call

TARGETS = {"forward": 0.5, "forward+backward": 0.65}
PEER = "torch.library.custom_op + register_autograd"
CALLS = 200


def square(x: Tensor) -> Tensor:
    return x * x


def product(grad: Tensor, x: Tensor) -> Tensor:
    return grad * x


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


def measure(seconds: float, device: torch.device) -> dict[str, dict[str, float]]:
    """Microseconds per call of each contender, for forward with gradient and for forward+backward."""
    x = torch.randn(16, device=device, requires_grad=True)
    grad = torch.ones_like(x)
    ops = {"custom_ops.library": _ours(), PEER: _peer(), "torch.square (native)": torch.square}

    def pair(op: Callable[[Tensor], Tensor]) -> None:
        torch.autograd.grad(op(x), x, grad)

    runs = {
        "forward": {name: per_call(lambda op=op: op(x), CALLS) for name, op in ops.items()},
        "forward+backward": {name: per_call(lambda op=op: pair(op), CALLS) for name, op in ops.items()},
    }
    return {
        direction: {name: median(times) / CALLS * 1e6 for name, times in interleave(contenders, seconds).items()}
        for direction, contenders in runs.items()
    }
