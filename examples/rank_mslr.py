"""Learning to rank web pages: a small network trained with `lambda_loss`, beside the plain formula of the same loss.

The task is to order the pages that a search engine found for a query by relevance, from 136 features of each pair of
query and page. The network gives every page a score; LambdaRank compares all pairs of pages of a query and weights each
by the change of NDCG if the two were swapped. Quality is NDCG@10 on the test part's queries, with gains 2^label - 1,
averaged over the queries that have a relevant page.

The data are a slice of MSLR-WEB; `examples.data` has their source and terms.

Two networks start from the same weights and see the same queries, one with our loss, the other with the formula in
PyTorch's own ops; they are trained and timed separately. To show that the two losses are the same, both formulas get
the first network's scores at each step.

Then the same network is trained with other list losses: a few of them by default, each with ``--losses all``, from
several starts with ``--seeds``.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import custom_ops
from benchmarks.memory import peak_bytes
from custom_ops.registry import FUNCTIONS
from examples import report
from examples.agreement import Agreement
from examples.data import Ranking, load_mslr
from examples.long_lists import compare, plain_lambda_loss
from examples.report import NEUTRAL, OURS, THEIRS, Check, Gain, Options, Part, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EPOCHS = 20  # later it overfits the 43 queries of the training part
LISTS = 8  # queries per batch
AT = (1, 5, 10)

# Over four seeds NDCG@10 was 0.40 to 0.41, which was 0.17 to 0.22 above the better baseline; the two trainings were
# 0.005 apart.
LEAST_GAIN, MOST_APART = 0.08, 0.08


class Scorer(nn.Module):
    """A network from pages [N, features] to scores [N]."""

    def __init__(self, features: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation
        # The last layer has no bias: differences of scores don't depend on it, so its gradient would be mere rounding.
        last = nn.Linear(64, 1, bias=False)
        self.layers = nn.ModuleList([nn.Linear(features, 128), nn.Linear(128, 64), last])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x).squeeze(-1)


@dataclass
class Lists:
    """Queries padded to the longest: pages [L, n, features], labels [L, n], lengths [L]."""

    pages: Tensor
    labels: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, pages: Tensor, data: Ranking) -> Lists:
        lengths = torch.from_numpy(np.bincount(data.queries))
        parts = (torch.nn.utils.rnn.pad_sequence(t.split(lengths.tolist()), True)
                 for t in (pages, torch.from_numpy(data.labels)))  # fmt: skip
        return cls(*parts, lengths)

    def batch(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        lengths = self.lengths[chosen]
        longest = int(lengths.max())
        return self.pages[chosen, :longest], self.labels[chosen, :longest], lengths

    def ndcg(self, model: Scorer) -> list[float]:
        return self.ndcg_of_queries(model).nanmean(0).tolist()

    def ndcg_of_queries(self, model: Scorer) -> Tensor:
        """Return the NDCG of each query at each cutoff, and NaN for a query without a relevant page."""
        with torch.no_grad():
            scores = model(self.pages)
        return custom_ops.ndcg(scores, self.labels, AT, lengths=self.lengths, empty=float("nan"), reduction="none")


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # takes scores and labels [L, n] and lengths [L]


def our_loss(scores: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
    return custom_ops.lambda_loss(scores, labels, lengths=lengths)


def plain_loss(scores: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
    return plain_lambda_loss(*padded(scores, scores, labels=labels, lengths=lengths))


def padded(*scores: Tensor, labels: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    """Pad as the plain formula expects: label -1 and the lowest score in place of a missing page."""
    valid = torch.arange(labels.shape[1]) < lengths[:, None]
    return *(s.masked_fill(~valid, -1e9) for s in scores), labels.masked_fill(~valid, -1)


@dataclass
class Variant:
    name: str
    model: Scorer
    loss_fn: Loss
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    curve: list[float] = field(default_factory=list)  # the test part's NDCG@10 before the first epoch and after each

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def step(self, pages: Tensor, labels: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Take a step and return the loss and the scores, with their gradients."""
        start = time.perf_counter()
        self.optimiser.zero_grad()
        scores = self.model(pages)
        scores.retain_grad()
        loss = self.loss_fn(scores, labels, lengths)
        loss.backward()
        self.optimiser.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())
        return loss, scores

    @property
    def milliseconds(self) -> float:
        """Return the median time of a step, without the first few steps, which touch memory for the first time."""
        return 1e3 * statistics.median(self.seconds[min(5, len(self.seconds) - 1) :])


