"""Recommending films: a matrix factorisation trained with four losses.

The task is to recommend, of the films that a user hasn't rated yet, those that they will like (rate 4 or 5). The last
fifth of each user's liked films is held out. Quality is recall@10 and NDCG@10 on those, averaged over the users; the
baseline recommends the films that most users liked.

The data are MovieLens 100K; `examples.data` has their source and terms.

`bpr_loss` compares a liked film with a random one. `pairwise_logistic_loss` compares each liked film with every other
one at once: the pairs of one user would fill a table of films by films, but none of it is stored.
`linear_cross_entropy` asks for the liked film among all films (the whole catalogue), or among the films that were liked
in the same batch, whose scores are lowered by the logarithm of their popularity (a sample with logQ correction). All
are compared with torch's own formulas on the scores of the training: BPR at each step, the others at some of the steps,
the pairs of a few users only, since a table of all pairs takes time and much memory.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import custom_ops
from benchmarks.memory import peak_bytes
from benchmarks.peers import logsigmoid_bpr_loss
from examples import report
from examples.agreement import Agreement
from examples.data import Ratings, load_movielens
from examples.long_lists import compare, forward_and_backward, plain_logistic_loss
from examples.report import NEUTRAL, OURS, Check, Gain, Options, Part, Report, milliseconds

K = 10
STEPS = 240
MEASURED = 48  # steps between two evaluations on the held-out films
BATCH = 8192  # pairs per step of BPR
ROWS = 1024  # pairs per step of the softmax over the whole catalogue
SAMPLE = 512  # pairs per step of the softmax over the films of these pairs
USERS = 128  # users per step of the pairwise logistic loss
LEAST_GAIN = 0.02  # over four seeds, NDCG@10 of the first two was 0.063 to 0.074 above that of the most liked films
FEW = 4  # users whose pairs are compared with torch's formula
COLOURS = (OURS, "#2a9d5c", "#8e5bb5", "#d1662b")


class Factors(nn.Module):
    """A score for each user and item: the product of their factors plus the item's popularity."""

    def __init__(self, users: int, items: int, size: int = 32) -> None:
        super().__init__()
        self.users = nn.Parameter(0.1 * torch.randn(users, size))
        self.items = nn.Parameter(0.1 * torch.randn(items, size))
        self.bias = nn.Parameter(torch.zeros(items))

    def pair(self, users: Tensor, items: Tensor) -> Tensor:
        return (self.users[users] * self.items[items]).sum(-1) + self.bias[items]

    def all_items(self, users: Tensor) -> Tensor:
        return self.users[users] @ self.items.T + self.bias


@dataclass(frozen=True)
class Split:
    """The liked films of each user, [users, items], to train on and held out, and the films that may be recommended."""

    train: Tensor
    test: Tensor
    unseen: Tensor

    @staticmethod
    def of(ratings: Ratings) -> Split:
        shape = int(ratings.users.max()) + 1, int(ratings.items.max()) + 1
        train, test = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        rated = torch.zeros(shape, dtype=torch.bool)
        rated[ratings.users, ratings.items] = True
        for user in range(shape[0]):
            liked = np.flatnonzero((ratings.users == user) & (ratings.ratings >= 4))
            liked = ratings.items[liked[np.argsort(ratings.times[liked], kind="stable")]]
            kept = len(liked) - len(liked) // 5
            train[user, liked[:kept]] = True
            test[user, liked[kept:]] = True
        return Split(train, test, ~rated | test)


Scores = tuple[Tensor, ...]


@dataclass
class Variant:
    """One model and its loss; ``score`` returns the loss's arguments: scores of pairs of films or of all films, or the
    factors that they are made of.
    """

    name: str
    model: Factors
    score: Callable[[Factors], Scores]
    loss_fn: Callable[..., Tensor]
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)  # (steps, NDCG after them)

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=1e-2, weight_decay=1e-5)

    def step(self) -> tuple[Tensor, Scores]:
        """Take a step and return the loss and the scores, with their gradients."""
        start = time.perf_counter()
        self.optimiser.zero_grad()
        scores = self.score(self.model)
        for s in scores:
            s.retain_grad()
        loss = self.loss_fn(*scores)
        loss.backward()
        self.optimiser.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())
        return loss, scores

    @property
    def milliseconds(self) -> float:
        """Return the median time of a step, without the first few steps, which touch memory for the first time."""
        return 1e3 * statistics.median(self.seconds[min(5, len(self.seconds) - 1) :])


class Sampler:
    """A sampler of liked films, each with a film that the user didn't like, and of users in turn."""

    def __init__(self, liked: Tensor, seed: int) -> None:
        self.liked = liked
        self.pairs = liked.nonzero()
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.int64)

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        users, positive = self.pairs[torch.randint(len(self.pairs), (BATCH,), generator=self.generator)].unbind(1)
        negative = torch.randint(self.liked.shape[1], (BATCH,), generator=self.generator)
        kept = ~self.liked[users, negative]
        return users[kept], positive[kept], negative[kept]

    def next_users(self) -> Tensor:
        if len(self.order) < USERS:
            self.order = torch.randperm(len(self.liked), generator=self.generator)
        users, self.order = self.order[:USERS], self.order[USERS:]
        return users


