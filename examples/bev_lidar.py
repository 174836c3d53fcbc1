"""A bird's-eye view of LiDAR scans: a network trained end to end through `voxels_summing`.

The task needs no labels. Random blocks of the ground plan are hidden; from the points outside of them the network
predicts, for every hidden cell of 0.5 m, whether the scan has a point there. A small network maps each point to
features, `voxels_summing` adds them up per cell, and a convolutional network reads the resulting picture.

It is trained on the first scan, which is rotated, mirrored and shifted at random. It is tested on the second scan, in
four passes that hide every cell once. The sensor moved by 0.5 m between the scans, so they show the same place from two
points. One baseline therefore copies the first scan by the known transform; the other copies the nearest cell that
isn't hidden.

At every fifth step the FIERY formula of voxel summing (a cumulative sum over all points and differences at the ends of
the voxels) gets the same weights and points, in float32 as in FIERY and in float64 as the reference.

Data: two scans of small_gicp (MIT), see `examples.data`.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import custom_ops
from benchmarks.memory import peak_bytes
from benchmarks.peers import cumulative_voxels_summing
from examples import report
from examples.agreement import Agreement
from examples.data import Array, load_lidar
from examples.report import NEUTRAL, OURS, THEIRS, Check, Gain, Options, Part, Report, milliseconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GRID = 64  # cells per side
CELL = 0.5  # metres
CENTRE = (0.0, -6.0)  # metres from the sensor; most of the scans lies to its south
BLOCK = 2  # cells per side of a hidden block
CHANNELS = 32
SPANS = (1, 3, 7)  # cells per side over which the picture is averaged, to reach into hidden blocks
STEPS = 150
EVERY = 5  # one step in so many is compared with FIERY's formula

# The approximate number of terms between a point and the loss: those of the fullest cells, of the convolutions over
# them, and of the mean over the hidden cells.
CHAIN = 5000 + 105 + 2 * 9 * 32 + 32 + GRID * GRID // 4
LEAST_GAIN = 0.1  # over four seeds, F1 was 0.27 to 0.40 above that of the untrained network

Pool = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def pool_fiery64(x: Tensor, geometry: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the voxels by FIERY's formula in float64."""
    sums, geometry = cumulative_voxels_summing(x.double(), geometry, ranks)
    return sums.to(x.dtype), geometry


@dataclass
class Scene:
    """A scan on the grid: its points sorted by cell, and which cells are occupied."""

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
    """A network from points to a logit for each cell: points -> features -> voxel sums -> picture -> logits."""

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
        # A column of ones counts the points, so the sum also gives the mean.
        x = torch.cat((self.points(x), x.new_ones(len(x), 1)), 1)
        sums, cells = self.pool(x, geometry, ranks)
        counts = sums[:, -1:]
        pooled = torch.cat((sums[:, :-1] / counts, counts.log(), torch.ones_like(counts)), 1)
        picture = x.new_zeros(GRID, GRID, pooled.shape[1]).index_put(tuple(cells.unbind(1)), pooled)
        picture = torch.cat((picture, (~hidden).to(x.dtype)[..., None]), 2).permute(2, 0, 1)[None]
        around = torch.cat([averages(picture, span) for span in SPANS], 1)
        return self.picture(around)[0, 0]


