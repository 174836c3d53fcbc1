"""The Triton kernels without a GPU: interpreted and compared with the C++ kernels, and compiled ahead of time."""

import ast
import importlib
import inspect
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

import custom_ops
from custom_ops.registry import FUNCTIONS, Sample
from custom_ops.triton_kernels import (
    aot,
    common,
    dropout,
    lists,
    margin,
    pairwise,
    piecewise,
    squared,
    voxel_grid,
    voxel_segments,
)
from custom_ops.verify import backend
from custom_ops.verify import check as check_call

GPU_PAGE = Path(__file__).parent.parent / "docs" / "gpu.md"
ops = torch.ops.custom_ops
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SPECIAL = (float("nan"), -float("nan"), float("inf"), -float("inf"), 0.0, -0.0)
# The dimensions before the given number are a batch. The examples have no element, whole bytes, padded bytes, or more
# than one block.
SHAPES = [((), 0), ((0,), 0), ((1,), 0), ((7,), 0), ((8,), 0), ((9,), 0), ((1025,), 0)]
SHAPES += [((3, 9), 1), ((2, 2, 2, 4), 2), ((2, 1025), 1), ((3, 0), 1), ((0, 3), 1)]

# NumPy warns while it interprets a kernel
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def draw(shape, dtype, seed=0, special=False):
    """Draw every second element of transposed memory, with NaN, infinities and zeros if ``special``."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(math.prod(shape), generator=generator, dtype=torch.float64).to(dtype)
    if special and len(values) > len(SPECIAL):
        values[torch.randperm(len(values), generator=generator)[: len(SPECIAL)]] = torch.tensor(SPECIAL, dtype=dtype)
    memory = torch.stack([values, values + 1], -1).view(*reversed(shape), 2)
    return memory[..., 0].permute(tuple(reversed(range(len(shape)))))


def same(got, expected):
    """Check for equality, where NaN equals NaN."""
    assert got.is_contiguous()
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def rounded(got, expected):
    """Check for equality before rounding to 16 bits: the interpreter truncates to bfloat16, a GPU rounds."""
    assert got.is_contiguous()
    ulp = 2**-7 if got.dtype == torch.bfloat16 else 0
    torch.testing.assert_close(got, expected, rtol=ulp, atol=0, equal_nan=True)


def close(got, expected):
    """Check sums in another order: a few roundings of the accumulator apart, and then rounded."""
    assert got.is_contiguous()
    roundings = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[got.dtype]
    largest = max(expected[expected.isfinite()].abs().max().item() if expected.isfinite().any() else 0, 1)
    torch.testing.assert_close(got, expected, rtol=roundings, atol=roundings * largest, equal_nan=True)


# These are low, high, below, above, slope and nan_passes.
ACTIVATIONS = {
    "relu": (0.0, None, 0.0, 0.0, 0.0, True),
    "leaky_relu": (0.0, None, 0.0, 0.0, 0.3, False),
    "hardtanh": (-0.5, 0.5, -0.5, 0.5, 0.0, False),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_and_mask(dtype, name):
    for shape, batch_dims in SHAPES:
        x, grad = draw(shape, dtype, special=True), draw(shape, dtype, seed=1)
        arguments = (x, None, 1, *ACTIVATIONS[name], batch_dims)
        y, mask = piecewise.piecewise_linear(*arguments)
        expected, expected_mask = ops.piecewise_linear.default(*arguments)
        rounded(y, expected)
        same(mask, expected_mask)
        for slopes in ((1.0, 0.0), (1.0, 0.3), (2.0, 0.0)):
            rounded(piecewise.apply_mask(grad, mask, *slopes), ops.apply_mask.default(grad, mask, *slopes))


@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_of_a_channel(dtype, inner):
    x, bias = draw((2, 5, 4, 3), dtype), draw((2, 4), dtype, seed=1)
    shape = (2, 5, 4, 3) if inner == 3 else (2, 5, 3, 4)
    arguments = (x.reshape(shape), bias, inner, *ACTIVATIONS["leaky_relu"], 1)
    y, mask = piecewise.piecewise_linear(*arguments)
    expected, expected_mask = ops.piecewise_linear.default(*arguments)
    rounded(y, expected)
    same(mask, expected_mask)
    for off in (0.0, 0.3):
        masked, sums = piecewise.apply_mask_and_sum(x.reshape(shape), mask, inner, 4, off)
        expected, expected_sums = ops.apply_mask_and_sum.default(x.reshape(shape), mask, inner, 4, off)
        rounded(masked, expected)
        close(sums, expected_sums)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_dropout(dtype, p):
    for shape, batch_dims in SHAPES:
        x = draw(shape, dtype, special=True)
        seed = torch.arange(math.prod(shape[:batch_dims])).view(shape[:batch_dims]) * 0x123456789ABC - 5
        y, mask = dropout.relu_dropout_forward(x, seed, p, batch_dims)
        expected, expected_mask = ops.relu_dropout_forward.default(x, seed, p, batch_dims)
        rounded(y, expected)
        same(mask, expected_mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_squared_relu(dtype):
    for shape, _ in SHAPES:
        x, grad = draw(shape, dtype, special=True), draw(shape, dtype, seed=1)
        rounded(squared.squared_relu_forward(x), ops.squared_relu_forward.default(x))
        rounded(squared.squared_relu_backward(grad, x), ops.squared_relu_backward.default(grad, x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_keeps_nan_and_no_zero(dtype):
    y, mask = piecewise.piecewise_linear(torch.tensor(SPECIAL, dtype=dtype), None, 1, *ACTIVATIONS["relu"], 0)
    assert mask.tolist() == [0b000111]
    assert y.isnan().tolist() == [True, True, False, False, False, False]
    assert y[2:].tolist() == [float("inf"), 0, 0, 0]


@pytest.mark.parametrize(("reduce", "divisor"), [(False, 1), (True, 1), (True, 7)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_margin_ranking(dtype, reduce, divisor):
    for shape, batch_dims in SHAPES:
        x1, x2 = draw(shape, dtype, special=True), draw(shape, dtype, seed=1)
        for target in (draw(shape, dtype, seed=2), torch.ones((), dtype=dtype).expand(shape)):
            arguments = (x1, x2, target, 0.3, divisor, reduce, batch_dims)
            (loss, mask), (expected, expected_mask) = margin.margin_ranking(*arguments), ops.margin_ranking(*arguments)
            same(mask, expected_mask)
            (close if reduce else rounded)(loss, expected)
        grad = draw(loss.shape, dtype, seed=3)
        for inputs in ((x1, x2), (None, None)):
            arguments = (grad, *inputs, target, mask, divisor, reduce)
            expected = ops.margin_ranking_backward.default(*arguments)
            for got, want in zip(margin.margin_ranking_backward(*arguments), expected, strict=True):
                rounded(got, want)


def test_margin_in_double():
    """The margin is exact in float64, though Triton passes a plain float in single precision."""
    x = torch.zeros(1, dtype=torch.float64)
    assert margin.margin_ranking(x, x, x, 0.1, 1, False, 0)[0].item() == 0.1


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64])
def test_voxel_bounds(dtype):
    for points in (0, 1, 2, 1024, 1025, 2600):
        ranks = torch.randint(-3, 40, (points,), generator=torch.Generator().manual_seed(points)).to(dtype)
        in_order, strided = ranks.sort().values, torch.stack([ranks, ranks], 1).sort(0).values[:, 0]
        for case, check in ((in_order, True), (strided, True), (ranks.abs(), False), (-1 - ranks.abs(), False)):
            for got, want in zip(
                voxel_grid.voxel_bounds(case, check), ops.voxel_bounds.default(case, check), strict=True
            ):
                same(got, want)


def test_voxel_bounds_of_unsorted_ranks():
    ranks = torch.zeros(1025, dtype=torch.int64)
    ranks[1024] = -1  # the ranks descend from one block to the next
    with pytest.raises(RuntimeError, match="ranks: expected non-decreasing values, ") as interpreted:
        voxel_grid.voxel_bounds(ranks, True)
    with pytest.raises(RuntimeError) as compiled:
        ops.voxel_bounds.default(ranks, True)
    assert str(interpreted.value) in str(compiled.value)
    for wrong in (torch.tensor([3, -1, 3]), torch.tensor([0.5]), torch.tensor([2.0**24]), torch.tensor([float("nan")])):
        with pytest.raises(RuntimeError, match="ranks: expected ") as interpreted:
            voxel_grid.voxel_bounds(wrong, False)
        with pytest.raises(RuntimeError) as compiled:
            ops.voxel_bounds.default(wrong, False)
        assert str(interpreted.value) in str(compiled.value)


CHUNK = voxel_segments._CHUNK
INDPTRS = {
    "skewed, empty, uncovered": ([2, 2, 3, 3, 3, 9, 9 + 3 * CHUNK, 9 + 3 * CHUNK, 20 + 3 * CHUNK], 4 * CHUNK + 5),
    "one long": ([0, 3 * CHUNK + 7], 3 * CHUNK + 7),
    "long ones meet": ([0, CHUNK + 1, 2 * CHUNK + 3, 3 * CHUNK + 4], 3 * CHUNK + 4),
    "aligned to chunks": ([0, CHUNK, 3 * CHUNK, 5 * CHUNK], 5 * CHUNK),
    "all empty": ([3, 3, 3], 5),
    "no segment": ([2], 4),
    "no point": ([0, 0], 0),
}
IN_FULL = ("skewed, empty, uncovered", "all empty", "no segment", "no point")  # the interpreter is slow


def reduce_alike(x, weight, indptr, perm, mean, bins=1, plane=1):
    """Compare the sums with the C++ kernel's, and the adjoints for a third operand of the same kind."""
    arguments = (weight, indptr, perm, mean, bins, plane)
    sums = ops.segment_reduce.default(x, *arguments)
    close(voxel_segments.segment_reduce(x, *arguments), sums)
    transposed, points = sums.mT.contiguous().mT, x.shape[-2] * bins
    for other, of_x in ((x, True), (None, True), (x, False), (None, False)):
        arguments = (transposed, other, weight, indptr, perm, points, mean, bins, plane, of_x)
        expected = ops.segment_spread.default(*arguments)
        for got, want in zip(voxel_segments.segment_spread(*arguments), expected, strict=True):
            close(got, want)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in INDPTRS for dtype in (DTYPES if name in IN_FULL else [torch.float32])],
)
def test_segments(name, dtype):
    bounds, points = INDPTRS[name]
    indptr = torch.tensor(bounds)
    for shape in ((points, 3), (2, points, 1), (points, 0), (0, points, 2), (points, voxel_segments._WIDTHS[-1] + 1)):
        if (dtype != torch.float32 or name not in IN_FULL) and shape != (points, 3):
            continue
        x, weight = draw(shape, dtype), draw(shape[:-1], dtype, seed=1)
        perm = torch.randperm(points, generator=torch.Generator().manual_seed(0))
        for order in (None, perm):
            reduce_alike(x, None, indptr, order, mean=False)
            for largest in (True, False):
                extremes = (x, indptr, order, largest)
                for got, want in zip(
                    voxel_segments.segment_extreme(*extremes), ops.segment_extreme.default(*extremes), strict=True
                ):
                    same(got, want)
            close(voxel_segments.segment_logsumexp(x, indptr, order), ops.segment_logsumexp.default(x, indptr, order))
            close(voxel_segments.segment_prod(x, indptr, order), ops.segment_prod.default(x, indptr, order))
            if dtype == torch.float32 and shape == (points, 3) and order is not None:  # seconds in the interpreter
                scan = (x / 2, x if len(bounds) % 2 else None, indptr, order, len(bounds) % 3 == 0)
                close(voxel_segments.segment_scan(*scan), ops.segment_scan.default(*scan))
            softmax = ops.segment_softmax.default(x, indptr, order)
            for op, operands in (
                ("segment_softmax", (x,)),
                ("segment_softmax_adjoint", (x, softmax)),
                ("segment_center", (x,)),
            ):
                arguments = (*operands, indptr, order)
                close(getattr(voxel_segments, op)(*arguments), getattr(ops, op).default(*arguments))
        reduce_alike(x, weight, indptr, perm, mean=True)
        reduce_alike(x, weight, indptr, None, mean=False)


