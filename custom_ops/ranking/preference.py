"""Losses of one margin per pair of a preferred and a rejected item."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from custom_ops import _checks, library
from custom_ops._bilinear import add
from custom_ops._enums import PreferenceLoss
from custom_ops._leaf import leaf
from custom_ops._native import define
from custom_ops._wide import under_autocast, wide
from custom_ops.library import Function

_SIGNS = (1, -1, -1, 1)  # the signs of chosen, rejected, chosen_offset and rejected_offset in the difference


@define
def preference(
    chosen: Tensor,
    rejected: Tensor,
    chosen_offset: Tensor | None,
    rejected_offset: Tensor | None,
    kind: int,
    margin: float,
    beta: float,
    p: float,
    q: float,
    divisor: int,
    reduce: bool,
    batch_dims: int,
) -> Tensor:
    """Return the loss of ``d = (chosen - chosen_offset) - (rejected - rejected_offset) - margin``, exact in any order.

    Without a ``rejected_offset`` it is ``(chosen - rejected) - chosen_offset - margin``.

    ``kind`` selects the loss, with z = beta d: p softplus(-z) + q softplus(z); max(0, 1 - z); (d - p)^2; sigmoid(z)
    (log sigmoid(z) + p) + sigmoid(-z) (log sigmoid(-z) + q); p sigmoid(-z) + q sigmoid(z); or sigmoid(-p z)
    softplus(-z) + sigmoid(p z) exp(-z). The first ``batch_dims`` dimensions are the batch. ``reduce`` sums over the
    others and, if ``divisor`` isn't 0, divides by it; the caller gives ``divisor`` because the elements may be sharded.
    """
    return chosen.new_empty(chosen.shape[:batch_dims] if reduce else chosen.shape)


@define
def preference_slope(
    weight: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    chosen_offset: Tensor | None,
    rejected_offset: Tensor | None,
    order: int,
    kind: int,
    margin: float,
    beta: float,
    p: float,
    q: float,
    divisor: int,
    reduce: bool,
) -> Tensor:
    """Return ``weight`` times the loss's derivative of order 1, 2 or 3 with respect to d, for each element."""
    return chosen.new_empty(chosen.shape)


def _along(moves: Sequence[Tensor | None]) -> Tensor | None:
    """Return the tangent of d for the tangents of its four tensors."""
    return add(*(move if move is None or sign > 0 else -move for move, sign in zip(moves, _SIGNS)))


def _back(slope: Tensor | None, needed: Sequence[bool]) -> list[Tensor | None]:
    """Return the gradients of the four tensors for the gradient of d."""
    return [
        (slope if sign > 0 else -slope) if needs and slope is not None else None for needs, sign in zip(needed, _SIGNS)
    ]


class Preference(Function, op=preference):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.batch_dims = inputs[:4] + inputs[11:]
        ctx.parameters = inputs[4:11]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slope = PreferenceSlope.apply(grad, *ctx.saved_tensors, 1, *ctx.parameters)
        return *_back(slope, ctx.needs_input_grad), *[None] * 8

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        tensors, reduce = [wide(t) for t in ctx.saved_tensors], ctx.parameters[-1]
        ones = tensors[0].new_ones(tensors[0].shape[: ctx.batch_dims] if reduce else tensors[0].shape)
        slope = preference_slope(ones, *tensors, 1, *ctx.parameters)
        return _summed(_along([wide(t) for t in tangents[:4]]) * slope, ones).to(ctx.saved_tensors[0].dtype)


