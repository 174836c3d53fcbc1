"""Losses over a catalogue beyond the battery: blocks, memory, ignored rows, digits, parts of the words."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import custom_ops
from benchmarks.memory import peak_bytes
from custom_ops.ranking import catalogue
from custom_ops.ranking.catalogue import catalogue_backward, catalogue_log_prob
from custom_ops.ranking.specs.catalogue import linear_cross_entropy_reference, linear_log_prob_reference
from custom_ops.ranking.specs.contrastive import info_nce_loss_reference, sigmoid_contrastive_loss_reference
from custom_ops.triton_kernels import catalogue as launchers
from custom_ops.verify._backends import backend

# NumPy warns while it interprets a kernel
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
FUNCTIONS = {
    "linear_log_prob": (custom_ops.linear_log_prob, linear_log_prob_reference),
    "linear_cross_entropy": (custom_ops.linear_cross_entropy, linear_cross_entropy_reference),
}
PAIRS = {
    "info_nce_loss": (custom_ops.info_nce_loss, info_nce_loss_reference),
    "sigmoid_contrastive_loss": (custom_ops.sigmoid_contrastive_loss, sigmoid_contrastive_loss_reference),
}


@pytest.fixture(params=["cpp", "triton"])
def each_backend(request):
    with backend(request.param):
        yield request.param


def drawn(rows, words, dims, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, dims, generator=generator).to(dtype).requires_grad_() for n in (rows, words))
    target = torch.randint(words, (rows,), generator=generator)
    target[1::3] = -100
    return x, weight, target


def to_second_order(function, x, weight, target, **options):
    """Return the results, their gradients and the second derivatives, for cotangents that differ between rows."""
    results = function(x, weight, target, **options)
    results = [results] if isinstance(results, torch.Tensor) else list(results)
    loss = sum((y * torch.linspace(-1, 1, y.numel() + 1)[1:].view(y.shape).to(y)).sum() for y in results)
    first = torch.autograd.grad(loss, (x, weight), create_graph=True)
    square = sum((g.square() * torch.linspace(0, 1, g.shape[0]).unsqueeze(-1).to(g)).sum() for g in first)
    return [t.detach() for t in (*results, *first, *torch.autograd.grad(square, (x, weight)))]


def small_blocks(monkeypatch):
    monkeypatch.setattr(launchers, "_LOGITS", 8)
    monkeypatch.setattr(launchers, "_LEAST_ROWS", 3)
    monkeypatch.setattr(launchers, "_WORDS", 4)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_rows_and_words_add_up(name, dtype, each_backend, monkeypatch):
    """There are several blocks of rows, in which ignored rows lie; words of 16 bits are widened in several parts."""
    small_blocks(monkeypatch)
    rows, words = (200, 40_000) if each_backend == "cpp" else (11, 13)
    arguments = drawn(rows, words, 2, dtype)
    own, reference = FUNCTIONS[name]
    exact = [t.detach().double().requires_grad_() for t in arguments[:2]]
    rtol = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for ours, right in zip(to_second_order(own, *arguments), to_second_order(reference, *exact, arguments[2])):
        scale = right.abs().max().item()
        torch.testing.assert_close(ours.double(), right, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("name", PAIRS)
def test_blocks_of_pairs_add_up(name, each_backend, monkeypatch):
    small_blocks(monkeypatch)
    queries, keys = (70, 33_000) if each_backend == "cpp" else (7, 9)
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(n, 2, generator=generator).double().requires_grad_() for n in (queries, keys))
    target = torch.randint(keys, (queries,), generator=generator)
    mask = torch.rand(queries, keys, generator=generator) < 0.7
    own, reference = (partial(f, temperature=0.8, mask=mask, reduction="none") for f in PAIRS[name])
    for ours, right in zip(to_second_order(own, query, key, target), to_second_order(reference, query, key, target)):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-9 * right.abs().max().item())


def symmetric(queries, keys, dtype=torch.float64, temperature=0.8, **options):
    """Return the loss in both directions and its gradients, and what plain PyTorch finds in float64."""
    generator = torch.Generator().manual_seed(2)
    pair = [torch.randn(n, 2, generator=generator).to(dtype).requires_grad_() for n in (queries, keys)]
    exact = [t.detach().double().requires_grad_() for t in pair]
    found = []
    for function, given in ((custom_ops.info_nce_loss, pair), (info_nce_loss_reference, exact)):
        loss = function(*given, temperature=temperature, **options)
        found.append((loss, *torch.autograd.grad(loss, given)))
    return zip(*found)


def test_both_directions_add_up_over_blocks(each_backend, monkeypatch):
    """A key is compared with no query of the first block, and its own query is in the second."""
    small_blocks(monkeypatch)
    queries, keys, first = (300, 12_000, 262) if each_backend == "cpp" else (7, 9, 3)
    mask = torch.rand(queries, keys, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[:first, queries - 1] = False
    for ours, right in symmetric(queries, keys, mask=mask):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("each_backend")
def test_both_directions_keep_their_digits_for_similarities_far_apart():
    """They reach from -4,000 to 4,000, and the largest of a query is far from that of a key."""
    for ours, right in symmetric(7, 7, torch.float32, 0.001):
        torch.testing.assert_close(ours.double(), right, rtol=1e-6, atol=1e-6 * right.abs().max().item())


@pytest.mark.parametrize(("of_block", "products"), [(8, 3), (4, 8)])
def test_both_directions_share_their_matrix_products(of_block, products, monkeypatch):
    """There are three if the similarities fit in a block, and four for each of several blocks."""
    monkeypatch.setattr(launchers, "_LOGITS", 1)
    monkeypatch.setattr(launchers, "_LEAST_ROWS", of_block)
    original, found = launchers.catalogue_symmetric_loss, []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten.matmul.default, torch.ops.aten.addmm_.default):
                found.append(function)
            return function(*args, **(kwargs or {}))

    def within(*args):
        with Products():
            return original(*args)

    monkeypatch.setattr(launchers, "catalogue_symmetric_loss", within)
    query, key = (torch.randn(8, 2, requires_grad=True) for _ in range(2))
    with backend("triton"):
        custom_ops.info_nce_loss(query, key, temperature=1.0).backward()
    assert len(found) == products


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_tensor_of_rows_times_words_is_allocated(name):
    """The logits would take 100 MiB; a block takes 32."""
    arguments = drawn(1310, 20_000, 2)
    function = FUNCTIONS[name][0]
    assert peak_bytes(lambda: to_second_order(function, *arguments), torch.device("cpu")) < 33 << 20


@pytest.mark.parametrize("name", PAIRS)
def test_the_similarities_of_a_batch_are_not_in_memory(name):
    """They would take 64 MiB in each direction; groups leave out pairs without a mask of their size."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(4096, 2, generator=generator, requires_grad=True) for _ in range(2))
    group = torch.arange(4096) // 2

    def run():
        loss = PAIRS[name][0](query, key, temperature=0.5, query_group=group)
        torch.autograd.grad(loss, (query, key))

    assert peak_bytes(run, torch.device("cpu")) < 33 << 20


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_launchers_allocate_no_tensor_of_rows_times_words(name, monkeypatch):
    small_blocks(monkeypatch)
    monkeypatch.setattr(catalogue, "_KEPT", 0)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            found = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
            sizes.extend(t.numel() * t.element_size() for t in found)
            return result

    rows, words = 9, 17
    for op in ("catalogue_log_prob", "catalogue_backward", "catalogue_second", "catalogue_loss"):
        original = getattr(launchers, op)

        def within(*args, original=original):
            with Sizes():
                return original(*args)

        monkeypatch.setattr(launchers, op, within)
    with backend("triton"):
        to_second_order(FUNCTIONS[name][0], *drawn(rows, words, 2))
    assert 0 < max(sizes) < rows * words * 4


