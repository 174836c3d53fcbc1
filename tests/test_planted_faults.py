"""The battery catches what it claims to catch: for every row of the matrix there is a faulty op that fails it.

All are variations of one healthy op, the elementwise product, which is closed under differentiation.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from custom_ops import library
from custom_ops.registry import OpInfo
from custom_ops.verify import BadCall, Sample, _sharding, capabilities, verify
from custom_ops.verify._case import CAPABILITIES
from custom_ops.verify._run import _converter

_names = (f"product_{i}" for i in range(1000))


def contiguous_result(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    return a.contiguous() * b.contiguous()


def flat_storage(t: Tensor) -> Tensor:
    """Return what a kernel reads if it takes the pointer and ignores the strides."""
    missing = max(t.numel() - (t.untyped_storage().nbytes() // t.itemsize - t.storage_offset()), 0)
    memory = torch.cat([t.as_strided((t.numel() - missing,), (1,)), t.new_full((missing,), 7.0)])
    return memory.view(t.shape)


def pair_rule(op: Any, change: Callable[[Tensor], Tensor] = lambda b: b) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, a: Tensor, b: Tensor) -> Any:
        a, b = (library.to_front(t, d, info.batch_size) for t, d in zip((a, b), in_dims))
        return op(a, change(b)), 0

    return rule


def product(
    kernel: Callable[..., Tensor] = multiply,
    fake: Callable[..., Tensor] = contiguous_result,
    backward: Callable[..., Any] | None = None,
    jvp: Callable[..., Any] | None = None,
    vmap: Callable[[Any], Any] | None = pair_rule,
) -> Any:
    """Return the elementwise product as an op with some parts replaced; backward and jvp get the op first."""
    op = library.define(f"planted::{next(_names)}")(fake)
    library.kernel(op, "cpu", "cuda")(kernel)
    if vmap is not None:
        library.vmap(op)(vmap(op))
    backward = backward or (lambda op, grad, a, b: (op(grad, b), op(grad, a)))
    jvp = jvp or (lambda op, da, db, a, b: _sum(None if da is None else op(da, b), None if db is None else op(a, db)))

    class Product(library.Function, op=op):
        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return backward(op, grad, *ctx.saved_tensors)

        @staticmethod
        def jvp(ctx: Any, da: Tensor | None, db: Tensor | None) -> Any:
            return jvp(op, da, db, *ctx.saved_tensors)

    return op


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    return [
        Sample((leaf(4, 3), leaf(4, 3)), dynamic={0: 0, 1: 0}),
        Sample((leaf(2, 3), leaf(2, 3).detach())),
    ]


class Layer(torch.nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.function(a, b)


@dataclass
class Fault:
    """A faulty function, which ``make`` returns, and the ``rows`` that must fail; ``options`` go to `verify`."""

    make: Callable[[], Callable[..., Any]]
    rows: list[str]
    options: dict[str, Any] = field(default_factory=dict)
    samples: Callable[[], list[Any]] = samples


# --- the faults --------------------------------------------------------------------------------


def wrong_second_derivative() -> Any:
    inner = product(backward=lambda op, grad, a, b: (op(grad, b), 2 * op(grad, a)))
    return product(backward=lambda op, grad, a, b: (inner(grad, b), inner(grad, a)))


def tangents_of_register_autograd() -> Any:
    """Return an op by torch.library alone, whose torch.func.jvp silently returns zeros."""

    @torch.library.custom_op(f"planted::{next(_names)}", mutates_args=())
    def op(a: Tensor, b: Tensor) -> Tensor:
        return a * b

    op.register_fake(lambda a, b: torch.empty_like(a))
    op.register_autograd(
        lambda ctx, grad: (grad * ctx.saved_tensors[1], grad * ctx.saved_tensors[0]),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    return op


def no_fake_kernel() -> Any:
    @torch.library.custom_op(f"planted::{next(_names)}", mutates_args=())
    def op(a: Tensor, b: Tensor) -> Tensor:
        return a * b

    return op


def written_in_place(a: Tensor, b: Tensor) -> Tensor:
    result = a * b
    a.mul_(2)
    return result


def written_behind_the_version_counter(a: Tensor, b: Tensor) -> Tensor:
    result = a * b
    b.data.mul_(2)
    return result


def gradient_written_in_place(op: Any, grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    grads = op(grad, b), op(grad, a)
    grad.data.mul_(2)
    return grads


def aliasing() -> Any:
    op = product(kernel=lambda a, b: a.view(a.shape))
    return lambda a, b: op(a, b)


def expanded_gradients_ignored() -> Any:
    adjoint = product(kernel=lambda grad, t: flat_storage(grad) * t.contiguous())
    return product(backward=lambda op, grad, a, b: (adjoint(grad, b), adjoint(grad, a)))


def noisy(a: Tensor, b: Tensor) -> Tensor:
    return a * b * (1 + 4 * torch.finfo(a.dtype).eps * torch.randint(0, 2, a.shape))


def dependent_on_threads(a: Tensor, b: Tensor) -> Tensor:
    return a * b * (1 + 4 * torch.finfo(a.dtype).eps * torch.get_num_threads())


def wrong_tail_of_large(a: Tensor, b: Tensor) -> Tensor:
    result = a * b
    result.view(-1)[1000:] *= 2
    return result


def half_written(a: Tensor, b: Tensor) -> Tensor:
    result = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    result[1:] = a[1:] * b[1:]
    return result


def stale_scratch(a: Tensor, b: Tensor) -> Tensor:
    return a * b + 0 * torch.empty_like(a).nan_to_num(nan=1 / 3).mul(3e300 if a.dtype == torch.float64 else 3e37) * 1e-3


def refuses_empty(a: Tensor, b: Tensor) -> Tensor:
    if a.numel() == 0:
        raise RuntimeError("invalid configuration argument")
    return a * b


def refuses_mixed(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype != b.dtype:
        raise RuntimeError(f"expected {b.dtype}, got {a.dtype}")
    return a * b


def under_autocast() -> Any:
    op = product(kernel=refuses_mixed)
    return lambda a, b: op(a @ torch.eye(a.shape[1]).to(a), b)


def refuses_half(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == torch.float16:
        raise RuntimeError("not implemented for 'Half'")
    return a * b


def old_style_function() -> Any:
    """Return a Function whose forward takes ctx, the common style."""

    class Old(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
            ctx.save_for_backward(a, b)
            return a * b

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            a, b = ctx.saved_tensors
            return grad * b, grad * a

    return Old.apply


def once_differentiable() -> Any:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(a: Tensor, b: Tensor) -> Tensor:
            return a * b

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            a, b = ctx.saved_tensors
            return grad * b, grad * a

    return Once.apply


def own_function(save: Callable[..., None], backward: Callable[[Any, Tensor], tuple[Tensor, Tensor]]) -> Any:
    """Return the product as a plain Function that calls ``save`` with ctx and the inputs."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(a: Tensor, b: Tensor) -> Tensor:
            return a * b

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
            save(ctx, *inputs)

    Own.backward = staticmethod(backward)  # type: ignore[method-assign,assignment]
    return Own.apply


