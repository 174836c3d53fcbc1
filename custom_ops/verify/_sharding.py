"""DTensors over two processes, simulated by threads of this process."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from custom_ops.library._torch import processes_as_threads
from custom_ops.verify._case import Call, Case, NotApplicable, capability, check_close, describe
from custom_ops.verify._tracing import records

WORLD = 2


@capability("sharding", of_dispatch=True)
def sharding(case: Case) -> str:
    """DTensors over two processes, each input sharded alone and all together, give one process's results or raise."""
    if case.interpreted:
        raise NotApplicable("two processes are two threads here, and Triton's interpreter has one")
    spread = [(call, dims) for call in case.calls(torch.float32)[: 3 if case.quick else None] for dims in _ways(call)]
    if not spread:
        raise NotApplicable("no sample has two rows to share out")
    import torch.distributed as dist

    if dist.is_initialized():
        raise NotApplicable("this process is in a process group already")
    expected = [_results(call, call.tensors) for call, _ in spread]
    refusals: list[str] = []
    checked = [0]

    def check(mesh: Any) -> None:
        from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

        for (call, dims), right in zip(spread, expected):
            tensors = [
                distribute_tensor(t.detach(), mesh, [Shard(dims[k]) if k in dims else Replicate()]).requires_grad_(
                    t.requires_grad
                )
                for k, t in zip(call.keys, call.tensors)
            ]
            try:
                found = _results(call, tensors)
            except (NotImplementedError, RuntimeError) as error:
                refusals.append(str(error).splitlines()[0][:200])
                continue
            whole = [t.full_tensor() if isinstance(t, DTensor) else t for t in found]
            check_close(whole, right, f"{describe(call)} with dimensions {dims} sharded", rtol=1e-5)
            checked[0] += 1

    try:
        _together(check)
    except AssertionError as error:
        try:
            records(case, [torch.float64])
        except NotApplicable:
            raise NotApplicable(f"only torch's own sharding rules, which are wrong: {error}") from None
        raise
    if not checked[0]:
        raise NotApplicable(f"refuses DTensors: {refusals[0]}")
    return f"{checked[0] // WORLD} ways to shard, {len(refusals) // WORLD} refused"


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


def _together(work: Callable[[Any], None]) -> None:
    """Call ``work`` with a mesh in ``WORLD`` threads, which torch takes for the processes of one group."""
    from torch.distributed.device_mesh import init_device_mesh

    dist: Any = torch.distributed
    store = dist.HashStore()
    failures: list[Exception] = []

    def run(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=WORLD, store=store)
            work(init_device_mesh("cpu", (WORLD,)))
        except Exception as error:
            failures.append(error)
            end_waiting(error)
        except SystemExit:
            pass  # another thread's error has ended this one
        finally:
            dist.destroy_process_group()

    hook = sys.excepthook  # torch would put the rank before each line of any later traceback
    with processes_as_threads() as end_waiting:
        threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(WORLD)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    sys.excepthook = hook
    if failures:
        raise failures[0]
