"""The ops that all list losses share: scaling each list, sums over each list and over all lists, and their adjoints.

The last dimension of ``x [..., T]`` holds one list (``offsets`` None, L = 1), or L lists one after the other (``offsets
[L + 1]``). An item that isn't ``valid`` is never read.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from custom_ops import library
from custom_ops._bilinear import bilinear
from custom_ops._enums import Reduction
from custom_ops._native import define
from custom_ops.library import Function
from custom_ops.library._torch import OpOverload, schema
from custom_ops.ranking._inputs import list_labels


def per_list(x: Tensor, offsets: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], 1 if offsets is None else offsets.shape[0] - 1))


# ---------------------------------------------------------------- scaling lists, and the adjoint


@define
def list_scale(weight: Tensor, x: Tensor, valid: Tensor | None, offsets: Tensor | None) -> Tensor:
    """Return each valid item of x [..., T] times the weight [..., L] of its list, and 0 elsewhere."""
    return x.new_empty(x.shape)


@define
def list_dot(x: Tensor, y: Tensor, valid: Tensor | None, offsets: Tensor | None) -> Tensor:
    """Return the sum of x times y [..., T] over the valid items of each list [..., L]."""
    return per_list(x, offsets)


class ListScale(Function, op=list_scale):
    setup_context, jvp = bilinear(list_scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, x, *where = ctx.saved_tensors
        of_weight = list_dot(grad, x, *where) if ctx.needs_input_grad[0] else None
        of_x = list_scale(weight, grad, *where) if ctx.needs_input_grad[1] else None
        return of_weight, of_x, None, None


class ListDot(Function, op=list_dot):
    setup_context, jvp = bilinear(list_dot)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, *where = ctx.saved_tensors
        of_x = list_scale(grad, y, *where) if ctx.needs_input_grad[0] else None
        of_y = list_scale(grad, x, *where) if ctx.needs_input_grad[1] else None
        return of_x, of_y, None, None


# ---------------------------------------------------------------- the sum or mean over lists, and the adjoint


@define
def list_total(loss: Tensor, active: Tensor, mean: bool, batch_dims: int) -> Tensor:
    """Return the sum of each example's losses, divided by the number of active lists (at least 1) if ``mean``."""
    return loss.new_empty(loss.shape[:batch_dims])


@define
def list_share(grad: Tensor, active: Tensor, mean: bool) -> Tensor:
    """Return the adjoint of `list_total`: the gradient [...] of an example, or its share, for each of its lists."""
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


# ---------------------------------------------------------------- rules that ops over lists share

WHOLE = ("offsets", "cutoffs", "discounts")  # the tensors that all lists share


def batch(op: OpOverload) -> None:
    """Register a rule that lets every tensor but the offsets be vmapped."""
    names = [argument.name for argument in schema(op).arguments]
    outputs = len(schema(op).returns)

    @library.vmap(op)
    def _(info: Any, in_dims: Any, *args: Any) -> Any:
        def front(name: str, arg: Any, dim: int | None) -> Any:
            if name == "batch_dims":
                return arg + 1
            if name == "offsets" and dim is not None:
                raise RuntimeError("cu_lengths: can't be vmapped, because each example would have lists of its own")
            is_batch = isinstance(arg, Tensor) and name not in WHOLE
            return library.to_front(arg, dim, info.batch_size) if is_batch else arg

        result = op(*map(front, names, args, in_dims))
        return result, (0,) * outputs if outputs > 1 else 0


def shard(op: OpOverload) -> None:
    """Register a rule that shards all tensors alike in any dimension but the items', unless ``op`` reduces over
    lists.
    """
    names = [argument.name for argument in schema(op).arguments]
    outputs = len(schema(op).returns)

    @library.sharding(op)
    def _(*args: Any) -> Any:
        from torch.distributed.tensor import Replicate, Shard

        def placed(name: str, arg: Any, placement: Any) -> Any:
            if not hasattr(arg, "placements"):
                return None
            return Replicate() if name in WHOLE else placement

        whole = any(name == "reduction" and arg != Reduction.NONE for name, arg in zip(names, args))
        free = [Replicate(), *(Shard(d) for d in range(0 if whole else args[0].ndim - 1))]
        return [([p] * outputs, [placed(name, arg, p) for name, arg in zip(names, args)]) for p in free]


for _op in (list_scale, list_dot, list_labels):
    batch(_op)
    shard(_op)
