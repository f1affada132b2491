"""Data, corpora, tokenisers and models from anybody: they cost themselves, and run nothing."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import zstandard

from dray.corpus.manifest import load_manifest
from dray.corpus.reading import Bad, Span, SpanReader
from dray.corpus.sources import find_files
from dray.errors import CorpusError, SpecError, UserError
from dray.spec import Source
from dray.storage.filesystem import open_filesystem

Refused = Callable[..., str]
LIMIT = 1 << 20


class Touches:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


# ---- a corpus ----------------------------------------------------------------------------------


def spoil(hostile: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change every copy of the corpus' manifest."""
    for path in hostile.rglob("manifest.json"):
        tree = json.loads(path.read_text())
        if "train" in tree:
            change(tree)
            path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    "file",
    ["../../../etc/passwd", "/etc/passwd", "a/../../b.arrow", "..", ".hidden", "a\nb", "a\0b", ""],
)
def test_a_manifest_whose_shards_lie_elsewhere(hostile: Path, refused: Refused, file: str):
    spoil(hostile, lambda tree: tree["validation"]["sources"][0]["shards"][0].update(file=file))
    line = refused("evaluate", "tiny", "--storage", str(hostile))
    assert "manifest.json: is not a manifest" in line


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree.update(group_rows=0),
        lambda tree: tree.update(group_rows=-1),
        lambda tree: tree["validation"]["sources"][0].update(num_rows=10**15),
        lambda tree: tree["validation"]["sources"][0].update(num_rows=-5),
        lambda tree: tree["validation"]["sources"][0]["shards"][0].update(num_rows=-5),
        lambda tree: tree["validation"]["sources"][0]["shards"][0].update(num_bytes=-1),
        lambda tree: tree.update(extra="key"),
        lambda tree: tree.update(version=99),
        lambda tree: tree.update(train=[]),
        lambda tree: tree.clear(),
    ],
)
def test_a_manifest_whose_counts_are_wrong(
    hostile: Path, refused: Refused, change: Callable[[dict[str, Any]], object]
):
    spoil(hostile, change)
    refused("evaluate", "tiny", "--storage", str(hostile))


def test_a_manifest_of_other_sizes_than_the_files(hostile: Path, refused: Refused):
    spoil(
        hostile,
        lambda tree: tree["validation"]["sources"][0]["shards"][0].update(num_bytes=10**15),
    )
    line = refused("evaluate", "tiny", "--storage", str(hostile))
    assert "bytes instead of 1000000000000000" in line


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "{", "[]", "\0", "9" * 10_000])
def test_a_manifest_that_is_none(hostile: Path, refused: Refused, text: str):
    for path in hostile.rglob("corpus/manifest.json"):
        path.write_text(text)
    refused("evaluate", "tiny", "--storage", str(hostile))
    with pytest.raises(CorpusError):
        load_manifest(*open_filesystem(str(hostile / "tiny" / "corpus")))


def test_a_shard_that_was_changed(hostile: Path, refused: Refused):
    (shard,) = hostile.glob("corpora/*/validation/*.arrow")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    assert "checksum differs" in refused("evaluate", "tiny", "--storage", str(hostile))


def test_a_shard_that_is_a_link(hostile: Path, refused: Refused):
    (shard,) = hostile.glob("corpora/*/validation/*.arrow")
    shard.unlink()
    shard.symlink_to("/etc/passwd")
    line = refused("evaluate", "tiny", "--storage", str(hostile))
    assert "cannot be read" in line
    assert "root:" not in line


# ---- files that burst --------------------------------------------------------------------------

BURST_BYTES = 300_000_000
MOST_BYTES = 80_000_000
"""A few blocks of 4 MiB, and the record that may be the longest."""


