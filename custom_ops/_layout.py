"""The layout of elementwise results in memory."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def _by_stride(x: Tensor) -> list[int]:
    """Return the dimensions of ``x``, largest stride first (Dynamo can't trace `sorted` over symbolic strides)."""
    order: list[int] = []
    for d in range(x.dim()):
        at = len(order)
        while at > 0 and x.stride(order[at - 1]) < x.stride(d):
            at -= 1
        order.insert(at, d)
    return order


def as_it_lies(x: Tensor, run: Callable[[Tensor, int], Tensor], dim: int = 0) -> Tensor:
    """Return ``run(x, dim)`` in x's layout; ``run``, an op for row-major memory, gets the dimensions in memory
    order.
    """
    if x.is_contiguous():
        return run(x, dim)
    order = _by_stride(x)
    inverse = [order.index(d) for d in range(x.dim())]
    return run(x.permute(order), inverse[dim] if inverse else 0).permute(inverse)


def overlaps(x: Tensor) -> bool:
    """Return whether elements of x may share memory: some dimension's stride is within the reach of all smaller
    ones.
    """
    if x.is_contiguous():
        return False
    reach = 0
    for d in reversed(_by_stride(x)):
        if x.shape[d] > 1:
            if x.stride(d) <= reach:
                return True
            reach += (x.shape[d] - 1) * x.stride(d)
    return False
