"""The bridge: attach an ``autograd.Function`` to an operator so that it composes with all of PyTorch.

An op is defined in a handful of lines, each saying one thing once::

    import torch
    from torch import Tensor
    from custom_ops import library

    @library.define("mylib::scale")              # the schema comes from the annotations,
    def scale(x: Tensor, factor: float) -> Tensor:
        return torch.empty_like(x)               # the body is the fake (meta) kernel

    @library.kernel(scale, "cpu", "cuda")        # any callable: Python, a Triton launcher, ...
    def _(x, factor):
        return x * factor

    class Scale(library.Function, op=scale):     # derivatives, in terms of ops only
        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.factor = inputs[1]

        @staticmethod
        def backward(ctx, grad):
            return scale(grad, ctx.factor), None

        @staticmethod
        def jvp(ctx, tangent, _):
            return scale(tangent, ctx.factor)

    @library.vmap(scale)
    def _(info, in_dims, x, factor):
        return scale(x, factor), in_dims[0]

``scale(x, 2.0)`` and ``Scale.apply(x, 2.0)`` now work eagerly, under ``torch.compile``,
``torch.export`` and ``torch.func``, in forward mode and to any order of differentiation.

Why not ``torch.library.register_autograd``: it attaches a plain ``autograd.Function``, so
``torch.func`` transforms raise, and forward-mode AD returns zeros without a word. Here the
Function is applied one level at a time on the op's ``Autograd`` dispatch key, where functorch
unwraps every level for us; this also saves the re-dispatch and signature binding of each call.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.util
import inspect
import operator
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Private names, each needed because no public one does the same; tests/test_library.py fails
# first if torch moves one.
from torch._C import (  # type: ignore[attr-defined]
    _any_requires_grad,  # whether to build a graph at all, without a Python loop
    _are_functorch_transforms_active,  # whether a transform will see this call
    _AutoDispatchBelowAutograd,  # calls the op's own kernel from its Autograd kernel
    _dispatch_tls_local_exclude_set,  # these two say whether anything that
    _dispatch_tls_local_include_set,  # comes before autograd will see this call,
    _is_alias_of,  # whether two tensors share memory, also fake ones
    _is_torch_function_mode_enabled,  # as this does
)
from torch._functorch.utils import enable_single_level_autograd_function  # see _attach
from torch._guards import CompileContext  # whether Dynamo traces this call, see _seen_by_dynamo
from torch._library.utils import fill_defaults  # see _with_defaults
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.autograd.function import (
    FunctionMeta,
    _SingleLevelFunction,  # a Function without functorch's re-dispatch
)
from torch.nn import Parameter

__all__ = [
    "Function",
    "autocast",
    "compose",
    "define",
    "direct",
    "function_of",
    "inductor",
    "kernel",
    "override_kernel",
    "sharding",
    "to_front",
    "vmap",
]

_libraries: dict[OpOverload, torch.library.Library] = {}
_functions: dict[OpOverload, type[Function]] = {}
_bodies: dict[OpOverload, Callable[..., Any]] = {}  # of composed ops: what runs below autograd in place of a kernel
_applied: dict[OpOverload, list[Callable[..., Any]]] = {}  # by the Autograd kernel: the apply of a _twin
_direct: dict[OpOverload, Callable[..., Any]] = {}


def define(name: str) -> Callable[[Callable[..., Any]], OpOverload]:
    """Define the operator ``name`` ("namespace::op") from an annotated Python function.

    The annotations give the schema (``Tensor``, ``int``, ``float``, ``bool``, ``str``,
    ``torch.dtype``, their ``Optional``, sequences of them; a tuple of ``Tensor`` for several
    outputs). The body is the fake kernel: it returns empty tensors of the right shape, dtype, stride and
    device and never reads data; for a data-dependent size use
    ``torch.library.get_ctx().new_dynamic_size()``.

    Ops are functional: they neither mutate nor alias their inputs. Until a `Function` is attached, a
    derivative of the op raises.

    Returns the operator itself, ``torch.ops.namespace.op.default``.

    Example:
        >>> import torch
        >>> from torch import Tensor
        >>> from custom_ops import library
        >>> @library.define("docs::twice")
        ... def twice(x: Tensor) -> Tensor:
        ...     return torch.empty_like(x)
        >>> twice(torch.ones(2, device="meta")).shape
        torch.Size([2])
    """
    _split(name)

    def decorate(fake: Callable[..., Any]) -> OpOverload:
        op = _declare(name, fake)
        torch.library.register_fake(name, _seen_by_dynamo(_checked_fake(op._opname, fake)), lib=_libraries[op])
        return op

    return decorate


def compose(name: str, view: bool = False) -> Callable[[Callable[..., Any]], OpOverload]:
    """Define the operator ``name`` from an annotated Python function that is its kernel everywhere.

    For a composition of torch's ops, or of ours, that is to have a derivative of its own: attach a
    `Function`, and a `vmap` rule. Derivatives are taken of the whole op; below autograd only its body
    is left. So ``torch.compile`` fuses it with its neighbours, and there is no kernel to write and no
    opaque call. ``torch.export`` keeps the op in the program, and with it the derivative.

    With ``view=True`` the body returns its first argument as it is, of which the op gives a view: a gradient is
    changed on its way at no cost to the forward pass. As to any view that a Function returns, autograd refuses
    in-place writes to the output and to its base; in forward mode it isn't a view but a copy.

    Returns the operator itself, ``torch.ops.namespace.op.default``.

    Example:
        >>> import torch
        >>> from torch import Tensor
        >>> from custom_ops import library
        >>> @library.compose("docs::rounded")
        ... def rounded(x: Tensor) -> Tensor:
        ...     return x.round()
        >>> class Rounded(library.Function, op=rounded):
        ...     @staticmethod
        ...     def backward(ctx, grad):
        ...         return grad
        >>> x = torch.tensor([0.4, 1.6], requires_grad=True)
        >>> rounded(x).sum().backward()
        >>> rounded(x).detach(), x.grad
        (tensor([0., 2.]), tensor([1., 1.]))
    """
    _split(name)

    def decorate(body: Callable[..., Any]) -> OpOverload:
        run = _seen_by_dynamo(_viewing(body) if view else _functional(name, body))
        op = _declare(name, body, run, view)
        _libraries[op].impl(op._opname, _with_defaults(op, run), "CompositeExplicitAutograd")
        return op

    return decorate


def _split(name: str) -> tuple[str, str]:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*::[A-Za-z_]\w*", name):
        raise ValueError(f'name: expected "namespace::op", got {name!r}')
    namespace, _, opname = name.partition("::")
    return namespace, opname


def _declare(
    name: str, like: Callable[..., Any], body: Callable[..., Any] | None = None, view: bool = False
) -> OpOverload:
    """The operator with the schema of ``like``'s annotations and its Autograd kernel, but nothing below that."""
    namespace, opname = _split(name)
    for parameter in inspect.signature(like).parameters.values():
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            raise ValueError(f"{like.__name__}: expected positional arguments only, got {parameter}")
    if hasattr(getattr(torch.ops, namespace), opname):
        raise ValueError(f"name: expected a new one, and there is an operator {name} already")
    lib = torch.library.Library(namespace, "FRAGMENT")  # noqa: TOR901 (kept in _libraries)
    schema = torch.library.infer_schema(like, mutates_args=(), op_name=opname)
    if view:
        annotated = re.sub(r"\(Tensor (.*) -> Tensor$", r"(Tensor(a) \1 -> Tensor(a)", schema)
        if annotated == schema:
            raise ValueError(f"{like.__name__}: expected a tensor first and one as result, got {schema}")
        schema = annotated
    lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op: OpOverload = getattr(getattr(torch.ops, namespace), opname).default
    op.__doc__ = like.__doc__
    _libraries[op] = lib
    if body is not None:
        _bodies[op] = body
    _applied[op] = [_twin(op, None).apply]
    run = _autograd_kernel(op, _applied[op])
    lib.impl(opname, _with_defaults(op, run), "Autograd")
    _direct[op] = _past_dispatcher(op, run)
    return op


