"""The memory that one-bit activations save in whole networks, and their cost in a compiled chain.

``python -m benchmarks.networks [--quick] [--only PART ...] [--json FILE]`` measures the peak memory of a training step
of three networks, eager and compiled, with torch's activations out of place, with ours and with torch's in place. Then
it times a compiled ``linear -> bias -> activation -> residual``.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import custom_ops
from benchmarks.environment import machine
from benchmarks.memory import peak_bytes
from benchmarks.timing import Call, interleave, median

LEAST_SAVED = {"MobileNetV2-shaped, ReLU6": 0.2, "Darknet-shaped, LeakyReLU": 0.2}
# These options halve the compile time and make slower code, which doesn't matter where only memory is measured.
MEMORY_ONLY: dict[str, str | int | bool | Callable[..., Any]] = {"cpp.simdlen": 1, "aot_inductor.debug_compile": True}
CHAINED: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "squared_relu": lambda x: F.relu(x) ** 2,
    "relu_dropout": lambda x: F.dropout(F.relu(x)),
}


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    padding = kernel // 2
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


class _Residual(nn.Module):
    def __init__(self, body: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.body, self.after = body, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x + self.body(x))


def _mobilenet() -> nn.Module:
    """Return a stack of inverted residuals: widen by 6, depthwise convolution, narrow again."""
    layers: list[nn.Module] = [*_conv(3, 16, 3, 2), nn.ReLU6()]
    for inputs, outputs, stride in ((16, 24, 2), (24, 24, 1), (24, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)):
        wide = 6 * inputs
        body = nn.Sequential(
            *_conv(inputs, wide, 1), nn.ReLU6(),
            *_conv(wide, wide, 3, stride, wide), nn.ReLU6(),
            *_conv(wide, outputs, 1),
        )  # fmt: skip
        layers.append(_Residual(body, nn.Identity()) if inputs == outputs and stride == 1 else body)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def _darknet() -> nn.Module:
    layers: list[nn.Module] = [*_conv(3, 16, 3), nn.LeakyReLU(0.1)]
    for width in (16, 32, 64):
        layers += [*_conv(width, 2 * width, 3, 2), nn.LeakyReLU(0.1)]
        body = nn.Sequential(
            *_conv(2 * width, width, 1), nn.LeakyReLU(0.1), *_conv(width, 2 * width, 3), nn.LeakyReLU(0.1)
        )  # fmt: skip
        layers.append(_Residual(body, nn.Identity()))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def _resnet() -> nn.Module:
    layers: list[nn.Module] = [*_conv(3, 32, 3, 2), nn.ReLU()]
    for width in (32, 64):
        for _ in range(2):
            body = nn.Sequential(*_conv(width, width, 3), nn.ReLU(), *_conv(width, width, 3))
            layers.append(_Residual(body, nn.ReLU()))
        layers += [*_conv(width, 2 * width, 3, 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MobileNetV2-shaped, ReLU6": _mobilenet,
    "Darknet-shaped, LeakyReLU": _darknet,
    "ResNet-shaped, ReLU": _resnet,
}


def _part(network: str) -> str:
    return network.partition("-")[0].lower()


PARTS = [*map(_part, NETWORKS), "chains"]


def _variants(network: Callable[[], nn.Module]) -> dict[str, nn.Module]:
    """Return copies of one network, with the same weights, each with another kind of activation."""
    torch.manual_seed(0)
    theirs = network()
    ours, inplace = copy.deepcopy(theirs), copy.deepcopy(theirs)
    custom_ops.convert_activations(ours)
    for module in inplace.modules():
        if isinstance(module, (nn.ReLU, nn.ReLU6, nn.LeakyReLU)):
            module.inplace = True
    return {"torch": theirs, "custom_ops": ours, "torch, in place": inplace}


def step_memory(
    batch: int, size: int, device: torch.device, compiled: bool, networks: Sequence[str] = tuple(NETWORKS)
) -> list[dict[str, Any]]:
    """Return the peak memory and the loss of one training step of each network with each kind of activation."""
    rows = []
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).to(device)
    target = torch.arange(batch, device=device) % 10
    for name in networks:
        for variant, model in _variants(NETWORKS[name]).items():
            model = model.to(device).train()
            torch._dynamo.reset()  # Dynamo stops compiling after a number of models otherwise
            forward = torch.compile(model, options=MEMORY_ONLY) if compiled else model
            losses: list[float] = []

            def step(model: nn.Module = model, forward: Any = forward, losses: list[float] = losses) -> None:
                model.zero_grad(set_to_none=True)
                loss = F.cross_entropy(forward(x), target)
                loss.backward()
                losses.append(loss.item())

            peak = peak_bytes(step, device)
            mode = "compiled" if compiled else "eager"
            rows.append(
                {"network": name, "mode": mode, "activations": variant, "mebibytes": peak / 2**20, "loss": losses[-1]}
            )
    return rows


def chain_times(rows: int, columns: int, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """Return the milliseconds of the compiled chain, forward and backward, with our activation and with torch's."""
    inputs = [
        torch.randn(s, device=device, requires_grad=True)
        for s in ((rows, columns), (columns, columns), (columns,), (rows, columns))
    ]
    grad = torch.randn(rows, columns, device=device)
    results = []
    for name, theirs in CHAINED.items():
        torch._dynamo.reset()
        contenders = {}
        for library, activation in (("custom_ops", getattr(custom_ops, name)), ("torch", theirs)):

            def chain(x: Tensor, weight: Tensor, bias: Tensor, rest: Tensor, activation: Any = activation) -> Tensor:
                return activation(F.linear(x, weight) + bias) + rest

            run = torch.compile(chain, fullgraph=True)
            contenders[library] = Call(lambda _, run=run: torch.autograd.grad(run(*inputs), inputs, grad))
        measured = interleave(contenders, seconds, device, warm_ups=1)
        times = {library: median(values) * 1e3 for library, values in measured.items()}
        results.append({"activation": name, **times, "ours_over_torch": times["custom_ops"] / times["torch"]})
    return results


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller images, eager only, shorter timings")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts; all by default")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    batch, size = (4, 64) if options.quick else (16, 128)
    networks = [name for name in NETWORKS if _part(name) in options.only]
    modes = (False,) if options.quick else (False, True)
    steps = [row for compiled in modes for row in step_memory(batch, size, device, compiled, networks)]
    if steps:
        _print_steps(steps, batch, size)
    chains = []
    if "chains" in options.only:
        chains = chain_times(*((512, 512) if options.quick else (65536, 256)), device, 1.0 if options.quick else 3.0)
        _print_chains(chains)
    if options.json:
        command = f"python -m benchmarks.networks {' '.join(argv)}"
        inputs = {"device": options.device, "batch": batch, "size": size}
        results = {"command": command, "machine": machine(), **inputs, "steps": steps, "chains": chains}
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _print_steps(rows: list[dict[str, Any]], batch: int, size: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"peak memory of a training step, batch {batch}, {size} x {size}", title_justify="left")
    for column in ("network", "", "activations", "MiB", "against torch", "loss", "target"):
        table.add_column(column, justify="left" if column in ("network", "", "activations") else "right")
    for row in rows:
        baseline = next(
            r for r in rows if (r["network"], r["mode"], r["activations"]) == (row["network"], row["mode"], "torch")
        )
        change = row["mebibytes"] / baseline["mebibytes"] - 1
        least = LEAST_SAVED.get(row["network"])
        target = ""
        if least is not None and row["activations"] == "custom_ops":
            target = f"≤ {-least:.0%} {'met' if change <= -least else 'MISSED'}"
        table.add_row(
            row["network"], row["mode"], row["activations"], f"{row['mebibytes']:.1f}", f"{change:+.0%}",
            f"{row['loss']:.6f}", target,
        )  # fmt: skip
    Console().print(table)


def _print_chains(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="compiled linear → bias → activation → residual, forward + backward", title_justify="left")
    for column in ("activation", "custom_ops ms", "torch ms", "ours / torch", "target"):
        table.add_column(column, justify="left" if column == "activation" else "right")
    for row in rows:
        verdict = "met" if row["ours_over_torch"] <= 1 else "MISSED"
        times = f"{row['custom_ops']:.3g}", f"{row['torch']:.3g}", f"{row['ours_over_torch']:.2f}"
        table.add_row(row["activation"], *times, f"≤ 1 {verdict}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
