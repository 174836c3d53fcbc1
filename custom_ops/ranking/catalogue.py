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
from custom_ops._wide import to_dtype, under_autocast, wide
from custom_ops.library import Function
from custom_ops.library._torch import transforms_are_active
from custom_ops.ranking._list_loss import is_differentiated

# ---------------------------------------------------------------- ops

# The arguments are x [B, N, D], weight [B, V, D], bias [B, V] and target [B, N]. The logits z = scale x weight' + bias
# are never returned, and the results of rows are [B, N]. B is 1 except under vmap. The bias and the results are in
# float64 if x and weight are, else in float32. If the catalogue has ``total`` words, of which ``weight`` has those from
# ``first`` on, the target is a word of the whole, and a target that isn't among the V has the score 0. Rows with the
# target ``ignore_index`` are never read. A word other than the target is left out of a row where ``mask``, which is
# uint8 [B, N, V], is 0, or if its ``word_group`` [B, V] is the row's ``row_group`` [B, N].
#
# If ``binary``, each pair of a row and a word is a problem of its own: log_prob is the sum of log sigmoid(z) over the
# right words, which are the target and those where ``mask`` is 2, and of log sigmoid(-z) over the others. Then entropy,
# lse and stats are 0, and have no derivative.


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
    binary: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return each row's log_prob, entropy and lse, its ``stats`` [B, N, 3], with which backward starts, and ``kept``.

    The stats are the largest score, the logarithm of the sum of e^(z - largest), and the entropy. If ``keep``, which
    isn't for binary problems, ``kept`` [B, N, V] has e^(z - largest); else it is empty.
    """
    return *_results(x), _of_rows(x, 3), _of_rows(x, weight.shape[1]) if keep else x.new_empty(0, dtype=wide_dtype(x))


@define
def catalogue_backward(
    of_log_prob: Tensor | None,
    of_entropy: Tensor | None,
    of_lse: Tensor | None,
    stats: Tensor,
    kept: Tensor | None,
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
    binary: bool,
    of_x: bool,
    of_weight: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the derivatives of ``sum(of_log_prob log_prob + of_entropy entropy + of_lse lse)`` in x, weight and bias.

    One that isn't wanted is empty. Stats and ``kept`` must be those of these arguments, and have no derivative
    of their own.
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
    binary: bool,
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
def catalogue_curve(
    stats: Tensor,
    x_t: Tensor | None,
    weight_t: Tensor | None,
    bias_t: Tensor | None,
    x_u: Tensor | None,
    weight_u: Tensor | None,
    bias_u: Tensor | None,
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
    binary: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the second derivatives of log_prob, entropy and lse along two tangents of x, weight and bias."""
    return _results(x)


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
    binary: bool,
    of_x: bool,
    of_weight: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return ``sum(of_log_prob log_prob + of_lse lse)`` [B], the rows' stats, and the sum's derivatives, in one pass.

    The derivatives are in x, weight and bias; one that isn't wanted is empty. They are float32 even for 16-bit
    arguments, as the loss may have a scale that keeps them in float16's range.
    """
    loss = x.new_empty(x.shape[:1], dtype=wide_dtype(x))
    of_first, of_second, of_third = _gradients(x, weight, of_x, of_weight, of_bias)
    return loss, _of_rows(x, 3), wide(of_first), wide(of_second), of_third


@define
def catalogue_symmetric_loss(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    row_group: Tensor | None,
    word_group: Tensor | None,
    scale: float,
    of_x: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the sum of -log_prob [B] in both directions, the stats of both, and the sum's derivatives.

    The target of row i is word i, and among the rows it is the row of word i; there may be more words than rows. The
    logits are computed once for both directions. Stats have no entropy in the second direction. Otherwise all is as for
    ``catalogue_loss``.
    """
    of_first, of_second, _ = _gradients(x, weight, of_x, of_weight, False)
    loss = x.new_empty(x.shape[:1], dtype=wide_dtype(x))
    return loss, _of_rows(x, 3), _of_rows(x, 3), wide(of_first), wide(of_second)


