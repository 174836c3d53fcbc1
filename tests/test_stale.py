"""A compiled program runs the current Python code on the current numbers, whatever a cache holds."""

from __future__ import annotations

import inspect
import math
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import custom_ops
from custom_ops import leaky_relu, library
from custom_ops.registry import FUNCTIONS

PROGRAM = """
import sys

import torch
from torch import Tensor

from custom_ops import library

k = float(sys.argv[1])


def helper(x):
    return k * x


def with_derivative(op, derivative):
    class Edited(library.Function, op=op):
        @staticmethod
        def backward(ctx, grad):
            return derivative(grad)


@library.compose("stale::of_backward")
def of_backward(x: Tensor) -> Tensor:
    return 2 * x


with_derivative(of_backward, lambda grad: k * grad)


@library.compose("stale::of_helper")
def of_helper(x: Tensor) -> Tensor:
    return 2 * x


with_derivative(of_helper, lambda grad: helper(grad))


@library.compose("stale::of_body")
def of_body(x: Tensor) -> Tensor:
    return k * x


with_derivative(of_body, lambda grad: 2 * grad)


@library.define("stale::of_composition")
def of_composition(x: Tensor) -> Tensor:
    return torch.empty_like(x)


library.kernel(of_composition, "cpu")(helper)
library.inductor(of_composition)(helper)
with_derivative(of_composition, lambda grad: of_composition(grad))


def f(x):
    return torch.stack([of_backward(x), of_helper(x), of_body(x), of_composition(x)])


def results(f):
    x = torch.ones(3, requires_grad=True)
    y = f(x)
    (grad,) = torch.autograd.grad(y[:, 0].sum() + 10 * y[:, 1].sum(), x)
    with torch.inference_mode():
        return y.tolist(), grad.tolist(), f(torch.ones(3)).tolist()


compiled, eager = results(torch.compile(f)), results(f)
assert compiled == eager, (compiled, eager)
"""


