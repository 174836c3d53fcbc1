"""The ops of this family in PyTorch's own ops, for runtimes that don't have their kernels, such as ONNX Runtime.

`custom_ops.library.decompositions` returns them. Unlike the kernels, they don't raise for a wrong index.
"""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops import library
from custom_ops._wide import wide
from custom_ops.voxel import intervals, voxel_grid, voxel_segments

# ---------------------------------------------------------------- points and voxels


def _largest(x: Tensor) -> Tensor:
    """Return the largest of x [..., N] and 0, [..., 1]."""
    return torch.nn.functional.pad(x, (1, 0)).amax(-1, keepdim=True)


def _sorted_points(rank: Tensor) -> Tensor:
    """Return the points [..., N] in the order of their ranks, equal ones in theirs, and negative ranks at the end."""
    points = rank.shape[-1]
    key = torch.where(rank < 0, _largest(rank) + 1, rank)
    # All keys differ, as topk may return equal ones in any order.
    different = key * points + torch.arange(points, device=rank.device)
    return different.topk(points, -1, largest=False, sorted=True).indices


def _boundaries(counts: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(counts.sum(-1, keepdim=True)), counts.cumsum(-1)], -1)


def _counts(places: Tensor, size: int) -> Tensor:
    """Return how many of the places [..., N], of at most ``size``, have each number below it."""
    return _sums(torch.ones_like(places)[..., None], places, size)[..., 0]


def _sums(x: Tensor, places: Tensor, size: int) -> Tensor:
    """Sum the rows [..., N, C] of each place below ``size``; places of ``size`` count nowhere."""
    zeros = x.new_zeros((*x.shape[:-2], size + 1, x.shape[-1]))
    return zeros.scatter_add(-2, places[..., None].expand(x.shape), x)[..., :size, :]


@library.decomposition(voxel_grid.voxel_index)
def _(points: Tensor, frame: Tensor, x_cells: int, y_cells: int, z_cells: int, truncate: bool) -> Tensor:
    if frame.dim() == 3:
        frame = frame.view(frame.shape[0], *[1] * (points.dim() - 2), 2, 3)
    position = (points.to(frame.dtype) - frame[..., 0, :]) / frame[..., 1, :]
    x, y, z = (position.trunc() if truncate else position.floor()).unbind(-1)
    inside = (x >= 0) & (x < x_cells) & (y >= 0) & (y < y_cells) & (z >= 0) & (z < z_cells)
    i, j, k = (torch.where(inside, axis, 0).long() for axis in (x, y, z))
    return torch.where(inside, (i * y_cells + j) * z_cells + k, -1)


@library.decomposition(voxel_grid.voxel_sort)
def _sort(rank: Tensor, voxels: int) -> tuple[Tensor, Tensor]:
    rank = rank.long()
    return _sorted_points(rank), _boundaries(_counts(torch.where(rank < 0, voxels, rank), voxels))


@library.decomposition(voxel_grid.voxel_match)
def _(rank: Tensor, perm: Tensor, indptr: Tensor) -> Tensor:
    return indptr.clone()


@library.decomposition(voxel_grid.voxel_bounds)
def _(ranks: Tensor, check_sorted: bool) -> tuple[Tensor, Tensor]:
    before = torch.cat([ranks[:1] - 1, ranks[:-1]])
    first = ((ranks >= 0) & (ranks != before)).nonzero()[:, 0]
    # The points outside are before or behind all others. Without a point in a voxel, the only bound is 0.
    end = _largest(torch.where(ranks >= 0, torch.arange(ranks.shape[0], device=ranks.device) + 1, 0))
    bounds = torch.cat([first, end])
    return bounds, bounds[1:] - 1


