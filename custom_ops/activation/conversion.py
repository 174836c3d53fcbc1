"""Conversion of a whole model's activations to ours, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from custom_ops import _checks
from custom_ops.activation.piecewise import Hardtanh, LeakyReLU, ReLU, ReLU6, Threshold

# Each of ours is a subclass with the same attributes, so a module can change its class and stay the same object.
_TO_CUSTOM_OPS: dict[type[nn.Module], type[nn.Module]] = {
    cls.__mro__[1]: cls for cls in (ReLU, LeakyReLU, ReLU6, Hardtanh, Threshold)
}
_TO = {"custom_ops": _TO_CUSTOM_OPS, "torch": {ours: theirs for theirs, ours in _TO_CUSTOM_OPS.items()}}


@dataclass(frozen=True)
class ConvertedActivation:
    """A module that changed its class and, if measured, the bytes that only it keeps for backward, before and after.

    A tensor that several of these modules keep is counted with the first. If nothing is saved, ``remark`` says why:
    usually a neighbour keeps the same tensor for its own backward.

    Example:
        >>> import torch, custom_ops
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU6(), torch.nn.Linear(8, 8))
        >>> (change,) = custom_ops.convert_activations(model, measure=[torch.ones(4, 8)]).activations
        >>> change.name, change.bytes_before, change.bytes_after
        ('1', 128, 4)
    """

    name: str
    before: type[nn.Module]
    after: type[nn.Module]
    bytes_before: int | None = None
    bytes_after: int | None = None
    remark: str = ""

    def __str__(self) -> str:
        text = f"{self.name or '(the model)'}: {_qualified(self.before)} -> {_qualified(self.after)}"
        if self.bytes_before is None:
            return text
        return f"{text}, {self.bytes_before:,} -> {self.bytes_after:,} bytes{self.remark and ', '}{self.remark}"


@dataclass(frozen=True)
class Conversion:
    """The changes of `convert_activations` and, if measured, all bytes kept for backward, before and after.

    ``functions`` counts the functions, such as ``relu``, that the measured call reached outside of these modules.
    Functions can't be converted.

    Example:
        >>> import torch, custom_ops
        >>> conversion = custom_ops.convert_activations(torch.nn.Sequential(torch.nn.ReLU()))
        >>> [(change.name, change.after.__name__) for change in conversion.activations]
        [('0', 'ReLU')]
    """

    activations: Sequence[ConvertedActivation]
    bytes_before: int | None = None
    bytes_after: int | None = None
    functions: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [str(activation) for activation in self.activations]
        if self.bytes_before is not None:
            lines.append(f"kept for backward in all: {self.bytes_before:,} -> {self.bytes_after:,} bytes")
        for name, times in self.functions.items():
            lines.append(f"not converted, as it is no module: {name}, called {times} time{'s' * (times > 1)}")
        return "\n".join(lines) or "no activation to convert among the modules; functional calls aren't seen"


def convert_activations(model: nn.Module, to: str = "custom_ops", measure: Sequence[Any] | None = None) -> Conversion:
    """Convert every ReLU, LeakyReLU, ReLU6, Hardtanh and Threshold of a module tree to ours, or back.

    The modules stay the same objects, with their attributes, hooks and names; only their class changes. Subclasses of
    torch's modules, which may have a ``forward`` of their own, are left alone. Calls of functions, such as
    ``F.relu(x)``, can't be converted; with ``measure`` the report counts them. An error leaves the model as it was.

    Args:
        model: any module, changed in place.
        to: "custom_ops", or "torch" for the way back.
        measure: the arguments of one call ``model(*measure)``. With it the model runs forward once before
            and once after, and the report says what each activation alone keeps for backward. The model's
            buffers and the random generator are put back.

    Returns:
        A `Conversion`; print it.

    Raises:
        TypeError: ``model`` isn't a module, or ``measure`` isn't a sequence.
        ValueError: an unknown ``to``.

    Convert a model back before ``torch.jit.script``, ``torch.ao.quantization.fuse_modules`` or quantization: they know
    modules by their class. ``torch.fx.symbolic_trace`` and what builds on it, such as ``prepare_fx``, take both.

    The memory saved depends on the neighbours. A convolution or linear layer after ``relu`` keeps its input, which is
    relu's output, whatever relu keeps; a normalisation before it keeps its own input, not relu's.

    Example:
        >>> import torch, custom_ops
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LeakyReLU(), torch.nn.Flatten())
        >>> print(custom_ops.convert_activations(model, measure=[torch.ones(4, 8)]))
        1: torch.nn.LeakyReLU -> custom_ops.LeakyReLU, 128 -> 4 bytes
        kept for backward in all: 256 -> 132 bytes
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    _checks.is_one_of("to", to, tuple(_TO))
    if measure is not None and not isinstance(measure, Sequence):
        raise TypeError(f"measure: expected a sequence of arguments, got {type(measure).__name__}")
    classes = _TO[to]
    modules = {name: module for name, module in model.named_modules() if type(module) in classes}
    before = None if measure is None else _Saved(model, modules, measure)
    previous = {name: type(module) for name, module in modules.items()}
    try:
        for module in modules.values():
            module.__class__ = classes[type(module)]
        after = None if before is None else _Saved(model, modules, measure or ())
    except BaseException:
        for name, module in modules.items():
            module.__class__ = previous[name]
        raise
    if before is None or after is None:
        return Conversion([ConvertedActivation(n, cls, classes[cls]) for n, cls in previous.items()])
    activations = [
        ConvertedActivation(n, cls, classes[cls], before.alone(n), after.alone(n), before.remark(n))
        for n, cls in previous.items()
    ]
    return Conversion(activations, before.total(), after.total(), before.functions)


