"""A compiled program runs the Python of today and the numbers of this call, whatever a cache remembers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

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
    """A derivative, a helper of one, a body and an Inductor composition change between processes that share a cache."""
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
