"""The adapters in the training loops of the real packages, where they are installed."""

from __future__ import annotations

import copy
import math
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

import custom_ops


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randint(0, 3, shape, generator=generator)


# ---------------------------------------------------------------- TorchMetrics


def test_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics")
    from custom_ops.adapters.torchmetrics import RankingMetric

    scores, labels = draw(6, 8)
    scores = scores.sigmoid()  # TorchMetrics' average precision drops scores that aren't above 0
    labels[2] = 0
    queries = torch.arange(6).repeat_interleave(8)
    shuffled = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    theirs = {
        "ndcg": torchmetrics.retrieval.RetrievalNormalizedDCG(empty_target_action="skip", top_k=3),
        "mrr": torchmetrics.retrieval.RetrievalMRR(empty_target_action="neg", top_k=3),
        "precision": torchmetrics.retrieval.RetrievalPrecision(empty_target_action="neg", top_k=3),
        "recall": torchmetrics.retrieval.RetrievalRecall(empty_target_action="pos", top_k=3),
        "hit_rate": torchmetrics.retrieval.RetrievalHitRate(empty_target_action="skip", top_k=3),
        "average_precision": torchmetrics.retrieval.RetrievalMAP(empty_target_action="neg", top_k=8),
    }
    for name, metric in theirs.items():
        own = {"gain": "linear"} if name == "ndcg" else {}
        empty = {"skip": None, "neg": 0.0, "pos": 1.0}[metric.empty_target_action]
        function = getattr(custom_ops, name)
        y = labels if name == "ndcg" else (labels > 1).long()
        by_rows = RankingMetric(function, k=getattr(metric, "top_k", 8), empty=empty, **own)
        collection = torchmetrics.MetricCollection({"rows": by_rows, "flat": by_rows.clone(), "theirs": metric})
        for rows in (slice(0, 2), slice(2, 6)):
            collection["rows"].update(scores[rows], y[rows])
        for items in shuffled.split(20):  # a query is spread over batches
            flat = scores.flatten()[items], y.flatten()[items]
            collection["flat"].update(*flat, indexes=queries[items])
            collection["theirs"].update(*flat, indexes=queries[items])
        values = collection.compute()
        for own_name in ("rows", "flat"):
            torch.testing.assert_close(values[own_name], values["theirs"], rtol=1e-5, atol=1e-6)
        by_rows.reset()
        assert by_rows.compute() == 0
    several = RankingMetric(custom_ops.precision, k=(1, 3))
    torch.testing.assert_close(several(scores, labels), custom_ops.precision(scores, labels, k=(1, 3)))
    with pytest.raises(TypeError, match="weights"):  # the mean over batches would need them, too
        several.update(scores, labels, weights=torch.ones(6))
    with pytest.raises(ValueError, match="indexes: expected no lengths beside it"):
        several.update(scores[0], labels[0], indexes=queries[:8], lengths=torch.tensor(3))
    several.update(scores[0], labels[0], indexes=queries[:8])
    with pytest.raises(ValueError, match="indexes: expected in all updates or in none"):
        several.compute()


# ---------------------------------------------------------------- allRank


def test_allrank_fit(tmp_path, monkeypatch):
    pytest.importorskip("allrank")
    # allRank imports these for what isn't used here.
    for name in ("attr", "gcsfs", "pkg_resources", "tensorboardX", "torchvision", "torchvision.transforms"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    utils = pytest.importorskip("allrank.training.train_utils")
    from allrank.models.losses import lambdaLoss

    from custom_ops.adapters import allrank

    monkeypatch.setattr(
        utils, "TensorboardSummaryWriter", lambda path: SimpleNamespace(
            save_to_tensorboard=lambda *args: None, close_all_writers=lambda: None
        )
    )  # fmt: skip
    x = torch.randn(8, 12, 5, generator=torch.Generator().manual_seed(0))
    y = draw(8, 12)[1].float()
    y[:, 9:] = -1
    batches = [(x[i : i + 4], y[i : i + 4].clone(), torch.arange(12).repeat(4, 1)) for i in (0, 4)]

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(5, 1)

        def forward(self, x, mask, indices):
            return self.layer(x).squeeze(-1)

        score = forward

    torch.manual_seed(0)
    start = Model()
    config = SimpleNamespace(metrics={"ndcg": [5]}, val_metric="ndcg_5")
    trained = []
    ours = allrank.loss_function(custom_ops.lambda_loss, weighting="ndcg2pp", k=5, topk_mode="and", reduction="sum")
    for loss in (ours, lambda a, b: lambdaLoss(a, b, weighing_scheme="ndcgLoss2PP_scheme", k=5)):
        model = copy.deepcopy(start)
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
        utils.fit(3, model, loss, optimiser, None, batches, batches, config, 1.0, 5, "cpu", str(tmp_path), "")
        trained.append(model.layer.weight.detach())
    assert not trained[0].equal(start.layer.weight)
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- Sentence Transformers


def cross_encoder():
    """Make a tiny cross encoder with random weights and a vocabulary of its own."""
    from sentence_transformers import CrossEncoder
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *map(str, range(50))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=52, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        max_position_embeddings=16, num_labels=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config), fast, CrossEncoder


