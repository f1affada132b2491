"""What is hidden of a row: in training by chance, in a thorough evaluation each token by itself."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from dray.corpus.shards import make_batch, stored_columns
from dray.models.build import build_model
from dray.spec import make_spec
from dray.tasks import IGNORED
from dray.tasks.masked_lm import PLACES_MULTIPLE, SPECIAL, MaskedLM
from tiny import tiny_tree

MASK, PAD, VOCAB = 3, 0, 20
CORPUS = SimpleNamespace(labels=(), pad_token_id=PAD, mask_token_id=MASK, vocab_size=VOCAB)
TOKENS = [[1, 7, 8, 9, 2, 0, 0, 0], [1, 10, 11, 12, 13, 14, 15, 2], [1, 5, 2, 0, 0, 0, 0, 0]]
NUM_TOKENS = [5, 8, 3]


def make_rows(task: MaskedLM) -> pa.Table:
    """Three rows, of which the last one only fills a batch up; 1 and 2 are no word's tokens."""
    tokens = np.array(TOKENS, np.uint32)
    starts = np.where(tokens < 4, SPECIAL, 1).astype(np.uint8)
    values = {"input_ids": tokens, "num_tokens": np.array(NUM_TOKENS, np.int32), "starts": starts}
    rows = pa.Table.from_batches([make_batch(stored_columns(task, 8, "uint32"), values)])
    return rows.append_column("row_id", pa.array([0, 1, -1]))


def test_a_row_where_nothing_was_drawn_hides_a_whole_word() -> None:
    """Rows of words of three tokens each, at a share so small that nothing is drawn."""
    task = MaskedLM(MaskedLM.Settings(share=1e-9)).on(CORPUS)
    tokens = np.tile(np.array([1, 7, 8, 9, 10, 11, 12, 2], np.uint32), (40, 1))
    starts = np.tile(np.array([SPECIAL, 1, 0, 0, 1, 0, 0, SPECIAL], np.uint8), (40, 1))
    values = {"input_ids": tokens, "num_tokens": np.full(40, 8, np.int32), "starts": starts}
    table = pa.Table.from_batches([make_batch(stored_columns(task, 8, "uint32"), values)])
    words = {(1, 2, 3), (4, 5, 6)}
    hidden = (task.collate(table, draw=5)["labels"] != IGNORED).tolist()
    assert {tuple(i for i, is_hidden in enumerate(row) if is_hidden) for row in hidden} == words
    task = MaskedLM(MaskedLM.Settings(share=1e-9, whole_words=False)).on(CORPUS)
    hidden = (task.collate(table, draw=5)["labels"] != IGNORED).sum(dim=1)
    assert hidden.tolist() == [1] * 40


def test_a_thorough_evaluation_hides_each_token_by_itself() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
    )
    model = BertForMaskedLM(config).eval()
    task = MaskedLM().on(CORPUS).thorough()
    metrics, objective = task.new_metrics(), task.objective(model).eval()
    sizes = []
    with torch.no_grad():
        for batch in task.passes(make_rows(task), 0, 4):
            sizes.append(len(batch["input_ids"]))
            metrics.update(batch, objective(batch)[1])
    assert sizes == [4, 4, 1]
    surprises = []
    for row, size in zip(TOKENS[:2], NUM_TOKENS[:2], strict=True):
        for place in range(1, size - 1):
            ids = torch.tensor([row])
            ids[0, place] = MASK
            attended = torch.tensor([[1] * size + [0] * (8 - size)])
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=attended).logits[0, place]
            surprises.append(-float(torch.log_softmax(logits, -1)[row[place]]))
    found = metrics.compute()
    assert found["num_targets"] == 9
    assert found["loss"] == pytest.approx(sum(surprises) / 9, rel=1e-5)
    assert found["pseudo_perplexity"] == pytest.approx(math.exp(sum(surprises) / 9), rel=1e-5)


def tiny_model(architecture: str) -> Any:
    torch.manual_seed(0)
    tree = tiny_tree(Path("none"), task="masked_lm", model={"architecture": architecture})
    return build_model(make_spec(tree), vocab_size=VOCAB, pad_token_id=PAD, eos_token_id=2)


def loss_and_gradients(objective: Any, model: Any, batch: dict[str, Any]) -> tuple[float, Any]:
    model.zero_grad()
    terms, output = objective(batch)
    loss, count = terms["loss"]
    assert int(count) == int((batch["labels"] != IGNORED).sum()) > 0
    assert output == {}
    loss.backward()
    return float(loss.detach()), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("architecture", ["bert", "roberta", "modernbert", "albert", "electra"])
def test_only_hidden_tokens_go_through_the_head(architecture: str) -> None:
    model, task = tiny_model(architecture), MaskedLM().on(CORPUS)
    (batch,) = task.passes(make_rows(task), 3, 8)
    objective = task.objective(model)
    assert objective.selects
    seen = []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda module, given, output: seen.append(tuple(output.shape))
    )
    found, gradients = loss_and_gradients(objective, model, batch)
    assert seen == [(1, PLACES_MULTIPLE, VOCAB)]
    objective.selects = False
    expected, whole = loss_and_gradients(objective, model, batch)
    hook.remove()
    assert found == pytest.approx(expected, rel=1e-5)
    for name, gradient in whole.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        counts = []
        for selects in (True, False):
            objective.selects = selects
            counts.append(int(objective(batch)[1]["num_correct"]))
    assert counts[0] == counts[1]


def test_a_head_that_looks_at_neighbours_gets_all_tokens() -> None:
    model, task = tiny_model("bert"), MaskedLM().on(CORPUS)
    transform = model.cls.predictions.transform
    transform.register_forward_hook(lambda module, given, output: output + output.roll(1, dims=1))
    (batch,) = task.passes(make_rows(task), 3, 8)
    objective = task.objective(model)
    assert not objective.selects
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum", ignore_index=IGNORED
    )
    torch.testing.assert_close(objective(batch)[0]["loss"][0], expected)


def test_a_validation_names_what_it_measures() -> None:
    task = MaskedLM().on(CORPUS)
    assert "masked_perplexity" in task.new_metrics().compute()
    (batch,) = task.passes(make_rows(task), 0, 8)
    assert bool((batch["labels"][2] == IGNORED).all())
    assert torch.equal(batch["labels"], task.collate(make_rows(task), 0)["labels"])
