"""The ops on DTensors over two processes: the results of one process, without hidden gathers."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import custom_ops
from custom_ops.examples.rank_mslr import LIST_LOSSES
from custom_ops.voxel import segment_sum


def worker() -> None:
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    for placement in (Shard(0), Replicate()):
        for activation in (custom_ops.relu, custom_ops.leaky_relu, custom_ops.hardtanh, custom_ops.squared_relu):
            activation_agrees(activation, mesh, placement)
        bias_agrees(mesh, placement)
        margin_ranking_loss_agrees(mesh, placement)
        shaped_gradients_agree(mesh, placement)
        list_losses_agree(mesh, placement)
    for placement in (Shard(1), Replicate()):
        segment_sum_agrees(mesh, placement)
    mixed = init_device_mesh("cpu", (2, 1))
    for placements in ([Shard(0), Replicate()], [Replicate(), Shard(0)], [Shard(0), Shard(1)], [Shard(1), Replicate()]):
        mixtures_agree(mixed, placements)
    dist.destroy_process_group()


def activation_agrees(activation, mesh, placement) -> None:
    x = torch.randn(5, 7, requires_grad=True)  # odd: each rank's mask has padding bits of its own
    grad = torch.randn(5, 7)
    sharded = distribute_tensor(x.detach(), mesh, [placement]).requires_grad_()
    sharded_grad = distribute_tensor(grad, mesh, [placement])
    with CommDebugMode() as communication:
        y = activation(sharded)
        y.backward(sharded_grad)
    assert communication.get_total_counts() == 0
    activation(x).backward(grad)
    torch.testing.assert_close(y.full_tensor(), activation(x))
    torch.testing.assert_close(sharded.grad.full_tensor(), x.grad)


def bias_agrees(mesh, placement) -> None:
    """One all-reduce where the rows are spread: of the bias's gradient, when it is asked for in full."""
    for dim in (0, 1):
        x, bias = torch.randn(5, 7, requires_grad=True), torch.randn((5, 7)[dim], requires_grad=True)
        sharded = distribute_tensor(x.detach(), mesh, [placement]).requires_grad_()
        replicated = distribute_tensor(bias.detach(), mesh, [Replicate()]).requires_grad_()
        y = custom_ops.bias_leaky_relu(sharded, replicated, 0.3, dim)
        y.sum().backward()
        expected = custom_ops.bias_leaky_relu(x, bias, 0.3, dim)
        expected.sum().backward()
        torch.testing.assert_close(y.full_tensor(), expected)
        torch.testing.assert_close(sharded.grad.full_tensor(), x.grad)
        torch.testing.assert_close(replicated.grad.full_tensor(), bias.grad)


def mixtures_agree(mesh, placements) -> None:
    """Placements that differ between mesh dimensions: right, though what isn't sharded by rows is moved."""
    x = torch.randn(5, 8, requires_grad=True)
    sharded = distribute_tensor(x.detach(), mesh, placements).requires_grad_()
    y = custom_ops.relu(sharded)
    custom_ops.margin_ranking_loss(y, sharded * 2, sharded.detach()).backward()
    custom_ops.margin_ranking_loss(custom_ops.relu(x), x * 2, x.detach()).backward()
    torch.testing.assert_close(sharded.grad.full_tensor(), x.grad)


def margin_ranking_loss_agrees(mesh, placement) -> None:
    for reduction in ("mean", "sum", "none"):
        tensors = [torch.randn(5, 3, requires_grad=True) for _ in range(3)]
        sharded = [distribute_tensor(t.detach(), mesh, [placement]).requires_grad_() for t in tensors]
        loss = custom_ops.margin_ranking_loss(*sharded, 0.5, reduction)
        expected = custom_ops.margin_ranking_loss(*tensors, 0.5, reduction)
        with CommDebugMode() as communication:
            loss.sum().backward()
        assert communication.get_total_counts() == 0
        expected.sum().backward()
        torch.testing.assert_close(loss.full_tensor(), expected)
        for ours, whole in zip(sharded, tensors):
            torch.testing.assert_close(ours.grad.full_tensor(), whole.grad)


def shaped_gradients_agree(mesh, placement) -> None:
    x, grad = torch.randn(4, 6), torch.randn(4, 6)
    sharded, sharded_grad = (distribute_tensor(t, mesh, [placement]) for t in (x, grad))
    shapings = (
        lambda x: custom_ops.reverse_gradient(x, 0.5),
        lambda x: custom_ops.clip_gradient_norm(x, 1.0, dim=1),
        lambda x: custom_ops.straight_through(x.round(), x),
        lambda x: custom_ops.surrogate_gradient(x, "triangle"),
    )
    for shaping in shapings:
        ours, whole = sharded.detach().requires_grad_(), x.clone().requires_grad_()
        with CommDebugMode() as communication:
            y = shaping(ours)
            y.backward(sharded_grad)
        assert communication.get_total_counts() == 0
        shaping(whole).backward(grad)
        torch.testing.assert_close(y.full_tensor(), shaping(x))
        torch.testing.assert_close(ours.grad.full_tensor(), whole.grad)


def list_losses_agree(mesh, placement) -> None:
    """Sharded over the lists: each process has whole ones, and no more than a mean's sums are communicated."""
    scores, labels = torch.randn(5, 6), torch.randint(0, 4, (5, 6))
    mask = torch.rand(5, 6) < 0.8
    for name, loss_fn in LIST_LOSSES.items():
        if name == "spearman_loss":
            continue  # the labels are ranked by ops of torch that have no sharding rule
        for masks in ({}, {"mask": mask}):
            whole = scores.clone().requires_grad_()
            ours, sharded_labels = (distribute_tensor(t, mesh, [placement]) for t in (scores, labels))
            ours = ours.requires_grad_()
            sharded_masks = {key: distribute_tensor(t, mesh, [placement]) for key, t in masks.items()}
            expected = loss_fn(whole, labels, reduction="none", **masks)
            with CommDebugMode() as communication:
                losses = loss_fn(ours, sharded_labels, reduction="none", **sharded_masks)
                losses.sum().backward()
            assert communication.get_total_counts() == 0, name
            expected.sum().backward()
            torch.testing.assert_close(losses.full_tensor(), expected)
            torch.testing.assert_close(ours.grad.full_tensor(), whole.grad)
            mean = loss_fn(ours, sharded_labels, **sharded_masks)
            torch.testing.assert_close(mean.full_tensor(), loss_fn(whole, labels, **masks))


def segment_sum_agrees(mesh, placement) -> None:
    indptr = torch.tensor([0, 2, 2, 5, 6])
    x = torch.randn(6, 4, requires_grad=True)
    sharded = distribute_tensor(x.detach(), mesh, [placement]).requires_grad_()
    whole = distribute_tensor(indptr, mesh, [Replicate()])
    with CommDebugMode() as communication:
        sums = segment_sum(sharded, whole)
        (sums * sums).sum().backward()
    assert communication.get_total_counts() == 0
    expected = segment_sum(x, indptr)
    (expected * expected).sum().backward()
    torch.testing.assert_close(sums.full_tensor(), expected)
    torch.testing.assert_close(sharded.grad.full_tensor(), x.grad)


def test_two_processes_agree_with_one() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


if __name__ == "__main__":
    worker()
