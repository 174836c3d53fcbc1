"""The ground of the list losses: their arguments, their derivatives, and the reduction over lists.

A list loss is two ops, here called ``op`` and ``slope_op``, over ``scores [..., T]`` whose last dimension
holds one list (``offsets`` None, L = 1) or L lists one after the other (``offsets [L + 1]``)::

    op(scores, labels, valid, offsets, reduction, batch_dims, *params) -> (loss, slope [..., T], active [..., L])
    slope_op(scores, labels, valid, offsets, v, *params) -> [..., T]

`list_op` declares both, given the parameters.

The loss is that of each list [..., L], or by ``reduction`` the mean over those that contribute, which ``active``
tells, or the sum over all, of each example of the first ``batch_dims`` dimensions (0 but under ``vmap``). The slope
is its derivative in the scores. It comes with the loss because one pass gives both, and serves the plain backward;
whenever that backward is itself differentiated, ``slope_op`` with ``v`` None gives the slope of each list's own
loss, with a derivative of its own: ``slope_op`` with ``v`` is the Hessian times v.

The ops see float32 or float64 only. An item that isn't ``valid`` is never read, and its slope is 0.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.nn import Parameter

from custom_ops import _checks, library, shards
from custom_ops._native import define
from custom_ops._wide import under_autocast
from custom_ops.library import Function
from custom_ops.ranking import _inputs

NONE, MEAN, SUM = map(_checks.REDUCTIONS.index, ("none", "mean", "sum"))  # as numbered in csrc/lists.h


def _per_list(x: Tensor, offsets: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], 1 if offsets is None else offsets.shape[0] - 1))


# ---------------------------------------------------------------- scaling lists, and the adjoint


@define
def list_scale(weight: Tensor, x: Tensor, valid: Tensor | None, offsets: Tensor | None) -> Tensor:
    """Each valid item of x [..., T] times the weight [..., L] of its list; 0 elsewhere."""
    return x.new_empty(x.shape)


@define
def list_dot(x: Tensor, y: Tensor, valid: Tensor | None, offsets: Tensor | None) -> Tensor:
    """The sum of x times y [..., T] over the valid items of each list [..., L]."""
    return _per_list(x, offsets)


class ListScale(Function, op=list_scale):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, x, *where = ctx.saved_tensors
        of_weight = list_dot(grad, x, *where) if ctx.needs_input_grad[0] else None
        of_x = list_scale(weight, grad, *where) if ctx.needs_input_grad[1] else None
        return of_weight, of_x, None, None

    @staticmethod
    def jvp(ctx: Any, weight_t: Tensor | None, x_t: Tensor | None, *_: None) -> Tensor:
        weight, x, *where = ctx.saved_tensors
        parts = [] if weight_t is None else [list_scale(weight_t, x, *where)]
        parts += [] if x_t is None else [list_scale(weight, x_t, *where)]
        return sum(parts[1:], parts[0])


class ListDot(Function, op=list_dot):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, *where = ctx.saved_tensors
        of_x = list_scale(grad, y, *where) if ctx.needs_input_grad[0] else None
        of_y = list_scale(grad, x, *where) if ctx.needs_input_grad[1] else None
        return of_x, of_y, None, None

    @staticmethod
    def jvp(ctx: Any, x_t: Tensor | None, y_t: Tensor | None, *_: None) -> Tensor:
        x, y, *where = ctx.saved_tensors
        parts = [] if x_t is None else [list_dot(x_t, y, *where)]
        parts += [] if y_t is None else [list_dot(x, y_t, *where)]
        return sum(parts[1:], parts[0])


# ---------------------------------------------------------------- the sum or mean over lists, and the adjoint


@define
def list_total(loss: Tensor, active: Tensor, mean: bool, batch_dims: int) -> Tensor:
    """The sum of each example's losses, over the number of the active ones if ``mean``; of none it is 0."""
    return loss.new_empty(loss.shape[:batch_dims])


@define
def list_share(grad: Tensor, active: Tensor, mean: bool) -> Tensor:
    """The adjoint of `list_total`: the gradient [...] of an example for each of its lists, or its share of it."""
    return grad.new_empty(active.shape)