def test_a_compiled_program_runs_the_python_of_today(tmp_path):
    """A derivative, its helper, a body and an Inductor composition are up to date in processes that share a cache."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    for k in "2", "3":
        done = subprocess.run([sys.executable, program, k], env=os.environ | caches, capture_output=True, text=True)
        assert not done.returncode, done.stderr


def test_only_graphs_with_an_op_of_the_bridge_do_without_the_cache():
    counters = torch._dynamo.utils.counters["aot_autograd"]
    x = torch.ones(3, requires_grad=True)

    def lookups(f):
        torch._dynamo.reset()
        before = counters["autograd_cache_hit"] + counters["autograd_cache_miss"]
        torch.compile(f)(x).sum().backward()
        return counters["autograd_cache_hit"] + counters["autograd_cache_miss"] - before

    with torch._functorch.config.patch(enable_autograd_cache=True):
        assert lookups(lambda x: custom_ops.scale_gradient(x, 2.0) * 2) == 0
        assert torch._functorch.config.enable_autograd_cache
        assert lookups(lambda x: x.sin() * 2) == 1

    def failing(x):
        y = custom_ops.scale_gradient(x, 2.0)
        torch._dynamo.graph_break()
        return y

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(failing, fullgraph=True)(x)
    assert (
        torch._functorch.config.enable_autograd_cache
        == torch._functorch.config._config["enable_autograd_cache"].default
    )


SCHEDULED = {
    "leaky_relu": lambda x, s: custom_ops.leaky_relu(x * s, s * 0.5),
    "scale_gradient": lambda x, s: custom_ops.scale_gradient(x * s, s * 0.5).square(),
}


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_float_that_varies_is_that_of_this_call(name):
    f = SCHEDULED[name]
    torch._dynamo.reset()
    compiled = torch.compile(f)
    for s in 0.15, 0.25, 0.35, 0.45:
        x = torch.linspace(-1, 1, 8, requires_grad=True)
        (actual,) = torch.autograd.grad(compiled(x, s).sum(), x)
        (expected,) = torch.autograd.grad(f(x, s).sum(), x)
        torch.testing.assert_close(actual, expected)


def numbers() -> list[Any]:
    """Return each argument of a public function that may be a float, with the function's name in the registry.

    All list losses share one code for ``empty``.
    """
    return [
        pytest.param(name, parameter.name, marks=pytest.mark.full)
        if parameter.name == "empty" and name != "softmax_loss"
        else pytest.param(name, parameter.name)
        for name, info in FUNCTIONS.items()
        for parameter in inspect.signature(info.function).parameters.values()
        if re.search(r"(?<!\[)\bfloat\b", parameter.annotation)
    ]


# Compiled, these aren't bit for bit what eager mode computes: they are compositions, or keep less for backward.
ROUNDED = {"surrogate_gradient", "clip_gradient_norm", "linear_log_prob"}
COMPUTED = "Dynamo 2.10 makes a number that Python computes with a constant"
COMPUTED_WITH = {
    "info_nce_loss temperature",
    "sigmoid_contrastive_loss temperature",
    "lambda_loss log_base",
    "dpo_loss discopop_tau",
}
AT_LEAST = {"log_base": 1.0, "regularization_strength": 10.0}
# The first samples don't depend on these numbers, or draw at random.
GIVEN = {
    ("relu_dropout", "p"): {"training": True, "seed": torch.tensor(3)},
    ("lambda_loss", "mu"): {"weighting": "ndcg2pp"},
    ("clip_gradient", "min"): {"max": 2.0},
    ("clip_gradient", "max"): {"min": -2.0},
    ("dpo_loss", "discopop_tau"): {"loss_type": "discopop"},
}


def compiled_twice(f, *, dtype=torch.float32, shape=(2, 8), backend="aot_eager", exact=True, start=0.0, limit=2):
    """Check f(x, s) and its gradient for 12 values of s, and that ``torch.compile`` compiles it at most twice."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)

    def total(x, s):
        y = f(x, s)
        y = y[0] if isinstance(y, tuple) else y
        return (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)).square().sum()

    compiled = torch.compile(total, backend=counter, fullgraph=True)
    seen = set()
    for s in (start + torch.linspace(0.02, 0.48, 12)).tolist():
        x = torch.linspace(-1, 1, math.prod(shape), dtype=dtype).view(shape).requires_grad_()
        expected = total(x, s)
        (expected_grad,) = torch.autograd.grad(expected, x)
        actual = compiled(x, s)
        (actual_grad,) = torch.autograd.grad(actual, x)
        close = {"rtol": 0, "atol": 0} if exact else {}
        torch.testing.assert_close((actual, actual_grad), (expected, expected_grad), **close)
        seen.add((expected.item(), *expected_grad.flatten().tolist()))
    assert len(seen) > 1, "nothing depends on the number"
    assert counter.frame_count <= limit


def test_every_number_of_a_public_function_is_found():
    found = {case.values[0] for case in numbers()}
    assert found >= {"leaky_relu", "relu_dropout", "soft_rank", "dpo_loss", "surrogate_gradient"}


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("name", "number"), numbers())
def test_a_schedule_of_numbers_is_compiled_twice(name, number):
    """A number compiles the program once, and once more when it turns out to vary; that program is right for all."""
    if name + " " + number in COMPUTED_WITH and torch.__version__ < (2, 13):
        pytest.skip(COMPUTED)
    info = FUNCTIONS[name]
    sample = next(s for s in info.samples(torch.device("cpu"), torch.float32) if s.args[0].numel() > 2)
    names = [*inspect.signature(info.function).parameters]
    given = dict(zip(names[1:], sample.args[1:])) | sample.kwargs | GIVEN.get((name, number), {})
    given = {k: v.detach() if isinstance(v, Tensor) else v for k, v in given.items()}
    if number == "empty":
        given = {"labels": given["labels"], "mask": torch.zeros_like(sample.args[0], dtype=torch.bool)}
    compiled_twice(
        lambda x, s: info.function(x, **given | {number: s}),
        shape=sample.args[0].shape,
        exact=name not in ROUNDED,
        start=AT_LEAST.get(number, 0.0),
    )


@library.define("stale::wave")
def wave(x: Tensor, scale: float, shift: float = 0.5, more: float | None = None) -> Tensor:
    return torch.empty_like(x)


@library.kernel(wave, "cpu")
def _(x, scale, shift, more):
    return x.sin() * scale + shift + (0 if more is None else more)


@library.define("stale::wave_slope")
def wave_slope(grad: Tensor, x: Tensor, scale: float) -> Tensor:
    return torch.empty_like(x)


@library.kernel(wave_slope, "cpu")
def _(grad, x, scale):
    return grad * x.cos() * scale


