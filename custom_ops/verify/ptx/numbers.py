"""PTX's types in NumPy, and arithmetic that NumPy doesn't have: bfloat16, fused multiply-add, bounded errors.

A value is an array with one number for each thread, or a scalar if all threads have the same number. Registers hold
bits: a `Type` converts them to numbers and back. Packed types, such as ``f16x2``, have their parts along a last axis
of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_WIDTHS = (8, 16, 32, 64)
UNSIGNED: dict[int, np.dtype[Any]] = {1: np.dtype(bool), **{width: np.dtype(f"u{width // 8}") for width in _WIDTHS}}
SIGNED: dict[int, np.dtype[Any]] = {width: np.dtype(f"i{width // 8}") for width in _WIDTHS}


def resize(bits: Array, width: int) -> Array:
    """Return the low ``width`` bits of unsigned numbers, padded with zeros if they have fewer."""
    dtype = UNSIGNED[width]
    return bits if bits.dtype == dtype else bits.astype(dtype)


@dataclass(frozen=True)
class Type:
    """``kind`` is b or u (unsigned), s (signed), f (floating point), bf (bfloat16) or pred; ``lanes`` are packed."""

    kind: str
    width: int  # the width of one lane
    lanes: int = 1

    @staticmethod
    def of(name: str) -> Type | None:
        return _TYPES.get(name)

    @cached_property
    def bits(self) -> int:
        return self.width * self.lanes

    @property
    def floating(self) -> bool:
        return self.kind in ("f", "bf")

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the numbers."""
        if self.kind == "bf":
            return np.dtype("f4")
        if self.kind == "f":
            return np.dtype(f"f{self.width // 8}")
        return (SIGNED if self.kind == "s" else UNSIGNED)[self.width]

    def read(self, bits: Array) -> Array:
        """Return the numbers in the low bits of a register."""
        bits = resize(bits, self.bits)
        if self.kind in ("b", "u", "pred") and self.lanes == 1:
            return bits
        if self.lanes > 1:
            bits = np.asarray(bits)
            bits = np.ascontiguousarray(bits).reshape(*bits.shape, 1).view(UNSIGNED[self.width])
        if self.kind == "bf":
            return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return bits.view(self.dtype)

    def write(self, numbers: Array, register: int) -> Array:
        """Return numbers as the bits of a register of that width; signed numbers keep their sign."""
        if self.kind == "bf":
            numbers = bfloat16_bits(numbers)
        elif numbers.dtype != self.dtype:
            numbers = numbers.astype(self.dtype)
        if self.lanes > 1:
            numbers = np.ascontiguousarray(numbers).view(UNSIGNED[self.bits])[..., 0]
        elif self.kind == "s":
            return numbers.astype(SIGNED[register]).view(UNSIGNED[register])
        elif self.kind == "f":
            numbers = numbers.view(UNSIGNED[self.width])
        return resize(numbers, register)


_TYPES = {
    **{f"{kind}{width}": Type(kind, width) for kind in "bus" for width in (8, 16, 32, 64)},
    **{f"f{width}": Type("f", width) for width in (16, 32, 64)},
    "bf16": Type("bf", 16),
    "pred": Type("pred", 1),
    "f16x2": Type("f", 16, 2),
    "bf16x2": Type("bf", 16, 2),
    "f32x2": Type("f", 32, 2),
}


def bfloat16_bits(x: Array) -> Array:
    """Round float32 or float64 once, to nearest even, to bits of bfloat16. NaN is 0x7fff, as on the hardware."""
    single = x if x.dtype == np.float32 else round_to_odd(x)
    bits = single.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(single), np.uint16(0x7FFF), rounded.astype(np.uint16))


def round_to_odd(x: Array) -> Array:
    """Round float64 to odd in float32, so that a second rounding to fewer bits gives the result of a single one."""
    near = x.astype(np.float32)
    bits = near.view(np.uint32)
    even = (near.astype(np.float64) != x) & np.isfinite(near) & (bits & np.uint32(1) == 0)
    inwards = np.abs(near.astype(np.float64)) > np.abs(x)
    return np.where(even, np.where(inwards, bits - np.uint32(1), bits + np.uint32(1)), bits).view(np.float32)


