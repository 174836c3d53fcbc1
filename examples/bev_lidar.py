"""A bird's-eye view of LiDAR scans: a network trained end to end through `voxels_summing`.

Task, which needs no labels: the points in random blocks of the ground plan are hidden; from the
others the network says, for every hidden cell of 0.5 m, whether the scan has a point there. A small
network looks at each point, `voxels_summing` adds up its features in the point's cell, a
convolutional network reads the resulting picture.

It is trained on the first scan, turned, mirrored and shifted at random, and judged on the second one,
in four passes that hide every cell once. The sensor moved by 0.5 m between the scans, so it is the
same place seen from another point; how far copying the first scan by the known transform gets is
reported too. The other baseline copies the nearest cell that isn't hidden.

Beside it runs the same network on the FIERY formula of voxel summing (a cumulative sum over all points
and differences at the ends of the voxels), in float32 as FIERY does and, as the arbiter, in float64.

Data: two scans of small_gicp (MIT), see `custom_ops.examples.data`.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import custom_ops
from custom_ops.benchmarks.peers import cumulative_voxels_summing
from custom_ops.examples import report
from custom_ops.examples.data import Array, load_lidar
from custom_ops.examples.report import NEUTRAL, OURS, THEIRS, Check, Options, Report

GRID = 64  # cells a side
CELL = 0.5  # metres
CENTRE = (0.0, -6.0)  # metres from the sensor: most of the scans lies to its south
BLOCK = 2  # cells a side of what is hidden together
CHANNELS = 32
SPANS = (1, 3, 7)  # cells a side over which the picture is averaged, to reach into hidden blocks
STEPS = 150

# Ours differs from float64 by the rounding of each voxel's own sum, which leaves the loss alike to
# about 1e-7; FIERY's cumulative sum in float32 rounds at the size of the sum over all points. Training
# amplifies any rounding: after some 50 steps ours drifts from float64 too. So the tight limit holds
# for the first steps, and a wide one for all.
EARLY, TOLERANCE_EARLY, TOLERANCE = 40, 1e-5, 2e-2

Pool = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def pool_fiery64(x: Tensor, geometry: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """FIERY's formula, with the sums in float64."""
    sums, geometry = cumulative_voxels_summing(x.double(), geometry, ranks)
    return sums.to(x.dtype), geometry


