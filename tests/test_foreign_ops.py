"""A Function attaches to operators that others have defined, and operators can be defined anew."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from custom_ops import library
from custom_ops.verify import verify

# C++ registers its operators so too, by schemas and kernels for dispatch keys.
FOREIGN = torch.library.Library("custom_ops_foreign", "FRAGMENT")


def _fold(xs, bias=None, factor=1.0, *, negate=False):
    total = torch.stack(list(xs)).sum(0) * (-factor if negate else factor)
    return total if bias is None else total + bias, torch.stack(list(xs)).prod(0)


FOREIGN.define("fold(Tensor[] xs, Tensor? bias=None, float factor=1.0, *, bool negate=False) -> (Tensor, Tensor)")
FOREIGN.impl("fold", _fold, "CPU")
torch.library.register_fake(
    "custom_ops_foreign::fold", lambda xs, *_, **__: (torch.empty_like(xs[0]), torch.empty_like(xs[0])), lib=FOREIGN
)


class Fold(library.Function, op=torch.ops.custom_ops_foreign.fold):
    @staticmethod
    def setup_context(ctx, inputs, output):
        xs, _, factor, negate = inputs
        ctx.factor = -factor if negate else factor
        ctx.save_for_backward(*xs)

    @staticmethod
    def backward(ctx, of_sum, of_product):
        x, y = ctx.saved_tensors
        grads = [0 if of_sum is None else of_sum * ctx.factor] * 2
        if of_product is not None:
            grads = [grads[0] + of_product * y, grads[1] + of_product * x]
        return grads, of_sum if ctx.needs_input_grad[1] else None, None, None

    @staticmethod
    def jvp(ctx, tangents, of_bias, *_):
        x, y = ctx.saved_tensors
        dx, dy = (torch.zeros_like(x) if t is None else t for t in tangents)
        total = (dx + dy) * ctx.factor
        return total if of_bias is None else total + of_bias, dx * y + dy * x


def test_an_operator_of_cpp_with_lists_optionals_keywords_and_several_outputs():
    fold = torch.ops.custom_ops_foreign.fold
    x, y, bias = inputs = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    for call in (lambda *given: fold([*given[:2]], given[2], 2.0, negate=True), lambda x, y, _: fold([x, y])[1]):
        assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(call, inputs)
    loss = lambda x, y, b: sum(part.square().sum() for part in fold([x, y], b, 2.0, negate=True))  # noqa: E731
    eager = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), eager)
    torch.testing.assert_close(torch.func.grad(loss, (0, 1, 2))(*inputs), eager)
    assert torch.equal(Fold.apply([x, y], bias, 2.0, negate=True)[0], fold([x, y], bias, 2.0, negate=True)[0])
    assert library.function_of(fold) is library.function_of(fold.default) is Fold


def _scaled_square(of: Any) -> Any:
    """Return the operator that ``of``, such as torch.library.custom_op, makes of x * x * factor."""

    def scaled_square(x: Tensor, factor: float) -> Tensor:
        return x * x * factor

    made = of(f"custom_ops_foreign::{of.__name__}_square", mutates_args=())(scaled_square)
    made.register_fake(lambda x, factor: torch.empty_like(x))
    return made


@pytest.mark.parametrize("of", [torch.library.custom_op, torch.library.triton_op], ids=lambda of: of.__name__)
def test_an_operator_of_torch_library_passes_the_whole_battery(of):
    square = _scaled_square(of)

    class Square(library.Function, op=square):
        @staticmethod
        def setup_context(ctx, inputs, output):
            x, ctx.factor = inputs
            ctx.save_for_backward(x)

        @staticmethod
        def backward(ctx, grad):
            return 2 * ctx.factor * grad * ctx.saved_tensors[0], None

        @staticmethod
        def jvp(ctx, tangent, _):
            return 2 * ctx.factor * tangent * ctx.saved_tensors[0]

    @library.vmap(square)
    def _(info, in_dims, x, factor):
        return square(x, factor), in_dims[0]

    x = torch.tensor([0.5, -1.5, 2.0], dtype=torch.float64, requires_grad=True)
    verify(square, [(x, 2.0)], reference=lambda x, factor: x * x * factor, quick=True).raise_on_failure()
    # A float that varies isn't kept from an earlier call.
    compiled = torch.compile(lambda x, s: square(x * s, s * 0.5).sum(), backend="aot_eager", fullgraph=True)
    for s in (0.15, 0.25, 0.35):
        (grad,) = torch.autograd.grad(compiled(x, s), x)
        torch.testing.assert_close(grad, s**3 * x.detach())


def _attach(op: Any) -> Any:
    return type(library.Function)("Attached", (library.Function,), {}, op=op)


def test_operators_that_a_function_would_not_derive_are_refused():
    FOREIGN.define("double_(Tensor(a!) x, int times) -> Tensor(a!)")
    FOREIGN.define("composite(Tensor x) -> Tensor")
    FOREIGN.impl("composite", torch.sin, "CompositeImplicitAutograd")
    ops = torch.ops.custom_ops_foreign
    with pytest.raises(TypeError, match=r"double_.default writes to x.*by library.compose: .*x = x.clone\(\); torch"):
        _attach(ops.double_)
    with pytest.raises(TypeError, match="aten.view.default returns memory of an argument.*compose"):
        _attach(torch.ops.aten.view.default)
    with pytest.raises(TypeError, match='composite.default has a kernel for all devices.* "CPU"'):
        _attach(ops.composite)
    with pytest.raises(TypeError, match="expected an operator, torch.ops.aten.relu.default or torch.ops.aten.relu.out"):
        _attach(torch.ops.aten.relu)
    derived = _scaled_square(torch.library.custom_op)
    derived.register_autograd(lambda ctx, grad: (grad, None))
    with pytest.raises(TypeError, match="has a derivative already: take away its register_autograd"):
        _attach(derived)


def test_an_operator_that_turns_out_to_return_its_argument_is_refused():
    FOREIGN.define("same(Tensor x) -> Tensor")
    FOREIGN.impl("same", lambda x: x, "CPU")
    _attach(torch.ops.custom_ops_foreign.same)
    with pytest.raises(RuntimeError, match="foreign::same: expected a kernel that returns tensors of its own"):
        torch.ops.custom_ops_foreign.same(torch.ones(2))


MODULE = """
import torch
from torch import Tensor
from custom_ops import library

