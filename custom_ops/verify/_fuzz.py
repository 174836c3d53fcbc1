"""Random calls of an op, made from its samples and compared with its float64 reference, and a script of a failing
call.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import is_dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from custom_ops import registry
from custom_ops.registry import OpInfo, Sample
from custom_ops.verify._case import TOLERANCE, Call, Case, describe, flatten, grads, randn_like
from custom_ops.verify._values import EXPANDED, LAYOUTS, Layout, double, resized, run_leaves

Choose = Callable[[Sequence[Any]], Any]
Values = Callable[[torch.Size, torch.dtype, torch.Generator], Tensor]


def _normal(shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _pick(numbers: Sequence[float]) -> Values:
    def values(shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64)[torch.randint(len(numbers), shape, generator=generator)]

    return values


def _tiny(shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return numbers around the smallest normal number, on both sides of it, and zeros."""
    return torch.finfo(dtype).smallest_normal * _pick((-4, -1, -0.25, -0.0, 0.0, 0.125, 1, 8))(shape, dtype, generator)


def _large(shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return numbers so large that 1 is lost beside them, but whose products are finite."""
    scale = 2.0 ** round(0.45 * math.log2(torch.finfo(dtype).max))
    return scale * _pick((-1, -0.5, -0.25, 0.125, 0.5, 1))(shape, dtype, generator)


def _with_some(numbers: Sequence[float], finite: bool = False) -> Values:
    """Return a function that mixes in some of the numbers; with ``finite`` they are clamped to the dtype's range."""

    def values(shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        rare = _pick(numbers)(shape, dtype, generator)
        if finite:
            rare = rare.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
        return torch.where(torch.rand(shape, generator=generator) < 0.2, rare, _normal(shape, dtype, generator))

    return values


VALUES: dict[str, Values] = {
    "normal": _normal,
    "ties": _pick((-1.5, -1, -0.5, -0.25, -0.0, 0.0, 0.25, 0.5, 1, 1.5, 6)),
    "tiny": _tiny,
    "large": _large,
    "fills": _with_some((-1e4, -65504, -1e9, -1e30), finite=True),
    "outliers": _with_some((-1e9, -300, 300, 1e9), finite=True),
    "NaN": _with_some((math.nan,)),
    "infinite": _with_some((math.inf, -math.inf)),
}


def _time_stamps(shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return 1_700_000_000 + torch.randint(4, shape, generator=generator)


def _padding(shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return _pick((-1, -1, 0, 1, 2, 3))(shape, dtype, generator).to(torch.int64)


# These are kinds of values for the argument `labels`.
LABELS: dict[str, Values] = {
    "as given": _normal,
    "below 0": _padding,
    "time stamps": _time_stamps,
    "NaN": _with_some((math.nan,)),
}

# These are kinds of values for the argument `rank`, each in int32 too.
RANKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "as given": lambda rank, drawn: rank,
    "most outside": lambda rank, drawn: torch.where(drawn < 0.8, -1, rank),
    "all outside": lambda rank, drawn: torch.full_like(rank, -1),
    "all inside in one voxel": lambda rank, drawn: rank.clamp(max=0),
}


def _in_order(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def _stepped(tensor: Tensor) -> Tensor:
    """Return a view whose elements are far apart in every dimension."""
    if tensor.numel() == 0:
        return tensor
    shape = [(n - 1) * 3 + 1 for n in tensor.shape[:-1]] + [(n - 1) * 257 + 1 for n in tensor.shape[-1:]]
    wide = torch.full(shape, math.nan, dtype=tensor.dtype) if tensor.is_floating_point() else tensor.new_ones(shape)
    steps = [slice(None, None, 3)] * (tensor.dim() - 1) + [slice(None, None, 257)] * bool(tensor.dim())
    wide[tuple(steps)] = tensor
    return wide[tuple(steps)]


_LAYOUTS: dict[str, Layout] = {"in order": _in_order, **LAYOUTS, "stepped": _stepped}
_SIZES = (0, 1, 2, 3, 5, 8, 9, 17)


def _of_lists(info: OpInfo, call: Call, dtype: torch.dtype, choose: Choose) -> Call:
    """Return a call of an op of lists with lists of any lengths in any form, and with options of any of its samples."""
    generator = torch.Generator().manual_seed(choose(range(1 << 16)))

    def numbers(*shape: int) -> Tensor:
        return _pick((0, 0.25, 1, 3))(torch.Size(shape), dtype, generator).to(dtype)

    options: dict[str, list[Any]] = {}
    for sample in info.samples(torch.device("cpu"), dtype):
        for name, value in sample.kwargs.items():
            if not isinstance(value, Tensor):
                options.setdefault(name, []).append(value)
    accepted = inspect.signature(info.function).parameters
    needed = {name for name in options if accepted[name].default is inspect.Parameter.empty}
    kwargs = {name: choose(values) for name, values in options.items() if name in needed or choose((False, True))}
    shape = choose(((5,), (3, 9), (2, 2, 4), (2, 33), ()))
    lists = shape[:-1]
    if not shape:  # one long list among many short ones
        lengths = [choose((0, 1, 2, 3)) for _ in range(choose((1, 4, 12)))]
        lengths[choose(range(len(lengths)))] = choose((3, 33))
        kwargs["cu_lengths"] = torch.tensor([0, *accumulate(lengths)])
        shape, lists = (sum(lengths),), (len(lengths),)
    elif choose((False, True)):
        kwargs["lengths"] = torch.randint(0, shape[-1] + 1, lists, generator=generator)
    for name, of in (("mask", shape), ("weights", lists), ("item_weights", shape)):
        if name in accepted and choose((False, True)):
            kwargs[name] = numbers(*of) > 0 if name == "mask" else numbers(*of)
    args = [torch.zeros(shape, dtype=dtype, requires_grad=True)]
    args += [torch.randint(0, 4, shape, generator=generator).to(dtype)] * ("labels" in accepted)
    return replace(call, sample=Sample((*args, *call.sample.args[len(args) :]), kwargs))


def random_sample(info: OpInfo, choose: Choose) -> Sample:
    """Return a random call of the op: one of its samples with another size, other values, layouts and dtypes.

    Half of the calls of an op of lists have lists of other lengths, in another form, and options of several samples.
    Tensors that require a gradient take values of any of the `VALUES` that the op doesn't exclude. ``labels`` are the
    given ones, or below 0, time stamps or partly NaN; ``rank`` is the given one, or mostly outside or in one voxel.
    Other floating or boolean tensors are drawn from their own elements, and integers stay as they are.
    ``choose(options)`` picks one of the options.

    Raises `NotApplicable` if the op has no sample of the chosen dtype.

    Example:
        >>> import random
        >>> import custom_ops
        >>> from custom_ops.registry import FUNCTIONS
        >>> from custom_ops.verify import check, random_sample
        >>> for seed in range(10):
        ...     check(FUNCTIONS["relu"], random_sample(FUNCTIONS["relu"], random.Random(seed).choice))
    """
    dtype = choose(info.dtypes)
    call = Call(info.function, choose(Case(info, torch.device("cpu"), quick=True).samples(dtype)))
    if call.sample.dynamic:
        call = resized(call, choose((1, 0, 2, 3, 4)))
    if "cu_lengths" in inspect.signature(info.function).parameters and choose((False, True)):
        call = _of_lists(info, call, dtype, choose)
    shapes = {t.shape for t in call.tensors}
    if len(shapes) == 1 and all(t.requires_grad for t in call.tensors):
        (shape,) = shapes
        shapes = {torch.Size([choose((n, *_SIZES)) for n in shape])}
    kind = choose([kind for kind in VALUES if kind not in info.not_fuzzed])
    labels, ranks = (_named(name, info, call) for name in ("labels", "rank"))
    label_kind = choose([kind for kind in LABELS if kind not in info.not_fuzzed]) if labels else ""
    generator = torch.Generator().manual_seed(choose(range(1 << 16)))
    tensors = []
    for tensor in call.tensors:
        shape = tensor.shape if len(shapes) > 1 else next(iter(shapes))
        if tensor.requires_grad:
            new = VALUES[kind](shape, tensor.dtype, generator).to(tensor.dtype)
        elif any(tensor is t for t in labels) and label_kind != "as given":
            new = LABELS[label_kind](shape, dtype, generator)
        elif (tensor.is_floating_point() or tensor.dtype == torch.bool) and tensor.numel():
            new = tensor.flatten()[torch.randint(tensor.numel(), shape, generator=generator)]
        else:
            new = tensor
        if any(tensor is t for t in ranks):
            new = RANKS[choose(list(RANKS))](tensor, torch.rand(tensor.shape, generator=generator))
            new = new.to(choose((torch.int64, torch.int32)))
        layouts = {**_LAYOUTS, **EXPANDED} if tensor.requires_grad else _LAYOUTS
        new = layouts[choose(list(layouts))](new.detach())
        tensors.append(new.requires_grad_(tensor.requires_grad))
    return call.with_tensors(tensors).sample


def _named(name: str, info: OpInfo, call: Call) -> list[Tensor]:
    """Return the call's argument of that name as a list, empty if there is none."""
    place = [*inspect.signature(info.function).parameters, name].index(name)
    return [t for key, t in zip(call.keys, call.tensors) if key in (name, place)]


def check(info: OpInfo, sample: Sample) -> None:
    """Check values and gradients against the reference in float64 on the same numbers.

    Where the reference is NaN, infinite or beyond the dtype, the op must be too. A gradient is compared where the input
    and the reference's gradient are finite, since equivalent formulas may differ in 0 * inf; it may also be NaN where
    it depends on an output that is NaN or beyond the dtype.

    Example:
        >>> import torch, custom_ops
        >>> from custom_ops.registry import FUNCTIONS, Sample
        >>> from custom_ops.verify import check
        >>> check(FUNCTIONS["relu"], Sample((torch.tensor([-1.0, 2.0], requires_grad=True),)))
    """
    if info.reference is None:
        raise ValueError(f"info: {info.name} has no reference")
    call = Call(info.function, sample)
    wide = call.with_tensors([double(t) for t in call.tensors])
    reference = Call(info.reference, wide.sample)
    try:
        expected = run_leaves(reference, wide.tensors)
    except Exception:
        if call.is_empty:
            return  # not every op is defined for it
        raise
    before = [t.detach().clone() for t in call.tensors]
    actual = run_leaves(call, call.tensors)
    for tensor, copy in zip(call.tensors, before):
        if not torch.equal(tensor.detach().nan_to_num(), copy.nan_to_num()):
            raise AssertionError(f"{info.name}{describe(call)} changed an argument")
    inputs = [t.detach() for t in call.tensors if t.requires_grad]
    outputs = len(actual) - len(inputs)
    # A result that cancels to 0 has the rounding error of numbers of this size. A gradient may have that of any factor.
    size, of_factors = (
        _largest(t for t in tensors if t.is_floating_point()) for tensors in (wide.inputs, wide.tensors)
    )
    sizes: list[Tensor | float] = [*([size] * outputs), *([of_factors] * len(inputs))]
    if info.term_size is not None:
        terms = flatten(info.term_size(*wide.sample.args, **wide.sample.kwargs))
        sizes[:outputs] = [t.detach().nan_to_num(0, 0, 0).clamp_min(size) for t in terms]
    outside = [_outside(e, a.dtype) for a, e in zip(actual[:outputs], expected)]
    allowed = _reached(reference, wide.tensors, outside) if any(o.any() for o in outside) else [None] * len(inputs)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if i < outputs:
            _compare(a, e, sizes[i], f"output {i} of {info.name}{describe(call)}")
        else:
            j = i - outputs
            what = f"gradient {j} of {info.name}{describe(call)}"
            try:
                _compare(a, e, sizes[i], what, inputs[j], allowed[j])
            except AssertionError:
                if inputs[j].dim() > 0 and inputs[j].numel() == max(x.numel() for x in inputs):
                    raise
                size = max(of_factors, _variation(reference, wide.tensors, j))
                _compare(a, e, size, what, inputs[j], allowed[j])


def _variation(reference: Call, tensors: Sequence[Tensor], index: int) -> float:
    """Return how much a gradient varies with its inputs, relative to these: the size of the terms that cancel in it.

    That of what many terms share, such as a temperature or one reference of several pairs, may cancel to 0, whatever
    the terms are.
    """
    inputs = [t for t in tensors if t.requires_grad]
    outputs = [y for y in reference.with_tensors(tensors).run() if y.requires_grad]
    found = grads(outputs, inputs, randn_like(outputs, seed=1), create_graph=True)[index]
    moves = grads([found], inputs, [torch.ones_like(found)])
    return sum((x.detach() * move).nan_to_num(0, 0, 0).abs().sum().item() for x, move in zip(inputs, moves))


def _largest(tensors: Iterable[Tensor]) -> float:
    """Return the largest finite magnitude, or 1 if it is larger."""
    return min(1.0, max((t.detach().nan_to_num(0, 0, 0).abs().max().item() for t in tensors if t.numel()), default=0.0))


def _outside(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """Return which numbers are NaN or beyond the dtype's range."""
    if not expected.is_floating_point():
        return torch.zeros_like(expected, dtype=torch.bool)
    return ~(expected.abs() < torch.finfo(dtype).max)


def _reached(reference: Call, tensors: Sequence[Tensor], outside: Sequence[Tensor]) -> list[Tensor]:
    """Return which elements of the gradients depend on the outputs that are ``outside``: a NaN that is the cotangent of
    these reaches them.
    """
    pairs = [(y, o) for y, o in zip(reference.with_tensors(tensors).run(), outside) if y.requires_grad]
    inputs = [t for t in tensors if t.requires_grad]
    if not pairs or not inputs:
        return [torch.zeros_like(x, dtype=torch.bool) for x in inputs]
    found = grads([y for y, _ in pairs], inputs, [torch.where(o, math.nan, torch.zeros_like(y)) for y, o in pairs])
    return [g.isnan() for g in found]


def _compare(
    actual: Tensor,
    expected: Tensor,
    size: Tensor | float,
    what: str,
    gradient_in: Tensor | None = None,
    may_be_nan: Tensor | None = None,
) -> None:
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}")
    if not actual.is_floating_point():
        if not torch.equal(actual, expected.to(actual.dtype)):
            raise AssertionError(f"{what}: {actual}, expected {expected}")
        return
    limits = torch.finfo(actual.dtype)
    a, e = actual.detach().double(), expected.detach().double()
    half = actual.dtype.itemsize == 2
    rtol = 2 * limits.eps if half else max(64 * limits.eps, TOLERANCE)
    atol = 64 * torch.finfo(torch.float32).eps if half and gradient_in is None else rtol
    inside = e.abs() < limits.max / 2
    scale = torch.as_tensor(size, dtype=torch.float64).clamp_min(e[inside].abs().max().item() if inside.any() else 0.0)
    close = (a - e).abs() <= rtol * e.abs() + atol * scale + 2 * limits.smallest_normal * limits.eps
    if gradient_in is not None:
        good = close | ~inside | ~gradient_in.isfinite()
        if may_be_nan is not None:
            good |= may_be_nan & a.isnan()
    else:
        beyond = a * e.sign() > limits.max / 4
        good = torch.where(e.isnan(), a.isnan(), torch.where(inside, close, beyond))
    if not good.all():
        raise AssertionError(f"{what}:\n{actual.detach()}\nexpected\n{expected.detach()}")


def script(info: OpInfo, sample: Sample, only: Sequence[str] = ()) -> str:
    """Return a program that makes the same call and checks it.

    The program runs `check` on a function of this package. It runs the rows ``only`` of `verify` on any other
    function, whose dotted name must be the name of ``info``.

    Example:
        >>> import torch, custom_ops
        >>> from custom_ops.registry import FUNCTIONS, Sample
        >>> from custom_ops.verify import script
        >>> print(script(FUNCTIONS["relu"], Sample((torch.tensor([-1.0, 2.0]),))).rstrip())
        import torch
        from torch import inf, nan
        <BLANKLINE>
        import custom_ops  # registers the ops
        from custom_ops.registry import FUNCTIONS, Sample
        from custom_ops.verify import check
        <BLANKLINE>
        t0 = torch.tensor([-1.0, 2.0], dtype=torch.float32).as_strided((2,), (1,))
        <BLANKLINE>
        check(FUNCTIONS['relu'], Sample((t0, ), {}))
    """
    call = Call(info.function, sample)
    ours = info.name in registry.FUNCTIONS
    lines = ["import torch", "from torch import inf, nan", ""]
    if ours:
        lines += ["import custom_ops  # registers the ops", "from custom_ops.registry import FUNCTIONS, Sample"]
        lines += ["from custom_ops.verify import check", ""]
    else:
        parts = info.name.split(".")
        module = next(m for i in range(len(parts), 0, -1) if (m := ".".join(parts[:i])) in sys.modules)
        described = [v for v in (*sample.args, *sample.kwargs.values()) if is_dataclass(v)]
        lines += [f"from {type(v).__module__} import {type(v).__name__}" for v in described]
        lines += [f"import {module}", "from custom_ops.verify import Sample, verify", ""]
    for i, tensor in enumerate(call.tensors):
        flat = torch.as_strided(tensor.detach(), (_extent(tensor),), (1,), tensor.storage_offset())
        place = f"{tuple(tensor.shape)}, {tensor.stride()}"
        lines.append(f"t{i} = torch.tensor({flat.tolist()}, dtype={tensor.dtype}).as_strided({place})")
        if tensor.requires_grad:
            lines.append(f"t{i}.requires_grad_()")
    names = {id(tensor): f"t{i}" for i, tensor in enumerate(call.tensors)}

    def shown(value: Any) -> str:
        return names[id(value)] if isinstance(value, Tensor) else repr(value)

    args = "".join(f"{shown(a)}, " for a in sample.args)
    kwargs = ", ".join(f"{name!r}: {shown(a)}" for name, a in sample.kwargs.items())
    called = f"Sample(({args}), {{{kwargs}}})"
    checked = f"check(FUNCTIONS[{info.name!r}], {called})"
    verified = f"verify({info.name}, [{called}], only={list(only) or None}, quick=True).raise_on_failure()"
    lines += ["", checked if ours else verified]
    return "\n".join(lines) + "\n"


def _extent(tensor: Tensor) -> int:
    """Return the number of elements from the tensor's first to its last in memory."""
    return 0 if tensor.numel() == 0 else 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
