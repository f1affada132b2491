"""Preparing whole corpora with a real Ray: nothing is lost, the result is always the same, bad
input is refused."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dray.corpus import prepare as prepare_module
from dray.corpus.account import describe
from dray.corpus.manifest import Manifest, SourceRows
from dray.corpus.prepare import Corpus, corpus_key, find, find_inputs, prepare, recall
from dray.corpus.shards import read_groups
from dray.errors import CorpusError, StorageFailed, StoreError
from dray.redaction import restored
from dray.spec import Spec, make_spec
from dray.storage.filesystem import open_filesystem
from tiny import tiny_tree

pytestmark = pytest.mark.usefixtures("local_ray")

TEXT = "the cat sat on a mat and saw one red bird fly over seven small houses by the sea"
WORDS = tuple(TEXT.split())


def make_texts(count: int, seed: int = 0, words: int = 40) -> list[str]:
    rng = random.Random(seed)
    return [
        f"{seed}-{i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 2 * words)))
        for i in range(count)
    ]


def write_jsonl(path: Path, texts: list[str], **columns: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [
        {"text": text} | {name: values[i] for name, values in columns.items()}
        for i, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def make(train: Any, task: str = "causal_lm", tokenizer: Any = None, **data: Any) -> Spec:
    tree = tiny_tree(Path("."), task=task)
    tree["data"] = {"train": train, "sequence_tokens": 32, **data}
    tree["tokenizer"] = tokenizer or {"train": "byte_bpe", "vocab_size": 300}
    return make_spec(tree)


def read_rows(corpus: Corpus, source: SourceRows) -> list[dict[str, Any]]:
    filesystem, folder = open_filesystem(corpus.folder)
    groups = range(-(-source.num_rows // corpus.manifest.group_rows))
    rows: list[dict[str, Any]] = read_groups(
        filesystem, folder, source, groups, corpus.manifest.group_rows
    ).to_pylist()
    assert len(rows) == source.num_rows
    return rows


def decode(corpus: Corpus, ids: list[int]) -> str:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(f"{corpus.folder}/tokenizer/tokenizer.json").decode(
        ids, skip_special_tokens=False
    )


def documents(corpus: Corpus, source: SourceRows) -> Counter[str]:
    """The documents that lie whole in the rows."""
    found: Counter[str] = Counter()
    for row in read_rows(corpus, source):
        assert set(row["input_ids"][row["num_tokens"] :]) <= {corpus.manifest.pad_token_id}
        found.update(decode(corpus, row["input_ids"][: row["num_tokens"]]).split("<|endoftext|>"))
    return found


def digests(manifest: Manifest) -> list[tuple[str, str]]:
    splits = [manifest.train, *([manifest.validation] if manifest.validation else [])]
    return [
        (shard.file, shard.sha256)
        for split in splits
        for source in split.sources
        for shard in source.shards
    ]


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A URI with `{}` for the path below an empty bucket; it carries its credentials."""
    server_module = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    query = (
        f"endpoint_override={host}:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
    )
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    filesystem, _ = open_filesystem(f"s3://key:secret@{name}/x?{query}")
    filesystem.create_dir(name)
    yield f"s3://key:secret@{name}/{{}}?{query.removesuffix('&allow_bucket_creation=true')}"
    server.stop()


# --- what comes out -----------------------------------------------------------------------------


