"""Pooling the features of the points in each voxel of a grid: unsorted, masked, batched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops import _checks, shards
from custom_ops._wide import wide
from custom_ops.voxel._geometry import Csr, KeepsGeometry
from custom_ops.voxel.voxel_grid import as_voxels, voxel_csr, voxel_match
from custom_ops.voxel.voxel_segments import segment_max, segment_reduce

_REDUCTIONS = ("sum", "mean", "max")


def _ranks_of(x: Tensor, rank: Tensor, mask: Tensor | None) -> Tensor:
    """``rank``, -1 where ``mask`` is False; all of them checked."""
    _checks.has_dtype("x", x, _checks.FLOATING)
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
    """Whether there is one for each point of x, with leading dimensions that broadcast."""
    lead, other = x.shape[:-2], rank.shape[:-1]
    alike = all(a == b or a == 1 or b == 1 for a, b in zip(reversed(lead), reversed(other)))
    return rank.dim() > 0 and rank.shape[-1] == x.shape[-2] and alike


def csr_of(rank: Tensor, num_voxels: int, csr: tuple[Tensor, Tensor] | None) -> Csr:
    """The points of each voxel: ``csr`` if it is given, of which `voxel_match` finds out whether it is ``rank``'s."""
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


def _pool(x: Tensor, csr: Csr, reduce: str) -> Tensor:
    """The points of each voxel pooled; leading dimensions of x and the geometry are broadcast against each other."""
    perm, indptr = csr
    lead, own = x.shape[:-2], perm.shape[:-1]
    if own not in (lead, ()):
        if len(own) <= len(lead) and all(n == 1 for n in own):
            perm, indptr = perm.flatten(), indptr.flatten()  # shared, which is less work than alike for all
        else:
            lead = torch.broadcast_shapes(lead, own)
            x, perm, indptr = (
                t.expand(*lead, *t.shape[len(t.shape) - dims :]) for t, dims in ((x, 2), (perm, 1), (indptr, 1))
            )
    if reduce == "max":
        return segment_max(x, indptr, perm)[0]
    return segment_reduce(x, None, indptr, perm, reduce == "mean", 1, 1)


