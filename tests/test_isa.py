"""CUSTOM_OPS_ISA: the C++ kernels give the same bits on every instruction set that they are compiled for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from benchmarks.environment import machine
from custom_ops import _native
from custom_ops.__main__ import usage
from custom_ops.registry import FUNCTIONS, REGISTRY, OpInfo
from custom_ops.verify._case import CAPABILITIES, Call, Case
from custom_ops.verify._run import run
from custom_ops.verify._values import resized

ALL = _native.isas()
NUMERIC = ("value", "gradient", "float32", "bfloat16", "float16", "second derivative", "gradgradcheck", "forward AD")


@contextmanager
def isa(name: str) -> Iterator[None]:
    _native.choose_isa(name)
    try:
        yield
    finally:
        _native.choose_isa(os.environ.get("CUSTOM_OPS_ISA", ""))


@pytest.mark.full
@pytest.mark.parametrize("op", REGISTRY)
@pytest.mark.parametrize("name", ALL[:-1])  # the battery runs on the last one
def test_the_numeric_rows_hold(name: str, op: str) -> None:
    """They follow from the battery, and from equal bits, which `make test` compares."""
    with isa(name):
        run(REGISTRY[op], "cpp", True, [CAPABILITIES[row] for row in NUMERIC], {}).raise_on_failure()


def _widened(call: Call, times: int) -> Call:
    """Return the call with the last dimension of its first input, and of matching tensors, `times` as long, and new
    values.
    """
    generator = torch.Generator().manual_seed(times)
    size = call.inputs[0].shape[-1]
    tensors = []
    for tensor in call.tensors:
        new = tensor.detach()
        if new.dim() and new.shape[-1] == size and (new.is_floating_point() or new.dtype == torch.bool):
            new = new.repeat_interleave(times, -1)
        if tensor.requires_grad:
            noise = torch.randn(new.shape, generator=generator, dtype=torch.float64)
            new = (new.double() + noise).to(new.dtype)
        tensors.append(new.requires_grad_(tensor.requires_grad))
    return call.with_tensors(tensors)


def _calls(info: OpInfo, dtype: torch.dtype) -> Iterator[Call]:
    """Yield the op's samples, then longer ones around and far beyond the length of a vector."""
    for sample in Case(info, torch.device("cpu"), quick=True).samples(dtype):
        call = Call(info.function, sample)
        yield call
        if call.sample.dynamic:
            for times in (11, 331):
                yield resized(call, times)
        if call.inputs and call.inputs[0].dim() and call.inputs[0].numel():
            for times in (3, 13, 43):
                yield _widened(call, times)


def _results(call: Call) -> list[Tensor] | str:
    """Return outputs, gradients and second gradients, or the message of an error."""
    torch.manual_seed(0)
    inputs = call.inputs
    try:
        outputs = call.with_tensors(inputs, call.input_keys).run()
    except (RuntimeError, ValueError) as error:  # some calls can't be lengthened
        return str(error)
    generator = torch.Generator().manual_seed(1)
    results = list(outputs)
    for create_graph in (True, False):
        outputs = [y for y in outputs if y.requires_grad]
        if not outputs:
            break
        weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs]
        try:
            found = torch.autograd.grad(outputs, inputs, weights, create_graph=create_graph, allow_unused=True)
        except (RuntimeError, NotImplementedError) as error:
            results.append(torch.tensor(list(str(error).encode())))
            break
        outputs = [g for g in found if g is not None]
        results += outputs
    return [y.detach() for y in results]


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether the tensors are equal bit by bit, where any NaN equals any other."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    same = (a.contiguous().view(word) == b.contiguous().view(word)) | (a.isnan() & b.isnan())
    return a.shape == b.shape and bool(same.all())