class PreferenceSlope(Function, op=preference_slope):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.order = inputs[:6]
        ctx.parameters = inputs[6:]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        weight, *tensors = ctx.saved_tensors
        of_weight = of_difference = None
        if ctx.needs_input_grad[0]:
            slope = preference_slope(torch.ones_like(wide(weight)), *map(wide, tensors), ctx.order, *ctx.parameters)
            of_weight = _summed(wide(cotangent) * slope, weight).to(weight.dtype)
        if any(ctx.needs_input_grad[1:5]):
            of_difference = cotangent * preference_slope(weight, *tensors, _after(ctx.order), *ctx.parameters)
        return of_weight, *_back(of_difference, ctx.needs_input_grad[1:5]), *[None] * 8

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        weight, *tensors = ctx.saved_tensors
        parts = []
        if tangents[0] is not None:
            parts.append(preference_slope(tangents[0], *tensors, ctx.order, *ctx.parameters))
        move = _along(tangents[1:5])
        if move is not None:
            parts.append(move * preference_slope(weight, *tensors, _after(ctx.order), *ctx.parameters))
        return sum(parts[1:], parts[0])


def _after(order: int) -> int:
    if order == 3:
        raise NotImplementedError("preference losses have derivatives up to the third, not of order 4")
    return order + 1


def _summed(x: Tensor, like: Tensor) -> Tensor:
    """Sum over the dimensions that x has beyond those of ``like``."""
    dims = tuple(range(like.dim(), x.dim()))
    return x.sum(dims) if dims else x


def _batched(count: int, args: Any, in_dims: Any, size: int) -> list[Tensor | None]:
    return [None if t is None else library.to_front(t, d, size) for t, d in zip(args[:count], in_dims)]


@library.vmap(preference)
def _(info: Any, in_dims: Any, *args: Any) -> Any:
    return preference(*_batched(4, args, in_dims, info.batch_size), *args[4:11], args[11] + 1), 0


@library.vmap(preference_slope)
def _(info: Any, in_dims: Any, *args: Any) -> Any:
    return preference_slope(*_batched(5, args, in_dims, info.batch_size), *args[5:]), 0


def _placements(placement: Any, tensors: Sequence[Any]) -> list[Any]:
    """Return one placement for all tensors that are there, and none for the eight other arguments."""
    return [*(None if t is None else placement for t in tensors), *[None] * 8]


@library.sharding(preference)
def _(*args: Any) -> Any:
    from torch.distributed.tensor import Partial, Replicate, Shard

    *tensors, reduce, batch_dims = *args[:4], *args[-2:]
    shards = [(Shard(d), Partial() if reduce and d >= batch_dims else Shard(d)) for d in range(args[0].ndim)]
    return [([loss], _placements(of, tensors)) for of, loss in [(Replicate(), Replicate()), *shards]]


@library.sharding(preference_slope)
def _(weight: Any, *args: Any) -> Any:
    from torch.distributed.tensor import Replicate, Shard

    shards = [(Shard(d), Shard(d) if d < weight.ndim else Replicate()) for d in range(args[0].ndim)]
    rows = [(Replicate(), Replicate()), *shards]
    return [([of], [of_weight, *_placements(of, args[:4])]) for of, of_weight in rows]


library.autocast(preference, torch.float32)


def _loss(
    tensors: dict[str, Tensor | None],
    kind: int,
    reduction: str,
    margin: float = 0.0,
    beta: float = 1.0,
    p: float = 1.0,
    q: float = 0.0,
) -> Tensor:
    """Return the loss of chosen, rejected and their offsets, which are checked under the caller's names."""
    given: dict[str, Any] = {name: t for i, (name, t) in enumerate(tensors.items()) if i < 2 or t is not None}
    for name, t in given.items():
        _checks.has_dtype(name, t, _checks.FLOATING)
    _checks.is_one_of("reduction", reduction, _checks.REDUCTIONS)
    expanded = dict(zip(given, _checks.broadcast(**given)))
    chosen, rejected = list(expanded.values())[:2]
    offsets = [expanded.get(name) for name in list(tensors)[2:]]
    divisor = chosen.numel() if reduction == "mean" else 1
    padded = (*offsets, None, None)[:2]
    return Preference.apply(chosen, rejected, *padded, kind, margin, beta, p, q, divisor, reduction != "none", 0)


