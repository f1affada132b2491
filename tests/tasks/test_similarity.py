"""Vectors of pairs: the loss of a pool, the gradient of a pool that is cut into ranks and micro
batches, and how retrieval is measured."""

from __future__ import annotations

from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import BertConfig, BertModel

from dray.spec.tasks import make_task
from dray.tasks.parts.encoding import encode_apart
from dray.tasks.parts.similarity import PairVectors, RetrievalMetrics, contrastive_losses
from dray.tasks.rows import SEPARATOR


class Letters:
    """Tools that know letters, between two marks."""

    prefix, middle, suffix = (1,), (), (2,)
    row_tokens, dtype = 6, "uint16"

    def encode(self, texts: pa.Array) -> tuple[Any, Any]:
        ids = [[3 + ord(letter) - ord("a") for letter in text.as_py()] for text in texts]
        return np.array(list(chain(*ids)), np.uint32), np.array(list(map(len, ids)), np.int64)


def test_two_texts_are_encoded_apart() -> None:
    texts = pa.array([f"ab{SEPARATOR}c", f"a{SEPARATOR}abcdefg"], pa.large_string())
    found = encode_apart(texts, Letters(), second="pair")
    assert found.tokens.tolist() == [3, 4, 3]
    assert found.lengths.tolist() == [2, 1]
    assert found.columns["pair"].to_pylist() == [[1, 5, 2], [1, 3, 4, 5, 6, 2]]
    assert found.num_lost.tolist() == [0, 3]
    alone = encode_apart(pa.array(["ab"], pa.large_string()), Letters(), second="pair")
    assert alone.columns["pair"].to_pylist() == [[]]
    assert alone.num_lost.tolist() == [0]


def test_the_loss_of_a_pair_is_of_both_directions() -> None:
    pooled = torch.nn.functional.normalize(torch.randn(5, 2, 8), dim=-1)
    found = contrastive_losses(pooled, 0.1)
    for row in range(5):
        forth = (pooled[row, 0] @ pooled[:, 1].T / 0.1).log_softmax(0)[row]
        back = (pooled[row, 1] @ pooled[:, 0].T / 0.1).log_softmax(0)[row]
        assert float(found[row]) == pytest.approx(-float(forth + back) / 2, rel=1e-5)


def table(num_rows: int, *, pairs: bool = True) -> pa.Table:
    random = np.random.default_rng(0)
    ids = random.integers(3, 30, (num_rows, 6)).astype(np.uint16)
    lengths = random.integers(1, 7, num_rows)
    lists = [random.integers(3, 30, length).astype(np.uint32) for length in lengths[::-1]]
    return pa.table(
        {
            "input_ids": pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), 6),
            "num_tokens": lengths.astype(np.int32),
            "pair": pa.array(lists if pairs else [[]] * num_rows, pa.large_list(pa.uint32())),
            "row_id": np.arange(num_rows),
        }
    )


def objective(pooling: str = "mean") -> PairVectors:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )
    body = BertModel(config, add_pooling_layer=False)
    return PairVectors(body, temperature=0.1, pooling=pooling).eval()  # type: ignore[arg-type]


def task() -> Any:
    corpus = SimpleNamespace(labels=(), pad_token_id=0, mask_token_id=None, vocab_size=30)
    return make_task("embedding").on(corpus)


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_a_text_has_the_same_vector_whatever_stands_beside_it(pooling: str) -> None:
    model, rows = objective(pooling), table(7)
    with torch.no_grad():
        whole = model(task().collate(rows))[1]["pooled"]
        parts = [model(task().collate(rows.slice(at, 2)))[1]["pooled"] for at in range(0, 7, 2)]
        alone = model(task().collate(table(7, pairs=False)))[1]["pooled"]
    assert whole.shape == (7, 2, 16)
    assert torch.allclose(whole, torch.cat(parts), atol=1e-5)
    assert torch.allclose(whole[:, :1], alone, atol=1e-5)
    assert torch.allclose(whole.norm(dim=-1), torch.ones(7, 2), atol=1e-5)


def test_padding_rows_are_no_pairs() -> None:
    rows = table(4)
    rows = rows.set_column(3, "row_id", pa.array([0, -1, 1, -1], pa.int64()))
    batch, model = task().collate(rows), objective()
    assert task().num_targets(batch) == 2
    with torch.no_grad():
        terms, output = model(batch)
    (loss, count), pooled = terms["loss"], output["pooled"][[0, 2]]
    assert int(count) == 2
    assert float(loss) == pytest.approx(float(contrastive_losses(pooled, 0.1).sum()), rel=1e-5)


def test_retrieval_is_measured_over_all_pairs_whatever_parts_they_came_in() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(40, 2, 8), dim=-1)
    vectors[:20, 1] = vectors[:20, 0]  # these find their own

    def of(part: torch.Tensor) -> RetrievalMetrics:
        metrics = RetrievalMetrics(0.1)
        metrics.update({"real": torch.ones(len(part), dtype=torch.bool)}, {"pooled": part})
        return metrics

    values = of(vectors[:13]).merge([of(vectors[13:30]).state(), of(vectors[30:]).state()])
    found = values.compute()
    cosines = vectors[:, 0] @ vectors[:, 1].T
    places = (cosines >= cosines.diag()[:, None]).sum(dim=1)
    assert places[:20].tolist() == [1] * 20
    assert found["recall_1"] == pytest.approx(float((places <= 1).float().mean()))
    assert found["recall_10"] == pytest.approx(float((places <= 10).float().mean()))
    assert found["mrr"] == pytest.approx(float((1 / places).mean()), rel=1e-6)
    assert found["loss"] == pytest.approx(float(contrastive_losses(vectors, 0.1).mean()), rel=1e-5)
    assert found == of(vectors).compute() | {"loss": found["loss"]}


def test_vectors_that_are_all_alike_find_nothing() -> None:
    metrics = RetrievalMetrics(0.1)
    metrics.update({"real": torch.ones(30, dtype=torch.bool)}, {"pooled": torch.ones(30, 2, 4)})
    assert metrics.compute()["recall_10"] == 0.0
