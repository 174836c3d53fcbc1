"""Every registered op on DTensors over 2 and 4 processes: results equal those of one process, without hidden exchange.

The registry (`Sharding`) declares the sharded arguments, the placement of the result and the collectives; an op without
a declaration is sharded by the rows of its samples.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import together
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import custom_ops
from custom_ops import shards
from custom_ops.registry import FUNCTIONS, OpInfo, Sample, Sharding

ROWS = 5  # an uneven sharding; with four processes the last has no rows


def by_rows(info: OpInfo) -> Iterator[Sharding]:
    """Yield the samples, lengthened by repeating rows and sharded in the first dimension of each tensor that has it."""
    for sample in info.samples(torch.device("cpu"), torch.float32):
        calls = {**dict(enumerate(sample.args)), **sample.kwargs}
        rows = {key: t for key, t in calls.items() if isinstance(t, Tensor) and t.dim() and len(t) == len(calls[0])}
        if calls[0].dim() < 2 or not len(calls[0]):
            continue

        def longer(t: Tensor) -> Tensor:
            repeated = t.detach().repeat(-(-ROWS // len(t)), *[1] * (t.dim() - 1))[:ROWS]
            return repeated.requires_grad_(t.requires_grad)

        calls |= {key: longer(t) for key, t in rows.items()}
        values = dict(calls)
        args = tuple(calls.pop(at) for at in range(len(sample.args)))
        of_whole = sum(t.requires_grad for key, t in values.items() if isinstance(t, Tensor) and key not in rows)
        exchanged = {"all_reduce": of_whole} if of_whole else {}
        yield Sharding("rows", Sample(args, calls), dict.fromkeys(rows, 0), 0, exchanged)


def flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def differentiable(results: Any) -> list[Tensor]:
    return [t for t in flat(results) if t.requires_grad]


def check(info: OpInfo, sharding: Sharding, mesh: Any, declared: bool) -> dict[str, int]:
    """Compare value and gradients with one process, and return the counts of collectives."""
    sample = sharding.sample
    calls = {**dict(enumerate(sample.args)), **sample.kwargs}
    whole = {k: t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for k, t in calls.items()}
    spread = dict(whole)
    for key, t in whole.items():
        if isinstance(t, Tensor):
            placement = Shard(sharding.dims[key]) if key in sharding.dims else Replicate()
            spread[key] = distribute_tensor(t.detach(), mesh, [placement]).requires_grad_(t.requires_grad)

    def call(values: dict[Any, Any]) -> Any:
        kwargs = {key: value for key, value in values.items() if isinstance(key, str)}
        return info.function(*(values[at] for at in range(len(sample.args))), **kwargs)

    expected = call(whole)
    torch.manual_seed(0)
    grads = [torch.randn(t.shape) for t in differentiable(expected)]
    with CommDebugMode() as communication:
        results = call(spread)
        spread_grads = []
        for t, grad in zip(differentiable(results), grads):
            placement = t.placements[0]
            whole_grad = Replicate() if placement.is_partial() else placement
            spread_grads.append(distribute_tensor(grad, mesh, [whole_grad], src_data_rank=None))
        if grads:
            torch.autograd.backward(differentiable(results), spread_grads)
    exchanged = {op.__name__.removesuffix("_"): n for op, n in communication.get_comm_counts().items()}
    for ours, theirs in zip(flat(results), flat(expected)):
        assert isinstance(ours, DTensor)
        torch.testing.assert_close(ours.full_tensor(), theirs)
        if ours.ndim and declared:
            named = {"partial": Partial(), "replicated": Replicate()}
            wanted = named[sharding.result] if isinstance(sharding.result, str) else Shard(sharding.result)
            assert ours.placements == (wanted,), ours.placements
    if grads:
        torch.autograd.backward(differentiable(expected), grads)
    for key, t in whole.items():
        if isinstance(t, Tensor) and t.grad is not None:
            torch.testing.assert_close(spread[key].grad.full_tensor(), t.grad)
    return exchanged


def mixtures_agree() -> None:
    """Check results on a 2D mesh whose dimensions shard different dimensions of the tensors."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2))
    x, rank = torch.randn(6, 9, 4, requires_grad=True), torch.randint(-1, 5, (6, 9))
    for placements in ([Shard(0), Shard(1)], [Shard(1), Shard(0)], [Shard(2), Replicate()], [Shard(0), Shard(0)]):
        ours = distribute_tensor(x.detach(), mesh, placements).requires_grad_()
        y = custom_ops.relu(ours)
        custom_ops.margin_ranking_loss(y, ours * 2, ours.detach()).backward()
        (expected,) = torch.autograd.grad(custom_ops.margin_ranking_loss(custom_ops.relu(x), x * 2, x.detach()), x)
        torch.testing.assert_close(ours.grad.full_tensor(), expected)
    for placements in ([Shard(0), Shard(1)], [Shard(1), Shard(2)], [Shard(1), Shard(1)]):
        ours = distribute_tensor(x.detach(), mesh, placements).requires_grad_()
        spread_rank = distribute_tensor(rank, mesh, [Replicate()] * 2)
        for reduce in ("sum", "mean"):
            sums = custom_ops.voxel_sum(ours, spread_rank, 5, reduce)
            torch.testing.assert_close(sums.full_tensor(), custom_ops.voxel_sum(x, rank, 5, reduce))


