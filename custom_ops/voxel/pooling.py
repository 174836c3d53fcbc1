"""Depth-weighted pooling of image features into a grid, without the frustum of points in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops import _checks, shards
from custom_ops._leaf import leaf
from custom_ops.voxel._geometry import Csr, Geometry, KeepsGeometry
from custom_ops.voxel.sums import csr_of, has_one_mask
from custom_ops.voxel.voxel_grid import as_voxels, voxel_csr
from custom_ops.voxel.voxel_segments import segment_reduce


@leaf
def bev_pool(
    depth: Tensor,
    feat: Tensor,
    rank: Tensor,
    num_voxels: int,
    csr: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Lift image features along their depths and sum them in the voxels that they fall into.

    ``out[b, v, c] = sum of depth[b, n, d, h, w] feat[b, n, c, h, w]`` over the (n, d, h, w) with ``rank[b, n, d, h, w]
    = v``. The product, N D H W C numbers, is never in memory. A point with a negative rank contributes nothing, and its
    gradient is exactly zero.

    The sum is bilinear. Its gradients with respect to ``depth`` and ``feat`` are computed pixel by pixel, without
    sorting or atomics, and second derivatives are computed by the same three kernels.

    Args:
        depth: the weight of each depth bin of each pixel ``[B, N, D, H, W]`` of N cameras; float16,
            bfloat16, float32 or float64.
        feat: image features ``[B, N, C, H, W]``. Two dtypes are promoted as in torch.
            Sums of 16-bit features are accumulated in float32.
        rank: voxel number of each point ``[B, N, D, H, W]``, counted within each example, or
            ``[N, D, H, W]`` for all examples alike; int32 or int64, as from `voxel_rank`.
        num_voxels: the number V of voxels.
        csr: ``voxel_csr(rank.flatten(-4), num_voxels)``, computed once for fixed cameras. Each call compares
            all of it with ``rank``. It can't be combined with ``mask``: apply that to the ranks it is made of,
            ``rank.masked_fill(~mask, -1)``.
        mask: bool, broadcastable to ``[B, N, D, H, W]``, True for the points that count: ``[B, N, 1, H, W]`` for whole
            pixels.

    Returns:
        ``[B, V, C]``, which `voxel_image` arranges as an image; 0 for a voxel without points.

    Raises:
        TypeError: a wrong dtype, or not a tensor.
        ValueError: a wrong shape or value, or tensors on several devices.
        RuntimeError: on the CPU, a rank of ``num_voxels`` or more, or a ``csr`` of other ranks, even if one
            point is in another voxel. On a GPU, where an error would wait for the device, that example's
            result and gradients are NaN.

    DTensors may be sharded by examples, channels, cameras or depths. (In the last two cases each process sums its own
    points, and the result is ``Partial``.) ``rank`` is sharded as ``depth`` is; a ``csr`` is then that of the process's
    own points, as in `voxel_sum`.

    The op takes O(B N D H W C + B V C) time and keeps the inputs and the geometry for backward.

    Source: Philion & Fidler, "Lift, Splat, Shoot", ECCV 2020; fused as in Huang & Huang, "BEVPoolv2",
    2022.

    Example:
        >>> import torch, custom_ops
        >>> depth = torch.tensor([0.25, 0.75]).view(1, 1, 2, 1, 1)
        >>> feat = torch.tensor([4.0, 8.0]).view(1, 1, 2, 1, 1)
        >>> custom_ops.bev_pool(depth, feat, torch.tensor([2, 0]).view(1, 2, 1, 1), 3)
        tensor([[[3., 6.],
                 [0., 0.],
                 [1., 2.]]])
    """
    num_voxels = as_voxels("num_voxels", num_voxels)
    has_one_mask(mask, csr)
    if shards.is_sharded(depth, feat):
        return _in_shards(depth, feat, rank, num_voxels, csr, mask)
    _check(depth, feat, rank)
    return _pool(depth, feat, csr_of(_masked(depth, rank, mask).flatten(-4), num_voxels, csr))


def _check(depth: Tensor, feat: Tensor, rank: Tensor) -> None:
    _checks.has_dtype("depth", depth, _checks.FLOATING)
    _checks.has_dims("depth", depth, "[B, N, D, H, W]")
    _checks.has_dtype("feat", feat, _checks.FLOATING)
    _checks.has_dims("feat", feat, "[B, N, C, H, W]")
    batch, cameras, _, height, width = depth.shape
    if feat.shape != (batch, cameras, feat.shape[2], height, width):
        raise ValueError(
            f"feat: expected shape {[batch, cameras, 'C', height, width]} as depth, got {list(feat.shape)}"
        )
    _checks.has_dtype("rank", rank, _checks.INDEX)
    if rank.shape not in (depth.shape, depth.shape[1:], (1, *depth.shape[1:])):
        expected = f"{list(depth.shape)} or {list(depth.shape[1:])}"
        raise ValueError(f"rank: expected shape {expected}, got {list(rank.shape)}")
    _checks.same_device(depth=depth, feat=feat, rank=rank)


