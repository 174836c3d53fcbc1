"""Geometry that a layer keeps between calls, by one mechanism for all voxel layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor

from custom_ops._leaf import have_values
from custom_ops.library._torch import tree_map

Csr = tuple[Tensor, Tensor]


class Geometry(NamedTuple):
    """The ranks of points, the points sorted by rank, and the tensors that both were computed from."""

    sources: tuple[Tensor, ...]
    rank: Tensor
    csr: Csr

    def is_of(self, sources: tuple[Tensor, ...]) -> bool:
        pairs = zip(self.sources, sources)
        return all(a.device == b.device and a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


class KeepsGeometry(torch.nn.Module):
    """A layer that computes its geometry once and reuses it while its sources have the same values.

    A geometry that was set serves the calls without sources, and no call changes it. A geometry that a call computed is
    a cache, which only calls with the same sources use. Neither is part of the ``state_dict`` or a buffer:
    DistributedDataParallel would overwrite every process's buffers with those of the first, whose geometry differs.
    Where values can't be compared (in a program being traced, compiled or exported, under torch.func and on the meta
    device), each call computes the geometry. The attributes that determine the geometry, ``_fixed``, can't be set
    again.
    """

    _fixed: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self._was_set: Geometry | None = None
        self._cached: Geometry | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._fixed and name in self.__dict__:
            raise AttributeError(
                f"{name}: can't be set again, because the kept geometry follows from it; make another layer"
            )
        super().__setattr__(name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.fx.Proxy):  # the layer, with its geometry, stays one node of torch.fx
                tracer: Any = value.tracer
                return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
        return super().__call__(*args, **kwargs)

    def clear_geometry(self) -> None:
        """Release the cached geometry and the one that was set."""
        self._was_set = self._cached = None

    def _compute(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Csr]:
        """Return the ranks that follow from the sources, and their `voxel_csr`."""
        raise NotImplementedError

    def _get(self, expected: str) -> Geometry:
        was_set = self._was_set  # read once, as another thread may clear it
        if was_set is None:
            raise ValueError(f"{expected}, here or by set_geometry before, got None")
        return was_set

    def _set(self, *sources: Tensor) -> None:
        self._was_set, self._cached = self._made_of(sources), None

    def _made_of(self, sources: tuple[Tensor, ...]) -> Geometry:
        # A tensor made under inference_mode couldn't be saved for a later backward pass.
        with torch.inference_mode(False):
            copies = tuple(t.detach().clone() for t in sources)
            return Geometry(copies, *self._compute(*copies))

    def _geometry_of(self, *sources: Tensor) -> Geometry:
        if not have_values(*sources):
            return Geometry(sources, *self._compute(*sources))
        for kept in (self._was_set, self._cached):
            if kept is not None and kept.is_of(sources):
                return kept
        self._cached = made = self._made_of(sources)
        return made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)

        def moved(geometry: Geometry | None) -> Geometry | None:
            """Move the geometry like a buffer, but never convert it; drop it if it comes from the meta device without
            values.
            """
            device = None if geometry is None else fn(geometry.rank).device
            if geometry is None or (geometry.rank.is_meta and device != geometry.rank.device):
                return None
            return tree_map(lambda t: t.to(device), geometry)

        self._was_set, self._cached = moved(self._was_set), moved(self._cached)
        return self
