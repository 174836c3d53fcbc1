"""The layers VoxelSum and BEVPool sort points once while their ranks stay the same, and never use outdated ranks."""

from __future__ import annotations

import copy
import io
import weakref

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

import custom_ops
from custom_ops.voxel import pooling, sums

VOXELS = 6


def points(seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 20, 3, generator=generator, requires_grad=True)
    return (x,), torch.randint(-1, VOXELS, (batch, 20), generator=generator)


def pixels(seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    depth = torch.rand(batch, 2, 3, 2, 4, generator=generator, requires_grad=True)
    feat = torch.randn(batch, 2, 5, 2, 4, generator=generator, requires_grad=True)
    return (depth, feat), torch.randint(-1, VOXELS, depth.shape, generator=generator)


LAYERS = {
    "sum": (lambda: custom_ops.VoxelSum(VOXELS), points, lambda x, rank: custom_ops.voxel_sum(x, rank, VOXELS)),
    "max": (
        lambda: custom_ops.VoxelSum(VOXELS, "max"),
        points,
        lambda x, rank: custom_ops.voxel_sum(x, rank, VOXELS, "max"),
    ),
    "bev": (lambda: custom_ops.BEVPool(VOXELS), pixels, lambda d, f, rank: custom_ops.bev_pool(d, f, rank, VOXELS)),
}


@pytest.fixture(params=LAYERS)
def case(request):
    make, draw, function = LAYERS[request.param]
    return make(), draw, function


@pytest.fixture
def sorts(monkeypatch):
    """Count how often a layer or a function sorts points."""
    calls = []
    for module in (pooling, sums):
        original = module.voxel_csr
        monkeypatch.setattr(module, "voxel_csr", lambda *args, f=original: calls.append(args) or f(*args))
    return calls


def test_points_are_sorted_again_only_for_other_ranks(case, sorts):
    layer, draw, function = case
    _, rank = draw()
    for frame in range(3):  # the features change, the ranks don't
        values, _ = draw(frame)
        assert torch.equal(layer(*values, rank.clone()), layer(*values, rank))
    assert len(sorts) == 1
    changes = [rank.clone(), rank.int(), rank[:1].expand_as(rank), rank[0]]
    changes[0].view(-1)[-1] = (changes[0].view(-1)[-1] + 2) % VOXELS
    for changed in changes:
        before = len(sorts)
        out = layer(*values, changed)
        assert len(sorts) == before + 1
        assert torch.equal(out, function(*values, changed))
    rank = rank.clone()
    layer(*values, rank)
    rank.view(-1)[0] = (rank.view(-1)[0] + 2) % VOXELS  # the same tensor with new values
    assert torch.equal(layer(*values, rank), function(*values, rank))


def test_set_once_and_for_all(case, sorts):
    layer, draw, function = case
    values, rank = draw()
    with pytest.raises(ValueError, match="^rank: expected ranks, here or by set_geometry"):
        layer(*values)
    layer.set_geometry(rank)
    for twin in (layer, copy.deepcopy(layer)):
        assert torch.equal(twin(*values), function(*values, rank))
    other = draw(1)[1]
    layer.set_geometry(other)
    rank.fill_(-1)
    assert torch.equal(layer(*values), function(*values, other))
    layer.clear_geometry()
    with pytest.raises(ValueError, match="^rank: expected ranks"):
        layer(*values)


def test_gradients(case):
    layer, draw, function = case
    values, rank = draw()
    layer.set_geometry(rank)
    ours, theirs = (torch.autograd.grad((y**2).sum(), values) for y in (layer(*values), function(*values, rank)))
    torch.testing.assert_close(ours, theirs)


def test_clearing_releases_the_memory(case):
    layer, draw, _ = case
    values, rank = draw()
    layer(*values, rank)
    kept = [weakref.ref(t) for t in tree_leaves(layer._cached)]
    layer.clear_geometry()
    assert len(kept) >= 3 and all(reference() is None for reference in kept)


def test_is_no_state(case):
    layer, draw, _ = case
    values, rank = draw()
    layer.set_geometry(rank)
    assert not layer.state_dict() and not list(layer.buffers())
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(*values), layer(*values))
    assert torch.equal(layer.half()(*values), layer(*values))  # the kept indices are never converted
    assert layer.to("meta")(*(v.to("meta") for v in values)).device.type == "meta"


