"""A corpus without personal data: not in its rows, its vocabulary, its kept texts or any file;
counted; the same however it is cut."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow.fs import LocalFileSystem

from dray.corpus import prepare as prepare_module
from dray.corpus.account import to_json
from dray.corpus.cleaning import clean
from dray.corpus.prepare import Corpus, corpus_key, find, prepare
from dray.corpus.redacted import redact_documents
from dray.corpus.redacting import make_redactor
from dray.corpus.shards import read_groups
from dray.corpus.tokenizing import save_trained, train_byte_bpe
from dray.errors import CorpusError, SpecError
from dray.spec import Cleaning, Redaction, make_spec
from dray.storage.filesystem import open_filesystem
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


def rows(corpus: Corpus) -> list[tuple[str, list[int]]]:
    """Text and tokens of every training row, sorted."""
    (source,) = corpus.manifest.train.sources
    groups = range(-(-source.num_rows // corpus.manifest.group_rows))
    filesystem, folder = open_filesystem(corpus.folder)
    table = read_groups(filesystem, folder, source, groups, corpus.manifest.group_rows)
    return sorted(
        (bytes(row["given_text"]).decode(), row["input_ids"]) for row in table.to_pylist()
    )


@pytest.mark.usefixtures("local_ray")
def test_rows_are_the_same_however_files_are_cut_and_labels_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAY_PSEUDONYM_KEY", "a key of pseudonyms 4711")
    given_texts = texts(200, seed=3)
    labels = [("a@example.org", "b")[number % 2] for number in range(200)]
    records = [{"text": t, "label": n} for t, n in zip(given_texts, labels, strict=True)]
    path = write(tmp_path / "a.jsonl", records)
    # A vocabulary that is there already: the sample for one is drawn from the parts.
    vocabulary = train_byte_bpe([text.encode() for text in given_texts], 300)
    save_trained(LocalFileSystem(), str(tmp_path / "tokenizer"), vocabulary)
    tree = tiny_tree(Path("."), task="sequence_classification")
    tree["data"] = {
        "train": {"path": str(path), "label": "label"},
        "sequence_tokens": 128,
        "redaction": {"mode": "pseudonym"},
    }
    tree["tokenizer"] = {"path": str(tmp_path / "tokenizer")}
    tree["augmentation"] = {"kinds": ["swap"]}
    found = []
    for number, size in enumerate((1 << 30, 5_000)):
        monkeypatch.setattr(prepare_module, "choose_part_bytes", lambda files, size=size: size)
        monkeypatch.setattr(prepare_module, "MIN_CHUNK_BYTES", 1)
        found.append(prepare(make_spec(tree), str(tmp_path / f"runs{number}")))
    assert rows(found[0]) == rows(found[1])
    manifests = [corpus.manifest for corpus in found]
    assert manifests[0].redacted == manifests[1].redacted
    assert [one.num_redacted for one in manifests] == [50, 50]
    assert manifests[0].labels == ("a@example.org", "b")
    kept = "\n".join(text for text, _ in rows(found[0]))
    assert kept.count("[EMAIL-") == manifests[0].redacted["email"]
    assert len(set(re.findall(r"\[EMAIL-[0-9a-f]{8}\]", kept))) == 1
    assert not any(secret in kept for secret in SECRETS)


@pytest.mark.usefixtures("local_ray")
def test_what_becomes_equal_is_one_document_and_dropping_all_is_told(tmp_path: Path) -> None:
    same = [{"text": f"write to {name}@example.com today"} for name in ("anna", "bert", "carl")]
    path = write(tmp_path / "a.jsonl", [*same, *({"text": text} for text in texts(40))])
    masked = prepare(spec(str(path), data={"redaction": {}}), str(tmp_path / "runs"))
    assert masked.manifest.dropped == {"duplicate": 2}
    assert masked.manifest.num_redacted == 13
    only = write(tmp_path / "b.jsonl", same)
    with pytest.raises(CorpusError, match="dropped: 3 with e-mail addresses"):
        prepare(spec(str(only), data={"redaction": {"mode": "drop"}}), str(tmp_path / "runs"))


def test_what_is_dropped_is_counted_by_its_first_kind() -> None:
    redactor = make_redactor(Redaction(mode="drop"))
    assert redactor is not None
    held = pa.array([*SECRETS, "tel " + " ".join(SECRETS), "none"], pa.large_string())
    labels = pa.array(["a", "b", "c", "d", "e"])
    found = redact_documents(clean(held, labels, Cleaning()), redactor, ["text"], answers=False)
    assert found.texts.to_pylist() == ["none"]
    assert found.labels is not None
    assert found.labels.to_pylist() == ["e"]
    wanted = {"with e-mail addresses": 2, "with phone numbers": 1, "with card numbers": 1}
    assert (found.dropped, found.num_redacted) == (wanted, 0)


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