NONE_IGNORED = -(2**63)  # no target is equal to it


def wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _of_rows(x: Tensor, *tail: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], *tail), dtype=wide_dtype(x))


def _results(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _of_rows(x), _of_rows(x), _of_rows(x)


def _gradients(x: Tensor, weight: Tensor, of_x: bool, of_weight: bool, of_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if of_x else (0,)),
        weight.new_empty(weight.shape if of_weight else (0,)),
        x.new_empty(weight.shape[:2] if of_bias else (0,), dtype=wide_dtype(x)),
    )


# ---------------------------------------------------------------- derivatives


def _wanted(gradients: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    return [gradient if needs else None for gradient, needs in zip(gradients, needed)]


def _no_third() -> Exception:
    return NotImplementedError("linear_log_prob and the losses made of it have no third derivative")


class CatalogueLogProb(Function, op=catalogue_log_prob):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        (*_, stats, kept), ctx.options = output, inputs[7:12]
        ctx.mark_non_differentiable(stats, kept)
        ctx.save_for_backward(stats, kept if inputs[12] else None, *inputs[:7])
        ctx.save_for_forward(stats, *inputs[:7])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:3]
        found = catalogue_backward(*grads[:3], *ctx.saved_tensors, *ctx.options, *needed)
        return *_wanted(found, needed), *[None] * 10

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        stats, *where = ctx.saved_tensors
        return *_tangents(stats, tangents[:3], where, ctx.options), None, None


def _tangents(stats: Tensor, moves: Sequence[Tensor | None], where: Sequence[Any], options: Sequence[Any]) -> Any:
    """Return the tangents of log_prob, entropy and lse."""
    nothing = (None,) * 3, (False,) * 3
    return catalogue_second(*nothing[0], stats, *moves, *where, *options, *nothing[1])[:3]


