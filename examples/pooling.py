"""Sums into a bird's-eye view, at the sizes of the papers, beside the formulas that are copied between repositories.

Lift-Splat sums the features of six cameras, weighted by their depths, on a grid. Lift-Splat-Shoot writes out the
features of all points, sorts them and takes differences of a cumulative sum (`QuickCumsum`); ours reads each pixel's
features in place. The LiDAR example sums a scan's points, sorted by voxel, with FIERY's class of the same formula
(`VoxelsSumming`) and with ours.

The pillar encoder is that of PointPillars and CenterPoint: the points of each column of the grid get their offsets from
the column's mean, a linear layer, and the maximum over the column, which is written into the picture. It is written
with torch's unique and scatter as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import custom_ops
from benchmarks.memory import peak_bytes
from benchmarks.peers import cumulative_voxels_summing, lss_bev_pool
from examples import report
from examples.agreement import Agreement
from examples.data import load_lidar
from examples.report import Gain, Options, Part, Report, milliseconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The sizes are Lift-Splat-Shoot's: six cameras, features every 16 pixels, 41 depths, a grid of 100 m in cells of 0.5 m.
BATCH, CAMERAS, IMAGE, FEATURES = 4, 6, (128, 352), (8, 22)
DEPTHS = torch.arange(4.0, 45.0)
CHANNELS, GRID, CELL = 64, 200, 0.5
GROUP = "Summing into a bird's-eye view, beside QuickCumsum and VoxelsSumming"
VOXEL = 0.5  # metres per side, for the LiDAR scan
PILLAR, SIDE = 0.25, 512  # metres per side of a pillar, and pillars per side of the picture


def rig() -> tuple[Tensor, Tensor]:
    """Return intrinsics and poses of six cameras that look all around."""
    height, width = IMAGE
    focal = width / 2 / math.tan(math.radians(35))
    intrinsics = torch.tensor([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
    yaw = torch.arange(CAMERAS) * 2 * math.pi / CAMERAS
    camera_to_ego = torch.eye(4).repeat(CAMERAS, 1, 1)
    right = torch.stack((yaw.sin(), -yaw.cos(), torch.zeros_like(yaw)), -1)
    forward = torch.stack((yaw.cos(), yaw.sin(), torch.zeros_like(yaw)), -1)
    camera_to_ego[:, :3, :3] = torch.stack((right, torch.linalg.cross(forward, right), forward), -1)
    camera_to_ego[:, 2, 3] = 1.6
    return intrinsics.repeat(CAMERAS, 1, 1), camera_to_ego


def example(options: Options) -> Report:
    generator = torch.Generator().manual_seed(options.seed)
    rounds = 1 if options.quick else 5
    result = Report("Summing into a bird's-eye view", ("forward and backward", "ours", "theirs", "remark"))
    shown: dict[str, tuple[float, float]] = {}
    with options.progress() as progress:
        task = progress.add_task("Voxel sums", total=3, note="")
        for name, whose, remark, contenders, agreement in (
            lift_splat(generator, 1 if options.quick else BATCH),
            lidar(generator),
            pillars(generator),
        ):
            progress.update(task, note=name)
            times = milliseconds(contenders, rounds)
            memory = {who: peak_bytes(run, torch.device("cpu")) / 2**20 for who, run in contenders.items()}
            for unit, values in (("ms", times), ("MiB", memory)):
                gain = Gain(name, unit, values["ours"], values["theirs"], GROUP)
                result.rows.append((*gain.row[:3], f"{whose}; {remark}"))
                if unit == "ms":
                    shown[f"{name}, {whose}"] = gain.ours, gain.theirs
                if unit == "ms" or whose == "QuickCumsum":  # only gains go into the closing table
                    result.gains.append(gain)
            result.checks.append(agreement.check())
            progress.update(task, advance=1)
    result.panels.append(partial(draw, shown=shown))
    return result


Contenders = dict[str, Callable[[], list[Tensor]]]


def lift_splat(generator: torch.Generator, batch: int) -> tuple[str, str, str, Contenders, Agreement]:
    half = GRID * CELL / 2
    layer = custom_ops.LiftSplat(IMAGE, FEATURES, DEPTHS, (-half, -half, -10), (CELL, CELL, 20), (GRID, GRID, 1))
    cameras = rig()
    layer.set_geometry(*cameras)
    rank = custom_ops.voxel_rank(layer.points(*cameras), layer.origin, layer.voxel_size, layer.grid_size)
    rank = rank.expand(batch, *rank.shape[-4:])
    depth = torch.rand(batch, CAMERAS, len(DEPTHS), *FEATURES, generator=generator).softmax(2).requires_grad_()
    features = torch.randn(batch, CAMERAS, CHANNELS, *FEATURES, generator=generator).requires_grad_()
    grad = torch.randn(batch, GRID, GRID, CHANNELS, generator=generator)

    def ours(d: Tensor, f: Tensor) -> Tensor:
        return layer(d, f).movedim(1, -1)

    def theirs(d: Tensor, f: Tensor) -> Tensor:
        return lss_bev_pool(d, f, rank, GRID * GRID).view(grad.shape)

    def run(pool: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        sums = pool(depth, features)
        return [sums, *torch.autograd.grad(sums, (depth, features), grad)]

    # The tolerance needs the sum of magnitudes, that is of the terms without their signs. The reference runs in
    # float64, since its cumulative sums run over all voxels.
    wide = [t.detach().double().requires_grad_() for t in (depth, features)]
    sums = theirs(*wide)
    expected = [sums, *torch.autograd.grad(sums, wide, grad.double())]
    positive = [t.detach().double().abs().requires_grad_() for t in (depth, features)]
    magnitudes = theirs(*positive)
    sizes = [magnitudes, *torch.autograd.grad(magnitudes, positive, grad.double().abs())]
    terms = [int(rank.flatten()[rank.flatten() >= 0].bincount().max()), CHANNELS, len(DEPTHS)]
    agreement = Agreement("Lift-Splat pooling and its gradients beside the formula in float64")
    for mine, other, size, n in zip(run(ours), expected, sizes, terms):
        agreement.compare(mine, other, n, size)
    name = "Lift-Splat pooling"
    remark = f"batch of {batch}, {batch * math.prod(rank.shape[-4:]):,} points, {CHANNELS} channels"
    return name, "QuickCumsum", remark, {"ours": partial(run, ours), "theirs": partial(run, theirs)}, agreement


def lidar(generator: torch.Generator) -> tuple[str, str, str, Contenders, Agreement]:
    points = torch.from_numpy(load_lidar()[0])
    cell = (points[:, :2] / VOXEL).floor().long()
    cell -= cell.amin(0)
    ranks, order = (cell[:, 0] * (cell[:, 1].max() + 1) + cell[:, 1]).sort()
    cell = cell[order]
    x = torch.randn(len(ranks), CHANNELS, generator=generator).requires_grad_()
    _, counts = ranks.unique_consecutive(return_counts=True)
    grad = torch.randn(len(counts), CHANNELS, generator=generator)

    def run(pool: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        sums, _ = pool(x, cell, ranks)
        return [sums, *torch.autograd.grad(sums, x, grad)]

    sums, gradient = run(custom_ops.voxels_summing)
    agreement = Agreement("LiDAR sums and their gradient beside the formula in float64")
    (expected, _), (sizes, _) = (cumulative_voxels_summing(t, cell, ranks) for t in (x.double(), x.double().abs()))
    agreement.compare(sums, expected, counts[:, None], sizes)
    agreement.compare(gradient, run(cumulative_voxels_summing)[1], 1)
    remark = f"{len(ranks):,} points in {len(counts):,} voxels, {CHANNELS} channels"
    contenders = {"ours": custom_ops.voxels_summing, "theirs": cumulative_voxels_summing}
    runs = {who: partial(run, pool) for who, pool in contenders.items()}
    return "LiDAR sums", "VoxelsSumming", remark, runs, agreement


def encode(points: Tensor, weight: Tensor) -> Tensor:
    """Return the picture [pillars, channels] of a scan."""
    corner = (-SIDE * PILLAR / 2, -SIDE * PILLAR / 2, -100)
    rank = custom_ops.voxel_rank(points[:, :3], corner, (PILLAR, PILLAR, 200), (SIDE, SIDE, 1))
    voxels = custom_ops.voxelize(rank)
    mean = custom_ops.segment_reduce(points[:, :3], voxels.indptr, "mean", voxels.perm)
    offset = points[:, :3] - custom_ops.voxel_gather(mean, voxels.inverse, voxels.csr)
    x = custom_ops.relu(torch.cat((points, offset), 1) @ weight)
    largest = custom_ops.segment_reduce(x, voxels.indptr, "max", voxels.perm)
    return x.new_zeros(SIDE * SIDE, weight.shape[1]).index_copy(0, voxels.rank, largest)


def encode_by_scatter(points: Tensor, weight: Tensor) -> Tensor:
    """Return the same picture by torch's unique and scatter."""
    cell = (points[:, :2] / PILLAR + SIDE / 2).floor().long()
    inside = ((cell >= 0) & (cell < SIDE)).all(1)
    points, cell = points[inside], cell[inside]
    pillar, inverse = cell.unique(dim=0, return_inverse=True)

    def reduced(x: Tensor, reduce: str) -> Tensor:
        at = inverse[:, None].expand_as(x)
        return x.new_zeros(len(pillar), x.shape[1]).scatter_reduce(0, at, x, reduce, include_self=False)

    offset = points[:, :3] - reduced(points[:, :3], "mean")[inverse]
    largest = reduced(torch.relu(torch.cat((points, offset), 1) @ weight), "amax")
    return points.new_zeros(SIDE * SIDE, weight.shape[1]).index_copy(0, pillar[:, 0] * SIDE + pillar[:, 1], largest)