def test_segments_of_their_own_geometry_and_pooled_points():
    rank = torch.randint(-1, 9, (2, 3 * 4 * 5), generator=torch.Generator().manual_seed(0))
    perm, indptr = ops.voxel_sort.default(rank, 9)
    for weight in (draw(rank.shape, torch.float64, seed=1), None):
        reduce_alike(draw((2, 60, 3), torch.float64), weight, indptr, perm, mean=True)
        reduce_alike(draw((2, 15, 3), torch.float64), weight, indptr, perm, mean=False, bins=4, plane=5)


def test_maximum_with_nan_ties_and_infinities():
    indptr = torch.tensor([0, 4, 4, 8, 8 + 3 * CHUNK])
    x = draw((8 + 3 * CHUNK, 1), torch.float32).round()
    x[:4] = float("-inf")
    x[5:7] = float("nan")
    x[8 + 2 * CHUNK] = x[8 + CHUNK] = 9
    out, argmax = voxel_segments.segment_extreme(x, indptr, None, True)
    same(out, torch.tensor([[float("-inf")], [0], [float("nan")], [9]]))
    assert argmax.flatten().tolist() == [0, -1, 5, 8 + CHUNK]


def test_reductions_of_infinities_and_integers():
    indptr, perm = torch.tensor([0, 3, 5, 7, 7, 9]), torch.tensor([1, 0, 2, 4, 3, 6, 5, 8, 7, 9])
    inf = float("inf")
    x = torch.tensor([[-inf, -inf, -inf, -inf, 2.0, inf, 1.0, float("nan"), inf, float("nan")]]).T.contiguous()
    assert voxel_segments.segment_logsumexp(x, indptr, perm)[:4].flatten().tolist() == [-inf, 2, inf, -inf]
    for order in (None, perm):
        for op in ("segment_logsumexp", "segment_softmax", "segment_center"):
            same(getattr(voxel_segments, op)(x, indptr, order), getattr(ops, op).default(x, indptr, order))
        whole = torch.randint(-3, 3, (2, 10, 2), generator=torch.Generator().manual_seed(0))
        for largest in (True, False):
            extremes = (whole, indptr, order, largest)
            for got, want in zip(
                voxel_segments.segment_extreme(*extremes), ops.segment_extreme.default(*extremes), strict=True
            ):
                same(got, want)
        wrong = torch.tensor([0, 3, 99])
        with pytest.raises(RuntimeError, match="indptr, perm: expected valid segments"):
            voxel_segments.segment_extreme(whole, wrong, order, True)
        sums = (whole, None, indptr, order, False, 1, 1)
        same(voxel_segments.segment_reduce(*sums), ops.segment_reduce.default(*sums))
        products = (whole * 2**40, indptr, order)
        same(voxel_segments.segment_prod(*products), ops.segment_prod.default(*products))


