"""Reductions and softmax over segments of points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from custom_ops import _checks, shards
from custom_ops._leaf import leaf
from custom_ops.voxel import voxel_segments as ops
from custom_ops.voxel.voxel_segments import check_points, segment_sum

REDUCTIONS = ("sum", "mean", "prod", "min", "max", "logsumexp", "var", "std")
_OF_INTEGERS = ("sum", "prod", "min", "max")


def has_reducible(x: Tensor, reduce: str) -> None:
    """Check the name of a reduction and the dtype that it is applied to."""
    _checks.is_one_of("reduce", reduce, REDUCTIONS)
    dtypes = (*_checks.FLOATING, *_checks.INTEGER) if reduce in _OF_INTEGERS else _checks.FLOATING
    _checks.has_dtype("x", x, dtypes)


def reduced(x: Tensor, indptr: Tensor, perm: Tensor | None, reduce: str) -> Tensor:
    """Reduce the points ``[..., N, C]`` of each segment; the arguments have been checked."""
    dtype = x.dtype
    x = x if dtype.is_floating_point else x.long()
    if reduce in ("min", "max"):
        return ops.segment_extreme(x, indptr, perm, reduce == "max")[0].to(dtype)
    if reduce == "prod":
        return ops.segment_prod(x, indptr, perm)
    if reduce == "logsumexp":
        return ops.segment_logsumexp(x, indptr, perm)
    if reduce in ("sum", "mean"):
        return ops.segment_reduce(x, None, indptr, perm, reduce == "mean", 1, 1)
    # In float32 a mean of large numbers is far from them, and the squares of tiny ones are 0.
    squares = ops.segment_center(x.double(), indptr, perm).square()
    var = ops.segment_reduce(squares, None, indptr, perm, False, 1, 1) / (indptr.diff() - 1).clamp_min(1)[..., None]
    if reduce == "std":
        is_zero = var == 0  # where the slope of the root is infinite, but that of the result is taken as 0
        var = torch.where(is_zero, 1, var).sqrt().masked_fill(is_zero, 0)
    return var.to(dtype)


@overload
def segment_reduce(
    x: Tensor, indptr: Tensor, reduce: str = ..., perm: Tensor | None = ..., return_indices: Literal[False] = ...
) -> Tensor: ...
@overload
def segment_reduce(
    x: Tensor, indptr: Tensor, reduce: str, perm: Tensor | None, return_indices: Literal[True]
) -> tuple[Tensor, Tensor]: ...
@overload
def segment_reduce(
    x: Tensor, indptr: Tensor, reduce: str, perm: Tensor | None = ..., *, return_indices: Literal[True]
) -> tuple[Tensor, Tensor]: ...
@leaf
def segment_reduce(
    x: Tensor, indptr: Tensor, reduce: str = "sum", perm: Tensor | None = None, return_indices: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Reduce the points of each segment, in any order, to one row.

    Segment v has the points ``p = perm[..., i]`` with ``indptr[..., v] <= i < indptr[..., v + 1]``. Points in no
    segment contribute nothing, even if they are NaN, and their gradients are exactly zero. For points that are numbered
    by segment and not sorted, see `voxel_sum`.

    Args:
        x: ``[..., N, C]``, or ``[N]`` for one column; float16, bfloat16, float32 or float64, or integers for "sum",
            "prod", "min" and "max". 16-bit features are accumulated in float32.
        indptr: int32 or int64 boundaries ``[..., V + 1]``, non-decreasing, from 0 to at most N; or ``[V + 1]`` for
            all examples alike.
        reduce: the reduction, where an empty segment gives 0 unless said otherwise:

            - "sum", of which `segment_sum` is the weighted form; that of integers is int64;
            - "mean";
            - "prod"; 1 for an empty segment. That of integers is int64 and wraps around. All derivatives are right
              where points are 0, too;
            - "min" and "max", where a NaN comes before all numbers. The gradient goes to the first point with the
              value;
            - "logsumexp", ``log(sum(exp(x)))``; -inf for an empty segment;
            - "var" and "std", with n - 1 in the denominator; 0 for a single point. The gradient of a "std" of 0 is 0.
        perm: int32 or int64 ``[..., N]`` or ``[N]``, like ``indptr``: a permutation of the points, as from
            `voxel_csr`; the identity if None.
        return_indices: return the points that have the "min" or "max", too.

    Returns:
        ``[..., V, C]``, or ``[V]`` for x ``[N]``. Differentiable to any order in ``x``. With ``return_indices`` a pair
        of it and the int64 indices of the first points with these values, -1 for an empty segment.

    Raises:
        TypeError: a wrong dtype, or not a tensor.
        ValueError: a wrong shape or value, or tensors on several devices.
        RuntimeError: on the CPU, for boundaries or points out of range, and in backward for a ``perm``
            that has a point twice. On a GPU, where an error would wait for the device, an index out of range
            makes its segment NaN; for integers, an assertion fails on the device.

    DTensors may be sharded by leading dimensions and by columns, and for "sum" by points, too, as in `segment_sum`.

    The op takes O(N C + V C) time, and the work is divided by points rather than by segments. The result doesn't depend
    on the number of threads.

    Source: ``segment_csr`` of Fey & Lenssen, "Fast Graph Representation Learning with PyTorch Geometric", 2019.

    Example:
        >>> import torch, custom_ops
        >>> x, indptr = torch.tensor([[1.0], [4.0], [2.0]]), torch.tensor([0, 2, 2, 3])
        >>> custom_ops.segment_reduce(x, indptr, "max", return_indices=True)
        (tensor([[4.],
                [0.],
                [2.]]), tensor([[ 1],
                [-1],
                [ 2]]))
    """
    return_indices = _checks.as_bool("return_indices", return_indices)
    has_reducible(x, reduce)
    if return_indices and reduce not in ("min", "max"):
        raise ValueError(f"return_indices: expected False, as no single point has the {reduce}, got True")
    again: Callable[..., Any] = segment_reduce
    if x.dim() == 1:
        return _of_column(lambda x: again(x, indptr, reduce, perm, return_indices), x)
    if reduce == "sum":
        return segment_sum(x, indptr, perm)
    if shards.is_sharded(x):
        results = ("Vc", "Vc") if return_indices else ("Vc",)
        return _in_shards(lambda x, at, perm: again(x, at, reduce, perm, return_indices), results, x, indptr, perm)
    check_points(x, indptr, perm)
    indptr, perm = indptr.long(), None if perm is None else perm.long()
    if not return_indices:
        return reduced(x, indptr, perm, reduce)
    values, indices = ops.segment_extreme(x if x.is_floating_point() else x.long(), indptr, perm, reduce == "max")
    return values.to(x.dtype), indices


