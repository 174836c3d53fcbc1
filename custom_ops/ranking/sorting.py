"""Soft ranks, soft sorting and Spearman's correlation: differentiable sorting by isotonic regression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from custom_ops import _checks, shards
from custom_ops._native import define
from custom_ops.library import Function
from custom_ops.ranking import _lists
from custom_ops.ranking._lists import valid_items
from custom_ops.registry import BadCall, Benchmark, OpInfo, Sample, Target, register

__all__ = ["SpearmanLoss", "soft_rank", "soft_sort", "spearman_loss"]

_REGULARIZATIONS = ("l2", "kl")
SUM, MEAN, CENTRE = range(3)


@define
def isotonic(x: Tensor, valid: Tensor | None, strength: float, kl: bool, sort: bool) -> tuple[Tensor, Tensor]:
    """The soft ranks of the items, or if ``sort`` the soft sort, and the groups in which they are pooled.

    ``groups`` says for each place in the order (descending for ranks, ascending for ``sort``) which item it
    holds: i, or ~i where a group begins; n behind the last valid item. There ``sort`` gives 0, as a rank is
    for an item that isn't valid. float32 or float64.
    """
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.int32)


@define
def group_reduce(x: Tensor, groups: Tensor, mode: int, from_order: bool, to_order: bool, scale: float) -> Tensor:
    """``scale`` times each group's sum, its mean, or x less its mean, by ``mode``, at all members of the group.

    x is given by place in the order if ``from_order``, else by item, and so is the result if ``to_order``.
    """
    return x.new_empty(x.shape)


@define
def group_share(v: Tensor, ranks: Tensor, groups: Tensor, scale: float) -> Tensor:
    """``scale`` times the ranks times what v is above its mean over the group, weighted with the ranks; by item.

    That is the derivative of the "kl" ranks, of which it needs no exponential; it has none itself.
    """
    return v.new_empty(v.shape)


@define
def group_softmax(x: Tensor, groups: Tensor, scale: float, weighted: bool) -> Tensor:
    """The softmax of scale x within each group, times the sum of the group's ranks if ``weighted``; by item."""
    return x.new_empty(x.shape)


def _softmax_derivative(x: Tensor, groups: Tensor, scale: float, weighted: bool, v: Tensor) -> Tensor:
    """The Jacobian of `group_softmax`, which is symmetric, times v."""
    softmax = group_softmax(x, groups, scale, False)
    v = torch.where(softmax == 0, 0, v)  # where an item isn't valid v may be NaN
    moved = v * (group_softmax(x, groups, scale, True) if weighted else softmax)
    return scale * (moved - softmax * group_reduce(moved, groups, SUM, False, False, 1.0))


class Isotonic(Function, op=isotonic):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, _, ctx.strength, ctx.kl, ctx.sort = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x if ctx.kl else None, output[1], output[0] if ctx.kl and not ctx.sort else None)
        ctx.save_for_forward(x if ctx.kl else None, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        x, groups, ranks = ctx.saved_tensors
        if ctx.sort and ctx.kl:
            total = group_reduce(grad, groups, SUM, True, False, 1.0)
            of_x = total * group_softmax(x, groups, -1.0, False)
        elif ctx.sort:
            of_x = group_reduce(grad, groups, MEAN, True, False, 1.0)
        elif ctx.kl and not _lists.is_differentiated():
            of_x = group_share(grad, ranks, groups, 1 / ctx.strength)
        else:
            of_x = _rank_derivative(x, groups, ctx, grad)
        return of_x, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor, None]:
        x, groups = ctx.saved_tensors
        if ctx.sort and ctx.kl:
            softmax = group_softmax(x, groups, -1.0, False)
            return group_reduce(softmax * tangent, groups, SUM, False, True, 1.0), None
        if ctx.sort:
            return group_reduce(tangent, groups, MEAN, False, True, 1.0), None
        return _rank_derivative(x, groups, ctx, tangent), None


