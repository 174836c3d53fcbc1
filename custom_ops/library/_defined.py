"""The bridge's records of the operators that it has made."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from custom_ops.library._torch import OpOverload, fill_defaults, is_alias_of, operators_of, schema


@dataclass
class Defined:
    """An operator's registrations.

    ``body`` runs in place of a kernel below autograd, if the op is composed; otherwise ``fake`` is its fake kernel.
    ``apply`` runs the op at one level of autograd, with the derivatives of ``function`` if one is attached. Compilers
    get ``composition`` in place of the op, programs for other runtimes ``decomposition``, and ``vmap`` is its batching
    rule. ``rules`` register what was given for the op on it and on ``symbolic``, its twin for symbolic numbers. An op
    that the bridge hasn't made is ``foreign`` and has no such twin. The function at ``place`` has defined the op.
    """

    library: torch.library.Library
    body: Callable[..., Any] | None = None
    fake: Callable[..., Any] | None = None
    function: Any = None
    apply: Any = None
    composition: Callable[..., Any] | None = None
    vmap: Callable[..., Any] | None = None
    foreign: bool = False
    decomposition: Callable[..., Any] | None = None
    rules: list[Callable[[OpOverload], None]] = field(default_factory=list)
    symbolic: OpOverload | None = None
    place: tuple[str, str] | None = None


DEFINED: dict[OpOverload, Defined] = {}


def defined(op: Any) -> tuple[OpOverload, Defined]:
    """Return ``op`` as an operator, and its record; raise ``TypeError`` if the bridge has none."""
    operators = operators_of(op)
    if len(operators) != 1 or operators[0] not in DEFINED:
        raise TypeError(
            f"op: expected an operator made by custom_ops.library.define, or one with a library.Function, got {op!r}"
        )
    return operators[0], DEFINED[operators[0]]


def place(definition: Any) -> tuple[str, str]:
    """Return where a function or class is written, by which the next version of the same one is known."""
    return definition.__module__, definition.__qualname__


def add_rule(op: OpOverload, rule: Callable[[OpOverload], None]) -> None:
    """Call ``rule`` with ``op`` and with its twin for symbolic numbers, now or when it is made."""
    known = DEFINED[op]
    rule(op)
    if known.symbolic is not None:
        rule(known.symbolic)
    known.rules.append(rule)


def with_defaults(op: OpOverload, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``fn`` so that it gets all of ``op``'s arguments by position, as the dispatcher drops those equal to a
    default. Those by keyword only come last.
    """
    if not any(argument.has_default_value() or argument.kwarg_only for argument in schema(op).arguments):
        return fn

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = fill_defaults(schema(op), args, kwargs)
        return fn(*args, *kwargs.values())

    return run


def forget_compiled() -> None:
    """Forget all compiled programs, which may hold what an op was before its registrations changed."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def functional(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``kernel`` to raise if it returns memory of an argument, which autograd and the compiler would take for
    fresh.
    """

    def run(*args: Any) -> Any:
        result = kernel(*args)
        for output in _tensors((result,)):
            if any(output is given or is_alias_of(output, given) for given in _tensors(args)):
                raise RuntimeError(
                    f"{name}: expected a kernel that returns tensors of its own, got memory of an argument"
                )
        return result

    return run


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    """Return the tensors among ``values`` and in the lists among them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [element for element in value if isinstance(element, Tensor)]
    return found