class Wave(library.Function, op=wave):
    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.scale, *_ = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx, grad):
        return wave_slope(grad, *ctx.saved_tensors, ctx.scale), None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return wave_slope(tangent, *ctx.saved_tensors, scale=ctx.scale)


class WaveSlope(library.Function, op=wave_slope):
    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, x, ctx.scale = inputs
        ctx.save_for_backward(grad, x)
        ctx.save_for_forward(grad, x)

    @staticmethod
    def backward(ctx, v):
        grad, x = ctx.saved_tensors
        return wave_slope(v, x, ctx.scale), -wave(v * grad * x, ctx.scale), None

    @staticmethod
    def jvp(ctx, of_grad, of_x, _):
        grad, x = ctx.saved_tensors
        return wave_slope(of_grad, x, ctx.scale) - wave(of_x * grad * x, ctx.scale)


@library.vmap(wave)
def _(info, in_dims, x, *numbers):
    return wave(x, *numbers), in_dims[0]


@library.vmap(wave_slope)
def _(info, in_dims, grad, x, scale):
    grad, x = (library.to_front(t, dim, info.batch_size) for t, dim in zip((grad, x), in_dims))
    return wave_slope(grad, x, scale), 0


library.autocast(wave, torch.bfloat16)


@library.define("stale::weighted")
def weighted(x: Tensor, weights: list[float]) -> Tensor:
    return torch.empty_like(x)


@library.kernel(weighted, "cpu")
def _(x, weights):
    return x * weights[0] + weights[1]


@library.define("stale::limited")
def limited(x: Tensor, low: float) -> Tensor:
    return torch.empty_like(x)


@library.kernel(limited, "cpu")
def _(x, low):
    return torch.where(x > low, x, low)


@library.inductor(limited)
def _(x, low):
    return torch.where(x > low, x, library.as_tensor(low, x))


def in_autocast(x, s):
    with torch.autocast("cpu"):
        return wave(x, s).float()


func = torch.func
CALLS = {
    "positional": wave,
    "by name": lambda x, s: wave(x, scale=2 * s, more=s),
    "another": lambda x, s: wave(x, 2.0, s + 1),
    "packet": lambda x, s: torch.ops.stale.wave(x, s),
    "Function": lambda x, s: Wave.apply(x, s, 0.5, None),
    "no Function": lambda x, s: weighted(x.detach(), [s, 2 * s]) * x,
    "composition": lambda x, s: limited(x.detach(), s) * x,
    "grad": lambda x, s: func.grad(lambda x: wave(x, s).sum())(x),
    "vmap of grad": lambda x, s: func.vmap(func.grad(lambda x: wave(x, s).sum()))(x),
    "hessian": lambda x, s: func.hessian(lambda x: wave(x, s).square().sum())(x.flatten()[:4].detach()).sum() * x,
    "tangent of grad": lambda x, s: (
        func.jacfwd(func.grad(lambda x: wave(x, s).square().sum()))(x[0].detach()).sum() * x
    ),
    "autocast": in_autocast,
}


IN_TRANSFORMS = {"grad", "vmap of grad", "hessian", "tangent of grad"}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("how", CALLS)
def test_any_op_with_a_number_is_compiled_twice(how):
    if how in IN_TRANSFORMS and torch.__version__ < (2, 13):
        pytest.skip("Dynamo 2.10 makes a number within torch.func a constant, with torch's ops too")
    if how == "another" and torch.__version__ < (2, 13):
        pytest.skip(COMPUTED)
    compiled_twice(CALLS[how])


def test_a_number_stays_symbolic_under_inductor_and_from_the_first_compilation_on():
    compiled_twice(lambda x, s: wave(leaky_relu(x, s), s) + limited(x.detach(), s), backend="inductor", exact=False)


@library.define("stale::stretched")
def stretched(x: Tensor, factor: float) -> Tensor:
    return x.new_empty(int(len(x) * factor))


@library.kernel(stretched, "cpu")
def _(x, factor):
    return x.new_ones(int(len(x) * factor))


def test_a_number_that_a_shape_depends_on_is_compiled_for_each_value():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, s: stretched(x, s) * s, backend="aot_eager", fullgraph=True)
    for s in 1.0, 1.5, 2.0, 1.5:
        torch.testing.assert_close(compiled(torch.ones(4), s), stretched(torch.ones(4), s) * s)
