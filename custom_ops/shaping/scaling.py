"""Scaled and reversed gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops import _checks, library
from custom_ops._wide import wide
from custom_ops.library import Function
from custom_ops.registry import BadCall, OpInfo, Sample, register
from custom_ops.shaping._common import NOT_FUZZED, OF_SHAPING, VIEW, as_tensor, beside_hook, integers, leaf, two

__all__ = [
    "GradientScaling",
    "ReverseGradient",
    "ScaleGradient",
    "reverse_gradient",
    "scale_gradient",
]


@library.compose("custom_ops::gradient_scaling", view=True)
def gradient_scaling(x: Tensor, factor: float, scale: Tensor | None) -> Tensor:
    """x, whose gradient is multiplied by ``scale``, or by ``factor`` if there is none."""
    return x


class GradientScaling(Function, op=gradient_scaling):
    """``GradientScaling.apply(x, scale)`` is `scale_gradient`, in the idiom of ``torch.autograd.Function``.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.zeros(2, requires_grad=True)
        >>> custom_ops.GradientScaling.apply(x, 0.5).sum().backward()
        >>> x.grad
        tensor([0.5000, 0.5000])
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.factor, scale = inputs
        ctx.save_for_backward(scale)
        ctx.save_for_forward(scale, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _scaled(grad, ctx.factor, *ctx.saved_tensors), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, *_: Any) -> Tensor:
        scale, x = ctx.saved_tensors
        return torch.zeros_like(x) if tangent is None else _scaled(tangent, ctx.factor, scale)

    @staticmethod
    def apply(*args: Any, **kwargs: Any) -> Tensor:
        return scale_gradient(*args, **kwargs)


def _scaled(grad: Tensor, factor: float, scale: Tensor | None) -> Tensor:
    if scale is not None:
        return (wide(grad) * scale if scale.dim() == 0 else grad * scale).to(grad.dtype)
    return -grad if factor == -1 else grad * factor  # the same, in a third of the time on a few elements


@library.vmap(gradient_scaling)
def _(info: Any, in_dims: Any, x: Tensor, factor: float, scale: Tensor | None) -> Any:
    x = library.to_front(x, in_dims[0], info.batch_size)
    if scale is not None and in_dims[2] is not None:
        scale = scale.movedim(in_dims[2], 0)
        scale = scale.view(scale.shape[0], *(1,) * (x.dim() - scale.dim()), *scale.shape[1:])
    return gradient_scaling(x, factor, scale), 0


def scale_gradient(x: Tensor, scale: float | Tensor) -> Tensor:
    """``x``, whose gradient is multiplied by ``scale`` on its way back.

    ``y = x``, ``dL/dx = scale * dL/dy``, and likewise the tangent ``dy = scale * dx``. With
    ``scale = 2 * x.detach()`` it is the layer ``y = x`` with the backward of ``x ** 2``.

    Args:
        x: any shape and strides; float16, bfloat16, float32 or float64.
        scale: a number, or a floating tensor that broadcasts to the shape of ``x``. It gets no gradient, as the
            value doesn't depend on it; in a double backward it does, as the gradient of ``x`` does.

    Returns:
        A view of ``x``: no copy is made. In-place writes to it raise where a gradient is recorded.

    Raises:
        TypeError: ``x`` is no tensor or of another dtype, ``scale`` neither a number nor a floating tensor.
        ValueError: ``scale`` doesn't broadcast to the shape of ``x``, or is on another device.

    O(1) forward, O(n) backward; ``scale`` is kept for backward.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        >>> custom_ops.scale_gradient(x, 2 * x.detach()).sum().backward()
        >>> x.grad
        tensor([2., 4., 6.])
    """
    _checks.has_dtype("x", x, _checks.FLOATING)
    scale = _scale("scale", scale)
    if not isinstance(scale, Tensor):
        if not torch.compiler.is_compiling():
            return library.direct(gradient_scaling)(x, scale, None)
        scale = as_tensor(scale, x)
    scale = _checks.beside(x, scale)
    _checks.same_device(x=x, scale=scale)
    if scale.dim() > x.dim() or not all(s in (1, n) for s, n in zip(reversed(scale.shape), reversed(x.shape))):
        raise ValueError(f"scale: expected a shape that broadcasts to {list(x.shape)}, got {list(scale.shape)}")
    return library.direct(gradient_scaling)(x, 1.0, scale)


def _scale(name: str, scale: Any) -> float | Tensor:
    if isinstance(scale, Tensor) and (scale.dim() > 0 or scale.is_floating_point()):
        _checks.has_dtype(name, scale, _checks.FLOATING)
        return scale
    return _checks.as_float(name, scale)


class ScaleGradient(torch.nn.Module):
    """`scale_gradient` as a layer. A tensor ``scale`` is a buffer: it moves and is saved with the layer.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.zeros(2, requires_grad=True)
        >>> custom_ops.ScaleGradient(0.5)(x).sum().backward()
        >>> x.grad
        tensor([0.5000, 0.5000])
    """

    scale: float | Tensor

    def __init__(self, scale: float | Tensor) -> None:
        super().__init__()
        scale = _scale("scale", scale)
        if isinstance(scale, Tensor):
            self.register_buffer("scale", scale)
        else:
            self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return scale_gradient(x, self.scale)

    def extra_repr(self) -> str:
        return f"scale={list(self.scale.shape) if isinstance(self.scale, Tensor) else self.scale}"


