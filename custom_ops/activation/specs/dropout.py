"""The specs of `custom_ops.activation.dropout`: references, samples and wrong calls."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.activation.dropout import _dropout_scale, relu_dropout
from custom_ops.activation.specs._common import not_a_tensor, unary_samples
from custom_ops.activation.specs.piecewise import relu_reference
from custom_ops.registry import BadCall, OpInfo, Sample, Sharding, register


def philox(seed: Tensor, n: int) -> Tensor:
    """Return the first n draws of Philox 4x32-10 keyed by ``seed``, as integers in [0, 2^32)."""
    low = 0xFFFFFFFF
    counter = torch.arange((n + 3) // 4, device=seed.device)
    zero = torch.zeros_like(counter)
    c = [counter & low, counter >> 32, zero, zero]
    keys = [seed & low, (seed >> 32) & low]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57  # all 64 bits of each product are kept, and the sign doesn't matter
        c = [((b >> 32) & low) ^ c[1] ^ keys[0], b & low, ((a >> 32) & low) ^ c[3] ^ keys[1], a & low]
        keys = [(key + step) & low for key, step in zip(keys, (0x9E3779B9, 0xBB67AE85))]
    return torch.stack(c, 1).flatten()[:n]


def relu_dropout_reference(
    x: Tensor, p: float, training: bool, seed: Tensor | None = None, inplace: bool = False
) -> Tensor:
    if not training or seed is None:
        return relu_reference(x)
    draws = philox(seed, x.numel())
    kept = (draws >= round(p * 2**32)).view(x.shape)
    y = torch.where(kept, relu_reference(x) * _dropout_scale(p), 0)
    return torch.where(x.isnan(), x, y)


def _dropout_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    seed = torch.tensor(0x123456789ABCDEF, device=device)
    samples = unary_samples(0.0)(device, dtype)
    evaluation = Sample((*samples[0].args, 0.4, False), dynamic={0: 0})
    return [evaluation, *(Sample((*s.args, 0.4, True, seed), dynamic=s.dynamic) for s in samples)]


_x = torch.ones(2, 3)

register(
    OpInfo(
        name="relu_dropout",
        summary="Dropout of ReLU, both masks in one bit per element",
        function=relu_dropout,
        reference=relu_dropout_reference,
        samples=_dropout_samples,
        not_sharded="each element's draw depends on its place in the whole tensor, not in a shard",
        shardings=lambda: [Sharding("rows", Sample((torch.ones(5, 3), 0.5)), {0: 0}, 0)],
        bad_calls=lambda: [
            *not_a_tensor(),
            BadCall((_x, 1.5), "p: expected a probability, got 1.5"),
            BadCall((_x, "half"), "p: expected a number, got str"),
            BadCall((_x, 0.5, 1), "training: expected True or False, got 1"),
            BadCall((_x, 0.5, True, None, 1), "inplace: expected True or False, got 1"),
            BadCall((_x[:1].expand(2, 3), 0.5, True, None, True), "x: expected elements with memory of their own"),
            BadCall((_x, 0.5, True, 7), "seed: expected a tensor, got int"),
            BadCall((_x, 0.5, True, torch.ones(2, dtype=torch.int64)), r"seed: expected a scalar, got shape \[2\]"),
            BadCall((_x, 0.5, True, torch.ones(())), "seed: expected one of int64, got float32"),
        ],
    )
)
