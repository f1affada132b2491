"""From real files to the rows and batches of each task: lists, pairs, numbers, lines of words, and
what is hidden. Real Ray Data, real tokenisers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch

from dray.corpus.prepare import Corpus, prepare
from dray.corpus.shards import read_groups
from dray.corpus.tokenizing import TokenizerInfo
from dray.corpus.tools import Tools
from dray.errors import CorpusError, SpecError
from dray.spec import Spec, make_spec
from dray.spec import Tokenizer as Tokenizers
from dray.spec.tasks import make_task
from dray.storage.filesystem import open_filesystem
from dray.tasks import IGNORED, draw_of
from dray.tasks.rows import SEPARATOR
from tiny import tiny_tree

pytestmark = pytest.mark.usefixtures("local_ray")
TEXT = "the cat sat on a mat while Ada Lovelace wrote in London about engines"
WORDS = TEXT.split(" ")


def write(folder: Path, records: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    lines = [json.dumps(record) for record in records]
    (folder / "part.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def spec_of(folder: Path, task: Any, **sections: Any) -> Spec:
    model = {"architecture": "bert", "hidden_size": 32, "num_layers": 1, "num_heads": 2}
    data = {"validation": None, "sequence_tokens": 32, **sections.pop("data", {})}
    tree = tiny_tree(folder, task=task, model=model, data=data, **sections)
    tree["tokenizer"] = {"train": "byte_bpe", "vocab_size": 400}
    return make_spec(tree)


def labelled(folder: Path) -> dict[str, Any]:
    return {"train": {"path": f"{folder}/*.jsonl", "label": "label"}}


def rows_of(corpus: Corpus) -> Any:
    filesystem, folder = open_filesystem(corpus.folder)
    (source,) = corpus.manifest.train.sources
    groups = range(-(-source.num_rows // corpus.manifest.group_rows))
    return read_groups(filesystem, folder, source, list(groups), corpus.manifest.group_rows)


def batch_of(spec: Spec, corpus: Corpus, draw: int = 0) -> dict[str, torch.Tensor]:
    return spec.task.on(corpus.manifest, spec.model.num_labels).collate(rows_of(corpus), draw)


def test_many_labels_become_ones_and_zeros(tmp_path: Path) -> None:
    records = [
        {"text": "news of sport", "label": ["sport", "news"]},
        {"text": "only news", "label": "news"},
        {"text": "nothing at all", "label": []},
        {"text": "music, sport", "label": "music,sport"},
    ]
    folder = write(tmp_path / "in", records)
    task = {"name": "sequence_classification", "labels": "many"}
    spec = spec_of(folder, task, data=labelled(folder))
    corpus = prepare(spec, str(tmp_path / "runs"))
    assert corpus.manifest.labels == ("music", "news", "sport")
    assert corpus.manifest.train.documents_by_label == {"music": 1, "news": 2, "sport": 2}
    labels = batch_of(spec, corpus)["labels"]
    assert sorted(labels.tolist()) == [[0, 0, 0], [0, 1, 0], [0, 1, 1], [1, 0, 1]]


def test_pairs_are_one_row_with_segments_and_the_longer_is_cut(tmp_path: Path) -> None:
    records = [
        {"text": "a b", "other": "c", "label": 0},
        {"text": " ".join(WORDS * 8), "other": "short", "label": 1},
    ]
    folder = write(tmp_path / "in", records)
    data = labelled(folder)
    data["train"]["columns"] = {"text_pair": "other"}
    spec = spec_of(folder, {"name": "sequence_classification", "pairs": True}, data=data)
    corpus = prepare(spec, str(tmp_path / "runs"))
    batch = batch_of(spec, corpus)
    assert corpus.manifest.packing.num_truncated_documents == 1
    for ids, segments, mask in zip(
        batch["input_ids"], batch["token_type_ids"], batch["attention_mask"], strict=True
    ):
        inside = segments[mask.bool()].tolist()
        assert inside == sorted(inside)
        assert {0, 1} == set(inside)
        apart = ids[mask.bool()].tolist()
        (middle,) = corpus.manifest.middle
        assert apart[inside.index(1) - 1] == middle
    assert int(batch["attention_mask"].sum(dim=1).max()) == 32


def test_numbers_are_read_and_what_is_none_is_a_bad_record(tmp_path: Path) -> None:
    records = [{"text": f"text {n}", "label": n / 4} for n in range(40)]
    records += [{"text": "no number", "label": "many"}]
    folder = write(tmp_path / "in", records)
    spec = spec_of(folder, "regression", data={**labelled(folder), "max_bad_share": 0.1})
    corpus = prepare(spec, str(tmp_path / "runs"))
    assert corpus.manifest.num_bad == 1
    task = spec.task.on(corpus.manifest)
    batch = task.collate(rows_of(corpus))
    assert sorted(batch["labels"].tolist()) == [n / 4 for n in range(40)]
    assert (task.num_labels, task.num_targets(batch)) == (1, 40)


def test_a_number_that_rows_cannot_hold_costs_its_record(tmp_path: Path) -> None:
    """As infinity it would count as no target at all."""
    records: list[dict[str, Any]] = [{"text": f"text {n}", "label": n / 4} for n in range(40)]
    records += [{"text": f"far {n}", "label": n} for n in (1e39, -1e39, 10**400, 3.4e38)]
    folder = write(tmp_path / "in", records)
    spec = spec_of(folder, "regression", data={**labelled(folder), "max_bad_share": 0.5})
    corpus = prepare(spec, str(tmp_path / "runs"))
    assert (corpus.manifest.num_bad, corpus.manifest.train.num_rows) == (3, 41)
    lines = (Path(corpus.folder) / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in lines] == [
        "'label' is beyond 3.4e+38",
        "'label' is beyond 3.4e+38",
        "'label' is beyond what a float holds",
    ]
    task = spec.task.on(corpus.manifest)
    assert task.num_targets(task.collate(rows_of(corpus))) == 41


@pytest.mark.parametrize(
    ("records", "said"),
    [
        (
            [{"text": "a", "price": "x"}, {"text": "b"}],
            r"2 of its 2 records are unreadable \(first: 'price' is no number",
        ),
        ([{"text": "a"}, {"text": "b"}], "no label column 'price'; columns: text"),
        ([{"price": 1}, {"price": "x"}], "no text column 'text'; columns: price"),
    ],
)
def test_the_fault_that_is_told_is_the_one_there_is(
    tmp_path: Path, records: list[dict[str, Any]], said: str
) -> None:
    folder = write(tmp_path / "in", records)
    source = {"path": str(folder), "label": "price"}
    with pytest.raises(CorpusError, match=said):
        prepare(spec_of(folder, "regression", data={"train": source}), str(tmp_path / "runs"))


CONLL = """-DOCSTART- -X- O