def voxel_sum(
    x: Tensor,
    rank: Tensor,
    num_voxels: int,
    reduce: str = "sum",
    mask: Tensor | None = None,
    csr: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Pool the features of the points of each voxel, in any order, into a grid of static size.

    ``out[..., v, :]`` is the sum, mean or largest of ``x[..., n, :]`` over the points with
    ``rank[..., n] = v``. A point with a negative rank or a False ``mask`` contributes nothing, even if
    its features are NaN, and its gradient is exactly zero.

    Args:
        x: point features ``[..., N, C]``, or ``[N]`` for one of each point; float16, bfloat16, float32 or
            float64. Sums of 16-bit features are accumulated in float32.
        rank: voxel number of each point ``[..., N]``, or ``[N]`` for all examples alike; int32 or int64,
            as from `voxel_rank`. The leading dimensions of x, rank and mask are broadcast.
        num_voxels: the number V of voxels.
        reduce: "sum", "mean" or "max". A voxel without points gets 0. The gradient of "max" goes to the
            first of the points that have it; a NaN is larger than all numbers.
        mask: bool ``[..., N]``, True for the points that count.
        csr: ``voxel_csr(rank, num_voxels)``, computed once for several calls. Each call compares all of it
            with ``rank``, in the order of the voxels; the layer `VoxelSum`, which compares ranks in their own
            order, takes less time for it. It can't be combined with ``mask``: put that into the ranks it is
            made of, ``rank.masked_fill(~mask, -1)``.

    Returns:
        ``[..., V, C]``, or ``[V]`` for x ``[N]``. Differentiable to any order in ``x``.

    Raises:
        TypeError: a wrong dtype, or no tensor.
        ValueError: a wrong shape or value, or tensors on several devices.
        RuntimeError: on the CPU, a rank of ``num_voxels`` or more, or a ``csr`` of other ranks, even if one
            point is in another voxel. On a GPU, where an error would wait for the device, that example's
            result and gradients are NaN.

    DTensors may be sharded by leading dimensions, by columns and, except for "max", by points: each process then sums
    its own and the result is ``Partial``. ``rank`` and ``mask`` are cut as x is; a ``csr`` is then the process's
    own, ``voxel_csr(rank.to_local(), num_voxels)`` with ``rank`` sharded as x is.

    O(N C + V C) time, split by points and not by voxels. The result doesn't depend on the number of
    threads, nor on the order in which they run.

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
    _checks.is_one_of("reduce", reduce, _REDUCTIONS)
    if mask is not None and csr is not None:
        raise ValueError("mask: expected None with csr, which is made of rank.masked_fill(~mask, -1)")
    num_voxels = as_voxels("num_voxels", num_voxels)
    if shards.is_sharded(x):
        return _in_shards(x, rank, num_voxels, reduce, mask, csr)
    if isinstance(x, Tensor) and x.dim() == 1:
        return voxel_sum(x[:, None], rank, num_voxels, reduce, mask, csr)[..., 0]
    return _pool(x, csr_of(_ranks_of(x, rank, mask), num_voxels, csr), reduce)


def _in_shards(
    x: Any, rank: Tensor, num_voxels: int, reduce: str, mask: Tensor | None, csr: tuple[Tensor, Tensor] | None
) -> Tensor:
    """`voxel_sum` of DTensors. A ``csr`` is that of the whole, or a plain one that of the process's own points."""
    points = x.dim() - 2
    if reduce == "mean" and any(p.is_shard(points) for p in x.placements):
        return _mean_of_parts(x, rank, num_voxels, mask, csr)

    def run(x: Tensor, rank: Tensor, mask: Tensor | None, perm: Tensor | None, indptr: Tensor | None) -> Tensor:
        own = None if perm is None or indptr is None else (perm, indptr)
        return voxel_sum(x, rank, num_voxels, reduce, mask, own)

    lead = shards.batch_labels(points)
    p = "P" if reduce == "max" else "p"
    of_rank, of_mask = (lead if t is not None and t.dim() > 1 else "" for t in (rank, mask))
    labels = f"{lead}{p}c,{of_rank}{p},{of_mask}{p},{of_rank}N,{of_rank}V->{lead}Vc"
    return shards.in_shards(run, labels, x, rank, mask, *(csr or (None, None)))


def _mean_of_parts(
    x: Any, rank: Any, num_voxels: int, mask: Tensor | None, csr: tuple[Tensor, Tensor] | None
) -> Tensor:
    """The sum over all processes' points by their number; that is one integer per voxel to exchange."""
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
    """`voxel_sum` as a layer that sorts its points once, while their ranks stay the same.

    Call ``layer(x, rank)``, or with a ``mask``, or with a ``csr`` of your own. The sorted points are kept and
    used again for ranks (and masks) of the same values; that is compared on each call, for which a GPU is
    waited for. ``set_geometry(rank)`` saves the comparison: call ``layer(x)`` from then on. Calls with ranks
    leave what was set as it is. A traced, compiled or exported program that is given ranks sorts them on each
    call. ``num_voxels`` can't be set again. What is kept, three integers per point and
    one per voxel, isn't in the ``state_dict``; ``clear_geometry()`` releases it.

    Raises as `voxel_sum` does, and ``ValueError`` without ranks, here or set.

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
        _checks.is_one_of("reduce", reduce, _REDUCTIONS)
        self.reduce = reduce

    def forward(
        self,
        x: Tensor,
        rank: Tensor | None = None,
        mask: Tensor | None = None,
        csr: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if isinstance(x, Tensor) and x.dim() == 1:
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
        return _pool(x, geometry.csr, self.reduce)

    def set_geometry(self, rank: Tensor) -> None:
        """Keep these ranks, ``[..., N]`` or ``[N]``, for calls without any; no call changes them."""
        _checks.has_dtype("rank", rank, _checks.INDEX)
        self._set(rank)

    def _compute(self, rank: Tensor) -> tuple[Tensor, Csr]:
        return rank, voxel_csr(rank, self.num_voxels)

    def extra_repr(self) -> str:
        return f"{self.num_voxels}, reduce={self.reduce!r}"
