"""Answers to texts, by an encoder with a decoder behind it and by a decoder alone: a toy language
is learnt exactly, taken up again exactly, and measured by what is written."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from dray.cli import main
from dray.corpus.prepare import prepare
from dray.corpus.tokenizing import TokenizerInfo
from dray.corpus.tools import Tools
from dray.release.evaluate import evaluate
from dray.release.export import export
from dray.release.generate import generate
from dray.release.predict import Counts, predict
from dray.runs import Run
from dray.spec import Spec, make_spec
from dray.tasks.parts.text_metrics import measure_texts
from dray.tasks.parts.writing import DecodedLoss, pad_before, pad_behind, write
from dray.tasks.rows import IGNORED
from dray.tasks.seq2seq import Seq2Seq
from dray.train import train_locally
from small_models import small_model, small_spec
from tiny import tiny_tree

SLOTS = (
    (["one", "two", "five", "ten"], ["ka", "lo", "mi", "po"]),
    (["red", "blue", "green", "pale"], ["tu", "fen", "sar", "wik"]),
    (["cats", "dogs", "birds", "fish"], ["gor", "rax", "nim", "lub"]),
    (["run", "sleep", "sing", "wait"], ["suv", "hin", "dep", "yor"]),
)
TEXTS = [" ".join(words) for words in itertools.product(*(ours for ours, _ in SLOTS))]


def translated(text: str) -> str:
    """The toy language has another word for each, in the opposite order: each text has one
    translation, and each translation is of one text."""
    words = {word: other for slot in SLOTS for word, other in zip(*slot, strict=True)}
    return " ".join(words[word] for word in reversed(text.split()))


def write_pairs(folder: Path) -> None:
    folder.mkdir()
    lines = [json.dumps({"text": text, "foreign": translated(text)}) for text in TEXTS]
    random.Random(0).shuffle(lines)
    (folder / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")


def make(folder: Path, *, alone: bool, steps: int, **sections: Any) -> Spec:
    tree = tiny_tree(
        folder,
        name="toy",
        task={"name": "seq2seq", "decoder_only": alone, "answer_tokens": 16, "beams": 2},
        data={
            "train": {"path": f"{folder}/pairs.jsonl", "columns": {"answer": "foreign"}},
            "validation": {"share": 0.2},
            "sequence_tokens": 32,
        },
        tokenizer={"train": "byte_bpe", "vocab_size": 400},
        model={
            "architecture": "llama" if alone else "t5",
            "hidden_size": 64,
            "num_layers": 1,
            "num_heads": 4,
        },
        batch={"global_rows": 32, "micro_rows": 16},
        optimizer={"learning_rate": 5e-3},
        schedule={"name": "constant", "warmup_steps": 10},
        validation={"every_steps": 50, "max_rows": None},
        checkpoint={"every_steps": 50},
        resources={"workers": 1},
    )
    tree["duration"] = {"steps": steps}
    return make_spec(tree | sections)


@pytest.mark.parametrize("alone", [False, True])
def test_a_toy_language_is_learnt_exactly(
    tmp_path: Path, local_ray: None, capsys: pytest.CaptureFixture[str], alone: bool
) -> None:
    folder, storage = tmp_path / "in", str(tmp_path / "runs")
    write_pairs(folder)
    spec = make(folder, alone=alone, steps=100)
    corpus = prepare(spec, storage)
    assert corpus.manifest.packing.num_truncated_documents == 0
    train_locally(spec, storage=storage, run_name="toy")
    measured = Run.open(storage, "toy").validations()[-1]
    assert measured["accuracy"] > 0.97
    exact = evaluate(storage, "toy", thorough=True)
    assert exact["loss"] == pytest.approx(measured["loss"], rel=1e-4, abs=1e-5)
    assert exact["num_texts"] == exact["num_rows"]
    assert exact["exact"] > 0.9
    assert exact["bleu"] > 90
    assert exact["rougel"] > 0.95
    (folder / "new.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in TEXTS[::16]), encoding="utf-8"
    )
    counts = Counts()
    found = list(predict(storage, "toy", [str(folder / "new.jsonl")], counts=counts))
    assert (counts.num_predicted, counts.num_cut) == (16, 0)
    assert [record["text"] for record in found] == TEXTS[::16]
    right = [record["prediction"] == translated(record["text"]) for record in found]
    assert sum(right) >= 14
    texts = generate(storage, "toy", TEXTS[:4], temperature=0, beams=2)
    assert sum(map(str.__eq__, texts, map(translated, TEXTS[:4]))) >= 3
    command = ["generate", "toy", "--storage", storage, "--prompt", TEXTS[0], "--beams", "2"]
    assert main(command) == 0
    assert capsys.readouterr().out == f"── {TEXTS[0]}\n{texts[0]}\n\n"
    if not alone:
        check_export(storage, tmp_path / "out", texts)


def check_export(storage: str, folder: Path, texts: list[str]) -> None:
    """transformers writes the same with the exported folder."""
    export(storage, "toy", str(folder))
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = tokenizer(TEXTS[:4], return_tensors="pt", padding=True)
    ids = model.generate(**given, num_beams=2, do_sample=False, max_new_tokens=64)
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == texts


def make_tools(row_tokens: int) -> Tools:
    """Of a tokeniser whose ids are letters, between 1 and 2, with 3 between two texts."""

    class Letters(Tools):
        def encode(self, texts: pa.Array) -> Any:

            found = [[ord(letter) for letter in text] for text in texts.to_pylist()]
            ids = np.array([i for text in found for i in text], np.uint32)
            return ids, np.array(list(map(len, found)), np.int64)

    info = TokenizerInfo(128, 0, 2, "tokenizers", (1,), (2,), (3,))
    return Letters("", info, row_tokens)


def strings(*texts: str) -> pa.Array:
    return pa.array(texts, pa.large_string())


def test_what_is_too_long_for_a_row_is_cut_and_counted() -> None:
    task = Seq2Seq(Seq2Seq.Settings(decoder_only=True, answer_tokens=8))
    texts, answers = strings("abc", "a" * 30, "a" * 30, "abc"), ("xy", "xy", "x" * 30, "x" * 30)
    encoded = task.encode(texts, pa.array(answers), make_tools(23))
    # A row has room for 20 between its three marks; an answer of 8 tokens for 7 and its end.
    assert encoded.lengths.tolist() == [3 + 1 + 2, 18 + 1 + 2, 13 + 1 + 7, 3 + 1 + 7]
    assert encoded.columns["prompt"].tolist() == [5, 20, 15, 5]
    assert encoded.columns["whole"].tolist() == [1, 1, 0, 0]
    assert encoded.num_lost is not None
    assert encoded.num_lost.tolist() == [0, 12, 17 + 23, 23]
    asked = task.encode(texts, None, make_tools(23))
    assert asked.columns["prompt"].tolist() == [5, 14, 14, 5]
    behind = Seq2Seq(Seq2Seq.Settings(answer_tokens=8))
    encoded = behind.encode(texts, pa.array(answers), make_tools(23))
    x, y = ord("x"), ord("y")
    assert encoded.columns["answer"].to_pylist() == [[x, y, 2], [x, y, 2], [x] * 8, [x] * 8]
    assert encoded.num_lost is not None
    assert encoded.num_lost.tolist() == [0, 0, 23, 23]
    assert encoded.lengths.tolist() == [3, 30, 30, 3]


def test_the_loss_of_a_row_is_of_the_answer_alone() -> None:
    task = Seq2Seq(Seq2Seq.Settings(decoder_only=True))
    ids = pa.FixedSizeListArray.from_arrays(pa.array(range(24), pa.uint16()), 8)
    table = pa.table(
        {
            "input_ids": ids,
            "num_tokens": pa.array([7, 7, 6], pa.int32()),
            "prompt": pa.array([3, 3, 2], pa.int32()),
            "whole": pa.array([1, 0, 1], pa.uint8()),
            "row_id": pa.array([4, 5, -1]),
        }
    )
    batch = task.collate(table)
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    none = IGNORED
    assert batch["labels"].tolist() == [
        [none, none, 3, 4, 5, 6, none],
        [none, none, 11, 12, 13, none, none],  # a cut answer's end is none of it
        [none] * 7,
    ]
    batch = task.predicting().collate(table)
    assert batch["prompt"].tolist() == [[0, 1, 2], [8, 9, 10], [0, 16, 17]]
    assert batch["prompt_mask"].tolist() == [[1, 1, 1], [1, 1, 1], [0, 1, 1]]


@pytest.mark.parametrize("architecture", ["t5", "bart", "pegasus"])
def test_the_loss_behind_an_encoder_is_transformers_own(architecture: str) -> None:
    spec = small_spec(architecture, "causal_lm")
    spec = spec.model_copy(update={"task": Seq2Seq()})
    model = small_model(spec)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 500, (size,), generator=generator) for size in (7, 12, 9)]
    ids, labels = pad_behind(rows, 1), pad_behind([row.flip(0)[:6] for row in rows], IGNORED)
    batch = {"input_ids": ids, "attention_mask": (ids != 1).long(), "labels": labels}
    with torch.no_grad():
        terms, output = DecodedLoss(model)(batch)
        theirs = model(**{**batch, "labels": labels})
    loss, count = terms["loss"]
    assert int(count) == int((labels != IGNORED).sum()) == 18
    torch.testing.assert_close(loss / count, theirs.loss, rtol=1e-5, atol=1e-5)
    wanted = F.cross_entropy(theirs.logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(output["loss_sum"], wanted, rtol=1e-5, atol=1e-4)


def test_prompts_of_any_lengths_are_answered_as_each_by_itself() -> None:
    model = small_model(small_spec("gpt2"))
    rows = [torch.arange(5, 5 + size) for size in (3, 9, 1)]
    prompt, mask = pad_before(rows, 1)
    for beams in (1, 3):
        together = write(model, prompt, mask, most_tokens=6, beams=beams)
        for row, found in zip(rows, together, strict=True):
            alone = write(
                model, row[None], torch.ones(1, len(row)).long(), most_tokens=6, beams=beams
            )
            assert found[: alone.shape[1]].tolist() == alone[0].tolist()
    # Positions end with the row that the model takes.
    full = torch.arange(2, 32)[None]
    assert write(model, full, torch.ones_like(full), most_tokens=6).shape == (1, 2)


def test_metrics_of_texts_count_words_as_told() -> None:
    one = measure_texts(["the cat sat down"], ["the cat sat down"])
    assert (one["bleu"], one["chrf"]) == pytest.approx((100.0, 100.0))
    assert (one["rouge1"], one["exact"]) == (1.0, 1.0)
    wanted, written = ["今天天气很好我们去公园"], ["今天天气很好我们回家"]
    by_letter = measure_texts(wanted, written, words="zh")
    assert by_letter["rouge1"] == pytest.approx(2 * 8 / (11 + 10))
    assert by_letter["bleu"] > 50
    assert measure_texts(wanted, written)["rouge1"] == 0.0  # one word to who looks for spaces
