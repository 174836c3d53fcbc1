"""A spiking network that reads handwritten digits, trained through `surrogate_gradient`.

Each neuron adds up its inputs, loses a share of its potential at each step, and, above its threshold, fires a spike and
is reset. The network sees the same picture for a number of time steps. A spike is a step function: its derivative is 0
wherever it exists, so no gradient passes through it. With a surrogate, forward keeps the step and backward uses the
slope of a smooth function.

For comparison the same network is trained with the step's true derivative, so only the readout learns and the spiking
layers stay at their random start. At each step the same weights and pictures are also given to the surrogate written in
plain PyTorch. It gives the same spikes, hence the same loss to the last bit, and the same gradients up to rounding.

The data are the digits that come with scikit-learn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import custom_ops
from custom_ops.shaping.specs.surrogate import surrogate_gradient_reference
from examples import report
from examples.agreement import Agreement
from examples.report import NEUTRAL, OURS, THEIRS, Check, Options, Part, Report

LAYERS = (64, 32, 32, 32)
TIMES = 8  # time steps per picture
LEAK = 0.8  # the share of a potential that remains after a time step
THRESHOLD = 1.0
WIDTH = 0.5  # width of the surrogate, in units of the potential
STEPS, BATCH = 400, 128

# The approximate number of terms in a gradient: sums over the pictures, the time steps and the layers.
CHAIN = BATCH + TIMES * sum(LAYERS)

Spike = Callable[[Tensor], Tensor]


def step(x: Tensor) -> Tensor:
    """Return a spike with its true derivative, 0."""
    return (x >= 0).to(x.dtype)


class SpikingNetwork(nn.Module):
    """A network from pictures [B, 64] through three spiking layers to logits, and each layer's spikes per neuron and
    step.
    """

    def __init__(self, spike: Spike) -> None:
        super().__init__()
        self.spike = spike
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(LAYERS))
        self.readout = nn.Linear(LAYERS[-1], 10)
        for layer in self.layers:
            # hardly any neuron fires at first with the default
            nn.init.normal_(layer.weight, std=1.5 / layer.in_features**0.5)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        potentials = [pictures.new_zeros(len(pictures), n) for n in LAYERS[1:]]
        counts = [torch.zeros_like(p) for p in potentials]
        for _ in range(TIMES):
            signal = pictures
            for i, layer in enumerate(self.layers):
                potential = LEAK * potentials[i] + layer(signal)
                signal = self.spike(potential - THRESHOLD)
                potentials[i] = potential - signal * THRESHOLD
                counts[i] = counts[i] + signal
        return self.readout(counts[-1] / TIMES), torch.stack([c.detach().mean() / TIMES for c in counts])


@dataclass
class Variant:
    name: str
    model: SpikingNetwork
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=5e-3)

    def step(self, pictures: Tensor, digits: Tensor) -> None:
        self.optimiser.zero_grad()
        loss = F.cross_entropy(self.model(pictures)[0], digits)
        loss.backward()
        self.optimiser.step()
        self.losses.append(loss.item())

    def with_spike(self, spike: Spike, pictures: Tensor, digits: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the loss of the current weights and its gradients if ``spike`` replaces the network's own."""
        own, self.model.spike = self.model.spike, spike
        loss = F.cross_entropy(self.model(pictures)[0], digits)
        self.model.spike = own
        return loss, list(torch.autograd.grad(loss, list(self.model.parameters())))

    @torch.no_grad()
    def test(self, pictures: Tensor, digits: Tensor) -> None:
        right = self.model(pictures)[0].argmax(1) == digits
        self.accuracies.append(float(right.double().mean()))


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the pictures and digits of the training set, then those of the test set, which is every fourth."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pictures, digits = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    test = torch.arange(len(digits)) % 4 == 0
    return pictures[~test], digits[~test], pictures[test], digits[test]


def gradient_sizes(model: SpikingNetwork, pictures: Tensor, digits: Tensor) -> list[float]:
    """Return the norm of the gradient of each layer's weights, the readout's last."""
    weights = [layer.weight for layer in (*model.layers, model.readout)]
    loss = F.cross_entropy(model(pictures)[0], digits)
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return [0.0 if g is None else float(g.norm()) for g in found]


def example(options: Options) -> Report:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one thread is faster on such small tensors
    try:
        return _example(options)
    finally:
        torch.set_num_threads(threads)