def kernel(op: OpOverload, *devices: str) -> Callable[[Any], Any]:
    """Register the decorated callable as ``op``'s kernel on ``devices`` ("cpu", "cuda", ...).

    ``kernel(op, "cuda")("package.module:function")`` takes the kernel from there on its first
    call, so that defining the op imports nothing.

    Example:
        >>> import torch
        >>> from torch import Tensor
        >>> from custom_ops import library
        >>> @library.define("docs::negated")
        ... def negated(x: Tensor) -> Tensor:
        ...     return torch.empty_like(x)
        >>> @library.kernel(negated, "cpu")
        ... def _(x):
        ...     return -x
        >>> negated(torch.ones(2))
        tensor([-1., -1.])
    """

    library = _library_of(op)
    if not devices or not all(isinstance(device, str) for device in devices):
        raise ValueError(f'devices: expected some of "cpu", "cuda", ..., got {devices}')

    def decorate(fn: Any) -> Any:
        run = _imported_on_first_call(fn) if isinstance(fn, str) else _callable(fn)
        run = _with_defaults(op, _functional(op._name, run))
        for device in devices:
            library.impl(op._opname, run, _dispatch_key(device))
        return fn

    return decorate


@contextmanager
def override_kernel(op: OpOverload, device: str, fn: Callable[..., Any]) -> Iterator[None]:
    """Within the context ``fn`` stands in for ``op``'s kernel on ``device``.

    Example:
        >>> import torch
        >>> from torch import Tensor
        >>> from custom_ops import library
        >>> @library.define("docs::times")
        ... def times(x: Tensor, factor: float) -> Tensor:
        ...     return torch.empty_like(x)
        >>> @library.kernel(times, "cpu")
        ... def _(x, factor):
        ...     return x * factor
        >>> with library.override_kernel(times, "cpu", lambda x, factor: x * round(factor)):
        ...     times(torch.ones(2), 1.75)
        tensor([2., 2.])
    """
    _library_of(op)
    lib = torch.library.Library(op.namespace, "IMPL")  # noqa: TOR901 (destroyed below)
    try:
        with warnings.catch_warnings():  # torch warns that a kernel is overridden
            warnings.simplefilter("ignore")
            lib.impl(op._opname, _with_defaults(op, fn), _dispatch_key(device), allow_override=True)
        yield
    finally:
        lib._destroy()  # no public way to end a registration before the object is collected


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

    library = _library_of(op)

    def decorate(rule: Callable[..., Any]) -> Callable[..., Any]:
        def run(info: Any, in_dims: Any, *args: Any) -> Any:
            return _with_defaults(op, functools.partial(rule, info, in_dims))(*args)

        torch.library.register_vmap(op._name, run, lib=library)
        return rule

    return decorate


