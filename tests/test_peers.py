"""The peers of the voxel ops compute the same sums as ours."""

from __future__ import annotations

import pytest
import torch

from benchmarks import interval_peers, peers

VOXELS, COLUMNS = 7, 3


def dense_sums(x: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """Return [..., V, C] from [..., N, C] by multiplying with a matrix of which point is in which voxel."""
    return (rank[..., None, :] == torch.arange(VOXELS)[:, None]).to(x.dtype) @ x


def agree(got: torch.Tensor, expected: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    torch.testing.assert_close(got, expected)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs, grad), torch.autograd.grad(expected, inputs, grad, retain_graph=True)
    )


@pytest.mark.parametrize("peer", ["embedding_bag", "index_add", "compiled_index_add", "scatter_add", "segment_reduce"])
def test_segment_sum(peer):
    rank = torch.tensor([0, 0, 1, 3, 3, 3, 6])
    indptr = torch.searchsorted(rank, torch.arange(VOXELS + 1))
    x = torch.randn(len(rank), COLUMNS, dtype=torch.float64, requires_grad=True)
    for _ in range(2):  # the second call uses what the first has cached
        agree(getattr(peers, f"{peer}_segment_sum")(x, indptr), dense_sums(x, rank), [x])


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize(
    "peer",
    ["lss_voxel_sum", "trash_row_index_add", "trash_row_scatter_add", "embedding_bag_voxel_sum",
     "cached_embedding_bag_voxel_sum", "interval_voxel_sum"],
)  # fmt: skip
def test_voxel_sum(peer, batch):
    torch.manual_seed(0)
    rank = torch.randint(-1, VOXELS, (*batch, 40))
    x = torch.randn(*batch, 40, COLUMNS, dtype=torch.float64, requires_grad=True)
    sums = getattr(interval_peers if peer.startswith("interval") else peers, peer)
    for _ in range(2):
        agree(sums(x, rank, VOXELS), dense_sums(x, rank), [x])
    more = sums(x, rank.clamp(max=3), VOXELS + 2)  # another grid, with empty voxels at the end
    assert more.shape == (*batch, VOXELS + 2, COLUMNS) and not more[..., 4:, :].any()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "peer",
    [
        "lss_bev_pool",
        "index_add_bev_pool",
        "compiled_index_add_bev_pool",
        "cached_embedding_bag_bev_pool",
        "interval_bev_pool",
    ],
)
def test_bev_pool(peer, shared):
    torch.manual_seed(0)
    batch, cameras, bins, height, width = 2, 3, 4, 2, 3
    rank = torch.randint(-1, VOXELS, (*(() if shared else (batch,)), cameras, bins, height, width))
    depth = torch.rand(batch, cameras, bins, height, width, dtype=torch.float64, requires_grad=True)
    feat = torch.randn(batch, cameras, COLUMNS, height, width, dtype=torch.float64, requires_grad=True)
    points = torch.einsum("bndhw,bnchw->bndhwc", depth, feat).flatten(1, 4)
    expected = dense_sums(points, rank.expand_as(depth).flatten(1))
    for _ in range(2):
        bev = getattr(interval_peers if peer.startswith("interval") else peers, peer)(depth, feat, rank, VOXELS)
        agree(bev, expected, [depth, feat])
