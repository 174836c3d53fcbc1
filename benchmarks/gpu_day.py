"""``python -m benchmarks.gpu_day PART``: the first day on a GPU, in three commands of at most nine minutes each.

``correctness`` runs the battery's rows about numbers, ``runtime`` CUDA graphs, streams, compilers and sanitizers, and
``numbers`` the timings. Each part is a list of steps, each a process with a time limit. Whatever fails, the folder has
the output of each step, ``gpu_day.json`` with what all parts have found so far, and the same as tables, gpu_day.md. A
rehearsal without a GPU runs ``correctness`` on the emulator and ``numbers`` on the CPU; its report says so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import machine
from custom_ops.registry import REGISTRY

LIMIT = 540.0  # seconds for one part
ROOT = Path(__file__).parent.parent
SMOKE = ("relu", "voxel_sum", "pairwise_logistic_loss", "softmax_loss")
SANITIZED = ("bias_relu", "segment_sum", "soft_rank")
PROFILED = ("relu", "voxel_sum", "pairwise_logistic_loss")
# {op: sizes}, in the op's first table.
TIMED: dict[str, tuple[Any, ...]] = {
    "relu": (1 << 27,),
    "voxel_sum": (1_000_000, 4_000_000),
    "bev_pool": (23,),
    "pairwise_logistic_loss": ((16, 1024), (4, 4096)),
}
REPLAYED = ("softmax_loss", "list_mle_loss")

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@dataclass(frozen=True)
class Step:
    """A command of a part. If it ``needs`` a program that isn't installed, or a GPU that isn't there, it is left out.
    ``again`` are commands that tell why it failed.
    """

    name: str
    command: Sequence[str]
    limit: float = 120.0
    needs: str = ""
    again: Sequence[Step] = ()
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    part: str
    step: str
    result: str  # "passed", "failed", "out of time" or "left out: " and the reason
    seconds: float = 0.0
    said: str = ""  # the end of the output of a step that didn't pass
    rows: list[dict[str, Any]] = field(default_factory=list)  # the measurements of a step that takes some


def _python(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "ignore", *arguments]


def _verify(op: str, backend: str, *options: str) -> list[str]:
    return _python("-m", "custom_ops", "verify", "--op", op, "--backend", backend, "--quick", *options)


def _call(op: str, times: int) -> str:
    """Return a program that calls an op forward and backward on its first sample."""
    return (
        "import torch; from benchmarks.launches import call; from custom_ops.registry import REGISTRY\n"
        f"torch.manual_seed(0); info = REGISTRY[{op!r}]\n"
        "sample = info.samples(torch.device('cuda'), torch.float32)[0]\n"
        f"for _ in range({times}): call(info, sample)[1]()\n"
        "torch.cuda.synchronize()"
    )


def correctness(device: str, ops: Sequence[str]) -> list[Step]:
    """A smoke of a few ops, then the rows about numbers of all; a failing op again with other compilers."""
    backend = "cuda" if device == "cuda" else "ptx"
    rows = [
        "value",
        "gradient",
        "second derivative",
        "float32",
        "bfloat16",
        "float16",
        "special values",
        "deterministic",
    ]
    smoke = [op for op in SMOKE if op in ops] or list(ops[:1])
    found = [Step(f"smoke: {op}", _verify(op, backend, "--only", "value", "float32")) for op in smoke]
    assembler = shutil.which("ptxas")
    for op in ops:
        command, again = _verify(op, backend, "--only", *rows), []
        if backend == "cuda":
            again.append(Step(f"{op}, emulated", _verify(op, "ptx", "--only", *rows), 300))
            if assembler:  # a compiler of another version
                again.append(Step(f"{op}, {assembler}", command, 300, environment={"TRITON_PTXAS_PATH": assembler}))
        found.append(Step(op, command, 300, again=again))
    return found


def runtime(device: str, ops: Sequence[str]) -> list[Step]:
    """CUDA graphs, streams, recompilations, one op compiled and packaged, and sanitizers."""
    tests = (
        "a_graph_replays",
        "the_current_stream_is_used",
        "new_sizes_compile_little",
        "reduced_overhead_is_the_same",
    )
    program = "import sys; sys.path.insert(0, 'tests'); import test_cuda as t; t.of_every_op({!r}, {})"
    found = []
    for test in tests:
        but = "t.WAITING" if test in tests[::3] else "{}"
        found.append(Step(test, _python("-c", program.format(test, but)), 240, "gpu"))
    compiled = ["compile", "compiled composition", "AOTInductor", "error messages", "large"]
    found += [Step(f"{op}: compilers", _verify(op, "cuda", "--only", *compiled), 180, "gpu") for op in ops[:1]]
    for tool in ("memcheck", "racecheck"):
        for op in (op for op in SANITIZED if op in ops):
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *_python("-c", _call(op, 1))]
            found.append(Step(f"{tool}: {op}", command, 120, "compute-sanitizer"))
    return found


def numbers(device: str, ops: Sequence[str]) -> list[Step]:
    """The timings, and profiles of a few kernels."""
    found = []
    for op, sizes in TIMED.items():
        for size in sizes if op in ops else ():
            found.append(Step(f"{op}, {size}", _python("-m", "benchmarks.gpu_day", "--cell", op, str(size), device)))
    for op in (op for op in REPLAYED if op in ops):
        found.append(Step(f"{op}, replayed", _python("-m", "benchmarks.gpu_day", "--cell", op, "replay", device)))
    for op in (op for op in PROFILED if op in ops):
        command = ["ncu", "--set", "full", "--launch-skip", "20", "--launch-count", "10", *_python("-c", _call(op, 9))]
        found.append(Step(f"ncu: {op}", command, 120, "ncu"))
    return found


PARTS: dict[str, Callable[[str, Sequence[str]], list[Step]]] = {
    "correctness": correctness,
    "runtime": runtime,
    "numbers": numbers,
}


# ---------------------------------------------------------------- running


def run_step(part: str, step: Step, folder: Path, left: float, device: str, run: Run = subprocess.run) -> Outcome:
    """Run a step for at most ``left`` seconds and keep its output in the folder."""
    missing = step.needs == "gpu" and device != "cuda"
    if missing or (step.needs not in ("", "gpu") and not shutil.which(step.needs)):
        return Outcome(part, step.name, f"left out: there is no {'GPU' if missing else step.needs}")
    if left <= 0:
        return Outcome(part, step.name, "left out: no time")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    begin = time.monotonic()
    try:
        done = run(
            list(step.command), cwd=ROOT, env=environment | step.environment, timeout=min(step.limit, left),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        result, output = ("failed" if done.returncode else "passed"), done.stdout or ""
    except subprocess.TimeoutExpired as error:
        partial = error.stdout or b""
        output = partial.decode(errors="replace") if isinstance(partial, bytes) else partial
        result = "out of time"
    except OSError as error:
        result, output = "failed", str(error)
    outcome = Outcome(part, step.name, result, round(time.monotonic() - begin, 1))
    (folder / part).mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "_" for c in step.name)
    (folder / part / f"{name}.txt").write_text(output)
    if result != "passed":
        outcome.said = output[-2000:]
    for line in output.splitlines():
        if line.startswith(ROWS):
            outcome.rows = json.loads(line[len(ROWS) :])
    return outcome


def run_part(
    part: str, device: str, folder: Path, ops: Sequence[str], workers: int, limit: float, run: Run = subprocess.run
) -> list[Outcome]:
    """Run a part, several steps at a time, and write the report after each of them."""
    begin = time.monotonic()
    before = [o for o in _read(folder)["outcomes"] if o["part"] != part] if (folder / "gpu_day.json").exists() else []
    outcomes: list[Outcome] = []

    def one(step: Step) -> list[Outcome]:
        def attempt(step: Step) -> Outcome:
            return run_step(part, step, folder, limit - (time.monotonic() - begin), device, run)

        found = [attempt(step)]
        if found[0].result == "failed":
            found += [attempt(other) for other in step.again]
        return found

    steps = PARTS[part](device, ops)
    with ThreadPoolExecutor(workers if part == "correctness" else 1) as pool:
        for found in pool.map(one, steps):
            outcomes += found
            write(folder, device, [*before, *map(asdict, outcomes)])
    return outcomes


# ---------------------------------------------------------------- the report


def _read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "gpu_day.json").read_text())
    return found


def write(folder: Path, device: str, outcomes: list[dict[str, Any]]) -> None:
    report = {"rehearsal": device != "cuda", "machine": machine(), "outcomes": outcomes}
    whole = folder / "gpu_day.json.new"
    whole.write_text(json.dumps(report, indent=1))
    whole.replace(folder / "gpu_day.json")
    (folder / "gpu_day.md").write_text("\n".join(tables(report)) + "\n")


def tables(report: dict[str, Any]) -> Iterable[str]:
    """Yield the lines of a report's tables."""
    about = report["machine"]
    where = f"{about.get('device', about['cpu'])}, torch {about['torch']}"
    where += f", Triton {about['triton']}" if "triton" in about else ""
    yield f"{'A rehearsal without a GPU, whose times mean nothing, on' if report['rehearsal'] else 'On'} {where}."
    yield from ("", "| part | step | result | s |", "|---|---|---|--:|")
    for outcome in report["outcomes"]:
        yield f"| {outcome['part']} | {outcome['step']} | {outcome['result']} | {outcome['seconds']} |"
    rows = [row for outcome in report["outcomes"] for row in outcome["rows"]]
    if rows:
        yield from ("", "| op | at | contender | ms | host, ms | × floor |", "|---|---|---|--:|--:|--:|")
    for row in rows:
        host = "" if row["host"] is None else f"{row['host']:.3g}"
        floors = "" if row["floors"] is None else f"{row['floors']:.2f}"
        yield f"| `{row['op']}` | {row['at']} | {row['contender']} | {row['ms']:.3g} | {host} | {floors} |"


