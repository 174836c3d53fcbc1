"""Losses for the trainers of Sentence Transformers, tested with version 6.2."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn

from custom_ops.ranking.lambdas import lambda_loss
from custom_ops.ranking.listwise import cosent_loss


class ListwiseLoss(nn.Module):
    """Train a ``CrossEncoder`` with a list loss on queries that have any number of documents.

    The scores of a batch are one jagged tensor, without padding, and beside them the loss needs O(n) memory.

    Args:
        model: a ``CrossEncoder`` with one output.
        loss: a list loss such as ``custom_ops.softmax_loss``.
        activation_fn: a function of the scores; None for the scores as they are.
        mini_batch_size: the number of pairs of query and document in a forward pass of the model; None for all at once.
        options: the loss's own options.

    It takes the same batches as Sentence Transformers' ``LambdaLoss``: queries, a list of documents for each, and a
    tensor of labels for each.
    """

    def __init__(
        self,
        model: CrossEncoder,
        loss: Callable[..., Tensor],
        activation_fn: Callable[[Tensor], Tensor] | None = None,
        mini_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if model.num_labels != 1:
            raise ValueError(f"model: expected one output label, got {model.num_labels}")
        self.model, self.loss, self.options = model, loss, options
        self.activation_fn, self.mini_batch_size = activation_fn, mini_batch_size

    def scores(self, inputs: list[Any], labels: list[Tensor], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return the scores [n] and labels [n] of all documents of the batch, and the bounds of its queries."""
        queries, documents = inputs
        lengths = [len(own) for own in documents]
        if lengths != [len(own) for own in labels]:
            raise ValueError(f"labels: expected {lengths} for the queries, got {[len(own) for own in labels]}")
        pairs = [(query, document) for query, own in zip(queries, documents) for document in own]
        step = self.mini_batch_size or max(len(pairs), 1)
        parts = []
        for begin in range(0, len(pairs), step):
            tokens = batch_to_device(self.model.preprocess(pairs[begin : begin + step], **options), self.model.device)
            parts.append(self.model(tokens)["scores"].view(-1))
        scores = torch.cat(parts).float()
        if self.activation_fn is not None:
            scores = self.activation_fn(scores)
        bounds = torch.tensor([0, *lengths], device=scores.device).cumsum(0)
        return scores, torch.cat(list(labels)).to(scores.device), bounds

    def forward(self, inputs: list[Any], labels: list[Tensor], prompt: Any = None, task: Any = None) -> Tensor:
        scores, y, bounds = self.scores(inputs, labels, prompt=prompt, task=task)
        return self.loss(scores, y, cu_lengths=bounds, **self.options)

    def get_config_dict(self) -> dict[str, Any]:
        """Return what the model card lists."""
        return {"loss": getattr(self.loss, "__name__", repr(self.loss)), **self.options}


class LambdaLoss(ListwiseLoss):
    """`custom_ops.lambda_loss` with the defaults and the value of Sentence Transformers' ``LambdaLoss``.

    The value is the mean over all pairs of the batch. The other arguments are those of `ListwiseLoss`; ``options`` are
    further ones of `custom_ops.lambda_loss`.
    """

    def __init__(
        self,
        model: CrossEncoder,
        weighting: str = "ndcg2pp",
        k: int | None = None,
        sigma: float = 1.0,
        reduction_log: str = "binary",
        **options: Any,
    ) -> None:
        base = {"binary": 2.0, "natural": math.e}[reduction_log]
        super().__init__(model, lambda_loss, weighting=weighting, k=k, sigma=sigma, log_base=base, **options)

    def forward(self, inputs: list[Any], labels: list[Tensor], prompt: Any = None, task: Any = None) -> Tensor:
        scores, y, bounds = self.scores(inputs, labels, prompt=prompt, task=task)
        # Each list's mean over its pairs, weighted by their number.
        own: dict[str, Any] = {"cu_lengths": bounds, "reduction": "none", **self.options}
        means = lambda_loss(scores, y, normalize="pairs", **own)
        pairs = _pairs(scores.detach(), y, bounds, self.options["k"], self.options["weighting"] == "ndcg1")
        return (means * pairs).sum() / pairs.sum().clamp(min=1)


def _pairs(scores: Tensor, labels: Tensor, bounds: Tensor, k: int | None, every: bool) -> Tensor:
    """Return the number of pairs of each list with one item in the top k: all pairs less those of the other items."""
    lengths = bounds.diff()
    query = torch.repeat_interleave(torch.arange(len(lengths), device=bounds.device), lengths)
    order = torch.argsort(scores, descending=True, stable=True)
    order = order[torch.argsort(query[order], stable=True)]
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device)) - bounds[query]

    def among(some: Tensor) -> Tensor:
        n = torch.bincount(query[some], minlength=len(lengths))
        if every:  # both orders of each pair, and each item with itself
            return n * n
        levels = torch.stack([query[some].double(), labels[some].double()], -1)
        own, tied = torch.unique(levels, dim=0, return_counts=True)
        same = torch.zeros_like(n).scatter_add_(0, own[:, 0].long(), tied * tied)
        return (n * n - same) // 2

    everything = among(torch.ones_like(rank, dtype=torch.bool))
    return (everything if k is None else everything - among(rank >= k)).to(scores.dtype)


class CoSENTLoss(losses.CoSENTLoss):
    """`custom_ops.cosent_loss` with the arguments of Sentence Transformers' ``CoSENTLoss``, for any batch size."""

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        return cosent_loss(self.similarity_fct(*embeddings[:2]), labels.view(-1), scale=self.scale)
