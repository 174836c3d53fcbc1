"""The metrics equal scikit-learn's, and the mean over all orders of tied items."""

from __future__ import annotations

import doctest
import functools
import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    average_precision_score,
    dcg_score,
    label_ranking_average_precision_score,
    ndcg_score,
    roc_auc_score,
)

import custom_ops

METRICS = [custom_ops.ndcg, custom_ops.mrr, custom_ops.average_precision]
CUT = [  # the metrics with cutoffs and an average over ties
    *METRICS,
    custom_ops.dcg,
    custom_ops.precision,
    custom_ops.recall,
    custom_ops.f1_score,
    custom_ops.hit_rate,
]
ALL = {metric.__name__: metric for metric in [*CUT, custom_ops.r_precision, custom_ops.auc]}
ALL["err"] = functools.partial(custom_ops.err, max_label=3)


def by_hand(name, scores, labels, k):
    """Return a metric of one list without ties, from its definition."""
    y = [label for _, label in sorted(zip(scores, labels), key=lambda item: -item[0])]
    total, places = sum(a > 0 for a in y), len(y) if k is None else k
    hits = sum(a > 0 for a in y[:k])
    if name == "auc":
        pairs = [(i, j) for i in range(len(y)) for j in range(len(y)) if y[i] > 0 >= y[j]]
        return sum(i < j for i, j in pairs) / len(pairs)
    if name == "err":
        stops = [(2**a - 1) / 8 for a in y]
        return sum(stops[r] * math.prod(1 - p for p in stops[:r]) / (r + 1) for r in range(len(y[:k])))
    ranks = [r for r, a in enumerate(y[:k], 1) if a > 0]
    dcg, ideal = (
        sum((2**a - 1) / math.log2(1 + r) for r, a in enumerate(z[:k], 1)) for z in (y, sorted(y, reverse=True))
    )
    return {
        "ndcg": dcg / ideal,
        "dcg": dcg,
        "mrr": 1 / ranks[0] if ranks else 0,
        "average_precision": sum((i + 1) / r for i, r in enumerate(ranks)) / min(total, places),
        "precision": hits / places,
        "recall": hits / total,
        "f1_score": 2 * hits / (places + total),
        "hit_rate": float(hits > 0),
        "r_precision": sum(a > 0 for a in y[:total]) / total,
    }[name]


