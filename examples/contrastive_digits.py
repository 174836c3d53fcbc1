"""An encoder that learns which two views belong to the same picture, trained by contrastive losses.

Each picture of a batch is shifted, dimmed and made noisy twice. The encoder has to find a view's twin among the views
of all pictures, with `info_nce_loss` (which of them is it?) or with `sigmoid_contrastive_loss` (is this one it?). A
picture that was drawn twice isn't a negative of itself: its group says so. The temperature and the bias are learnt.

The test asks for the twin among all pictures of the test part. The baseline is the cosine of the pixels. At each step
the same weights and views are also given to the losses written in plain PyTorch, with the matrix of similarities in
memory.

The data are the digits that come with scikit-learn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import custom_ops
from custom_ops.ranking.specs.contrastive import info_nce_loss_reference, sigmoid_contrastive_loss_reference
from examples import report
from examples.agreement import Agreement
from examples.report import NEUTRAL, OURS, THEIRS, Check, Options, Part, Report
from examples.spiking_digits import load

STEPS, BATCH, SIDE = 300, 256, 8
TOP = 5

# The approximate number of terms in a gradient: sums over the views and the encoder's layers.
CHAIN = BATCH * 2 + 64 + 256 + 256


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(SIDE * SIDE, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 32)
        )
        self.log_scale, self.bias = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.tensor(-20.0))

    def forward(self, views: Tensor) -> Tensor:
        return F.normalize(self.layers(views.flatten(1)), dim=-1)


Loss = Callable[..., Tensor]


def info_nce(encoder: Encoder, function: Loss, *views: Tensor, **group: Tensor) -> Tensor:
    return function(*map(encoder, views), temperature=(-encoder.log_scale).exp(), **group)


def sigmoid(encoder: Encoder, function: Loss, *views: Tensor, **group: Tensor) -> Tensor:
    return function(*map(encoder, views), temperature=(-encoder.log_scale).exp(), bias=encoder.bias, **group)


@dataclass
class Variant:
    name: str
    loss: Callable[..., Tensor]
    ours: Loss
    theirs: Loss
    colour: str
    encoder: Encoder
    losses: list[float] = field(default_factory=list)
    recalls: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.Adam(self.encoder.parameters(), lr=3e-3)

    def gradients(self, function: Loss, views: Sequence[Tensor], pictures: Tensor) -> tuple[Tensor, list[Tensor]]:
        loss = self.loss(self.encoder, function, *views, query_group=pictures)
        found = torch.autograd.grad(loss, list(self.encoder.parameters()), allow_unused=True, materialize_grads=True)
        return loss, list(found)

    def step(self, views: Sequence[Tensor], pictures: Tensor, agreement: Agreement) -> None:
        loss, found = self.gradients(self.ours, views, pictures)
        agreement.compare_networks((loss, found), self.gradients(self.theirs, views, pictures), CHAIN)
        for parameter, gradient in zip(self.encoder.parameters(), found):
            parameter.grad = gradient
        self.optimiser.step()
        self.losses.append(loss.item())


def view(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Return the pictures, each shifted by up to a pixel, with another brightness and noise."""
    n, size = len(pictures), (SIDE, SIDE)
    padded = F.pad(pictures.view(n, *size), (1, 1, 1, 1))
    down, right = torch.randint(0, 3, (2, n, 1), generator=generator) + torch.arange(SIDE)
    shifted = padded[torch.arange(n).view(-1, 1, 1), down.unsqueeze(2), right.unsqueeze(1)]
    brightness = 0.7 + 0.6 * torch.rand(n, 1, 1, generator=generator)
    return shifted * brightness + 0.05 * torch.randn(n, *size, generator=generator)


@torch.no_grad()
def recall(encoder: Callable[[Tensor], Tensor], first: Tensor, second: Tensor, top: int = 1) -> float:
    """Return the share of the first views whose twin is among the ``top`` nearest of the second views."""
    similarities = encoder(first) @ encoder(second).T
    ahead = (similarities > similarities.diagonal().unsqueeze(1)).sum(1)
    return float((ahead < top).double().mean())


def pixels(views: Tensor) -> Tensor:
    return F.normalize(views.flatten(1), dim=-1)


