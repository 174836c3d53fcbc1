"""The bridge keeps its promises to users' own ops."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import custom_ops
from custom_ops import CustomReLU, library
from custom_ops.verify import Sample, verify


@library.define("custom_ops_test::cube")
def cube(x: Tensor, factor: float = 1.0) -> Tensor:
    return torch.empty_like(x)


@library.kernel(cube, "cpu")
def _(x, factor):
    return factor * x**3


@library.define("custom_ops_test::cube_slope")
def cube_slope(x: Tensor, factor: float) -> Tensor:
    return torch.empty_like(x)


@library.kernel(cube_slope, "cpu")
def _(x, factor):
    return 3 * factor * x**2


class Cube(library.Function, op=cube):
    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.factor = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * cube_slope(*ctx.saved_tensors, ctx.factor), None

    @staticmethod
    def jvp(ctx, tangent, _):
        return tangent * cube_slope(*ctx.saved_tensors, ctx.factor)


class CubeSlope(library.Function, op=cube_slope):
    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.factor = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * 6 * ctx.factor * ctx.saved_tensors[0], None

    @staticmethod
    def jvp(ctx, tangent, _):
        return tangent * 6 * ctx.factor * ctx.saved_tensors[0]


@library.vmap(cube)
def _(info, in_dims, x, factor):
    return cube(x, factor), in_dims[0]


@library.vmap(cube_slope)
def _(info, in_dims, x, factor):
    return cube_slope(x, factor), in_dims[0]


def test_a_user_op_passes_the_whole_battery():
    x = torch.tensor([0.5, -1.5, 2.0], dtype=torch.float64, requires_grad=True)
    report = verify(cube, [(x, 2.0)], reference=lambda x, factor: factor * x * x * x, quick=True)
    report.raise_on_failure()


@library.compose("custom_ops_test::doubled", view=True)
def doubled(x: Tensor, times: float = 2.0) -> Tensor:
    return x


class Doubled(library.Function, op=doubled):
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.times = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.times, None

    @staticmethod
    def jvp(ctx, tangent, _):
        return tangent * ctx.times


@library.vmap(doubled)
def _(info, in_dims, x, times):
    return doubled(x, times), in_dims[0]


@library.compose("custom_ops_test::softplus")
def softplus(x: Tensor) -> Tensor:
    return x.clamp_min(0) + torch.log1p(torch.exp(-x.abs()))  # torch would give a gradient of 0 or NaN at 0


class Softplus(library.Function, op=softplus):
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.sigmoid(*ctx.saved_tensors)

    @staticmethod
    def jvp(ctx, tangent):
        return tangent * torch.sigmoid(*ctx.saved_tensors)


@library.vmap(softplus)
def _(info, in_dims, x):
    return softplus(x), in_dims[0]


def test_a_composed_op_passes_the_whole_battery():
    samples = [Sample((torch.tensor([0.0, -1.5, 2.0], dtype=torch.float64, requires_grad=True),), dynamic={0: 0})]
    verify(softplus, samples, reference=torch.nn.functional.softplus, quick=True).raise_on_failure()


def test_a_composed_view_costs_nothing_and_is_differentiated_all_the_same():
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            x = torch.ones(3, requires_grad=True)
            y = doubled(x)
            assert y.data_ptr() == x.data_ptr()
            assert y.requires_grad == x.view_as(x).requires_grad
    x = torch.ones(3, requires_grad=True)
    torch.library.opcheck(doubled, (x, 3.0))
    doubled(x).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones(3))
        y = doubled(dual, 5.0)
        assert torch.autograd.forward_ad.unpack_dual(y).tangent.tolist() == [5, 5, 5]
        assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_composed_view_is_transparent_to_the_compiler(backend):
    x = torch.ones(3, requires_grad=True)
    torch.compile(lambda x: (doubled(x) * x).sum(), backend=backend, fullgraph=True)(x).backward()
    assert x.grad.tolist() == [3, 3, 3]
    for written in (0, 1):

        def in_place(x, written=written):
            base = x * 1
            y = doubled(base)
            (base, y)[written].mul_(2)
            return (base + y).sum()

        torch._dynamo.reset()
        with pytest.raises(Exception, match="is a view and"):
            torch.compile(in_place, backend=backend)(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = torch.zeros(3)
            torch.compile(lambda y: doubled(y).add_(1), backend=backend)(y)
            assert y.tolist() == [1, 1, 1]


def test_an_exported_program_keeps_the_derivative_of_a_composed_op(tmp_path):
    class Model(torch.nn.Module):
        def forward(self, x):
            return doubled(2 * x)

    torch.export.save(torch.export.export(Model(), (torch.ones(3),)), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    x = torch.ones(3, requires_grad=True)
    program.module()(x).sum().backward()
    assert x.grad.tolist() == [4, 4, 4]
    assert not any("custom_ops_test" in str(node.target) for node in program.run_decompositions().graph.nodes)


def test_a_composed_view_is_of_its_first_argument():
    with pytest.raises(ValueError, match="expected a tensor first and one as result"):

        @library.compose("custom_ops_test::no_view", view=True)
        def no_view(factor: float, x: Tensor) -> Tensor:
            return x

    @library.compose("custom_ops_test::another_view", view=True)
    def another_view(x: Tensor) -> Tensor:
        return x.view_as(x)

    with pytest.raises(TypeError, match="another_view: expected the first argument back"):
        another_view(torch.ones(2))


def test_a_composed_op_without_a_function_has_no_derivative():
    @library.compose("custom_ops_test::composed_without_function")
    def composed(x: Tensor) -> Tensor:
        return x.sin()

    with pytest.raises(NotImplementedError, match="has no backward"):
        composed(torch.ones(2, requires_grad=True)).sum().backward()


def test_defaults_reach_the_function():
    x = torch.tensor([2.0], requires_grad=True)
    cube(x).backward()
    assert x.grad.item() == 12


def test_functions_are_autograd_functions_whose_apply_is_the_op():
    assert issubclass(CustomReLU, torch.autograd.Function)
    x = torch.tensor([2.0], requires_grad=True)
    assert Cube.apply(x, 1.0).grad_fn.name() == "CubeBackward"
    assert library.function_of(cube) is Cube


def test_third_derivative_of_nested_transforms():
    third = torch.func.grad(torch.func.grad(torch.func.grad(lambda x: cube(x).sum())))
    assert third(torch.tensor(2.0)).item() == 6


def test_tangents_survive_no_grad():
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.tensor(2.0), torch.tensor(1.0))
        assert torch.autograd.forward_ad.unpack_dual(cube(dual)).tangent.item() == 12


def test_an_undefined_gradient_is_no_gradient():
    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    x = torch.tensor([2.0], requires_grad=True)
    NoGradient.apply(cube(x)).backward()
    assert x.grad is None


def test_a_missing_jvp_raises_instead_of_returning_zeros():
    @library.define("custom_ops_test::no_tangent")
    def no_tangent(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    library.kernel(no_tangent, "cpu")(torch.clone)

    class NoTangent(library.Function, op=no_tangent):
        @staticmethod
        def backward(ctx, grad):
            return grad

    with pytest.raises(NotImplementedError, match="has no jvp"):
        torch.func.jvp(no_tangent, (torch.ones(2),), (torch.ones(2),))


def test_without_a_function_a_derivative_raises():
    @library.define("custom_ops_test::no_function")
    def no_function(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    library.kernel(no_function, "cpu")(torch.sin)
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(NotImplementedError, match="has no backward"):
        no_function(x).sum().backward()
    with pytest.raises(NotImplementedError, match="has no jvp"):
        torch.func.jvp(no_function, (torch.ones(2),), (torch.ones(2),))


def test_methods_may_be_inherited():
    class Doubling(library.Function):
        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    @library.define("custom_ops_test::inherits")
    def inherits(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    library.kernel(inherits, "cpu")(lambda x: 2 * x)

    class Inherits(Doubling, op=inherits):
        pass

    assert torch.func.grad(lambda x: Inherits.apply(x).sum())(torch.ones(2)).tolist() == [2, 2]


def test_compiled_autograd():
    x = torch.tensor([2.0], requires_grad=True)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        cube(x).sum().backward()
    assert x.grad.item() == 12


def test_meta_tensors_dont_mix():
    with pytest.raises(ValueError, match="expected all tensors or none on the meta device"):
        torch.ops.custom_ops.apply_mask(torch.ones(8), torch.ones(1, dtype=torch.uint8, device="meta"), 1.0, 0.0)


@pytest.mark.parametrize("batch_dims", [-2, -1, 3, 2**40])
def test_raw_ops_refuse_wrong_batch_dims(batch_dims):
    x = torch.ones(3, 4)
    with pytest.raises(RuntimeError, match="batch_dims: expected 0 to 2"):
        torch.ops.custom_ops.piecewise_linear(x, None, 1, 0.0, None, 0.0, 0.0, 0.0, True, batch_dims)
    with pytest.raises(RuntimeError, match="batch_dims: expected 0 to 2"):
        torch.ops.custom_ops.margin_ranking(x, x, x, 0.1, 3, True, batch_dims)


def test_keyword_only_arguments_are_refused():
    with pytest.raises(ValueError, match="positional arguments only, got factor"):

        @library.define("custom_ops_test::keyword_only")
        def keyword_only(x: Tensor, *, factor: float) -> Tensor:
            return torch.empty_like(x)


@pytest.mark.parametrize("name", ["scale", "::scale", "mylib::", "mylib::scale.out", "my lib::scale", None, len])
def test_a_wrong_name_is_named(name):
    for decorator in (library.define, library.compose):
        with pytest.raises(ValueError, match=r'name: expected "namespace::op", got '):
            decorator(name)


@pytest.mark.parametrize("name", ["custom_ops_test::cube", "aten::relu"])
def test_a_name_that_is_taken(name):
    for decorator in (library.define, library.compose):
        with pytest.raises(ValueError, match=f"name: expected a new one, and there is an operator {name} already"):

            @decorator(name)
            def taken(x: Tensor) -> Tensor:
                return torch.empty_like(x)

    x = torch.tensor([2.0], requires_grad=True)
    assert torch.autograd.grad(cube(x, 1.0), x)[0].item() == 12  # the op is unchanged


@pytest.mark.parametrize(
    "use",
    [
        lambda op: library.kernel(op, "cpu"),
        lambda op: library.vmap(op),
        lambda op: library.autocast(op, torch.float16),
        lambda op: library.sharding(op),
        lambda op: library.inductor(op),
        lambda op: library.override_kernel(op, "cpu", len).__enter__(),
    ],
)
@pytest.mark.parametrize("op", [torch.ops.aten.relu.default, torch.ops.aten.relu, len, [], "custom_ops_test::cube"])
def test_what_is_not_an_operator_of_ours_is_refused_at_once(use, op):
    with pytest.raises(TypeError, match="op: expected an operator made by custom_ops.library.define, or .*, got "):
        use(op)


def test_a_wrong_kernel_is_refused_at_once():
    @library.define("custom_ops_test::without_kernel")
    def without_kernel(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    for devices in ((), (len,)):
        with pytest.raises(ValueError, match='devices: expected some of "cpu", "cuda", ..., got '):
            library.kernel(without_kernel, *devices)
    for path in ("module", "module:", ":function"):
        with pytest.raises(ValueError, match='kernel: expected a function or "package.module:function", got '):
            library.kernel(without_kernel, "cpu")(path)
    with pytest.raises(TypeError, match="kernel: expected a function, got 5"):
        library.kernel(without_kernel, "cpu")(5)
    with pytest.raises(RuntimeError, match="device"):
        library.kernel(without_kernel, "gpu")(torch.neg)
    with pytest.raises(NotImplementedError, match="custom_ops_test::without_kernel"):
        without_kernel(torch.ones(2))


def test_a_fake_kernel_that_was_forgotten_is_named():
    @library.define("custom_ops_test::without_fake")
    def without_fake(x: Tensor) -> Tensor: ...

    library.kernel(without_fake, "cpu")(torch.neg)
    assert without_fake(torch.ones(1)).item() == -1
    message = "without_fake: expected empty tensors from the body of its definition, the fake kernel; got None"
    with pytest.raises(TypeError, match=message):
        without_fake(torch.ones(1, device="meta"))
    with pytest.raises(Exception, match=message):
        torch.compile(without_fake, backend="aot_eager", fullgraph=True)(torch.ones(1))


@pytest.mark.parametrize(("name", "instead"), [("forward", "kernel"), ("vmap", "vmap")])
def test_a_method_that_would_never_be_called_is_refused(name, instead):
    @library.compose(f"custom_ops_test::with_{name}")
    def op(x: Tensor) -> Tensor:
        return x * 1

    with pytest.raises(TypeError, match=rf"Wrong: expected no {name}, which is what library.{instead}\("):
        type(library.Function)("Wrong", (library.Function,), {name: staticmethod(lambda ctx, x: x)}, op=op)
    type(library.Function)("Right", (library.Function,), {}, op=op)


def test_attaching_twice_or_to_a_foreign_op_is_refused():
    with pytest.raises(TypeError, match="already has the Function Cube"):
        type(library.Function)("Again", (library.Function,), {}, op=cube)
    with pytest.raises(TypeError, match="aten.relu.default has a derivative already"):
        type(library.Function)("Foreign", (library.Function,), {}, op=torch.ops.aten.relu.default)


def test_a_kernel_can_be_overridden_for_a_while():
    x = torch.tensor([2.0])
    with library.override_kernel(cube, "cpu", lambda x, factor: x):
        assert cube(x).item() == 2
    assert cube(x).item() == 8


def test_dynamo_still_knows_functions_by_their_exact_metaclass():
    """If Dynamo accepted subclasses of FunctionMeta too, it would bypass our `apply` under compile."""
    x = torch.tensor([2.0], requires_grad=True)
    calls = []

    class Routed(Cube):
        @staticmethod
        def apply(x):
            calls.append(1)
            return cube(x, 1.0)

    torch.compile(lambda x: Routed.apply(x), fullgraph=True, backend="eager")(x)
    assert calls


@library.define("custom_ops_test::weighted_total")
def weighted_total(xs: Sequence[Tensor], weights: Sequence[float], bias: Tensor | None) -> Tensor:
    return torch.empty_like(xs[0])


@library.kernel(weighted_total, "cpu")
def _(xs, weights, bias):
    return sum((w * x for w, x in zip(weights, xs)), bias if bias is not None else torch.zeros_like(xs[0]))


class WeightedTotal(library.Function, op=weighted_total):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.weights, _ = inputs

    @staticmethod
    def backward(ctx, grad):
        needed, _, of_bias = ctx.needs_input_grad
        return [w * grad if n else None for w, n in zip(ctx.weights, needed)], None, grad if of_bias else None

    @staticmethod
    def jvp(ctx, tangents, _, of_bias):
        parts = [w * t for w, t in zip(ctx.weights, tangents) if t is not None]
        return sum(parts + ([] if of_bias is None else [of_bias.clone()]))


@library.compose("custom_ops_test::halves")
def halves(xs: Sequence[Tensor]) -> list[Tensor]:
    return [x / 2 for x in xs]


class Halves(library.Function, op=halves):
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*inputs[0])

    @staticmethod
    def backward(ctx, *grads):
        return ([None if grad is None else grad / 2 for grad in grads],)

    @staticmethod
    def jvp(ctx, tangents):
        return tuple(torch.zeros_like(x) if t is None else t / 2 for x, t in zip(ctx.saved_tensors, tangents))


LISTS = {
    "a list in": lambda x, y, z: weighted_total([x, y.sin(), torch.ones_like(x)], [2.0, 3.0, 4.0], z),
    "the same tensor twice, no bias": lambda x, y, z: weighted_total([x * y, x * y], [2.0, 3.0], None) * z,
    "lists in and out": lambda x, y, z: z * sum(a * b for a, b in zip(halves([x, y]), halves([y, x * z]))),
}


@pytest.mark.parametrize("name", LISTS)
def test_gradients_through_lists_of_tensors(name):
    f = LISTS[name]
    inputs = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, inputs)
    loss = lambda *inputs: f(*inputs).square().sum()  # noqa: E731
    eager = torch.autograd.grad(loss(*inputs), inputs)
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), eager)
    torch.testing.assert_close(torch.func.grad(loss, (0, 1, 2))(*inputs), eager)


def test_the_battery_records_calls_with_lists_of_tensors():
    """Printing a tensor in a recorded list has once left the process without gradients."""
    inputs = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    verify(LISTS["a list in"], [tuple(inputs)], quick=True, only=["ops functional"]).raise_on_failure()
    assert LISTS["a list in"](*inputs).requires_grad


def test_without_a_function_a_derivative_through_a_list_raises():
    @library.define("custom_ops_test::first_of")
    def first_of(xs: Sequence[Tensor]) -> Tensor:
        return torch.empty_like(xs[0])

    library.kernel(first_of, "cpu")(lambda xs: xs[0].clone())
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(NotImplementedError, match="first_of.* has no backward"):
        first_of([torch.ones(2), w]).sum().backward()


@pytest.mark.parametrize("returned", [lambda x: x, lambda x: x[1:], lambda x: x.view(-1)])
def test_a_kernel_that_returns_its_input_is_refused(returned):
    name = f"custom_ops_test::returned{id(returned)}"

    @library.define(name)
    def kept(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    library.kernel(kept, "cpu")(returned)
    with pytest.raises(RuntimeError, match=f"{name}: expected a kernel that returns tensors of its own"):
        kept(torch.ones(3))


def test_a_body_that_returns_its_input_is_refused():
    @library.compose("custom_ops_test::unchanged")
    def unchanged(x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, x

    with pytest.raises(RuntimeError, match="unchanged: expected a kernel that returns tensors of its own"):
        unchanged(torch.ones(3))


def test_a_view_of_an_inference_tensor_has_a_gradient():
    """Autograd doesn't see what is computed from an inference tensor, and a view of one is an inference tensor too."""
    with torch.inference_mode():
        value = torch.zeros(2, 3)
    for forward_value in value, value[0]:
        w = torch.ones(forward_value.shape, requires_grad=True)
        y = custom_ops.straight_through(forward_value, w)
        (2 * y.exp() + w).sum().backward()
        assert torch.equal(w.grad, torch.full_like(w, 3))


TRACED = {
    "bias_relu": (custom_ops.bias_relu, lambda n: (torch.randn(2, 3, n, n), torch.randn(3))),
    "margin_ranking_loss": (custom_ops.margin_ranking_loss, lambda n: (torch.randn(n), torch.randn(n), torch.ones(n))),
    "dpo_loss": (custom_ops.dpo_loss, lambda n: [torch.randn(n) for _ in range(4)]),
    "relu": (custom_ops.relu, lambda n: (torch.randn(n),)),
    "softmax_loss": (custom_ops.softmax_loss, lambda n: (torch.randn(2, n), torch.rand(2, n))),
}


@pytest.mark.parametrize("name", TRACED)
def test_what_jit_traces_holds_for_other_sizes(name):
    function, make = TRACED[name]
    try:
        traced = torch.jit.trace(function, tuple(make(4)), check_trace=False)
    except RuntimeError as error:
        if "depends on the size of a tensor, which torch.jit.trace would keep" not in str(error):
            raise
        return
    inputs = make(9)
    torch.testing.assert_close(traced(*inputs), function(*inputs))