@dataclass
class Scene:
    """A scan on the grid: its points sorted by cell, and what each cell holds."""

    features: Tensor  # [N, 4]: position in the cell, height, intensity
    geometry: Tensor  # [N, 2]: row (south to north), column (west to east)
    ranks: Tensor  # [N]: the cell's number, sorted
    occupied: Tensor  # [GRID, GRID]

    @staticmethod
    def of(points: Tensor) -> Scene:
        at = (points[:, [1, 0]] - torch.tensor(CENTRE[::-1])) / CELL + GRID / 2
        cell = at.floor().long()
        inside = ((cell >= 0) & (cell < GRID)).all(1)
        ranks, order = (cell[:, 0] * GRID + cell[:, 1])[inside].sort(stable=True)
        points, at, cell = (t[inside][order] for t in (points, at, cell))
        features = torch.cat((at - cell - 0.5, points[:, 2:3] / 2, points[:, 3:] / 50 - 0.5), 1)
        occupied = torch.zeros(GRID * GRID, dtype=torch.bool).index_fill(0, ranks, True).view(GRID, GRID)
        return Scene(features, cell, ranks, occupied)

    def visible_points(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keep = ~hidden.flatten()[self.ranks]
        return self.features[keep], self.geometry[keep], self.ranks[keep]


class BirdsEye(nn.Module):
    """Points -> features -> voxel sums -> picture -> logit of each cell being occupied."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool = pool
        self.points = nn.Sequential(nn.Linear(4, 32), custom_ops.ReLU(), nn.Linear(32, CHANNELS))
        layers: list[nn.Module] = [nn.Conv2d(len(SPANS) * (CHANNELS + 3), 32, 1), custom_ops.ReLU()]
        for _ in range(2):
            layers += [nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(4, 32), custom_ops.ReLU()]
        self.picture = nn.Sequential(*layers, nn.Conv2d(32, 1, 1))

    def forward(self, scene: Scene, hidden: Tensor) -> Tensor:
        x, geometry, ranks = scene.visible_points(hidden)
        # A column of ones counts the points, so that the sum also gives the mean.
        x = torch.cat((self.points(x), x.new_ones(len(x), 1)), 1)
        sums, cells = self.pool(x, geometry, ranks)
        counts = sums[:, -1:]
        pooled = torch.cat((sums[:, :-1] / counts, counts.log(), torch.ones_like(counts)), 1)
        picture = x.new_zeros(GRID, GRID, pooled.shape[1]).index_put(tuple(cells.unbind(1)), pooled)
        picture = torch.cat((picture, (~hidden).to(x.dtype)[..., None]), 2).permute(2, 0, 1)[None]
        around = torch.cat([averages(picture, span) for span in SPANS], 1)
        return self.picture(around)[0, 0]


def averages(picture: Tensor, span: int) -> Tensor:
    """Averages over ``span`` x ``span`` cells: of features over the occupied cells, of those over the known ones."""
    features, occupied, known = F.avg_pool2d(picture, span, 1, span // 2).split((CHANNELS + 1, 1, 1), 1)
    return torch.cat((features / (occupied + 1e-3), occupied / (known + 1e-3), known), 1)


def loss_of(model: BirdsEye, scene: Scene, hidden: Tensor) -> Tensor:
    logit = model(scene, hidden)[hidden]
    return F.binary_cross_entropy_with_logits(logit, scene.occupied[hidden].to(logit.dtype))


def training_step(model: BirdsEye, scene: Scene, hidden: Tensor) -> None:
    loss_of(model, scene, hidden).backward()


def blocks(generator: torch.Generator) -> Tensor:
    """A quarter of the grid's blocks at random, from a random corner on: [GRID, GRID] of hidden or not."""
    coarse = torch.rand(GRID // BLOCK + 1, GRID // BLOCK + 1, generator=generator) < 0.25
    row, column = torch.randint(BLOCK, (2,), generator=generator).tolist()
    fine = coarse.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return fine[row : row + GRID, column : column + GRID]


def folds() -> list[Tensor]:
    """Four masks that hide every block once."""
    index = torch.arange(GRID) // BLOCK
    number = (index[:, None] + 2 * index[None, :] + index[None, :] // 2) % 4
    return [number == k for k in range(4)]


def augmented(points: Tensor, generator: torch.Generator) -> Scene:
    """The points turned about the grid's centre, mirrored and shifted by up to a metre."""
    angle, mirror, east, north = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    cos, sin = np.cos(2 * np.pi * angle), np.sin(2 * np.pi * angle)
    turn = torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float32)
    if mirror < 0.5:
        turn[0] = -turn[0]
    centre = torch.tensor(CENTRE)
    plan = (points[:, :2] - centre) @ turn + centre + 2 * torch.tensor([east - 0.5, north - 0.5])
    return Scene.of(torch.cat((plan, points[:, 2:]), 1))


@dataclass
class Variant:
    name: str
    model: BirdsEye
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=3e-3)

    def step(self, scene: Scene, hidden: Tensor) -> None:
        start = time.perf_counter()
        self.optimiser.zero_grad()
        loss = loss_of(self.model, scene, hidden)
        loss.backward()
        self.optimiser.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)


def f1(predicted: Tensor, scene: Scene) -> float:
    """How well occupied cells are told from empty ones; ``predicted`` are probabilities [GRID, GRID]."""
    occupied = predicted > 0.5
    both = (occupied & scene.occupied).sum()
    return float(2 * both / (occupied.sum() + scene.occupied.sum()))


def predict(model: BirdsEye, scene: Scene) -> Tensor:
    """Every cell as predicted while it was hidden."""
    probability = torch.zeros(GRID, GRID)
    with torch.no_grad():
        for hidden in folds():
            probability[hidden] = model(scene, hidden).sigmoid()[hidden]
    return probability


def copy_nearest(scene: Scene) -> Tensor:
    """Baseline: every cell from the nearest one that isn't hidden with it."""
    copied = torch.zeros(GRID, GRID)
    for hidden in folds():
        known = (~hidden).nonzero()
        nearest = known[torch.cdist(hidden.nonzero().float(), known.float()).argmin(1)]
        copied[hidden] = scene.occupied[tuple(nearest.unbind(1))].float()
    return copied


def copy_first_scan(first: Array, transform: Array) -> Tensor:
    """Baseline: the first scan, moved to where the second one was taken."""
    moved = first.copy()
    moved[:, :3] = first[:, :3] @ transform[:3, :3].T + transform[:3, 3]
    return Scene.of(torch.from_numpy(moved)).occupied.float()


def time_pooling(pools: Sequence[Pool], scene: Scene, repeats: int) -> list[float]:
    """Median milliseconds of each pooling, forward and backward, taken in turn."""
    seconds: list[list[float]] = [[] for _ in pools]
    runs = [pooling(pool, scene) for pool in pools]
    for _ in range(repeats + 2):
        for run, times in zip(runs, seconds):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return [1e3 * statistics.median(times[2:]) for times in seconds]