@library.define("custom_ops_redefined::scaled")
def scaled(x: Tensor{more}) -> Tensor:
    return torch.empty_like(x)

@library.kernel(scaled, "cpu")
def _(x, *more):
    return {factor} * x

class Scaled(library.Function, op=scaled):
    @staticmethod
    def backward(ctx, grad):
        return grad * {factor}, *[None] * (len(ctx.needs_input_grad) - 1)

    @staticmethod
    def jvp(ctx, tangent, *more):
        return tangent * {factor}

@library.vmap(scaled)
def _(info, in_dims, x, *more):
    return scaled(x, *more), in_dims[0]
"""


def test_a_module_that_defines_an_operator_can_be_reloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "redefined_operator.py"
    file.write_text(MODULE.format(factor=2, more=""))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    module: Any = importlib.import_module("redefined_operator")
    x = torch.ones(3, requires_grad=True)
    former, saved = module.scaled, module.scaled(x)
    compiled = torch.compile(lambda x: module.scaled(x).sum(), backend="aot_eager", fullgraph=True)
    assert torch.autograd.grad(compiled(x), x)[0].tolist() == [2, 2, 2]
    file.write_text(MODULE.format(factor=3.5, more=""))
    importlib.reload(module)
    for function in (compiled, lambda x: former(x).sum(), lambda x: torch.vmap(module.Scaled.apply)(x).sum()):
        assert function(x).item() == 10.5
        assert torch.autograd.grad(function(x), x)[0].tolist() == [3.5, 3.5, 3.5]
    assert torch.autograd.grad(saved.sum(), x)[0].tolist() == [2, 2, 2]
    file.write_text(MODULE.format(factor=4.25, more=", y: Tensor"))
    importlib.reload(module)
    assert torch.func.grad(lambda x: module.scaled(x, x).sum())(x.detach()).tolist() == [4.25, 4.25, 4.25]
    with pytest.raises(RuntimeError, match="missing value for argument 'y'"):
        former(x)


def test_a_cell_can_be_run_again():
    @library.compose("custom_ops_redefined::doubled")
    def doubled(x: Tensor) -> Tensor:
        return 2 * x

    def cell(slope: float) -> None:
        class Doubled(library.Function, op=doubled):
            @staticmethod
            def backward(ctx, grad):
                return slope * grad

        @library.vmap(doubled)
        def _(info, in_dims, x):
            return slope * x, in_dims[0]

    x = torch.ones(2, requires_grad=True)
    compiled = torch.compile(lambda x: doubled(x).sum(), backend="aot_eager", fullgraph=True)
    for slope in (2, 3):
        cell(slope)
        for function in (compiled, lambda x: doubled(x).sum()):
            assert torch.autograd.grad(function(x), x)[0].tolist() == [slope, slope]
        assert torch.vmap(doubled)(x.detach()).tolist() == [slope, slope]

    @library.define("custom_ops_redefined::kernels")
    def kernels(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    for factor in (2, 3):
        library.kernel(kernels, "cpu")(lambda x, factor=factor: factor * x)
        library.inductor(kernels)(lambda x, factor=factor: factor * x)
        assert kernels(torch.ones(1)).item() == factor
        assert torch.compile(kernels, backend="aot_eager")(torch.ones(1)).item() == factor


def test_a_custom_op_with_a_function_can_be_defined_again():
    def cell(factor: int) -> Any:
        @torch.library.custom_op("custom_ops_redefined::custom", mutates_args=())
        def custom(x: Tensor) -> Tensor:
            return factor * x

        class Custom(library.Function, op=custom):
            @staticmethod
            def backward(ctx, grad):
                return factor * grad

        return custom

    for factor in (2, 3):
        x = torch.ones(2, requires_grad=True)
        cell(factor)(x).sum().backward()
        assert x.grad.tolist() == [factor, factor]


def test_jvp_gets_what_was_saved_for_backward():
    @library.compose("custom_ops_foreign::squared")
    def squared(x: Tensor) -> Tensor:
        return x * x

    class Squared(library.Function, op=squared):
        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad * ctx.saved_tensors[0]

        jvp = backward

    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(squared, x, check_forward_ad=True)
    assert torch.func.hessian(lambda x: squared(x).sum())(x.detach()).diag().tolist() == [2, 2, 2]


def test_the_battery_allows_the_functional_form_of_an_op_that_writes():
    @torch.library.custom_op("custom_ops_foreign::raise_", mutates_args={"x"})
    def raise_(x: Tensor) -> None:
        x.add_(1)

    @library.compose("custom_ops_foreign::raised")
    def raised(x: Tensor) -> Tensor:
        x = x.clone()
        torch.ops.custom_ops_foreign.raise_(x)
        return x

    x = torch.ones(3, dtype=torch.float64)
    rows = ["ops functional", "inputs unmutated"]
    assert verify(raised, [(x,)], quick=True, differentiable=False, only=rows).ok
    assert not verify(lambda x: raise_(x) or x, [(x,)], quick=True, differentiable=False, only=rows).ok
