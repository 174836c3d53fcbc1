"""The Triton kernels without a GPU: interpreted against the C++ kernels, and compiled ahead of time."""

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

from custom_ops.triton_kernels import activation, aot, common, margin, voxel

ops = torch.ops.custom_ops
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SPECIAL = (float("nan"), -float("nan"), float("inf"), -float("inf"), 0.0, -0.0)
# Each of the first dims is a batch: none, whole bytes, padded bytes, more than one block.
SHAPES = [((), 0), ((0,), 0), ((1,), 0), ((7,), 0), ((8,), 0), ((9,), 0), ((1025,), 0)]
SHAPES += [((3, 9), 1), ((2, 2, 2, 4), 2), ((2, 1025), 1), ((3, 0), 1), ((0, 3), 1)]

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy interprets


def draw(shape, dtype, seed=0, special=False):
    """Every second element of transposed memory; with NaN, infinities and zeros if ``special``."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(math.prod(shape), generator=generator, dtype=torch.float64).to(dtype)
    if special and len(values) > len(SPECIAL):
        values[torch.randperm(len(values), generator=generator)[: len(SPECIAL)]] = torch.tensor(SPECIAL, dtype=dtype)
    memory = torch.stack([values, values + 1], -1).view(*reversed(shape), 2)
    return memory[..., 0].permute(tuple(reversed(range(len(shape)))))


def same(got, expected):
    """Equal, NaN for NaN."""
    assert got.is_contiguous()
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def rounded(got, expected):
    """The same before rounding to 16 bits: the interpreter truncates to bfloat16, a GPU does not."""
    assert got.is_contiguous()
    ulp = 2**-7 if got.dtype == torch.bfloat16 else 0
    torch.testing.assert_close(got, expected, rtol=ulp, atol=0, equal_nan=True)


def close(got, expected):
    """Sums in another order: a few roundings of the accumulator apart, then rounded."""
    assert got.is_contiguous()
    roundings = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[got.dtype]
    torch.testing.assert_close(got, expected, rtol=roundings, atol=roundings, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_and_mask(dtype):
    for shape, batch_dims in SHAPES:
        x, grad = draw(shape, dtype, special=True), draw(shape, dtype, seed=1)
        y, mask = activation.relu_forward(x, batch_dims)
        expected, expected_mask = ops.relu_forward.default(x, batch_dims)
        same(y, expected)
        same(mask, expected_mask)
        same(activation.apply_mask(grad, mask), ops.apply_mask.default(grad, mask))


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_keeps_nan_and_no_zero(dtype):
    y, mask = activation.relu_forward(torch.tensor(SPECIAL, dtype=dtype), 0)
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
    """Triton passes a plain float in single precision."""
    x = torch.zeros(1, dtype=torch.float64)
    assert margin.margin_ranking(x, x, x, 0.1, 1, False, 0)[0].item() == 0.1


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_voxel_bounds(dtype):
    for points in (0, 1, 2, 1024, 1025, 2600):
        ranks = torch.randint(-3, 40, (points,), generator=torch.Generator().manual_seed(points)).to(dtype)
        in_order, strided = ranks.sort().values, torch.stack([ranks, ranks], 1).sort(0).values[:, 0]
        for case, check in ((in_order, True), (strided, True), (ranks, False)):
            for got, want in zip(voxel.voxel_bounds(case, check), ops.voxel_bounds.default(case, check), strict=True):
                same(got, want)


def test_voxel_bounds_of_unsorted_ranks():
    ranks = torch.zeros(1025, dtype=torch.int64)
    ranks[1024] = -1  # descends from one block to the next
    with pytest.raises(RuntimeError, match="ranks: expected non-decreasing values, ") as interpreted:
        voxel.voxel_bounds(ranks, True)
    with pytest.raises(RuntimeError) as compiled:
        ops.voxel_bounds.default(ranks, True)
    assert str(interpreted.value) in str(compiled.value)


CHUNK = voxel._CHUNK
INDPTRS = {
    "skewed, empty, uncovered": ([2, 2, 3, 3, 3, 9, 9 + 3 * CHUNK, 9 + 3 * CHUNK, 20 + 3 * CHUNK], 4 * CHUNK + 5),
    "one long": ([0, 3 * CHUNK + 7], 3 * CHUNK + 7),
    "long ones meet": ([0, CHUNK + 1, 2 * CHUNK + 3, 3 * CHUNK + 4], 3 * CHUNK + 4),
    "aligned to chunks": ([0, CHUNK, 3 * CHUNK, 5 * CHUNK], 5 * CHUNK),
    "all empty": ([3, 3, 3], 5),
    "no segment": ([2], 4),
    "no point": ([0, 0], 0),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", INDPTRS)
def test_segments(name, dtype):
    bounds, points = INDPTRS[name]
    indptr = torch.tensor(bounds)
    for shape in ((points, 3), (2, points, 1), (points, 0), (0, points, 2), (points, voxel._WIDTHS[-1] + 1)):
        if dtype != torch.float32 and shape[-1] > 3:
            continue
        x = draw(shape, dtype)
        sums = ops.segment_sum.default(x, indptr)
        close(voxel.segment_sum(x, indptr), sums)
        same(voxel.segment_gather(sums.mT.contiguous().mT, indptr, points), ops.segment_gather(sums, indptr, points))


def test_segments_are_deterministic():
    bounds, points = INDPTRS["skewed, empty, uncovered"]
    x, indptr = draw((points, 3), torch.float32), torch.tensor(bounds)
    assert torch.equal(voxel.segment_sum(x, indptr), voxel.segment_sum(x, indptr))


def test_no_segment_reaches_another():
    x = torch.ones(4 * CHUNK, 1)
    x[CHUNK : 2 * CHUNK + 5] = float("nan")
    indptr = torch.tensor([0, CHUNK, 2 * CHUNK + 5, 4 * CHUNK])
    assert voxel.segment_sum(x, indptr).isnan().flatten().tolist() == [False, True, False]


@pytest.mark.parametrize("bounds", [[-1000, 50], [10**12, -(10**12)], [0, 10**12], [5, 3, 1, 7], [900, 0, 900]])
def test_corrupted_boundaries_reach_no_other_memory(bounds):
    """The interpreter reads real memory: what lies around x must show nowhere."""
    points = 2 * CHUNK
    around = torch.full((3 * points, 2), float("nan"))
    x = around[points : 2 * points]
    x[:] = 1
    sums = voxel.segment_sum(x, torch.tensor(bounds))
    long = (torch.tensor(bounds).diff() > CHUNK)[:, None]  # their partial sums may be missing
    assert not (sums.isnan() & ~long).any()
    rows = voxel.segment_gather(torch.ones(len(bounds) - 1, 2), torch.tensor(bounds), points)
    assert ((rows == 0) | (rows == 1)).all()


def test_raw_checks():
    x, mask = torch.ones(9), torch.zeros(2, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="mask: expected 2 bytes for each of 1 examples"):
        activation.apply_mask(x, mask[:1])
    with pytest.raises(RuntimeError, match="mask: expected 2 bytes"):
        margin.margin_ranking_backward(x, None, None, x, mask[:1], 1, False)
    with pytest.raises(RuntimeError, match="grad: expected the shape"):
        margin.margin_ranking_backward(x[:1], None, None, x, mask, 1, False)
    with pytest.raises(RuntimeError, match="input1, input2: expected both or neither"):
        margin.margin_ranking_backward(x, x, None, x, mask, 1, False)
    with pytest.raises(RuntimeError, match="input1, input2, target: expected the same"):
        margin.margin_ranking(x, x[:1], x, 0.0, 1, False, 0)
    with pytest.raises(RuntimeError, match="indptr: expected a 1-d int64"):
        voxel.segment_sum(x[:, None], torch.tensor([0, 9], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="sums: expected 1 segments, got 9"):
        voxel.segment_gather(x[:, None], torch.tensor([0, 9]), 9)


# ---------------------------------------------------------------- ahead of time


def run_compiling(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def test_every_kernel_compiles_without_spills():
    run = run_compiling("-m", "custom_ops.triton_kernels.aot")
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    compiled = set(re.findall(r"^(\w+)\s+(\w+)\[(\w+)\]", run.stdout, re.MULTILINE))
    expected = {(target, k.name, dtype) for target in aot.TARGETS for k in aot.kernels() for dtype in k.dtypes}
    assert compiled == expected


def test_the_kink_is_not_fused():
    script = """
