"""Learning to rank web pages: a small network, our margin ranking loss and `relu`, beside torch's own.

Task: order the pages that a search engine found for a query by relevance, from 136 features of each
pair of query and page. The network gives every page a score; for two pages of one query whose labels
differ, the better one should score higher by a margin of 1. Quality is NDCG@10 on the test part's
queries, with gains 2^label - 1, averaged over the queries that have a relevant page.

Data: a slice of MSLR-WEB, see `custom_ops.examples.data` for where it comes from and its terms.

Four variants start from the same weights, see the same pairs at the same step and take their steps in
turn, so that their times meet the same load on the machine.

Then the same network is trained with list losses, which see whole queries: a few of them here, each with
``--losses all``, from several starts with ``--seeds``.
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
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import margin_ranking_loss as torch_margin_ranking_loss

import custom_ops
from custom_ops.examples import report
from custom_ops.examples.data import Ranking, load_mslr
from custom_ops.examples.report import NEUTRAL, OURS, THEIRS, Check, Options, Report
from custom_ops.registry import REGISTRY

MARGIN = 1.0
STEPS = 150  # by then it starts to overfit, with 43 queries to learn from
PAIRS = 1 << 16  # per step

# Our ops repeat torch's arithmetic but for the order in which the loss adds up its pairs, so early losses,
# of about 1, differ by float32's rounding. Later a page may fall on the other side of a kink of ReLU or of
# the margin, on one machine and not on another: that has put torch's own compiled curve 1e-4 from its eager one.
EARLY, TOLERANCE_EARLY = 50, 1e-5
TOLERANCE = 1e-3


class Scorer(nn.Module):
    """A score for each page: [N, features] -> [N]."""

    def __init__(self, features: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation
        # No bias at the end: differences of scores don't show it, so its gradient would be mere rounding.
        last = nn.Linear(64, 1, bias=False)
        self.layers = nn.ModuleList([nn.Linear(features, 128), nn.Linear(128, 64), last])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x).squeeze(-1)


@dataclass
class Variant:
    name: str
    model: Scorer
    loss_fn: Callable[..., Tensor]
    compiled: bool
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=3e-4)
        self.forward = torch.compile(self._loss, fullgraph=True, dynamic=False) if self.compiled else self._loss

    def _loss(self, pages: Tensor, better: Tensor, worse: Tensor) -> Tensor:
        scores = self.model(pages)
        ones = scores.new_ones(better.shape)
        return self.loss_fn(scores.index_select(0, better), scores.index_select(0, worse), ones, margin=MARGIN)

    def step(self, pages: Tensor, better: Tensor, worse: Tensor) -> None:
        start = time.perf_counter()
        self.optimiser.zero_grad()
        loss = self.forward(pages, better, worse)
        loss.backward()
        self.optimiser.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)

    @property
    def milliseconds(self) -> float:
        """The median step's, without the first few, which compile or touch memory first."""
        return 1e3 * statistics.median(self.seconds[min(5, len(self.seconds) - 1) :])


class PairSampler:
    """Draws a query, then a pair of its pages with different labels, each uniformly."""

    def __init__(self, data: Ranking) -> None:
        same_query = data.queries[:, None] == data.queries[None, :]
        pairs = np.argwhere(same_query & (data.labels[:, None] > data.labels[None, :]))
        self.pairs = torch.from_numpy(pairs)  # sorted by query, because the pages are
        self.counts = torch.from_numpy(np.unique(data.queries[pairs[:, 0]], return_counts=True)[1])
        self.starts = self.counts.cumsum(0) - self.counts
        self.generator = torch.Generator().manual_seed(0)

    def draw(self, size: int) -> tuple[Tensor, Tensor]:
        query = torch.randint(len(self.counts), (size,), generator=self.generator)
        fraction = torch.rand(size, generator=self.generator, dtype=torch.float64)
        better, worse = self.pairs[self.starts[query] + (fraction * self.counts[query]).long()].unbind(1)
        return better, worse


def standardise(train: Ranking, test: Ranking) -> tuple[Tensor, Tensor]:
    """Both parts' features, their long tails tamed by a signed log, then scaled by the train part's statistics."""
    a, b = (torch.from_numpy(np.sign(x) * np.log1p(np.abs(x))) for x in (train.features, test.features))
    mean, std = a.mean(0), a.std(0)
    std[std == 0] = 1.0
    return (a - mean) / std, (b - mean) / std


def ndcg(data: Ranking, scores: NDArray[np.floating]) -> float:
    """Mean NDCG@10; queries without a relevant page, where it is undefined, are left out."""
    from sklearn.metrics import ndcg_score

    values = []
    for rows in np.split(np.arange(len(data.labels)), np.flatnonzero(np.diff(data.queries)) + 1):
        gains = 2.0 ** data.labels[rows] - 1
        if gains.any():
            values.append(ndcg_score(gains[None], scores[rows][None], k=10))
    return float(np.mean(values))


