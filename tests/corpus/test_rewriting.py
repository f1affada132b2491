"""Rows in other words: the same for whoever reads them, made of the text that they say they are
made of, and no row but those that are drawn."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dray.corpus.manifest import Manifest
from dray.corpus.prepare import Corpus, find, prepare
from dray.corpus.rewriting import KEPT, Rewriter
from dray.corpus.stream import RowStream
from dray.corpus.tokenizing import load_decoder
from dray.errors import CorpusError, SpecError
from dray.rank.feeding import hide_tokens
from dray.spec import Spec, make_spec
from dray.tasks.rows import HIDDEN
from tiny import tiny_tree

pytestmark = pytest.mark.usefixtures("local_ray")
WORDS = ("red", "green", "old", "new", "cold", "warm")
KINDS = ["synonyms", "insertion", "swap", "deletion", "keyboard", "ocr"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Labelled texts, pairs, tagged words, and a thesaurus."""
    drawn = random.Random(0)
    records = []
    for _ in range(90):
        words = [drawn.choice(WORDS) for _ in range(drawn.randint(3, 9))]
        tags = ["B-AGE" if word in ("old", "new") else "O" for word in words]
        label = drawn.choice(("a", "b"))
        text = " ".join(words)
        other = f"{drawn.choice(WORDS)} {drawn.choice(WORDS)}"
        labels = sorted(drawn.sample(("x", "y", "z"), drawn.randint(1, 2)))
        records.append({"text": text, "label": label, "other": other, "labels": labels,
                        "tokens": words, "tags": tags})  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    (tmp_path / "words").write_text("red crimson scarlet\nold aged\nnew fresh\n", encoding="utf-8")
    return tmp_path


def spec_of(folder: Path, task: Any = "sequence_classification", **augmentation: Any) -> Spec:
    source = {"path": f"{folder}/a.jsonl", "label": "label"}
    name = task if isinstance(task, str) else task["name"]
    if name == "token_classification":
        source = {"path": f"{folder}/a.jsonl"}
    elif name == "causal_lm":
        del source["label"]
    elif isinstance(task, dict):
        source |= {"columns": {"text_pair": "other"}} if task.get("pairs") else {"label": "labels"}
    kinds = augmentation.setdefault("kinds", KINDS)
    if {"synonyms", "insertion"} & set(kinds):
        augmentation.setdefault("thesaurus", f"{folder}/words")
    data = {
        "train": [source],
        "validation": {"share": 0.2},
        "sequence_tokens": 32,
        "cleaning": {"deduplicate": "none"},
    }
    tree = tiny_tree(folder, task=task, augmentation=augmentation, data=data)
    tree["model"] = {"architecture": "bert", "hidden_size": 16, "num_layers": 1, "num_heads": 2}
    if name == "causal_lm":
        tree["model"]["architecture"] = "llama"
    return make_spec(tree)