def draw(batch, n, seed=0, levels=None):
    """Return scores, of ``levels`` values if given, and labels 0 to 2 with at least one relevant item."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, n, generator=generator, dtype=torch.float64)
    if levels:
        scores = torch.randint(levels, (batch, n), generator=generator).double()
    labels = torch.randint(3, (batch, n), generator=generator)
    labels[:, 0] = 1
    return scores, labels


@pytest.mark.parametrize("k", [None, 1, 3, 100])
@pytest.mark.parametrize("levels", [None, 3])
def test_ndcg_equals_scikit_learns(k, levels):
    scores, labels = draw(7, 20, levels=levels)
    expected = ndcg_score(labels.numpy(), scores.numpy(), k=k)
    assert custom_ops.ndcg(scores, labels, k, gain="linear").item() == pytest.approx(expected, rel=1e-12)
    exponential = ndcg_score(2.0 ** labels.numpy() - 1, scores.numpy(), k=k)
    assert custom_ops.ndcg(scores, labels, k).item() == pytest.approx(exponential, rel=1e-12)
    if levels is None:
        assert custom_ops.ndcg(scores, labels, k, ties="index").item() == pytest.approx(exponential, rel=1e-12)


@pytest.mark.parametrize("levels", [None, 3])
def test_average_precision_equals_scikit_learns(levels):
    scores, labels = draw(7, 20, levels=levels)
    expected = [average_precision_score(y > 0, s) for s, y in zip(scores.numpy(), labels.numpy())]
    ours = custom_ops.average_precision(scores, labels, ties="together", reduction="none")
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


@pytest.mark.parametrize("levels", [None, 3])
def test_mrr_equals_scikit_learns_label_ranking_average_precision(levels):
    scores, _ = draw(7, 20, levels=levels)
    labels = torch.nn.functional.one_hot(torch.arange(7) * 2, 20)
    expected = label_ranking_average_precision_score(labels.numpy(), scores.numpy())
    assert custom_ops.mrr(scores, labels, ties="together").item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_each_metric_is_its_definition_on_each_backend_and_in_each_form_of_lists(each_backend, name):
    """Lists come padded, jagged and by the numbers of their queries, with one cutoff or several at once."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([9, 4, 6, 1])
    scores, labels = torch.randn(4, 9, generator=generator), torch.randint(0, 4, (4, 9), generator=generator)
    labels[:3, 0], labels[:3, 1], labels[3, 0] = 1, 0, 0
    metric, ks = ALL[name], (1, 3, None, 7)
    cut = {} if name in ("auc", "r_precision") else {"k": ks}
    columns = ks if cut else (None,)
    lists = [(s[:n].tolist(), y[:n].tolist()) for s, y, n in zip(scores, labels, lengths)]
    expected = torch.tensor([[by_hand(name, *one, k) for k in columns] for one in lists[:3]] + [[0.0] * len(columns)])
    expected = expected if cut else expected.squeeze(-1)

    def same(ours, expected):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)

    options = {"lengths": lengths, **cut}
    same(metric(scores, labels, reduction="none", **options), expected)
    same(metric(scores, labels, **options), expected[:3].mean(0))
    same(metric(scores, labels, reduction="sum", **options), expected.sum(0))
    valid = torch.arange(9) < lengths[:, None]
    same(metric(scores, labels, reduction="none", mask=valid, **cut), expected)
    flat = {"scores": scores[valid], "labels": labels[valid]}
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    weights = torch.tensor([1.0, 3.0, 0.0, 2.0])
    same(metric(**flat, cu_lengths=bounds, reduction="none", **cut), expected)
    same(metric(**flat, cu_lengths=bounds, weights=weights, **cut), (expected[0] + 3 * expected[1]) / 4)
    same(
        metric(**flat, cu_lengths=bounds, weights=weights, reduction="none", **cut),
        torch.einsum("l,l...->l...", weights, expected),
    )
    shuffled = torch.randperm(len(flat["scores"]), generator=generator)
    queries = torch.arange(40, 44).repeat_interleave(lengths)[shuffled]
    mixed = {key: x[shuffled] for key, x in flat.items()}
    same(metric(**mixed, index=queries, reduction="none", **cut), expected)
    dropped = metric(**mixed, index=queries, mask=queries != 42, **cut)
    same(dropped, expected[:2].mean(0))
    for empty in (0.0, 1.0, math.nan):
        filled = torch.cat([expected[:3], torch.full_like(expected[3:], empty)])
        torch.testing.assert_close(
            metric(scores, labels, empty=empty, reduction="none", **options), filled, equal_nan=True
        )
        torch.testing.assert_close(metric(scores, labels, empty=empty, **options), filled.mean(0), equal_nan=True)
    assert metric(scores, labels, weights=weights, empty=math.nan, **options).isnan().all()
    weights = torch.tensor([1.0, 0.0, 0.0, 0.0])  # a list of weight 0 doesn't count, whatever its value is
    same(metric(scores, labels, weights=weights, empty=math.nan, **options), expected[0])
    scores[1, 2] = math.nan
    assert metric(scores, labels, reduction="none", **options).isnan().view(4, -1).any(-1).tolist() == [0, 1, 0, 0]
    assert not metric(scores, labels, weights=weights, reduction="none", **options).isnan().any()


@pytest.mark.parametrize("levels", [None, 3])
def test_auc_and_dcg_equal_scikit_learns(levels):
    scores, labels = draw(7, 20, levels=levels)
    expected = [roc_auc_score(y > 0, s) for s, y in zip(scores.numpy(), labels.numpy())]
    np.testing.assert_allclose(custom_ops.auc(scores, labels, reduction="none"), expected, rtol=1e-12)
    for k in (None, 3):
        expected = dcg_score(labels.numpy(), scores.numpy(), k=k, log_base=3)
        ours = custom_ops.dcg(scores, labels, k, gain="linear", discount=lambda rank: math.log(3) / (1 + rank).log())
        assert ours.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.full
