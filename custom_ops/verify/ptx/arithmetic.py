"""Arithmetic instructions: each thread computes from its own registers."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from custom_ops.verify.ptx.decode import Decoder, Fetch, Run, builds
from custom_ops.verify.ptx.numbers import (
    UNSIGNED,
    Array,
    Type,
    flush,
    fma,
    perturb,
)
from custom_ops.verify.ptx.program import Vector

if TYPE_CHECKING:
    from custom_ops.verify.ptx.machine import Machine

PREDICATE = Type("pred", 1)
B32 = Type("b", 32)
U32 = Type("u", 32)
F32 = Type("f", 32)
F64 = Type("f", 64)


def elementwise(d: Decoder, type_: Type, function: Callable[..., Array], *fetches: Fetch) -> Run:
    """Write ``function`` of the fetched operands to the first operand."""
    put = d.target(type_)
    if len(fetches) == 1:
        (only,) = fetches
        return lambda m: put(m, function(only(m)))
    if len(fetches) == 2:
        first, second = fetches
        return lambda m: put(m, function(first(m), second(m)))
    return lambda m: put(m, function(*(fetch(m) for fetch in fetches)))


def rounding(d: Decoder, type_: Type, function: Callable[..., Array], *fetches: Fetch) -> Run:
    """Do the same for floating-point numbers, rounded to nearest, with ``.ftz`` and ``.sat``.

    Every NaN in a result becomes the canonical one, because CPUs and GPUs choose a NaN's bits differently.
    """
    d.take("rn")
    ftz = "ftz" in d.modifiers and type_.dtype == np.float32
    fetches = tuple(d.flushing(type_, *fetches))
    saturate = d.take("sat")

    def complete(*numbers: Array) -> Array:
        result = function(*numbers)
        if ftz:
            result = flush(result)
        if saturate:
            return np.where(np.isnan(result), result.dtype.type(0), np.clip(result, 0, 1))
        nan = np.isnan(result)
        return np.where(nan, result.dtype.type(np.nan), result) if nan.any() else result

    return elementwise(d, type_, complete, *fetches)


# ---------------------------------------------------------------- sums and products


@builds("add", "sub")
def _sum(d: Decoder) -> Run:
    type_ = d.type()
    function = np.add if d.name == "add" else np.subtract
    if not type_.floating:
        return elementwise(d, type_, function, d.source(1, type_), d.source(2, type_))
    wider = Type.of(d.modifiers[-1]) if d.modifiers else None
    if wider is not None:  # d.f32 = a.f16 + b.f32
        d.modifiers.pop()
        narrow = d.source(1, type_)
        return rounding(d, wider, function, lambda m: narrow(m).astype(wider.dtype), d.source(2, wider))
    return rounding(d, type_, function, d.source(1, type_), d.source(2, type_))


def high(a: Array, b: Array) -> Array:
    """Return the upper half of a product of integers."""
    width = 8 * a.dtype.itemsize
    if width < 64:
        wide = np.dtype(f"{a.dtype.kind}{width // 4}")
        return ((a.astype(wide) * b.astype(wide)) >> wide.type(width)).astype(a.dtype)
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    x, y = a.view(np.uint64), b.view(np.uint64)
    xl, xh, yl, yh = x & low, x >> half, y & low, y >> half
    middle = xh * yl + ((xl * yl) >> half)
    carried = (middle & low) + xl * yh
    result = xh * yh + (middle >> half) + (carried >> half)
    if a.dtype.kind == "i":
        result = result - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return result.view(a.dtype)


@builds("mul", "mad")
def _product(d: Decoder) -> Run:
    type_ = d.type()
    if type_.floating:
        if d.name == "mad":
            raise d.instruction.unknown()
        return rounding(d, type_, np.multiply, d.source(1, type_), d.source(2, type_))
    part = d.take("lo", "hi", "wide")
    result = Type(type_.kind, 2 * type_.width) if part == "wide" else type_
    wide = result.dtype
    product: Callable[[Array, Array], Array]
    if part == "wide":
        product = lambda a, b: a.astype(wide) * b.astype(wide)  # noqa: E731
    elif part in ("lo", "hi"):
        product = np.multiply if part == "lo" else high
    else:
        raise d.instruction.unknown()
    first, second = d.source(1, type_), d.source(2, type_)
    if d.name == "mul":
        return elementwise(d, result, product, first, second)
    return elementwise(d, result, lambda a, b, c: product(a, b) + c, first, second, d.source(3, result))


@builds("fma")
def _fma(d: Decoder) -> Run:
    type_ = d.type()
    if not type_.floating or "rn" not in d.modifiers:
        raise d.instruction.unknown()
    wider = Type.of(d.modifiers[-1])
    fetches = d.sources(type_)
    result = type_
    if wider is not None:  # d.f32 = a.f16 * b.f16 + c.f32
        d.modifiers.pop()
        first, second = fetches[:2]
        result, fetches = (
            wider,
            [lambda m: first(m).astype(np.float32), lambda m: second(m).astype(np.float32), d.source(3, wider)],
        )
    return rounding(d, result, lambda a, b, c: fma(a, b, c, result), *fetches)


@builds("div", "rem")
def _quotient(d: Decoder) -> Run:
    type_ = d.type()
    first, second = d.source(1, type_), d.source(2, type_)
    if not type_.floating:
        return elementwise(d, type_, divide if d.name == "div" else remainder, first, second)
    if d.name == "rem":
        raise d.instruction.unknown()
    if d.take("approx", "full"):
        if type_ != F32:
            raise d.instruction.unknown("type")
        return approximate(
            d, lambda a, b: np.divide(a, b, dtype=np.float64), relative=2.0**-22, fetches=[first, second]
        )
    if "rn" not in d.modifiers:
        raise d.instruction.unknown()
    return rounding(d, type_, np.divide, first, second)


def divide(a: Array, b: Array) -> Array:
    """Divide, rounding towards zero. A quotient by zero is all ones; PTX leaves it unspecified."""
    quotient = np.floor_divide(a, np.where(b == 0, b.dtype.type(1), b))
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient < 0) & (quotient * b != a)).astype(a.dtype)
    return np.where(b == 0, ~a.dtype.type(0), quotient)


def remainder(a: Array, b: Array) -> Array:
    return np.where(b == 0, ~a.dtype.type(0), np.fmod(a, np.where(b == 0, b.dtype.type(1), b)))


@builds("min", "max")
def _extremum(d: Decoder) -> Run:
    type_ = d.type()
    least = d.name == "min"
    if not type_.floating:
        return elementwise(d, type_, np.minimum if least else np.maximum, *d.sources(type_))
    with_nan = bool(d.take("NaN"))
    return rounding(
        d, type_, lambda *numbers: reduce(lambda a, b: extremum(a, b, least, with_nan), numbers), *d.sources(type_)
    )


def extremum(a: Array, b: Array, least: bool, with_nan: bool) -> Array:
    """Return the minimum or maximum. It orders -0 before +0, and ignores a NaN unless ``with_nan``."""
    function: Any = (np.minimum if with_nan else np.fmin) if least else (np.maximum if with_nan else np.fmax)
    result = function(a, b)
    zeros = (a == 0) & (b == 0)
    if zeros.any():
        signs = np.signbit(a) | np.signbit(b) if least else np.signbit(a) & np.signbit(b)
        result = np.where(zeros, np.where(signs, -result.dtype.type(0), result.dtype.type(0)), result)
    return result


@builds("abs", "neg")
def _sign(d: Decoder) -> Run:
    type_ = d.type()
    function = np.abs if d.name == "abs" else np.negative
    return (rounding if type_.floating else elementwise)(d, type_, function, d.source(1, type_))


@builds("copysign")
def _copysign(d: Decoder) -> Run:
    type_ = d.type()
    return elementwise(d, type_, lambda sign, size: np.copysign(size, sign), d.source(1, type_), d.source(2, type_))


# ---------------------------------------------------------------- bits


@builds("and", "or", "xor", "not")
def _bitwise(d: Decoder) -> Run:
    type_ = d.type()
    functions: dict[str, Any] = {
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "not": np.invert,
    }
    return elementwise(d, type_, functions[d.name], *d.sources(type_))


@builds("shl", "shr")
def _shift(d: Decoder) -> Run:
    type_ = d.type()
    left = d.name == "shl"
    limit = np.uint32(type_.width)

    def shift(a: Array, by: Array) -> Array:
        within = np.minimum(by, limit - np.uint32(1)).astype(a.dtype)
        shifted = a << within if left else a >> within
        return shifted if a.dtype.kind == "i" and not left else np.where(by >= limit, a.dtype.type(0), shifted)

    return elementwise(d, type_, shift, d.source(1, type_), d.source(2, U32))


@builds("shf")
def _funnel(d: Decoder) -> Run:
    left, clamp = d.take("l", "r") == "l", d.take("clamp", "wrap") == "clamp"
    type_ = d.type()

    def shift(low: Array, high: Array, by: Array) -> Array:
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        by = (np.minimum(by, np.uint32(32)) if clamp else by & np.uint32(31)).astype(np.uint64)
        return ((both << by) >> np.uint64(32) if left else both >> by).astype(np.uint32)

    return elementwise(d, type_, shift, d.source(1, B32), d.source(2, B32), d.source(3, U32))


@builds("bfe")
def _extract(d: Decoder) -> Run:
    type_ = d.type()
    width = type_.width

    def extract(a: Array, position: Array, length: Array) -> Array:
        """Return the field; bits past the number's end are zeros or copies of the sign."""
        position, length = position & np.uint32(255), length & np.uint32(255)
        inside = np.minimum(position + length, np.uint32(width)) - np.minimum(position, np.uint32(width))
        moved = a >> np.minimum(position, np.uint32(width - 1)).astype(a.dtype)
        up = np.minimum(np.uint32(width) - inside, np.uint32(width - 1)).astype(a.dtype)
        beyond = a >> a.dtype.type(width - 1) if a.dtype.kind == "i" else a.dtype.type(0)
        field = np.where(inside == 0, beyond, (moved << up) >> up)
        return np.where(length == 0, a.dtype.type(0), field)

    return elementwise(d, type_, extract, d.source(1, type_), d.source(2, U32), d.source(3, U32))


