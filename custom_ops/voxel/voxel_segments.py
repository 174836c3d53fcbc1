"""Reductions over segments of points, and maps of the points that need all of their segment, with all derivatives.

Point p has a weight w[p], a row x[q(p)] and a segment r(p). Every op here is a derivative of the form

    T = sum over p of w[p] <sums[r(p)], x[q(p)]>

`segment_reduce` is its derivative with respect to ``sums``, and `segment_spread` returns those with respect to ``x``
and ``w``. Their own derivatives are these ops again. The other reductions and maps have derivatives that are made of
these and of each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops import _checks, library, shards
from custom_ops._bilinear import add, bilinear
from custom_ops._leaf import leaf
from custom_ops._native import define
from custom_ops._wide import wide
from custom_ops.library import Function


@define
def segment_reduce(
    x: Tensor, weight: Tensor | None, indptr: Tensor, perm: Tensor | None, mean: bool, bins: int, plane: int
) -> Tensor:
    """Return out[..., s, c] = sum of w[p] x[..., q(p), c] over p = perm[i] with indptr[s] <= i < indptr[s + 1].

    ``bins`` points share a row and lie ``plane`` apart: q(p) = p // (bins plane) plane + p % plane. ``mean`` divides by
    the number of points. ``indptr`` and ``perm`` have the leading dimensions of x, or none. Without ``perm`` the points
    are in order; without ``weight`` all weights are 1.
    """
    return x.new_empty((*x.shape[:-2], indptr.shape[-1] - 1, x.shape[-1]))


@define
def segment_spread(
    sums: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    indptr: Tensor,
    perm: Tensor | None,
    points: int,
    mean: bool,
    bins: int,
    plane: int,
    of_x: bool,
) -> tuple[Tensor, Tensor]:
    """Return the adjoints of `segment_reduce`: T's derivatives with respect to x and, if x is given, to the weight.

    They are [..., q, c] = sum of w[p] sums[..., r(p), c] over the points of row q, and [..., p] = sum over c of
    sums[..., r(p), c] x[..., q(p), c]. An output that isn't wanted is empty; points in no segment contribute nothing.
    """
    grad_x = (*sums.shape[:-2], points // bins, sums.shape[-1]) if of_x else (0,)
    grad_weight = (0,) if x is None else (*sums.shape[:-2], points)
    return sums.new_empty(grad_x), sums.new_empty(grad_weight)


@define
def segment_extreme(x: Tensor, indptr: Tensor, perm: Tensor | None, largest: bool) -> tuple[Tensor, Tensor]:
    """Return each segment's largest or smallest x[..., p, c] and the first point that has it; 0 and -1 if it is
    empty.
    """
    shape = (*x.shape[:-2], indptr.shape[-1] - 1, x.shape[-1])
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


@define
def segment_prod(x: Tensor, indptr: Tensor, perm: Tensor | None) -> Tensor:
    """Return the product of x over each segment, 1 if it is empty."""
    return x.new_empty((*x.shape[:-2], indptr.shape[-1] - 1, x.shape[-1]))


@define
def segment_scan(factors: Tensor, terms: Tensor | None, indptr: Tensor, perm: Tensor | None, backwards: bool) -> Tensor:
    """Return the rows y of a linear recurrence over the points of each segment, in their order or backwards.

    The first point has y = 0, or 1 without ``terms``, and each next one has factor * y + term of the one before it. So
    without terms y is the product of the factors before the point. Points in no segment get 0.
    """
    return factors.new_empty(factors.shape)


@define
def segment_logsumexp(x: Tensor, indptr: Tensor, perm: Tensor | None) -> Tensor:
    """Return the logarithm of the sum of e^x over each segment, -inf if it is empty."""
    return x.new_empty((*x.shape[:-2], indptr.shape[-1] - 1, x.shape[-1]))


@define
def segment_softmax(x: Tensor, indptr: Tensor, perm: Tensor | None) -> Tensor:
    """Return e^x divided by its sum over the segment; 0 for points in no segment and where all x are -inf."""
    return x.new_empty(x.shape)


@define
def segment_softmax_adjoint(grad: Tensor, y: Tensor, indptr: Tensor, perm: Tensor | None) -> Tensor:
    """Return y (grad - sum of grad y over the segment), the adjoint of `segment_softmax` with the result y."""
    return grad.new_empty(grad.shape)


@define
def segment_center(x: Tensor, indptr: Tensor, perm: Tensor | None) -> Tensor:
    """Return the difference of x from its mean over the segment; 0 for points in no segment."""
    return x.new_empty(x.shape)


@define
def pair_reduce(x: Tensor, weight: Tensor, rows: Tensor, ranks: Tensor, segments: int) -> Tensor:
    """Return out[..., s, c] = sum of weight[..., p] x[..., rows[p], c] over the pairs p with ranks[p] = s.

    Pairs with a negative row or rank contribute nothing. Rows and ranks have the leading dimensions of x, or none.
    """
    return x.new_empty((*x.shape[:-2], segments, x.shape[-1]))


@define
def pair_dots(sums: Tensor, x: Tensor, ranks: Tensor, rows: Tensor) -> Tensor:
    """Return [..., p] = sum over c of sums[..., ranks[p], c] x[..., rows[p], c], or 0 for a negative row or rank."""
    return x.new_empty((*x.shape[:-2], rows.shape[-1]))


class SegmentReduce(Function, op=segment_reduce):
    """The op is bilinear in x and weight."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, indptr, perm, *ctx.options = inputs
        ctx.points = x.shape[-2] * ctx.options[1]
        needs_x = weight is not None and (ctx.needs_input_grad[1])
        ctx.save_for_backward(x if needs_x else None, weight, indptr, perm)
        ctx.save_for_forward(x, weight, indptr, perm)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, indptr, perm = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad[:2]
        grads = segment_spread(grad, x, weight, indptr, perm, ctx.points, *ctx.options, of_x)
        return grads[0] if of_x else None, grads[1] if of_weight else None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, of_x: Tensor | None, of_weight: Tensor | None, *_: None) -> Tensor | None:
        x, weight, *geometry = ctx.saved_tensors
        return add(
            None if of_x is None else segment_reduce(of_x, weight, *geometry, *ctx.options),
            None if of_weight is None else segment_reduce(x, of_weight, *geometry, *ctx.options),
        )