def saved(ctx: Any, a: Tensor, b: Tensor) -> None:
    ctx.save_for_backward(a, b)


def state_of_the_last_forward() -> Any:
    last: dict[str, Tensor] = {}
    return own_function(
        lambda ctx, a, b: last.update(a=a, b=b),
        lambda ctx, grad: (grad * last["b"], grad * last["a"]),
    )


def saved_tensors_that_depend_on_the_count_of_calls() -> Any:
    calls: list[int] = []

    def save(ctx: Any, a: Tensor, b: Tensor) -> None:
        calls.append(0)
        ctx.save_for_backward(a * len(calls), b * len(calls))
        ctx.count = len(calls)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return grad * b / ctx.count, grad * a / ctx.count

    return own_function(save, backward)


def tensors_as_attributes() -> Any:
    def save(ctx: Any, a: Tensor, b: Tensor) -> None:
        ctx.a, ctx.b = a, b

    return own_function(save, lambda ctx, grad: (grad * ctx.b, grad * ctx.a))


def wrong_where_the_other_needs_no_gradient() -> Any:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return grad * b * (1 if ctx.needs_input_grad[1] else 7), grad * a

    return own_function(saved, backward)


def refusing() -> Any:
    """Return an op whose second derivative doesn't exist and raises."""

    def refuse(*_: Any) -> Any:
        raise NotImplementedError("no second derivative")

    inner = product(backward=refuse, jvp=refuse)
    return product(backward=lambda op, grad, a, b: (inner(grad, b), inner(grad, a)))


