"""Pooling the features of the points in each voxel of a grid: unsorted, masked, batched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops import _checks, shards
from custom_ops._leaf import leaf
from custom_ops._wide import wide
from custom_ops.voxel._geometry import Csr, KeepsGeometry
from custom_ops.voxel.segments import REDUCTIONS, has_reducible, reduced
from custom_ops.voxel.voxel_grid import as_voxels, voxel_csr, voxel_match
from custom_ops.voxel.voxel_segments import segment_softmax


def _ranks_of(x: Tensor, rank: Tensor, mask: Tensor | None) -> Tensor:
    """Check all arguments but x's dtype, and return ``rank`` with -1 where ``mask`` is False."""
    if x.dim() < 2:
        raise ValueError(f"x: expected [..., N, C], got shape {list(x.shape)}")
    _checks.has_dtype("rank", rank, _checks.INDEX)
    _checks.same_device(x=x, rank=rank)
    if mask is not None:
        _checks.has_dtype("mask", mask, (torch.bool,))
        _checks.same_device(x=x, mask=mask)
    for name, tensor in (("rank", rank), ("mask", mask)):
        if tensor is not None and not _fits(x, tensor):
            expected = f"{list(x.shape[:-1])} or [{x.shape[-2]}]" if x.dim() > 2 else str(list(x.shape[:-1]))
            raise ValueError(f"{name}: expected shape {expected}, got {list(tensor.shape)}")
    return rank if mask is None else torch.where(mask, rank, -1)


def _fits(x: Tensor, rank: Tensor) -> bool:
    """Return whether ``rank`` has one number per point of x, with leading dimensions that broadcast."""
    lead, other = x.shape[:-2], rank.shape[:-1]
    alike = all(a == b or a == 1 or b == 1 for a, b in zip(reversed(lead), reversed(other)))
    return rank.dim() > 0 and rank.shape[-1] == x.shape[-2] and alike


def csr_of(rank: Tensor, num_voxels: int, csr: tuple[Tensor, Tensor] | None) -> Csr:
    """Return the points of each voxel: those of ``csr``, after `voxel_match` compared it with ``rank``, or new ones."""
    if csr is None:
        return voxel_csr(rank, num_voxels)
    if not isinstance(csr, (tuple, list)) or len(csr) != 2:
        raise TypeError(f"csr: expected (perm, indptr) as from voxel_csr, got {type(csr).__name__}")
    for tensor in csr:
        _checks.has_dtype("csr", tensor, _checks.INDEX)
        _checks.same_device(rank=rank, csr=tensor)
    perm, indptr = (tensor.long() for tensor in csr)
    expected = [*rank.shape[:-1], num_voxels + 1]
    if perm.shape != rank.shape or list(indptr.shape) != expected:
        raise ValueError(
            f"csr: expected perm {list(rank.shape)} and indptr {expected} for rank and num_voxels, "
            f"got {list(perm.shape)} and {list(indptr.shape)}"
        )
    return perm, voxel_match(rank, perm, indptr)