import subprocess, tempfile, triton
from custom_ops.triton_kernels import aot, margin
kernel = margin.margin_ranking_kernel
for dtype, _, source in aot.sources(kernel):
    if dtype in ("fp32", "fp64"):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(triton.compile(source, target=aot.TARGETS["sm_90"], options=dict(kernel.options)).asm["cubin"])
            file.flush()
            print(subprocess.check_output([triton.knobs.nvidia.cuobjdump.path, "-sass", file.name], text=True))
"""
    run = run_compiling("-c", script)
    assert run.returncode == 0, run.stderr[-4000:]
    assert "FMUL" in run.stdout and "DMUL" in run.stdout
    assert "FFMA" not in run.stdout and "DFMA" not in run.stdout


def test_aot_refuses_the_interpreter():
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        aot.compile_all()


def test_every_jitted_function_is_declared():
    """It is a declared kernel or called by another jitted function, and only a Kernel launches."""
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
                names = (n.func for n in ast.walk(function) if isinstance(n, ast.Call))
                called |= {n.id for n in names if isinstance(n, ast.Name)}
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
 Function relu_forward_kernel:
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


def test_planted_spills_are_reported(monkeypatch, capsys):
    def verdict(resources):
        report = aot.Report("k", "fp32", "", "sm_90", resources)
        assert ("SPILLS" in str(report)) == (not report.ok)
        monkeypatch.setattr(aot, "compile_all", lambda name: [report])
        assert aot.main() == (not report.ok)
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
    with pytest.raises(KeyError):
        aot.parse_cuobjdump("the format has changed")
    assert "1 compiled, 1 with spills" in capsys.readouterr().out
