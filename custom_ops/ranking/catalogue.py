"""Losses over a catalogue: one item ranked above all others, without the scores of all items in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from custom_ops import _checks, library, shards
from custom_ops._bilinear import add
from custom_ops._leaf import leaf
from custom_ops._native import define
from custom_ops._wide import under_autocast, wide
from custom_ops.library import Function
from custom_ops.ranking._arguments import reduce_by_torch
from custom_ops.ranking._list_loss import is_differentiated

# ---------------------------------------------------------------- ops

# The arguments are x [B, N, D], weight [B, V, D], bias [B, V] and target [B, N]. The logits z = scale x weight' + bias
# are never returned, and the results of rows are [B, N]. B is 1 except under vmap. The bias and the results are in
# float64 if x and weight are, else in float32. If the catalogue has ``total`` words, of which ``weight`` has those from
# ``first`` on, the target is a word of the whole, and a target that isn't among the V has the score 0. Rows with the
# target ``ignore_index`` are never read. A word other than the target is left out of a row where ``mask`` [B, N, V] is
# False, or if its ``word_group`` [B, V] is the row's ``row_group`` [B, N].


@define
def catalogue_log_prob(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    row_group: Tensor | None,
    word_group: Tensor | None,
    scale: float,
    ignore_index: int,
    first: int,
    total: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return each row's log_prob, entropy and lse, and its ``stats`` [B, N, 3], with which backward starts.

    The stats are the largest score, the logarithm of the sum of e^(z - largest), and the entropy.
    """
    return *_results(x), _of_rows(x, 3)