def specialised_on_size() -> Any:
    op = product()
    return lambda a, b: op(a, b) if a.shape[0] < 10 else op(b, a)


def graph_break() -> Any:
    op = product()

    def function(a: Tensor, b: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return op(a, b)

    return function


def depends_on_values() -> Any:
    op = product()
    return lambda a, b: op(a, b) if a.sum().item() < 1e6 else op(b, a)


def wrong_module(a: Tensor, b: Tensor) -> Tensor:
    return a * b + 1


def cut_off() -> Any:
    op = product()
    return lambda a, b: op(a.detach(), b.detach())


# --- faults that torch's own opcheck and gradcheck miss, and this battery once missed --------------


def shaped(*shape: int) -> Callable[[], list[Sample]]:
    a, b = (torch.randn(shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(2))
    return lambda: [Sample((a.clone().requires_grad_(), b.clone().requires_grad_()))]


def of_gradients(kernel: Callable[..., Tensor]) -> Any:
    """Return an op whose backward has a kernel of its own."""
    adjoint = product(kernel)
    return product(backward=lambda op, grad, a, b: (adjoint(grad, b), adjoint(grad, a)))


def wrong_for_permuted_gradients(*dims: int) -> Any:
    def kernel(grad: Tensor, t: Tensor) -> Tensor:
        permuted = grad.dim() == len(dims) and not grad.is_contiguous() and grad.permute(dims).is_contiguous()
        return multiply(flat_storage(grad) if permuted else grad, t)

    return of_gradients(kernel)


def batched(wrong: Callable[[Any, Any, Tensor, Tensor], Tensor | None]) -> Any:
    """Return an op whose vmap rule gives the result of ``wrong``, unless that is None."""

    def make(op: Any) -> Callable[..., Any]:
        right = pair_rule(op)

        def rule(info: Any, in_dims: Any, a: Tensor, b: Tensor) -> Any:
            found = wrong(info, in_dims, a, b)
            return right(info, in_dims, a, b) if found is None else (found, 0)

        return rule

    return product(vmap=make)


def one_dim_for_both(info: Any, in_dims: Any, a: Tensor, b: Tensor) -> Tensor | None:
    return None if None in in_dims else a.movedim(in_dims[0], 0) * b.movedim(in_dims[0], 0)


def wrong_in_the_middle(info: Any, in_dims: Any, a: Tensor, b: Tensor) -> Tensor | None:
    within = None not in in_dims and 0 < in_dims[0] < a.dim() - 1
    return 2 * a.movedim(in_dims[0], 0) * b.movedim(in_dims[1], 0) if within else None


def wrong_for_one(info: Any, in_dims: Any, a: Tensor, b: Tensor) -> Tensor | None:
    if info.batch_size > 1 or None in in_dims:
        return None
    return 2 * a.movedim(in_dims[0], 0) * b.movedim(in_dims[1], 0)


def keeps_channels_last(a: Tensor, b: Tensor) -> Tensor:
    result = multiply(a, b)
    last = a.dim() == 4 and not a.is_contiguous() and a.is_contiguous(memory_format=torch.channels_last)
    return result.contiguous(memory_format=torch.channels_last) if last else result


def with_shared_scratch() -> Callable[..., Tensor]:
    scratch: dict[Any, Tensor] = {}

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        memory = scratch.setdefault((a.shape, a.dtype), torch.empty(a.shape, dtype=a.dtype))
        memory.copy_(a)
        return memory * b

    return kernel


def written_where_large(a: Tensor, b: Tensor) -> Tensor:
    result = a * b
    if a.numel() > 1000:
        a.data.mul_(2)
    return result


def keeps_its_inputs() -> Any:
    kept: list[Tensor] = []

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        kept.append(a)
        return a * b

    return product(kernel)


def output_on_the_context() -> Any:
    class Cyclic(torch.autograd.Function):
        @staticmethod
        def forward(a: Tensor, b: Tensor) -> Tensor:
            return a * b

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
            ctx.save_for_backward(*inputs)
            ctx.output = output

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            a, b = ctx.saved_tensors
            return grad * b, grad * a

    return Cyclic.apply


def having(*effects: Callable[[], Any]) -> Any:
    """Return an op that has these effects on the process."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        for effect in effects:
            effect()
        return multiply(a, b)

    return product(kernel)


def in_backward(change: Callable[[Tensor], Tensor]) -> Any:
    return product(backward=lambda op, grad, a, b: (change(op(grad, b)), change(op(grad, a))))


def composed(composition: Callable[..., Tensor]) -> Any:
    op = product()
    library.inductor(op)(composition)
    return op


def partial_where_whole() -> Any:
    op = product()

    @library.sharding(op)
    def rule(a: Any, b: Any) -> Any:
        from torch.distributed.tensor import Partial, Replicate

        return [([Partial()], [Replicate(), Replicate()])]

    return op


def in_a_group(effect: Callable[[], Any]) -> Any:
    """Return an op with a right sharding rule and an effect on the processes that share a DTensor."""
    op = having(lambda: effect() if torch.distributed.is_initialized() else None)

    @library.sharding(op)
    def rule(a: Any, b: Any) -> Any:
        from torch.distributed.tensor import Replicate, Shard

        return [([place], [place, place]) for place in (Replicate(), Shard(0))]

    return op


def refuses_in_one_process() -> None:
    if torch.distributed.get_rank():
        raise NotImplementedError("only the first process can")


def fails_in_one_process() -> None:
    if torch.distributed.get_rank():
        raise ValueError("only the first process can")


def killed_in_one_process() -> None:
    if torch.distributed.get_rank():
        os._exit(1)


def oversized_save() -> Any:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = (t[: len(grad)] for t in ctx.saved_tensors)
        return grad * b, grad * a

    return own_function(lambda ctx, a, b: ctx.save_for_backward(torch.cat([a] * 4), torch.cat([b] * 4)), backward)


MISSED = {
    **{
        f"gradient wrong where the incoming one is permuted to {dims}": Fault(
            partial(wrong_for_permuted_gradients, *dims), ["gradient layouts"], samples=shaped(2, 4, 3)
        )
        for dims in ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
    },
    "vmap rule wrong for a batch in the middle": Fault(lambda: batched(wrong_in_the_middle), ["vmap"]),
    "vmap rule wrong for batches in different dimensions": Fault(lambda: batched(one_dim_for_both), ["vmap"]),
    "vmap rule wrong for a batch of one": Fault(lambda: batched(wrong_for_one), ["vmap"]),
    "fake strides wrong for channels last": Fault(
        lambda: product(keeps_channels_last), ["fake kernel"], samples=shaped(2, 3, 4, 5)
    ),
    "fake shape wrong where a size is 1": Fault(
        lambda: product(fake=_fake(lambda a: a.new_empty([n for n in a.shape if n != 1]))), ["fake kernel"]
    ),
    "fake shape wrong where a size is 0": Fault(
        lambda: product(fake=_fake(lambda a: a.new_empty(a.shape if a.numel() else 0))), ["fake kernel"]
    ),
    "scratch shared between threads": Fault(lambda: product(with_shared_scratch()), ["threads"]),
    "scratch of the backward shared between threads": Fault(lambda: of_gradients(with_shared_scratch()), ["threads"]),
    "promise of autocast not kept": Fault(product, ["autocast"], {"autocast": torch.bfloat16}),
    "input written where it is large": Fault(lambda: product(written_where_large), ["inputs unmutated"]),
    "inputs kept in a list": Fault(keeps_its_inputs, ["memory freed"]),
    "output kept by its own graph": Fault(output_on_the_context, ["memory freed"]),
    "NaN swallowed": Fault(lambda: product(lambda a, b: (a * b).nan_to_num()), ["special values"]),
    "NaN gradient swallowed": Fault(lambda: in_backward(torch.nan_to_num), ["special values"]),
    "random numbers seeded anew": Fault(lambda: having(lambda: torch.manual_seed(0)), ["global state"]),
    "Python's random numbers seeded anew": Fault(lambda: having(lambda: random.seed(0)), ["global state"]),
    "threads changed by the first call": Fault(lambda: having(lambda: torch.set_num_threads(3)), ["global state"]),
    "environment changed": Fault(lambda: having(lambda: os.environ.update(PLANTED="1")), ["global state"]),
    "composition wrong in bfloat16": Fault(
        lambda: composed(lambda a, b: a * b * (1.1 if a.dtype == torch.bfloat16 else 1)), ["compiled composition"]
    ),
    "composition wrong where it is large": Fault(
        lambda: composed(lambda a, b: a * b * (1.1 if a.numel() > 1000 else 1)), ["compiled composition"]
    ),
    "composition wrong where it is transposed": Fault(
        lambda: composed(lambda a, b: a * b * (1.1 if a.stride(0) == 1 else 1)), ["compiled composition"]
    ),
    "composition wrong for NaN": Fault(lambda: composed(lambda a, b: (a * b).nan_to_num()), ["compiled composition"]),
    "small values flushed to zero": Fault(
        lambda: product(lambda a, b: torch.where((a * b).abs() < 1e-30, 0.0, a * b)), ["special values"]
    ),
    "sharding rule wrong": Fault(partial_where_whole, ["sharding"]),
    "process killed where DTensors are sharded": Fault(lambda: in_a_group(lambda: os._exit(1)), ["sharding"]),
    "DTensors refused by one process": Fault(
        lambda: in_a_group(refuses_in_one_process),
        ["sharding"],
        {"differentiable": False},
        lambda: [tuple(t.detach() for t in s.args) for s in samples()],
    ),
    "more saved than needed": Fault(oversized_save, ["saved memory"]),
    "default dtype changed": Fault(lambda: having(lambda: torch.set_default_dtype(torch.float64)), ["global state"]),
    "wrong above 1,000 elements, in samples without dynamic dimensions": Fault(
        lambda: product(wrong_tail_of_large), ["large"], samples=lambda: [s.args for s in samples()]
    ),
}

_FUNC = ["func.grad", "func.vjp", "func.jvp", "func.jacrev", "func.jacfwd", "func.hessian", "vmap", "vmap(grad)"]
_COMPILED = ["compile", "compile dynamic", "compile(grad)", "compile(vmap(grad))", "compile(jvp)", "export"]
_SECOND = ["gradgradcheck", "second derivative", "func.hessian"]

FAULTS = MISSED | {
    "wrong value": Fault(lambda: product(lambda a, b: a * b + 1e-4), ["value", "float32"]),
    "wrong backward": Fault(
        lambda: product(backward=lambda op, grad, a, b: (op(grad, b), op(grad, b))),
        ["gradient", "gradcheck", "func.grad", "func.vjp", "func.jacrev", "vmap(grad)"],
    ),
    "gradient of the wrong sign in 16 bits": Fault(
        lambda: product(backward=lambda op, g, a, b: (op(g, b), op(g, a) * (-1 if g.itemsize == 2 else 1))),
        ["bfloat16", "float16"],
    ),
    "wrong tangent": Fault(
        lambda: product(jvp=lambda op, da, db, a, b: op(da if da is not None else db, b)),
        ["gradcheck", "forward AD", "func.jvp", "func.jacfwd"],
    ),
    "tangent left out": Fault(tangents_of_register_autograd, ["func.jvp", "func.jacfwd", "func.grad"]),
    "wrong second derivative": Fault(wrong_second_derivative, _SECOND),
    "silently zero second derivative": Fault(
        lambda: product(backward=lambda op, grad, a, b: (op(grad, b.detach()), op(grad, a.detach()))), _SECOND
    ),
    "tangent of the tangent cut off": Fault(
        lambda: product(
            jvp=lambda op, da, db, a, b: _sum(
                None if da is None else op(da, b.detach()), None if db is None else op(a.detach(), db)
            )
        ),
        ["forward over forward"],
    ),
    "forward over forward said to be refused, yet it isn't": Fault(
        product, ["forward over forward"], {"not_applicable": {"forward over forward": "no second tangent"}}
    ),
    "backward reads the state of the last forward": Fault(state_of_the_last_forward, ["checkpoint"]),
    "what is saved depends on the count of calls": Fault(
        saved_tensors_that_depend_on_the_count_of_calls, ["checkpoint"]
    ),
    "saved tensors kept as attributes": Fault(tensors_as_attributes, ["version check"]),
    "wrong gradient where the other input needs none": Fault(
        wrong_where_the_other_needs_no_gradient, ["each input alone"]
    ),
    "second derivative lost by once_differentiable": Fault(once_differentiable, _SECOND),
    "refused second derivative, undeclared": Fault(refusing, _SECOND),
    "second derivative said to be refused, yet it isn't": Fault(
        product, _SECOND, {"not_applicable": dict.fromkeys(_SECOND, "no second derivative")}
    ),
    "gradient cut off": Fault(cut_off, ["value", "gradient", "gradcheck", "batched grad", "func.grad"]),
    "no fake kernel": Fault(no_fake_kernel, ["opcheck", "fake kernel", "meta device", *_COMPILED]),
    "no fake kernel, packaged": Fault(no_fake_kernel, ["AOTInductor"]),
    "fake of wrong shape": Fault(
        lambda: product(fake=_fake(lambda a: a.new_empty(a.shape[::-1]))), ["opcheck", "fake kernel", "meta device"]
    ),
    "fake of wrong dtype": Fault(
        lambda: product(fake=_fake(lambda a: a.new_empty(a.shape, dtype=torch.float32))),
        ["opcheck", "fake kernel", "meta device"],
    ),
    "fake of wrong strides": Fault(lambda: product(fake=_fake(torch.empty_like)), ["fake kernel", "meta device"]),
    "input written in place": Fault(
        lambda: product(written_in_place), ["inputs unmutated", "ops functional", "opcheck"]
    ),
    "input written behind the version counter": Fault(
        lambda: product(written_behind_the_version_counter), ["inputs unmutated", "ops functional"]
    ),
    "gradient written in place": Fault(lambda: product(backward=gradient_written_in_place), ["inputs unmutated"]),
    "output aliases an input": Fault(aliasing, ["outputs own memory", "ops functional", "opcheck"]),
    "strides ignored": Fault(
        lambda: product(lambda a, b: flat_storage(a) * flat_storage(b)), ["input layouts", "gradient layouts"]
    ),
    "expanded gradients ignored": Fault(expanded_gradients_ignored, ["gradient layouts"]),
    "not deterministic": Fault(lambda: product(noisy), ["deterministic"]),
    "dependent on the number of threads": Fault(lambda: product(dependent_on_threads), ["deterministic"]),
    "wrong above 1,000 elements": Fault(lambda: product(wrong_tail_of_large), ["large"]),
    "a part of the output never written": Fault(lambda: product(half_written), ["no uninitialised memory"]),
    "scratch memory never written": Fault(lambda: product(stale_scratch), ["no uninitialised memory"]),
    "examples mixed under vmap": Fault(
        lambda: product(vmap=lambda op: pair_rule(op, lambda b: b.flip(0))), ["vmap", "vmap(grad)"]
    ),
    "no vmap rule": Fault(lambda: product(vmap=None), ["vmap", "vmap(grad)", "func.jacrev"]),
    "empty refused": Fault(lambda: product(refuses_empty), ["zero size"]),
    "half refused": Fault(lambda: product(refuses_half), ["float16"]),
    "accumulated in 16 bits": Fault(
        lambda: product(lambda a, b: (a.bfloat16() * b.bfloat16()).to(a.dtype)), ["float32", "float16"]
    ),
    "breaks under autocast": Fault(under_autocast, ["autocast"]),
    "Function of the old style": Fault(old_style_function, [*_FUNC, "forward AD", "compile(grad)"]),
    "specialised on the size": Fault(specialised_on_size, ["compile dynamic", "export"]),
    "graph break": Fault(graph_break, ["compile", "compile dynamic"]),
    "dependent on values": Fault(depends_on_values, ["compile", "export", "vmap"]),
    "module unlike the function": Fault(product, ["modules"], {"modules": lambda: [(Layer(wrong_module), {})]}),
    "module that can't be saved": Fault(product, ["modules"], {"modules": lambda: [(Layer(lambda a, b: a * b), {})]}),
    "apply unlike the function": Fault(product, ["apply"], {"apply": lambda a, b: a * b * 2}),
    "apply that breaks the graph": Fault(product, ["apply"], {"apply": graph_break()}),
    "no error raised": Fault(product, ["error messages"], {"bad_calls": lambda: [_bad("a: expected")]}),
    "error that doesn't name the argument": Fault(
        lambda: _raising("wrong size"), ["error messages"], {"bad_calls": lambda: [_bad("a: expected")]}
    ),
    "error of the wrong type": Fault(
        lambda: _raising("a: expected"), ["error messages"], {"bad_calls": lambda: [_bad("a: expected", TypeError)]}
    ),
}


def _fake(make: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def fake(a: Tensor, b: Tensor) -> Tensor:
        return make(a)

    return fake


def _bad(message: str, error: type[Exception] = ValueError) -> BadCall:
    return BadCall((torch.ones(2), torch.ones(2)), message, error=error)


def _raising(message: str) -> Callable[..., Tensor]:
    def function(a: Tensor, b: Tensor) -> Tensor:
        raise ValueError(message)

    return function


def healthy_options() -> dict[str, Any]:
    return {
        "apply": torch.mul,
        "modules": lambda: [(Layer(torch.mul), {})],
        "bad_calls": lambda: [BadCall((torch.ones(2), torch.ones(3)), "must match")],
    }


def test_the_healthy_op_passes_every_row() -> None:
    calls: list[int] = []

    def counted(a: Tensor, b: Tensor) -> Tensor:
        calls.append(0)
        return multiply(a, b)

    report = verify(product(counted), samples(), reference=torch.mul, quick=True, **healthy_options())
    report.raise_on_failure()
    inapplicable = {cell.capability for cell in report.cells if cell.status != "pass"}
    assert inapplicable == {"compiled composition", "sharding"}, report.to_markdown()
    assert [cell.capability for cell in report.cells] == list(capabilities(quick=True))
    assert len(calls) < 2500  # the quick matrix takes seconds for a small op


def test_the_page_lists_the_kinds_of_faults_with_the_row_that_names_each() -> None:
    page = (Path(__file__).parents[1] / "docs" / "verification.md").read_text()
    table = page[page.index("| planted fault |") :].split("\n\n")[0].splitlines()[2:]
    listed = [tuple(line.strip("| ").split(" | ")) for line in table]
    assert len(dict(listed)) == len(listed) == 35
    assert all(row in FAULTS[kind].rows and row in capabilities(quick=True) for kind, row in listed)
    assert [kind for kind, _ in listed[15:]] == [kind for kind in MISSED if kind in dict(listed)]


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name: str) -> None:
    fault = FAULTS[name]
    report = verify(fault.make(), fault.samples(), reference=torch.mul, quick=True, only=fault.rows, **fault.options)
    missed = [cell for cell in report.cells if cell.status != "fail"]
    assert not missed


def test_a_right_sharding_rule_passes_and_what_its_processes_print_is_no_output(
    capfd: pytest.CaptureFixture[str],
) -> None:
    report = verify(in_a_group(lambda: os.write(1, b"printed")), samples(), quick=True, only=["sharding"])
    assert (report["sharding"].status, report["sharding"].detail) == ("pass", "8 ways to shard, 0 refused")
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("effect", "why"),
    [(fails_in_one_process, "ValueError: only the first process can"), (killed_in_one_process, "was killed")],
)
def test_a_process_that_fails_alone_is_named_and_its_peer_does_not_wait(
    effect: Callable[[], None], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sharding, "PATIENCE", timedelta(days=1))
    report = verify(in_a_group(effect), samples(), quick=True, only=["sharding"])
    assert report["sharding"].status == "fail"
    assert why in report["sharding"].detail


def test_no_vmap_rule_names_what_to_do() -> None:
    report = verify(product(vmap=None), samples(), quick=True, only=["vmap"])
    assert "give the op a batching rule by library.vmap" in report["vmap"].detail


@pytest.mark.full  # the samples above name their dynamic dimensions, which saves time
@pytest.mark.parametrize("name", MISSED)
def test_fault_is_caught_with_plain_tuples(name: str) -> None:
    fault = MISSED[name]
    made = [sample.args if isinstance(sample, Sample) else sample for sample in fault.samples()]
    report = verify(fault.make(), made, reference=torch.mul, quick=True, only=fault.rows, **fault.options)
    assert [cell.status for cell in report.cells] == ["fail"] * len(fault.rows)


OF_VARIANTS = [row.name for row in CAPABILITIES.values() if row.of_variants]


def entry(name: str, function: Callable[..., Any], made: Callable[[], Any] = samples, **options: Any) -> OpInfo:
    return OpInfo(name, function, torch.mul, _converter(function, made()), "", **options)


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if {*fault.rows} & {*OF_VARIANTS}])
def test_fault_of_a_variant_is_caught_in_the_cell_of_its_op(name: str) -> None:
    fault = FAULTS[name]
    rows = [row for row in fault.rows if row in OF_VARIANTS]
    faulty = entry("faulty", fault.make(), fault.samples, **fault.options)
    info = entry("product", product(), variants=(faulty,), **healthy_options())
    report = verify(info, quick=True, only=rows)
    assert {(cell.op, cell.status) for cell in report.cells} == {("product", "fail")}
    assert all(cell.detail.startswith("faulty: ") for cell in report.cells)


def test_a_healthy_variant_changes_no_cell() -> None:
    info = entry("product", product(), variants=(entry("twin", product(), **healthy_options()),), **healthy_options())
    report = verify(info, quick=True, only=OF_VARIANTS)
    report.raise_on_failure()
    assert {cell.status for cell in report.cells} == {"pass"}, report.to_markdown()


def test_every_row_can_fail() -> None:
    assert {row for fault in FAULTS.values() for row in fault.rows} == set(capabilities())


def test_faults_show_without_a_reference() -> None:
    rows = ["gradcheck", "forward AD", "func.jvp", "gradgradcheck", "func.hessian"]
    report = verify(FAULTS["wrong tangent"].make(), samples(), quick=True, only=rows)
    assert report["forward AD"].status == report["func.jvp"].status == report["gradcheck"].status == "fail"
    assert verify(FAULTS["wrong second derivative"].make(), samples(), quick=True, only=["gradgradcheck"]).failures
    assert verify(product(), samples(), quick=True, only=rows).ok


def test_a_refused_second_derivative_may_be_declared() -> None:
    declared = dict.fromkeys(_SECOND, "backward isn't differentiable")
    report = verify(refusing(), samples(), reference=torch.mul, quick=True, only=_SECOND, not_applicable=declared)
    assert [cell.status for cell in report.cells] == ["not applicable"] * 3
