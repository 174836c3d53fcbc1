"""Lift-Splat on synthetic scenes: a network that maps camera images to a bird's-eye view of the surroundings.

The scenes are synthetic, and their geometry is exactly known: boxes of the size of cars on a flat chequered ground,
ray-cast into four calibrated cameras that look all around from a height of 2.4 m. The cameras' directions, heights and
focal lengths differ from scene to scene, so the network can't memorise them and has to use the calibration it is given.

A convolutional network gives each pixel of a feature map features and a distribution over depths,
`custom_ops.LiftSplat` sums them up on a grid of 0.75 m, and a second network predicts from the grid whether a cell lies
within a box. Only that grid supervises the network; it is never shown a depth.

It is trained in eager mode. Along the way its loss and gradients are compared with those under `torch.compile` and
those of the program from `torch.export`, with the same weights and scenes. The baseline ignores the images and predicts
each cell from how often it is occupied in the training scenes.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import custom_ops
from examples import report
from examples.agreement import Agreement
from examples.report import NEUTRAL, OURS, THEIRS, Check, Options, Part, Report

if TYPE_CHECKING:
    pass

IMAGE = (48, 128)  # pixels
STRIDE = 4  # pixels of an image per pixel of the feature map
CAMERAS, HEIGHT = 4, 2.4  # metres above the ground
GRID, CELL = 48, 0.75  # cells per side, metres
BOXES = 8
DEPTHS = torch.linspace(2, 25, 24)  # metres
CHANNELS = 24
BATCH, STEPS, SHORT = 4, 400, 200
TRAINING, TEST = 256, 48  # scenes

# The comparisons are in float64. In float32 some activation is always so close to the kink of ReLU that a rounding
# moves it to the other side, and no bound on the rounding of sums covers that.
COMPARISONS = 10

# The approximate number of terms between a pixel and the loss: those of the convolutions, the cells and the mean.
CHAIN = 6 * 25 + 16 * 9 + 32 * 25 + 32 * 9 + 32 + 500 + CHANNELS * 9 + 2 * 32 * 9 + 2 * GRID * GRID
LEAST_GAIN = 1.5  # over four seeds, the IoU was 3.3 to 3.8 times that of the baselines


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
    """Draw intrinsics [S, N, 3, 3] and poses [S, N, 4, 4] of cameras that look to all sides and a little down."""

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
    """Draw boxes [S, M, 10]: x, y, z of the bottom, length, width, height, heading, red, green, blue."""
    half = GRID * CELL / 2
    low = torch.tensor([0, 3, 0, 3.5, 1.7, 1.3, 0, 0.1, 0.1, 0.1])
    high = torch.tensor([2 * math.pi, half, 0, 5, 2.1, 2.2, 2 * math.pi, 1, 1, 1])
    boxes = low + torch.rand(count, BOXES, 10, generator=generator) * (high - low)
    angle, distance = boxes[..., 0].clone(), boxes[..., 1].clone()
    boxes[..., 0], boxes[..., 1] = distance * angle.cos(), distance * angle.sin()
    return boxes


def into_boxes(vectors: Tensor, boxes: Tensor) -> Tensor:
    """Rotate vectors [..., M, P, 3] into the axes of boxes [..., M, 10]."""
    cos, sin = boxes[..., 6, None].cos(), boxes[..., 6, None].sin()
    x, y, z = vectors.unbind(-1)
    return torch.stack((cos * x + sin * y, cos * y - sin * x, z.expand_as(cos * x)), -1)


def truth(boxes: Tensor) -> Tensor:
    """Return which cells [S, GRID, GRID] have their centre within a box."""
    axis = (torch.arange(GRID) + 0.5) * CELL - GRID * CELL / 2
    x, y = torch.meshgrid(axis, axis, indexing="ij")
    centres = torch.stack((x, y, torch.zeros_like(x)), -1).flatten(0, 1)
    within = into_boxes(centres - boxes[:, :, None, :3], boxes).abs() <= boxes[:, :, None, 3:6] / 2
    return within.all(-1).any(1).unflatten(-1, (GRID, GRID))


def render(boxes: Tensor, intrinsics: Tensor, camera_to_ego: Tensor) -> Tensor:
    """Render one scene's images [N, 6, height, width] by casting a ray through the centre of each pixel."""
    v, u = torch.meshgrid(torch.arange(IMAGE[0]), torch.arange(IMAGE[1]), indexing="ij")
    pixels = torch.stack((u, v, torch.ones_like(u)), -1).flatten(0, 1).float()
    rays = pixels @ (camera_to_ego[:, :3, :3] @ intrinsics.inverse()).mT  # [N, P, 3]
    eyes = camera_to_ego[:, None, :3, 3]
    sky = torch.tensor([0.6, 0.75, 0.95])

    ground = torch.where(rays[..., 2] < 0, -eyes[..., 2] / rays[..., 2], torch.inf)
    tile = ((eyes + ground.clamp(max=1e3)[..., None] * rays)[..., :2] / 2).floor().sum(-1) % 2
    stone = (0.42 + 0.08 * tile)[..., None]
    colour = stone + (ground / 60).clamp(max=1)[..., None] * (sky - stone)  # the ground gets hazier with the distance

    # A ray lies within a box after it has entered all three pairs of planes and before it leaves the first.
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
    """A network from images to the grid: images -> features and depths of each pixel -> grid -> logit of each cell."""

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
        nn.init.constant_(last.get_parameter("bias"), -2.5)  # starts from a low probability, as few cells are occupied
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


