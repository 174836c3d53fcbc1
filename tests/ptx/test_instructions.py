"""Each instruction that the emulator knows, compared with NumPy."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from custom_ops.verify.ptx.errors import OutOfBoundsError, PartialWarpError, RaceError, UnknownInstructionError
from custom_ops.verify.ptx.machine import Kernel
from custom_ops.verify.ptx.memory import GlobalMemory
from custom_ops.verify.ptx.numbers import UNSIGNED, Type, bfloat16_bits, fma

THREADS = 1024
RNG = np.random.default_rng(0)


def run(body, inputs, outputs, threads=THREADS, shared=0, seed=0, grid=(1, 1, 1)):
    """Give each thread one element of each input (%a0, ...), and return the outputs (%o0, ...).

    ``outputs`` are their dtypes.
    """
    registers = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}
    arrays = [*inputs, *(np.zeros(threads, dtype) for dtype in outputs)]
    parameters = ",".join(f".param .u64 p{i}" for i in range(len(arrays)))
    lines = [f".visible .entry kernel({parameters}) .reqntid {threads} {{", ".reg .b32 %id; .reg .b64 %ad<99>;"]
    lines += [".reg .b16 %h<9>; .reg .b32 %r<9>; .reg .b64 %d<9>; .reg .pred %p<9>; mov.u32 %id, %tid.x;"]
    load, store = [], []
    for i, array in enumerate(arrays):
        size, name = array.dtype.itemsize, f"%a{i}" if i < len(inputs) else f"%o{i - len(inputs)}"
        kind = "u" if array.dtype.kind in "bu" else "s" if array.dtype.kind == "i" else "b"
        lines += [f".reg .{registers[size]} {name}; ld.param.u64 %ad{i}, [p{i}];"]
        lines += [f"mad.wide.u32 %ad{i}, %id, {size}, %ad{i};"]
        (load if i < len(inputs) else store).append(
            f"ld.global.{kind}{8 * size} {name}, [%ad{i}];"
            if i < len(inputs)
            else f"st.global.b{8 * size} [%ad{i}], {name};"
        )
    ptx = "\n".join([*lines, *load, body, *store, "ret; }"])
    kernel = Kernel(ptx)
    tensors = {f"p{i}": torch.from_numpy(array.view(f"i{array.dtype.itemsize}")) for i, array in enumerate(arrays)}
    memory = GlobalMemory(tensors, {}, kernel.granules["global"])
    pointers = {name: memory.address(tensor).to_bytes(8, "little") for name, tensor in tensors.items()}
    kernel.launch(memory, pointers, grid, shared, order=0, seed=seed, strict=True)
    memory.copy_back()
    return arrays[len(inputs) :]


def draw(name, count=THREADS):
    """Return numbers of a type: random bits, small numbers and edge cases."""
    type_ = Type.of(name)
    dtype = UNSIGNED[type_.bits]
    bits = RNG.integers(0, 2**type_.bits, count, dtype=np.uint64).astype(dtype)
    if type_.floating and type_.lanes == 1:
        some = RNG.standard_normal(count // 2)
        edges = [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, math.inf, -math.inf, math.nan, 3.0e-39, 65504.0]
        values = np.concatenate([some, np.resize(edges, count // 4)])
        bits[: len(values)] = type_.write(values.astype(type_.dtype if type_.kind == "f" else "f4"), type_.bits)
    elif type_.lanes == 1:
        small = RNG.integers(-40, 40, count // 2)
        bits[: count // 2] = small.astype(np.int64).view(np.uint64).astype(dtype)
    return RNG.permutation(bits)


def same(got, want, type_):
    """Compare bit by bit, except the bits of NaN."""
    got, want = type_.read(got), np.asarray(want)
    if type_.floating:
        nan = np.isnan(want)
        assert (np.isnan(got) == nan).all()
        got, want = np.where(nan, 0, got), np.where(nan, 0, want)
        assert (np.signbit(got) == np.signbit(want)).all()
    wrong = got != want
    assert not wrong.any(), (got[wrong][:5], want[wrong][:5])


def each(text, function, *names, result=""):
    """Compare an instruction on operands of these types with its function. ``result`` is by default the first type."""
    types, to = [Type.of(name) for name in names], Type.of(result or names[0])
    inputs = [draw(name) for name in names]
    operands = ", ".join(f"%a{i}" for i in range(len(names)))
    (got,) = run(f"{text} %o0, {operands};", inputs, [UNSIGNED[to.bits]])
    with np.errstate(all="ignore"):
        same(got, function(*(type_.read(x) for type_, x in zip(types, inputs))), to)


INTEGERS = ["s16", "u16", "s32", "u32", "s64", "u64"]
FLOATS = ["f16", "bf16", "f32", "f64"]


def one_by_one(function, dtype):
    """Apply a function of Python's integers to each element, and keep the result's low bits."""
    unsigned = UNSIGNED[8 * np.dtype(dtype).itemsize]

    def every(*columns):
        results = (function(*(int(x) for x in row)) for row in zip(*columns))
        return np.array([r & int(np.iinfo(unsigned).max) for r in results], unsigned).view(dtype)

    return every


def quotient(a, b):
    return int(Fraction(a, b)) if b else -1


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name):
    dtype, width = Type.of(name).dtype, Type.of(name).width
    for text, function in (
        ("add", lambda a, b: a + b),
        ("sub", lambda a, b: a - b),
        ("mul.lo", lambda a, b: a * b),
        ("mul.hi", lambda a, b: (a * b) >> width),
        ("min", min),
        ("max", max),
        ("div", quotient),
        ("rem", lambda a, b: a - quotient(a, b) * b if b else -1),
    ):
        each(f"{text}.{name}", one_by_one(function, dtype), name, name)
    each(f"mad.lo.{name}", one_by_one(lambda a, b, c: a * b + c, dtype), name, name, name)
    if dtype.kind == "i":
        each(f"neg.{name}", np.negative, name)
        each(f"abs.{name}", np.abs, name)
    if width < 64:
        double = f"{name[0]}{2 * width}"
        wide = Type.of(double).dtype
        each(f"mul.wide.{name}", one_by_one(lambda a, b: a * b, wide), name, name, result=double)
        each(f"mad.wide.{name}", one_by_one(lambda a, b, c: a * b + c, wide), name, name, double, result=double)


@pytest.mark.parametrize("name", INTEGERS)
def test_shifts_and_fields(name):
    dtype, width = Type.of(name).dtype, Type.of(name).width
    bits = Type.of(name)

    def shifted(text, function):
        a, by = draw(name), RNG.integers(0, 80, THREADS).astype(np.uint32)
        (got,) = run(f"{text} %o0, %a0, %a1;", [a, by], [UNSIGNED[width]])
        same(got, one_by_one(function, dtype)(bits.read(a), by), bits)

    shifted(f"shr.{name}", lambda a, by: a >> by)
    shifted(f"shl.b{width}", lambda a, by: a << by)
    if width == 16:
        return

    def field(a, position, length):
        """Return the field; bits past the number's end are zeros or copies of the sign."""
        unsigned = a & ((1 << width) - 1)
        if dtype.kind == "u":
            return unsigned >> position & ((1 << length) - 1)
        if not length:
            return 0
        sign = unsigned >> min(position + length - 1, width - 1) & 1
        inside = max(0, min(length, width - position))
        return (unsigned >> position & ((1 << inside) - 1)) | sign * (-1 << inside)

    a = draw(name)
    position, length = (RNG.integers(0, width + 10, THREADS).astype(np.uint32) for _ in range(2))
    (got,) = run(f"bfe.{name} %o0, %a0, %a1, %a2;", [a, position, length], [UNSIGNED[width]])
    same(got, one_by_one(field, dtype)(bits.read(a), position, length), bits)