class ListTotal(Function, op=list_total):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, active, ctx.mean, ctx.batch_dims = inputs
        ctx.save_for_backward(active)
        ctx.save_for_forward(active)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return list_share(grad, ctx.saved_tensors[0], ctx.mean), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        total: Tensor = list_total(tangent, ctx.saved_tensors[0], ctx.mean, ctx.batch_dims)
        return total


class ListShare(Function, op=list_share):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, active, ctx.mean = inputs
        ctx.batch_dims = grad.dim()
        ctx.save_for_backward(active)
        ctx.save_for_forward(active)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return list_total(grad, ctx.saved_tensors[0], ctx.mean, ctx.batch_dims), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        share: Tensor = list_share(tangent, ctx.saved_tensors[0], ctx.mean)
        return share


@library.vmap(list_total)
def _(info: Any, in_dims: Any, loss: Tensor, active: Tensor, mean: bool, batch_dims: int) -> Any:
    loss, active = (library.to_front(x, dim, info.batch_size) for x, dim in zip((loss, active), in_dims))
    return list_total(loss, active, mean, batch_dims + 1), 0


@library.vmap(list_share)
def _(info: Any, in_dims: Any, grad: Tensor, active: Tensor, mean: bool) -> Any:
    grad, active = (library.to_front(x, dim, info.batch_size) for x, dim in zip((grad, active), in_dims))
    return list_share(grad, active, mean), 0


# ---------------------------------------------------------------- derivatives of a list loss