def _qualified(cls: type[nn.Module]) -> str:
    return f"{'custom_ops' if cls.__module__.startswith('custom_ops.') else 'torch.nn'}.{cls.__name__}"


class _Saved:
    """The memory that one forward pass keeps for backward, by the module that keeps it (None for all others)."""

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module], args: Sequence[Any]) -> None:
        self._bytes: dict[int, int] = {}
        # {address: the modules that keep it, in order of their first use}
        self._keepers: dict[int, dict[str | None, None]] = {}
        self.functions: dict[str, int] = {}
        kept: list[Tensor] = []  # stays alive, so no address is reused
        running: list[str] = []

        def pack(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            storage = tensor.untyped_storage()
            self._bytes[storage.data_ptr()] = storage.nbytes()
            self._keepers.setdefault(storage.data_ptr(), {})[running[-1] if running else None] = None
            return tensor

        hooks = []
        for name, module in modules.items():
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
            hooks.append(module.register_forward_hook(lambda *_: running.pop() and None))
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        try:
            with (
                torch.random.fork_rng(),
                torch.enable_grad(),
                torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
                _Functions(self.functions, running),
            ):
                model(*args)
        finally:
            for hook in hooks:
                hook.remove()
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
        for parameter in model.parameters():
            self._bytes.pop(parameter.untyped_storage().data_ptr(), None)

    def alone(self, name: str) -> int:
        """Return the bytes kept only by modules of this kind, and first by this one."""
        return sum(
            size
            for at, size in self._bytes.items()
            if None not in self._keepers[at] and next(iter(self._keepers[at])) == name
        )

    def remark(self, name: str) -> str:
        """Return why no bytes are kept by this module alone."""
        keepers = [self._keepers[at] for at in self._bytes if name in self._keepers[at]]
        if self.alone(name):
            return ""
        if not keepers:
            return "it keeps nothing in this call"
        if any(None in those for those in keepers):
            return "a neighbour keeps the tensor anyway"
        return "what it keeps is counted with the activation before it"

    def total(self) -> int:
        return sum(self._bytes.values())


class _Functions(TorchFunctionMode):
    """A mode that counts the calls of functional activations while no module is running."""

    NAMES = ("relu", "leaky_relu", "relu6", "hardtanh", "threshold")

    def __init__(self, counts: dict[str, int], running: list[str]) -> None:
        super().__init__()
        self._counts, self._running = counts, running

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name.removesuffix("_") in self.NAMES and not self._running:
            self._counts[name] = self._counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))
