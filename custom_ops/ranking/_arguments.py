"""The arguments that all list losses share: their documentation, their checks, and the reduction over lists."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from custom_ops import _checks, shards
from custom_ops._enums import LabelUse, Reduction
from custom_ops._leaf import have_values
from custom_ops._wide import to_dtype, under_autocast
from custom_ops.library._torch import OpOverload
from custom_ops.ranking._inputs import in_dtype, in_order, list_valid
from custom_ops.ranking._list_loss import WEIGHTED, no_gradient
from custom_ops.ranking._lists import list_total

_NO_LIMIT = 2**31 - 1

# ---------------------------------------------------------------- documentation

_ARGUMENTS = """
    scores: ``[..., n]``; float16, bfloat16, float32 or float64. 16-bit scores are computed in float32.
    labels: ``[..., n]``, of any real dtype; higher is better. Labels that require a gradient are an error.
    mask: bool ``[..., n]``, True for the items that count. The others are never read, and their gradient is 0.
    lengths: int ``[...]``, the number of items at the start of each list that count.
    cu_lengths: int ``[L + 1]``, non-decreasing: the last dimension holds L lists, and list l has the items from
        ``cu_lengths[l]`` to before ``cu_lengths[l + 1]``.
    weights: real ``[...]``, with ``cu_lengths`` ``[..., L]``: one for each list.
    item_weights: real ``[..., n]``, not negative, without gradient: one for each item, such as an inverse
        propensity. The term of a pair is multiplied by the weights of both items, and the gain of an item, or its own
        term, by its weight.
    reduction: "mean" over the lists that contribute (weighted by ``weights``; 0 if there is none), "sum" or "none".
    empty: the loss of a list that doesn't contribute, such as 0.0, 1.0 or ``math.nan``, which then is in the mean. Its
        gradient is 0.
"""

_RETURNS = """Returns:
    A scalar, or for "none" one loss for each list; in the dtype of the scores, under autocast in float32. A list that
    doesn't contribute has a loss, unless ``empty`` is given, and a gradient of 0."""

_RAISES = """Raises:
    TypeError: an argument of a wrong type or dtype.
    ValueError: a shape that doesn't match, tensors on several devices, both ``lengths`` and ``cu_lengths``, an
        unknown option, a number out of range.
    RuntimeError: ``lengths`` out of range, ``cu_lengths`` out of order or out of range; on a GPU it is an assertion
        on the device."""

_SECTION = re.compile(r"^(?=(?:Args|Returns|Raises|Source|Example):)", re.MULTILINE)
_ENTRY = re.compile(r"^(?=    \w)", re.MULTILINE)

_WEIGHTS = (*_checks.REAL, torch.bool)

F = TypeVar("F", bound=Callable[..., Tensor])


def _entries(arguments: str) -> dict[str, str]:
    """Return {name: description} of the arguments that the lines describe."""
    return {entry.split()[0].strip(":,"): entry.strip("\n") for entry in _ENTRY.split(arguments) if entry.strip()}


def documented(function: F, arguments: str = "", returns: str = _RETURNS) -> F:
    """Complete the docstring of a function of lists with the parts that all of them share.

    In the source, ``Args`` has the function's own arguments, and those shared ones that have another meaning there.
    ``Returns`` and ``Raises`` are those of all list losses, unless the source has such a section. ``arguments`` has
    further shared arguments, or the same ones with another meaning.
    """
    if function.__doc__ is None:  # under python -OO there is no docstring
        return function
    description, *sections = (part.strip() for part in _SECTION.split(inspect.cleandoc(function.__doc__)))
    own = {section.partition(":")[0]: section for section in sections}
    entries = _entries(_ARGUMENTS) | _entries(arguments) | _entries(own.pop("Args", "Args:").removeprefix("Args:"))
    described = [entries[name] for name in inspect.signature(function).parameters if name in entries]
    complete = {"Args": "\n".join(["Args:", *described]), "Returns": returns, "Raises": _RAISES} | own
    function.__doc__ = "\n\n".join([description, *complete.values()])
    return function