class CatalogueBackward(Function, op=catalogue_backward):
    """The op is linear in the weights of the rows, and symmetric in what it is differentiated in and along."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.of_x, ctx.of_weight, ctx.of_bias = inputs
        del tensors[4]  # The second order computes the scores again.
        ctx.options = tensors[11:]
        ctx.save_for_backward(*tensors[:11])
        ctx.save_for_forward(*tensors[:11])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[5:8]
        asked = ctx.of_x, ctx.of_weight, ctx.of_bias
        moves = [move if wanted else None for move, wanted in zip(cotangents, asked)]
        saved = ctx.saved_tensors
        found = catalogue_second(*saved[:4], *moves, *saved[4:], *ctx.options, *needed)
        return *_wanted(found[:3], ctx.needs_input_grad[:3]), None, None, *_wanted(found[3:], needed), *[None] * 12

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        of_rows, moves = tangents[:3], tangents[5:8]
        asked = ctx.of_x, ctx.of_weight, ctx.of_bias
        saved = ctx.saved_tensors
        parts = []
        if any(t is not None for t in of_rows):
            parts.append(catalogue_backward(*of_rows, saved[3], None, *saved[4:], *ctx.options, *asked))
        if any(t is not None for t in moves):
            parts.append(catalogue_second(*saved[:4], *moves, *saved[4:], *ctx.options, *asked)[3:])
        return tuple(add(*some) for some in zip(*parts)) if parts else (None,) * 3


class CatalogueSecond(Function, op=catalogue_second):
    """The op is linear in the tangents of x, weight and bias. In these themselves, only its results of rows have a
    derivative.
    """

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
            parts.append(catalogue_backward(*of_rows, stats, None, *where, *ctx.options, *of_moves))
            if any(of_where):
                found = catalogue_second(*of_rows, stats, *moves, *where, *ctx.options, *of_where)
                of_primals = _wanted(found[3:], of_where)
        sums = [add(*some) for some in zip(*parts)]
        return *[None] * 4, *_wanted(sums, of_moves), *of_primals, *[None] * 12

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        asked = ctx.of_x, ctx.of_weight, ctx.of_bias
        weights, again, of_where = tangents[:3], tangents[4:7], tangents[7:10]
        moved = any(t is not None for t in of_where)
        if any(asked) and (moved or any(t is not None for t in weights)):
            raise _no_third()
        saved = ctx.saved_tensors
        parts: list[Any] = []
        if any(t is not None for t in again):
            parts.append(catalogue_second(*saved[:4], *again, *saved[7:], *ctx.options, *asked))
        if moved:
            curved = catalogue_curve(saved[3], *saved[4:7], *of_where, *saved[7:], *ctx.options)
            x, weight = saved[7:9]
            parts.append((*curved, x.new_zeros(0), weight.new_zeros(0), x.new_zeros(0, dtype=wide_dtype(x))))
        return tuple(add(*some) for some in zip(*parts)) if parts else (None,) * 6


class CatalogueCurve(Function, op=catalogue_curve):
    """The op is linear in each of the two tangents, and symmetric in them."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options = inputs[14:]
        ctx.save_for_backward(*inputs[:14])
        ctx.save_for_forward(*inputs[:14])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if any(ctx.needs_input_grad[7:10]):
            raise _no_third()
        stats, *saved = ctx.saved_tensors
        gradients: list[Tensor | None] = []
        for needed, other in ((ctx.needs_input_grad[1:4], saved[3:6]), (ctx.needs_input_grad[4:7], saved[:3])):
            found: Sequence[Any] = (None,) * 3
            if any(needed):
                found = catalogue_second(*cotangents, stats, *other, *saved[6:], *ctx.options, *needed)[3:]
            gradients += _wanted(found, needed)
        return None, *gradients, *[None] * 12

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        if any(t is not None for t in tangents[7:10]):
            raise _no_third()
        stats, *saved = ctx.saved_tensors
        parts = [
            catalogue_curve(stats, *again, *other, *saved[6:], *ctx.options)
            for again, other in ((tangents[1:4], saved[3:6]), (tangents[4:7], saved[:3]))
            if any(t is not None for t in again)
        ]
        return tuple(add(*some) for some in zip(*parts)) if parts else (None,) * 3


class CatalogueLoss(Function, op=catalogue_loss):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        if any(ctx.needs_input_grad[:2]):
            raise NotImplementedError("catalogue_loss has no derivative in the weights of the rows")
        of_log_prob, of_lse, *where = inputs[:9]
        ctx.options = inputs[9:14]
        _, stats, *gradients = output
        ctx.mark_non_differentiable(stats, *gradients)
        ctx.found = inputs[14:]
        ctx.save_for_backward(of_log_prob, of_lse, stats, *where, *gradients)
        ctx.save_for_forward(of_log_prob, of_lse, stats, *where)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        of_log_prob, of_lse, *where, of_x, of_words, of_bias = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:5]
        if is_differentiated() or any(needs and not found for needs, found in zip(needed, ctx.found)):
            of_rows = [None if of is None else grad.unsqueeze(-1) * of for of in (of_log_prob, None, of_lse)]
            gradients = catalogue_backward(*of_rows, where[0], None, *where[1:], *ctx.options, *needed)
        else:  # the loss's derivatives are known up to the factor
            pairs = zip((of_x, of_words, of_bias), (where[1], where[2], of_log_prob), needed)
            gradients = [
                to_dtype(grad.reshape(-1, *[1] * (found.dim() - 1)) * found, like.dtype) if needs else None
                for found, like, needs in pairs
            ]
        return None, None, *_wanted(gradients, needed), *[None] * 12

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        of_log_prob, of_lse, stats, *where = ctx.saved_tensors
        log_prob_t, _, lse_t = _tangents(stats, tangents[2:5], where, ctx.options)
        moved = of_log_prob * log_prob_t if of_lse is None else of_log_prob * log_prob_t + of_lse * lse_t
        # The sum is in float64, as torch's sums depend on the number of threads.
        return moved.sum(-1, dtype=torch.float64).to(moved.dtype), *[None] * 4


