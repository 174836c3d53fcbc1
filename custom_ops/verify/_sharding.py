"""DTensors over two processes."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch

from custom_ops.verify._case import Call, Case, NotApplicable, capability, check_close, describe, explain
from custom_ops.verify._tracing import records

WORLD = 2
PATIENCE = timedelta(minutes=1)  # after this long a process gives up on its peer


@capability("sharding", of_dispatch=True)
def sharding(case: Case) -> str:
    """DTensors over two processes, each input sharded alone and all together, give one process's results or raise."""
    if case.device.type != "cpu":
        raise NotApplicable("a process forked from this one can't use its GPU; the C++ kernels have the row")
    spread = [(call, dims) for call in case.calls(torch.float32)[: 2 if case.quick else None] for dims in _ways(call)]
    if not spread:
        raise NotApplicable("no sample has two rows to share out")
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    if dist.is_initialized():
        raise NotApplicable("this process is in a process group already")
    expected = [_results(call, call.tensors) for call, _ in spread]

    def check(mesh: Any) -> list[str]:
        """Return why each way to shard is refused, empty where it isn't."""
        refusals = []
        for (call, dims), right in zip(spread, expected):
            tensors = [
                distribute_tensor(t.detach(), mesh, [Shard(dims[k]) if k in dims else Replicate()]).requires_grad_(
                    t.requires_grad
                )
                for k, t in zip(call.keys, call.tensors)
            ]
            found, why, what = [], "", f"{describe(call)} with dimensions {dims} sharded"
            try:
                found = _results(call, tensors)
            except (NotImplementedError, RuntimeError) as error:
                why = (str(error).splitlines() or [type(error).__name__])[0][:200]
            everywhere = [""] * WORLD
            dist.all_gather_object(everywhere, why)
            if any(everywhere) and not all(everywhere):
                raise AssertionError(f"{what}: one process refuses and the other doesn't: {''.join(everywhere)}")
            if not why:
                check_close([t.full_tensor() if isinstance(t, DTensor) else t for t in found], right, what, rtol=1e-5)
            refusals.append(why)
        return refusals

    found = _together(check)
    wrong = [result for result in found if isinstance(result, str)]
    if wrong:
        try:
            records(case, [torch.float64])
        except NotApplicable:
            raise NotApplicable(f"only torch's own sharding rules, which are wrong: {wrong[0]}") from None
        raise AssertionError(wrong[0])
    refused = [why for why in found[0] if why]
    if len(refused) == len(spread):
        raise NotApplicable(f"refuses DTensors: {refused[0]}")
    return f"{len(spread) - len(refused)} ways to shard, {len(refused)} refused"


def _ways(call: Call) -> Iterator[dict[Any, int]]:
    """Yield ways to shard: all tensors in their first dimension, then each input alone in each dimension."""
    tensors = dict(zip(call.keys, call.tensors))
    if call.is_empty:
        return
    first = {key: 0 for key, t in tensors.items() if t.dim() and len(t) >= WORLD}
    ways = [first] if len({len(tensors[key]) for key in first}) == 1 else []
    for key in call.input_keys:
        ways += [{key: dim} for dim in range(tensors[key].dim()) if tensors[key].shape[dim] >= WORLD]
    yield from (way for i, way in enumerate(ways) if way not in ways[:i])


def _results(call: Call, tensors: Any) -> list[Any]:
    """Return outputs and gradients; the loss is the same however the tensors are placed."""
    leaves = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
    outputs = call.with_tensors(leaves).run()
    inputs = [t for t in leaves if t.requires_grad]
    differentiable = [y for y in outputs if y.requires_grad]
    if not differentiable:
        return list(outputs)
    loss = torch.stack([(y * y).sum() for y in differentiable]).sum()
    return [
        *(y.detach() for y in outputs),
        *torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True),
    ]


def _together(work: Callable[[Any], Any]) -> list[Any]:
    """Call ``work`` with a mesh in ``WORLD`` processes of one group, and return results or errors' texts as they came.

    The processes are forked, as an op that was defined in a notebook can't be sent to them. One that fails ends at
    once, which closes its connections, so that its peer fails next rather than wait for it.
    """
    fork = multiprocessing.get_context("fork")
    processes, found = [], []
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(WORLD):
            receiving, sending = fork.Pipe(duplex=False)
            process = fork.Process(target=_one_of_them, args=(sending, f"file://{folder}/store", work, rank))
            process.start()
            sending.close()  # the process has the only other end, and closes it when it is killed
            processes.append((process, receiving))
        for process, receiving in processes:
            try:
                found.append(receiving.recv())
            except EOFError:
                found.append((0.0, "one of the processes was killed, as by a fault of memory"))
            process.join()
    return [result for _, result in sorted(found, key=lambda pair: pair[0])]


def _one_of_them(sending: Connection, store: str, work: Callable[[Any], Any], rank: int) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)  # OpenMP's other threads don't survive a fork
    os.dup2(2, 1)  # gloo prints, and the standard output may be a report in JSON
    try:
        dist.init_process_group("gloo", store, PATIENCE, WORLD, rank)
        result = work(init_device_mesh("cpu", (WORLD,)))
        dist.destroy_process_group()
    except Exception as error:
        result = explain(error)
    sending.send((time.monotonic(), result))