def _aligned(x: Tensor, csr: Csr) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, ``indptr`` and ``perm`` with leading dimensions that are broadcast against each other."""
    perm, indptr = csr
    lead, own = x.shape[:-2], perm.shape[:-1]
    if own not in (lead, ()):
        if len(own) <= len(lead) and all(n == 1 for n in own):
            perm, indptr = perm.flatten(), indptr.flatten()  # one shared geometry takes less work than equal copies
        else:
            lead = torch.broadcast_shapes(lead, own)
            x, perm, indptr = (
                t.expand(*lead, *t.shape[len(t.shape) - dims :]) for t, dims in ((x, 2), (perm, 1), (indptr, 1))
            )
    return x, indptr, perm


@leaf
def voxel_sum(
    x: Tensor,
    rank: Tensor,
    num_voxels: int,
    reduce: str = "sum",
    mask: Tensor | None = None,
    csr: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Pool the features of the points of each voxel, in any order, into a grid of static size.

    ``out[..., v, :]`` is the sum, or another reduction, of ``x[..., n, :]`` over the points with
    ``rank[..., n] = v``. A point with a negative rank or a False ``mask`` contributes nothing, even if
    its features are NaN, and its gradient is exactly zero.

    Args:
        x: point features ``[..., N, C]``, or ``[N]`` for one column; float16, bfloat16, float32 or
            float64, or integers for "sum", "prod", "min" and "max". Sums of 16-bit features are accumulated in float32.
        rank: voxel number of each point ``[..., N]``, or ``[N]`` for all examples alike; int32 or int64,
            as from `voxel_rank`. The leading dimensions of x, rank and mask are broadcast.
        num_voxels: the number V of voxels.
        reduce: "sum", "mean", "prod", "min", "max", "logsumexp", "var" or "std", as in `segment_reduce`. A voxel
            without points gets 0, or 1 from "prod" and -inf from "logsumexp". The gradient of "max" goes to the first
            point with the largest value; a NaN is larger than all numbers.
        mask: bool ``[..., N]``, True for the points that count.
        csr: ``voxel_csr(rank, num_voxels)``, computed once for several calls. Each call compares all of it
            with ``rank``, on the CPU by sums of 64-bit hashes of each point and its voxel; the layer `VoxelSum`
            compares ranks alone, which takes less time. It can't be combined with ``mask``: apply that to the
            ranks it is made of, ``rank.masked_fill(~mask, -1)``.

    Returns:
        ``[..., V, C]``, or ``[V]`` for x ``[N]``. Differentiable to any order in ``x``.

    Raises:
        TypeError: a wrong dtype, or not a tensor.
        ValueError: a wrong shape or value, or tensors on several devices.
        RuntimeError: on the CPU, a rank of ``num_voxels`` or more, or a ``csr`` of other ranks, even if one
            point is in another voxel. On a GPU, where an error would wait for the device, that example's
            result and gradients are NaN.

    DTensors may be sharded by leading dimensions, by columns and, for "sum" and "mean", by points: each process then
    sums its own points, and the result is ``Partial``. ``rank`` and ``mask`` are sharded as x is; a ``csr`` is then
    that of the process's own points, ``voxel_csr(rank.to_local(), num_voxels)`` with ``rank`` sharded as x is.

    The op takes O(N C + V C) time, and the work is divided by points rather than by voxels. The result doesn't depend
    on the number of threads or on the order in which they run.

    Source: the pooling of Philion & Fidler, "Lift, Splat, Shoot", ECCV 2020; unsorted, as dynamic
    voxelisation in Zhou et al., "End-to-End Multi-View Fusion for 3D Object Detection", CoRL 2019.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.tensor([[1.0], [2.0], [4.0], [8.0]])
        >>> custom_ops.voxel_sum(x, torch.tensor([2, 0, 2, -1]), 3)
        tensor([[2.],
                [0.],
                [5.]])
    """
    has_reducible(x, reduce)
    has_one_mask(mask, csr)
    num_voxels = as_voxels("num_voxels", num_voxels)
    if shards.is_sharded(x):
        return _in_shards(x, rank, num_voxels, reduce, mask, csr)
    if x.dim() == 1:
        return voxel_sum(x[:, None], rank, num_voxels, reduce, mask, csr)[..., 0]
    return reduced(*_aligned(x, csr_of(_ranks_of(x, rank, mask), num_voxels, csr)), reduce)


def has_one_mask(mask: Tensor | None, csr: tuple[Tensor, Tensor] | None) -> None:
    """Refuse a ``mask`` beside a ``csr``, which was sorted without it."""
    if mask is not None and csr is not None:
        raise ValueError("mask: expected None with csr, which is made of rank.masked_fill(~mask, -1)")