def quality(scores: Tensor, split: Split) -> tuple[float, float]:
    """Return the mean NDCG@K and recall@K over the users with a held-out film."""
    users = split.test.any(1)
    scores, relevant, unseen = scores[users], split.test[users], split.unseen[users]
    ndcg = custom_ops.ndcg(scores, relevant, K, mask=unseen).item()
    best = scores.masked_fill(~unseen, -torch.inf).topk(K).indices
    hits = relevant.gather(1, best).sum(1)
    return ndcg, (hits / relevant.sum(1)).mean().item()


def example(options: Options) -> Report:
    split = Split.of(load_movielens())
    steps = 8 if options.quick else STEPS
    torch.manual_seed(options.seed)
    start = Factors(*split.train.shape)
    sampler = Sampler(split.train, options.seed)

    def pairs(model: Factors) -> Scores:
        of, positive, negative = batch
        return model.pair(of, positive), model.pair(of, negative)

    def lists(model: Factors) -> Scores:
        return (model.all_items(users),)

    def logistic(scores: Tensor) -> Tensor:
        return custom_ops.pairwise_logistic_loss(scores, split.train[users], normalize=True)

    def factors(model: Factors) -> Scores:
        return model.users[batch[0][:ROWS]], model.items, model.bias

    def whole(rows: Tensor, items: Tensor, bias: Tensor) -> Tensor:
        return custom_ops.linear_cross_entropy(rows, items, batch[1][:ROWS], linear_bias=bias)

    def sample(model: Factors) -> Scores:
        of, positive, _ = (t[:SAMPLE] for t in batch)
        return model.users[of], model.items[positive], model.bias[positive] - log_share[positive]

    def corrected(rows: Tensor, items: Tensor, bias: Tensor) -> Tensor:
        return custom_ops.linear_cross_entropy(rows, items, torch.arange(len(rows)), linear_bias=bias)

    log_share = (split.train.sum(0) / split.train.sum()).log()
    bpr = Variant("BPR", copy.deepcopy(start), pairs, custom_ops.bpr_loss)
    all_pairs = Variant("pairwise logistic", copy.deepcopy(start), lists, logistic)
    softmax = Variant("softmax", copy.deepcopy(start), factors, whole)
    sampled = Variant("sampled softmax", copy.deepcopy(start), sample, corrected)
    variants = [bpr, all_pairs, softmax, sampled]
    everyone = torch.arange(len(split.train))
    agreement = Agreement("bpr_loss and its gradient beside torch's logsigmoid, at each step")
    agreement_of_rows = Agreement("linear_cross_entropy and its gradient beside torch's, with the logits in memory")
    agreement_of_lists = Agreement("pairwise_logistic_loss and its gradient beside the table of all pairs")

    def measure(model: Factors) -> tuple[float, float]:
        with torch.no_grad():
            return quality(model.all_items(everyone), split)

    with options.progress() as progress:
        task = progress.add_task("Recommending films", total=steps, note="")
        for step in range(1, steps + 1):
            batch, users = sampler.draw(), sampler.next_users()
            loss, scores = bpr.step()
            leaves = [s.detach().requires_grad_() for s in scores]
            expected = logsigmoid_bpr_loss(*leaves)
            agreement.compare(loss, expected, len(batch[0]))
            for s, gradient in zip(scores, torch.autograd.grad(expected, leaves)):
                agreement.compare(s.grad, gradient, 1)
            _, (scores,) = all_pairs.step()
            if step % MEASURED == 0 or step == steps:
                compare_rows(factors(softmax.model), batch[1][:ROWS], agreement_of_rows)
            softmax.step()
            sampled.step()
            if step % MEASURED == 0 or step == steps:
                compare_few(scores[:FEW], split.train[users[:FEW]], agreement_of_lists)
                for v in variants:
                    v.curve.append((step, measure(v.model)[0]))
            progress.update(task, advance=1, note=f"loss {bpr.losses[-1]:.4f}")

    few = start.all_items(everyone[:FEW]).detach().requires_grad_()
    liked = split.train[:FEW]
    runs = {
        "ours": partial(forward_and_backward, custom_ops.pairwise_logistic_loss, few, liked),
        "theirs": partial(forward_and_backward, lambda s, y: plain_logistic_loss(s, s, y), few, liked),
    }
    times = milliseconds(runs, 1 if options.quick else 3)
    memory = {who: peak_bytes(run, few.device) / 2**20 for who, run in runs.items()}

    popularity = split.train.sum(0).float().expand(split.train.shape)
    chance = torch.rand(split.train.shape, generator=torch.Generator().manual_seed(options.seed))
    qualities = {"random": quality(chance, split), "most liked by all": quality(popularity, split)}
    qualities |= {v.name: measure(v.model) for v in variants}

    result = Report("Recommending: MovieLens 100K", ("", f"NDCG@{K}", f"recall@{K}", "remark"))
    group = "Recommender of films (MovieLens), beside the table of all pairs"
    what = f"loss of {FEW} users, all {split.train.shape[1]:,} films"
    for unit, values in (("ms", times), ("MiB", memory)):
        result.gains.append(Gain(what, unit, *values.values(), group))
    pairs_of_a_user = (split.train.sum(1) * (~split.train).sum(1)).float().mean().item()
    remarks = {
        bpr.name: f"{bpr.milliseconds:.1f} ms a step of {BATCH:,} pairs (median)",
        all_pairs.name: f"{all_pairs.milliseconds:.1f} ms a step of {USERS * pairs_of_a_user:,.0f} pairs",
        softmax.name: f"{softmax.milliseconds:.1f} ms a step of {ROWS:,} liked films, each among all",
        sampled.name: f"{sampled.milliseconds:.1f} ms a step of {SAMPLE:,} liked films, each among these",
    }
    for name, (ndcg, recall) in qualities.items():
        result.rows.append((name, f"{ndcg:.3f}", f"{recall:.3f}", remarks.get(name, "")))
    result.checks += [agreement.check(), agreement_of_lists.check(), agreement_of_rows.check()]
    if not options.quick:
        for v in variants:
            gain = qualities[v.name][0] - qualities["most liked by all"][0]
            result.checks.append(Check(f"NDCG@{K} of `{v.name}` above the most liked", gain, LEAST_GAIN, at_least=True))
    result.pictures.append(draw(variants, qualities, options.out / "recommending.png"))
    return result


