"""A compiled program runs the current Python code on the current numbers, whatever a cache holds."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing

import custom_ops

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


FOLLOWS_A_SCHEDULE = {
    "scale_gradient": custom_ops.scale_gradient,
    "reverse_gradient": custom_ops.reverse_gradient,
    "clip_gradient": lambda x, s: custom_ops.clip_gradient(x, -s, s),
    "clip_gradient, a minimum": custom_ops.clip_gradient,
    "clip_gradient_norm": custom_ops.clip_gradient_norm,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FOLLOWS_A_SCHEDULE)
def test_a_schedule_of_numbers_is_compiled_twice(name, dtype):
    """A number compiles the program once, and once more when it turns out to vary."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def f(x, s):
        return FOLLOWS_A_SCHEDULE[name](x, s).square().sum()

    compiled = torch.compile(f, backend=counter, fullgraph=True)
    for s in torch.linspace(0.1, 1.3, 12).tolist():
        x = torch.linspace(-1, 1, 8, dtype=dtype, requires_grad=True)
        (actual,) = torch.autograd.grad(compiled(x, s), x)
        (expected,) = torch.autograd.grad(f(x, s), x)
        torch.testing.assert_close(actual, expected)
    assert counter.frame_count <= 2