Ada B-person
Lovelace I-person
wrote O

London\tB-place
\t
# a comment
rains\tO
#\tO

broken
line O
"""


def test_lines_of_words_become_tags_of_first_tokens(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.conll").write_text(CONLL, encoding="utf-8")
    data = {"train": {"path": f"{folder}/a.conll"}, "max_bad_share": 0.5}
    spec = spec_of(folder, "token_classification", data=data)
    corpus = prepare(spec, str(tmp_path / "runs"))
    assert corpus.manifest.labels == ("B-person", "B-place", "I-person", "O")
    assert corpus.manifest.num_bad == 1  # lines of one and of two columns in one sentence
    assert corpus.manifest.train.documents_by_label["O"] == 3
    labels = batch_of(spec, corpus)["labels"]
    tagged = sorted([tag for tag in row.tolist() if tag != IGNORED] for row in labels)
    assert tagged == [[0, 2, 3], [1], [3, 3]]


def test_a_sentence_longer_than_a_row_goes_on_in_others_and_no_entity_is_cut(
    tmp_path: Path,
) -> None:
    tags = ["O"] * len(WORDS)
    tags[7:9], tags[11] = ["B-person", "I-person"], "B-place"
    records = [{"tokens": WORDS * 6, "tags": tags * 6}, {"tokens": ["a"], "tags": ["O", "O"]}]
    folder = write(tmp_path / "in", records)
    spec = spec_of(folder, "token_classification", data={"max_bad_share": 0.9})
    corpus = prepare(spec, str(tmp_path / "runs"))
    assert corpus.manifest.num_bad == 1  # two tags for one token
    batch = batch_of(spec, corpus)
    order = batch["window"].argsort()
    assert batch["window"][order].tolist() == list(range(len(order)))
    assert len(set(batch["document"].tolist())) == 1
    found = [tag for row in order for tag in batch["labels"][row].tolist() if tag >= 0]
    assert [corpus.manifest.labels[tag] for tag in found] == tags * 6
    for row in batch["labels"][order[1:]].tolist():
        first = next(tag for tag in row if tag >= 0)
        assert not corpus.manifest.labels[first].startswith("I-")


def test_a_word_that_is_nothing_to_the_tokeniser_is_counted(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    words = ["[UNK]", "[PAD]", "Ada", "wrote"]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)  # drops control characters
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer/tokenizer.json"))
    (tmp_path / "tokenizer/tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
    sentence = "Ada B-PER\n\x07 I-PER\nwrote O\n\n"
    (tmp_path / "in").mkdir()
    (tmp_path / "in/train.conll").write_text(sentence + "wrote O\nAda B-PER\nAda I-PER\n\n")
    spec = spec_of(tmp_path / "in", "token_classification", data={"train": [f"{tmp_path}/in"]})
    spec = spec.model_copy(update={"tokenizer": Tokenizers(path=str(tmp_path / "tokenizer"))})
    corpus = prepare(spec, str(tmp_path / "runs"))
    packing = corpus.manifest.packing
    assert (packing.num_truncated_documents, packing.num_truncated_tokens) == (1, 1)
    assert "1 training document lost 1 token" in "\n".join(corpus.describe())

    info = TokenizerInfo(4, 1, None, "tokenizers", (), ())
    tools = Tools(f"{corpus.folder}/tokenizer", info, 32)
    texts = pa.array([SEPARATOR.join(words) for words in (["\x07", "Ada", "\x07"], ["wrote"])])
    encoded = spec.task.encode(texts.cast(pa.large_string()), None, tools)
    assert encoded.untold == {0: [0, 2]}
    join = spec.task.join_predictions
    assert join([["B-PER"]], {}, encoded.untold[0]) == {
        "prediction": [None, "B-PER", None],
        "num_untold": 2,
    }
    assert join([["O", "O"], ["O"]], {}) == {"prediction": ["O", "O", "O"]}


def test_what_is_hidden_depends_on_seed_step_and_row_alone(tmp_path: Path) -> None:
    records = [{"text": " ".join(WORDS * 3)} for _ in range(3)] + [
        {"text": " ".join(WORDS[::-1] * 20)}
    ]
    spec = spec_of(write(tmp_path / "in", records), {"name": "masked_lm", "share": 0.3})
    corpus = prepare(spec, str(tmp_path / "runs"))
    assert corpus.manifest.mask_token_id is not None
    task, table = spec.task.on(corpus.manifest), rows_of(corpus)
    table = table.append_column("row_id", pa.array(range(table.num_rows), pa.int64()))
    first, again = (task.collate(table, draw_of(7, 3)) for _ in range(2))
    other = task.collate(table, draw_of(7, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["labels"], other["labels"])
    alone = task.collate(table.slice(1, 1), draw_of(7, 3))
    assert torch.equal(alone["labels"][0], first["labels"][1])
    hidden = first["labels"] != IGNORED
    masked = first["input_ids"] == corpus.manifest.mask_token_id
    assert hidden.any(dim=1).all()
    assert (masked & ~hidden).sum() == 0
    assert 0.6 < masked.sum() / hidden.sum() < 1
    starts = torch.tensor(table.column("starts").to_pylist())
    assert not (hidden & (starts == 2)).any()  # no special token
    for row, begins in zip(hidden, starts, strict=True):
        for place in range(1, len(row)):
            if begins[place] == 0 and begins[place - 1] != 2:
                assert row[place] == row[place - 1]  # a word is hidden whole


def test_a_tokeniser_without_a_mask_is_refused(tmp_path: Path) -> None:
    first = spec_of(write(tmp_path / "in", [{"text": "one two three"}] * 3), "causal_lm")
    folder = prepare(first, str(tmp_path / "runs")).folder
    tree = first.model_dump(mode="json") | {
        "task": "masked_lm",
        "tokenizer": {"path": f"{folder}/tokenizer"},
    }
    with pytest.raises(CorpusError, match="no mask token"):
        prepare(make_spec(tree), str(tmp_path / "runs"))


@pytest.mark.parametrize(
    ("scheme", "tags", "fits"),
    [
        ("BIO", ("O", "B-A", "I-A"), True),
        ("BIOES", ("O", "B-A", "E-A", "S-A"), True),
        ("BIO", ("O", "B-A", "S-A"), False),
        ("BIO", ("NOUN", "VERB"), False),
        ("none", ("NOUN", "VERB"), True),
    ],
)
def test_tags_are_of_the_scheme(scheme: str, tags: tuple[str, ...], fits: bool) -> None:
    task: Any = make_task({"name": "token_classification", "scheme": scheme})
    corpus: Any = SimpleNamespace(labels=tags)
    if fits:
        task.check(corpus)
        return
    with pytest.raises(SpecError, match=f"task.scheme = {scheme}: the training documents have"):
        task.check(corpus)
