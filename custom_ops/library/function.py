"""The derivatives of an operator: one Function, applied a level at a time on the op's ``Autograd`` dispatch key."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from custom_ops.library import _dtensor
from custom_ops.library._defined import DEFINED, Defined, add_rule, forget_compiled, functional, place, with_defaults
from custom_ops.library._torch import (
    CompileContext,
    FunctionMeta,
    OpOverload,
    SingleLevelFunction,
    any_requires_grad,
    below_autograd,
    call_of,
    compiled_autograd_key,
    forward_level,
    forward_mode,
    has_kernel,
    implement,
    is_jvp,
    operators_of,
    opname,
    own_library,
    schema,
    single_level,
    transforms_are_active,
    without_autograd_cache,
)

__all__ = ["Function", "function_of"]


class _FunctionMeta(FunctionMeta):
    """A metaclass that keeps Dynamo from special-casing these classes.

    Dynamo traces ``X.apply`` of a plain ``autograd.Function`` by inlining forward and backward, but refuses a class
    with a ``jvp``. It recognises a plain Function by ``type(X) is FunctionMeta``. With any other metaclass it inlines
    ``apply`` itself, which calls the registered op here.
    """

    def __init__(cls, name: str, bases: tuple[type, ...], attrs: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(name, bases, attrs)  # FunctionMeta takes no class arguments


class Function(torch.autograd.Function, metaclass=_FunctionMeta):
    """An ``autograd.Function`` that is the derivative of one operator.

    Subclass it with ``op=``, and write ``setup_context``, ``backward`` and ``jvp`` as PyTorch
    documents them for a Function with a separate ``setup_context``; ``forward`` is the op's kernel
    and isn't written again. ``apply`` calls the op; override it to shape inputs or outputs.

    A list of tensors is a list in ``inputs``, in ``needs_input_grad`` and in the tangents, and ``backward`` returns a
    list or None for it. An op that returns a list returns a tuple to the Function, which takes a gradient for each
    tensor.

    Undefined gradients arrive as ``None`` (there is no ``set_materialize_grads`` to call), but at least one of them is
    defined. Whatever ``backward`` and ``jvp`` compute may be differentiated again, so anything that they save besides
    inputs must be an integer or bit mask, or carry its own derivative. Save tensors with ``save_for_backward``, never
    as attributes of ``ctx``; ``jvp`` gets the same ones, unless ``save_for_forward`` saves others for it. A missing
    ``jvp`` or ``backward`` raises where it is needed.

    The op may be anyone's: one by `define` or `compose`, ``torch.library.custom_op``, ``torch.library.triton_op`` or
    C++. What belongs to the op, such as `vmap`, can be registered once it has its Function. Arguments by keyword only
    come last in ``inputs``. Writing the same class again replaces the former one.

    Raises ``TypeError`` if ``op`` isn't an operator, mutates or aliases an argument, or already has a derivative.

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

    def __init_subclass__(cls, op: Any = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if op is not None:
            _attach(cls, op)


def function_of(op: Any) -> type[Function] | None:
    """Return the Function attached to ``op``, or None.

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
        <class 'custom_ops.library.function.Shown'>
    """
    return next((DEFINED[op].function for op in operators_of(op) if op in DEFINED), None)


def _attach(function: type[Function], op: Any) -> None:
    op = _operator(op)
    for name, instead in (("forward", "kernel"), ("vmap", "vmap")):  # torch would never call them
        if getattr(function, name) is not getattr(torch.autograd.Function, name):
            raise TypeError(f"{function.__name__}: expected no {name}, which is what library.{instead}({op}) is for")
    former = DEFINED[op].function
    if former is not None:
        if place(former) != place(function):
            raise TypeError(f"op: {op} already has the Function {former.__name__}")
        forget_compiled()
    add_rule(op, lambda op: _derive(op, function))
    if "apply" not in function.__dict__:
        function.apply = staticmethod(lambda *args, **kw: op(*untraced(op, *args), **kw))  # type: ignore[method-assign]


def _operator(value: Any) -> OpOverload:
    """Return the operator that ``value`` is; make a record of it if the bridge hasn't made it."""
    operators = operators_of(value)
    if len(operators) != 1:
        told = " or ".join(f"torch.ops.{op}" for op in operators)
        raise TypeError(f"op: expected an operator{told and ', '}{told}, got {value!r}")
    (op,) = operators
    if op not in DEFINED:
        _adopt(op)
    return op


def _adopt(op: OpOverload) -> None:
    _refuse_memory_of_arguments(op)
    library, derived = own_library(op)
    if library is None:
        if has_kernel(op, "CompositeImplicitAutograd"):
            raise TypeError(
                f"op: {op} has a kernel for all devices that autograd differentiates by itself: register it for "
                '"CPU", "CUDA", ... instead, to give the op a derivative of its own'
            )
        derived = any(has_kernel(op, key) for key in ("Autograd", "AutogradCPU", "AutogradCUDA"))
        library = torch.library.Library(op.namespace, "FRAGMENT")  # noqa: TOR901 (kept as long as the process)
    if derived:
        raise TypeError(
            f"op: {op} has a derivative already: take away its register_autograd or its kernel for Autograd, and "
            "write the derivative as a library.Function"
        )
    for former in [former for former in DEFINED if former.name() == op.name()]:
        del DEFINED[former]  # torch.library.custom_op has defined it again
    DEFINED[op] = Defined(library, foreign=True)
    implement(library, opname(op), with_defaults(op, autograd_kernel(op)), "Autograd")


def _refuse_memory_of_arguments(op: OpOverload) -> None:
    arguments = schema(op).arguments
    written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    if written:
        names, tensors = ", ".join(a.name for a in arguments), ", ".join(written)
        copies = ", ".join(f"{name}.clone()" for name in written)
        raise TypeError(
            f"op: expected one that writes to no argument, and {op} writes to {tensors}. Give the Function to an op "
            f"that calls it on copies, by library.compose: def functional({names}): {tensors} = {copies}; "
            f"torch.ops.{op}({names}); return {tensors}"
        )
    if any(value.alias_info is not None for value in (*arguments, *schema(op).returns)):
        raise TypeError(
            f"op: expected one that returns tensors of its own, and {op} returns memory of an argument. Give the "
            "Function to an op by library.compose that calls it and returns a copy"
        )


def _derive(op: OpOverload, function: type[Function]) -> None:
    known = DEFINED[op]
    known.function = function
    _build_later(op, known)


def untraced(op: OpOverload, *args: Any) -> tuple[Any, ...]:
    """Return ``args``; raise if ``torch.jit.trace`` passes a tensor for a size, as it would keep the example's size."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        for argument, value in zip(schema(op).arguments, args):
            if isinstance(value, Tensor) and "Tensor" not in str(argument.type):
                raise RuntimeError(
                    f"{op}: {argument.name} depends on the size of a tensor, which torch.jit.trace would keep as it is "
                    "now: use torch.export or torch.compile"
                )
    return args


def _build_later(op: OpOverload, known: Defined) -> None:
    """Build ``op``'s twin class on the first call that needs it, so that importing many ops stays fast."""

    def build(*args: Any) -> Any:
        known.apply = _twin(op, known.function).apply
        return known.apply(*args)

    known.apply = build


def _twin(op: OpOverload, function: type[Function] | None) -> Any:
    """Return the class that runs ``function`` at a single autograd level, or one whose derivatives raise if it is None.

    Functorch itself builds such a class for each level of a Function, but this one doesn't bind a signature at every
    call.
    """

    def own(name: str) -> Any:
        method = getattr(function, name, None)
        return None if method is getattr(torch.autograd.Function, name) else method

    call = _by_position(op)
    below = _below(op, DEFINED[op])
    setup_context, backward, jvp = own("setup_context"), own("backward"), own("jvp")
    lists = bool(_lists_of_tensors(op))

    def forward(ctx: Any, *args: Any) -> Any:
        if lists:
            ctx, args = _Nested(ctx, args[0]), _nested(*args)
        if transforms_are_active():
            # autograd turns gradients off here, but the outer transforms still need theirs.
            with torch.enable_grad(), forward_mode(True), below_autograd():
                output = call(*args)
        else:
            with below_autograd():
                output = below(*args)
        ctx.materialize_grads = False
        if isinstance(output, list):
            output = tuple(output)  # autograd wouldn't take the elements of a list for outputs
        if setup_context is not None:
            setup_context(ctx, args, output)
            if jvp is not None and ctx.to_save and not ctx.saved_for_forward:
                ctx.save_for_forward(*ctx.to_save)
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
        if not transforms_are_active():
            return jvp(ctx, *tangents)
        # Forward mode is on for the outer transforms, as in forward; at this level the saved tensors are constants.
        with forward_mode(True):
            return jvp(_Primals(ctx), *tangents)

    members = {
        "forward": staticmethod(forward),
        "backward": staticmethod(backward_of_defined),
        "jvp": staticmethod(jvp_at_all_levels),
        "_compiled_autograd_key": staticmethod(compiled_autograd_key),
        "__module__": __name__ if function is None else function.__module__,
    }
    name = opname(op) if function is None else function.__name__
    twin: Any = type(name, (SingleLevelFunction,), members)
    twin._backward_cls.apply = backward_of_defined  # lets the engine call it without a lookup
    return twin


class _Primals:
    """A Function's ctx whose saved tensors don't have the tangents of the current level."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx

    @property
    def saved_tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(
            None if t is None else torch.autograd.forward_ad.unpack_dual(t, level=0).primal
            for t in self._ctx.saved_tensors
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _below(op: OpOverload, known: Defined) -> Callable[..., Any]:
    """Return what runs ``op`` below autograd. The kernels of a foreign op haven't been checked yet."""
    call = known.body or _by_position(op)
    return functional(op.name(), call) if known.foreign else call


def _by_position(op: OpOverload) -> Callable[..., Any]:
    """Return ``op``'s call, which takes all arguments by position."""
    call = call_of(op)
    names = [argument.name for argument in schema(op).arguments if argument.kwarg_only]
    if not names:
        return call
    first = len(schema(op).arguments) - len(names)
    return lambda *args: call(*args[:first], **dict(zip(names, args[first:])))


def _lists_of_tensors(op: OpOverload) -> list[bool]:
    """Return whether each argument is a list of tensors, which autograd handles singly; empty if none is."""
    found = [re.search(r"List\[(Optional\[)?Tensor", str(argument.type)) for argument in schema(op).arguments]
    return [match is not None for match in found] if any(found) else []


def _flat(lengths: Sequence[int | None], values: Sequence[Any]) -> list[Any]:
    """Return ``values`` with each list replaced by its elements; ``lengths`` has the lists' lengths, else None.

    A None for a whole list becomes a None for each of its tensors.
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
    """Invert `_flat`."""
    values = iter(flat)
    return tuple(next(values) if length is None else [next(values) for _ in range(length)] for length in lengths)


class _Nested:
    """A Function's ctx that shows lists of tensors as the op's arguments have them."""

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


class _Calls(threading.local):
    within_jvp = False


_calls = _Calls()


@contextmanager
def _within(jvp: bool) -> Iterator[None]:
    before = _calls.within_jvp
    _calls.within_jvp = before or jvp
    try:
        yield
    finally:
        _calls.within_jvp = before


def in_forward_mode() -> bool:
    """Return whether a call of an op is differentiated in forward mode, at any level of torch.func."""
    return forward_level() >= 0 or _calls.within_jvp


def autograd_kernel(op: OpOverload) -> Callable[..., Any]:
    """Return ``op``'s Autograd kernel, which applies its Function at one level, or at none if no derivative is
    needed.
    """
    known = DEFINED[op]
    _build_later(op, known)
    below = _below(op, known)
    lists = _lists_of_tensors(op)

    def run(*args: Any) -> Any:
        _dtensor.register_waiting()
        if known.foreign and CompileContext.try_get() is not None:
            without_autograd_cache()
        flat = args
        if lists:
            lengths = tuple(len(a) if of_tensors and a is not None else None for of_tensors, a in zip(lists, args))
            flat = (lengths, *_flat(lengths, args))
        if transforms_are_active():
            with single_level(), _within(is_jvp()):
                return known.apply(*flat)
        # A dual tensor carries its tangent even where gradients are off.
        if forward_level() < 0 and not (torch.is_grad_enabled() and any_requires_grad(*flat)):
            with below_autograd():
                return below(*args)
        return known.apply(*flat)

    return run
