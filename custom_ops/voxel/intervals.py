"""The adapter for BEVDet's pooling, whose geometry is five arrays that list points by voxel."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from custom_ops import _checks, library, shards
from custom_ops._leaf import leaf
from custom_ops._native import define
from custom_ops._wide import under_autocast
from custom_ops.voxel.voxel_grid import numbers_of
from custom_ops.voxel.voxel_segments import pair_dots, pair_reduce


@define
def interval_ranks(
    ranks_depth: Tensor,
    ranks_feat: Tensor,
    ranks_bev: Tensor,
    interval_starts: Tensor,
    interval_lengths: Tensor,
    points: int,
    pixels: int,
    voxels: int,
) -> Tensor:
    """Return the voxel of each listed point [P], or -1 in a gap between intervals; see `bev_pool_v2`.

    Inconsistent arrays raise on the CPU; on a GPU the result is the invalid rank ``voxels``, whose sums are NaN.
    """
    return torch.empty_like(ranks_bev)


@library.vmap(interval_ranks)
def _(info: Any, in_dims: Any, *args: Any) -> Any:
    arrays = [library.to_front(t, d, info.batch_size) for t, d in zip(args[:5], in_dims)]
    return torch.stack([interval_ranks(*example, *args[5:]) for example in zip(*arrays)]), 0


@library.sharding(interval_ranks)
def _(*args: Any) -> Any:
    from torch.distributed.tensor import Replicate

    return [([Replicate()], [*[Replicate()] * 5, *[None] * 3])]


@leaf
def bev_pool_v2(
    depth: Tensor,
    feat: Tensor,
    ranks_depth: Tensor,
    ranks_feat: Tensor,
    ranks_bev: Tensor,
    bev_feat_shape: Sequence[int],
    interval_starts: Tensor,
    interval_lengths: Tensor,
) -> Tensor:
    """Compute `bev_pool` with the arguments and the result of BEVDet's function of that name.

    Interval i lists the points ``j = interval_starts[i]`` to ``interval_starts[i] + interval_lengths[i] - 1`` of one
    voxel, ``ranks_bev[j]``. The sum of ``depth.flatten()[ranks_depth[j]] * feat.flatten(0, 3)[ranks_feat[j]]`` over
    them is added to that voxel; voxels without an interval are 0. A depth may be listed any number of times, as in
    DualBEV, and with any pixel; points between intervals are ignored.

    Args:
        depth: ``[B, N, D, H, W]``.
        feat: ``[B, N, H, W, C]``.
        ranks_depth: the index of each listed point in ``depth``, ``[P]``.
        ranks_feat: the index of its pixel in ``feat``, ``[P]``.
        ranks_bev: its voxel, counted over the batch, ``[P]``; it is the same within an interval.
        bev_feat_shape: ``(B, Z, Y, X, C)``.
        interval_starts, interval_lengths: the intervals ``[I]``, in any order, without overlap.

    The arrays are int32 or int64, as BEVDet's ``voxel_pooling_prepare_v2`` makes them.

    Returns:
        ``[B, C, Z, Y, X]``, contiguous; under autocast it is float32, as in BEVDet.

    Raises:
        TypeError: a wrong dtype, or not a tensor.
        ValueError: a wrong shape, or tensors on several devices.
        RuntimeError: on the CPU, for inconsistent arrays or an index out of range.
            On a GPU, where an error would wait for the device, the result is NaN.

    DTensors may be sharded as in `bev_pool`, with all of the arrays on each process. The result is ``Partial``, even if
    the examples are sharded.

    The op takes O(P C + B Z Y X C) time; it sorts the listed points by voxel, and by depth and pixel in backward.

    Source: Huang & Huang, "BEVPoolv2", 2022.

    Example:
        >>> import torch, custom_ops
        >>> depth = torch.tensor([0.25, 0.75]).view(1, 1, 2, 1, 1)
        >>> feat = torch.tensor([4.0, 8.0]).view(1, 1, 1, 1, 2)
        >>> points, pixels, voxels = torch.tensor([1, 0]), torch.tensor([0, 0]), torch.tensor([0, 2])
        >>> starts, lengths = torch.tensor([0, 1]), torch.tensor([1, 1])
        >>> custom_ops.bev_pool_v2(depth, feat, points, pixels, voxels, (1, 1, 1, 3, 2), starts, lengths)
        tensor([[[[[3., 0., 1.]]],
        <BLANKLINE>
        <BLANKLINE>
                 [[[6., 0., 2.]]]]])
    """
    _checks.has_dtype("depth", depth, _checks.FLOATING)
    _checks.has_dims("depth", depth, "[B, N, D, H, W]")
    _checks.has_dtype("feat", feat, _checks.FLOATING)
    _checks.has_dims("feat", feat, "[B, N, H, W, C]")
    ranks = {"ranks_depth": ranks_depth, "ranks_feat": ranks_feat, "ranks_bev": ranks_bev}
    intervals = {"interval_starts": interval_starts, "interval_lengths": interval_lengths}
    for arrays, layout in ((ranks, "[P]"), (intervals, "[I]")):
        first = next(iter(arrays))
        for name, array in arrays.items():
            _checks.has_dtype(name, array, _checks.INDEX)
            _checks.has_dims(name, array, layout)
            if array.shape != arrays[first].shape:
                raise ValueError(f"{name}: expected {layout} as {first}, got shape {list(array.shape)}")
    _checks.same_device(depth=depth, feat=feat, **ranks, **intervals)
    batch, cameras, _, height, width = depth.shape
    expected = [batch, cameras, height, width]
    if list(feat.shape[:4]) != expected:
        raise ValueError(f"feat: expected shape {[*expected, 'C']} as depth, got {list(feat.shape)}")
    bev_feat_shape = numbers_of("bev_feat_shape", bev_feat_shape, 5, _checks.as_count)
    if bev_feat_shape[0] != batch or bev_feat_shape[4] != feat.shape[4]:
        wanted = f"(B, Z, Y, X, C) with B={batch} and C={feat.shape[4]}"
        raise ValueError(f"bev_feat_shape: expected {wanted}, got {bev_feat_shape}")
    voxels = math.prod(bev_feat_shape[:4])
    _checks.as_count("bev_feat_shape", voxels)
    depth_at, feat_at, bev, starts, lengths = (array.long() for array in (*ranks.values(), *intervals.values()))
    sizes = (depth.numel(), feat.shape[:4].numel(), voxels)
    rank = interval_ranks(depth_at, feat_at, bev, starts, lengths, *sizes)
    dtype = torch.promote_types(depth.dtype, feat.dtype)

    def pool(depth: Tensor, feat: Tensor, depth_at: Tensor, feat_at: Tensor, rank: Tensor) -> Tensor:
        listed = (rank >= 0) & (depth_at >= 0)  # in the grid and on this process
        depth_at, feat_at = (torch.where(listed, at, -1) for at in (depth_at, feat_at))
        # A sum over a single product looks the weights up differentiably.
        ones, first = depth.new_ones(1, 1), depth_at.clamp_max(0)
        weight = pair_dots(depth.reshape(-1, 1), ones, depth_at, first)
        out = pair_reduce(feat.flatten(0, 3), weight, feat_at, rank, voxels)
        if not under_autocast(out):
            out = out.to(dtype)
        return out.view(*bev_feat_shape[:4], out.shape[1]).permute(0, 4, 1, 2, 3).contiguous()

    depth, feat = (t.to(torch.promote_types(dtype, torch.float32)) for t in (depth, feat))
    if shards.is_sharded(depth, feat):
        return _in_shards(pool, depth, feat, depth_at, feat_at, rank)
    return pool(depth, feat, depth_at, feat_at, rank)


def _in_shards(pool: Callable[..., Tensor], depth: Any, feat: Any, *listed: Tensor) -> Tensor:
    """Pool DTensors: each process selects, among all listed points, those of its own depths and pixels."""

    def numbered(shape: torch.Size) -> Any:
        return shards.replicated(torch.arange(shape.numel(), device=depth.device).view(shape), depth)

    def run(
        depth: Tensor, feat: Tensor, depths: Tensor, pixels: Tensor, depth_at: Tensor, feat_at: Tensor, rank: Tensor
    ) -> Tensor:
        own = []
        for at, numbers, whole in ((depth_at, depths, points), (feat_at, pixels, rows)):
            place = at.new_full((whole,), -1)
            place[numbers.flatten()] = torch.arange(numbers.numel(), device=at.device)
            own.append(place[at.clamp(0, max(whole - 1, 0))] if whole else torch.full_like(at, -1))
        if bool(((own[0] < 0) != (own[1] < 0)).any()):
            raise RuntimeError("ranks_feat: expected pixels on the process of their depths, got some elsewhere")
        return pool(depth, feat, *own, rank)

    points, rows = depth.numel(), feat.shape[:4].numel()
    numbers = numbered(depth.shape), numbered(feat.shape[:4])
    return shards.in_shards(run, "bndHW,bnHWc,bndHW,bnHW,P,P,P->BcZYX", depth, feat, *numbers, *listed)
