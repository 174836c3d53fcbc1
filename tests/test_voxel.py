"""Properties of voxel summing beyond the battery: it is free of the faults of the cumulative sum."""

from __future__ import annotations

import pytest
import torch

import custom_ops
from benchmarks.peers import cumulative_voxels_summing
from custom_ops.voxel.specs.summing import voxels_summing_reference


def points(counts, columns=4, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    ranks = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return torch.randn(len(ranks), columns, dtype=dtype), torch.stack([ranks, 2 * ranks], 1), ranks


def test_equals_the_cumulative_sum_where_that_is_right():
    x, geometry, ranks = points([3, 1, 5, 2], dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    sums, voxels = custom_ops.VoxelsSumming.apply(ours, geometry, ranks)
    expected, places = cumulative_voxels_summing(theirs, geometry, ranks)
    torch.testing.assert_close(sums, expected)
    assert torch.equal(voxels, places)
    grad = torch.randn_like(sums)
    sums.backward(grad)
    expected.backward(grad)
    assert torch.equal(ours.grad, theirs.grad)


def test_no_voxel_touches_another():
    x = torch.tensor([1e9, 1, 1, 1, 1, 1])[:, None]
    ranks = torch.tensor([0, 1, 1, 2, 2, 2])
    assert custom_ops.voxels_summing(x, ranks[:, None], ranks)[0].flatten().tolist() == [1e9, 2, 3]
    x[0] = float("nan")
    assert custom_ops.voxels_summing(x, ranks[:, None], ranks)[0][1:].flatten().tolist() == [2, 3]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-3), (torch.float16, 1e-3)])
def test_accuracy_on_positive_features(dtype, tolerance):
    x, geometry, ranks = points([12] * 2000 + [5000])
    x = x.abs().to(dtype)
    exact = voxels_summing_reference(x.double(), geometry, ranks)[0]
    error = custom_ops.voxels_summing(x, geometry, ranks)[0].double() - exact
    assert error.norm() / exact.norm() <= tolerance


def test_unsorted_ranks_raise_unless_told_not_to_check():
    x, geometry, ranks = points([2, 3])
    for wrong in (ranks.flip(0), torch.tensor([0, 0, 2, 1, 1])):
        with pytest.raises(RuntimeError, match="^ranks: expected non-decreasing"):
            custom_ops.voxels_summing(x, geometry, wrong)
        sums, voxels = custom_ops.voxels_summing(x, geometry, wrong, check_sorted=False)
        expected, places = cumulative_voxels_summing(x, geometry, wrong)
        torch.testing.assert_close(sums, expected)
        assert torch.equal(voxels, places)


@pytest.mark.parametrize("descent", [1, 32767, 32768, 32769, 99_999])
def test_one_descent_anywhere_is_found(descent):
    ranks = torch.arange(100_000)
    ranks[descent] = ranks[descent - 1] - 1
    with pytest.raises(RuntimeError, match="^ranks: expected non-decreasing"):
        custom_ops.voxel.voxel_grid.voxel_bounds(ranks, True)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_bounds_of_many_chunks(dtype):
    ranks = torch.randint(0, 30_000, (100_000,)).sort().values
    ranks = (ranks - 5).to(dtype)  # the points of the first voxels are outside
    counts = torch.unique_consecutive(ranks[ranks >= 0], return_counts=True)[1]
    first = (ranks < 0).sum().view(1)
    expected = torch.cat([first, first + counts.cumsum(0)])
    indptr, last = custom_ops.voxel.voxel_grid.voxel_bounds(ranks, True)
    assert torch.equal(indptr, expected)
    assert torch.equal(last, expected[1:] - 1)
