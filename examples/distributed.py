"""Two of the examples trained by several processes with DistributedDataParallel, FSDP2 or tensor parallelism, on any
CPU.

    torchrun --standalone --nproc-per-node 2 -m examples.distributed --task rank --parallel ddp

At each step the loss and the gradients must equal those of one process with the same weights and the whole batch; the
command fails otherwise. It trains in float64: in float32 some activation is always so close to the kink of ReLU that
another order of summation moves it to the other side. With ``--checkpoint FOLDER`` the same command, started again,
continues where it was interrupted.

With ``ddp`` and ``fsdp`` each process takes its share of the pairs or scenes; ``fsdp`` also shards parameters,
gradients and Adam's moments. With ``tp`` each process sees all data. The ranker's first layer is sharded by its outputs
and its second by its inputs, so the ReLU between them runs on a shard of the features. Of Lift-Splat only the middle is
sharded, by the channels that are pooled: each process sums its own channels into the grid and multiplies them with its
columns of the next convolution. Every process computes the networks of the cameras and of the grid in full; models of
this size gain nothing from sharding them.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import custom_ops
from examples import lift_splat, rank_mslr
from examples.agreement import Agreement
from examples.data import DataError, Ranking, load_mslr

Loss = Callable[[nn.Module, Any, slice], Tensor]  # takes the model, the batch and this process's part of it

MARGIN = 1.0
# The approximate number of terms in the sums between an input and the loss.
CHAIN = {"rank": 136 + 128 + 64 + (1 << 14), "lift_splat": lift_splat.CHAIN}


class PairSampler:
    """A sampler that draws a query, then a pair of its pages with different labels, each uniformly."""

    def __init__(self, data: Ranking) -> None:
        same_query = data.queries[:, None] == data.queries[None, :]
        pairs = np.argwhere(same_query & (data.labels[:, None] > data.labels[None, :]))
        self.pairs = torch.from_numpy(pairs)  # sorted by query, because the pages are
        self.counts = torch.from_numpy(np.unique(data.queries[pairs[:, 0]], return_counts=True)[1])
        self.starts = self.counts.cumsum(0) - self.counts
        self.generator = torch.Generator().manual_seed(0)

    def draw(self, size: int) -> tuple[Tensor, Tensor]:
        query = torch.randint(len(self.counts), (size,), generator=self.generator)
        fraction = torch.rand(size, generator=self.generator, dtype=torch.float64)
        better, worse = self.pairs[self.starts[query] + (fraction * self.counts[query]).long()].unbind(1)
        return better, worse


def rank(pairs: int = 1 << 14) -> tuple[nn.Module, Iterator[Any], Loss, int]:
    train = load_mslr("train")
    pages = rank_mslr.standardise(train, train)[0].double()
    sampler = PairSampler(train)

    def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor], part: slice) -> Tensor:
        scores = model(pages)
        better, worse = (scores.index_select(0, which[part]) for which in batch)
        return custom_ops.margin_ranking_loss(better, worse, torch.ones(()), margin=MARGIN)

    batches = (sampler.draw(pairs) for _ in itertools.count())
    return rank_mslr.Scorer(pages.shape[1], custom_ops.relu), batches, loss_of, pairs


def lift(scenes: int = 16) -> tuple[nn.Module, Iterator[Any], Loss, int]:
    data = lift_splat.Scenes.draw(scenes, 0)
    generator = torch.Generator().manual_seed(0)

    def loss_of(model: nn.Module, batch: lift_splat.Scenes, part: slice) -> Tensor:
        return lift_splat.loss_of(model(*(t.double() for t in batch[part].inputs)), batch[part].occupied)

    size = lift_splat.BATCH
    batches = (data[torch.randperm(scenes, generator=generator)[:size]] for _ in itertools.count())
    return lift_splat.LiftSplatNet(), batches, loss_of, size


class PoolChannels(ParallelStyle):
    """A style that runs `custom_ops.LiftSplat` on each process's own channels, without any exchange."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        def cut(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
            depth, features = (DTensor.from_local(t, mesh, [Replicate()]) for t in inputs[:2])
            return depth, features.redistribute(placements=[Shard(2)]), *inputs[2:]

        module.register_forward_pre_hook(cut)
        return module