@leaf
def segment_softmax(x: Tensor, indptr: Tensor, perm: Tensor | None = None) -> Tensor:
    """Compute the softmax of each column over the points of each segment.

    ``out[..., p, c] = exp(x[..., p, c]) / sum of exp(x[..., q, c])`` over the points q of p's segment. Points in no
    segment get 0, as does a segment in which all values are -inf. For points that are numbered by segment and not
    sorted, see `voxel_softmax`.

    Args:
        x: ``[..., N, C]``, or ``[N]`` for one column; float16, bfloat16, float32 or float64. 16-bit numbers are
            computed in float32.
        indptr: int32 or int64 boundaries ``[..., V + 1]``, non-decreasing, from 0 to at most N; or ``[V + 1]`` for
            all examples alike.
        perm: int32 or int64 ``[..., N]`` or ``[N]``, like ``indptr``: a permutation of the points, as from
            `voxel_csr`; the identity if None.

    Returns:
        The shape and dtype of x, in the order of x. Differentiable to any order in ``x``.

    Raises:
        TypeError: a wrong dtype, or not a tensor.
        ValueError: a wrong shape, or tensors on several devices.
        RuntimeError: on the CPU, for boundaries or points out of range, and for a ``perm`` that has a point twice. On a
            GPU, where an error would wait for the device, the result is NaN there.

    DTensors may be sharded by leading dimensions and by columns.

    The op takes O(N C) time. The largest value of a segment is subtracted first, so no exponential overflows. The
    result doesn't depend on the number of threads.

    Source: the attention over neighbours of Velickovic et al., "Graph Attention Networks", ICLR 2018.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.segment_softmax(torch.tensor([0.0, 0.0, 5.0]), torch.tensor([0, 2, 3]))
        tensor([0.5000, 0.5000, 1.0000])
    """
    _checks.has_dtype("x", x, _checks.FLOATING)
    if x.dim() == 1:
        return segment_softmax(x[:, None], indptr, perm)[..., 0]
    if shards.is_sharded(x):
        return _in_shards(segment_softmax, ("Pc",), x, indptr, perm)
    check_points(x, indptr, perm)
    return ops.segment_softmax(x, indptr.long(), None if perm is None else perm.long())


def _of_column(run: Callable[[Tensor], Any], x: Tensor) -> Any:
    """Return the results of ``run`` for one column, without its dimension."""
    results = run(x[:, None])
    return results[..., 0] if isinstance(results, Tensor) else tuple(result[..., 0] for result in results)


def _in_shards(
    run: Callable[..., Any], results: tuple[str, ...], x: Tensor, indptr: Tensor, perm: Tensor | None
) -> Any:
    """Run on shards that have whole segments."""
    lead = shards.batch_labels(x.dim() - 2)
    own = lead if indptr.dim() > 1 else ""
    labels = f"{lead}Pc,{own}V,{own}P->{','.join(lead + names for names in results)}"
    return shards.in_shards(run, labels, x, indptr, perm)