def test_where_values_cant_be_compared(case):
    """Under torch.func, on the meta device and with fake tensors nothing is cached and cached ranks are ignored."""
    layer, draw, function = case
    values, rank = draw()
    layer.set_geometry(draw(1)[1])
    kept = layer._was_set
    expected = function(*values, rank)
    assert torch.equal(torch.func.vmap(layer)(*(v[:, None] for v in values), rank[:, None])[:, 0], expected)
    gradient = torch.func.grad(lambda v: (layer(v, *values[1:], rank) ** 2).sum())(values[0])
    assert torch.equal(gradient, torch.autograd.grad((expected**2).sum(), values[0])[0])
    assert layer(*(v.to("meta") for v in values), rank.to("meta")).shape == expected.shape
    with FakeTensorMode() as mode:
        assert layer(*map(mode.from_tensor, values), mode.from_tensor(rank)).shape == expected.shape
    assert layer._was_set is kept and layer._cached is None


def test_kept_under_inference_mode_for_training(case):
    layer, draw, _ = case
    values, rank = draw()
    with torch.inference_mode():
        layer(*values, rank + 0)
    kept = layer._cached
    assert all(g is not None for g in torch.autograd.grad(layer(*values, rank).sum(), values))
    assert layer._cached is kept


@pytest.mark.parametrize("given", [True, False], ids=["ranks given", "ranks set"])
def test_compile(case, given):
    layer, draw, function = case
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for seed in range(3):  # new ranks need no new program
        values, rank = draw(seed)
        layer.set_geometry(draw(7)[1] if given else rank)
        out = compiled(*values, rank) if given else compiled(*values)
        expected = function(*values, rank)
        torch.testing.assert_close(out, expected)
        grads = [torch.autograd.grad((y**2).sum(), values) for y in (out, expected)]
        torch.testing.assert_close(*grads)
    torch._dynamo.reset()
    counter = CompileCounter()
    counted = torch.compile(layer, fullgraph=True, backend=counter)
    for seed in range(3):
        values, rank = draw(seed)
        layer.set_geometry(rank)
        counted(*values, *([rank] if given else []))
    assert counter.frame_count == 1


@pytest.mark.parametrize("given", [True, False], ids=["ranks given", "ranks set"])
def test_symbolic_trace(case, given):
    layer, draw, function = case
    values, rank = draw()
    layer.set_geometry(draw(7)[1] if given else rank)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = layer

        def forward(self, given):
            return self.pool(*(given[i] for i in range(arguments)))

    arguments = len(values) + given
    traced = torch.fx.symbolic_trace(Model())
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["pool"]
    values, rank = draw(1)[0], draw(1)[1] if given else rank
    assert torch.equal(traced([*values, rank]), function(*values, rank))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("given", [True, False], ids=["ranks given", "ranks set"])
def test_export(case, given, strict):
    layer, draw, function = case
    values, rank = draw()
    layer.set_geometry(draw(7)[1] if given else rank)
    batch = {0: torch.export.Dim("batch", min=2)}
    arguments = (*values, rank) if given else values
    dynamic = (batch,) * len(arguments) if given else None
    program = torch.export.export(layer, arguments, dynamic_shapes=dynamic, strict=strict)
    assert not program.state_dict
    for size in (2, 5) if given else (2,):
        values, other = draw(1, size)
        ranks = other if given else rank
        got = program.module()(*values, *([ranks] if given else []))
        torch.testing.assert_close(got, function(*values, ranks))


