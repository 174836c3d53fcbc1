"""``python -m benchmarks.exchange``: measure what a training step over several processes exchanges, and how long it
takes.

It runs each case over 1, 2 and 4 processes (gloo, one thread each), counts the bytes of every collective, and prints
the tables of docs/scaling.md: the counts beside the times, then a model of both on up to 1,000 GPUs. ``--write
docs/scaling.md`` writes them into that page.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import machine

POINTS, COLUMNS, VOXELS = 172_824, 64, 40_000
LISTS, ITEMS = 1024, 128
PROCESSES = (1, 2, 4)


# ---------------------------------------------------------------- the cases


@dataclass
class Case:
    """A training step: a call's tensors, the dimension that each is sharded in (None: replicated), and the following
    step.
    """

    op: str
    over: str
    make: Callable[[], tuple[Callable[..., Any], list[Tensor]]]
    dims: tuple[int | None, ...]
    then: str = ""  # "whole": the result is all-reduced; "columns": it is reduce-scattered over the columns


def _points() -> tuple[Callable[..., Any], list[Tensor]]:
    import custom_ops

    x, rank = torch.randn(POINTS, COLUMNS, requires_grad=True), torch.randint(0, VOXELS, (POINTS,))
    return lambda x, rank: custom_ops.voxel_sum(x, rank, VOXELS), [x, rank]


def _cameras() -> tuple[Callable[..., Any], list[Tensor]]:
    import custom_ops

    depth = torch.rand(1, 4, 41, 8, 22, requires_grad=True)
    feat = torch.randn(1, 4, COLUMNS, 8, 22, requires_grad=True)
    rank = torch.randint(0, VOXELS, depth.shape)
    return lambda depth, feat, rank: custom_ops.bev_pool(depth, feat, rank, VOXELS), [depth, feat, rank]


def _lists() -> tuple[Callable[..., Any], list[Tensor]]:
    import custom_ops

    return custom_ops.lambda_loss, [torch.randn(LISTS, ITEMS, requires_grad=True), torch.randint(0, 5, (LISTS, ITEMS))]


def _pairs() -> tuple[Callable[..., Any], list[Tensor]]:
    import custom_ops

    scores = [torch.randn(1 << 20, requires_grad=True) for _ in range(2)]
    return custom_ops.margin_ranking_loss, [*scores, torch.ones(1 << 20)]


def _activation() -> tuple[Callable[..., Any], list[Tensor]]:
    import custom_ops

    return custom_ops.relu, [torch.randn(1 << 14, 256, requires_grad=True)]


CASES = [
    Case("relu", "rows, or columns", _activation, (0,)),
    Case("margin_ranking_loss", "pairs", _pairs, (0, 0, 0), "whole"),
    Case("lambda_loss", "lists", _lists, (0, 0), "whole"),
    Case("voxel_sum", "columns", _points, (1, None)),
    Case("voxel_sum", "points, the grid whole", _points, (0, 0), "whole"),
    Case("voxel_sum", "points, then columns", _points, (0, 0), "columns"),
    Case("bev_pool", "cameras, the grid whole", _cameras, (1, 1, 1), "whole"),
    Case("bev_pool", "channels", _cameras, (None, 2, None)),
]
MODELS = [(task, parallel) for task in ("rank", "lift_splat") for parallel in ("ddp", "fsdp", "tp")]


@dataclass
class Measured:
    name: str
    over: str
    processes: int
    milliseconds: float
    moved: int = 0  # bytes that the op reads and writes, forward and backward, over all processes
    exchanged: dict[str, int] = field(default_factory=dict)  # {collective: bytes of the whole tensor}

    @property
    def sent(self) -> float:
        """Return the bytes that each process sends if every collective is a ring."""
        return sum(ring_bytes(name, size, self.processes) for name, size in self.exchanged.items())


def ring_bytes(collective: str, size: float, processes: int) -> float:
    """Return the bytes a process sends: (P - 1) / P of the tensor, twice for an all-reduce (reduce-scatter,
    all-gather).
    """
    passes = 2 if collective == "all_reduce" else 1
    return passes * size * (processes - 1) / processes


# ---------------------------------------------------------------- in each process


def count(step: Callable[[], Any]) -> dict[str, int]:
    """Return, for each collective, the bytes of the whole tensors that it reduces or gathers."""
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.utils._pytree import tree_leaves

    exchanged: dict[str, int] = {}

    class Counting(CommDebugMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = super().__torch_dispatch__(func, types, args, kwargs)
            name = re.sub("[^a-z]", "", func.name().partition("::")[2]) if "c10d" in func.name() else ""
            for key in ("reduce_scatter", "all_reduce", "all_gather", "all_to_all", "broadcast"):
                if name.startswith(key.replace("_", "")) and result is not NotImplemented:
                    tensors = [t for t in tree_leaves((args, result)) if isinstance(t, Tensor)]
                    exchanged[key] = exchanged.get(key, 0) + max(t.nbytes for t in tensors)
            return result

    with Counting():
        step()
    return exchanged


def run_case(case: Case, mesh: Any) -> Measured:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.manual_seed(0)
    function, tensors = case.make()
    parts = [
        distribute_tensor(t.detach(), mesh, [Replicate() if d is None else Shard(d)]).requires_grad_(t.requires_grad)
        for t, d in zip(tensors, case.dims)
    ]
    moved = 0

    def step() -> None:
        nonlocal moved
        y = result = function(*parts)
        if case.then:
            y = result.redistribute(placements=[Replicate() if case.then == "whole" else Shard(1)])
        (y if y.ndim == 0 else (y * y).sum().full_tensor()).backward()
        moved = sum(t.nbytes * (1 + t.requires_grad) for t in tensors)
        moved += 2 * math.prod(result.shape) * result.to_local().itemsize

    return Measured(case.op, case.over, mesh.size(), _time(step), moved, count(step))


def run_model(task: str, parallel: str, mesh: Any) -> Measured:
    from examples import distributed

    torch.manual_seed(0)
    model, batches, loss_of, size = distributed.rank() if task == "rank" else distributed.lift()
    share, process = size // mesh.size(), mesh.get_rank()
    part = slice(None) if parallel == "tp" else slice(process * share, (process + 1) * share)
    model = distributed.parallelise(model, task, parallel, mesh)
    optimiser = distributed.adam(model)

    def step() -> None:
        distributed.step(model, optimiser, loss_of, next(batches), part)

    milliseconds = _time(step)
    return Measured(f"{task} example", parallel, mesh.size(), milliseconds, 0, count(step))


def _time(step: Callable[[], None], repeats: int = 5) -> float:
    seconds = []
    for _ in range(repeats + 2):
        torch.distributed.barrier()
        start = time.perf_counter()
        step()
        torch.distributed.barrier()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[2:])


def worker(out: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
    results = [run_case(case, mesh) for case in CASES]
    results += [run_model(task, parallel, mesh) for task, parallel in MODELS]
    if mesh.get_rank() == 0:
        out.write_text(json.dumps([asdict(result) for result in results]))
    torch.distributed.destroy_process_group()


def measure(processes: Sequence[int]) -> list[Measured]:
    results = []
    for n in processes:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.json"
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
            command = [*torchrun, "-m", "benchmarks.exchange", "--worker", str(out)]
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            results += [Measured(**row) for row in json.loads(out.read_text())]
    return results


# ---------------------------------------------------------------- the model


@dataclass(frozen=True)
class Hardware:
    """Round numbers for a node of 8 GPUs with one network card each; 70% of each bandwidth is assumed to be reached."""

    memory: float = 0.7 * 3.35e12  # bytes per second of one GPU
    inside: float = 0.7 * 450e9  # bytes per second that a GPU sends to another GPU of its node
    between: float = 0.7 * 50e9  # bytes per second that a GPU sends to another node
    latency: float = 10e-6  # seconds of one message from a process to the next
    node: int = 8

    def exchange(self, collective: str, size: float, processes: int) -> float:
        """Return a collective's seconds: the bytes of a ring, with the hops of recursive halving and doubling (log2
        P).
        """
        if processes == 1:
            return 0.0
        bandwidth = self.inside if processes <= self.node else self.between
        passes = 2 if collective == "all_reduce" else 1
        hops = passes * math.ceil(math.log2(processes))
        return hops * self.latency + ring_bytes(collective, size, processes) / bandwidth


@dataclass(frozen=True)
class Workload:
    """The bytes of a step: ``spread`` is divided among the processes, and ``fixed`` falls on each of them."""

    title: str
    spread: float
    fixed: float
    exchanged: Sequence[tuple[str, float]]
    weak: bool = False  # True: `spread` is per process, so the work grows with the processes

    def seconds(self, processes: int, on: Hardware) -> tuple[float, float]:
        share = self.spread if self.weak else self.spread / processes
        return (share + self.fixed) / on.memory, sum(on.exchange(*each, processes) for each in self.exchanged)


def _sum(points: float, voxels: float, columns: int = COLUMNS) -> tuple[float, float, float]:
    """Return the bytes of `voxel_sum`: those of all points, those of the grid on each process, and those of the grid
    itself.

    Forward reads the features and the geometry (8 bytes per rank, and 8 bytes of perm, written and read) and writes the
    grid. Backward reads the geometry and a grid row for each point and writes the gradient.
    """
    grid = 4 * voxels * columns
    return points * (3 * 4 * columns + 5 * 8), 2 * grid, grid


def workloads() -> list[Workload]:
    result = []
    for points, voxels in ((1e8, 40_000), (1e9, 40_000), (1e9, 4e6)):
        spread, fixed, grid = _sum(points, voxels)
        title = f"`voxel_sum`, {points:,.0f} points, {voxels:,.0f} voxels"
        result.append(Workload(title, spread, fixed, [("all_reduce", grid)]))
    documents = 1e7
    result += [
        Workload(f"list loss, {documents:,.0f} documents a process", 4 * 4 * documents, 0, [("all_reduce", 8)], True),
        Workload(
            f"ranker of 26,000 parameters by DDP, {documents:,.0f} documents a process",
            documents * 4 * 3 * (136 + 2 * 128 + 2 * 64),
            0,
            [("all_reduce", 8), ("all_reduce", 4 * 26_000)],
            True,
        ),
    ]
    return result


# ---------------------------------------------------------------- tables


def shown(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} GB"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def measured_table(results: Sequence[Measured]) -> list[str]:
    counts = sorted({r.processes for r in results})
    largest = max(counts)
    lines = [
        "| step of | over | moved | exchanged | each sends, of " + ", ".join(map(str, counts)) + " | ms, of "
        + ", ".join(map(str, counts)) + " |",
        "|---|---|--:|---|--:|--:|",
    ]  # fmt: skip
    for row in (r for r in results if r.processes == largest):
        alike = [r for n in counts for r in results if (r.name, r.over, r.processes) == (row.name, row.over, n)]
        exchanged = ", ".join(f"{name} {shown(size)}" for name, size in row.exchanged.items()) or "nothing"
        sent = ", ".join(shown(r.sent) for r in alike)
        times = ", ".join(f"{r.milliseconds:.3g}" for r in alike)
        moved = shown(row.moved) if row.moved else ""
        lines.append(f"| `{row.name}` | {row.over} | {moved} | {exchanged} | {sent} | {times} |")
    return lines


def model_table(on: Hardware = Hardware(), counts: Sequence[int] = (1, 8, 64, 512, 1000)) -> list[str]:
    lines = [
        "| ms for memory + ms for the exchange, GPUs: | " + " | ".join(f"{n:,}" for n in counts) + " | speed-up |",
        "|---|" + "--:|" * (len(counts) + 1),
    ]
    for work in workloads():
        times = [work.seconds(n, on) for n in counts]
        cells = [f"{milliseconds(memory)} + {milliseconds(exchange)}" for memory, exchange in times]
        gain = sum(times[0]) / sum(times[-1]) * (counts[-1] if work.weak else 1)
        lines.append(f"| {work.title} | {' | '.join(cells)} | {gain:,.3g} |")
    return lines


def tables(results: Sequence[Measured]) -> dict[str, str]:
    about = machine()
    where = f"{about['cpu']}, {about['cores']} cores, torch {about['torch']}, gloo, one thread a process."
    return {"measured": "\n".join([where, "", *measured_table(results)]), "model": "\n".join(model_table())}


def write(page: Path, parts: dict[str, str]) -> None:
    """Write each part between its marks in the page."""
    text = page.read_text()
    for name, part in parts.items():
        marks = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = text.partition(marks[0])
        text = f"{before}{marks[0]}\n{part}\n{marks[1]}{rest.partition(marks[1])[2]}"
    page.write_text(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exchange", description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=PROCESSES)
    parser.add_argument("--write", type=Path, metavar="PAGE")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        from examples import distributed

        worker(options.worker)
        distributed.leave(0)
    parts = tables(measure(options.processes))
    print(*parts.values(), sep="\n\n")
    if options.write:
        write(options.write, parts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