def peak_memory(run: Callable[[], object]) -> float:
    """The most MiB that tensors allocated during ``run`` take at once.

    Added up from every allocation and release of torch's CPU allocator, in the trace that its
    profiler writes: exact and the same on every run, which a process's resident memory isn't.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        trace = json.loads(Path(folder, "trace.json").read_text())
    events = [event for event in trace["traceEvents"] if event["name"] == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    return max(itertools.accumulate(event["args"]["Bytes"] for event in events)) / 2**20


def pooling(pool: Pool, scene: Scene, backward: bool = True) -> Callable[[], object]:
    """Pooling by itself of all of a scene's points."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(scene.ranks), CHANNELS, generator=generator).requires_grad_()
    grad = torch.randn(len(scene.ranks.unique()), CHANNELS, generator=generator)

    def run() -> object:
        sums, _ = pool(x, scene.geometry, scene.ranks)
        return torch.autograd.grad(sums, x, grad) if backward else None

    return run


def example(options: Options) -> Report:
    first, second, transform = load_lidar()
    points, test = torch.from_numpy(first), Scene.of(torch.from_numpy(second))
    generator = torch.Generator().manual_seed(0)
    steps = 4 if options.quick else STEPS

    torch.manual_seed(0)
    start = BirdsEye(custom_ops.voxels_summing)

    def variant(name: str, pool: Pool) -> Variant:
        model = copy.deepcopy(start)
        model.pool = pool
        return Variant(name, model)

    variants = [
        variant("custom_ops", custom_ops.voxels_summing),
        variant("FIERY", cumulative_voxels_summing),
        variant("FIERY in float64", pool_fiery64),
    ]
    ours, fiery, arbiter = variants
    with options.progress() as progress:
        task = progress.add_task("Bird's-eye view", total=steps, note="")
        for _ in range(steps):
            scene, hidden = augmented(points, generator), blocks(generator)
            for v in variants:
                v.step(scene, hidden)
            progress.update(task, advance=1, note=f"loss {ours.losses[-1]:.4f}")

    pools: list[Pool] = [custom_ops.voxels_summing, cumulative_voxels_summing]
    pool_ms = time_pooling(pools, test, 3 if options.quick else 30)
    forward_mib = [peak_memory(pooling(pool, test, backward=False)) for pool in pools]
    pool_mib = [peak_memory(pooling(pool, test)) for pool in pools]
    everything = torch.zeros(GRID, GRID, dtype=torch.bool)
    everything[::2] = True
    step_mib = [peak_memory(partial(training_step, v.model, test, everything)) for v in (ours, fiery)]
    step_ms = [1e3 * statistics.median(v.seconds[1:]) for v in (ours, fiery)]

    predictions = {
        "untrained": predict(start, test),
        "nearest known cell": copy_nearest(test),
        "first scan, moved": copy_first_scan(first, transform),
        "FIERY": predict(fiery.model, test),
        "custom_ops": predict(ours.model, test),
    }
    score = {name: f1(prediction, test) for name, prediction in predictions.items()}

    def last(v: Variant) -> float:
        return statistics.mean(v.losses[-20:])

    def ratio(pair: Sequence[float]) -> str:
        return f"{pair[0] / pair[1]:.2f} of FIERY's"

    def mib(pair: Sequence[float]) -> tuple[str, str, str]:
        return f"{pair[0]:.1f} MiB", f"{pair[1]:.1f} MiB", ratio(pair)

    baselines = ", ".join(f"{name} {score[name]:.2f}" for name in list(score)[:3])
    result = Report("Bird's-eye view: two LiDAR scans", ("", "custom_ops", "FIERY", "remark"))
    size = f"{len(test.ranks):,} points, {int(test.occupied.sum())} voxels, {CHANNELS} channels"
    result.rows = [
        ("loss, first step", f"{ours.losses[0]:.4f}", f"{fiery.losses[0]:.4f}", ""),
        ("loss, last 20 steps", f"{last(ours):.4f}", f"{last(fiery):.4f}", f"{steps} steps"),
        ("F1 of occupied, scan 2", f"{score['custom_ops']:.2f}", f"{score['FIERY']:.2f}", baselines),
        ("pooling", f"{pool_ms[0]:.1f} ms", f"{pool_ms[1]:.1f} ms", f"{ratio(pool_ms)}; {size}"),
        ("training step", f"{step_ms[0]:.0f} ms", f"{step_ms[1]:.0f} ms", ratio(step_ms)),
        ("pooling forward, peak memory", *mib(forward_mib)),
        ("pooling and backward, peak", *mib(pool_mib)),
        ("training step, peak memory", *mib(step_mib)),
    ]

    def gap(v: Variant, steps: int | None = None) -> float:
        return float(np.max(np.abs(np.subtract(v.losses, arbiter.losses))[:steps]))

    early = f"loss of custom_ops against FIERY's formula in float64, largest gap of {EARLY} steps"
    result.checks = [
        Check(early, gap(ours, EARLY), TOLERANCE_EARLY),
        Check("the same over all steps", gap(ours), TOLERANCE),
        Check("loss of FIERY's formula in float32 against float64, all steps", gap(fiery), TOLERANCE),
        Check("peak memory of pooling's forward, share of FIERY's", forward_mib[0] / forward_mib[1], 0.1),
    ]
    if not options.quick:
        gain = score["custom_ops"] - max(score["untrained"], score["nearest known cell"])
        result.checks.append(
            Check("F1 on scan 2 above the untrained network's and nearest's", gain, 0.0, at_least=True)
        )
    result.pictures = [
        draw_views(test, predictions["custom_ops"], predictions["nearest known cell"], options.out),
        draw_training(variants, [pool_ms, step_ms], [forward_mib, pool_mib, step_mib], options.out),
    ]
    return result