@builds("bfi")
def _insert(d: Decoder) -> Run:
    type_ = d.type()
    width, dtype = type_.width, type_.dtype.type

    def insert(a: Array, b: Array, position: Array, length: Array) -> Array:
        position, length = position & np.uint32(255), length & np.uint32(255)
        ones = np.where(
            length >= width, ~dtype(0), (dtype(1) << np.minimum(length, width - 1).astype(dtype)) - dtype(1)
        )
        at = np.minimum(position, width - 1).astype(dtype)
        mask = np.where(position >= width, dtype(0), ones << at)
        return (b & ~mask) | ((a << at) & mask)

    return elementwise(d, type_, insert, d.source(1, type_), d.source(2, type_), d.source(3, U32), d.source(4, U32))


@builds("prmt")
def _permute(d: Decoder) -> Run:
    type_ = d.type()

    def permute(a: Array, b: Array, selector: Array) -> Array:
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        result: Any = np.uint32(0)
        for place in range(4):
            nibble = selector >> np.uint32(4 * place)
            byte = (both >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(np.uint32) & np.uint32(
                255
            )
            sign = np.where(byte & np.uint32(128) != 0, np.uint32(255), np.uint32(0))
            result = result | (np.where(nibble & np.uint32(8) != 0, sign, byte) << np.uint32(8 * place))
        return result

    return elementwise(d, type_, permute, d.source(1, B32), d.source(2, B32), d.source(3, B32))


@builds("lop3")
def _lookup(d: Decoder) -> Run:
    type_ = d.type()

    def lookup(a: Array, b: Array, c: Array, table: Array) -> Array:
        result: Any = np.uint32(0)
        for row in range(8):
            if int(table) >> row & 1:
                result = result | (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return np.broadcast_arrays(result, a)[0]

    return elementwise(d, type_, lookup, *d.sources(type_))


@builds("popc")
def _popc(d: Decoder) -> Run:
    return elementwise(d, U32, lambda a: np.bitwise_count(a).astype(np.uint32), d.source(1, d.type()))


@builds("clz")
def _clz(d: Decoder) -> Run:
    type_ = d.type()

    def zeros(a: Array) -> Array:
        for shift in (1, 2, 4, 8, 16, 32)[: 5 if type_.width == 32 else 6]:
            a = a | (a >> a.dtype.type(shift))
        return np.uint32(type_.width) - np.bitwise_count(a).astype(np.uint32)

    return elementwise(d, U32, zeros, d.source(1, type_))


@builds("brev")
def _reverse(d: Decoder) -> Run:
    type_ = d.type()

    def reverse(a: Array) -> Array:
        result = np.zeros_like(a)
        for place in range(type_.width):
            result = result | (((a >> a.dtype.type(place)) & a.dtype.type(1)) << a.dtype.type(type_.width - 1 - place))
        return result

    return elementwise(d, type_, reverse, d.source(1, type_))


# ---------------------------------------------------------------- moves, choices and comparisons


@builds("mov")
def _move(d: Decoder) -> Run:
    type_ = d.type()
    type_ = type_ if type_.kind == "pred" else Type("b", type_.bits)
    return elementwise(d, type_, lambda a: a, d.source(1, type_))


@builds("cvta")
def _convert_address(d: Decoder) -> Run:
    to = bool(d.take("to"))
    space = d.take("global", "shared", "local", "const")
    type_ = d.type()
    window = WINDOWS[space]
    return elementwise(
        d, type_, lambda a: a - type_.dtype.type(window) if to else a + type_.dtype.type(window), d.source(1, type_)
    )


WINDOWS = {"global": 0, "const": 0, "shared": 1 << 60, "local": 1 << 61}  # the first generic addresses


def _choose(a: Array, b: Array, first: Array) -> Array:
    return np.where(first, a, b)


@builds("selp")
def _select(d: Decoder) -> Run:
    type_ = d.type()
    type_ = Type("b", type_.bits)
    return elementwise(d, type_, _choose, d.source(1, type_), d.source(2, type_), d.source(3, PREDICATE))


_COMPARISONS: dict[str, Any] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNSIGNED_COMPARISONS = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def comparison(d: Decoder, type_: Type) -> Callable[[Array, Array], Array]:
    if type_.floating:
        name = d.take("num", "nan", *_COMPARISONS, *(f"{name}u" for name in _COMPARISONS))
        if name in ("num", "nan"):
            return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
        if name.endswith("u"):
            compare = _COMPARISONS[name[:-1]]
            return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)
        if name == "ne":
            return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
    else:
        name = d.take(*_COMPARISONS, *_UNSIGNED_COMPARISONS)
        name = _UNSIGNED_COMPARISONS.get(name, name)
    if not name:
        raise d.instruction.unknown("comparison")
    return _COMPARISONS[name]


@builds("setp")
def _compare(d: Decoder) -> Run:
    type_ = d.type()
    compare = comparison(d, type_)
    combine: Any = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "": None}[
        d.take("and", "or", "xor")
    ]
    third = d.source(3, PREDICATE) if combine else None
    first, second = d.flushing(type_, d.source(1, type_), d.source(2, type_))
    targets = d.operand(0)
    both = [d.put(one, PREDICATE) for one in (targets.parts if isinstance(targets, Vector) else (targets,))]

    def run(m: Machine) -> None:
        result = compare(first(m), second(m))
        opposite = ~result
        if third is not None:
            result, opposite = combine(result, third(m)), combine(opposite, third(m))
        if type_.lanes == 2:
            result, opposite = result[..., 0], result[..., 1]
        both[0](m, result)
        if len(both) > 1:
            both[1](m, opposite)

    return run


