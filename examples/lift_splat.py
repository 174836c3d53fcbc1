"""Lift-Splat on synthetic scenes: cameras in, a bird's-eye view of what stands around them out.

The scenes are synthetic, and so is all of their geometry: boxes of the size of cars on a flat chequered
ground, ray-cast into four calibrated cameras that look all around from a height of 2.4 m. Where the
cameras look to, their height and their focal lengths differ from scene to scene, so the network can't
learn them by heart; it has to use the calibration it is given.

A convolutional network gives each pixel of a feature map features and a distribution over depths,
`custom_ops.LiftSplat` sums them up on a grid of 0.75 m, a second network reads from that whether a
cell lies within a box. Nothing but that grid supervises it: no depth is ever shown to it.

Three copies are trained on the same batches: eager, under `torch.compile`, and the program that
`torch.export` makes of the network. They have to agree in their losses. The baseline, which doesn't
look, takes for each cell how often it is occupied in the training scenes.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import custom_ops
from custom_ops.benchmarks.peers import lss_bev_pool
from custom_ops.examples import report
from custom_ops.examples.report import NEUTRAL, OURS, THEIRS, Check, Options, Report

IMAGE = (48, 128)  # pixels
STRIDE = 4  # of the feature map
CAMERAS, HEIGHT = 4, 2.4  # metres above the ground
GRID, CELL = 48, 0.75  # cells a side, metres
BOXES = 8
DEPTHS = torch.linspace(2, 25, 24)  # metres
CHANNELS = 24
BATCH, STEPS, SHORT = 4, 400, 200
TRAINING, TEST = 256, 48  # scenes

# Inductor rounds the same arithmetic otherwise than eager, and training amplifies any rounding: Adam's
# first steps are of the gradient's sign alone. The losses differ by some 1e-5 after 10 steps and 1e-2
# after 100 (in float64 by no more than 1e-16 in the first 20). So the tight limit holds for the first
# steps, and a wide one for the mean of the last 20.
EARLY, TOLERANCE_EARLY, TOLERANCE = 10, 1e-3, 3e-2


@dataclass
class Scenes:
    images: Tensor  # [S, N, 6, height, width]: red, green, blue, and the ray's direction in the ego frame
    intrinsics: Tensor  # [S, N, 3, 3]
    camera_to_ego: Tensor  # [S, N, 4, 4]; the ego frame: x to the front, y to the left, z up from the ground
    occupied: Tensor  # [S, GRID, GRID], by x and y

    def __getitem__(self, which: Tensor | slice) -> Scenes:
        return Scenes(*(t[which] for t in (self.images, self.intrinsics, self.camera_to_ego, self.occupied)))

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.images, self.intrinsics, self.camera_to_ego

    @staticmethod
    def draw(count: int, seed: int) -> Scenes:
        generator = torch.Generator().manual_seed(seed)
        intrinsics, camera_to_ego = draw_cameras(count, generator)
        boxes = draw_boxes(count, generator)
        images = torch.stack([render(*scene) for scene in zip(boxes, intrinsics, camera_to_ego)])
        return Scenes(images, intrinsics, camera_to_ego, truth(boxes))


def draw_cameras(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Intrinsics [S, N, 3, 3] and poses [S, N, 4, 4] of cameras that look to all sides and a little down."""

    def around(size: float) -> Tensor:
        return size * (2 * torch.rand(count, CAMERAS, generator=generator) - 1)

    height, width = IMAGE
    intrinsics = torch.eye(3).repeat(count, CAMERAS, 1, 1)
    focal = width / 2 / math.tan(math.radians(50)) * (1 + around(0.1))
    intrinsics[..., 0, 0] = intrinsics[..., 1, 1] = focal
    intrinsics[..., 0, 2], intrinsics[..., 1, 2] = (width - 1) / 2, (height - 1) / 2

    yaw = torch.arange(CAMERAS) * 2 * math.pi / CAMERAS + around(math.radians(10))
    pitch = math.radians(12) + around(math.radians(3))
    forward = torch.stack((yaw.cos() * pitch.cos(), yaw.sin() * pitch.cos(), -pitch.sin()), -1)
    right = torch.stack((yaw.sin(), -yaw.cos(), torch.zeros_like(yaw)), -1)
    camera_to_ego = torch.eye(4).repeat(count, CAMERAS, 1, 1)
    camera_to_ego[..., :3, :3] = torch.stack((right, torch.linalg.cross(forward, right), forward), -1)
    camera_to_ego[..., :3, 3] = torch.stack((0.5 * yaw.cos(), 0.5 * yaw.sin(), HEIGHT + around(0.2)), -1)
    return intrinsics, camera_to_ego