def _smoothing(value: Any, limit: float) -> float:
    smoothing = _checks.as_float("label_smoothing", value)
    if not 0 <= smoothing < limit:
        raise ValueError(f"label_smoothing: expected at least 0 and less than {limit}, got {_checks.plain(value)}")
    return smoothing


@leaf
def bpr_loss(positive: Tensor, negative: Tensor, reduction: str = "mean", *, mask: Tensor | None = None) -> Tensor:
    """Return ``-log sigmoid(positive - negative)``: a chosen item should score above one that the user didn't choose.

    It is `bradley_terry_loss` without a margin, at ``beta = 1``, and all that is said there holds: dtypes, errors, the
    orders of derivatives and cost.

    Args:
        positive, negative: scores; float16, bfloat16, float32 or float64. The shapes broadcast: [B, 1]
            beside [B, K] compares each positive with K negatives.
        reduction: "mean", "sum" or "none"; the mean over no pair is 0.
        mask: bool, of a shape that broadcasts with those: True for the pairs that count. The others have a loss and a
            gradient of 0, whatever their scores are, and aren't in the mean.

    Returns:
        A scalar, or for "none" a tensor of the broadcast shape; in the promoted dtype.

    Raises:
        TypeError: not a tensor, or a wrong dtype.
        ValueError: shapes that don't broadcast, several devices, an unknown ``reduction``.

    Source: Rendle et al., "BPR: Bayesian Personalized Ranking from Implicit Feedback", UAI 2009.

    Example:
        >>> import torch, custom_ops
        >>> positive = torch.tensor([2.0, -40.0], requires_grad=True)
        >>> loss = custom_ops.bpr_loss(positive, torch.zeros(2), reduction="none")
        >>> loss.detach()
        tensor([ 0.1269, 40.0000])
        >>> loss.sum().backward()
        >>> positive.grad
        tensor([-0.1192, -1.0000])
    """
    if mask is None:
        return _loss({"positive": positive, "negative": negative}, PreferenceLoss.LOGISTIC.value, reduction)
    for name, tensor in (("positive", positive), ("negative", negative)):
        _checks.has_dtype(name, tensor, _checks.FLOATING)
    _checks.has_dtype("mask", mask, (torch.bool,))
    _checks.is_one_of("reduction", reduction, _checks.REDUCTIONS)
    dtype = torch.promote_types(positive.dtype, negative.dtype)
    given = {"positive": positive.to(dtype), "negative": negative.to(dtype), "mask": mask}
    shape = _checks.broadcast(positive=given["positive"], negative=given["negative"], mask=mask.to(dtype))[0].shape
    mask = mask.expand(shape)
    # The difference of a masked pair is infinite, where the loss and its slope are 0.
    won, lost = torch.where(mask, given["positive"], 0), torch.where(mask, given["negative"], -torch.inf)
    pairs: dict[str, Tensor | None] = {"positive": won, "negative": lost}
    if reduction != "mean":
        return _loss(pairs, PreferenceLoss.LOGISTIC.value, reduction)
    total = _loss({"positive": wide(won), "negative": wide(lost)}, PreferenceLoss.LOGISTIC.value, "sum")
    mean = total / mask.sum().clamp(min=1)
    return mean if under_autocast(positive) else mean.to(dtype)


