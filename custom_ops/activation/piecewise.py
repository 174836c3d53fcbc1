"""Piecewise-linear activations whose backward keeps one bit per element instead of a tensor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from custom_ops import _checks, library, shards
from custom_ops._bits import empty_mask, pack, unpack
from custom_ops._layout import as_it_lies, overlaps
from custom_ops._leaf import leaf
from custom_ops._native import define
from custom_ops._wide import under_autocast
from custom_ops.library import Function


@define
def piecewise_linear(
    x: Tensor,
    bias: Tensor | None,
    inner: int,
    low: float,
    high: float | None,
    below: float,
    above: float,
    slope: float,
    nan_passes: bool,
    batch_dims: int,
) -> tuple[Tensor, Tensor]:
    """Return a piecewise-linear activation of v = x + bias, contiguous, and one bit per element: whether low < v <
    high.

    The activation is v where the bit is set. Elsewhere it is slope * v or, if the slope is 0, ``below`` and ``above``.
    A NaN stays, and its bit is ``nan_passes``. The first ``batch_dims`` dimensions are a batch: the mask has shape
    ``[*batch, ceil(n / 8)]`` for n elements each, and bias ``[*batch, C]``; element i belongs to channel i // inner %
    C.
    """
    return x.new_empty(x.shape), empty_mask(x, batch_dims)


@define
def apply_mask(x: Tensor, mask: Tensor, on: float, off: float) -> Tensor:
    """Return on * x where the bit of ``mask [*batch, ceil(n / 8)]`` is set, off * x elsewhere; 0 if off is 0."""
    return x.new_empty(x.shape)


@define
def apply_mask_and_sum(x: Tensor, mask: Tensor, inner: int, channels: int, off: float) -> tuple[Tensor, Tensor]:
    """Return `apply_mask` with on = 1 and its sum over each channel, ``[*batch, channels]``, in one pass.

    Channels are as in `piecewise_linear`: if the first result is the gradient of x + bias, the second is that of bias.
    """
    return x.new_empty(x.shape), x.new_empty((*mask.shape[:-1], channels))


class ApplyMask(Function, op=apply_mask):
    """The masking is linear and self-adjoint, so gradient and tangent are masked alike."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, mask, *ctx.slopes = inputs
        ctx.save_for_backward(mask)
        ctx.save_for_forward(mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return apply_mask(grad, *ctx.saved_tensors, *ctx.slopes), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return apply_mask(tangent, *ctx.saved_tensors, *ctx.slopes)


def _spread(bias: Tensor, inner: int, shape: torch.Size, batch_dims: int) -> Tensor:
    """Return the bias of each element of a tensor of that shape."""
    outer = math.prod(shape[batch_dims:]) // max(1, bias.shape[-1] * inner)
    sizes = *shape[:batch_dims], outer, bias.shape[-1], inner
    return bias[..., None, :, None].expand(sizes).reshape(shape)


def _plus_bias(x: Tensor | None, bias: Tensor | None, inner: int, shape: torch.Size, batch_dims: int) -> Tensor | None:
    if bias is None:
        return x
    spread = _spread(bias, inner, shape, batch_dims)
    return spread if x is None else x + spread


class ApplyMaskAndSum(Function, op=apply_mask_and_sum):
    """The op is linear, and its adjoint is the tangent of `piecewise_linear`."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, mask, ctx.inner, ctx.channels, ctx.off = inputs
        ctx.shape = x.shape
        ctx.save_for_backward(mask)
        ctx.save_for_forward(mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, of_sums: Tensor | None) -> tuple[Tensor, None, None, None, None]:
        (mask,) = ctx.saved_tensors
        total = _plus_bias(grad, of_sums, ctx.inner, ctx.shape, mask.dim() - 1)
        return apply_mask(total, mask, 1.0, ctx.off), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor, Tensor]:
        return apply_mask_and_sum(tangent, *ctx.saved_tensors, ctx.inner, ctx.channels, ctx.off)


class PiecewiseLinear(Function, op=piecewise_linear):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, bias, ctx.inner, *_, ctx.slope, _, ctx.batch_dims = inputs
        ctx.channels = None if bias is None else bias.shape[-1]
        ctx.shape = x.shape
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.save_for_forward(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            return *ApplyMaskAndSum.apply(grad, mask, ctx.inner, ctx.channels, ctx.slope), *[None] * 8
        return ApplyMask.apply(grad, mask, 1.0, ctx.slope), *[None] * 9

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, of_bias: Tensor | None, *_: None) -> tuple[Tensor, None]:
        tangent = _plus_bias(tangent, of_bias, ctx.inner, ctx.shape, ctx.batch_dims)
        return apply_mask(tangent, *ctx.saved_tensors, 1.0, ctx.slope), None


@library.vmap(piecewise_linear)
def _(info: Any, in_dims: Any, x: Tensor, bias: Tensor | None, *rest: Any) -> Any:
    x = library.to_front(x, in_dims[0], info.batch_size)
    if bias is not None:
        bias = library.to_front(bias, in_dims[1], info.batch_size)
    *parameters, batch_dims = rest
    return piecewise_linear(x, bias, *parameters, batch_dims + 1), (0, 0)


@library.vmap(apply_mask)
def _(info: Any, in_dims: Any, x: Tensor, mask: Tensor, on: float, off: float) -> Any:
    x, mask = (library.to_front(t, d, info.batch_size) for t, d in zip((x, mask), in_dims))
    return apply_mask(x, mask, on, off), 0


@library.vmap(apply_mask_and_sum)
def _(info: Any, in_dims: Any, x: Tensor, mask: Tensor, *rest: Any) -> Any:
    x, mask = (library.to_front(t, d, info.batch_size) for t, d in zip((x, mask), in_dims))
    return apply_mask_and_sum(x, mask, *rest), (0, 0)


@library.inductor(piecewise_linear)
def _(
    x: Tensor,
    bias: Tensor | None,
    inner: int,
    low: float,
    high: float | None,
    below: float,
    above: float,
    slope: float,
    nan_passes: bool,
    batch_dims: int,
) -> tuple[Tensor, Tensor]:
    v = x if bias is None else x + _spread(bias, inner, x.shape, batch_dims)
    keep = v > low
    y = torch.where(keep, v, slope * v if slope != 0 else torch.where(v <= low, library.as_tensor(below, v), v))
    if high is not None:
        keep = keep & (v < high)
        y = torch.where(v >= high, library.as_tensor(above, v), y)
    if nan_passes:
        keep = keep | (v != v)  # Inductor doesn't vectorise a negated comparison
    return y.to(x.dtype).contiguous(), pack(keep, batch_dims)


@library.inductor(apply_mask)
def _masked(x: Tensor, mask: Tensor, on: float, off: float) -> Tensor:
    return torch.where(unpack(mask, x), on * x, off * x if off != 0 else 0).to(x.dtype).contiguous()


@library.inductor(apply_mask_and_sum)
def _(x: Tensor, mask: Tensor, inner: int, channels: int, off: float) -> tuple[Tensor, Tensor]:
    masked = _masked(x, mask, 1.0, off)
    batch = mask.shape[:-1]
    rows = math.prod(x.shape[len(batch) :]) // max(channels * inner, 1)
    return masked, masked.reshape(*batch, rows, channels, inner).sum((-3, -1))


def check_inplace(x: Tensor, inplace: bool) -> None:
    if _checks.as_bool("inplace", inplace) and overlaps(x):
        raise ValueError(f"x: expected elements with memory of their own to write to, got strides {list(x.stride())}")


def _activate(
    x: Tensor,
    *,
    low: float,
    high: float | None = None,
    below: float = 0.0,
    above: float = 0.0,
    slope: float = 0.0,
    nan_passes: bool = False,
    inplace: bool = False,
    bias: Tensor | None = None,
    dim: int = 0,
) -> Tensor:
    """Apply the op's activation to x and return the result in x's layout."""
    if isinstance(x, Tensor) and x.is_quantized:
        raise TypeError(
            "x: expected a dense tensor, got a quantized one: call convert_activations(model, to='torch') before a "
            "model is prepared for quantization"
        )
    _checks.has_dtype("x", x, _checks.FLOATING)
    check_inplace(x, inplace)

    def run(rows: Tensor, dim: int) -> Tensor:
        inner = 1 if bias is None else math.prod(rows.shape[dim + 1 :])
        return PiecewiseLinear.apply(rows, bias, inner, low, high, below, above, slope, nan_passes, 0)[0]

    if shards.is_sharded(x):

        def part(x: Tensor, bias: Tensor | None) -> Tensor:
            return _activate(
                x, low=low, high=high, below=below, above=above, slope=slope, nan_passes=nan_passes, bias=bias, dim=dim
            )

        names = shards.batch_labels(x.dim())
        y = shards.in_shards(part, f"{names},{names[dim : dim + 1]}->{names}", x, bias)
    else:
        y = as_it_lies(x, run, dim)
    return x.copy_(y) if inplace else y


@leaf
def relu(x: Tensor, inplace: bool = False) -> Tensor:
    """Return ``max(x, 0)``, keeping one bit per element for backward where torch keeps a tensor.

    The result equals ``torch.relu``, except that -0.0 gives 0.0. NaN propagates; the gradient at exactly 0 is 0, and at
    NaN it passes. Where the gradient is 0, a NaN gradient gives 0 too. The function is differentiable to any order and
    in forward mode; the second derivative is 0.

    Args:
        x: any shape and strides; float16, bfloat16, float32 or float64. The result has the layout
            of ``x`` (channels-last stays channels-last).
        inplace: write the result into ``x`` and return it, if autograd allows that (a temporary of
            x's size is needed for the time of the call).

    Raises:
        TypeError: ``x`` isn't a tensor, or has another dtype.
        ValueError: ``inplace`` of a tensor whose elements share memory, such as an expanded or unfolded one.
        RuntimeError: ``inplace`` of a leaf that requires a gradient.

    The op takes O(n) time and keeps numel / 8 bytes for backward. It saves memory unless a neighbour keeps the output
    anyway: after a convolution whose next layer is linear in it, torch keeps that output once for both.

    Source: torch.relu; pytorch#63644 asks for the packed mask.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
        >>> custom_ops.relu(x).sum().backward()
        >>> x.grad
        tensor([0., 0., 1.])
    """
    return _activate(x, low=0.0, nan_passes=True, inplace=inplace)


@leaf
def leaky_relu(x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """Return ``x`` where it is positive and ``negative_slope * x`` elsewhere, keeping one bit per element for backward.

    The result equals ``torch.nn.functional.leaky_relu`` bit by bit: the gradient at exactly 0 and at NaN is that of the
    negative side. There is one exception: a ``negative_slope`` of 0 gives exactly 0, also at -inf and for a NaN
    gradient, where torch's product with 0 is NaN. Any ``negative_slope`` is allowed, a negative one too, also in place.

    Arguments, errors, layout and cost are those of `relu`; a ``negative_slope`` that isn't a number raises
    ``TypeError``.

    Source: torch.nn.LeakyReLU.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
        >>> custom_ops.leaky_relu(x, 0.5).sum().backward()
        >>> x.grad
        tensor([0.5000, 0.5000, 1.0000])
    """
    slope = _checks.as_float("negative_slope", negative_slope)
    return _activate(x, low=0.0, slope=slope, inplace=inplace)


@leaf
def hardtanh(x: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """Return ``x`` clamped to [min_val, max_val], keeping one bit per element for backward.

    The result equals ``torch.nn.functional.hardtanh``, except that -0.0 at a bound of 0 gives 0.0. NaN propagates, and
    the gradient is 0 at both bounds. At NaN it is 0, as in torch's vectorised kernels (torch's scalar kernels let it
    pass).

    Arguments, errors, layout and cost are those of `relu`; unless ``min_val <= max_val``, it raises ``ValueError``.

    Source: torch.nn.Hardtanh.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.hardtanh(torch.tensor([-3.0, 0.5, 3.0]))
        tensor([-1.0000,  0.5000,  1.0000])
    """
    low, high = _checks.as_float("min_val", min_val), _checks.as_float("max_val", max_val)
    if not low <= high:
        raise ValueError(f"min_val: expected at most max_val, got {min_val} and {max_val}")
    return _activate(x, low=low, high=high, below=low, above=high, inplace=inplace)


@leaf
def relu6(x: Tensor, inplace: bool = False) -> Tensor:
    """Return `hardtanh` between 0 and 6, as ``torch.nn.functional.relu6``; arguments, errors and cost are those of
    `relu`.

    Source: torch.nn.ReLU6.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.relu6(torch.tensor([-1.0, 3.0, 8.0]))
        tensor([0., 3., 6.])
    """
    return hardtanh(x, 0.0, 6.0, inplace)


@leaf
def threshold(x: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    """Return ``x`` where it exceeds ``threshold``, else ``value``, keeping one bit per element for backward.

    The result equals ``torch.nn.functional.threshold`` bit by bit: NaN propagates, and its gradient passes. `relu` is
    ``threshold(x, 0, 0)``.

    Arguments, errors, layout and cost are those of `relu`; a bound that isn't a number raises ``TypeError``.

    Source: torch.nn.Threshold.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.threshold(torch.tensor([0.5, 1.5]), 1.0, -2.0)
        tensor([-2.0000,  1.5000])
    """
    low, below = _checks.as_float("threshold", threshold), _checks.as_float("value", value)
    return _activate(x, low=low, below=below, nan_passes=True, inplace=inplace)


@leaf
def bias_relu(x: Tensor, bias: Tensor, dim: int = 1, inplace: bool = False) -> Tensor:
    """Return ``relu(x + bias)`` with one bias per channel, in one pass, keeping one bit per element for backward.

    Args:
        x: as for `relu`; the channels are its dimension ``dim``, in any memory format.
        bias: ``[C]``, of x's dtype; under autocast it is cast to that.
        dim: the channel dimension.
        inplace: as for `relu`.

    Raises:
        TypeError: a wrong dtype, not a tensor, or ``dim`` isn't an integer.
        ValueError: ``bias`` has another size or device than the channels.
        IndexError: ``x`` has no dimension ``dim``.

    The sum is rounded once, after the activation. The op takes O(n) time and keeps numel / 8 bytes for backward.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.bias_relu(torch.tensor([[1.0, -3.0]]), torch.tensor([0.5, 1.0]))
        tensor([[1.5000, 0.0000]])
    """
    bias, dim = _of_channels(x, bias, dim)
    return _activate(x, low=0.0, nan_passes=True, inplace=inplace, bias=bias, dim=dim)


@leaf
def bias_leaky_relu(
    x: Tensor, bias: Tensor, negative_slope: float = 0.01, dim: int = 1, inplace: bool = False
) -> Tensor:
    """Return ``leaky_relu(x + bias, negative_slope)`` in one pass; arguments, errors and cost are those of `bias_relu`.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.bias_leaky_relu(torch.tensor([[1.0, -3.0]]), torch.tensor([0.5, 1.0]), 0.5)
        tensor([[ 1.5000, -1.0000]])
    """
    slope = _checks.as_float("negative_slope", negative_slope)
    bias, dim = _of_channels(x, bias, dim)
    return _activate(x, low=0.0, slope=slope, inplace=inplace, bias=bias, dim=dim)


def _of_channels(x: Tensor, bias: Tensor, dim: int) -> tuple[Tensor, int]:
    """Return the bias in x's dtype, and the index of its dimension in x."""
    _checks.has_dtype("x", x, _checks.FLOATING)
    _checks.has_dtype("bias", bias, _checks.FLOATING)
    if bias.dtype != x.dtype and under_autocast(x):
        bias = bias.to(x.dtype)  # autocast runs the layer before in 16 bits, but the bias is a float32 parameter
    _checks.has_dtype("bias", bias, (x.dtype,))
    _checks.has_dims("bias", bias, "[C]")
    _checks.same_device(x=x, bias=bias)
    dim = _checks.as_int("dim", dim)
    if not -x.dim() <= dim < x.dim():
        raise IndexError(f"dim: expected a dimension of x with shape {list(x.shape)}, got {dim}")
    if bias.shape[0] != x.shape[dim]:
        raise ValueError(f"bias: expected {x.shape[dim]} channels as in x, got {bias.shape[0]}")
    return bias, dim % x.dim()


class CustomReLU(PiecewiseLinear):
    """``CustomReLU.apply(x)`` is `relu` of ``x``, called like a ``torch.autograd.Function``.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.CustomReLU.apply(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """

    @staticmethod
    def apply(*args: Any, **kwargs: Any) -> Tensor:
        return relu(*args, **kwargs)


class ReLU(torch.nn.ReLU):
    """Apply `relu` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.ReLU()(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """

    def forward(self, x: Tensor) -> Tensor:
        return relu(x, self.inplace)


class LeakyReLU(torch.nn.LeakyReLU):
    """Apply `leaky_relu` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.LeakyReLU(0.5)(torch.tensor([-1.0, 2.0]))
        tensor([-0.5000,  2.0000])
    """

    def forward(self, x: Tensor) -> Tensor:
        return leaky_relu(x, self.negative_slope, self.inplace)


class Hardtanh(torch.nn.Hardtanh):
    """Apply `hardtanh` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.Hardtanh(-0.5, 0.5)(torch.tensor([-1.0, 0.25, 2.0]))
        tensor([-0.5000,  0.2500,  0.5000])
    """

    def forward(self, x: Tensor) -> Tensor:
        return hardtanh(x, self.min_val, self.max_val, self.inplace)


class ReLU6(torch.nn.ReLU6):
    """Apply `relu6` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.ReLU6()(torch.tensor([-1.0, 2.0, 7.0]))
        tensor([0., 2., 6.])
    """

    def forward(self, x: Tensor) -> Tensor:
        return relu6(x, self.inplace)


class Threshold(torch.nn.Threshold):
    """Apply `threshold` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.Threshold(0.5, -1.0)(torch.tensor([0.25, 2.0]))
        tensor([-1.,  2.])
    """

    def forward(self, x: Tensor) -> Tensor:
        return threshold(x, self.threshold, self.value, self.inplace)


class BiasReLU(torch.nn.Module):
    """Apply `bias_relu` as a layer with a learned bias ``[channels]``, which starts at 0.

    Example:
        >>> import torch, custom_ops
        >>> layer = custom_ops.BiasReLU(2)
        >>> layer(torch.tensor([[-1.0, 2.0]])).sum().backward()
        >>> layer.bias.grad
        tensor([0., 1.])
    """

    def __init__(self, channels: int, dim: int = 1, inplace: bool = False) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(_checks.as_count("channels", channels)))
        self.dim = _checks.as_int("dim", dim)
        self.inplace = _checks.as_bool("inplace", inplace)

    def forward(self, x: Tensor) -> Tensor:
        return bias_relu(x, self.bias, self.dim, self.inplace)

    def extra_repr(self) -> str:
        return f"{self.bias.shape[0]}, dim={self.dim}{', inplace=True' * self.inplace}"


class BiasLeakyReLU(BiasReLU):
    """Apply `bias_leaky_relu` as a layer with a learned bias ``[channels]``, which starts at 0.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.BiasLeakyReLU(2, negative_slope=0.5)(torch.tensor([[-1.0, 2.0]])).tolist()
        [[-0.5, 2.0]]
    """

    def __init__(self, channels: int, negative_slope: float = 0.01, dim: int = 1, inplace: bool = False) -> None:
        super().__init__(channels, dim, inplace)
        self.negative_slope = _checks.as_float("negative_slope", negative_slope)

    def forward(self, x: Tensor) -> Tensor:
        return bias_leaky_relu(x, self.bias, self.negative_slope, self.dim, self.inplace)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, negative_slope={self.negative_slope}"