def loss_of(logit: Tensor, occupied: Tensor) -> Tensor:
    # Few cells are occupied; without the weight the network takes long to predict the first one.
    return F.binary_cross_entropy_with_logits(logit, occupied.to(logit.dtype), pos_weight=torch.tensor(3.0))


def predict(model: nn.Module, scenes: Scenes) -> Tensor:
    with torch.no_grad():
        batches = [scenes[first : first + BATCH] for first in range(0, len(scenes.images), BATCH)]
        return torch.cat([model(*batch.inputs) for batch in batches]).sigmoid()


def iou(predicted: Tensor, occupied: Tensor) -> float:
    predicted = predicted > 0.5
    return float((predicted & occupied).sum() / (predicted | occupied).sum())


def frequencies(training: Scenes, test: Scenes) -> Tensor:
    """Return the baseline [GRID, GRID]: 1 for the most often occupied cells, as many as maximise the IoU on the
    test.
    """
    often = training.occupied.float().mean(0)
    candidates = [(often >= threshold).float() for threshold in often.unique()]
    return max(candidates, key=lambda prediction: iou(prediction.expand(test.occupied.shape), test.occupied))


class Twins:
    """Copies of the network in float64, run in up to three ways with the weights of the training in float32."""

    def __init__(self, net: LiftSplatNet, scenes: Scenes, options: Options) -> None:
        eager = copy.deepcopy(net).double()
        dynamic = ({0: torch.export.Dim("batch", min=2)},) * 3
        exported = torch.export.export(copy.deepcopy(eager), self.inputs(scenes), dynamic_shapes=dynamic).module()
        self.networks: dict[str, nn.Module] = {"eager": eager, "exported": exported}
        if options.compiled:
            compiled = copy.deepcopy(eager)
            compiled.compile(fullgraph=True, backend="aot_eager" if options.quick else "inductor")
            self.networks["compiled"] = compiled

    @staticmethod
    def inputs(scenes: Scenes) -> tuple[Tensor, ...]:
        return tuple(t.double() for t in scenes.inputs)

    def compare(self, net: LiftSplatNet, scenes: Scenes, into: dict[str, Agreement]) -> dict[str, float]:
        """Compare each copy with the eager one, and return how far its loss is from the eager loss, relative to
        that.
        """
        results = {}
        for name, twin in self.networks.items():
            for mine, theirs in zip(twin.parameters(), net.parameters()):
                mine.data.copy_(theirs.detach())
            loss = loss_of(twin(*self.inputs(scenes)), scenes.occupied)
            results[name] = loss.detach(), torch.autograd.grad(loss, list(twin.parameters()))
        eager = results.pop("eager")
        for name, result in results.items():
            into[name].compare_networks(result, eager, CHAIN)
        return {name: abs(float(loss / eager[0] - 1)) for name, (loss, _) in results.items()}


