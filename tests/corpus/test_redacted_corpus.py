"""A corpus without personal data: not in its rows, its vocabulary, its kept texts or any file;
counted; the same however it is cut."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dray.corpus import prepare as prepare_module
from dray.corpus.account import to_json
from dray.corpus.cleaning import clean
from dray.corpus.prepare import Corpus, corpus_key, find, prepare
from dray.corpus.redacted import redact_documents
from dray.corpus.redacting import make_redactor
from dray.errors import CorpusError, SpecError
from dray.spec import Cleaning, Redaction, make_spec
from dray.tasks.rows import SEPARATOR
from tiny import tiny_tree

WORDS = "the cat sat on a mat and saw one red bird fly over seven small houses".split()  # noqa: SIM905
SECRETS = ("anna.schmidt@example.com", "+49 30 1234567", "4111 1111 1111 1111")


def texts(count: int, seed: int = 0) -> list[str]:
    """Every fourth holds some of SECRETS."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        words = [f"{seed}-{number}", *rng.choices(WORDS, k=rng.randint(5, 40))]
        if number % 4 == 0:
            words.insert(rng.randrange(1, len(words)), rng.choice(SECRETS))
        found.append(" ".join(words))
    return found


def spec(train: Any, task: Any = "causal_lm", **sections: Any) -> Any:
    tree = tiny_tree(Path("."), task="causal_lm")
    tree["task"] = task
    data = {"train": train, "sequence_tokens": 64, **sections.pop("data", {})}
    tokenizer = {"train": "byte_bpe", "vocab_size": 600}
    return make_spec({**tree, "data": data, "tokenizer": tokenizer, **sections})


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def whole(corpus: Corpus) -> str:
    """Everything that lies in a corpus' folder, and its rows as text."""
    from tokenizers import Tokenizer

    from dray.corpus.shards import read_groups
    from dray.storage.filesystem import open_filesystem

    said = []
    tokenizer = Tokenizer.from_file(f"{corpus.folder}/tokenizer/tokenizer.json")
    for split in filter(None, (corpus.manifest.train, corpus.manifest.validation)):
        for source in split.sources:
            groups = range(-(-source.num_rows // corpus.manifest.group_rows))
            table = read_groups(
                *open_filesystem(corpus.folder), source, groups, corpus.manifest.group_rows
            )
            for row in table.to_pylist():
                said.append(tokenizer.decode(row["input_ids"], skip_special_tokens=False))
                said += [bytes(row[name]).decode() for name in row if name.startswith("given_")]
    files = [path for path in Path(corpus.folder).rglob("*") if path.is_file()]
    said += [path.read_bytes().decode(errors="replace") for path in files]
    return "\n".join(said)


@pytest.mark.usefixtures("local_ray")
def test_nothing_of_it_is_kept_or_learnt(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts(400)])
    data = {"redaction": {}, "validation": {"share": 0.1}}
    plain = spec(str(path), data={"validation": {"share": 0.1}})
    hidden = spec(str(path), data=data)
    assert corpus_key(plain) != corpus_key(hidden)
    corpus = prepare(hidden, str(tmp_path / "runs"))
    manifest = corpus.manifest
    assert manifest.num_redacted == 100
    assert sum(manifest.redacted.values()) == 100
    assert set(manifest.redacted) == {"email", "phone", "card"}
    text = whole(corpus)
    assert text.count("[EMAIL]") >= manifest.redacted["email"]
    for secret in ("schmidt", "1234567", "4111"):
        assert secret not in text
    (line,) = [line for line in corpus.describe() if line.startswith("redacted")]
    assert "e-mail addresses" in line
    assert line.endswith(" in 100 documents")
    told = to_json(manifest, corpus.source_files())
    assert (told["redacted"], told["num_redacted_documents"]) == (manifest.redacted, 100)
    assert find(hidden, str(tmp_path / "runs")) == corpus


@pytest.mark.usefixtures("local_ray")
def test_rows_are_the_same_however_the_files_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAY_PSEUDONYM_KEY", "a key of pseudonyms 4711")
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts(600, seed=3)])
    # A vocabulary that is there already: its training sample is drawn from the parts.
    first = prepare(spec(str(path)), str(tmp_path / "tokenizer"))
    tokenizer = {"path": f"{first.folder}/tokenizer"}
    found = []
    for number, size in enumerate((1 << 30, 20_000)):
        monkeypatch.setattr(prepare_module, "choose_part_bytes", lambda files, size=size: size)
        monkeypatch.setattr(prepare_module, "MIN_CHUNK_BYTES", 1)
        given = spec(str(path), data={"redaction": {"mode": "pseudonym"}}, tokenizer=tokenizer)
        corpus = prepare(given, str(tmp_path / f"runs{number}"))
        pieces = whole(corpus).split("<|endoftext|>")
        kept = sorted(piece for piece in pieces if piece.startswith("3-"))
        found.append((corpus.manifest.redacted, corpus.manifest.num_redacted, set(kept)))
    assert found[0] == found[1]
    assert found[0][1] == 150


