"""What the ops are to reach on an H200. None of it has been measured yet: there was no device."""

from __future__ import annotations

from benchmarks.table import Target

FLOOR = "bandwidth floor"
INTERVALS = "BEVFusion's intervals, in Triton"
PLAIN = "plain PyTorch, compiled"

# {op: {beside: the most time it may take, in units of that one's}}, forward+backward at the largest size of each
# table; beside the floor, the inverse of the share of the bandwidth that copying the same bytes reaches.
GOALS: dict[str, dict[str, float]] = {
    **{op: {FLOOR: 1 / 0.85} for op in ("relu", "leaky_relu", "hardtanh", "relu6", "threshold", "bias_relu")},
    **{op: {FLOOR: 1 / 0.85} for op in ("relu_dropout", "surrogate_gradient")},
    # Their backward also reads an input once more, which the floor leaves out.
    "squared_relu": {FLOOR: 1.25 / 0.85},
    "margin_ranking_loss": {FLOOR: 1.2 / 0.85},
    "pairwise_logistic_loss": {PLAIN: 1 / 20},
    "voxel_sum": {FLOOR: 1 / 0.7, "index_add": 1.0, INTERVALS: 1.0},
    "bev_pool": {FLOOR: 1 / 0.7, "outer product, index_add": 1.0, INTERVALS: 1.0},
}


def targets(op: str, size: object) -> list[Target]:
    """At ``size``, for `bench --device cuda`."""
    return [Target(size, peer, ratio, memory="cuda") for peer, ratio in GOALS.get(op, {}).items()]
