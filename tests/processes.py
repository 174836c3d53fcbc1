"""Processes in one group, forked by a program that has imported what they need."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist


def together(processes: int, worker: Callable[..., None], *arguments: object) -> None:
    """Run ``worker`` in so many processes, within a process group; an exception in one is raised here."""
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
