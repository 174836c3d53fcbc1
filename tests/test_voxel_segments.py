"""Reductions and softmax over segments, voxelisation, and the calls of other projects, beyond the battery."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from test_voxel_sums import lidar_like, threads_agree

import custom_ops
from custom_ops.triton_kernels import voxel_segments
from custom_ops.verify._backends import backend

NAN, INF = float("nan"), float("inf")
REDUCTIONS = ("sum", "mean", "prod", "min", "max", "logsumexp", "var", "std")


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("reduce", [*REDUCTIONS, "softmax"])
def test_points_in_no_segment_count_nowhere_even_as_nan(reduce):
    """Points before the first segment, between and behind them; segments without points; any order."""
    indptr, perm = torch.tensor([1, 3, 3, 6, 7]), torch.randperm(9)
    clean = torch.randn(9, 2, dtype=torch.float64)
    dirty = clean.clone()
    dirty[perm[[0, 7, 8]]] = NAN
    results = []
    for x in (clean.requires_grad_(), dirty.requires_grad_()):
        if reduce == "softmax":
            out = custom_ops.segment_softmax(x, indptr, perm)
        else:
            out = custom_ops.segment_reduce(x, indptr, reduce, perm)
            assert (out[1] == {"logsumexp": -INF, "prod": 1}.get(reduce, 0)).all()
        (grad,) = torch.autograd.grad(out.where(out.isfinite(), 0).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), x)
        results.append((out.detach(), grad.detach(), second))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert (results[1][1][perm[[0, 7, 8]]] == 0).all()


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_segments_that_share_a_program(reduce, monkeypatch):
    """Empty ones, a long one, one of no valid bounds, and a last program of fewer."""
    monkeypatch.setattr(voxel_segments, "_PROGRAMS", 1)
    x = torch.randn(2, 300, 70, dtype=torch.float64)
    bounds = torch.cat([torch.tensor([3, 3, 150]), torch.randint(150, 300, (18,)).sort().values])
    indptr = torch.stack([bounds, bounds + 1])
    expected = custom_ops.segment_reduce(x, indptr, reduce)
    with backend("triton"):
        torch.testing.assert_close(custom_ops.segment_reduce(x, indptr, reduce), expected)
        broken = torch.stack([bounds, bounds.flip(0)])
        assert custom_ops.segment_reduce(x, broken, reduce)[1].isnan().all(-1).sum() == (broken[1].diff() < 0).sum()


@pytest.mark.usefixtures("each_backend")
def test_equal_values_have_a_deviation_without_slope():
    x = torch.tensor([[2.0], [2.0], [5.0]], requires_grad=True)
    out = custom_ops.segment_reduce(x, torch.tensor([0, 2, 3]), "std")
    assert out.tolist() == [[0], [0]]
    assert torch.autograd.grad(out.sum(), x)[0].tolist() == [[0], [0], [0]]


@pytest.mark.usefixtures("each_backend")
def test_deviations_beside_large_numbers_are_exact():
    """In float32 the mean of these numbers is one of their neighbours."""
    x = torch.tensor([[1e8], [1e8 + 8], [1e8 + 16], [3e38], [3e38]], requires_grad=True)
    deviation = custom_ops.segment_reduce(x, torch.tensor([0, 3, 5]), "std")
    assert deviation.tolist() == [[8], [0]]
    deviation.sum().backward()
    assert x.grad.flatten().tolist() == [-0.5, 0, 0.5, 0, 0]


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integers(dtype):
    x, indptr = torch.tensor([3, 1, 200, 100, 9]).to(dtype), torch.tensor([0, 2, 2, 4])
    if dtype == torch.int64:
        x = x + 2**60  # float64 would round it
    big = 2**60 if dtype == torch.int64 else 0
    total = custom_ops.segment_sum(x, indptr)
    assert total.dtype == torch.int64
    assert total.tolist() == [4 + 2 * big, 0, 300 + 2 * big]
    low, at = custom_ops.segment_reduce(x, indptr, "min", return_indices=True)
    assert low.dtype == dtype
    assert (low.tolist(), at.tolist()) == ([1 + big, 0, 100 + big], [1, -1, 3])
    rank = torch.tensor([1, 0, 1, -1, 0])
    assert custom_ops.voxel_sum(x, rank, 2, "max").tolist() == [9 + big, 200 + big]
    product = custom_ops.segment_reduce(x - big if big else x, indptr, "prod")
    assert (product.dtype, product.tolist()) == (torch.int64, [3, 1, 20_000])


@pytest.mark.parametrize(("name", "length"), [("cpp", 300), ("triton", 140)])  # a long segment is divided
def test_products_have_the_derivatives_of_polynomials_where_points_are_zero(name, length):
    """No, one, two and three zeros in a segment, and a long one; every derivative up to the third, and tangents."""
    x = torch.randn(12 + length, 2, dtype=torch.float64)
    x[12:] = 1 + x[12:] / 30
    x[[1, 3, 5, 6, 7, 8, 40, 11 + length]] = 0
    indptr, perm = torch.tensor([0, 2, 5, 8, 12, 12 + length]), torch.randperm(12 + length)
    points = torch.empty_like(x)
    points[perm] = x
    leaf, tangent, weight = points.requires_grad_(), torch.randn_like(x), torch.randn(5, 2, dtype=torch.float64)

    def by_hand(x):
        return torch.stack([part.prod(0) for part in x[perm].split(indptr.diff().tolist())])

    results = []
    for function in (lambda x: custom_ops.segment_reduce(x, indptr, "prod", perm), by_hand):
        with backend(name):
            out = function(leaf)
            (first,) = torch.autograd.grad((out.sin() * weight).sum(), leaf, create_graph=True)
            (second,) = torch.autograd.grad((first * tangent).sum(), leaf, create_graph=True)
            (third,) = torch.autograd.grad((second * tangent).sum(), leaf)
            slope = partial(lambda f, x: torch.func.jvp(f, (x,), (tangent,))[1], function)
            forward = torch.func.jvp(slope, (points.detach(),), (x,))
        results.append((out, first, second, third, *forward))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reduce", [*REDUCTIONS, "softmax"])
def test_skewed_segments_are_right_on_any_number_of_threads(reduce):
    rank, x = lidar_like(20_000, 300), torch.randn(20_000, 5)
    perm, indptr = custom_ops.voxel_csr(rank, 300)

    def run(x=x):
        if reduce == "softmax":
            return (custom_ops.segment_softmax(x, indptr, perm),)
        return (custom_ops.segment_reduce(x, indptr, reduce, perm),)

    (out,) = threads_agree(run)
    torch.testing.assert_close(out.double(), run(x.double())[0], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("each_backend")
def test_softmax_of_large_numbers_is_exact_to_rounding():
    x = torch.tensor([[10_000.0], [10_001.0], [-1e30], [1e30], [-INF]])
    out = custom_ops.segment_softmax(x, torch.tensor([0, 2, 4, 5]))
    expected = torch.tensor([[1 / (1 + torch.e)], [torch.e / (1 + torch.e)], [0], [1], [0]])
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("max_voxels", [None, 0, 40, 1000])
def test_voxels_are_those_of_unique(max_voxels):
    rank = lidar_like(700, 10_000) * 7_000_000_000
    voxels = custom_ops.voxelize(rank, max_voxels)
    unique, counts = rank[rank >= 0].unique(return_counts=True)
    kept = len(unique) if max_voxels is None else min(max_voxels, len(unique))
    assert torch.equal(voxels.rank[:kept], unique[:kept])
    assert torch.equal(voxels.counts[:kept], counts[:kept])
    assert (voxels.rank[kept:] == -1).all() and (voxels.counts[kept:] == 0).all()
    inside = (rank >= 0) & (rank <= unique[kept - 1]) if kept else torch.zeros_like(rank, dtype=torch.bool)
    assert torch.equal(voxels.inverse >= 0, inside)
    assert torch.equal(voxels.rank[voxels.inverse[inside]], rank[inside])
    for a, b in zip(voxels.csr, custom_ops.voxel_csr(voxels.inverse, len(voxels.rank)), strict=True):
        assert torch.equal(a, b)
    # The csr is what the pooling of the same points takes.
    x = torch.randn(700, 2)
    pooled = custom_ops.voxel_sum(x, voxels.inverse, len(voxels.rank), "mean", csr=voxels.csr)
    assert torch.equal(custom_ops.segment_reduce(x, voxels.indptr, "mean", voxels.perm), pooled)
    back = custom_ops.voxel_gather(pooled, voxels.inverse, voxels.csr)
    assert torch.equal(back[inside], pooled[voxels.inverse[inside]])
    assert (back[~inside] == 0).all()


def _mmcv(points, size, low, grid, max_points, max_voxels):
    """Voxelise one point after the other, with coordinates z, y, x."""
    found = {}
    for point in points.tolist():
        cell = tuple(int((p - o) // s) for p, o, s in zip(point, low, size))
        if any(c < 0 or c >= n for c, n in zip(cell, grid)):
            continue
        if cell not in found and len(found) >= max_voxels:
            continue
        if len(found.setdefault(cell, [])) < max_points:
            found[cell].append(point)
    padded = [rows + [[0.0] * points.shape[1]] * (max_points - len(rows)) for rows in found.values()]
    counts = [len(rows) for rows in found.values()]
    return torch.tensor(padded), torch.tensor([cell[::-1] for cell in found]), torch.tensor(counts)


@pytest.mark.usefixtures("each_backend")
def test_calls_of_mmcv():
    points = (torch.randint(-4, 20, (200, 4)) / 4).float()  # multiples of a quarter, whose voxels are exact
    size, low, grid = (0.5, 1.0, 2.0), (0.0, 0.5, -0.25), (6, 3, 2)
    corners = (*low, *(o + s * n for o, s, n in zip(low, size, grid)))
    for limits in ((3, 10), (35, 1000), (1, 1)):
        for got, want in zip(
            custom_ops.voxelization(points, size, corners, *limits),
            _mmcv(points, size, low, grid, *limits),
            strict=True,
        ):
            assert torch.equal(got, want.to(got.dtype))
    coors = custom_ops.voxelization(points, size, torch.tensor(corners), -1, -1)
    assert coors.dtype == torch.int32
    inside = (coors >= 0).all(1)
    assert torch.equal(coors[inside][:, 2].long(), (points[inside, 0] / 0.5).floor().long())
    for reduce in ("max", "sum", "mean"):
        feats, places = custom_ops.dynamic_scatter(points, coors, reduce)
        unique, inverse = coors[inside].unique(dim=0, return_inverse=True)
        assert torch.equal(places, unique)
        for i, row in enumerate(feats):
            members = points[inside][inverse == i]
            expected = members.amax(0) if reduce == "max" else getattr(members, reduce)(0)
            torch.testing.assert_close(row, expected)
    empty = custom_ops.dynamic_scatter(points[:0], coors[:0])
    assert [t.shape for t in empty] == [(0, 4), (0, 3)]
    for high in (0.25, 0.35):  # 2.5 and, in float32, 3.5 voxels of 0.1
        point, corners = torch.tensor([[high - 0.03, 0.0, 0.0]]), (0, 0, 0, high, 1, 1)
        for limits in ((1, 1), (-1, -1)):
            coors = custom_ops.voxelization(point, (0.1, 1, 1), corners, *limits)
            assert (coors if -1 in limits else coors[1]).tolist() == [[0, 0, int(high * 10)]]


@pytest.mark.usefixtures("each_backend")
def test_calls_of_bevfusion_and_bevdepth():
    x = torch.randn(50, 3, dtype=torch.float64, requires_grad=True)
    coords = torch.stack([torch.randint(-1, n + 1, (50,)) for n in (4, 5, 2, 2)], 1)
    out = custom_ops.bevfusion_pool(x, coords, B=2, D=2, H=4, W=5)
    expected = torch.zeros(2, 3, 2, 4, 5, dtype=torch.float64)
    for row, (h, w, d, b) in zip(x.detach(), coords.tolist()):
        if 0 <= h < 4 and 0 <= w < 5 and 0 <= d < 2 and 0 <= b < 2:
            expected[b, :, d, h, w] += row
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous()
    places = torch.stack([torch.randint(-1, n + 1, (2, 6, 4)) for n in (4, 5, 2)], -1).int()
    features = torch.randn(2, 6, 4, 3)
    pooled = custom_ops.voxel_pooling_train(places, features, torch.tensor([4, 5, 2]))
    expected = torch.zeros(2, 3, 5, 4)
    for b, n, k in torch.cartesian_prod(*(torch.arange(size) for size in (2, 6, 4))).tolist():
        i, j, z = places[b, n, k].tolist()
        if 0 <= i < 4 and 0 <= j < 5 and 0 <= z < 2:
            expected[b, :, j, i] += features[b, n, k]
    torch.testing.assert_close(pooled, expected)


class OnGpu(torch.Tensor):
    """Sizes of a model that was moved to a GPU."""

    device = property(lambda self: torch.device("cuda"))

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_sizes_may_be_on_a_gpu():
    """BEVFusion and BEVDepth keep them as parameters and buffers, and read them in each call; a tensor made under
    ``torch.set_default_device`` is there, too.
    """
    height, sizes = torch.tensor(4).as_subclass(OnGpu), torch.tensor([4, 5, 2]).as_subclass(OnGpu)
    x, coords = torch.randn(7, 3), torch.randint(0, 2, (7, 4))
    pooled = custom_ops.bevfusion_pool(x, coords, 2, 2, height, 5)
    assert torch.equal(pooled, custom_ops.bevfusion_pool(x, coords, 2, 2, 4, 5))
    places = coords[None, :, :3]
    pooled = custom_ops.voxel_pooling_train(places, x[None], sizes)
    assert torch.equal(pooled, custom_ops.voxel_pooling_train(places, x[None], (4, 5, 2)))
    depths, origin = torch.tensor([1.0, 2.0]).as_subclass(OnGpu), torch.zeros(3).as_subclass(OnGpu)
    layer = custom_ops.LiftSplat((4, 4), (2, 2), depths, origin, torch.ones(3).as_subclass(OnGpu), sizes)
    assert (layer.depths, layer.origin, layer.voxel_size) == ((1.0, 2.0), (0.0,) * 3, (1.0,) * 3)
    assert layer.grid_size == (4, 5, 2)


@pytest.mark.parametrize("grid", [torch.tensor([4.0, 5.0, 2.0]), np.array([4.0, 5.0, 2.0])])
def test_sizes_of_a_grid_may_be_whole_floating_numbers(grid):
    """BEVDet computes them by a division."""
    points, sizes = torch.rand(9, 3) * 6, (4, 5, 2)
    rank = custom_ops.voxel_rank(points, (0, 0, 0), (1, 1, 1), sizes)
    assert torch.equal(custom_ops.voxel_rank(points, (0, 0, 0), (1, 1, 1), grid), rank)
    cells = custom_ops.voxel_unravel(rank, sizes)
    assert torch.equal(custom_ops.voxel_unravel(rank, grid), cells)
    assert torch.equal(custom_ops.voxel_ravel(cells, grid), rank)
    x = torch.rand(1, 40, 2)
    assert torch.equal(custom_ops.voxel_image(x, grid), custom_ops.voxel_image(x, sizes))
    assert custom_ops.LiftSplat((4, 4), (2, 2), (1.0,), (0, 0, 0), (1, 1, 1), grid).grid_size == sizes
    with pytest.raises(TypeError, match="grid_size: expected an integer"):
        custom_ops.voxel_unravel(rank, grid + 0.5)


@pytest.mark.usefixtures("each_backend")
def test_softmax_of_voxels_is_that_of_their_segments():
    x, rank = torch.randn(2, 30, 3, dtype=torch.float64), torch.randint(-1, 5, (2, 30))
    mask, shared = torch.rand(2, 30) < 0.7, torch.randint(-1, 5, (30,), dtype=torch.int32)
    for ranks, given, inside in ((rank, mask, mask), (shared, None, True), (shared, mask, mask)):
        x.requires_grad_()
        out = custom_ops.voxel_softmax(x, ranks, 5, given)
        at = torch.where((ranks >= 0) & inside, ranks, -1).expand(2, 30).long()
        expected = torch.zeros_like(x)
        for e, voxel in torch.cartesian_prod(torch.arange(2), torch.arange(5)).tolist():
            chosen = (at[e] == voxel).nonzero()[:, 0]
            expected = expected.index_put((torch.tensor(e), chosen), x[e, chosen].softmax(0))
        torch.testing.assert_close(out, expected)
        grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (out, expected)]
        torch.testing.assert_close(*grads)
    csr = custom_ops.voxel_csr(rank, 5)
    assert torch.equal(custom_ops.voxel_softmax(x, rank, 5, csr=csr), custom_ops.voxel_softmax(x, rank, 5))
    assert torch.equal(
        custom_ops.voxel_softmax(x[0, :, 0], rank[0], 5), custom_ops.voxel_softmax(x[0], rank[0], 5)[:, 0]
    )


def test_coordinates_and_their_numbers():
    grid = (3, 4, 2)
    cells = torch.cartesian_prod(*(torch.arange(-1, n + 1) for n in grid))
    inside = ((cells >= 0) & (cells < torch.tensor(grid))).all(1)
    rank = custom_ops.voxel_ravel(cells.int(), grid)
    assert rank[inside].tolist() == list(range(24))
    assert (rank[~inside] == -1).all()
    assert torch.equal(custom_ops.voxel_unravel(rank, grid), cells.where(inside[:, None], -1))
    assert custom_ops.voxel_unravel(torch.tensor([24, -5]), grid).tolist() == [[-1] * 3] * 2
    points = cells[inside] + 0.5
    assert torch.equal(custom_ops.voxel_rank(points, (0, 0, 0), (1, 1, 1), grid), rank[inside])
    assert custom_ops.voxel_ravel(torch.tensor([[1, 2, 3, 1]]), (2, *grid)).tolist() == [24 + 23]
    for call, message in (
        (lambda: custom_ops.voxel_ravel(points, grid), "coordinates: expected one of int32, int64, got float32"),
        (lambda: custom_ops.voxel_ravel(cells, grid[1:]), "grid_size: expected 3 numbers"),
        (lambda: custom_ops.voxel_ravel(cells[0, 0], ()), r"coordinates: expected \[..., k\], got shape \[\]"),
        (lambda: custom_ops.voxel_unravel(rank, 3), "grid_size: expected 1 numbers, got 3"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def test_layouts_of_a_grid():
    x = torch.arange(2 * 24 * 5).view(2, 24, 5)  # 2 x 3 x 4 voxels
    for layout in ("cyx", "xyc", "czyx", "zcxy"):
        image = custom_ops.voxel_image(x, (2, 3, 4), layout)
        for i, j, k, c in ((0, 0, 0, 0), (1, 2, 3, 4), (1, 0, 2, 3)):
            at = {"x": i, "y": j, "z": k, "c": c if "z" in layout else k * 5 + c}
            assert image[(1, *(at[axis] for axis in layout))] == x[1, (i * 3 + j) * 4 + k, c]
    with pytest.raises(ValueError, match='layout: expected an order of "cxy" or "cxyz", got \'cx\''):
        custom_ops.voxel_image(x, (2, 3, 4), "cx")
    with pytest.raises(ValueError, match=r"x: expected \[..., 12, C\]"):
        custom_ops.voxel_image(x, (2, 3, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, i: custom_ops.bevfusion_pool(x, i, 1, 1, 2, 2), r"coords: expected \[N, 4\], got shape \[3, 3\]"),
        (lambda x, i: custom_ops.voxel_pooling_train(i, x, (1, 1, 1)), r"geom_xyz: expected \[B, ..., 3\], got"),
        (lambda x, i: custom_ops.voxel_pooling_train(i[None], x, (1, 1, 1)), "input_features: expected"),
        (lambda x, i: custom_ops.dynamic_scatter(x, i, "min"), "reduce_type: expected one of 'max', 'sum', 'mean'"),
        (lambda x, i: custom_ops.dynamic_scatter(x[1:], i), r"feats: expected \[3, C\] as coors, got shape \[2, 2\]"),
        (lambda x, i: custom_ops.voxelization(x, (1, 1, 1), (0, 0, 0, 1, 1, 1)), r"points: expected \[N, 3 \+ k\]"),
        (lambda x, i: custom_ops.voxelization(i.float(), (1, 0, 1), (0, 0, 0, 1, 1, 1)), "voxel_size: expected a pos"),
        (
            lambda x, i: custom_ops.voxelization(i.float(), (1, 1, 1), (0, 0, 4, 4, 4, 0)),
            "coors_range: expected",
        ),
        (
            lambda x, i: custom_ops.voxelization(i.float(), (1, 1, 1), (-INF, -INF, -INF, 1, 1, 1)),
            "coors_range: expected",
        ),
    ],
)
def test_wrong_calls_of_adapters(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(3, 2), torch.zeros(3, 3, dtype=torch.int64))