class SegmentSpread(Function, op=segment_spread):
    """The first output is bilinear in sums and weight, the second in sums and x."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        sums, x, weight, indptr, perm, ctx.points, *ctx.options, ctx.of_x = inputs
        ctx.mark_non_differentiable(*([] if ctx.of_x else output[:1]), *(output[1:] if x is None else []))
        ctx.save_for_backward(sums, x, weight, indptr, perm)
        ctx.save_for_forward(sums, x, weight, indptr, perm)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None) -> tuple[Tensor | None, ...]:
        sums, x, weight, *geometry = ctx.saved_tensors
        u, v = u if ctx.of_x else None, None if x is None else v
        of_sums, of_x, of_weight = ctx.needs_input_grad[:3]
        in_sums = in_x = in_weight = None
        if of_sums:
            in_sums = add(
                None if u is None else segment_reduce(u, weight, *geometry, *ctx.options),
                None if v is None else segment_reduce(x, v, *geometry, *ctx.options),
            )
        if of_x and v is not None:
            in_x = segment_spread(sums, None, v, *geometry, ctx.points, *ctx.options, True)[0]
        if of_weight and u is not None:
            in_weight = segment_spread(sums, u, None, *geometry, ctx.points, *ctx.options, False)[1]
        return in_sums, in_x, in_weight, None, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, sums_t: Tensor | None, x_t: Tensor | None, weight_t: Tensor | None, *_: None) -> Any:
        sums, x, weight, *geometry = ctx.saved_tensors

        def spread(sums: Tensor, x: Tensor | None, weight: Tensor | None, of_x: bool) -> tuple[Tensor, Tensor]:
            return segment_spread(sums, x, weight, *geometry, ctx.points, *ctx.options, of_x)

        rows: list[Tensor | None] = []
        dots: list[Tensor | None] = []
        if sums_t is not None:
            both = spread(sums_t, x, weight, ctx.of_x)
            rows, dots = [both[0]], [both[1]]
        if weight_t is not None and ctx.of_x:
            rows.append(spread(sums, None, weight_t, True)[0])
        if x_t is not None:
            dots.append(spread(sums, x_t, None, False)[1])
        return add(*rows) if ctx.of_x else None, None if x is None else add(*dots)


class PairReduce(Function, op=pair_reduce):
    """The op is bilinear in x and weight. For the gradient of x, rows and segments change places."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, rows, ranks, ctx.segments = inputs
        ctx.rows = x.shape[-2]
        ctx.save_for_backward(x, weight, rows, ranks)
        ctx.save_for_forward(x, weight, rows, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rows, ranks = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad[:2]
        in_x = pair_reduce(grad, weight, ranks, rows, ctx.rows) if of_x else None
        return in_x, pair_dots(grad, x, ranks, rows) if of_weight else None, None, None, None

    @staticmethod
    def jvp(ctx: Any, of_x: Tensor | None, of_weight: Tensor | None, *_: None) -> Tensor | None:
        x, weight, rows, ranks = ctx.saved_tensors
        return add(
            None if of_x is None else pair_reduce(of_x, weight, rows, ranks, ctx.segments),
            None if of_weight is None else pair_reduce(x, of_weight, rows, ranks, ctx.segments),
        )


class PairDots(Function, op=pair_dots):
    """The op is bilinear in sums and x."""

    setup_context, jvp = bilinear(pair_dots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sums, x, ranks, rows = ctx.saved_tensors
        of_sums, of_x = ctx.needs_input_grad[:2]
        in_sums = pair_reduce(x, grad, rows, ranks, sums.shape[-2]) if of_sums else None
        return in_sums, pair_reduce(sums, grad, ranks, rows, x.shape[-2]) if of_x else None, None, None


def _pick(x: Tensor, argmax: Tensor) -> Tensor:
    """Return x[..., argmax[..., s, c], c], or 0 where the index is -1."""
    if x.shape[-2] == 0:
        return x.new_zeros(argmax.shape)
    return x.gather(-2, argmax.clamp_min(0)).where(argmax >= 0, 0)


class SegmentExtreme(Function, op=segment_extreme):
    """The op is linear in x for a constant index."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.points = inputs[0].shape[-2]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.save_for_forward(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor, None, None, None]:
        (index,) = ctx.saved_tensors
        # Empty segments write to an extra row after the points. No element is written twice. As the zeros are expanded,
        # the gradient's memory is filled once.
        zeros = grad.new_zeros(()).expand(*grad.shape[:-2], ctx.points + 1, grad.shape[-1])
        return zeros.scatter(-2, index.where(index >= 0, ctx.points), grad)[..., :-1, :], None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor, None]:
        return _pick(tangent, *ctx.saved_tensors), None


class SegmentProd(Function, op=segment_prod):
    """The slope at a point is the product of the others: of those before it times those behind it, without a quotient,
    which a zero would make 0 / 0.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, *geometry = ctx.saved_tensors
        spread, _ = segment_spread(wide(grad), None, None, *geometry, x.shape[-2], False, 1, 1, True)
        return (_others(x, *geometry) * spread).to(x.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        x, *geometry = ctx.saved_tensors
        return _sums(_others(x, *geometry) * wide(tangent), *geometry).to(x.dtype)


def _others(x: Tensor, indptr: Tensor, perm: Tensor | None) -> Tensor:
    """Return, for each point, the product of the other points of its segment; 0 for points in no segment."""
    x = wide(x)
    return segment_scan(x, None, indptr, perm, False) * segment_scan(x, None, indptr, perm, True)


class SegmentScan(Function, op=segment_scan):
    """The adjoint of the recurrence is the same recurrence in the other direction, with the gradients as its terms."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        factors, _, indptr, perm, ctx.backwards = inputs
        ctx.save_for_backward(factors, output, indptr, perm)
        ctx.save_for_forward(factors, output, indptr, perm)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factors, y, *geometry = ctx.saved_tensors
        of_terms = segment_scan(factors, grad, *geometry, not ctx.backwards)
        return of_terms * y, of_terms if ctx.needs_input_grad[1] else None, None, None, None

    @staticmethod
    def jvp(ctx: Any, factors_t: Tensor | None, terms_t: Tensor | None, *_: None) -> Tensor:
        factors, y, *geometry = ctx.saved_tensors
        terms = add(None if factors_t is None else factors_t * y, terms_t)
        return segment_scan(factors, terms, *geometry, ctx.backwards)


class SegmentLogsumexp(Function, op=segment_logsumexp):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)
        ctx.points = inputs[0].shape[-2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, *geometry = ctx.saved_tensors
        spread, _ = segment_spread(grad, None, None, *geometry, ctx.points, False, 1, 1, True)
        return segment_softmax(x, *geometry) * spread, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        x, *geometry = ctx.saved_tensors
        return _sums(segment_softmax(x, *geometry) * tangent, *geometry)


class SegmentSoftmax(Function, op=segment_softmax):
    """The Jacobian is symmetric within each segment."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output, *inputs[1:])
        ctx.save_for_forward(output, *inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return segment_softmax_adjoint(grad, *ctx.saved_tensors), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return segment_softmax_adjoint(tangent, *ctx.saved_tensors)


class SegmentSoftmaxAdjoint(Function, op=segment_softmax_adjoint):
    """The op is linear and symmetric in grad, and quadratic in y."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        grad, y, *geometry = ctx.saved_tensors
        in_grad = segment_softmax_adjoint(u, y, *geometry) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return in_grad, None, None, None
        u, g, wide_y = wide(u), wide(grad), wide(y)
        in_y = u * (g - _totals(g * wide_y, *geometry)) - g * _totals(u * wide_y, *geometry)
        return in_grad, in_y.to(y.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, grad_t: Tensor | None, y_t: Tensor | None, *_: None) -> Tensor | None:
        grad, y, *geometry = ctx.saved_tensors
        of_y = None
        if y_t is not None:
            g, wide_y, t = wide(grad), wide(y), wide(y_t)
            of_y = t * (g - _totals(g * wide_y, *geometry)) - wide_y * _totals(g * t, *geometry)
            of_y = of_y.to(y.dtype)
        return add(None if grad_t is None else segment_softmax_adjoint(grad_t, y, *geometry), of_y)


class SegmentCenter(Function, op=segment_center):
    """The op is linear and symmetric."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return segment_center(grad, *ctx.saved_tensors), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return segment_center(tangent, *ctx.saved_tensors)


def _sums(x: Tensor, indptr: Tensor, perm: Tensor | None) -> Tensor:
    return segment_reduce(x, None, indptr, perm, False, 1, 1)


def _totals(x: Tensor, indptr: Tensor, perm: Tensor | None) -> Tensor:
    """Return, for each point, the sum of x over its segment."""
    return segment_spread(_sums(x, indptr, perm), None, None, indptr, perm, x.shape[-2], False, 1, 1, True)[0]


# ---------------------------------------------------------------- batching


def _batched(info: Any, in_dims: Any, tensors: Any) -> list[Tensor | None]:
    """Move the vmapped dimension to the front; the geometry, the last two arguments, gets one only if it needs it."""
    *values, indptr, perm = zip(tensors, in_dims)
    result = [None if t is None else library.to_front(t, d, info.batch_size) for t, d in values]
    lead = next(t for t in result if t is not None).dim() - 2
    own = any(d is not None for t, d in (indptr, perm)) or indptr[0].dim() > 1
    for t, d in (indptr, perm):
        if t is not None and own:
            t = library.to_front(t, d, info.batch_size)
            # If each example of vmap has a geometry, it is expanded over the batch dimensions within the example.
            missing = lead - (t.dim() - 1)
            shape = next(r for r in result if r is not None).shape[:lead]
            t = t.reshape(t.shape[0], *[1] * missing, *t.shape[1:]).expand(*shape, t.shape[-1])
        result.append(t)
    return result


@library.vmap(segment_reduce)
def _(info: Any, in_dims: Any, *args: Any) -> Any:
    return segment_reduce(*_batched(info, in_dims[:4], args[:4]), *args[4:]), 0


@library.vmap(segment_spread)
def _(info: Any, in_dims: Any, *args: Any) -> Any:
    grads = segment_spread(*_batched(info, in_dims[:5], args[:5]), *args[5:])
    of_x, x = args[-1], args[1]
    return grads, (0 if of_x else None, None if x is None else 0)


@library.vmap(pair_reduce)
def _(info: Any, in_dims: Any, *args: Any) -> Any:
    return pair_reduce(*_batched(info, in_dims[:4], args[:4]), args[4]), 0


@library.vmap(pair_dots)
def _(info: Any, in_dims: Any, *args: Any) -> Any:
    return pair_dots(*_batched(info, in_dims, args)), 0


@library.vmap(segment_extreme)
def _(info: Any, in_dims: Any, *args: Any) -> Any:
    return segment_extreme(*_batched(info, in_dims[:3], args[:3]), args[3]), (0, 0)


@library.vmap(segment_scan)
def _(info: Any, in_dims: Any, *args: Any) -> Any:
    return segment_scan(*_batched(info, in_dims[:4], args[:4]), args[4]), 0


def _batch(op: Any) -> None:
    @library.vmap(op)
    def _(info: Any, in_dims: Any, *args: Any) -> Any:
        return op(*_batched(info, in_dims, args)), 0


for _op in (segment_prod, segment_logsumexp, segment_softmax, segment_softmax_adjoint, segment_center):
    _batch(_op)


# ---------------------------------------------------------------- segment_sum


def check_segments(x: Tensor, indptr: Tensor, perm: Tensor | None, lead: int) -> None:
    """Check ``indptr`` and ``perm`` for values with ``lead`` leading dimensions."""
    given = [("indptr", indptr, "[..., V + 1]")]
    if perm is not None:
        given.append(("perm", perm, "[..., N]"))
    for name, tensor, layout in given:
        _checks.has_dtype(name, tensor, _checks.INDEX)
        if tensor.dim() - 1 not in (0, lead) or tensor.shape[:-1] not in (x.shape[:lead], ()):
            raise ValueError(
                f"{name}: expected {layout} with the leading dimensions {list(x.shape[:lead])} of x or none, "
                f"got shape {list(tensor.shape)}"
            )
    if perm is not None and perm.dim() != indptr.dim():
        raise ValueError(f"perm: expected as many dimensions as indptr ({indptr.dim()}), got shape {list(perm.shape)}")
    if indptr.shape[-1] < 1:
        raise ValueError("indptr: expected at least one boundary, got none")


def check_points(x: Tensor, indptr: Tensor, perm: Tensor | None) -> None:
    """Check x ``[..., N, C]`` and its segments; its dtype has been checked."""
    if x.dim() < 2:
        raise ValueError(f"x: expected [..., N, C], got shape {list(x.shape)}")
    check_segments(x, indptr, perm, x.dim() - 2)
    if perm is not None and perm.shape[-1] != x.shape[-2]:
        raise ValueError(f"perm: expected {x.shape[-2]} points as in x, got {perm.shape[-1]}")
    _checks.same_device(x=x, indptr=indptr, **({} if perm is None else {"perm": perm}))


@leaf
def segment_sum(x: Tensor, indptr: Tensor, perm: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """Sum the rows of each segment, in any order and optionally weighted: the building block of this family.

    ``out[..., v, c] = sum of weight[..., p] x[..., p, c]`` over the points ``p = perm[..., i]`` with ``indptr[..., v]
    <= i < indptr[..., v + 1]``. Points in no segment contribute nothing, even if they are NaN, and their gradients are
    exactly zero.

    Args:
        x: ``[..., N, C]``, or ``[N]`` for one column; float16, bfloat16, float32 or float64, or integers if
            there are no weights. Sums of 16-bit features are accumulated in float32.
        indptr: int32 or int64 boundaries ``[..., V + 1]``, non-decreasing, from 0 to at most N; or ``[V + 1]`` for
            all examples alike.
        perm: int32 or int64 ``[..., N]`` or ``[N]``, like ``indptr``: a permutation of the points, as from
            `voxel_csr`; the identity if None.
        weight: ``[..., N]`` or broadcastable to it, floating; 1 if None. Two dtypes are promoted as in
            torch.

    Returns:
        ``[..., V, C]``, or ``[V]`` for x ``[N]``; 0 for an empty segment. Sums of integers are int64, as in torch.
        Differentiable to any order in ``x`` and ``weight``.

    Raises:
        TypeError: a wrong dtype, or not a tensor.
        ValueError: a wrong shape, or tensors on several devices.
        RuntimeError: on the CPU, for boundaries or points out of range, and in backward for a ``perm``
            that has a point twice. On a GPU, where an error would wait for the device, an index out of range
            makes its segment NaN and, in backward, the gradient of a point that ``perm`` lacks.

    DTensors may be sharded by leading dimensions, by columns and by points. In the last case each process sums its own
    points, and the result is ``Partial``. A DTensor ``indptr`` and ``perm`` cover all points, and each process finds
    its own in them; plain tensors cover the process's own points.

    The op takes O(N C + V C) time, and the work is divided by points rather than by segments. The result doesn't depend
    on the number of threads. It is PyTorch Scatter's ``segment_csr`` with sum, plus order and weights.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.tensor([[1.0], [2.0], [4.0]])
        >>> custom_ops.segment_sum(x, torch.tensor([0, 2, 2, 3]), perm=torch.tensor([2, 0, 1]))
        tensor([[5.],
                [0.],
                [2.]])
    """
    _checks.has_dtype("x", x, _checks.FLOATING if weight is not None else (*_checks.FLOATING, *_checks.INTEGER))
    if x.dim() == 1:
        return segment_sum(x[:, None], indptr, perm, weight)[..., 0]
    if shards.is_sharded(x):
        return _segment_sum_in_shards(x, indptr, perm, weight)
    check_points(x, indptr, perm)
    if weight is not None:
        _checks.has_dtype("weight", weight, _checks.FLOATING)
        _checks.same_device(x=x, weight=weight)
        try:
            weight = weight.expand(x.shape[:-1])
        except RuntimeError:
            raise ValueError(
                f"weight: expected shape {list(x.shape[:-1])} as x without its columns, got {list(weight.shape)}"
            ) from None
        dtype = torch.promote_types(x.dtype, weight.dtype)
        x, weight = x.to(dtype), weight.to(dtype)
    x = x if x.is_floating_point() else x.long()
    return segment_reduce(x, weight, indptr.long(), None if perm is None else perm.long(), False, 1, 1)


def _segment_sum_in_shards(x: Tensor, indptr: Tensor, perm: Tensor | None, weight: Tensor | None) -> Tensor:
    """Sum the process's own points, which it finds in a geometry of all points; a plain geometry has only its own."""

    def run(x: Tensor, indptr: Tensor, perm: Tensor | None, weight: Tensor | None, own: Tensor) -> Tensor:
        if of_all and x.shape[-2] < points:
            first = own[:1].sum()  # 0 if it has none
            if perm is None:
                indptr = (indptr - first).clamp(0, x.shape[-2])
            else:
                mine = (perm >= first) & (perm < first + x.shape[-2])
                perm = (perm[mine] - first).view(*perm.shape[:-1], x.shape[-2])
                indptr = torch.nn.functional.pad(mine.cumsum(-1), (1, 0)).gather(-1, indptr)
        return segment_sum(x, indptr, perm, weight)

    of_all, points = shards.is_sharded(indptr), x.shape[-2]
    own = shards.replicated(torch.arange(points, device=x.device), x)
    lead = shards.batch_labels(x.dim() - 2)
    shared = lead if indptr.dim() > 1 else ""
    labels = f"{lead}pc,{shared}V,{shared}N,{lead}p,p->{lead}Vc"
    return shards.in_shards(run, labels, x, indptr, perm, weight, own)