def flush(x: Array) -> Array:
    """Flush subnormal single-precision numbers to zeros of their sign."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


# ---------------------------------------------------------------- fused multiply-add


def fma(a: Array, b: Array, c: Array, type_: Type) -> Array:
    """Return ``a * b + c``, rounded once."""
    if type_.width == 64:
        return _fma64(a, b, c)
    product = a.astype(np.float64) * b.astype(np.float64)  # exact
    addend = c.astype(np.float64)
    total = product + addend
    if type_.width == 16:
        odd = _to_odd(total, _error(product, addend, total))
        return odd if type_.kind == "bf" else odd.astype(np.float16)
    single = total.astype(np.float32)
    # Rounding twice differs only where the sum in double precision is halfway between two singles.
    tied = (total.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    if (tied | (np.abs(total) < 2.0**-125)).any():
        return _to_odd(total, _error(product, addend, total)).astype(np.float32)
    return single


def _error(a: Array, b: Array, total: Array) -> Array:
    """Return the rounding error of ``total = a + b`` (Knuth)."""
    part = total - a
    return (a - (total - part)) + (b - part)


def _to_odd(total: Array, error: Array) -> Array:
    """Return ``total + error`` rounded to odd, where the error is less than half a unit (Boldo and Melquiond)."""
    bits = total.view(np.int64)
    even = (error != 0) & np.isfinite(error) & np.isfinite(total) & (bits & np.int64(1) == 0)
    step = np.where((error > 0) == (total > 0), np.int64(1), np.int64(-1))
    return np.where(even, bits + step, bits).view(np.float64)


def _split(a: Array) -> tuple[Array, Array]:
    scaled = a * np.float64(134217729.0)
    high = scaled - (scaled - a)
    return high, a - high


def _fma64(a: Array, b: Array, c: Array) -> Array:
    product = a * b
    (ah, al), (bh, bl) = _split(a), _split(b)
    low = al * bl - (((product - ah * bh) - al * bh) - ah * bl)
    first = c + low
    first_error = _error(c, low, first)
    second = product + first
    second_error = _error(product, first, second)
    rest = second_error + first_error
    result = second + _to_odd(rest, _error(second_error, first_error, rest))
    # A product of zero only needs the right sign.
    tiny, zero = np.abs(product) < _SMALL, (a == 0) | (b == 0)
    large = (np.abs(a) > _LARGE) | (np.abs(b) > _LARGE) | (np.abs(c) > _LARGE**2)
    result = np.where(tiny & zero, product + c, result)
    extreme = tiny & ~zero | large
    if not extreme.any() and not np.isnan(result).any():
        return result
    # The parts of very large and very small numbers overflow or underflow, so these few results are computed exactly.
    # The rounded product already gives infinity and NaN.
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    result, columns = np.array(np.where(finite, result, product + c)), np.broadcast_arrays(a, b, c)
    for at in zip(*np.nonzero(extreme & finite)):
        x, y, z = (float(column[at]) for column in columns)
        result[at] = _exact(Fraction(x) * Fraction(y) + Fraction(z), x * y + z)
    return result


_LARGE, _SMALL = 2.0**500, 2.0**-900


def _exact(value: Fraction, sign: float) -> float:
    if value == 0:
        return math.copysign(0.0, sign)
    try:
        return value.numerator / value.denominator  # correctly rounded
    except OverflowError:
        return math.inf if value > 0 else -math.inf


# ---------------------------------------------------------------- approximate instructions


def perturb(exact: Array, relative: float, absolute: float, seed: int, *inputs: Array) -> Array:
    """Return single-precision results with a random error up to the larger bound, the same for the same ``inputs``.

    Zeros and results of infinite inputs are exact.
    """
    noise, finite = np.uint64(seed), np.isfinite(exact)
    for x in inputs:
        finite = finite & np.isfinite(x)
        noise = noise ^ x.view(UNSIGNED[8 * x.dtype.itemsize]).astype(np.uint64)
        noise = (noise ^ (noise >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    noise = noise ^ (noise >> np.uint64(29))
    unit = (noise >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0
    single = exact.astype(np.float32)
    with_error = (exact + unit * np.maximum(np.abs(exact) * relative, absolute)).astype(np.float32)
    return np.where(finite & (single != 0), with_error, single)