def is_differentiated() -> bool:
    """Whether derivatives may be taken of what a backward computes."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def _loss(
    scores: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    offsets: Tensor | None,
    reduction: int,
    batch_dims: int,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    active = torch.empty_like(_per_list(scores, offsets), dtype=torch.bool)
    loss = scores.new_empty(active.shape if reduction == NONE else active.shape[:batch_dims])
    return loss, scores.new_empty(scores.shape), active


def _slope(
    scores: Tensor, labels: Tensor, valid: Tensor | None, offsets: Tensor | None, v: Tensor | None, *_: Any
) -> Tensor:
    return scores.new_empty(scores.shape)


def list_op(third_is_zero: bool = False) -> Callable[[Callable[..., None]], OpOverload]:
    """Define the two ops of a list loss, ``name`` and ``name_slope``, with all their rules; gives the first.

    What is decorated has the name, what the loss is of each list, and the parameters that come after the
    arguments common to all. For ``third_is_zero`` see `_attach`.
    """

    def decorate(declared: Callable[..., None]) -> OpOverload:
        op = define(_fake(_loss, declared, declared.__name__))
        _attach(op, define(_fake(_slope, declared, f"{declared.__name__}_slope")), third_is_zero)
        return op

    return decorate


def _fake(common: Callable[..., Any], declared: Callable[..., None], name: str) -> Callable[..., Any]:
    """The fake kernel of that name, with the arguments of ``common`` and then those of ``declared``."""

    def fake(*args: Any) -> Any:
        return common(*args)

    signature = inspect.signature(common, eval_str=True)
    own = inspect.signature(declared, eval_str=True).parameters.values()
    parameters = [*list(signature.parameters.values())[:-1], *own]
    fake.__name__, fake.__module__, fake.__doc__ = name, declared.__module__, declared.__doc__
    fake.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return fake


def _attach(op: OpOverload, slope_op: OpOverload, third_is_zero: bool = False) -> None:
    """Give a list loss its derivatives up to the second, batching rules and sharding rules.

    A third derivative raises, unless ``third_is_zero`` says that it vanishes: of a loss that is a
    quadratic function of the scores, piece by piece.
    """

    class ListLoss(Function, op=op):
        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            _no_gradient(ctx.needs_input_grad[1])  # of an outer transform
            *tensors, ctx.reduction, ctx.batch_dims = inputs[:6]
            ctx.params = inputs[6:]
            _, slope, active = output
            ctx.mark_non_differentiable(slope, active)
            ctx.save_for_backward(*tensors, slope, active)
            ctx.save_for_forward(*tensors, active)

        @staticmethod
        def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
            scores, labels, valid, offsets, slope, active = ctx.saved_tensors
            whole = ctx.reduction != NONE
            if is_differentiated():
                slope = slope_op(scores, labels, valid, offsets, None, *ctx.params)
                of_lists = list_share(grad, active, ctx.reduction == MEAN) if whole else grad
                of_scores = list_scale(of_lists, slope, valid, offsets)
            elif not whole:
                of_scores = list_scale(grad, slope, valid, offsets)
            else:  # the share of each list is in the slope
                of_lists = grad.reshape(*grad.shape, *[1] * (slope.dim() - ctx.batch_dims)) if grad.dim() else grad
                if valid is None and offsets is None:
                    of_scores = of_lists * slope
                else:  # what is in no list gets 0, whatever the gradient
                    of_scores = list_scale(of_lists.expand(active.shape), slope, valid, offsets)
            return of_scores, *[None] * (5 + len(ctx.params))

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor, of_labels: Tensor | None, *_: None) -> tuple[Tensor, None, None]:
            _no_gradient(of_labels is not None)
            scores, labels, valid, offsets, active = ctx.saved_tensors
            slope = slope_op(scores, labels, valid, offsets, None, *ctx.params)
            moved = list_dot(slope, tangent, valid, offsets)
            if ctx.reduction != NONE:
                moved = list_total(moved, active, ctx.reduction == MEAN, ctx.batch_dims)
            return moved, None, None

    class ListSlope(Function, op=slope_op):
        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            *tensors, ctx.params = *inputs[:5], inputs[5:]
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
                if ctx.needs_input_grad[4]:
                    of_v = slope_op(*where, grad, *ctx.params)
            return of_scores, None, None, None, of_v, *[None] * len(ctx.params)

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
            *where, v = ctx.saved_tensors
            of_scores, of_v = tangents[0], tangents[4]
            if v is not None and of_scores is not None and not third_is_zero:
                raise _no_third(op)
            moved = of_scores if v is None else of_v
            if moved is None:
                return torch.zeros_like(where[0])
            moved_slope: Tensor = slope_op(*where, moved, *ctx.params)
            return moved_slope

    for some in (op, slope_op):
        _batch(some)
        _shard(some)


def _no_third(op: OpOverload) -> Exception:
    return NotImplementedError(f"{op} has no third derivative")


def _no_gradient(wanted: bool) -> None:
    if wanted:
        raise ValueError("labels: expected a tensor without gradient, as the loss has none in the labels; detach it")


def _batch(op: OpOverload) -> None:
    """Every tensor but the offsets may be vmapped."""
    names = [argument.name for argument in op._schema.arguments]
    outputs = len(op._schema.returns)

    @library.vmap(op)
    def _(info: Any, in_dims: Any, *args: Any) -> Any:
        def front(name: str, arg: Any, dim: int | None) -> Any:
            if name == "batch_dims":
                return arg + 1
            if name == "offsets" and dim is not None:
                raise RuntimeError("cu_lengths: can't be vmapped, because each example would have lists of its own")
            is_batch = isinstance(arg, Tensor) and name != "offsets"
            return library.to_front(arg, dim, info.batch_size) if is_batch else arg

        result = op(*map(front, names, args, in_dims))
        return result, (0,) * outputs if outputs > 1 else 0


def _shard(op: OpOverload) -> None:
    """Sharded alike in any dimension but the items'; not at all if the op reduces over the lists."""
    names = [argument.name for argument in op._schema.arguments]
    outputs = len(op._schema.returns)

    @library.sharding(op)
    def _(*args: Any) -> Any:
        from torch.distributed.tensor import Replicate, Shard

        def placed(name: str, arg: Any, placement: Any) -> Any:
            if not hasattr(arg, "placements"):
                return None
            return Replicate() if name == "offsets" else placement

        whole = any(name == "reduction" and arg != NONE for name, arg in zip(names, args))
        free = [Replicate(), *(Shard(d) for d in range(0 if whole else args[0].ndim - 1))]
        return [([p] * outputs, [placed(name, arg, p) for name, arg in zip(names, args)]) for p in free]