def standardise(train: Ranking, test: Ranking) -> tuple[Tensor, Tensor]:
    """Return both parts' features after a signed log, which shortens their tails, scaled by the train part's
    statistics.
    """
    a, b = (torch.from_numpy(np.sign(x) * np.log1p(np.abs(x))) for x in (train.features, test.features))
    mean, std = a.mean(0), a.std(0)
    std[std == 0] = 1.0
    return (a - mean) / std, (b - mean) / std


def ndcg(data: Ranking, scores: NDArray[np.floating]) -> float:
    """Return the mean NDCG@10 over the queries with a relevant page; it is undefined for the others."""
    from sklearn.metrics import ndcg_score

    values = []
    for rows in np.split(np.arange(len(data.labels)), np.flatnonzero(np.diff(data.queries)) + 1):
        gains = 2.0 ** data.labels[rows] - 1
        if gains.any():
            values.append(ndcg_score(gains[None], scores[rows][None], k=10))
    return float(np.mean(values))


def best_feature(train: Ranking) -> tuple[int, float]:
    """Return the feature, and its sign, that correlates most with the label (Spearman's correlation)."""
    from scipy.stats import rankdata

    labels = rankdata(train.labels) - (len(train.labels) + 1) / 2
    ranks = rankdata(train.features, axis=0) - (len(train.labels) + 1) / 2
    correlation = labels @ ranks / np.maximum(np.linalg.norm(ranks, axis=0), 1e-9)
    column = int(np.abs(correlation).argmax())
    return column, float(np.sign(correlation[column]))


def example(options: Options) -> Report:
    train, test = load_mslr("train"), load_mslr("test")
    train_pages, test_pages = standardise(train, test)
    lists, held_out = Lists.of(train_pages, train), Lists.of(test_pages, test)
    epochs = 2 if options.quick else EPOCHS

    torch.manual_seed(options.seed)
    start = Scorer(train_pages.shape[1], custom_ops.relu)
    ours = Variant("custom_ops", copy.deepcopy(start), our_loss)
    plain = Variant("plain PyTorch", copy.deepcopy(start), plain_loss)
    agreement = Agreement("lambda_loss and its gradient beside the plain formula, at each step")
    with options.progress() as progress:
        task = progress.add_task("Ranking web pages", total=epochs, note="")
        for epoch in range(epochs + 1):
            for v in (ours, plain):
                v.curve.append(held_out.ndcg(v.model)[-1])
            if epoch == epochs:
                break
            for chosen in torch.randperm(len(lists.lengths)).split(LISTS):
                batch = lists.batch(chosen)
                loss, scores = ours.step(*batch)
                assert scores.grad is not None
                filled, labels = padded(scores, labels=batch[1], lengths=batch[2])
                compare(loss, scores.grad, plain_lambda_loss, filled, labels, agreement)
                plain.step(*batch)
            progress.update(task, advance=1, note=f"loss {ours.losses[-1]:.4f}")

    longest = lists.batch(lists.lengths.topk(LISTS).indices)
    with torch.no_grad():
        scores = start(longest[0])

    def peak(loss_fn: Loss) -> float:
        leaf = scores.clone().requires_grad_()
        return peak_bytes(lambda: torch.autograd.grad(loss_fn(leaf, *longest[1:]), leaf), leaf.device) / 2**20

    column, sign = best_feature(train)
    shuffled = np.random.default_rng(options.seed).random((20, len(test.labels)))
    qualities = {
        "random order": float(np.mean([ndcg(test, scores) for scores in shuffled])),
        "untrained": held_out.ndcg(start)[-1],
        f"feature {column + 1}": ndcg(test, sign * test.features[:, column]),
        "plain PyTorch": plain.curve[-1],
        "custom_ops": ours.curve[-1],
    }
    group = "Ranker of web pages (MSLR-WEB), beside plain LambdaRank"
    step = Gain("a training step", "ms", ours.milliseconds, plain.milliseconds, group)
    memory = Gain("its loss, longest lists", "MiB", peak(our_loss), peak(plain_loss), group)

    result = Report("Ranking: MSLR-WEB slice", ("", "custom_ops", "plain PyTorch", "remark"))
    result.gains = [step, memory]
    result.rows = [
        ("loss, first step", f"{ours.losses[0]:.4f}", f"{plain.losses[0]:.4f}", f"{LISTS} queries a step"),
        ("loss, last step", f"{ours.losses[-1]:.4f}", f"{plain.losses[-1]:.4f}", f"{len(ours.losses)} steps"),
        ("NDCG@10, test part", f"{ours.curve[-1]:.3f}", f"{plain.curve[-1]:.3f}", _baselines(qualities)),
        *(gain.row for gain in (step, memory)),
    ]
    result.checks.append(agreement.check())
    if not options.quick:
        gain = qualities["custom_ops"] - max(qualities["untrained"], qualities["random order"])
        apart = abs(ours.curve[-1] - plain.curve[-1])
        result.checks += [
            Check("NDCG@10 above the untrained network and random order", gain, LEAST_GAIN, at_least=True),
            Check("NDCG@10 of the two trainings apart", apart, MOST_APART),
        ]
    result.pictures.append(draw((ours, plain), qualities, options.out / "ranking.png"))
    result.panels.append(partial(draw_progress, variants=(ours, plain), baseline=qualities[f"feature {column + 1}"]))
    return result


