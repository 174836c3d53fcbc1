"""The two ops of a list loss, and their derivatives.

The ops are called ``op`` and ``slope_op`` here. The last dimension of ``scores [..., T]`` holds L lists::

    op(scores, labels, valid, offsets, reduction, batch_dims, *params) -> (loss, slope [..., T], active [..., L])
    slope_op(scores, labels, valid, offsets, v, *params) -> [..., T]

`list_op` declares both for given parameters. The ops of a ``weighted`` loss take ``item_weights [..., T]`` after
``offsets``.

The loss is that of each list [..., L] or, by ``reduction``, a mean or sum for each example of the first ``batch_dims``
dimensions (0 except under ``vmap``). The mean is over the lists that contribute, which ``active`` marks. The slope is
the loss's derivative with respect to the scores. One pass computes both, and the plain backward uses this slope. If
that backward is itself differentiated, it calls ``slope_op`` with ``v`` None, which returns the slope of each list's
own loss and has a derivative of its own: ``slope_op`` with ``v`` is the Hessian times v.

The ops take float32 or float64 only. An item that isn't ``valid`` is never read, and its slope is 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from custom_ops._enums import Reduction
from custom_ops._native import define
from custom_ops.library import Function
from custom_ops.library._torch import OpOverload, forward_level
from custom_ops.ranking._lists import batch, list_dot, list_scale, list_share, list_total, per_list, shard


def is_differentiated() -> bool:
    """Return whether the result of a backward may be differentiated."""
    return torch.is_grad_enabled() or forward_level() >= 0


def _loss(
    scores: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    offsets: Tensor | None,
    reduction: int,
    batch_dims: int,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    active = torch.empty_like(per_list(scores, offsets), dtype=torch.bool)
    loss = scores.new_empty(active.shape if reduction == Reduction.NONE else active.shape[:batch_dims])
    return loss, scores.new_empty(scores.shape), active


def _slope(
    scores: Tensor, labels: Tensor, valid: Tensor | None, offsets: Tensor | None, v: Tensor | None, *_: Any
) -> Tensor:
    return scores.new_empty(scores.shape)


WEIGHTED: set[OpOverload] = set()  # the ops of list losses whose kernels take weights of the items


def list_op(third_is_zero: bool = False, weighted: bool = False) -> Callable[[Callable[..., None]], OpOverload]:
    """Define the two ops of a list loss, ``name`` and ``name_slope``, with all their rules, and return the first.

    The decorated function has the name, the formula for each list, and the parameters that follow the common arguments.
    For ``third_is_zero`` see `_attach`.
    """

    def decorate(declared: Callable[..., None]) -> OpOverload:
        op = define(_fake(_loss, declared, declared.__name__, weighted))
        slope_op = define(_fake(_slope, declared, f"{declared.__name__}_slope", weighted))
        _attach(op, slope_op, 5 if weighted else 4, third_is_zero)
        if weighted:
            WEIGHTED.add(op)
        return op

    return decorate


def _fake(common: Callable[..., Any], declared: Callable[..., None], name: str, weighted: bool) -> Callable[..., Any]:
    """Return the fake kernel of that name, with the arguments of ``common`` and then those of ``declared``."""

    def fake(*args: Any) -> Any:
        return common(*args[:4], *args[4 + weighted :])

    signature = inspect.signature(common, eval_str=True)
    shared = list(signature.parameters.values())[:-1]
    if weighted:
        shared.insert(4, shared[3].replace(name="item_weights"))
    own = inspect.signature(declared, eval_str=True).parameters.values()
    parameters = [*shared, *own]
    fake.__name__, fake.__module__, fake.__doc__ = name, declared.__module__, declared.__doc__
    fake.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return fake


def _attach(op: OpOverload, slope_op: OpOverload, given: int, third_is_zero: bool) -> None:
    """Give a list loss, of so many ``given`` tensors, its first and second derivatives, batching and sharding rules.

    A third derivative raises, unless ``third_is_zero`` says that it vanishes because the loss is piecewise quadratic.
    """

    class ListLoss(Function, op=op):
        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            no_gradient(ctx.needs_input_grad[1])  # requested by an outer transform
            *tensors, ctx.reduction, ctx.batch_dims = inputs[: given + 2]
            ctx.params = inputs[given + 2 :]
            _, slope, active = output
            ctx.mark_non_differentiable(slope, active)
            ctx.save_for_backward(*tensors, slope, active)
            ctx.save_for_forward(*tensors, active)

        @staticmethod
        def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
            *tensors, slope, active = ctx.saved_tensors
            valid, offsets = tensors[2:4]
            whole = ctx.reduction != Reduction.NONE
            if is_differentiated():
                slope = slope_op(*tensors, None, *ctx.params)
                of_lists = list_share(grad, active, ctx.reduction == Reduction.MEAN) if whole else grad
                of_scores = list_scale(of_lists, slope, valid, offsets)
            elif not whole:
                of_scores = list_scale(grad, slope, valid, offsets)
            else:  # the slope already contains the share of each list
                of_lists = grad.reshape(*grad.shape, *[1] * (slope.dim() - ctx.batch_dims)) if grad.dim() else grad
                if valid is None and offsets is None:
                    of_scores = of_lists * slope
                else:  # items in no list get 0, whatever the gradient is
                    of_scores = list_scale(of_lists.expand(active.shape), slope, valid, offsets)
            return of_scores, *[None] * (given + 1 + len(ctx.params))

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor, of_labels: Tensor | None, *_: None) -> tuple[Tensor, None, None]:
            no_gradient(of_labels is not None)
            *tensors, active = ctx.saved_tensors
            slope = slope_op(*tensors, None, *ctx.params)
            moved = list_dot(slope, tangent, *tensors[2:4])
            if ctx.reduction != Reduction.NONE:
                moved = list_total(moved, active, ctx.reduction == Reduction.MEAN, ctx.batch_dims)
            return moved, None, None

    class ListSlope(Function, op=slope_op):
        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            *tensors, ctx.params = *inputs[: given + 1], inputs[given + 1 :]
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            *where, v = ctx.saved_tensors
            of_scores = of_v = None
            if v is None:
                of_scores = slope_op(*where, grad, *ctx.params)
            else:
                if ctx.needs_input_grad[0] and not third_is_zero:
                    raise _no_third(op)
                if ctx.needs_input_grad[given]:
                    of_v = slope_op(*where, grad, *ctx.params)
            return of_scores, *[None] * (given - 1), of_v, *[None] * len(ctx.params)

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
            *where, v = ctx.saved_tensors
            of_scores, of_v = tangents[0], tangents[given]
            if v is not None and of_scores is not None and not third_is_zero:
                raise _no_third(op)
            moved = of_scores if v is None else of_v
            if moved is None:
                return torch.zeros_like(where[0])
            moved_slope: Tensor = slope_op(*where, moved, *ctx.params)
            return moved_slope

    for some in (op, slope_op):
        batch(some)
        shard(some)


def _no_third(op: OpOverload) -> Exception:
    return NotImplementedError(f"{op} has no third derivative")


def no_gradient(wanted: bool) -> None:
    if wanted:
        raise ValueError("labels: expected a tensor without gradient, as the loss has none in the labels; detach it")
