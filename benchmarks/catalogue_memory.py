"""``python -m benchmarks.catalogue_memory``: the peak memory of a loss over a catalogue, beside plain PyTorch.

It grows the number of words and the number of rows to where plain PyTorch's logits no longer fit in the machine. Plain
PyTorch isn't called where the logits and their gradient alone would take more than is free.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import custom_ops
from benchmarks.environment import machine
from benchmarks.memory import peak_bytes

RESULT = Path(__file__).parent / "results" / "memory" / "catalogue.json"
DIMS = 8
OF_WORDS = [(8192, 8192 * 4**k) for k in range(4)]
OF_ROWS = [(512 * 4**k, 131_072) for k in range(4)]
NAMES = ("plain PyTorch", "linear_cross_entropy", "linear_log_prob")


def plain(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(x @ weight.T, target)


def log_prob(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return custom_ops.linear_log_prob(x, weight, target).log_prob.mean()


def free_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def peak(function: Callable[..., Tensor], rows: int, words: int) -> int:
    x, weight = torch.randn(rows, DIMS, requires_grad=True), torch.randn(words, DIMS, requires_grad=True)
    target = torch.randint(words, (rows,))
    return peak_bytes(lambda: torch.autograd.grad(function(x, weight, target), (x, weight)), torch.device("cpu"))


def measured(sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Return the peak of each function at each (rows, words), or None where plain PyTorch doesn't fit."""
    found = []
    for rows, words in sizes:
        row: dict[str, Any] = {"rows": rows, "words": words}
        for name, function in zip(NAMES, (plain, custom_ops.linear_cross_entropy, log_prob)):
            fits = name != NAMES[0] or 2 * 4 * rows * words < 0.8 * free_bytes()
            row[name] = peak(function, rows, words) if fits else None
        print(row, flush=True)
        found.append(row)
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULT, help="write the results there (default: %(default)s)")
    parser.add_argument("--most", type=int, help="leave out sizes of more logits than this")
    options = parser.parse_args(argv)
    kept = [[s for s in sizes if not options.most or s[0] * s[1] <= options.most] for sizes in (OF_WORDS, OF_ROWS)]
    result = {"machine": machine(), "of words": measured(kept[0]), "of rows": measured(kept[1])}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
