"""Triton's interpreter without the work it repeats at each launch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class _KeptScope:
    """What a launch restores at its end: nothing."""

    def restore(self) -> None:
        pass


@contextmanager
def patched_once() -> Iterator[None]:
    """Within the context ``triton.language`` is patched for interpretation once, and restored at the end.

    By itself the interpreter looks through the whole language at each launch and at each call of a jitted
    function by another, which takes longer than most of our kernels.
    """
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    patch: Callable[[Any], Any] = interpreter._patch_lang
    scopes = []
    seen: dict[Any, _KeptScope] = {}

    def patch_once(fn: Any) -> _KeptScope:
        if fn not in seen:
            scopes.append(patch(fn))
            seen[fn] = _KeptScope()
        return seen[fn]

    interpreter._patch_lang = patch_once
    try:
        yield
    finally:
        interpreter._patch_lang = patch
        while scopes:
            scopes.pop().restore()
