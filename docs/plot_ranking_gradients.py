"""Draws docs/ranking_gradients.png: the gradient that each list loss gives on one list.

``python docs/plot_ranking_gradients.py``
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from custom_ops.examples.rank_mslr import LIST_LOSSES
from custom_ops.registry import REGISTRY

PICTURE = Path(__file__).with_name("ranking_gradients.png")
COLUMNS = 4
COLOURS = {0: "#9aa3ab", 1: "#6fb1e0", 2: "#1f6fb4", 3: "#0b3c68"}

# In the order of the scores: a relevant item on top, the best one below two lesser ones, ties, and one far too low.
SCORES = torch.tensor([3.0, 2.2, 1.6, 1.2, 0.6, 0.2, -0.4, -1.0, -1.6, -3.0])
LABELS = torch.tensor([2, 0, 1, 3, 0, 0, 1, 0, 0, 2])

# Where the default suits scores of another scale, so that the picture would show one spike.
OWN: dict[str, dict[str, Any]] = {
    "cosent_loss": {"scale": 1.0},
    "approx_ndcg_loss": {"temperature": 0.5},
    "approx_mrr_loss": {"temperature": 0.5},
    "smooth_ap_loss": {"temperature": 0.5},
}


def gradient(name: str) -> torch.Tensor:
    """Relative to its largest element."""
    scores = SCORES.clone().requires_grad_()
    REGISTRY[name].function(scores, LABELS, **OWN.get(name, {})).backward()
    assert scores.grad is not None
    return scores.grad / scores.grad.abs().max()


def main() -> None:
    names = [name for name in LIST_LOSSES if name in REGISTRY]
    rows = math.ceil(len(names) / COLUMNS)
    figure = Figure(figsize=(11, 1.75 * rows + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).flat
    for axis, name in zip(axes, names):
        push = -gradient(name)  # what a step of gradient descent does to the score
        axis.bar(range(len(SCORES)), push, color=[COLOURS[label] for label in LABELS.tolist()])
        axis.axhline(0, color="0.3", lw=0.8)
        own = ", ".join(f"{key} {value}" for key, value in OWN.get(name, {}).items())
        axis.set_title(name.removesuffix("_loss") + (f" ({own})" if own else ""), fontsize=9)
        axis.set_xticks(range(len(SCORES)), [f"{s:g}" for s in SCORES.tolist()], fontsize=6.5)
        axis.set_yticks([-1, 0, 1], ["down", "0", "up"], fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes:
        axis.set_visible(False)
    handles = [Patch(color=colour, label=f"label {label}") for label, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.suptitle(
        "Where each loss pushes the scores of one list (from high to low), relative to its largest push", fontsize=11
    )
    figure.savefig(PICTURE, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