@pytest.mark.parametrize(("action", "empty"), [("skip", None), ("neg", 0.0), ("pos", 1.0)])
def test_metrics_by_query_numbers_equal_torchmetrics(action, empty):
    retrieval = pytest.importorskip("torchmetrics.retrieval", reason="torchmetrics isn't here: python tests/peers.py")
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(40).repeat_interleave(12)[torch.randperm(480, generator=generator)]
    scores, grades = torch.rand(480, generator=generator), torch.randint(0, 4, (480,), generator=generator)
    grades[index == 3] = 0
    relevant = (grades > 1).long()
    for theirs, ours, labels, k in [
        (retrieval.RetrievalPrecision, custom_ops.precision, relevant, 5),
        (retrieval.RetrievalRecall, custom_ops.recall, relevant, 5),
        (retrieval.RetrievalHitRate, custom_ops.hit_rate, relevant, 2),
        (retrieval.RetrievalRPrecision, custom_ops.r_precision, relevant, None),
        (retrieval.RetrievalMAP, custom_ops.average_precision, relevant, None),
        (retrieval.RetrievalMRR, custom_ops.mrr, relevant, 3),
        (retrieval.RetrievalAUROC, custom_ops.auc, relevant, None),
        (retrieval.RetrievalNormalizedDCG, functools.partial(custom_ops.ndcg, gain="linear"), grades, 5),
    ]:
        metric = theirs(empty_target_action=action, **({} if k is None else {"top_k": k}))
        metric.update(scores, labels, indexes=index)
        value = ours(scores, labels, index=index, empty=empty, **({} if k is None else {"k": k}))
        torch.testing.assert_close(value, metric.compute(), rtol=1e-5, atol=1e-6)


