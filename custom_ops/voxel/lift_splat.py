"""Lift-Splat: project the features of calibrated cameras onto a bird's-eye-view grid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from custom_ops import _checks, shards
from custom_ops.voxel._geometry import Csr, Geometry, KeepsGeometry
from custom_ops.voxel.adapters import checked_layout, voxel_image
from custom_ops.voxel.pooling import bev_pool, pool_kept
from custom_ops.voxel.voxel_grid import numbers_of, on_host, sizes_of, voxel_csr, voxel_rank


class LiftSplat(KeepsGeometry):
    """Lift each pixel's features to all depths along its ray and sum them up in the voxels of a grid.

    ``bev[b, c, x, y]`` is the sum of ``depth[b, n, d, h, w] * feat[b, n, c, h, w]`` over the points of all cameras in
    cell (x, y). Pixel (u, v) of camera n at depth d is the point ``R K^-1 (u, v, 1) d + t`` with ``K = intrinsics[b,
    n]`` and ``(R, t) = camera_to_ego[b, n]``. The points' features are never written to memory; see `bev_pool`.

    The feature map covers the image: column w is at ``u = (w + 0.5) width / W - 0.5``, where the image's pixels are at
    the integers. With ``align_corners`` it is at ``w (width - 1) / (W - 1)``, as in Lift-Splat-Shoot (which also has
    ``rounding="trunc"``). An affine augmentation of the image is applied to the intrinsics: ``A @ K`` for the 3 x 3
    matrix A that maps old pixels to new ones.

    The points' voxels are kept and reused while the cameras have the same values. Each call compares the values, which
    waits for a GPU. `set_geometry` saves the comparison if the cameras never change: call the layer with ``depth`` and
    ``feat`` alone. Compiled and exported programs that are given cameras compute the voxels on each call. The geometry
    is computed in float64, so neither autocast nor the module's dtype moves a point to another voxel. It has no
    gradient. It isn't part of the ``state_dict`` and isn't a buffer, because DistributedDataParallel would overwrite
    every process's buffers with those of the first, whose cameras differ.

    Args:
        image_size: height and width of the image that the intrinsics refer to.
        feature_size: height and width ``(H, W)`` of the feature map.
        depths: the D distances along the optical axis.
        origin, voxel_size, grid_size, rounding: the grid of ``(X, Y, Z)`` voxels; see `voxel_rank`.
        align_corners: how the feature map is aligned with the image; see above.
        layout: the order of the result's dimensions after the first, by their letters, as in `voxel_image`: "cyx" for
            ``[B, Z C, Y, X]``.

    Call ``layer(depth, feat, intrinsics, camera_to_ego)`` with each depth's weight ``depth [B, N, D, H, W]`` (commonly
    a softmax over D), ``feat [B, N, C, H, W]``, ``intrinsics [B, N, 3, 3]`` and ``camera_to_ego [B, N, 4, 4]``;
    matrices without the dimension B apply to all examples. A bool ``mask`` as in `bev_pool` chooses the points that
    count; with one, the points are sorted on each call. The result is ``[B, Z C, X, Y]`` or as ``layout`` says, with
    the channels of the lowest layer of voxels first; for Z = 1 its memory is channels-last.

    ``depth`` and ``feat`` may be DTensors, sharded as in `bev_pool`; all cameras are given as plain tensors, and the
    points are sorted on each call.

    Raises:
        TypeError: a wrong dtype, or not a tensor.
        ValueError: a wrong shape or size, tensors on several devices, one camera matrix without the
            other, or no cameras although `set_geometry` wasn't called.
        RuntimeError: singular intrinsics.

    The op takes O(B N D H W C) time; the kept geometry is two integers per point and one per voxel.

    Source: Philion & Fidler, "Lift, Splat, Shoot", ECCV 2020.

    Example:
        >>> import torch, custom_ops
        >>> layer = custom_ops.LiftSplat((2, 2), (1, 1), [1.0, 2.0], (0, -0.5, -0.5), (1, 1, 1), (4, 1, 1))
        >>> looking_along_x = torch.tensor([[0.0, 0, 1, 0.5], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
        >>> intrinsics = torch.tensor([[1.0, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
        >>> depth = torch.tensor([0.25, 0.75]).view(1, 1, 2, 1, 1)
        >>> feat = torch.tensor([4.0]).view(1, 1, 1, 1, 1)
        >>> layer(depth, feat, intrinsics[None], looking_along_x[None]).flatten()
        tensor([0., 1., 3., 0.])
    """

    _fixed = (
        "image_size",
        "feature_size",
        "depths",
        "origin",
        "voxel_size",
        "grid_size",
        "rounding",
        "align_corners",
    )

    def __init__(
        self,
        image_size: tuple[int, int],
        feature_size: tuple[int, int],
        depths: Sequence[float] | Tensor,
        origin: Sequence[float] | Tensor,
        voxel_size: Sequence[float] | Tensor,
        grid_size: Sequence[int],
        rounding: str = "floor",
        align_corners: bool = False,
        layout: str = "cxy",
    ) -> None:
        super().__init__()
        self.image_size = numbers_of("image_size", image_size, 2, _size)
        self.feature_size = numbers_of("feature_size", feature_size, 2, _size)
        self.depths = _numbers("depths", depths)
        if not self.depths:
            raise ValueError("depths: expected at least one, got none")
        self.origin, self.voxel_size = _numbers("origin", origin), _numbers("voxel_size", voxel_size)
        self.grid_size = sizes_of("grid_size", on_host(grid_size), 3)
        self.rounding, self.align_corners = rounding, _checks.as_bool("align_corners", align_corners)
        self._rank(torch.zeros(1, 3))  # raises if the grid is wrong
        self.layout = checked_layout(layout)

    def forward(
        self,
        depth: Tensor,
        feat: Tensor,
        intrinsics: Tensor | None = None,
        camera_to_ego: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        _checks.is_tensor("depth", depth)
        _checks.has_dims("depth", depth, "[B, N, D, H, W]")
        geometry = self._geometry_for(intrinsics, camera_to_ego)
        _checks.same_device(depth=depth, intrinsics=geometry.sources[0])
        cameras, frustum = geometry.sources[0].shape[:-2], (len(self.depths), *self.feature_size)
        if depth.shape[2:] != frustum:
            raise ValueError(f"depth: expected (D, H, W) = {frustum}, got shape {list(depth.shape)}")
        if cameras not in (depth.shape[:2], depth.shape[1:2]):
            raise ValueError(f"depth: expected (B, N) of the cameras, {list(cameras)}, got shape {list(depth.shape)}")
        if shards.is_sharded(depth):  # each process sorts its own points
            bev = bev_pool(depth, feat, shards.replicated(geometry.rank, depth), self._voxels(), mask=mask)
        elif mask is not None:
            bev = bev_pool(depth, feat, geometry.rank, self._voxels(), mask=mask)
        else:
            bev = pool_kept(depth, feat, geometry, self._voxels())
        return voxel_image(bev, self.grid_size, self.layout)

    def points(self, intrinsics: Tensor, camera_to_ego: Tensor) -> Tensor:
        """Return the frustums' points ``[B, N, D, H, W, 3]`` (or without B) in the ego frame, float64."""
        for name, matrix, size in (("intrinsics", intrinsics, 3), ("camera_to_ego", camera_to_ego, 4)):
            _checks.has_dtype(name, matrix, (torch.float32, torch.float64))
            if matrix.dim() not in (3, 4) or matrix.shape[-2:] != (size, size):
                layout = f"[B, N, {size}, {size}] or [N, {size}, {size}]"
                raise ValueError(f"{name}: expected {layout}, got shape {list(matrix.shape)}")
        _checks.same_device(intrinsics=intrinsics, camera_to_ego=camera_to_ego)
        if intrinsics.shape[:-2] != camera_to_ego.shape[:-2]:
            expected = f"{list(intrinsics.shape[:-2])} cameras as in intrinsics"
            raise ValueError(f"camera_to_ego: expected {expected}, got {list(camera_to_ego.shape[:-2])}")
        pose, device = camera_to_ego.detach().double(), camera_to_ego.device
        v, u = torch.meshgrid(self._positions(0, device), self._positions(1, device), indexing="ij")
        pixels = torch.stack((u, v, torch.ones_like(u)), -1).flatten(0, 1)
        rays = pixels @ (pose[..., :3, :3] @ torch.linalg.inv(intrinsics.detach().double())).mT
        depths = torch.tensor(self.depths, dtype=torch.float64, device=device)[:, None, None, None]
        return rays.unflatten(-2, self.feature_size).unsqueeze(-4) * depths + pose[..., None, None, None, :3, 3]

    def set_geometry(self, intrinsics: Tensor, camera_to_ego: Tensor) -> None:
        """Keep these cameras for calls without any; no call changes them, and `clear_geometry` releases them."""
        _checks.is_tensor("intrinsics", intrinsics)
        _checks.is_tensor("camera_to_ego", camera_to_ego)
        self._set(intrinsics, camera_to_ego)

    def _geometry_for(self, intrinsics: Tensor | None, camera_to_ego: Tensor | None) -> Geometry:
        if intrinsics is None and camera_to_ego is None:
            return self._get("intrinsics: expected cameras")
        if intrinsics is None or camera_to_ego is None:
            raise ValueError("camera_to_ego: expected together with intrinsics, got one of them alone")
        _checks.is_tensor("intrinsics", intrinsics)
        _checks.is_tensor("camera_to_ego", camera_to_ego)
        return self._geometry_of(intrinsics, camera_to_ego)

    def _compute(self, intrinsics: Tensor, camera_to_ego: Tensor) -> tuple[Tensor, Csr]:
        rank = self._rank(self.points(intrinsics, camera_to_ego))
        return rank, voxel_csr(rank.flatten(-4), self._voxels())

    def _rank(self, points: Tensor) -> Tensor:
        return voxel_rank(points, self.origin, self.voxel_size, self.grid_size, rounding=self.rounding)

    def _voxels(self) -> int:
        return math.prod(self.grid_size)

    def _positions(self, side: int, device: torch.device) -> Tensor:
        """Return the positions of the feature map's rows (side 0) or columns (side 1) in the image."""
        pixels, features = self.image_size[side], self.feature_size[side]
        if self.align_corners:
            return torch.linspace(0, pixels - 1, features, dtype=torch.float64, device=device)
        return (torch.arange(features, dtype=torch.float64, device=device) + 0.5) * (pixels / features) - 0.5

    def extra_repr(self) -> str:
        return (
            f"image_size={self.image_size}, feature_size={self.feature_size}, depths={len(self.depths)}, "
            f"grid_size={self.grid_size}, layout={self.layout!r}"
        )


def _size(name: str, value: int) -> int:
    return _checks.as_count(name, value, 1)


def _numbers(name: str, values: Sequence[float] | Tensor) -> tuple[float, ...]:
    if getattr(values, "ndim", 1) != 1 or not hasattr(values, "__len__"):
        raise TypeError(f"{name}: expected numbers, got {values!r}")
    return numbers_of(name, on_host(values), len(values), _checks.as_float)
