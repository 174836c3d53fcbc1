"""The bridge's records of the operators that it has made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from custom_ops.library._torch import OpOverload, fill_defaults, schema


@dataclass
class Defined:
    """An operator's registrations.

    ``body`` runs in place of a kernel below autograd, if the op is composed; otherwise ``fake`` is its fake kernel.
    ``apply`` runs the op at one level of autograd, with the derivatives of ``function`` if one is attached. Compilers
    get ``composition`` in place of the op, and programs for other runtimes ``decomposition``. ``rules`` register what
    was given for the op on it and on ``symbolic``, its twin for symbolic numbers.
    """

    library: torch.library.Library
    body: Callable[..., Any] | None = None
    fake: Callable[..., Any] | None = None
    function: Any = None
    apply: Any = None
    composition: Callable[..., Any] | None = None
    decomposition: Callable[..., Any] | None = None
    rules: list[Callable[[OpOverload], None]] = field(default_factory=list)
    symbolic: OpOverload | None = None


DEFINED: dict[OpOverload, Defined] = {}


def defined(op: OpOverload) -> Defined:
    """Return the record of ``op``; raise ``TypeError`` if the bridge hasn't made the op."""
    if not isinstance(op, OpOverload) or op not in DEFINED:
        raise TypeError(f"op: expected an operator made by custom_ops.library.define, got {op!r}")
    return DEFINED[op]


def add_rule(op: OpOverload, rule: Callable[[OpOverload], None]) -> None:
    """Call ``rule`` with ``op`` and with its twin for symbolic numbers, now or when it is made."""
    known = defined(op)
    rule(op)
    if known.symbolic is not None:
        rule(known.symbolic)
    known.rules.append(rule)


def with_defaults(op: OpOverload, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``fn`` so that it gets all of ``op``'s arguments, since the dispatcher drops those equal to a default."""
    if not any(argument.has_default_value() for argument in schema(op).arguments):
        return fn
    return lambda *args: fn(*fill_defaults(schema(op), args, {})[0])
