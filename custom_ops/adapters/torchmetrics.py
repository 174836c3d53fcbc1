"""Ranking metrics as TorchMetrics' ``Metric`` objects, tested with TorchMetrics 1.9."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from custom_ops import _checks


class RankingMetric(Metric):
    """The mean of a metric over all lists of all batches and processes.

    A list is a row of ``preds [..., n]``. If the items of a query are spread over batches, ``indexes`` have the query
    of each item, as in TorchMetrics' retrieval metrics; then all items are kept until ``compute``, and otherwise only
    the sum and the number of lists.

    Args:
        metric: a metric such as ``custom_ops.ndcg``.
        options: its own options, such as ``k=(1, 5, 10)`` or ``empty=0.0``.

    Example:
        >>> import torch, custom_ops
        >>> from custom_ops.adapters.torchmetrics import RankingMetric
        >>> metric = RankingMetric(custom_ops.ndcg, k=(1, 2))
        >>> metric.update(torch.tensor([[0.9, 0.3], [0.1, 0.2]]), torch.tensor([[1, 0], [2, 0]]))
        >>> metric.update(torch.tensor([[0.5, 0.6]]), torch.tensor([[0, 0]]))  # a list without a relevant item
        >>> metric.compute()
        tensor([0.5000, 0.8155])
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    total: Tensor
    lists: Tensor
    preds: list[Tensor]
    target: list[Tensor]
    indexes: list[Tensor]

    def __init__(self, metric: Callable[..., Tensor], **options: Any) -> None:
        known = ("compute_on_cpu", "dist_sync_on_step", "process_group", "dist_sync_fn", "distributed_available_fn")
        own = {name: options.pop(name) for name in (*known, "sync_on_compute", "compute_with_cache") if name in options}
        super().__init__(**own)
        self.metric, self.options = metric, options
        several = _checks.listed(options.get("k"))
        shape = () if several is None else (len(several),)
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("lists", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("preds", "target", "indexes"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(
        self,
        preds: Tensor,
        target: Tensor,
        indexes: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_lengths: Tensor | None = None,
    ) -> None:
        """Add lists, padded or jagged; with ``indexes`` these are neither."""
        where = {"mask": mask, "lengths": lengths, "cu_lengths": cu_lengths}
        if indexes is not None:
            if given := [name for name, value in where.items() if value is not None]:
                raise ValueError(f"indexes: expected no {', '.join(given)} beside it")
            for state, x in ((self.preds, preds), (self.target, target), (self.indexes, indexes)):
                state.append(x.detach().flatten())
            return
        undefined = self.options.get("empty") is None
        options = self.options | ({"empty": -1.0} if undefined else {})  # metrics aren't negative
        values = self.metric(preds, target, **where, **options, reduction="none").double()
        values = values.reshape(-1, *self.total.shape)
        first = values[:, 0] if values.dim() == 2 else values
        counted = first != -1 if undefined else torch.ones_like(first, dtype=torch.bool)
        self.total += values[counted].sum(0)
        self.lists += counted.sum()

    def compute(self) -> Tensor:
        """Return the mean over the lists, or 0 if there is none; with several k one for each."""
        if len(self.preds) == 0:
            return (self.total / self.lists.clamp(min=1)).float()
        if self.lists > 0:
            raise ValueError("indexes: expected in all updates or in none")
        preds, target, indexes = (dim_zero_cat(x) for x in (self.preds, self.target, self.indexes))
        return self.metric(preds, target, index=indexes, **self.options)
