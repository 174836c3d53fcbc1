"""Sharding rules, kept until DTensor is there: it takes long to import, and most programs do without."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from custom_ops.library._torch import OpOverload

_waiting: dict[OpOverload, Callable[..., Any]] = {}
_lock = threading.RLock()


def register_later(op: OpOverload, rule: Callable[..., Any]) -> None:
    """Register ``rule`` when an op of the bridge next runs with DTensor imported."""
    _waiting[op] = rule


def register_waiting() -> None:
    """Register what is waiting, if someone has imported DTensor.

    Each op calls this from its Autograd kernel and from its fake kernel or body. DTensor runs the latter to learn
    the shapes of a result before it looks for a rule, so that a call below autograd is prepared for as well.
    """
    if _waiting and hasattr(torch.distributed, "tensor"):  # which it has once the import is over, in any thread
        with _lock:  # no other thread goes on before its op has a rule
            from torch.distributed.tensor.experimental import register_sharding

            for op, rule in list(_waiting.items()):
                register_sharding(op)(rule)
                del _waiting[op]