def _example(options: Options) -> Report:
    pictures, digits, test_pictures, test_digits = load()
    steps = 8 if options.quick else STEPS
    torch.manual_seed(options.seed)
    start = SpikingNetwork(step)

    def variant(name: str, spike: Spike) -> Variant:
        model = copy.deepcopy(start)
        model.spike = spike
        return Variant(name, model)

    ours = variant("custom_ops", partial(custom_ops.surrogate_gradient, shape="atan", width=WIDTH))
    plain_spike = partial(surrogate_gradient_reference, shape="atan", width=WIDTH)
    without = variant("no surrogate", step)
    sizes = {v.name: gradient_sizes(v.model, pictures, digits) for v in (ours, without)}

    agreement = Agreement("loss and gradients beside plain PyTorch's surrogate, at each step")
    generator = torch.Generator().manual_seed(options.seed)
    with options.progress() as progress:
        task = progress.add_task("Reading digits", total=steps, note="")
        for i in range(steps):
            batch = torch.randint(len(digits), (BATCH,), generator=generator)
            expected = ours.with_spike(plain_spike, pictures[batch], digits[batch])
            for v in (ours, without):
                v.step(pictures[batch], digits[batch])
            found = torch.tensor(ours.losses[-1]), [p.grad for p in ours.model.parameters()]
            agreement.compare_networks(found, expected, CHAIN)
            if i % 20 == 19 or i == steps - 1:
                for v in (ours, without):
                    v.test(test_pictures, test_digits)
            progress.update(task, advance=1, note=f"loss {ours.losses[-1]:.3f}")

    with torch.no_grad():
        rates = {v.name: v.model(test_pictures)[1].tolist() for v in (ours, without)}
    result = Report("Spiking network: scikit-learn's digits", ("", "surrogate", "true derivative", "remark"))
    result.rows = [
        ("loss, first step", f"{ours.losses[0]:.3f}", f"{without.losses[0]:.3f}", f"{BATCH} pictures a step"),
        ("loss, last step", f"{ours.losses[-1]:.3f}", f"{without.losses[-1]:.3f}", f"{steps} steps"),
        ("accuracy, test part", f"{ours.accuracies[-1]:.3f}", f"{without.accuracies[-1]:.3f}", "10 digits"),
        *(
            (f"spikes, layer {i + 1}", f"{a:.2f}", f"{b:.2f}", "per neuron and time step")
            for i, (a, b) in enumerate(zip(*rates.values()))
        ),
    ]
    result.checks = [
        agreement.check(),
        Check("gradient in the spiking layers, true derivative", max(sizes[without.name][:-1]), 0.0),
        Check("gradient in the spiking layers, surrogate", min(sizes[ours.name][:-1]), 1e-4, at_least=True),
    ]
    if not options.quick:
        result.checks += [
            Check("accuracy with the surrogate", ours.accuracies[-1], 0.95, at_least=True),
            Check("gain in accuracy", ours.accuracies[-1] - without.accuracies[-1], 0.1, at_least=True),
        ]
    result.pictures.append(draw(ours, without, sizes, steps, options.out / "spiking.png"))
    return result


def draw(ours: Variant, without: Variant, sizes: dict[str, list[float]], steps: int, path: Path) -> Path:
    figure = report.new_figure(3, title="Spiking network on handwritten digits: with a surrogate gradient and without")
    slopes, bars, curves = figure.axes

    x = torch.linspace(-2, 2, 801, requires_grad=True)
    for shape, style in zip(("sigmoid", "atan", "triangle", "boxcar"), ("-", "--", "-.", ":")):
        y = custom_ops.surrogate_gradient(x, shape, WIDTH)
        (slope,) = torch.autograd.grad(y.sum(), x)
        slopes.plot(x.detach(), slope, style, label=shape)
    slopes.plot(x.detach(), y.detach(), color=NEUTRAL, label="the spike itself")
    slopes.set(xlabel="potential above the threshold", title=f"What backward sees (width {WIDTH})")
    slopes.legend(frameon=False)

    names = [f"layer {i + 1}" for i in range(len(LAYERS) - 1)] + ["readout"]
    places = torch.arange(len(names))
    for v, shift, colour in ((ours, -0.2, OURS), (without, 0.2, THEIRS)):
        drawn = bars.bar(places + shift, sizes[v.name], 0.4, color=colour, label=v.name)
        bars.bar_label(drawn, fmt="%.2g", padding=2)
    bars.set_xticks(places, names)
    bars.set(ylabel="norm of the gradient", title="Before training: what reaches each layer")
    bars.margins(y=0.12)  # leaves room for the numbers
    bars.legend(frameon=False)

    tested = [*range(20, steps + 1, 20)] if steps % 20 == 0 else [*range(20, steps, 20), steps]
    for v, colour in ((ours, OURS), (without, THEIRS)):
        curves.plot(tested, v.accuracies, color=colour, label=f"{v.name}: {v.accuracies[-1]:.3f}")
    curves.set(xlabel="step", ylabel="accuracy, test part", ylim=(0, 1), title="Training")
    curves.legend(frameon=False, loc="lower right")
    figure.savefig(path)
    return path


PARTS = {"spiking": Part(example)}


def main(argv: Sequence[str] | None = None) -> int:
    return report.run(PARTS, "python -m examples.spiking_digits", "A spiking network on digits.", argv)


if __name__ == "__main__":
    raise SystemExit(main())