@pytest.mark.parametrize("width", [16, 32, 64])
def test_bits(width):
    name = f"b{width}"
    each(f"and.{name}", np.bitwise_and, name, name)
    each(f"or.{name}", np.bitwise_or, name, name)
    each(f"xor.{name}", np.bitwise_xor, name, name)
    each(f"not.{name}", np.invert, name)
    if width > 16:
        each(f"popc.{name}", one_by_one(int.bit_count, "u4"), name, result="u32")
        each(f"clz.{name}", one_by_one(lambda a: width - a.bit_length(), "u4"), name, result="u32")
        each(f"brev.{name}", one_by_one(lambda a: int(f"{a:0{width}b}"[::-1], 2), f"u{width // 8}"), name)


def test_bits_of_several_operands():
    a, b, c = (draw("b32") for _ in range(3))
    for table in (0x96, 0xE8, 0x01, 0xCA):
        (got,) = run(f"lop3.b32 %o0, %a0, %a1, %a2, {table:#x};", [a, b, c], [np.uint32])
        want = np.zeros_like(a)
        for bit in range(32):
            row = ((a >> bit) & 1) << 2 | ((b >> bit) & 1) << 1 | ((c >> bit) & 1)
            want |= ((table >> row) & 1).astype(np.uint32) << np.uint32(bit)
        assert (got == want).all()
    (got,) = run("prmt.b32 %o0, %a0, %a1, %a2;", [a, b, c], [np.uint32])
    both = [int(x) | int(y) << 32 for x, y in zip(a, b)]
    for word, selector, result in zip(both, c, got):
        for place in range(4):
            nibble = int(selector) >> 4 * place & 15
            byte = word >> 8 * (nibble & 7) & 255
            assert int(result) >> 8 * place & 255 == ((255 if byte & 128 else 0) if nibble & 8 else byte)
    by = RNG.integers(0, 70, THREADS).astype(np.uint32)
    for mode, limit in (("wrap", lambda n: n % 32), ("clamp", lambda n: min(n, 32))):
        (left,) = run(f"shf.l.{mode}.b32 %o0, %a0, %a1, %a2;", [a, b, by], [np.uint32])
        (right,) = run(f"shf.r.{mode}.b32 %o0, %a0, %a1, %a2;", [a, b, by], [np.uint32])
        for word, n, x, y in zip(both, by, left, right):
            assert int(x) == (word << limit(int(n)) >> 32) & 0xFFFFFFFF
            assert int(y) == word >> limit(int(n)) & 0xFFFFFFFF
    position, length = RNG.integers(0, 34, THREADS).astype(np.uint32), RNG.integers(0, 34, THREADS).astype(np.uint32)
    (got,) = run("bfi.b32 %o0, %a0, %a1, %a2, %a3;", [a, b, position, length], [np.uint32])
    for x, y, p, n, result in zip(a, b, position, length, got):
        mask = ((1 << int(n)) - 1) << int(p) & 0xFFFFFFFF
        assert int(result) == (int(y) & ~mask) | (int(x) << int(p) & mask)