def to_front(x: Tensor, in_dim: int | None, batch: int) -> Tensor:
    """``x`` with its vmapped dimension first; expanded to ``batch`` if it isn't vmapped.

    Example:
        >>> import torch
        >>> from custom_ops import library
        >>> library.to_front(torch.ones(2, 3), 1, 3).shape, library.to_front(torch.ones(2), None, 3).shape
        (torch.Size([3, 2]), torch.Size([3, 2]))
    """
    return x.expand(batch, *x.shape) if in_dim is None else x.movedim(in_dim, 0)


def autocast(op: OpOverload, dtype: torch.dtype, devices: Sequence[str] = ("cpu", "cuda")) -> None:
    """Under autocast compute ``op`` in ``dtype``; an op without this keeps its inputs' dtypes.

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
    library = _library_of(op)
    for device in devices:
        torch.library.register_autocast(op._name, device, dtype, lib=library)


def sharding(op: OpOverload) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as ``op``'s DTensor sharding rule.

    The rule takes the op's arguments (specs in place of tensors) and returns the acceptable
    shardings, as for ``torch.distributed.tensor.experimental.register_sharding``. It is handed
    over when ``torch.distributed.tensor`` is first imported, not before: that import takes long.

    DTensor caches a rule's answer by the tensors and by the arguments from the op's first ``int`` on:
    arguments that a rule depends on must not come before that.

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
    _library_of(op)

    def decorate(rule: Callable[..., Any]) -> Callable[..., Any]:
        def register() -> None:
            from torch.distributed.tensor.experimental import register_sharding

            register_sharding(op)(rule)

        _after_import("torch.distributed.tensor", register)
        return rule

    return decorate


def inductor(op: OpOverload) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated composition of PyTorch ops as what Inductor compiles in place of ``op``.

    For pointwise ops, which Inductor then fuses with their neighbours; the kernels of ``op`` stay what runs
    everywhere else. The derivatives are those of ``op`` too: AOTAutograd takes the composition apart only
    below them, so that what backward needs is still what the Function saves. It must return what the kernels
    return, contiguous, bit for bit where it is packed: a graph may hand it to a kernel.

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
    _library_of(op)

    def decorate(composition: Callable[..., Any]) -> Callable[..., Any]:
        def register() -> None:
            from torch._inductor.decomposition import register_decomposition  # no public way for one op

            register_decomposition([op])(_with_defaults(op, composition))

        _after_import("torch._inductor.decomposition", register)
        return composition

    return decorate


class _FunctionMeta(FunctionMeta):
    """Keeps Dynamo from special-casing these classes by their metaclass.

    Dynamo traces ``X.apply`` of a plain ``autograd.Function`` by inlining forward and backward,
    which refuses a class with a ``jvp``. It knows such a class by ``type(X) is FunctionMeta``; for
    any other metaclass it inlines ``apply`` itself, here a call of the registered op.
    """

    def __init__(cls, name: str, bases: tuple[type, ...], attrs: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(name, bases, attrs)  # FunctionMeta takes no class arguments


class Function(torch.autograd.Function, metaclass=_FunctionMeta):
    """An ``autograd.Function`` that is the derivative of one operator.

    Subclass it with ``op=``, and write ``setup_context``, ``backward`` and ``jvp`` as PyTorch
    documents them for a Function with a separate ``setup_context``; ``forward`` is the op's kernel
    and isn't written again. ``apply`` calls the op; override it to shape inputs or outputs.

    For a list of tensors, ``inputs``, ``needs_input_grad`` and tangents have a list, and ``backward`` returns one, or
    None; an op that returns a list gives a tuple, and takes a gradient for each tensor.

    Undefined gradients arrive as ``None`` (there is no ``set_materialize_grads`` to call), at
    least one of them isn't. Derivatives are taken of whatever ``backward`` and ``jvp`` compute, so
    anything they save besides inputs must be an integer or bit mask, or carry its own derivative. Save
    tensors with ``save_for_backward`` and ``save_for_forward``, never as attributes of ``ctx``. A
    missing ``jvp`` or ``backward`` raises where it is needed.

    Raises ``TypeError`` if ``op`` wasn't made by `define`, or has a
    Function already.

    Example:
        >>> import torch
        >>> from torch import Tensor
        >>> from custom_ops import library
        >>> @library.compose("docs::linear")
        ... def linear(x: Tensor) -> Tensor:
        ...     return 2 * x
        >>> class Linear(library.Function, op=linear):
        ...     @staticmethod
        ...     def backward(ctx, grad):
        ...         return linear(grad)
        ...
        ...     @staticmethod
        ...     def jvp(ctx, tangent):
        ...         return linear(tangent)
        >>> torch.func.grad(lambda x: Linear.apply(x).pow(2).sum())(torch.ones(2))
        tensor([8., 8.])
        >>> torch.func.jvp(linear, (torch.ones(2),), (torch.ones(2),))[1]
        tensor([2., 2.])
    """

    def __init_subclass__(cls, op: OpOverload | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if op is not None:
            _attach(cls, op)


def function_of(op: OpOverload) -> type[Function] | None:
    """The Function attached to ``op``, if any.

    Example:
        >>> import torch
        >>> from torch import Tensor
        >>> from custom_ops import library
        >>> @library.compose("docs::shown")
        ... def shown(x: Tensor) -> Tensor:
        ...     return 2 * x
        >>> class Shown(library.Function, op=shown):
        ...     pass
        >>> library.function_of(shown)
        <class 'custom_ops.library.Shown'>
    """
    return _functions.get(op)


def direct(op: OpOverload) -> Callable[..., Any]:
    """``op`` as a function that is quicker to call in eager mode, by a tenth of forward+backward on a few elements.

    It runs the op's Autograd kernel past the dispatcher where that would go there at once: called with all
    arguments by position and of the schema's own types, outside of compilation, transforms, autocast and
    modes. Elsewhere it is the op.

    Example:
        >>> import torch
        >>> from torch import Tensor
        >>> from custom_ops import library
        >>> @library.compose("docs::quadrupled")
        ... def quadrupled(x: Tensor) -> Tensor:
        ...     return 4 * x
        >>> library.direct(quadrupled)(torch.ones(2))
        tensor([4., 4.])
    """
    _library_of(op)
    return _direct[op]


def _attach(function: type[Function], op: OpOverload) -> None:
    _library_of(op)
    for name, instead in (("forward", "kernel"), ("vmap", "vmap")):  # they would never be called
        if getattr(function, name) is not getattr(torch.autograd.Function, name):
            raise TypeError(f"{function.__name__}: expected no {name}, which is what library.{instead}({op}) is for")
    attached = _functions.setdefault(op, function)
    if attached is not function:
        raise TypeError(f"op: {op} already has the Function {attached.__name__}")
    _applied[op][0] = _twin(op, function).apply
    if "apply" not in function.__dict__:
        function.apply = staticmethod(direct(op))  # type: ignore[method-assign]


def _twin(op: OpOverload, function: type[Function] | None) -> Any:
    """``function`` at a single autograd level; one whose derivatives raise if it is None.

    This is what functorch itself builds for each level of a Function, without binding a signature at
    every call.
    """

    def own(name: str) -> Any:
        method = getattr(function, name, None)
        return None if method is getattr(torch.autograd.Function, name) else method

    call = op._op  # op.__call__ without its Python frame
    below = _bodies.get(op, call)
    setup_context, backward, jvp = own("setup_context"), own("backward"), own("jvp")
    lists = any(_lists_of_tensors(op))

    def forward(ctx: Any, *args: Any) -> Any:
        if lists:
            ctx, args = _Nested(ctx, args[0]), _nested(*args)
        if _are_functorch_transforms_active():
            # autograd turns gradients off in here, but the outer transforms still want theirs.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), _AutoDispatchBelowAutograd():
                output = call(*args)
        else:
            with _AutoDispatchBelowAutograd():
                output = below(*args)
        ctx.materialize_grads = False
        if isinstance(output, list):
            output = tuple(output)  # of a list autograd would take no element for an output
        if setup_context is not None:
            setup_context(ctx, args, output)
        return output

    def backward_of_defined(ctx: Any, *grads: Tensor | None) -> Any:
        if backward is None:
            raise NotImplementedError(f"{op} has no backward: give one to the custom_ops.library.Function of this op")
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        if not lists:
            return backward(ctx, *grads)
        of_args = backward(_Nested(ctx, ctx.lengths), *grads)
        return None, *_flat(ctx.lengths, of_args)

    def jvp_at_all_levels(ctx: Any, *tangents: Tensor | None) -> Any:
        if jvp is None:
            raise NotImplementedError(f"{op} has no jvp: give one to the custom_ops.library.Function of this op")
        if lists:
            ctx, tangents = _Nested(ctx, ctx.lengths), _nested(ctx.lengths, *tangents[1:])
        if not _are_functorch_transforms_active():
            return jvp(ctx, *tangents)
        # As in forward; and at this level the saved tensors are constants.
        with forward_ad._set_fwd_grad_enabled(True):
            return jvp(_Primals(ctx), *tangents)

    members = {
        "forward": staticmethod(forward),
        "backward": staticmethod(backward_of_defined),
        "jvp": staticmethod(jvp_at_all_levels),
        "_compiled_autograd_key": staticmethod(torch.autograd.Function._compiled_autograd_key),
        "__module__": __name__ if function is None else function.__module__,
    }
    name = op._opname if function is None else function.__name__
    twin: Any = type(name, (_SingleLevelFunction,), members)
    twin._backward_cls.apply = backward_of_defined  # the engine's call, without looking it up again
    return twin


class _Primals:
    """A Function's ctx, with the tangents of the current level taken off the saved tensors."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx

    @property
    def saved_tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else forward_ad.unpack_dual(t, level=0).primal for t in self._ctx.saved_tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _lists_of_tensors(op: OpOverload) -> list[bool]:
    """Of each argument whether it is a list of tensors, which autograd takes and gives one by one only."""
    return [
        re.search(r"List\[(Optional\[)?Tensor", str(argument.type)) is not None for argument in op._schema.arguments
    ]