def test_masked_points_and_a_csr_of_ones_own():
    (x,), rank = points()
    mask = torch.rand(rank.shape) < 0.5
    layer = custom_ops.VoxelSum(VOXELS)
    expected = custom_ops.voxel_sum(x, rank, VOXELS, mask=mask)
    for _ in range(2):
        assert torch.equal(layer(x, rank, mask), expected)
    assert torch.equal(layer(x, rank, ~mask), custom_ops.voxel_sum(x, rank, VOXELS, mask=~mask))
    kept = layer._cached
    csr = custom_ops.voxel_csr(rank, VOXELS)
    assert torch.equal(layer(x, rank, csr=csr), custom_ops.voxel_sum(x, rank, VOXELS))
    assert layer._cached is kept


def test_wrong_arguments():
    (x,), rank = points()
    (depth, feat), ranks = pixels()
    voxel_sum, bev_pool = custom_ops.VoxelSum(VOXELS), custom_ops.BEVPool(VOXELS)
    csr = custom_ops.voxel_csr(rank, VOXELS)
    for call, message in (
        (lambda: voxel_sum(x, mask=rank > 0), "rank: expected ranks with a mask or csr, got None"),
        (lambda: voxel_sum(x, csr=csr), "rank: expected ranks with a mask or csr, got None"),
        (lambda: voxel_sum(x, rank.float()), "rank: expected one of int32, int64, got float32"),
        (lambda: voxel_sum(x, rank[:, 1:]), r"rank: expected shape \[2, 20\] or \[20\], got \[2, 19\]"),
        (lambda: voxel_sum(x, rank, rank), "mask: expected one of bool, got int64"),
        (lambda: voxel_sum(x, rank, rank > 0, csr), "mask: expected None with csr"),
        (lambda: voxel_sum(x, rank + VOXELS), "rank: expected values below num_voxels=6"),
        (lambda: voxel_sum.set_geometry([1]), "rank: expected a tensor, got list"),
        (lambda: voxel_sum.set_geometry(rank + VOXELS), "rank: expected values below num_voxels=6"),
        (lambda: voxel_sum.set_geometry(rank[0, 0]), r"rank: expected \[..., N\], got a scalar"),
        (lambda: bev_pool(depth, feat, csr=csr), "rank: expected ranks with a mask or csr, got None"),
        (lambda: bev_pool(depth, feat, ranks[0, 0]), r"rank: expected \[B, N, D, H, W\] or \[N, D, H, W\], got shape"),
        (lambda: bev_pool(depth, feat, ranks[:, :1]), r"rank: expected shape \[2, 2, 3, 2, 4\] or \[2, 3, 2, 4\], got"),
        (lambda: bev_pool.set_geometry(None), "rank: expected a tensor, got NoneType"),
        (lambda: bev_pool.set_geometry(rank), r"rank: expected \[B, N, D, H, W\] or \[N, D, H, W\], got shape"),
    ):
        with pytest.raises((TypeError, ValueError, RuntimeError), match=f"^{message}"):
            call()
    voxel_sum.set_geometry(rank)
    with pytest.raises(ValueError, match=r"^rank: expected shape \[2, 19\] or \[19\], got \[2, 20\]"):
        voxel_sum(x[:, 1:])


@pytest.mark.usefixtures("each_backend")
def test_a_mask_leaves_points_out():
    """Points that a mask leaves out count nowhere, even if they are NaN, and have no gradient."""
    (depth, feat), rank = pixels()
    layer = custom_ops.BEVPool(VOXELS)
    for mask in (torch.rand(depth.shape) < 0.5, torch.rand(2, 2, 1, 2, 4) < 0.5, torch.rand(2, 1, 1, 1) < 0.5):
        for ranks in (rank, rank[0]):
            expected = custom_ops.bev_pool(depth, feat, ranks.expand_as(depth).masked_fill(~mask, -1), VOXELS)
            broken = depth.detach().where(mask, float("nan")).requires_grad_()
            for pooled in (
                custom_ops.bev_pool(broken, feat, ranks, VOXELS, mask=mask),
                layer(broken, feat, ranks, mask=mask),
            ):
                assert torch.equal(pooled, expected)
                (grad,) = torch.autograd.grad(pooled.square().sum(), broken)
                assert torch.equal(grad, torch.autograd.grad(expected.square().sum(), depth, retain_graph=True)[0])
                assert (grad.where(~mask.expand_as(grad), 0) == 0).all()
