"""Properties of gradient shaping beyond the battery: forward copies nothing, and each mode of differentiation
agrees.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile

import custom_ops
from custom_ops.shaping.specs.surrogate import surrogate_gradient_reference

FLOATING = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
IDENTITIES = {
    "scale_gradient": lambda x: custom_ops.scale_gradient(x, 2.0),
    "scale_gradient by a tensor": lambda x: custom_ops.scale_gradient(x, torch.ones(1)),
    "reverse_gradient": custom_ops.reverse_gradient,
    "clip_gradient": lambda x: custom_ops.clip_gradient(x, -1.0, 1.0),
    "clip_gradient_norm": lambda x: custom_ops.clip_gradient_norm(x, 1.0),
    "straight_through": lambda x: custom_ops.straight_through(x, x),
}
identities = pytest.mark.parametrize("identity", IDENTITIES.values(), ids=IDENTITIES)


def of_gradient(function, grad: list[float]) -> list[float]:
    """Return what the function's backward makes of this gradient."""
    x = torch.zeros(len(grad), requires_grad=True)
    function(x).backward(torch.tensor(grad))
    return x.grad.tolist()


# ---------------------------------------------------------------- the views


@identities
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_forward_pass_allocates_nothing(identity, mode):
    x = torch.randn(1 << 18, requires_grad=True)
    with mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        y = identity(x)
    assert y.data_ptr() == x.data_ptr()
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profiled.key_averages()) < 1024


