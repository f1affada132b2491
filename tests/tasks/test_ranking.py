"""Next items are ranked among all, beside plain arithmetic; sequences become rows."""

from __future__ import annotations

import math
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from dray.spec.tasks import make_task
from dray.tasks.parts.encoding import encode_sequences
from dray.tasks.parts.ranking import NextOfAllLoss, RankMetrics
from dray.tasks.rows import FIRST_WORD, IGNORED, SEPARATOR, UNKNOWN_WORD

VOCAB = 12


class Letters:
    """Tools that know the letters, each a token from FIRST_WORD on."""

    prefix = middle = suffix = ()
    row_tokens, dtype = 4, "uint16"

    def encode(self, texts: pa.Array) -> tuple[Any, Any]:
        ids = [
            [FIRST_WORD + ord(name) - ord("a") for name in text.as_py().split(SEPARATOR)]
            for text in texts
        ]
        return np.array(list(chain(*ids)), np.uint32), np.array(list(map(len, ids)), np.int64)


def rows(*sequences: str) -> pa.Table:
    """Rows as the corpus has them."""
    texts = pa.array([SEPARATOR.join(text) for text in sequences], pa.large_string())
    encoded = encode_sequences(texts, Letters())
    ends = np.cumsum(encoded.lengths)
    padded = np.zeros((len(ends), 4), np.uint16)
    for row, (end, length) in enumerate(zip(ends, encoded.lengths, strict=True)):
        padded[row, :length] = encoded.tokens[end - length : end]
    ids = pa.FixedSizeListArray.from_arrays(pa.array(padded.reshape(-1)), 4)
    return pa.table(
        {
            "input_ids": ids,
            "num_tokens": encoded.lengths.astype(np.int32),
            "row_id": np.arange(len(ends)),
            **{name: encoded.columns[name] for name in ("final", "before")},
        }
    )


def model() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=8,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=None,
        eos_token_id=None,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    return GPT2LMHeadModel(config).eval()


def task(**settings: Any) -> Any:
    corpus = SimpleNamespace(labels=(), pad_token_id=0, mask_token_id=None, vocab_size=VOCAB)
    return make_task({"name": "next_item", **settings}).on(corpus)


def test_a_long_sequence_becomes_rows_of_which_the_last_is_measured() -> None:
    table = rows("abcdefghij", "ab", "abcd")
    assert table.column("num_tokens").to_pylist() == [2, 4, 4, 2, 4]
    assert table.column("final").to_pylist() == [0, 0, 1, 1, 1]
    assert table.column("before").to_pylist() == [[], [], [2, 3, 4, 5, 6, 7], [], []]
    batch = task().collate(table)
    assert batch["last"].tolist() == [-1, -1, 3, 1, 3]
    assert batch["labels"][0].tolist() == [3, IGNORED, IGNORED, IGNORED]
    assert batch["labels"][4].tolist() == [3, 4, 5, IGNORED]
    assert batch["before"][2].tolist() == [2, 3, 4, 5, 6, 7]


def test_padding_rows_and_unknown_items_are_no_targets() -> None:
    table = rows("abc", "abcd")
    table = table.set_column(
        table.column_names.index("row_id"), "row_id", pa.array([0, -1], pa.int64())
    )
    ids = np.array([2, UNKNOWN_WORD, 3, 0, 2, 3, 4, 5], np.uint16)
    table = table.set_column(0, "input_ids", pa.FixedSizeListArray.from_arrays(pa.array(ids), 4))
    batch = task().collate(table)
    assert batch["labels"].tolist() == [[IGNORED, 3, IGNORED], [IGNORED] * 3]
    assert batch["last"].tolist() == [2, -1]
    assert task().num_targets(batch) == 1


@pytest.mark.parametrize("repeats", [False, True])
def test_the_last_item_is_ranked_among_all_that_a_sequence_has_not_had(repeats: bool) -> None:
    net, sequences = model(), ("abcdefghij", "ab", "abaa", "cde")
    batch = task(repeats=repeats).collate(rows(*sequences))
    with torch.no_grad():
        terms, output = NextOfAllLoss(net, num_told=3, repeats=repeats).eval()(batch)
        losses, ranks = [], []
        for place in (2, 3, 4, 5):
            sequence = sequences[place - 2]
            last = int(batch["last"][place])
            ids = batch["input_ids"][place, : last + 1]
            target = int(ids[last])
            logits = net(input_ids=ids[None, :last]).logits[0, -1]
            losses.append(float(-logits.log_softmax(0)[target]))
            had = {FIRST_WORD + ord(name) - ord("a") for name in sequence[:-1]}
            others = [
                item
                for item in range(FIRST_WORD, VOCAB)
                if item != target and (repeats or item not in had)
            ]
            behind = sum(float(logits[item]) >= float(logits[target]) for item in others)
            comes_again = not repeats and target in had  # which nobody is told: behind them all
            ranks.append(1 + (VOCAB if comes_again else behind))
            after = net(input_ids=ids[None]).logits[0, -1].softmax(0)
            free = [
                item for item in range(FIRST_WORD, VOCAB) if repeats or item not in had | {target}
            ]
            told = sorted(free, key=lambda item: -float(after[item]))[:3]
            if len(free) >= 3:
                assert output["told"][place].tolist() == told
    assert output["measured"].tolist() == [False, False, True, True, True, True]
    assert output["ranks"][output["measured"]].tolist() == ranks
    assert float(terms["loss"][0]) == pytest.approx(sum(losses), rel=1e-5)


def test_training_learns_each_next_item() -> None:
    net = model()
    batch = task().collate(rows("abcdefghij", "cde"))
    loss, count = NextOfAllLoss(net, num_told=3, repeats=False)(batch)[0]["loss"]
    logits = net(input_ids=batch["input_ids"]).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert int(count) == 1 + 3 + 3 + 2


def test_metrics_of_ranks_add_up() -> None:
    def of(*ranks: int) -> RankMetrics:
        metrics = RankMetrics()
        metrics.update(
            {},
            {
                "loss_sum": torch.tensor(2.0),
                "measured": torch.tensor([True] * len(ranks) + [False]),
                "ranks": torch.tensor([*ranks, 5]),
            },
        )
        return metrics

    whole = of(1, 3).merge([of(10, 11).state(), of(0).state()])  # 0: the vocabulary has it not
    values = whole.compute()
    assert values["hr_10"] == pytest.approx(3 / 5)
    assert values["ndcg_10"] == pytest.approx((1 + 1 / 2 + 1 / math.log2(11)) / 5)
    assert values["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 10 + 1 / 11) / 5)
    assert values["loss"] == pytest.approx(6 / 4)
    assert whole.undefined() == ()
    assert RankMetrics().undefined() == RankMetrics.names


def test_a_model_that_tells_nothing_apart_ranks_nothing_first() -> None:
    loss = NextOfAllLoss(model(), num_told=3, repeats=False)
    same = torch.zeros(2, VOCAB)
    seen = torch.tensor([[2, 3], [0, 0]])
    targets = torch.tensor([4, 4])
    assert loss._ranks(same, targets, seen).tolist() == [VOCAB - 4, VOCAB - 2]
    nothing = torch.full((2, VOCAB), math.nan)
    assert loss._ranks(nothing, targets, seen).min() > 7