def pillars(generator: torch.Generator) -> tuple[str, str, str, Contenders, Agreement]:
    points = torch.from_numpy(load_lidar()[0])
    weight = torch.randn(7, CHANNELS, generator=generator)
    grad = torch.randn(SIDE * SIDE, CHANNELS, generator=generator)

    def run(encoder: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        inputs = [t.detach().to(dtype).requires_grad_() for t in (points, weight)]
        picture = encoder(*inputs)
        return [picture, *torch.autograd.grad(picture, inputs, grad.to(dtype))]

    agreement = Agreement("Pillar encoder and its gradients beside unique and scatter, in float64")
    mine, theirs = (run(encoder, torch.float64) for encoder in (encode, encode_by_scatter))
    agreement.compare(mine[0], theirs[0], len(weight), theirs[0].abs().max())
    agreement.compare_networks((mine[0].square().sum(), mine[1:]), (theirs[0].square().sum(), theirs[1:]), len(points))
    remark = f"{len(points):,} points, {int((theirs[0] != 0).any(1).sum()):,} pillars, {CHANNELS} channels"
    contenders = {"ours": partial(run, encode), "theirs": partial(run, encode_by_scatter)}
    return "Pillar encoder", "unique, scatter", remark, contenders, agreement


def draw(axis: Axes, shown: dict[str, tuple[float, float]]) -> None:
    report.draw_pairs(axis, list(shown), list(shown.values()), "ms", "theirs")
    axis.set(title="Summing into a bird's-eye view: time\n(with backward)")


PARTS = {"pooling": Part(example, ("lidar",))}


def main(argv: Sequence[str] | None = None) -> int:
    return report.run(PARTS, "python -m examples.pooling", "Voxel sums.", argv, "Voxel sums")


if __name__ == "__main__":
    raise SystemExit(main())