def example(options: Options, steps: int = STEPS) -> Report:
    steps = 4 if options.quick else steps
    training = Scenes.draw(16 if options.quick else TRAINING, 2 * options.seed)
    test = Scenes.draw(8 if options.quick else TEST, 2 * options.seed + 1)
    torch.manual_seed(options.seed)
    net = LiftSplatNet()
    untrained = predict(net, test)
    optimiser = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, steps, pct_start=0.2)
    generator = torch.Generator().manual_seed(options.seed)
    losses: list[float] = []
    seconds: list[float] = []
    gaps: dict[str, dict[int, float]] = {}
    with options.progress() as progress:
        task = progress.add_task("Lift-Splat", total=steps, note="exporting and compiling")
        twins = Twins(net, training[:2], options)
        agreements = {
            name: Agreement(f"loss and gradients {name} beside eager, in float64, at {min(steps, COMPARISONS)} steps")
            for name in twins.networks
            if name != "eager"
        }
        for step in range(steps):
            batch = training[torch.randperm(len(training.images), generator=generator)[:BATCH]]
            if step % max(1, steps // COMPARISONS) == 0:
                for name, gap in twins.compare(net, batch[:2], agreements).items():
                    gaps.setdefault(name, {})[step] = gap
            start = time.perf_counter()
            optimiser.zero_grad()
            loss = loss_of(net(*batch.inputs), batch.occupied)
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
            progress.update(task, advance=1, note=f"loss {losses[-1]:.4f}")

    prediction = predict(net, test)
    scores = {
        "untrained": iou(untrained, test.occupied),
        "how often each\ncell is occupied": iou(frequencies(training, test).expand(prediction.shape), test.occupied),
        "trained": iou(prediction, test.occupied),
    }
    result = Report("Lift-Splat: synthetic scenes", ("", "IoU, unseen scenes", "remark"))
    remark = f"{steps} steps of {1e3 * statistics.median(seconds[1:]):.0f} ms, last loss {losses[-1]:.4f}"
    for name, score in scores.items():
        result.rows.append((name.replace("\n", " "), f"{score:.2f}", remark if name == "trained" else ""))
    result.checks += [agreement.check() for agreement in agreements.values()]
    if not options.quick:
        untrained_score, baseline, trained = scores.values()
        gain = trained / max(untrained_score, baseline)
        result.checks.append(Check("IoU over that of the baselines", gain, LEAST_GAIN, at_least=True))
    result.pictures = [
        draw_views(test, prediction, options.out),
        draw_training(losses, gaps, scores, options.out),
    ]
    return result


def short(options: Options) -> Report:
    """Run a shorter training for the demo."""
    return example(options, SHORT)


def draw_views(scenes: Scenes, predicted: Tensor, out: Path) -> Path:
    """Draw what the cameras of three scenes see, the truth, and the prediction."""
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


def draw_training(
    losses: Sequence[float], gaps: dict[str, dict[int, float]], scores: dict[str, float], out: Path
) -> Path:
    figure = report.new_figure(3, width=4.8, title="Lift-Splat: trained in eager mode, compared in three")
    curve, gap_axis, bars = figure.axes
    curve.plot(losses, color=OURS)
    curve.set(xlabel="step", ylabel="loss", title="Training loss")
    for (name, values), marker, colour in zip(gaps.items(), "ox", (THEIRS, OURS)):
        shown = np.maximum(list(values.values()), 1e-17)
        gap_axis.semilogy(list(values), shown, marker, color=colour, label=name)
    gap_axis.set(
        xlabel="step", ylabel="|loss / loss in eager - 1|", title="Same weights, in float64: how far from eager?"
    )
    gap_axis.legend(frameon=False)
    drawn = bars.bar(list(scores), list(scores.values()), 0.6, color=[NEUTRAL, NEUTRAL, OURS])
    bars.bar_label(drawn, fmt="%.2f", padding=2)
    bars.margins(y=0.12)  # leaves room for the numbers
    bars.set(ylabel="IoU", title="Scenes that it hasn't seen")
    path = out / "lift_splat_training.png"
    figure.savefig(path)
    return path


PARTS = {"cameras": Part(example)}


def main(argv: Sequence[str] | None = None) -> int:
    return report.run(PARTS, "python -m examples.lift_splat", "Lift-Splat on synthetic scenes.", argv)


if __name__ == "__main__":
    raise SystemExit(main())