# ---------------------------------------------------------------- one measurement, in a process of its own

ROWS = "gpu_day rows: "


def cell(op: str, size: str, device: torch.device) -> list[dict[str, Any]]:
    """Return the times of an op at a size of its first table, or in a replayed graph beside eager calls."""
    from benchmarks.measure import Cell, Effort, measure
    from benchmarks.plan import Peers
    from benchmarks.tables import TIMED as TABLES

    info = TABLES[op]
    table = info.benchmarks[0]
    if size == "replay":
        return _replayed(op, device)
    rehearsed = table.sizes[0] if device.type == "cpu" else None
    wanted = rehearsed or next(s for s in TIMED[op] if str(s) == size)
    peers = Peers([table], [], quick=False).of(table)
    effort = Effort(seconds=2.0, limit=100.0, whole=True)
    memory = "cuda" if device.type == "cuda" else "fresh"
    result = measure(Cell(info, table, wanted), peers, device, memory, effort)
    if result.wrong:
        raise RuntimeError(result.wrong)
    return [
        {"op": op, "at": f"{wanted}, {row.direction}", "contender": row.contender, "ms": row.milliseconds,
         "host": row.host_milliseconds, "floors": row.floors}
        for row in result.rows
    ]  # fmt: skip


def _replayed(op: str, device: torch.device) -> list[dict[str, Any]]:
    from benchmarks.measure import Cell, Problem
    from benchmarks.tables import TIMED as TABLES
    from benchmarks.timing import Call, host_seconds_of, interleave, median

    table = TABLES[op].benchmarks[0]
    own = Cell(TABLES[op], table, table.sizes[-1])
    problem = Problem(own, own.size, device, own.ours)
    calls = {"eager": problem.call(own.ours, problem.directions[-1])}
    if device.type == "cuda":
        side = torch.cuda.Stream(device)
        with torch.cuda.stream(side):
            for _ in range(3):
                calls["eager"]()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = calls["eager"]()
        calls["replayed"] = Call(lambda _, kept=kept: graph.replay())
    times = interleave(calls, 1.0, device)
    return [
        {"op": op, "at": f"{own.size}, {problem.directions[-1]}", "contender": name, "ms": median(values) * 1e3,
         "host": median([host_seconds_of(calls[name], device) for _ in range(7)]) * 1e3, "floors": None}
        for name, values in times.items()
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_day", description=__doc__)
    parser.add_argument("part", nargs="?", choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path("gpu_day"), metavar="FOLDER", help="default: gpu_day")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--op", nargs="+", choices=list(REGISTRY), default=list(REGISTRY), metavar="NAME")
    parser.add_argument("--workers", type=int, default=14, help="how many ops are checked at a time")
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help="time of the part")
    parser.add_argument("--cell", nargs=3, metavar=("OP", "SIZE", "DEVICE"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.cell:
        op, size, device = options.cell
        print(ROWS + json.dumps(cell(op, size, torch.device(device))))
        return 0
    if not options.part:
        parser.error(f"expected a part, one of {', '.join(PARTS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: there is no CUDA device; --device cpu rehearses without one")
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes = run_part(options.part, options.device, options.out, options.op, options.workers, options.limit)
    print((options.out / "gpu_day.md").read_text())
    return int(any(outcome.result in ("failed", "out of time") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
