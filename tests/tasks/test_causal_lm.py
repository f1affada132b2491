"""Next-token prediction: targets, loss and metrics on packed rows."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dray.spec import make_spec
from dray.tasks import IGNORED
from dray.tasks.causal_lm import CausalLM
from dray.tasks.parts.losses import summed_cross_entropy
from dray.tasks.parts.metrics import bits_per_byte

WIDTH, VOCAB = 8, 11


def rows(
    num_tokens: list[int], row_ids: list[int] | None = None, dtype: Any = np.uint16, seed: int = 0
) -> pa.Table:
    """Rows of random tokens, padded with 0."""
    tokens = np.random.default_rng(seed).integers(1, VOCAB, (len(num_tokens), WIDTH)).astype(dtype)
    for row, count in enumerate(num_tokens):
        tokens[row, count:] = 0
    return pa.table(
        {
            "input_ids": pa.FixedSizeListArray.from_arrays(pa.array(tokens.ravel()), WIDTH),
            "num_tokens": pa.array(num_tokens, pa.int32()),
            "row_id": pa.array(range(len(num_tokens)) if row_ids is None else row_ids, pa.int64()),
        }
    )


class Bigrams(torch.nn.Module):
    """The smallest language model: a table of next-token logits."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=VOCAB))
        self.table = torch.nn.Parameter(
            torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
        )

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])

    def get_output_embeddings(self) -> None:
        return None


