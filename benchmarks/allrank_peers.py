"""allRank's losses as peers (``pip install --no-deps allrank==1.4.3``)."""

from __future__ import annotations

import sys
import types

from torch import Tensor

# The losses take one constant from a module that needs torchvision and scikit-learn.
_loading = types.ModuleType("allrank.data.dataset_loading")
_loading.PADDED_Y_VALUE = -1  # type: ignore[attr-defined]
sys.modules.setdefault(_loading.__name__, _loading)

from allrank.models import losses  # noqa: E402


def _lambda_loss(scheme: str, scores: Tensor, labels: Tensor) -> Tensor:
    return losses.lambdaLoss(scores, labels.to(scores.dtype), weighing_scheme=scheme) / len(scores)


def lambdarank(scores: Tensor, labels: Tensor) -> Tensor:
    return _lambda_loss("lambdaRank_scheme", scores, labels)


def ndcg2pp(scores: Tensor, labels: Tensor) -> Tensor:
    return _lambda_loss("ndcgLoss2PP_scheme", scores, labels)
