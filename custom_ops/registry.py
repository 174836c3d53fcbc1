"""The registry: an entry per public op, from which it gets the battery, its timings and its row in the docs.

`REGISTRY` holds the entries by name. `FUNCTIONS` holds these and their variants, which are special cases of an op:
public functions without a row of their own. The entries come from the specs of the ops
(``custom_ops/FAMILY/specs/MODULE.py``). These are imported when `REGISTRY` or `FUNCTIONS` is first used, and not by
``import custom_ops``.
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

__all__ = ["FUNCTIONS", "REGISTRY", "BadCall", "OpInfo", "Sample", "Sharding", "register"]


@dataclass(frozen=True)
class Sample:
    """One call of an op; the tensors with ``requires_grad`` get a derivative.

    Tens of elements are enough, as some rows take whole Hessians; the rows on large inputs and on threads make the
    dynamic dimension longer by themselves. ``dynamic`` names a dimension whose size may vary under
    ``torch.compile(dynamic=True)`` and export, as {position in args or name in kwargs: dimension}; tensors named
    together share one size.

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
    """A call of an op on sharded tensors, whose result must be that of one process.

    ``dims`` has the dimensions in which tensors are sharded, as {position in args or name in kwargs: dimension}; the
    other tensors are replicated. ``result`` is the placement of the result: the dimension in which it is sharded,
    "replicated", or "partial" if it is the sum of the processes' results. ``exchanged`` counts all collectives of
    forward and backward, as in {"all_reduce": 1}. A partial result hasn't been reduced yet, but the gradient of a
    replicated tensor has.

    Example:
        >>> import torch
        >>> from custom_ops.registry import Sample, Sharding
        >>> two_lists = Sample((torch.randn(2, 5, requires_grad=True), torch.rand(2, 5)), {"reduction": "none"})
        >>> Sharding("lists", two_lists, dims={0: 0, 1: 0}, result=0).exchanged
        {}
    """

    over: str  # a description of the sharding
    sample: Sample
    dims: dict[int | str, int]
    result: int | str
    exchanged: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class BadCall:
    """Wrong arguments and a regular expression for the error's message, which must name the argument.

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
    """A public op and everything that the tools need to know about it.

    ``function`` and ``reference`` take the same arguments; the reference is plain PyTorch and correct in float64.
    ``samples(device, dtype)`` returns small calls that cover the op's arguments and edge cases. ``apply`` is the
    ``Function.apply`` idiom. ``modules`` returns pairs of a module and the keyword arguments of ``function`` that it
    stands for. ``dtypes`` are the supported floating dtypes.

    A second derivative that is ``not_applicable`` must raise. Rows that are ``not_comparable`` aren't run, because the
    op's result differs from theirs by design. ``not_fuzzed`` are kinds of `custom_ops.verify.VALUES` for which the op's
    results aren't specified or its reference's aren't right. ``term_size`` takes the reference's arguments and returns,
    for an op whose output is a sum of terms that may cancel, the sum of their absolute values: random calls allow for
    rounding errors relative to it.

    If an op isn't ``differentiable``, no sample of it requires grad. ``autocast`` is the dtype that its outputs have
    under autocast: float32, or any 16-bit dtype for the one that autocast chooses. By default it isn't checked.

    ``shardings`` are the ways to shard a call over processes; by default the samples are sharded by their first
    dimension. An op with a reason in ``not_sharded`` must raise for DTensors.

    ``variants`` are the op's special cases: other functions of the same kernels. The battery tries them within the
    op's cells, in the rows that are about numbers or about the function itself.

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
    not_comparable: dict[str, str] = field(default_factory=dict)  # capability: reason, for ops that shape gradients
    not_fuzzed: dict[str, str] = field(default_factory=dict)  # kind of values: reason
    term_size: Callable[..., Tensor] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    shardings: Callable[[], list[Sharding]] | None = None
    not_sharded: str = ""
    differentiable: bool = True
    autocast: torch.dtype | None = None
    variants: tuple[OpInfo, ...] = ()

    @property
    def functions(self) -> tuple[OpInfo, ...]:
        """Return the op and its variants."""
        return self, *self.variants

    @property
    def family(self) -> str:
        """Return the module of the package that the op belongs to."""
        return self.function.__module__.split(".")[1]


FAMILIES = ("activation", "ranking", "shaping", "voxel")
REGISTRY: dict[str, OpInfo]  # __getattr__ returns both
FUNCTIONS: dict[str, OpInfo]
_given: dict[str, dict[str, OpInfo]] = {"REGISTRY": {}, "FUNCTIONS": {}}


@cache
def _load_specs() -> None:
    for family in FAMILIES:
        specs = importlib.import_module(f"custom_ops.{family}.specs")
        for module in pkgutil.iter_modules(specs.__path__, f"{specs.__name__}."):
            importlib.import_module(module.name)


def __getattr__(name: str) -> Any:
    if name not in _given:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _load_specs()
    return _given[name]


def register(info: OpInfo) -> None:
    """Add an op to `REGISTRY`, and it and its variants to `FUNCTIONS`; raise ``ValueError`` if a name is registered.

    Example:
        >>> import custom_ops
        >>> from custom_ops.registry import REGISTRY, register
        >>> register(REGISTRY["relu"])
        Traceback (most recent call last):
            ...
        ValueError: name: 'relu' is registered already
    """
    for function in info.functions:
        if function.name in _given["FUNCTIONS"]:
            raise ValueError(f"name: {function.name!r} is registered already")
        _given["FUNCTIONS"][function.name] = function
    _given["REGISTRY"][info.name] = info


def leaves(args: Any) -> list[Tensor]:
    """Return the tensors among the arguments that require a gradient."""
    return [a for a in args if isinstance(a, Tensor) and a.requires_grad]