def rounded(function, name):
    """Round a function's results to a type."""
    type_ = Type.of(name)

    def near(*numbers):
        result = np.asarray(function(*numbers))
        if type_.kind == "bf":
            return (bfloat16_bits(result).astype(np.uint32) << 16).view(np.float32)
        return result.astype(type_.dtype)

    return near


def itself(x):
    return x


@pytest.mark.parametrize("name", FLOATS)
def test_floating_point(name):
    for text, function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
        each(f"{text}.rn.{name}", rounded(function, name), name, name)
    each(f"neg.{name}", np.negative, name)
    each(f"abs.{name}", np.abs, name)
    for text, least in (("min", True), ("max", False)):
        each(f"{text}.{name}", extremum(np.fmin if least else np.fmax, least), name, name)
        if name != "f64":
            each(f"{text}.NaN.{name}", extremum(np.minimum if least else np.maximum, least), name, name)
    if name in ("f32", "f64"):
        each(f"div.rn.{name}", np.divide, name, name)
        each(f"sqrt.rn.{name}", np.sqrt, name)
        each(f"rcp.rn.{name}", lambda a: 1 / a, name)
        each(f"copysign.{name}", lambda sign, size: np.copysign(size, sign), name, name)


def extremum(function, least):
    """Order -0 before +0."""

    def every(a, b):
        negative = np.signbit(a) | np.signbit(b) if least else np.signbit(a) & np.signbit(b)
        return np.where((a == 0) & (b == 0), np.where(negative, -0.0, 0.0).astype(a.dtype), function(a, b))

    return every


