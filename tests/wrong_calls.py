"""Calls of every public function with every kind of wrong argument, and the table of the errors: docs/errors.md.

The calls are made from the samples of the registry, with one argument spoiled at a time. A call that an op accepts must
give what its reference gives. ``python tests/wrong_calls.py`` writes the table.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import custom_ops
from custom_ops.registry import FUNCTIONS

KINDS = {
    "type": "an object of a type that isn't accepted",
    "dtype": "complex numbers for floating ones, or floating ones for integers and booleans",
    "device": "a tensor on another device than the others",
    "shape": "one dimension too many, one element too many in the last dimension, or no dimension",
    "range": "an integer far above and far below all others",
    "NaN": "a NaN among the options",
    "negative": "-1 among the options",
    "overlap": "elements that share memory, written in place",
    "gradient": "requires_grad for an argument without a gradient",
}
_GUARD = 64

Call = tuple[Callable[..., Any], dict[str, Any]]


def functions() -> dict[str, list[Call]]:
    """Return the public functions with valid calls of each."""
    found: dict[str, list[Call]] = {}
    for name in sorted(custom_ops.__all__):
        torch.manual_seed(0)
        function = getattr(custom_ops, name)
        if inspect.isclass(function):
            continue
        if name in FUNCTIONS:
            samples = FUNCTIONS[name].samples(torch.device("cpu"), torch.float32)
            found[name] = [(function, _bind(function, *s.args, **s.kwargs)) for s in samples]
        else:
            options = OPTIONS.get(name, {})
            found[name] = [(function, _bind(function, *args, **options)) for args in OTHERS.get(name, list)()]
    return found


def _bind(function: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _lists() -> list[tuple[Any, ...]]:
    return [(torch.randn(2, 4), torch.tensor([[0, 2, 1, 1], [1, 0, 0, 3]]))]


def _bevdet() -> list[tuple[Any, ...]]:
    index = torch.tensor([0, 3, 1])
    starts = torch.tensor([0]), torch.tensor([3])
    return [
        (torch.rand(1, 1, 2, 1, 2), torch.rand(1, 1, 1, 2, 3), index, index % 2, index * 0, (1, 1, 2, 2, 3), *starts)
    ]


def _places(*shape: int) -> Tensor:
    return torch.arange(int(torch.tensor(shape).prod())).view(shape) % 2


# These public functions aren't ops, so the registry doesn't have them.
OTHERS: dict[str, Callable[[], list[tuple[Any, ...]]]] = {
    "ndcg": _lists,
    "mrr": _lists,
    **dict.fromkeys(("precision", "recall", "f1_score", "hit_rate", "r_precision", "dcg", "err"), _lists),
    **dict.fromkeys(("average_precision", "auc"), lambda: [(s, (y > 0).long()) for s, y in _lists()]),
    "bev_pool_v2": _bevdet,
    "bevfusion_pool": lambda: [(torch.randn(3, 2), _places(3, 4), 2, 2, 2, 2)],
    "dynamic_scatter": lambda: [(torch.randn(3, 2), _places(3, 3), "mean")],
    "voxel_image": lambda: [(torch.randn(2, 8, 3), (2, 2, 2), "cyx")],
    "voxel_pooling_train": lambda: [(_places(1, 4, 3), torch.randn(1, 4, 2), (2, 2, 2))],
    "voxel_ravel": lambda: [(_places(3, 2), (2, 2))],
    "voxel_softmax": lambda: [(torch.randn(3, 2), _places(3), 2), (torch.randn(3, 2), _places(3), 2, _places(3) > 0)],
    "voxel_unravel": lambda: [(_places(3), (2, 2))],
    "voxelization": lambda: [(torch.rand(5, 4), (0.5, 0.5, 0.5), (0, 0, 0, 1, 1, 1), 2, 10, True)],
    "convert_activations": lambda: [(torch.nn.Sequential(torch.nn.ReLU()),)],
}
OPTIONS = {"err": {"max_label": 3.0}}


def spoiled(argument: str, value: Any, call: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each kind of wrong value for one argument, with the arguments that it replaces."""
    yield "type", {argument: object()}
    if isinstance(value, (int, float)) and not isinstance(value, bool) and argument != "empty":  # it may be NaN
        yield "NaN", {argument: float("nan")}
        yield "negative", {argument: -1}
    if argument == "inplace":
        yield "overlap", {"inplace": True, "x": torch.ones(1).expand(3)}
    if not isinstance(value, Tensor):
        return
    value = value.detach()
    yield "dtype", {argument: value.to(torch.complex64 if value.is_floating_point() else torch.float32)}
    if sum(isinstance(v, Tensor) for v in call.values()) > 1:
        yield "device", {argument: value.to("meta")}
    yield "shape", {argument: value.expand(3, *value.shape)}
    if value.dim():
        yield "shape", {argument: torch.cat([value, value[..., :1]], -1)}
        yield "shape", {argument: value.flatten()[0]}
    if value.dtype in (torch.int32, torch.int64) and value.numel():
        for number in (2**30, -(2**30)):
            wrong = value.clone()
            wrong.view(-1)[-1] = number
            yield "range", {argument: wrong}
    if value.is_floating_point() and not _has_gradient(call[argument]):
        yield "gradient", {argument: value.clone().requires_grad_()}


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