def limit(k: int | None) -> int:
    """Check ``k`` and return it as ops take it: the number of ranks that count."""
    k = _checks.as_limit("k", k)
    return _NO_LIMIT if k is None else min(k, _NO_LIMIT)


# ---------------------------------------------------------------- checks, and the loss


def list_loss(
    op: OpOverload,
    params: Sequence[Any],
    use: int,
    scores: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    cu_lengths: Tensor | None,
    weights: Tensor | None,
    item_weights: Tensor | None,
    reduction: str,
    empty: float | None = None,
    of_pairs: bool = False,
) -> Tensor:
    """Check the arguments of all list losses, call ``op`` on them and its own ``params``, and reduce over the lists.

    ``use`` says how the loss uses its labels; see `custom_ops.ranking._inputs`. If it needs more than their order,
    float64 labels are computed in float64, whatever the scores' dtype is. Weights of the items are an argument of the
    op, or multiply the labels' gains if it has no such argument. In a loss ``of_pairs`` an item of weight 0 is in no
    pair.
    """
    valid, offsets = checked(scores, labels, mask, lengths, cu_lengths, weights, reduction, item_weights=item_weights)
    wide = torch.promote_types(scores.dtype, torch.float32)
    if labels.dtype == torch.uint64 and use not in (LabelUse.ORDER, LabelUse.DIFFERENCE):
        labels = labels.double()
    dtype = torch.float64 if labels.dtype == torch.float64 and use != LabelUse.ORDER else wide
    # A DTensor stays sharded until only the losses of its lists need to be communicated.
    empty = value_of_empty(empty)
    whole = weights is None and empty is None and type(scores) in (Tensor, Parameter)
    by_op = _checks.REDUCTIONS[reduction] if whole else Reduction.NONE.value
    given: tuple[Tensor | None, ...] = (valid, offsets)
    if item_weights is not None and op not in WEIGHTED:
        if use != LabelUse.VALUE and not labels.is_floating_point():
            labels = in_dtype(labels, torch.float32, valid, offsets, use)  # time stamps as their exact differences
        labels = weighted_labels(labels, item_weights.to(dtype), use)
    elif op in WEIGHTED:
        if item_weights is not None:
            item_weights = item_weights.to(dtype)
            if of_pairs:
                some = item_weights != 0
                valid = some if valid is None else valid & some
        given = (valid, offsets, item_weights)
    labels = in_dtype(labels, dtype, valid, offsets, use)
    loss, _, active = op(to_dtype(scores, dtype), labels, *given, by_op, 0, *params)
    if by_op == Reduction.NONE:
        if offsets is None and (weights is not None or reduction == "none"):
            loss, active = loss.squeeze(-1), active.squeeze(-1)
        loss, active = with_empty(loss, active, empty)
        loss = reduce(loss, active, weights, reduction)
    return rounded(loss, wide if under_autocast(scores) else scores.dtype)


def value_of_empty(empty: Any) -> float | None:
    """Check the option ``empty``, which may be NaN, and return it as a Python number."""
    value = _checks.plain(empty)
    return value if value is None or isinstance(value, float) else _checks.as_float("empty", value)


def with_empty(values: Tensor, active: Tensor, empty: float | None) -> tuple[Tensor, Tensor]:
    """Return the lists' values with ``empty`` for those that don't contribute, which then are in the mean."""
    if empty is None:
        return values, active
    instead = values.new_ones(()) * empty  # Dynamo would compile torch.where anew for each number
    return torch.where(active, values, instead), torch.ones_like(active)