def stream(spec: Spec, corpus: Corpus, num_ranks: int = 1, start_step: int = 0) -> RowStream:
    rows = 12
    assert spec.augmentation is not None
    return RowStream(
        corpus.folder, corpus.manifest.key, spec.seed, rows, num_ranks, -(-rows // num_ranks), 1,
        start_step, 20, rewriter=Rewriter(spec.augmentation, spec.task, spec.seed),
    )  # fmt: skip


def learnt(reader: RowStream) -> dict[int, list[Any]]:
    """By step what all ranks read, in the order's order."""
    found: dict[int, list[Any]] = {}
    for rank in range(reader.num_ranks):
        for load in reader.loads():
            block = reader.read_block(load, rank)
            for segment, rows in reader.cut(block, load):
                if segment.kind != "train":
                    continue
                for number, row in enumerate(rows.to_pylist()):
                    step = segment.first + number // reader.rows_per_rank
                    if row["row_id"] >= 0:
                        found.setdefault(step, []).append(row)
    return found


TASKS: list[tuple[Any, list[str]]] = [
    ("sequence_classification", [*KINDS, "token_cutoff", "span_masking"]),
    ({"name": "sequence_classification", "pairs": True}, KINDS),
    ({"name": "sequence_classification", "labels": "many"}, KINDS),
    ("token_classification", ["synonyms", "keyboard", "ocr", "token_cutoff"]),
    ("causal_lm", ["token_cutoff", "span_masking"]),
]


@pytest.mark.parametrize(("task", "kinds"), TASKS, ids=["one", "pairs", "many", "tags", "texts"])
def test_rows_are_the_same_at_any_number_of_ranks_and_after_any_restart(
    folder: Path, task: Any, kinds: list[str]
) -> None:
    spec = spec_of(folder, task, kinds=kinds, share=0.7, strength=0.3)
    corpus = prepare(spec, str(folder / "runs"))
    assert find(spec, str(folder / "runs")) == corpus
    alone = learnt(stream(spec, corpus))
    assert len(alone) == 20
    for ranks, start in ((3, 0), (2, 7), (5, 13)):
        assert learnt(stream(spec, corpus, ranks, start)) == {
            step: rows for step, rows in alone.items() if step > start
        }
    rows = [row for step in alone.values() for row in step]
    assert not any(name in row for row in rows for name in KEPT)
    by_row: dict[int, set[str]] = {}
    for row in rows:
        by_row.setdefault(row["row_id"], set()).add(json.dumps(row))
    assert sum(len(forms) > 1 for forms in by_row.values()) > len(by_row) / 2  # others each epoch


def test_a_changed_row_is_its_text_encoded_and_its_label_stays(folder: Path) -> None:
    spec = spec_of(folder, share=0.5, strength=0.3)
    corpus = prepare(spec, str(folder / "runs"))
    reader = stream(spec, corpus)
    plain = RowStream(**{name: getattr(reader, name) for name in ("folder", "key", "seed")},
                      global_rows=12, num_ranks=1, rows_per_rank=12, micro_rows=1, start_step=0,
                      num_steps=20)  # fmt: skip
    decoder = load_decoder(f"{corpus.folder}/tokenizer")
    num_changed = num = 0
    before = learnt(plain)
    for step, rows in learnt(reader).items():
        for one, other in zip(before[step], rows, strict=True):
            assert (one["row_id"], one["label"]) == (other["row_id"], other["label"])
            said = bytes(one["given_text"]).decode()
            size = other["num_tokens"]
            told = decoder.decode(other["input_ids"][:size], skip_special_tokens=True)
            changed = other["input_ids"] != one["input_ids"]
            assert changed == (told != said)
            num_changed, num = num_changed + changed, num + 1
    assert 0.38 < num_changed / num < 0.55  # a swap of equal words changes nothing


def test_validation_rows_stay_as_they_are(folder: Path) -> None:
    spec = spec_of(folder, kinds=["swap", "token_cutoff"], share=1.0)
    corpus = prepare(spec, str(folder / "runs"))
    reader = stream(spec, corpus)
    held = corpus.manifest.validation
    assert held is not None
    found = [
        row
        for load in reader.loads()
        for segment, rows in reader.cut(reader.read_block(load, 0), load)
        if segment.kind == "validation"
        for row in rows.to_pylist()
        if row["row_id"] >= 0
    ]
    assert len(found) == held.num_rows
    decoder = load_decoder(f"{corpus.folder}/tokenizer")
    texts = {json.loads(line)["text"] for line in (folder / "a.jsonl").read_text().splitlines()}
    told = {decoder.decode(row["input_ids"][: row["num_tokens"]]) for row in found}
    assert {text.replace("<|endoftext|>", "") for text in told} <= texts
    assert all(row[HIDDEN] == [] for row in found)


def test_documents_of_several_rows_keep_their_words_and_are_counted(folder: Path) -> None:
    words = ["old", "cold"] * 40
    record = {"tokens": words, "tags": ["O"] * len(words)}
    with (folder / "a.jsonl").open("a") as file:
        file.write("\n" + json.dumps(record))
    spec = spec_of(folder, "token_classification", kinds=["synonyms"], share=1.0, strength=1.0)
    spec = make_spec({**spec.model_dump(mode="json"), "data": {
        **spec.data.model_dump(mode="json"), "validation": None}})  # fmt: skip
    corpus = prepare(spec, str(folder / "runs"))
    assert corpus.manifest.num_unchanged >= 3
    assert any(f"{corpus.manifest.num_unchanged} training rows are of documents that became "
               "several" in line for line in corpus.describe())  # fmt: skip


def test_how_often_and_how_much_is_no_matter_of_the_corpus(folder: Path) -> None:
    storage = str(folder / "runs")
    corpus = prepare(spec_of(folder), storage)
    for other in ({"share": 0.1}, {"strength": 0.9}, {"kinds": ["swap", "synonyms"]}):
        assert find(spec_of(folder, **other), storage) == corpus
    (folder / "words").write_text("red crimson\n", encoding="utf-8")
    assert find(spec_of(folder), storage) is None
    assert find(spec_of(folder, kinds=["swap"]), storage) is None  # it has no thesaurus


@pytest.mark.parametrize(
    ("task", "augmentation", "message"),
    [
        ("causal_lm", {"kinds": ["swap"]}, "swap: texts of causal_lm are packed"),
        ("token_classification", {"kinds": ["keyboard", "deletion"]}, "deletion: a tag belongs to"),
        ("sequence_classification", {"kinds": []}, "augmentation.kinds"),
        ("sequence_classification", {"kinds": ["swap", "swap"]}, "names swap twice"),
        ("sequence_classification", {"kinds": ["swap"], "thesaurus": "x"}, "neither is given"),
        ("sequence_classification", {"kinds": ["synonyms"], "thesaurus": None}, "is needed"),
        ("sequence_classification", {"kinds": ["back_translation"]}, "belong together"),
        ("sequence_classification", {"kinds": ["swap"], "share": 0}, "augmentation.share"),
    ],
)
def test_what_cannot_be_is_refused(
    folder: Path, task: str, augmentation: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        spec_of(folder, task, **augmentation)


def test_a_thesaurus_that_is_none_is_refused_before_anything_is_written(folder: Path) -> None:
    storage = folder / "runs"
    with pytest.raises(CorpusError, match=r"augmentation\.thesaurus: .*nowhere is no file"):
        prepare(spec_of(folder, thesaurus=f"{folder}/nowhere"), str(storage))
    assert not storage.exists()
    (folder / "words").write_text("alone\n", encoding="utf-8")
    with pytest.raises(CorpusError, match="has no two words that mean the same"):
        prepare(spec_of(folder), str(storage))
    assert not storage.exists()


def test_hidden_tokens_are_the_mask_to_the_model_alone(folder: Path) -> None:
    spec = spec_of(folder, "causal_lm", kinds=["token_cutoff"], share=1.0, strength=0.25)
    corpus = prepare(spec, str(folder / "runs"))
    manifest: Manifest = corpus.manifest
    task = spec.task.on(manifest)
    reader = stream(spec, corpus)
    rows: pa.Table = reader.read_block(next(reader.loads()), 0).slice(0, 12)
    batch = task.collate(rows)
    hidden = hide_tokens(batch, rows, manifest)
    assert (hidden["labels"] == batch["labels"]).all()
    changed = (hidden["input_ids"] != batch["input_ids"]).numpy()
    assert (hidden["input_ids"].numpy()[changed] == manifest.mask_token_id).all()
    sizes = rows.column("num_tokens").to_numpy()
    assert np.array_equal(
        changed.sum(axis=1), [len(row) for row in rows.column(HIDDEN).to_pylist()]
    )
    assert (np.abs(changed.sum(axis=1) / sizes - 0.25) < 0.1).all()
