"""Importing and reading run no foreign code, and state that threads share is safe from its first use."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from examples import data

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("custom_ops", "triton_kernels", "benchmarks", "examples")
PICKLES_MODULES = ROOT / "custom_ops" / "verify" / "_objects.py"  # it unpickles only what it has just pickled
RUNS_ITS_OWN_LINES = ROOT / "benchmarks" / "derivatives.py"
RUNS_CODE = {"eval", "exec", "pickle", "marshal", "shelve", "dill", "joblib", "yaml", "cloudpickle"}

IMPORT = """
import sys, tempfile
tempfile.gettempdir()  # tries to write, once
import torch, torch.distributed, numpy, matplotlib, rich, triton, sklearn.datasets
events = []
sys.addaudithook(lambda event, args: events.append((event, args)))
import custom_ops.verify, custom_ops.triton_kernels.common
import benchmarks.run, examples.rank_mslr, examples.bev_lidar
import custom_ops.__main__
for event, args in events:
    assert not event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "pickle.")), event
    if event == "open" and isinstance(args[2], int) and not isinstance(args[0], int):  # a number is open already
        assert not args[2] & 3 or "__pycache__" in str(args[0]) or str(args[0]) == "/dev/null", args
"""

THREADS = """
import threading
import torch
barrier, failures = threading.Barrier(8), []
def run(number):
    try:
        barrier.wait()
        import custom_ops  # by all of them at once
        barrier.wait()
        if number % 2:
            from torch.distributed import tensor  # on which sharding rules wait
        x = torch.tensor([-1.0, 2.0, 3.0], requires_grad=True)
        custom_ops.relu(x).sum().backward()
        loss = custom_ops.lambda_loss(x, torch.tensor([2, 0, 1]))
        pooled = custom_ops.voxel_sum(x[:, None], torch.tensor([0, 1, 1]), 2)
        (loss + pooled.sum()).backward()
        assert pooled.tolist() == [[-1], [5]] and x.grad.isfinite().all()
    except BaseException as error:
        failures.append(repr(error))
        barrier.abort()
threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failures, failures
"""


def run(program: str) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_opens_no_connection_starts_no_process_and_writes_no_file() -> None:
    run(IMPORT)


def test_threads_share_the_state_of_modules_from_the_first_use() -> None:
    run(THREADS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_reads_data_that_could_run_code(folder: str) -> None:
    for path in set((ROOT / folder).rglob("*.py")) - {PICKLES_MODULES, RUNS_ITS_OWN_LINES}:
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.name}, line {getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
                assert not {name.split(".")[0] for name in names} & RUNS_CODE, where
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in RUNS_CODE, where
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert (
                    called not in ("torch.load", "numpy.load", "np.load") or keywords.get("weights_only") == "True"
                ), where
                assert "allow_pickle" not in keywords and keywords.get("shell") != "True", where


def test_a_file_of_data_with_code_in_it_is_refused_unrun(tmp_path: Path) -> None:
    path, trace = tmp_path / "source.ply", tmp_path / "trace"
    code = f"__import__('pathlib').Path({str(trace)!r}).touch()"
    path.write_bytes(f"ply\n{code}\nformat ascii 1.0\nend_header\n{code}\n".encode())
    with pytest.raises(data.DataError, match="expected a binary little-endian PLY"):
        data.read_ply(path)
    path.write_text(code)
    with pytest.raises(ValueError, match="could not convert"):
        np.loadtxt(path, dtype=np.float32)
    assert not trace.exists()