def zeros(open_for_writing: Callable[[io.BytesIO], Any], first: bytes = b"") -> bytes:
    out = io.BytesIO()
    with open_for_writing(out) as stream:
        stream.write(first)
        for _ in range(BURST_BYTES // 1_000_000):
            stream.write(b"0" * 1_000_000)
    return out.getvalue()


BURSTS: dict[str, Callable[[io.BytesIO], Any]] = {
    "gz": lambda out: gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1),
    "bz2": lambda out: bz2.BZ2File(out, "wb", compresslevel=1),
    "xz": lambda out: lzma.LZMAFile(out, "wb", preset=0),  # noqa: SIM115
    "zst": lambda out: zstandard.ZstdCompressor().stream_writer(out, closefd=False),
}


def read(path: Path, **fields: Any) -> tuple[int, list[Bad]]:
    """Number of documents, and the bad records. The memory that it takes is bounded."""
    source = Source(path=str(path), **fields)
    tracemalloc.start()
    try:
        reader = SpanReader(Span(find_files(source, "s")[0], 0, None), source, LIMIT)
        found = [(len(documents.texts), documents.bad) for documents in reader.read()]
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
    return sum(count for count, _ in found), [bad for _, some in found for bad in some]


@pytest.mark.parametrize("ending", BURSTS)
def test_a_compressed_file_that_bursts(tmp_path: Path, ending: str):
    path = tmp_path / f"burst.jsonl.{ending}"
    path.write_bytes(zeros(BURSTS[ending]))
    assert path.stat().st_size < BURST_BYTES / 100
    count, bad = read(path)
    assert count == 0
    assert [item.reason.partition(" =")[0] for item in bad] == ["longer than data.max_record_bytes"]


@pytest.mark.parametrize(
    ("form", "first"),
    [
        ("csv", b'text\n"'),
        ("csv", b"text\n"),
        ("tsv", b"text\t"),
        ("txt", b""),
        ("json", b"[{"),
        ("json", b'[{"text": "'),
        ("conll", b"a\t"),
    ],
)
def test_a_burst_of_every_form(tmp_path: Path, form: str, first: bytes):
    path = tmp_path / f"burst.{form}.gz"
    path.write_bytes(zeros(BURSTS["gz"], first))
    with suppress(CorpusError):  # of the csv files whose header is no such column
        count, bad = read(path, **({"text": "0"} if form == "conll" else {}))
        assert (count, bool(bad)) == (0, True)


def test_an_archive_that_bursts(tmp_path: Path):
    path = tmp_path / "burst.jsonl.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("a.jsonl", "w", force_zip64=True) as stream:
            for _ in range(BURST_BYTES // 1_000_000):
                stream.write(b"0" * 1_000_000)
        archive.writestr("b.jsonl", '{"text": "sound"}\n')
    count, bad = read(path)
    assert count == 1
    assert [item.reason.partition(" =")[0] for item in bad] == ["longer than data.max_record_bytes"]


def test_an_archive_with_paths_out_of_its_folder(tmp_path: Path):
    """Its files are read where they lie; none is written anywhere."""
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "a.jsonl.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("../../evil.jsonl", "/tmp/evil.jsonl", "..\\evil.jsonl", "good.jsonl"):
            archive.writestr(name, json.dumps({"text": f"of {name}"}) + "\n")
    count, bad = read(path)
    assert (count + len(bad)) <= 4
    assert {item.name for item in tmp_path.rglob("*")} == {"data", "a.jsonl.zip"}


def test_an_archive_that_lies_about_its_sizes(tmp_path: Path):
    path = tmp_path / "a.jsonl.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jsonl", '{"text": "some words"}\n' * 1000)
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x01\x02")
    content[at + 20 : at + 28] = b"\xff\xff\xff\x7f" * 2  # both sizes in the central directory
    path.write_bytes(bytes(content))
    count, bad = read(path)
    assert count <= 1000
    assert bad


