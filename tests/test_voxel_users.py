"""Calls of the voxel ops as found in public code; each once gave a wrong result."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import custom_ops

T = torch.tensor
X = T([[1.0], [2.0], [4.0]])
A, B = T([0, 1, 2]), T([2, 1, 0])
CAMERAS = (T([[[1.0, 0, 0.5], [0, 1, 0.5], [0, 0, 1]]]), torch.eye(4)[None])
each_backend = pytest.mark.usefixtures("each_backend")


def pixels(rank):
    return X.view(1, 1, 3, 1, 1), torch.ones(1, 1, 1, 1, 1), rank.view(1, 3, 1, 1)


def lift_splat(**changed):
    arguments = {"image_size": (2, 2), "feature_size": (1, 1), "depths": [1.0, 2.0, 3.0]}
    grid = {"origin": (-0.5, -0.5, 0.5), "voxel_size": (1.0, 1.0, 1.0), "grid_size": (1, 1, 3)}
    return custom_ops.LiftSplat(**(arguments | grid | changed))


def gives_no_numbers(x, rank, voxels, csr):
    """Return whether the call raises (CPU) or gives NaN for an example, in its gradients too (GPU)."""
    x = x.clone().requires_grad_()
    try:
        out = custom_ops.voxel_sum(x, rank, voxels, csr=csr)
    except RuntimeError as error:
        return str(error).startswith("csr: expected voxel_csr(rank, num_voxels), got one of other ranks")
    wrong = out.isnan().flatten(-2).all(-1)
    return wrong.any() and torch.autograd.grad(out.sum(), x)[0][wrong].isnan().all()


@pytest.mark.parametrize("trace", [torch.jit.trace, lambda f, inputs: make_fx(f)(*inputs)], ids=["jit", "make_fx"])
def test_no_cache_in_a_trace(trace):
    layer, bev, lift = custom_ops.VoxelSum(3), custom_ops.BEVPool(3), lift_splat()
    moved = (CAMERAS[0], CAMERAS[1].clone())
    moved[1][0, 2, 3] = 1.0
    for module, first, second in (
        (layer, (X, A), (X, B)),
        (bev, pixels(A), pixels(B)),
        (lift, (*pixels(A)[:2], *CAMERAS), (*pixels(A)[:2], *moved)),
    ):
        module(*first)
        traced = trace(module, first)
        expected = type(module)(3)(*second) if module is not lift else lift_splat()(*second)
        assert not torch.equal(expected, module(*first))
        torch.testing.assert_close(traced(*second), expected)


def test_a_call_never_changes_what_was_set():
    layer = custom_ops.VoxelSum(3)
    with pytest.raises(ValueError, match="^rank: expected ranks, here or by set_geometry"):
        layer(X)
    layer(X, A)
    with pytest.raises(ValueError, match="^rank: expected ranks, here or by set_geometry"):
        layer(X)
    layer.set_geometry(A)
    assert layer(X, B).flatten().tolist() == [4, 2, 1]
    assert layer(X).flatten().tolist() == [1, 2, 4]
    lift = lift_splat()
    lift(*pixels(A)[:2], *CAMERAS)
    with pytest.raises(ValueError, match="^intrinsics: expected cameras"):
        lift(*pixels(A)[:2])


@each_backend
def test_a_csr_by_hand_gives_its_sums_or_none():
    x, rank = torch.arange(4.0)[:, None], T([0] * 4)
    right = (T([0, 1, 2, 3], dtype=torch.int32), T([0, 4, 4], dtype=torch.int32))
    assert custom_ops.voxel_sum(x, rank, 2, csr=right).flatten().tolist() == [6, 0]
    assert gives_no_numbers(x, rank, 2, (torch.zeros(4, dtype=torch.int64), right[1]))


@each_backend
@pytest.mark.parametrize(
    ("perm", "indptr"),
    [
        ([[0, 0], [1, 1]], [[0, 1, 2], [0, 1, 2]]),
        ([[0, 1], [0, 1]], [[0, 1, 2], [0, 1, 2]]),
        ([[0, 2], [1, 0]], [[0, 1, 2], [0, 1, 2]]),
        ([[0, -(2**63)], [1, 0]], [[0, 1, 2], [0, 1, 2]]),
        ([[0, 1], [1, 0]], [[0, 1, 2], [0, 2, 2]]),
        ([[0, 1], [1, 0]], [[0, 2**63 - 1, 2], [0, -(2**63), 2]]),
    ],
    ids=["points of the other example", "the other voxel", "no such point", "far away", "boundary", "far boundaries"],
)
def test_a_csr_that_differs_in_one_of_two_examples_gives_no_numbers(perm, indptr):
    x, rank = torch.ones(2, 2, 1), T([[0, 1], [1, 0]])
    right = custom_ops.voxel_csr(rank, 2)
    assert [t.tolist() for t in right] == [[[0, 1], [1, 0]], [[0, 1, 2], [0, 1, 2]]]
    assert gives_no_numbers(x, rank, 2, (T(perm), T(indptr)))


@each_backend
@pytest.mark.parametrize("past", [2, 3, 2**63 - 1])
def test_a_csr_of_dropped_points_is_not_that_of_ranks_past_the_end(past):
    x, rank = torch.ones(2, 1), T([1, -1])
    assert gives_no_numbers(x, T([1, past]), 2, custom_ops.voxel_csr(rank, 2))


@each_backend
def test_a_csr_of_cameras_a_millimetre_away_gives_no_numbers():
    points = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0)) * 10
    grid = ((0, 0, 0), (0.5, 0.5, 10), (20, 20, 1))
    rank, moved = (custom_ops.voxel_rank(p, *grid) for p in (points, points + T([0.001, 0, 0])))
    assert 0 < (rank != moved).sum() < 100
    one = rank.clone()
    one[12_345] = (rank[12_345] + 1) % 400
    for other in (moved, one):
        assert gives_no_numbers(points, rank, 400, custom_ops.voxel_csr(other, 400))


@each_backend
def test_points_outside_and_float_ranks_in_the_drop_in():
    x, geometry = T([[9.0], [1.0], [2.0], [4.0]]), T([[7, 7], [0, 0], [0, 0], [0, 1]])
    x[0] = float("nan")
    for ranks in (T([-1, 0, 0, 1]), T([-1.0, 0, 0, 1])):
        leaf = x.clone().requires_grad_()
        sums, voxels = custom_ops.VoxelsSumming.apply(leaf, geometry, ranks)
        assert sums.flatten().tolist() == [3, 4] and voxels.tolist() == [[0, 0], [0, 1]]
        assert torch.autograd.grad(sums.sum(), leaf)[0].flatten().tolist() == [0, 1, 1, 1]
    none, voxels = custom_ops.VoxelsSumming.apply(x, geometry, T([-1] * 4))
    assert none.shape == (0, 1) and voxels.shape == (0, 2)
    for wrong in (T([0, 0.5, 1, 1]), T([0, 1, 2, 2.0**24]), T([0, 1, 2, float("nan")])):
        with pytest.raises(RuntimeError, match="^ranks: expected whole numbers"):
            custom_ops.VoxelsSumming.apply(x, geometry, wrong)


def test_what_geometry_follows_from_is_read_only():
    lift = lift_splat()
    for layer, names in ((custom_ops.VoxelSum(3), ["num_voxels"]), (custom_ops.BEVPool(3), ["num_voxels"])):
        for name in names:
            with pytest.raises(AttributeError, match=f"^{name}: can't be set again"):
                setattr(layer, name, 6)
    for name in lift._fixed:
        with pytest.raises(AttributeError, match=f"^{name}: can't be set again"):
            setattr(lift, name, getattr(lift, name))


def test_clear_errors():
    with pytest.raises(ValueError, match=r"^num_voxels: expected less than 2\^59"):
        custom_ops.voxel_csr(A, 2**63 - 1)
    layer = custom_ops.VoxelSum(3)
    layer.set_geometry(A)
    layer.to("meta").to_empty(device="cpu")
    with pytest.raises(ValueError, match="^rank: expected ranks, here or by set_geometry"):
        layer(X)
    with torch.device("meta"), pytest.raises(TypeError, match="^depths: expected a number, got a tensor on meta"):
        lift_splat(depths=torch.arange(1.0, 4.0))


@each_backend
def test_what_is_meant_clearly_is_taken():
    expected = custom_ops.voxel_sum(X, B, 4)
    for voxels in (np.int64(4), T(4)):
        assert torch.equal(custom_ops.voxel_sum(X, B, voxels), expected)
        assert torch.equal(custom_ops.VoxelSum(voxels)(X, B), expected)
        assert torch.equal(custom_ops.bev_pool(*pixels(B), voxels).flatten(), expected.flatten())
    assert torch.equal(custom_ops.voxel_sum(X[:, 0], B, 4), expected[:, 0])
    assert torch.equal(custom_ops.VoxelSum(4)(X[:, 0], B), expected[:, 0])
    pair = torch.stack([X, 2 * X])
    assert torch.equal(custom_ops.voxel_sum(pair, B[None], 4), custom_ops.voxel_sum(pair, B, 4))
    assert torch.equal(custom_ops.voxel_sum(X, B[None], 4), expected[None])
    assert torch.equal(custom_ops.bev_pool(*pixels(B)[:2], B.view(1, 1, 3, 1, 1), 4).flatten(), expected.flatten())
    indptr, perm = T([0, 2, 3], dtype=torch.int32), T([2, 0, 1], dtype=torch.int32)
    assert custom_ops.segment_sum(X[:, 0], indptr, perm, T([2.0])).tolist() == [10, 4]
    for narrow, wide in ((torch.float32, torch.float64), (torch.bfloat16, torch.float32)):
        for of_x, of_weight in ((narrow, wide), (wide, narrow)):
            x, weight = X.to(of_x).requires_grad_(), T([1.0, 3.0, 5.0], dtype=of_weight, requires_grad=True)
            sums = custom_ops.segment_sum(x, indptr, perm, weight)
            grads = torch.autograd.grad(sums.sum(), (x, weight))
            assert (sums.dtype, grads[0].dtype, grads[1].dtype) == (wide, of_x, of_weight)
            assert sums.flatten().tolist() == [21, 6] and grads[1].tolist() == [1, 2, 4]
    points, grid = torch.rand(9, 3), ((0.0, 0.0, 0.0), (0.5, 0.5, 0.5), (2, 2, 2))
    taken = [np.asarray(g) for g in grid]
    assert torch.equal(custom_ops.voxel_rank(points, *taken), custom_ops.voxel_rank(points, *grid))
    given = lift_splat(image_size=(np.int64(2), 2), origin=np.array([-0.5, -0.5, 0.5]), depths=np.arange(1.0, 4.0))
    assert torch.equal(given(*pixels(A)[:2], *CAMERAS), lift_splat()(*pixels(A)[:2], *CAMERAS))