def saved(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_sentence_transformers_lambda_loss(tmp_path):
    pytest.importorskip("sentence_transformers")
    datasets = pytest.importorskip("datasets")
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments, losses

    from custom_ops.adapters import sentence_transformers as adapters

    model, tokenizer, CrossEncoder = cross_encoder()
    path = saved(tmp_path / "model", model, tokenizer)
    _, labels = draw(4, 1000)
    rows = {"query": ["1", "2", "3", "4"], "docs": [], "labels": []}
    for row, n in enumerate((1000, 7, 12, 1)):  # lists of different lengths, one with 1,000 documents
        rows["docs"].append([f"{i % 50} {i // 50}" for i in range(row, row + n)])
        rows["labels"].append(labels[row, :n].tolist())
    encoder = CrossEncoder(path, device="cpu", max_length=16)
    schemes = {"ndcg2pp": losses.NDCGLoss2PPScheme(), "ranknet": losses.NoWeightingScheme()}
    for weighting, scheme in schemes.items():
        for k in (None, 5):
            batch = [rows["query"], rows["docs"]], [torch.tensor(y) for y in rows["labels"]]
            ours = adapters.LambdaLoss(encoder, weighting, k=k, mini_batch_size=256)
            theirs = losses.LambdaLoss(encoder, scheme, k=k, mini_batch_size=256)
            with torch.no_grad():
                torch.testing.assert_close(ours(*batch), theirs(*batch), rtol=1e-4, atol=1e-6)

    trained = []
    arguments = CrossEncoderTrainingArguments(
        str(tmp_path / "out"), num_train_epochs=1, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, seed=1, optim="sgd",
    )  # fmt: skip
    for loss in (adapters.LambdaLoss, losses.LambdaLoss, adapters.ListwiseLoss):
        encoder = CrossEncoder(path, device="cpu", max_length=16)
        own = {"loss": custom_ops.softmax_loss, "empty": 0.0} if loss is adapters.ListwiseLoss else {}
        dataset = datasets.Dataset.from_dict(rows)
        loss_of = loss(encoder, mini_batch_size=256, **own)
        trainer = CrossEncoderTrainer(model=encoder, args=arguments, train_dataset=dataset, loss=loss_of)
        assert math.isfinite(trainer.train().training_loss)
        trained.append(torch.cat([p.detach().flatten() for p in encoder.parameters()]))
    torch.testing.assert_close(trained[0], trained[1], rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match=r"labels: expected \[2\] for the queries, got \[1\]"):
        adapters.LambdaLoss(encoder)([["1"], [["1", "2"]]], [torch.tensor([1])])


def test_sentence_transformers_cosent(tmp_path):
    pytest.importorskip("sentence_transformers")
    datasets = pytest.importorskip("datasets")
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    from custom_ops.adapters.sentence_transformers import CoSENTLoss

    _, tokenizer, _ = cross_encoder()
    torch.manual_seed(0)
    start = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu")
    similarities = draw(1000)[0]
    rows = {"a": [str(i % 50) for i in range(1000)], "b": [str(i * 7 % 50) for i in range(1000)]}
    dataset = datasets.Dataset.from_dict(rows | {"score": similarities.tolist()})
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path), num_train_epochs=2, per_device_train_batch_size=1000, learning_rate=1e-2, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, optim="sgd",
    )  # fmt: skip
    trained = []
    for loss in (CoSENTLoss, losses.CoSENTLoss):
        model = copy.deepcopy(start)
        trainer = SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=dataset, loss=loss(model, scale=5.0)
        )
        trainer.train()
        trained.append(next(model.parameters()).detach())
    assert not trained[0].equal(next(start.parameters()))
    torch.testing.assert_close(*trained, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- TRL


def test_trl_dpo_trainer(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from custom_ops.adapters.trl import DPOTrainer

    words = ["<pad>", "<eos>", *"abcdefgh"]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    config = LlamaConfig(
        vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    start = LlamaForCausalLM(config)
    rows = {"prompt": ["a b", "c", "d e f", "g"] * 2, "chosen": [" c d", " h", " a", " b b b"] * 2}
    dataset = datasets.Dataset.from_dict(rows | {"rejected": [" e", " f g", " h h", " a"] * 2})
    calls = [
        {"loss_type": ["sigmoid"]},
        {"loss_type": ["robust", "ipo", "sigmoid_norm"], "loss_weights": [1.0, 0.5, 0.25], "label_smoothing": 0.1},
        {"loss_type": ["discopop", "nca_pair", "aot", "aot_unpaired"], "label_smoothing": 0.1},
        {"loss_type": ["apo_zero", "apo_down", "sppo_hard", "bco_pair", "hinge"], "precompute_ref_log_probs": True},
    ]
    for number, own in enumerate(calls):
        trained, losses = [], []
        for trainer_class in (DPOTrainer, trl.DPOTrainer):
            model = copy.deepcopy(start)
            arguments = trl.DPOConfig(
                output_dir=str(tmp_path / f"{number}"), beta=0.5, learning_rate=1e-2, max_steps=3,
                per_device_train_batch_size=4, use_cpu=True, bf16=False, report_to=[], save_strategy="no",
                disable_tqdm=True, logging_steps=1, optim="sgd", gradient_checkpointing=False, **own,
            )  # fmt: skip
            trainer = trainer_class(
                model=model, ref_model=copy.deepcopy(start), args=arguments, train_dataset=dataset,
                processing_class=tokenizer,
            )  # fmt: skip
            trainer.train()
            trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
            losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
        assert not trained[0].equal(torch.cat([p.detach().flatten() for p in start.parameters()]))
        torch.testing.assert_close(*trained, rtol=1e-2, atol=1e-3)
    arguments.loss_type = ["sft"]
    with pytest.raises(ValueError, match=r"loss_type: expected one of .* got sft"):
        DPOTrainer(model=start, args=arguments, train_dataset=dataset, processing_class=tokenizer)


# ---------------------------------------------------------------- LightGBM


@pytest.mark.parametrize("norm", [False, True])
def test_the_derivatives_of_lightgbm(norm):
    """A leaf of its first tree has the value -G / (H + l2), of the sums of both derivatives over its documents."""
    lightgbm = pytest.importorskip("lightgbm")
    scores, labels = (t.double() for t in draw(6, 8))
    options = {
        "objective": "lambdarank", "lambdarank_norm": norm, "lambdarank_truncation_level": 4, "sigmoid": 2.0,
        "num_leaves": 48, "min_data_in_leaf": 1, "min_sum_hessian_in_leaf": 1e-3, "lambda_l2": 10.0,
        "learning_rate": 1.0, "min_data_in_bin": 1, "verbosity": -1, "num_threads": 1,
    }  # fmt: skip
    places = torch.arange(48.0)[:, None].numpy()
    data = lightgbm.Dataset(places, labels.flatten().numpy(), group=[8] * 6, init_score=scores.flatten().numpy())
    tree = lightgbm.train(options, data, 1)
    leaf = torch.from_numpy(tree.predict(places, pred_leaf=True)).flatten().long()
    theirs = torch.from_numpy(tree.predict(places, raw_score=True))
    s = scores.clone().requires_grad_()
    own = {"normalize": "lambdas", "score_normalize": True} if norm else {}
    loss = custom_ops.lambda_loss(s, labels, k=4, sigma=2.0, log_base=math.e, reduction="sum", **own)
    gradient = torch.autograd.grad(loss, s, create_graph=True)[0].flatten()
    rows = [torch.autograd.grad(one, s, retain_graph=True)[0].flatten()[i] for i, one in enumerate(gradient)]
    of_leaf = [torch.zeros(48).double().index_add_(0, leaf, x.detach())[leaf] for x in (gradient, torch.stack(rows))]
    assert leaf.max() > 5
    torch.testing.assert_close(-of_leaf[0] / (of_leaf[1] + 10), theirs, rtol=1e-4, atol=1e-6)