def compare_few(scores: Tensor, liked: Tensor, into: Agreement) -> None:
    scores = scores.detach().requires_grad_()
    compare(*forward_and_backward(custom_ops.pairwise_logistic_loss, scores, liked), plain_logistic_loss, scores,
            liked, into)  # fmt: skip


def compare_rows(arguments: Scores, target: Tensor, into: Agreement) -> None:
    ours, theirs = ([t.detach().double().requires_grad_() for t in arguments] for _ in range(2))
    loss = custom_ops.linear_cross_entropy(*ours[:2], target, linear_bias=ours[2])
    expected = nn.functional.cross_entropy(nn.functional.linear(*theirs), target)
    found, right = torch.autograd.grad(loss, ours), torch.autograd.grad(expected, theirs)
    into.compare_networks((loss, found), (expected, right), len(target))


def draw(variants: Sequence[Variant], qualities: dict[str, tuple[float, float]], path: Path) -> Path:
    figure = report.new_figure(3, title="Recommending films of MovieLens 100K: matrix factorisation")
    curves, progress, bars = figure.axes
    colours = {v.name: colour for v, colour in zip(variants, COLOURS)}

    for v in variants:
        curves.plot(v.losses, color=colours[v.name], label=v.name)
        progress.plot(*zip(*v.curve), color=colours[v.name], label=v.name)
    curves.set(xlabel="step", ylabel="loss, mean over pairs or films", title="Training loss")
    curves.legend(frameon=False)
    progress.axhline(qualities["most liked by all"][0], color=NEUTRAL, label="most liked by all")
    progress.set(xlabel="step", ylabel=f"NDCG@{K}, mean over users", title="Held-out films")
    progress.legend(frameon=False)

    names = [name.replace(", ", "\n").replace(" by ", "\nby ") for name in qualities]
    places = np.arange(len(names))
    for i, (label, hatch) in enumerate(((f"NDCG@{K}", ""), (f"recall@{K}", "//"))):
        heights = [values[i] for values in qualities.values()]
        found = bars.bar(places + 0.4 * i, heights, 0.38, hatch=hatch, edgecolor="white", label=label)
        for bar, name in zip(found, qualities):
            bar.set_facecolor(colours.get(name, NEUTRAL))
        bars.bar_label(found, fmt="%.3f", padding=2, fontsize=7)
    bars.set_xticks(places + 0.2, names, fontsize=8)
    bars.set(title="Held-out films, at the end")
    bars.margins(y=0.3)  # leaves room for the numbers and the legend
    legend = bars.legend(frameon=False, loc="upper left")
    for handle in legend.legend_handles:
        handle.set_facecolor(NEUTRAL)
    figure.savefig(path)
    return path


PARTS = {"recommending": Part(example, ("movielens",))}


def main(argv: Sequence[str] | None = None) -> int:
    return report.run(PARTS, "python -m examples.recommend_ml100k", "Recommending films.", argv)


if __name__ == "__main__":
    raise SystemExit(main())
