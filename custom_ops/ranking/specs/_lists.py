"""The specs of `custom_ops.ranking._lists`: references, samples and wrong calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from custom_ops.ranking._arguments import reduce_by_torch, with_empty
from custom_ops.registry import BadCall, Sample


def rounded_off(a: Tensor, b: Tensor) -> Tensor:
    """Return the rounding error of a - b."""
    difference = a - b
    subtracted = a - difference
    return torch.where(difference.isfinite(), (a - (difference + subtracted)) + (subtracted - b), 0)


def reference_of(
    one_list: Callable[..., tuple[Tensor, bool | Tensor]], weightless_labels: bool = True
) -> Callable[..., Tensor]:
    """Return a reference made of ``one_list(s [n], y [n], **own) -> (loss, whether it contributes)`` in plain PyTorch.

    Weights of the items are one of its ``own`` arguments, ``w [n]``. Invalid items are dropped first. The loss of a
    list that doesn't contribute is replaced by 0, and that of a list with a NaN label by NaN. Labels
    of items of weight 0 count only if ``weightless_labels``. A NaN loss has NaN derivatives. ``one_list`` is vmapped
    over whole lists.
    """

    def loss_of(s: Tensor, y: Tensor, *w: Tensor, **own: Any) -> tuple[Tensor, Tensor]:
        undefined = (y.isnan() if weightless_labels or not w else y.isnan() & (w[0] != 0)).any()
        loss, contributes = one_list(s, y.nan_to_num(), **(own | dict(zip("w", w))))
        contributes = torch.as_tensor(contributes, device=s.device)
        undefined = undefined | (contributes & loss.isnan())
        loss = torch.where(contributes & ~undefined, loss, torch.where(undefined, s, 0).sum())
        return loss * torch.where(undefined, torch.nan, 1).to(loss.dtype), contributes | undefined

    def reference(
        scores: Tensor,
        labels: Tensor,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_lengths: Tensor | None = None,
        weights: Tensor | None = None,
        item_weights: Tensor | None = None,
        reduction: str = "mean",
        empty: float | None = None,
        **own: Any,
    ) -> Tensor:
        *batch, n = scores.shape
        given = [scores, labels.to(scores.dtype)]
        if item_weights is not None:
            given.append(item_weights.to(scores.dtype))
        bounds = [0, n] if cu_lengths is None else cu_lengths.tolist()
        if lengths is not None:
            begun = torch.arange(n, device=scores.device) < lengths.unsqueeze(-1)
            mask = begun if mask is None else mask & begun
        losses, actives = [], []
        for start, stop in pairwise(bounds):
            items = [t[..., start:stop].reshape(math.prod(batch), stop - start) for t in given]
            s = items[0]
            if s.numel() == 0:
                loss, active = s.sum(-1), torch.zeros(len(s), dtype=torch.bool, device=s.device)
            elif mask is None:
                loss, active = torch.vmap(partial(loss_of, **own))(*items)
            else:
                kept = mask[..., start:stop].reshape(s.shape)
                rows = [[t[k] for t in row] for *row, k in zip(*items, kept)]
                none = s[:0].sum(), torch.tensor(False, device=s.device)
                loss, active = map(torch.stack, zip(*(loss_of(*row, **own) if len(row[0]) else none for row in rows)))
            losses.append(loss)
            actives.append(active)
        connected = scores[..., :0].sum()
        shape = batch if cu_lengths is None else (*batch, len(bounds) - 1)
        loss = torch.stack(losses, -1).reshape(shape) + connected if losses else connected.expand(shape)
        active = torch.stack(actives, -1).reshape(shape) if actives else torch.zeros(shape, dtype=torch.bool)
        return reduce_by_torch(*with_empty(loss, active, empty), weights, reduction)

    return reference


def list_samples(device: torch.device, dtype: torch.dtype, grow_items: bool = False, **own: Any) -> list[Sample]:
    """Return small calls that cover the arguments of all list losses, with distinct scores and some tied labels.

    The battery enlarges the first call by longer lists if ``grow_items``, else by more lists, since a reference with
    O(n^2) memory can't handle long ones.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> tuple[Tensor, Tensor]:
        scores = torch.randn(shape, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, 3, shape, generator=generator)
        return scores.to(device, dtype).requires_grad_(), labels.to(device, dtype)

    def tensor(*values: Any, **options: Any) -> Tensor:
        return torch.tensor(values, device=device, **options)

    mask = tensor([True, False, True, True], [True, True, True, True])
    item_weights = tensor([0.5, 1.0, 2.0, 1.5], [1.0, 3.0, 0.0, 0.25], dtype=dtype)
    return [
        Sample(draw(2, 5), own, dynamic=dict.fromkeys((0, 1), int(grow_items))),
        Sample(draw(2, 4), {**own, "mask": mask, "item_weights": item_weights, "reduction": "none"}),
        Sample(draw(3, 4), {**own, "lengths": tensor(4, 1, 3), "reduction": "sum", "empty": 0.5}),
        Sample(draw(6), {**own, "cu_lengths": tensor(0, 3, 3, 6), "weights": tensor(1.0, 2.0, 0.5, dtype=dtype)}),
        Sample(draw(2, 0), own),
    ]


def list_bad_calls() -> list[BadCall]:
    """Return wrong calls for the arguments that all list losses share."""
    x, y, two = torch.ones(2, 3), torch.ones(2, 3), torch.tensor([1, 2])
    return [
        BadCall((None, y), "scores: expected a tensor, got NoneType"),
        BadCall((x.int(), y), "scores: expected one of float16"),
        BadCall((x[0, 0], y), r"scores: expected \[..., n\]"),
        BadCall((x, None), "labels: expected a tensor, got NoneType"),
        BadCall((x, y.to(torch.complex64)), "labels: expected real numbers, got complex64"),
        BadCall((x, y.clone().requires_grad_()), "labels: expected a tensor without gradient"),
        BadCall((x, y[0]), r"labels: expected shape \[2, 3\], got \[3\]"),
        BadCall((x, y.to("meta")), "labels: expected on cpu as scores, got meta"),
        BadCall((x, y), "mask: expected one of bool, got float32", {"mask": y}),
        BadCall((x, y), r"mask: expected shape \[2, 3\], got \[3\]", {"mask": y[0] > 0}),
        BadCall((x, y), "lengths: expected integers, got float32", {"lengths": y[:, 0]}),
        BadCall((x, y), r"lengths: expected shape \[2\], got \[1\]", {"lengths": two[:1]}),
        BadCall((x, y), "lengths, cu_lengths: expected at most one", {"lengths": two, "cu_lengths": two}),
        BadCall((x, y), r"cu_lengths: expected \[L \+ 1\]", {"cu_lengths": two[None]}),
        BadCall((x, y), "cu_lengths: expected at least one element", {"cu_lengths": two[:0]}),
        BadCall((x, y), "weights: expected one of float16", {"weights": two.to(torch.complex64)}),
        BadCall((x, y), r"weights: expected shape \[2\], got \[2, 3\]", {"weights": y}),
        BadCall((x, y), "item_weights: expected one of float16", {"item_weights": x.to(torch.complex64)}),
        BadCall((x, y), r"item_weights: expected shape \[2, 3\], got \[3\]", {"item_weights": y[0]}),
        BadCall(
            (x, y),
            "item_weights: expected a tensor without gradient",
            {"item_weights": y.clone().requires_grad_()},
        ),
        BadCall((x, y), "reduction: expected one of 'none', 'mean', 'sum', got 'avg'", {"reduction": "avg"}),
        BadCall((x, y), "empty: expected a number, got str", {"empty": "0"}),
    ]
