"""A check that runs before any other import, so that a missing or old torch gives one clear error."""

from __future__ import annotations

import re

_REMEDY = '`pip install "torch>=2.10"`'

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError(f"custom_ops: torch >= 2.10 is needed, and torch isn't installed: {_REMEDY}") from None

if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < (2, 10):
    raise ImportError(f"custom_ops: torch >= 2.10 is needed, and {torch.__version__} is installed: {_REMEDY}")