def _judged():
    """Return scores and grades, and both as the nested dictionaries that tools of information retrieval take."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(30, 25, generator=generator, dtype=torch.float64)
    grades = torch.randint(0, 4, (30, 25), generator=generator) * (torch.rand(30, 25, generator=generator) < 0.4)
    run, judgments = (
        {f"{q:02}": {str(d): value for d, value in enumerate(row)} for q, row in enumerate(values.tolist())}
        for values in (scores, grades)
    )
    return scores, grades, run, judgments


_AT_K = {
    "P": custom_ops.precision,
    "recall": custom_ops.recall,
    "success": custom_ops.hit_rate,
    "ndcg_cut": functools.partial(custom_ops.ndcg, gain="linear"),
}
_OF_ALL = {
    "Rprec": custom_ops.r_precision,
    "recip_rank": custom_ops.mrr,
    "map": custom_ops.average_precision,
    "ndcg": functools.partial(custom_ops.ndcg, gain="linear"),
}


@pytest.mark.full
def test_metrics_equal_trec_eval():
    pytrec_eval = pytest.importorskip("pytrec_eval", reason="pytrec_eval isn't installed: pip install -e '.[peers]'")
    scores, grades, run, judgments = _judged()
    grades[4] = 0
    judgments["04"] = dict.fromkeys(judgments["04"], 0)
    cuts = (1, 5, 10, 100)
    wanted = {f"{name}_{','.join(map(str, cuts))}" for name in (*_AT_K, "map_cut")} | set(_OF_ALL)
    found = pytrec_eval.RelevanceEvaluator(judgments, wanted).evaluate(run)

    def theirs(name):
        return torch.tensor([found[query][name] for query in sorted(found)], dtype=torch.float64)

    options = {"empty": 0.0, "reduction": "none"}
    for name, metric in _OF_ALL.items():
        torch.testing.assert_close(metric(scores, grades, **options), theirs(name))
    relevant = (grades > 0).sum(-1)
    for k in cuts:
        for name, metric in _AT_K.items():
            torch.testing.assert_close(metric(scores, grades, k, **options), theirs(f"{name}_{k}"))
        of_all = custom_ops.average_precision(scores, grades, k, **options) * relevant.clamp(max=k) / relevant
        torch.testing.assert_close(of_all.nan_to_num(), theirs(f"map_cut_{k}"))


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # those of numba
def test_metrics_equal_ranx():
    ranx = pytest.importorskip("ranx", reason="ranx isn't installed: pip install -e '.[peers]'")
    scores, grades, run, judgments = _judged()
    judged = ranx.Qrels({query: {d: y for d, y in items.items() if y} for query, items in judgments.items()})
    linear = {"gain": "linear"}
    for name, metric, k, options in [
        ("precision@5", custom_ops.precision, 5, {}),
        ("recall@5", custom_ops.recall, 5, {}),
        ("hit_rate@3", custom_ops.hit_rate, 3, {}),
        ("f1@5", custom_ops.f1_score, 5, {}),
        ("r-precision", custom_ops.r_precision, None, {}),
        ("mrr", custom_ops.mrr, None, {}),
        ("map", custom_ops.average_precision, None, {}),
        ("ndcg@5", custom_ops.ndcg, 5, linear),
        ("ndcg_burges@5", custom_ops.ndcg, 5, {}),
        ("dcg@5", custom_ops.dcg, 5, linear),
        ("dcg_burges@5", custom_ops.dcg, 5, {}),
    ]:
        theirs = ranx.evaluate(judged, ranx.Run(run), name, return_mean=False)
        limit = {} if k is None else {"k": k}
        np.testing.assert_allclose(
            metric(scores, grades, reduction="none", **limit, **options), theirs, rtol=1e-12, err_msg=name
        )


def test_gains_and_discounts_of_ones_own():
    scores, labels = draw(4, 7)
    for metric in (custom_ops.ndcg, custom_ops.dcg):
        by_name = metric(scores, labels, (2, None))
        by_function = metric(
            scores, labels, (2, None), gain=lambda y: 2.0**y - 1, discount=lambda rank: 1 / (1 + rank).log2()
        )
        torch.testing.assert_close(by_function, by_name)
        assert torch.equal(metric(scores, labels, 2, discount=lambda rank: 0 * rank), torch.zeros(()).double())
        with pytest.raises(ValueError, match=r"gain: expected a real result of shape \[4, 7\], got \[4\]"):
            metric(scores, labels, gain=lambda y: y[:, 0])
        with pytest.raises(TypeError, match="discount: expected a function, got str"):
            metric(scores, labels, discount="log2")
        with pytest.raises(ValueError, match="gain: expected one of 'exponential', 'linear', got 'x'"):
            metric(scores, labels, gain="x")


def test_wrong_query_numbers_and_cutoffs():
    x = torch.ones(3)
    for options, message in {
        "index: expected integers, got float32": {"index": x},
        r"index: expected shape \[3\], got \[2\]": {"index": torch.tensor([0, 1])},
        "index: expected neither lengths nor cu_lengths": {"index": torch.arange(3), "lengths": torch.tensor(3)},
        r"weights: expected shape \[2\], got \[3\]": {"index": torch.tensor([7, 2, 7]), "weights": x},
        "k: expected at least 1, got 0": {"k": (1, 0)},
        "k: expected an integer or None, got str": {"k": "10"},
        "empty: expected a number, got str": {"empty": "skip"},
    }.items():
        with pytest.raises((TypeError, ValueError), match=options):
            custom_ops.ndcg(x, x, **message)
    with pytest.raises(ValueError, match=r"index: expected scores \[n\] beside it, got shape \[1, 3\]"):
        custom_ops.ndcg(x[None], x[None], index=torch.arange(3))
    with pytest.raises(ValueError, match="max_label: expected a positive number, got 0"):
        custom_ops.err(x, x, max_label=0)
    assert custom_ops.ndcg(x, x, ()).shape == (0,)


@pytest.mark.parametrize("metric", [custom_ops.precision, custom_ops.f1_score])
def test_only_none_lets_all_places_count(each_backend, metric):
    scores, labels, ks = torch.tensor([0.5, 0.25]), torch.tensor([0, 1]), (2**31 - 1, 2**40)
    more = 1 if metric is custom_ops.f1_score else 0
    expected = torch.tensor([(1 + more) / (k + more) for k in ks])
    torch.testing.assert_close(metric(scores, labels, ks), expected, rtol=1e-6, atol=0)
    assert metric(scores, labels) == (1 + more) / (2 + more)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_no_item_at_all(each_backend, shape):
    x = torch.zeros(shape)
    for options in ({}, {"mask": x > 0}):
        assert custom_ops.ndcg(x, x, reduction="none", **options).tolist() == [0] * shape[0]


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_scores_and_query_numbers_of_any_integers(dtype):
    scores, labels = torch.tensor([1, 0, 1, 0, 1, 1]), torch.tensor([0, 2, 1, 1, 0, 1])
    expected = custom_ops.ndcg(scores.float(), labels)
    torch.testing.assert_close(custom_ops.ndcg(scores.to(dtype), labels), expected)
    queries = torch.tensor([7, 3, 7, 3, 3, 7])
    expected = custom_ops.ndcg(scores, labels, index=queries, reduction="none")
    for given in (queries.to(dtype), queries.to(dtype).numpy()):
        assert torch.equal(custom_ops.ndcg(scores.to(dtype), labels, index=given, reduction="none"), expected)


def test_unsigned_numbers_keep_their_order():
    large = torch.tensor([2**64 - 1, 0, 2**63, 2**63 - 1], dtype=torch.uint64)
    labels, order = torch.tensor([0, 1, 2, 0]), torch.tensor([3, 0, 2, 1])
    assert torch.equal(custom_ops.ndcg(large, labels), custom_ops.ndcg(order, labels))
    each = custom_ops.ndcg(torch.ones(4), labels, index=large, reduction="none")
    assert torch.equal(each, custom_ops.ndcg(torch.ones(4), labels, index=order, reduction="none"))


def test_arrays_that_run_backwards():
    scores, labels = torch.tensor([0.5, 0.25, 1.0]), torch.tensor([0, 1, 1])
    value = custom_ops.ndcg(scores, labels, index=np.array([4, 3, 3])[::-1], reduction="none")
    assert value.tolist() == [custom_ops.ndcg(scores[:2], labels[:2]), 1]


def test_metrics_can_be_vmapped_and_compiled():
    scores, labels = draw(6, 5, levels=3)
    expected = custom_ops.ndcg(scores, labels, (1, 3), reduction="none")
    vmapped = torch.vmap(lambda s, y: custom_ops.ndcg(s, y, (1, 3), reduction="none"))(scores, labels)
    torch.testing.assert_close(vmapped, expected)
    compiled = torch.compile(custom_ops.ndcg, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(scores, labels, (1, 3), reduction="none"), expected)


@pytest.mark.parametrize("metric", CUT)
def test_tie_averaging_is_the_mean_over_all_orders_of_the_tied(each_backend, metric):
    """All lists and orders go into one call, since each call of the interpreted kernels takes long."""
    scores, labels = draw(4, 4, 1, levels=2)
    orders = [list(order) for order in itertools.permutations(range(4))]
    ks = (None, 1, 2, 3)
    every = metric(scores[:, orders], labels[:, orders], ks, ties="index", reduction="none")
    torch.testing.assert_close(metric(scores, labels, ks, reduction="none"), every.mean(1), rtol=1e-12, atol=0)


def test_ties_by_index_keep_the_order_they_came_in():
    scores, labels = torch.zeros(4), torch.tensor([0, 0, 1, 0])
    assert custom_ops.mrr(scores, labels, ties="index").item() == pytest.approx(1 / 3)
    assert custom_ops.average_precision(scores, labels, ties="index").item() == pytest.approx(1 / 3)
    assert custom_ops.ndcg(scores, labels, ties="index").item() == pytest.approx(0.5)
    assert custom_ops.mrr(scores, labels, 2, ties="index") == 0
    assert custom_ops.mrr(scores, labels, ties="together").item() == pytest.approx(1 / 4)


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("ties", ["average", "index"])
@pytest.mark.parametrize("metric", METRICS)
def test_padding_by_mask_or_lengths_changes_nothing(metric, ties, k):
    scores, labels = draw(5, 8, levels=3)
    lengths = torch.tensor([8, 3, 1, 0, 5])
    mask = torch.arange(8) < lengths[:, None]
    alone = [metric(s[:n], y[:n], k, ties=ties) for s, y, n in zip(scores, labels, lengths)]
    scores[~mask], labels[~mask] = math.nan, 9
    for options in ({"mask": mask}, {"lengths": lengths}, {"mask": mask, "lengths": lengths}):
        ours = metric(scores, labels, k, ties=ties, reduction="none", **options)
        torch.testing.assert_close(ours, torch.stack(alone))
    shuffled = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    if ties == "average":
        scattered = metric(scores[:, shuffled], labels[:, shuffled], k, mask=mask[:, shuffled], reduction="none")
        torch.testing.assert_close(scattered, torch.stack(alone))
    torch.testing.assert_close(metric(scores, labels, k, mask=mask, ties=ties), sum(alone) / 4)


@pytest.mark.parametrize("metric", METRICS)
def test_a_valid_score_of_minus_infinity_is_not_padding(metric):
    scores, labels = torch.tensor([1.0, -math.inf, -math.inf]), torch.tensor([0, 0, 1])
    mask = torch.tensor([True, False, True])
    assert metric(scores, labels, mask=mask) == metric(torch.tensor([1.0, 0.0]), torch.tensor([0, 1]))


@pytest.mark.parametrize("metric", METRICS)
def test_lists_without_a_relevant_item_count_for_nothing(metric):
    scores, labels = draw(3, 5)
    labels[1] = 0
    each = metric(scores, labels, reduction="none")
    assert each[1] == 0
    torch.testing.assert_close(metric(scores, labels), each.sum() / 2)
    assert metric(scores, labels * 0) == 0
    assert metric(scores[:, :0], labels[:, :0], reduction="none").tolist() == [0, 0, 0]
    assert metric(scores[:0], labels[:0]) == 0


@pytest.mark.parametrize("metric", METRICS)
def test_nan_scores_show(metric):
    scores, labels = draw(3, 5)
    scores[2, 3] = math.nan
    assert metric(scores, labels, reduction="none").isnan().tolist() == [False, False, True]
    assert metric(scores, labels).isnan()


@pytest.mark.parametrize("metric", METRICS)
def test_shapes_dtypes_and_no_gradient(metric):
    scores, labels = draw(6, 5)
    expected = metric(scores, labels, reduction="none")
    shaped = metric(scores.view(2, 3, 5), labels.view(2, 3, 5), reduction="none")
    torch.testing.assert_close(shaped, expected.view(2, 3))
    half = metric(scores.half().requires_grad_(), labels, reduction="none")
    assert half.dtype == torch.float32 and not half.requires_grad
    torch.testing.assert_close(half, expected.float())


def test_exponential_gains_of_any_label_are_finite():
    value = custom_ops.ndcg(torch.tensor([1.0, 2.0]), torch.tensor([2000, 1999]))
    assert value.item() == pytest.approx((0.5 + 1 / math.log2(3)) / (1 + 0.5 / math.log2(3)))


def test_perfect_and_reversed_orders():
    scores, labels = torch.arange(5.0), torch.tensor([0, 0, 0, 1, 1])
    for metric in METRICS:
        assert metric(scores, labels).item() == pytest.approx(1)
        assert metric(scores, labels, 1).item() == pytest.approx(1)
        assert metric(-scores, labels, 2) == 0


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_jagged_lists_are_the_padded_ones(metric, reduction):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([4, 0, 7, 1, 5])
    scores, labels = torch.randn(5, 7, generator=generator), torch.randint(0, 3, (5, 7), generator=generator)
    valid = torch.arange(7) < lengths[:, None]
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    flat = metric(scores[valid], labels[valid], 3, cu_lengths=bounds, reduction=reduction)
    torch.testing.assert_close(flat, metric(scores, labels, 3, lengths=lengths, reduction=reduction))
    none = metric(scores[valid], labels[valid], cu_lengths=bounds[:1], reduction=reduction)
    assert none.shape == ((0,) if reduction == "none" else ())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": torch.ones(2).bool()}, "scores: expected one of float16"),
        ({"scores": torch.tensor(1.0)}, r"scores: expected \[..., n\]"),
        ({"labels": [1, 0]}, "labels: expected a tensor, got list"),
        ({"labels": torch.ones(3)}, r"labels: expected shape \[2\], got \[3\]"),
        ({"labels": torch.ones(2, device="meta")}, "labels: expected on cpu as scores, got meta"),
        ({"k": 0}, "k: expected at least 1, got 0"),
        ({"mask": torch.ones(2)}, "mask: expected one of bool"),
        ({"lengths": torch.ones(2).int()}, r"lengths: expected shape \[\], got \[2\]"),
        ({"cu_lengths": torch.tensor([[0, 2]])}, r"cu_lengths: expected \[L \+ 1\]"),
        ({"cu_lengths": torch.tensor([0, 3])}, "cu_lengths: expected non-decreasing values from 0 to 2"),
        ({"cu_lengths": torch.tensor([0, 2, 1])}, "cu_lengths: expected non-decreasing values"),
        ({"cu_lengths": torch.tensor([0]), "lengths": torch.tensor(1)}, "expected at most one of them"),
        ({"ties": "random"}, "ties: expected one of 'average', 'index'.* got 'random'"),
        ({"reduction": "avg"}, "reduction: expected one of"),
    ],
)
def test_wrong_calls(metric, options, message):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        metric(**{"scores": torch.ones(2), "labels": torch.ones(2), **options})


def test_examples_of_docstrings():
    result = doctest.testmod(custom_ops.ranking.metrics)
    assert (result.attempted, result.failed) == (23, 0)
