"""The private names of torch that this package uses, each with the reason.

tests/test_private_names.py reads this file. It fails if torch no longer has a name, and if another file of the package
uses a private one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

# This finds out, without a Python loop, whether a graph is to be built at all.
from torch._C import _any_requires_grad as any_requires_grad

# While a transform of torch.func is active, the Function has to be applied at one level of it.
from torch._C import _are_functorch_transforms_active as transforms_are_active

# An Autograd kernel calls the kernel of its own op with this, which skips autograd.
from torch._C import _AutoDispatchBelowAutograd as below_autograd

# Library.impl takes a dispatch key, where `kernel` takes a device.
from torch._C import _dispatch_key_for_device as dispatch_key_for_device

# Fake tensors have no address to compare, but they can share memory.
from torch._C import _is_alias_of as is_alias_of  # type: ignore[attr-defined]

# A view has its own kernel for functionalize, which asks whether torch.func or AOTAutograd is calling.
from torch._C._functorch import maybe_current_level as current_level

# Functorch refuses a Function that is applied at a single level, except within this context.
from torch._functorch.utils import enable_single_level_autograd_function as single_level

# Only this context, in which Dynamo compiles, shows that Dynamo is tracing a call.
from torch._guards import CompileContext

# This is what torch.library.custom_op returns, which keeps its operator.
from torch._library.custom_ops import CustomOpDef

# This finds it by that operator.
from torch._library.custom_ops import _maybe_get_opdef as opdef_of

# The dispatcher drops arguments that equal their default, and kernels, rules and Functions want all of them.
from torch._library.utils import fill_defaults

# These are the types of operators, which have no public names.
from torch._ops import OpOverload, OpOverloadPacket

# The battery runs ops under a mode without data, to read the shapes that a fake kernel gives.
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

# AOTAutograd traces within this mode, in which a compiler's composition replaces an op.
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

# The forward mode of autograd has no public state, but a dual tensor carries its tangent even where gradients are off.
from torch.autograd import forward_ad

# Dynamo recognises a plain Function by this metaclass. Ours has another one, so that Dynamo inlines `apply`. See
# `Function`.
from torch.autograd.function import FunctionMeta

# This Function skips functorch's dispatch to its levels, since the dispatcher already does that for an op.
from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction

# The battery records each op that is called; this mode is documented under a private name.
from torch.utils._python_dispatch import TorchDispatchMode

# A layer's geometry is a tuple of tensors that move together.
from torch.utils._pytree import tree_map

__all__ = [
    "CompileContext",
    "CustomOpDef",
    "DynamicOutputShapeException",
    "FakeTensorMode",
    "FunctionMeta",
    "FunctionalTensor",
    "FunctionalTensorMode",
    "OpOverload",
    "OpOverloadPacket",
    "SingleLevelFunction",
    "TorchDispatchMode",
    "any_requires_grad",
    "aot_inductor_package",
    "assert_async",
    "below_autograd",
    "call_of",
    "check",
    "compiled_afresh",
    "compiled_autograd_key",
    "current_level",
    "destroy",
    "dispatch_key_for_device",
    "during_compilations",
    "fill_defaults",
    "forget_constants",
    "forward_level",
    "forward_mode",
    "has_kernel",
    "implement",
    "is_alias_of",
    "is_composed",
    "is_packaging",
    "no_recompiles",
    "no_vmap_fallback",
    "opdef_of",
    "operators_of",
    "opname",
    "own_library",
    "register_autocast",
    "schema",
    "set_call",
    "single_level",
    "transforms_are_active",
    "tree_map",
    "version",
    "without_autograd_cache",
]

# No other check looks at values on a GPU without waiting for them.
assert_async = torch._assert_async

# torch.export documents this check, which also works for sizes that aren't known yet.
check = torch._check

# Compiled autograd looks this up on a Function that it traces, but only torch.autograd.Function has it.
compiled_autograd_key = torch.autograd.Function._compiled_autograd_key

# This turns forward mode on again where it is off; torch.autograd.forward_ad has no function for that.
forward_mode = forward_ad._set_fwd_grad_enabled


def register_autocast(op: OpOverload, device: str, dtype: torch.dtype, library: torch.library.Library) -> None:
    """Cast ``op``'s tensors of a device under autocast.

    Torch 2.10 overwrites the kernels of the other devices that AOTAutograd traces, and they then cast no tensor.
    """
    own = torch._C.DispatchKey.__members__["Autocast" + dispatch_key_for_device(device)]
    others = {key: kernel for key, kernel in op.py_kernels.items() if key != own}
    torch.library.register_autocast(op.name(), device, dtype, lib=library)
    op.py_kernels.update(others)


def opname(op: OpOverload) -> str:
    """Return ``op``'s name without its namespace."""
    return op.name().partition("::")[2]