def _flat(lengths: Sequence[int | None], values: Sequence[Any]) -> list[Any]:
    """``values`` with those of each list in its place: ``lengths`` has how many, or None for what is no list.

    What is None for a whole list is None for each of its tensors.
    """
    found: list[Any] = []
    for length, value in zip(lengths, values, strict=True):
        if length is None:
            found.append(value)
        elif value is None:
            found += [None] * length
        else:
            if len(value) != length:
                raise RuntimeError(
                    f"backward: expected a list of {length} gradients for one of tensors, got {len(value)}"
                )
            found += value
    return found


def _nested(lengths: Sequence[int | None], *flat: Any) -> tuple[Any, ...]:
    """The values of which `_flat` makes these."""
    values = iter(flat)
    return tuple(next(values) if length is None else [next(values) for _ in range(length)] for length in lengths)


class _Nested:
    """A Function's ctx that speaks of lists of tensors as the op has them."""

    def __init__(self, ctx: Any, lengths: Sequence[int | None]) -> None:
        ctx.lengths = lengths
        object.__setattr__(self, "_ctx", ctx)

    @property
    def needs_input_grad(self) -> tuple[Any, ...]:
        return _nested(self._ctx.lengths, *self._ctx.needs_input_grad[1:])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._ctx, name, value)