class RowwiseConv(ParallelStyle):
    """A style that convolves each process's own input channels and sums the results over the processes."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Conv2d) and module.bias is not None
        bias = module.bias
        module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Shard(1)]))

        def forward(x: Any) -> Tensor:
            weight: Any = module.weight
            own = F.conv2d(x.to_local(), weight.to_local(), None, module.stride, module.padding)
            return DTensor.from_local(own, mesh, [Partial()]).full_tensor() + bias[:, None, None]

        module.forward = forward  # type: ignore[assignment, method-assign]
        return module


PLANS: dict[str, dict[str, ParallelStyle]] = {
    "rank": {"layers.0": ColwiseParallel(), "layers.1": RowwiseParallel()},
    "lift_splat": {"lift_splat": PoolChannels(), "picture.0": RowwiseConv()},
}


def parallelise(model: nn.Module, task: str, parallel: str, mesh: DeviceMesh) -> nn.Module:
    if parallel == "ddp":
        return DistributedDataParallel(model)
    if parallel == "tp":
        return parallelize_module(model, mesh, PLANS[task])
    for module in list(model.modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


class Checkpoints:
    """The model, optimiser and losses in FOLDER/step-N, a name that a folder gets only once it is complete."""

    def __init__(self, folder: Path | None, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        self.folder, self.model, self.optimiser = folder, model, optimiser

    def save(self, losses: list[float]) -> None:
        if self.folder is None:
            return
        path = self.folder / f"step-{len(losses):06}"
        partial = path.with_suffix(".partial")
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier()
        model, optimiser = get_state_dict(self.model, self.optimiser)
        save({"model": model, "optimiser": optimiser, "losses": losses}, checkpoint_id=partial)
        if dist.get_rank() == 0:
            self.publish(partial, path)
        dist.barrier()

    @staticmethod
    def publish(partial: Path, path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)

    def load(self) -> list[float]:
        """Restore model and optimiser from the latest checkpoint and return the losses up to it."""
        found = [p for p in self.folder.glob("step-*") if not p.suffix] if self.folder else []
        if not found:
            return []
        model, optimiser = get_state_dict(self.model, self.optimiser)
        state: dict[str, Any] = {"model": model, "optimiser": optimiser, "losses": []}
        load(state, checkpoint_id=max(found))
        set_state_dict(self.model, self.optimiser, model_state_dict=state["model"], optim_state_dict=state["optimiser"])
        return list(state["losses"])


def train(task: str, parallel: str, steps: int, folder: Path | None = None, every: int = 5) -> bool:
    """Train, and return whether loss and gradients equalled those of one process at each step."""
    torch.manual_seed(0)
    model, batches, loss_of, size = rank() if task == "rank" else lift()
    model.double()
    alone, all_batches = copy.deepcopy(model), list(itertools.islice(batches, steps))
    processes, process = dist.get_world_size(), dist.get_rank()
    if size % processes:
        raise ValueError(f"--nproc-per-node: expected a divisor of {size}, got {processes}")
    share = size // processes
    part = slice(None) if parallel == "tp" else slice(process * share, (process + 1) * share)

    model = parallelise(model, task, parallel, init_device_mesh("cpu", (processes,)))
    optimiser = adam(model)
    checkpoints = Checkpoints(folder, model, optimiser)
    losses = checkpoints.load()
    if losses and process == 0:
        print(f"resumed after step {len(losses)}", flush=True)
    agreement = Agreement("one process")
    for batch in all_batches[len(losses) :]:
        for own, parameter in zip(alone.parameters(), model.parameters()):
            own.data.copy_(whole(parameter.detach()))
        loss = step(model, optimiser, loss_of, batch, part)
        dist.all_reduce(loss)
        losses.append(loss.item() / processes)
        gradients = [whole(parameter.grad) for parameter in model.parameters()]
        if process == 0:
            expected = loss_of(alone, batch, slice(None))
            expected_gradients = torch.autograd.grad(expected, list(alone.parameters()))
            agreement.compare_networks((loss / processes, gradients), (expected, expected_gradients), CHAIN[task])
            print(f"step {len(losses)}: loss {losses[-1]:.6f}", flush=True)
        if len(losses) % every == 0 or len(losses) == steps:
            checkpoints.save(losses)
    holds = torch.ones(())
    if process == 0:
        check = agreement.check()
        holds.fill_(check.holds)
        print(f"{task}, {parallel}, {processes} processes: loss {losses[0]:.4f} to {losses[-1]:.4f} in {steps} steps")
        verdict = "" if check.holds else "NOT "
        print(f"largest gap to one process, in units of its bound: {check.value:.2g}, {verdict}at most 1", flush=True)
    dist.broadcast(holds, 0)
    return bool(holds)


def whole(tensor: Any) -> Tensor:
    """Return the whole of a parameter or gradient that may be sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3, foreach=False)  # foreach can't mix DTensors and tensors


def step(model: nn.Module, optimiser: torch.optim.Optimizer, loss_of: Loss, batch: Any, part: slice) -> Tensor:
    optimiser.zero_grad()
    loss = loss_of(model, batch, part)
    loss.backward()
    optimiser.step()
    return loss.detach()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="torchrun -m examples.distributed", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--task", choices=CHAIN, default="rank")
    parser.add_argument("--parallel", choices=("ddp", "fsdp", "tp"), default="ddp")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="save into it, and resume from it")
    parser.add_argument("--every", type=int, default=5, metavar="STEPS", help="between two checkpoints")
    options = parser.parse_args(argv)
    if "RANK" not in os.environ:
        parser.error("start it with torchrun, e.g. torchrun --standalone --nproc-per-node 2 -m ...")
    dist.init_process_group("gloo")
    try:
        return 0 if train(options.task, options.parallel, options.steps, options.checkpoint, options.every) else 1
    except DataError as error:
        print(f"error: {error}")
        return 2
    finally:
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End the process at once, after ``destroy_process_group``.

    torch's caches may still hold the process group, if there were DTensors, and gloo's threads outlive that call. A
    thread that frees its last tensor while the interpreter shuts down aborts the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main())