# ---------------------------------------------------------------- conversions

_TO_INTEGER: dict[str, Any] = {
    "rni": np.rint,
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
}


@builds("cvt")
def _convert(d: Decoder) -> Run:
    if "tf32" in d.modifiers:
        return _to_tf32(d)
    source = d.type()
    target = d.type()
    ftz = bool(d.take("ftz"))
    integral = d.take(*_TO_INTEGER)
    d.take("rn")
    saturate = bool(d.take("sat"))
    if target.lanes == 2 and source.lanes == 1:  # packs two numbers into one register, the first in the upper half
        upper, lower = d.source(1, source), d.source(2, source)
        return elementwise(d, target, lambda a, b: np.stack(np.broadcast_arrays(b, a), -1), upper, lower)
    if target.lanes != source.lanes:
        raise d.instruction.unknown()

    def convert(x: Array) -> Array:
        if ftz and x.dtype == np.float32:
            x = flush(x)
        if integral:
            x = _TO_INTEGER[integral](x)
        if source.floating and not target.floating:
            return to_integer(x, target, wide=source.width == 64 or target.width == 64)
        if saturate:
            if target.floating:
                x = np.where(np.isnan(x), x.dtype.type(0), np.clip(x, 0, 1))
            else:
                x = _saturated(x, target)
        if target.kind == "bf":
            return x.astype(np.float64) if x.dtype != np.float32 else x
        x = x.astype(target.dtype)
        return flush(x) if ftz and x.dtype == np.float32 else x

    if source.floating and not target.floating and not integral:
        raise d.instruction.unknown("rounding")
    return elementwise(d, target, convert, d.source(1, source))