@identities
def test_compiled_there_is_nothing_left_of_it(identity):
    graphs = []

    def keep(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return graph

    from torch._dynamo.backends.common import aot_autograd

    x = torch.randn(8, requires_grad=True)
    compiled = torch.compile(lambda x: identity(x * 2), backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    compiled(x).backward(torch.full((8,), 3.0))
    expected = torch.autograd.grad(identity(x * 2), x, torch.full((8,), 3.0))[0]
    assert torch.equal(x.grad, expected)
    assert len(graphs) == 2
    assert not any("custom_ops" in target for targets in graphs for target in targets)
    assert not graphs[0] - {"aten.mul.Tensor", "aten.alias.default", "aten.ones.default", "aten.detach.default"}


@identities
def test_writing_to_the_output_in_place_raises(identity):
    x = torch.randn(8, requires_grad=True)
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        identity(x * 1).mul_(2)


@identities
def test_tangents_are_not_shared(identity):
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.ones(3), torch.ones(3))
        identity(x).mul_(2)
        primal, tangent = forward_ad.unpack_dual(x)
        assert primal.tolist() == [1, 1, 1]
        assert tangent.tolist() == [1, 1, 1]


@identities
def test_channels_last_stays(identity):
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    y = identity(x)
    assert y.stride() == x.stride()
    assert torch.autograd.grad(y, x, torch.ones_like(y))[0].stride() == x.stride()


# ---------------------------------------------------------------- scaling


def test_the_textbook_function():
    """A Function with y = x whose backward multiplies by 2 x is replaced by an op, second derivative included."""

    class MyFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

    def shaped(x):
        return custom_ops.scale_gradient(x, 2 * x)

    for function in (MyFunction.apply, shaped, lambda x: custom_ops.scale_gradient(x, 2 * x.detach())):
        x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        (gradient,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        assert gradient.tolist() == [2, 4, 6]
    for function in (MyFunction.apply, shaped):
        x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
        (gradient,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        assert torch.autograd.grad(gradient.sum(), x)[0].tolist() == [2, 2, 2]


def test_a_scale_has_a_second_derivative_only():
    x, scale = torch.ones(2, 3, requires_grad=True), torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    y = custom_ops.scale_gradient(x, scale)
    of_x, of_scale = torch.autograd.grad(y.sum(), (x, scale), create_graph=True, allow_unused=True)
    assert of_scale is None
    assert torch.autograd.grad(of_x.sum(), scale)[0].tolist() == [2, 2, 2]


@pytest.mark.parametrize("function", [custom_ops.scale_gradient, custom_ops.reverse_gradient])
def test_a_tangent_of_a_scale_alone_is_zero(function):
    x, scale = torch.randn(3), torch.randn(1)
    value, tangent = torch.func.jvp(lambda s: function(x, s), (scale,), (scale,))
    torch.testing.assert_close((value, tangent), (x, torch.zeros(3)))
    with forward_ad.dual_level():
        dual = function(x, forward_ad.make_dual(scale, scale))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, torch.zeros(3))


def test_a_wider_scale_is_rounded_once():
    x = torch.ones(1000, dtype=torch.bfloat16, requires_grad=True)
    scale, grad = torch.rand(1000), torch.randn(1000).bfloat16()
    custom_ops.scale_gradient(x, scale).backward(grad)
    assert torch.equal(x.grad, (scale * grad.float()).bfloat16())


def test_vmap_over_a_scale_of_fewer_dimensions():
    x, scale = torch.randn(4, 2, 3), torch.randn(4, 3)
    of_one = torch.func.grad(lambda x, scale: custom_ops.scale_gradient(x, scale).sum())
    assert torch.equal(torch.vmap(of_one)(x, scale), scale[:, None].expand(4, 2, 3))
    assert torch.equal(torch.vmap(of_one, (None, 0))(x[0], scale), scale[:, None].expand(4, 2, 3))


def test_modules_keep_their_scale():
    layer = custom_ops.ScaleGradient(torch.tensor([1.0, 2.0]))
    twin = copy.deepcopy(layer).double()
    assert twin.scale.dtype == torch.float64
    assert list(layer.state_dict()) == ["scale"]
    assert repr(layer) == "ScaleGradient(scale=[2])"
    assert of_gradient(layer, [1.0, 1.0]) == [1, 2]
    reverse = custom_ops.ReverseGradient()
    reverse.lambda_ = 0.5
    assert of_gradient(reverse, [1.0]) == [-0.5]


# ---------------------------------------------------------------- clipping


def test_clipping_at_its_limits():
    nan, inf = float("nan"), float("inf")
    assert of_gradient(lambda x: custom_ops.clip_gradient(x, -1, 1), [inf, -inf, 1.0, -2.0]) == [1, -1, 1, -1]
    assert of_gradient(lambda x: custom_ops.clip_gradient(x, max=0), [3.0, -3.0]) == [0, -3]
    assert of_gradient(lambda x: custom_ops.clip_gradient(x, -1, 1), [nan])[0] != 0
    assert of_gradient(lambda x: custom_ops.clip_gradient_norm(x, 1), [0.0, 0.0]) == [0, 0]
    assert of_gradient(lambda x: custom_ops.clip_gradient_norm(x, 0), [3.0, 4.0]) == [0, 0]
    assert of_gradient(lambda x: custom_ops.clip_gradient_norm(x, 0), [0.0, 0.0]) == [0, 0]
    assert of_gradient(lambda x: custom_ops.clip_gradient_norm(x, inf), [3.0, 4.0]) == [3, 4]
    assert of_gradient(lambda x: custom_ops.clip_gradient_norm(x, 5), [3.0, 4.0]) == [3, 4]


@pytest.mark.parametrize("compiled", [False, True])
def test_clipping_under_a_scaler(compiled):
    """The scale multiplies the gradient before it is clipped, so the limits have to follow it, also when it changes."""

    def loss(w, scale):
        y = custom_ops.clip_gradient(w * w, -0.5 * scale, 0.5 * scale)
        return (custom_ops.clip_gradient_norm(y, 0.75 * scale) * torch.tensor([0.25, 3.0])).sum()

    run = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
    plain = torch.ones(2, requires_grad=True)
    loss(plain, 1.0).backward()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    scales = []
    for _ in range(4):
        w = torch.ones(2, requires_grad=True)
        optimizer = torch.optim.SGD([w])
        scales.append(scaler.get_scale())
        scaler.scale(run(w, scales[-1])).backward()
        scaler.unscale_(optimizer)
        torch.testing.assert_close(w.grad, plain.grad)
        scaler.step(optimizer)
        scaler.update()
    assert scales == [1024, 2048, 4096, 8192]


@pytest.mark.parametrize("shape", [(2**22 + 5,), (2**11, 2**11 + 1)])
def test_norms_of_many_are_exact_to_the_dtype(shape):
    """Torch's own sum of 2^22 squares in float32 is 8e-5 off."""
    x, grad = torch.zeros(shape, requires_grad=True), torch.randn(shape)
    custom_ops.clip_gradient_norm(x, 1.0).backward(grad)
    torch.testing.assert_close(x.grad.double(), grad.double() / grad.double().norm(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_16_bits_are_taken_in_32(dtype):
    x = torch.zeros(1 << 16, dtype=dtype, requires_grad=True)
    custom_ops.clip_gradient_norm(x, 2.0).backward(torch.full_like(x, 512.0))  # the norm overflows or stalls in 16 bits
    assert x.grad.unique().tolist() == [2.0 / 256]


CLIPPED = {
    "clip_gradient": lambda x: custom_ops.clip_gradient(x, -1.0, 1.0),
    "clip_gradient_norm": lambda x: custom_ops.clip_gradient_norm(x, 1.0, dim=-1),
}


@pytest.mark.parametrize("name", CLIPPED)
@pytest.mark.parametrize("compiled", [False, True])
def test_second_derivatives_of_clipping_by_mode(name, compiled):
    """L = 3 sum(clip(x)^2) has the gradient 6 x, clipped to g(6 x), so forward over reverse gives dg(6 x) 6 v.

    In reverse over reverse the vector passes through the graph the other way, and the result is clipped once more.
    """
    clip = CLIPPED[name]
    x = torch.tensor([[0.05, 0.1], [0.5, 2.0], [0.0, 0.0]], dtype=torch.float64)
    v = torch.tensor([[1.0, -2.0], [1.0, 2.0], [0.01, 0.02]], dtype=torch.float64)

    def loss(x):
        return 3 * clip(x).square().sum()

    if name == "clip_gradient":
        inside = (6 * x).abs() <= 1
        gradient = (6 * x).clamp(-1, 1)
        forward_over_reverse = torch.where(inside, 6 * v, 0)
        reverse_over_reverse = forward_over_reverse.clamp(-1, 1)
    else:
        norm = (6 * x).norm(dim=-1, keepdim=True)
        direction = 6 * x / norm
        projected = v - direction * (direction * v).sum(-1, keepdim=True)
        gradient = torch.where(norm > 1, direction, 6 * x)
        forward_over_reverse = torch.where(norm > 1, projected / norm, v) * 6
        size = forward_over_reverse.norm(dim=-1, keepdim=True)
        reverse_over_reverse = forward_over_reverse / size.clamp_min(1)

    def run(function):
        return torch.compile(function, backend="aot_eager", fullgraph=True) if compiled else function

    value_tangent = run(lambda x: torch.func.jvp(loss, (x,), (v,))[1])(x)
    torch.testing.assert_close(value_tangent, (6 * x * v).sum())  # forward mode doesn't clip
    torch.testing.assert_close(run(torch.func.grad(loss))(x), gradient)
    tangent = run(lambda x: torch.func.jvp(torch.func.grad(loss), (x,), (v,))[1])(x)
    torch.testing.assert_close(tangent, forward_over_reverse)
    twice = run(torch.func.grad(lambda x: (torch.func.grad(loss)(x) * v).sum()))(x)
    torch.testing.assert_close(twice, reverse_over_reverse)


# ---------------------------------------------------------------- straight through


def test_straight_through_lets_go_of_the_values_graph():
    x, other = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    value = (x * other).round()
    y = custom_ops.straight_through(value, x)
    assert value.grad_fn not in [node for node, _ in y.grad_fn.next_functions]
    of_x, of_other = torch.autograd.grad(y.sum(), (x, other), allow_unused=True)
    assert of_x.tolist() == [1, 1, 1]
    assert of_other is None
    assert not custom_ops.straight_through(other, x.detach()).requires_grad


def test_the_tangent_of_straight_through_is_that_of_x():
    x, v = torch.tensor([0.2, 0.7]), torch.tensor([1.0, 2.0])
    assert torch.func.jvp(lambda x: custom_ops.straight_through(3 * x, x), (x,), (v,))[1].tolist() == [1, 2]
    assert torch.func.jvp(lambda x: custom_ops.straight_through(3 * x, torch.zeros(2)), (x,), (v,))[1].tolist() == [
        0,
        0,
    ]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, v)
        assert forward_ad.unpack_dual(custom_ops.straight_through(3 * dual, x)).tangent is None


# ---------------------------------------------------------------- surrogate


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("shape", ["sigmoid", "atan", "triangle", "boxcar"])
def test_spikes_and_slopes_at_special_values(shape, dtype):
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([-inf, -0.5, -0.0, 0.0, 0.5, inf, 1e4, nan], dtype=dtype, requires_grad=True)
    y = custom_ops.surrogate_gradient(x, shape, 0.5)
    assert y.tolist() == [0, 0, 1, 1, 1, 1, 1, 0]
    y.sum().backward()
    wide = x.detach().double().requires_grad_()
    surrogate_gradient_reference(wide, shape, 0.5).nan_to_num().sum().backward()
    at_width = {"sigmoid": 0.39322386648296365, "atan": 1 / torch.pi, "triangle": 0, "boxcar": 0}[shape]
    at_zero = {"sigmoid": 0.5, "atan": 2 / torch.pi, "triangle": 2, "boxcar": 1}[shape]
    far = 2 / torch.pi / (1 + 4e8) if shape == "atan" else 0
    at_nan = 0.0 if shape == "boxcar" else nan
    expected = torch.tensor([0.0, at_width, at_zero, at_zero, at_width, 0, far, at_nan])
    torch.testing.assert_close(x.grad.float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("shape", ["sigmoid", "atan", "triangle", "boxcar"])
def test_each_slope_integrates_to_one(shape):
    x = torch.linspace(-5000, 5000, 2_000_001, dtype=torch.float64, requires_grad=True)
    custom_ops.surrogate_gradient(x, shape, 2.0).sum().backward()
    assert x.grad.sum().item() * 5e-3 == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize(("shape", "smooth"), [("sigmoid", torch.sigmoid), ("atan", lambda x: x.atan() / torch.pi)])
def test_third_derivatives_are_those_of_the_smooth_step(shape, smooth):
    def third(step):
        return torch.func.jacrev(torch.func.jacfwd(torch.func.jacrev(step)))

    x = torch.tensor([-0.7, 0.3, 1.2], dtype=torch.float64)
    torch.testing.assert_close(third(lambda x: custom_ops.surrogate_gradient(x, shape))(x), third(smooth)(x))


@pytest.mark.parametrize("shape", ["sigmoid", "atan", "triangle"])
def test_second_derivatives_of_16_bits_are_rounded_once(shape):
    x = torch.linspace(-4, 4, 64).half()

    def second(dtype):
        leaf = x.to(dtype).requires_grad_()
        y = custom_ops.surrogate_gradient(leaf, shape, 0.125)
        (of_x,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
        reverse = torch.autograd.grad(of_x.sum(), leaf)[0]
        slope = torch.func.grad(lambda x: custom_ops.surrogate_gradient(x, shape, 0.125).sum())
        return reverse.double(), torch.func.jvp(slope, (x.to(dtype),), (torch.ones_like(leaf),))[1].double()

    torch.testing.assert_close(second(torch.float16), second(torch.float64), rtol=2**-10, atol=2**-24)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", FLOATING)
def test_inductors_slopes_are_the_kernels(dtype):
    def slopes(grad, x):
        return [torch.ops.custom_ops.surrogate_slope(grad, x, shape, 0.5) for shape in range(4)]

    x = torch.tensor([-torch.inf, -1e4, -1, -0.5, -0.0, 0.3, 1, torch.inf, torch.nan], dtype=dtype)
    grad = torch.full_like(x, 0.7)
    torch._dynamo.reset()
    compiled = torch.compile(slopes, fullgraph=True)(grad, x)
    torch.testing.assert_close(compiled, slopes(grad, x), equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATING)
def test_inductors_spikes_are_the_kernels(dtype):
    x = torch.tensor([-torch.inf, -1e4, -1e-7, -0.0, 0.0, 1e-7, 1, torch.inf, torch.nan] * 5, dtype=dtype)
    expected = torch.heaviside(x.nan_to_num(-1), torch.ones((), dtype=dtype))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: custom_ops.surrogate_gradient(x), fullgraph=True)(x)
    assert torch.equal(compiled, expected)
    assert torch.equal(custom_ops.surrogate_gradient(x), expected)


@pytest.mark.parametrize("n", [0, 1, 31, 1 << 18])
def test_spikes_of_any_number_and_layout(n):
    x = torch.randn(n, 3)
    for view in (x, x.T, x[::2], x[:, :1].expand(n, 3), x[:, 0]):
        y = custom_ops.surrogate_gradient(view)
        assert torch.equal(y, (view >= 0).float())
        assert y.data_ptr() != view.data_ptr() or n == 0


def test_channels_last_spikes():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    y = custom_ops.surrogate_gradient(x)
    assert y.stride() == x.stride()
    y.backward(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    assert x.grad.stride() == x.stride()


def test_raw_slopes_are_checked():
    slope, x = torch.ops.custom_ops.surrogate_slope, torch.ones(3)
    with pytest.raises(RuntimeError, match="grad: expected the shape of x"):
        slope(torch.ones(4), x, 0, 1.0)
    with pytest.raises(RuntimeError, match="grad: expected the dtype of x"):
        slope(x.double(), x, 0, 1.0)
    with pytest.raises(RuntimeError, match="SurrogateShape: expected 0 to 3, got 4"):
        slope(x, x, 4, 1.0)


SHAPING = {
    "scale_gradient": lambda x: custom_ops.scale_gradient(x, 0.5),
    "clip_gradient_norm": lambda x: custom_ops.clip_gradient_norm(x, 0.5),
    "straight_through": lambda x: custom_ops.straight_through(x.round(), x),
}


@pytest.mark.parametrize("name", SHAPING)
def test_functionalize(name):
    """On any side of any transform, and of a plain backward, it leaves the shaped derivatives as they are."""
    shape, functionalize, grad, vmap = SHAPING[name], torch.func.functionalize, torch.func.grad, torch.func.vmap
    jvp = lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1]  # noqa: E731
    x = torch.randn(3, 4, dtype=torch.float64)
    loss = lambda x: (3 * shape(2 * x)).square().sum()  # noqa: E731
    assert torch.equal(functionalize(shape)(x), shape(x))
    for transform in (grad, vmap, jvp, lambda f: vmap(grad(f)), lambda f: grad(lambda x: grad(f)(x).square().sum())):
        expected = transform(loss)(x)
        torch.testing.assert_close(functionalize(transform(loss))(x), expected)
        torch.testing.assert_close(transform(functionalize(loss))(x), expected)
    leaf = x.clone().requires_grad_()
    functionalize(loss)(leaf).backward()
    torch.testing.assert_close(leaf.grad, grad(loss)(x))

    def written(x):
        base = x.clone()
        shape(base).add_(1)
        return base

    if name != "straight_through":  # its output is a view of the values, not of x
        assert torch.equal(functionalize(written)(x), x + 1)