def example(options: Options) -> Report:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one thread is faster on such small tensors
    try:
        return _example(options)
    finally:
        torch.set_num_threads(threads)


def _example(options: Options) -> Report:
    pictures, _, tested, _ = load()
    steps = 4 if options.quick else STEPS
    variants = []
    for name, loss, ours, theirs, colour in (
        ("info_nce_loss", info_nce, custom_ops.info_nce_loss, info_nce_loss_reference, OURS),
        (
            "sigmoid_contrastive_loss",
            sigmoid,
            custom_ops.sigmoid_contrastive_loss,
            sigmoid_contrastive_loss_reference,
            THEIRS,
        ),
    ):
        torch.manual_seed(options.seed)
        variants.append(Variant(name, loss, ours, theirs, colour, Encoder()))
    generator = torch.Generator().manual_seed(options.seed)
    first, second = view(tested, generator), view(tested, generator)
    start = recall(variants[0].encoder, first, second)
    agreement = Agreement("losses and gradients beside those with all similarities in memory, at each step")
    with options.progress() as progress:
        task = progress.add_task("Comparing views", total=steps, note="")
        for i in range(steps):
            chosen = torch.randint(len(pictures), (BATCH,), generator=generator)
            views = [view(pictures[chosen], generator) for _ in range(2)]
            for v in variants:
                v.step(views, chosen, agreement)
                if i % 20 == 19 or i == steps - 1:
                    v.recalls.append(recall(v.encoder, first, second))
            progress.update(task, advance=1, note=f"loss {variants[0].losses[-1]:.3f}")

    of_pixels = recall(pixels, first, second)
    result = Report("Contrastive learning: scikit-learn's digits", ("", *(v.name for v in variants), "remark"))
    result.rows = [
        ("loss, first step", *(f"{v.losses[0]:.3f}" for v in variants), f"{BATCH} pictures a step, twice each"),
        ("loss, last step", *(f"{v.losses[-1]:.3f}" for v in variants), f"{steps} steps"),
        ("recall@1", *(f"{v.recalls[-1]:.3f}" for v in variants), f"{len(tested)} pictures; pixels {of_pixels:.3f}"),
        (
            f"recall@{TOP}",
            *(f"{recall(v.encoder, first, second, TOP):.3f}" for v in variants),
            f"pixels {recall(pixels, first, second, TOP):.3f}",
        ),
    ]
    result.checks = [agreement.check()]
    if not options.quick:
        least = max(of_pixels, start) + 0.3  # recall differs by about 0.03 between seeds
        result.checks += [Check(f"recall@1 with {v.name}", v.recalls[-1], least, at_least=True) for v in variants]
    result.pictures.append(draw(variants, of_pixels, steps, first, second, options.out / "contrastive.png"))
    return result


def draw(variants: Sequence[Variant], of_pixels: float, steps: int, first: Tensor, second: Tensor, path: Path) -> Path:
    figure = report.new_figure(2, title="Which two views belong to the same handwritten digit?")
    pairs, curves = figure.axes
    rows: list[Any] = [torch.cat([*some[:6]], dim=1) for some in (first, second)]
    pairs.imshow(torch.cat(rows), cmap="gray_r")
    pairs.set(xticks=[], yticks=[], title="Two views of each picture")
    at = [*range(20, steps + 1, 20)] if steps % 20 == 0 else [*range(20, steps, 20), steps]
    for v in variants:
        curves.plot(at, v.recalls, color=v.colour, label=f"{v.name}: {v.recalls[-1]:.3f}")
    curves.axhline(of_pixels, color=NEUTRAL, linestyle="--", label=f"pixels: {of_pixels:.3f}")
    curves.set(xlabel="step", ylabel="recall@1, test part", ylim=(0, 1), title="Training")
    curves.legend(frameon=False)
    figure.savefig(path)
    return path


PARTS = {"contrastive": Part(example)}


def main(argv: Sequence[str] | None = None) -> int:
    return report.run(PARTS, "python -m examples.contrastive_digits", "Contrastive losses on digits.", argv)


if __name__ == "__main__":
    raise SystemExit(main())