def best_feature(train: Ranking, pairs: NDArray[np.int64]) -> tuple[int, float]:
    """The feature, and its sign, that alone orders most of the train part's pairs rightly."""
    better, worse = train.features[pairs[:, 0]], train.features[pairs[:, 1]]
    agreement = np.sign(better - worse).mean(0)
    column = int(np.abs(agreement).argmax())
    return column, float(np.sign(agreement[column]))


def example(options: Options) -> Report:
    train, test = load_mslr("train"), load_mslr("test")
    train_pages, test_pages = standardise(train, test)
    sampler = PairSampler(train)
    steps = 8 if options.quick else STEPS

    torch.manual_seed(0)
    start = Scorer(train_pages.shape[1], torch.relu)

    def variant(name: str, activation: Callable[[Tensor], Tensor], loss_fn: Callable[..., Tensor]) -> Variant:
        model = copy.deepcopy(start)
        model.activation = activation
        return Variant(name, model, loss_fn, name.endswith("compiled"))

    variants = [
        variant("torch, eager", torch.relu, torch_margin_ranking_loss),
        variant("custom_ops, eager", custom_ops.relu, custom_ops.margin_ranking_loss),
        variant("torch, compiled", torch.relu, torch_margin_ranking_loss),
        variant("custom_ops, compiled", custom_ops.relu, custom_ops.margin_ranking_loss),
    ]
    with options.progress() as progress:
        task = progress.add_task("Ranking web pages", total=steps, note="compiling")
        for _ in range(steps):
            better, worse = sampler.draw(PAIRS)
            for v in variants:
                v.step(train_pages, better, worse)
            progress.update(task, advance=1, note=f"loss {variants[1].losses[-1]:.4f}")

    def quality(model: Scorer) -> float:
        with torch.no_grad():
            return ndcg(test, model(test_pages).numpy())

    reference, ours = variants[:2]
    column, sign = best_feature(train, sampler.pairs.numpy())
    shuffled = np.random.default_rng(0).random((20, len(test.labels)))
    qualities = {
        "random order": float(np.mean([ndcg(test, scores) for scores in shuffled])),
        "untrained": quality(start),
        f"feature {column + 1}": ndcg(test, sign * test.features[:, column]),
        "torch": quality(reference.model),
        "custom_ops": quality(ours.model),
    }

    result = Report("Ranking: MSLR-WEB slice", ("", "custom_ops", "torch", "remark"))
    result.rows = [
        ("loss, first step", f"{ours.losses[0]:.4f}", f"{reference.losses[0]:.4f}", f"{PAIRS:,} pairs a step"),
        ("loss, last step", f"{ours.losses[-1]:.4f}", f"{reference.losses[-1]:.4f}", f"{steps} steps"),
        ("NDCG@10, test part", f"{qualities['custom_ops']:.3f}", f"{qualities['torch']:.3f}", _baselines(qualities)),
    ]
    for mode, theirs, mine in (("eager", *variants[:2]), ("compiled", *variants[2:])):
        ratio = f"{theirs.milliseconds / mine.milliseconds:.2f}x as fast"
        result.rows.append(
            (f"step, {mode}", f"{mine.milliseconds:.1f} ms", f"{theirs.milliseconds:.1f} ms", f"{ratio} (median)")
        )
    _, _, compiled_reference, compiled = variants
    for v, other in ((ours, reference), (compiled, compiled_reference), (compiled, ours)):
        gaps = np.abs(np.subtract(v.losses, other.losses))
        curves = f"loss of `{v.name}` against `{other.name}`, largest gap"
        result.checks += [
            Check(f"{curves} of {EARLY} steps", float(gaps[:EARLY].max()), TOLERANCE_EARLY),
            Check(f"{curves} of all", float(gaps.max()), TOLERANCE),
        ]
    if not options.quick:
        gain = qualities["custom_ops"] - max(qualities["untrained"], qualities["random order"])
        result.checks.append(Check("NDCG@10 above the untrained network and random order", gain, 0.1, at_least=True))
    result.pictures.append(draw(variants, qualities, options.out / "ranking.png"))
    return result


def _baselines(qualities: dict[str, float]) -> str:
    baselines = [item for item in qualities.items() if item[0] not in ("torch", "custom_ops")]
    return ", ".join(f"{name} {value:.3f}" for name, value in baselines)