@leaf
def voxel_softmax(
    x: Tensor,
    rank: Tensor,
    num_voxels: int,
    mask: Tensor | None = None,
    csr: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Compute the softmax of each column over the points of each voxel, in any order.

    ``out[..., n, c] = exp(x[..., n, c]) / sum of exp(x[..., m, c])`` over the points with ``rank[..., m] =
    rank[..., n]``. A point with a negative rank or a False ``mask`` counts nowhere and gets 0. It is `segment_softmax`
    for points that are numbered by segment, such as the edges of a graph by their target.

    Args:
        x: ``[..., N, C]``, or ``[N]`` for one column; float16, bfloat16, float32 or float64. 16-bit numbers are
            computed in float32.
        rank, num_voxels, mask, csr: as in `voxel_sum`.

    Returns:
        The shape and dtype of x. Differentiable to any order in ``x``.

    Raises:
        TypeError, ValueError, RuntimeError: as `voxel_sum`.

    DTensors may be sharded by leading dimensions and by columns.

    The op takes O(N C + V) time. The result doesn't depend on the number of threads.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.voxel_softmax(torch.tensor([0.0, 5.0, 0.0, 1.0]), torch.tensor([2, 0, 2, -1]), 3)
        tensor([0.5000, 1.0000, 0.5000, 0.0000])
    """
    _checks.has_dtype("x", x, _checks.FLOATING)
    has_one_mask(mask, csr)
    num_voxels = as_voxels("num_voxels", num_voxels)
    if shards.is_sharded(x):

        def run(x: Tensor, rank: Tensor, mask: Tensor | None, perm: Tensor | None, indptr: Tensor | None) -> Tensor:
            return voxel_softmax(x, rank, num_voxels, mask, None if perm is None or indptr is None else (perm, indptr))

        labels = f"{_labels(x, rank, mask, 'P')}->{shards.batch_labels(x.dim() - 2)}Pc"
        return shards.in_shards(run, labels, x, rank, mask, *(csr or (None, None)))
    if x.dim() == 1:
        return voxel_softmax(x[:, None], rank, num_voxels, mask, csr)[..., 0]
    return segment_softmax(*_aligned(x, csr_of(_ranks_of(x, rank, mask), num_voxels, csr)))


def _in_shards(
    x: Any, rank: Tensor, num_voxels: int, reduce: str, mask: Tensor | None, csr: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Compute `voxel_sum` of DTensors; a DTensor ``csr`` covers all points, a plain one the process's own points."""
    points = x.dim() - 2
    if reduce == "mean" and any(p.is_shard(points) for p in x.placements):
        return _mean_of_parts(x, rank, num_voxels, mask, csr)

    def run(x: Tensor, rank: Tensor, mask: Tensor | None, perm: Tensor | None, indptr: Tensor | None) -> Tensor:
        own = None if perm is None or indptr is None else (perm, indptr)
        return voxel_sum(x, rank, num_voxels, reduce, mask, own)

    labels = _labels(x, rank, mask, "p" if reduce == "sum" else "P")
    return shards.in_shards(run, f"{labels}->{shards.batch_labels(points)}Vc", x, rank, mask, *(csr or (None, None)))


def _labels(x: Tensor, rank: Tensor, mask: Tensor | None, p: str) -> str:
    """Return the labels of x, rank, mask, perm and indptr for `shards.in_shards`, where ``p`` is that of points."""
    lead = shards.batch_labels(x.dim() - 2)
    of_rank, of_mask = (lead if t is not None and t.dim() > 1 else "" for t in (rank, mask))
    return f"{lead}{p}c,{of_rank}{p},{of_mask}{p},{of_rank}N,{of_rank}V"


def _mean_of_parts(
    x: Any, rank: Any, num_voxels: int, mask: Tensor | None, csr: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Divide the sum over all processes' points by their number, which exchanges one integer per voxel."""
    from torch.distributed.tensor import Replicate, Shard

    def count(rank: Tensor) -> Tensor:
        return voxel_csr(rank, num_voxels)[1].diff()

    inside: Any = rank if mask is None else torch.where(mask, rank, -1)
    at = [p.dim - (x.dim() - 1 - inside.dim()) if p.is_shard() else -1 for p in x.placements]
    cut = [Shard(d) if 0 <= d < inside.dim() else Replicate() for d in at]
    lead = shards.batch_labels(inside.dim() - 1)
    counts = shards.in_shards(count, f"{lead}p->{lead}V", inside.redistribute(placements=cut))
    sums = voxel_sum(wide(x), rank, num_voxels, "sum", mask, csr)
    return (sums / shards.summed_up(counts).clamp_min(1)[..., None]).to(x.dtype)


class VoxelSum(KeepsGeometry):
    """Apply `voxel_sum` as a layer that sorts its points once, while their ranks stay the same.

    Call ``layer(x, rank)``, or with a ``mask``, or with a ``csr`` of your own. The sorted points are kept and reused
    for ranks (and masks) with the same values. Each call compares the values, which waits for a GPU.
    ``set_geometry(rank)`` saves the comparison: call ``layer(x)`` from then on. Calls with ranks don't change the
    geometry that was set. A traced, compiled or exported program that is given ranks sorts them on each call.
    ``num_voxels`` can't be set again. The kept geometry, three integers per point and one per voxel, isn't part of the
    ``state_dict``; ``clear_geometry()`` releases it.

    The errors are those of `voxel_sum`, and a ``ValueError`` if ranks are neither given nor set.

    Example:
        >>> import torch, custom_ops
        >>> layer = custom_ops.VoxelSum(3)
        >>> layer.set_geometry(torch.tensor([2, 0, 2, -1]))
        >>> layer(torch.tensor([[1.0], [2.0], [4.0], [8.0]])).flatten()
        tensor([2., 0., 5.])
    """

    _fixed = ("num_voxels",)

    def __init__(self, num_voxels: int, reduce: str = "sum") -> None:
        super().__init__()
        self.num_voxels = as_voxels("num_voxels", num_voxels)
        _checks.is_one_of("reduce", reduce, REDUCTIONS)
        self.reduce = reduce

    def forward(
        self,
        x: Tensor,
        rank: Tensor | None = None,
        mask: Tensor | None = None,
        csr: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        has_reducible(x, self.reduce)
        if x.dim() == 1:
            return self(x[:, None], rank, mask, csr)[..., 0]
        if rank is None:
            if mask is not None or csr is not None:
                raise ValueError("rank: expected ranks with a mask or csr, got None")
            geometry = self._get("rank: expected ranks")
        elif csr is not None or shards.is_sharded(x):
            return voxel_sum(x, rank, self.num_voxels, self.reduce, mask, csr)
        else:
            geometry = self._geometry_of(_ranks_of(x, rank, mask))
        if shards.is_sharded(x):
            return voxel_sum(x, geometry.rank, self.num_voxels, self.reduce, csr=geometry.csr)
        _ranks_of(x, geometry.rank, None)
        return reduced(*_aligned(x, geometry.csr), self.reduce)

    def set_geometry(self, rank: Tensor) -> None:
        """Keep these ranks, ``[..., N]`` or ``[N]``, for calls without any; no call changes them."""
        _checks.has_dtype("rank", rank, _checks.INDEX)
        self._set(rank)

    def _compute(self, rank: Tensor) -> tuple[Tensor, Csr]:
        return rank, voxel_csr(rank, self.num_voxels)

    def extra_repr(self) -> str:
        return f"{self.num_voxels}, reduce={self.reduce!r}"