def loss_of(model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The summed loss and the outputs, with the count checked."""
    task = CausalLM()
    terms, output = task.objective(model)(batch)
    loss, count = terms["loss"]
    assert int(count) == task.num_targets(batch)
    return loss, output


def test_build_task_finds_it() -> None:
    spec = make_spec(
        {
            "name": "a",
            "data": {"train": "x"},
            "duration": {"steps": 1},
            "model": {"architecture": "llama", "hidden_size": 8, "num_layers": 1, "num_heads": 1},
        }
    )
    corpus = SimpleNamespace(pad_token_id=1, labels=(), mask_token_id=None, vocab_size=9)
    assert spec.task.on(corpus).name == "causal_lm"


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_labels_are_the_next_tokens(dtype: Any) -> None:
    batch = CausalLM().collate(rows([8, 5, 1, 0], dtype=dtype))
    ids, labels = batch["input_ids"], batch["labels"]
    assert ids.dtype == labels.dtype == torch.int64
    assert ids.shape == labels.shape == (4, WIDTH)
    assert torch.equal(labels[0, :7], ids[0, 1:])
    assert labels[0, 7] == IGNORED
    assert torch.equal(labels[1, :4], ids[1, 1:5])
    assert (labels[1, 4:] == IGNORED).all()
    assert (labels[2:] == IGNORED).all()
    assert CausalLM().num_targets(batch) == 7 + 4


def test_padding_rows_have_no_targets() -> None:
    task = CausalLM()
    batch = task.collate(rows([8, 8, 8], row_ids=[4, -1, 7]))
    assert task.num_targets(batch) == 14
    assert (batch["labels"][1] == IGNORED).all()


def test_the_largest_tokens_of_each_width_survive() -> None:
    for dtype, largest in ((np.uint16, 65_535), (np.uint32, 4_000_000_000)):
        column = pa.FixedSizeListArray.from_arrays(pa.array(np.full(4, largest, dtype)), 2)
        batch = CausalLM().collate(
            pa.table({"input_ids": column, "num_tokens": pa.array([2, 2], pa.int32())})
        )
        assert batch["input_ids"].unique().tolist() == [largest]


def test_slices_and_chunks_of_a_table_read_the_right_rows() -> None:
    task, whole = CausalLM(), rows([8, 6, 4, 8, 3])
    expected = task.collate(whole)
    sliced = task.collate(whole.slice(1, 3))
    chunked = task.collate(pa.concat_tables([whole.slice(0, 2), whole.slice(2, 0), whole.slice(2)]))
    for name in expected:
        assert torch.equal(sliced[name], expected[name][1:4])
        assert torch.equal(chunked[name], expected[name])
    empty = task.collate(whole.slice(0, 0))
    assert empty["input_ids"].shape == (0, WIDTH)
    assert task.num_targets(empty) == 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, WIDTH), min_size=1, max_size=12), st.integers(1, 4))
def test_losses_and_targets_of_micro_batches_add_up(num_tokens: list[int], micro_rows: int) -> None:
    task, model, table = CausalLM(), Bigrams(), rows(num_tokens)
    whole = task.collate(table)
    parts = [
        task.collate(table.slice(at, micro_rows)) for at in range(0, len(num_tokens), micro_rows)
    ]
    assert task.num_targets(whole) == sum(max(0, count - 1) for count in num_tokens)
    assert task.num_targets(whole) == sum(map(task.num_targets, parts))
    loss = loss_of(model, whole)[0]
    torch.testing.assert_close(torch.stack([loss_of(model, part)[0] for part in parts]).sum(), loss)


def test_the_loss_is_torchs_cross_entropy() -> None:
    logits = torch.randn(6, VOCAB, requires_grad=True)
    labels = torch.tensor([1, IGNORED, 3, 4, IGNORED, 10])
    for smoothing in (0.0, 0.1):
        ours = summed_cross_entropy(logits, labels, smoothing)
        theirs = F.cross_entropy(
            logits, labels, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing
        )
        torch.testing.assert_close(ours, theirs)
        (ours_grad,) = torch.autograd.grad(ours, logits)
        (theirs_grad,) = torch.autograd.grad(theirs, logits)
        torch.testing.assert_close(ours_grad, theirs_grad)
    assert float(summed_cross_entropy(logits, torch.full((6,), IGNORED)).detach()) == 0.0


def test_half_precision_logits_are_summed_in_fp32() -> None:
    logits = (torch.randn(64, VOCAB) * 5).bfloat16()
    labels = torch.randint(0, VOCAB, (64,))
    loss = summed_cross_entropy(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), labels, reduction="sum"))


def test_training_keeps_no_logits() -> None:
    task, model = CausalLM(), Bigrams()
    batch = task.collate(rows([8, 8]))
    loss, output = loss_of(model, batch)
    assert output == {}
    loss.backward()
    with torch.no_grad():
        assert loss_of(model, batch)[1].keys() == {"loss_sum", "num_correct"}


def test_metrics_merge_over_ranks_in_any_order() -> None:
    task, model = CausalLM(), Bigrams()
    tables = [rows([8, 5], seed=1), rows([8, 2], seed=2), rows([3, 8], seed=3)]
    ranks = [task.new_metrics() for _ in tables]
    alone = task.new_metrics()
    with torch.no_grad():
        for metrics, table in zip(ranks, tables, strict=True):
            batch = task.collate(table)
            output = loss_of(model, batch)[1]
            metrics.update(batch, output)
            alone.update(batch, output)
    states = json.loads(json.dumps([metrics.state() for metrics in ranks]))  # plain values
    forward, backward = task.new_metrics().merge(states), task.new_metrics().merge(reversed(states))
    assert forward.compute() == backward.compute() == alone.compute()
    values, whole = forward.compute(), task.collate(pa.concat_tables(tables))
    logits, labels = model(whole["input_ids"]).logits, whole["labels"]
    assert values["num_targets"] == task.num_targets(whole) == 28
    mean = float(
        F.cross_entropy(logits.view(-1, VOCAB), labels.view(-1), ignore_index=IGNORED).detach()
    )
    assert values["loss"] == pytest.approx(mean)
    assert values["perplexity"] == pytest.approx(math.exp(mean))
    real = labels != IGNORED
    assert values["accuracy"] == pytest.approx(
        float((logits.argmax(-1)[real] == labels[real]).float().mean())
    )


def test_empty_metrics_are_numbers() -> None:
    assert CausalLM().new_metrics().compute() == {
        "loss": 0.0,
        "perplexity": 1.0,
        "accuracy": 0.0,
        "num_targets": 0.0,
    }


def test_bits_per_byte() -> None:
    assert bits_per_byte(math.log(256), 1000, 1000) == pytest.approx(8.0)  # guessing bytes
    assert bits_per_byte(math.log(4), 500, 1000) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="num_text_bytes"):
        bits_per_byte(1.0, 10, 0)
