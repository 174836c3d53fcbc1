"""The limits of the voxel ops: sizes 0 and 1, any number of columns, threads, accuracy, and 2^31 elements."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import custom_ops
from custom_ops.verify._backends import backend
from custom_ops.voxel.specs.pooling import bev_pool_reference
from custom_ops.voxel.specs.sums import voxel_sum_reference

NAN = float("nan")
REDUCTIONS = ("sum", "mean", "max")


def cameras(shape=(2, 1, 6, 3, 5), columns=4, voxels=9, dtype=torch.float64):
    depth = torch.rand(shape, dtype=torch.float64).to(dtype).requires_grad_()
    feat = torch.randn(*shape[:2], columns, *shape[3:], dtype=torch.float64).to(dtype).requires_grad_()
    return depth, feat, torch.randint(-1, voxels, shape)


def with_gradients(out, leaves):
    """Return the output, and first and second gradients of a nonlinear loss."""
    first = torch.autograd.grad((out**2).sum(), leaves, create_graph=True)
    return [out.detach(), *first, *torch.autograd.grad(sum((g**2).sum() for g in first), leaves)]


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_ranks_of_both_widths(reduce):
    x, rank = torch.randn(3, 500, 5, requires_grad=True), torch.randint(-1, 40, (3, 500))
    csr = custom_ops.voxel_csr(rank, 40)
    assert all(torch.equal(*pair) for pair in zip(csr, custom_ops.voxel_csr(rank.int(), 40)))
    wide = with_gradients(custom_ops.voxel_sum(x, rank, 40, reduce), [x])
    for ranks, given in ((rank.int(), None), (rank, csr), (rank.int(), csr)):
        narrow = with_gradients(custom_ops.voxel_sum(x, ranks, 40, reduce, csr=given), [x])
        assert all(torch.equal(*pair) for pair in zip(wide, narrow))


@pytest.mark.usefixtures("each_backend")
def test_ranks_of_both_widths_in_the_others():
    depth, feat, rank = cameras()
    wide, narrow = (with_gradients(custom_ops.bev_pool(depth, feat, r, 9), [depth, feat]) for r in (rank, rank.int()))
    assert all(torch.equal(*pair) for pair in zip(wide, narrow))
    x, geometry, ranks = torch.randn(50, 3), torch.zeros(50, 2), torch.randint(0, 9, (50,)).sort().values
    wide, narrow = (custom_ops.voxels_summing(x, geometry, r) for r in (ranks, ranks.int()))
    assert all(torch.equal(*pair) for pair in zip(wide, narrow))


@pytest.mark.usefixtures("each_backend")
def test_a_frame_without_points():
    nothing = torch.zeros(0, dtype=torch.int64)
    assert custom_ops.voxel_rank(torch.zeros(0, 3), (0, 0, 0), (1, 1, 1), (2, 2, 2)).shape == (0,)
    perm, indptr = custom_ops.voxel_csr(nothing, 4)
    assert perm.shape == (0,) and indptr.tolist() == [0] * 5
    x = torch.zeros(0, 3, requires_grad=True)
    outputs = [custom_ops.voxel_sum(x, nothing, 4, reduce) for reduce in REDUCTIONS]
    outputs += [custom_ops.voxel_sum(x, nothing, 4, csr=(perm, indptr)), custom_ops.segment_sum(x, indptr, perm)]
    for out in outputs:
        assert torch.equal(out, torch.zeros(4, 3))
        assert torch.autograd.grad(out.sum(), x)[0].shape == (0, 3)
    sums, voxels = custom_ops.voxels_summing(x, torch.zeros(0, 2), nothing)
    assert sums.shape == (0, 3) and voxels.shape == (0, 2)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_sample_without_points_in_the_grid(reduce):
    """A sample without points, alone or among others, gives 0 and zero gradients of first and second order."""
    x, rank = torch.randn(3, 20, 4, requires_grad=True), torch.randint(0, 6, (3, 20))
    rank[1] = -1
    out, first, second = with_gradients(custom_ops.voxel_sum(x, rank, 6, reduce), [x])
    assert all((t[1] == 0).all() for t in (out, first, second))
    for i in (0, 2):
        assert torch.equal(out[i], custom_ops.voxel_sum(x[i], rank[i], 6, reduce))
    depth, feat, ranks = cameras()
    ranks[0] = -1
    for t in with_gradients(custom_ops.bev_pool(depth, feat, ranks, 9), [depth, feat]):
        assert (t[0] == 0).all() and (t[1] != 0).any()


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_what_lies_outside_of_the_grid_is_never_read(value):
    """NaN or infinite features of a pixel all of whose points are outside, and depths of points outside, are never
    read.
    """
    depth, feat, rank = cameras()
    rank[:, :, :, 1, 2] = -1
    clean = with_gradients(custom_ops.bev_pool(depth, feat, rank, 9), [depth, feat])
    dirty = [t.detach().clone() for t in (depth, feat)]
    dirty[0][rank < 0] = value
    dirty[1][..., 1, 2] = value
    dirty = [t.requires_grad_() for t in dirty]
    for got, expected in zip(with_gradients(custom_ops.bev_pool(*dirty, rank, 9), dirty), clean):
        assert torch.equal(got, expected)
    assert (clean[1][rank < 0] == 0).all() and (clean[2][..., 1, 2] == 0).all()


@pytest.mark.parametrize("voxels", [1, 7])
@pytest.mark.parametrize("columns", [1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 130])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_number_of_columns_and_one_voxel(columns, voxels, dtype):
    """All numbers of columns work, whatever is left over after whole vectors, for short and for long voxels."""
    rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    x, rank = torch.randn(700, columns, dtype=torch.float64).to(dtype), torch.randint(-1, voxels, (700,))
    depth, feat, ranks = cameras((1, 2, 4, 3, 5), columns, voxels, dtype)
    for reduce in REDUCTIONS:
        leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        out, truth = custom_ops.voxel_sum(leaf, rank, voxels, reduce), voxel_sum_reference(exact, rank, voxels, reduce)
        grad = torch.randn(truth.shape, dtype=torch.float64).to(dtype)
        check([out], [truth], rounding)
        check(torch.autograd.grad(out, leaf, grad), torch.autograd.grad(truth, exact, grad.double()), rounding)
    exact = [t.detach().double().requires_grad_() for t in (depth, feat)]
    out, truth = custom_ops.bev_pool(depth, feat, ranks, voxels), bev_pool_reference(*exact, ranks, voxels)
    grad = torch.randn(truth.shape, dtype=torch.float64).to(dtype)
    check([out], [truth], rounding)
    check(torch.autograd.grad(out, [depth, feat], grad), torch.autograd.grad(truth, exact, grad.double()), rounding)


def check(got, truth, rounding):
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(
            a.double(), b, rtol=rounding, atol=rounding * max(b.detach().abs().max().item(), 1.0)
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_same_bits_on_any_number_of_threads(dtype):
    """The ranks are as skewed as a LiDAR scan's: one voxel with a tenth of the points, many with one, some points
    outside.
    """
    generator = torch.Generator().manual_seed(0)
    rank = (torch.rand(60_000, generator=generator) ** 6 * 3000).long()
    rank[torch.rand(60_000, generator=generator) < 0.1] = -1
    assert rank.clamp_min(0).bincount().max() > 6000
    x = torch.randn(60_000, 20, generator=generator).to(dtype).requires_grad_()
    weight = torch.rand(60_000, generator=generator).to(dtype).requires_grad_()
    ordered = rank.sort().values
    depth = weight.detach().view(1, 2, 30, 25, 40).requires_grad_()
    feat = torch.randn(1, 2, 20, 25, 40, generator=generator).to(dtype).requires_grad_()
    perm, indptr = custom_ops.voxel_csr(rank, 3000)

    def run():
        results = [*custom_ops.voxel_csr(rank, 3000)]
        for reduce in REDUCTIONS:
            results += with_gradients(custom_ops.voxel_sum(x, rank, 3000, reduce), [x])
        results += with_gradients(custom_ops.segment_sum(x, indptr, perm, weight), [x, weight])
        results += with_gradients(custom_ops.voxels_summing(x, ordered[:, None], ordered)[0], [x])
        return results + with_gradients(custom_ops.bev_pool(depth, feat, rank.view(depth.shape), 3000), [depth, feat])

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run()
        for threads in (2, 4):
            torch.set_num_threads(threads)
            assert all(torch.equal(*pair) for pair in zip(alone, run(), strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-3)])
@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("voxels", [1, 1000, 100_000])
def test_accuracy_at_a_million_points(voxels, positive, dtype, tolerance):
    """The relative rms error of sums, means, weighted sums and their gradients is small, even for positive terms."""
    if voxels == 1 and dtype == torch.bfloat16:
        tolerance = 2**-8  # only four numbers, each rounded by up to half a unit in the last place
    generator = torch.Generator().manual_seed(voxels)
    draw = torch.rand if positive else torch.randn
    rank = torch.randint(0, voxels, (1_000_000,), generator=generator)
    x, depth, feat = (
        draw(shape, generator=generator).to(dtype).requires_grad_()
        for shape in ((1_000_000, 4), (1, 1, 100, 100, 100), (1, 1, 4, 100, 100))
    )
    perm, indptr = custom_ops.voxel_csr(rank, voxels)
    ordered = rank.sort().values
    grad = draw(voxels, 4, generator=generator).to(dtype)
    calls = {
        "voxel_sum": (lambda x: custom_ops.voxel_sum(x, rank, voxels), [x], grad),
        "mean": (lambda x: custom_ops.voxel_sum(x, rank, voxels, "mean"), [x], grad),
        "segment_sum": (lambda x, d: custom_ops.segment_sum(x, indptr, perm, d.flatten()), [x, depth], grad),
        "voxels_summing": (lambda x: custom_ops.voxels_summing(x, x, ordered)[0], [x], None),
        "bev_pool": (
            lambda d, f: custom_ops.bev_pool(d, f, rank.view(1, *depth.shape[1:]), voxels)[0],
            [depth, feat],
            grad,
        ),
    }
    for name, (function, leaves, grad_out) in calls.items():
        exact = [t.detach().double().requires_grad_() for t in leaves]
        out, truth = function(*leaves), function(*exact)
        grad_out = torch.ones_like(out) if grad_out is None else grad_out
        got = [out, *torch.autograd.grad(out, leaves, grad_out)]
        for a, b in zip(got, [truth, *torch.autograd.grad(truth, exact, grad_out.double())]):
            assert ((a.double() - b).norm() / b.norm()).item() <= tolerance, name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2**-11)])
@pytest.mark.parametrize("voxels", [1, 50])
def test_accuracy_of_the_triton_kernels(voxels, dtype, tolerance):
    """The kernels are accurate on as many points as the interpreter can take. (It truncates to bfloat16, a GPU
    rounds.)
    """
    torch.manual_seed(0)
    rank = torch.randint(0, voxels, (3000,)).where(torch.rand(3000) < 0.5, 0)
    x, weight = torch.rand(3000, 16).to(dtype).requires_grad_(), torch.rand(3000).to(dtype).requires_grad_()
    perm, indptr = custom_ops.voxel_csr(rank, voxels)
    grad = torch.rand(voxels, 16).to(dtype)
    for function, leaves in (
        (lambda x: custom_ops.voxel_sum(x, rank, voxels), [x]),
        (lambda x: custom_ops.voxel_sum(x, rank, voxels, "mean"), [x]),
        (lambda x, w: custom_ops.segment_sum(x, indptr, perm, w), [x, weight]),
    ):
        exact = [t.detach().double().requires_grad_() for t in leaves]
        truth = function(*exact)
        with backend("triton"):
            out = function(*leaves)
            got = [out, *torch.autograd.grad(out, leaves, grad)]
        for a, b in zip(got, [truth, *torch.autograd.grad(truth, exact, grad.double())]):
            assert ((a.double() - b).norm() / b.norm()).item() <= tolerance


# ---------------------------------------------------------------- more than 2^31 elements

POINTS, COLUMNS = 2**25 + 3, 64


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_more_than_two_to_the_31_elements_of_points(dtype, reduce):
    x = torch.zeros(POINTS, COLUMNS, dtype=dtype)
    x[-1], x[-2], x[5] = 3, 5, 7
    rank = torch.full((POINTS,), -1, dtype=torch.int32)
    rank[-1], rank[-2], rank[5] = 1, 0, 1
    x.requires_grad_()
    out = custom_ops.voxel_sum(x, rank, 2, reduce)
    share = 0.5 if reduce == "mean" else 1.0
    assert (out == torch.tensor([[5.0], [10 * share]])).all()
    (grad,) = torch.autograd.grad(out[1].sum(), x)
    assert grad[-1].eq(share).all() and grad[5].eq(share).all() and grad[-2].eq(0).all() and grad[1000].eq(0).all()


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_more_than_two_to_the_31_elements_of_voxels(dtype):
    x = torch.ones(2, COLUMNS, dtype=dtype, requires_grad=True)
    out = custom_ops.voxel_sum(x, torch.tensor([POINTS - 1, 0]), POINTS)
    assert out[-1].eq(1).all() and out[0].eq(1).all() and out[1].eq(0).all() and out[-2].eq(0).all()
    grad = torch.zeros_like(out.detach())
    grad[-1] = 3
    assert torch.autograd.grad(out, x, grad)[0].tolist() == [[3] * COLUMNS, [0] * COLUMNS]


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_more_than_two_to_the_31_elements_pooled(dtype):
    """Features and voxels have that many elements at once, and the last of both has one point."""
    feat = torch.zeros(1, 1, POINTS, 1, COLUMNS, dtype=dtype)  # memory order channels last, as the kernels read it
    feat[0, 0, -1] = 3
    feat = feat.permute(0, 1, 4, 2, 3).requires_grad_()
    depth = torch.full((1, 1, 1, POINTS, 1), 2.0, dtype=dtype)
    rank = torch.full(depth.shape, -1, dtype=torch.int32)
    rank[..., -1, 0] = POINTS - 1
    out = custom_ops.bev_pool(depth, feat, rank, POINTS)
    assert out[0, -1].eq(6).all() and out[0, 0].eq(0).all() and out[0, -2].eq(0).all()
    total = out.view(-1, COLUMNS)[-1].sum()
    del out
    (grad,) = torch.autograd.grad(total, feat)
    assert grad[0, 0, :, -1].eq(2).all() and grad[0, 0, :, -2].eq(0).all()


def test_offsets_past_2_to_the_31_in_the_triton_kernels():
    """One interpreted program of each kernel reads the end of 4 GiB that are never touched elsewhere."""
    from custom_ops.triton_kernels import voxel_segments as kernels

    rows, width = POINTS, COLUMNS
    # Pages that nothing reads take no memory.
    x = torch.from_numpy(np.zeros((rows, width), np.int16)).view(torch.float16)
    x[-2:] = torch.tensor([[3.0], [5.0]])
    indptr, nothing = torch.tensor([rows - 2, rows]), torch.empty(0)
    perm = torch.from_numpy(np.zeros(rows, np.int64))
    perm[-2:] = torch.tensor([rows - 1, rows - 2])
    out, at = torch.empty(1, width, dtype=torch.float16), torch.empty(1, width, dtype=torch.int64)
    partial, partial_at = nothing.float(), nothing.long()
    sizes = (rows, rows, 1, width, 1, 1, 1, 0, 0, 0, 1)  # points, rows, segments, columns, bins, plane, pieces, ...
    for ordered, kind in ((False, kernels._SUM), (True, kernels._SUM), (True, kernels._MAX)):
        tensors = (x, x, indptr, perm, perm, x, partial, partial_at, out, at)
        kernels.segment_reduce_kernel(1, *tensors, *sizes, variant=(width, ordered, False, False, kind.value))
        assert out.eq(5 if kind == kernels._MAX else 8).all()
        if kind == kernels._MAX:
            assert at.eq(rows - 1).all()
    # The spreading kernels read two rows of x in the last segments.
    rank, bounds = torch.tensor([rows - 1, rows - 2]), torch.from_numpy(np.zeros(rows + 1, np.int64))
    grad, dots = torch.empty(2, width, dtype=torch.float16), torch.empty(2, dtype=torch.float16)
    ones = torch.ones(2, width, dtype=torch.float16)
    kernels.segment_spread_rows_kernel(
        1, *(x, x, bounds, rank, grad), *(rows, 2, width, 1, 1, 1, 1, 0, 0), variant=(width, False)
    )
    assert torch.equal(grad[:, 0], torch.tensor([5.0, 3.0]).half())
    kernels.segment_spread_dots_kernel(
        1, *(x, ones, bounds, rank, dots), *(rows, 2, width, 1, 1, 1, 0, 0), variant=width
    )
    assert torch.equal(dots, width * torch.tensor([5.0, 3.0]).half())


def test_a_plane_without_pixels_after_others_in_a_compiled_program():
    compiled = torch.compile(custom_ops.bev_pool, backend="aot_eager", dynamic=True, fullgraph=True)
    for bins, height, width in ((3, 2, 2), (4, 3, 2), (3, 0, 2), (0, 2, 2), (3, 2, 0)):
        depth, feat = torch.rand(2, 2, bins, height, width), torch.rand(2, 2, 4, height, width)
        rank = torch.randint(-1, 6, depth.shape)
        torch.testing.assert_close(compiled(depth, feat, rank, 6), custom_ops.bev_pool(depth, feat, rank, 6))