def rows_and_words_agree() -> None:
    """Check a loss over a catalogue whose rows and words are sharded in different dimensions of a mesh."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2))
    x, weight, target = torch.randn(5, 3), torch.randn(7, 3), torch.tensor([0, 6, 3, -100, 2])
    rows, words = [Shard(0), Replicate()], [Replicate(), Shard(0)]
    spread = [distribute_tensor(t, mesh, p) for t, p in ((x, rows), (weight, words), (target, rows))]
    of_spread, of_whole = [t.requires_grad_() for t in spread[:2]], [t.requires_grad_() for t in (x, weight)]
    found = custom_ops.linear_log_prob(*of_spread, spread[2], scale=2.0)
    expected = custom_ops.linear_log_prob(*of_whole, target, scale=2.0)
    factors = torch.linspace(-1, 1, 5)
    of_rows = distribute_tensor(factors, mesh, rows)
    for ours, right in zip(found, expected):
        torch.testing.assert_close(ours.full_tensor(), right)
    own = torch.autograd.grad(sum((t * of_rows).sum() for t in found), of_spread)
    for ours, right in zip(own, torch.autograd.grad(sum((t * factors).sum() for t in expected), of_whole)):
        torch.testing.assert_close(ours.full_tensor(), right)


def queries_and_keys_agree() -> None:
    """Check contrastive losses whose queries and keys are sharded in different dimensions of a mesh, or in the same."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2))
    query, key, mask = torch.randn(5, 3), torch.randn(7, 3), torch.rand(5, 7) < 0.7
    target = torch.tensor([0, 6, 3, 1, 2], dtype=torch.int32)
    pairs = {"query_group": torch.arange(5) // 2, "key_group": torch.arange(7) // 3, "mask": mask}
    rows, words, whole = [Shard(0), Replicate()], [Replicate(), Shard(0)], [Replicate()] * 2
    sigmoid = {"bias": torch.tensor(-1.0, requires_grad=True)}
    for places in ((rows, words), (words, words)):
        for function, own, chosen in (
            (custom_ops.info_nce_loss, {}, {1: target}),
            (custom_ops.sigmoid_contrastive_loss, sigmoid, {1: target}),
            (custom_ops.sigmoid_contrastive_loss, {}, {"positive": mask.roll(1)}),
        ):
            spread = [distribute_tensor(t, mesh, p).requires_grad_() for t, p in zip((query, key), places)]
            plain = [t.clone().requires_grad_() for t in (query, key)]
            learnt = torch.tensor(0.7, requires_grad=True)
            options = {**pairs, **own, "temperature": learnt, "reduction": "none"}
            found = []
            for inputs, put in ((spread, lambda t: distribute_tensor(t, mesh, whole)), (plain, lambda t: t)):
                others = {name: put(t) if name in pairs else t for name, t in options.items()}
                asked = {name: put(t) for name, t in chosen.items()}
                loss = function(*inputs, asked.pop(1, None), **others, **asked)
                factors = put(torch.linspace(-1, 1, 5))
                leaves = [*inputs, learnt, *own.values()]
                found.append([loss, *torch.autograd.grad((loss * factors).sum(), leaves)])
            for ours, right in zip(*found):
                torch.testing.assert_close(ours.full_tensor() if isinstance(ours, DTensor) else ours, right)


def own_geometry_agrees() -> None:
    """Check that each process can sort its own points, for the op, the layer and a second derivative, without
    exchange.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x, rank = torch.randn(9, 4, requires_grad=True), torch.randint(-1, 5, (9,))
    ours = distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_()
    spread_rank = distribute_tensor(rank, mesh, [Shard(0)])
    with CommDebugMode() as communication:
        csr = custom_ops.voxel_csr(spread_rank.to_local(), 5)
        sums = custom_ops.voxel_sum(ours, spread_rank, 5, csr=csr)
        layer = custom_ops.VoxelSum(5)(ours, spread_rank)
    assert communication.get_total_counts() == 0
    for result in (sums, layer):
        torch.testing.assert_close(result.full_tensor(), custom_ops.voxel_sum(x, rank, 5))
    with pytest.raises(NotImplementedError, match="expected dimension N of N->N,V whole"):
        custom_ops.voxel_csr(spread_rank, 5)
    with pytest.raises(NotImplementedError, match="expected dimension P"):
        custom_ops.voxel_sum(ours, spread_rank, 5, "max")

    def second(x: Tensor, rank: Tensor, whole: Any) -> Tensor:
        y = whole(custom_ops.voxel_sum(x * x, rank, 5))
        (grad,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
        return torch.autograd.grad((grad * grad).sum(), x)[0]

    ours = ours.detach().requires_grad_()  # CommDebugMode left hooks on the old tensor
    of_ours = second(ours, spread_rank, shards.summed_up)
    torch.testing.assert_close(of_ours.full_tensor(), second(x, rank, lambda y: y))


def compiled_agrees() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x, ranks = torch.randn(8, 6, requires_grad=True), torch.randint(-1, 5, (8,))
    ours, spread_ranks = distribute_tensor(x.detach(), mesh, [Shard(0)]), distribute_tensor(ranks, mesh, [Shard(0)])

    def loss_of(x: Tensor, ranks: Tensor) -> Tensor:
        x = custom_ops.relu(x)
        of_scores = custom_ops.pairwise_logistic_loss(x, torch.ones_like(x).cumsum(1), reduction="sum")
        return of_scores + custom_ops.voxel_sum(x, ranks, 5)[2:].sum()

    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)(ours.requires_grad_(), spread_ranks)
    compiled.full_tensor().backward()
    (expected,) = torch.autograd.grad(loss_of(x, ranks), x)
    torch.testing.assert_close(ours.grad.full_tensor(), expected)


def every_op_agrees() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    failures = []
    for name, info in FUNCTIONS.items():
        torch.manual_seed(0)
        shardings = list(by_rows(info)) if info.shardings is None else info.shardings()
        for number, sharding in enumerate(shardings):
            label = f"{name}, over {sharding.over}, call {number}"
            try:
                exchanged = check(info, sharding, mesh, info.shardings is not None)
            except Exception as error:
                if not (info.not_sharded and isinstance(error, NotImplementedError)):
                    failures.append(f"{label}: {type(error).__name__}: {error}")
                continue
            if info.not_sharded:
                failures.append(f"{label}: expected an error, because {info.not_sharded}")
            expected = [sharding.exchanged]
            if info.shardings is None and "reduction" in inspect.signature(info.function).parameters:
                expected.append({"all_reduce": 1})  # counts the lists of a mean
            if exchanged not in expected:
                failures.append(f"{label}: exchanged {exchanged}, expected one of {expected}")
        if not shardings:
            failures.append(f"{name}: nothing to spread")
    assert not failures, "\n".join(failures)
    mixtures_agree()
    rows_and_words_agree()
    queries_and_keys_agree()
    own_geometry_agrees()


# The compiled cases run in processes of their own, as AOTAutograd has been seen to fail after eager calls of the ops.
GROUPS = {"4": (4, every_op_agrees), "2, compiled": (2, compiled_agrees), "2": (2, every_op_agrees)}
# Four processes show what two do, and one of them has no rows.
QUICK = ["4", "2, compiled"]


@pytest.fixture(scope="module")
def errors(full: bool) -> dict[str, str]:
    """Return the error of each group of processes; one program forks them all."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, __file__, *(GROUPS if full else QUICK)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("group", [*QUICK, pytest.param("2", marks=pytest.mark.full)])
def test_all_processes_agree_with_one(group: str, errors: dict[str, str]) -> None:
    assert errors[group] == ""


if __name__ == "__main__":
    found = dict.fromkeys(sys.argv[1:], "")
    for group in found:
        processes, worker = GROUPS[group]
        try:
            together(processes, worker)
        except Exception as error:
            found[group] = str(error)
    print(json.dumps(found))
