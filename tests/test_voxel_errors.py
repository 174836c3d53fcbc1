"""Wrong geometry raises an error that names its argument; on a GPU, which can't raise, the result is NaN."""

from __future__ import annotations

import itertools

import pytest
import torch

import custom_ops
from custom_ops.verify._backends import backend
from custom_ops.voxel.voxel_grid import voxel_match

VOXELS = 50
OTHER = r"^csr: expected voxel_csr\(rank, num_voxels\), got one of other ranks"


def frame(batch=(), points=1000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rank = torch.randint(-1, VOXELS, (*batch, points), generator=generator)
    return torch.randn(*batch, points, 2, generator=generator), rank, custom_ops.voxel_csr(rank, VOXELS)


def pool(rank, csr):
    """Run `bev_pool` on as many points."""
    depth = torch.ones(*([1] if rank.dim() == 1 else [len(rank)]), 1, rank.shape[-1], 1, 1)
    feat = torch.ones(len(depth), 1, 2, 1, 1)
    return custom_ops.bev_pool(depth, feat, rank.view(depth.shape), VOXELS, tuple(t.view(len(depth), -1) for t in csr))


@pytest.mark.parametrize("points", [3, 256, 257, 500, 1000, 100_000])
def test_a_csr_of_other_ranks_raises(points):
    x, rank, (perm, indptr) = frame(points=points)
    others = [custom_ops.voxel_csr(rank.roll(1), VOXELS), custom_ops.voxel_csr(rank.clamp_min(0) * 0 + 7, VOXELS)]
    others += [(perm.roll(points // 2), indptr), (perm, torch.zeros_like(indptr)), (perm, indptr + 1)]
    for at in (0, points // 2, points - 1):  # one point is in another voxel, or in none
        moved = rank.clone()
        moved[at] = -1 if rank[at] > 20 else 30
        others.append(custom_ops.voxel_csr(moved, VOXELS))
    swapped = perm.clone()  # the same points in another order, which would change the first of equal ones
    first = int((indptr.diff() > 1).nonzero()[0]) if (indptr.diff() > 1).any() else None
    if first is not None:
        swapped[indptr[first] : indptr[first] + 2] = perm[indptr[first] : indptr[first] + 2].flip(0)
        others.append((swapped, indptr))
    for csr in others:
        with pytest.raises(RuntimeError, match=OTHER):
            custom_ops.voxel_sum(x, rank, VOXELS, csr=csr)
        with pytest.raises(RuntimeError, match=OTHER):
            pool(rank, csr)


def test_a_csr_of_other_ranks_in_one_example_raises():
    x, rank, (perm, indptr) = frame((3,))
    perm = torch.stack([perm[0], perm[1], perm[0]])
    for run in (lambda csr: custom_ops.voxel_sum(x, rank, VOXELS, csr=csr), lambda csr: pool(rank, csr)):
        with pytest.raises(RuntimeError, match=OTHER):
            run((perm, indptr))


@pytest.mark.parametrize("name", ["cpp", "triton"])
def test_of_all_orders_and_boundaries_only_those_of_the_ranks_match(name):
    orders = torch.tensor([*itertools.permutations(range(3)), (0, 0, 1), (1, 2, 2)])
    boundaries = torch.cartesian_prod(*[torch.arange(4)] * 3)
    pairs = [t.flatten(0, 1) for t in (orders[:, None].expand(-1, 64, 3), boundaries.expand(8, -1, 3))]
    with backend(name):
        for ranks in ([1, 0, 1], [0, 0, -1], [-1, 1, -1]):
            rank, right = torch.tensor(ranks), custom_ops.voxel_csr(torch.tensor(ranks), 2)
            are_right = (pairs[0] == right[0]).all(-1) & (pairs[1] == right[1]).all(-1)
            if name == "triton":
                matches = (voxel_match(rank.expand(len(are_right), 3), *pairs) == pairs[1]).all(-1)
            else:
                matches = torch.tensor([_is_matched(rank, *csr) for csr in zip(*pairs)])
                sums = torch.tensor([_is_matched(rank, *csr, summed=True) for csr in zip(*pairs)])
                assert torch.equal(sums, are_right)
            assert are_right.sum() == 1
            assert torch.equal(matches, are_right)


def _is_matched(rank, perm, indptr, summed=False):
    try:
        if summed:
            return custom_ops.voxel_sum(torch.ones(3, 1), rank, 2, csr=(perm, indptr)) is not None
        return torch.equal(voxel_match(rank, perm, indptr), indptr)
    except RuntimeError:
        return False


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_one_point_elsewhere_raises_in_long_voxels_and_among_the_rest(index):
    """Points are compared across the ends of the parts of a long voxel, and those in no voxel by themselves."""
    rank = torch.cat([torch.arange(3000) % 7, torch.full((200,), -1)])[torch.randperm(3200)].to(index)
    rank[:600] = 3
    perm, indptr = custom_ops.voxel_csr(rank, 7)
    x, depth, feat = torch.randn(3200, 2), torch.rand(1, 2, 16, 10, 10), torch.randn(1, 2, 3, 10, 10)
    runs = (
        lambda csr: custom_ops.voxel_sum(x, rank, 7, csr=csr),
        lambda csr: custom_ops.voxel_sum(x.expand(2, 3200, 2), rank, 7, "mean", csr=csr),
        lambda csr: custom_ops.bev_pool(depth, feat, rank.view(2, 16, 10, 10), 7, csr),
    )
    for run in runs:
        run((perm, indptr))
        for place in (*range(int(indptr[3]) + 254, int(indptr[3]) + 258), int(indptr[4]) - 1, int(indptr[-1]) + 5):
            swapped, doubled = perm.clone(), perm.clone()
            swapped[place], swapped[place + 1] = perm[place + 1], perm[place]
            doubled[place] = perm[place - 1]
            for wrong in (swapped, doubled):
                with pytest.raises(RuntimeError, match=OTHER):
                    run((wrong, indptr))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p, i: p, TypeError, r"csr: expected \(perm, indptr\) as from voxel_csr, got Tensor"),
        (lambda p, i: (p, i, i), TypeError, r"csr: expected \(perm, indptr\) as from voxel_csr, got tuple"),
        (lambda p, i: (p, None), TypeError, "csr: expected a tensor, got NoneType"),
        (lambda p, i: (p, i.double()), TypeError, "csr: expected one of int32, int64, got float64"),
        (lambda p, i: (p.to("meta"), i), ValueError, "csr: expected on cpu as rank, got meta"),
        (lambda p, i: (p[1:], i), ValueError, r"csr: expected perm \[1000\] and indptr \[51\] .*\[999\] and \[51\]"),
        (lambda p, i: (p, i[1:]), ValueError, r"csr: expected perm \[1000\] and indptr \[51\] .*\[1000\] and \[50\]"),
        (lambda p, i: (p[None], i[None]), ValueError, r"csr: expected perm \[1000\] and indptr \[51\]"),
        (lambda p, i: (p - 2**40, i), RuntimeError, OTHER[1:]),
        (lambda p, i: (p + 1, i), RuntimeError, "(csr|perm): expected"),
        (lambda p, i: (p, i.flip(0)), RuntimeError, OTHER[1:]),
        (lambda p, i: (p, i - 1), RuntimeError, OTHER[1:]),
    ],
)
def test_what_is_no_csr_raises(change, error, message):
    x, rank, csr = frame()
    with pytest.raises(error, match=f"^{message}"):
        custom_ops.voxel_sum(x, rank, VOXELS, csr=change(*csr))


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.int32, VOXELS),
        (torch.int32, 2**31 - 1),
        (torch.int64, VOXELS),
        (torch.int64, 2**31),
        (torch.int64, 2**62),
    ],
)
def test_a_rank_past_the_grid_raises(dtype, value, batch):
    layer, bev = custom_ops.VoxelSum(VOXELS), custom_ops.BEVPool(VOXELS)
    x, rank, _ = frame(batch)
    rank = rank.to(dtype)
    rank.view(-1)[-1] = value
    ranks = rank.view(-1, 1, 1000, 1, 1)
    depth, feat = torch.ones(ranks.shape), torch.ones(len(ranks), 1, 2, 1, 1)
    for run in (
        lambda: custom_ops.voxel_csr(rank, VOXELS),
        lambda: custom_ops.voxel_sum(x, rank, VOXELS),
        lambda: custom_ops.voxel_sum(x, rank, VOXELS, "max", rank >= 0),
        lambda: custom_ops.bev_pool(depth, feat, ranks, VOXELS),
        lambda: layer(x, rank),
        lambda: layer.set_geometry(rank),
        lambda: bev(depth, feat, ranks),
        lambda: bev.set_geometry(ranks),
    ):
        with pytest.raises(RuntimeError, match=f"^rank: expected values below num_voxels=50, got {value}"):
            run()
    assert layer._cached is layer._was_set is bev._cached is bev._was_set is None
    out = custom_ops.voxel_sum(x, rank, VOXELS, mask=rank < VOXELS)  # a masked rank may be anything
    assert out.isfinite().all()