def _baselines(qualities: dict[str, float]) -> str:
    baselines = [item for item in qualities.items() if item[0] not in ("plain PyTorch", "custom_ops")]
    return ", ".join(f"{name} {value:.3f}" for name, value in baselines)


def draw_progress(axis: Axes, variants: Sequence[Variant], baseline: float) -> None:
    for v, colour in zip(variants, (OURS, THEIRS)):
        epochs = np.arange(len(v.curve)) * (len(v.seconds) / (len(v.curve) - 1))
        seconds = np.concatenate(([0.0], np.cumsum(v.seconds)))[epochs.astype(int)]
        axis.plot(seconds, v.curve, ".-", color=colour, label=f"{v.name}: {v.curve[-1]:.3f} in {seconds[-1]:.1f} s")
    axis.axhline(baseline, color=NEUTRAL, zorder=0)
    axis.text(0.98, baseline, "the best single feature", transform=axis.get_yaxis_transform(), ha="right", va="bottom")
    axis.set(xlabel="seconds of training", ylabel="NDCG@10, test part", title="Ranking web pages with LambdaRank")
    axis.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.2))


def draw(variants: Sequence[Variant], qualities: dict[str, float], path: Path) -> Path:
    figure = report.new_figure(3, title="Learning to rank on a slice of MSLR-WEB: lambda_loss beside the plain formula")
    progress, bars, times = figure.axes
    draw_progress(progress, variants, max(v for k, v in qualities.items() if k.startswith("feature")))

    colours = {"custom_ops": OURS, "plain PyTorch": THEIRS}
    drawn = bars.bar(list(qualities), list(qualities.values()), color=[colours.get(q, NEUTRAL) for q in qualities])
    bars.bar_label(drawn, fmt="%.3f", padding=2)
    bars.set(ylabel="NDCG@10, mean over queries", title="Test part: how good is the order?")
    bars.tick_params(axis="x", rotation=25)

    names = [v.name for v in variants]
    drawn = times.bar(names, [v.milliseconds for v in variants], color=[colours[name] for name in names])
    times.bar_label(drawn, fmt="%.1f", padding=2)
    times.set(ylabel="ms per training step (median)", title="Time: forward, backward and Adam")
    for axis in (bars, times):
        axis.margins(y=0.12)  # leaves room for the numbers
    figure.savefig(path)
    return path


# ---------------------------------------------------------------- the other list losses

SHORT = ("pairwise_logistic_loss", "lambda_loss", "softmax_loss", "approx_ndcg_loss")
POINTWISE = "squared error of labels"

# The defaults of these losses suit other scores, or sum over the pairs so that long lists would count for more.
OWN: dict[str, dict[str, Any]] = {
    **{f"pairwise_{name}_loss": {"normalize": True} for name in ("logistic", "soft_zero_one", "exponential", "hinge")},
    "pairwise_mse_loss": {"normalize": True},
    "cosent_loss": {"scale": 1.0},
    "smooth_ap_loss": {"temperature": 0.1},
}


def _takes_lists(function: Callable[..., Any]) -> bool:
    return {"scores", "labels", "lengths"} <= set(inspect.signature(function).parameters)


LIST_LOSSES = {
    name: partial(info.function, **OWN.get(name, {}))
    for name, info in FUNCTIONS.items()
    if info.family == "ranking" and _takes_lists(info.function)
} | {"lambda_loss:ndcg2pp": partial(custom_ops.lambda_loss, weighting="ndcg2pp")}


def _squared_error(scores: Tensor, labels: Tensor, *, lengths: Tensor) -> Tensor:
    """Return the baseline loss, which scores each page independently."""
    valid = torch.arange(scores.shape[1]) < lengths[:, None]
    return torch.nn.functional.mse_loss(scores[valid], labels[valid].to(scores.dtype))