@pytest.mark.parametrize("name", FUNCTIONS)
def test_ignored_rows_are_never_read(name, each_backend):
    x, weight, target = drawn(7, 5, 3)
    own, reference = FUNCTIONS[name]
    expected = to_second_order(reference, x, weight, target)
    with torch.no_grad():
        x[target == -100] = math.nan
    for ours, right in zip(to_second_order(own, x, weight, target), expected):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)
    if name == "linear_cross_entropy":
        smooth = own(x, weight, target, label_smoothing=0.5)
        assert torch.autograd.grad(smooth, x)[0].isfinite().all()
    nothing = to_second_order(own, x, weight, torch.full_like(target, -100))
    assert all(not t.any() for t in nothing)


@pytest.mark.usefixtures("each_backend")
def test_a_likely_target_keeps_its_digits_and_far_words_are_harmless():
    weight = torch.tensor([[1000.0], [985.0], [-1000.0]], requires_grad=True)
    x = torch.ones(1, 1, requires_grad=True)
    found = custom_ops.linear_log_prob(x, weight, torch.tensor([0]))
    # The logits are rounded to 6e-5, as is their logsumexp; the difference isn't.
    assert found.log_prob.item() == pytest.approx(-math.log1p(math.exp(-15)), abs=6e-8)
    assert found.lse.item() == 1000
    assert found.entropy.item() == pytest.approx(16 * math.exp(-15), rel=2e-2)
    for result in to_second_order(custom_ops.linear_log_prob, x, weight, torch.tensor([0])):
        assert result.isfinite().all()


