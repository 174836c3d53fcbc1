"""Properties of pooling into voxels beyond the battery: masks, skew, accuracy, reused geometry, sizes."""

from __future__ import annotations

import pytest
import torch

import custom_ops
from custom_ops.voxel.specs.pooling import bev_pool_reference
from custom_ops.voxel.specs.sums import voxel_sum_reference
from custom_ops.voxel.specs.voxel_grid import voxel_csr_reference
from custom_ops.voxel.voxel_segments import segment_extreme, segment_reduce, segment_spread

NAN = float("nan")
REDUCTIONS = ("sum", "mean", "max")


def threads_agree(run):
    """Return the result after checking that it is bitwise the same on one thread and on several."""
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
    return results[0]


def lidar_like(points, voxels, seed=0):
    """Return ranks as skewed as a scan's: a few voxels with thousands of points, many with one, some points outside."""
    generator = torch.Generator().manual_seed(seed)
    rank = (torch.rand(points, generator=generator) ** 6 * voxels).long()
    return torch.where(torch.rand(points, generator=generator) < 0.1, -1, rank)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_masked_points_count_nowhere_even_as_nan(reduce):
    x = torch.randn(2, 40, 5, dtype=torch.float64)
    rank = torch.randint(-1, 6, (2, 40))
    mask = torch.rand(2, 40) < 0.7
    clean = x.clone().requires_grad_()
    expected = custom_ops.voxel_sum(clean, rank, 6, reduce, mask)
    x[~(mask & (rank >= 0))] = NAN
    x.requires_grad_()
    out = custom_ops.voxel_sum(x, rank, 6, reduce, mask)
    assert torch.equal(out, expected)
    (out**2).sum().backward()
    (expected**2).sum().backward()
    assert torch.equal(x.grad, clean.grad)
    assert (x.grad[~(mask & (rank >= 0))] == 0).all()
    grad, second = (
        torch.autograd.grad((custom_ops.voxel_sum(x, rank, 6, reduce, mask) ** 2).sum(), x, create_graph=True)[0],
        None,
    )
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert second.isfinite().all()


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_empty_voxels_are_zero(reduce):
    x = torch.randn(3, 2, requires_grad=True)
    for rank, voxels in ((torch.tensor([4, 4, -1]), 6), (torch.tensor([-1, -1, -1]), 2)):
        out = custom_ops.voxel_sum(x, rank, voxels, reduce)
        filled = torch.zeros(voxels, dtype=torch.bool).index_fill(0, rank[rank >= 0], True)
        assert (out[~filled] == 0).all()
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert (grad[rank < 0] == 0).all()
    assert custom_ops.voxel_sum(x, rank, 0, reduce).shape == (0, 2)
    assert custom_ops.voxel_sum(x[:0], rank[:0], 3, reduce).tolist() == [[0, 0]] * 3
    # One example of the batch has no point in the grid.
    batch, ranks = torch.randn(2, 5, 3), torch.stack([torch.full((5,), -1), torch.arange(5)])
    assert torch.equal(custom_ops.voxel_sum(batch, ranks, 5, reduce), torch.stack([torch.zeros(5, 3), batch[1]]))


@pytest.mark.usefixtures("each_backend")
def test_max_is_the_first_of_equals_and_nan_above_all():
    x = torch.tensor([1.0, 3, 3, 2, NAN, 5, float("-inf")])[:, None].requires_grad_()
    out = custom_ops.voxel_sum(x, torch.tensor([0, 0, 0, 0, 1, 1, 2]), 4, "max")
    torch.testing.assert_close(out.flatten(), torch.tensor([3, NAN, float("-inf"), 0]), equal_nan=True)
    out.backward(torch.tensor([[1.0], [10], [100], [1000]]))
    assert x.grad.flatten().tolist() == [0, 1, 0, 0, 10, 0, 100]


def test_max_goes_to_the_first_across_the_parts_of_a_long_voxel():
    x = torch.zeros(5000, 3)
    x[[700, 1500, 4999], 1] = 7
    x[[300, 4000], 2] = NAN
    perm = torch.randperm(5000)
    indptr = torch.tensor([0, 5000])
    out, argmax = segment_extreme(x, indptr, None, True)
    assert argmax.tolist() == [[0, 700, 300]]
    out, argmax = segment_extreme(x.index_select(0, perm.argsort()), indptr, perm, True)
    assert argmax.tolist() == [[perm[0], perm[700], perm[300]]]
    assert out[0, 1] == 7 and out[0, 2].isnan()


@pytest.mark.parametrize("columns", [1, 3, 16, 64, 100])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_skew(reduce, columns):
    rank = lidar_like(60_000, 3000)
    assert rank.clamp_min(0).bincount().max() > 5000
    x = torch.randn(60_000, columns, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3000, columns, dtype=torch.float64)

    def run(function):
        out = function(x, rank, 3000, reduce)
        return out.detach(), *torch.autograd.grad((out * weight).sum(), x)

    for got, want in zip(threads_agree(lambda: run(custom_ops.voxel_sum)), run(voxel_sum_reference)):
        torch.testing.assert_close(got, want)


