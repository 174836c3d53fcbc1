"""The ops' goals on an H200. None has been measured yet, for want of a device."""

from __future__ import annotations

from benchmarks.table import Target

FLOOR = "bandwidth floor"
INTERVALS = "BEVFusion's intervals, in Triton"
PLAIN = "plain PyTorch, compiled"

# {op: {contender: limit}}: forward+backward at the largest size of each table may take at most ``limit`` times as long
# as the contender. The limit beside the floor is the inverse of the share of the bandwidth that a plain copy reaches.
GOALS: dict[str, dict[str, float]] = {
    **{op: {FLOOR: 1 / 0.85} for op in ("relu", "leaky_relu", "hardtanh", "relu6", "threshold")},
    **{op: {FLOOR: 1 / 0.85} for op in ("relu_dropout", "surrogate_gradient")},
    # The backward of these ops reads one input twice, but the floor counts one read.
    "squared_relu": {FLOOR: 1.25 / 0.85},
    "margin_ranking_loss": {FLOOR: 1.2 / 0.85},
    # The backward reads the masked gradient again for the sums of the bias: five passes over memory beside four.
    "bias_relu": {FLOOR: 1.25 / 0.85},
    # Compiled PyTorch may fuse the pairs into one kernel, too, and then it computes as much; ours writes no matrix.
    "pairwise_logistic_loss": {PLAIN: 1.0},
    # Intervals are given sorted points, which ours sorts in the call.
    "voxel_sum": {FLOOR: 1 / 0.7, "index_add": 1.0},
    "bev_pool": {FLOOR: 1 / 0.7, "outer product, index_add": 1.0, INTERVALS: 1.0},
}


def targets(op: str, size: object) -> list[Target]:
    """Return the op's targets at ``size`` for ``python -m benchmarks --device cuda``."""
    return [Target(size, peer, ratio, memory="cuda") for peer, ratio in GOALS.get(op, {}).items()]
