"""Tables of the voxel ops: random points from 10,000 to 4 million, cameras, and two real LiDAR scans."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.table import Benchmark, Target, Unavailable
from custom_ops import voxel_csr, voxel_rank, voxels_summing
from custom_ops.voxel.specs.intervals import interval_arrays

Peers = dict[str, Callable[..., Any] | str]
SIZES = (10_000, 172_824, 1_000_000, 4_000_000)
CAMERAS = (1, 4, 23, 92)  # examples of 43,296 points each, up to 4 million points
SCALED_CAMERAS = (1, 4, 16, 46, 92)
LSS, FIERY = "Lift-Splat-Shoot's pipeline", "FIERY's cumulative sum"


def _at_most_checked(points: int) -> int:
    """Return the size at which answers are checked; the references take seconds and gigabytes at larger sizes."""
    return min(points, 50_000)


def _unsorted(points: int, device: torch.device, skew: int = 1) -> tuple[Tensor, Tensor, int]:
    """Return unordered points, 8 per voxel, in an eighth of the grid's voxels; ``skew`` concentrates them in fewer."""
    generator = torch.Generator().manual_seed(points)
    x = torch.randn(points, 64, generator=generator)
    voxels = max(points // 8, 1)
    rank = (torch.rand(points, generator=generator).double() ** skew * voxels).long() * 8
    return x.to(device).requires_grad_(), rank.to(device), 8 * voxels


def _scans(edge: float, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Return two real LiDAR scans with random features, and their columns in a grid of ``edge`` metres."""
    from examples.data import DataError, load_lidar  # has dependencies that only the tools need

    try:
        scans = [torch.from_numpy(scan[:, :3]) for scan in load_lidar()[:2]]
    except DataError as error:
        raise Unavailable(str(error)) from error
    which = torch.arange(2).repeat_interleave(torch.tensor([len(scan) for scan in scans]))
    grid = (math.ceil(44 / edge), math.ceil(88 / edge), 1)
    rank = voxel_rank(torch.cat(scans), (-24, -76, -16), (edge, edge, 32), grid, which)
    x = torch.randn(len(rank), 64, generator=torch.Generator().manual_seed(0))
    return x.to(device).requires_grad_(), rank.to(device), 2 * math.prod(grid)


def draw_cameras(batch: int, device: torch.device) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(batch)
    depth = torch.rand(batch, 6, 41, 8, 22, generator=generator).to(device).requires_grad_()
    feat = torch.randn(batch, 6, 64, 8, 22, generator=generator).to(device).requires_grad_()
    rank = (torch.randint(0, 5000, depth.shape, generator=generator) * 8).to(device)
    return depth, feat, rank, 40_000, voxel_csr(rank.flatten(1), 40_000)


def _interval_cameras(batch: int, device: torch.device) -> tuple[Any, ...]:
    depth, feat, rank, voxels, _ = draw_cameras(batch, device)
    feat = feat.detach().permute(0, 1, 3, 4, 2).contiguous().requires_grad_()
    points, pixels, ranks, starts, lengths = interval_arrays(rank, voxels)
    return depth, feat, points, pixels, ranks, (batch, 1, 200, 200, 64), starts, lengths


def _in_order(points: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(points)
    ranks = torch.randint(0, max(points // 8, 1), (points,), generator=generator).sort().values
    x = torch.randn(points, 64, generator=generator).to(device).requires_grad_()
    return x, torch.stack([ranks // 100, ranks % 100], 1).to(device), ranks.to(device)


def _segments(points: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(points)
    counts = torch.randint(0, max(points // 8, 1), (points,), generator=generator).bincount()
    x = torch.randn(points, 64, generator=generator).to(device).requires_grad_()
    return x, torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(device)


def _cloud(points: int, device: torch.device) -> tuple[Any, ...]:
    """Return points at multiples of a power of two, whose voxel is the same in any precision; some lie outside."""
    generator = torch.Generator().manual_seed(points)
    cloud = torch.randint(-(2**14), 2**14, (points, 3), generator=generator) / 2**9
    return cloud.to(device), (-30.0, -30.0, -30.0), (0.5, 0.5, 10.0), (120, 120, 6)


def _ranks(points: int, device: torch.device) -> tuple[Tensor, int]:
    generator = torch.Generator().manual_seed(points)
    return torch.randint(-1, points // 8, (points,), generator=generator).to(device), points // 8


_OF_SEGMENT_REDUCE: Peers = {
    "scatter_reduce": "benchmarks.peers:scatter_segment_reduce",
    "torch.segment_reduce": "benchmarks.peers:torch_segment_reduce",
    "embedding_bag": "benchmarks.peers:embedding_bag_segment_reduce",
    "torch_scatter.segment_csr": "benchmarks.scatter_peers:segment_csr_segment_reduce",
}


def _reduced(reduce: str, peers: Sequence[str], targets: Sequence[str]) -> Benchmark:
    """Return the table of one reduction over segments."""

    def make(points: int, device: torch.device) -> tuple[Tensor, Tensor, str]:
        return *_segments(points, device), reduce

    return Benchmark(
        unit=f"points of 64 features in order, 8 to a segment; {reduce}",
        sizes=SIZES,
        make=make,
        checked_at=_at_most_checked,
        peers={peer: _OF_SEGMENT_REDUCE[peer] for peer in peers},
        targets=[Target(172_824, peer, 0.6, memory=memory) for peer in targets for memory in ("fresh", "warm")],
    )


def _scores(columns: int) -> Callable[..., Any]:
    """Return what makes features or scores of points in segments."""

    def make(points: int, device: torch.device) -> tuple[Tensor, Tensor]:
        x, indptr = _segments(points, device)
        return x.detach()[:, :columns].contiguous().requires_grad_(), indptr

    return make


def _occupied(points: int, device: torch.device) -> tuple[Tensor]:
    """Return points in a grid of 400 x 400 x 10 voxels."""
    generator = torch.Generator().manual_seed(points)
    return (torch.randint(0, 1_600_000, (points,), generator=generator).to(device),)


def _pillars(edge: float, device: torch.device) -> tuple[Any, ...]:
    """Return the positions of two LiDAR scans, their columns of ``edge`` metres, and mmcv's usual limits."""
    x, rank, _ = _scans(edge, device)
    return x.detach()[:, :4].contiguous(), rank, 32, 40_000


_OF_SOFTMAX: Peers = {
    "PyTorch Geometric's composition": "benchmarks.peers:graph_softmax",
    "PyTorch Geometric's composition, torch.compile": "benchmarks.peers:compiled_graph_softmax",
}
_OF_VOXEL_SUM: Peers = {
    LSS: "benchmarks.peers:lss_voxel_sum",
    "BEVFusion's intervals, in Triton": "benchmarks.interval_peers:interval_voxel_sum",
    "index_add": "benchmarks.peers:trash_row_index_add",
    "scatter_add": "benchmarks.peers:trash_row_scatter_add",
    "torch_scatter.scatter": "benchmarks.scatter_peers:trash_row_scatter",
    "embedding_bag": "benchmarks.peers:embedding_bag_voxel_sum",
    "embedding_bag, cached": "benchmarks.peers:cached_embedding_bag_voxel_sum",
    "conch, cached": "benchmarks.conch_peers:cached_bev_pool_voxel_sum",
    "ours, cached": "benchmarks.peers:cached_voxel_sum",
    "ours, as a layer": "benchmarks.peers:layer_voxel_sum",
    "ours, cached, unchecked": "benchmarks.peers:unchecked_voxel_sum",
}


def _beside_all(size: Any) -> list[Target]:
    """Return targets for skewed points: 0.8 times the time of every peer."""
    peers = [peer for peer in _OF_VOXEL_SUM if not peer.startswith("ours")]
    return [Target(size, peer, 0.8, memory=memory) for peer in peers for memory in ("fresh", "warm")]


TABLES: dict[str, list[Benchmark]] = {
    "segment_reduce": [
        *(_reduced(reduce, list(_OF_SEGMENT_REDUCE), list(_OF_SEGMENT_REDUCE)) for reduce in ("max", "mean")),
        _reduced("prod", ["scatter_reduce", "torch.segment_reduce"], ["scatter_reduce"]),
    ],
    "segment_softmax": [
        Benchmark(
            unit=f"points in order, 8 to a segment; {columns} columns",
            sizes=SIZES[:3],
            make=_scores(columns),
            checked_at=_at_most_checked,
            peers=_OF_SOFTMAX,
            targets=[Target(172_824, peer, 0.3, memory=memory) for peer in _OF_SOFTMAX for memory in ("fresh", "warm")],
        )
        for columns in (64, 8)
    ],
    "voxelize": [
        Benchmark(
            unit="points in a grid of 400 x 400 x 10 voxels",
            sizes=SIZES[:3],
            make=_occupied,
            checked_at=_at_most_checked,
            peers={
                "torch.unique of coordinates": "benchmarks.peers:unique_rows_voxelize",
                "torch.unique of ranks": "benchmarks.peers:unique_voxelize",
            },
            targets=[Target(172_824, "torch.unique of coordinates", 0.3, "forward")],
        )
    ],
    "hard_voxelize": [
        Benchmark(
            unit="metres a pillar, 128,741 points of two real LiDAR scans, 4 features, 32 points a pillar",
            sizes=(0.5, 0.2),
            make=_pillars,
            kwargs={"padded": False},
            peers={"mmcv's deterministic form, rewritten": "benchmarks.peers:one_by_one_hard_voxelize"},
            targets=[Target(0.2, "mmcv's deterministic form, rewritten", 0.5, "forward")],
        )
    ],
    "voxel_rank": [
        Benchmark(
            unit="points", sizes=SIZES, make=_cloud, peers={"PyTorch's own ops": "benchmarks.peers:eager_voxel_rank"}
        )
    ],
    "voxel_csr": [
        Benchmark(
            unit="points in any order, 8 to a voxel",
            sizes=SIZES,
            make=_ranks,
            peers={
                "stable sort, searchsorted": "benchmarks.peers:sorted_voxel_csr",
                "stable sort, bincount": "benchmarks.peers:counted_voxel_csr",
            },
        )
    ],
    "segment_sum": [
        Benchmark(
            unit="points of 64 features in order, 8 to a segment",
            sizes=SIZES,
            make=_segments,
            checked_at=_at_most_checked,
            peers={
                "embedding_bag": "benchmarks.peers:embedding_bag_segment_sum",
                "index_add": "benchmarks.peers:index_add_segment_sum",
                "scatter_add": "benchmarks.peers:scatter_add_segment_sum",
                "torch.segment_reduce": "benchmarks.peers:segment_reduce_segment_sum",
                "torch.compile(index_add)": "benchmarks.peers:compiled_index_add_segment_sum",
                "torch_scatter.scatter": "benchmarks.scatter_peers:scatter_segment_sum",
                "torch_scatter.segment_csr": "benchmarks.scatter_peers:segment_csr_segment_sum",
                "fbgemm_gpu, on the CPU": "benchmarks.fbgemm_peers:table_segment_sum",
            },
            targets=[
                *(Target(172_824, "embedding_bag", 1.0, "forward", memory) for memory in ("fresh", "warm")),
                *(
                    Target(172_824, peer, 0.6, memory=memory)
                    for peer in ("embedding_bag", "index_add", "torch_scatter.segment_csr", "scatter_add")
                    for memory in ("fresh", "warm")
                ),
            ],
        )
    ],
    "voxel_sum": [
        Benchmark(
            unit="points of 64 features in any order, 8 to a voxel",
            sizes=SIZES,
            make=_unsorted,
            checked_at=_at_most_checked,
            peers=_OF_VOXEL_SUM,
            targets=[
                Target(172_824, peer, ratio, memory=memory)
                for peer, ratio in ((LSS, 0.1), ("index_add", 0.6))
                for memory in ("fresh", "warm")
            ],
        ),
        Benchmark(
            unit="points of 64 features in any order, thousands in one voxel and one in many",
            sizes=(10_000, 140_000, 1_000_000, 4_000_000),
            make=lambda points, device: _unsorted(points, device, skew=6),
            checked_at=_at_most_checked,
            peers=_OF_VOXEL_SUM,
            targets=_beside_all(140_000),
        ),
        Benchmark(
            unit="metres a cell, 128,741 points of two real LiDAR scans, 64 features",
            sizes=(0.5, 0.2),
            make=_scans,
            peers=_OF_VOXEL_SUM,
            targets=_beside_all(0.5),
        ),
    ],
    "bev_pool": [
        Benchmark(
            unit="examples of 6 cameras, 41 depths of 8 x 22 pixels, 64 features; geometry cached",
            sizes=CAMERAS,
            make=draw_cameras,
            checked_at=lambda batch: 1,
            scaling=SCALED_CAMERAS,
            peers={
                LSS: "benchmarks.peers:lss_bev_pool",
                "outer product, index_add": "benchmarks.peers:index_add_bev_pool",
                "torch.compile(gather, index_add)": "benchmarks.peers:compiled_index_add_bev_pool",
                "embedding_bag, cached": "benchmarks.peers:cached_embedding_bag_bev_pool",
                "fbgemm_gpu, on the CPU, cached": "benchmarks.fbgemm_peers:table_bev_pool",
                "BEVFusion's intervals, in Triton": "benchmarks.interval_peers:interval_bev_pool",
            },
            targets=[
                *(
                    Target(4, "embedding_bag, cached", ratio, direction, memory)
                    for direction, ratio in (("forward", 1.0), ("forward+backward", 0.5))
                    for memory in ("fresh", "warm")
                ),
                *(Target(4, LSS, 0.08, memory=memory) for memory in ("fresh", "warm")),
            ],
        )
    ],
    "bev_pool_v2": [
        Benchmark(
            unit="examples of 6 cameras, 41 depths of 8 x 22 pixels, 64 features; BEVDet's arrays",
            sizes=CAMERAS,
            make=_interval_cameras,
            checked_at=lambda batch: 1,
            scaling=SCALED_CAMERAS,
            peers={"outer product, index_add": "benchmarks.peers:index_add_bev_pool_v2"},
        )
    ],
    "voxels_summing": [
        Benchmark(
            unit="points of 64 features, 8 to a voxel",
            sizes=SIZES,
            make=_in_order,
            checked_at=_at_most_checked,
            peers={
                FIERY: "benchmarks.peers:cumulative_voxels_summing",
                "index_add": "benchmarks.peers:index_add_voxels_summing",
                "ours, unchecked": lambda x, geometry, ranks: voxels_summing(x, geometry, ranks, check_sorted=False),
            },
            targets=[Target(172_824, FIERY, 0.1, memory=memory) for memory in ("fresh", "warm")],
        )
    ],
}
NATIVE: dict[str, Callable[..., Any]] = {
    "voxel_csr": lambda rank, num_voxels: rank.sort(stable=True),
    "segment_sum": lambda x, indptr, perm, weight: torch.nn.functional.embedding_bag(
        perm, x, indptr, mode="sum", per_sample_weights=weight, include_last_offset=True
    ),
    "voxel_sum": lambda x, rank, num_voxels: x.new_zeros(num_voxels + 1, x.shape[1]).index_add(
        0, torch.where(rank < 0, num_voxels, rank), x
    )[:num_voxels],
    "voxels_summing": lambda x, geometry, ranks: torch.segment_reduce(
        x, "sum", lengths=ranks.unique_consecutive(return_counts=True)[1]
    ),
}