def test_pooling_of_many_pixels():
    shape = (2, 3, 11, 8, 22)
    depth = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    feat = torch.randn(2, 3, 70, 8, 22, dtype=torch.float64, requires_grad=True)
    rank = lidar_like(depth.numel(), 900).view(shape)
    csr = custom_ops.voxel_csr(rank.flatten(1), 900)
    weight = torch.randn(2, 900, 70, dtype=torch.float64)

    def run(function, *extra):
        out = function(depth, feat, rank, 900, *extra)
        return out.detach(), *torch.autograd.grad((out * weight).sum(), (depth, feat))

    expected = run(bev_pool_reference)
    for results in (threads_agree(lambda: run(custom_ops.bev_pool)), run(custom_ops.bev_pool, csr)):
        for got, want in zip(results, expected):
            torch.testing.assert_close(got, want)


def test_pooling_promotes_as_under_autocast():
    depth, feat, rank = torch.rand(1, 1, 2, 1, 2), torch.rand(1, 1, 3, 1, 2), torch.zeros(1, 2, 1, 2, dtype=torch.int64)
    out = custom_ops.bev_pool(depth, feat.bfloat16(), rank, 1)
    assert torch.equal(out, custom_ops.bev_pool(depth, feat.bfloat16().float(), rank, 1))


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("shape", [(0, 1, 2, 1, 2), (1, 0, 2, 1, 2), (1, 1, 0, 1, 2), (1, 1, 2, 0, 2)])
def test_pooling_of_nothing(shape):
    depth = torch.rand(shape, requires_grad=True)
    feat = torch.rand(*shape[:2], 3, *shape[3:], requires_grad=True)
    out = custom_ops.bev_pool(depth, feat, torch.zeros(shape, dtype=torch.int64), 4)
    assert torch.equal(out, torch.zeros(shape[0], 4, 3))
    grads = torch.autograd.grad(out.sum(), (depth, feat))
    assert [(g == 0).all() and g.shape for g in grads] == [depth.shape, feat.shape]