@pytest.mark.usefixtures("each_backend")
def test_a_bias_of_minus_infinity_leaves_a_word_out():
    x, weight, _ = drawn(4, 6, 3)
    target = torch.tensor([0, 1, 3, 3])
    bias = torch.zeros(6)
    bias[2] = -math.inf
    own = to_second_order(custom_ops.linear_log_prob, x, weight, target, bias=bias)
    rest = torch.tensor([0, 1, 3, 4, 5])
    fewer = weight.detach()[rest].requires_grad_()
    without = to_second_order(custom_ops.linear_log_prob, x, fewer, target - (target > 2).long())
    for ours, right in zip(own[:4], without[:4]):
        torch.testing.assert_close(ours, right)
    torch.testing.assert_close(own[4][rest], without[4])
    assert not own[4][2].any()
    assert all(t.isfinite().all() for t in own)


@pytest.mark.usefixtures("each_backend")
def test_parts_of_the_words_make_up_the_whole():
    """Each part knows its words' lse, and the score of a target that it has; elsewhere the target's score is 0."""
    x, weight, target = drawn(6, 7, 2)
    whole = custom_ops.linear_log_prob(x, weight, target)
    parts = [
        catalogue_log_prob(
            x[None], weight[None, a:b], None, target[None], None, None, None, 1.0, -100, a, 7, False, False
        )
        for a, b in ((0, 3), (3, 4), (4, 7))
    ]
    counts = target != -100
    lse = torch.where(counts, torch.cat([part[2] for part in parts]).logsumexp(0), 0)
    torch.testing.assert_close(lse, whole.lse)
    scores = sum(part[0] + part[2] for part in parts)[0]
    torch.testing.assert_close(scores - lse, whole.log_prob)


def test_the_gradient_of_float16_survives_a_loss_scale():
    """The forward pass computes the gradient before the scale is known, and float16 couldn't hold it."""
    x, weight, target = drawn(2000, 1000, 4)
    with torch.autocast("cpu", torch.float16):
        loss = custom_ops.linear_cross_entropy(x, weight, target)
    (gradient,) = torch.autograd.grad(loss * 65536.0, weight)
    (right,) = torch.autograd.grad(linear_cross_entropy_reference(x, weight, target) * 65536.0, weight)
    assert ((gradient - right).norm(dim=1) <= 3e-3 * right.norm(dim=1)).all()


def test_the_gradient_found_in_forward_and_that_found_anew_agree():
    x, weight, target = drawn(50, 30, 4, torch.float64)
    loss = custom_ops.linear_cross_entropy(x, weight, target)
    known = torch.autograd.grad(loss, (x, weight), torch.tensor(3.0, dtype=torch.float64), retain_graph=True)
    anew = torch.autograd.grad(loss, (x, weight), torch.tensor(3.0, dtype=torch.float64), create_graph=True)
    torch.testing.assert_close(known, tuple(t.detach() for t in anew))
    assert all(t.requires_grad for t in anew)
    frozen = custom_ops.linear_cross_entropy(x.detach(), weight, target)
    torch.testing.assert_close(torch.autograd.grad(3 * frozen, weight)[0], known[1])


@pytest.mark.usefixtures("each_backend")
def test_scores_that_are_kept_give_the_same_derivatives_as_those_computed_anew(monkeypatch):
    x, weight, target = drawn(5, 6, 3, torch.float64)
    bias = torch.tensor([0, -math.inf, 0, 1, 0, 2.0], dtype=torch.float64, requires_grad=True)
    target[0] = 0
    of_rows = torch.linspace(-1, 1, 5, dtype=torch.float64)

    def gradients():
        log_prob, _, lse = custom_ops.linear_log_prob(x, weight, target, bias=bias)
        return torch.autograd.grad((log_prob * of_rows + lse * of_rows.flip(0)).sum(), (x, weight, bias))

    kept = gradients()
    monkeypatch.setattr(catalogue, "_KEPT", 0)
    torch.testing.assert_close(kept, gradients())