def schema(op: OpOverload) -> Any:
    """Return ``op``'s schema, which torch.library takes but never returns."""
    return op._schema


def call_of(op: OpOverload) -> Any:
    """Return ``op`` without the Python frame of its ``__call__``."""
    return op._op


def operators_of(value: Any) -> list[OpOverload]:
    """Return the operators under the name that ``value`` has in ``torch.ops`` or as ``torch.library.custom_op``."""
    if isinstance(value, CustomOpDef):
        return [value._opoverload]
    if isinstance(value, OpOverloadPacket):
        return [getattr(value, overload) for overload in value.overloads()]
    return [value] if isinstance(value, OpOverload) else []


def own_library(op: OpOverload) -> tuple[torch.library.Library | None, bool]:
    """Return the library of an op by ``torch.library.custom_op``, which ends with the op, and whether the op has a
    derivative already.
    """
    made = opdef_of(op)
    return (None, False) if made is None else (made._lib, made._backward_fn is not None)


def has_kernel(op: OpOverload, key: str) -> bool:
    """Return whether ``op`` has a kernel under a dispatch key, for which torch.library has no query."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key)


def implement(library: torch.library.Library, name: str, kernel: Callable[..., Any], key: str) -> None:
    """Register ``kernel`` in place of a former one, for which older versions want a word and all warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl(name, kernel, key, allow_override=True)


def below_functionalize(op: OpOverload, args: tuple[Any, ...]) -> Any:
    """Call ``op`` at the level below the running ``torch.func.functionalize``, as torch's own kernels for it do, for
    which there is no public way.
    """
    sync = torch._sync  # type: ignore[attr-defined]
    values = [*args]
    for i, arg in enumerate(args):
        if isinstance(arg, Tensor) and torch._is_functional_tensor(arg):
            sync(arg)
            values[i] = torch._from_functional_tensor(arg)
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)):
        return op(*values)


def replace_value(view: Tensor, value: Tensor) -> None:
    """Give a tensor under ``torch.func.functionalize`` another value, which Python can do only so."""
    torch._functionalize_replace(view, value)


def set_call(op: OpOverload, call: Any) -> None:
    """Let calls of ``op`` from Python go to ``call``, which `call_of` then returns; torch has no hook before the
    dispatcher, where a symbolic number has become a float.
    """
    op._op = op.overloadpacket._op = call


def is_jvp() -> bool:
    """Return whether the running transform of torch.func is ``jvp``, which leaves no other trace under a tracer."""
    functorch: Any = torch._C._functorch
    return functorch.peek_interpreter_stack().key() == functorch.TransformType.Jvp


def forward_level() -> int:
    """Return the level of forward-mode AD, below 0 outside of it, for which there is no public function."""
    return forward_ad._current_level


def destroy(library: torch.library.Library) -> None:
    """End the registrations of ``library``, which otherwise last as long as the object."""
    library._destroy()


def saved_tensors_hooks_refused() -> str | None:
    """Return the error that hooks of saved tensors raise, which an interrupted ``torch.func.grad`` leaves behind."""
    return torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()