def draw_boxes(count: int, generator: torch.Generator) -> Tensor:
    """Boxes [S, M, 10]: x, y, z of the bottom, length, width, height, heading, red, green, blue."""
    half = GRID * CELL / 2
    low = torch.tensor([0, 3, 0, 3.5, 1.7, 1.3, 0, 0.1, 0.1, 0.1])
    high = torch.tensor([2 * math.pi, half, 0, 5, 2.1, 2.2, 2 * math.pi, 1, 1, 1])
    boxes = low + torch.rand(count, BOXES, 10, generator=generator) * (high - low)
    angle, distance = boxes[..., 0].clone(), boxes[..., 1].clone()
    boxes[..., 0], boxes[..., 1] = distance * angle.cos(), distance * angle.sin()
    return boxes


def into_boxes(vectors: Tensor, boxes: Tensor) -> Tensor:
    """Vectors [..., M, P, 3] turned into the axes of boxes [..., M, 10]."""
    cos, sin = boxes[..., 6, None].cos(), boxes[..., 6, None].sin()
    x, y, z = vectors.unbind(-1)
    return torch.stack((cos * x + sin * y, cos * y - sin * x, z.expand_as(cos * x)), -1)


def truth(boxes: Tensor) -> Tensor:
    """Which cells have their centre within a box [S, GRID, GRID]."""
    axis = (torch.arange(GRID) + 0.5) * CELL - GRID * CELL / 2
    x, y = torch.meshgrid(axis, axis, indexing="ij")
    centres = torch.stack((x, y, torch.zeros_like(x)), -1).flatten(0, 1)
    within = into_boxes(centres - boxes[:, :, None, :3], boxes).abs() <= boxes[:, :, None, 3:6] / 2
    return within.all(-1).any(1).unflatten(-1, (GRID, GRID))


def render(boxes: Tensor, intrinsics: Tensor, camera_to_ego: Tensor) -> Tensor:
    """One scene's images [N, 6, height, width], by casting a ray through the centre of each pixel."""
    v, u = torch.meshgrid(torch.arange(IMAGE[0]), torch.arange(IMAGE[1]), indexing="ij")
    pixels = torch.stack((u, v, torch.ones_like(u)), -1).flatten(0, 1).float()
    rays = pixels @ (camera_to_ego[:, :3, :3] @ intrinsics.inverse()).mT  # [N, P, 3]
    eyes = camera_to_ego[:, None, :3, 3]
    sky = torch.tensor([0.6, 0.75, 0.95])

    ground = torch.where(rays[..., 2] < 0, -eyes[..., 2] / rays[..., 2], torch.inf)
    tile = ((eyes + ground.clamp(max=1e3)[..., None] * rays)[..., :2] / 2).floor().sum(-1) % 2
    stone = (0.42 + 0.08 * tile)[..., None]
    colour = stone + (ground / 60).clamp(max=1)[..., None] * (sky - stone)  # hazier with the distance

    # A ray is within a box between the last of the three pairs of planes it enters and the first it leaves.
    start = into_boxes((eyes - boxes[:, :3])[:, :, None], boxes)  # [N, M, 1, 3]
    along = into_boxes(rays[:, None], boxes)  # [N, M, P, 3]
    size = boxes[:, None, 3:6]
    planes = torch.stack((-size, size)) / 2 + torch.tensor([0, 0, 0.5]) * size
    crossings = (planes[:, None] - start) / along
    enters, face = crossings.amin(0).max(-1)
    leaves = crossings.amax(0).amin(-1)
    distance, box = enters.where((enters < leaves) & (enters > 0), torch.inf).min(1)
    light = torch.tensor([0.55, 0.8, 1.0])[face.gather(1, box[:, None])[:, 0]]
    colour = torch.where((distance < ground)[..., None], light[..., None] * boxes[box, 7:], colour)
    return torch.cat((colour, F.normalize(rays, dim=-1)), -1).mT.unflatten(-1, IMAGE)


