"""The pictures of the guides; each function draws one with the ops themselves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

import custom_ops
from benchmarks import catalogue_memory as catalogue
from custom_ops.registry import FUNCTIONS, REGISTRY
from examples.rank_mslr import LIST_LOSSES

COLOURS = {0: "#9aa3ab", 1: "#6fb1e0", 2: "#1f6fb4", 3: "#0b3c68"}

# The list is sorted by score: a relevant item on top, the best one below two lesser ones, ties, and one far too low.
SCORES = torch.tensor([3.0, 2.2, 1.6, 1.2, 0.6, 0.2, -0.4, -1.0, -1.6, -3.0])
LABELS = torch.tensor([2, 0, 1, 3, 0, 0, 1, 0, 0, 2])

# The default scales of these losses would draw a single spike.
OWN: dict[str, dict[str, Any]] = {
    "cosent_loss": {"scale": 1.0},
    "approx_ndcg_loss": {"temperature": 0.5},
    "approx_mrr_loss": {"temperature": 0.5},
    "smooth_ap_loss": {"temperature": 0.5},
}


def _push(loss: str) -> list[float]:
    """Return how far gradient descent moves each score, relative to the one that it moves most."""
    scores = SCORES.clone().requires_grad_()
    (slope,) = torch.autograd.grad(FUNCTIONS[loss].function(scores, LABELS, **OWN.get(loss, {})), scores)
    return [float(x) for x in -slope / slope.abs().max()]


def ranking_gradients() -> Figure:
    """Draw each list loss's gradient with respect to the scores of one list: bars, and markers for its variants."""
    names = [name for name in LIST_LOSSES if name in REGISTRY]
    columns = 4
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(11, 1.9 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for name, axis in zip(names, axes):
        axis.bar(range(len(SCORES)), _push(name), color=[COLOURS[label] for label in LABELS.tolist()])
        marked = []
        for marker, sign, variant in zip("o_", "○–", REGISTRY[name].variants):
            axis.plot(_push(variant.name), marker, ms=7, mfc="none", color="#d1662b")
            marked.append(f"{sign} {variant.name.removesuffix('_loss')}")
        axis.axhline(0, color="0.3", lw=0.8)
        own = ", ".join(f"{key} {value}" for key, value in OWN.get(name, {}).items())
        title = name.removesuffix("_loss") + (f" ({own})" if own else "")
        axis.set_title(f"{title}\n{', '.join(marked)}", fontsize=8)
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
    return figure


def activations() -> Figure:
    """Draw the value and the slope of each activation."""
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "relu": custom_ops.relu,
        "leaky_relu(0.2)": lambda x: custom_ops.leaky_relu(x, 0.2),
        "hardtanh": custom_ops.hardtanh,
        "squared_relu": custom_ops.squared_relu,
    }
    figure = Figure(figsize=(11, 2.6), layout="constrained")
    for axis, (name, function) in zip(figure.subplots(1, len(functions), sharey=True), functions.items()):
        x = torch.linspace(-2, 2, 801, requires_grad=True)
        y = function(x)
        y.sum().backward()
        axis.plot(x.detach(), y.detach(), color="#1f6fb4", lw=2, label="value")
        axis.plot(x.detach(), x.grad, color="#d1662b", lw=1.3, ls="--", label="slope")
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
        axis.set_ylim(-1.5, 4.2)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def shaping() -> Figure:
    """Draw what each op does to a gradient (left) and the slopes of the surrogates of a step (right)."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    gradient = torch.linspace(-3, 3, 601)
    shapes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "scale_gradient(x, 0.5)": lambda x: custom_ops.scale_gradient(x, 0.5),
        "reverse_gradient(x, 1)": lambda x: custom_ops.reverse_gradient(x, 1.0),
        "clip_gradient(x, -1, 1)": lambda x: custom_ops.clip_gradient(x, -1.0, 1.0),
        "straight_through(x.round(), x)": lambda x: custom_ops.straight_through(x.round(), x),
    }
    for name, shape in shapes.items():
        x = torch.zeros_like(gradient, requires_grad=True)
        shape(x).backward(gradient)
        left.plot(gradient, x.grad, label=name, lw=1.8)
    left.set_xlabel("gradient that arrives")
    left.set_title("gradient that is passed on", fontsize=11)
    for name in ("sigmoid", "atan", "triangle", "boxcar"):
        x = torch.linspace(-4, 4, 801, requires_grad=True)
        custom_ops.surrogate_gradient(x, name).sum().backward()
        right.plot(x.detach(), x.grad, label=name, lw=1.8)
    right.set_xlabel("x")
    right.set_title("slope of surrogate_gradient(x, ...)", fontsize=11)
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def voxels() -> Figure:
    """Draw points with a feature, the voxel of each, and the sums."""
    generator = torch.Generator().manual_seed(0)
    cells = 8
    angle = torch.rand(220, generator=generator) * 2 * math.pi
    radius = 1.6 + 0.9 * torch.rand(220, generator=generator) + 0.9 * torch.cos(3 * angle)
    points = torch.stack([4 + radius * angle.cos(), 4 + radius * angle.sin(), torch.zeros(220)], 1)
    feature = torch.rand(220, 1, generator=generator)
    rank = custom_ops.voxel_rank(points, (0, 0, -1), (1, 1, 2), (cells, cells, 1))
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    axes = figure.subplots(1, 3)
    axes[0].scatter(points[:, 0], points[:, 1], c=feature[:, 0], s=14, cmap="viridis")
    axes[0].set_title("points, each with features", fontsize=10)
    colours = torch.rand(cells * cells, 3, generator=generator).clamp(0.15, 0.85)
    axes[1].scatter(points[:, 0], points[:, 1], c=rank, s=14, cmap=ListedColormap(colours.tolist()), vmin=0, vmax=63)
    axes[1].set_title("voxel_rank: the voxel of each point", fontsize=10)
    grid = custom_ops.voxel_sum(feature, rank, cells * cells).view(cells, cells)
    image = axes[2].imshow(grid.T, origin="lower", extent=(0, cells, 0, cells), cmap="viridis")
    axes[2].set_title("voxel_sum: one row for each voxel", fontsize=10)
    figure.colorbar(image, ax=axes[2], shrink=0.85)
    for axis in axes:
        axis.set_aspect("equal")
        axis.set_xlim(0, cells)
        axis.set_ylim(0, cells)
        axis.set_xticks(range(cells + 1), [])
        axis.set_yticks(range(cells + 1), [])
        axis.grid(alpha=0.5)
    return figure


def catalogue_memory() -> Figure:
    """Draw the peak memory of forward and backward of losses over a catalogue, as measured, beside plain PyTorch."""
    found = json.loads(catalogue.RESULT.read_text())
    ram = int(found["machine"]["ram"].split()[0]) / 2**10
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    of_words, of_rows = figure.subplots(1, 2, sharey=True)
    for axis, kind, other in ((of_words, "words", "rows"), (of_rows, "rows", "words")):
        results = found[f"of {kind}"]
        sizes = [row[kind] for row in results]
        for name, style in zip(catalogue.NAMES, ("o-", "o-", "k:")):
            axis.plot(sizes, [row[name] and row[name] / 2**20 for row in results], style, label=name)
        axis.axhline(ram, color="#9aa3ab", linestyle="--", label="the machine's memory")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=7)
        axis.set_xlabel(f"{kind}, for {results[0][other]:,} {other}")
        axis.spines[["top", "right"]].set_visible(False)
    of_words.set_ylabel("peak memory, MiB")
    of_words.legend(frameon=False, fontsize=8)
    return figure


# These are kinds of training data, and for each of them what matters most and the loss to take.
CHOICES: dict[str, dict[str, str]] = {
    "grades of a list's items": {
        "NDCG, the top above all": "lambda_loss",
        "NDCG, without pairs": "approx_ndcg_loss",
        "many tied grades": "unique_softmax_loss",
        "grades that are often wrong": "pairwise_soft_zero_one_loss",
        "every pair of a long list": "pairwise_hinge_loss",
    },
    "clicks, relevant or not": {
        "the sound default; biased: item_weights": "softmax_loss",
        "average precision": "smooth_ap_loss",
        "one right answer": "approx_mrr_loss",
    },
    "scores: a teacher's, similarities": {
        "their distribution": "list_net_loss",
        "their differences": "pairwise_mse_loss",
        "the worst pairs of a batch": "cosent_loss",
    },
    "an order of all items": {
        "places from the top on": "list_mle_loss",
        "all places alike": "spearman_loss",
    },
    "pairs: this before that": {
        "recommendation, sampled negatives": "bpr_loss",
        "a reward model": "bradley_terry_loss",
        "a language model's completions": "dpo_loss",
        "a fixed margin": "margin_ranking_loss",
    },
    "one item of a whole catalogue": {
        "words, products": "linear_cross_entropy",
        "pairs of embeddings": "info_nce_loss",
    },
}


def ranking_choice() -> Figure:
    """Draw a tree from the kind of training data to the loss to take."""
    rows = sum(len(cases) for cases in CHOICES.values()) + 0.6 * (len(CHOICES) - 1)
    figure = Figure(figsize=(10, 0.36 * rows), layout="constrained")
    axis = figure.subplots()
    box = {"boxstyle": "round,pad=0.35", "fc": "#eaf3fa", "ec": COLOURS[1]}
    at = 0.0
    for kind, cases in CHOICES.items():
        middle = at - (len(cases) - 1) / 2
        for case, loss in cases.items():
            axis.plot([2.35, 2.65, 3.0], [middle, at, at], color="0.7", lw=1, zorder=0)
            axis.text(3.05, at, case, va="center", fontsize=9)
            axis.annotate("", (6.1, at), (5.75, at), arrowprops={"arrowstyle": "->", "color": "0.4"})
            axis.text(6.2, at, loss, va="center", fontsize=9, family="monospace", color=COLOURS[3])
            at -= 1
        axis.text(2.3, middle, kind, va="center", ha="right", fontsize=9.5, weight="bold", bbox=box)
        at -= 0.6
    axis.text(2.3, 1.1, "the data", ha="right", color="0.4", fontsize=8)
    axis.text(3.05, 1.1, "what matters", color="0.4", fontsize=8)
    axis.text(6.2, 1.1, "the loss", color="0.4", fontsize=8)
    axis.set(xlim=(0, 8.6), ylim=(at + 1, 1.6))
    axis.axis("off")
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "ranking_choice.png": ranking_choice,
    "activations.png": activations,
    "catalogue_memory.png": catalogue_memory,
    "ranking_gradients.png": ranking_gradients,
    "shaping.png": shaping,
    "voxels.png": voxels,
}
