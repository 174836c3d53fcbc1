"""The adapter for BEVDet's five arrays: its sums, its checks, and that no wrong array reaches other memory."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import custom_ops
from custom_ops.triton_kernels import intervals as launchers
from custom_ops.verify._backends import backend
from custom_ops.voxel.intervals import interval_ranks
from custom_ops.voxel.specs.intervals import bev_pool_v2_reference, interval_arrays

SHAPE, GRID, COLUMNS = (2, 3, 4, 2, 5), (2, 3, 4), 7


def frame(dtype=torch.float64, seed=0):
    """Return depth, feat, rank, and the arguments of `bev_pool_v2`."""
    torch.manual_seed(seed)
    depth = torch.rand(SHAPE, dtype=dtype, requires_grad=True)
    feat = torch.randn(2, 3, 2, 5, COLUMNS, dtype=dtype, requires_grad=True)
    rank = torch.randint(-1, 24, SHAPE)
    points, pixels, voxels, starts, lengths = interval_arrays(rank, 24)
    return depth, feat, rank, [depth, feat, points, pixels, voxels, (2, *GRID, COLUMNS), starts, lengths]


def results(function, depth, feat, *arguments):
    """Return the output, its gradients and their gradients."""
    out = function(depth, feat, *arguments)
    first = torch.autograd.grad((out**2).sum(), (depth, feat), create_graph=True)
    second = torch.autograd.grad(sum((g**2).sum() for g in first), (depth, feat))
    return [out, *first, *second]


def test_equals_the_loop_over_intervals_and_bev_pool():
    depth, feat, rank, arguments = frame()
    ours = results(custom_ops.bev_pool_v2, *arguments)
    torch.testing.assert_close(ours, results(bev_pool_v2_reference, *arguments))

    def pooled(depth, feat):
        bev = custom_ops.bev_pool(depth, feat.permute(0, 1, 4, 2, 3), rank, 24)
        return bev.view(2, *GRID, COLUMNS).permute(0, 4, 1, 2, 3)

    torch.testing.assert_close(ours, results(pooled, depth, feat))


@pytest.mark.usefixtures("each_backend")
def test_the_numbers_that_bevdet_publishes_for_its_kernel():
    depth = torch.tensor([0.3, 0.4, 0.2, 0.1, 0.7, 0.6, 0.8, 0.9]).view(1, 1, 2, 2, 2).requires_grad_()
    feat = torch.ones(1, 1, 2, 2, 2, requires_grad=True)
    depths, pixels, voxels = torch.tensor([[0, 4, 1, 6], [0, 0, 1, 2], [0, 0, 1, 1]], dtype=torch.int32)
    starts, lengths = torch.tensor([[0, 2], [2, 2]], dtype=torch.int32)
    total = custom_ops.bev_pool_v2(depth, feat, depths, pixels, voxels, (1, 1, 2, 2, 2), starts, lengths).sum()
    of_depth, of_feat = torch.autograd.grad(total, (depth, feat))
    torch.testing.assert_close(total, torch.tensor(4.4))
    torch.testing.assert_close(of_depth.flatten(), torch.tensor([2.0, 2, 0, 0, 2, 0, 2, 0]))
    torch.testing.assert_close(of_feat.flatten(), torch.tensor([1, 1, 0.4, 0.4, 0.8, 0.8, 0, 0]))


@pytest.mark.usefixtures("each_backend")
def test_a_depth_in_several_voxels_with_any_pixel_and_gaps_between_intervals():
    """BEVDet's kernel accepts these too; entries in a gap between intervals are ignored."""
    depth, feat, _, _ = frame()
    generator = torch.Generator().manual_seed(1)
    listed = 500
    voxels = torch.randint(0, 48, (listed,), generator=generator).sort().values
    points = torch.randint(0, depth.numel(), (listed,), generator=generator)
    pixels = torch.randint(0, feat[..., 0].numel(), (listed,), generator=generator)
    lengths = voxels.unique_consecutive(return_counts=True)[1]
    starts = lengths.cumsum(0) - lengths
    some = torch.randperm(len(starts), generator=generator)[:20]
    arrays = [points, pixels, voxels, (2, *GRID, COLUMNS), starts[some], lengths[some]]
    expected = results(bev_pool_v2_reference, depth, feat, *arrays)
    torch.testing.assert_close(results(custom_ops.bev_pool_v2, depth, feat, *arrays), expected)
    gap = torch.ones(listed, dtype=torch.bool)
    for start, length in zip(*arrays[4:]):
        gap[start : start + length] = False
    assert gap.any()
    garbage = [t.masked_fill(gap, value) for t, value in zip(arrays[:3], (-7, 2**40, 48))]
    torch.testing.assert_close(results(custom_ops.bev_pool_v2, depth, feat, *garbage, *arrays[3:]), expected)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_result_is_contiguous_and_float32_under_autocast(dtype):
    depth, feat, _, arguments = frame(torch.float32)
    half = [t.detach().to(dtype).requires_grad_() for t in (depth, feat)]
    expected = custom_ops.bev_pool_v2(*(t.float() for t in half), *arguments[2:])
    assert expected.is_contiguous()
    assert torch.equal(custom_ops.bev_pool_v2(*half, *arguments[2:]), expected.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = custom_ops.bev_pool_v2(*half, *arguments[2:])
        assert out.is_contiguous() and torch.equal(out, expected) and out.dtype == torch.float32
    grads = torch.autograd.grad(out.sum(), half)
    assert all(g.dtype == dtype for g in grads)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_for_any_number_of_points(compiler):
    """Each frame lists other points, and the program is not recompiled for them."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(custom_ops.bev_pool_v2, backend=counter, fullgraph=True, dynamic=True)
    for seed in range(3):
        depth, feat, _, arguments = frame(seed=seed)
        out, expected = compiled(*arguments), custom_ops.bev_pool_v2(*arguments)
        torch.testing.assert_close(out, expected)
        grads, wanted = (torch.autograd.grad((y**2).sum(), (depth, feat)) for y in (out, expected))
        torch.testing.assert_close(grads, wanted)
    assert counter.frame_count == 1


def test_exported_for_any_number_of_points():
    class Net(torch.nn.Module):
        def forward(self, depth, feat, points, pixels, voxels, starts, lengths):
            return custom_ops.bev_pool_v2(depth, feat, points, pixels, voxels, (2, *GRID, COLUMNS), starts, lengths)

    def tensors(seed):
        arguments = frame(seed=seed)[-1]
        return tuple(arguments[:5] + arguments[6:])

    listed, intervals = {0: torch.export.Dim("points")}, {0: torch.export.Dim("intervals")}
    dynamic = ({}, {}, listed, listed, listed, intervals, intervals)
    program = torch.export.export(Net(), tensors(0), dynamic_shapes=dynamic)
    for seed in range(3):
        torch.testing.assert_close(program.module()(*tensors(seed)), Net()(*tensors(seed)))


def test_intervals_in_any_order():
    _, _, _, arguments = frame()
    depth, feat, points, pixels, voxels, shape, starts, lengths = arguments
    order = torch.randperm(len(starts))
    listed = torch.cat([torch.arange(starts[i], starts[i] + lengths[i]) for i in order])
    starts, lengths = lengths[order].cumsum(0) - lengths[order], lengths[order]
    out = custom_ops.bev_pool_v2(depth, feat, points[listed], pixels[listed], voxels[listed], shape, starts, lengths)
    torch.testing.assert_close(out, custom_ops.bev_pool_v2(*arguments))


def test_a_frame_without_points():
    depth, feat, _, arguments = frame()
    nothing = [t[:0] for t in arguments[2:5]] + [arguments[5]] + [t[:0] for t in arguments[6:]]
    out = custom_ops.bev_pool_v2(depth, feat, *nothing)
    assert out.shape == (2, COLUMNS, *GRID) and (out == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), (depth, feat)))


# Points 1, 0 and 3 of two bins of two pixels lie in the voxels 0, 0 and 2 of 3.
RIGHT = {"depth": [1, 0, 3], "feat": [1, 0, 1], "bev": [0, 0, 2], "starts": [0, 2], "lengths": [2, 1]}
SIZES = (4, 2, 3)  # numbers of points, pixels, voxels
WRONG = [
    ("depth", [1, 0, 4], r"ranks_depth: expected values within \[0, 4\), got 4"),
    ("depth", [1, 0, -1], r"ranks_depth: expected values within \[0, 4\), got -1"),
    ("depth", [1, 0, 2**40], "ranks_depth: expected values within"),
    ("feat", [1, 0, 2], r"ranks_feat: expected values within \[0, 2\), got 2"),
    ("feat", [1, -1, 0], r"ranks_feat: expected values within \[0, 2\), got -1"),
    ("feat", [1, 0, 2**40], "ranks_feat: expected values within"),
    ("bev", [0, 0, 3], r"ranks_bev: expected values within \[0, 3\), got 3"),
    ("bev", [0, 0, -1], r"ranks_bev: expected values within \[0, 3\), got -1"),
    ("bev", [0, 1, 2], "ranks_bev: expected one voxel in each interval, got 1"),
    ("starts", [0, 1], "interval_starts, interval_lengths: expected intervals that don't overlap"),
    ("starts", [0, -1], r"interval_starts: expected values within \[0, 3\], got -1"),
    ("starts", [0, 2**40], r"interval_starts: expected values within \[0, 3\], got 1099511627776"),
    ("lengths", [2, 2], "interval_lengths: expected 0 to the 1 points that are left for interval 1, got 2"),
    ("lengths", [2**62, 2**62], "interval_lengths: expected 0 to the 3 points that are left for interval 0"),
    ("lengths", [3, 1], "interval_starts, interval_lengths: expected intervals that don't overlap"),
    ("lengths", [2, -1], "interval_lengths: expected 0 to the 1 points"),
]


def arrays(**changed):
    given = RIGHT | changed
    return [torch.tensor(given[name]) for name in RIGHT]


@pytest.mark.parametrize(("name", "values", "message"), WRONG)
def test_arrays_that_dont_belong_together_raise_or_are_nan(name, values, message):
    """The CPU raises; on a GPU, which can't raise without waiting, the result is NaN, whatever the arrays hold."""
    points, pixels, voxels, starts, lengths = arrays(**{name: values})
    depth, feat = torch.ones(1, 1, 2, 1, 2, requires_grad=True), torch.ones(1, 1, 1, 2, 1, requires_grad=True)
    call = (depth, feat, points, pixels, voxels, (1, 1, 1, 3, 1), starts, lengths)
    with pytest.raises(RuntimeError, match=f"^{message}"):
        custom_ops.bev_pool_v2(*call)
    with backend("triton"):
        out = custom_ops.bev_pool_v2(*call)
        (grad,) = torch.autograd.grad(out.sum(), feat)
    assert out.isnan().all() and grad.isnan().all()


def test_both_backends_agree():
    rank = torch.randint(-1, 500, (2, 3, 8, 6, 9))
    listed = [t.long() for t in interval_arrays(rank, 500)]
    sizes = (rank.numel(), 2 * 3 * 54, 1000)
    assert launchers.interval_ranks(*arrays(), *SIZES).tolist() == [0, 0, 2]
    assert torch.equal(launchers.interval_ranks(*listed, *sizes), interval_ranks(*listed, *sizes))
    gaps = [*listed[:3], listed[3][::3], listed[4][::3] - 1]
    assert torch.equal(launchers.interval_ranks(*gaps, *sizes), interval_ranks(*gaps, *sizes))
    none = [t[:0] for t in listed]
    for some in ([*listed[:3], *none[3:]], none):
        assert torch.equal(launchers.interval_ranks(*some, *sizes), interval_ranks(*some, *sizes))