def test_a_negative_grid_raises():
    x, rank, _ = frame(points=8)
    ranks, one = rank.view(1, 1, 8, 1, 1), (1.0, 1.0, 1.0)
    for run, name in (
        (lambda: custom_ops.voxel_rank(torch.ones(2, 3), one, one, (4, -1, 4)), "grid_size"),
        (lambda: custom_ops.LiftSplat((2, 2), (1, 1), [1.0], one, one, (4, 4, -1)), "grid_size"),
        (lambda: custom_ops.voxel_csr(rank, -1), "num_voxels"),
        (lambda: custom_ops.voxel_sum(x, rank, -1), "num_voxels"),
        (lambda: custom_ops.bev_pool(torch.ones(ranks.shape), torch.ones(1, 1, 2, 1, 1), ranks, -1), "num_voxels"),
        (lambda: custom_ops.VoxelSum(-1), "num_voxels"),
        (lambda: custom_ops.BEVPool(-1), "num_voxels"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected at least 0, got -1"):
            run()


@pytest.mark.parametrize("name", ["cpp", "triton"])
@pytest.mark.parametrize("batch", [2**60, 2**61, 2**62 + 1, 2**63 - 1])
def test_ranks_that_int64_cant_hold_never_wrap_around(batch, name):
    """With 8 voxels per grid, 2^61 grids would wrap around to 0."""
    points, grid = torch.tensor([[0.5, 0.5, 1.5]]), ((0, 0, 0), (1, 1, 1), (2, 2, 2))
    with backend(name):
        rank = custom_ops.voxel_rank(points, *grid, torch.tensor([batch]))
    assert rank >= 2**62
    with pytest.raises(RuntimeError, match="^rank: expected values below num_voxels=16, got"):
        custom_ops.voxel_csr(rank, 16)
    none = custom_ops.voxel_rank(points, *grid[:2], (0, 2, 2), torch.tensor([batch]))
    assert none.tolist() == [-1]


@pytest.mark.parametrize("grid", [(2**63, 1, 1), (2**40, 2**40, 1)])
def test_grids_that_int64_cant_count_raise(grid):
    voxels, x, rank = grid[0] * grid[1], torch.ones(2, 1), torch.tensor([0, 1])
    arrays, depth = [torch.zeros(0, dtype=torch.int32)] * 5, torch.ones(1, 1, 1, 1, 1)
    for name, run in (
        ("grid_size", lambda: custom_ops.voxel_rank(torch.ones(2, 3), (0, 0, 0), (1, 1, 1), grid)),
        ("grid_size", lambda: custom_ops.LiftSplat((2, 2), (1, 1), [1.0], (0, 0, 0), (1, 1, 1), grid)),
        ("num_voxels", lambda: custom_ops.voxel_csr(rank, voxels)),
        ("num_voxels", lambda: custom_ops.voxel_sum(x, rank, voxels)),
        ("num_voxels", lambda: custom_ops.VoxelSum(voxels)),
        ("bev_feat_shape", lambda: custom_ops.bev_pool_v2(depth, depth, *arrays[:3], (1, *grid, 1), *arrays[3:])),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected less than 2\\^63, got"):
            run()


@pytest.mark.parametrize("value", [VOXELS, 2**31, 2**62])
def test_on_a_gpu_a_rank_past_the_grid_makes_its_example_nan(value):
    """An out-of-range rank reads no memory; the interpreted launchers would read real memory."""
    x, rank, _ = frame((2,), points=40)
    x.requires_grad_()
    past = rank.clone()
    past[0, 7] = value
    depth, feat = torch.rand(2, 1, 40, 1, 1, requires_grad=True), torch.rand(2, 1, 2, 1, 1, requires_grad=True)
    ranks = [r.view(depth.shape) for r in (rank, past)]
    with backend("triton"):
        for reduce in ("sum", "mean", "max"):
            expected, out = (custom_ops.voxel_sum(x, r, VOXELS, reduce) for r in (rank, past))
            grads = [torch.autograd.grad(y.sum(), x)[0] for y in (expected, out)]
            assert out[0].isnan().all() and torch.equal(out[1], expected[1]) and torch.equal(grads[0][1], grads[1][1])
            assert (grads[1][0] == 0).all() if reduce == "max" else grads[1][0].isnan().all()
        expected, out = (custom_ops.bev_pool(depth, feat, r, VOXELS) for r in ranks)
        assert out[0].isnan().all() and torch.equal(out[1], expected[1])
        assert all(g[0].isnan().all() and g[1].isfinite().all() for g in torch.autograd.grad(out.sum(), (depth, feat)))
        masked = custom_ops.voxel_sum(x, past, VOXELS, mask=past < VOXELS)
        assert masked.isfinite().all()


def test_on_a_gpu_a_csr_of_anything_is_nan_and_reaches_no_other_memory():
    around = torch.full((120, 2), 1e30)
    x = around[40:80]
    x[:] = 1
    _, rank, (perm, indptr) = frame(points=40)
    for csr in ((perm - 30, indptr), (perm * 2**40, indptr), (perm, indptr * 2**40 - 7), (perm, indptr.flip(0))):
        for reduce in ("sum", "mean", "max"):
            leaf = x.clone().requires_grad_()
            with backend("triton"):
                out = custom_ops.voxel_sum(leaf, rank, VOXELS, reduce, csr=csr)
                (grad,) = torch.autograd.grad(out.sum(), leaf)
            assert out.isnan().all() and (grad.isnan() | (grad == 0)).all()


def test_on_a_gpu_what_is_no_geometry_of_segment_sum_is_nan():
    x = torch.ones(6, 2, requires_grad=True)
    for indptr, perm, rows in (
        ([0, 4, 2, 6], None, [1]),
        ([-1, 2, 3, 6], None, [0]),
        ([0, 2, 3, 7], None, [2]),
        ([0, 2, 3, 6], [0, 1, 2, 3, 4, 6], [2]),
        ([0, 2, 3, 6], [-1, 1, 2, 3, 4, 5], [0]),
    ):
        given = [None if t is None else torch.tensor(t) for t in (indptr, perm)]
        with backend("triton"):
            out = custom_ops.segment_sum(x, *given)
            (grad,) = torch.autograd.grad(out.sum(), x)
        assert out[rows].isnan().all()
        assert perm is None or grad.isnan().any()
    with backend("triton"):  # summing a point twice is allowed, but the gradient needs a permutation
        out = custom_ops.segment_sum(x, torch.tensor([0, 2, 3, 6]), torch.tensor([0, 0, 2, 3, 4, 5]))
        assert torch.autograd.grad(out.sum(), x)[0][1].isnan().all()
