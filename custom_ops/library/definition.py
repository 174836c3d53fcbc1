"""The definition of operators and their kernels."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from custom_ops.library import _dtensor
from custom_ops.library._defined import DEFINED, defined, forget_compiled, functional, with_defaults
from custom_ops.library._defined import place as _place
from custom_ops.library._numbers import declare, keep_symbolic
from custom_ops.library._torch import (
    CompileContext,
    OpOverload,
    below_functionalize,
    current_level,
    destroy,
    dispatch_key_for_device,
    forward_level,
    implement,
    operators_of,
    opname,
    replace_value,
    set_call,
    without_autograd_cache,
)
from custom_ops.library.function import in_forward_mode

__all__ = ["compose", "define", "dynamic_size", "kernel", "override_kernel"]


def define(name: str) -> Callable[[Callable[..., Any]], OpOverload]:
    """Define the operator ``name`` ("namespace::op") from an annotated Python function.

    The annotations give the schema (``Tensor``, ``int``, ``float``, ``bool``, ``str``, ``torch.dtype``, their
    ``Optional``, sequences of them; a tuple of ``Tensor`` for several outputs). The body is the fake kernel: it returns
    empty tensors of the right shape, dtype, stride and device and never reads data. `dynamic_size` stands for a size
    that depends on data.

    Ops are functional: they neither mutate nor alias their inputs. A derivative of the op raises until a `Function` is
    attached.

    Returns the operator itself, ``torch.ops.namespace.op.default``. Defining it again by the same function, as when the
    cell of a notebook is run once more or a module is reloaded, ends the former operator with all that was registered
    for it. Calls of the former go to the new one.

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
        known = DEFINED[op]
        known.fake = _traced(_checked_fake(opname(op), fake))
        torch.library.register_fake(name, known.fake, lib=known.library)
        return op

    return decorate


def compose(name: str, view: bool = False) -> Callable[[Callable[..., Any]], OpOverload]:
    """Define the operator ``name`` from an annotated Python function that is its kernel on every device.

    Use it for a composition of torch's or our ops that needs a derivative of its own: attach a `Function` and a `vmap`
    rule. The whole op is differentiated; below autograd only its body remains. ``torch.compile`` therefore fuses it
    with its neighbours, and there is no kernel to write and no opaque call. ``torch.export`` keeps the op, and thereby
    the derivative, in the program.

    With ``view=True`` the body returns its first argument as it is, and the op returns a view of it, so an op that only
    changes a gradient costs nothing in forward. As with any view from a Function, autograd refuses in-place writes to
    the output and to its base; under ``torch.func.functionalize``, which makes views of all writes, it doesn't, and
    after a write to the base the output has the base's derivative. In forward mode the op returns a copy instead of a
    view.

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
        run = _traced(_viewing(body) if view else functional(name, body))
        op = _declare(name, body, run, view)
        DEFINED[op].library.impl(opname(op), with_defaults(op, run), "CompositeExplicitAutograd")
        if view:
            DEFINED[op].library.impl(opname(op), with_defaults(op, _functionalized(op, run)), "Functionalize")
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
    """Return an operator with the schema of ``like``'s annotations and its Autograd kernel, but nothing below that."""
    namespace, short = _split(name)
    for parameter in inspect.signature(like).parameters.values():
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            raise ValueError(f"{like.__name__}: expected positional arguments only, got {parameter}")
    former = _former(name, like)
    schema = _schema(short, like)
    if view:
        annotated = re.sub(r"\(Tensor (.*) -> Tensor$", r"(Tensor(a) \1 -> Tensor(a)", schema)
        if annotated == schema:
            raise ValueError(f"{like.__name__}: expected a tensor first and one as result, got {schema}")
        schema = annotated
    if former is not None:
        _end(former)
    op = declare(torch.library.Library(namespace, "FRAGMENT"), schema, body)  # noqa: TOR901 (kept as long as its op)
    if former is not None:
        set_call(former, op)  # torch would crash in a call of an operator that is no more
    op.__doc__ = like.__doc__
    DEFINED[op].place = _place(like)
    return op


def _former(name: str, like: Callable[..., Any]) -> OpOverload | None:
    """Return the operator of this name that the same function made before; raise if another has made it."""
    namespace, short = _split(name)
    packet = getattr(getattr(torch.ops, namespace), short, None)
    if packet is None:
        return None
    (former, *_) = operators_of(packet)
    if former not in DEFINED or DEFINED[former].place != _place(like):
        raise ValueError(f"name: expected a new one, and there is an operator {name} already")
    return former


def _end(op: OpOverload) -> None:
    """End ``op`` and its twins."""
    library = DEFINED[op].library
    for other in [other for other, known in DEFINED.items() if known.library is library]:
        _dtensor.forget(other)
        del DEFINED[other]
    destroy(library)
    forget_compiled()


