"""The registry: one entry per public op gives it the battery, its timings and its row in the docs.

`REGISTRY` holds the entries by name. They come from the specs beside the ops (``custom_ops/FAMILY/specs/MODULE.py``),
which are imported when `REGISTRY` is first asked for, and not by ``import custom_ops``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["REGISTRY", "BadCall", "OpInfo", "Sample", "Sharding", "register"]


@dataclass(frozen=True)
class Sample:
    """One call of an op; tensors with ``requires_grad`` are those it is differentiated in.

    ``dynamic`` names a dimension whose size may vary under ``torch.compile(dynamic=True)`` and
    export, as {position in args or name in kwargs: dimension}; tensors named together share one size.

    Example:
        >>> import torch
        >>> from custom_ops.verify import Sample, verify
        >>> x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        >>> verify(torch.sin, [Sample((x,), dynamic={0: 0})], only=["compile dynamic"], quick=True).ok
        True
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    dynamic: dict[int | str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Sharding:
    """A call of an op with its tensors spread over processes, to be what it is in one.

    ``dims`` are the dimensions that tensors are sharded in, as {position in args or name in kwargs: dimension}; the
    other tensors are whole. ``result`` is how the result is placed: the dimension that it is sharded in, or "partial"
    where it is the sum of the processes' results. ``exchanged`` are all collectives of forward and backward,
    {"all_reduce": 1}; a partial result isn't summed up yet, but the gradient of a tensor that is whole is.

    Example:
        >>> import torch
        >>> from custom_ops.registry import Sample, Sharding
        >>> two_lists = Sample((torch.randn(2, 5, requires_grad=True), torch.rand(2, 5)), {"reduction": "none"})
        >>> Sharding("lists", two_lists, dims={0: 0, 1: 0}, result=0).exchanged
        {}
    """

    over: str  # what is spread, in words
    sample: Sample
    dims: dict[int | str, int]
    result: int | str
    exchanged: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class BadCall:
    """Wrong arguments, and what the error must say: a regular expression naming the argument.

    Example:
        >>> import torch
        >>> from custom_ops.verify import BadCall, verify
        >>> x = torch.ones(3, dtype=torch.float64, requires_grad=True)
        >>> wrong = BadCall((None,), "must be Tensor, not NoneType")
        >>> verify(torch.sin, [(x,)], bad_calls=lambda: [wrong], only=["error messages"]).ok
        True
    """

    args: tuple[Any, ...]
    message: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    error: type[Exception] | tuple[type[Exception], ...] = (TypeError, ValueError, RuntimeError)


@dataclass(frozen=True)
class OpInfo:
    """A public op and all that the tools need to know of it.

    ``function`` and ``reference`` take the same arguments; the reference is plain PyTorch, correct in
    float64. ``samples(device, dtype)`` returns small calls that cover the op's arguments and edge
    cases. ``apply`` is the ``Function.apply`` idiom. ``modules`` maps a description to a module and
    the keyword arguments of ``function`` it stands for. ``dtypes`` are the floating dtypes supported.

    A second derivative that is ``not_applicable`` must raise. Rows that are ``not_comparable`` aren't run: there the
    op gives something, by design other than what they compare with. ``not_fuzzed`` are kinds of values of
    `custom_ops.verify.VALUES` on which the op's results aren't specified, or its reference's aren't right.

    ``shardings`` are the ways to spread a call over processes; by default the samples are, by their first dimension.
    An op that is ``not_sharded``, and why, must raise for DTensors.

    Example:
        >>> import torch
        >>> from custom_ops.registry import OpInfo, Sample
        >>> from custom_ops.verify import verify
        >>> def samples(device, dtype):
        ...     return [Sample((torch.randn(3, device=device, dtype=dtype, requires_grad=True),))]
        >>> verify(OpInfo("sine", torch.sin, torch.sin, samples, "The sine"), only=["value", "gradcheck"]).ok
        True
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any] | None
    samples: Callable[[torch.device, torch.dtype], list[Sample]]
    summary: str
    apply: Callable[..., Any] | None = None
    modules: Callable[[], list[tuple[torch.nn.Module, dict[str, Any]]]] = list
    bad_calls: Callable[[], list[BadCall]] = list
    not_applicable: dict[str, str] = field(default_factory=dict)  # capability: reason
    not_comparable: dict[str, str] = field(default_factory=dict)  # capability: reason, of an op that shapes gradients
    not_fuzzed: dict[str, str] = field(default_factory=dict)  # kind of values: reason
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    shardings: Callable[[], list[Sharding]] | None = None
    not_sharded: str = ""

    @property
    def family(self) -> str:
        """The module of the package that the op belongs to."""
        return self.function.__module__.split(".")[1]


FAMILIES = ("activation", "ranking", "shaping", "voxel")
REGISTRY: dict[str, OpInfo]  # made by __getattr__
_registered: dict[str, OpInfo] = {}


@cache
def _load_specs() -> None:
    for family in FAMILIES:
        specs = importlib.import_module(f"custom_ops.{family}.specs")
        for module in pkgutil.iter_modules(specs.__path__, f"{specs.__name__}."):
            importlib.import_module(module.name)


def __getattr__(name: str) -> Any:
    if name != "REGISTRY":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _load_specs()
    return _registered


def register(info: OpInfo) -> None:
    """Add an op to `REGISTRY`; ``ValueError`` if there is one of its name.

    Example:
        >>> import custom_ops
        >>> from custom_ops.registry import REGISTRY, register
        >>> register(REGISTRY["relu"])
        Traceback (most recent call last):
            ...
        ValueError: name: 'relu' is registered already
    """
    if info.name in _registered:
        raise ValueError(f"name: {info.name!r} is registered already")
    _registered[info.name] = info


def leaves(args: Any) -> list[Tensor]:
    """The tensors among the arguments that are differentiated in."""
    return [a for a in args if isinstance(a, Tensor) and a.requires_grad]
