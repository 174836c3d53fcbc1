"""``python -m custom_ops demo``: what one gains by our ops, beside what one would write today; pictures in out/.

First losses, sums and activations by themselves, at sizes where they matter, then networks that are trained through
them. ``--only PART`` runs some of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from custom_ops.examples import (
    activations,
    bev_lidar,
    lift_splat,
    long_lists,
    pooling,
    rank_mslr,
    recommend_ml100k,
    report,
)
from custom_ops.examples.report import Part

PARTS = {
    **long_lists.PARTS,
    **pooling.PARTS,
    **activations.PARTS,
    "ranking": rank_mslr.PARTS["ranking"],
    **recommend_ml100k.PARTS,
    **bev_lidar.PARTS,
    "cameras": Part(lift_splat.short),
}


def main(argv: Sequence[str] | None = None) -> int:
    description = "Time and memory of our ops beside what they replace; networks trained on real data and on scenes."
    summary = "custom_ops beside what one would write today"
    return report.run(PARTS, "python -m custom_ops demo", description, argv, summary)
