"""``python -m custom_ops demo``: the examples one after another, their tables at the end, pictures in out/."""

from __future__ import annotations

from collections.abc import Sequence

from custom_ops.examples import bev_lidar, lift_splat, rank_mslr, recommend_ml100k, report


def main(argv: Sequence[str] | None = None) -> int:
    description = "Train through custom_ops, beside what it replaces: on real data, and on synthetic scenes in cameras."
    examples = [rank_mslr.example, rank_mslr.short, recommend_ml100k.example, bev_lidar.example, lift_splat.short]
    return report.run(examples, "python -m custom_ops demo", description, argv)
