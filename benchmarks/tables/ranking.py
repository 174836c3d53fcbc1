"""Tables of the ranking losses, beside plain PyTorch, eager and compiled, and other libraries' losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.table import Benchmark, Target
from custom_ops.registry import FUNCTIONS

SHAPES = ((64, 128), (16, 1024), (4, 4096))
Peers = dict[str, Callable[..., Any] | str]


def _plain(name: str) -> Peers:
    reference = FUNCTIONS[name].reference
    assert reference is not None
    return {"plain PyTorch": reference}


def _lists_of_five_levels(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(shape, generator=generator), torch.randint(0, 5, shape, generator=generator)
    return scores.to(device).requires_grad_(), labels.to(device)


def _lists(peers: Peers, peer: str = "", times: Sequence[float] = (), **kwargs: Any) -> list[Benchmark]:
    """Return the tables of a list loss; at each shape it is to be ``times`` as fast as ``peer``.

    A loss that no other library has is compared with its reference, at the first shape only.
    """
    sizes = SHAPES if times or len(peers) > 1 else SHAPES[:1]
    targets = [Target(shape, peer, 1 / t) for shape, t in zip(SHAPES, times, strict=bool(times))]
    return [Benchmark(sizes, _lists_of_five_levels, peers, "scores, of five labels", targets, kwargs)]


def _pairs(peers: Peers, tensors: int, sizes: Sequence[int], targets: Sequence[Target] = ()) -> list[Benchmark]:
    def make(n: int, device: torch.device) -> tuple[Tensor, ...]:
        return tuple(torch.randn(n, device=device, requires_grad=True) for _ in range(tensors))

    return [Benchmark(sizes, make, peers, "pairs", targets)]


def _signed_pairs(n: int, device: torch.device) -> tuple[Any, ...]:
    first, second = (torch.randn(n, device=device, requires_grad=True) for _ in range(2))
    return first, second, torch.randn(n, device=device).sign(), 0.5


def _items(name: str) -> list[Benchmark]:
    return [
        Benchmark(
            unit="lists, items",
            sizes=SHAPES,
            make=lambda shape, device: (torch.randn(shape, device=device, requires_grad=True),),
            kwargs={"regularization": regularization},
            peers={f"torchsort, {regularization}": f"benchmarks.torchsort_peers:{name}_{regularization}"},
            targets=[Target(shape, f"torchsort, {regularization}", 1 / 2.5) for shape in SHAPES],
        )
        for regularization in ("l2", "kl")
    ]


def _cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(scores, labels.to(scores.dtype).softmax(-1))


def _catalogue(peers: Peers, targets: Sequence[Target] = ()) -> list[Benchmark]:
    """Return the table of a loss over a catalogue, of (rows, dimensions, words)."""

    def make(size: tuple[int, int, int], device: torch.device) -> tuple[Tensor, ...]:
        rows, dims, words = size
        x = torch.randn(rows, dims, device=device, requires_grad=True)
        weight = (0.1 * torch.randn(words, dims, device=device)).requires_grad_()
        return x, weight, torch.randint(words, (rows,), device=device)

    sizes = ((512, 64, 1000), (4096, 64, 16_000), (2048, 256, 32_000))
    return [Benchmark(sizes, make, peers, "rows, dimensions, words", targets)]


def _logits_in_memory(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(x @ weight.T, target)


def _log_prob_in_memory(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return -torch.nn.functional.cross_entropy(x @ weight.T, target, reduction="none")


def _in_chunks(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    functional, nn = torch.nn.functional, torch.nn
    if not hasattr(functional, "linear_cross_entropy"):
        raise NotImplementedError("this torch has no linear_cross_entropy")
    return functional.linear_cross_entropy(x, weight, target, options=nn.LinearCrossEntropyOptions())


def _similarities_in_memory(query: Tensor, key: Tensor) -> Tensor:
    z = query @ key.T / 0.1
    own = torch.arange(len(query), device=query.device)
    return (torch.nn.functional.cross_entropy(z, own) + torch.nn.functional.cross_entropy(z.T, own)) / 2


def _pairs_in_memory(query: Tensor, key: Tensor) -> Tensor:
    z = query @ key.T / 0.1 - 10
    signs = 2 * torch.eye(len(query), device=query.device) - 1
    return -torch.nn.functional.logsigmoid(signs * z).sum() / len(query)


def _pairs_of_rows(size: tuple[int, int], device: torch.device) -> tuple[Tensor, ...]:
    query, key = (torch.nn.functional.normalize(torch.randn(size, device=device), dim=-1) for _ in range(2))
    return query.requires_grad_(), key.requires_grad_()


_BESIDE_REFERENCE = (
    "softmax_loss",
    "unique_softmax_loss",
    "cosent_loss",
    "pairwise_soft_zero_one_loss",
    "pairwise_exponential_loss",
    "pairwise_mse_loss",
    "approx_mrr_loss",
    "smooth_ap_loss",
    "spearman_loss",
)
TABLES: dict[str, list[Benchmark]] = {name: _lists(_plain(name)) for name in _BESIDE_REFERENCE} | {
    "lambda_loss": [
        table
        for weighting in ("lambdarank", "ndcg2pp")
        for table in _lists(
            {f"allRank {weighting}": f"benchmarks.allrank_peers:{weighting}"},
            f"allRank {weighting}",
            (20, 120, 200),
            weighting=weighting,
        )
    ],
    "list_net_loss": _lists(
        {"allRank": "benchmarks.allrank_peers:list_net", "F.cross_entropy": _cross_entropy},
        "F.cross_entropy",
        (1, 1, 1),
    ),
    "list_mle_loss": _lists(
        {
            "allRank": "benchmarks.allrank_peers:list_mle",
            "allRank, compiled": "benchmarks.allrank_peers:compiled_list_mle",
        },
        "allRank, compiled",
        (4, 4, 4),
    ),
    "neural_sort_ndcg_loss": _lists(
        {
            "plain PyTorch": "benchmarks.peers:neural_sort_ndcg_loss",
            "plain PyTorch, compiled": "benchmarks.peers:compiled_neural_sort_ndcg_loss",
            "allRank": "benchmarks.allrank_peers:neural_ndcg",
        }
    ),
    "pairwise_logistic_loss": _lists(
        {
            "plain PyTorch": "benchmarks.peers:pairwise_logistic_loss",
            "plain PyTorch, compiled": "benchmarks.peers:compiled_pairwise_logistic_loss",
            "pytorchltr": "benchmarks.pytorchltr_peers:logistic",
            "allRank rankNet": "benchmarks.allrank_peers:rank_net",
        },
        "plain PyTorch, compiled",
        (5, 20, 30),
    ),
    "pairwise_hinge_loss": _lists(
        {"plain PyTorch": "benchmarks.peers:pairwise_hinge_loss", "pytorchltr": "benchmarks.pytorchltr_peers:hinge"},
        "plain PyTorch",
        (7, 150, 500),
    ),
    "approx_ndcg_loss": _lists(
        {
            "allRank": "benchmarks.allrank_peers:approx_ndcg",
            "allRank, compiled": "benchmarks.allrank_peers:compiled_approx_ndcg",
        },
        "allRank, compiled",
        (20, 80, 100),
        temperature=1.0,
    ),
    "linear_log_prob": _catalogue(
        {"F.cross_entropy": _log_prob_in_memory} | _plain("linear_log_prob"),
        [
            Target((512, 64, 1000), "F.cross_entropy", 1.1),
            Target((4096, 64, 16_000), "F.cross_entropy", 0.8),
            Target((2048, 256, 32_000), "F.cross_entropy", 1.05),
        ],
    ),
    "linear_cross_entropy": _catalogue(
        {"F.cross_entropy": _logits_in_memory, "F.linear_cross_entropy": _in_chunks},
        [
            Target((512, 64, 1000), "F.cross_entropy", 1.1),
            Target((4096, 64, 16_000), "F.cross_entropy", 0.55),
            Target((2048, 256, 32_000), "F.cross_entropy", 0.85),
        ],
    ),
    "info_nce_loss": [
        Benchmark(
            ((1024, 256), (16_384, 256)),
            _pairs_of_rows,
            {"F.cross_entropy in both directions": _similarities_in_memory},
            "pairs, dimensions",
            [
                Target((1024, 256), "F.cross_entropy in both directions", 1.1),
                Target((16_384, 256), "F.cross_entropy in both directions", 0.54),
            ],
            kwargs={"temperature": 0.1},
        )
    ],
    "sigmoid_contrastive_loss": [
        Benchmark(
            ((1024, 256), (16_384, 256)),
            _pairs_of_rows,
            {"F.logsigmoid": _pairs_in_memory},
            "pairs, dimensions",
            kwargs={"temperature": 0.1, "bias": -10.0},
        )
    ],
    "margin_ranking_loss": [
        Benchmark(
            unit="pairs",
            sizes=(10_000, 1_000_000, 10_000_000),
            make=_signed_pairs,
            peers={
                "F.margin_ranking_loss": torch.nn.functional.margin_ranking_loss,
                "torch.compile(F.margin_ranking_loss)": "benchmarks.peers:compiled_margin_ranking_loss",
            },
            targets=[
                Target(1_000_000, "F.margin_ranking_loss", 1 / 8),
                Target(10_000_000, "F.margin_ranking_loss", 1 / 10),
                Target(10_000_000, "torch.compile(F.margin_ranking_loss)", 1 / 6),
            ],
        )
    ],
    "bpr_loss": _pairs(
        {name: f"benchmarks.peers:{name}" for name in ("logsigmoid_bpr_loss", "compiled_bpr_loss")},
        2,
        (10_000, 1_000_000),
        [Target(1_000_000, "logsigmoid_bpr_loss", 1 / 2)],
    ),
    "bradley_terry_loss": _pairs(_plain("bradley_terry_loss"), 3, (1_000_000,)),
    "dpo_loss": _pairs(_plain("dpo_loss"), 4, (1_000_000,)),
    "soft_rank": _items("soft_rank"),
    "soft_sort": _items("soft_sort"),
}
NATIVE: dict[str, Callable[..., Any]] = {
    "list_net_loss": _cross_entropy,
    "margin_ranking_loss": lambda x1, x2, target, margin, reduction: torch.nn.functional.margin_ranking_loss(
        x1, x2, target, margin, reduction=reduction
    ),
    "bpr_loss": lambda positive, negative: -torch.nn.functional.logsigmoid(positive - negative).mean(),
    "soft_sort": lambda x: x.sort().values,
}
