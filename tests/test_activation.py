"""Tests of the one-bit activations beyond the battery: their values equal torch's bit by bit, and memory is saved."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import custom_ops
from custom_ops.activation.specs.dropout import philox

FLOATING = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
PAIRS = {
    "relu": (custom_ops.relu, torch.relu),
    "leaky_relu": (lambda x: custom_ops.leaky_relu(x, 0.3), lambda x: F.leaky_relu(x, 0.3)),
    "leaky_relu, negative slope": (lambda x: custom_ops.leaky_relu(x, -2), lambda x: F.leaky_relu(x, -2)),
    "relu6": (custom_ops.relu6, F.relu6),
    "hardtanh": (lambda x: custom_ops.hardtanh(x, -0.1, 1.3), lambda x: F.hardtanh(x, -0.1, 1.3)),
    "threshold": (lambda x: custom_ops.threshold(x, 0.1, -3.7), lambda x: F.threshold(x, 0.1, -3.7)),
}
ONE_BIT = {name: ours for name, (ours, _) in PAIRS.items()} | {
    "bias_relu": lambda x: custom_ops.bias_relu(x, torch.zeros(1, dtype=x.dtype).expand(x.shape[0]), dim=0),
    "relu_dropout": lambda x: custom_ops.relu_dropout(x, 0.3),
}


def special(dtype: torch.dtype) -> torch.Tensor:
    nan, inf, tiny = float("nan"), float("inf"), torch.finfo(dtype).tiny
    values = [0.0, -0.0, nan, -nan, inf, -inf, tiny, -tiny, tiny / 2, -tiny / 2, 1.0, -1.0, 0.1, -0.1, 1.3, 6.0, 7.0]
    return torch.tensor(values * 4, dtype=dtype)[:-1]  # whole vectors and a tail


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", FLOATING)
def test_torchs_values_and_gradients_at_special_values(dtype, name):
    ours, theirs = PAIRS[name]
    a, b = special(dtype).requires_grad_(), special(dtype).requires_grad_()
    y, expected = ours(a), theirs(b)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    grad = torch.arange(1, len(a) + 1).to(dtype)
    y.backward(grad)
    expected.backward(grad)
    # torch's vectorised and scalar hardtanh disagree with each other on NaN.
    compared = ~a.isnan() if name in ("relu6", "hardtanh") else torch.ones_like(a, dtype=torch.bool)
    assert torch.equal(a.grad[compared], b.grad[compared])
    if name not in ("relu", "relu6"):  # these two give 0.0 for -0.0, as documented
        number = ~expected.isnan()
        assert torch.equal(y[number].signbit(), expected[number].signbit())


@pytest.mark.parametrize("slope", [0.01, -0.5, 1.0, 2**-8, 3e38, 1e-39, math.inf])
def test_torchs_leaky_relu_at_every_bfloat16(slope):
    words = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    grad = words[torch.randperm(len(words))]
    a, b = words.clone().requires_grad_(), words.clone().requires_grad_()
    y, expected = custom_ops.leaky_relu(a, slope), F.leaky_relu(b, slope)
    y.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["relu6", "hardtanh"])
def test_no_gradient_at_nan(name):
    x = torch.full((40,), math.nan, requires_grad=True)
    PAIRS[name][0](x).sum().backward()
    assert not x.grad.any()


@pytest.mark.parametrize("name", ONE_BIT)
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 31, 1000, 1 << 17])
def test_one_bit_per_element_is_kept(n, name):
    saved = []
    x = torch.randn(n, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ONE_BIT[name](x)
    assert saved
    assert sum(t.untyped_storage().nbytes() for t in saved) <= n / 8 + 64
    if name in PAIRS:
        grad = torch.randn(n)
        expected = torch.autograd.grad(PAIRS[name][1](x), x, grad)[0]
        assert torch.equal(torch.autograd.grad(y, x, grad)[0], expected)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("examples", [0, 3])
def test_large_outputs_are_written_past_the_caches_to_the_last_element(examples, dtype):
    # All examples of the batch but the first start inside a cache line.
    n = (9 << 20) // dtype.itemsize // max(1, examples) + 37
    x = torch.randn(*[examples] * bool(examples), n, dtype=dtype, requires_grad=True)
    grad = torch.randn_like(x)
    for ours, theirs in (
        (custom_ops.relu, F.relu),
        (lambda x: custom_ops.leaky_relu(x, 0.5), lambda x: F.leaky_relu(x, 0.5)),
        (custom_ops.relu6, F.relu6),
        (lambda x: custom_ops.relu_dropout(x, 0.0), F.relu),
        (lambda x: custom_ops.bias_relu(x, x.new_zeros(x.shape[:1]), 0), F.relu),
    ):
        y, expected = (torch.func.vmap(ours, randomness="different") if examples else ours)(x), theirs(x)
        assert torch.equal(y, expected)
        assert torch.equal(*(torch.autograd.grad(of, x, grad)[0] for of in (y, expected)))


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "hardtanh", "bias_relu", "squared_relu"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 2, 4, 5)])
def test_channels_last_stays(shape, name):
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x = torch.randn(shape).to(memory_format=layout).requires_grad_()
    bias = torch.randn(3, requires_grad=True)
    function = getattr(custom_ops, name)
    run = (lambda x: function(x, bias)) if name == "bias_relu" else function
    y = run(x)
    assert y.is_contiguous(memory_format=layout)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert gradient.is_contiguous(memory_format=layout)
    assert torch.equal(y, run(x.contiguous()))


def test_any_strides():
    x = torch.randn(4, 6, 8)
    for view in (x.transpose(0, 2), x[:, ::2], x[1:, 1:, 1:], x[:, :1].expand(4, 6, 8), x.flip(0)):
        assert torch.equal(custom_ops.relu(view), torch.relu(view))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1])
def test_bias_of_any_dimension(dim, layout):
    x = torch.randn(3, 5, 17, 11).to(memory_format=layout).requires_grad_()
    bias = torch.randn(x.shape[dim], requires_grad=True)
    grad = torch.randn_like(x)
    y = custom_ops.bias_leaky_relu(x, bias, 0.2, dim=dim)
    expected = F.leaky_relu(x + bias.view(-1, *[1] * (3 - dim % 4)), 0.2)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, (x, bias), grad), torch.autograd.grad(expected, (x, bias), grad))


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("batch", "rows", "channels", "inner"),
    [((), 5000, 3, 37), ((), 900, 700, 1), ((), 70001, 2, 1), ((), 3, 70000, 1), ((), 1, 1, 200001), ((), 3, 0, 4)]
    + [((), 0, 3, 2), ((3,), 11, 5, 1), ((2, 2), 3, 5, 7), ((0,), 3, 4, 5), ((2,), 40000, 1, 3)],
)  # fmt: skip
def test_sums_over_channels(batch, rows, channels, inner, threads, dtype):
    x = torch.randn(*batch, rows, channels, inner, dtype=torch.float64).to(dtype)
    mask = torch.randint(0, 256, (*batch, -(-rows * channels * inner // 8)), dtype=torch.uint8)
    default = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for off in (0.0, 0.3):
            masked, sums = torch.ops.custom_ops.apply_mask_and_sum(x, mask, inner, channels, off)
            assert torch.equal(masked, torch.ops.custom_ops.apply_mask(x, mask, 1.0, off))
            exact = torch.ops.custom_ops.apply_mask(x.double(), mask, 1.0, off)
            largest = exact.abs().sum((-3, -1))
            assert sums.shape == (*batch, channels)
            rounding = 2e-15 if dtype == torch.float64 else 1e-7
            allowed = rounding * largest + torch.finfo(dtype).eps / 2 * (1.001 * exact.sum((-3, -1)).abs() + 1e-7)
            assert ((sums.double() - exact.sum((-3, -1))).abs() <= allowed).all()
            torch.set_num_threads(3 - threads)
            assert torch.equal(sums, torch.ops.custom_ops.apply_mask_and_sum(x, mask, inner, channels, off)[1])
            torch.set_num_threads(threads)
    finally:
        torch.set_num_threads(default)


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
def test_the_gradient_of_a_bias_takes_one_pass(needed):
    from torch.utils._python_dispatch import TorchDispatchMode

    called = []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            called.append(op._opname)
            return op(*args, **(kwargs or {}))

    x, bias = torch.randn(4, 3, 5, requires_grad=needed[0]), torch.randn(3, requires_grad=needed[1])
    y = custom_ops.bias_relu(x, bias)
    with Recording():
        torch.autograd.grad(y, [t for t in (x, bias) if t.requires_grad], torch.ones_like(y))
    kernels = [name for name in called if "mask" in name]
    assert kernels == ["apply_mask_and_sum" if needed[1] else "apply_mask"]
    assert not {"sum", "reshape", "mul"} & set(called)


def test_raw_sums_are_checked():
    x, mask = torch.ones(24), torch.zeros(3, dtype=torch.uint8)
    for channels, inner in ((5, 1), (3, 16), (4, 0), (0, 1), (-3, 8), (3, -8), (1 << 62, 4), (4, 1 << 62)):
        with pytest.raises(RuntimeError, match="channels, inner: expected divisors of 24 elements"):
            torch.ops.custom_ops.apply_mask_and_sum(x, mask, inner, channels, 0.0)
    with pytest.raises(RuntimeError, match="mask: expected 3 bytes"):
        torch.ops.custom_ops.apply_mask_and_sum(x, mask[:2], 1, 3, 0.0)
    for inner in (0, 1 << 62):
        with pytest.raises(RuntimeError, match="bias: expected"):
            torch.ops.custom_ops.piecewise_linear(x, torch.ones(4), inner, 0.0, None, 0.0, 0.0, 0.0, True, 0)


@pytest.mark.parametrize("module", [custom_ops.BiasReLU(5), custom_ops.BiasLeakyReLU(5, 0.2)])
def test_bias_layers_learn_their_bias(module):
    x = torch.randn(3, 5, 4)
    module(x).sum().backward()
    slope = getattr(module, "negative_slope", 0.0)
    torch.testing.assert_close(module.bias.grad, torch.where(x > 0, 1, slope).sum((0, 2)))
    assert repr(module).startswith(type(module).__name__ + "(5, dim=1")
    module.inplace, y = True, x.clone()
    assert module(y) is y
    assert "inplace=True" in repr(module)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("layer", [custom_ops.BiasReLU, custom_ops.BiasLeakyReLU])
def test_bias_layers_under_autocast(layer, compiled):
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), layer(8)), torch.randn(2, 3, 9, 9)
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    with torch.autocast("cpu", torch.bfloat16):
        y = run(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert model[1].bias.grad.dtype == torch.float32
    conv = model[0].weight.detach().bfloat16()
    slope = getattr(model[1], "negative_slope", 0.0)
    steep = torch.where(F.conv2d(x.bfloat16(), conv) > 0, 1, slope).bfloat16().float().sum((0, 2, 3))
    torch.testing.assert_close(model[1].bias.grad, steep, rtol=2**-8, atol=0)
    with pytest.raises(TypeError, match="bias: expected one of float32, got bfloat16"):
        custom_ops.bias_relu(x, torch.ones(3, dtype=torch.bfloat16))


def test_layers_check_what_they_are_made_of():
    for channels, message in ((-1, "channels: expected at least 0, got -1"), ("8", "channels: expected an integer")):
        with pytest.raises((TypeError, ValueError), match=message):
            custom_ops.BiasReLU(channels)
    with pytest.raises(ValueError, match=r"p: expected a probability, got 1\.5"):
        custom_ops.ReLUDropout(1.5)
    for layer in (custom_ops.BiasReLU, custom_ops.ReLUDropout):
        with pytest.raises(TypeError, match="inplace: expected True or False, got 2"):
            layer(1, inplace=2)
        assert repr(layer(1, inplace=np.bool_(True))).endswith("inplace=True)")


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("torch.sparse_coo", torch.Tensor.to_sparse),
        ("torch.sparse_csr", torch.Tensor.to_sparse_csr),
        ("torch._mkldnn", torch.Tensor.to_mkldnn),
        ("a nested tensor", lambda x: torch.nested.nested_tensor([x, x])),
    ],
)
def test_only_dense_tensors(kind, make):
    x = make(torch.randn(3, 4))
    for function in (custom_ops.relu, custom_ops.squared_relu, custom_ops.relu_dropout, custom_ops.reverse_gradient):
        with pytest.raises(TypeError, match=f"x: expected a dense tensor, got {kind}"):
            function(x)


# ---------------------------------------------------------------- in place


@pytest.mark.parametrize("name", [*PAIRS, "bias_relu", "bias_leaky_relu", "relu_dropout"])
def test_in_place(name):
    arguments = {
        "threshold": (0.1, -3.7),
        "bias_relu": (torch.randn(100), 0),
        "bias_leaky_relu": (torch.randn(100), 0.2, 0),
        "relu_dropout": (0.3, True, torch.tensor(7)),
        "leaky_relu, negative slope": (-2.0,),
    }.get(name, ())

    def function(x, inplace=False):
        return getattr(custom_ops, name.partition(",")[0])(x, *arguments, inplace=inplace)

    x = torch.randn(100, requires_grad=True)
    y = x * 2
    version = y._version
    assert function(y, inplace=True) is y
    assert y._version == version + 1
    expected = function(x * 2)
    assert torch.equal(y, expected)
    grad = torch.randn(100)
    assert torch.equal(*(torch.autograd.grad(t, x, grad)[0] for t in (y, expected)))


def test_in_place_is_refused_where_autograd_needs_the_old_value():
    x = torch.randn(8, requires_grad=True)
    y = x.exp()
    custom_ops.relu(y, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---------------------------------------------------------------- dropout


def test_philox_is_the_published_generator():
    # These are Random123's test vectors for 4x32-10: counter and key all zero, then all ones in the key.
    assert philox(torch.tensor(0), 4).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_dropout_drops_with_probability_p(p):
    torch.manual_seed(0)
    x = torch.rand(200_000) + 0.5
    y = custom_ops.relu_dropout(x, p)
    dropped = (y == 0).double().mean().item()
    assert abs(dropped - p) <= 4 * math.sqrt(p * (1 - p) / len(x))
    if p < 1:
        torch.testing.assert_close(y[y != 0], (x / (1 - p))[y != 0])
    # A mask bit is independent of its neighbour.
    together = ((y[1:] == 0) & (y[:-1] == 0)).double().mean().item()
    assert abs(together - p * p) <= 0.01


def test_dropout_is_reproducible_and_seeded_by_torch():
    x = torch.randn(1000)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(custom_ops.relu_dropout(x))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(custom_ops.relu_dropout(x), custom_ops.relu_dropout(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_dropout_is_the_same_when_recomputed(use_reentrant):
    x = torch.randn(1000, requires_grad=True)
    y = checkpoint(lambda x: custom_ops.relu_dropout(x, 0.4) * 1.0, x, use_reentrant=use_reentrant)
    y.sum().backward()
    torch.testing.assert_close(x.grad != 0, y != 0)


def test_dropout_under_vmap():
    x = torch.ones(3, 1000)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(custom_ops.relu_dropout)(x)
    same = torch.func.vmap(custom_ops.relu_dropout, randomness="same")(x)
    assert torch.equal(same[0], same[1])
    different = torch.func.vmap(custom_ops.relu_dropout, randomness="different")(x)
    assert not torch.equal(different[0], different[1])


def test_dropout_layer():
    layer, x = custom_ops.ReLUDropout(0.25), torch.randn(100)
    assert repr(layer) == "ReLUDropout(p=0.25)"
    assert (layer(x) != torch.relu(x)).any()
    assert torch.equal(layer.eval()(x), torch.relu(x))


# ---------------------------------------------------------------- conversion


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LeakyReLU(0.2, inplace=True),
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU6(), nn.AvgPool2d(2), nn.Hardtanh(-0.5, 0.5), nn.Threshold(0.1, 0.0)),
        nn.ReLU(),
    )  # fmt: skip


def test_conversion_and_back():
    model, x = network(), torch.randn(2, 3, 16, 16)
    identities, text = [id(m) for m in model.modules()], repr(model)
    expected = model(x)
    report = custom_ops.convert_activations(model)
    assert [a.name for a in report.activations] == ["2", "3.1", "3.3", "3.4", "4"]
    assert [a.after for a in report.activations] == [
        custom_ops.LeakyReLU, custom_ops.ReLU6, custom_ops.Hardtanh, custom_ops.Threshold, custom_ops.ReLU
    ]  # fmt: skip
    torch.testing.assert_close(model(x), expected)
    assert "2: torch.nn.LeakyReLU -> custom_ops.LeakyReLU" in str(report)
    assert not custom_ops.convert_activations(model).activations
    assert len(custom_ops.convert_activations(model, to="torch").activations) == 5
    assert repr(model) == text
    assert [id(m) for m in model.modules()] == identities
    assert "no activation to convert" in str(custom_ops.convert_activations(nn.Linear(1, 1)))


def quantized(model: nn.Module, x: torch.Tensor) -> nn.Module:
    from torch.ao.quantization import DeQuantStub, QuantStub, convert, get_default_qat_qconfig, prepare_qat

    model = nn.Sequential(QuantStub(), model, DeQuantStub()).train()
    model.qconfig = get_default_qat_qconfig()
    prepare_qat(model, inplace=True)(x).sum().backward()
    return convert(model.eval())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_converted_model_can_be_traced_and_says_what_to_do_before_it_is_scripted_or_quantized():
    from torch.ao.quantization import fuse_modules, get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    activations = nn.ReLU(), nn.LeakyReLU(0.2), nn.ReLU6(), nn.Hardtanh(-0.5, 0.5), nn.Threshold(0.1, 0.0)
    x = torch.randn(2, 3, 8, 8)
    for activation in activations:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), activation).eval()
        expected = model(x)
        custom_ops.convert_activations(model)
        assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
        of_functions = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(), (x,))
        of_functions(x)
        torch.testing.assert_close(convert_fx(of_functions)(x), expected, atol=0.2, rtol=0)  # Threshold jumps by 0.1
        with pytest.raises(RuntimeError, match=r"torch.jit.script can't compile .* or call convert_activations"):
            torch.jit.script(model)
        custom_ops.convert_activations(model, to="torch")
        torch.testing.assert_close(torch.jit.script(model)(x), expected)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    custom_ops.convert_activations(model)
    with pytest.raises(TypeError, match=r"a quantized one: call convert_activations\(model, to='torch'\) before"):
        quantized(copy.deepcopy(model), x)(x)
    custom_ops.convert_activations(model, to="torch")
    fused = fuse_modules(model.eval(), ["0", "1", "2"])
    torch.testing.assert_close(fused(x), model(x))
    rounding = 0.1 if torch.__version__ < (2, 15) else 0.2  # it was seen to reach 0.103
    torch.testing.assert_close(quantized(copy.deepcopy(model), x)(x), model(x), atol=rounding, rtol=0)


def test_conversion_of_a_lone_module_keeps_its_hooks_and_leaves_subclasses():
    class Mine(nn.ReLU):
        pass

    mine, lone, calls = Mine(), nn.ReLU(), []
    lone.register_forward_hook(lambda *_: calls.append(1))
    assert not custom_ops.convert_activations(mine).activations
    custom_ops.convert_activations(lone)
    assert type(lone) is custom_ops.ReLU
    lone(torch.ones(1))
    assert calls == [1]


def test_conversion_measures_what_each_layer_saves():
    model, x = network().train(), torch.randn(2, 3, 16, 16)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    generator = torch.get_rng_state()
    report = custom_ops.convert_activations(model, measure=[x])
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    relu6 = report.activations[1]
    elements = 2 * 8 * 12 * 12
    assert (relu6.bytes_before, relu6.bytes_after) == (4 * elements, elements // 8)
    assert report.bytes_after < report.bytes_before


def test_conversion_says_where_it_does_not_help():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    report = custom_ops.convert_activations(model, measure=[torch.randn(4, 8)])
    (relu,) = report.activations
    assert relu.bytes_before == 0
    assert "a neighbour keeps the tensor anyway" in str(report)
    assert report.bytes_after == report.bytes_before + relu.bytes_after


def test_conversion_blames_no_neighbour_where_none_keeps_the_tensor():
    idle = nn.Sequential(nn.ReLU(), nn.Flatten())
    (relu,) = custom_ops.convert_activations(idle, measure=[torch.randn(4, 8)]).activations
    assert (relu.bytes_before, relu.remark) == (0, "it keeps nothing in this call")
    chain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.LeakyReLU(), nn.Flatten())
    report = custom_ops.convert_activations(chain, measure=[torch.randn(4, 8)])
    relu, leaky = report.activations
    assert relu.bytes_before == 128
    assert (leaky.bytes_before, leaky.remark) == (0, "what it keeps is counted with the activation before it")
    kept = sum(a.bytes_before - a.bytes_after for a in report.activations)
    assert report.bytes_before - report.bytes_after == kept


def test_conversion_that_fails_leaves_the_model_as_it_was():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.ReLU(), nn.ReLU6()

        def forward(self, x):
            if type(self.second) is not nn.ReLU6:
                raise RuntimeError("not mine")
            return self.second(self.first(x))

    model = Picky()
    with pytest.raises(RuntimeError, match="not mine"):
        custom_ops.convert_activations(model, measure=[torch.ones(3)])
    assert [type(m) for m in (model.first, model.second)] == [nn.ReLU, nn.ReLU6]


def test_conversion_counts_the_functional_calls_that_it_leaves():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

        def forward(self, x):
            return F.relu(torch.relu(self.layer(x)) * 2) + F.leaky_relu(x).relu_()

    report = custom_ops.convert_activations(Functional(), measure=[torch.randn(4, 8)])
    assert report.functions == {"relu": 2, "leaky_relu": 1, "relu_": 1}
    assert "not converted, as it is no module: relu, called 2 times" in str(report)


def test_conversion_refuses_what_it_does_not_know():
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got builtin"):
        custom_ops.convert_activations(torch.relu)
    with pytest.raises(ValueError, match="to: expected one of 'custom_ops', 'torch', got 'jax'"):
        custom_ops.convert_activations(nn.ReLU(), to="jax")


def test_a_training_step_of_whole_networks_needs_less():
    from benchmarks.networks import LEAST_SAVED, step_memory

    peaks, losses = {}, {}
    for row in step_memory(batch=2, size=64, device=torch.device("cpu"), compiled=False):
        peaks.setdefault(row["network"], {})[row["activations"]] = row["mebibytes"]
        losses.setdefault(row["network"], set()).add(row["loss"])
    assert all(len(same) == 1 for same in losses.values())
    for network, least in LEAST_SAVED.items():
        assert peaks[network]["custom_ops"] <= (1 - least) * peaks[network]["torch"]


# ---------------------------------------------------------------- compiled


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["relu", "leaky_relu", "hardtanh"])
def test_inductor_fuses_and_keeps_one_bit(name):
    from torch._inductor.utils import run_and_get_code

    function = PAIRS[name][0]
    x, bias, rest = (torch.randn(s, requires_grad=True) for s in ((67, 33), (33,), (67, 33)))
    grad = torch.randn(67, 33)
    saved = []

    def chain(x, bias, rest):
        return function(x + bias) * 2 + rest

    torch._dynamo.reset()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y, code = run_and_get_code(torch.compile(chain, fullgraph=True), x, bias, rest)
    assert not any("custom_ops" in c and "torch.ops.custom_ops" in c for c in code)
    assert sum(t.numel() * t.element_size() for t in saved) <= math.ceil(x.numel() / 8) + 64
    expected = chain(x, bias, rest)
    torch.testing.assert_close(y, expected)
    inputs = (x, bias, rest)
    torch.testing.assert_close(torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad))


def test_compiled_networks_keep_what_they_keep_with_torchs_activations():
    """Both keep the inputs of convolution and normalisation and no bit, which is recomputed from those
    (docs/limits.md).
    """
    from benchmarks.networks import MEMORY_ONLY

    torch.manual_seed(0)
    block = nn.Sequential(
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.LeakyReLU(0.1),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3),
    )  # fmt: skip
    x, kept = torch.randn(2, 8, 12, 12), []
    for to in ("torch", "custom_ops"):
        custom_ops.convert_activations(block, to=to)
        saved = {}

        def pack(tensor, saved=saved):
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = tensor.dtype, storage.nbytes()
            return tensor

        torch._dynamo.reset()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            torch.compile(block, fullgraph=True, options=MEMORY_ONLY)(x)
        kept.append(sorted(saved.values(), key=str))
    assert kept[0] == kept[1]
    assert not any(dtype == torch.uint8 for dtype, _ in kept[1])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("n", [1, 8, 13, 64])
def test_inductors_masks_are_the_kernels(n):
    x, grad = torch.randn(n), torch.randn(n)
    ops = torch.ops.custom_ops
    arguments = (None, 1, 0.0, None, 0.0, 0.0, 0.5, False, 0)
    y, mask = torch.compile(lambda x: ops.piecewise_linear(x, *arguments), fullgraph=True)(x)
    torch.testing.assert_close((y, mask), ops.piecewise_linear(x, *arguments))
    unpacked = torch.compile(lambda g, m: ops.apply_mask(g, m, 1.0, 0.5), fullgraph=True)(grad, mask)
    torch.testing.assert_close(unpacked, ops.apply_mask(grad, mask, 1.0, 0.5))


def test_no_channels():
    x, bias = torch.ones(3, 0, requires_grad=True), torch.ones(0, requires_grad=True)
    custom_ops.bias_relu(x, bias).sum().backward()
    assert x.grad.shape == (3, 0)
    assert bias.grad.shape == (0,)


@pytest.mark.parametrize(
    "function",
    [
        custom_ops.relu,
        custom_ops.leaky_relu,
        custom_ops.hardtanh,
        custom_ops.relu6,
        lambda x, inplace: custom_ops.threshold(x, 0.0, 0.0, inplace),
        lambda x, inplace: custom_ops.relu_dropout(x, inplace=inplace),
        lambda x, inplace: custom_ops.bias_relu(x, torch.ones(3), inplace=inplace),
        lambda x, inplace: custom_ops.bias_leaky_relu(x, torch.ones(3), inplace=inplace),
    ],
)
def test_no_form_writes_in_place_to_memory_that_overlaps(function):
    x = torch.arange(-2.0, 3.0)
    for overlapping in x.unfold(0, 3, 1), torch.ones(9).as_strided((3, 3), (1, 2)), x[:1].expand(2, 3):
        with pytest.raises(ValueError, match="x: expected elements with memory of their own"):
            function(overlapping, inplace=True)
    for apart in torch.ones(3, 6)[:, ::2].t(), torch.ones(4, 3)[::2], torch.ones(3, 1).expand(3, 1).t():
        function(apart, inplace=True)


def test_a_slope_of_0_is_a_true_0():
    """A slope of 0 gives a gradient of 0, as documented, where torch multiplies by 0 and gets NaN."""
    x = torch.tensor([-math.inf, -1.0, 2.0], requires_grad=True)
    y = custom_ops.leaky_relu(x, 0.0)
    y.backward(torch.full_like(y, math.nan))
    assert y.tolist() == [0, 0, 2]
    assert x.grad[:2].tolist() == [0, 0]
    assert x.grad[2].isnan()