def _autograd_kernel(op: OpOverload, applied: list[Callable[..., Any]]) -> Callable[..., Any]:
    below = _bodies.get(op, op._op)
    lists = _lists_of_tensors(op)
    if any(lists):

        def run_lists(*args: Any) -> Any:
            lengths = tuple(len(a) if of_tensors and a is not None else None for of_tensors, a in zip(lists, args))
            flat = _flat(lengths, args)
            if _are_functorch_transforms_active():
                with enable_single_level_autograd_function():
                    return applied[0](lengths, *flat)
            if forward_ad._current_level < 0 and not (torch.is_grad_enabled() and _any_requires_grad(*flat)):
                with _AutoDispatchBelowAutograd():
                    return below(*args)
            return applied[0](lengths, *flat)

        return run_lists

    def run(*args: Any) -> Any:
        if _are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return applied[0](*args)
        # A dual tensor carries its tangent even where gradients are off.
        if forward_ad._current_level < 0 and not (torch.is_grad_enabled() and _any_requires_grad(*args)):
            with _AutoDispatchBelowAutograd():
                return below(*args)
        return applied[0](*args)

    return run


_PLAIN = {"Tensor": (Tensor, Parameter), "int": (int,), "float": (float,), "bool": (bool,), "str": (str,)}


def _past_dispatcher(op: OpOverload, run: Callable[..., Any]) -> Callable[..., Any]:
    """``op``, or its Autograd kernel at once where the dispatcher would only convert the arguments and call that."""
    accepted = [_plain_types(argument.type) for argument in op._schema.arguments]
    seen: set[tuple[type, ...]] = set()  # signatures of calls that are plain

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*args)
        types = tuple(map(type, args))
        if types not in seen:
            if len(types) != len(accepted) or not all(map(operator.contains, accepted, types)):
                _refuse_traced_sizes(op, args)
                return op(*args)
            seen.add(types)
        # Whatever else comes before autograd is in these, functorch, autocast, tracing.
        plain = (
            not _is_torch_function_mode_enabled()
            and _dispatch_tls_local_include_set() == _INCLUDED
            and _dispatch_tls_local_exclude_set() == _EXCLUDED
        )
        return run(*args) if plain else op(*args)

    return call


