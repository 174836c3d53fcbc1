"""The bandwidth floor: moving the bytes that an op must move, and computing nothing.

In each pass so many bytes are copied as are both read and written, and the rest is summed or filled: an
op that mostly reads is not excused by the price of fresh pages, which only writing pays. The floor is
timed in turns with the contenders, at the same size and on the same kind of memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.answers import first

HUGE_PAGE = 2 << 20
MADV_HUGEPAGE = 14

Pass = tuple[int, int]  # bytes read and written


class Floor:
    """A call does each of ``passes`` with float32 elements; what is written is fresh, as an op's outputs are."""

    def __init__(self, passes: Sequence[Pass], device: torch.device) -> None:
        self.bytes = sum(map(sum, passes))
        source = torch.zeros(max(read for read, _ in passes) // 4, device=device)
        self.moves = []
        for read, written in passes:
            copied = min(read, written) // 4
            self.moves.append((written // 4, source[:copied], source[copied : read // 4]))

    def __call__(self, _: Any = None) -> list[Any]:
        return [self._move(*move) for move in self.moves]

    def _move(self, written: int, copied: Tensor, summed: Tensor) -> Any:
        target = _fresh(written, copied.device)
        if written == len(copied):
            target.copy_(copied)
        else:
            target[: len(copied)].copy_(copied)
            target[len(copied) :].zero_()
        return target, summed.sum() if len(summed) else None


def least_traffic(args: tuple[Any, ...], outputs: Any, inputs: list[Tensor]) -> tuple[Pass, Pass]:
    """Of forward and backward, where each argument, result and gradient is met once."""
    forward = (_bytes(tree_leaves(args)), _bytes(tree_leaves(outputs)))
    backward = (_bytes([first(outputs)]), _bytes(inputs)) if inputs else (0, 0)
    return forward, backward


def _bytes(values: Iterable[Any]) -> int:
    """Of the memory behind them: an expanded tensor is as large as what it was expanded from."""
    tensors = [t for t in values if isinstance(t, Tensor)]
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)


def _fresh(elements: int, device: torch.device) -> Tensor:
    """As our kernels allocate: large outputs ask for huge pages."""
    out = torch.empty(elements, device=device)
    if device.type == "cpu" and 4 * elements >= HUGE_PAGE:
        begin = out.data_ptr() // HUGE_PAGE * HUGE_PAGE
        end = -(-(out.data_ptr() + 4 * elements) // HUGE_PAGE) * HUGE_PAGE
        _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_HUGEPAGE)
    return out


_libc = ctypes.CDLL(None)
