"""The distributed examples: the losses of one process, and what happens when a worker is killed."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from custom_ops.benchmarks import exchange

STEPS = 8


def run(program: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *program]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=240, env=environment, check=False
    )


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run(["-m", "custom_ops.examples.distributed"], "--steps", str(STEPS), *arguments)


@functools.cache
def uninterrupted(task: str, parallel: str) -> subprocess.CompletedProcess[str]:
    return train("--task", task, "--parallel", parallel)


def losses(output: str) -> dict[str, str]:
    return dict(re.findall(r"^step (\d+): loss (\S+)$", output, re.MULTILINE))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "tp"])
@pytest.mark.parametrize("task", ["rank", "lift_splat"])
def test_two_processes_have_the_losses_of_one(task: str, parallel: str) -> None:
    """The example compares them itself; for the ranker's data see test_examples.py."""
    done = uninterrupted(task, parallel)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "largest gap to one process" in done.stdout
    assert list(losses(done.stdout)) == [str(n + 1) for n in range(STEPS)]


@pytest.mark.parametrize(
    ("parallel", "killed"),
    [("ddp", "in a checkpoint"), ("fsdp", "in a step"), ("tp", "in a step")],
)
def test_a_killed_worker_ends_the_job_and_a_second_start_resumes(parallel: str, killed: str, tmp_path: Path) -> None:
    arguments = ("--task", "lift_splat", "--parallel", parallel, "--every", "3")
    died = run([__file__, killed], "--steps", str(STEPS), "--checkpoint", str(tmp_path), *arguments)
    assert died.returncode != 0
    assert "Signal 9 (SIGKILL) received by PID" in died.stderr, died.stderr[-4000:]
    found = {"step-000003", "step-000006"} if killed == "in a step" else {"step-000003", "step-000006.partial"}
    assert {path.name for path in tmp_path.iterdir()} == found

    resumed = train("--checkpoint", str(tmp_path), *arguments)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr[-4000:]
    last = 6 if killed == "in a step" else 3
    assert f"resumed after step {last}\n" in resumed.stdout
    whole = losses(uninterrupted("lift_splat", parallel).stdout)
    assert losses(died.stdout) | losses(resumed.stdout) == whole
    assert list(losses(resumed.stdout)) == [str(n + 1) for n in range(last, STEPS)]


def test_the_page_on_scaling_shows_the_model_of_today_and_the_grid_that_is_exchanged() -> None:
    text = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
    assert "\n".join(exchange.model_table()) in text, "python -m custom_ops.benchmarks.exchange --write docs/scaling.md"
    grid = exchange.shown(4 * exchange.VOXELS * exchange.COLUMNS)
    assert f"| `voxel_sum` | points, the grid whole | 110 MB | all_reduce {grid} |" in text
    assert all(f"| `{case.op}` | {case.over} |" in text for case in exchange.CASES)


def test_a_ring_sends_all_parts_but_one() -> None:
    assert exchange.ring_bytes("all_reduce", 1000, 1) == 0
    assert exchange.ring_bytes("all_reduce", 1000, 4) == 1500
    assert exchange.ring_bytes("all_gather", 1000, 4) == 750


def die(killed: str) -> None:
    """As the example, but one process is killed: the second one in step 7, or the first one while it saves step 6."""
    from custom_ops.examples import distributed

    step, publish, steps = distributed.step, distributed.Checkpoints.publish, iter(range(1, STEPS + 1))

    def killed_step(*args):  # type: ignore[no-untyped-def]
        if next(steps) == 7 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*args)

    def killed_publish(partial: Path, path: Path) -> None:
        if path.name == "step-000006":
            os.kill(os.getpid(), signal.SIGKILL)
        publish(partial, path)

    if killed == "in a step":
        distributed.step = killed_step
    else:
        distributed.Checkpoints.publish = staticmethod(killed_publish)  # type: ignore[method-assign]
    distributed.main(sys.argv[2:])


if __name__ == "__main__":
    die(sys.argv[1])
