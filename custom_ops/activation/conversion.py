"""Swapping the activations of a whole model for ours, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from custom_ops import _checks
from custom_ops.activation.piecewise import Hardtanh, LeakyReLU, ReLU, ReLU6, Threshold

__all__ = ["Conversion", "ConvertedActivation", "convert_activations"]

# Each of ours is a subclass with the same attributes, so that a module can change its class and stay itself.
_TO_CUSTOM_OPS: dict[type[nn.Module], type[nn.Module]] = {
    cls.__mro__[1]: cls for cls in (ReLU, LeakyReLU, ReLU6, Hardtanh, Threshold)
}
_TO = {"custom_ops": _TO_CUSTOM_OPS, "torch": {ours: theirs for theirs, ours in _TO_CUSTOM_OPS.items()}}


@dataclass(frozen=True)
class ConvertedActivation:
    """A module that changed its class; if measured, the bytes that it alone keeps for backward, before and after.

    0 before means that nothing is to be saved there: a neighbour keeps the same tensor for its own backward.

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

    def __str__(self) -> str:
        text = f"{self.name or '(the model)'}: {_qualified(self.before)} -> {_qualified(self.after)}"
        if self.bytes_before is None:
            return text
        shared = "" if self.bytes_before else ", a neighbour keeps the tensor anyway"
        return f"{text}, {self.bytes_before:,} -> {self.bytes_after:,} bytes{shared}"


@dataclass(frozen=True)
class Conversion:
    """What `convert_activations` changed; if measured, all bytes kept for backward, before and after.

    Example:
        >>> import torch, custom_ops
        >>> conversion = custom_ops.convert_activations(torch.nn.Sequential(torch.nn.ReLU()))
        >>> [(change.name, change.after.__name__) for change in conversion.activations]
        [('0', 'ReLU')]
    """

    activations: Sequence[ConvertedActivation]
    bytes_before: int | None = None
    bytes_after: int | None = None

    def __str__(self) -> str:
        lines = [str(activation) for activation in self.activations]
        if self.bytes_before is not None:
            lines.append(f"kept for backward in all: {self.bytes_before:,} -> {self.bytes_after:,} bytes")
        return "\n".join(lines) or "no activation to convert"


def convert_activations(model: nn.Module, to: str = "custom_ops", measure: Sequence[Any] | None = None) -> Conversion:
    """Swap every ReLU, LeakyReLU, ReLU6, Hardtanh and Threshold of a module tree for ours, or back.

    The modules stay the same objects, with their attributes, hooks and names; only their class changes.
    Subclasses of torch's modules, which may have a ``forward`` of their own, are left alone.

    Args:
        model: any module, changed in place.
        to: "custom_ops", or "torch" for the way back.
        measure: the arguments of one call ``model(*measure)``. With it the model runs forward once before
            and once after, and the report says what each activation alone keeps for backward. The model's
            buffers and the random generator are put back.

    Returns:
        A `Conversion`; print it.

    Raises:
        TypeError: ``model`` is no module, ``measure`` no sequence.
        ValueError: an unknown ``to``.

    What is saved depends on the neighbours: behind ``relu`` a convolution or linear layer keeps its input, which
    is relu's output, whatever relu keeps; a normalisation in front of it keeps its own input, not relu's.

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
    for module in modules.values():
        module.__class__ = classes[type(module)]
    if before is None:
        return Conversion([ConvertedActivation(n, cls, classes[cls]) for n, cls in previous.items()])
    after = _Saved(model, modules, measure or ())
    activations = [
        ConvertedActivation(n, cls, classes[cls], before.alone(n), after.alone(n)) for n, cls in previous.items()
    ]
    return Conversion(activations, before.total(), after.total())


def _qualified(cls: type[nn.Module]) -> str:
    return f"{'custom_ops' if cls.__module__.startswith('custom_ops.') else 'torch.nn'}.{cls.__name__}"


class _Saved:
    """The memory that one forward pass keeps for backward, by the module that keeps it ("" for all others)."""

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module], args: Sequence[Any]) -> None:
        self._bytes: dict[int, int] = {}
        self._keepers: dict[int, set[str | None]] = {}
        kept: list[Tensor] = []  # alive to the end, so that no address comes twice
        running: list[str] = []

        def pack(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            storage = tensor.untyped_storage()
            self._bytes[storage.data_ptr()] = storage.nbytes()
            self._keepers.setdefault(storage.data_ptr(), set()).add(running[-1] if running else None)
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
        """The bytes that nothing but this module keeps."""
        return sum(size for at, size in self._bytes.items() if self._keepers[at] == {name})

    def total(self) -> int:
        return sum(self._bytes.values())