def test_segments_are_deterministic():
    bounds, points = INDPTRS["skewed, empty, uncovered"]
    x, indptr = draw((points, 3), torch.float32), torch.tensor(bounds)
    arguments = (x, None, indptr, None, False, 1, 1)
    assert torch.equal(voxel_segments.segment_reduce(*arguments), voxel_segments.segment_reduce(*arguments))


@pytest.mark.parametrize("size", [-1, 0, 3, 40])
def test_voxels_of_points(size):
    generator = torch.Generator().manual_seed(1)
    for ranks in (-1, 1, 5, 2**40):
        for points in (0, 1, 30):
            rank = torch.randint(-1, max(ranks, 0) + 1, (points,), generator=generator)
            for given in (rank, rank.clamp_max(9).int(), torch.stack([rank, rank.flip(0)])):
                if given.dim() > 1 and size < 0:
                    continue
                slots = [("voxel_slots", (2, size, padded)) for padded in (False, True)]
                for op, limits in (("voxel_unique", (size,)), *slots):
                    if (limits[-1] is True and size < 0) or (limits[-1] is False and given.dim() > 1):
                        continue
                    results = getattr(voxel_grid, op)(given, *limits), getattr(ops, op).default(given, *limits)
                    for got, want in zip(*results, strict=True):
                        same(got, want)