def _refuse_traced_sizes(op: OpOverload, args: tuple[Any, ...]) -> None:
    """``torch.jit.trace`` has a tensor for every size, and an op's ``int`` made of one would be that of the example."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        for argument, value in zip(op._schema.arguments, args):
            if isinstance(value, Tensor) and "Tensor" not in str(argument.type):
                raise RuntimeError(
                    f"{op}: {argument.name} depends on the size of a tensor, which torch.jit.trace would keep as it is "
                    "now: use torch.export or torch.compile"
                )


def _plain_types(annotation: Any) -> tuple[type, ...]:
    optional = re.fullmatch(r"Optional\[(.*)\]", str(annotation))
    return (*_PLAIN.get(optional[1] if optional else str(annotation), ()), *([type(None)] if optional else []))


def _keys_of_new_thread() -> tuple[Any, Any]:
    """The dispatch keys that a thread has on or off where no context changes them, as one around this import may."""
    found: list[Any] = []
    thread = threading.Thread(
        target=lambda: found.extend([_dispatch_tls_local_include_set(), _dispatch_tls_local_exclude_set()])
    )
    thread.start()
    thread.join()
    return found[0], found[1]


_INCLUDED, _EXCLUDED = _keys_of_new_thread()


def _viewing(body: Callable[..., Any]) -> Callable[..., Any]:
    """A view of what ``body`` returns; a copy in forward mode, where a view's tangent must be a view of the tangent.

    It is the plainest view there is: with others, of sizes, compiled in-place writes went unnoticed.
    """

    def run(*args: Any) -> Any:
        if body(*args) is not args[0]:
            raise TypeError(f"{body.__name__}: expected the first argument back, as the op is a view")
        # Of an inference tensor a view is one too, and autograd doesn't see all that is made of it.
        unseen = args[0].is_inference() and not torch.is_inference_mode_enabled()
        copied = unseen or forward_ad._current_level >= 0
        return args[0].clone() if copied else torch.ops.aten.alias.default(args[0])

    return run


def _checked_fake(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """One argument on the meta device is enough for the dispatcher to call ``fake`` and nothing else."""

    def run(*args: Any) -> Any:
        devices = {a.device for a in args if isinstance(a, Tensor)}
        if len(devices) > 1 and any(d.type == "meta" for d in devices):
            raise ValueError(
                f"{name}: expected all tensors or none on the meta device, got {sorted(map(str, devices))}"
            )
        result = fake(*args)
        if result is None:
            raise TypeError(
                f"{name}: expected empty tensors from the body of its definition, the fake kernel; got None"
            )
        return result

    return run


def _functional(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel``, refused where it returns memory of an argument, which autograd and the compiler take for fresh."""

    def run(*args: Any) -> Any:
        result = kernel(*args)
        for output in _tensors((result,)):
            if any(output is given or _is_alias_of(output, given) for given in _tensors(args)):
                raise RuntimeError(
                    f"{name}: expected a kernel that returns tensors of its own, got memory of an argument"
                )
        return result

    return run


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among ``values``, and in the lists among them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [element for element in value if isinstance(element, Tensor)]
    return found


