"""Peers that no installable package provides, written from their published formulas."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from custom_ops.ranking.specs.neural_sort import neural_sort_matrix
from custom_ops.voxel import VoxelSum, segment_sum, voxel_csr, voxel_sum


class CumulativeVoxelsSumming(torch.autograd.Function):
    """The cumulative-sum trick of Lift-Splat-Shoot and FIERY: differences of a running sum over all points."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, geometry: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
        last = torch.ones(len(ranks), dtype=torch.bool, device=x.device)
        last[:-1] = ranks[1:] != ranks[:-1]
        totals, geometry = x.cumsum(0)[last], geometry[last]
        ctx.save_for_backward(last)
        ctx.mark_non_differentiable(geometry)
        return torch.cat([totals[:1], totals[1:] - totals[:-1]]), geometry

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (last,) = ctx.saved_tensors
        voxel = last.cumsum(0)
        voxel[last] -= 1
        return grad[voxel], None, None


def cumulative_voxels_summing(x: Tensor, geometry: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    return CumulativeVoxelsSumming.apply(x, geometry, ranks)


def index_add_voxels_summing(x: Tensor, geometry: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the points of each voxel with PyTorch's own ops: number the runs, then scatter."""
    _, voxel, counts = torch.unique_consecutive(ranks, return_inverse=True, return_counts=True)
    return x.new_zeros(len(counts), x.shape[1]).index_add(0, voxel, x), geometry[counts.cumsum(0) - 1]


class SigmoidSurrogate(torch.autograd.Function):
    """A spike with the gradient of a sigmoid, written as in libraries for spiking networks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x >= 0).to(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        s = ctx.saved_tensors[0].sigmoid()
        return grad * (1 - s) * s


def surrogate_gradient_function(x: Tensor) -> Tensor:
    return SigmoidSurrogate.apply(x)


def logsigmoid_bpr_loss(positive: Tensor, negative: Tensor) -> Tensor:
    return -torch.nn.functional.logsigmoid(positive - negative).mean()


compiled_bpr_loss = torch.compile(logsigmoid_bpr_loss)
compiled_margin_ranking_loss = torch.compile(F.margin_ranking_loss)


# The peers below pool points onto a dense grid. Each is called as the op it is compared with: `segment_sum(x, indptr)`,
# `voxel_sum(x, rank, num_voxels)`, `bev_pool(depth, feat, rank, num_voxels, csr)`. The peers of `segment_sum` and those
# called "cached" keep what depends on the indices alone, as a user with a fixed geometry does.


def once(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Cache ``compute(indices, ...)`` for each tensor of indices and each set of other arguments."""
    known: Any = WeakTensorKeyDictionary()

    def get(indices: Tensor, *args: Any) -> Any:
        results = known.setdefault(indices, {})
        if args not in results:
            results[args] = compute(indices, *args)
        return results[args]

    return get


@once
def segment_of_point(indptr: Tensor) -> Tensor:
    return torch.arange(len(indptr) - 1, device=indptr.device).repeat_interleave(indptr.diff())


@once
def all_points(indptr: Tensor) -> Tensor:
    return torch.arange(int(indptr[-1]), device=indptr.device)


def embedding_bag_segment_sum(x: Tensor, indptr: Tensor) -> Tensor:
    return F.embedding_bag(all_points(indptr), x, indptr, mode="sum", include_last_offset=True)


def index_add_segment_sum(x: Tensor, indptr: Tensor) -> Tensor:
    return x.new_zeros(len(indptr) - 1, x.shape[1]).index_add(0, segment_of_point(indptr), x)


def scatter_add_segment_sum(x: Tensor, indptr: Tensor) -> Tensor:
    segment = segment_of_point(indptr)[:, None].expand_as(x)
    return x.new_zeros(len(indptr) - 1, x.shape[1]).scatter_add(0, segment, x)


@torch.compile
def _compiled_index_add(x: Tensor, row: Tensor, rows: int) -> Tensor:
    return x.new_zeros(rows, x.shape[1]).index_add(0, row, x)


def compiled_index_add_segment_sum(x: Tensor, indptr: Tensor) -> Tensor:
    return _compiled_index_add(x, segment_of_point(indptr), len(indptr) - 1)


def segment_reduce_segment_sum(x: Tensor, indptr: Tensor) -> Tensor:
    return torch.segment_reduce(x, "sum", offsets=indptr)


def scatter_segment_reduce(x: Tensor, indptr: Tensor, reduce: str) -> Tensor:
    segment = segment_of_point(indptr)[:, None].expand_as(x)
    empty = x.new_full((len(indptr) - 1, x.shape[1]), reduce == "prod")
    return empty.scatter_reduce(0, segment, x, {"max": "amax"}.get(reduce, reduce), include_self=False)


def torch_segment_reduce(x: Tensor, indptr: Tensor, reduce: str) -> Tensor:
    out = torch.segment_reduce(x, reduce, offsets=indptr)
    return out.masked_fill((indptr.diff() == 0)[:, None], reduce == "prod")


def embedding_bag_segment_reduce(x: Tensor, indptr: Tensor, reduce: str) -> Tensor:
    return F.embedding_bag(all_points(indptr), x, indptr, mode=reduce, include_last_offset=True)


def graph_softmax(x: Tensor, indptr: Tensor) -> Tensor:
    """Compute the softmax as PyTorch Geometric does where it has no kernel: scatter, gather, divide."""
    segment, segments = segment_of_point(indptr), len(indptr) - 1
    at = segment[:, None].expand_as(x)
    largest = x.new_zeros(segments, x.shape[1]).scatter_reduce(0, at, x.detach(), "amax", include_self=False)
    exponentials = (x - largest.index_select(0, segment)).exp()
    total = x.new_zeros(segments, x.shape[1]).scatter_add(0, at, exponentials) + 1e-16
    return exponentials / total.index_select(0, segment)


compiled_graph_softmax = torch.compile(graph_softmax)


def unique_rows_voxelize(rank: Tensor) -> tuple[Tensor, ...]:
    """Find the voxels by their coordinates (x, y, z), which `voxel_unravel` gives."""
    coordinates = torch.stack([rank // 4000, rank // 10 % 400, rank % 10], 1)
    rows, inverse, counts = coordinates.unique(dim=0, return_inverse=True, return_counts=True)
    return (rows[:, 0] * 400 + rows[:, 1]) * 10 + rows[:, 2], inverse, counts


def unique_voxelize(rank: Tensor) -> tuple[Tensor, ...]:
    return rank.unique(return_inverse=True, return_counts=True)


def one_by_one_hard_voxelize(
    points: Tensor, rank: Tensor, max_points: int, max_voxels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Voxelise one point after the other, as mmcv's deterministic form does, compiled from C++ on the first call.

    A dense grid holds each voxel's number, and the features are copied point by point.
    """
    voxels, ranks, counts = _one_by_one().run(points.detach(), rank, max_points, max_voxels)
    found = int((ranks >= 0).sum())
    return voxels[:found], ranks[:found], counts[:found]


@functools.cache
def _one_by_one() -> Any:
    from torch.utils.cpp_extension import load_inline

    return load_inline(
        "one_by_one_voxelization",
        """
        std::vector<torch::Tensor> run(torch::Tensor points, torch::Tensor rank, int64_t max_points,
                                       int64_t max_voxels) {
          const int64_t n = points.size(0), c = points.size(1), cells = n ? rank.max().item<int64_t>() + 1 : 0;
          auto numbers = torch::full({cells}, -1, torch::kInt);
          auto voxels = torch::zeros({max_voxels, max_points, c}, points.options());
          auto ranks = torch::full({max_voxels}, -1, torch::kLong), counts = torch::zeros({max_voxels}, torch::kLong);
          const float* x = points.data_ptr<float>();
          const int64_t* r = rank.data_ptr<int64_t>();
          int* number = numbers.data_ptr<int>();
          float* out = voxels.data_ptr<float>();
          int64_t *found = ranks.data_ptr<int64_t>(), *count = counts.data_ptr<int64_t>(), known = 0;
          for (int64_t i = 0; i < n; ++i) {
            if (r[i] < 0) continue;
            int64_t voxel = number[r[i]];
            if (voxel < 0) {
              if (known >= max_voxels) continue;
              voxel = known++, number[r[i]] = voxel, found[voxel] = r[i];
            }
            if (count[voxel] >= max_points) continue;
            float* to = out + (voxel * max_points + count[voxel]++) * c;
            for (int64_t k = 0; k < c; ++k) to[k] = x[i * c + k];
          }
          return {voxels, ranks, counts};
        }""",
        functions=["run"],
        extra_cflags=["-O3"],
    )


def flat_rank(rank: Tensor, batch: int, num_voxels: int, outside: int) -> Tensor:
    """Return the ranks ``[batch, N]`` or ``[N]`` as rows of the whole batch's ``batch * num_voxels``."""
    first = torch.arange(0, batch * num_voxels, max(num_voxels, 1), device=rank.device)[:, None]
    return torch.where(rank < 0, outside, rank + first).flatten()


def lss_voxel_sum(x: Tensor, rank: Tensor, num_voxels: int) -> Tensor:
    """Sum with the pipeline of Lift-Splat-Shoot and FIERY: drop, sort, cumulative sum, write into a dense grid."""
    batch = x.shape[:-2]
    rank = flat_rank(rank, batch.numel(), num_voxels, outside=-1)
    x, inside = x.reshape(-1, x.shape[-1]), rank >= 0
    x, rank = x[inside], rank[inside]
    order = rank.argsort()
    sums, voxels = cumulative_voxels_summing(x[order], rank[order, None], rank[order])
    grid = x.new_zeros(batch.numel() * num_voxels, x.shape[1])
    grid[voxels[:, 0]] = sums
    return grid.view(*batch, num_voxels, -1)


def trash_row_index_add(x: Tensor, rank: Tensor, num_voxels: int) -> Tensor:
    """Sum with one index_add; points outside of the grid go to an extra row that is cut off."""
    batch = x.shape[:-2]
    rows = batch.numel() * num_voxels
    rank = flat_rank(rank, batch.numel(), num_voxels, outside=rows)
    return x.new_zeros(rows + 1, x.shape[-1]).index_add(0, rank, x.flatten(0, -2))[:-1].view(*batch, num_voxels, -1)


def trash_row_scatter_add(x: Tensor, rank: Tensor, num_voxels: int) -> Tensor:
    batch, columns = x.shape[:-2], x.shape[-1]
    rows = batch.numel() * num_voxels
    rank = flat_rank(rank, batch.numel(), num_voxels, outside=rows)[:, None].expand(-1, columns)
    return x.new_zeros(rows + 1, columns).scatter_add(0, rank, x.flatten(0, -2))[:-1].view(*batch, num_voxels, -1)


def _bags(rank: Tensor, batch: int, num_voxels: int) -> tuple[Tensor, Tensor]:
    """Return the points inside of the grid, sorted by voxel, and the offset at which each voxel begins."""
    rows = batch * num_voxels
    rank, points = flat_rank(rank, batch, num_voxels, outside=rows).sort(stable=True)
    offsets = torch.searchsorted(rank, torch.arange(rows + 1, device=rank.device))
    return points[: int(offsets[-1])], offsets


kept_bags = once(_bags)


def embedding_bag_voxel_sum(x: Tensor, rank: Tensor, num_voxels: int, bags: Callable[..., Any] = _bags) -> Tensor:
    batch = x.shape[:-2]
    points, offsets = bags(rank, batch.numel(), num_voxels)
    sums = F.embedding_bag(points, x.flatten(0, -2), offsets, mode="sum", include_last_offset=True)
    return sums.view(*batch, num_voxels, -1)


def cached_embedding_bag_voxel_sum(x: Tensor, rank: Tensor, num_voxels: int) -> Tensor:
    return embedding_bag_voxel_sum(x, rank, num_voxels, kept_bags)


_kept_csr = once(voxel_csr)


def cached_voxel_sum(x: Tensor, rank: Tensor, num_voxels: int) -> Tensor:
    """Sum with our op, given points that were sorted before."""
    return voxel_sum(x, rank, num_voxels, csr=_kept_csr(rank, num_voxels))


_kept_layer = once(lambda rank, num_voxels: VoxelSum(num_voxels))


def layer_voxel_sum(x: Tensor, rank: Tensor, num_voxels: int) -> Tensor:
    """Sum with our layer, which compares the ranks with those it sorted last."""
    out: Tensor = _kept_layer(rank, num_voxels)(x, rank)
    return out


def unchecked_voxel_sum(x: Tensor, rank: Tensor, num_voxels: int) -> Tensor:
    """Sum with our op without the layer's comparison of the ranks, to measure what that comparison costs."""
    perm, indptr = _kept_csr(rank, num_voxels)
    return segment_sum(x, indptr, perm)


def _outer(depth: Tensor, feat: Tensor) -> Tensor:
    """Return the features of all points ``[B, N D H W, C]``, which Lift-Splat-Shoot stores in memory."""
    return (depth[:, :, None] * feat[:, :, :, None]).movedim(2, -1).flatten(1, -2)


def lss_bev_pool(depth: Tensor, feat: Tensor, rank: Tensor, num_voxels: int, *_: Any) -> Tensor:
    return lss_voxel_sum(_outer(depth, feat), rank.flatten(-4), num_voxels)


def index_add_bev_pool(depth: Tensor, feat: Tensor, rank: Tensor, num_voxels: int, *_: Any) -> Tensor:
    return trash_row_index_add(_outer(depth, feat), rank.flatten(-4), num_voxels)


@once
def bags_of_pixels(rank: Tensor, batch: int, num_voxels: int) -> tuple[Tensor, Tensor, Tensor]:
    points, offsets = _bags(rank.flatten(-4), batch, num_voxels)
    cameras, bins, pixels = rank.shape[-4], rank.shape[-3], rank.shape[-2] * rank.shape[-1]
    pixel = torch.arange(batch * cameras * pixels, device=rank.device).view(-1, 1, pixels).expand(-1, bins, -1)
    return points, pixel.flatten()[points], offsets


def cached_embedding_bag_bev_pool(depth: Tensor, feat: Tensor, rank: Tensor, num_voxels: int, *_: Any) -> Tensor:
    """Pool the pixels of each voxel as a weighted embedding bag; the indices are computed once for each ``rank``."""
    points, pixels, offsets = bags_of_pixels(rank, len(depth), num_voxels)
    rows = feat.movedim(2, -1).flatten(0, -2)
    weights = depth.flatten()[points]
    bev = F.embedding_bag(pixels, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)
    return bev.view(len(depth), num_voxels, -1)


@once
def _voxel_of_weight(rank: Tensor, batch: int, num_voxels: int) -> Tensor:
    points, _, offsets = bags_of_pixels(rank, batch, num_voxels)
    return torch.searchsorted(offsets, torch.arange(len(points), device=rank.device), right=True) - 1


@torch.compile
def _compiled_weighted_index_add(
    weights: Tensor, rows: Tensor, points: Tensor, pixels: Tensor, voxels: Tensor, n: int
) -> Tensor:
    return rows.new_zeros(n, rows.shape[1]).index_add(0, voxels, weights[points, None] * rows[pixels])


def compiled_index_add_bev_pool(depth: Tensor, feat: Tensor, rank: Tensor, num_voxels: int, *_: Any) -> Tensor:
    points, pixels, _ = bags_of_pixels(rank, len(depth), num_voxels)
    voxels, rows = _voxel_of_weight(rank, len(depth), num_voxels), feat.movedim(2, -1).flatten(0, -2)
    bev = _compiled_weighted_index_add(depth.flatten(), rows, points, pixels, voxels, len(depth) * num_voxels)
    return bev.view(len(depth), num_voxels, -1)


def eager_voxel_rank(points: Tensor, origin: Any, voxel_size: Any, grid_size: Any) -> Tensor:
    """Compute the ranks with PyTorch's own ops: floor, compare, number."""
    cell = ((points - points.new_tensor(origin)) / points.new_tensor(voxel_size)).floor().long()
    grid = torch.tensor(grid_size, device=points.device)
    inside = ((cell >= 0) & (cell < grid)).all(-1)
    x, y, z = cell.unbind(-1)
    return torch.where(inside, (x * grid[1] + y) * grid[2] + z, -1)


def sorted_voxel_csr(rank: Tensor, num_voxels: int) -> tuple[Tensor, Tensor]:
    key, perm = torch.where(rank < 0, num_voxels, rank).sort(stable=True)
    return perm, torch.searchsorted(key, torch.arange(num_voxels + 1, device=rank.device))


def counted_voxel_csr(rank: Tensor, num_voxels: int) -> tuple[Tensor, Tensor]:
    key = torch.where(rank < 0, num_voxels, rank)
    counts = key.bincount(minlength=num_voxels + 1)
    return key.argsort(stable=True), F.pad(counts[:num_voxels].cumsum(0), (1, 0))


def index_add_bev_pool_v2(
    depth: Tensor,
    feat: Tensor,
    ranks_depth: Tensor,
    ranks_feat: Tensor,
    ranks_bev: Tensor,
    bev_feat_shape: tuple[int, ...],
    *_: Tensor,
) -> Tensor:
    """Compute BEVDet's bev_pool_v2 without its kernel: write out the features of all points, then call index_add
    once.
    """
    points = depth.flatten()[ranks_depth, None] * feat.flatten(0, 3)[ranks_feat]
    bev = feat.new_zeros(math.prod(bev_feat_shape[:4]), feat.shape[4]).index_add(0, ranks_bev, points)
    return bev.view(bev_feat_shape).permute(0, 4, 1, 2, 3)


def _pairs_of(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return scores[..., :, None] - scores[..., None, :], labels[..., :, None] > labels[..., None, :]


def pairwise_logistic_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Compute the loss with PyTorch's own ops, from the matrix of all pairs."""
    difference, pairs = _pairs_of(scores, labels)
    return torch.where(pairs, torch.nn.functional.softplus(-difference), 0).sum((-1, -2)).mean()


def pairwise_hinge_loss(scores: Tensor, labels: Tensor) -> Tensor:
    difference, pairs = _pairs_of(scores, labels)
    return torch.where(pairs, (1 - difference).relu(), 0).sum((-1, -2)).mean()


def neural_sort_ndcg_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Compute NeuralNDCG without column scaling from the whole matrix; every list needs a relevant item."""
    gains = 2 ** labels.to(scores.dtype) - 1
    discounts = 1 / (torch.arange(gains.shape[-1], device=gains.device) + 2.0).log2()
    ideal = (gains.sort(descending=True).values * discounts).sum(-1)
    found = ((neural_sort_matrix(scores, 1.0) @ gains.unsqueeze(-1)).squeeze(-1) * discounts).sum(-1)
    return (1 - found / ideal).mean()


compiled_pairwise_logistic_loss = torch.compile(pairwise_logistic_loss)
compiled_neural_sort_ndcg_loss = torch.compile(neural_sort_ndcg_loss)
