"""User code passes a strict type checker and gets our types rather than Any."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import custom_ops

ROOT = Path(__file__).resolve().parents[1]

RIGHT = """
import torch
from torch import Tensor

import custom_ops
from custom_ops import library
from custom_ops.registry import Sample
from custom_ops.verify import Report, verify


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.activation = custom_ops.LeakyReLU(0.1)
        self.loss = custom_ops.PairwiseHingeLoss(margin=0.5)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        scores: Tensor = self.activation(x)
        loss: Tensor = self.loss(scores, labels)
        return loss


@library.define("mylib::scale")
def scale(x: Tensor, factor: float) -> Tensor:
    return torch.empty_like(x)


def run(x: Tensor, rank: Tensor) -> tuple[Tensor, float]:
    perm, indptr = custom_ops.voxel_csr(rank, 8)
    pooled = custom_ops.voxel_sum(custom_ops.relu(x), rank, 8, reduce="max", csr=(perm, indptr))
    report: Report = verify(custom_ops.relu, [Sample((x,), dynamic={0: 0})], reference=torch.relu)
    return custom_ops.reverse_gradient(pooled, 0.5), float(len(report.cells))


reveal_type(custom_ops.relu)
reveal_type(custom_ops.voxel_csr)
reveal_type(custom_ops.bpr_loss)
"""

WRONG = {
    "custom_ops.relu(1.0)": "arg-type",
    "custom_ops.voxel_sum(torch.ones(2, 2), torch.ones(2), '8')": "arg-type",
    "custom_ops.relu(torch.ones(2), slope=1)": "call-arg",
    "len(custom_ops.relu(torch.ones(2)).nothing)": "attr-defined",
    "custom_ops.no_such_op": "attr-defined",
}


def mypy(source: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "user.py").write_text(source)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={folder.parent / 'mypy'}"]
    command.append("--follow-imports=silent")  # checks our types only, as for an installed package
    environment = os.environ | {"MYPYPATH": str(ROOT)}  # mypy doesn't find an editable installation
    return subprocess.run(
        [*command, "user.py"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_user_code_passes_a_strict_type_checker(tmp_path: Path) -> None:
    done = mypy(RIGHT + "\n".join(f"custom_ops.{name}" for name in custom_ops.__all__) + "\n", tmp_path)
    assert done.returncode == 0, done.stdout
    revealed = [line.split('"')[1] for line in done.stdout.splitlines() if "Revealed type" in line]
    assert len(revealed) == 3
    assert not any("Any" in kind for kind in revealed), revealed


def test_wrong_user_code_does_not(tmp_path: Path) -> None:
    done = mypy("import torch, custom_ops\n" + "".join(f"{line}\n" for line in WRONG), tmp_path)
    for number, (line, code) in enumerate(WRONG.items(), 2):
        assert any(f"user.py:{number}: error" in out and f"[{code}]" in out for out in done.stdout.splitlines()), line