# ---- records -----------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_records_that_take_long_or_deep(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    names = ", ".join(f'"k{number % 40_000}": 1' for number in range(60_000))
    path.write_text(
        "\n".join(
            [
                '{"text": "first"}',
                "{" + names + "}",
                '{"text": ' + "[" * 200_000,
                '{"text": ' + '{"a":' * 100_000,
                '{"text": ' + "9" * 100_000 + "}",
                '{"text": "x", "text": "y"}',
                '{"__proto__": 1, "__class__": 2}',
                '{"text": "last"}',
            ]
        )
    )
    begun = time.monotonic()
    count, bad = read(path)
    assert time.monotonic() - begun < 20
    assert count + len(bad) == 8
    assert count >= 2


@pytest.mark.timeout(60)
def test_a_folder_of_data_with_what_never_ends(tmp_path: Path):
    """Pipes and devices are no files of data."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to(".")
    (tmp_path / "good.jsonl").write_text('{"text": "x"}\n')
    found = find_files(Source(path=str(tmp_path)), "s")
    assert [Path(file.path).name for file in found] == ["good.jsonl"]


# ---- tokenisers and models ---------------------------------------------------------------------


def folder_of(tmp_path: Path, **files: str | bytes) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


EVIL = "open('pwned', 'w').close()\n"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[" * 100_000,
        "{}",
        '{"model": {"type": "BPE", "vocab": {"a": 99999999999999999999}, "merges": []}}',
        '{"model": {"type": "BPE", "vocab": {}, "merges": [["x", "y"]]}}',
        '{"model": {"type": "Evil", "vocab": {}}}',
        pickle.dumps(Touches()),
    ],
)
def test_a_tokenizer_that_is_none(
    tmp_path: Path, content: str | bytes, monkeypatch: pytest.MonkeyPatch
):
    from dray.corpus.tokenizing import copy_tokenizer

    monkeypatch.chdir(tmp_path)
    place = folder_of(tmp_path, tokenizer__json=content)
    with pytest.raises(CorpusError) as caught:
        copy_tokenizer(str(place), *open_filesystem(str(tmp_path / "out")))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()


def test_a_tokenizer_that_brings_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from dray.corpus.tokenizing import copy_tokenizer

    monkeypatch.chdir(tmp_path)
    config = {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "evil.T"}
    place = folder_of(
        tmp_path,
        tokenizer_config__json=json.dumps(config),
        evil__py=EVIL,
        vocab__txt="[PAD]\n[UNK]\na\n",
    )
    with pytest.raises(UserError):
        copy_tokenizer(str(place), *open_filesystem(str(tmp_path / "out")))
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "out" / "evil.py").exists()


SIZES = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
}


def test_a_model_that_brings_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from dray.models.config import read_config

    monkeypatch.chdir(tmp_path)
    brings = {
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        "_attn_implementation": "evil/kernel",
        "attn_implementation": "evil/kernel",
        "use_kernels": True,
    }
    place = folder_of(tmp_path, config__json=json.dumps(SIZES | brings), evil__py=EVIL)
    kept = read_config(place)
    assert kept["hidden_size"] == 64
    assert not set(kept) & set(brings)
    (place / "config.json").write_text(json.dumps(SIZES | brings | {"model_type": "evil"}))
    with pytest.raises(SpecError, match="remote code is never run"):
        read_config(place)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_weights_that_are_pickles(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    from dray.models.config import weight_files
    from dray.models.source import check_weights

    monkeypatch.chdir(tmp_path)
    place = folder_of(tmp_path, config__json=json.dumps(SIZES))
    (place / name).write_bytes(pickle.dumps(Touches()))
    check = weight_files if name == "pytorch_model.bin" else check_weights
    with pytest.raises(SpecError, match=r"never pickles|no whole safetensors file"):
        check(place)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "weight_map",
    [{"w": "../../etc/passwd"}, {"w": "/etc/passwd"}, {"w": 3}, {"w": ""}, [], None, {"w": "x\0"}],
)
def test_an_index_of_weights_that_lie_elsewhere(tmp_path: Path, weight_map: Any):
    from dray.models.config import weight_files

    place = folder_of(tmp_path, config__json=json.dumps(SIZES))
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(SpecError):
        weight_files(place)