# ---------------------------------------------------------------- reused geometry


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [64, 4, 1])
def test_every_16_bit_number_is_its_own_sum(columns, dtype):
    x = torch.arange(2**16).short().view(dtype).view(-1, columns)
    out = custom_ops.segment_sum(x, torch.arange(len(x) + 1))
    torch.testing.assert_close(out, x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_results_too_large_for_the_caches(reduce, dtype):
    x = torch.randint(-4, 5, (70_000, 64)).to(dtype).requires_grad_()
    rank = torch.randint(-1, 10_000, (70_000,)) * 8
    rank = torch.where(rank < 0, -1, rank)
    out = custom_ops.voxel_sum(x, rank, 80_000, reduce)
    expected = voxel_sum_reference(x.double(), rank, 80_000, reduce)
    torch.testing.assert_close(out, expected.to(dtype))
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    torch.testing.assert_close(grad, torch.autograd.grad(expected, x, torch.ones_like(expected))[0])


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_reused_geometry(reduce):
    x, rank = torch.randn(2, 50, 3), torch.randint(-1, 7, (2, 50))
    csr = custom_ops.voxel_csr(rank, 7)
    assert torch.equal(custom_ops.voxel_sum(x, rank, 7, reduce, csr=csr), custom_ops.voxel_sum(x, rank, 7, reduce))
    shared = custom_ops.voxel_csr(rank[0], 7)
    both = custom_ops.voxel_sum(x, rank[0], 7, reduce, csr=shared)
    assert torch.equal(both, custom_ops.voxel_sum(x, rank[:1].expand(2, 50), 7, reduce))
    batched = torch.func.vmap(lambda x: custom_ops.voxel_sum(x, rank[0], 7, reduce, csr=shared))(x)
    assert torch.equal(batched, both)


def test_reused_geometry_of_other_ranks_raises():
    rank = torch.randint(0, 50, (1000,))
    perm, indptr = custom_ops.voxel_csr(rank, 50)
    x = torch.ones(1000, 1)
    for csr in ((perm.flip(0), indptr), (perm, indptr.flip(0)), custom_ops.voxel_csr(rank.roll(1), 50)):
        with pytest.raises(RuntimeError, match=r"^csr: expected voxel_csr\(rank, num_voxels\)"):
            custom_ops.voxel_sum(x, rank, 50, csr=csr)
    with pytest.raises(RuntimeError, match="^csr"):
        custom_ops.voxel_sum(x, rank.where(rank != 7, -1), 50, csr=(perm, indptr))


def test_a_rank_past_the_grid_raises():
    depth, rank = torch.ones(1, 1, 3, 1, 1), torch.tensor([0, 4, -1])
    for run in (
        lambda: custom_ops.voxel_csr(rank, 4),
        lambda: custom_ops.voxel_sum(torch.ones(3, 1), rank, 4),
        lambda: custom_ops.bev_pool(depth, torch.ones(1, 1, 1, 1, 1), rank.view(1, 3, 1, 1), 4),
    ):
        with pytest.raises(RuntimeError, match="^rank: expected values below num_voxels=4, got 4"):
            run()


def test_a_repeated_point_is_no_permutation():
    x, weight = torch.ones(3, 1, requires_grad=True), torch.ones(3, requires_grad=True)
    for leaf in (x, weight):
        out = custom_ops.segment_sum(x, torch.tensor([0, 3]), torch.tensor([0, 0, 2]), weight)
        with pytest.raises(RuntimeError, match="^perm: expected a permutation of the points, got some of them twice"):
            torch.autograd.grad(out.sum(), leaf)


def test_csr_reference_of_many_points():
    for voxels in (1, 40, 5000, 200_000):
        for dtype in (torch.int32, torch.int64):
            rank = torch.randint(-1, voxels, (100_000,)).to(dtype)
            perm, indptr = threads_agree(lambda rank=rank, voxels=voxels: custom_ops.voxel_csr(rank, voxels))
            expected = voxel_csr_reference(rank, voxels)
            assert torch.equal(perm, expected[0])
            assert torch.equal(indptr, expected[1])


@pytest.mark.usefixtures("each_backend")
def test_rank_truncates_as_lift_splat_shoot():
    """Points up to one voxel below the box leak in with ``trunc`` and don't with ``floor``."""
    points = torch.rand(10_000, 3) * 4 - 1
    grid = ((0.0, 0.0, 0.0), (0.5, 0.5, 2.0), (4, 4, 1))
    cells = ((points - torch.zeros(3)) / torch.tensor(grid[1])).long()
    inside = ((cells >= 0) & (cells < torch.tensor(grid[2]))).all(-1)
    theirs = torch.where(inside, (cells[:, 0] * 4 + cells[:, 1]) * 1 + cells[:, 2], -1)
    assert torch.equal(custom_ops.voxel_rank(points, *grid, rounding="trunc"), theirs)
    floor = custom_ops.voxel_rank(points, *grid)
    below = (points < 0).any(-1)
    assert (floor[below] == -1).all()
    assert (theirs[below] >= 0).any()
    assert torch.equal(floor[~below], theirs[~below])


@pytest.mark.usefixtures("each_backend")
def test_rank_of_what_is_no_number():
    points = torch.tensor([[NAN, 0, 0], [float("inf"), 0, 0], [0, -float("inf"), 0], [1e30, 0, 0], [0, 0, 0]])
    ranks = custom_ops.voxel_rank(points, (0, 0, 0), (1, 1, 1), (2, 2, 2), torch.tensor([0, 0, 0, 0, 3]))
    assert ranks.tolist() == [-1, -1, -1, -1, 24]


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("indptr", [[0, 3, 2], [-1, 4], [0, 5], [0, 2**40], [4, 0]])
def test_corrupted_boundaries_never_reach_foreign_memory(indptr):
    x, boundaries = torch.ones(4, 2), torch.tensor(indptr)
    with pytest.raises(RuntimeError, match="^indptr: expected non-decreasing boundaries within"):
        custom_ops.segment_sum(x, boundaries)
    with pytest.raises(RuntimeError, match="^indptr"):
        segment_spread(torch.ones(len(indptr) - 1, 2), None, None, boundaries, None, 4, False, 1, 1, True)


@pytest.mark.parametrize("perm", [[0, 1, 4, 2], [-1, 1, 2, 3], [0, 2**40, 2, 3]])
def test_corrupted_points_never_reach_foreign_memory(perm):
    x, indptr, points = torch.ones(4, 2), torch.tensor([0, 4]), torch.tensor(perm)
    for run in (
        lambda: segment_reduce(x, None, indptr, points, False, 1, 1),
        lambda: segment_extreme(x, indptr, points, True),
        lambda: segment_spread(torch.ones(1, 2), None, None, indptr, points, 4, False, 1, 1, True),
    ):
        with pytest.raises(RuntimeError, match=r"^perm: expected points within \[0, 4\)"):
            run()


@pytest.mark.usefixtures("each_backend")
def test_points_outside_all_segments_count_nowhere():
    x = torch.arange(12.0).view(6, 2)
    indptr = torch.tensor([1, 3, 3, 4])
    assert custom_ops.segment_sum(x, indptr).tolist() == [[6, 8], [0, 0], [6, 7]]
    sums = torch.tensor([[1.0], [2.0], [3.0]])
    rows, _ = segment_spread(sums, None, None, indptr, None, 6, False, 1, 1, True)
    assert rows.flatten().tolist() == [0, 1, 1, 3, 0, 0]
