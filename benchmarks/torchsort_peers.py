"""torchsort's soft ranks and sorting, which take matrices only."""

from __future__ import annotations

import torchsort  # type: ignore[import-not-found]
from torch import Tensor


def soft_rank_l2(values: Tensor) -> Tensor:
    return torchsort.soft_rank(values, regularization="l2")


def soft_rank_kl(values: Tensor) -> Tensor:
    return torchsort.soft_rank(values, regularization="kl")


def soft_sort_l2(values: Tensor) -> Tensor:
    return torchsort.soft_sort(values, regularization="l2")


def soft_sort_kl(values: Tensor) -> Tensor:
    return torchsort.soft_sort(values, regularization="kl")