for _op in (list_scale, list_dot, _inputs.list_labels):
    _batch(_op)
    _shard(_op)


# ---------------------------------------------------------------- the public arguments


def list_loss(
    op: OpOverload,
    scores: Tensor,
    labels: Tensor,
    params: Sequence[Any],
    mask: Tensor | None,
    lengths: Tensor | None,
    cu_lengths: Tensor | None,
    weights: Tensor | None,
    reduction: str,
    purpose: int,
) -> Tensor:
    """Check what all list losses take, call ``op`` on it and reduce over the lists.

    ``purpose`` says what the loss makes of its labels, as `_inputs` has it. float64 labels of which it needs more than
    the order are computed with in float64, whatever the scores are.
    """
    valid, offsets = checked(scores, labels, mask, lengths, cu_lengths, weights, reduction)
    wide = torch.promote_types(scores.dtype, torch.float32)
    dtype = torch.float64 if labels.dtype == torch.float64 and purpose != _inputs.ORDER else wide
    # A DTensor is left sharded until only the losses of its lists are to be communicated.
    whole = weights is None and type(scores) in (Tensor, Parameter)
    by_op = _checks.REDUCTIONS.index(reduction) if whole else NONE
    labels = _inputs.in_dtype(labels, dtype, valid, offsets, purpose)
    loss, _, active = library.direct(op)(scores.to(dtype), labels, valid, offsets, by_op, 0, *params)
    if by_op == NONE:
        if offsets is None and (weights is not None or reduction == "none"):
            loss, active = loss.squeeze(-1), active.squeeze(-1)
        loss = reduce(loss, active, weights, reduction)
    return rounded(loss, wide if under_autocast(scores) else scores.dtype)


def rounded(loss: Tensor, dtype: torch.dtype) -> Tensor:
    """The loss in ``dtype``; a sum over pairs that float16 can't hold is told of, where no device has to be awaited."""
    out = loss.to(dtype)
    eager = type(out) is Tensor and not (torch.compiler.is_compiling() or library._are_functorch_transforms_active())  # type: ignore[attr-defined]
    if dtype == torch.float16 and out.device.type == "cpu" and eager and bool(out.isinf().any()):
        warnings.warn(
            "the loss is beyond the range of float16, or near it: where the loss is a sum over pairs, pass "
            "normalize=True to divide by their number; or pass float32 scores",
            stacklevel=4,
        )
    return out


def checked(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    cu_lengths: Tensor | None,
    weights: Tensor | None,
    reduction: str,
    dtypes: Sequence[torch.dtype] = _checks.FLOATING,
) -> tuple[Tensor | None, Tensor | None]:
    """What `valid_items` gives, once all arguments are checked."""
    not_nested("scores", scores)
    _checks.has_dtype("scores", scores, dtypes)
    if scores.dim() == 0:
        raise ValueError("scores: expected [..., n], got a single number")
    _checks.is_tensor("labels", labels)
    if labels.is_complex():
        raise TypeError(f"labels: expected real numbers, got {str(labels.dtype).removeprefix('torch.')}")
    _no_gradient(labels.requires_grad)
    _has_shape("labels", labels, scores, scores.shape)
    valid, offsets = valid_items("scores", scores, mask, lengths, cu_lengths)
    if weights is not None:
        _checks.has_dtype("weights", weights, _checks.FLOATING)
        per_list = scores.shape[:-1] if offsets is None else (*scores.shape[:-1], offsets.shape[0] - 1)
        _has_shape("weights", weights, scores, torch.Size(per_list))
    _checks.is_one_of("reduction", reduction, _checks.REDUCTIONS)
    return valid, offsets


def not_nested(name: str, x: Tensor) -> None:
    if isinstance(x, Tensor) and x.is_nested:
        raise TypeError(
            f"{name}: expected a dense tensor, got a nested tensor; pass its values() with cu_lengths=its offsets()"
        )


