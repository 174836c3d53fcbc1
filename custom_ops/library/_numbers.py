"""Float arguments that stay symbolic in a compiled program, so that a new value doesn't compile it anew.

A schema's ``float`` holds no symbolic number, so torch would compile a program for each value. While it compiles,
a call of an op with a symbolic number goes to a twin of the op with ``Scalar`` for each ``float``. The twin has the
Function and the rules of the op, whose Python computes with symbolic numbers. Below them the compiler gets the op's
composition. If there is none, it gets a second twin with ``Tensor`` for each ``float``, because AOTAutograd passes the
numbers of a compiled program as tensors. Its kernel reads the numbers and calls the op.

Both twins are made by the first call that needs them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from custom_ops.library._defined import DEFINED, Defined, with_defaults
from custom_ops.library._torch import (
    OpOverload,
    call_of,
    during_compilations,
    forget_constants,
    opname,
    schema,
    set_call,
)
from custom_ops.library.function import autograd_kernel
from custom_ops.library.rules import compiled_as

_calls: dict[OpOverload, Any] = {}  # {op: its own call, while a compilation runs}


def as_tensor(number: float, x: Tensor) -> float | Tensor:
    """Return ``number``, or a tensor of it beside ``x`` if it is symbolic.

    ``torch.compile`` keeps a float argument symbolic once it has varied. In a derivative, a composition or a rule it
    stays so as an operand of ``+ - * / **`` or of a comparison, and as an argument of an op of the bridge. As another
    argument of torch's ops, such as a bound of ``clamp``, or as a condition by itself (``if low`` instead of ``if low
    != 0``), it is compiled anew for each value: give torch's ops this tensor there. It isn't rounded to 16 bits, as
    PyTorch doesn't round a number that meets a 16-bit tensor.

    Example:
        >>> import torch
        >>> from torch import Tensor
        >>> from custom_ops import library
        >>> @library.define("docs::at_least")
        ... def at_least(x: Tensor, low: float) -> Tensor:
        ...     return torch.empty_like(x)
        >>> @library.inductor(at_least)
        ... def _(x, low):
        ...     return torch.where(x > low, x, library.as_tensor(low, x))
    """
    if not _is_symbolic(number):
        return number
    # AOTAutograd can turn a product with a symbolic number into one of tensors.
    return torch.ones((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device) * number


def declare(library: torch.library.Library, schema: str, body: Callable[..., Any] | None = None) -> OpOverload:
    """Return a new operator with its Autograd kernel, but nothing below that."""
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op: OpOverload = getattr(getattr(torch.ops, library.ns), name).default
    DEFINED[op] = Defined(library, body)
    library.impl(name, with_defaults(op, autograd_kernel(op)), "Autograd")
    return op


def keep_symbolic() -> None:
    """Let calls with symbolic numbers go to the twins in each compilation from the next on.

    The one that runs has no symbolic number, unless it was asked for, since a number becomes one when it has changed.
    """
    during_compilations(_begin, _end)


def _begin(_: Any) -> None:
    for op in [*DEFINED]:
        if op not in _calls and not DEFINED[op].foreign and (places := _floats(op)):
            _calls[op] = call_of(op)
            set_call(op, _SymbolicOr(op, places))


def _end(_: Any) -> None:
    if not _calls:  # this compilation had begun before, and may have made a symbolic number a constant
        forget_constants()
    while _calls:
        set_call(*_calls.popitem())


def _floats(op: OpOverload) -> list[int]:
    """Return the places of ``op``'s arguments that are floats, or None, or lists of floats."""
    return [i for i, argument in enumerate(schema(op).arguments) if "float" in str(argument.type)]


class _SymbolicOr:
    """``op``'s own call, except with a symbolic number at one of ``places``, which goes to the twin."""

    def __init__(self, op: OpOverload, places: Sequence[int]) -> None:
        self._of, self._places, self._call = op, places, call_of(op)
        self._arguments = schema(op).arguments

    def __hash__(self) -> int:
        return hash(self._call)  # an OpOverload has the hash of its call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = {a.name: value for a, value in zip(self._arguments, args)} | kwargs
        if not any(_is_symbolic(given.get(self._arguments[i].name)) for i in self._places):
            return self._call(*args, **kwargs)
        return _symbolic(self._of)(*(given.get(a.name, a.default_value) for a in self._arguments))


def _is_symbolic(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_is_symbolic(number) for number in value)
    return isinstance(value, (torch.SymFloat, torch.SymInt))


def _twin_schema(op: OpOverload, suffix: str, kind: str) -> str:
    """Return ``op``'s schema under another name, with ``kind`` for ``float`` and without defaults."""
    arguments, _, returned = str(schema(op)).partition("(")[2].rpartition(" -> ")
    arguments = re.sub(r"=[^,)]*", "", arguments.replace(", *", ""))
    arguments = re.sub(r"(^|[ (])float(?=[?\[ ])", rf"\1{kind}", arguments)
    return f"_{opname(op)}_{suffix}({arguments} -> {returned}"


def _symbolic(op: OpOverload) -> OpOverload:
    """Return the twin of ``op`` for symbolic numbers."""
    known = DEFINED[op]
    if known.symbolic is None:
        twin = declare(known.library, _twin_schema(op, "of_symbols", "Scalar"), known.body)
        if known.body is not None:
            known.library.impl(opname(twin), known.body, "CompositeExplicitAutograd")
        else:
            torch.library.register_fake(twin.name(), known.fake, lib=known.library)
            compiled_as(twin, known.library, _below(op, known))
        for rule in known.rules:
            rule(twin)
        known.symbolic = twin
    return known.symbolic


def _below(op: OpOverload, known: Defined) -> Callable[..., Any]:
    """Return what a compiler gets in place of the twin for symbolic numbers."""
    places = _floats(op)
    twin = declare(known.library, _twin_schema(op, "of_tensors", "Tensor"))

    def fake(*args: Any) -> Any:
        return known.fake(*_at(places, args, lambda number: _Unread()))  # type: ignore[misc]

    def kernel(*args: Any) -> Any:
        return op(*_at(places, args, Tensor.item))

    torch.library.register_fake(twin.name(), fake, lib=known.library)
    known.library.impl(opname(twin), kernel, "CompositeExplicitAutograd")

    def run(*args: Any) -> Any:
        if known.composition is not None:
            return known.composition(*args)
        try:
            return twin(*_at(places, args, lambda number: torch.ones((), dtype=torch.float64, device="cpu") * number))
        except (_Read, TypeError):  # torch raises the latter where it is given such a number
            return op(*_at(places, args, float))

    return run


def _at(places: Sequence[int], args: Sequence[Any], change: Callable[[Any], Any]) -> list[Any]:
    """Return ``args`` with the numbers at these places changed."""
    changed = [*args]
    for i in places:
        if isinstance(changed[i], (list, tuple)):
            changed[i] = [change(number) for number in changed[i]]
        elif changed[i] is not None:
            changed[i] = change(changed[i])
    return changed


class _Read(Exception):
    pass


class _Unread:
    """A number in a call of a fake kernel, which raises where the kernel reads it: it has no value there."""

    def _raise(self, *_: Any) -> Any:
        raise _Read("a shape depends on a number")

    __bool__ = __float__ = __int__ = __index__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _raise
    __neg__ = __abs__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _raise
    __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = _raise
    __ceil__ = __floor__ = __round__ = __trunc__ = _raise
