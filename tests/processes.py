"""A process group whose processes are forked from one program that has already imported what they need."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist


def together(processes: int, worker: Callable[..., None], *arguments: object) -> None:
    """Run ``worker`` in ``processes`` processes of one process group, and raise an exception of any of them."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _in_a_group, (processes, f"file://{folder}/store", worker, arguments), processes, start_method="fork"
        )


def _in_a_group(rank: int, processes: int, store: str, worker: Callable[..., None], arguments: tuple[object]) -> None:
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    try:
        worker(*arguments)
    finally:
        dist.destroy_process_group()