def draw_views(scene: Scene, network: Tensor, nearest: Tensor, out: Path) -> Path:
    """What one pass sees of scan 2, the truth, the predictions for all cells."""
    figure = report.new_figure(4, width=4.2, height=4.9)
    figure.suptitle("Scan 2 from above, in cells of 0.5 m", fontsize=14)
    half = GRID * CELL / 2
    extent = (CENTRE[0] - half, CENTRE[0] + half, CENTRE[1] - half, CENTRE[1] + half)
    truth, hidden = scene.occupied.float(), folds()[0]
    panels = [
        ("Input of one pass of four\n(hidden blocks in pink)", truth.where(~hidden, 0.0)),
        (f"Truth\n{int(truth.sum())} occupied cells", truth),
        (f"Network through voxels_summing\nF1 {f1(network, scene):.2f}", network),
        (f"Baseline: nearest known cell\nF1 {f1(nearest, scene):.2f}", nearest),
    ]
    for axis, (title, probability) in zip(figure.axes, panels):
        image = axis.imshow(probability, origin="lower", extent=extent, cmap="Blues", vmin=0, vmax=1)
        axis.plot(0, 0, "r^", markersize=6)
        axis.set(title=title, xlabel="east of the sensor, m")
    veil = np.zeros((GRID, GRID, 4))
    veil[hidden.numpy()] = (0.96, 0.82, 0.86, 1.0)
    figure.axes[0].imshow(veil, origin="lower", extent=extent)
    figure.axes[0].set_ylabel("north of the sensor, m")
    figure.colorbar(image, ax=figure.axes, label="probability of a point in the cell", shrink=0.75)
    path = out / "bev_scan2.png"
    figure.savefig(path)
    return path


def draw_training(
    variants: Sequence[Variant],
    times: Sequence[Sequence[float]],
    memory: Sequence[Sequence[float]],
    out: Path,
) -> Path:
    figure = report.new_figure(4, width=4.2, title="Bird's-eye view: voxels_summing beside FIERY's formula")
    curves, gaps, time_axis, memory_axis = figure.axes
    ours, fiery, arbiter = variants
    for v, style, width, colour in ((arbiter, "-", 5, NEUTRAL), (fiery, "-", 2, THEIRS), (ours, "--", 1.2, OURS)):
        curves.plot(v.losses, style, color=colour, linewidth=width, label=v.name)
    curves.set(xlabel="step", ylabel="loss on hidden cells", title="Training loss")
    curves.legend(frameon=False)
    for v, colour in ((fiery, THEIRS), (ours, OURS)):
        gaps.semilogy(np.maximum(np.abs(np.subtract(v.losses, arbiter.losses)), 1e-9), color=colour, label=v.name)
    gaps.set(xlabel="step", ylabel="|loss - loss in float64|", title="How far from the float64 curve?")
    gaps.legend(frameon=False)
    pooling_names = ["pooling,\nforward", "pooling, with\nbackward", "training\nstep"]
    for axis, groups, names, unit, title in (
        (time_axis, times, pooling_names[1:], "ms (median)", "Time"),
        (memory_axis, memory, pooling_names, "MiB of tensors at once", "Peak memory"),
    ):
        for which, (colour, name) in enumerate(((OURS, "custom_ops"), (THEIRS, "FIERY"))):
            at = [i + 0.4 * which - 0.2 for i in range(len(groups))]
            bars = axis.bar(at, [group[which] for group in groups], 0.4, color=colour, label=name)
            axis.bar_label(bars, fmt="%.1f", padding=2, fontsize=9)
        axis.set_xticks(range(len(groups)), names)
        axis.set(ylabel=unit, title=title)
        axis.margins(y=0.12)  # room for the numbers
        axis.legend(frameon=False, loc="upper left")
    path = out / "bev_training.png"
    figure.savefig(path)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    return report.run([example], "python -m custom_ops.examples.bev_lidar", "A bird's-eye view of LiDAR.", argv)


if __name__ == "__main__":
    raise SystemExit(main())
