"""The bandwidth floor: the time to move the bytes that an op must move, without computing anything.

Each pass copies as many bytes as are both read and written, and sums or fills the rest. An op that mostly reads is
therefore not compared with the cost of fresh pages, which only writes pay. The floor takes turns with the contenders,
at the same size and on the same kind of memory.
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
    """A call that makes each of ``passes`` over float32 elements, with fresh outputs like those of an op."""

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
    """Return the traffic of forward and backward if each argument, result and gradient is moved once."""
    forward = (_bytes(tree_leaves(args)), _bytes(tree_leaves(outputs)))
    backward = (_bytes([first(outputs)]), _bytes(inputs)) if inputs else (0, 0)
    return forward, backward


def _bytes(values: Iterable[Any]) -> int:
    """Return the bytes of the memory that holds the values: an expanded tensor is as small as its source."""
    tensors = [t for t in values if isinstance(t, Tensor)]
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)


def _fresh(elements: int, device: torch.device) -> Tensor:
    """Allocate as our kernels do: large outputs ask for huge pages."""
    out = torch.empty(elements, device=device)
    if device.type == "cpu" and 4 * elements >= HUGE_PAGE:
        begin = out.data_ptr() // HUGE_PAGE * HUGE_PAGE
        end = -(-(out.data_ptr() + 4 * elements) // HUGE_PAGE) * HUGE_PAGE
        _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_HUGEPAGE)
    return out


_libc = ctypes.CDLL(None)