@pytest.mark.sampled(3)
@pytest.mark.skipif(len(ALL) == 1, reason="this processor has one instruction set only")
@pytest.mark.parametrize("op", FUNCTIONS)
def test_each_instruction_set_gives_the_same_bits(op: str) -> None:
    info, compared = FUNCTIONS[op], 0
    for dtype in info.dtypes:
        for call in _calls(info, dtype):
            by_isa = []
            for name in ALL:
                with isa(name):
                    by_isa.append(_results(call))
            expected = by_isa[0]
            for name, actual in zip(ALL[1:], by_isa[1:]):
                shapes = [tuple(t.shape) for t in call.tensors]
                what = f"{op} of {shapes}, {dtype}: {name} differs from {ALL[0]}"
                if isinstance(expected, str) or isinstance(actual, str):
                    assert actual == expected, what
                    continue
                compared += 1
                assert len(actual) == len(expected), what
                for i, (a, b) in enumerate(zip(actual, expected)):
                    assert _same(a, b), f"{what}, result {i}:\n{a}\n{b}"
    assert compared >= 2 * len(info.dtypes)


@pytest.mark.skipif(len(ALL) == 1, reason="this processor has one instruction set only")
@pytest.mark.parametrize(
    ("op", "n"),
    [
        *((op, 1501) for op in ("lambda_loss", "pairwise_logistic_loss", "approx_ndcg_loss", "neural_sort_ndcg_loss")),
        *((op, 70_001) for op in ("list_mle_loss", "list_net_loss", "unique_softmax_loss", "cosent_loss")),
    ],
)
@pytest.mark.parametrize("spread", [1.0, 300.0])
def test_a_long_list_gives_the_same_bits(op: str, n: int, spread: float) -> None:
    """A list that is long enough to be divided gives the same bits, for scores of a narrow and of a wide range."""
    generator = torch.Generator().manual_seed(0)
    scores = (spread * torch.randn(1, n, generator=generator)).requires_grad_()
    labels = torch.randint(0, 5, (1, n), generator=generator).float()
    results = []
    for name in ALL:
        with isa(name):
            loss = FUNCTIONS[op].function(scores, labels)
            (slope,) = torch.autograd.grad(loss.sum(), scores, create_graph=True)
            (curvature,) = torch.autograd.grad(slope.square().sum(), scores)
            results.append([loss.detach(), slope.detach(), curvature])
    for other in results[1:]:
        assert all(_same(a, b) for a, b in zip(other, results[0]))


@pytest.mark.skipif(len(ALL) == 1, reason="this processor has one instruction set only")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [31, 32, 95, 512, 1003, 40_003])
def test_a_sum_of_hinges_has_the_same_bits(dtype: torch.dtype, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    x1, x2 = (torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    y = torch.randint(0, 2, (n,), generator=generator).to(dtype) * 2 - 1
    results = []
    for name in ALL:
        with isa(name):
            results.append(torch.ops.custom_ops.margin_ranking(x1, x2, y, 0.1, 1, True, 0)[0])
    assert all(_same(other, results[0]) for other in results[1:])


def _python(value: str, code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CUSTOM_OPS_ISA": value}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_the_environment_chooses() -> None:
    code = "from custom_ops import _native; print(_native.isa())"
    assert _python("portable", code).stdout == "portable\n"


def test_the_best_is_the_default() -> None:
    with isa(""):
        assert _native.isa() == ALL[-1]


def test_an_unknown_one_is_refused() -> None:
    done = _python("avx1024", "import custom_ops")
    assert done.returncode == 1
    message = f"CUSTOM_OPS_ISA: expected {' or '.join(ALL)} on this processor, got 'avx1024'"
    assert done.stderr.rstrip().endswith(f"ImportError: custom_ops: {message}")


def test_without_python_an_op_refuses() -> None:
    """A program that loads the library without Python, as AOTInductor's do, gets the error from its first op."""
    path = str(_native._PATH)
    schema = "squared_relu_forward(Tensor x) -> Tensor"
    code = (
        f"import torch; torch.ops.load_library({path!r})\n"
        f"library = torch.library.Library('custom_ops', 'FRAGMENT'); library.define({schema!r})\n"
        "torch.ops.custom_ops.squared_relu_forward(torch.ones(3))"
    )
    done = _python("avx1024", code)
    assert done.returncode == 1
    assert "CUSTOM_OPS_ISA: expected" in done.stderr


def test_it_is_visible() -> None:
    with isa("portable"):
        assert f"C++ kernels: portable, by CUSTOM_OPS_ISA={'|'.join(ALL)}" in usage()
        assert machine()["kernels"] == "portable"
