"""Triton's interpreter without the work it repeats at each launch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch


class _KeptScope:
    """What a launch restores at its end: nothing."""

    def restore(self) -> None:
        pass


def _index(scalar: Any) -> int:
    """Triton 3.6 leaves an array of one element to ``int``, which NumPy 2.4 refuses."""
    return int(scalar.handle.data.item())


@contextmanager
def patched_once() -> Iterator[None]:
    """Within the context ``triton.language`` is patched for interpretation once, and restored at the end.

    By itself the interpreter looks through the whole language at each launch and at each call of a jitted
    function by another, which takes longer than most of our kernels. It also computes each sum and product of integers
    once more in 64 bits, to see whether it overflows, and drops the answer.
    """
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    patch_language: Callable[[Any], Any] = interpreter._patch_lang
    patch_tensor: Callable[[Any, Any], None] = interpreter._patch_lang_tensor
    builder = interpreter.interpreter_builder
    scopes = []
    seen: dict[Any, _KeptScope] = {}

    def patch_once(fn: Any) -> _KeptScope:
        if fn not in seen:
            scopes.append(patch_language(fn))
            seen[fn] = _KeptScope()
        return seen[fn]

    def patch_index_too(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", _index)

    with (
        patch.object(interpreter, "_patch_lang", patch_once),
        patch.object(interpreter, "_patch_lang_tensor", patch_index_too),
        patch.object(builder, "options", replace(builder.options, sanitize_overflow=False)),
    ):
        try:
            yield
        finally:
            while scopes:
                scopes.pop().restore()
