"""Contrastive losses: each query is closer to its key than to the other keys of a batch.

They are problems of a catalogue whose words are the keys, and have its ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from custom_ops import _checks, shards
from custom_ops._leaf import leaf
from custom_ops._wide import under_autocast, wide
from custom_ops.ranking.catalogue import (
    NONE_IGNORED,
    Words,
    catalogue_log_prob,
    checked_arguments,
    is_cut,
    one_number,
    sum_in_both_directions,
    sum_over_rows,
    wide_dtype,
)


@leaf
def info_nce_loss(
    query: Tensor,
    key: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor,
    symmetric: bool = True,
    mask: Tensor | None = None,
    query_group: Tensor | None = None,
    key_group: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return InfoNCE's loss: each query should be closer to its key than to all other keys of the batch.

    With the similarities ``z_ij = query_i key_j / temperature`` and the key t of query i, the query's loss is

    ``lse_j(z_ij) - z_it``, or if ``symmetric`` ``(lse_j(z_ij) - z_it) / 2 + (lse_k(z_kt) - z_it) / 2``

    The second form also asks which of the queries belongs to the key, as CLIP does. Similarities are products as they
    are: normalise the rows of both if cosines are meant. The matrix of similarities is never in memory, unless it is
    for ``mask``. The loss is differentiable in query, key and temperature, twice and in forward mode. All that is said
    at `linear_cross_entropy` of dtypes, autocast, derivatives in the forward pass and memory holds here too.

    Args:
        query: ``[N, D]``; float16, bfloat16, float32 or float64.
        key: ``[M, D]``: the keys of the queries, and others.
        target: integers ``[N]``, the place of each query's key; by default query i has the key i.
        temperature: a positive number, or a tensor of one number, which may need a gradient; where a tensor isn't
            positive, the loss is NaN.
        symmetric: ask for the query of each key, too.
        mask: bool ``[N, M]``, False for the keys that aren't compared with a query, such as false negatives. A query
            is always compared with its own key.
        query_group, key_group: integers ``[N]`` and ``[M]``. A query isn't compared with other keys of its group,
            which takes no memory of N x M. The keys of N queries have the groups of the queries by default.
        reduction: "mean", "sum" or "none".

    Returns:
        A scalar, or for "none" one loss for each query. The mean over no query is 0.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes that don't match, fewer keys than queries have, tensors on several devices, a temperature
            that isn't positive, a ``key_group`` alone, an unknown ``reduction``.
        RuntimeError: a target out of range; on a GPU it is an assertion on the device.

    Source: van den Oord, Li, Vinyals, "Representation learning with contrastive predictive coding", 2018; in both
    directions in Radford et al., "Learning transferable visual models from natural language supervision", 2021.

    Example:
        >>> import torch, custom_ops
        >>> query = torch.eye(2, requires_grad=True)
        >>> loss = custom_ops.info_nce_loss(query, torch.eye(2), temperature=0.5)
        >>> loss.backward()
        >>> loss.detach(), query.grad
        (tensor(0.1269), tensor([[-0.1192,  0.1192],
                [ 0.1192, -0.1192]]))
    """
    _checks.is_one_of("reduction", reduction, _checks.REDUCTIONS)
    both = _checks.as_bool("symmetric", symmetric)
    _are_pairs(query, key, target)
    if shards.is_sharded(query, key, target, mask, query_group, key_group):
        kept = mask, query_group, key_group
        return _contrastive_in_shards(both, query, key, target, temperature, None, None, *kept, reduction)
    rows, keys, dtype = query.shape[0], key.shape[0], torch.promote_types(query.dtype, key.dtype)
    places = torch.arange(rows, device=query.device)
    own = places if target is None else target
    found = [_similarities(query, key, own, temperature, None, None, mask, query_group, key_group)]
    if both and target is None and reduction != "none":
        tensors, (scale, *_) = found[0]
        total = sum_in_both_directions(tensors, scale)[0] * (0.5 / max(rows, 1) if reduction == "mean" else 0.5)
        return total if under_autocast(query) else total.to(dtype)
    if both:
        chosen = slice(rows) if target is None else own.to(torch.int64).clamp(0, max(keys - 1, 0))
        compared = None if mask is None else mask[:, chosen].T
        of_key = query_group if key_group is None else key_group
        of_key = None if of_key is None else of_key[chosen]
        found.append(_similarities(key[chosen], query, places, temperature, None, None, compared, of_key, query_group))
    share = torch.full_like(places, -1, dtype=wide_dtype(found[0][0][0])).unsqueeze(0) / len(found)
    return _contrastive(found, share, reduction, dtype, under_autocast(query))