class CatalogueSymmetricLoss(Function, op=catalogue_symmetric_loss):
    """Each derivative is the sum of those of ``catalogue_log_prob`` in the two directions."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.scale, of_x, of_weight = inputs
        _, of_rows, of_columns, *gradients = output
        ctx.mark_non_differentiable(of_rows, of_columns, *gradients)
        ctx.found = of_x, of_weight
        ctx.save_for_backward(of_rows, of_columns, *tensors, *gradients)
        ctx.save_for_forward(of_rows, of_columns, *tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        *saved, of_x, of_words = ctx.saved_tensors
        x, weight = saved[2:4]
        needed = ctx.needs_input_grad[:2]
        if is_differentiated() or any(needs and not found for needs, found in zip(needed, ctx.found)):
            nothing, of_rows = (None, None), -grad.unsqueeze(-1).expand(x.shape[:2])
            first, second = (
                catalogue_backward(of_rows, *nothing, stats, None, *where, *options, *asked, False)
                for (stats, where, options), asked in zip(_directions(ctx.scale, *saved), (needed, needed[::-1]))
            )
            others = weight.shape[1] - x.shape[1]
            gradients = [
                first[0] + second[1] if needed[0] else None,
                first[1] + torch.nn.functional.pad(second[0], (0, 0, 0, others)) if needed[1] else None,
            ]
        else:
            gradients = [
                to_dtype(grad.reshape(-1, 1, 1) * found, like.dtype) if needs else None
                for found, like, needs in zip((of_x, of_words), (x, weight), needed)
            ]
        return *gradients, *[None] * 6

    @staticmethod
    def jvp(ctx: Any, x_t: Tensor | None, weight_t: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        rows = saved[2].shape[1]
        moves = (x_t, weight_t, None), (None if weight_t is None else weight_t.narrow(1, 0, rows), x_t, None)
        moved = torch.stack(
            [
                _tangents(stats, moves_of, where, options)[0]
                for (stats, where, options), moves_of in zip(_directions(ctx.scale, *saved), moves)
            ]
        )
        return -moved.sum((0, 2), dtype=torch.float64).to(moved.dtype), *[None] * 4


def _directions(
    scale: float,
    of_rows: Tensor,
    of_columns: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    row_group: Tensor | None,
    word_group: Tensor | None,
) -> Any:
    """Return the stats, tensors and options of both directions of a symmetric loss, as for ``catalogue_log_prob``."""
    rows, words = x.shape[1], weight.shape[1]
    target = torch.arange(rows, device=x.device).expand(x.shape[:2])
    turned = None if mask is None else mask.narrow(2, 0, rows).transpose(1, 2)
    groups = None if word_group is None else word_group.narrow(1, 0, rows)
    first = x, weight, None, target, mask, row_group, word_group
    second = weight.narrow(1, 0, rows), x, None, target, turned, groups, row_group
    return (
        (of_rows, first, (scale, NONE_IGNORED, 0, words, False)),
        (of_columns, second, (scale, NONE_IGNORED, 0, rows, False)),
    )


# ---------------------------------------------------------------- batching


def _batch(op: Any, arguments: str, results: str, flagged: int) -> None:
    """Add a batching rule: the batch becomes examples, or if all share their words, more rows of the same example.

    ``arguments`` has an "r" for each tensor that has rows, and a "w" for each that has words. ``results`` likewise has
    an "r" or "w", or an "e" for one with neither; the last ``flagged`` are those whose flags the op's last arguments
    are.
    """
    tensors = len(arguments)

    @library.vmap(op)
    def _(info: Any, in_dims: Any, *args: Any) -> Any:
        size = info.batch_size
        flags = [*[True] * (len(results) - flagged), *args[len(args) - flagged :]]
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
_batch(catalogue_log_prob, _WHERE, "rrrrr", 1)
_batch(catalogue_backward, "rrrrr" + _WHERE, "rww", 3)
_batch(catalogue_second, "rrrrrww" + _WHERE, "rrrrww", 3)
_batch(catalogue_curve, "rrwwrww" + _WHERE, "rrr", 0)
_batch(catalogue_loss, "rr" + _WHERE, "errww", 3)
_batch(catalogue_symmetric_loss, "rwrrw", "errrw", 2)


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
        target: integers ``[...]``, from 0 to V - 1, or ``ignore_index``.
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
    arguments, results and gradients, the memory is O(N + V), and for 16-bit words a float32 copy of their gradient. Up
    to 4 million logits are kept for backward instead. A third derivative raises ``NotImplementedError``.

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
    tensors, options = checked_arguments(("x", x), ("weight", weight), target, ("bias", bias), scale, ignore_index)
    found = catalogue_log_prob(*tensors, *options, _keeps(tensors))
    return LogProbs(*(t.reshape(target.shape) for t in found[:3]))


def _in_shards(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, scale: float | Tensor, ignore_index: int
) -> LogProbs:
    """Return the results for DTensors, of which rows and words may be sharded.

    Only three numbers of each row are exchanged for sharded words: its logsumexp, its entropy and its target's score
    among the words of each process.
    """
    ignored, row = _ignored(ignore_index), shards.batch_labels(x.dim() - 1)
    if isinstance(scale, Tensor):
        x, scale = wide(x) * scale, 1.0
    words = Words.of(x, weight, bias)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Any:
        tensors, options = checked_arguments(("x", x), ("weight", weight), target, ("bias", bias), scale, ignored)
        found = catalogue_log_prob(*tensors, *options[:2], words.first, words.total, False, False)[:3]
        log_prob, entropy, lse = (t.reshape(target.shape) for t in found)
        return (
            (log_prob, entropy, lse)
            if words.parts == 1
            else words.own(words.score(log_prob, lse, target), entropy, lse)
        )

    def joined(of_parts: Tensor, target: Tensor) -> Any:
        score, entropy, lse = of_parts.unbind(1)
        whole = lse.logsumexp(0)
        has_words = lse.isfinite()
        below = torch.where(has_words, whole - lse, 0)
        share = torch.where(has_words, (-below).exp(), 0)
        results = score.sum(0) - whole, (share * (entropy + below)).sum(0), whole
        counts = target.to(torch.int64) != ignored
        return tuple(torch.where(counts, t, 0) for t in results)

    inputs, results = f"{row}D,vD,v,{row}", ",".join([row] * 3)
    if words.parts == 1:
        return LogProbs(*shards.in_shards(run, f"{inputs}->{results}", x, weight, bias, target))
    of_parts = shards.summed_up(shards.in_shards(run, f"{inputs}->KT{row}", x, weight, bias, target))
    return LogProbs(*shards.in_shards(joined, f"KT{row},{row}->{results}", of_parts, target))


class Words(NamedTuple):
    """The words of this process: they are those from ``first`` on, in part ``part`` of ``parts``."""

    part: int
    parts: int
    first: int
    total: int

    @staticmethod
    def of(rows: Tensor, *words: Any) -> Words:
        """Return the place in the first of ``words`` that is sharded where the rows aren't; all have it then."""
        total = words[0].shape[0]
        for t in words:
            cuts = [at for at, p in enumerate(getattr(t, "placements", ())) if p.is_shard(0) and not is_cut(rows, at)]
            if len(cuts) > 1:
                raise NotImplementedError("weight: expected words sharded in one dimension of the mesh, got several")
            if cuts:
                part, parts = t.device_mesh.get_local_rank(cuts[0]), t.device_mesh.size(cuts[0])
                return Words(part, parts, min(part * -(-total // parts), total), total)
        return Words(0, 1, 0, total)

    def own(self, *numbers: Tensor) -> Tensor:
        """Return [parts, K, ...] with this process's K numbers of each row in its place; the sum has those of all."""
        stacked = torch.stack(numbers)
        is_own = torch.arange(self.parts, device=stacked.device) == self.part
        return torch.where(is_own.view(-1, *[1] * stacked.dim()), stacked, 0)

    def score(self, log_prob: Tensor, lse: Tensor, target: Tensor) -> Tensor:
        """Return the target's score, or 0 if it isn't among this process's words."""
        words = -(-self.total // self.parts)
        return torch.where((target >= self.first) & (target < self.first + words), log_prob + lse, 0)


def is_cut(t: Any, at: int) -> bool:
    return hasattr(t, "placements") and bool(t.placements[at].is_shard(0))


_KEPT = 1 << 22  # as many scores are kept for backward, where they cost less than the product that computes them anew


def _keeps(tensors: Sequence[Tensor | None]) -> bool:
    """Return whether forward should keep the scores for backward."""
    x, weight = tensors[:2]
    assert x is not None
    assert weight is not None
    if torch.compiler.is_compiling() or transforms_are_active() or not torch.is_grad_enabled():
        return False
    return x.shape[1] * weight.shape[1] <= _KEPT and any(t is not None and t.requires_grad for t in tensors[:3])


class _Arguments(NamedTuple):
    """The arguments as ops take them."""

    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None]
    options: tuple[float, int, int, int, bool]


def checked_arguments(
    x_named: tuple[str, Tensor],
    weight_named: tuple[str, Tensor],
    target: Tensor,
    bias_named: tuple[str, Tensor | None],
    scale: float | Tensor,
    ignore_index: int,
    scale_name: str = "scale",
) -> _Arguments:
    """Check the arguments, which have these names, and return them as ops take them."""
    (x_name, x), (weight_name, weight), (bias_name, bias) = x_named, weight_named, bias_named
    _checks.has_dtype(x_name, x, _checks.FLOATING)
    _checks.has_dtype(weight_name, weight, _checks.FLOATING)
    _checks.is_integer("target", target)
    if x.dim() == 0:
        raise ValueError(f"{x_name}: expected [..., D], got a single number")
    _checks.has_dims(weight_name, weight, "[V, D]")
    if weight.shape[1] != x.shape[-1]:
        raise ValueError(f"{weight_name}: expected [V, {x.shape[-1]}] as {x_name}, got {list(weight.shape)}")
    if target.shape != x.shape[:-1]:
        raise ValueError(f"target: expected shape {list(x.shape[:-1])}, got {list(target.shape)}")
    target = to_dtype(target, torch.int64)  # an int32 is never equal to an ignore_index of more bits
    tensors = {x_name: x, weight_name: weight, "target": target}
    if bias is not None:
        _checks.has_dtype(bias_name, bias, _checks.FLOATING)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{bias_name}: expected shape [{weight.shape[0]}], got {list(bias.shape)}")
        tensors[bias_name] = bias
    ignored = _ignored(ignore_index)
    if isinstance(scale, Tensor):
        scale = tensors["scale"] = one_number("scale", scale, x)
    else:
        scale = _checks.as_float("scale", scale)
    _checks.same_device(**tensors)
    if under_autocast(x):
        low = torch.get_autocast_dtype(x.device.type)
        x, weight = (t if t.dtype == torch.float64 else t.to(low) for t in (x, weight))
    if torch.float64 in (x.dtype, weight.dtype):
        x, weight = x.double(), weight.double()
    dtype = wide_dtype(x)
    if isinstance(scale, Tensor):
        # A row that is ignored isn't scaled, so that it has no part in a derivative, whatever it and the scale hold.
        x, scale = wide(x) * torch.where(target != ignored, scale.to(dtype), 1).unsqueeze(-1), 1.0
    most = torch.finfo(dtype).max
    if not -most <= scale <= most:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(f"{scale_name}: expected scores times a number within the range of {kind}, got {scale}")
    words = weight.shape[0]
    return _Arguments(
        (
            x.reshape(1, -1, x.shape[-1]) if x.numel() else x.reshape(1, target.numel(), x.shape[-1]),
            weight.unsqueeze(0),
            None if bias is None else bias.to(dtype).unsqueeze(0),
            target.reshape(1, -1),
            *(None, None, None),
        ),
        (scale, ignored, 0, words, False),
    )


def one_number(name: str, value: Tensor, beside: Tensor) -> Tensor:
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

    The mean is that over the weights of the rows' targets, NaN if these are all 0. For "mean" and "sum" the forward
    pass computes the derivatives too, as they are known up to a factor, so that backward takes no product of matrices.
    Under a transform, or if the gradient is differentiated again, they are computed anew. The loss is differentiable in
    input, linear_weight, linear_bias and scale, twice and in forward mode. All that is said at `linear_log_prob` of
    dtypes, ignored rows, autocast, errors and memory holds here too; the loss has the dtype of the arguments, under
    autocast float32. For sharded words, DTensors exchange five numbers of each row at most.

    Args:
        input: ``[..., D]``, the rows; float16, bfloat16, float32 or float64.
        linear_weight: ``[V, D]``.
        target: integers ``[...]``, from 0 to V - 1, or ``ignore_index``.
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
    if shards.is_sharded(input, linear_weight, target, linear_bias, weight):
        given = input, linear_weight, linear_bias, weight, target
        return _cross_entropy_in_shards(*given, reduction, _ignored(ignored), e, scale)
    named = ("input", input), ("linear_weight", linear_weight), target, ("linear_bias", linear_bias)
    tensors, options = checked_arguments(*named, scale, ignored)
    x, words, bias, at = tensors[:4]
    counts = at != options[1]
    dtype, total = wide_dtype(x), words.shape[1]
    of_rows = shared = counts.to(dtype)
    if weight is not None:
        weight = _class_weights(weight, linear_weight).to(dtype)
        of_rows = torch.where(counts, weight[at.clamp(0, max(total - 1, 0))], 0) if total else of_rows
        is_weightless = of_rows == 0
    if reduction == "mean" and weight is None:
        of_rows = shared = shared / counts.sum().clamp_min(1)
    elif reduction == "mean":  # weights that are all 0 give NaN, but rows that don't count have no part in it
        whole = torch.where(counts.any(), of_rows.sum(dtype=torch.float64), 1).to(dtype)
        is_weightless = is_weightless & (whole != 0)
        of_rows, shared = (torch.where(counts, of / whole, 0) for of in (of_rows, shared))
    if weight is not None and not e:  # a row of weight 0 isn't read, as one that is ignored
        tensors = (*tensors[:3], torch.where(is_weightless, options[1], at), *tensors[4:])
    of_log_prob = (e - 1) * of_rows
    of_lse = shared * (e / max(total, 1) * (total if weight is None else weight.sum())) if e else None
    if reduction == "none":
        log_prob, _, lse, *_ = catalogue_log_prob(*tensors, *options, _keeps(tensors))
        loss = of_log_prob * log_prob if of_lse is None else of_log_prob * log_prob + of_lse * lse
    else:
        loss = sum_over_rows(of_log_prob, of_lse, tensors, options)
    if e:
        mean = _mean_score(x, words, bias, weight, options[0], shared, reduction != "none")
        loss = loss - (e * mean).to(dtype)
    if not under_autocast(input):
        loss = to_dtype(loss, torch.promote_types(input.dtype, linear_weight.dtype))
    return loss.reshape(target.shape if reduction == "none" else ())


def _cross_entropy_in_shards(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    target: Tensor,
    reduction: str,
    ignored: int,
    e: float,
    scale: float | Tensor,
) -> Tensor:
    """Return the loss for DTensors, of which rows and words may be sharded.

    For sharded words at most five numbers of each row are exchanged: its logsumexp, its target's score and weight, the
    weighted sum of scores, and the sum of weights, all among the words of each process.
    """
    row, dtype = shards.batch_labels(input.dim() - 1), torch.promote_types(input.dtype, linear_weight.dtype)
    if isinstance(scale, Tensor):
        input, scale = wide(input) * scale, 1.0
    words = Words.of(input, linear_weight, linear_bias, weight)

    def run(x: Tensor, linear: Tensor, bias: Tensor | None, weight: Tensor | None, target: Tensor) -> Any:
        named = ("input", x), ("linear_weight", linear), target, ("linear_bias", bias)
        tensors, options = checked_arguments(*named, scale, ignored)
        x, linear, bias, at = tensors[:4]
        log_prob, _, lse, *_ = catalogue_log_prob(*tensors, *options[:2], words.first, words.total, False, False)
        counts, here = at != ignored, at - words.first
        numbers = [log_prob if words.parts == 1 else words.score(log_prob, lse, at), lse]
        if weight is not None:
            weight = _class_weights(weight, linear[0]).to(lse.dtype)
            chosen = weight[here.clamp(0, max(len(weight) - 1, 0))] if len(weight) else torch.zeros_like(lse)
            numbers.append(torch.where(counts & (here >= 0) & (here < len(weight)), chosen, 0))
        if e:
            mean = _mean_score(x, linear, bias, weight, options[0], counts.to(lse.dtype), False)
            whole = linear.shape[1] if weight is None else weight.sum()
            numbers += [(mean * linear.shape[1]).to(lse.dtype), torch.zeros_like(lse) + whole]
        return words.own(*(t.reshape(target.shape) for t in numbers))

    def joined(of_parts: Tensor, target: Tensor) -> Any:
        score, lse, *others = of_parts.unbind(1)
        lse, counts = lse.logsumexp(0), target.to(torch.int64) != ignored
        of_rows = counts.to(lse.dtype) if weight is None else others.pop(0).sum(0)
        log_prob = score[0] if words.parts == 1 else score.sum(0) - lse
        loss = torch.where(of_rows == 0, 0, (e - 1) * of_rows * log_prob)
        if e:
            scores, whole = (t.sum(0) for t in others)
            loss = loss + e / max(words.total, 1) * (whole * lse - scores)
        return torch.where(counts, loss, 0), of_rows.double(), counts.double()

    tensors = input, linear_weight, linear_bias, weight, target
    of_parts = shards.summed_up(shards.in_shards(run, f"{row}D,vD,v,v,{row}->KT{row}", *tensors))
    loss, of_rows, counted = shards.in_shards(joined, f"KT{row},{row}->{row},{row},{row}", of_parts, target)
    if reduction == "none":
        return loss if under_autocast(input) else loss.to(dtype)
    total = loss.sum(dtype=torch.float64)
    if reduction == "mean":
        sums = shards.in_shards(lambda *t: torch.stack(t).flatten(1).sum(1), f"{row},{row}->S", of_rows, counted)
        whole, number = shards.summed_up(sums)
        total = total / torch.where(number == 0, 1, whole)
    return total.to(loss.dtype if under_autocast(input) else dtype)


def sum_over_rows(of_log_prob: Tensor, of_lse: Tensor | None, tensors: Sequence[Any], options: Sequence[Any]) -> Tensor:
    """Return ``sum(of_log_prob log_prob + of_lse lse)`` [1]."""
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors[:3]]
    loss: Tensor = catalogue_loss(of_log_prob, of_lse, *tensors, *options, *wanted)[0]
    return loss


def sum_in_both_directions(tensors: Sequence[Any], scale: float) -> Tensor:
    """Return the sum of -log_prob [1] of rows whose targets are the first words, and of these words among the rows."""
    x, weight, _, _, *left_out = tensors
    wanted = [torch.is_grad_enabled() and t.requires_grad for t in (x, weight)]
    loss: Tensor = catalogue_symmetric_loss(x, weight, *left_out, scale, *wanted)[0]
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