def test_every_document_is_in_exactly_one_split_and_the_counts_agree(tmp_path: Path) -> None:
    texts = make_texts(900, words=8)
    write_jsonl(tmp_path / "in/a.jsonl", texts[:500])
    write_jsonl(tmp_path / "in/b.jsonl", texts[500:] + texts[:100])
    corpus = prepare(
        make(str(tmp_path / "in"), validation={"share": 0.1}, sequence_tokens=128),
        str(tmp_path / "out"),
    )
    manifest = corpus.manifest
    assert manifest.validation is not None
    train, held = (
        documents(corpus, split.sources[0]) for split in (manifest.train, manifest.validation)
    )
    together = train + held
    assert {text: together[text] for text in texts} == dict.fromkeys(texts, 1)
    assert 30 < sum(held[text] for text in texts) < 180
    assert manifest.dropped == {"duplicate": 100}
    assert (manifest.num_records, manifest.num_bad) == (1000, 0)
    assert manifest.train.num_documents + manifest.validation.num_documents == 900
    assert manifest.train.num_text_bytes + manifest.validation.num_text_bytes == sum(
        len(text) for text in texts
    )
    assert manifest.train.num_tokens == sum(
        row["num_tokens"] for row in read_rows(corpus, manifest.train.sources[0])
    )
    assert manifest.packing.utilization > 0.9
    assert [file.num_documents for file in corpus.source_files()] == [500, 500]
    for file in corpus.source_files():
        assert file.sha256 == hashlib.sha256(Path(file.path).read_bytes()).hexdigest()
    for name, digest in digests(manifest):
        assert hashlib.sha256(Path(corpus.folder, name).read_bytes()).hexdigest() == digest