def _contrastive(found: Sequence[Any], share: Tensor, reduction: str, dtype: torch.dtype, lowered: bool) -> Tensor:
    """Return the loss of the arguments ``found`` of one or two directions, whose rows' log_prob have that ``share``."""
    if reduction == "none":
        losses = [share[0] * catalogue_log_prob(*arguments, *options, False)[0][0] for arguments, options in found]
    else:
        share = share / max(share.shape[1], 1) if reduction == "mean" else share
        losses = [sum_over_rows(share, None, arguments, options)[0] for arguments, options in found]
    loss = sum(losses[1:], losses[0])
    return loss if lowered else loss.to(dtype)


def _similarities(
    query: Tensor,
    key: Tensor,
    own: Tensor,
    temperature: float | Tensor,
    bias: float | Tensor | None,
    positive: Tensor | None,
    mask: Tensor | None,
    query_group: Tensor | None,
    key_group: Tensor | None,
    words: Words | None = None,
) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return tensors and options as ops take them. The problem is binary if there is a bias.

    ``words`` says which of all keys these are.
    """
    left_out = _left_out(query, key, mask, query_group, key_group)
    keys = key.shape[0]
    if positive is not None:
        left_out = _with_positive(query, key, positive, left_out[0]), *left_out[1:]
    query, scale = _heated(query, temperature)
    of_keys: Tensor | None = None
    if isinstance(bias, Tensor):
        shift = one_number("bias", bias, query)
        _checks.same_device(query=query, bias=shift)
        # The bias is spread in float64, as is the sum of its gradient, since torch's sums depend on the threads.
        of_keys = shift.double().expand(keys).to(torch.promote_types(wide_dtype(query), wide_dtype(key)))
    elif bias is not None:
        of_keys = query.new_ones(keys, dtype=torch.float64) * _checks.as_float("bias", bias)
    named = ("query", query), ("key", key), own, ("bias", of_keys)
    tensors, (scale, ignored, first, total, _) = checked_arguments(*named, scale, NONE_IGNORED, "temperature")
    if words is not None:
        first, total = words.first, words.total
    # With several right keys, or none, the target is one beyond the last. Torch 2.10 can't add a boolean to a size.
    return (*tensors[:4], *left_out), (scale, ignored, first, total + int(positive is not None), bias is not None)


def _contrastive_in_shards(
    both: bool,
    query: Tensor,
    key: Tensor,
    target: Tensor | None,
    temperature: float | Tensor,
    bias: float | Tensor | None,
    positive: Tensor | None,
    mask: Tensor | None,
    query_group: Tensor | None,
    key_group: Tensor | None,
    reduction: str,
) -> Tensor:
    """Return a contrastive loss for DTensors, of which queries and keys may be sharded.

    Where both are in the same dimension of the mesh, the keys are gathered, and for the second direction the queries.
    """
    given = [
        t for t in (query, key, target, positive, mask, query_group, key_group, temperature, bias) if t is not None
    ]
    like = next(t for t in given if shards.is_sharded(t))

    def spread(t: Any) -> Any:
        return shards.replicated(t, like) if isinstance(t, Tensor) and not shards.is_sharded(t) else t

    dtype, rows = torch.promote_types(query.dtype, key.dtype), query.shape[0]
    lowered, is_own = under_autocast(query), target is None and rows == key.shape[0]
    query, key, temperature, bias = (spread(t) for t in (query, key, temperature, bias))
    places = spread(torch.arange(rows, device=query.device))
    own = places if target is None else spread(target)
    if positive is not None:
        own = own * 0 + key.shape[0]
    key_group = query_group if key_group is None else key_group
    positive, mask, query_group, key_group = (spread(t) for t in (positive, mask, query_group, key_group))
    log_prob = _in_one_direction(query, key, own, temperature, bias, positive, mask, query_group, key_group)
    if both:
        chosen = key
        if not is_own:
            chosen, key_group = _picked(key, own), None if key_group is None else _picked(key_group, own)
        if mask is not None:
            compared = mask if is_own else shards.in_shards(lambda m, k: m[:, k], "nV,k->nk", _whole(mask, 1), own)
            mask = shards.in_shards(lambda m: m.T, "nv->vn", compared)
        turned = _in_one_direction(chosen, query, places, temperature, None, None, mask, key_group, query_group)
        log_prob = (log_prob + turned) / 2
    loss = -log_prob
    if reduction != "none":
        loss = loss.sum(dtype=torch.float64) / (max(rows, 1) if reduction == "mean" else 1)
    return loss.to(torch.promote_types(dtype, torch.float32) if lowered else dtype)


def _whole(t: Any, dim: int) -> Any:
    """Return the DTensor without shards in that dimension."""
    from torch.distributed.tensor import Replicate

    return t.redistribute(placements=[Replicate() if p.is_shard(dim) else p for p in t.placements])


def _picked(t: Any, at: Any) -> Any:
    """Return the rows ``at`` of the DTensor t, whose rows may be sharded."""
    words, tail = Words.of(at * 0, t), "D" * (t.dim() - 1)

    def run(t: Tensor, at: Tensor) -> Tensor:
        here = at.to(torch.int64) - words.first
        found = t[here.clamp(0, max(len(t) - 1, 0))] if len(t) else t.new_zeros(len(at), *t.shape[1:])
        is_here = (here >= 0) & (here < len(t))
        return torch.where(is_here.view(-1, *[1] * (t.dim() - 1)), found, 0)

    return shards.summed_up(shards.in_shards(run, f"v{tail},n->n{tail}", t, at))


def _in_one_direction(
    query: Any, key: Any, own: Any, temperature: Any, bias: Any, positive: Any, mask: Any, of_query: Any, of_key: Any
) -> Any:
    """Return the log-probability of each row's own keys, for DTensors."""
    from torch.distributed.tensor import Replicate

    words = Words.of(query, key)

    def along(t: Any) -> Any:
        """Return t without shards where neither queries nor keys have any."""
        if t is None:
            return None
        cut = [is_cut(query, at) or is_cut(key, at) for at in range(len(t.placements))]
        return t.redistribute(placements=[p if is_cut else Replicate() for p, is_cut in zip(t.placements, cut)])

    def run(query: Tensor, key: Tensor, own: Tensor, *others: Any) -> Tensor:
        given = iter(others)
        heat, shift = (next(given) if isinstance(number, Tensor) else number for number in (temperature, bias))
        right, kept, of_rows, of_words = given
        arguments, numbers = _similarities(query, key, own, heat, shift, right, kept, of_rows, of_words, words)
        log_prob, _, lse, *_ = catalogue_log_prob(*arguments, *numbers, False)
        if numbers[-1] or words.parts == 1:
            return log_prob[0]
        return words.own(words.score(log_prob[0], lse[0], own.to(torch.int64)), lse[0])

    numbers = [number for number in (temperature, bias) if isinstance(number, Tensor)]
    pairs = [along(t) for t in (positive, mask, of_query, of_key)]
    labels = "nD,vD,n" + "," * len(numbers) + ",nv,nv,n,v"
    tensors = query, key, along(own), *numbers, *pairs
    if bias is not None or words.parts == 1:
        return shards.in_shards(run, f"{labels}->n", *tensors)
    of_parts = shards.summed_up(shards.in_shards(run, f"{labels}->KTn", *tensors))

    def joined(of_parts: Tensor) -> Tensor:
        score, lse = of_parts.unbind(1)
        return score.sum(0) - lse.logsumexp(0)

    return shards.in_shards(joined, "KTn->n", of_parts)