def averages(picture: Tensor, span: int) -> Tensor:
    """Average over ``span`` x ``span`` cells: the features over the occupied cells, the occupancy over the known
    ones.
    """
    features, occupied, known = F.avg_pool2d(picture, span, 1, span // 2).split((CHANNELS + 1, 1, 1), 1)
    return torch.cat((features / (occupied + 1e-3), occupied / (known + 1e-3), known), 1)


def loss_of(model: BirdsEye, scene: Scene, hidden: Tensor) -> Tensor:
    logit = model(scene, hidden)[hidden]
    return F.binary_cross_entropy_with_logits(logit, scene.occupied[hidden].to(logit.dtype))


def training_step(model: BirdsEye, scene: Scene, hidden: Tensor) -> None:
    loss_of(model, scene, hidden).backward()


def blocks(generator: torch.Generator) -> Tensor:
    """Hide a quarter of the grid's blocks at random, from a random corner on: [GRID, GRID], True for hidden."""
    coarse = torch.rand(GRID // BLOCK + 1, GRID // BLOCK + 1, generator=generator) < 0.25
    row, column = torch.randint(BLOCK, (2,), generator=generator).tolist()
    fine = coarse.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return fine[row : row + GRID, column : column + GRID]


def folds() -> list[Tensor]:
    """Return four masks that together hide every block once."""
    index = torch.arange(GRID) // BLOCK
    number = (index[:, None] + 2 * index[None, :] + index[None, :] // 2) % 4
    return [number == k for k in range(4)]


def augmented(points: Tensor, generator: torch.Generator) -> Scene:
    """Return the points rotated about the grid's centre, mirrored and shifted by up to a metre."""
    angle, mirror, east, north = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    cos, sin = np.cos(2 * np.pi * angle), np.sin(2 * np.pi * angle)
    turn = torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float32)
    if mirror < 0.5:
        turn[0] = -turn[0]
    centre = torch.tensor(CENTRE)
    plan = (points[:, :2] - centre) @ turn + centre + 2 * torch.tensor([east - 0.5, north - 0.5])
    return Scene.of(torch.cat((plan, points[:, 2:]), 1))


def f1(predicted: Tensor, scene: Scene) -> float:
    """Return the F1 score of the occupied cells; ``predicted`` holds probabilities [GRID, GRID]."""
    occupied = predicted > 0.5
    both = (occupied & scene.occupied).sum()
    return float(2 * both / (occupied.sum() + scene.occupied.sum()))


def predict(model: BirdsEye, scene: Scene) -> Tensor:
    """Predict every cell in the pass that hides it."""
    probability = torch.zeros(GRID, GRID)
    with torch.no_grad():
        for hidden in folds():
            probability[hidden] = model(scene, hidden).sigmoid()[hidden]
    return probability


def copy_nearest(scene: Scene) -> Tensor:
    """Return the baseline that copies, to each cell, the nearest one that isn't hidden with it."""
    copied = torch.zeros(GRID, GRID)
    for hidden in folds():
        known = (~hidden).nonzero()
        nearest = known[torch.cdist(hidden.nonzero().float(), known.float()).argmin(1)]
        copied[hidden] = scene.occupied[tuple(nearest.unbind(1))].float()
    return copied


def copy_first_scan(first: Array, transform: Array) -> Tensor:
    """Return the baseline that moves the first scan to where the second one was taken."""
    moved = first.copy()
    moved[:, :3] = first[:, :3] @ transform[:3, :3].T + transform[:3, 3]
    return Scene.of(torch.from_numpy(moved)).occupied.float()


class Watched:
    """`custom_ops.voxels_summing`, recording the last call's points and sums together with their gradients."""

    def __call__(self, x: Tensor, geometry: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
        self.sums, cells = custom_ops.voxels_summing(x, geometry, ranks)
        self.x, self.geometry, self.ranks = x, geometry, ranks
        if x.requires_grad:
            x.retain_grad()
            self.sums.retain_grad()
        return self.sums, cells

    def compare(self, into: Agreement) -> None:
        """Compare with FIERY's formula in float64, for the same points and the same gradient of the sums."""
        x = self.x.detach().double().requires_grad_()
        sums, _ = cumulative_voxels_summing(x, self.geometry, self.ranks)
        sizes, _ = cumulative_voxels_summing(x.detach().abs(), self.geometry, self.ranks)
        counts = self.ranks.unique_consecutive(return_counts=True)[1]
        into.compare(self.sums, sums, counts[:, None], sizes)
        assert self.x.grad is not None and self.sums.grad is not None
        into.compare(self.x.grad, torch.autograd.grad(sums, x, self.sums.grad.double())[0], 1)


POOLS: tuple[Pool, ...] = (pool_fiery64, cumulative_voxels_summing)


@torch.no_grad()
def other_loss(model: BirdsEye, pool: Pool, scene: Scene, hidden: Tensor) -> Tensor:
    """Return the loss of the current weights if ``pool`` sums the voxels."""
    own, model.pool = model.pool, pool
    loss = loss_of(model, scene, hidden)
    model.pool = own
    return loss


def example(options: Options) -> Report:
    first, second, transform = load_lidar()
    points, test = torch.from_numpy(first), Scene.of(torch.from_numpy(second))
    generator = torch.Generator().manual_seed(options.seed)
    steps = 4 if options.quick else STEPS

    torch.manual_seed(options.seed)
    watched = Watched()
    model = BirdsEye(watched)
    untrained = predict(model, test)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    agreement = Agreement(f"voxel sums and their gradient beside FIERY's formula in float64, at every {EVERY}th step")
    agreement_of_loss = Agreement(f"loss beside that with FIERY's formula in float64, at every {EVERY}th step")
    losses: list[float] = []
    gaps: dict[str, list[float]] = {"custom_ops": [], "FIERY": []}  # the gap between each loss and that in float64
    with options.progress() as progress:
        task = progress.add_task("Bird's-eye view", total=steps, note="")
        for step in range(steps):
            scene, hidden = augmented(points, generator), blocks(generator)
            optimiser.zero_grad()
            loss = loss_of(model, scene, hidden)
            loss.backward()
            losses.append(loss.item())
            if step % EVERY == 0:
                watched.compare(agreement)
                exact, fiery = (other_loss(model, pool, scene, hidden) for pool in POOLS)
                agreement_of_loss.compare(loss, exact, CHAIN)
                for name, value in (("custom_ops", loss.detach()), ("FIERY", fiery)):
                    gaps[name].append(abs(float(value - exact)))
            optimiser.step()
            progress.update(task, advance=1, note=f"loss {losses[-1]:.4f}")

    everything = torch.zeros(GRID, GRID, dtype=torch.bool)
    everything[::2] = True
    model.pool = custom_ops.voxels_summing
    models = {"custom_ops": model, "FIERY": copy.deepcopy(model)}
    models["FIERY"].pool = cumulative_voxels_summing
    runs = {name: partial(training_step, each, test, everything) for name, each in models.items()}
    times = milliseconds(runs, 3 if options.quick else 9)
    memory = {name: peak_bytes(run, points.device) / 2**20 for name, run in runs.items()}

    predictions = {
        "untrained": untrained,
        "nearest known cell": copy_nearest(test),
        "first scan, moved": copy_first_scan(first, transform),
        "custom_ops": predict(model, test),
    }
    score = {name: f1(prediction, test) for name, prediction in predictions.items()}
    time, peak = (
        Gain("a training step", unit, *values.values(), "Bird's-eye view of LiDAR scans, beside VoxelsSumming")
        for unit, values in (("ms", times), ("MiB", memory))
    )
    result = Report("Bird's-eye view: two LiDAR scans", ("", "custom_ops", "FIERY", "remark"))
    result.gains = [time]
    result.rows = [
        ("loss, first step", f"{losses[0]:.4f}", "", ""),
        ("loss, last 20 steps", f"{statistics.mean(losses[-20:]):.4f}", "", f"{steps} steps"),
        ("loss beside float64", *(f"{max(gap):.1g}" for gap in gaps.values()), "the largest gap of a step"),
        ("F1 of occupied, scan 2", f"{score['custom_ops']:.2f}", "", _baselines(score)),
        ("time of a training step", *time.row[1:3], f"{len(test.ranks):,} points"),
        ("its peak memory", *peak.row[1:3], f"{int(test.occupied.sum()):,} voxels, {CHANNELS} channels"),
    ]
    result.checks = [agreement.check(), agreement_of_loss.check()]
    if not options.quick:
        gain = score["custom_ops"] - score["untrained"]
        result.checks.append(Check("F1 on scan 2 above the untrained network's", gain, LEAST_GAIN, at_least=True))
    result.pictures = [
        draw_views(test, predictions["custom_ops"], predictions["nearest known cell"], options.out),
        draw_training(losses, gaps, times, memory, options.out),
    ]
    result.panels.append(partial(draw_prediction, scene=test, network=predictions["custom_ops"]))
    return result


def _baselines(score: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in score.items() if name != "custom_ops")


HALF = GRID * CELL / 2
EXTENT = (CENTRE[0] - HALF, CENTRE[0] + HALF, CENTRE[1] - HALF, CENTRE[1] + HALF)


def draw_prediction(axis: Axes, scene: Scene, network: Tensor) -> None:
    """Draw correct cells in blue, missed ones in grey and false ones in orange."""
    colours = np.ones((GRID, GRID, 3))
    predicted = network > 0.5
    for cells, colour in (
        (predicted & scene.occupied, OURS),
        (~predicted & scene.occupied, NEUTRAL),
        (predicted & ~scene.occupied, THEIRS),
    ):
        colours[cells.numpy()] = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    axis.imshow(colours, origin="lower", extent=EXTENT)
    axis.plot(0, 0, "r^", markersize=6)
    title = f"Hidden cells of a LiDAR scan, predicted: F1 {f1(network, scene):.2f}"
    axis.set(title=f"{title}\nright (blue), missed (grey), wrong (orange)", xlabel="east of the sensor, m")


def draw_views(scene: Scene, network: Tensor, nearest: Tensor, out: Path) -> Path:
    """Draw what one pass sees of scan 2, the truth, and the predictions for all cells."""
    figure = report.new_figure(4, width=4.2, height=4.9)
    figure.suptitle("Scan 2 from above, in cells of 0.5 m", fontsize=14)
    truth, hidden = scene.occupied.float(), folds()[0]
    panels = [
        ("Input of one pass of four\n(hidden blocks in pink)", truth.where(~hidden, 0.0)),
        (f"Truth\n{int(truth.sum())} occupied cells", truth),
        (f"Network through voxels_summing\nF1 {f1(network, scene):.2f}", network),
        (f"Baseline: nearest known cell\nF1 {f1(nearest, scene):.2f}", nearest),
    ]
    for axis, (title, probability) in zip(figure.axes, panels):
        image = axis.imshow(probability, origin="lower", extent=EXTENT, cmap="Blues", vmin=0, vmax=1)
        axis.plot(0, 0, "r^", markersize=6)
        axis.set(title=title, xlabel="east of the sensor, m")
    veil = np.zeros((GRID, GRID, 4))
    veil[hidden.numpy()] = (0.96, 0.82, 0.86, 1.0)
    figure.axes[0].imshow(veil, origin="lower", extent=EXTENT)
    figure.axes[0].set_ylabel("north of the sensor, m")
    figure.colorbar(image, ax=figure.axes, label="probability of a point in the cell", shrink=0.75)
    path = out / "bev_scan2.png"
    figure.savefig(path)
    return path


def draw_training(
    losses: Sequence[float],
    gaps: dict[str, list[float]],
    times: dict[str, float],
    memory: dict[str, float],
    out: Path,
) -> Path:
    figure = report.new_figure(4, width=4.2, title="Bird's-eye view: voxels_summing beside FIERY's formula")
    curve, gap_axis, time_axis, memory_axis = figure.axes
    curve.plot(losses, color=OURS)
    curve.set(xlabel="step", ylabel="loss on hidden cells", title="Training loss")
    for (name, values), colour in zip(gaps.items(), (OURS, THEIRS)):
        gap_axis.semilogy(range(0, len(losses), EVERY), np.maximum(values, 1e-9), ".", color=colour, label=name)
    gap_axis.set(xlabel="step", ylabel="|loss - loss in float64|", title="Sums in float32 or in float64,\nsame weights")
    gap_axis.legend(frameon=False)
    for axis, values, unit, title in (
        (time_axis, times, "ms", "Time of a training step (median)"),
        (memory_axis, memory, "MiB", "Peak memory of a training step"),
    ):
        bars = axis.bar(list(values), list(values.values()), 0.5, color=[OURS, THEIRS])
        axis.bar_label(bars, [report.shown(value, unit) for value in values.values()], padding=2)
        axis.set(ylabel=unit, title=title)
        axis.margins(y=0.12)  # leaves room for the numbers
    path = out / "bev_training.png"
    figure.savefig(path)
    return path


PARTS = {"lidar": Part(example, ("lidar",))}


def main(argv: Sequence[str] | None = None) -> int:
    return report.run(PARTS, "python -m examples.bev_lidar", "A bird's-eye view of LiDAR.", argv)


if __name__ == "__main__":
    raise SystemExit(main())