def test_only_the_corpus_is_left_in_the_storage(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    corpus = prepare(make(str(tmp_path / "a.jsonl")), str(tmp_path / "out"))
    key = corpus.manifest.key
    assert corpus.folder == str(tmp_path / "out/corpora" / key)
    assert files_below(tmp_path / "out/corpora") == [
        key,
        *(
            f"{key}/{name}"
            for name in (
                "examples.json",
                "manifest.json",
                "quarantine.jsonl",
                "source_files.json",
                "tokenizer",
                "tokenizer/tokenizer.json",
                "tokenizer/tokenizer_config.json",
                "train",
                "train/000-000000.arrow",
            )
        ),
    ]


def test_a_prepared_corpus_is_found_without_ray_and_not_made_again(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    spec = make(str(path))
    assert find(spec, str(tmp_path / "out")) is None
    lines: list[str] = []
    corpus = prepare(spec, str(tmp_path / "out"), lines.append)
    assert lines[-1] == "shards: 1 of 1"
    assert find(spec, str(tmp_path / "out")) == corpus
    assert prepare(spec, str(tmp_path / "out"), pytest.fail) == corpus


def test_a_plan_recalls_a_corpus_without_reading_its_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    spec, storage = make(str(path)), str(tmp_path / "out")
    monkeypatch.setattr("dray.storage.digests.SETTLED_SECONDS", 0.0)
    assert recall(spec, storage) is None
    corpus = prepare(spec, storage)
    monkeypatch.setattr("dray.storage.digests._digest", lambda path: pytest.fail(f"{path} is read"))
    assert recall(spec, storage) == corpus
    path.write_text("another")
    assert recall(spec, storage) is None


def test_the_key_goes_by_inputs_and_settings(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(5))
    spec = make(str(path))
    key = corpus_key(spec)
    assert corpus_key(make(str(path), max_bad_share=0.5)) == key
    assert corpus_key(make(str(path), validation={"share": 0.1})) != key
    assert corpus_key(make(str(path), shuffle_seed=1)) != key
    assert corpus_key(make(str(path), tokenizer={"train": "byte_bpe", "vocab_size": 301})) != key


def test_what_the_inputs_hold_makes_the_key_and_neither_their_names_nor_their_times(
    tmp_path: Path,
) -> None:
    path = write_jsonl(tmp_path / "here/a.jsonl", make_texts(50))
    spec, storage = make(str(path)), str(tmp_path / "out")
    corpus = prepare(spec, storage)
    os.utime(path, ns=(1, 1))
    assert find(spec, storage) == corpus
    moved = tmp_path / "there/b.jsonl"
    moved.parent.mkdir()
    path.rename(moved)
    assert find(make(str(moved)), storage) == corpus
    text = moved.read_text()
    moved.write_text(text.replace("0-0 ", "0-x "))  # of the same size
    os.utime(moved, ns=(1, 1))
    assert corpus_key(make(str(moved))) != corpus.manifest.key
    # The order of the files decides which of equal documents is kept.
    one, two = (
        write_jsonl(tmp_path / f"{name}.jsonl", make_texts(5, seed))
        for seed, name in enumerate("ab")
    )
    assert corpus_key(make([str(one), str(two)])) != corpus_key(make([str(two), str(one)]))


def test_an_object_store_is_asked_for_etags(bucket: str, tmp_path: Path) -> None:
    filesystem, folder = open_filesystem(bucket.format("in"))
    for name, text in (("a/x.jsonl", "one"), ("b/y.jsonl", "one"), ("c/z.jsonl", "two")):
        with filesystem.open_output_stream(f"{folder}/{name}") as stream:
            stream.write(json.dumps({"text": text}).encode())
    same, copied, other = (corpus_key(make(bucket.format(f"in/{name}"))) for name in "abc")
    assert same == copied != other
    files = find_inputs(make(bucket.format("in/a"))).files[0]
    assert files[0].digest.startswith("etag ")
    assert files[0].sha256 == ""


def test_weighted_sources_stay_apart_and_own_validation_is_not_mixed_in(tmp_path: Path) -> None:
    texts = {name: make_texts(120, seed) for seed, name in enumerate("abv")}
    texts["a"] += texts["v"][:7] + texts["b"][:5]
    for name, items in texts.items():
        write_jsonl(tmp_path / name / "x.jsonl", items)
    spec = make(
        [{"path": str(tmp_path / "a"), "weight": 3}, {"path": str(tmp_path / "b"), "weight": 1}],
        validation={"path": str(tmp_path / "v")},
        sequence_tokens=512,
    )
    corpus = prepare(spec, str(tmp_path / "out"))
    manifest = corpus.manifest
    assert manifest.validation is not None
    assert [(source.name, source.weight) for source in manifest.train.sources] == [
        ("a", 3),
        ("b", 1),
    ]
    assert [
        (source.name, source.weight, source.num_documents) for source in manifest.validation.sources
    ] == [("v", None, 120)]
    # Equal texts: validation keeps its own, then the first source does.
    assert manifest.dropped == {"duplicate": 5, "in_validation": 7}
    a, b = (documents(corpus, source) for source in manifest.train.sources)
    assert not set(a) & set(texts["v"])
    assert set(texts["b"][:5]) <= set(a)
    assert not set(texts["b"][:5]) & set(b)


def test_long_documents_are_cut_and_go_on_in_other_rows(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text(" ".join(f"w{i}" for i in range(5000)))
    corpus = prepare(make(str(path)), str(tmp_path / "out"))
    rows = read_rows(corpus, corpus.manifest.train.sources[0])
    assert corpus.manifest.packing.num_cut_documents == 1
    pieces = {decode(corpus, row["input_ids"][: row["num_tokens"]]) for row in rows}
    assert sum(len(piece) for piece in pieces) == len(path.read_text()) + len("<|endoftext|>")


def test_rows_are_shuffled_over_files_with_the_corpus_seed(tmp_path: Path) -> None:
    for name in "ab":
        write_jsonl(tmp_path / f"in/{name}.jsonl", [f"{name * 40} {i}" for i in range(3000)])
    first, second = (
        prepare(make(str(tmp_path / "in"), shuffle_seed=seed), str(tmp_path / "out"))
        for seed in (0, 1)
    )
    orders = []
    for corpus in (first, second):
        rows = read_rows(corpus, corpus.manifest.train.sources[0])
        orders.append([decode(corpus, row["input_ids"])[:1] for row in rows])
        half = len(rows) // 2
        assert 0.4 < np.mean([letter == "a" for letter in orders[-1][:half]]) < 0.6
    assert orders[0] != orders[1]
    assert first.manifest.train.num_tokens == second.manifest.train.num_tokens


def test_classification_rows_in_length_buckets(tmp_path: Path) -> None:
    texts = make_texts(1500, words=20)
    labels = ["odd", *("pos" if i % 3 else "neg" for i in range(1499))]
    train = write_jsonl(tmp_path / "train.jsonl", texts, y=labels)
    dev = write_jsonl(tmp_path / "dev.jsonl", make_texts(70, 1), y=["neg"] * 69 + ["odd"])
    spec = make(
        {"path": str(train), "label": "y"},
        "sequence_classification",
        sequence_tokens=64,
        validation={"path": str(dev), "label": "y"},
    )
    corpus = prepare(spec, str(tmp_path / "out"))
    manifest = corpus.manifest
    assert manifest.labels == ("neg", "odd", "pos")
    assert manifest.group_rows == 64
    rows = read_rows(corpus, manifest.train.sources[0])
    assert len(rows) == 1500
    expected = dict(zip(texts, labels, strict=True))
    whole = [row for row in rows if row["num_tokens"] < 64]
    assert len(whole) > 500
    for row in whole[:200]:
        text = decode(corpus, row["input_ids"][: row["num_tokens"]])
        assert text.endswith("<|endoftext|>")
        assert manifest.labels[row["label"]] == expected[text.removesuffix("<|endoftext|>")]
    lengths = np.array([row["num_tokens"] for row in rows[:1472]]).reshape(-1, 64)
    assert np.ptp(lengths, axis=1).mean() < 8
    assert len(set(lengths.mean(axis=1).argsort().tolist())) == 23
    assert (
        0 < manifest.packing.num_truncated_documents <= sum(row["num_tokens"] == 64 for row in rows)
    )
    packing, told = manifest.packing, "\n".join(corpus.describe())
    for split, documents, tokens in (
        ("training", packing.num_truncated_documents, packing.num_truncated_tokens),
        (
            "validation",
            packing.num_truncated_validation_documents,
            packing.num_truncated_validation_tokens,
        ),
    ):
        assert documents > 0
        what = f"{split} documents lost {tokens:,} tokens"
        assert f"{documents:,} {what} that rows have no place for" in told


@pytest.mark.parametrize("deduplicate", ["exact", "none"])
def test_texts_under_two_labels_are_counted(tmp_path: Path, deduplicate: str) -> None:
    texts = make_texts(30)
    path = write_jsonl(
        tmp_path / "a.jsonl", texts + texts[:6], y=["a", "b"] * 15 + ["a", "a", "b", "b", "a", "b"]
    )
    manifest = prepare(
        make(
            {"path": str(path), "label": "y"},
            "sequence_classification",
            cleaning={"deduplicate": deduplicate},
        ),
        str(tmp_path / "out"),
    ).manifest
    assert manifest.num_contradicting == 2
    lines = describe(manifest, [])
    assert (
        "labels       2 documents with a text that an earlier one has under another label" in lines
    )
    assert any(line.startswith("labels       2 classes: 'a' (1") for line in lines)
    assert manifest.dropped == ({"duplicate": 6} if deduplicate == "exact" else {})
    assert manifest.train.documents_by_label == (
        {"a": 15, "b": 15} if deduplicate == "exact" else {"a": 18, "b": 18}
    )


def test_classes_of_a_trained_model_stay_as_they_are(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["only one"], y=["pos"])
    spec = make({"path": str(path), "label": "y"}, "sequence_classification")
    corpus = prepare(spec, str(tmp_path / "out"), labels=("pos", "neg", "odd"))
    assert corpus.manifest.labels == ("pos", "neg", "odd")
    assert corpus.manifest.train.documents_by_label == {"pos": 1, "neg": 0, "odd": 0}
    assert read_rows(corpus, corpus.manifest.train.sources[0])[0]["label"] == 0
    with pytest.raises(
        CorpusError, match=r"does not know the label 'pos' \(1\); it knows 'a', 'b'"
    ):
        prepare(spec, str(tmp_path / "out"), labels=("a", "b"))


def test_a_class_without_a_training_document_is_refused(tmp_path: Path) -> None:
    texts = make_texts(40)
    write_jsonl(tmp_path / "a.jsonl", texts, y=["a", "b"] * 20)
    # The text that has the third label has the first one too, and before.
    write_jsonl(tmp_path / "b.jsonl", texts[:1], y=["c"])
    spec = make({"path": str(tmp_path / "*.jsonl"), "label": "y"}, "sequence_classification")
    with pytest.raises(CorpusError, match=r"no training document is left of the label 'c' \(1\)"):
        prepare(spec, str(tmp_path / "out"))
    validation = {
        "path": str(write_jsonl(tmp_path / "v/held.jsonl", ["new"], y=["d"])),
        "label": "y",
    }
    spec = make(
        {"path": str(tmp_path / "a.jsonl"), "label": "y"},
        "sequence_classification",
        validation=validation,
    )
    with pytest.raises(
        CorpusError, match=r"data.validation: no training document has the label 'd' \(1\)"
    ):
        prepare(spec, str(tmp_path / "out"))
    assert files_below(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("values", "labels"), [([10, 9, 2], ("2", "9", "10")), (["b", "B", "a"], ("B", "a", "b"))]
)
def test_labels_are_sorted_by_number_or_name(
    tmp_path: Path, values: list[Any], labels: tuple[str, ...]
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(30), y=values * 10)
    spec = make({"path": str(path), "label": "y"}, "sequence_classification")
    assert prepare(spec, str(tmp_path / "out")).manifest.labels == labels


def test_real_reviews_and_hotel_csv(tmp_path: Path, shared_data: Path) -> None:
    hotels = shared_data / "chnsenticorp_hotel"
    spec = make(
        {"path": f"{hotels}/*.csv.gz", "text": "review", "label": "label"},
        "sequence_classification",
        validation={"share": 0.1},
        sequence_tokens=64,
    )
    manifest = prepare(spec, str(tmp_path / "out")).manifest
    assert manifest.labels == ("0", "1")
    assert manifest.num_records == 7766
    assert manifest.num_bad <= 1


# --- the same whatever happens ------------------------------------------------------------------


def big_corpus(folder: Path) -> Spec:
    """Several parts of several megabytes, one file cut by bytes, one compressed; cleaning that
    takes its time."""
    rng = random.Random(5)
    lines = [" ".join(rng.choices(WORDS, k=6)) + str(i) for i in range(4000)]
    texts = [f"{i}\n" + "\n".join(rng.choices(lines, k=120)) for i in range(4500)]
    write_jsonl(folder / "in/a.jsonl", texts[:3000])
    (folder / "in/b.jsonl.gz").write_bytes(
        gzip.compress(
            "".join(json.dumps({"text": text}) + "\n" for text in texts[3000:]).encode(), 1
        )
    )
    return make(
        str(folder / "in"),
        cleaning={"max_repeated_line_share": 0.99},
        validation={"share": 0.05},
        sequence_tokens=256,
    )


PROGRAM = """
import json, sys
import ray
from dray.corpus.prepare import prepare
from dray.redaction import restored
from dray.spec import make_spec
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
lines = []
corpus = prepare(make_spec(json.loads(sys.argv[2])), sys.argv[3], lines.append)
print(json.dumps([corpus.manifest.model_dump(mode="json"), lines]))
"""


def start_process(spec: Spec, storage: str) -> subprocess.Popen[str]:
    import ray

    tree = spec.model_dump(mode="json")
    for source in tree["data"][
        "train"
    ]:  # another process knows only the credentials that it is told
        source["path"] = [restored(path) for path in spec.data.train[0].paths]
    arguments = [ray.get_runtime_context().gcs_address, json.dumps(tree), storage]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> tuple[Spec, Corpus]:
    folder = tmp_path_factory.mktemp("straight")
    spec = big_corpus(folder)
    return spec, prepare(spec, str(folder / "out"))


def test_killed_half_way_it_goes_on_where_it_stopped(
    straight: tuple[Spec, Corpus], tmp_path: Path
) -> None:
    spec, expected = straight
    storage = tmp_path / "out"
    staging = storage / "corpora" / expected.manifest.key / ".staging"
    process = start_process(spec, str(storage))
    deadline = time.monotonic() + 120
    while not list(staging.glob("*/read/*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = sorted(staging.glob("*/read/*.json"))
    assert done, "nothing was finished before the kill"
    assert find(spec, str(storage)) is None
    # A mark on finished work shows in the manifest if that work is used rather than done again.
    record = json.loads(done[0].read_text())
    done[0].write_text(json.dumps(record | {"dropped": {"marked": 1}}))
    resumed = prepare(spec, str(storage))
    assert resumed.manifest.dropped == expected.manifest.dropped | {"marked": 1}
    assert digests(resumed.manifest) == digests(expected.manifest)
    assert resumed.manifest.model_copy(update={"dropped": {}}) == expected.manifest.model_copy(
        update={"dropped": {}}
    )


def test_processes_at_once_prepare_it_once(straight: tuple[Spec, Corpus], tmp_path: Path) -> None:
    spec, expected = straight
    processes = [start_process(spec, str(tmp_path / "out")) for _ in range(2)]
    results = [json.loads(process.communicate(timeout=240)[0]) for process in processes]
    assert [Manifest.model_validate(manifest) for manifest, _ in results] == [expected.manifest] * 2
    # One of them did all the work; the other waited for it, or came when all was done.
    assert sorted(any(line.startswith("shards") for line in lines) for _, lines in results) == [
        False,
        True,
    ]
    assert files_below(tmp_path / "out/corpora")[0] == expected.manifest.key


def test_an_object_store_as_input_and_storage_by_two_processes_at_once(
    bucket: str, tmp_path: Path
) -> None:
    filesystem, root = open_filesystem(bucket.format("in"))
    for name in "ab":
        with filesystem.open_output_stream(
            f"{root}/deep/{name}.jsonl.gz", compression="gzip"
        ) as stream:
            stream.write(
                "".join(
                    json.dumps({"text": text}) + "\n" for text in make_texts(300, ord(name))
                ).encode()
            )
    spec = make(bucket.format("in/*/*.jsonl.gz"), validation={"share": 0.1})
    processes = [start_process(spec, bucket.format("out")) for _ in range(2)]
    corpus = prepare(spec, bucket.format("elsewhere"))
    results = [json.loads(process.communicate(timeout=240)[0])[0] for process in processes]
    assert [Manifest.model_validate(manifest) for manifest in results] == [corpus.manifest] * 2
    found = find(spec, bucket.format("out"))
    assert found is not None
    assert len(read_rows(found, found.manifest.train.sources[0])) == corpus.manifest.train.num_rows
    assert [file.path.partition("/in/")[2] for file in corpus.source_files()] == [
        "deep/a.jsonl.gz",
        "deep/b.jsonl.gz",
    ]
    assert "secret" not in corpus.manifest.model_dump_json()


# --- bad records --------------------------------------------------------------------------------


def spoil(path: Path, num_bad: int, num_good: int = 1000) -> Path:
    lines = [json.dumps({"text": text}).encode() for text in make_texts(num_good)]
    kinds = [
        b'{"text": "caf\xe9"}',
        b'{"text": "half',
        b'{"text": "n\x00l"}',
        b'{"text": "' + b"x" * 20_000 + b'"}',
    ]
    for i in range(num_bad):
        lines.insert(i * 3, kinds[i % len(kinds)])
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_bad_records_are_counted_and_quarantined_with_file_and_offset(tmp_path: Path) -> None:
    path = spoil(tmp_path / "a.jsonl", 8)
    corpus = prepare(
        make(str(path), max_record_bytes=10_000, max_bad_share=0.2), str(tmp_path / "out")
    )
    assert (corpus.manifest.num_bad, corpus.manifest.num_records) == (8, 1008)
    assert (
        0.1 < (corpus.manifest.bad_share or 0) < 0.2
    )  # two of them are long: they weigh more than their number
    assert corpus.manifest.train.num_documents == 1000
    quarantined = [
        json.loads(line)
        for line in Path(corpus.folder, "quarantine.jsonl").read_text().splitlines()
    ]
    assert [item["reason"].partition(" (")[0] for item in quarantined] == [
        "invalid UTF-8",
        "broken JSON",
        "null byte",
        "longer than data.max_record_bytes = 10000",
    ] * 2
    data = path.read_bytes()
    for item in quarantined:
        line = data[item["offset"] : item["offset"] + item["num_bytes"]]
        assert item["file"] == str(path)
        assert data[item["offset"] - 1 : item["offset"]] in (b"", b"\n")
        assert data[item["offset"] + len(line) :][:1] == b"\n"


def test_too_many_bad_records_stop_and_name_the_worst_file(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    spoil(tmp_path / "in/a.jsonl", 2)
    worst = spoil(tmp_path / "in/b.jsonl", 40)
    spec = make(str(tmp_path / "in"), max_record_bytes=10_000)
    with pytest.raises(
        CorpusError, match=r"42 of all 2042 records.*more than data.max_bad_share = 0.01"
    ) as caught:
        prepare(spec, str(tmp_path / "out"))
    assert caught.value.where == str(worst)
    assert "40 of its 1040 records are unreadable (first: invalid UTF-8 at offset 0)" in str(
        caught.value
    )
    assert not (tmp_path / "out").exists()
    corpus = prepare(
        make(str(tmp_path / "in"), max_record_bytes=10_000, max_bad_share=0.4),
        str(tmp_path / "out"),
    )
    assert corpus.manifest.num_bad == 42
    # The same corpus, but a spec that allows less.
    with pytest.raises(CorpusError, match="max_bad_share"):
        find(spec, str(tmp_path / "out"))


def test_a_truncated_file_costs_its_rest_and_counts_whole(tmp_path: Path) -> None:
    data = gzip.compress(
        "".join(json.dumps({"text": text}) + "\n" for text in make_texts(2000)).encode()
    )
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(
        CorpusError,
        match=r"a\.jsonl\.gz: from offset \d+ on: truncated gzip; 100\.00% of all bytes are lost",
    ):
        prepare(make(str(path)), str(tmp_path / "out"))
    corpus = prepare(make(str(path), max_bad_share=1), str(tmp_path / "out"))
    assert corpus.manifest.num_bad == 1
    assert corpus.manifest.bad_share == 1
    assert 500 < corpus.manifest.train.num_documents < 1500
    assert corpus.source_files()[0].is_damaged


def test_a_lost_shard_is_judged_by_its_bytes_and_told(tmp_path: Path) -> None:
    for index in range(5):
        table = pa.table({"text": make_texts(200, index)})
        (tmp_path / "in").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "in" / f"{index}.parquet")
    whole = (tmp_path / "in" / "4.parquet").read_bytes()
    (tmp_path / "in" / "4.parquet").write_bytes(whole[:-100])
    (tmp_path / "in" / "README.md").write_text("# Five shards\n")
    (tmp_path / "in" / "more.bin").write_bytes(b"?")
    spec = make(str(tmp_path / "in"))
    with pytest.raises(
        CorpusError, match=r"4\.parquet: .*damaged parquet.*19\.\d\d% of all bytes are lost"
    ) as caught:
        prepare(spec, str(tmp_path / "out"))
    assert "exclude" in caught.value.way_out
    assert not (tmp_path / "out").exists()
    corpus = prepare(make(str(tmp_path / "in"), max_bad_share=0.3), str(tmp_path / "out"))
    told = "\n".join(corpus.describe())
    assert "read         5 files (5 parquet)" in told
    assert "left out     1 (documentation beside data)" in told
    assert "README.md" in told
    assert "more.bin" in told
    assert "4.parquet: from there on" in told
    assert "documents    800 kept" in told
    assert f"tokens       {corpus.manifest.train.num_tokens:,} in" in told
    assert [(item.num_files, item.num_bytes) for item in corpus.manifest.left_out] == [
        (1, 14),
        (1, 1),
    ]
    with pytest.raises(CorpusError, match="max_bad_share"):
        find(spec, str(tmp_path / "out"))


def test_a_large_csv_is_cut_where_its_quotes_allow(tmp_path: Path) -> None:
    """Ranges of one file, with newlines in most fields, give each document once."""
    rng = random.Random(1)
    texts = [
        "\n".join(
            rng.choices(
                ('say "a, b"', "", "1,2,3", '"', "plain words here " * 20), k=rng.randint(1, 110)
            )
        )
        for _ in range(3500)
    ]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["text", "n"])
        for index, text in enumerate(texts):
            if index == 2000:
                file.write("one field\r\n")
            out.writerow([f"{index} {text}", index])
    assert (tmp_path / "a.csv").stat().st_size > 12 << 20
    corpus = prepare(make(str(tmp_path / "a.csv")), str(tmp_path / "out"))
    assert corpus.manifest.train.num_documents == 3500
    assert corpus.manifest.num_bad == 1
    assert corpus.manifest.train.num_text_bytes == sum(
        len(f"{i} {text}") for i, text in enumerate(texts)
    )


def test_one_text_file_names_lines_as_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text("".join(f"sentence {i}\n" for i in range(500)))
    with pytest.raises(CorpusError, match="`format: lines` of the source"):
        prepare(make(str(tmp_path / "input.txt"), validation={"share": 0.1}), str(tmp_path / "out"))


# --- what is done stays done --------------------------------------------------------------------


def test_a_storage_that_fails_costs_no_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, storage = (
        make(str(write_jsonl(tmp_path / "a.jsonl", make_texts(50)))),
        str(tmp_path / "out"),
    )

    def fail(*_: Any) -> None:
        raise StorageFailed("corpora", "the storage failed for 120 s")

    with monkeypatch.context() as failing:
        failing.setattr(prepare_module, "measure_compressors", fail)
        with pytest.raises(StorageFailed):
            prepare(spec, storage)
    lines: list[str] = []
    prepare(spec, storage, lines.append)
    assert lines == ["shards: 1 of 1"]


def test_inputs_that_are_refused_take_no_work_of_others_with_them(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in make_texts(50)) + "no record\n" * 10
    )
    strict, storage = make(str(path)), tmp_path / "out"
    folder = storage / "corpora" / corpus_key(strict)
    others = folder / ".staging/claims/another-process"
    others.parent.mkdir(parents=True)
    others.touch()
    lines: list[str] = []
    with pytest.raises(CorpusError, match="max_bad_share"):
        prepare(strict, str(storage), lines.append)
    assert others.exists()
    assert lines[-1] == f"what another process has prepared stays in {folder}"
    assert [file.name for file in others.parent.iterdir()] == ["another-process"]
    assert prepare(make(str(path), max_bad_share=0.5), str(storage)).manifest.num_bad == 10
    assert not others.exists()


# --- refusals -----------------------------------------------------------------------------------


REFUSALS: list[tuple[str, dict[str, Any], str, str]] = [
    ("missing.jsonl", {}, "does not exist", "data.train.0.path"),
    ("*.parquet", {}, "no matching file", "data.train.0.path"),
    ("empty.jsonl", {}, "holds only empty files", "data.train.0.path"),
    ("blank.jsonl", {}, "holds no documents", "data.train.0.path"),
    ("good.jsonl", {"text": "body"}, "no text column 'body'; columns: text", "good.jsonl"),
    (
        "good.jsonl",
        {"cleaning": {"min_chars": 10**6}},
        "is left; dropped: 20 too_short",
        "data.train.0.path",
    ),
    ("good.jsonl", {"validation": "{root}/missing"}, "does not exist", "data.validation.0.path"),
    ("good.jsonl", {"validation": "{root}/good.jsonl"}, "all are duplicates", "data.train.0.path"),
    (
        "good.jsonl",
        {"validation": {"share": 1e-9}},
        "of 20 documents holds out none",
        "data.validation.share",
    ),
    ("good.jsonl", {"label": "y"}, "no label column 'y'; columns: text", "good.jsonl"),
    ("one.jsonl", {"label": "y"}, "only the label 'same'", "data.train.label"),
]


@pytest.mark.parametrize(
    ("name", "changes", "what", "where"), REFUSALS, ids=[what for _, _, what, _ in REFUSALS]
)
def test_refusals_say_where_and_leave_nothing_behind(
    tmp_path: Path, name: str, changes: dict[str, Any], what: str, where: str
) -> None:
    write_jsonl(tmp_path / "good.jsonl", make_texts(20))
    write_jsonl(tmp_path / "one.jsonl", make_texts(20), y=["same"] * 20)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n \n\n")
    source = {"path": f"{tmp_path}/{name}"} | {
        key: changes[key] for key in ("text", "label") if key in changes
    }
    data = {
        key: json.loads(json.dumps(value).replace("{root}", str(tmp_path)))
        for key, value in changes.items()
        if key not in ("text", "label")
    }
    spec = make(source, "sequence_classification" if "label" in changes else "causal_lm", **data)
    with pytest.raises(CorpusError, match=what) as caught:
        prepare(spec, str(tmp_path / "out"))
    assert caught.value.where.endswith(where)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_storage_that_cannot_be_written(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(5))
    with pytest.raises(StoreError):
        prepare(make(str(path)), str(path))
