"""Geometry that a layer keeps between calls: one mechanism for all layers of this family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active  # see library.py
from torch.nn import Parameter
from torch.utils._pytree import tree_map

Csr = tuple[Tensor, Tensor]


class Geometry(NamedTuple):
    """The ranks of points, the points sorted by them, and the tensors that all this was computed from."""

    sources: tuple[Tensor, ...]
    rank: Tensor
    csr: Csr

    def is_of(self, sources: tuple[Tensor, ...]) -> bool:
        pairs = zip(self.sources, sources)
        return all(a.device == b.device and a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


class KeepsGeometry(torch.nn.Module):
    """A layer that computes its geometry once and uses it again while its sources have the same values.

    It is neither in the ``state_dict`` nor a buffer: DistributedDataParallel would replace every process's
    buffers by those of the first, whose geometry is another. Where values can't be compared, in a program
    being compiled or exported, under torch.func and on the meta device, it is computed on each call.
    """

    def __init__(self) -> None:
        super().__init__()
        self._geometry: Geometry | None = None

    def clear_geometry(self) -> None:
        """Release what is kept."""
        self._geometry = None

    def _compute(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Csr]:
        """The ranks that follow from the sources, and their `voxel_csr`."""
        raise NotImplementedError

    def _kept(self, expected: str) -> Geometry:
        kept = self._geometry  # once: another thread may clear it
        if kept is None:
            raise ValueError(f"{expected}, here or by set_geometry before, got None")
        return kept

    def _keep(self, *sources: Tensor) -> Geometry:
        # What is made under inference_mode couldn't be saved for a backward pass later.
        with torch.inference_mode(False):
            copies = tuple(t.detach().clone() for t in sources)
            self._geometry = geometry = Geometry(copies, *self._compute(*copies))
        return geometry

    def _geometry_of(self, *sources: Tensor) -> Geometry:
        if not _have_values(sources):
            return Geometry(sources, *self._compute(*sources))
        kept = self._geometry
        return kept if kept is not None and kept.is_of(sources) else self._keep(*sources)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self._geometry is not None:  # moved as a buffer is, but never converted
            self._geometry = tree_map(lambda t: t.to(fn(t).device), self._geometry)
        return self


def _have_values(tensors: tuple[Tensor, ...]) -> bool:
    if torch.compiler.is_compiling() or _are_functorch_transforms_active():
        return False
    return all(type(t) in (Tensor, Parameter) and not t.is_meta for t in tensors)
