"""The options and indices of a random call in other forms in which people have them: numpy scalars and arrays, tensors
of one number, lists, and other integer dtypes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from custom_ops.verify._fuzz import Choose

LISTED = ("lengths", "cu_lengths", "index")  # these integers may come in anything that holds them
OF_ANY_SIZE = (*LISTED, "target", "query_group", "key_group")  # and these in any dtype that holds them
SHORT = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32)


class InOtherForms:
    """A function that is called with its arguments in other forms, which ``choose`` picks; ``given`` tells which."""

    def __init__(self, function: Callable[..., Any], choose: Choose) -> None:
        functools.update_wrapper(self, function)
        self.function, self.choose, self.given = function, choose, ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        signature = inspect.signature(self.function)
        arguments = signature.bind(*args, **kwargs).arguments
        if "index" in signature.parameters and arguments.get("cu_lengths") is not None:
            arguments = self.choose((arguments, by_query(arguments, self.choose)))
        formed = {name: self.choose(forms_of(name, value)) for name, value in arguments.items()}
        told = [f"{name}={value!r}" for name, value in formed.items() if value is not arguments[name]]
        self.given = ", ".join(told)
        return self.function(**formed)


def by_query(arguments: dict[str, Any], choose: Choose) -> dict[str, Any]:
    """Return the lists of ``cu_lengths`` as mixed items with the numbers of their queries, if none is empty."""
    lengths = arguments["cu_lengths"].diff()
    if not len(lengths) or not bool((lengths > 0).all()):
        return arguments
    generator = torch.Generator().manual_seed(choose(range(1 << 16)))
    queries = torch.randint(1, 9, lengths.shape, generator=generator).cumsum(0).repeat_interleave(lengths)
    mixed = queries[torch.randperm(len(queries), generator=generator)]
    places = mixed.sort(stable=True).indices  # an item's place; the items of a query keep their order

    def moved(t: Tensor) -> Tensor:
        return torch.empty_like(t).index_copy(0, places, t)

    items = {name: moved(t) for name in ("scores", "labels", "mask") if (t := arguments.get(name)) is not None}
    others = {name: value for name, value in arguments.items() if name != "cu_lengths"}
    return {**others, **items, "index": mixed}


def forms_of(name: str, value: Any) -> list[Any]:
    """Return the argument as it is, and in other forms that mean the same."""
    if isinstance(value, Tensor):
        if value.dtype not in (torch.int32, torch.int64) or name == "labels":
            return [value]
        other = value.to(torch.int32 if value.dtype == torch.int64 else torch.int64)
        fits = value.numel() == 0 or bool((value.abs() < 2**31).all())
        forms = [value, *[other] * fits]
        if name in OF_ANY_SIZE:
            forms += [t for dtype in SHORT if torch.equal((t := value.to(dtype)).long(), value.long())]
        return [*forms, *(t.numpy() for t in forms), value.tolist()] if name in LISTED else forms
    if isinstance(value, bool):
        return [value, np.bool_(value), torch.tensor(value)]
    if isinstance(value, int):
        return [value, np.int64(value), np.int32(value), torch.tensor(value), torch.tensor(value, dtype=torch.int32)]
    if isinstance(value, float):
        forms = [value, np.float64(value), torch.tensor(value, dtype=torch.float64)]
        rounded = np.float32(value)
        return [*forms, rounded, torch.tensor(value)] if float(rounded) == value else forms
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, (int, float)) for v in value):
        return [value, [*value], tuple(value), np.array(value), torch.tensor(value), [np.array(v)[()] for v in value]]
    return [value]
