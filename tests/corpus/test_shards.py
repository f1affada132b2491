"""Token shards: what is written is read back by group."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import fs as pafs

from dray.corpus import shards
from dray.corpus.manifest import (
    VERSION,
    Manifest,
    Packing,
    Shard,
    SourceFile,
    SourceRows,
    Split,
    dump_manifest,
    dump_source_files,
    load_manifest,
    load_source_files,
)
from dray.corpus.shards import make_batch, read_groups, stored_columns, write_shard
from dray.errors import CorpusError
from dray.tasks.causal_lm import CausalLM
from dray.tasks.sequence_classification import SequenceClassification

GROUP = 4
WIDTH = 6


def make_rows(first: int, num_rows: int, labelled: bool = False) -> pa.RecordBatch:
    tokens = np.repeat(np.arange(first, first + num_rows, dtype=np.uint16), WIDTH).reshape(
        -1, WIDTH
    )
    task = SequenceClassification() if labelled else CausalLM()
    values = {
        "input_ids": tokens,
        "num_tokens": np.full(num_rows, 3, np.int32),
        "label": np.arange(num_rows, dtype=np.int32),
    }
    return make_batch(stored_columns(task, WIDTH, "uint16"), values)


def make_source(num_rows: int, *shards: Shard) -> SourceRows:
    return SourceRows(
        name="s",
        weight=None,
        num_rows=num_rows,
        num_documents=num_rows,
        num_tokens=3 * num_rows,
        num_text_bytes=0,
        shards=shards,
    )


@pytest.fixture
def source(tmp_path: Path) -> SourceRows:
    local = pafs.LocalFileSystem()
    shards = (
        write_shard(local, str(tmp_path), "train/0.arrow", make_rows(0, 12), GROUP),
        write_shard(local, str(tmp_path), "train/1.arrow", make_rows(12, 6), GROUP),
    )
    return make_source(18, *shards)


@pytest.mark.parametrize("kind", ["local", "other"])
def test_groups_in_the_order_asked_for(tmp_path: Path, source: SourceRows, kind: str) -> None:
    filesystem, folder = pafs.LocalFileSystem(), str(tmp_path)
    if kind == "other":
        filesystem, folder = pafs.SubTreeFileSystem(str(tmp_path), filesystem), ""
    table = read_groups(filesystem, folder, source, [3, 0, 4, 0], GROUP)
    rows = [row[0] for row in table.column("input_ids").to_pylist()]
    assert rows == [12, 13, 14, 15, 0, 1, 2, 3, 16, 17, 0, 1, 2, 3]
    ids = table.schema.field("input_ids").type
    assert (ids.list_size, ids.value_type) == (WIDTH, pa.uint16())


def test_a_shard_says_its_size_and_digest_and_is_the_same_every_time(
    tmp_path: Path, source: SourceRows
) -> None:
    shard = source.shards[0]
    data = (tmp_path / shard.file).read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.num_bytes, shard.sha256)
    again = write_shard(
        pafs.LocalFileSystem(), str(tmp_path), "again/0.arrow", make_rows(0, 12), GROUP
    )
    assert again.sha256 == shard.sha256


def test_verified_rows_do_not_change_under_their_reader_and_a_shard_written_anew_is_read_anew(
    tmp_path: Path, source: SourceRows
) -> None:
    """A shard that is overwritten in its place, of the same size: what was read stays, the next
    reading notices."""
    table = read_groups(pafs.LocalFileSystem(), str(tmp_path), source, [0, 1, 2], GROUP)
    path = tmp_path / source.shards[0].file
    path.write_bytes(b"\0" * path.stat().st_size)
    assert table.column("input_ids").to_pylist()[11][0] == 11
    with pytest.raises(CorpusError, match="cannot be read"):
        read_groups(pafs.LocalFileSystem(), str(tmp_path), source, [0, 1, 2], GROUP)


@pytest.mark.parametrize("column", ["input_ids", "num_tokens", "label"])
def test_a_flipped_bit_is_noticed_where_it_is_read(tmp_path: Path, column: str) -> None:
    """The file keeps its size and its form."""
    tokens, counts = (
        np.arange(72, dtype=np.uint16).reshape(12, WIDTH),
        np.arange(100, 112, dtype=np.int32),
    )
    rows = make_batch(
        stored_columns(SequenceClassification(), WIDTH, "uint16"),
        {"input_ids": tokens, "num_tokens": counts, "label": counts + 100},
    )
    source = make_source(
        12, write_shard(pafs.LocalFileSystem(), str(tmp_path), "0.arrow", rows, GROUP)
    )
    path, group = (
        tmp_path / "0.arrow",
        {"input_ids": tokens, "num_tokens": counts, "label": counts + 100}[column],
    )
    content = bytearray(path.read_bytes())
    content[content.rindex(group[GROUP : 2 * GROUP].tobytes()) + 4] ^= (
        4  # its last place: small groups carry more
    )
    path.write_bytes(content)
    assert (
        read_groups(pafs.LocalFileSystem(), str(tmp_path), source, [0, 2], GROUP).num_rows
        == 2 * GROUP
    )
    with pytest.raises(CorpusError, match="group 1 is not what was written"):
        read_groups(pafs.LocalFileSystem(), str(tmp_path), source, [0, 1], GROUP)


def test_groups_are_kept_up_to_a_bound_and_read_once(
    tmp_path: Path, source: SourceRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of several ranks share groups, and a slice of validation rows lies in one."""
    kept = shards._Kept()
    monkeypatch.setattr(shards, "_kept", kept)
    monkeypatch.setattr(shards, "CACHED_BYTES", 3 * GROUP * (WIDTH * 2 + 4))
    read: list[int] = []
    original = kept._load
    monkeypatch.setattr(kept, "_load", lambda *where: (read.append(where[-1]), original(*where))[1])

    def first_tokens(*groups: int) -> list[int]:
        table = read_groups(pafs.LocalFileSystem(), str(tmp_path), source, groups, GROUP)
        return [int(row[0]) for row in table.column("input_ids").to_pylist()[::GROUP]]

    for _ in range(3):
        assert first_tokens(0, 1, 2) == [0, 4, 8]
    assert read == [0, 1, 2]
    assert first_tokens(3, 0) == [
        12,
        0,
    ]  # both shards: group 3 of the source is the second one's first
    assert first_tokens(1) == [4]
    assert read == [0, 1, 2, 0, 1]
    assert (
        kept._num_bytes
        == sum(batch.nbytes for batch in kept._groups.values())
        <= shards.CACHED_BYTES
    )