def _seen_by_dynamo(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel``, the fake one or a body: a graph that Dynamo traces it into isn't cached by AOTAutograd.

    That cache knows an op by its name only. From an earlier process it would bring a derivative, a body or a
    composition that has been changed since, and from an earlier call the value that a float had then
    (pytorch#144344, #197889). The cache of compiled graphs below it knows what they are made of and stays.
    """

    def run(*args: Any) -> Any:
        if CompileContext.try_get() is not None:
            _compile_without_autograd_cache()
        return kernel(*args)

    return run


def _compile_without_autograd_cache() -> None:
    """Turn AOTAutograd's cache off until the compilation that is running has ended."""
    from torch._dynamo.callback import callback_handler

    # There is no public way to see whether one is running that will call back; exporting doesn't, nor use the cache.
    running = callback_handler._CompilationCallbackHandler__pending_callbacks_counter  # type: ignore[attr-defined]
    if not running or _autograd_cache:
        return
    if _restore_autograd_cache not in callback_handler.end_callbacks:  # torch.compiler.reset() clears them
        callback_handler.register_end_callback(_restore_autograd_cache)
    for name in ("enable_autograd_cache", "enable_remote_autograd_cache"):
        _autograd_cache[name] = getattr(torch._functorch.config, name)
        setattr(torch._functorch.config, name, False)


_autograd_cache: dict[str, Any] = {}  # AOTAutograd's settings before a compilation turned them off


def _restore_autograd_cache(_: Any) -> None:
    for name, value in _autograd_cache.items():
        setattr(torch._functorch.config, name, value)
    _autograd_cache.clear()


def _library_of(op: OpOverload) -> torch.library.Library:
    if not isinstance(op, OpOverload) or op not in _libraries:
        raise TypeError(f"op: expected an operator made by custom_ops.library.define, got {op!r}")
    return _libraries[op]


def _with_defaults(op: OpOverload, fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` called with all of ``op``'s arguments: the dispatcher drops those equal to a default."""
    if not any(argument.has_default_value() for argument in op._schema.arguments):
        return fn
    return lambda *args: fn(*fill_defaults(op._schema, args, {})[0])


def _dispatch_key(device: str) -> str:
    return torch._C._dispatch_key_for_device(device)


def _callable(fn: Any) -> Callable[..., Any]:
    if not callable(fn):
        raise TypeError(f"kernel: expected a function, got {fn!r}")
    return fn


def _imported_on_first_call(path: str) -> Callable[..., Any]:
    module, _, attribute = path.partition(":")
    if not (module and attribute):
        raise ValueError(f'kernel: expected a function or "package.module:function", got {path!r}')
    target: Callable[..., Any] | None = None

    def run(*args: Any) -> Any:
        nonlocal target
        if target is None:
            target = getattr(importlib.import_module(module), attribute)
        return target(*args)

    return run


def _after_import(module: str, callback: Callable[[], None]) -> None:
    """Call back once ``module``, slow to import, has been imported by someone else; now if it has been."""
    with _AfterImport.lock:
        spec = getattr(sys.modules.get(module), "__spec__", None)
        imported = module in _AfterImport.imported or (spec and not getattr(spec, "_initializing", False))
        if not imported:
            _AfterImport.callbacks.setdefault(module, []).append(callback)
    if imported:
        callback()


class _AfterImport(importlib.abc.MetaPathFinder):
    """Threads may import several of the modules at once, and define ops meanwhile."""

    callbacks: dict[str, list[Callable[[], None]]] = {}
    imported: set[str] = set()
    lock = threading.Lock()
    thread = threading.local()

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        searching = self.thread.__dict__.setdefault("searching", set())
        if fullname not in self.callbacks or fullname in searching:
            return None
        searching.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            searching.discard(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            with self.lock:
                self.imported.add(fullname)
                waiting = self.callbacks.pop(fullname, [])
            for callback in waiting:
                callback()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _AfterImport())