def _runs(rank: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the points sorted by rank, their ranks, which of them are in voxels, and which are the first in one."""
    rank = rank.long()
    perm = _sorted_points(rank)
    ordered = rank.gather(-1, perm)
    before = torch.cat([torch.full_like(ordered[..., :1], -1), ordered[..., :-1]], -1)
    inside = ordered >= 0
    return perm, ordered, inside, inside & (ordered != before)


def _placed(values: Tensor, places: Tensor, size: int) -> Tensor:
    """Return ``values`` at their places, and -1 elsewhere; places of ``size`` count nowhere."""
    return values.new_full((*values.shape[:-1], size + 1), -1).scatter(-1, places, values)[..., :size]


def _check_size(size: int) -> None:
    if size < 0:
        raise NotImplementedError("max_voxels: expected a number in a program for other runtimes, got None")


@library.decomposition(voxel_grid.voxel_unique)
def _(rank: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_size(size)
    perm, ordered, inside, begins = _runs(rank)
    number = torch.where(inside, begins.long().cumsum(-1) - 1, size).clamp_max(size)
    inverse = torch.zeros_like(perm).scatter(-1, perm, torch.where(number < size, number, -1))
    return _placed(ordered, number, size), inverse, *_sort(inverse, size)


@library.decomposition(voxel_grid.voxel_slots)
def _(rank: Tensor, max_points: int, size: int, padded: bool) -> tuple[Tensor, Tensor, Tensor]:
    _check_size(size if padded else -1)
    perm, ordered, inside, begins = _runs(rank)
    at = torch.arange(rank.shape[-1], device=rank.device).expand(rank.shape)
    number = torch.where(inside, begins.long().cumsum(-1) - 1, rank.shape[-1])
    starts = _placed(at, torch.where(begins, number, rank.shape[-1]), rank.shape[-1])
    start = starts.gather(-1, number.clamp_max(rank.shape[-1] - 1)).clamp_min(0)
    # A voxel's number in the order of first points is the place of its first point among all first points.
    order = torch.zeros_like(perm).scatter(-1, perm, begins.long()).cumsum(-1) - 1
    voxel = torch.where(inside, order.gather(-1, perm.gather(-1, start)), size).clamp_max(size)
    place = at - start
    kept = (voxel < size) & (place < max_points)
    slot = torch.zeros_like(perm).scatter(-1, perm, torch.where(kept, voxel * max_points + place, -1))
    return slot, _placed(ordered, voxel, size), _counts(torch.where(kept, voxel, size), size)


@library.decomposition(voxel_grid.voxel_place)
def _(x: Tensor, place: Tensor, rows: int) -> Tensor:
    return _sums(x, torch.where(place < 0, rows, place), rows)


@library.decomposition(voxel_grid.voxel_take)
def _(x: Tensor, place: Tensor) -> Tensor:
    return _looked_up(x, torch.where(place < 0, x.shape[-2], place))


@library.decomposition(intervals.interval_ranks)
def _(
    ranks_depth: Tensor,
    ranks_feat: Tensor,
    ranks_bev: Tensor,
    interval_starts: Tensor,
    interval_lengths: Tensor,
    points: int,
    pixels: int,
    voxels: int,
) -> Tensor:
    # A listed point is in an interval if more of them begin than end up to it.
    listed = ranks_bev.shape[0]
    begun = _counts(interval_starts.clamp_max(listed), listed)
    ended = _counts((interval_starts + interval_lengths).clamp_max(listed), listed)
    return torch.where((begun - ended).cumsum(0) > 0, ranks_bev, -1)


# ---------------------------------------------------------------- segments


def _segments(indptr: Tensor, perm: Tensor | None, batch: torch.Size, points: int) -> tuple[Tensor, int]:
    """Return the segment of each point [..., N], or for points in none the number of segments, and that number."""
    count = indptr.shape[-1] - 1
    begun = _counts(indptr, points).cumsum(-1) - 1
    place = torch.where(begun < 0, count, begun)
    if perm is not None:
        place = torch.zeros_like(perm).scatter(-1, perm, place)
    return place.expand(*batch, points), count


def _rows(x: Tensor, bins: int, plane: int) -> Tensor:
    """Return the row of each point: ``bins`` points that are ``plane`` apart share one."""
    if bins == 1:
        return x
    shape = (*x.shape[:-2], x.shape[-2] // plane, 1, plane, x.shape[-1])
    return x.reshape(shape).expand(*shape[:-3], bins, *shape[-2:]).flatten(-4, -2)


def _looked_up(sums: Tensor, place: Tensor) -> Tensor:
    """Return the row of each place, which is 0 past the end."""
    padded = torch.cat([sums, torch.zeros_like(sums[..., :1, :].sum(-2, keepdim=True))], -2)
    return padded.gather(-2, place[..., None].expand(*place.shape, sums.shape[-1]))


def _divided(x: Tensor, indptr: Tensor, mean: bool) -> Tensor:
    return x / indptr.diff().clamp_min(1)[..., None].to(x.dtype) if mean else x


@library.decomposition(voxel_segments.segment_reduce)
def _reduce(
    x: Tensor, weight: Tensor | None, indptr: Tensor, perm: Tensor | None, mean: bool, bins: int, plane: int
) -> Tensor:
    rows = _rows(x, bins, plane)
    values = rows if x.dtype == torch.int64 else wide(rows)
    place, count = _segments(indptr, perm, x.shape[:-2], rows.shape[-2])
    sums = _sums(values if weight is None else values * wide(weight)[..., None], place, count)
    return _divided(sums, indptr, mean).to(x.dtype)


@library.decomposition(voxel_segments.segment_spread)
def _spread(
    sums: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    indptr: Tensor,
    perm: Tensor | None,
    points: int,
    mean: bool,
    bins: int,
    plane: int,
    of_x: bool,
) -> tuple[Tensor, Tensor]:
    place, _ = _segments(indptr, perm, sums.shape[:-2], points)
    rows = _looked_up(_divided(wide(sums), indptr, mean), place)
    of_weight = sums.new_zeros(0) if x is None else (rows * wide(_rows(x, bins, plane))).sum(-1).to(sums.dtype)
    if not of_x:
        return sums.new_zeros(0), of_weight
    rows = rows if weight is None else rows * wide(weight)[..., None]
    if bins > 1:
        rows = rows.unflatten(-2, (points // (bins * plane), bins, plane)).sum(-3).flatten(-3, -2)
    return rows.to(sums.dtype), of_weight


@library.decomposition(voxel_segments.segment_extreme)
def _extreme(x: Tensor, indptr: Tensor, perm: Tensor | None, largest: bool) -> tuple[Tensor, Tensor]:
    points = x.shape[-2]
    place, count = _segments(indptr, perm, x.shape[:-2], points)
    at = place[..., None].expand(x.shape)
    filled = (indptr.diff() > 0)[..., None]
    values = _extremes(x, at, count, "amax" if largest else "amin")
    position = torch.arange(points, device=x.device).expand(place.shape)
    if perm is not None:
        perm = perm.expand(place.shape)
        position = torch.zeros_like(perm).scatter(-1, perm, position)
    has_it = (x == _looked_up(values, place)) | (x != x)
    index = _extremes(torch.where(has_it, position[..., None].expand(x.shape), points), at, count, "amin")
    if perm is not None:
        index = perm[..., None].expand(x.shape).gather(-2, index.clamp(0, points - 1))
    return torch.where(filled, values, 0), torch.where(filled, index, -1)


def _extremes(x: Tensor, at: Tensor, count: int, reduce: str) -> Tensor:
    zeros = x.new_zeros((*x.shape[:-2], count + 1, x.shape[-1]))
    return zeros.scatter_reduce(-2, at, x, reduce, include_self=False)[..., :count, :]


@library.decomposition(voxel_segments.segment_prod)
def _(x: Tensor, indptr: Tensor, perm: Tensor | None) -> Tensor:
    values = x if x.dtype == torch.int64 else wide(x)
    place, count = _segments(indptr, perm, x.shape[:-2], x.shape[-2])
    ones = values.new_ones((*x.shape[:-2], count + 1, x.shape[-1]))
    products = ones.scatter_reduce(-2, place[..., None].expand(x.shape), values, "prod")
    return products[..., :count, :].to(x.dtype)


@library.decomposition(voxel_segments.segment_scan)
def _(factors: Tensor, terms: Tensor | None, indptr: Tensor, perm: Tensor | None, backwards: bool) -> Tensor:
    points = int(factors.shape[-2])  # a program for other runtimes has steps for that many
    place, count = _segments(indptr, perm, factors.shape[:-2], points)
    order = torch.arange(points, device=factors.device) if perm is None else perm
    order = (order.flip(-1) if backwards else order).expand(place.shape)
    at = order[..., None].expand(factors.shape)
    segment = place.gather(-1, order)
    a = wide(factors).gather(-2, at)
    b = torch.zeros_like(a) if terms is None else wide(terms).gather(-2, at)

    def earlier(t: Tensor, by: int, dim: int) -> Tensor:
        return torch.cat([torch.zeros_like(t.narrow(dim, 0, by)), t.narrow(dim, 0, points - by)], dim)

    def continues(by: int) -> Tensor:
        """Return which points have one of the same segment so many places before them."""
        return (earlier(segment + 1, by, -1) == segment + 1)[..., None]

    # The pair (a, b) of a point maps the row at the start of a span that ends before it to a * row + b.
    if points:
        a, b = (torch.where(continues(1), earlier(t, 1, -2), 0) for t in (a, b))
        b = b if terms is not None else torch.where(continues(1), b, 1)
    by = 1
    while by < points:
        joined = continues(by)
        b = torch.where(joined, a * earlier(b, by, -2) + b, b)
        a = torch.where(joined, a * earlier(a, by, -2), a)
        by *= 2
    out = torch.where((segment < count)[..., None], b, 0)
    return torch.zeros_like(out).scatter(-2, at, out).to(factors.dtype)


@library.decomposition(voxel_segments.segment_logsumexp)
def _(x: Tensor, indptr: Tensor, perm: Tensor | None) -> Tensor:
    largest, top, total = _exponential_sums(wide(x), indptr, perm)
    return torch.where(largest == float("inf"), largest, top + total.log()).to(x.dtype)


def _exponential_sums(x: Tensor, indptr: Tensor, perm: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return each segment's largest x, the same but 0 instead of -inf, and the sum of e^(x - that)."""
    largest, _ = _extreme(x, indptr, perm, True)
    top = torch.where(largest == float("-inf"), 0, largest)
    place, count = _segments(indptr, perm, x.shape[:-2], x.shape[-2])
    return largest, top, _sums((x - _looked_up(top, place)).exp(), place, count)


@library.decomposition(voxel_segments.segment_softmax)
def _(x: Tensor, indptr: Tensor, perm: Tensor | None) -> Tensor:
    _, top, total = _exponential_sums(wide(x), indptr, perm)
    place, count = _segments(indptr, perm, x.shape[:-2], x.shape[-2])
    softmax = (wide(x) - _looked_up(top, place)).exp() * _looked_up(torch.where(total == 0, 0, 1 / total), place)
    return torch.where((place < count)[..., None], softmax, 0).to(x.dtype)


@library.decomposition(voxel_segments.segment_softmax_adjoint)
def _(grad: Tensor, y: Tensor, indptr: Tensor, perm: Tensor | None) -> Tensor:
    g, wide_y = wide(grad), wide(y)
    dots = _reduce(g * wide_y, None, indptr, perm, False, 1, 1)
    place, count = _segments(indptr, perm, grad.shape[:-2], grad.shape[-2])
    return torch.where((place < count)[..., None], wide_y * (g - _looked_up(dots, place)), 0).to(grad.dtype)


@library.decomposition(voxel_segments.segment_center)
def _(x: Tensor, indptr: Tensor, perm: Tensor | None) -> Tensor:
    place, count = _segments(indptr, perm, x.shape[:-2], x.shape[-2])
    mean = _reduce(wide(x), None, indptr, perm, True, 1, 1)
    return torch.where((place < count)[..., None], wide(x) - _looked_up(mean, place), 0).to(x.dtype)


def _used(index: Tensor, ranks: Tensor, rows: int, segments: int) -> tuple[Tensor, Tensor]:
    """Return rows and ranks, past the end where one of them is negative."""
    used = (index >= 0) & (ranks >= 0)
    return torch.where(used, index, rows), torch.where(used, ranks, segments)


@library.decomposition(voxel_segments.pair_reduce)
def _(x: Tensor, weight: Tensor, rows: Tensor, ranks: Tensor, segments: int) -> Tensor:
    row, rank = (t.expand(weight.shape) for t in _used(rows, ranks, x.shape[-2], segments))
    return _sums(wide(weight)[..., None] * _looked_up(wide(x), row), rank, segments).to(x.dtype)


@library.decomposition(voxel_segments.pair_dots)
def _(sums: Tensor, x: Tensor, ranks: Tensor, rows: Tensor) -> Tensor:
    row, rank = _used(rows, ranks, x.shape[-2], sums.shape[-2])
    row, rank = (t.expand(*x.shape[:-2], t.shape[-1]) for t in (row, rank))
    return (_looked_up(wide(sums), rank) * _looked_up(wide(x), row)).sum(-1).to(x.dtype)