@pytest.mark.parametrize("groups", [[-1], [5], [0, 99]])
def test_groups_that_are_not_there(tmp_path: Path, source: SourceRows, groups: list[int]) -> None:
    with pytest.raises(IndexError, match="of source s"):
        read_groups(pafs.LocalFileSystem(), str(tmp_path), source, groups, GROUP)


def test_labels_ride_along(tmp_path: Path) -> None:
    shard = write_shard(
        pafs.LocalFileSystem(), str(tmp_path), "0.arrow", make_rows(0, 5, labelled=True), GROUP
    )
    table = read_groups(pafs.LocalFileSystem(), str(tmp_path), make_source(5, shard), [1, 0], GROUP)
    assert table.column("label").to_pylist() == [4, 0, 1, 2, 3]


def make_manifest(source: SourceRows) -> Manifest:
    return Manifest(
        version=VERSION,
        key="k",
        sequence_tokens=WIDTH,
        group_rows=GROUP,
        vocab_size=100,
        pad_token_id=1,
        eos_token_id=0,
        encoder="gigatoken",
        labels=(),
        train=Split(sources=(source, source)),
        validation=None,
        num_source_files=0,
        num_source_bytes=0,
        dropped={},
        num_records=1,
        num_bad=0,
        shuffle_seed=0,
        packing=Packing(
            utilization=1, num_cut_documents=0, num_truncated_documents=0, num_truncated_tokens=0
        ),
    )


def test_a_manifest_comes_back_whole_and_sums_up(tmp_path: Path, source: SourceRows) -> None:
    manifest = make_manifest(source)
    (tmp_path / "manifest.json").write_bytes(dump_manifest(manifest))
    assert load_manifest(pafs.LocalFileSystem(), str(tmp_path)) == manifest
    assert (manifest.train.num_rows, manifest.train.num_tokens) == (36, 108)
    assert manifest.num_bytes == 2 * sum(shard.num_bytes for shard in source.shards)
    assert Shard.model_validate(source.shards[0].model_dump()) == source.shards[0]


def test_a_manifest_of_the_version_before_is_read(tmp_path: Path, source: SourceRows) -> None:
    """It held the account of the source files itself; the rows are the same."""
    files = [
        SourceFile(path=f"{n}.txt", num_bytes=n, sha256="", num_documents=1, num_bad=0)
        for n in range(3)
    ]
    manifest = make_manifest(source).model_copy(
        update={"num_source_files": 3, "num_source_bytes": 3}
    )
    old = {
        key: value
        for key, value in manifest.model_dump(mode="json").items()
        if not key.startswith("num_source_")
    }
    old |= {"version": 2, "source_files": [file.model_dump() for file in files]}
    (tmp_path / "manifest.json").write_text(json.dumps(old))
    assert load_manifest(pafs.LocalFileSystem(), str(tmp_path)) == manifest
    assert list(load_source_files(pafs.LocalFileSystem(), str(tmp_path))) == files


def test_the_account_of_the_source_files_lies_beside_the_manifest(
    tmp_path: Path, source: SourceRows
) -> None:
    """Workers load the manifest: its size does not go by the number of files."""
    files = [SourceFile(path="a.txt", num_bytes=7, sha256="5", num_documents=1, num_bad=2)]
    (tmp_path / "source_files.json").write_bytes(dump_source_files(files))
    assert list(load_source_files(pafs.LocalFileSystem(), str(tmp_path))) == files
    (tmp_path / "source_files.json").write_bytes(b"{}")
    with pytest.raises(CorpusError, match="is not the account"):
        load_source_files(pafs.LocalFileSystem(), str(tmp_path))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "holds no prepared corpus"),
        (b"{", "is not a manifest"),
        (b'{"version": 99}', "is of version 99"),
        (b'{"version": 1}', "is of version 1"),
        (b'{"version": %d}' % VERSION, "is not a manifest"),
        (b"[]", "is of version None"),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: bytes | None, what: str) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(CorpusError, match=what):
        load_manifest(pafs.LocalFileSystem(), str(tmp_path))