@define
def catalogue_backward(
    of_log_prob: Tensor | None,
    of_entropy: Tensor | None,
    of_lse: Tensor | None,
    stats: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    row_group: Tensor | None,
    word_group: Tensor | None,
    scale: float,
    ignore_index: int,
    first: int,
    total: int,
    of_x: bool,
    of_weight: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the derivatives of ``sum(of_log_prob log_prob + of_entropy entropy + of_lse lse)`` in x, weight and bias.

    One that isn't wanted is empty. The stats must be those of these arguments, and have no derivative of their own.
    """
    return _gradients(x, weight, of_x, of_weight, of_bias)


@define
def catalogue_second(
    of_log_prob: Tensor | None,
    of_entropy: Tensor | None,
    of_lse: Tensor | None,
    stats: Tensor,
    x_t: Tensor | None,
    weight_t: Tensor | None,
    bias_t: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    row_group: Tensor | None,
    word_group: Tensor | None,
    scale: float,
    ignore_index: int,
    first: int,
    total: int,
    of_x: bool,
    of_weight: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the tangents of log_prob, entropy and lse, and those of the derivatives in x, weight and bias.

    ``x_t``, ``weight_t`` and ``bias_t`` are the tangents of the arguments. The derivatives are those which
    ``catalogue_backward`` returns; the tangent of one that isn't wanted is empty.
    """
    return *_results(x), *_gradients(x, weight, of_x, of_weight, of_bias)


@define
def catalogue_loss(
    of_log_prob: Tensor,
    of_lse: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    row_group: Tensor | None,
    word_group: Tensor | None,
    scale: float,
    ignore_index: int,
    first: int,
    total: int,
    of_x: bool,
    of_weight: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return ``sum(of_log_prob log_prob + of_lse lse)`` [B], the rows' stats, and the sum's derivatives, in one pass.

    The derivatives are in x, weight and bias; one that isn't wanted is empty. They are float32 even for 16-bit
    arguments, as the loss may have a scale that keeps them in float16's range.
    """
    loss = x.new_empty(x.shape[:1], dtype=_wide_dtype(x))
    of_first, of_second, of_third = _gradients(x, weight, of_x, of_weight, of_bias)
    return loss, _of_rows(x, 3), wide(of_first), wide(of_second), of_third


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _of_rows(x: Tensor, *tail: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], *tail), dtype=_wide_dtype(x))


def _results(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _of_rows(x), _of_rows(x), _of_rows(x)


def _gradients(x: Tensor, weight: Tensor, of_x: bool, of_weight: bool, of_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if of_x else (0,)),
        weight.new_empty(weight.shape if of_weight else (0,)),
        x.new_empty(weight.shape[:2] if of_bias else (0,), dtype=_wide_dtype(x)),
    )


# ---------------------------------------------------------------- derivatives


def _wanted(gradients: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    return [gradient if needs else None for gradient, needs in zip(gradients, needed)]


def _no_third() -> Exception:
    return NotImplementedError("linear_log_prob and the losses made of it have no third derivative")


class CatalogueLogProb(Function, op=catalogue_log_prob):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        stats, ctx.options = output[3], inputs[7:]
        ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(stats, *inputs[:7])
        ctx.save_for_forward(stats, *inputs[:7])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:3]
        found = catalogue_backward(*grads[:3], *ctx.saved_tensors, *ctx.options, *needed)
        return *_wanted(found, needed), *[None] * 8

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        stats, *where = ctx.saved_tensors
        return *_tangents(stats, tangents[:3], where, ctx.options), None


def _tangents(stats: Tensor, moves: Sequence[Tensor | None], where: Sequence[Any], options: Sequence[Any]) -> Any:
    """Return the tangents of log_prob, entropy and lse."""
    nothing = (None,) * 3, (False,) * 3
    return catalogue_second(*nothing[0], stats, *moves, *where, *options, *nothing[1])[:3]


class CatalogueBackward(Function, op=catalogue_backward):
    """The op is linear in the weights of the rows, and symmetric in what it is differentiated in and along."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.of_x, ctx.of_weight, ctx.of_bias = inputs
        ctx.options = tensors[11:]
        ctx.save_for_backward(*tensors[:11])
        ctx.save_for_forward(*tensors[:11])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[4:7]
        asked = ctx.of_x, ctx.of_weight, ctx.of_bias
        moves = [move if wanted else None for move, wanted in zip(cotangents, asked)]
        saved = ctx.saved_tensors
        found = catalogue_second(*saved[:4], *moves, *saved[4:], *ctx.options, *needed)
        return *_wanted(found[:3], ctx.needs_input_grad[:3]), None, *_wanted(found[3:], needed), *[None] * 11

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        of_rows, moves = tangents[:3], tangents[4:7]
        asked = ctx.of_x, ctx.of_weight, ctx.of_bias
        saved = ctx.saved_tensors
        parts = []
        if any(t is not None for t in of_rows):
            parts.append(catalogue_backward(*of_rows, *saved[3:], *ctx.options, *asked))
        if any(t is not None for t in moves):
            parts.append(catalogue_second(*saved[:4], *moves, *saved[4:], *ctx.options, *asked)[3:])
        return tuple(add(*some) for some in zip(*parts)) if parts else (None,) * 3


class CatalogueSecond(Function, op=catalogue_second):
    """The op is linear in the tangents of x, weight and bias. Of its tangents in them, only those of rows have one."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.of_x, ctx.of_weight, ctx.of_bias = inputs
        ctx.options = tensors[14:]
        ctx.save_for_backward(*tensors[:14])
        ctx.save_for_forward(*tensors[:14])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        weights, stats, moves, where = saved[:3], saved[3], saved[4:7], saved[7:]
        asked = ctx.of_x, ctx.of_weight, ctx.of_bias
        of_rows = cotangents[:3]
        again = [move if wanted else None for move, wanted in zip(cotangents[3:], asked)]
        curved = any(move is not None for move in again)
        of_moves, of_where = ctx.needs_input_grad[4:7], ctx.needs_input_grad[7:10]
        if curved and (any(of_where) or any(ctx.needs_input_grad[:3])):
            raise _no_third()
        parts: list[Any] = []
        if curved:
            found = catalogue_second(*weights, stats, *again, *where, *ctx.options, *of_moves)
            parts.append(found[3:])
        of_primals: list[Tensor | None] = [None] * 3
        if any(t is not None for t in of_rows):
            parts.append(catalogue_backward(*of_rows, stats, *where, *ctx.options, *of_moves))
            if any(of_where):
                found = catalogue_second(*of_rows, stats, *moves, *where, *ctx.options, *of_where)
                of_primals = _wanted(found[3:], of_where)
        sums = [add(*some) for some in zip(*parts)]
        return *[None] * 4, *_wanted(sums, of_moves), *of_primals, *[None] * 11

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        if any(t is not None for t in (*tangents[:3], *tangents[7:10])):
            raise NotImplementedError("linear_log_prob and the losses made of it have no tangent of a tangent")
        saved = ctx.saved_tensors
        asked = ctx.of_x, ctx.of_weight, ctx.of_bias
        return catalogue_second(*saved[:4], *tangents[4:7], *saved[7:], *ctx.options, *asked)


class CatalogueLoss(Function, op=catalogue_loss):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        if any(ctx.needs_input_grad[:2]):
            raise NotImplementedError("catalogue_loss has no derivative in the weights of the rows")
        of_log_prob, of_lse, *where = inputs[:9]
        ctx.options = inputs[9:13]
        _, stats, *gradients = output
        ctx.mark_non_differentiable(stats, *gradients)
        ctx.found = inputs[13:]
        ctx.save_for_backward(of_log_prob, of_lse, stats, *where, *gradients)
        ctx.save_for_forward(of_log_prob, of_lse, stats, *where)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        of_log_prob, of_lse, *where, of_x, of_words, of_bias = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:5]
        if is_differentiated() or any(needs and not found for needs, found in zip(needed, ctx.found)):
            of_rows = [None if of is None else grad.unsqueeze(-1) * of for of in (of_log_prob, None, of_lse)]
            gradients = catalogue_backward(*of_rows, *where, *ctx.options, *needed)
        else:  # the loss's derivatives are known up to the factor
            pairs = zip((of_x, of_words, of_bias), (where[1], where[2], of_log_prob), needed)
            gradients = [
                (grad.reshape(-1, *[1] * (found.dim() - 1)) * found).to(like.dtype) if needs else None
                for found, like, needs in pairs
            ]
        return None, None, *_wanted(gradients, needed), *[None] * 11

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        of_log_prob, of_lse, stats, *where = ctx.saved_tensors
        log_prob_t, _, lse_t = _tangents(stats, tangents[2:5], where, ctx.options)
        moved = of_log_prob * log_prob_t if of_lse is None else of_log_prob * log_prob_t + of_lse * lse_t
        # The sum is in float64, as torch's sums depend on the number of threads.
        return moved.sum(-1, dtype=torch.float64).to(moved.dtype), *[None] * 4


# ---------------------------------------------------------------- batching


def _batch(op: Any, arguments: str, results: str) -> None:
    """Add a batching rule: the batch becomes examples, or if all share their words, more rows of the same example.

    ``arguments`` has an "r" for each tensor that has rows, and a "w" for each that has words. ``results`` likewise has
    an "r" or "w", or an "e" for one with neither; the last three are those whose flags the op's last arguments are.
    """
    flagged = "w" in results
    tensors = len(arguments)

    @library.vmap(op)
    def _(info: Any, in_dims: Any, *args: Any) -> Any:
        size = info.batch_size
        flags = [True] * len(results) if not flagged else [*[True] * (len(results) - 3), *args[-3:]]
        shared = all(dim is None for dim, kind in zip(in_dims, arguments) if kind == "w")
        as_rows = shared and not any(wanted for wanted, kind in zip(flags, results) if kind != "r")
        moved: list[Tensor | None] = []
        for t, dim, kind in zip(args[:tensors], in_dims, arguments):
            if t is None or (as_rows and kind == "w"):
                moved.append(t)
            elif as_rows:
                moved.append(library.to_front(t, dim, size).movedim(0, 1).flatten(1, 2))
            else:
                moved.append(library.to_front(t, dim, size).flatten(0, 1))
        found = op(*moved, *args[tensors:])
        at = 1 if as_rows else 0
        whole = [t.unflatten(at, (size, t.shape[at] // size)) if wanted else t for t, wanted in zip(found, flags)]
        return tuple(whole), tuple(at if wanted else None for wanted in flags)


_WHERE = "rwwrrrw"
_batch(catalogue_log_prob, _WHERE, "rrrr")
_batch(catalogue_backward, "rrrr" + _WHERE, "rww")
_batch(catalogue_second, "rrrrrww" + _WHERE, "rrrrww")
_batch(catalogue_loss, "rr" + _WHERE, "errww")


# ---------------------------------------------------------------- public functions


class LogProbs(NamedTuple):
    """The results of `linear_log_prob`, each with one number for each row.

    Example:
        >>> import torch, custom_ops
        >>> found = custom_ops.linear_log_prob(torch.zeros(1, 2), torch.ones(4, 2), torch.tensor([3]))
        >>> found.log_prob, found.entropy
        (tensor([-1.3863]), tensor([1.3863]))
    """

    log_prob: Tensor
    entropy: Tensor
    lse: Tensor


@leaf
def linear_log_prob(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
    ignore_index: int = -100,
) -> LogProbs:
    """Return the log-probability of each row's target among all V words, without a tensor of rows times words.

    With the logits ``z = scale x weight' + bias`` of a row, the results are

    * ``log_prob = z_target - lse``
    * ``lse = log sum_v e^(z_v)``
    * ``entropy = lse - sum_v softmax(z)_v z_v``

    A language model's words, a recommender's items and a retriever's documents are such a catalogue. All results are
    differentiable in x, weight, bias and scale, twice and in forward mode, and a result that isn't used costs backward
    nothing. Rows whose target is ``ignore_index`` are never read; their results and gradients are 0. The results are
    float32 for float16, bfloat16 and float32 arguments, since a log-probability is often exponentiated or subtracted.
    Products and sums of 16-bit numbers are in float32, and gradients are rounded once. Under autocast, x and weight are
    rounded to its dtype, as by a linear layer.

    Args:
        x: ``[..., D]``, the rows; float16, bfloat16, float32 or float64.
        weight: ``[V, D]``, the words. If x or weight is float64, both are taken as float64.
        target: int32 or int64 ``[...]``, from 0 to V - 1, or ``ignore_index``.
        bias: ``[V]``, added to the logits of each row; minus infinity leaves a word out.
        scale: a number, or a tensor of one number, which may need a gradient.
        ignore_index: the target of the rows that don't count.

    Returns:
        A named tuple of ``log_prob``, ``entropy`` and ``lse``, each ``[...]``.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes that don't match, tensors on several devices.
        RuntimeError: a target out of range; on a GPU it is an assertion on the device.

    Of DTensors, rows may be sharded, words (``Shard(0)`` of weight and bias), or both. Only three numbers of each row
    are exchanged for sharded words, never logits.

    Forward takes one product of matrices, backward three: it computes the logits again, in blocks of rows. Besides
    arguments, results and gradients, the memory is O(N + V), and for 16-bit words a float32 copy of their gradient. A
    third derivative and a tangent of a tangent raise ``NotImplementedError``.

    Source: the blocks are those of Luo et al., "MiniSequence Transformer", 2024, and of Wijmans et al., "Cut your
    losses in large-vocabulary language models", 2024; the entropy's gradient is Williams and Peng's, 1991.

    Example:
        >>> import torch, custom_ops
        >>> weight = torch.eye(3, requires_grad=True)
        >>> found = custom_ops.linear_log_prob(torch.eye(2, 3), weight, torch.tensor([0, -100]), scale=2.0)
        >>> found.log_prob.detach()
        tensor([-0.2395,  0.0000])
        >>> found.log_prob.sum().backward()
        >>> weight.grad[:, 0]
        tensor([ 0.4260, -0.2130, -0.2130])
    """
    if shards.is_sharded(x, weight, target, bias):
        return _in_shards(x, weight, target, bias, scale, ignore_index)
    tensors, options = _checked(("x", x), ("weight", weight), target, ("bias", bias), scale, ignore_index)
    found = catalogue_log_prob(*tensors, *options)
    return LogProbs(*(t.reshape(target.shape) for t in found[:3]))


def _in_shards(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, scale: float | Tensor, ignore_index: int
) -> LogProbs:
    """Return the results for DTensors, of which rows and words may be sharded.

    Only three numbers of each row are exchanged for sharded words: its logsumexp, its entropy and its target's score
    among the words of each process.
    """
    total, ignored, row = weight.shape[0], _ignored(ignore_index), shards.batch_labels(x.dim() - 1)
    if isinstance(scale, Tensor):
        x, scale = wide(x) * scale, 1.0
    place = _place_of_words(weight, bias)
    index, parts = (0, 1) if place is None else place
    first = min(index * -(-total // parts), total)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Any:
        tensors, options = _checked(("x", x), ("weight", weight), target, ("bias", bias), scale, ignored)
        found = catalogue_log_prob(*tensors, *options[:2], first, total)[:3]
        log_prob, entropy, lse = (t.reshape(target.shape) for t in found)
        if place is None:
            return log_prob, entropy, lse
        here = (target >= first) & (target < first + weight.shape[0])
        own = torch.stack([torch.where(here, log_prob + lse, 0), entropy, lse])
        is_own = torch.arange(parts, device=own.device) == index
        return torch.where(is_own.view(-1, *[1] * own.dim()), own, 0)

    def joined(of_parts: Tensor, target: Tensor) -> Any:
        score, entropy, lse = of_parts.unbind(1)
        whole = lse.logsumexp(0)
        has_words = lse.isfinite()
        below = torch.where(has_words, whole - lse, 0)
        share = torch.where(has_words, (-below).exp(), 0)
        found = score.sum(0) - whole, (share * (entropy + below)).sum(0), whole
        return tuple(torch.where(target != ignored, t, 0) for t in found)

    inputs, results = f"{row}D,vD,v,{row}", ",".join([row] * 3)
    if place is None:
        return LogProbs(*shards.in_shards(run, f"{inputs}->{results}", x, weight, bias, target))
    of_parts = shards.summed_up(shards.in_shards(run, f"{inputs}->KT{row}", x, weight, bias, target))
    return LogProbs(*shards.in_shards(joined, f"KT{row},{row}->{results}", of_parts, target))


def _place_of_words(*tensors: Any) -> tuple[int, int] | None:
    """Return which part of the words this process has, and the number of parts; None if they aren't sharded."""
    for t in tensors:
        if shards.is_sharded(t):
            cuts = [at for at, placement in enumerate(t.placements) if placement.is_shard(0)]
            if len(cuts) > 1:
                raise NotImplementedError("weight: expected words sharded in one dimension of the mesh, got several")
            if cuts:
                return t.device_mesh.get_local_rank(cuts[0]), t.device_mesh.size(cuts[0])
    return None


class _Arguments(NamedTuple):
    """The arguments as ops take them."""

    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None]
    options: tuple[float, int, int, int]


def _checked(
    x_named: tuple[str, Tensor],
    weight_named: tuple[str, Tensor],
    target: Tensor,
    bias_named: tuple[str, Tensor | None],
    scale: float | Tensor,
    ignore_index: int,
) -> _Arguments:
    """Check the arguments, which have these names, and return them as ops take them."""
    (x_name, x), (weight_name, weight), (bias_name, bias) = x_named, weight_named, bias_named
    _checks.has_dtype(x_name, x, _checks.FLOATING)
    _checks.has_dtype(weight_name, weight, _checks.FLOATING)
    _checks.has_dtype("target", target, _checks.INDEX)
    if x.dim() == 0:
        raise ValueError(f"{x_name}: expected [..., D], got a single number")
    _checks.has_dims(weight_name, weight, "[V, D]")
    if weight.shape[1] != x.shape[-1]:
        raise ValueError(f"{weight_name}: expected [V, {x.shape[-1]}] as {x_name}, got {list(weight.shape)}")
    if target.shape != x.shape[:-1]:
        raise ValueError(f"target: expected shape {list(x.shape[:-1])}, got {list(target.shape)}")
    tensors = {x_name: x, weight_name: weight, "target": target}
    if bias is not None:
        _checks.has_dtype(bias_name, bias, _checks.FLOATING)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{bias_name}: expected shape [{weight.shape[0]}], got {list(bias.shape)}")
        tensors[bias_name] = bias
    ignored = _ignored(ignore_index)
    if isinstance(scale, Tensor):
        scale = tensors["scale"] = _one_number("scale", scale, x)
    else:
        scale = _checks.as_float("scale", scale)
    _checks.same_device(**tensors)
    if under_autocast(x):
        low = torch.get_autocast_dtype(x.device.type)
        x, weight = (t if t.dtype == torch.float64 else t.to(low) for t in (x, weight))
    if torch.float64 in (x.dtype, weight.dtype):
        x, weight = x.double(), weight.double()
    dtype = _wide_dtype(x)
    if isinstance(scale, Tensor):
        # A row that is ignored isn't scaled, so that it has no part in a derivative, whatever it and the scale hold.
        x, scale = wide(x) * torch.where(target != ignored, scale.to(dtype), 1).unsqueeze(-1), 1.0
    words = weight.shape[0]
    return _Arguments(
        (
            x.reshape(1, -1, x.shape[-1]) if x.numel() else x.reshape(1, target.numel(), x.shape[-1]),
            weight.unsqueeze(0),
            None if bias is None else bias.to(dtype).unsqueeze(0),
            target.to(torch.int64).reshape(1, -1),
            *(None, None, None),
        ),
        (scale, ignored, 0, words),
    )


def _one_number(name: str, value: Tensor, beside: Tensor) -> Tensor:
    _checks.has_dtype(name, value, _checks.FLOATING)
    if value.numel() != 1:
        raise ValueError(f"{name}: expected one number, got shape {list(value.shape)}")
    return _checks.beside(beside, value.reshape(()))


@leaf
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """Return ``cross_entropy(scale linear(input, linear_weight) + linear_bias, target)`` without the logits in memory.

    It is called like ``torch.nn.functional.linear_cross_entropy`` and has the same results for class indices, except
    that the mean over no row is 0 instead of NaN. Let ``w`` be the class weights, or ones, and e the label smoothing.
    A row's loss is

    ``(1 - e) w_target (lse - z_target) + e / V sum_v w_v (lse - z_v)``

    The mean is that over the weights of the rows' targets. For "mean" and "sum" the forward pass computes the
    derivatives too, as they are known up to a factor, so that backward takes no product of matrices. Under a transform,
    or if the gradient is differentiated again, they are computed anew. The loss is differentiable in input,
    linear_weight, linear_bias and scale, twice and in forward mode. All that is said at `linear_log_prob` of dtypes,
    ignored rows, autocast, errors and memory holds here too; the loss has the dtype of the arguments, under autocast
    float32. DTensors are taken without class weights and label smoothing.

    Args:
        input: ``[..., D]``, the rows; float16, bfloat16, float32 or float64.
        linear_weight: ``[V, D]``.
        target: int32 or int64 ``[...]``, from 0 to V - 1, or ``ignore_index``.
        linear_bias: ``[V]``, added to the logits.
        weight: ``[V]``, a factor for each word's loss, without gradient.
        reduction: "mean", "sum" or "none".
        ignore_index: the target of the rows that don't count, or None for -100.
        label_smoothing: the share e of the target's probability that all words share, from 0 to 1.
        scale: a number, or a tensor of one number, which may need a gradient.

    Returns:
        A scalar, or for "none" one loss for each row.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes that don't match, tensors on several devices, class weights that need a gradient, an unknown
            ``reduction``, a ``label_smoothing`` out of range.
        RuntimeError: a target out of range; on a GPU it is an assertion on the device.

    Source: the derivatives in the forward pass are those of Hsu et al., "Liger Kernel", 2024.

    Example:
        >>> import torch, custom_ops
        >>> rows = torch.eye(2, 3, requires_grad=True)
        >>> loss = custom_ops.linear_cross_entropy(rows, torch.eye(3), torch.tensor([0, 1]))
        >>> loss.backward()
        >>> loss.detach(), rows.grad
        (tensor(0.5514), tensor([[-0.2119,  0.1060,  0.1060],
                [ 0.1060, -0.2119,  0.1060]]))
    """
    _checks.is_one_of("reduction", reduction, _checks.REDUCTIONS)
    e = _smoothing(label_smoothing)
    ignored = -100 if ignore_index is None else ignore_index
    if shards.is_sharded(input, linear_weight, target, linear_bias):
        if weight is not None or e:
            raise NotImplementedError("linear_cross_entropy: expected no weight and no label_smoothing for DTensors")
        log_prob = linear_log_prob(
            input, linear_weight, target, bias=linear_bias, scale=scale, ignore_index=ignored
        ).log_prob
        return reduce_by_torch(-log_prob, target != ignored, None, reduction)
    named = ("input", input), ("linear_weight", linear_weight), target, ("linear_bias", linear_bias)
    tensors, options = _checked(*named, scale, ignored)
    x, words, bias, at = tensors[:4]
    counts = at != options[1]
    dtype, total = _wide_dtype(x), words.shape[1]
    of_rows = counts.to(dtype)
    if weight is not None:
        weight = _class_weights(weight, linear_weight).to(dtype)
        of_rows = torch.where(counts, weight[at.clamp(0, max(total - 1, 0))], 0) if total else of_rows
    if reduction == "mean":
        whole = of_rows.sum(dtype=torch.float64)
        divisor = torch.where(whole == 0, 1, whole).to(dtype)
        of_rows, shared = of_rows / divisor, counts / divisor
    else:
        shared = counts.to(dtype)
    of_log_prob = (e - 1) * of_rows
    of_lse = shared * (e / max(total, 1) * (total if weight is None else weight.sum())) if e else None
    if reduction == "none":
        log_prob, _, lse, _ = catalogue_log_prob(*tensors, *options)
        loss = of_log_prob * log_prob if of_lse is None else of_log_prob * log_prob + of_lse * lse
    else:
        loss = _summed(of_log_prob, of_lse, tensors, options)
    if e:
        mean = _mean_score(x, words, bias, weight, options[0], shared, reduction != "none")
        loss = loss - (e * mean).to(dtype)
    if not under_autocast(input):
        loss = loss.to(torch.promote_types(input.dtype, linear_weight.dtype))
    return loss.reshape(target.shape if reduction == "none" else ())


def _summed(of_log_prob: Tensor, of_lse: Tensor | None, tensors: Sequence[Any], options: Sequence[Any]) -> Tensor:
    """Return ``sum(of_log_prob log_prob + of_lse lse)`` [1]."""
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors[:3]]
    loss: Tensor = catalogue_loss(of_log_prob, of_lse, *tensors, *options, *wanted)[0]
    return loss


