"""DTensors in ops whose shards can't be described by a rule for a single op.

Such an op runs in each process on the process's own part of its arguments. Letters say which dimensions may be sharded:
``shards.in_shards(run, "apc,ap->aVc", x, weight)``. If a rule for one op is enough, `sharding` is simpler.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["batch_labels", "in_shards", "is_sharded", "replicated", "summed_up"]


def is_sharded(*values: Any) -> bool:
    """Return whether one of the values is a DTensor, without importing DTensor's module.

    Example:
        >>> import torch
        >>> from custom_ops import shards
        >>> shards.is_sharded(torch.ones(3), None)
        False
    """
    for value in values:  # noqa: SIM110 (a generator would double the time)
        if hasattr(value, "device_mesh"):
            return True
    return False


def summed_up(x: Any) -> Any:
    """Return the DTensor ``x`` with every ``Partial`` placement reduced to ``Replicate``.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from torch.distributed.tensor import Shard, distribute_tensor
        >>> from custom_ops import shards
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = init_device_mesh("cpu", (1,))
        >>> total = distribute_tensor(torch.ones(4), mesh, [Shard(0)]).sum()
        >>> total.placements, shards.summed_up(total).placements
        ((Partial(sum),), (Replicate(),))
        >>> dist.destroy_process_group()
    """
    from torch.distributed.tensor import Replicate

    return x.redistribute(placements=[Replicate() if p.is_partial() else p for p in x.placements])


def batch_labels(dims: int) -> str:
    """Return labels of ``dims`` leading dimensions for `in_shards`.

    Example:
        >>> from custom_ops import shards
        >>> shards.batch_labels(2) + "N"
        'abN'
    """
    return string.ascii_lowercase[:dims]


def replicated(plain: Tensor, like: Any) -> Any:
    """Return ``plain``, which is the same in every process, as a DTensor on the mesh of ``like``.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from torch.distributed.tensor import Shard, distribute_tensor
        >>> from custom_ops import shards
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = init_device_mesh("cpu", (1,))
        >>> x = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
        >>> shards.replicated(torch.arange(4), x).placements
        (Replicate(),)
        >>> dist.destroy_process_group()
    """
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    return DTensor.from_local(plain, mesh, [Replicate()] * mesh.ndim, run_check=False)


def in_shards(run: Callable[..., Any], labels: str, *tensors: Any) -> Any:
    """Run ``run`` in each process on its own part of DTensors whose parts no rule for single ops can describe.

    ``labels`` names the dimensions of the tensors and of the results, with a letter each: "bpc,bp->bVc". A dimension
    with a small letter may be sharded in any number of dimensions of the mesh. Replicated tensors with the same
    dimension are sharded alike, which moves no data. If the result lacks a sharded dimension, ``run`` must be a sum
    over it, and the result is ``Partial``. A dimension with a capital letter must be whole on each process. A plain
    tensor among DTensors is taken as this process's part; None stays None. The derivative is that of ``run``: gradients
    are placed like the tensors, and the gradient of a replicated tensor is a sum over the processes.

    Raises ``NotImplementedError`` if a dimension with a capital letter is sharded.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from torch.distributed.tensor import Shard, distribute_tensor
        >>> from custom_ops import shards
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = init_device_mesh("cpu", (1,))
        >>> x = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
        >>> shards.in_shards(lambda rows: rows.sum(0), "nc->c", x).placements
        (Partial(sum),)
        >>> dist.destroy_process_group()
    """
    from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

    ins, outs = (side.split(",") for side in labels.split("->"))
    given = [(t, names) for t, names in zip(tensors, ins) if isinstance(t, DTensor)]
    mesh = given[0][0].device_mesh
    cuts = []  # the dimension that each dimension of the mesh shards
    for at in range(mesh.ndim):
        places = ((t.placements[at], names) for t, names in given)
        cuts.append(next((names[place.dim] for place, names in places if isinstance(place, Shard)), ""))
        if cuts[-1].isupper():
            raise NotImplementedError(
                f"{getattr(run, '__name__', run)}: expected dimension {cuts[-1]} of {labels} whole on every process, "
                f"got it sharded; redistribute it, e.g. to Replicate()"
            )

    def placed(names: str, otherwise: Placement) -> list[Placement]:
        return [Replicate() if not cut else Shard(names.index(cut)) if cut in names else otherwise for cut in cuts]

    def part(t: Any, names: str) -> Any:
        if not isinstance(t, DTensor):
            return t
        return _Part.apply(t.redistribute(placements=placed(names, Replicate())), placed(names, Partial()))

    def whole(result: Tensor, names: str) -> Any:
        shape = [sizes[name] if name in cuts else n for name, n in zip(names, result.shape)]
        return _Whole.apply(result, mesh, placed(names, Partial()), placed(names, Replicate()), shape)

    sizes = {name: n for t, names in given for name, n in zip(names, t.shape)}
    results = run(*(part(t, names) for t, names in zip(tensors, ins)))
    if isinstance(results, Tensor):
        return whole(results, *outs)
    return tuple(whole(result, names) for result, names in zip(results, outs))


class _Part(torch.autograd.Function):
    """This process's part of a DTensor, whose gradient has the placement ``dual``.

    It and its adjoint can be differentiated to any order. With ``to_local`` and ``from_local``, the second derivative
    of a ``Partial`` result lacks the terms of other processes.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, dual: Any) -> Any:
        ctx.mesh, ctx.placements, ctx.dual, ctx.shape = x.device_mesh, x.placements, dual, x.shape
        ctx.set_materialize_grads(False)
        return x.to_local()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return None if grad is None else _Whole.apply(grad, ctx.mesh, ctx.dual, ctx.placements, ctx.shape), None


class _Whole(torch.autograd.Function):
    """The DTensor made of the processes' parts, whose gradient is redistributed to ``dual``."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, mesh: Any, placements: Any, dual: Any, shape: Any) -> Any:
        from torch.distributed.tensor import DTensor

        ctx.placements, ctx.dual = placements, dual
        ctx.set_materialize_grads(False)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(part.contiguous(), mesh, placements, shape=torch.Size(shape), stride=stride)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        part = None if grad is None else _Part.apply(grad.redistribute(placements=ctx.dual), ctx.placements)
        return part, None, None, None, None