def _masked(depth: Tensor, rank: Tensor, mask: Tensor | None) -> Tensor:
    """Return the checked ``rank`` with -1 where ``mask`` is False."""
    if mask is None:
        return rank
    _checks.has_dtype("mask", mask, (torch.bool,))
    _checks.same_device(depth=depth, mask=mask)
    lacks = depth.dim() - mask.dim()
    if lacks < 0 or any(m not in (1, d) for m, d in zip(mask.shape, depth.shape[lacks:])):
        raise ValueError(f"mask: expected a shape that broadcasts to {list(depth.shape)}, got {list(mask.shape)}")
    return torch.where(mask, rank, -1)


def _pool(depth: Tensor, feat: Tensor, csr: Csr) -> Tensor:
    _, _, bins, height, width = depth.shape
    # A geometry of one example is shared by all.
    perm, indptr = (t[0] if t.dim() > 1 and t.shape[0] != depth.shape[0] else t for t in csr)
    dtype = torch.promote_types(depth.dtype, feat.dtype)
    pixels = feat.to(dtype).permute(0, 1, 3, 4, 2).flatten(1, 3)
    weight = depth.to(dtype).flatten(1)
    if bins * height * width == 0:  # without points the result is an empty sum, which stays connected to both inputs
        return segment_reduce(weight[..., None] * pixels.sum(1, keepdim=True), None, indptr, perm, False, 1, 1)
    return segment_reduce(pixels, weight, indptr, perm, False, bins, height * width)


def _in_shards(
    depth: Tensor,
    feat: Tensor,
    rank: Tensor,
    num_voxels: int,
    csr: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
) -> Tensor:
    def run(
        depth: Tensor, feat: Tensor, rank: Tensor, mask: Tensor | None, perm: Tensor | None, indptr: Tensor | None
    ) -> Tensor:
        return bev_pool(depth, feat, rank, num_voxels, None if perm is None or indptr is None else (perm, indptr), mask)

    lead = "b" if rank.dim() > 4 else ""
    labels = f"bndHW,bncHW,{lead}ndHW,bndHW,{lead}P,{lead}V->bVc"
    whole = None if mask is None else mask.expand(depth.shape)
    return shards.in_shards(run, labels, depth, feat, rank, whole, *(csr or (None, None)))


def pool_kept(depth: Tensor, feat: Tensor, geometry: Geometry, num_voxels: int) -> Tensor:
    """Compute `bev_pool` with a layer's geometry, whose ``csr`` is known to belong to its ranks."""
    if shards.is_sharded(depth, feat):
        return bev_pool(depth, feat, geometry.rank, num_voxels, geometry.csr)
    _check(depth, feat, geometry.rank)
    return _pool(depth, feat, geometry.csr)


class BEVPool(KeepsGeometry):
    """Apply `bev_pool` as a layer that sorts its points once, while their ranks stay the same.

    Call ``layer(depth, feat, rank)``, or with a ``mask``, or with a ``csr`` of your own. The sorted points are kept and
    reused for ranks (and masks) with the same values. Each call compares the values, which waits for a GPU.
    ``set_geometry(rank)`` saves the comparison: call ``layer(depth, feat)`` from then on. Calls with ranks don't change
    the geometry that was set. A traced, compiled or exported program that is given ranks sorts them on each call.
    ``num_voxels`` can't be set again. The kept geometry, three integers per point and one per voxel, isn't part of the
    ``state_dict``; ``clear_geometry()`` releases it.

    The errors are those of `bev_pool`, and a ``ValueError`` if ranks are neither given nor set.

    Example:
        >>> import torch, custom_ops
        >>> layer = custom_ops.BEVPool(num_voxels=2)
        >>> layer.set_geometry(torch.tensor([0, 1]).view(1, 1, 2, 1, 1))
        >>> depth, feat = torch.tensor([0.25, 0.75]).view(1, 1, 2, 1, 1), torch.tensor([4.0]).view(1, 1, 1, 1, 1)
        >>> layer(depth, feat).flatten()
        tensor([1., 3.])
    """

    _fixed = ("num_voxels",)

    def __init__(self, num_voxels: int) -> None:
        super().__init__()
        self.num_voxels = as_voxels("num_voxels", num_voxels)

    def forward(
        self,
        depth: Tensor,
        feat: Tensor,
        rank: Tensor | None = None,
        csr: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        if rank is None:
            if mask is not None or csr is not None:
                raise ValueError("rank: expected ranks with a mask or csr, got None")
            geometry = self._get("rank: expected ranks")
        elif csr is not None or shards.is_sharded(depth, feat):
            return bev_pool(depth, feat, rank, self.num_voxels, csr, mask)
        else:
            _check(depth, feat, _checked(rank))
            geometry = self._geometry_of(_masked(depth, rank, mask))
        return pool_kept(depth, feat, geometry, self.num_voxels)

    def set_geometry(self, rank: Tensor) -> None:
        """Keep these ranks, ``[B, N, D, H, W]`` or ``[N, D, H, W]``, for calls without any; no call changes them."""
        self._set(_checked(rank))

    def _compute(self, rank: Tensor) -> tuple[Tensor, Csr]:
        return rank, voxel_csr(rank.flatten(-4), self.num_voxels)

    def extra_repr(self) -> str:
        return f"{self.num_voxels}"


def _checked(rank: Tensor) -> Tensor:
    _checks.has_dtype("rank", rank, _checks.INDEX)
    if rank.dim() not in (4, 5):
        raise ValueError(f"rank: expected [B, N, D, H, W] or [N, D, H, W], got shape {list(rank.shape)}")
    return rank