@leaf
def sigmoid_contrastive_loss(
    query: Tensor,
    key: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor,
    bias: float | Tensor = 0.0,
    positive: Tensor | None = None,
    mask: Tensor | None = None,
    query_group: Tensor | None = None,
    key_group: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return SigLIP's loss: each pair of a query and a key is a binary problem of its own.

    With the similarities ``z_ij = query_i key_j / temperature + bias``, the loss of query i is

    ``sum_j log(1 + e^(-z_ij))`` over its own keys, ``+ sum_j log(1 + e^(z_ij))`` over the others.

    Similarities are products as they are: normalise the rows of both if cosines are meant. The authors start with a
    temperature of 0.1 and a bias of -10, and learn both. The matrix of similarities is never in memory, unless it is
    for ``positive`` or ``mask``. The loss is differentiable in query, key, temperature and bias, twice and in forward
    mode. All that is said at `linear_cross_entropy` of dtypes, autocast, derivatives in the forward pass and memory
    holds here too.

    Args:
        query: ``[N, D]``; float16, bfloat16, float32 or float64.
        key: ``[M, D]``: the keys of the queries, and others.
        target: integers ``[N]``, the place of each query's key; by default query i has the key i.
        temperature: a positive number, or a tensor of one number, which may need a gradient; where a tensor isn't
            positive, the loss is NaN.
        bias: a number, or a tensor of one number, which may need a gradient.
        positive: bool ``[N, M]``, True for a query's own keys, of which it may have none or several; instead of
            ``target``.
        mask: bool ``[N, M]``, False for the keys that aren't compared with a query, such as false negatives. A query
            is always compared with its own keys.
        query_group, key_group: integers ``[N]`` and ``[M]``. A query isn't compared with other keys of its group,
            which takes no memory of N x M. The keys of N queries have the groups of the queries by default.
        reduction: "mean" over the queries, "sum" or "none".

    Returns:
        A scalar, or for "none" one loss for each query. The mean over no query is 0.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes that don't match, fewer keys than queries have, tensors on several devices, a temperature
            that isn't positive, both ``target`` and ``positive``, a ``key_group`` alone, an unknown ``reduction``.
        RuntimeError: a target out of range; on a GPU it is an assertion on the device.

    Source: Zhai, Mustafa, Kolesnikov, Beyer, "Sigmoid loss for language image pre-training", 2023.

    Example:
        >>> import torch, custom_ops
        >>> query = torch.eye(2, requires_grad=True)
        >>> loss = custom_ops.sigmoid_contrastive_loss(query, torch.eye(2), temperature=0.5, bias=-1.0)
        >>> loss.backward()
        >>> loss.detach(), query.grad
        (tensor(0.6265), tensor([[-0.2689,  0.2689],
                [ 0.2689, -0.2689]]))
    """
    _checks.is_one_of("reduction", reduction, _checks.REDUCTIONS)
    _are_pairs(query, key, target, positive is not None)
    if positive is not None and target is not None:
        raise ValueError("positive: expected no target beside it, got both")
    if not isinstance(bias, Tensor):
        bias = _checks.as_float("bias", bias)
    if shards.is_sharded(query, key, target, positive, mask, query_group, key_group):
        pairs = positive, mask, query_group, key_group
        return _contrastive_in_shards(False, query, key, target, temperature, bias, *pairs, reduction)
    dtype = torch.promote_types(query.dtype, key.dtype)
    own = torch.arange(query.shape[0], device=query.device) if target is None else target
    if positive is not None:
        own = torch.full_like(own, key.shape[0])
    found = _similarities(query, key, own, temperature, bias, positive, mask, query_group, key_group)
    share = torch.full_like(own, -1, dtype=wide_dtype(found[0][0])).unsqueeze(0)
    return _contrastive([found], share, reduction, dtype, under_autocast(query))


def _are_pairs(query: Tensor, key: Tensor, target: Tensor | None, any_number: bool = False) -> None:
    _checks.has_dtype("query", query, _checks.FLOATING)
    _checks.has_dtype("key", key, _checks.FLOATING)
    _checks.has_dims("query", query, "[N, D]")
    _checks.has_dims("key", key, "[M, D]")
    rows, keys = query.shape[0], key.shape[0]
    if not any_number and (keys < rows if target is None else keys == 0 < rows):
        raise ValueError(f"key: expected one for each of {rows} queries, got {keys}")


def _heated(query: Tensor, temperature: float | Tensor) -> tuple[Tensor, float]:
    """Return queries and a factor whose product is the query divided by the temperature."""
    if not isinstance(temperature, Tensor):
        return query, 1.0 / _checks.as_positive("temperature", temperature)
    divisor = one_number("temperature", temperature, query)
    _checks.same_device(query=query, temperature=divisor)
    return wide(query) / torch.where(divisor > 0, divisor, torch.nan), 1.0


def _of_pairs(name: str, value: Tensor, query: Tensor, key: Tensor) -> None:
    _checks.has_dtype(name, value, (torch.bool,))
    if value.shape != (query.shape[0], key.shape[0]):
        raise ValueError(f"{name}: expected shape {[query.shape[0], key.shape[0]]}, got {list(value.shape)}")


def _with_positive(query: Tensor, key: Tensor, positive: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mask as ops take it, with the number 2 for a query's own keys."""
    _of_pairs("positive", positive, query, key)
    _checks.same_device(query=query, positive=positive)
    return (positive.to(torch.uint8) + 1).unsqueeze(0) if mask is None else mask.masked_fill(positive, 2)


def _left_out(
    query: Tensor, key: Tensor, mask: Tensor | None, query_group: Tensor | None, key_group: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Check the arguments that leave keys out, and return them as ops take them."""
    given: dict[str, Tensor] = {"query": query}
    if mask is not None:
        _of_pairs("mask", mask, query, key)
        given["mask"] = mask
    for name, group, rows in (("query_group", query_group, query), ("key_group", key_group, key)):
        if group is not None:
            _checks.is_integer(name, group)
            if group.shape != rows.shape[:1]:
                raise ValueError(f"{name}: expected shape {list(rows.shape[:1])}, got {list(group.shape)}")
            given[name] = group
    if query_group is None and key_group is not None:
        raise ValueError("key_group: expected a query_group beside it, got None")
    if key_group is None and query_group is not None:
        if query.shape[0] != key.shape[0]:
            raise ValueError(f"key_group: expected one for {query.shape[0]} queries and {key.shape[0]} keys, got None")
        key_group = query_group
    _checks.same_device(**given)
    batched = [None if group is None else group.to(torch.int64).unsqueeze(0) for group in (query_group, key_group)]
    return None if mask is None else mask.to(torch.uint8).unsqueeze(0), batched[0], batched[1]


# ---------------------------------------------------------------- layers


class InfoNCELoss(torch.nn.Module):
    """Apply `info_nce_loss` as a layer with a fixed temperature.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.InfoNCELoss(temperature=0.5)(torch.eye(2), torch.eye(2))
        tensor(0.1269)
    """

    def __init__(self, temperature: float, symmetric: bool = True, reduction: str = "mean") -> None:
        super().__init__()
        self.temperature = _checks.as_positive("temperature", temperature)
        self.symmetric = _checks.as_bool("symmetric", symmetric)
        _checks.is_one_of("reduction", reduction, _checks.REDUCTIONS)
        self.reduction = reduction

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        target: Tensor | None = None,
        mask: Tensor | None = None,
        query_group: Tensor | None = None,
        key_group: Tensor | None = None,
    ) -> Tensor:
        left_out: dict[str, Any] = {"mask": mask, "query_group": query_group, "key_group": key_group}
        options: dict[str, Any] = {"temperature": self.temperature, "symmetric": self.symmetric}
        return info_nce_loss(query, key, target, **left_out, **options, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, symmetric={self.symmetric}, reduction={self.reduction!r}"


class SigmoidContrastiveLoss(torch.nn.Module):
    """Apply `sigmoid_contrastive_loss` as a layer with a fixed temperature and bias.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.SigmoidContrastiveLoss(temperature=0.5, bias=-1.0)(torch.eye(2), torch.eye(2))
        tensor(0.6265)
    """

    def __init__(self, temperature: float, bias: float = 0.0, reduction: str = "mean") -> None:
        super().__init__()
        self.temperature = _checks.as_positive("temperature", temperature)
        self.bias = _checks.as_float("bias", bias)
        _checks.is_one_of("reduction", reduction, _checks.REDUCTIONS)
        self.reduction = reduction

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        target: Tensor | None = None,
        positive: Tensor | None = None,
        mask: Tensor | None = None,
        query_group: Tensor | None = None,
        key_group: Tensor | None = None,
    ) -> Tensor:
        pairs: dict[str, Any] = {"positive": positive, "mask": mask, "query_group": query_group, "key_group": key_group}
        options: dict[str, Any] = {"temperature": self.temperature, "bias": self.bias, "reduction": self.reduction}
        return sigmoid_contrastive_loss(query, key, target, **pairs, **options)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, bias={self.bias}, reduction={self.reduction!r}"