class LiftSplatNet(nn.Module):
    """Images -> features and depths of each pixel -> grid -> logit of each cell being occupied."""

    def __init__(self) -> None:
        super().__init__()
        self.camera = nn.Sequential(
            *layer(6, 16, 5, stride=2), *layer(16, 32, 3, stride=2), *layer(32, 32, 5), *layer(32, 32, 3),
            nn.Conv2d(32, len(DEPTHS) + CHANNELS, 1),
        )  # fmt: skip
        half = GRID * CELL / 2
        self.lift_splat = custom_ops.LiftSplat(
            image_size=IMAGE,
            feature_size=(IMAGE[0] // STRIDE, IMAGE[1] // STRIDE),
            depths=DEPTHS,
            origin=(-half, -half, -1),
            voxel_size=(CELL, CELL, 5),
            grid_size=(GRID, GRID, 1),
        )
        last = nn.Conv2d(32, 1, 1)
        nn.init.constant_(last.get_parameter("bias"), -2.5)  # few cells are occupied
        self.picture = nn.Sequential(*layer(CHANNELS, 32, 3), *layer(32, 32, 3), last)

    def lift(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.camera(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        depth, features = x.split((len(DEPTHS), CHANNELS), 2)
        return depth.softmax(2), features

    def forward(self, images: Tensor, intrinsics: Tensor, camera_to_ego: Tensor) -> Tensor:
        return self.picture(self.lift_splat(*self.lift(images), intrinsics, camera_to_ego))[:, 0]


def layer(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2)
    return [convolution, nn.GroupNorm(4, outputs), custom_ops.ReLU()]


@dataclass
class Variant:
    name: str
    model: nn.Module
    steps: int
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.Adam(self.model.parameters())
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimiser, 5e-3, self.steps, pct_start=0.2)

    def step(self, scenes: Scenes) -> None:
        start = time.perf_counter()
        self.optimiser.zero_grad()
        loss = loss_of(self.model(*scenes.inputs), scenes.occupied)
        loss.backward()
        self.optimiser.step()
        self.schedule.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)

    @property
    def last_loss(self) -> float:
        return statistics.mean(self.losses[-20:])

    @property
    def milliseconds(self) -> float:
        return 1e3 * statistics.median(self.seconds[1:])


def loss_of(logit: Tensor, occupied: Tensor) -> Tensor:
    # Few cells are occupied: without the weight it takes long until the first one is found.
    return F.binary_cross_entropy_with_logits(logit, occupied.to(logit.dtype), pos_weight=torch.tensor(3.0))


def predict(model: nn.Module, scenes: Scenes) -> Tensor:
    with torch.no_grad():
        batches = [scenes[first : first + BATCH] for first in range(0, len(scenes.images), BATCH)]
        return torch.cat([model(*batch.inputs) for batch in batches]).sigmoid()


def iou(predicted: Tensor, occupied: Tensor) -> float:
    predicted = predicted > 0.5
    return float((predicted & occupied).sum() / (predicted | occupied).sum())


def frequencies(training: Scenes, test: Scenes) -> Tensor:
    """The baseline [GRID, GRID]: 1 for the cells most often occupied, as many as give it the best IoU on the test."""
    often = training.occupied.float().mean(0)
    candidates = [(often >= threshold).float() for threshold in often.unique()]
    return max(candidates, key=lambda prediction: iou(prediction.expand(test.occupied.shape), test.occupied))


def time_pooling(net: LiftSplatNet, scenes: Scenes, repeats: int) -> dict[str, float]:
    """Median milliseconds of pooling a batch, forward and backward, taken in turn."""
    with torch.no_grad():
        depth, features = (t.contiguous().requires_grad_() for t in net.lift(scenes.images))
    cameras = scenes.inputs[1:]
    kept = copy.deepcopy(net.lift_splat)
    renewed = copy.deepcopy(net.lift_splat)

    def renew() -> Tensor:
        renewed.clear_geometry()
        return renewed(depth, features, *cameras)

    kept.set_geometry(*cameras)
    rank = custom_ops.voxel_rank(kept.points(*cameras), kept.origin, kept.voxel_size, kept.grid_size)
    contenders: dict[str, Callable[[], Tensor]] = {
        "LiftSplat, the same cameras again": lambda: kept(depth, features, *cameras),
        "LiftSplat, new cameras": renew,
        "Lift-Splat-Shoot's cumulative sum": lambda: lss_bev_pool(depth, features, rank, GRID * GRID),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats + 2):
        for name, run in contenders.items():
            start = time.perf_counter()
            torch.autograd.grad(run().sum(), (depth, features))
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(times[2:]) for name, times in seconds.items()}