def _rank_derivative(x: Tensor, groups: Tensor, ctx: Any, v: Tensor) -> Tensor:
    """The Jacobian of the ranks, which is symmetric, times v."""
    if ctx.kl:
        return _softmax_derivative(x, groups, 1 / ctx.strength, True, v)
    return group_reduce(v, groups, CENTRE, False, False, 1 / ctx.strength)


class GroupReduce(Function, op=group_reduce):
    """Linear; the adjoint reads where it writes."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, groups, *ctx.options = inputs
        ctx.save_for_backward(groups)
        ctx.save_for_forward(groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mode, from_order, to_order, scale = ctx.options
        return group_reduce(grad, *ctx.saved_tensors, mode, to_order, from_order, scale), *[None] * 5

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return group_reduce(tangent, *ctx.saved_tensors, *ctx.options)


class GroupSoftmax(Function, op=group_softmax):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.scale, ctx.weighted = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, groups = ctx.saved_tensors
        return _softmax_derivative(x, groups, ctx.scale, ctx.weighted, grad), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        x, groups = ctx.saved_tensors
        return _softmax_derivative(x, groups, ctx.scale, ctx.weighted, tangent)


for _op in (isotonic, group_reduce, group_share, group_softmax):
    _lists._batch(_op)
    _lists._shard(_op)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_regularization(regularization: str, strength: float) -> None:
    _checks.is_one_of("regularization", regularization, _REGULARIZATIONS)
    _checks.is_positive("regularization_strength", strength)


def _soft(
    values: Tensor, regularization: str, strength: float, mask: Tensor | None, lengths: Tensor | None, sort: bool
) -> Tensor:
    _checks.has_dtype("values", values, _checks.FLOATING)
    if values.dim() == 0:
        raise ValueError("values: expected [..., n], got a single number")
    _check_regularization(regularization, strength)
    valid = valid_items("values", values, mask, lengths)
    return _fitted(_wide(values), valid, float(strength), regularization == "kl", sort).to(values.dtype)


def _fitted(x: Tensor, valid: Tensor | None, strength: float, kl: bool, sort: bool) -> Tensor:
    return _by_lists(lambda x, valid: isotonic(x, valid, strength, kl, sort)[0], x, valid)


def _by_lists(run: Callable[..., Tensor], x: Tensor, valid: Tensor | None) -> Tensor:
    """``run(x, valid)``, which takes lists one by one; of DTensors each process takes its own."""
    if not shards.is_sharded(x):
        return run(x, valid)
    lists = shards.batch_labels(x.dim() - 1) + "N"
    return shards.in_shards(run, f"{lists},{lists}->{lists}", x, valid)


def soft_rank(
    values: Tensor,
    regularization: str = "l2",
    regularization_strength: float = 1.0,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Ranks from 1, the least value's, to n, the greatest's, as a continuous function of the values.

    The projection of values / e, in the Euclidean norm or for "kl" in relative entropy, onto the convex hull
    of the permutations of 1..n, where e is ``regularization_strength``. The smaller e, the nearer to the hard
    ranks, which the result equals where neighbouring values are at least e apart; where they are nearer they
    share their ranks, tied ones equally. For "l2" piecewise linear: its second derivative is 0 but at the
    kinks; "kl" is differentiable to any order between them. In forward mode too.

    Args:
        values: [..., n]; float16, bfloat16, float32 or float64.
        regularization: "l2" or "kl".
        regularization_strength: e > 0.
        mask: [..., n], True for valid items: others are never read, and have rank 0 and no gradient.
        lengths: [...], how many items of each list are valid, from the first on.

    Returns:
        [..., n] in the values' dtype, computed in double and rounded once.

    Raises:
        TypeError: no tensor, a wrong dtype, a strength that is no number.
        ValueError: shapes that don't match, several devices, an unknown ``regularization``, a strength not
            above 0.

    O(n log n) time, O(n) memory; on a GPU the regression of each list is sequential.

    Source: Blondel et al., "Fast Differentiable Sorting and Ranking", ICML 2020; torchsort.

    Example:
        >>> import torch, custom_ops
        >>> x = torch.tensor([2.9, -0.4, 3.1], requires_grad=True)
        >>> ranks = custom_ops.soft_rank(x, regularization_strength=0.5)
        >>> ranks.detach()
        tensor([2.3000, 1.0000, 2.7000])
        >>> ranks[0].backward()
        >>> x.grad
        tensor([ 1.,  0., -1.])
    """
    return _soft(values, regularization, regularization_strength, mask, lengths, sort=False)