def exactly(a, b, c):
    """Return ``a * b + c`` as a double that rounds to fewer bits like the exact sum."""
    result = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
    flat, rows = result.ravel(), zip(a.ravel(), b.ravel(), c.ravel())
    for i, row in enumerate(rows):
        if np.isfinite(row).all():
            x, y, z = (Fraction(float(number)) for number in row)
            value = x * y + z
            near = Fraction(float(flat[i]))
            if value != near and not int(flat[i].view(np.uint64)) & 1:
                flat[i] = np.nextafter(flat[i], math.inf if value > near else -math.inf)
    return result


@pytest.mark.parametrize("name", ["f16", "bf16", "f32", "f16x2", "bf16x2", "f32x2"])
def test_fused_multiply_add(name):
    single = name.removesuffix("x2")
    each(f"fma.rn.{name}", rounded(exactly, single), name, name, name)


@pytest.mark.parametrize("name", ["f16x2", "bf16x2", "f32x2"])
def test_packed(name):
    single = name.removesuffix("x2")
    for text, function in (("add", np.add), ("mul", np.multiply), ("sub", np.subtract)):
        each(f"{text}.rn.{name}", rounded(function, single), name, name)
    if single != "f32":
        each(f"neg.{name}", np.negative, name)


def test_packed_comparison():
    a, b = draw("f16x2"), draw("f16x2")
    low, high = run(
        "setp.le.f16x2 %p1|%p2, %a0, %a1; selp.b32 %o0, 1, 0, %p1; selp.b32 %o1, 1, 0, %p2;", [a, b], [np.uint32] * 2
    )
    less = Type.of("f16x2").read(a) <= Type.of("f16x2").read(b)
    assert (low == less[:, 0]).all() and (high == less[:, 1]).all()


def test_fused_multiply_add_in_double():
    """Compare with rational numbers: cancellation, overflow and underflow."""
    size = 3000
    a, b = (RNG.standard_normal(size) * 2.0 ** RNG.integers(-40, 40, size) for _ in range(2))
    near = -a * b * (1 + RNG.integers(-3, 3, size) * 2.0**-52)
    c = np.where(RNG.random(size) < 0.5, near, RNG.standard_normal(size))
    a[:500] *= 2.0**480
    b[:500] *= 2.0**480
    a[500:1000] *= 2.0**-520
    b[500:1000] *= 2.0**-520
    with np.errstate(all="ignore"):
        got = fma(a, b, c, Type.of("f64"))
    for x, y, z, result in zip(a, b, c, got):
        value = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        try:
            assert result == value.numerator / value.denominator
        except OverflowError:
            assert math.isinf(result)


def test_a_sum_rounded_once():
    """In double precision the sum is halfway between two singles, except for a bit far below."""
    x = np.float32([1 + 2.0**-12])
    assert fma(x, x, np.float32([2.0**-60]), Type.of("f32")) == np.float32(1 + 2.0**-11 + 2.0**-23)
    assert fma(x, x, np.float32([-(2.0**-60)]), Type.of("f32")) == np.float32(1 + 2.0**-11)


