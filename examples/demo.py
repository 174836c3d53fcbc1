"""``python -m examples.demo``: run our ops beside the usual formulas and draw pictures into out/.

It starts with single losses, sums and activations at sizes where the difference matters, and goes on with networks that
are trained through them. ``--only PART`` runs some of it.
"""

from __future__ import annotations

import sys

from custom_ops._command import run


def _main(argv: list[str]) -> int:
    from examples import (
        activations,
        bev_lidar,
        lift_splat,
        long_lists,
        pooling,
        rank_mslr,
        recommend_ml100k,
        report,
    )

    parts = {
        **long_lists.PARTS,
        **pooling.PARTS,
        **activations.PARTS,
        "ranking": rank_mslr.PARTS["ranking"],
        **recommend_ml100k.PARTS,
        **bev_lidar.PARTS,
        "cameras": report.Part(lift_splat.short),
    }
    description = "Time and memory of our ops beside what they replace; networks trained on real data and on scenes."
    summary = "custom_ops beside what one would write today"
    return report.run(parts, "python -m examples.demo", description, argv, summary)


def main(argv: list[str]) -> int:
    return run("demo", _main, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