def test_nothing_is_kept_of_ignored_rows(each_backend):
    """The op returns defined numbers for them, whatever the memory held before."""
    x, weight, target = torch.randn(1, 5, 2), torch.randn(1, 7, 2), torch.tensor([[0, -100, 3, -100, 6]])
    for _ in range(20):
        before = torch.full((1, 5, 7), torch.nan)
        del before
        options = 1.0, -100, 0, 7, False, True
        *_, kept = catalogue_log_prob(x, weight, None, target, None, None, None, *options)
        assert kept.isfinite().all() and (kept[0, [0, 2, 4]].amax(1) == 1).all()


def test_a_result_that_nobody_uses_costs_nothing():
    given = []

    class Cotangents(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is catalogue_backward:
                given.append([t is not None for t in args[:3]])
            return function(*args, **(kwargs or {}))

    x, weight, target = drawn(5, 6, 3)
    for at in range(3):
        with Cotangents():
            custom_ops.linear_log_prob(x, weight, target)[at].sum().backward()
    assert given == [[at == i for i in range(3)] for at in range(3)]


def test_an_int32_target_is_not_equal_to_an_ignore_index_of_more_bits():
    x, weight, _ = drawn(3, 4, 2)
    scale = torch.tensor(2.0, requires_grad=True)
    target, options = torch.zeros(3, dtype=torch.int32), {"scale": scale, "ignore_index": 2**32}
    found = custom_ops.linear_log_prob(x, weight, target, **options).log_prob.sum()
    right = linear_log_prob_reference(x, weight, target.long(), **options)[0].sum()
    for ours, expected in zip(*(torch.autograd.grad(loss, (x, scale)) for loss in (found, right))):
        torch.testing.assert_close(ours, expected)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32])
def test_targets_and_groups_may_be_integers_of_any_size(dtype):
    x, keys = torch.randn(4, 3), torch.randn(5, 3)
    target, groups = torch.tensor([4, 0, 2, 4]), torch.tensor([1, 1, 0, 2])
    of_keys = torch.tensor([1, 0, 0, 2, 1])
    calls = [
        lambda t, q, k: custom_ops.linear_cross_entropy(x, keys, t, ignore_index=2),
        lambda t, q, k: custom_ops.linear_log_prob(x, keys, t).log_prob,
        lambda t, q, k: custom_ops.info_nce_loss(x, keys, t, temperature=1.0, query_group=q, key_group=k),
        lambda t, q, k: custom_ops.sigmoid_contrastive_loss(x, keys, t, temperature=1.0, query_group=q, key_group=k),
    ]
    for call in calls:
        assert torch.equal(call(*(t.to(dtype) for t in (target, groups, of_keys))), call(target, groups, of_keys))


def test_a_mean_over_weights_of_0_is_nan_and_ignored_rows_have_no_part_in_it():
    x, weight, target = drawn(4, 5, 3)
    own, right = (
        function(x, weight, target, weight=torch.zeros(5), label_smoothing=0.5)
        for function in (custom_ops.linear_cross_entropy, linear_cross_entropy_reference)
    )
    assert own.isnan() and right.isnan()
    (gradient,) = torch.autograd.grad(own, x)
    assert not gradient[target == -100].any() and gradient[target != -100].isnan().all()


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_row_whose_class_has_weight_0_is_not_read(reduction):
    x, weight, _ = (t.detach() for t in drawn(3, 4, 2))
    x[1] = math.nan
    options = {"weight": torch.tensor([1.0, 0.0, 2.0, 1.0]), "reduction": reduction}

    def results(x, target):
        x, words = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = custom_ops.linear_cross_entropy(x, words, target, **options)
        return loss.sum(), *torch.autograd.grad(loss.sum(), (x, words))

    found = results(x, torch.tensor([0, 1, 2]))
    expected = results(x.nan_to_num(), torch.tensor([0, -100, 2]))
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right)