@pytest.mark.parametrize("name", [*INTEGERS, *FLOATS])
def test_comparisons(name):
    type_ = Type.of(name)
    a, b = draw(name), draw(name)
    b[::5] = a[::5]
    x, y = type_.read(a), type_.read(b)
    unordered = np.isnan(x) | np.isnan(y) if type_.floating else np.zeros(THREADS, bool)
    for text, function in (
        ("eq", np.equal), ("ne", np.not_equal), ("lt", np.less), ("le", np.less_equal), ("gt", np.greater),
        ("ge", np.greater_equal),
    ):  # fmt: skip
        variants = [(text, function(x, y) & ~unordered)]
        if type_.floating:
            variants.append((f"{text}u", function(x, y) | unordered))
        for variant, want in variants:
            (got,) = run(f"setp.{variant}.{name} %p1, %a0, %a1; selp.b32 %o0, 1, 0, %p1;", [a, b], [np.uint32])
            assert (got == want).all(), variant
    if type_.floating:
        for variant, want in (("num", ~unordered), ("nan", unordered)):
            (got,) = run(f"setp.{variant}.{name} %p1, %a0, %a1; selp.b32 %o0, 1, 0, %p1;", [a, b], [np.uint32])
            assert (got == want).all()
    first, second = run(
        f"setp.lt.{name} %p3, %a1, %a0; setp.lt.and.{name} %p1|%p2, %a0, %a1, !%p3;"
        "selp.b32 %o0, 1, 0, %p1; selp.b32 %o1, 1, 0, %p2;",
        [a, b], [np.uint32] * 2,
    )  # fmt: skip
    less = (x < y) & ~unordered
    assert (first == less).all() and (second == (~less & ~(y < x))).all()


WIDENING = [("f16", "f32"), ("bf16", "f32"), ("f16", "f64"), ("f32", "f64")]
ROUNDING = [("f32", "f16"), ("f32", "bf16"), ("f64", "f32"), ("f64", "f16")]


def test_conversions_between_numbers():
    for source, target in WIDENING:
        each(f"cvt.{target}.{source}", rounded(itself, target), source, result=target)
    for source, target in [*ROUNDING, *((i, f) for i in INTEGERS[2:] for f in ("f32", "f64", "f16"))]:
        each(f"cvt.rn.{target}.{source}", rounded(itself, target), source, result=target)
    each("cvt.s64.s32", lambda a: a.astype(np.int64), "s32", result="s64")
    each("cvt.u64.u32", lambda a: a.astype(np.uint64), "u32", result="u64")
    each("cvt.u32.u64", lambda a: a.astype(np.uint32), "u64", result="u32")
    each("cvt.s16.s8", lambda a: a.astype(np.int8).astype(np.int16), "s16", result="s16")
    each("cvt.u32.u16", lambda a: a.astype(np.uint32), "u16", result="u32")
    each("cvt.sat.s16.s32", lambda a: np.clip(a, -(2**15), 2**15 - 1).astype(np.int16), "s32", result="s16")


MODES = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@pytest.mark.parametrize("source", ["f32", "f64"])
@pytest.mark.parametrize("mode", MODES)
def test_conversions_to_whole_numbers(source, mode):
    each(f"cvt.{mode}.{source}.{source}", MODES[mode], source)
    for target in ("s32", "u32", "s64", "u64"):
        limits = np.iinfo(Type.of(target).dtype)
        of_nan = 0 if (source, limits.bits) == ("f32", 32) else limits.min or 1 << (limits.bits - 1)

        def whole(a, limits=limits, of_nan=of_nan):
            clamped = np.clip(np.nan_to_num(MODES[mode](a.astype(np.float64))), -1e30, 1e30).tolist()
            numbers = [min(max(int(x), limits.min), limits.max) for x in clamped]
            return np.where(np.isnan(a), np.array(of_nan, limits.dtype), np.array(numbers, limits.dtype))

        each(f"cvt.{mode}.{target}.{source}", whole, source, result=target)


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_two_halves_at_once(name):
    def both(upper, lower):
        return np.stack([rounded(itself, name)(lower), rounded(itself, name)(upper)], axis=1)

    each(f"cvt.rn.{name}x2.f32", both, "f32", "f32", result=f"{name}x2")


def test_flushing():
    a = np.array([1e-39, -1e-39, 1.0, 2.0**-126] * 256, np.float32)
    b = np.array([1.0, 1.0, 2.0**-127, 0.75] * 256, np.float32)
    (got,) = run("mul.ftz.f32 %o0, %a0, %a1;", [a, b], [np.float32])
    assert got[:4].tolist() == [0.0, -0.0, 0.0, 0.0] and np.signbit(got[:4]).tolist() == [False, True, False, False]
    (got,) = run("mul.f32 %o0, %a0, %a1;", [a, b], [np.float32])
    assert (got == a * b).all()