@pytest.mark.usefixtures("local_ray")
def test_kept_texts_and_answers_are_redacted_and_labels_are_not(tmp_path: Path) -> None:
    records = [
        {"text": text, "label": "a@example.org" if number % 2 else "b"}
        for number, text in enumerate(texts(80))
    ]
    path = write(tmp_path / "a.jsonl", records)
    given = spec(
        {"path": str(path), "label": "label"},
        {"name": "sequence_classification"},
        data={"redaction": {"kinds": ["email", "phone", "card"]}},
        augmentation={"kinds": ["swap"]},
        model={"architecture": "bert", "hidden_size": 16, "num_layers": 1, "num_heads": 2},
    )
    corpus = prepare(given, str(tmp_path / "runs"))
    assert corpus.manifest.labels == ("a@example.org", "b")
    text = whole(corpus)
    assert "[EMAIL]" in text
    assert not any(secret in text for secret in SECRETS)


@pytest.mark.usefixtures("local_ray")
def test_what_becomes_equal_is_one_document_and_what_is_dropped_is_counted(tmp_path: Path) -> None:
    same = [{"text": f"write to {name}@example.com today"} for name in ("anna", "bert", "carl")]
    path = write(tmp_path / "a.jsonl", [*same, *({"text": text} for text in texts(40))])
    masked = prepare(spec(str(path), data={"redaction": {}}), str(tmp_path / "runs"))
    assert masked.manifest.dropped == {"duplicate": 2}
    assert masked.manifest.num_redacted == 13
    dropped = prepare(spec(str(path), data={"redaction": {"mode": "drop"}}), str(tmp_path / "runs"))
    assert sum(dropped.manifest.dropped.values()) == 13
    assert dropped.manifest.dropped["with e-mail addresses"] >= 3
    assert dropped.manifest.num_redacted == 0
    assert "redacted" not in json.loads(Path(dropped.folder, "manifest.json").read_text())
    only = write(tmp_path / "b.jsonl", same)
    with pytest.raises(CorpusError, match="with e-mail addresses"):
        prepare(spec(str(only), data={"redaction": {"mode": "drop"}}), str(tmp_path / "runs"))


def test_a_key_goes_by_what_is_redacted_and_not_by_the_name_of_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(write(tmp_path / "a.jsonl", [{"text": "words"}]))
    monkeypatch.setenv("ONE", "1" * 32)
    monkeypatch.setenv("SAME", "1" * 32)
    monkeypatch.setenv("TWO", "2" * 32)

    def key(**redaction: Any) -> str:
        return corpus_key(spec(path, data={"redaction": redaction}))

    keys = {
        corpus_key(spec(path)),
        key(),
        key(mode="drop"),
        key(kinds=["email"]),
        key(regions=["DE"]),
        key(mode="pseudonym", pseudonym_key="ONE"),
        key(mode="pseudonym", pseudonym_key="TWO"),
    }
    assert len(keys) == 7
    assert key(mode="pseudonym", pseudonym_key="SAME") in keys
    assert key(pseudonym_key="NOWHERE") == key()
    with pytest.raises(SpecError, match="is not set"):
        key(mode="pseudonym", pseudonym_key="NOWHERE")


@pytest.mark.parametrize(
    ("kinds", "given", "wanted"),
    [
        (["text"], f"a{SEPARATOR}x@example.org", f"a{SEPARATOR}[EMAIL]"),
        (["text", "text"], f"x@example.org{SEPARATOR}+49 30 1234567", f"[EMAIL]{SEPARATOR}[PHONE]"),
        (["words"], f"+49{SEPARATOR}30{SEPARATOR}1234567", SEPARATOR.join(["[PHONE]"] * 3)),
        (["names"], f"x@example.org{SEPARATOR}y", f"x@example.org{SEPARATOR}y"),
        (["name", "text"], f"x@example.org{SEPARATOR}y@e.org", f"x@example.org{SEPARATOR}[EMAIL]"),
        (["bytes"], "eEBleGFtcGxlLm9yZw==", "eEBleGFtcGxlLm9yZw=="),
        (["record"], '{"a":"x@example.org"}', '{"a":"[EMAIL]"}'),
        (["names", "text"], f"1{SEPARATOR}2{SEPARATOR}x@e.org", f"1{SEPARATOR}2{SEPARATOR}[EMAIL]"),
        (["words", "names"], SEPARATOR.join(["1", "x@e.org"]), f"1{SEPARATOR}[EMAIL]"),
    ],
)  # fmt: skip
def test_fields_are_redacted_by_their_kinds(kinds: list[str], given: str, wanted: str) -> None:
    redactor = make_redactor(Redaction())
    assert redactor is not None
    documents = clean(pa.array([given], pa.large_string()), None, Cleaning())
    found = redact_documents(documents, redactor, kinds, answers=False)
    assert found.texts.to_pylist() == [wanted]
    assert found.num_redacted == (given != wanted)


def test_answers_are_redacted_with_their_texts() -> None:
    redactor = make_redactor(Redaction())
    assert redactor is not None
    texts = pa.array(["a", "x@example.org", "c"], pa.large_string())
    answers = pa.array(["+49 30 1234567", "y@example.org", "d"])
    documents = clean(texts, answers, Cleaning(), answers=True)
    found = redact_documents(documents, redactor, ["text"], answers=True)
    assert found.labels is not None
    assert found.labels.to_pylist() == ["[PHONE]", "[EMAIL]", "d"]
    assert (found.redacted, found.num_redacted) == ({"email": 2, "phone": 1}, 2)
    labelled = redact_documents(documents, redactor, ["text"], answers=False)
    assert labelled.labels == documents.labels
