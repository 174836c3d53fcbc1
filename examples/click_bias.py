"""Learning from clicks: a ranker trained on simulated clicks that depend on positions, naive and corrected.

An old ranker orders the pages of each query in the slice of MSLR-WEB (`examples.data` has its source and terms) by the
feature that correlates most with relevance, with noise. A user looks at the page on place r with probability 1 / r, the
page's propensity, and clicks on it, if seen, with a probability that grows with its label: 5% for irrelevant pages,
which is noise, up to 100%. Only these clicks are used in training, drawn anew in each step. The old ranker's first
places get most clicks whatever is on them, so that a network trained on plain clicks learns the old order as much as
relevance.

Three networks start from the same weights: `softmax_loss` on the clicks, the same with each click divided by its
propensity (`item_weights`), and the loss on the true gains, which bounds what clicks can teach. Quality is NDCG@10 by
the true labels on the test part.

Source: Joachims, Swaminathan, Schnabel, "Unbiased Learning-to-Rank with Biased Feedback", WSDM 2017.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

import custom_ops
from examples import report
from examples.data import load_mslr
from examples.rank_mslr import EPOCHS, LISTS, Lists, Scorer, best_feature, standardise
from examples.report import Check, Options, Part, Report

SESSIONS = 20  # users of each query in a step
MOST = 100.0  # the largest weight of a click: rarely seen places have few clicks of large weights, hence noise
KINDS = ("clicks", "clicks over propensity", "true labels")

LEAST_GAIN = 0.01  # over 20 seeds the corrected network was 0.045 better, over the first five 0.03


def relevance(labels: Tensor) -> Tensor:
    """Return the probability of a click on a page that is seen."""
    return 0.05 + 0.95 * (2.0**labels - 1) / 15


def old_ranks(lists: Lists, column: int, sign: float, generator: torch.Generator) -> Tensor:
    """Return each page's place, from 1, in the order that users see."""
    noise = torch.randn(lists.labels.shape, generator=generator)
    scores = sign * lists.pages[..., column] + noise
    missing = torch.arange(scores.shape[1]) >= lists.lengths[:, None]
    return scores.masked_fill(missing, -torch.inf).argsort(-1, descending=True).argsort(-1) + 1


def train(kind: str, lists: Lists, ranks: Tensor, seed: int, epochs: int) -> Scorer:
    torch.manual_seed(seed)
    model = Scorer(lists.pages.shape[-1], custom_ops.relu)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    propensity = 1.0 / ranks
    for _ in range(epochs):
        for chosen in torch.randperm(len(lists.lengths)).split(LISTS):
            pages, labels, lengths = lists.batch(chosen)
            seen = propensity[chosen, : labels.shape[1]]
            if kind == "true labels":
                target, weights = 2.0**labels - 1, torch.ones_like(seen)
            else:
                users = torch.full_like(seen, SESSIONS)
                target = torch.binomial(users, seen * relevance(labels), generator=generator)
                weights = (1 / seen).clamp(max=MOST) if kind == KINDS[1] else torch.ones_like(seen)
            inside = torch.arange(labels.shape[1]) < lengths[:, None]
            total = (target * weights * inside).sum(-1).clamp(min=1)  # each query counts alike
            optimiser.zero_grad()
            loss = custom_ops.softmax_loss(
                model(pages), target, lengths=lengths, item_weights=weights, weights=1 / total
            )
            loss.backward()
            optimiser.step()
    return model


def compare(options: Options, seeds: int) -> Report:
    train_part, test_part = load_mslr("train"), load_mslr("test")
    train_pages, test_pages = standardise(train_part, test_part)
    lists, held_out = Lists.of(train_pages, train_part), Lists.of(test_pages, test_part)
    column, sign = best_feature(train_part)
    values: dict[str, list[float]] = {kind: [] for kind in KINDS}
    old = []
    with options.progress() as progress:
        task = progress.add_task("Learning from clicks", total=seeds * len(KINDS), note="")
        for seed in range(options.seed, options.seed + seeds):
            ranks = old_ranks(lists, column, sign, torch.Generator().manual_seed(seed))
            old.append(custom_ops.ndcg(-ranks.float(), lists.labels, 10, lengths=lists.lengths).item())
            for kind in KINDS:
                model = train(kind, lists, ranks, seed, 1 if options.quick else EPOCHS)
                values[kind].append(held_out.ndcg(model)[-1])
                progress.update(task, advance=1, note=kind)
    result = Report("Ranking: clicks biased by position, MSLR-WEB slice", ("trained on", "NDCG@10", "less clicks"))
    for kind, own in values.items():
        apart = [a - b for a, b in zip(own, values[KINDS[0]])]
        result.rows.append((kind, _with_interval(own), "" if kind == KINDS[0] else _with_interval(apart)))
    result.rows.append(("the order that users saw", f"{statistics.fmean(old):.3f}, training part", ""))
    if not options.quick:
        gain = statistics.fmean(values[KINDS[1]]) - statistics.fmean(values[KINDS[0]])
        result.checks.append(Check("NDCG@10 that propensities gain", gain, LEAST_GAIN, at_least=True))
    return result


def _with_interval(values: Sequence[float]) -> str:
    """Return the mean over the seeds with its 95% interval by Student's t."""
    from scipy.stats import t

    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5:.3f}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--seeds", type=int, default=5, help="starts, each with clicks of its own (default: %(default)s)"
    )
    own, rest = parser.parse_known_args(argv)
    parts = {"clicks": Part(lambda options: compare(options, own.seeds), ("mslr",))}
    description = "Learning to rank from clicks. " + parser.format_usage().replace("usage:", "Own options:")
    return report.run(parts, "python -m examples.click_bias", description, rest)


if __name__ == "__main__":
    raise SystemExit(main())