@pytest.mark.parametrize(
    ("text", "function", "relative", "absolute"),
    [
        ("ex2.approx.f32", np.exp2, 2.0**-22, 0),
        ("ex2.approx.ftz.f32", np.exp2, 2.0**-22, 2.0**-126),
        ("lg2.approx.f32", np.log2, 2.0**-22, 2.0**-22),
        ("rcp.approx.f32", np.reciprocal, 2.0**-23, 0),
        ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x), 2.0**-22.4, 0),
        ("sqrt.approx.f32", np.sqrt, 2.0**-23, 0),
        ("tanh.approx.f32", np.tanh, 2.0**-11, 0),
        ("sin.approx.f32", np.sin, 0, 2.0**-20.5),
        ("cos.approx.f32", np.cos, 0, 2.0**-20.5),
    ],
)
def test_approximations(text, function, relative, absolute):
    """Errors are within the bounds and come near them; they depend on the number and on the seed only."""
    x = np.abs(RNG.standard_normal(THREADS)).astype(np.float32) * 3
    x[1::2] = x[::2]
    (got,) = run(f"{text} %o0, %a0;", [x], [np.float32])
    (again,) = run(f"{text} %o0, %a0;", [x], [np.float32])
    (other,) = run(f"{text} %o0, %a0;", [x], [np.float32], seed=1)
    exact = function(x.astype(np.float64))
    allowed = np.abs(exact) * relative + absolute
    error = np.abs(got - exact)
    assert (error <= allowed + np.abs(exact) * 2.0**-24).all()
    assert (error / allowed).max() > 0.5
    assert (got == again).all() and (got[1::2] == got[::2]).all() and (got != other).any()
    special = np.float32([math.inf, -math.inf, math.nan] * 352)[:THREADS]
    (got,) = run(f"{text} %o0, %a0;", [special], [np.float32])
    with np.errstate(all="ignore"):
        same(got.view(np.uint32), function(special.astype(np.float64)).astype(np.float32), Type.of("f32"))


def test_approximate_quotients():
    x, y = (RNG.standard_normal(THREADS).astype(np.float32) for _ in range(2))
    (got,) = run("div.full.f32 %o0, %a0, %a1;", [x, y], [np.float32])
    error = np.abs(got / (x.astype(np.float64) / y) - 1)
    assert 2.0**-24 < error.max() <= 2.0**-22 + 2.0**-24
    (got,) = run("rcp.approx.ftz.f64 %o0, %a0;", [x.astype(np.float64)], [np.float64])
    assert (got.view(np.uint64) & np.uint64(0xFFFFFFFF) == 0).all() and np.abs(got * x - 1).max() < 2.0**-19


def test_moves():
    a, b = draw("b32"), draw("b32")
    (got,) = run("mov.b64 %o0, {%a0, %a1};", [a, b], [np.uint64])
    assert (got == (a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32))).all()
    low, high = run("mov.b64 {%o0, %o1}, %a0;", [got], [np.uint32] * 2)
    assert (low == a).all() and (high == b).all()
    (high,) = run("mov.b64 {_, %o0}, %a0;", [got], [np.uint32])
    assert (high == b).all()
    (got,) = run("mov.b32 %o0, 0f3F800000;", [], [np.float32])
    assert (got == 1).all()
    (got,) = run("mov.b32 %r1, -1; cvt.s64.s32 %o0, %r1;", [], [np.int64])
    assert (got == -1).all()
    (got,) = run("mov.u32 %o0, %laneid;", [], [np.uint32])
    assert (got == np.arange(THREADS) % 32).all()