def example(options: Options, steps: int = STEPS) -> Report:
    steps = 4 if options.quick else steps
    training, test = Scenes.draw(16 if options.quick else TRAINING, 0), Scenes.draw(8 if options.quick else TEST, 1)
    torch.manual_seed(0)
    start = LiftSplatNet()
    untrained = predict(start, test)

    compiled = copy.deepcopy(start)
    compiled.compile(fullgraph=True, backend="aot_eager" if options.quick else "inductor")
    dynamic = ({0: torch.export.Dim("batch", min=2)},) * 3
    program = torch.export.export(copy.deepcopy(start), training[:BATCH].inputs, dynamic_shapes=dynamic)
    variants = [
        Variant("eager", start, steps),
        Variant("compiled", compiled, steps),
        Variant("exported", program.module(), steps),
    ]
    eager, *others = variants
    generator = torch.Generator().manual_seed(0)
    with options.progress() as progress:
        task = progress.add_task("Lift-Splat", total=steps, note="")
        for _ in range(steps):
            which = torch.randperm(len(training.images), generator=generator)[:BATCH]
            for v in variants:
                v.step(training[which])
            progress.update(task, advance=1, note=f"loss {eager.losses[-1]:.4f}")

    predictions = [predict(v.model, test) for v in variants]
    pooling = time_pooling(start, test[:BATCH], 3 if options.quick else 20)
    baseline = frequencies(training, test).expand(test.occupied.shape)
    scores = [iou(prediction, test.occupied) for prediction in predictions]

    result = Report("Lift-Splat: synthetic scenes", ("", "loss, last 20 steps", "IoU, unseen scenes", "ms"))
    result.rows = [
        *(
            (f"trained, {v.name}", f"{v.last_loss:.4f}", f"{s:.2f}", f"{v.milliseconds:.0f} a step")
            for v, s in zip(variants, scores)
        ),
        ("untrained", "", f"{iou(untrained, test.occupied):.2f}", ""),
        ("how often each cell is occupied", "", f"{iou(baseline, test.occupied):.2f}", ""),
        *((name, "", "", f"{milliseconds:.1f} a batch") for name, milliseconds in pooling.items()),
    ]
    for v in others:
        gap = np.abs(np.subtract(v.losses, eager.losses))
        result.checks += [
            Check(
                f"loss {v.name} against eager, largest gap of {EARLY} steps", float(gap[:EARLY].max()), TOLERANCE_EARLY
            ),
            Check("the same in the mean of the last 20 steps", abs(v.last_loss - eager.last_loss), TOLERANCE),
        ]
    if not options.quick:
        gain = min(scores) / iou(baseline, test.occupied)
        result.checks.append(Check("IoU over that of the baseline, the worst of the three", gain, 2.0, at_least=True))
    result.pictures = [
        draw_views(test, predictions[0], options.out),
        draw_training(variants, pooling, options.out),
    ]
    return result