@leaf
def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | float = 0.0,
    *,
    beta: float = 1.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Return a reward model's loss: ``(1 - e) softplus(-b d) + e softplus(b d)``, ``d = chosen - rejected - margin``.

    It is the negative log-likelihood of the Bradley-Terry model, in which ``chosen`` wins with probability sigmoid(b
    (chosen - rejected)); b is ``beta``, and e is ``label_smoothing``. The loss is exact at any difference. It is
    differentiable to third order, also with respect to ``margin``, and in forward mode. 16-bit rewards are computed in
    float32 and rounded once; under autocast the loss is float32.

    Args:
        chosen, rejected: rewards; float16, bfloat16, float32 or float64. The shapes broadcast.
        margin: the wanted lead of the chosen one: a number, or a tensor with one number for each pair.
        beta: the scale of the rewards, > 0.
        label_smoothing: the probability that a label is wrong, in [0, 1).
        reduction: "mean", "sum" or "none"; the mean over no pair is 0.

    Returns:
        A scalar, or for "none" a tensor of the broadcast shape; in the promoted dtype.

    Raises:
        TypeError: not a tensor, a wrong dtype, or a parameter that isn't a number.
        ValueError: shapes that don't broadcast, several devices, a parameter out of its range, an
            unknown ``reduction``.

    The loss takes O(n) time without temporaries and keeps its arguments for backward. An expanded input is copied in
    full.

    Source: Bradley and Terry, "Rank Analysis of Incomplete Block Designs", 1952; with a margin in Touvron
    et al., "Llama 2", 2023.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.bradley_terry_loss(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.5]), margin=0.5)
        tensor(0.3005)
    """
    beta = _checks.as_positive("beta", beta)
    e = _smoothing(label_smoothing, 1.0)
    tensors: dict[str, Tensor | None] = {"chosen": chosen, "rejected": rejected}
    if isinstance(margin, Tensor):
        tensors["margin"], margin = margin, 0.0
    return _loss(
        tensors, PreferenceLoss.LOGISTIC.value, reduction, _checks.as_float("margin", margin), beta, 1.0 - e, e
    )


DPO_LOSS_TYPES = (
    "sigmoid",
    "robust",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "apo_zero",
    "apo_down",
    "sppo_hard",
    "discopop",
)


class _Term(NamedTuple):
    """A function of the difference of both log ratios ("pair"), or of one of them."""

    of: str
    kind: PreferenceLoss
    p: float
    q: float


@leaf
def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: float | Tensor = 0.1,
    loss_type: str | Sequence[str] = "sigmoid",
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    loss_weights: Sequence[float] | None = None,
    discopop_tau: float = 0.05,
) -> Tensor:
    """Return the loss of direct preference optimisation, by which a policy learns to prefer the chosen completion.

    Let ``c = chosen_logps - ref_chosen_logps``, ``r = rejected_logps - ref_rejected_logps``, ``d = c - r``, b =
    ``beta``, e = ``label_smoothing``, s(z) = -log sigmoid(z) and u(z) = sigmoid(z). The loss depends on ``loss_type``:

    * "sigmoid": (1 - e) s(b d) + e s(-b d); with e > 0 this is conservative DPO
    * "robust": ((1 - e) s(b d) - e s(-b d)) / (1 - 2 e), unbiased under labels wrong with probability e < 1/2
    * "hinge": max(0, 1 - b d)
    * "ipo": (d - 1 / (2 b))^2; meant for log probabilities averaged over a completion's tokens
    * "exo_pair": KL of (sigmoid(b d), sigmoid(-b d)) from (1 - e, e); needs e > 0
    * "nca_pair": s(b c) + (s(-b c) + s(-b r)) / 2
    * "bco_pair": s(b c) + s(-b r)
    * "apo_zero": u(-b c) + u(b r), for chosen completions better than what the policy writes; with a reference point
      subtracted from both log ratios it is KTO's loss
    * "apo_down": u(b c) + u(-b d), for chosen completions worse than that
    * "sppo_hard": (c - 1 / (2 b))^2 + (r + 1 / (2 b))^2
    * "discopop": (1 - m) s(b d) + m exp(-b d), m = u(b d / ``discopop_tau``)

    With several types the loss is their sum, weighted by ``loss_weights``. The loss is exact at any difference. It is
    differentiable to third order and in forward mode; hinge's gradient at its kink is 0. 16-bit inputs are computed in
    float32 and rounded once; under autocast the loss is float32.

    Args:
        chosen_logps, rejected_logps: the policy's log probability of each pair's completions; float16,
            bfloat16, float32 or float64. All shapes broadcast.
        ref_chosen_logps, ref_rejected_logps: the reference's; without them the reference is uniform. They get a
            gradient if they require one; those of a frozen reference don't.
        beta: the strength of the pull towards the reference, > 0: a number, or a tensor with one for each pair, which
            isn't checked to be positive and gets a gradient if it requires one. "ipo" and "sppo_hard" take a number.
        loss_type: one of the above, or several.
        label_smoothing: the probability that a label is wrong, in [0, 1), for "robust" in [0, 1/2). Among several
            types it applies to those that have one.
        reduction: "mean", "sum" or "none"; the mean over no pair is 0.
        loss_weights: one number for each of several types; None for 1.
        discopop_tau: the temperature of the blend in "discopop", more than 0 and at most 1.

    Returns:
        A scalar, or for "none" a tensor of the broadcast shape; in the promoted dtype.

    Raises:
        TypeError: not a tensor, a wrong dtype, or a parameter that isn't a number.
        ValueError: only one of the references, shapes that don't broadcast, several devices, a parameter out
            of its range or without effect, an unknown ``loss_type`` or ``reduction``.

    The loss takes O(n) time, without temporaries for a loss of d alone, and keeps its arguments for backward. An
    expanded input is copied in full.

    Source: Rafailov et al., "Direct Preference Optimization", 2023; robust: Chowdhury et al., 2024; hinge:
    Zhao et al., "SLiC-HF", 2023; ipo: Azar et al., 2023; exo_pair: Ji et al., 2024, Eq. 16; nca_pair: Chen et al.,
    2024; bco_pair: Jung et al., 2024; apo: D'Oosterlinck et al., 2024; sppo_hard: Wu et al., 2024; discopop: Lu et al.,
    2024. The names are those of TRL's DPOTrainer.

    Example:
        >>> import torch, custom_ops
        >>> policy = torch.tensor([-10.0, -12.0]), torch.tensor([-14.0, -11.0])
        >>> reference = torch.tensor([-11.0, -11.0]), torch.tensor([-13.0, -12.0])
        >>> custom_ops.dpo_loss(*policy, *reference, beta=0.5, reduction="none")
        tensor([0.3133, 1.3133])
        >>> custom_ops.dpo_loss(*policy, *reference, loss_type=("sigmoid", "apo_zero"), loss_weights=(1.0, 0.5))
        tensor(1.1981)
    """
    if (ref_chosen_logps is None) != (ref_rejected_logps is None):
        raise ValueError("ref_chosen_logps, ref_rejected_logps: expected both or neither")
    tensors = {
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
        "ref_chosen_logps": ref_chosen_logps,
        "ref_rejected_logps": ref_rejected_logps,
    }
    traced = torch.compiler.is_compiling()  # a compiled program reads no tensor to choose what it runs
    of_pairs = isinstance(beta, Tensor) and (
        traced or beta.dim() > 0 or beta.requires_grad or beta.device.type != "cpu"
    )
    scale = 1.0 if of_pairs else _checks.as_positive("beta", beta)
    terms = _dpo_terms(None if of_pairs else scale, loss_type, label_smoothing, loss_weights, discopop_tau)
    if len(terms) == 1 and terms[0][1].of == "pair" and terms[0][0] == 1 and not of_pairs:
        term = terms[0][1]
        return _loss(tensors, term.kind.value, reduction, beta=scale, p=term.p, q=term.q)
    _checks.is_one_of("reduction", reduction, _checks.REDUCTIONS)
    given = {name: t for name, t in tensors.items() if t is not None} | ({"beta": beta} if of_pairs else {})
    for name, t in given.items():
        _checks.has_dtype(name, t, _checks.FLOATING)  # type: ignore[arg-type]
    expanded = dict(zip(given, _checks.broadcast(**given)))  # type: ignore[arg-type]
    dtype = expanded["chosen_logps"].dtype
    factor = expanded.pop("beta", None)
    # The products with a beta of each pair are exact in float64, and so are their differences.
    each = [wide(t) if factor is None else t.double() * factor.double() for t in expanded.values()]
    chosen, rejected, *references = each
    zero = torch.zeros_like(chosen)
    of_chosen, of_rejected = references or (None, None)
    parts: dict[str, dict[str, Tensor | None]] = {
        "pair": {"chosen": chosen, "rejected": rejected, "of_chosen": of_chosen, "of_rejected": of_rejected},
        "chosen": {"chosen": chosen, "rejected": zero if of_chosen is None else of_chosen},
        "rejected": {"chosen": rejected, "rejected": zero if of_rejected is None else of_rejected},
    }
    losses = [
        weight * _loss(parts[term.of], term.kind.value, reduction, beta=scale, p=term.p, q=term.q)
        for weight, term in terms
    ]
    total = sum(losses[1:], losses[0])
    return total.to(torch.promote_types(dtype, torch.float32) if under_autocast(chosen_logps) else dtype)


def _dpo_terms(
    beta: float | None,
    loss_type: str | Sequence[str],
    label_smoothing: Any,
    loss_weights: Sequence[float] | None,
    discopop_tau: Any,
) -> list[tuple[float, _Term]]:
    """Return the weighted terms of all types; ``beta`` is None if each pair has its own."""
    several = _checks.listed(loss_type)
    types = [loss_type] if several is None else several
    if not types:
        raise ValueError("loss_type: expected at least one type, got none")
    for one in types:
        _checks.is_one_of("loss_type", one, DPO_LOSS_TYPES)
    given = [1.0] * len(types) if loss_weights is None else _checks.listed(loss_weights)
    if given is None:
        raise TypeError(f"loss_weights: expected a sequence of numbers, got {type(loss_weights).__name__}")
    weights = [_checks.as_float("loss_weights", weight) for weight in given]
    if len(weights) != len(types):
        raise ValueError(f"loss_weights: expected one for each of {len(types)} types, got {len(weights)}")
    smoothed = {"sigmoid", "robust", "exo_pair"}
    e = _smoothing(label_smoothing, 0.5 if "robust" in types else 1.0)
    if e and not smoothed.intersection(types):
        raise ValueError(f"label_smoothing: expected 0, {types[0]!r} has none, got {label_smoothing}")
    tau = _checks.as_positive("discopop_tau", discopop_tau)
    if tau > 1:
        raise ValueError(f"discopop_tau: expected at most 1, got {tau}")
    return [(weight, term) for one, weight in zip(types, weights) for term in _terms_of(one, beta, e, tau)]


def _terms_of(loss_type: str, beta: float | None, e: float, tau: float) -> list[_Term]:
    logistic, sigmoid, squared = PreferenceLoss.LOGISTIC, PreferenceLoss.SIGMOID, PreferenceLoss.SQUARED
    if loss_type in ("ipo", "sppo_hard") and beta is None:
        raise ValueError(f"beta: expected a number for {loss_type!r}, got a tensor")
    if loss_type == "exo_pair" and e == 0:
        raise ValueError("label_smoothing: expected more than 0 for 'exo_pair', got 0")
    aim = 0.5 / (1.0 if beta is None else beta)
    terms: dict[str, Callable[[], list[_Term]]] = {
        "sigmoid": lambda: [_Term("pair", logistic, 1 - e, e)],
        "robust": lambda: [_Term("pair", logistic, (1 - e) / (1 - 2 * e), -e / (1 - 2 * e))],
        "hinge": lambda: [_Term("pair", PreferenceLoss.HINGE, 0.0, 0.0)],
        "ipo": lambda: [_Term("pair", squared, aim, 0.0)],
        "exo_pair": lambda: [_Term("pair", PreferenceLoss.DIVERGENCE, -math.log1p(-e), -math.log(e))],
        "nca_pair": lambda: [_Term("chosen", logistic, 1.0, 0.5), _Term("rejected", logistic, 0.0, 0.5)],
        "bco_pair": lambda: [_Term("chosen", logistic, 1.0, 0.0), _Term("rejected", logistic, 0.0, 1.0)],
        "apo_zero": lambda: [_Term("chosen", sigmoid, 1.0, 0.0), _Term("rejected", sigmoid, 0.0, 1.0)],
        "apo_down": lambda: [_Term("chosen", sigmoid, 0.0, 1.0), _Term("pair", sigmoid, 1.0, 0.0)],
        "sppo_hard": lambda: [_Term("chosen", squared, aim, 0.0), _Term("rejected", squared, -aim, 0.0)],
        "discopop": lambda: [_Term("pair", PreferenceLoss.BLEND, 1 / tau, 0.0)],
    }
    return terms[loss_type]()


class BPRLoss(torch.nn.Module):
    """Apply `bpr_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.BPRLoss()(torch.tensor([2.0]), torch.tensor([1.0]))
        tensor(0.3133)
    """

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        _checks.is_one_of("reduction", reduction, _checks.REDUCTIONS)
        self.reduction = reduction

    def forward(self, positive: Tensor, negative: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return bpr_loss(positive, negative, self.reduction, mask=mask)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


class BradleyTerryLoss(torch.nn.Module):
    """Apply `bradley_terry_loss` as a layer; the margin is given with the rewards.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.BradleyTerryLoss()(torch.tensor([2.0]), torch.tensor([1.0]), margin=0.5)
        tensor(0.4741)
    """

    def __init__(self, beta: float = 1.0, label_smoothing: float = 0.0, reduction: str = "mean") -> None:
        super().__init__()
        _checks.is_one_of("reduction", reduction, _checks.REDUCTIONS)
        self.beta, self.label_smoothing = _checks.as_positive("beta", beta), _smoothing(label_smoothing, 1.0)
        self.reduction = reduction

    def forward(self, chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
        options = {"beta": self.beta, "label_smoothing": self.label_smoothing}
        return bradley_terry_loss(chosen, rejected, margin, reduction=self.reduction, **options)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, label_smoothing={self.label_smoothing}, reduction={self.reduction!r}"


class DPOLoss(torch.nn.Module):
    """Apply `dpo_loss` as a layer.

    Example:
        >>> import torch, custom_ops
        >>> chosen, rejected, reference = torch.tensor([-10.0]), torch.tensor([-12.0]), torch.tensor([-11.0])
        >>> custom_ops.DPOLoss(beta=0.5)(chosen, rejected, reference, reference)
        tensor(0.3133)
    """

    def __init__(
        self,
        beta: float = 0.1,
        loss_type: str | Sequence[str] = "sigmoid",
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        loss_weights: Sequence[float] | None = None,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__()
        self.beta = _checks.as_positive("beta", beta)
        _dpo_terms(self.beta, loss_type, label_smoothing, loss_weights, discopop_tau)
        self.discopop_tau = _checks.as_float("discopop_tau", discopop_tau)
        self.label_smoothing = _checks.as_float("label_smoothing", label_smoothing)
        _checks.is_one_of("reduction", reduction, _checks.REDUCTIONS)
        types, given = _checks.listed(loss_type), _checks.listed(loss_weights)
        self.loss_type = loss_type if types is None else [str(one) for one in types]
        self.loss_weights = None if given is None else [_checks.as_float("loss_weights", one) for one in given]
        self.reduction = reduction

    def forward(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        ref_chosen_logps: Tensor | None = None,
        ref_rejected_logps: Tensor | None = None,
    ) -> Tensor:
        tensors = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
        options: dict[str, Any] = {"beta": self.beta, "label_smoothing": self.label_smoothing}
        options |= {"loss_weights": self.loss_weights, "discopop_tau": self.discopop_tau}
        return dpo_loss(*tensors, loss_type=self.loss_type, reduction=self.reduction, **options)

    def extra_repr(self) -> str:
        own = f"beta={self.beta}, loss_type={self.loss_type!r}, label_smoothing={self.label_smoothing}"
        return f"{own}, reduction={self.reduction!r}"
