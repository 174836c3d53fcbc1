"""An operator's rules for vmap, autocast, DTensor and compilers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from custom_ops.library import _dtensor
from custom_ops.library._defined import DEFINED, add_rule, defined, forget_compiled, with_defaults
from custom_ops.library._torch import (
    FunctionalTensor,
    FunctionalTensorMode,
    OpOverload,
    is_packaging,
    register_autocast,
)

__all__ = ["autocast", "decomposition", "decompositions", "inductor", "sharding", "to_front", "vmap"]


def vmap(op: OpOverload) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register ``rule(info, in_dims, *args) -> (outputs, out_dims)`` as ``op``'s batching rule.

    See ``torch.library.register_vmap``; `to_front` helps to write one.

    Example:
        >>> import torch
        >>> from torch import Tensor
        >>> from custom_ops import library
        >>> @library.compose("docs::doubled")
        ... def doubled(x: Tensor) -> Tensor:
        ...     return 2 * x
        >>> @library.vmap(doubled)
        ... def _(info, in_dims, x):
        ...     return doubled(x), in_dims[0]
        >>> torch.func.vmap(doubled)(torch.ones(2, 1))
        tensor([[2.],
                [2.]])
    """
    op, known = defined(op)

    def decorate(rule: Callable[..., Any]) -> Callable[..., Any]:
        registered = known.vmap is not None
        known.vmap = rule

        def run(info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> Any:
            assert known.vmap is not None
            return with_defaults(op, functools.partial(known.vmap, info, in_dims))(*args, **kwargs)

        if registered:
            forget_compiled()
        else:
            add_rule(op, lambda op: torch.library.register_vmap(op.name(), run, lib=known.library))
        return rule

    return decorate


def to_front(x: Tensor, in_dim: int | None, batch: int) -> Tensor:
    """Return ``x`` with its vmapped dimension first, expanded to ``batch`` if it isn't vmapped.

    Example:
        >>> import torch
        >>> from custom_ops import library
        >>> library.to_front(torch.ones(2, 3), 1, 3).shape, library.to_front(torch.ones(2), None, 3).shape
        (torch.Size([3, 2]), torch.Size([3, 2]))
    """
    return x.expand(batch, *x.shape) if in_dim is None else x.movedim(in_dim, 0)


def autocast(op: OpOverload, dtype: torch.dtype, devices: Sequence[str] = ("cpu", "cuda")) -> None:
    """Compute ``op`` in ``dtype`` under autocast; an op without this rule keeps its inputs' dtypes.

    Example:
        >>> import torch
        >>> from torch import Tensor
        >>> from custom_ops import library
        >>> @library.compose("docs::in_half")
        ... def in_half(x: Tensor) -> Tensor:
        ...     return 2 * x
        >>> library.autocast(in_half, torch.bfloat16)
        >>> with torch.autocast("cpu"):
        ...     in_half(torch.ones(2)).dtype
        torch.bfloat16
    """
    op, known = defined(op)

    def rule(op: OpOverload) -> None:
        for device in devices:
            register_autocast(op, device, dtype, known.library)

    add_rule(op, rule)


def sharding(op: OpOverload) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as ``op``'s DTensor sharding rule.

    The rule takes the op's arguments (specs in place of tensors) and returns the acceptable shardings, as for
    ``torch.distributed.tensor.experimental.register_sharding``. It is registered when an op first runs with
    ``torch.distributed.tensor`` imported, as that import takes long.

    DTensor caches a rule's answer by the tensors and by the arguments from the op's first ``int`` on, so an argument
    that the rule depends on must not come before that.

    Example:
        >>> import torch
        >>> from torch import Tensor
        >>> from custom_ops import library
        >>> @library.compose("docs::sharded")
        ... def sharded(x: Tensor) -> Tensor:
        ...     return 2 * x
        >>> @library.sharding(sharded)
        ... def _(x):
        ...     from torch.distributed.tensor import Replicate, Shard
        ...
        ...     return [([p], [p]) for p in (Replicate(), *(Shard(d) for d in range(x.ndim)))]
    """
    op, _ = defined(op)

    def decorate(rule: Callable[..., Any]) -> Callable[..., Any]:
        add_rule(op, lambda op: _dtensor.register_later(op, rule))
        return rule

    return decorate


def inductor(op: OpOverload) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated composition of PyTorch ops as what a compiler gets in place of ``op``.

    Use it for pointwise ops, which Inductor then fuses with their neighbours. The kernels of ``op`` still run
    everywhere else, and ``torch.export`` keeps the op. The derivatives are still those of ``op``: AOTAutograd takes the
    composition only below them, so backward needs what the Function saves. The composition must return what the kernels
    return, contiguous, and bit for bit where it is packed, since a graph may pass it to a kernel.

    Example:
        >>> import torch
        >>> from torch import Tensor
        >>> from custom_ops import library
        >>> @library.define("docs::cubed")
        ... def cubed(x: Tensor) -> Tensor:
        ...     return torch.empty_like(x)
        >>> @library.inductor(cubed)
        ... def _(x):
        ...     return x * x * x
    """
    op, known = defined(op)

    def decorate(composition: Callable[..., Any]) -> Callable[..., Any]:
        registered = known.composition is not None
        known.composition = with_defaults(op, composition)
        if registered:
            forget_compiled()
        else:
            compiled_as(op, known.library, lambda *args: known.composition(*args))  # type: ignore[misc]
        return composition

    return decorate


def compiled_as(op: OpOverload, library: torch.library.Library, run: Callable[..., Any]) -> None:
    """Let ``run`` be what a compiler gets in place of ``op``."""

    def in_its_place(mode: Any, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Another subclass, such as a DTensor, comes first.
        foreign = any(not issubclass(cls, FunctionalTensor) for cls in types)
        if foreign or (torch.compiler.is_exporting() and not is_packaging()):
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return run(*args)

    torch.library.register_torch_dispatch(op.name(), FunctionalTensorMode, in_its_place, lib=library)


def decomposition(op: OpOverload) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated composition of PyTorch ops as what `decompositions` replaces ``op`` by.

    It is for ops that keep their kernels under ``torch.compile`` and that other runtimes don't know. An op with a
    composition for `inductor`, or one that `compose` made, needs none. The composition needs no derivative.

    Example:
        >>> import torch
        >>> from torch import Tensor
        >>> from custom_ops import library
        >>> @library.define("docs::quartered")
        ... def quartered(x: Tensor) -> Tensor:
        ...     return torch.empty_like(x)
        >>> @library.decomposition(quartered)
        ... def _(x):
        ...     return x / 4
        >>> library.decompositions()[quartered](torch.ones(1))
        tensor([0.2500])
    """

    op, known = defined(op)

    def decorate(made_of: Callable[..., Any]) -> Callable[..., Any]:
        known.decomposition = with_defaults(op, made_of)
        return made_of

    return decorate


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """Return the composition of PyTorch ops of each op that has one, for ``ExportedProgram.run_decompositions``.

    A program without custom ops runs where their kernels don't: convert it with ``torch.onnx.export``, or save it for a
    process without this package. It is as slow as PyTorch's own ops.

    Example:
        >>> import torch, custom_ops
        >>> from custom_ops import library
        >>> class Pool(torch.nn.Module):
        ...     def forward(self, x, rank):
        ...         return custom_ops.voxel_sum(x, rank, 2)
        >>> program = torch.export.export(Pool(), (torch.ones(3, 1), torch.tensor([0, 1, 1])))
        >>> program = program.run_decompositions(library.decompositions())
        >>> "custom_ops" in str(program.graph)
        False
    """
    made_of = {op: known.decomposition or known.composition or known.body for op, known in DEFINED.items()}
    return {op: decomposition for op, decomposition in made_of.items() if decomposition is not None}