def _mean_score(
    x: Tensor, words: Tensor, bias: Tensor | None, weight: Tensor | None, scale: float, of_rows: Tensor, summed: bool
) -> Tensor:
    """Return the mean over all words of w_v z_v for each row, times the row's weight, or the sum of it over rows."""
    rows = torch.where(of_rows.unsqueeze(-1) != 0, wide(x), 0) * of_rows.unsqueeze(-1)
    total = max(words.shape[1], 1)
    if weight is None:
        word = words.sum(1, dtype=torch.float64)
        constant = None if bias is None else bias.sum(1, dtype=torch.float64)
    else:
        word = (weight.unsqueeze(0).unsqueeze(0) @ wide(words)).squeeze(1).double()
        constant = None if bias is None else (weight * bias).sum(1, dtype=torch.float64)
    if summed:
        rows, of_rows = rows.sum(1, keepdim=True, dtype=torch.float64), of_rows.sum(1, keepdim=True)
    score = scale * (rows * word.unsqueeze(1)).sum(-1, dtype=torch.float64)
    if constant is not None:
        score = score + of_rows * constant.unsqueeze(-1)
    score = torch.where(of_rows != 0, score, 0)
    return (score / total).squeeze(1) if summed else score / total


def _ignored(value: Any) -> int:
    ignored = _checks.as_int("ignore_index", value)
    if isinstance(ignored, int) and not -(2**63) <= ignored < 2**63:  # a symbolic number is in the range
        raise ValueError("ignore_index: expected an integer of 64 bits, got a larger one")
    return ignored


