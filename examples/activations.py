"""The memory that one-bit activations save in a training step of a network like MobileNetV2, in eager mode.

torch's ReLU6 keeps its input for backward, besides the input that the batch normalisation before it keeps. Ours keeps
one bit per element. Values and gradients are the same, bit by bit.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import custom_ops
from benchmarks.memory import peak_bytes
from benchmarks.networks import NETWORKS
from examples import report
from examples.agreement import Agreement
from examples.report import OURS, THEIRS, Check, Gain, Options, Part, Report, milliseconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NETWORK = "MobileNetV2-shaped, ReLU6"
BATCH, SIZE = 16, 128  # pictures in a batch, and pixels per side
CHAIN = 6000  # approximate number of terms in the sums between a pixel and the loss, and back


def training_step(model: nn.Module, pictures: Tensor, classes: Tensor) -> tuple[Tensor, list[Tensor]]:
    loss = F.cross_entropy(model(pictures), classes)
    return loss, list(torch.autograd.grad(loss, list(model.parameters())))


def example(options: Options) -> Report:
    batch, size = (2, 32) if options.quick else (BATCH, SIZE)
    generator = torch.Generator().manual_seed(options.seed)
    pictures = torch.randn(batch, 3, size, size, generator=generator)
    classes = torch.randint(10, (batch,), generator=generator)
    torch.manual_seed(options.seed)
    theirs = NETWORKS[NETWORK]().train()
    ours = copy.deepcopy(theirs)
    custom_ops.convert_activations(ours)
    models = {"custom_ops": ours, "torch": theirs}
    runs = {who: partial(training_step, model, pictures, classes) for who, model in models.items()}
    agreement = Agreement("loss and gradients with one-bit activations beside torch's")
    with options.progress() as progress:
        task = progress.add_task("One-bit activations", total=3, note="agreement")
        agreement.compare_networks(*(run() for run in runs.values()), CHAIN)
        progress.update(task, advance=1, note="time")
        times = milliseconds(runs, 1 if options.quick else 2)
        progress.update(task, advance=1, note="memory")
        memory = {who: peak_bytes(run, pictures.device) / 2**20 for who, run in runs.items()}
        progress.update(task, advance=1)
    result = Report("Activations: one bit per element", (f"{NETWORK}, eager", *models))
    result.gains = [Gain("a training step", "MiB", *memory.values(), f"{NETWORK}, eager, beside torch's activations")]
    for unit, values in (("MiB", memory), ("ms", times)):
        result.rows.append(("a training step", *(report.shown(value, unit) for value in values.values())))
    result.checks.append(agreement.check())
    if not options.quick:
        share = memory["custom_ops"] / memory["torch"]
        result.checks.append(Check("peak memory of a step, share of torch's", share, 0.8))
    result.panels.append(partial(draw, memory=memory))
    return result


def draw(axis: Axes, memory: dict[str, float]) -> None:
    names = list(memory)
    bars = axis.bar(names, list(memory.values()), 0.5, color=[OURS, THEIRS])
    axis.bar_label(bars, [report.shown(mib, "MiB") for mib in memory.values()], padding=2)
    axis.margins(y=0.12)  # leaves room for the numbers
    axis.set(ylabel="MiB of tensors at once", title=f"One-bit activations: memory of a step\n({NETWORK}, eager)")


PARTS = {"activations": Part(example)}


def main(argv: Sequence[str] | None = None) -> int:
    return report.run(PARTS, "python -m examples.activations", "One-bit activations.", argv, "Activations")


if __name__ == "__main__":
    raise SystemExit(main())
