"""Sharding rules, kept until DTensor is imported: its import takes long, and most programs don't need it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from custom_ops.library._torch import OpOverload

_waiting: dict[OpOverload, Callable[..., Any]] = {}
_lock = threading.RLock()


def register_later(op: OpOverload, rule: Callable[..., Any]) -> None:
    """Register ``rule`` as soon as an op of the bridge runs with DTensor imported."""
    _waiting[op] = rule


def forget(op: OpOverload) -> None:
    """Forget the rule of an op that has ended."""
    _waiting.pop(op, None)


def register_waiting() -> None:
    """Register the waiting rules if DTensor has been imported.

    Each op calls this from its Autograd kernel and from its fake kernel or body. DTensor runs the latter to learn the
    shapes of a result before it looks for a rule, so a call below autograd finds its rule too.
    """
    # The attribute exists once the import has finished, in any thread.
    if _waiting and hasattr(torch.distributed, "tensor"):
        with _lock:  # another thread waits until its op has a rule
            from torch.distributed.tensor.experimental import register_sharding

            for op, rule in list(_waiting.items()):
                register_sharding(op)(rule)
                del _waiting[op]