def _smoothing(value: Any) -> float:
    smoothing = _checks.as_float("label_smoothing", value)
    if not 0 <= smoothing <= 1:
        raise ValueError(f"label_smoothing: expected 0 to 1, got {_checks.plain(value)}")
    return smoothing


def _class_weights(weight: Tensor, linear_weight: Tensor) -> Tensor:
    _checks.has_dtype("weight", weight, _checks.FLOATING)
    if weight.shape != linear_weight.shape[:1]:
        raise ValueError(f"weight: expected shape [{linear_weight.shape[0]}], got {list(weight.shape)}")
    if weight.requires_grad:
        raise ValueError("weight: expected a tensor without gradient, as the loss has none in the class weights")
    _checks.same_device(linear_weight=linear_weight, weight=weight)
    return weight


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
        target: int32 or int64 ``[N]``, the place of each query's key; by default query i has the key i.
        temperature: a positive number, or a tensor of one number, which may need a gradient; where a tensor isn't
            positive, the loss is NaN.
        symmetric: ask for the query of each key, too.
        mask: bool ``[N, M]``, False for the keys that aren't compared with a query, such as false negatives. A query
            is always compared with its own key.
        query_group, key_group: int32 or int64 ``[N]`` and ``[M]``. A query isn't compared with other keys of its group,
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
    if shards.is_sharded(query, key, target, mask, query_group, key_group):
        raise NotImplementedError("info_nce_loss: expected plain tensors, got a DTensor; gather the keys first")
    _checks.has_dtype("query", query, _checks.FLOATING)
    _checks.has_dtype("key", key, _checks.FLOATING)
    _checks.has_dims("query", query, "[N, D]")
    _checks.has_dims("key", key, "[M, D]")
    rows, keys, dtype = query.shape[0], key.shape[0], torch.promote_types(query.dtype, key.dtype)
    if keys < rows if target is None else keys == 0 < rows:
        raise ValueError(f"key: expected one for each of {rows} queries, got {keys}")
    places = torch.arange(rows, device=query.device)
    own = places if target is None else target
    left_out = _left_out(query, key, mask, query_group, key_group)
    lowered = under_autocast(query)
    if isinstance(temperature, Tensor):
        divisor = _one_number("temperature", temperature, query)
        _checks.same_device(query=query, temperature=divisor)
        query, scale = wide(query) / torch.where(divisor > 0, divisor, torch.nan), 1.0
    else:
        scale = 1.0 / _checks.as_positive("temperature", temperature)
    nothing: Any = ("bias", None), scale, _NONE_IGNORED
    tensors, options = _checked(("query", query), ("key", key), own, *nothing)
    found = [((*tensors[:4], *left_out), options)]
    if both:
        chosen = slice(rows) if target is None else tensors[3][0].clamp(0, max(keys - 1, 0))
        tensors, options = _checked(("key", key[chosen]), ("query", query), places, *nothing)
        compared, of_query, of_key = left_out
        compared = None if compared is None else compared[..., chosen].transpose(1, 2)
        of_key = None if of_key is None else of_key[:, chosen]
        found.append(((*tensors[:4], compared, of_key, of_query), options))
    share = torch.full_like(places, 1, dtype=_wide_dtype(tensors[0])).unsqueeze(0) / len(found)
    if reduction == "none":
        losses = [-share * catalogue_log_prob(*arguments, *numbers)[0] for arguments, numbers in found]
    else:
        share = -share / max(rows, 1) if reduction == "mean" else -share
        losses = [_summed(share, None, arguments, numbers) for arguments, numbers in found]
    loss = sum(losses[1:], losses[0])
    if not lowered:
        loss = loss.to(dtype)
    return loss.reshape(query.shape[:1] if reduction == "none" else ())