def test_no_segment_reaches_another():
    x = torch.ones(4 * CHUNK, 1)
    x[CHUNK : 2 * CHUNK + 5] = float("nan")
    indptr = torch.tensor([0, CHUNK, 2 * CHUNK + 5, 4 * CHUNK])
    sums = voxel_segments.segment_reduce(x, None, indptr, None, False, 1, 1)
    assert sums.isnan().flatten().tolist() == [False, True, False]


@pytest.mark.parametrize("bounds", [[-1000, 50], [10**12, -(10**12)], [0, 10**12], [5, 3, 1, 7], [900, 0, 900]])
def test_corrupted_boundaries_reach_no_other_memory(bounds):
    """A wrong boundary gives NaN and never shows the memory around x, which the interpreter would really read."""
    points, indptr = 2 * CHUNK, torch.tensor(bounds)
    around = torch.full((3 * points, 2), 1e30)
    x = around[points : 2 * points]
    x[:] = 1
    long = (indptr.diff() > CHUNK)[:, None]  # its partial sums may be missing
    for perm in (None, torch.arange(points) * 7 - points):
        sums = voxel_segments.segment_reduce(x, None, indptr, perm, False, 1, 1)
        assert (sums.isnan() | (sums <= points) | long).all()
        _, argmax = voxel_segments.segment_extreme(x, indptr, perm, True)
        assert ((argmax >= -1) & (argmax < points)).all()
        rows, dots = voxel_segments.segment_spread(
            torch.ones(len(bounds) - 1, 2), x, None, indptr, perm, points, False, 1, 1, True
        )
        assert (rows.isnan() | (rows == 0) | (rows == 1)).all()
        assert (dots.isnan() | (dots == 0) | (dots == 2)).all()
        scan = voxel_segments.segment_scan(x, x, indptr, perm, False)
        assert (scan.isnan() | (scan.abs() <= points)).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_voxel_sort(dtype):
    for shape in ((0,), (2600,), (3, 40), (0, 5)):
        rank = torch.randint(-2, 30, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        for got, want in zip(voxel_grid.voxel_sort(rank, 30), ops.voxel_sort.default(rank, 30), strict=True):
            same(got, want)
    rank = torch.tensor([5, 0, 3])  # a rank out of range gives no boundaries, where C++ raises
    assert [t.tolist() for t in voxel_grid.voxel_sort(rank, 3)] == [[1, 0, 2], [-1, -1, -1, -1]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_voxel_index(dtype):
    frame = torch.tensor([[-1.0, -0.5, 0.25], [0.3, 0.7, 1.1]], dtype=common.accumulator(dtype))
    for truncate in (False, True):
        points = draw((2, 1025, 3), dtype, special=True)
        for frames in (frame, torch.stack([frame, frame + 0.1])):
            arguments = (points, frames, 7, 5, 2, truncate)
            same(voxel_grid.voxel_index(*arguments), ops.voxel_index.default(*arguments))
    assert voxel_grid.voxel_index(points[:0], frame, 7, 5, 2, False).shape == (0, 1025)


def test_raw_checks():
    x, mask = torch.ones(9), torch.zeros(2, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="mask: expected 2 bytes for each of 1 examples"):
        piecewise.apply_mask(x, mask[:1], 1.0, 0.0)
    for channels, inner in ((2, 1), (3, 6), (0, 1), (4, 0), (-9, -1)):
        with pytest.raises(RuntimeError, match="channels, inner: expected divisors of 9 elements"):
            piecewise.apply_mask_and_sum(x, mask, inner, channels, 0.0)
    with pytest.raises(RuntimeError, match="mask: expected 2 bytes"):
        margin.margin_ranking_backward(x, None, None, x, mask[:1], 1, False)
    with pytest.raises(RuntimeError, match="grad: expected the shape"):
        margin.margin_ranking_backward(x[:1], None, None, x, mask, 1, False)
    with pytest.raises(RuntimeError, match="input1, input2: expected both or neither"):
        margin.margin_ranking_backward(x, x, None, x, mask, 1, False)
    with pytest.raises(RuntimeError, match="input1, input2, target: expected the same"):
        margin.margin_ranking(x, x[:1], x, 0.0, 1, False, 0)
    indptr, column = torch.tensor([0, 9]), x[:, None]
    for kernels in (voxel_segments, ops):
        with pytest.raises(RuntimeError, match="indptr: expected an int64 tensor"):
            kernels.segment_reduce(column, None, indptr.int(), None, False, 1, 1)
        with pytest.raises(RuntimeError, match="indptr: expected the leading dimensions of x, or none"):
            kernels.segment_reduce(column, None, indptr.expand(2, 2), None, False, 1, 1)
        with pytest.raises(RuntimeError, match="perm: expected an int64 tensor of 9 points"):
            kernels.segment_reduce(column, None, indptr, torch.arange(8), False, 1, 1)
        with pytest.raises(RuntimeError, match="weight: expected a tensor that fits the others"):
            kernels.segment_reduce(column, x[1:], indptr, None, False, 1, 1)
        with pytest.raises(RuntimeError, match="bins, plane: expected divisors of 18 points, got 2 and 4"):
            kernels.segment_reduce(column, None, indptr, None, False, 2, 4)
        with pytest.raises(RuntimeError, match="sums: expected 1 segments, got 9"):
            kernels.segment_spread(column, None, None, indptr, None, 9, False, 1, 1, True)
        with pytest.raises(RuntimeError, match="x: expected a tensor that fits the others"):
            kernels.segment_spread(column[:1], column[1:], None, indptr, None, 9, False, 1, 1, True)
    for kernels in (voxel_grid, ops):
        with pytest.raises(RuntimeError, match=r"points: expected \[..., 3\]"):
            kernels.voxel_index(column, torch.ones(2, 3), 1, 1, 1, False)
        with pytest.raises(RuntimeError, match="frame: expected 6 numbers"):
            kernels.voxel_index(torch.ones(4, 3), torch.ones(3, 2, 3), 1, 1, 1, False)
        with pytest.raises(RuntimeError, match="csr: expected"):
            kernels.voxel_match(torch.arange(3), torch.arange(2), indptr)


# ---------------------------------------------------------------- ahead of time


def run_compiling(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def test_every_kernel_compiles_without_spills(tmp_path, full):
    """`make test` compiles one variant of each kernel for sm_90, and some for another target."""
    options = [str(tmp_path / "gpu.md"), *([] if full else ["--quick"])]
    run = run_compiling(str(GPU_PAGE.with_name("gpu_page.py")), *options)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    compiled = set(re.findall(r"^(\w+)\s+(\w+)\[(\w+)\]", run.stdout, re.MULTILINE))
    pairs = pairwise._ROWS * pairwise._COLUMNS // 128  # for each of a program's threads
    for phi, loop in re.findall(r"^sm_90 +pairwise_kernel\[fp32\] PHI=(\d).* (\d+) +[\d.]+$", run.stdout, re.MULTILINE):
        assert int(loop) <= pairs * (29 if int(phi) >= pairwise.HINGE.value else 66), phi
    expected = {(target, k.name, dtype) for target in aot.TARGETS for k in aot.kernels() for dtype in k.dtypes}
    if full:
        assert expected <= compiled
    else:
        assert {target for target, *_ in compiled} == set(aot.TARGETS)
        assert {name for target, name, _ in compiled if target == aot.MAIN} == {k.name for k in aot.kernels()}
    page, written = (path.read_text().splitlines() for path in (GPU_PAGE, tmp_path / "gpu.md"))
    if full and f"with Triton {triton.__version__}," in page[2]:  # the registers depend on the compiler
        assert written == page, "run `make docs`"


def rows_of_gpu_page():
    rows = re.findall(r"\| `(\w+)` \| (\w+) \|.*\| (\d+)% \| (\d+) \| \d+ \| (.*) \|\n", GPU_PAGE.read_text())
    assert len(rows) > 100
    return rows


def test_kernels_load_16_bytes_at_a_time_or_say_why_not():
    for kernel, dtype, _, load, why in rows_of_gpu_page():
        assert (load == "16") == (why == ""), (kernel, dtype)


def test_streaming_kernels_have_room_for_half_of_the_warps():
    for kernel, dtype, share, _, why in rows_of_gpu_page():
        assert int(share) >= 50 or why, (kernel, dtype)


# In these kernels the CPU's rounding decides on which side of a kink a value lies.
KINKED = """
import subprocess, tempfile, triton
from custom_ops._enums import SurrogateShape
from custom_ops.triton_kernels import aot, margin, preference, surrogate
hinge = preference.HINGE.value
for kernel, variant in [
    (margin.margin_ranking_kernel, False),
    (preference.preference_kernel, (hinge, False)),
    (preference.preference_slope_kernel, (hinge, 1)),
    (surrogate.surrogate_slope_kernel, int(SurrogateShape.BOXCAR)),
]:
    chosen = " ".join(f"{k}={v}" for k, v in kernel.variants[variant].items())
    for dtype, label, source in aot.sources(kernel):
        if dtype == "fp32" and label == chosen:
            asm = triton.compile(source, target=aot.TARGETS["sm_90"], options=kernel.options(dtype, 32)).asm
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(asm["cubin"])
                file.flush()
                sass = subprocess.check_output([triton.knobs.nvidia.cuobjdump.path, "-sass", file.name], text=True)
            print(f"kernel {kernel.name}", asm["ptx"], sass, sep="\\n")
"""


def test_kinks_are_where_the_cpu_has_them():
    """No multiply-add is fused before a comparison, and a compared quotient is rounded to nearest."""
    run = run_compiling("-c", KINKED)
    assert run.returncode == 0, run.stderr[-4000:]
    code = dict(part.split("\n", 1) for part in ("\n" + run.stdout).split("\nkernel ")[1:])
    assert "div.rn.f32" in code.pop("surrogate_slope_kernel")
    assert len(code) == 3
    for name, instructions in code.items():
        assert "FMUL" in instructions, name
        assert "FFMA" not in instructions, name


def test_sizes_of_one_and_of_64_bits():
    """Every kernel compiles with a size of 1, which Triton takes for a constant, and with sizes of more than 32
    bits.
    """
    script = """
from triton._C.libtriton import ir
from triton.compiler import ASTSource, make_backend
from custom_ops.triton_kernels import aot
target = aot.TARGETS["sm_90"]
backend = make_backend(target)
for kernel in aot.kernels():
    for dtype, _, source in list(aot.sources(kernel))[:: max(len(kernel.variants) - 1, 1)][:2]:
        sizes = [p for p in kernel.fn.params if source.signature[p.name] in ("i32", "i64")]
        constants = {kernel.fn.arg_names[i]: value for (i,), value in source.constants.items()}
        ones = {p.name: 1 for p in sizes if not p.do_not_specialize}
        for fixed, types in (
            ({**constants, **ones}, {**source.signature, **dict.fromkeys(ones, "constexpr")}),
            (constants, {**source.signature, **{p.name: "i64" for p in sizes}}),
        ):
            options = backend.parse_options(kernel.options(dtype, 32))
            context = ir.context()
            ir.load_dialects(context)
            backend.load_dialects(context)
            generate = ASTSource(kernel.fn, types, fixed, {}).make_ir
            generate(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    print(kernel.name)
"""
    run = run_compiling("-c", script)
    assert run.returncode == 0, run.stdout[-100:] + run.stderr[-4000:]
    assert len(run.stdout.splitlines()) == len(aot.kernels())


def test_aot_refuses_the_interpreter():
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        aot.compile_all()


def test_every_jitted_function_is_declared():
    """Every jitted function is a declared kernel or called by another jitted function, and only a Kernel launches."""
    jitted, declared, called = set(), set(), set()
    for path in Path(common.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        launches = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Subscript)]
        assert len(launches) == (path.name == "common.py"), f"{path.name}: launch through common.kernel"
        for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
            decorators = [ast.unparse(d) for d in function.decorator_list]
            if any("triton.jit" in d for d in decorators):
                jitted.add(function.name)
                declared |= {function.name} if decorators[0].startswith("kernel(") else set()
                called |= {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}  # or given to a scan
    assert declared == {k.name for k in aot.kernels()}
    assert jitted == declared | (jitted & called)
    assert not declared & called


def test_every_op_has_a_launcher():
    from custom_ops._native import OPS

    for op, family in OPS.items():
        schema = [a.name for a in op._schema.arguments]
        launcher = getattr(importlib.import_module(f"custom_ops.triton_kernels.{family}"), op._opname)
        taken = inspect.signature(launcher).parameters.values()
        named = [p.name for p in taken if p.kind is not p.VAR_POSITIONAL]
        assert named == (schema if len(named) == len(taken) else schema[: len(named)]), op


CUOBJDUMP = """
Resource usage:
 Common:
  GLOBAL:0
 Function some_kernel:
  REG:28 STACK:{stack} SHARED:1024 LOCAL:{local} CONSTANT[0]:560 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
AMDGCN = """
amdhsa.kernels:
  - .agpr_count:     0
    .group_segment_fixed_size: 512
    .private_segment_fixed_size: {private}
    .sgpr_count:     18
    .sgpr_spill_count: {sgprs}
    .vgpr_count:     38
    .vgpr_spill_count: {vgprs}
"""


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   SHFL.BFLY PT, R2, R3, 0x10, 0x1f ;
        /*0020*/                   FADD R4, R4, R5 ;
        /*0030*/              @!P0 FFMA R4, R4, R5, R6 ;
        /*0040*/               @P1 BRA 0x20 ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/               @P2 BRA 0x10 ;
        /*0070*/                   EXIT ;
        /*0080*/                   WARPSYNC.COLLECTIVE R7, 0x90 ;
        /*0090*/                   BRA 0x50 ;
"""


def test_a_loop_over_budget_is_reported():
    """The innermost loop has three instructions and waits for nothing; the one around it shuffles and has a barrier."""
    assert aot.innermost_loop(SASS) == (3, 0)
    assert aot.innermost_loop(SASS.replace("FADD R4", "SHFL.IDX R4")) == (3, 1)
    assert aot.innermost_loop("/*0000*/ EXIT ;") == (0, 0)
    for loop, waits, budget, ok in ((66, 0, 66, True), (67, 0, 66, False), (10, 1, 66, False), (999, 9, 0, True)):
        report = aot.Report(
            "k", "fp32", "", "sm_90", 4, aot.Resources(1, 0, 0, 0, loop=loop, waits=waits), budget=budget
        )
        assert report.ok == ok
        assert ("OVER BUDGET" in str(report)) == (not ok)


def test_a_launch_of_other_types_is_checked_again():
    x, y = torch.ones(3), torch.empty(3)
    for _ in range(2):
        squared.squared_relu_forward_kernel(1, x, y, 3)
    with pytest.raises(TypeError, match="squared_relu_forward_kernel: expected tensors of"):
        squared.squared_relu_forward_kernel(1, x, y.double(), 3)


def test_a_known_launch_is_not_checked_again(monkeypatch):
    x, y = torch.ones(3), torch.empty(3)
    squared.squared_relu_forward_kernel(1, x, y, 3)
    monkeypatch.setattr(common.Kernel, "_checked_dtype", None)
    squared.squared_relu_forward_kernel(1, x, y, 3)


def test_planted_spills_are_reported(monkeypatch, capsys):
    def verdict(resources, wide=False):
        report = aot.Report("k", "fp32", "", "sm_90", 4, resources, wide=wide)
        assert any(word in str(report) for word in ("SPILLS", "NARROW")) == (not report.ok)
        monkeypatch.setattr(aot, "compile_all", lambda name, quick: [report])
        assert aot.main([]) == (not report.ok)
        return report.ok

    assert aot.parse_cuobjdump(CUOBJDUMP.format(stack=0, local=0)) == aot.Resources(28, 0, 0, 1024)
    assert verdict(aot.parse_cuobjdump(CUOBJDUMP.format(stack=0, local=0)))
    assert not verdict(aot.parse_cuobjdump(CUOBJDUMP.format(stack=8, local=0)))
    assert not verdict(aot.parse_cuobjdump(CUOBJDUMP.format(stack=0, local=16)))
    assert aot.parse_amdgcn(AMDGCN.format(private=0, sgprs=0, vgprs=0)) == aot.Resources(38, 0, 0, 512)
    assert verdict(aot.parse_amdgcn(AMDGCN.format(private=0, sgprs=0, vgprs=0)))
    assert not verdict(aot.parse_amdgcn(AMDGCN.format(private=4, sgprs=0, vgprs=0)))
    assert not verdict(aot.parse_amdgcn(AMDGCN.format(private=0, sgprs=1, vgprs=0)))
    assert not verdict(aot.parse_amdgcn(AMDGCN.format(private=0, sgprs=0, vgprs=1)))
    ptx = "ld.global.b8 a; ld.global.L1::evict_last.L2::cache_hint.v4.b32 {b}; ld.shared.v4.b64 {c}; st.global.v2.b16 d"
    assert (aot.widest(ptx, "ld"), aot.widest(ptx, "st"), aot.widest("", "st")) == (16, 4, 0)
    assembly = "global_load_ushort v1\n buffer_load_dwordx4 v2\n ds_load_dwordx8 v3\n global_store_dword v4"
    assert (aot.widest_of_amd(assembly, "load"), aot.widest_of_amd(assembly, "store")) == (16, 4)
    assert verdict(aot.parse_amdgcn(AMDGCN.format(private=0, sgprs=0, vgprs=0) + assembly), wide=True)
    assert not verdict(aot.parse_amdgcn(AMDGCN.format(private=0, sgprs=0, vgprs=0)), wide=True)
    with pytest.raises(KeyError):
        aot.parse_cuobjdump("the format has changed")
    assert "1 compiled, 1 with spills" in capsys.readouterr().out


@pytest.mark.parametrize("op", ["pairwise_logistic_loss", "lambda_loss"])
def test_a_list_with_nan_counts_in_the_mean(op):
    scores = torch.tensor([[0.5, 0.25, 1.0], [0.5, math.nan, 1.0]], requires_grad=True)
    with backend("triton"):
        check_call(FUNCTIONS[op], Sample((scores, torch.tensor([[2.0, 0.0, 1.0], [2.0, 0.0, 1.0]]))))


def on_both_backends(loss):
    """Compare the loss, the gradient, and the Hessian times a vector with a NaN in the first list on both backends."""
    results = []
    for name in ("cpp", "triton"):
        scores = torch.tensor([0.3, 0.5, 0.25, 1.0, 0.2, 0.1, 0.7], dtype=torch.float64, requires_grad=True)
        labels = torch.tensor([1.0, 0.0, 1.0, 0.0, 2.0, 1.0, 0.0], dtype=torch.float64)
        with backend(name):
            value = loss(scores, labels)
            (slope,) = torch.autograd.grad(value.sum(), scores, create_graph=True)
            (product,) = torch.autograd.grad(slope, scores, torch.tensor([math.nan, 1, 1, 2, 3, 0, 1]).double())
        results.append((value, slope, product))
    assert not results[0][2][2:].isnan().any()
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12, equal_nan=True)


def test_no_list_reaches_another():
    """A NaN doesn't reach another list through running sums, or through a program that works on several lists."""
    lists = {"cu_lengths": torch.tensor([0, 2, 5, 7]), "reduction": "none"}
    on_both_backends(lambda s, y: custom_ops.neural_sort_ndcg_loss(s, y, **lists))
    lists["cu_lengths"] = torch.tensor([0, 1, 5, 7])  # a list of one item has no exponential weights
    on_both_backends(
        lambda s, y: custom_ops.list_mle_loss(s, y, ties="breslow", position_weights="exponential", **lists)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bounds", [None, [1, 3, 3, 8]])
def test_the_order_of_lists(dtype, masked, bounds):
    """Each list is sorted by descending key with NaN first, zeros tie, and masked items come last."""

    def place(key):
        return (1, -key) if key == key else (0, 0.0)

    values = torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, -math.nan, 2.5, 1e-45], dtype=dtype)
    draws = torch.Generator().manual_seed(0)
    key, then = values[torch.randint(0, len(values), (2, 40, 9), generator=draws)]
    valid = torch.rand(key.shape, generator=draws) > 0.4 if masked else torch.ones_like(key, dtype=torch.bool)
    offsets = None if bounds is None else torch.tensor(bounds)
    of_item = [0] * 9 if bounds is None else [sum(b <= i for b in bounds) for i in range(9)]
    for second in (None, then):
        with backend("triton"):
            order = lists.Lists(key, valid if masked else None, offsets).sort(key, second)
        for row, found in enumerate(order.tolist()):

            def by(i, row=row, second=second):
                tie = () if second is None else place(second[row, i].item())
                return of_item[i], not valid[row, i], place(key[row, i].item()), tie

            valid_first = [i for i in found if valid[row, i]]
            assert valid_first == sorted(valid_first, key=lambda i: (by(i), i))
            assert found == sorted(found, key=lambda i: by(i)[:2])


@pytest.mark.parametrize("loss", [custom_ops.pairwise_logistic_loss, custom_ops.pairwise_hinge_loss])
def test_an_infinite_score_has_a_slope(loss):
    scores, labels = torch.tensor([0.5, math.inf, 0.25]), torch.tensor([1.0, 2.0, 0.0])
    for name in ("cpp", "triton"):
        with backend(name):
            slope = torch.func.grad(loss)(scores, labels)
        assert slope.isfinite().all(), name