def valid_items(
    name: str, x: Tensor, mask: Tensor | None, lengths: Tensor | None, cu_lengths: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Which items of ``x``, called ``name``, are valid, None if all are; and the bounds of its lists, if several.

    All arguments are checked.
    """
    offsets = None
    if cu_lengths is not None:
        if lengths is not None:
            raise ValueError("lengths, cu_lengths: expected at most one of them, got both")
        offsets = _integers("cu_lengths", cu_lengths, x)
        _checks.has_dims("cu_lengths", offsets, "[L + 1]")
        if offsets.shape[0] == 0:
            raise ValueError("cu_lengths: expected at least one element, got none")
        _checks.same_device(**{name: x, "cu_lengths": offsets})
    if mask is not None:
        _checks.has_dtype("mask", mask, (torch.bool,))
        _has_shape("mask", mask, x, x.shape, name)
    if lengths is None:
        return mask, offsets
    lengths = _integers("lengths", lengths, x)
    _has_shape("lengths", lengths, x, x.shape[:-1], name)
    begun: Tensor = _inputs.list_valid(lengths, x.shape[-1])
    return begun if mask is None else mask & begun, offsets


def _integers(name: str, value: Any, x: Tensor) -> Tensor:
    """A tensor of int64, of one of integers, or of what else makes one: a list, an array of numpy's."""
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value, device=x.device)
        except (RuntimeError, TypeError, ValueError):
            raise TypeError(f"{name}: expected a tensor or a list of integers, got {type(value).__name__}") from None
        value = value if value.numel() else value.to(torch.int64)
    _checks.has_dtype(name, value, _checks.INDEX)
    return value.to(torch.int64)


def _has_shape(name: str, tensor: Tensor, beside: Tensor, shape: torch.Size, called: str = "scores") -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != beside.device:
        _checks.same_device(**{called: beside, name: tensor})


def reduce(loss: Tensor, active: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    """The mean is over the lists that contribute; of none it is 0."""
    if weights is not None or reduction == "none" or shards.is_sharded(loss):
        return _reduce_by_torch(loss, active, weights, reduction)
    total: Tensor = list_total(loss, active, reduction == "mean", 0)
    return total


def _reduce_by_torch(loss: Tensor, active: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    if weights is not None:
        weights = weights.to(loss.dtype)
        loss = torch.where((weights == 0) & ~loss.isfinite(), 0, loss) * weights
    if reduction == "none":
        return loss
    # In double, as torch's sums depend on the number of threads.
    total = loss.sum(dtype=torch.float64)
    if reduction == "mean":
        count = active.sum() if weights is None else (weights * active).sum(dtype=torch.float64)
        if shards.is_sharded(count):
            count = shards.summed_up(count)
        total = total / torch.where(count == 0, 1, count)
    return total.to(loss.dtype)


class ListLossModule(torch.nn.Module):
    """A list loss as a layer: subclasses name the ``function`` and pass its own arguments on."""

    function: Callable[..., Tensor]

    def __init__(self, reduction: str = "mean", **own: Any) -> None:
        super().__init__()
        self.reduction, self.own = reduction, {name: _checks.plain(value) for name, value in own.items()}
        with torch.no_grad():
            nothing = torch.empty(0, device="cpu")
            self(nothing, nothing)  # the function checks them

    def forward(
        self,
        scores: Tensor,
        labels: Tensor,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_lengths: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        where: dict[str, Any] = {"mask": mask, "lengths": lengths, "cu_lengths": cu_lengths, "weights": weights}
        return type(self).function(scores, labels, **where, reduction=self.reduction, **self.own)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in {**self.own, "reduction": self.reduction}.items())


# ---------------------------------------------------------------- for the registry entries


def relative_gains(labels: Tensor, highest: Tensor, gain: str) -> Tensor:
    """2^label - 1 over 2^highest, or label over highest, by ``gain``; a label of at most 0 has none."""
    if gain == "exponential":
        gains = -torch.expm1(-math.log(2) * labels) * torch.exp2(labels - highest)
    else:
        gains = labels / highest
    return torch.where(labels <= 0, 0, gains)
