"""Public functions under tracers, some of which pass something else than tensors: torch.fx and torch.jit.script."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch.fx
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import Parameter

from custom_ops.library._torch import transforms_are_active

F = TypeVar("F", bound=Callable[..., Any])


def leaf(function: F) -> F:
    """Let ``torch.fx.symbolic_trace`` keep a call of ``function`` as one node, as it has no value for its checks.

    ``torch.jit.script``, which compiles the source of all that a program calls, gets an error that says what to do.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.fx.Proxy):
                return value.tracer.create_proxy("call_function", call, args, kwargs)
        return function(*args, **kwargs)

    def refuse() -> None:
        raise RuntimeError(
            f"custom_ops.{function.__name__}: torch.jit.script can't compile an op with derivatives in Python: use "
            "torch.compile, torch.export or torch.jit.trace, or call convert_activations(model, to='torch') before"
        )

    # Dynamo counts compilations by code object, and would count those of all functions together.
    call.__code__ = call.__code__.replace(co_name=function.__name__)  # type: ignore[attr-defined]
    call.__prepare_scriptable__ = refuse  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def have_values(*tensors: Tensor) -> bool:
    """Return whether Python can read the numbers in the tensors, and nothing records what it then does."""
    if torch.compiler.is_compiling() or transforms_are_active():
        return False
    if torch.jit.is_tracing() or get_proxy_mode() is not None:  # type: ignore[attr-defined]
        return False
    return all(type(t) in (Tensor, Parameter) and not t.is_meta for t in tensors)