@pytest.mark.usefixtures("each_backend")
def test_binary_problems_keep_the_digits_of_likely_pairs_and_of_far_ones():
    query = torch.tensor([[40.0], [-1000.0]], requires_grad=True)
    options = {"temperature": 1.0, "reduction": "none"}
    found = custom_ops.sigmoid_contrastive_loss(query, torch.tensor([[1.0], [-0.5]]), **options)
    expected = [math.exp(-40) + math.exp(-20), 0.0]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    (slope,) = torch.autograd.grad(found.sum(), query)
    assert slope[0].item() == pytest.approx(-math.exp(-40) - 0.5 * math.exp(-20), rel=1e-5)
    assert slope[1].item() == 0
    wrong = custom_ops.sigmoid_contrastive_loss(query, torch.tensor([[-1.0], [1.0]]), **options)
    assert wrong.tolist() == pytest.approx([80, 2000])


def _again(f, x, v):
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad((first * v).sum(), x)[0]


class _Loss(torch.nn.Module):
    def __init__(self, f, x):
        super().__init__()
        self.f, self.x = f, torch.nn.Parameter(x)

    def forward(self, shift):
        return self.f(self.x + shift)


def _exported(f, x, v):
    program = torch.export.export(_Loss(f, x), (v,)).module()
    return torch.autograd.grad(program(v), program.parameters())[0]


def _checkpointed(f, x, v):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(checkpoint(f, x, use_reentrant=False), x)[0]


# Each fails or is silently wrong in torch's or TRL's losses in chunks; the function has cotangents of its own for each
# row's log-probability and entropy.
COMPOSITIONS = {
    "jvp": lambda f, x, v: torch.func.jvp(f, (x,), (v,))[1],
    "jvp of jvp": lambda f, x, v: torch.func.jvp(lambda y: torch.func.jvp(f, (y,), (v,))[1], (x,), (x,))[1],
    "func.grad": lambda f, x, v: torch.func.grad(f)(x),
    "hessian": lambda f, x, v: torch.func.hessian(f)(x),
    "compile(vmap(grad))": lambda f, x, v: torch.compile(
        torch.func.vmap(torch.func.grad(f)), backend="aot_eager", fullgraph=True
    )(torch.stack([x, v])),
    "double backward": _again,
    "checkpoint": _checkpointed,
    "export": _exported,
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_compositions(name):
    x, weight, target = drawn(4, 5, 3, torch.float64)
    of_rows = torch.linspace(-1, 1, 8, dtype=torch.float64)

    def loss(x, function):
        log_prob, entropy, _ = function(x, weight.detach(), target, scale=1.5)
        return (log_prob * of_rows[:4]).sum() + (entropy.exp() * of_rows[4:]).sum()

    x, v = x.detach(), x.detach().flip(0)
    own, right = (
        COMPOSITIONS[name](partial(loss, function=function), x, v)
        for function in (custom_ops.linear_log_prob, linear_log_prob_reference)
    )
    torch.testing.assert_close(own, right)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("name", [*FUNCTIONS, *PAIRS])
def test_no_rows_and_one_word_give_defined_results(name):
    own, reference = (FUNCTIONS | PAIRS)[name]
    options = {"temperature": 0.5} if name in PAIRS else {}
    for rows in (0, 1):
        x, weight, _ = drawn(rows, 1, 3)
        target = torch.zeros(rows, dtype=torch.int64)
        expected = to_second_order(reference, x, weight, target, **options)
        for ours, right in zip(to_second_order(own, x, weight, target, **options), expected):
            torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("name", PAIRS)
def test_a_temperature_tensor_that_is_not_positive_gives_nan(name):
    for temperature in (0.0, -1.0):
        assert PAIRS[name][0](torch.eye(2), torch.eye(2), temperature=torch.tensor(temperature)).isnan()


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("name", [*FUNCTIONS, *PAIRS])
def test_mixed_dtypes_are_promoted(name):
    own, reference = (FUNCTIONS | PAIRS)[name]
    x, weight, target = drawn(3, 5, 4)
    target, options = target.clamp(0), {"temperature": 0.5} if name in PAIRS else {}
    for low, dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.float64)):
        rows = x.detach().to(low).requires_grad_()
        words = weight.detach().to(dtype).requires_grad_()
        expected = to_second_order(reference, rows, words, target, **options)
        for ours, right in zip(to_second_order(own, rows, words, target, **options), expected):
            torch.testing.assert_close(ours, right)