def test_guards_and_branches():
    a = draw("s32")
    x = a.view(np.int32)
    body = "mov.b32 %o0, 7; setp.lt.s32 %p1, %a0, 0; @%p1 mov.b32 %o0, %a0; @!%p1 add.s32 %o0, %o0, 1;"
    (got,) = run(body, [a], [np.int32])
    assert (got == np.where(x < 0, x, 8)).all()
    body = """and.b32 %r1, %a0, 63; mov.b32 %o0, 0;
    $again: setp.eq.s32 %p1, %r1, 0; @%p1 bra $done; add.s32 %o0, %o0, %r1; sub.s32 %r1, %r1, 1;
    bra.uni $again; $done:"""
    (got,) = run(body, [a], [np.int32])
    assert (got == (x & 63) * ((x & 63) + 1) // 2).all()


def test_exchanges_in_a_warp():
    a = draw("b32")
    rows = a.reshape(-1, 32)
    lane = np.arange(32)
    for text, by, clamp, source in (
        ("bfly", 5, 31, lane ^ 5),
        ("up", 3, 0, np.where(lane >= 3, lane - 3, lane)),
        ("down", 3, 31, np.where(lane + 3 < 32, lane + 3, lane)),
        ("idx", 9, 31, np.full(32, 9)),
        ("idx", 9, (24 << 8) | 31, lane // 8 * 8 + 1),
    ):
        (got,) = run(f"shfl.sync.{text}.b32 %o0, %a0, {by}, {clamp}, -1;", [a], [np.uint32])
        assert (got.reshape(-1, 32) == rows[:, source]).all(), text
    got, inside = run("shfl.sync.up.b32 %o0|%p1, %a0, 3, 0, -1; selp.b32 %o1, 1, 0, %p1;", [a], [np.uint32] * 2)
    assert (inside.reshape(-1, 32) == (lane >= 3)).all()
    signed = rows.view(np.int32)
    for text, want in (
        ("min.s32", signed.min(1)),
        ("max.s32", signed.max(1)),
        ("add.s32", signed.sum(1, dtype=np.int32)),
    ):
        (got,) = run(f"redux.sync.{text} %o0, %a0, 0xffffffff;", [a], [np.int32])
        assert (got.reshape(-1, 32) == want[:, None]).all()
    (got,) = run("setp.lt.s32 %p1, %a0, 0; vote.sync.ballot.b32 %o0, %p1, -1;", [a], [np.uint32])
    ballot = (signed < 0).astype(np.uint64) @ (np.uint64(1) << lane.astype(np.uint64))
    assert (got.reshape(-1, 32) == ballot[:, None]).all()
    (got,) = run("elect.sync _|%p1, -1; selp.b32 %o0, 1, 0, %p1;", [], [np.uint32])
    assert (got.reshape(-1, 32) == (lane == 0)).all()
    (got,) = run(
        "mov.b32 %o0, %a0; setp.lt.u32 %p1, %id, 512; @%p1 shfl.sync.bfly.b32 %o0, %a0, 1, 31, -1;", [a], [np.uint32]
    )
    assert (got[:512].reshape(-1, 32) == rows[:16, lane ^ 1]).all() and (got[512:] == a[512:]).all()
    with pytest.raises(PartialWarpError):
        run("setp.eq.u32 %p1, %id, 5; @%p1 shfl.sync.bfly.b32 %o0, %a0, 1, 31, -1;", [a], [np.uint32])
    with pytest.raises(UnknownInstructionError, match="mask of a warp"):
        run("shfl.sync.bfly.b32 %o0, %a0, 1, 31, 255;", [a], [np.uint32])


def test_shared_memory_and_barriers():
    a = draw("b32")
    body = """.shared .align 16 .b8 space[4096]; mov.u32 %r1, space; shl.b32 %r2, %id, 2; add.u32 %r2, %r1, %r2;
    st.shared.b32 [%r2], %a0; bar.sync 0; xor.b32 %r3, %id, 1023; shl.b32 %r3, %r3, 2; add.u32 %r3, %r1, %r3;
    ld.shared.b32 %o0, [%r3];"""
    (got,) = run(body, [a], [np.uint32])
    assert (got == a[::-1]).all()
    with pytest.raises(OutOfBoundsError, match="outside of the 4096 bytes of shared memory"):
        run(body.replace("[%r3]", "[%r3+4]"), [a], [np.uint32])


def test_reads_before_a_write_are_forgotten():
    """All threads read a slot before thread 0 has it for itself."""
    body = """.shared .align 16 .b8 space[16]; mov.u32 %r1, space; setp.eq.u32 %p1, %id, 0;
    @%p1 st.shared.b32 [%r1], %a0; bar.sync 0; ld.shared.b32 %o0, [%r1]; bar.sync 0;
    @%p1 st.shared.b32 [%r1], 5; bar.sync 0; @%p1 ld.shared.b32 %r2, [%r1]; @%p1 st.shared.b32 [%r1], 6;"""
    a = draw("b32")
    (got,) = run(body, [a], [np.uint32])
    assert (got == a[0]).all()
    with pytest.raises(RaceError, match="thread 0 writes what another thread reads"):
        run(
            body.replace("bar.sync 0;\n    @%p1 st.shared.b32 [%r1], 5;", "@%p1 st.shared.b32 [%r1], 5;"),
            [a],
            [np.uint32],
        )


def test_reads_before_a_warp_meets():
    """A warp that has exchanged what it read may overwrite it, as each thread's number has arrived by then."""
    body = """.shared .align 16 .b8 space[4096]; mov.u32 %r1, space; shl.b32 %r2, %id, 2; add.u32 %r2, %r1, %r2;
    st.shared.b32 [%r2], %a0; bar.sync 0; xor.b32 %r3, %id, 1; shl.b32 %r3, %r3, 2; add.u32 %r3, %r1, %r3;
    ld.shared.b32 %r4, [%r3]; {} st.shared.b32 [%r2], %r4; mov.b32 %o0, %r4; {}"""
    a, meet = draw("b32"), "shfl.sync.bfly.b32 %r4, %r4, 1, 31, -1;"
    (got,) = run(body.format(meet, ""), [a], [np.uint32])
    assert (got == a).all()
    with pytest.raises(RaceError, match="writes what .* reads"):
        run(body.format("", ""), [a], [np.uint32])
    with pytest.raises(RaceError, match="reads what .* writes"):  # the exchange makes no write visible
        run(body.format(meet, f"{meet} ld.shared.b32 %o0, [%r3];"), [a], [np.uint32])


def test_matrices():
    """ldmatrix and stmatrix invert each other, both plain and transposed."""
    a = RNG.integers(0, 2**32, 32, dtype=np.uint64).astype(np.uint32)
    body = """.shared .align 16 .b8 space[512]; mov.u32 %r1, space; and.b32 %r2, %id, 7; shl.b32 %r2, %r2, 4;
    add.u32 %r1, %r1, %r2; {} bar.warp.sync -1; {}"""
    for trans in ("", ".trans"):
        store = f"stmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 [%r1], {{%a0}};"
        load = f"ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%o0}}, [%r1];"
        (got,) = run(body.format(store, load), [a], [np.uint32], threads=32)
        assert (got == a).all()
    store = "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r1], {%a0};"
    (got,) = run(body.format(store, load), [a], [np.uint32], threads=32)
    matrix = a.view(np.uint16).reshape(8, 8)
    assert (got.view(np.uint16).reshape(8, 8) == matrix.T).all()


@pytest.mark.parametrize(
    ("text", "function"),
    [
        ("add.u32", np.add),
        ("min.u32", np.minimum),
        ("max.u32", np.maximum),
        ("and.b32", np.bitwise_and),
        ("or.b32", np.bitwise_or),
        ("xor.b32", np.bitwise_xor),
    ],
)
def test_atomic_operations(text, function):
    a = draw("b32")
    start = np.zeros(THREADS, np.uint32)
    start[:4] = a[:4]
    # There are four counters; every fourth thread adds to the same one.
    body = f"""bar.sync 0; and.b32 %r1, %id, 3; shl.b32 %r1, %r1, 2; cvt.u64.u32 %d1, %r1; ld.param.u64 %d2, [p1];
    add.u64 %d1, %d1, %d2; atom.global.gpu.acq_rel.{text} %r2, [%d1], %a0; mov.b32 %o0, %r2;"""
    counters = start.copy()
    run(body, [a, counters], [np.uint32])
    for i in range(4):
        assert counters[i] == function.reduce(np.r_[a[i], a[i::4]].astype(np.uint32), dtype=np.uint32)