def soft_sort(
    values: Tensor,
    regularization: str = "l2",
    regularization_strength: float = 1.0,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """The values in ascending order, as a function that is continuous with its gradient's blocks.

    The projection of (1..n) / e onto the convex hull of the permutations of the values, where e is
    ``regularization_strength``: for e near 0 the sorted values, for larger ones sorted values that are drawn
    towards their mean. For "l2" piecewise linear: its second derivative is 0 but at the kinks; "kl" is
    differentiable to any order between them. In forward mode too.

    Args, dtype, errors and cost as for `soft_rank`; what is masked has no gradient, and behind the valid items the
    result has 0.

    Source: Blondel et al., "Fast Differentiable Sorting and Ranking", ICML 2020; torchsort.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.soft_sort(torch.tensor([2.9, -0.4, 3.1]), regularization_strength=0.1)
        tensor([-0.4000,  2.9000,  3.1000])
    """
    return _soft(values, regularization, regularization_strength, mask, lengths, sort=True)


def spearman_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    regularization: str = "l2",
    regularization_strength: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """1 - Spearman's rank correlation, of the soft ranks of the scores with the ranks of the labels.

    The Pearson correlation of `soft_rank` with the labels' ranks, tied labels sharing theirs; from 0, the same
    order, to 2, the reverse. A list whose labels are all tied, or of less than two items, has loss 0; where all
    scores are tied the correlation counts as 0, without a gradient. Its derivatives are those of `soft_rank`.

    Args:
        scores: [..., n]; float16, bfloat16, float32 or float64.
        labels: [..., n] of any real dtype, without a gradient.
        mask: [..., n], True for valid items: others are never read and have no gradient.
        lengths: [...], how many items of each list are valid, from the first on.
        regularization, regularization_strength: those of `soft_rank`.
        reduction: "mean" over the lists whose labels differ (0 if there is none), "sum", or "none" for one
            number for each list.

    Returns:
        A scalar or [...] in the scores' dtype, under autocast float32.

    Raises:
        TypeError: no tensor, a wrong dtype, a strength that is no number.
        ValueError: labels that require a gradient, shapes that don't match, several devices, an unknown
            ``regularization`` or ``reduction``, a strength not above 0.

    O(n log n) time, O(n) memory.

    Source: Blondel et al., "Fast Differentiable Sorting and Ranking", ICML 2020.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.spearman_loss(torch.tensor([1.0, 5.0, 9.0]), torch.tensor([1, 3, 2]))
        tensor(0.5000)
    """
    valid = _lists.checked(scores, labels, mask, lengths, None, None, reduction)
    _check_regularization(regularization, regularization_strength)
    arguments = (valid, float(regularization_strength), regularization == "kl", False)
    wanted = _by_lists(_ranks, labels.detach(), valid)
    ranks = _fitted(_wide(scores), *arguments).double()
    count: Any = scores.shape[-1] if valid is None else valid.sum(-1, keepdim=True)
    mean = (count + 1) / 2  # of both, whatever the scores
    ours, theirs = (x - mean if valid is None else torch.where(valid, x - mean, 0) for x in (ranks, wanted))
    spread, active = (ours * ours).sum(-1), (theirs * theirs).sum(-1) > 0
    defined = active & ~_tied(spread, count if valid is None else count.squeeze(-1))
    scale = spread * (theirs * theirs).sum(-1)
    correlation = torch.where(defined, (ours * theirs).sum(-1) * torch.where(defined, scale, 1).rsqrt(), 0)
    loss = _lists.reduce(torch.where(active, 1 - correlation, 0), active, None, reduction)
    return loss.float() if torch.is_autocast_enabled(scores.device.type) else loss.to(scores.dtype)


def _tied(spread: Tensor, n: int | Tensor) -> Tensor:
    """Whether n soft ranks, whose squared distances from their mean sum up to ``spread``, differ by rounding only."""
    rounding = 64 * torch.finfo(torch.float64).eps * n
    return spread <= n * rounding * rounding


def _ranks(x: Tensor, valid: Tensor | None) -> Tensor:
    """Ranks from 1 of the valid items, ascending, those of tied ones averaged; in double."""
    x = x.double()
    if valid is not None:
        x = x.masked_fill(~valid, torch.inf)  # last; only tied with infinite labels
    x = x.contiguous()
    ordered = x.sort(dim=-1).values
    below, through = (torch.searchsorted(ordered, x, side=side, out_int32=True) for side in ("left", "right"))
    return (below + through + 1).double() / 2


class SpearmanLoss(torch.nn.Module):
    """`spearman_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> loss = custom_ops.SpearmanLoss(regularization_strength=0.1)
        >>> loss(torch.tensor([0.5, 0.1, 0.9]), torch.tensor([2, 0, 1]))
        tensor(0.5000)
    """

    def __init__(
        self, regularization: str = "l2", regularization_strength: float = 1.0, reduction: str = "mean"
    ) -> None:
        super().__init__()
        _check_regularization(regularization, regularization_strength)
        _checks.is_one_of("reduction", reduction, _checks.REDUCTIONS)
        self.regularization, self.regularization_strength = regularization, regularization_strength
        self.reduction = reduction

    def forward(
        self, scores: Tensor, labels: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        options: dict[str, Any] = {
            "regularization": self.regularization,
            "regularization_strength": self.regularization_strength,
        }
        return spearman_loss(scores, labels, mask=mask, lengths=lengths, reduction=self.reduction, **options)

    def extra_repr(self) -> str:
        own = f"{self.regularization!r}, regularization_strength={self.regularization_strength}"
        return f"regularization={own}, reduction={self.reduction!r}"


# ---------------------------------------------------------------- plain PyTorch


def _pools(a: list[float], b: list[float], kl: bool) -> list[int]:
    """Where the pools begin of the non-increasing fit of (a, b): by definition, one violation at a time."""

    def add(x: float, y: float) -> float:
        if not kl:
            return x + y
        return max(x, y) + torch.tensor(-abs(x - y), dtype=torch.float64).exp().log1p().item()

    def fit(pool: tuple[float, float, int]) -> float:
        return pool[0] - pool[1] if kl else pool[0] / pool[1]

    pools: list[tuple[float, float, int]] = []
    for place, pool in enumerate(zip(a, b)):
        new = (*pool, place)
        while pools and fit(pools[-1]) <= fit(new):
            before = pools.pop()
            new = (add(before[0], new[0]), add(before[1], new[1]), before[2])
        pools.append(new)
    return [begin for _, _, begin in pools]


def _soft_row(x: Tensor, strength: float, kl: bool, sort: bool) -> Tensor:
    """The soft ranks, or the soft sort, of one list: given the pools, a formula in torch's own ops."""
    n = len(x)
    s, order = (-x if sort else x / strength).sort(descending=True, stable=True)
    w = torch.arange(n, 0, -1, device=x.device).to(x) / (strength if sort else 1.0)
    first, second = (w, s) if sort else (s, w.log() if kl else w)
    a, b = (first, second) if kl else (first - second, torch.ones_like(s))
    begins = _pools(a.tolist(), b.tolist(), kl)
    pool = torch.zeros(n, dtype=torch.int64, device=x.device)
    pool[torch.tensor(begins, dtype=torch.int64, device=x.device)] = 1
    pool = pool.cumsum(0) - 1

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(len(begins)).index_add(0, pool, values)[pool]

    def log_total(values: Tensor) -> Tensor:
        top = values.detach().new_full((len(begins),), -torch.inf).scatter_reduce(0, pool, values.detach(), "amax")
        return total((values - top[pool]).exp()).log() + top[pool]

    if kl:
        fit = log_total(first) - log_total(second)
    else:
        fit = total(first - second) / total(torch.ones_like(s))
    if sort:
        return fit - w
    ranks = (s - fit).exp() if kl else s - fit
    return torch.zeros_like(ranks).index_add(0, order, ranks)


def _soft_reference(
    values: Tensor, regularization: str, strength: float, mask: Tensor | None, lengths: Tensor | None, sort: bool
) -> Tensor:
    if values.numel() == 0:
        return values.clone()
    valid = valid_items("values", values, mask, lengths)
    n = values.shape[-1]
    x = values.reshape(-1, n)
    kept = torch.ones_like(x, dtype=torch.bool) if valid is None else valid.reshape(-1, n)
    rows = []
    for row, keep in zip(x, kept):
        at = keep.nonzero().squeeze(-1)
        soft = _soft_row(row[at], strength, regularization == "kl", sort)
        rows.append(row.new_zeros(n).index_add(0, torch.arange(len(at)).to(at) if sort else at, soft))
    return torch.stack(rows).view(values.shape)


def soft_rank_reference(
    values: Tensor,
    regularization: str = "l2",
    regularization_strength: float = 1.0,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    return _soft_reference(values, regularization, regularization_strength, mask, lengths, sort=False)


def soft_sort_reference(
    values: Tensor,
    regularization: str = "l2",
    regularization_strength: float = 1.0,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    return _soft_reference(values, regularization, regularization_strength, mask, lengths, sort=True)


def spearman_loss_reference(
    scores: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    regularization: str = "l2",
    regularization_strength: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    if scores.numel() == 0:
        return scores.sum(-1) if reduction == "none" else scores.sum()
    valid = valid_items("scores", scores, mask, lengths)
    n = scores.shape[-1]
    x, y = scores.reshape(-1, n), labels.reshape(-1, n)
    kept = torch.ones_like(x, dtype=torch.bool) if valid is None else valid.reshape(-1, n)
    losses, actives = [], []
    for row, wanted, keep in zip(x, y, kept):
        row, wanted = row[keep], wanted[keep].to(row)
        below, above = (wanted[:, None] > wanted).sum(1), (wanted[:, None] < wanted).sum(1)
        theirs = (below - above).to(row) / 2
        actives.append(bool((theirs != 0).any()))
        if actives[-1]:
            ours = _soft_row(row, regularization_strength, regularization == "kl", False) - (len(row) + 1) / 2
            spread = ours.pow(2).sum()
            tied = _tied(spread, len(row))
            scale = torch.where(tied, 1, spread) * theirs.pow(2).sum()
            losses.append(1 - torch.where(tied, 0, (ours * theirs).sum() / scale.sqrt()))
        else:
            losses.append(row.sum() * 0)
    loss = torch.stack(losses)
    if reduction == "none":
        return loss.view(scores.shape[:-1])
    return loss.sum() / (max(sum(actives), 1) if reduction == "mean" else 1)


# ---------------------------------------------------------------- registry


def _draw(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Values of which some lie near each other and some far, away from the kinks of the samples below."""
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.to(device, dtype).requires_grad_()


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    mask = torch.tensor([[True, False, True, True]], device=device)
    lengths = torch.tensor([3, 0], device=device)
    return [
        Sample((_draw(device, dtype, 2, 3),), dynamic={0: 0}),
        Sample((_draw(device, dtype, 4), "kl", 0.5)),
        Sample((_draw(device, dtype, 1, 4), "l2", 0.3), {"mask": mask}),
        Sample((_draw(device, dtype, 2, 3), "kl"), {"lengths": lengths}),
        Sample((_draw(device, dtype, 2, 0),)),
    ]


def _spearman_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    labels = torch.tensor([[0, 2, 1, 1], [3, 1, 0, 2], [1, 1, 1, 1]], device=device).to(dtype)
    mask = torch.tensor([[True, True, False, True]], device=device)
    lengths = torch.tensor([3, 1, 4], device=device)
    kl = {"regularization": "kl", "regularization_strength": 0.5}
    return [
        Sample((_draw(device, dtype, 3, 4), labels), dynamic={0: 0, 1: 0}),
        Sample((_draw(device, dtype, 1, 4), labels[:1]), {"mask": mask, "reduction": "none"}),
        Sample((_draw(device, dtype, 3, 4), labels), {"lengths": lengths, "reduction": "sum"}),
        Sample((_draw(device, dtype, 1, 4), labels[1:2]), kl),
        Sample((_draw(device, dtype, 2, 0), labels[:2, :0])),
    ]


def _bad_calls() -> list[BadCall]:
    x = torch.ones(2, 3)
    return [
        BadCall(([1.0],), "values: expected a tensor, got list"),
        BadCall((x.int(),), "values: expected one of float16"),
        BadCall((x[0, 0],), r"values: expected \[..., n\], got a single number"),
        BadCall((x, "l1"), "regularization: expected one of 'l2', 'kl', got 'l1'"),
        BadCall((x, "l2", 0), "regularization_strength: expected a positive number, got 0"),
        BadCall((x,), "mask: expected one of bool", {"mask": x}),
        BadCall((x,), r"mask: expected shape \[2, 3\], got \[3\]", {"mask": x[0] > 0}),
        BadCall((x,), r"lengths: expected shape \[2\], got \[1\]", {"lengths": torch.tensor([1])}),
    ]


def _make(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor]:
    return (torch.randn(shape, device=device, requires_grad=True),)


_NOT_FUZZED = {
    "NaN": "they have no place in the order",
    "infinite": "inf - inf",
    "large": "the reference's differences lose the ranks",
}
_SHAPES = ((64, 128), (16, 1024), (4, 4096))
_BENCHMARKS = [
    Benchmark(
        unit="lists, items",
        sizes=_SHAPES,
        make=_make,
        kwargs={"regularization": regularization},
        peers={f"torchsort, {regularization}": f"custom_ops.benchmarks.torchsort_peers:soft_rank_{regularization}"},
        targets=[Target(shape, f"torchsort, {regularization}", 1 / 2.5) for shape in _SHAPES],
    )
    for regularization in _REGULARIZATIONS
]

register(
    OpInfo(
        name="soft_rank",
        summary="Differentiable ranks, by projection onto the permutahedron",
        function=soft_rank,
        reference=soft_rank_reference,
        not_fuzzed=_NOT_FUZZED,
        samples=_samples,
        bad_calls=_bad_calls,
        benchmarks=_BENCHMARKS,
    )
)
register(
    OpInfo(
        name="soft_sort",
        summary="Differentiable sorting, by projection onto the permutahedron",
        function=soft_sort,
        reference=soft_sort_reference,
        not_fuzzed=_NOT_FUZZED,
        samples=_samples,
        native=lambda x: x.sort().values,
        bad_calls=_bad_calls,
    )
)
register(
    OpInfo(
        name="spearman_loss",
        summary="1 - Spearman's rank correlation, with soft ranks",
        function=spearman_loss,
        reference=spearman_loss_reference,
        not_fuzzed={**_NOT_FUZZED, "tiny": "in float32 ranks that hardly differ lose their differences"},
        samples=_spearman_samples,
        modules=lambda: [
            (SpearmanLoss(), {}),
            (
                SpearmanLoss("kl", 0.5, "sum"),
                {"regularization": "kl", "regularization_strength": 0.5, "reduction": "sum"},
            ),
        ],
        bad_calls=lambda: [
            BadCall((None, torch.ones(2)), "scores: expected a tensor, got NoneType"),
            BadCall((torch.ones(2), torch.ones(3)), r"labels: expected shape \[2\], got \[3\]"),
            BadCall((torch.ones(2), torch.ones(2).requires_grad_()), "labels: expected a tensor without gradient"),
            BadCall((torch.ones(2), torch.ones(2)), "regularization: expected one of", {"regularization": "l1"}),
            BadCall((torch.ones(2), torch.ones(2)), "reduction: expected one of", {"reduction": "avg"}),
        ],
    )
)