_NONE_IGNORED = -(2**63)  # no target is equal to it


def _left_out(
    query: Tensor, key: Tensor, mask: Tensor | None, query_group: Tensor | None, key_group: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Check the arguments that leave keys out, and return them as ops take them."""
    given: dict[str, Tensor] = {"query": query}
    if mask is not None:
        _checks.has_dtype("mask", mask, (torch.bool,))
        if mask.shape != (query.shape[0], key.shape[0]):
            raise ValueError(f"mask: expected shape {[query.shape[0], key.shape[0]]}, got {list(mask.shape)}")
        given["mask"] = mask
    for name, group, rows in (("query_group", query_group, query), ("key_group", key_group, key)):
        if group is not None:
            _checks.has_dtype(name, group, _checks.INDEX)
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
    return None if mask is None else mask.unsqueeze(0), batched[0], batched[1]


# ---------------------------------------------------------------- layers


class LinearLogProb(torch.nn.Module):
    """Apply `linear_log_prob` as a layer; the words are given with the rows, as they often are an embedding's.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.LinearLogProb(scale=2.0)(torch.eye(1, 3), torch.eye(3), torch.tensor([0])).log_prob
        tensor([-0.2395])
    """

    def __init__(self, scale: float = 1.0, ignore_index: int = -100) -> None:
        super().__init__()
        self.scale, self.ignore_index = _checks.as_float("scale", scale), _ignored(ignore_index)

    def forward(self, x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> LogProbs:
        options: dict[str, Any] = {"scale": self.scale, "ignore_index": self.ignore_index}
        return linear_log_prob(x, weight, target, bias=bias, **options)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, ignore_index={self.ignore_index}"


class LinearCrossEntropy(torch.nn.Module):
    """Apply `linear_cross_entropy` as a layer; the words are given with the rows, as they often are an embedding's.

    Example:
        >>> import torch, custom_ops
        >>> custom_ops.LinearCrossEntropy()(torch.eye(2, 3), torch.eye(3), torch.tensor([0, 1]))
        tensor(0.5514)
    """

    def __init__(
        self,
        reduction: str = "mean",
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        _checks.is_one_of("reduction", reduction, _checks.REDUCTIONS)
        self.reduction, self.label_smoothing = reduction, _smoothing(label_smoothing)
        self.ignore_index = None if ignore_index is None else _ignored(ignore_index)
        self.scale = _checks.as_float("scale", scale)

    def forward(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        linear_bias: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        options: dict[str, Any] = {"ignore_index": self.ignore_index, "label_smoothing": self.label_smoothing}
        tensors: dict[str, Any] = {"linear_bias": linear_bias, "weight": weight}
        options |= {"reduction": self.reduction, "scale": self.scale}
        return linear_cross_entropy(input, linear_weight, target, **tensors, **options)

    def extra_repr(self) -> str:
        own = f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}, scale={self.scale}"
        return f"reduction={self.reduction!r}, {own}"


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