def draw(variants: Sequence[Variant], qualities: dict[str, float], path: Path) -> Path:
    figure = report.new_figure(3, title="Learning to rank on a slice of MSLR-WEB: custom_ops beside torch's own ops")
    curves, bars, times = figure.axes

    for v, style in zip(variants, ("-", "--", "-.", ":")):
        colour = OURS if "custom_ops" in v.name else THEIRS
        curves.plot(v.losses, style, color=colour, label=v.name, linewidth=4 if v is variants[0] else 1.6)
    curves.set(xlabel="step", ylabel="margin ranking loss", title="Training loss: four curves in one")
    curves.legend(frameon=False)

    colours = [OURS if name == "custom_ops" else THEIRS if name == "torch" else NEUTRAL for name in qualities]
    bars.bar_label(bars.bar(list(qualities), list(qualities.values()), color=colours), fmt="%.3f", padding=2)
    bars.set(ylabel="NDCG@10, mean over queries", title="Test part: how good is the order?")
    bars.tick_params(axis="x", rotation=25)

    colours = [OURS if "custom_ops" in v.name else THEIRS for v in variants]
    names = [v.name.replace(", ", "\n") for v in variants]
    times.bar_label(times.bar(names, [v.milliseconds for v in variants], color=colours), fmt="%.1f", padding=2)
    times.set(ylabel="ms per training step (median)", title="Time: forward, backward and Adam")
    for axis in (bars, times):
        axis.margins(y=0.12)  # room for the numbers
    figure.savefig(path)
    return path


# ---------------------------------------------------------------- list losses

EPOCHS = 20
LISTS = 8  # in a batch
AT = (1, 5, 10)
SHORT = ("pairwise_logistic_loss", "lambda_loss", "softmax_loss", "approx_ndcg_loss")
POINTWISE = "squared error of labels"

# Where the default is for other scores or sums over the pairs, so that long lists would count for more.
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
    for name, info in REGISTRY.items()
    if info.family == "ranking" and _takes_lists(info.function)
} | {"lambda_loss:ndcg2pp": partial(custom_ops.lambda_loss, weighting="ndcg2pp")}


def _squared_error(scores: Tensor, labels: Tensor, *, lengths: Tensor) -> Tensor:
    """The baseline: each page by itself."""
    valid = torch.arange(scores.shape[1]) < lengths[:, None]
    return torch.nn.functional.mse_loss(scores[valid], labels[valid].to(scores.dtype))


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
        with torch.no_grad():
            scores = model(self.pages)
        return [custom_ops.ndcg(scores, self.labels, k, lengths=self.lengths).item() for k in AT]


def train_on_lists(loss_fn: Callable[..., Tensor], lists: Lists, seed: int, epochs: int) -> tuple[Scorer, list[float]]:
    """The model, and the seconds of each epoch."""
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
    """One table of the test part's NDCG and the time of an epoch, for each loss."""
    train, test = load_mslr("train"), load_mslr("test")
    train_pages, test_pages = standardise(train, test)
    lists, held_out = Lists.of(train_pages, train), Lists.of(test_pages, test)
    epochs = 1 if options.quick else EPOCHS
    contenders = {POINTWISE: _squared_error} | {name: LIST_LOSSES[name] for name in names}
    result = Report("Ranking losses: MSLR-WEB slice", ("loss", *(f"NDCG@{k}" for k in AT), "epoch"))
    rows: list[tuple[list[float], tuple[str, ...]]] = []
    with options.progress() as progress:
        task = progress.add_task("Ranking losses", total=len(contenders) * seeds, note="")
        for name, loss_fn in contenders.items():
            qualities, times = [], []
            for seed in range(seeds):
                progress.update(task, note=name)
                model, seconds = train_on_lists(loss_fn, lists, seed, epochs)
                qualities.append(held_out.ndcg(model))
                times += seconds[1:] or seconds
                progress.update(task, advance=1)
            columns = [_mean_and_confidence(column) for column in zip(*qualities)]
            means = [statistics.fmean(column) for column in zip(*qualities)]
            rows.append((means, (name, *columns, f"{1e3 * statistics.median(times):.0f} ms")))
    result.rows = [row for _, row in sorted(rows, key=lambda item: -item[0][-1])]
    if not options.quick:
        torch.manual_seed(0)
        untrained = held_out.ndcg(Scorer(train_pages.shape[1], torch.relu))[-1]
        worst = min(means[-1] for means, _ in rows) - untrained
        result.checks.append(Check("NDCG@10 of the worst loss above the untrained network", worst, 0.05, at_least=True))
    return result


def _mean_and_confidence(values: Sequence[float]) -> str:
    """With the 95% interval of the mean over the seeds, by Student's t."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.3f} ± {half:.3f}"


def short(options: Options) -> Report:
    """A few of the losses, two starts each."""
    return compare_losses(SHORT, 2, options)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--losses", nargs="+", choices=[*LIST_LOSSES, "all"], help="train with these list losses only")
    parser.add_argument("--seeds", type=int, default=5, help="starts for each of them (default: %(default)s)")
    own, rest = parser.parse_known_args(argv)
    examples: list[report.Example] = [example, short]
    if own.losses:
        names = list(LIST_LOSSES) if "all" in own.losses else own.losses
        examples = [lambda options: compare_losses(names, own.seeds, options)]
    description = "Learning to rank web pages. " + parser.format_usage().replace("usage:", "Own options:")
    return report.run(examples, "python -m custom_ops.examples.rank_mslr", description, rest)


if __name__ == "__main__":
    raise SystemExit(main())