def weighted_labels(labels: Tensor, item_weights: Tensor, use: int) -> Tensor:
    """Return the labels whose gains, values or exponentials, by ``use``, are those of ``labels`` times the weights."""
    y = labels.to(item_weights.dtype)
    if use == LabelUse.DIFFERENCE:  # their exponentials are the targets
        return y + item_weights.log()
    if use == LabelUse.VALUE:
        return torch.where(item_weights == 0, 0, y * item_weights)
    # 2^z - 1 = w (2^y - 1) for z = y + log2(w + (1 - w) 2^-y), in which nothing overflows.
    raised = y + torch.addcmul(item_weights, 1 - item_weights, torch.exp2(-y)).log2()
    return torch.where(y <= 0, y, torch.where(item_weights == 0, 0, raised))


def rounded(loss: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the loss in ``dtype``; warn of a sum over pairs that float16 can't hold, unless that would wait for a
    device.
    """
    out = to_dtype(loss, dtype)
    if dtype == torch.float16 and out.device.type == "cpu" and have_values(out) and bool(out.isinf().any()):
        warnings.warn(
            "the loss is beyond the range of float16, or near it: where the loss is a sum over pairs, pass "
            "normalize=True to divide by their number; or pass float32 scores",
            stacklevel=4,
        )
    return out


def checked(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    cu_lengths: Tensor | None,
    weights: Tensor | None,
    reduction: str,
    dtypes: Sequence[torch.dtype] = _checks.FLOATING,
    item_weights: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Check all arguments and return the result of `valid_items`."""
    not_nested("scores", scores)
    _checks.has_dtype("scores", scores, dtypes)
    if scores.dim() == 0:
        raise ValueError("scores: expected [..., n], got a single number")
    _checks.is_tensor("labels", labels)
    if labels.is_complex():
        raise TypeError(f"labels: expected real numbers, got {str(labels.dtype).removeprefix('torch.')}")
    no_gradient(labels.requires_grad)
    _has_shape("labels", labels, scores, scores.shape)
    valid, offsets = valid_items("scores", scores, mask, lengths, cu_lengths)
    if weights is not None:
        _checks.has_dtype("weights", weights, _WEIGHTS)
        per_list = scores.shape[:-1] if offsets is None else (*scores.shape[:-1], offsets.shape[0] - 1)
        _has_shape("weights", weights, scores, torch.Size(per_list))
    if item_weights is not None:
        _checks.has_dtype("item_weights", item_weights, _WEIGHTS)
        _has_shape("item_weights", item_weights, scores, scores.shape)
        if item_weights.requires_grad:
            raise ValueError(
                "item_weights: expected a tensor without gradient, as the loss has none in them; detach it"
            )
    _checks.is_one_of("reduction", reduction, _checks.REDUCTIONS)
    return valid, offsets


def not_nested(name: str, x: Tensor) -> None:
    if isinstance(x, Tensor) and x.is_nested:
        raise TypeError(
            f"{name}: expected a dense tensor, got a nested tensor; pass its values() with cu_lengths=its offsets()"
        )


def valid_items(
    name: str, x: Tensor, mask: Tensor | None, lengths: Tensor | None, cu_lengths: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return which items of ``x``, called ``name``, are valid (None for all), and the bounds of several lists.

    All arguments are checked.
    """
    offsets = None
    if cu_lengths is not None:
        if lengths is not None:
            raise ValueError("lengths, cu_lengths: expected at most one of them, got both")
        offsets = integers("cu_lengths", cu_lengths, x)
        _checks.has_dims("cu_lengths", offsets, "[L + 1]")
        if offsets.shape[0] == 0:
            raise ValueError("cu_lengths: expected at least one element, got none")
        _checks.same_device(**{name: x, "cu_lengths": offsets})
    if mask is not None:
        _checks.has_dtype("mask", mask, (torch.bool,))
        _has_shape("mask", mask, x, x.shape, name)
    if lengths is None:
        return mask, offsets
    lengths = integers("lengths", lengths, x)
    _has_shape("lengths", lengths, x, x.shape[:-1], name)
    begun: Tensor = list_valid(lengths, x.shape[-1])
    return begun if mask is None else mask & begun, offsets


def integers(name: str, value: Any, x: Tensor, unsigned: bool = False) -> Tensor:
    """Return an int64 tensor from integers in a tensor, a list, a NumPy array or the like.

    ``unsigned`` allows uint64, too, of which only the order stays.
    """
    if not isinstance(value, Tensor):
        if any(step < 0 for step in getattr(value, "strides", ())):  # torch takes no array that runs backwards
            value = value.copy()
        try:
            value = torch.as_tensor(value, device=x.device)
        except (RuntimeError, TypeError, ValueError):
            raise TypeError(f"{name}: expected a tensor or a list of integers, got {type(value).__name__}") from None
        value = value if value.numel() else value.to(torch.int64)
    if unsigned and value.dtype == torch.uint64:
        return in_order(value)
    _checks.is_integer(name, value)
    return value.to(torch.int64)


def _has_shape(name: str, tensor: Tensor, beside: Tensor, shape: torch.Size, called: str = "scores") -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != beside.device:
        _checks.same_device(**{called: beside, name: tensor})


def reduce(loss: Tensor, active: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    """Reduce over the lists; the mean is over the lists that contribute, or 0 if none does."""
    if weights is not None or reduction == "none" or shards.is_sharded(loss):
        return reduce_by_torch(loss, active, weights, reduction)
    total: Tensor = list_total(loss, active, reduction == "mean", 0)
    return total


def reduce_by_torch(loss: Tensor, active: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    dtype = loss.dtype
    if weights is not None:
        # In float32 the product with a tiny weight is 0, and that with a large one is infinite.
        weights = weights.to(dtype if reduction == "none" else torch.float64)
        loss = torch.where((weights == 0) & ~loss.isfinite(), 0, loss) * weights
    if reduction == "none":
        return loss
    # The sum is in float64, as torch's sums depend on the number of threads.
    total = loss.sum(dtype=torch.float64)
    if reduction == "mean":
        count = active.sum() if weights is None else (weights * active).sum(dtype=torch.float64)
        if shards.is_sharded(count):
            count = shards.summed_up(count)
        total = total / torch.where(count == 0, 1, count)
    return total.to(dtype)


class ListLossModule(torch.nn.Module):
    """A list loss as a layer; subclasses name the ``function`` and pass its own arguments on.

    Each argument is an attribute, which may be set again: a call reads them as they are then.
    """

    function: Callable[..., Tensor]

    def __init_subclass__(cls) -> None:
        shared = ListLossModule.forward
        if cls.forward is shared:  # Dynamo counts compilations by code object, and would count those of all losses
            own = FunctionType(shared.__code__.replace(co_name=cls.__name__), globals(), "forward")
            own.__kwdefaults__, own.__annotations__ = shared.__kwdefaults__, shared.__annotations__
            cls.forward = own  # type: ignore[method-assign]

    def __init__(self, reduction: str = "mean", empty: float | None = None, **own: Any) -> None:
        super().__init__()
        self.reduction, self.empty, self._own = reduction, _checks.plain(empty), (*own,)
        for name, value in own.items():
            setattr(self, name, _checks.plain(value))
        with torch.no_grad():
            nothing = torch.empty(0, device="cpu")
            self(nothing, nothing)  # the function checks the arguments

    def forward(
        self,
        scores: Tensor,
        labels: Tensor,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_lengths: Tensor | None = None,
        weights: Tensor | None = None,
        item_weights: Tensor | None = None,
    ) -> Tensor:
        where: dict[str, Any] = {"mask": mask, "lengths": lengths, "cu_lengths": cu_lengths, "weights": weights}
        where["item_weights"] = item_weights
        own = {name: getattr(self, name) for name in self._own}
        return type(self).function(scores, labels, **where, reduction=self.reduction, empty=self.empty, **own)

    def extra_repr(self) -> str:
        shown = (*self._own, *(["empty"] if self.empty is not None else []), "reduction")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)