def refuse_saved_tensors_hooks(error: str | None) -> None:
    """Let hooks of saved tensors raise this error, or none, for which torch has a context only."""
    autograd: Any = torch._C._autograd
    if error is None:
        autograd._saved_tensors_hooks_enable()
    else:
        autograd._saved_tensors_hooks_disable(error)


def version(tensor: Tensor) -> int:
    """Return how often ``tensor`` was written to, which shows the battery even a write that changes no value."""
    return tensor._version


# This keeps AOTAutograd's settings from before they were turned off for a compilation.
_settings: dict[str, bool] = {}


def without_autograd_cache() -> None:
    """Turn AOTAutograd's cache off until the running compilation has ended.

    There is no public way to see whether a compilation is running that will call back. An export doesn't, but it
    doesn't use the cache either.
    """
    from torch._dynamo.callback import callback_handler

    running = callback_handler._CompilationCallbackHandler__pending_callbacks_counter  # type: ignore[attr-defined]
    if not running or _settings:
        return
    if _restore_autograd_cache not in callback_handler.end_callbacks:  # torch.compiler.reset() clears the callbacks
        callback_handler.register_end_callback(_restore_autograd_cache)
    for name in ("enable_autograd_cache", "enable_remote_autograd_cache"):
        _settings[name] = getattr(torch._functorch.config, name)
        setattr(torch._functorch.config, name, False)


def _restore_autograd_cache(_: Any) -> None:
    for name, value in _settings.items():
        setattr(torch._functorch.config, name, value)
    _settings.clear()


def during_compilations(begin: Callable[[Any], None], end: Callable[[Any], None]) -> None:
    """Call ``begin`` and ``end`` at each compilation that Dynamo starts from now on; only its callbacks tell."""
    from torch._dynamo.callback import callback_handler

    if begin not in callback_handler.start_callbacks:  # torch.compiler.reset() clears the callbacks
        callback_handler.register_start_callback(begin)
        callback_handler.register_end_callback(end)


def forget_constants() -> None:
    """Let numbers be symbolic again that a compilation has made constants, which Dynamo remembers by their names."""
    from torch._dynamo.symbolic_convert import TensorifyState

    TensorifyState.clear()


@contextmanager
def compiled_afresh() -> Iterator[None]:
    """Compile within the context without caches of earlier processes, which may hold an older version of an op."""
    import torch._functorch.config
    import torch._inductor.config

    aot, inductor = torch._functorch.config, torch._inductor.config
    with (
        aot.patch(enable_autograd_cache=False, enable_remote_autograd_cache=False),
        inductor.patch(fx_graph_cache=False, fx_graph_remote_cache=False),
    ):
        yield


def is_packaging() -> bool:
    """Return whether AOTInductor is compiling, which ``torch.compiler.is_exporting`` doesn't tell from an export."""
    import torch._inductor.virtualized

    return torch._inductor.virtualized.V.aot_compilation is True


def no_recompiles(refused: bool) -> AbstractContextManager[None]:
    """Raise within the context on a second compilation if ``refused``; torch itself only logs it."""
    import torch._dynamo.config

    return torch._dynamo.config.patch(error_on_recompile=refused)


@contextmanager
def no_vmap_fallback() -> Iterator[None]:
    """Raise within the context where vmap falls back to a slow loop, for which torch only warns, past Python's
    warnings.
    """
    functorch: Any = torch._C._functorch
    enabled = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_enabled(enabled)


def aot_inductor_package(program: torch.export.ExportedProgram, path: str) -> Any:
    """Compile ``program`` to a package at ``path`` and load it, by functions that torch documents under this name."""
    import torch._inductor

    torch._inductor.aoti_compile_and_package(program, package_path=path)
    return torch._inductor.aoti_load_package(path)


def is_composed(op: OpOverload) -> bool:
    """Return whether compilers get a composition in place of ``op``. torch.library has no public query for it."""
    from torch._library.simple_registry import singleton

    return singleton.find(op.name()).torch_dispatch_rules.find(FunctionalTensorMode) is not None
