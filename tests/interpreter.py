"""Triton's interpreter without the work it repeats at each launch and at each operation; only tests have it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from operator import index
from typing import Any
from unittest.mock import patch


class _KeptScope:
    """A launch restores nothing at its end."""

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
    once more in 64 bits, to see whether it overflows, and drops the answer; and it makes the type and the shape of each
    result anew, which are kept here by their names.
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

    with ExitStack() as stack:
        for target, name, new in (
            (interpreter, "_patch_lang", patch_once),
            (interpreter, "_patch_lang_tensor", patch_index_too),
            (builder, "options", replace(builder.options, sanitize_overflow=False)),
            *_remembering(interpreter),
        ):
            stack.enter_context(patch.object(target, name, new))
        try:
            yield
        finally:
            while scopes:
                scopes.pop().restore()


def _remembering(interpreter: Any) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """What Triton makes anew for each result though it depends on types only: of what, its name, and the quicker one.

    Types are told apart by their names, but those of pointers to constants, which is why ``element_ty``, ``type`` and
    ``dtype`` are set each time.
    """
    language, semantic = interpreter.tl, type(interpreter.interpreter_semantic)
    np_dtype_of, broadcast, cast = interpreter._get_np_dtype, semantic.broadcast_impl_value, semantic.cast
    make_type, make_tensor = language.block_type.__init__, language.tensor.__init__
    np_dtypes: dict[str, Any] = {}
    types: dict[tuple[Any, ...], dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}

    def get_np_dtype(dtype: Any) -> Any:
        if dtype.name not in np_dtypes:
            np_dtypes[dtype.name] = np_dtype_of(dtype)
        return np_dtypes[dtype.name]

    def type_init(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *map(index, shape))
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = {**vars(self)}
        vars(self).update(types[key], element_ty=element_ty)

    def tensor_init(self: Any, handle: Any, type: Any) -> None:
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = {**vars(self), "handle": None}
        vars(self).update(tensors[type.name], handle=handle, type=type, dtype=type.scalar)

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.type.is_block() and rhs.type.is_block() and [*lhs.type.shape] == [*rhs.type.shape]:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    def cast_to(self: Any, value: Any, dtype: Any, *rounding: Any) -> Any:
        return value if value.type.scalar is dtype.scalar else cast(self, value, dtype, *rounding)

    yield interpreter, "_get_np_dtype", get_np_dtype
    yield language.block_type, "__init__", type_init
    yield language.tensor, "__init__", tensor_init
    yield semantic, "broadcast_impl_value", broadcast_impl_value
    yield semantic, "cast", cast_to