def to_integer(x: Array, target: Type, wide: bool) -> Array:
    """Return clamped integers. NaN becomes zero between 32-bit types, and the sign bit otherwise."""
    limits = np.iinfo(target.dtype)
    x = x.astype(np.float64)
    above, below, nan = x >= float(limits.max), x <= float(limits.min), np.isnan(x)
    within = np.where(above | below | nan, 0.0, x)
    number = within.astype(np.uint64).astype(target.dtype) if limits.min == 0 else within.astype(target.dtype)
    number = np.where(above, target.dtype.type(limits.max), np.where(below, target.dtype.type(limits.min), number))
    unsigned = UNSIGNED[target.width]
    of_nan = np.full((), 1 << (target.width - 1) if wide else 0, unsigned).view(target.dtype)
    return np.where(nan, of_nan, number)


def _saturated(x: Array, target: Type) -> Array:
    limits, of = np.iinfo(target.dtype), np.iinfo(x.dtype)
    return np.clip(x, x.dtype.type(max(limits.min, of.min)), x.dtype.type(min(limits.max, of.max)))


def _to_tf32(d: Decoder) -> Run:
    """Convert float32 to TF32: ten bits of mantissa, kept in 32 bits."""
    source, nearest = d.type(), d.take("rna", "rn")
    d.take("tf32")
    if source != F32 or not nearest:
        raise d.instruction.unknown()

    def convert(bits: Array) -> Array:
        half = np.uint32(0x1000) if nearest == "rna" else np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
        finite = (bits & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
        return np.where(finite, (bits + half) & np.uint32(0xFFFFE000), bits)

    return elementwise(d, B32, convert, d.source(1, B32))


# ---------------------------------------------------------------- approximations, with the errors that PTX documents


def approximate(
    d: Decoder,
    exact: Callable[..., Array],
    relative: float = 0.0,
    absolute: float = 0.0,
    fetches: list[Fetch] | None = None,
    type_: Type = F32,
) -> Run:
    """Write ``exact``, computed in float64, with a random error within the bounds."""
    flushes = "ftz" in d.modifiers
    fetches = d.flushing(type_, *(fetches or [d.source(1, type_)]))
    put = d.target(type_)

    def run(m: Machine) -> None:
        inputs = [fetch(m) for fetch in fetches]
        value = exact(*(x.astype(np.float64) for x in inputs))
        result = perturb(value, relative, absolute, m.seed, *inputs)
        put(m, flush(result) if flushes else result)

    return run


_APPROXIMATE: dict[str, tuple[Any, float, float]] = {
    "ex2": (np.exp2, 2.0**-22, 0.0),
    "lg2": (np.log2, 2.0**-22, 2.0**-22),
    "rcp": (np.reciprocal, 2.0**-23, 0.0),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 2.0**-22.4, 0.0),
    "sqrt": (np.sqrt, 2.0**-23, 0.0),
    "sin": (np.sin, 0.0, 2.0**-20.5),
    "cos": (np.cos, 0.0, 2.0**-20.5),
    "tanh": (np.tanh, 2.0**-11, 0.0),
}
_APPROXIMATE_HALF = {
    ("ex2", "f"): (2.0**-9.9, 0.0),
    ("ex2", "bf"): (2.0**-7, 0.0),
    ("tanh", "f"): (0.0, 2.0**-10.987),
    ("tanh", "bf"): (0.0, 2.0**-8),
}
_ROUNDED: dict[str, Any] = {"rcp": np.reciprocal, "sqrt": np.sqrt}


@builds(*_APPROXIMATE)
def _function(d: Decoder) -> Run:
    type_ = d.type()
    if d.take("approx"):
        exact, relative, absolute = _APPROXIMATE[d.name]
        if type_ == F64 and d.name in ("rcp", "rsqrt") and d.take("ftz"):
            return elementwise(d, F64, lambda x: coarse(exact(x)), d.source(1, F64))
        if type_.width == 16 and (d.name, type_.kind) in _APPROXIMATE_HALF:
            relative, absolute = _APPROXIMATE_HALF[d.name, type_.kind]
        elif type_ != F32:
            raise d.instruction.unknown("type")
        return approximate(d, exact, relative, absolute, type_=type_)
    if d.name not in _ROUNDED or "rn" not in d.modifiers:
        raise d.instruction.unknown()
    return rounding(d, type_, _ROUNDED[d.name], d.source(1, type_))


def coarse(x: Array) -> Array:
    """Return doubles whose lower 32 bits are zero, with subnormal numbers flushed to zero."""
    x = np.where(np.abs(x) < 2.0**-1022, np.copysign(0.0, x), x)
    return (x.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)