@dataclass(frozen=True)
class Answer:
    """A function's reaction to a wrong argument; ``error`` is None if it accepted it."""

    function: str
    argument: str
    kind: str
    arguments: dict[str, Any]
    error: Exception | None
    overwritten: bool

    @property
    def is_clear(self) -> bool:
        """Return whether the message says what was expected and names the argument (either one, if two shapes don't
        match).
        """
        to_blame = self.arguments if self.kind == "shape" else [self.argument, *["x"] * (self.kind == "overlap")]
        text = str(self.error)
        return "expected" in text and any(re.search(rf"\b{name}\b", text) for name in to_blame)


def answers() -> Iterator[Answer]:
    """Yield the answers to all wrong arguments; each argument is spoiled in the first call that gives it."""
    for name, calls in functions().items():
        for argument in calls[0][1]:
            function, call = next((c for c in calls if c[1][argument] is not None), calls[0])
            for kind, wrong in spoiled(argument, call[argument], call):
                arguments = {**call, **wrong}
                guarded = {n: _Guarded(v) for n, v in arguments.items() if _can_be_guarded(v, kind)}
                arguments |= {n: g.tensor for n, g in guarded.items()}
                error = None
                try:
                    function(**arguments)
                except Exception as raised:
                    error = raised
                overwritten = any(g.changed() for g in guarded.values())
                yield Answer(name, argument, kind, arguments, error, overwritten)


def _can_be_guarded(value: Any, kind: str) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu" and kind != "overlap"


class _Guarded:
    """A copy of a tensor that lies between canaries."""

    def __init__(self, value: Tensor) -> None:
        n = value.numel()
        self.memory = torch.full((n + 2 * _GUARD,), 77, dtype=value.dtype)
        self.memory[_GUARD : _GUARD + n] = value.detach().reshape(-1)
        self.before = self.memory.clone()
        self.tensor = self.memory[_GUARD : _GUARD + n].view(value.shape)
        if value.requires_grad:
            self.tensor.requires_grad_()

    def changed(self) -> bool:
        return bool(((self.memory != self.before) & (self.before == self.before)).any())


def markdown(found: list[Answer]) -> str:
    names = list(dict.fromkeys(a.function for a in found))
    lines = [
        "# Error messages",
        "",
        "Made by `tests/wrong_calls.py`, and checked by `tests/test_errors.py`: each argument of each public "
        "function is replaced by each kind of wrong value. Then either an exception names the argument and what was "
        "expected, or the function accepts the value and gives what its reference gives. Tensors lie between canaries, "
        "which show that nothing is written outside of them.",
        "",
        *(f"- **{kind}**: {meaning}." for kind, meaning in KINDS.items()),
        "",
        "The table counts the wrong calls that raised; – means that no argument can be wrong in this way.",
        "",
        f"| | {' | '.join(KINDS)} |",
        f"|---|{':-:|' * len(KINDS)}",
    ]
    for name in names:
        raised = [sum(a.function == name and a.kind == kind and a.error is not None for a in found) for kind in KINDS]
        lines.append(f"| `{name}` | {' | '.join(str(n) if n else '–' for n in raised)} |")
    for name in names:
        lines += ["", f"## {name}", ""]
        for a in found:
            if a.function == name and a.error is not None:
                text = " ".join(str(a.error).split())
                line = f"- {a.argument}, {a.kind}: `{type(a.error).__name__}: {text}`"
                lines += [] if line in lines else [re.sub(r" at 0x[0-9a-f]+", "", line)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(list(answers())), end="")
