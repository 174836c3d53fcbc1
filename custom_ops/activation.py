"""One-bit activations: backward keeps one bit per element instead of a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops import _checks, library
from custom_ops._bits import empty_mask
from custom_ops._native import define
from custom_ops.library import Function
from custom_ops.registry import BadCall, Benchmark, OpInfo, Sample, Target, register

__all__ = ["CustomReLU", "ReLU", "relu"]


@define
def relu_forward(x: Tensor, batch_dims: int) -> tuple[Tensor, Tensor]:
    """relu(x), contiguous, and one bit per element: whether its gradient passes.

    The first ``batch_dims`` dimensions are a batch; the mask has shape ``[*batch, ceil(n / 8)]`` for
    n elements each.
    """
    return x.new_empty(x.shape), empty_mask(x, batch_dims)


@define
def apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    """x where its bit of ``mask`` is set, 0 elsewhere; ``mask`` as `relu_forward` makes it."""
    return x.new_empty(x.shape)


class ApplyMask(Function, op=apply_mask):
    """Linear and its own adjoint: the gradient and the tangent are masked alike."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return apply_mask(grad, *ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return apply_mask(tangent, *ctx.saved_tensors)


class CustomReLU(Function, op=relu_forward):
    """``CustomReLU.apply(x)`` is `relu(x)`, in the idiom of ``torch.autograd.Function``."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.save_for_forward(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor, None]:
        return apply_mask(grad, *ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> tuple[Tensor, None]:
        return apply_mask(tangent, *ctx.saved_tensors), None

    @staticmethod
    def apply(x: Tensor) -> Tensor:
        return relu(x)


@library.vmap(relu_forward)
def _(info: Any, in_dims: Any, x: Tensor, batch_dims: int) -> Any:
    return relu_forward(x.movedim(in_dims[0], 0), batch_dims + 1), (0, 0)


@library.vmap(apply_mask)
def _(info: Any, in_dims: Any, x: Tensor, mask: Tensor) -> Any:
    x, mask = (library.to_front(t, d, info.batch_size) for t, d in zip((x, mask), in_dims))
    return apply_mask(x, mask), 0


@library.sharding(relu_forward)
def _(x: Any, batch_dims: int) -> Any:
    rows = library.row_placement(x)
    return [([rows, rows], [rows, None])]


@library.sharding(apply_mask)
def _(x: Any, mask: Any) -> Any:
    packed = mask.placements[0]
    return [([packed], [packed, packed])]


def relu(x: Tensor) -> Tensor:
    """``max(x, 0)``, keeping one bit per element for backward where torch keeps a tensor.

    Equal to ``torch.relu`` everywhere: NaN propagates, the gradient at exactly 0 is 0 and that at NaN
    passes. Differentiable to any order and in forward mode; the second derivative is 0.

    Args:
        x: any shape and strides; float16, bfloat16, float32 or float64. The result has the layout
            of ``x`` (channels-last stays channels-last).

    Raises:
        TypeError: ``x`` is no tensor, or of another dtype.

    O(n) time; numel / 8 bytes kept for backward. Saves memory where no neighbour keeps the output
    anyway: after a convolution whose next layer is linear in it, torch keeps that output once for both.

    Source: torch.relu; the packed mask is asked for in pytorch#63644.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
        >>> custom_ops.relu(x).sum().backward()
        >>> x.grad
        tensor([0., 0., 1.])
    """
    _checks.has_dtype("x", x, _checks.FLOATING)
    if x.is_contiguous():
        return relu_forward(x, 0)[0]
    # The op is written for row-major memory: show it the dimensions in the order they lie in.
    order = _by_stride(x)
    inverse = [order.index(d) for d in range(x.dim())]
    return relu_forward(x.permute(order), 0)[0].permute(inverse)


def _by_stride(x: Tensor) -> list[int]:
    """The dimensions of ``x``, largest stride first (Dynamo can't trace `sorted` over symbolic strides)."""
    order: list[int] = []
    for d in range(x.dim()):
        at = len(order)
        while at > 0 and x.stride(order[at - 1]) < x.stride(d):
            at -= 1
        order.insert(at, d)
    return order


class ReLU(torch.nn.Module):
    """`relu` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return relu(x)


def relu_reference(x: Tensor) -> Tensor:
    return torch.where(x <= 0, torch.zeros_like(x), x)


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    def away_from_zero(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return (x + 0.1 * x.sign()).to(device, dtype).requires_grad_()

    channels_last = away_from_zero(2, 3, 4, 5).detach().to(memory_format=torch.channels_last).requires_grad_()
    return [
        Sample((away_from_zero(3, 7),), dynamic={0: 0}),
        Sample((away_from_zero(),)),
        Sample((away_from_zero(0, 4),)),
        Sample((away_from_zero(17),)),
        Sample((channels_last,)),
    ]


register(
    OpInfo(
        name="relu",
        summary="ReLU that keeps one bit per element for backward",
        function=relu,
        reference=relu_reference,
        apply=CustomReLU.apply,
        samples=_samples,
        modules=lambda: [(ReLU(), {})],
        bad_calls=lambda: [
            BadCall(([1.0],), "x: expected a tensor, got list"),
            BadCall((torch.ones(2, dtype=torch.int64),), "x: expected one of float16, .* got int64"),
        ],
        benchmarks=[
            Benchmark(
                unit="elements",
                sizes=(1 << 16, 1 << 20, 1 << 24),
                make=lambda n, device: (torch.randn(n, device=device, requires_grad=True),),
                peers={"torch.relu": torch.relu},
                targets=[Target(1 << 20, "torch.relu", 1.0), Target(1 << 24, "torch.relu", 0.5)],
            )
        ],
    )
)