def train_on_lists(loss_fn: Callable[..., Tensor], lists: Lists, seed: int, epochs: int) -> tuple[Scorer, list[float]]:
    """Train a model and return it with the seconds of each epoch."""
    torch.manual_seed(seed)
    model = Scorer(lists.pages.shape[-1], custom_ops.relu)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    seconds = []
    for _ in range(epochs):
        start = time.perf_counter()
        for chosen in torch.randperm(len(lists.lengths)).split(LISTS):
            pages, labels, lengths = lists.batch(chosen)
            optimiser.zero_grad()
            loss_fn(model(pages), labels, lengths=lengths).backward()
            optimiser.step()
        seconds.append(time.perf_counter() - start)
    return model, seconds


def compare_losses(names: Sequence[str], seeds: int, options: Options) -> Report:
    """Return one table with each loss's NDCG on the test part and its time per epoch.

    The intervals of 95% are over seeds and queries alike: both are drawn again with replacement. The last difference is
    that from the squared error for the same seeds and queries, which vary much more than the losses do.
    """
    train, test = load_mslr("train"), load_mslr("test")
    train_pages, test_pages = standardise(train, test)
    lists, held_out = Lists.of(train_pages, train), Lists.of(test_pages, test)
    epochs = 1 if options.quick else EPOCHS
    contenders = {POINTWISE: _squared_error} | {name: LIST_LOSSES[name] for name in names}
    result = Report(
        "Ranking losses: MSLR-WEB slice", ("loss", *(f"NDCG@{k}" for k in AT), f"@{AT[-1]}, difference", "epoch")
    )
    rows: list[tuple[float, tuple[str, ...]]] = []
    baseline: NDArray[np.floating] | None = None
    with options.progress() as progress:
        task = progress.add_task("Ranking losses", total=len(contenders) * seeds, note="")
        for name, loss_fn in contenders.items():
            qualities, times = [], []
            for seed in range(seeds):
                progress.update(task, note=name)
                model, seconds = train_on_lists(loss_fn, lists, options.seed + seed, epochs)
                qualities.append(held_out.ndcg_of_queries(model).numpy())
                times += seconds[1:] or seconds
                progress.update(task, advance=1)
            values = np.stack(qualities)  # [seeds, queries, cutoffs]
            values = values[:, ~np.isnan(values[0, :, 0])]
            baseline = values if baseline is None else baseline
            columns = [_with_interval(values[..., i]) for i in range(len(AT))]
            columns.append(_with_interval((values - baseline)[..., -1], "+.3f") if name != POINTWISE else "")
            row = (name, *columns, f"{1e3 * statistics.median(times):.0f} ms")
            rows.append((float(values[..., -1].mean()), row))
    result.rows = [row for _, row in sorted(rows, key=lambda item: -item[0])]
    if not options.quick:
        torch.manual_seed(options.seed)
        untrained = held_out.ndcg(Scorer(train_pages.shape[1], torch.relu))[-1]
        worst = min(mean for mean, _ in rows) - untrained
        result.checks.append(Check("NDCG@10 of the worst loss above the untrained network", worst, 0.05, at_least=True))
    return result


def _with_interval(values: NDArray[np.floating], form: str = ".3f") -> str:
    """Return the mean of values [seeds, queries] with the middle 95% of the means of 2,000 resamplings of both."""
    draw = np.random.default_rng(0)
    seeds, queries = (draw.integers(n, size=(2000, n)) for n in values.shape)
    means = [values[np.ix_(a, b)].mean() for a, b in zip(seeds, queries)]
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{values.mean():{form}} [{low:{form}}, {high:{form}}]"


def short(options: Options) -> Report:
    """Run a few of the losses from two starts each, for the demo."""
    return compare_losses(SHORT, 2, options)


PARTS = {"ranking": Part(example, ("mslr",)), "losses": Part(short, ("mslr",))}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--losses", nargs="+", choices=[*LIST_LOSSES, "all"], help="train with these list losses only")
    parser.add_argument("--seeds", type=int, default=5, help="starts for each of them (default: %(default)s)")
    own, rest = parser.parse_known_args(argv)
    parts = PARTS
    if own.losses:
        names = list(LIST_LOSSES) if "all" in own.losses else own.losses
        parts = {"losses": Part(lambda options: compare_losses(names, own.seeds, options), ("mslr",))}
    description = "Learning to rank web pages. " + parser.format_usage().replace("usage:", "Own options:")
    return report.run(parts, "python -m examples.rank_mslr", description, rest)


if __name__ == "__main__":
    raise SystemExit(main())
