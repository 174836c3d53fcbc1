"""The distributed examples have the losses of one process, and resume after a worker was killed.

One process, this file as a program, imports what the jobs need and forks all of them.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import exchange

STEPS = {"rank": 3, "lift_splat": 5}
PARALLEL = ("ddp", "fsdp", "tp")
KILLED = {"ddp": "in a checkpoint", "fsdp": "in a step", "tp": "in a step"}
KILLED_QUICKLY = ["ddp"]
ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory, full: bool) -> dict[str, str]:
    """Return each job's output, with the error that ended it and the checkpoints at that time."""
    killed = KILLED if full else KILLED_QUICKLY
    command = [sys.executable, __file__, str(tmp_path_factory.mktemp("checkpoints")), *killed]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return dict(part.split("\n", 1) for part in done.stdout.split("\njob: ")[1:])


def losses(output: str) -> dict[str, str]:
    return dict(re.findall(r"^step (\d+): loss (\S+)$", output, re.MULTILINE))


@pytest.mark.parametrize("parallel", PARALLEL)
@pytest.mark.parametrize("task", STEPS)
def test_two_processes_have_the_losses_of_one(task: str, parallel: str, jobs: dict[str, str]) -> None:
    """The example compares the losses itself. (test_examples.py has the ranker's data.)"""
    output = jobs[f"{task}, {parallel}"]
    assert output.endswith("finished\n"), output
    assert "largest gap to one process" in output
    assert list(losses(output)) == [str(n + 1) for n in range(STEPS[task])]


@pytest.mark.parametrize(
    "parallel", [pytest.param(p, marks=[] if p in KILLED_QUICKLY else pytest.mark.full) for p in PARALLEL]
)
def test_a_killed_worker_ends_the_job_and_a_second_start_resumes(parallel: str, jobs: dict[str, str]) -> None:
    died, resumed, killed = jobs[f"killed, {parallel}"], jobs[f"resumed, {parallel}"], KILLED[parallel]
    # The launcher names the process that it saw end first: the killed one, or one that lost its peer.
    assert "killed\n" in died and "finished\n" not in died
    found = ["step-000002", "step-000004" if killed == "in a step" else "step-000004.partial"]
    assert died.endswith(f"checkpoints: {found}\n"), died

    assert "finished\n" in resumed, resumed
    last = 4 if killed == "in a step" else 2
    assert f"resumed after step {last}\n" in resumed
    whole = losses(jobs[f"lift_splat, {parallel}"])
    assert losses(died) | losses(resumed) == whole
    assert list(losses(resumed)) == [str(n + 1) for n in range(last, STEPS["lift_splat"])]


def test_the_example_runs_as_its_command() -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    example = ["-m", "examples.distributed", "--task", "lift_splat", "--steps", "1"]
    done = subprocess.run([*launcher, *example], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "largest gap to one process" in done.stdout


def test_the_page_on_scaling_shows_the_model_of_today_and_the_grid_that_is_exchanged() -> None:
    text = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
    assert "\n".join(exchange.model_table()) in text, "python -m benchmarks.exchange --write docs/scaling.md"
    grid = exchange.shown(4 * exchange.VOXELS * exchange.COLUMNS)
    assert f"| `voxel_sum` | points, the grid whole | 110 MB | all_reduce {grid} |" in text
    assert all(f"| `{case.op}` | {case.over} |" in text for case in exchange.CASES)


def test_a_ring_sends_all_parts_but_one() -> None:
    assert exchange.ring_bytes("all_reduce", 1000, 1) == 0
    assert exchange.ring_bytes("all_reduce", 1000, 4) == 1500
    assert exchange.ring_bytes("all_gather", 1000, 4) == 750


# ---------------------------------------------------------------- as a program


def kill(when: str) -> None:
    """Let a process of this job be killed: the second one in step 5, or the first one while it saves step 4."""
    from examples import distributed

    step, publish, steps = distributed.step, distributed.Checkpoints.publish, itertools.count(1)

    def end() -> None:
        print("killed", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def killed_step(*args):  # type: ignore[no-untyped-def]
        if next(steps) == 5 and os.environ["RANK"] == "1":
            end()
        return step(*args)

    def killed_publish(partial: Path, path: Path) -> None:
        if path.name == "step-000004":
            end()
        publish(partial, path)

    if when == "in a step":
        distributed.step = killed_step
    else:
        distributed.Checkpoints.publish = staticmethod(killed_publish)  # type: ignore[method-assign]


def worker(killed: str, task: str, *arguments: str) -> None:
    from examples import distributed

    if killed:
        kill(killed)
    if distributed.main(["--task", task, "--steps", str(STEPS[task]), *arguments]):
        raise RuntimeError("the example failed")


def start(name: str, killed: str, *arguments: str) -> None:
    """Start a job of two processes as torchrun does, but forked."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    print(f"\njob: {name}", flush=True)
    config = LaunchConfig(
        1, 1, 2, run_id=name, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0, start_method="fork"
    )
    try:
        elastic_launch(config, worker)(killed, *arguments)
        print("finished", flush=True)
    except ChildFailedError as error:
        print(error, flush=True)


def main(folder: Path, killed: list[str]) -> None:
    from examples import distributed

    distributed.rank = functools.cache(distributed.rank)  # its pairs take a second, and all jobs share them
    distributed.rank()
    for task in STEPS:
        for parallel in PARALLEL:
            start(f"{task}, {parallel}", "", task, "--parallel", parallel)
    for parallel in killed:
        checkpoints = folder / parallel
        arguments = ("lift_splat", "--parallel", parallel, "--checkpoint", str(checkpoints))
        start(f"killed, {parallel}", KILLED[parallel], *arguments, "--every", "2")
        print(f"checkpoints: {sorted(path.name for path in checkpoints.iterdir())}", flush=True)
        start(f"resumed, {parallel}", "", *arguments)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
