"""One label a document: padding, loss, metrics, and a model that learns real sentiment."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score

from dray.models.build import build_model
from dray.models.groups import parameter_groups
from dray.spec import Spec, make_spec
from dray.tasks import IGNORED
from dray.tasks.sequence_classification import SequenceClassification

SST2 = Path(__file__).parents[3] / "shared" / "data" / "sst2"
WIDTH, VOCAB, PAD = 32, 50, 1


def classifier(num_labels: int) -> SequenceClassification:
    return SequenceClassification().on(corpus_of(*map(str, range(num_labels))))


def corpus_of(*labels: str) -> SimpleNamespace:
    return SimpleNamespace(pad_token_id=PAD, labels=labels, mask_token_id=None, vocab_size=VOCAB)


def rows(num_tokens: list[int], labels: list[int], row_ids: list[int] | None = None) -> pa.Table:
    tokens = np.random.default_rng(0).integers(2, VOCAB, (len(num_tokens), WIDTH)).astype(np.uint16)
    for row, count in enumerate(num_tokens):
        tokens[row, count:] = PAD
    return pa.table(
        {
            "input_ids": pa.FixedSizeListArray.from_arrays(pa.array(tokens.ravel()), WIDTH),
            "num_tokens": pa.array(num_tokens, pa.int32()),
            "label": pa.array(labels, pa.int32()),
            "row_id": pa.array(range(len(labels)) if row_ids is None else row_ids, pa.int64()),
        }
    )


def spec_of(architecture: str, **sections: Any) -> Spec:
    return make_spec(
        {
            "name": "a",
            "task": "sequence_classification",
            "duration": {"steps": 1},
            "data": {"train": [{"path": "x", "label": "label"}], "sequence_tokens": WIDTH},
            "model": {
                "architecture": architecture,
                "hidden_size": 32,
                "num_layers": 1,
                "num_heads": 2,
            },
        }
        | sections
    )


def model_of(architecture: str, num_labels: int = 2, **sections: Any) -> Any:
    return build_model(
        spec_of(architecture, **sections),
        vocab_size=VOCAB,
        pad_token_id=PAD,
        eos_token_id=0,
        num_labels=num_labels,
    )


def loss_of(
    model: Any, batch: Any, label_smoothing: float = 0.0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The summed loss and the outputs, with the count checked; smoothed as in training."""
    task = classifier(2)
    objective = task.objective(model, label_smoothing)
    objective.training = label_smoothing > 0  # of the objective alone: dropout stays as it is
    terms, output = objective(batch)
    loss, count = terms["loss"]
    assert int(count) == task.num_targets(batch)
    return loss, output


def test_a_task_on_a_corpus_counts_its_labels() -> None:
    corpus = corpus_of("a", "b", "c")
    task = spec_of("bert").task.on(corpus)
    assert isinstance(task, SequenceClassification)
    assert task.num_labels == 3
    assert spec_of("bert").task.on(corpus, 5).num_labels == 5


@pytest.mark.parametrize(("longest", "width"), [(1, 1), (8, 8), (9, 9), (30, 30), (32, 32), (0, 1)])
def test_batches_are_as_wide_as_their_longest_row(longest: int, width: int) -> None:
    batch = classifier(2).collate(rows([longest, min(longest, 3)], [0, 1]))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, width)
    assert batch["attention_mask"].sum(dim=1).tolist() == [max(1, longest), max(1, min(longest, 3))]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2", "modernbert"])
def test_padding_rows_change_neither_loss_nor_gradients(architecture: str) -> None:
    task, model = classifier(2), model_of(architecture)
    gradients = []
    for table in (rows([9, 5], [0, 1]), rows([9, 5, 0, 7], [0, 1, 0, 1], row_ids=[0, 1, -1, -1])):
        batch = task.collate(table)
        assert task.num_targets(batch) == 2
        model.zero_grad()
        loss = loss_of(model, batch)[0]
        loss.backward()
        gradients.append(
            [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        )
    for first, second in zip(*gradients, strict=True):
        assert torch.isfinite(second).all()
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-4)
    batch = task.collate(rows([3, 0], [0, 1], row_ids=[-1, -1]))
    assert float(loss_of(model, batch)[0].detach()) == 0.0


def test_losses_of_micro_batches_of_other_widths_add_up() -> None:
    task, model = classifier(2), model_of("bert").eval()
    table = rows([3, 30, 12, 6], [0, 1, 1, 0])
    whole = loss_of(model, task.collate(table), 0.1)[0]
    parts = sum(loss_of(model, task.collate(table.slice(at, 1)), 0.1)[0] for at in range(4))
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