def short(options: Options) -> Report:
    """For the demo: the same, trained for less long."""
    return example(options, SHORT)


def draw_views(scenes: Scenes, predicted: Tensor, out: Path) -> Path:
    """What the cameras of three scenes see, the truth, the prediction."""
    figure = report.new_figure(3, 3, width=4.6, height=3.7)
    figure.suptitle("Lift-Splat: synthetic scenes that the network hasn't seen", fontsize=14)
    half = GRID * CELL / 2
    for s, (cameras, truth, prediction) in enumerate(np.reshape(np.asarray(figure.axes), (3, 3))):
        front, left, back, right = scenes.images[s, :, :3].movedim(1, -1)
        cameras.imshow(torch.cat((torch.cat((front, back)), torch.cat((left, right))), 1))
        cameras.set(title="Cameras" if s == 0 else "", xticks=[], yticks=[])
        for n, side in enumerate(("front", "back", "left", "right")):
            cameras.text(n // 2 * IMAGE[1] + 2, n % 2 * IMAGE[0] + 9, side, color="white")
        score = f"IoU {iou(predicted[s], scenes.occupied[s]):.2f}"
        for axis, title, cells in (
            (truth, "Truth" if s == 0 else "", scenes.occupied[s].float()),
            (prediction, f"Prediction\n{score}" if s == 0 else score, predicted[s]),
        ):
            extent = (-half, half, -half, half)
            image = axis.imshow(cells.flip(1), origin="lower", extent=extent, cmap="Blues", vmin=0, vmax=1)
            axis.plot(0, 0, "r^", markersize=6)
            axis.set(title=title, xlabel="to the right, m" if s == 2 else "", ylabel="to the front, m")
    figure.colorbar(image, ax=figure.axes, label="probability that the cell is within a box", shrink=0.6)
    path = out / "lift_splat_views.png"
    figure.savefig(path)
    return path


def draw_training(variants: Sequence[Variant], pooling: dict[str, float], out: Path) -> Path:
    figure = report.new_figure(3, width=4.8, title="Lift-Splat: one network, run in three ways")
    curves, gaps, times = figure.axes
    eager, compiled, exported = variants
    for v, style, width, colour in (
        (eager, "-", 5, NEUTRAL), (exported, "-", 2, THEIRS), (compiled, "--", 1.2, OURS),
    ):  # fmt: skip
        curves.plot(v.losses, style, color=colour, linewidth=width, label=v.name)
    curves.set(xlabel="step", ylabel="loss", title="Training loss")
    curves.legend(frameon=False)
    for v, colour in ((exported, THEIRS), (compiled, OURS)):
        gaps.semilogy(np.maximum(np.abs(np.subtract(v.losses, eager.losses)), 1e-9), color=colour, label=v.name)
    gaps.set(xlabel="step", ylabel="|loss - loss in eager|", title="How far from eager? (1e-9: not at all)")
    gaps.legend(frameon=False)
    bars = times.barh(range(len(pooling)), list(pooling.values()), 0.6, color=[OURS, OURS, THEIRS])
    times.bar_label(bars, fmt="%.1f", padding=2)
    times.set_yticks(range(len(pooling)), [name.replace(", ", ",\n").replace("'s ", "'s\n") for name in pooling])
    times.invert_yaxis()
    times.margins(x=0.12)  # room for the numbers
    times.set(xlabel="ms (median)", title="Pooling a batch, with backward")
    path = out / "lift_splat_training.png"
    figure.savefig(path)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    return report.run([example], "python -m custom_ops.examples.lift_splat", "Lift-Splat on synthetic scenes.", argv)


if __name__ == "__main__":
    raise SystemExit(main())