def _schema(short: str, like: Callable[..., Any]) -> str:
    """Return the schema by ``torch.library.infer_schema``, called once per annotation rather than per op to import
    fast.
    """
    try:
        signature = inspect.signature(like, eval_str=True)
        parameters = signature.parameters.values()
        if all(parameter.default is parameter.empty for parameter in parameters):
            arguments = ", ".join(f"{_type_of(p.annotation, False)} {p.name}" for p in parameters)
            return f"{short}({arguments}) -> {_type_of(signature.return_annotation, True)}"
    except (NameError, TypeError, ValueError):  # torch names the error below
        pass
    return torch.library.infer_schema(like, mutates_args=(), op_name=short)


@functools.cache
def _type_of(annotation: Any, returned: bool) -> str:
    def op(x: Any) -> Any: ...

    op.__annotations__ = {"x": Tensor, "return": annotation} if returned else {"x": annotation, "return": Tensor}
    argument, _, result = torch.library.infer_schema(op, mutates_args=(), op_name="op").partition(" -> ")
    return result if returned else argument.removeprefix("op(").removesuffix(" x)")


def dynamic_size(least: int = 0) -> Any:
    """Return a new size of at least ``least`` that depends on data, for an output of a fake kernel.

    It is ``torch.library.get_ctx().new_dynamic_size``, except under forward-mode AD, which asks whether a tangent is
    empty. A tracer can't know that of such a size. It is therefore taken to be at least 1 there, and a program compiled
    of a ``jvp`` raises where it is 0.

    Example:
        >>> import torch
        >>> from torch import Tensor
        >>> from custom_ops import library
        >>> @library.define("docs::places")
        ... def places(x: Tensor) -> Tensor:
        ...     return x.new_empty(library.dynamic_size(), dtype=torch.int64)
        >>> @library.kernel(places, "cpu")
        ... def _(x):
        ...     return torch.where(x > 0)[0]
        >>> torch.compile(places, fullgraph=True, backend="eager")(torch.tensor([-1.0, 2.0]))
        tensor([1])
    """
    return torch.library.get_ctx().new_dynamic_size(min=max(least, 1) if in_forward_mode() else least)


def kernel(op: OpOverload, *devices: str) -> Callable[[Any], Any]:
    """Register the decorated callable as ``op``'s kernel on ``devices`` ("cpu", "cuda", ...).

    ``kernel(op, "cuda")("package.module:function")`` imports the kernel on its first call, so defining the op imports
    nothing. A kernel for the same device replaces the former one.

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
    op, known = defined(op)
    if not devices or not all(isinstance(device, str) for device in devices):
        raise ValueError(f'devices: expected some of "cpu", "cuda", ..., got {devices}')

    def decorate(fn: Any) -> Any:
        run = _imported_on_first_call(fn) if isinstance(fn, str) else _callable(fn)
        run = with_defaults(op, functional(op.name(), run))
        for device in devices:
            implement(known.library, opname(op), run, dispatch_key_for_device(device))
        return fn

    return decorate


@contextmanager
def override_kernel(op: OpOverload, device: str, fn: Callable[..., Any]) -> Iterator[None]:
    """Replace ``op``'s kernel on ``device`` by ``fn`` within the context.

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
    op, _ = defined(op)
    lib = torch.library.Library(op.namespace, "IMPL")  # noqa: TOR901 (destroyed below)
    try:
        implement(lib, opname(op), with_defaults(op, fn), dispatch_key_for_device(device))
        yield
    finally:
        destroy(lib)


def _functionalized(op: OpOverload, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return a view's kernel for ``torch.func.functionalize``.

    The result is a view of the argument there, so that writes to either are seen in both. Its value comes from the op
    itself at the next level, as what that level differentiates has to be the op and not ``run``.
    """

    def kernel(*args: Any) -> Any:
        view = run(*args)
        if current_level() is not None:  # otherwise AOTAutograd is tracing, below autograd
            replace_value(view, below_functionalize(op, args))
        return view

    return kernel


def _viewing(body: Callable[..., Any]) -> Callable[..., Any]:
    """Return a view of what ``body`` returns, or a copy in forward mode, where the tangent would have to be a view too.

    ``alias`` is the plainest view there is. With views that take sizes, compiled in-place writes went unnoticed.
    """

    def run(*args: Any) -> Any:
        if body(*args) is not args[0]:
            raise TypeError(f"{body.__name__}: expected the first argument back, as the op is a view")
        # A view of an inference tensor is an inference tensor too, and autograd doesn't see what is computed from it.
        unseen = args[0].is_inference() and not torch.is_inference_mode_enabled()
        copied = unseen or forward_level() >= 0
        return args[0].clone() if copied else torch.ops.aten.alias.default(args[0])

    return run


def _checked_fake(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Check the devices of ``fake``'s arguments; the dispatcher calls it as soon as one of them is on the meta
    device.
    """

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


def _traced(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``kernel``, a fake kernel or a body, so that AOTAutograd doesn't cache a graph that Dynamo traces it into.

    That cache identifies an op by its name only. From an earlier process it would return a derivative, a body or a
    composition that has changed since, and from an earlier call the value that a float had then (pytorch#144344,
    #197889). The cache of compiled graphs below it is keyed by their contents and stays on.
    """

    def run(*args: Any) -> Any:
        _dtensor.register_waiting()
        if CompileContext.try_get() is not None:
            without_autograd_cache()
            keep_symbolic()
        return kernel(*args)

    return run


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
