"""ReLU with dropout, with both masks merged into one bit per element."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops import _checks, library, shards
from custom_ops._bits import empty_mask
from custom_ops._leaf import leaf
from custom_ops._native import define
from custom_ops.activation.piecewise import ApplyMask, apply_mask, check_inplace, relu
from custom_ops.library import Function


@define
def relu_dropout_forward(x: Tensor, seed: Tensor, p: float, batch_dims: int) -> tuple[Tensor, Tensor]:
    """Return relu(x) / (1 - p) where the element's draw from [0, 1) is at least p, and the mask in bits; a NaN stays.

    Element i of an example draws number i of the Philox generator keyed by its ``seed [*batch]``.
    """
    return x.new_empty(x.shape), empty_mask(x, batch_dims)


class ReLUDropoutForward(Function, op=relu_dropout_forward):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.scale = _dropout_scale(inputs[2])
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.save_for_forward(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor, None, None, None]:
        return ApplyMask.apply(grad, *ctx.saved_tensors, ctx.scale, 0.0), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor, None]:
        return apply_mask(tangent, *ctx.saved_tensors, ctx.scale, 0.0), None


def _dropout_scale(p: float) -> float:
    return 1 / (1 - p) if p < 1 else 0.0


@library.vmap(relu_dropout_forward)
def _(info: Any, in_dims: Any, x: Tensor, seed: Tensor, p: float, batch_dims: int) -> Any:
    x, seed = (library.to_front(t, d, info.batch_size) for t, d in zip((x, seed), in_dims))
    return relu_dropout_forward(x, seed, p, batch_dims + 1), (0, 0)


@leaf
def relu_dropout(
    x: Tensor, p: float = 0.5, training: bool = True, seed: Tensor | None = None, inplace: bool = False
) -> Tensor:
    """Apply dropout to relu(x): each element is dropped with probability p, the others are divided by 1 - p.

    Both masks are merged into the one bit per element that backward keeps. The random numbers are indexed: element i
    takes number i of the Philox generator keyed by the seed, whatever the number of threads. A recomputation under
    activation checkpointing, which restores torch's generator, therefore draws the same numbers.

    Args:
        x: as for `relu`.
        p: the probability of dropping an element, in steps of 2^-32.
        training: without it this is `relu`.
        seed: a scalar int64 tensor on x's device; by default it is drawn from torch's generator, so that
            ``torch.manual_seed`` reproduces it.
        inplace: as for `relu`.

    Raises:
        TypeError: a wrong dtype, or ``p`` isn't a number.
        ValueError: ``p`` outside [0, 1], ``seed`` on another device or not a scalar.

    A NaN stays where it is, dropped or not. The op takes O(n) time and keeps numel / 8 bytes for backward.

    Source: torch.nn.functional.dropout; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.relu_dropout(torch.tensor([-1.0, 2.0]), p=0.0)
        tensor([0., 2.])
    """
    _checks.has_dtype("x", x, _checks.FLOATING)
    p = _probability(p)
    training = _checks.as_bool("training", training)
    check_inplace(x, inplace)
    if seed is not None:
        _checks.has_dtype("seed", seed, (torch.int64,))
        _checks.same_device(x=x, seed=seed)
        if seed.dim():
            raise ValueError(f"seed: expected a scalar, got shape {list(seed.shape)}")
    if not training:
        return relu(x, inplace)
    if shards.is_sharded(x):
        raise NotImplementedError("x: each element's draw depends on its place in the whole tensor, not in a shard")
    if seed is None:
        seed = torch.randint(2**63 - 1, (), device=x.device)
    y = ReLUDropoutForward.apply(x, seed, p, 0)[0]
    return x.copy_(y) if inplace else y


def _probability(p: Any) -> float:
    probability = _checks.as_float("p", p)
    if not 0 <= probability <= 1:
        raise ValueError(f"p: expected a probability, got {p}")
    return probability


class ReLUDropout(torch.nn.Module):
    """Apply `relu_dropout` as a layer; in evaluation mode it is `relu`.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.ReLUDropout(0.5).eval()(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        super().__init__()
        self.p = _probability(p)
        self.inplace = _checks.as_bool("inplace", inplace)

    def forward(self, x: Tensor) -> Tensor:
        return relu_dropout(x, self.p, self.training, inplace=self.inplace)

    def extra_repr(self) -> str:
        return f"p={self.p}{', inplace=True' * self.inplace}"
