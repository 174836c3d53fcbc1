"""The bridge: what it promises to users' own ops, and the private names of torch that it leans on."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

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
    return x.clamp_min(0) + torch.log1p(torch.exp(-x.abs()))  # whose gradient at 0 would be 0 or NaN


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


def calls_seen(call):
    """How often the dispatcher is entered for an op of this file: twice by one call of it, for autograd and below."""
    with torch.autograd.profiler.profile() as profiler:
        call()
    return sum(event.count for event in profiler.key_averages() if event.key.startswith("custom_ops_test::"))


def test_a_direct_call_enters_the_dispatcher_once():
    x = torch.ones(2, requires_grad=True)
    assert (calls_seen(lambda: cube(x, 1.0)), calls_seen(lambda: library.direct(cube)(x, 1.0))) == (2, 1)
    assert calls_seen(lambda: Cube.apply(torch.nn.Parameter(x), 1.0)) == 1


@pytest.mark.parametrize("args", [(1,), (True,), (torch.tensor(2.0),), ()], ids=["int", "bool", "tensor", "default"])
def test_a_direct_call_takes_the_arguments_that_the_op_takes(args):
    x = torch.ones(2, requires_grad=True)
    expected, actual = cube(x, *args), library.direct(cube)(x, *args)
    assert torch.equal(actual, expected)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (actual, expected)))
    for wrong in ((), (None, 1.0), (x, "a"), (x, 1.0, 1.0)):
        messages = []
        for call in (cube, library.direct(cube)):
            with pytest.raises((RuntimeError, TypeError)) as error:
                call(*wrong)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


@library.compose("custom_ops_test::halved")
def halved(x: Tensor) -> Tensor:
    return x / 2


class Halved(library.Function, op=halved):
    @staticmethod
    def backward(ctx, grad):
        return grad / 2

    @staticmethod
    def jvp(ctx, tangent):
        return tangent / 2


library.autocast(halved, torch.bfloat16)


@library.vmap(halved)
def _(info, in_dims, x):
    return halved(x), in_dims[0]


class Seen(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {})), func


class Below(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {})) + (1 if func is halved else 0)


class Subclass(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return func


def in_mode(mode, call, x):
    with mode:
        return call(x)


SURROUNDINGS = {
    "autocast": lambda call, x: in_mode(torch.autocast("cpu"), call, x).dtype,
    "function mode": lambda call, x: in_mode(Seen(), call, x)[1],
    "dispatch mode": lambda call, x: in_mode(Below(), call, x).tolist(),
    "inference mode": lambda call, x: in_mode(torch.inference_mode(), call, x).is_inference(),
    "subclass": lambda call, x: call(x.as_subclass(Subclass)),
    "vmap": lambda call, x: torch.func.vmap(call)(x).tolist(),
    "grad": lambda call, x: torch.func.grad(lambda x: call(x).sum())(x).tolist(),
    "hessian of jvp": lambda call, x: torch.func.hessian(lambda x: torch.func.jvp(call, (x,), (x,))[1].sum())(
        x
    ).tolist(),
    "dual": lambda call, x: torch.func.jvp(call, (x,), (x,))[1].tolist(),
    "make_fx": lambda call, x: torch.fx.experimental.proxy_tensor.make_fx(call)(x).code,
    "pre-dispatch": lambda call, x: torch.fx.experimental.proxy_tensor.make_fx(call, pre_dispatch=True)(x).code,
    "jit trace": lambda call, x: str(torch.jit.trace(lambda x: call(x), x).inlined_graph),
    "below autograd": lambda call, x: in_mode(torch._C._AutoDispatchBelowAutograd(), call, x).requires_grad,
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_a_direct_call_is_the_op_wherever_it_is_seen(name):
    x = torch.ones(3, requires_grad=True)
    assert SURROUNDINGS[name](library.direct(halved), x) == SURROUNDINGS[name](halved, x)


def test_a_direct_call_is_the_op_where_that_was_imported_under_autocast():
    code = """
import torch
with torch.autocast("cpu"):
    import custom_ops
    from custom_ops import library
    @library.compose("custom_ops_test::tripled")
    def tripled(x: torch.Tensor) -> torch.Tensor:
        return 3 * x
    library.autocast(tripled, torch.bfloat16)
    print(library.direct(tripled)(torch.ones(2)).dtype)
print(library.direct(tripled)(torch.ones(2)).dtype)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["torch.bfloat16", "torch.float32"]


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


def test_sharding_rules_survive_a_search_for_dtensor():
    code = """
import importlib.util, custom_ops
importlib.util.find_spec("torch.distributed.tensor")
import torch.distributed.tensor
assert "torch.distributed.tensor" not in custom_ops.library._AfterImport.callbacks
"""
    subprocess.check_call([sys.executable, "-c", code])


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
    assert torch.autograd.grad(cube(x, 1.0), x)[0].item() == 12  # is what it was


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
    with pytest.raises(TypeError, match="op: expected an operator made by custom_ops.library.define, got "):
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
    with pytest.raises(TypeError, match="made by custom_ops.library.define"):
        type(library.Function)("Foreign", (library.Function,), {}, op=torch.ops.aten.relu.default)


def test_a_kernel_can_be_overridden_for_a_while():
    x = torch.tensor([2.0])
    with library.override_kernel(cube, "cpu", lambda x, factor: x):
        assert cube(x).item() == 2
    assert cube(x).item() == 8


def test_importing_stays_light():
    modules = "triton torch.distributed.tensor torch._inductor matplotlib rich numpy.testing"
    code = f"import sys, custom_ops; print([m for m in {modules.split()} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize(
    "name",
    [
        "torch._C._any_requires_grad",
        "torch._C._are_functorch_transforms_active",
        "torch._C._AutoDispatchBelowAutograd",
        "torch._C._dispatch_key_for_device",
        "torch._C._dispatch_tls_local_exclude_set",
        "torch._C._dispatch_tls_local_include_set",
        "torch._C._is_torch_function_mode_enabled",
        "torch._dynamo.callback.callback_handler._CompilationCallbackHandler__pending_callbacks_counter",
        "torch._dynamo.callback.callback_handler.end_callbacks",
        "torch._functorch.config.enable_autograd_cache",
        "torch._functorch.config.enable_remote_autograd_cache",
        "torch._functorch.utils.enable_single_level_autograd_function",
        "torch._guards.CompileContext.try_get",
        "torch._library.utils.fill_defaults",
        "torch.autograd.forward_ad._current_level",
        "torch.autograd.forward_ad._set_fwd_grad_enabled",
        "torch.autograd.Function._compiled_autograd_key",
        "torch.autograd.function.BackwardCFunction",
        "torch.autograd.function.FunctionMeta",
        "torch.autograd.function._SingleLevelFunction",
        "torch.library.Library._destroy",
    ],
)
def test_private_name_of_torch_is_still_there(name):
    import importlib

    parts = name.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:]:
            value = getattr(value, part)
        return
    raise AssertionError(name)


def test_dynamo_still_knows_functions_by_their_exact_metaclass():
    """If it began to accept subclasses of FunctionMeta, our `apply` would be bypassed under compile."""
    x = torch.tensor([2.0], requires_grad=True)
    calls = []

    class Routed(Cube):
        @staticmethod
        def apply(x):
            calls.append(1)
            return cube(x, 1.0)

    torch.compile(lambda x: Routed.apply(x), fullgraph=True, backend="eager")(x)
    assert calls
