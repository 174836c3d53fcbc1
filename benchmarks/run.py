"""``python -m custom_ops bench``: every registered op beside its peers, on answers checked first."""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from custom_ops.benchmarks import overhead
from custom_ops.benchmarks.timing import interleave, machine, median, spread
from custom_ops.registry import REGISTRY, Benchmark, OpInfo, leaves

# With these the C library keeps what is freed, so that outputs land on memory already mapped.
WARM = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "200000000000"}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m custom_ops bench", description=__doc__)
    parser.add_argument("--op", action="append", choices=sorted(REGISTRY), help="only this op (may be repeated)")
    parser.add_argument("--quick", action="store_true", help="under 3 minutes: fewer rounds")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--memory", choices=("fresh", "warm"), default="fresh", help="new pages or reused ones (CPU)")
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: there is no CUDA device")
    if options.memory == "warm" and any(os.environ.get(k) != v for k, v in WARM.items()):
        return subprocess.call([sys.executable, "-m", "custom_ops", "bench", *argv], env=os.environ | WARM)

    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=120)
    device, seconds = torch.device(options.device), 1.5 if options.quick else 8.0
    where = f"{options.device}, {torch.get_num_threads()} threads" + (
        f", {options.memory} memory" if options.device == "cpu" else ""
    )
    results: dict[str, Any] = {
        "command": f"python -m custom_ops bench {' '.join(argv)}",
        "machine": machine(),
        "memory": options.memory,
        "device": options.device,
    }
    results["overhead"] = overhead.measure(seconds / 2, device)
    _print_overhead(console, results["overhead"])
    results["ops"] = {}
    for info in REGISTRY.values():
        if options.op and info.name not in options.op:
            continue
        for benchmark in info.benchmarks:
            rows: list[dict[str, Any]] = []
            for size in benchmark.sizes:
                rows += _measure(info, benchmark, size, device, options.memory, seconds)
            results["ops"].setdefault(info.name, []).extend(rows)
            _print_rows(console, f"{info.name}, by {benchmark.unit} ({where})", rows)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _measure(
    info: OpInfo, benchmark: Benchmark, size: Any, device: torch.device, memory: str, seconds: float
) -> list[dict[str, Any]]:
    args = benchmark.make(size, device)
    function = functools.partial(info.function, **benchmark.kwargs)
    contenders = {"custom_ops": function} | _installed(benchmark.peers)
    inputs = leaves(args)
    grad = torch.randn_like(_first(function(*args)))
    _refuse_wrong_answer(info, benchmark, args, grad)

    def forward(fn: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: fn(*args)

    def pair(fn: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(_first(fn(*args)), inputs, grad)

    rows = []
    for direction, wrap in (("forward", forward), ("forward+backward", pair)):
        times = interleave({name: wrap(fn) for name, fn in contenders.items()}, seconds)
        ours = median(times["custom_ops"])
        for name, values in times.items():
            row: dict[str, Any] = {
                "size": size,
                "direction": direction,
                "contender": name,
                "milliseconds": median(values) * 1e3,
                "spread": spread(values),
                "ours_over_this": ours / median(values),
            }
            for target in benchmark.targets:
                if (target.size, target.peer, target.direction, target.memory) == (size, name, direction, memory):
                    row["target"] = target.ratio
            rows.append(row)
    return rows


def _refuse_wrong_answer(info: OpInfo, benchmark: Benchmark, args: tuple[Any, ...], grad: Tensor) -> None:
    inputs = leaves(args)
    exact = tuple(_double(a) for a in args)
    ours = _first(info.function(*args, **benchmark.kwargs))
    truth = _first(info.reference(*exact, **benchmark.kwargs))
    pairs = [(ours, truth)]
    pairs += zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(truth, leaves(exact), grad.double()))
    for got, expected in pairs:
        try:
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
        except AssertionError as error:
            raise SystemExit(f"{info.name}: not timed, its answer is wrong: {error}") from None


def _double(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _installed(peers: dict[str, Callable[..., Any] | str]) -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {}
    for name, peer in peers.items():
        if isinstance(peer, str):
            module, _, attribute = peer.partition(":")
            try:
                peer = getattr(importlib.import_module(module), attribute)
            except ImportError as error:
                print(f"{name}: not installed ({error})")
                continue
        found[name] = peer
    return found


def _print_overhead(console: Any, results: dict[str, dict[str, float]]) -> None:
    from rich.table import Table

    table = Table(title="one call on 16 elements", title_justify="left")
    for column in ("", "contender", "µs", "ours / this", "target"):
        table.add_column(column, justify="left" if column in ("", "contender") else "right")
    for direction, times in results.items():
        for name, microseconds in times.items():
            ratio = times["custom_ops.library"] / microseconds
            target = _verdict(ratio, overhead.TARGETS[direction]) if name == overhead.PEER else ""
            table.add_row(direction, name, f"{microseconds:.1f}", f"{ratio:.2f}", target)
    console.print(table)


def _print_rows(console: Any, title: str, rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in ("size", "", "contender", "ms", "± IQR", "ours / this", "target"):
        table.add_column(column, justify="left" if column in ("", "contender") else "right")
    for row in rows:
        target = _verdict(row["ours_over_this"], row["target"]) if "target" in row else ""
        table.add_row(
            _label(row["size"]), row["direction"], row["contender"], f"{row['milliseconds']:.3g}",
            f"{row['spread']:.0%}", f"{row['ours_over_this']:.3f}", target,
        )  # fmt: skip
    console.print(table)


def _label(size: Any) -> str:
    return f"{size:,}" if isinstance(size, int) else " × ".join(map(str, size))


def _verdict(ratio: float, target: float) -> str:
    return f"≤ {target:.3g} {'met' if ratio <= target else 'MISSED'}"
