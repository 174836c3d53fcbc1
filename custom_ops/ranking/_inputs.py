"""The inputs of list losses in the form that the kernels read: lengths as a mask, labels in the scores' dtype.

The kernels of a list loss read labels as float32, or as float64 with float64 scores. These hold small integers exactly,
but don't even keep the order of large ones: the time stamps 1700000001 and 1700000000 are one number in float32. The
labels of a list that the dtype doesn't hold exactly are therefore replaced, depending on how the loss uses labels
(``use``):

- ORDER, the loss only compares labels: by minus the number of higher labels in the list
- DIFFERENCE, it takes differences: by the difference from the highest label
- EXPONENTIAL, it takes gains 2^y - 1 relative to the highest: by that difference plus the highest label, or plus
  2048 if that is less, beside which neither the 1 nor labels near 0 count
- VALUE: by the labels themselves

The result is rounded, and then lowered by the few steps of the dtype that keep different labels different and in order.
A list that the dtype holds exactly is read as it is, and isn't sorted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops import library
from custom_ops._enums import LabelUse
from custom_ops._native import define


@define
def list_valid(lengths: Tensor, n: int) -> Tensor:
    """Return whether each item is among the first ``lengths`` [...] of its list [..., n]; ``lengths`` are checked."""
    return lengths.new_empty((*lengths.shape, n), dtype=torch.bool)


@define
def list_labels(labels: Tensor, valid: Tensor | None, offsets: Tensor | None, wide: bool, use: int) -> Tensor:
    """Return int64 or float64 labels [..., T] in float64 if ``wide``, else in float32, in their exact order."""
    return labels.new_empty(labels.shape, dtype=torch.float64 if wide else torch.float32)


@library.vmap(list_valid)
def _(info: Any, in_dims: Any, lengths: Tensor, n: int) -> Any:
    return list_valid(library.to_front(lengths, in_dims[0], info.batch_size), n), 0


@library.sharding(list_valid)
def _(lengths: Any, n: int) -> Any:
    from torch.distributed.tensor import Replicate, Shard

    return [([p], [p, None]) for p in (Replicate(), *map(Shard, range(lengths.ndim)))]


def in_order(labels: Tensor) -> Tensor:
    """Return int64 or float64 labels of the same order; those of uint64 are all less by 2^63."""
    if labels.dtype == torch.uint64:
        return labels.view(torch.int64) ^ -(2**63)
    return labels if labels.dtype == torch.int64 else labels.double()


def in_dtype(labels: Tensor, dtype: torch.dtype, valid: Tensor | None, offsets: Tensor | None, use: int) -> Tensor:
    """Return the labels in float32 or float64, with integers of any size and doubles in their exact order."""
    if labels.dtype in (torch.int32, torch.uint32):
        labels = labels.to(torch.int64)
    elif labels.dtype == torch.uint64 and use in (LabelUse.ORDER, LabelUse.DIFFERENCE):
        labels = in_order(labels)
    if labels.dtype == dtype:
        return labels
    if labels.dtype not in (torch.int64, torch.float64):
        return labels.to(dtype)
    ordered: Tensor = list_labels(labels, valid, offsets, dtype == torch.float64, use)
    return ordered