def reverse_gradient(x: Tensor, lambda_: float | Tensor = 1.0) -> Tensor:
    """``x``, whose gradient is multiplied by ``-lambda_`` on its way back: `scale_gradient` by ``-lambda_``.

    What comes before it climbs the loss that what comes after it descends, as a feature extractor does
    against a domain classifier.

    Args:
        x: any shape and strides; float16, bfloat16, float32 or float64.
        lambda_: how strongly; a number, or a floating tensor that broadcasts to the shape of ``x``.

    Returns:
        A view of ``x``: no copy is made. In-place writes to it raise where a gradient is recorded.

    Raises:
        TypeError, ValueError: as `scale_gradient`.

    O(1) forward, O(n) backward.

    Source: Ganin and Lempitsky, "Unsupervised Domain Adaptation by Backpropagation", 2015.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> custom_ops.reverse_gradient(x, 0.5).sum().backward()
        >>> x.grad
        tensor([-0.5000, -0.5000])
    """
    _checks.has_dtype("x", x, _checks.FLOATING)
    lambda_ = _scale("lambda_", lambda_)
    if torch.compiler.is_compiling() and not isinstance(lambda_, Tensor):
        lambda_ = as_tensor(lambda_, x)  # not of its negative, which torch 2.10 compiles anew for each value
    return scale_gradient(x, -1.0 * lambda_)


class ReverseGradient(torch.nn.Module):
    """`reverse_gradient` as a layer; set ``lambda_`` to follow a schedule.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.zeros(2, requires_grad=True)
        >>> custom_ops.ReverseGradient(0.5)(x).sum().backward()
        >>> x.grad
        tensor([-0.5000, -0.5000])
    """

    def __init__(self, lambda_: float = 1.0) -> None:
        super().__init__()
        self.lambda_ = _checks.as_float("lambda_", lambda_)

    def forward(self, x: Tensor) -> Tensor:
        return reverse_gradient(x, self.lambda_)

    def extra_repr(self) -> str:
        return f"lambda_={self.lambda_}"


# ---------------------------------------------------------------- reference and registry entry


def scale_gradient_reference(x: Tensor, scale: float | Tensor) -> Tensor:
    return x.detach() + (x - x.detach()) * scale


def reverse_gradient_reference(x: Tensor, lambda_: float | Tensor = 1.0) -> Tensor:
    return scale_gradient_reference(x, -lambda_)


def _scale_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    x, rows = leaf(device, dtype, 3, 7), leaf(device, dtype, 7, seed=1).detach()
    channels_last = leaf(device, dtype, 2, 3, 4, 2).detach().to(memory_format=torch.channels_last).requires_grad_()
    return [
        Sample((x, -0.5), dynamic={0: 0}),
        Sample((x, rows), dynamic={0: 0}),
        Sample((x, x.detach() * 2), dynamic={0: 0, 1: 0}),
        Sample((leaf(device, dtype), 3)),
        Sample((leaf(device, dtype, 0, 4), 2.0)),
        Sample((channels_last, rows[:3].view(3, 1, 1))),
    ]


register(
    OpInfo(
        name="scale_gradient",
        summary="The identity, whose gradient is scaled",
        function=scale_gradient,
        not_fuzzed=NOT_FUZZED,
        reference=scale_gradient_reference,
        native=torch.mul,
        apply=GradientScaling.apply,
        samples=_scale_samples,
        modules=lambda: [(ScaleGradient(2.0), {"scale": 2.0})],
        bad_calls=lambda: [
            BadCall(([1.0], 2.0), "x: expected a tensor, got list"),
            BadCall((integers, 2.0), "x: expected one of float16, .* got int64"),
            BadCall((two, "2"), "scale: expected a number, got str"),
            BadCall((two, integers), "scale: expected one of float16, .* got int64"),
            BadCall((two, torch.ones(3)), r"scale: expected a shape that broadcasts to \[2\], got \[3\]"),
            BadCall((two, torch.ones(2, 2)), r"scale: expected a shape that broadcasts to \[2\], got \[2, 2\]"),
            BadCall((two, two.to("meta")), "scale: expected on cpu as x, got meta"),
        ],
        benchmarks=[beside_hook(torch.mul, 0.5)],
        not_applicable=VIEW,
        not_comparable=OF_SHAPING,
    )
)


register(
    OpInfo(
        name="reverse_gradient",
        summary="The identity, whose gradient is reversed",
        function=reverse_gradient,
        not_fuzzed=NOT_FUZZED,
        reference=reverse_gradient_reference,
        native=torch.neg,
        samples=lambda device, dtype: [
            Sample((leaf(device, dtype, 3, 7),), dynamic={0: 0}),
            Sample((leaf(device, dtype, 3, 7), leaf(device, dtype, 3, 1, seed=1).detach())),
            Sample((leaf(device, dtype), 0.5)),
            Sample((leaf(device, dtype, 0, 4),)),
        ],
        modules=lambda: [(ReverseGradient(), {}), (ReverseGradient(0.5), {"lambda_": 0.5})],
        bad_calls=lambda: [
            BadCall(([1.0],), "x: expected a tensor, got list"),
            BadCall((two, "1"), "lambda_: expected a number, got str"),
            BadCall((two, integers), "lambda_: expected one of float16, .* got int64"),
        ],
        benchmarks=[beside_hook(torch.neg)],
        not_applicable=VIEW,
        not_comparable=OF_SHAPING,
    )
)
