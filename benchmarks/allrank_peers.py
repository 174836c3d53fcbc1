"""allRank's losses as peers (``pip install --no-deps allrank==1.4.3``)."""

from __future__ import annotations

import sys
import types

import torch
from torch import Tensor

# allRank's loss modules import one name each from modules that need torchvision, scikit-learn and gcsfs. Stubs stand in
# for those modules.
for _name, _member in (
    ("allrank.data.dataset_loading", {"PADDED_Y_VALUE": -1}),
    ("allrank.models.model_utils", {"get_torch_device": lambda: torch.device("cpu")}),
):
    _module = types.ModuleType(_name)
    vars(_module).update(_member)
    sys.modules.setdefault(_name, _module)

from allrank.models import losses  # noqa: E402


def _lambda_loss(scheme: str, scores: Tensor, labels: Tensor) -> Tensor:
    return losses.lambdaLoss(scores, labels.to(scores.dtype), weighing_scheme=scheme) / len(scores)


def lambdarank(scores: Tensor, labels: Tensor) -> Tensor:
    return _lambda_loss("lambdaRank_scheme", scores, labels)


def ndcg2pp(scores: Tensor, labels: Tensor) -> Tensor:
    return _lambda_loss("ndcgLoss2PP_scheme", scores, labels)


def rank_net(scores: Tensor, labels: Tensor) -> Tensor:
    """Return allRank's RankNet loss: a mean over the pairs of all lists, where ours sums the pairs of each list."""
    loss: Tensor = losses.rankNet(scores, labels.to(scores.dtype))
    return loss


def approx_ndcg(scores: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = losses.approxNDCGLoss(scores, labels.to(scores.dtype))
    return loss


def neural_ndcg(scores: Tensor, labels: Tensor) -> Tensor:
    """Return allRank's NeuralNDCG, which scales the columns of the permutation matrix; ours doesn't."""
    loss: Tensor = 1 + losses.neuralNDCG(scores, labels.to(scores.dtype))
    return loss


def list_mle(scores: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = losses.listMLE(scores, labels.to(scores.dtype))
    return loss


def list_net(scores: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = losses.listNet(scores, labels.to(scores.dtype))
    return loss


compiled_approx_ndcg, compiled_list_mle = torch.compile(approx_ndcg), torch.compile(list_mle)