def outputs(
    scores: list[list[float]], labels: list[int]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return {"labels": torch.tensor(labels)}, {
        "scores": torch.tensor(scores),
        "loss_sum": torch.tensor(1.5),
    }


def test_binary_metrics_are_those_of_class_one() -> None:
    metrics = classifier(2).new_metrics()
    metrics.update(
        *outputs(
            [[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.7, 0.3], [0.5, 0.5]], [0, 1, 0, 1, IGNORED]
        )
    )
    values = metrics.compute()
    assert values == pytest.approx(
        {
            "loss": 1.5 / 4,
            "accuracy": 0.5,
            "precision": 0.5,
            "recall": 0.5,
            "f1": 0.5,
            "auc": 0.75,
            "num_targets": 4.0,
        }
    )


def test_metrics_merge_over_ranks_in_any_order() -> None:
    task = classifier(3)
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.rand(30, 3, generator=generator).softmax(-1), torch.arange(30) % 3
    states = []
    for at in range(0, 30, 10):
        metrics = task.new_metrics()
        metrics.update(*outputs(scores[at : at + 10].tolist(), labels[at : at + 10].tolist()))
        states.append(json.loads(json.dumps(metrics.state())))
    values = task.new_metrics().merge(states).compute()
    assert values == pytest.approx(task.new_metrics().merge(reversed(states)).compute(), abs=1e-12)
    assert values["f1"] == pytest.approx(f1_score(labels, scores.argmax(-1), average="macro"))
    assert values["auc"] == pytest.approx(
        roc_auc_score(labels, scores.double().numpy(), multi_class="ovr"), abs=1e-6
    )


def test_metrics_without_a_class_or_without_documents_are_numbers() -> None:
    metrics = classifier(2).new_metrics()
    assert metrics.compute()["accuracy"] == 0.0
    metrics.update(*outputs([[0.9, 0.1], [0.8, 0.2]], [0, 0]))
    assert (metrics.compute()["auc"], metrics.compute()["f1"], metrics.compute()["accuracy"]) == (
        0.5,
        0.0,
        1.0,
    )


def sst2_rows(name: str, limit: int) -> tuple[pa.Table, int]:
    """Sentences as hashed words: good enough to learn from, without a tokeniser."""
    raw = (SST2 / name).read_bytes()
    text = (gzip.decompress(raw) if name.endswith(".gz") else raw).decode()
    pairs = [line.rsplit("\t", 1) for line in text.splitlines()][:limit]
    size = 8192
    words = [
        [2 + zlib.crc32(word.encode()) % (size - 2) for word in text.split()][:WIDTH]
        for text, _ in pairs
    ]
    tokens = np.full((len(pairs), WIDTH), PAD, np.uint16)
    for row, found in enumerate(words):
        tokens[row, : len(found)] = found
    return pa.table(
        {
            "input_ids": pa.FixedSizeListArray.from_arrays(pa.array(tokens.ravel()), WIDTH),
            "num_tokens": pa.array([len(found) for found in words], pa.int32()),
            "label": pa.array([int(label) for _, label in pairs], pa.int32()),
        }
    ), size


@pytest.mark.skipif(not SST2.is_dir(), reason="needs ../shared/data/sst2")
def test_a_small_model_learns_sentiment() -> None:
    task = classifier(2)
    (train, size), (dev, _) = sst2_rows("train.tsv.gz", 4000), sst2_rows("dev.tsv", 872)
    spec = spec_of("bert", regularization={"dropout": 0.2})
    model = build_model(spec, vocab_size=size, pad_token_id=PAD, eos_token_id=0).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=3e-3)
    torch.manual_seed(0)
    for _ in range(4):
        order = torch.randperm(train.num_rows).numpy()
        for at in range(0, train.num_rows, 64):
            batch = task.collate(train.take(order[at : at + 64]))
            (loss_of(model, batch)[0] / task.num_targets(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
    metrics, batch = task.new_metrics(), task.collate(dev)
    with torch.no_grad():
        metrics.update(batch, loss_of(model.eval(), batch)[1])
    values = metrics.compute()
    assert values["accuracy"] > 0.65
    assert values["auc"] > 0.7


def test_an_export_says_that_ordered_outputs_are_no_logits() -> None:
    assert classifier(3).remarks == ()
    ordered = SequenceClassification(SequenceClassification.Settings(labels="ordinal"))
    assert "cumulative link" in ordered.remarks[0]
