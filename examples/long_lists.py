"""Losses of long lists beside the usual formula, which holds the table of all pairs, eager and compiled.

The example measures time and peak memory, forward and backward, for lists of 1,000 to 4,000 documents with five labels.
The plain formula makes several tables of documents by documents; ours makes none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import softplus

import custom_ops
from benchmarks.memory import peak_bytes
from examples import report
from examples.agreement import Agreement
from examples.report import OURS, THEIRS, Gain, Options, Part, Report, milliseconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZES = (1000, 2000, 4000)
LISTS = 2
LOG2 = 0.6931471805599453
COLOURS = {"custom_ops": OURS, "plain, eager": THEIRS, "plain, compiled": "#b4452f"}

# A plain loss takes the scores twice, then the labels. The better document of a pair takes its score from the first
# argument, the worse one from the second. The gradient is the sum of both arguments' gradients. All terms of the first
# are negative and all of the second positive, so the difference of the two is the sum of the magnitudes.
PlainLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain_logistic_loss(better: Tensor, worse: Tensor, labels: Tensor) -> Tensor:
    """RankNet sums log(1 + exp(-d)) over all pairs with different labels, where d is the difference of their scores."""
    pairs = labels[..., :, None] > labels[..., None, :]
    loss = softplus(worse[..., None, :] - better[..., :, None])
    return torch.where(pairs, loss, 0).sum((-1, -2)).mean()


def plain_lambda_loss(better: Tensor, worse: Tensor, labels: Tensor) -> Tensor:
    """LambdaRank weights each pair by the change of NDCG if the two documents were swapped.

    A list without a relevant document, such as one of padding only, is 0 and isn't counted in the mean.
    """
    n = labels.shape[-1]
    rank = better.detach().argsort(dim=-1, descending=True, stable=True).argsort(-1)
    discount = 1 / torch.log2(rank + 2)
    gain = 2.0 ** labels.clamp_min(0) - 1  # a padded document has the label -1
    best = (gain.sort(-1, descending=True).values / torch.log2(torch.arange(n) + 2)).sum(-1)
    gain = gain / best.clamp_min(1)[..., None]
    weight = (gain[..., :, None] - gain[..., None, :]) * (discount[..., :, None] - discount[..., None, :]).abs()
    pairs = (labels[..., :, None] > labels[..., None, :]) & (labels[..., None, :] >= 0)
    loss = torch.where(pairs, weight * softplus(worse[..., None, :] - better[..., :, None]), 0).sum((-1, -2)) / LOG2
    return loss.sum() / pairs.any(-1).any(-1).sum().clamp_min(1)


def compare(ours: Tensor, gradient: Tensor, plain: PlainLoss, scores: Tensor, labels: Tensor, into: Agreement) -> None:
    """Compare a loss and its gradient with respect to the scores with those of the plain formula."""
    leaves = [scores.detach().clone().requires_grad_() for _ in range(2)]
    loss = plain(*leaves, labels)
    better, worse = torch.autograd.grad(loss, leaves)
    n = labels.shape[-1]
    into.compare(ours, loss, labels.numel() * n)
    into.compare(gradient, better + worse, n, worse - better)


CONTENDERS: dict[str, tuple[Callable[..., Tensor], PlainLoss]] = {
    "RankNet": (custom_ops.pairwise_logistic_loss, plain_logistic_loss),
    "LambdaRank": (custom_ops.lambda_loss, plain_lambda_loss),
}


def example(options: Options) -> Report:
    generator = torch.Generator().manual_seed(options.seed)
    sizes = (100, 200) if options.quick else SIZES
    names = [name for name in COLOURS if options.compiled or "compiled" not in name]
    result = Report("List losses: long lists", ("", "documents", *names))
    agreement = Agreement("losses of long lists and their gradients beside the plain formulas")
    times: dict[str, dict[int, dict[str, float]]] = {name: {} for name in CONTENDERS}
    memory: dict[str, dict[int, dict[str, float]]] = {name: {} for name in CONTENDERS}
    with options.progress() as progress:
        task = progress.add_task("Long lists", total=len(CONTENDERS) * len(sizes), note="")
        for name, (ours, plain) in CONTENDERS.items():
            losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
                "custom_ops": ours,
                "plain, eager": lambda s, y, plain=plain: plain(s, s, y),
            }
            if options.compiled:
                compiled = torch.compile(plain, backend="aot_eager" if options.quick else "inductor", dynamic=True)
                losses["plain, compiled"] = lambda s, y, compiled=compiled: compiled(s, s, y)
            for n in sizes:
                progress.update(task, note=f"{name}, {n:,} documents")
                scores = torch.randn(LISTS, n, generator=generator).requires_grad_()
                labels = torch.randint(5, (LISTS, n), generator=generator)
                runs = {who: partial(forward_and_backward, loss, scores, labels) for who, loss in losses.items()}
                compare(*runs["custom_ops"](), plain, scores, labels, agreement)
                times[name][n] = milliseconds(runs, 3)
                memory[name][n] = {who: peak_bytes(run, scores.device) / 2**20 for who, run in runs.items()}
                for unit, values in (("ms", times[name][n]), ("MiB", memory[name][n])):
                    result.rows.append((name, f"{n:,}", *(report.shown(v, unit) for v in values.values())))
                progress.update(task, advance=1)
    largest = sizes[-1]
    group = f"Ranking losses of {LISTS} lists of {largest:,} documents, beside plain PyTorch"
    for name in CONTENDERS:
        for unit, values in (("ms", times[name][largest]), ("MiB", memory[name][largest])):
            mine, *others = values
            for other in others:
                what = f"{name}, {other.removeprefix('plain, ')}"
                result.gains.append(Gain(what, unit, values[mine], values[other], group))
    result.checks.append(agreement.check())
    result.panels = [
        partial(draw, measured=times["LambdaRank"], unit="ms", title="A ranking loss of long lists: time"),
        partial(draw, measured=memory["LambdaRank"], unit="MiB", title="A ranking loss of long lists: memory"),
    ]
    return result


def forward_and_backward(
    loss_fn: Callable[[Tensor, Tensor], Tensor], scores: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    loss = loss_fn(scores, labels)
    return loss, torch.autograd.grad(loss, scores)[0]


def draw(axis: Axes, measured: dict[int, dict[str, float]], unit: str, title: str) -> None:
    sizes = list(measured)
    for name in measured[sizes[0]]:
        values = [measured[n][name] for n in sizes]
        axis.loglog(sizes, values, "o-", color=COLOURS[name])
        label = f"{name}: {report.shown(values[-1], unit)}"
        axis.annotate(label, (sizes[-1], values[-1]), (7, 0), "data", "offset points", va="center", color=COLOURS[name])
    axis.set_xticks(sizes, [f"{n:,}" for n in sizes])
    axis.minorticks_off()
    axis.set_xlim(sizes[0] * 0.9, sizes[-1] * 3)  # leaves room for the names
    axis.set(xlabel="documents in a list", ylabel=unit, title=f"{title}\n(LambdaRank, {LISTS} lists, with backward)")


PARTS = {"lists": Part(example)}


def main(argv: Sequence[str] | None = None) -> int:
    return report.run(PARTS, "python -m examples.long_lists", "Losses of long lists.", argv, "Long lists")


if __name__ == "__main__":
    raise SystemExit(main())
