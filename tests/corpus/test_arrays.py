"""Corpora whose documents are no texts: arrays of one shape and of any, from bytes to rows."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ray import cloudpickle

import scans
from dray.corpus import planning
from dray.corpus.encoded import check_columns, check_encoded
from dray.corpus.manifest import SourceRows, Split
from dray.corpus.packing import Varying
from dray.corpus.prepare import Corpus, corpus_key, prepare
from dray.corpus.records import BadRecord, Wanted
from dray.corpus.shards import Stored, make_batch, read_groups, write_shard
from dray.corpus.stream import read_rows
from dray.errors import CorpusError, SpecError, UserError
from dray.plan import make_plan, parse_shape
from dray.spec import Field, make_spec
from dray.storage.filesystem import open_filesystem
from dray.tasks.parts.columns import array_column, list_column, matrix
from dray.tasks.parts.encoding import join_lists
from dray.tasks.rows import Column, Encoded
from dray.tasks.sequence_classification import SequenceClassification
from scans import Scans, make_pgm, scans_tree, thumbnail

cloudpickle.register_pickle_by_value(scans)  # Ray's workers have no tests on their path
Image = npt.NDArray[np.uint8]


def draw_images(count: int, largest: int = 40, seed: int = 0) -> list[Image]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(4, largest, (count, 2)).tolist()
    return [rng.integers(0, 256, size).astype(np.uint8) for size in sizes]


def label_of(image: Image) -> str:
    return "wide" if image.shape[1] > image.shape[0] else "tall"


def write_parquet(path: Path, images: list[Image], *, as_records: bool) -> None:
    """As datasets keep images: binary, or records of bytes and a path."""
    files: list[Any] = [make_pgm(image) for image in images]
    if as_records:
        files = [{"bytes": content, "path": f"{i}.pgm"} for i, content in enumerate(files)]
    table = pa.table({"image": files, "label": [label_of(image) for image in images]})
    pq.write_table(table, path, row_group_size=50)


def write_jsonl(path: Path, images: list[Image]) -> None:
    with path.open("w") as file:
        for image in images:
            text = base64.b64encode(make_pgm(image)).decode()
            file.write(json.dumps({"image": text, "label": label_of(image)}) + "\n")


def read_split(corpus: Corpus, split: Split) -> list[tuple[Image, dict[str, Any]]]:
    """The images of a split, with their rows."""
    table = read_rows(corpus.folder, corpus.manifest, split, np.arange(split.num_rows))
    found = []
    for row in table.to_pylist():
        pixels = np.array(row["pixels"], np.uint8).reshape(row["size"])
        found.append((pixels, row))
    return found


def name_of(image: Image) -> bytes:
    return repr(image.shape).encode() + image.tobytes()


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "by files between"])
def test_images_of_any_size_come_back_as_they_were(
    tmp_path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = draw_images(420)
    monkeypatch.setattr(planning, "SHARD_BYTES", 8 << 10)  # several shards of so little
    monkeypatch.setattr(planning, "MIN_PART_BYTES", 32 << 10)
    if not direct:
        monkeypatch.setattr(planning, "DIRECT_READS", 1)
    write_parquet(tmp_path / "a.parquet", images[:150], as_records=False)
    write_parquet(tmp_path / "b.parquet", images[150:300], as_records=True)
    write_jsonl(tmp_path / "c.jsonl", [*images[300:], images[0], images[399]])
    paths = [tmp_path / name for name in ("a.parquet", "b.parquet", "c.jsonl")]
    corpus = prepare(make_spec(scans_tree(paths)), str(tmp_path / "store"))

    manifest = corpus.manifest
    assert manifest.dropped == {"duplicate": 2}
    assert (manifest.vocab_size, manifest.num_bad) == (0, 0)
    assert manifest.labels == ("tall", "wide")
    assert sum(len(source.shards) for source in manifest.train.sources) > 3
    assert manifest.validation is not None
    found = [
        row for split in (manifest.train, manifest.validation) for row in read_split(corpus, split)
    ]
    assert sorted(name_of(image) for image, _ in found) == sorted(map(name_of, images))
    for image, row in found:
        assert "input_ids" not in row
        assert manifest.labels[row["label"]] == label_of(image)
        assert row["num_tokens"] == image.size
        assert row["thumbnail"] == thumbnail(image).reshape(-1).tolist()
    train = read_split(corpus, manifest.train)
    spread = [[image.size for image, _ in train[at : at + 64]] for at in range(0, 256, 64)]
    assert sum(map(np.ptp, spread)) < 4 * np.ptp([image.size for image, _ in train])


@pytest.mark.usefixtures("local_ray")
def test_what_is_no_image_costs_itself_and_is_named(tmp_path: Path) -> None:
    images = draw_images(30)
    write_jsonl(tmp_path / "a.jsonl", images)
    with (tmp_path / "a.jsonl").open("a") as file:
        for image in ("not base64!", "", 7, None):
            file.write(json.dumps({"image": image, "label": "tall"}) + "\n")
    tree = scans_tree([tmp_path / "a.jsonl"])
    with pytest.raises(CorpusError, match=r"a\.jsonl: 4 of its 34 records are unreadable"):
        prepare(make_spec(tree), str(tmp_path / "store"))
    tree["data"] = {**tree["data"], "max_bad_share": 0.2}
    corpus = prepare(make_spec(tree), str(tmp_path / "store"))
    assert corpus.manifest.num_bad == 4
    lines = (Path(corpus.folder) / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in lines] == [
        "'image' is not base64",
        "'image' is empty",
        "'image' holds no bytes",
        "'image' holds no bytes",
    ]


@pytest.mark.usefixtures("local_ray")
def test_what_cannot_be_decoded_is_left_out_and_counted(tmp_path: Path) -> None:
    images = draw_images(30)
    table = pa.table(
        {
            "image": [
                make_pgm(image)[: -3 if nth % 10 == 4 else None] for nth, image in enumerate(images)
            ],
            "label": [label_of(image) for image in images],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    corpus = prepare(make_spec(scans_tree([tmp_path / "a.parquet"])), str(tmp_path / "store"))
    assert corpus.manifest.dropped == {"broken image": 3}
    kept = (
        corpus.manifest.train.num_rows + (corpus.manifest.validation or Split(sources=())).num_rows
    )
    assert kept == 27
    assert "3 broken image" in "\n".join(corpus.describe())
    for image, row in read_split(corpus, corpus.manifest.train):
        assert corpus.manifest.labels[row["label"]] == label_of(image)


@pytest.mark.usefixtures("local_ray")
def test_a_task_that_fails_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    class Broken(Scans):
        name = "broken"

        def encode(self, texts: Any, targets: Any, tools: Any) -> Any:
            raise ZeroDivisionError("no pixels")

    write_jsonl(tmp_path / "a.jsonl", draw_images(4))
    tree = scans_tree([tmp_path / "a.jsonl"], task=Broken())
    with pytest.raises(CorpusError, match=r"broken: its encode failed among.*a\.jsonl.*pixels"):
        prepare(make_spec(tree), str(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


DECLARED = (Column("a", "uint8"), Column("b", "uint8", varies=True), Column("c", shape=(2, 2)))


def encoded_of(**changed: Any) -> Encoded:
    """Two documents as they are declared, but for what is changed."""
    columns: dict[str, Any] = {
        "a": np.array([1, 255]),
        "b": join_lists([np.arange(3), np.arange(0)]),
        "c": np.zeros((2, 2, 2), np.int64),
    }
    columns |= changed.pop("columns", {})
    fields = {"tokens": np.empty(0, np.uint16), "lengths": np.array([3, 0]), "columns": columns}
    return Encoded(**{**fields, **changed})


def declaring(*columns: Column, **attributes: Any) -> Any:
    return type("Declared", (Scans,), {"name": "declared", "columns": columns, **attributes})()


def test_what_is_as_it_is_declared_gets_its_dtypes() -> None:
    found = check_encoded(declaring(*DECLARED), encoded_of(), 2)
    assert found.columns["a"].dtype == np.uint8
    assert found.columns["b"].type.value_type == pa.uint8()
    assert found.columns["b"].to_pylist() == [[0, 1, 2], []]
    assert found.columns["c"].dtype == np.int32


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"columns": {"a": np.array([1, 256])}}, "a has 1 to 256, beyond uint8"),
        ({"columns": {"a": np.array([1.5, 2])}}, "a has float64 values, not uint8"),
        ({"columns": {"a": pa.array([1, None])}}, "a has nulls"),
        ({"columns": {"a": np.array([1])}}, "a has 1 values, not 2"),
        ({"columns": {"b": join_lists([np.array([-1]), np.arange(2)])}}, "b has -1 to 1, beyond"),
        ({"columns": {"b": pa.array([[1], None])}}, "b has nulls"),
        ({"columns": {"b": np.arange(2)}}, "b is a ndarray, not lists of numbers"),
        (
            {"columns": {"c": np.zeros((2, 4, 4), int)}},
            r"c has values of shape \(4, 4\), not \(2, 2\)",
        ),
        ({"columns": {"d": np.arange(2)}}, "columns are .*'d'"),
        ({"lengths": np.array([3.0, 1.0])}, "lengths are float64, not integers"),
        ({"lengths": np.array([3, -1])}, "lengths are below 0"),
        ({"lengths": np.array([3, 2**31])}, "lengths are below 0, or 2"),
        ({"records": np.array([0, 0])}, "records say nothing of number 1: name it in refused"),
        ({"records": np.array([0, 2])}, "records name some that were refused, or not given"),
        ({"refused": {1: "bad"}}, "records name some that were refused"),
        ({"records": np.array([0])}, "records are 1 of 2 documents"),
        ({"records": np.array([0.0, 1.0])}, "records are float64, not integers"),
        ({"num_lost": np.array([0])}, "num_lost is no number from 0 for each of 2"),
        ({"num_lost": np.array([0, -1])}, "num_lost is no number from 0 for each of 2"),
        ({"num_lost": np.array([0, 0.5])}, "num_lost are float64, not integers"),
    ],
)
def test_what_is_not_as_it_is_declared_is_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(CorpusError, match=f"task declared: its encode gives .*{said}"):
        check_encoded(declaring(*DECLARED), encoded_of(**changed), 2)


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        (Column("x", "float32"), np.array([1.0, 1e39]), "x has 1e\\+39, beyond float32"),
        (Column("x", "float32"), np.array([1.0, -(10**39)], float), "x has -1e\\+39, beyond"),
        (Column("x", "float16"), np.array([1, 70_000]), "x has 70000, beyond float16"),
        (Column("x", "float32", varies=True), pa.array([[1e39], []]), "x has 1e\\+39, beyond"),
        (Column("x", hot=True), [["a"], []], "x is a list, not lists of numbers"),
        (Column("x", hot=True), pa.array([[0.5], []]), "x has double values, not classes"),
        (Column("x", hot=True), pa.array([[3], []]), "x has 3 to 3, not the numbers that Tools"),
        (Column("x", hot=True), pa.array([[-1], [0]]), "x has -1 to 0, not the numbers"),
        (Column("x", names=True), np.array([0, 3]), "x has 0 to 3, not the numbers"),
    ],
)
def test_values_that_a_column_cannot_hold_are_refused(
    column: Column, values: Any, said: str
) -> None:
    task = declaring(column)
    empty = np.empty(0, np.uint16)
    with pytest.raises(CorpusError, match=f"its encode gives .*{said}"):
        check_encoded(task, Encoded(empty, np.array([3, 0]), {"x": values}), 2, num_names=3)


def test_what_is_no_number_stays_what_it_is() -> None:
    values = np.array([math.nan, math.inf])
    given = Encoded(np.empty(0, np.uint16), np.array([3, 0]), {"x": values})
    found = check_encoded(declaring(Column("x", "float32")), given, 2).columns["x"]
    assert np.array_equal(found, values, equal_nan=True)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (np.array([1.0, 2.0]), "tokens are float64, not integers"),
        (np.array([-1, 2]), "tokens are -1 to 2, of a vocabulary of 300"),
        (np.array([1, 300]), "tokens are 1 to 300, of a vocabulary of 300"),
        (np.array([1]), "tokens are 1, but 2 by lengths"),
    ],
)
def test_tokens_are_of_the_vocabulary(tokens: npt.NDArray[Any], said: str) -> None:
    task = declaring(tokenizes=True)
    given = Encoded(np.array([299, 0]), np.array([1, 1]))
    assert check_encoded(task, given, 2, vocab_size=300).tokens.dtype == np.uint16
    with pytest.raises(CorpusError, match=f"its encode gives .*{said}"):
        check_encoded(task, Encoded(tokens, np.array([1, 1])), 2, vocab_size=300)


def test_segments_are_of_one_text_or_the_other() -> None:
    task = declaring(Column("segment", "uint8", "token"), tokenizes=True)
    given = Encoded(np.array([1, 2]), np.array([2]), {"segment": np.array([0, 2])})
    with pytest.raises(CorpusError, match="segment is not 0 or 1"):
        check_encoded(task, given, 1, vocab_size=300)


@pytest.mark.parametrize(
    ("columns", "attributes", "said"),
    [
        ([Column("low")], {}, "has a name that another has"),
        ([Column("a"), Column("a")], {}, "has a name that another has"),
        ([Column("a", "bool")], {}, "holds bool"),
        ([Column("a", "floaty")], {}, "holds floaty; columns hold integers or floats"),
        ([Column("a", "float32", names=True)], {}, "numbers names in float32"),
        ([Column("a", shape=(0,))], {}, r"is of shape \(0,\)"),
        ([Column("segment")], {}, "is called like what says which text"),
        ([Column("segment", "float32", "token")], {"tokenizes": True}, "is called like what says"),
        ([Column("a", varies=True, shape=(2,))], {}, "is of several kinds"),
        ([Column("a", names=True, varies=True)], {}, "is of several kinds"),
        ([Column("a", each="token")], {}, "is one of tokens, of which the task has none"),
        ([Column("a")], {"packs": True, "tokenizes": True}, "is one of rows, and the task packs"),
        ([], {"packs": True}, "packs documents without tokens"),
    ],
)
def test_columns_that_rows_cannot_have_are_refused(
    columns: list[Column], attributes: dict[str, Any], said: str
) -> None:
    with pytest.raises(CorpusError, match=said):
        check_columns(declaring(*columns, **attributes))


def test_rows_come_back_as_tensors() -> None:
    columns = [Stored("thumbnail", "float32", 4), Stored("pixels", "uint8", varies=True)]
    thumbnails = np.arange(12, dtype=np.float32).reshape(3, 4) / 7
    pixels = Varying(np.arange(9, dtype=np.uint8), np.array([4, 0, 5]))
    batch = make_batch(columns, {"thumbnail": thumbnails, "pixels": pixels})
    table = pa.Table.from_batches([batch.slice(0, 2), batch.slice(2)])
    found = array_column(table, "thumbnail", (2, 2))
    assert (found.dtype, found.flatten().tolist()) == (
        torch.float32,
        thumbnails.reshape(-1).tolist(),
    )
    assert [row.tolist() for row in list_column(table, "pixels")] == [
        [0, 1, 2, 3],
        [],
        [4, 5, 6, 7, 8],
    ]
    with pytest.raises(TypeError, match="thumbnail holds"):
        matrix(table, "thumbnail")


def test_a_task_without_text_has_no_plan(tmp_path: Path) -> None:
    message = "task = scans: "
    with pytest.raises(SpecError, match=message):
        make_plan(make_spec(scans_tree([tmp_path])), parse_shape("1xCPU(cpus=8,memory=16GB)"))


def test_a_task_without_text_takes_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="scans reads image, label, no text; leave the section"):
        make_spec(scans_tree([tmp_path], tokenizer={"train": "byte_bpe", "vocab_size": 300}))


def test_lines_of_text_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("aGVsbG8=\n")
    with pytest.raises(CorpusError, match="format text has no label column"):
        prepare(make_spec(scans_tree([tmp_path / "a.txt"])), str(tmp_path / "store"))


def test_tasks_of_other_packages_share_no_corpus(tmp_path: Path) -> None:
    """Their columns are not told by anything else."""
    write_jsonl(tmp_path / "a.jsonl", draw_images(4))

    class Others(Scans):
        name = "others"

    class Wider(Scans):
        columns = (*Scans.columns, Column("more"))

    class Later(Scans):
        version = 1

    class Elsewhere(Scans):
        fields: Mapping[str, Field] = {**Scans.fields, "label": Field("label", column="class")}

    class OtherKind(Scans):
        fields: Mapping[str, Field] = {**Scans.fields, "label": Field("labels")}

    tree = scans_tree([tmp_path / "a.jsonl"])
    kinds = (Scans, Others, Wider, Later, Elsewhere, OtherKind)
    assert len({corpus_key(make_spec({**tree, "task": kind()})) for kind in kinds}) == len(kinds)

    class Doubtful(SequenceClassification):
        """Says nothing of its rows itself."""

        columns = (*SequenceClassification.columns, Column("doubt"))

    (tmp_path / "b.jsonl").write_text('{"text": "a", "label": "b"}\n')
    source = {"path": str(tmp_path / "b.jsonl"), "label": "label"}
    texts = {**tree, "data": {"train": source, "validation": None, "sequence_tokens": 16}}
    kinds = (SequenceClassification, Doubtful)
    assert len({corpus_key(make_spec({**texts, "task": kind()})) for kind in kinds}) == 2


def test_a_sound_is_its_samples() -> None:
    """The bytes of a WAV file, by way of a record of JSON."""
    samples = np.arange(-300, 300, 7, dtype=np.int16)
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(samples.tobytes())
    wanted = Wanted.of(
        make_spec(scans_tree(["x.jsonl"])).data.train[0], {"image": Field("bytes")}, "jsonl"
    )
    text, _ = wanted.read({"image": content.getvalue()})
    with wave.open(io.BytesIO(base64.b64decode(text))) as file:
        assert np.frombuffer(file.readframes(600), np.int16).tolist() == samples.tolist()
    with pytest.raises(BadRecord, match="holds no bytes"):
        wanted.read({"image": {"path": "x.wav"}})


def test_lists_of_numbers_are_taken_joined_and_stored(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 90, 200)
    lengths[[0, 7, 199]] = 0
    whole = Varying(rng.random(lengths.sum()).astype(np.float32), lengths)
    lists = [part.tolist() for part in np.split(whole.values, np.cumsum(lengths)[:-1])]
    order = rng.permutation(200)
    assert whole[order].lists().to_pylist() == [lists[place] for place in order]
    halves = [whole[order[:90]], whole[order[90:]]]
    assert Varying.join(halves, "float32").lists().to_pylist() == whole[order].lists().to_pylist()
    assert Varying.of(whole.lists().slice(5, 20), "float32").lists().to_pylist() == lists[5:25]

    columns = [Stored("num_tokens", "int32"), Stored("samples", "float32", varies=True)]
    batch = make_batch(columns, {"num_tokens": lengths.astype(np.int32), "samples": whole})
    filesystem, path = open_filesystem(str(tmp_path))
    shard = write_shard(filesystem, path, "train/0.arrow", batch, 64)
    assert shard.sha256 == hashlib.sha256((tmp_path / "train/0.arrow").read_bytes()).hexdigest()
    rows = SourceRows(
        name="x",
        weight=None,
        num_rows=200,
        num_documents=200,
        num_tokens=1,
        num_text_bytes=1,
        shards=(shard,),
    )
    table = read_groups(filesystem, path, rows, [2, 0], 64)
    assert table.column("samples").to_pylist() == lists[128:192] + lists[:64]

    content = bytearray((tmp_path / "train/0.arrow").read_bytes())
    place = content.index(whole.values[:40].tobytes())
    content[place + 9] ^= 4
    (tmp_path / "train/0.arrow").write_bytes(content)
    with pytest.raises(CorpusError, match="its checksum differs"):
        read_groups(filesystem, path, rows, [0], 64)
