"""What list losses are given, in the form that their kernels read: lengths as a mask, labels in the scores' dtype.

The kernels of a list loss read labels as float32, or float64 with float64 scores. That holds small integers, and of
others not even the order: 1700000001 and 1700000000, two time stamps, are one number in float32. So the labels of a
list that it doesn't hold exactly are replaced by others, by what the loss makes of labels (``use``):

- ORDER, only compares them: by how many of the list's labels are higher, negated
- DIFFERENCE, takes differences: by the difference from the highest one
- EXPONENTIAL, gains of 2^y - 1 over the highest: by that difference plus the highest label, or 2048 if that is less,
  beside which neither the 1 nor labels near 0 count
- VALUE: by the labels themselves

in each case rounded, and then moved down by the few steps of the dtype that keep different labels different and in
their order. A list that is held exactly is read as it is, and no sort is made for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops import library
from custom_ops._native import define


@define
def list_valid(lengths: Tensor, n: int) -> Tensor:
    """Of lists of n items [..., n] whether each is among the first ``lengths`` [...], which are checked."""
    return lengths.new_empty((*lengths.shape, n), dtype=torch.bool)


@define
def list_labels(labels: Tensor, valid: Tensor | None, offsets: Tensor | None, wide: bool, use: int) -> Tensor:
    """int64 or float64 labels [..., T] in float64 if ``wide``, else in float32, in their exact order."""
    return labels.new_empty(labels.shape, dtype=torch.float64 if wide else torch.float32)


@library.vmap(list_valid)
def _(info: Any, in_dims: Any, lengths: Tensor, n: int) -> Any:
    return list_valid(library.to_front(lengths, in_dims[0], info.batch_size), n), 0


@library.sharding(list_valid)
def _(lengths: Any, n: int) -> Any:
    from torch.distributed.tensor import Replicate, Shard

    return [([p], [p, None]) for p in (Replicate(), *map(Shard, range(lengths.ndim)))]


def in_dtype(labels: Tensor, dtype: torch.dtype, valid: Tensor | None, offsets: Tensor | None, use: int) -> Tensor:
    """The labels in float32 or float64; integers of any size and doubles in their exact order."""
    if labels.dtype in (torch.int32, torch.uint32):
        labels = labels.to(torch.int64)
    elif labels.dtype == torch.uint64:
        labels = labels.to(torch.float64)
    if labels.dtype == dtype or labels.dtype not in (torch.int64, torch.float64):
        return labels.to(dtype)
    ordered: Tensor = list_labels(labels, valid, offsets, dtype == torch.float64, use)
    return ordered
