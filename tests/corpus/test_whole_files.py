"""Files that are a record each, and IDX files: read as they lie, labels by folder or by place."""

from __future__ import annotations

import base64
import gzip
import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from dray.corpus.idx import make_image_file, parse_idx
from dray.corpus.prepare import corpus_key
from dray.corpus.reading import Documents, Span, SpanReader
from dray.corpus.sources import find_files
from dray.errors import CorpusError, UserError
from dray.spec import Field, Source, make_spec

FIELDS = {"image": Field("bytes"), "label": Field("label")}


def idx_bytes(array: npt.NDArray[np.uint8]) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


def write_idx(
    folder: Path, num: int = 20, *, channels: int = 0, labels: int | None = None
) -> npt.NDArray[np.uint8]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num, 5, 4, *([channels] if channels else []))).astype(np.uint8)
    name = "idx4" if channels else "idx3"
    (folder / f"a-images-{name}-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
    own = np.arange(num if labels is None else labels, dtype=np.uint8) % 3
    (folder / "a-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(own)))
    return images


def read(source: Source, fields: Any = FIELDS, limit: int = 1 << 20) -> list[Documents]:
    found = []
    for file in find_files(source, "data.train.0"):
        found += SpanReader(Span(file), source, limit, fields).read()
    return found


def pixels_of(text: str) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


@pytest.mark.parametrize("channels", [0, 3])
def test_images_of_an_idx_file_come_with_the_labels_beside_it(
    tmp_path: Path, channels: int
) -> None:
    images = write_idx(tmp_path, channels=channels)
    path = next(str(path) for path in tmp_path.glob("*images*"))
    source = Source(path=path, format="idx")
    names = [Path(file.path).name for file in find_files(source, "data.train.0")]
    assert [name[:8] for name in names] == ["a-images", "a-labels"]  # both are what the corpus is
    (documents,) = read(source)
    found = [pixels_of(text) for text in documents.texts.to_pylist()]
    assert np.array_equal(np.stack(found), images)
    assert documents.labels.to_pylist() == [str(n % 3) for n in range(20)]
    assert (documents.bad, documents.num_bytes) == ([], images.nbytes)
    (same,) = read(Source(path=str(tmp_path), format="idx"))
    assert same.texts.equals(documents.texts)


def test_a_part_of_an_idx_file_is_told_by_numbers(tmp_path: Path) -> None:
    images = write_idx(tmp_path)
    source = Source(path=str(tmp_path), format="idx", records=(12, 17))
    (documents,) = read(source)
    assert np.array_equal(pixels_of(documents.texts[0].as_py()), images[12])
    assert documents.labels.to_pylist() == [str(n % 3) for n in range(12, 17)]
    with pytest.raises(CorpusError, match=r"has 20 images, and the source's records are \[0, 21\]"):
        read(source.model_copy(update={"records": (0, 21)}))
    for given, message in (
        ({"format": "idx", "records": [3, 3]}, "the second must be above the first"),
        ({"format": "csv", "records": [0, 3]}, "only those of idx files have numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            Source(path="x", **given)


def test_labels_that_are_not_there_or_of_others_are_refused(tmp_path: Path) -> None:
    write_idx(tmp_path, labels=19)
    source = Source(path=str(tmp_path), format="idx")
    with pytest.raises(CorpusError, match="has 19 labels of 20 images"):
        read(source)
    (tmp_path / "a-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(CorpusError, match=r"labels-idx1-ubyte.gz: is not there"):
        read(source)
    (documents,) = read(source, {"image": FIELDS["image"]})  # images alone are asked for
    assert len(documents.texts) == 20
    with pytest.raises(CorpusError, match="no label column 'digit'"):
        read(source.model_copy(update={"label": "digit"}))
    (tmp_path / "a-images-idx3-ubyte.gz").rename(tmp_path / "a.gz")
    with pytest.raises(CorpusError, match="has no `images` in its name"):
        read(source)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK..", "no IDX file"),
        (bytes([0, 0, 13, 3]) + bytes(12), "of type 13 with 3 dimensions"),
        (bytes([0, 0, 8, 3]) + struct.pack(">3I", 2, 2, 2) + bytes(7), "7 bytes, where 8 are"),
        (bytes([0, 0, 8, 4]) + struct.pack(">4I", 1, 1, 1, 2) + bytes(2), "images of 2 channels"),
    ],
)
def test_what_is_no_idx_file_is_set_aside_whole(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "images-idx3-ubyte").write_bytes(content)
    (documents,) = read(Source(path=str(tmp_path), format="idx"))
    (bad,) = documents.bad
    assert message in bad.reason
    assert bad.ends_file


def test_an_image_is_a_file_that_pillow_reads() -> None:
    for shape in ((3, 7), (7, 3, 3)):
        pixels = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(make_image_file(pixels)))), pixels)
    assert parse_idx(idx_bytes(np.arange(4, dtype=np.uint8))).tolist() == [0, 1, 2, 3]


def write_folders(folder: Path) -> dict[str, bytes]:
    """Files of two classes; one of no bytes, one that is compressed."""
    contents = {
        "cats/one.png": b"\x89PNG one",
        "cats/two.jpg": b"\xff\xd8\xff two",
        "dogs/three": gzip.compress(b"three"),
        "dogs/.hidden": b"no",
        "dogs/empty.png": b"",
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return contents


def test_a_file_is_a_record_as_it_lies_with_the_name_of_its_folder(tmp_path: Path) -> None:
    contents = write_folders(tmp_path)
    found = read(Source(path=str(tmp_path), format="files"))
    texts = [text for documents in found for text in documents.texts.to_pylist()]
    labels = [label for documents in found for label in documents.labels.to_pylist()]
    names = ("cats/one.png", "cats/two.jpg", "dogs/three")
    assert [base64.b64decode(text) for text in texts] == [contents[name] for name in names]
    assert labels == ["cats", "cats", "dogs"]
    assert [bad.reason for documents in found for bad in documents.bad] == ["'content' is empty"]
    by_name = read(Source(path=str(tmp_path / "cats"), format="files", label="name"))
    assert [documents.labels.to_pylist() for documents in by_name] == [["one"], ["two"]]
    large = read(Source(path=str(tmp_path / "cats"), format="files"), limit=1024)
    assert sum(len(documents.texts) for documents in large) == 2
    (tmp_path / "cats/two.jpg").write_bytes(bytes(2000))
    large = read(Source(path=str(tmp_path / "cats"), format="files"), limit=1024)
    assert "longer than data.max_record_bytes" in large[1].bad[0].reason
    with pytest.raises(CorpusError, match=r"no label column 'class'.*content, folder, name"):
        read(Source(path=str(tmp_path), format="files", label="class"))


def test_the_names_that_labels_come_from_are_a_part_of_the_corpus(tmp_path: Path) -> None:
    """Otherwise a file that moves from one class to another would stay what it was."""
    write_folders(tmp_path)

    def key() -> str:
        from scans import Scans

        tree = {
            "name": "x",
            "task": Scans(),
            "data": {"train": {"path": str(tmp_path), "format": "files"}},
            "model": {"architecture": "vit"},
            "duration": {"steps": 1},
        }
        return corpus_key(make_spec(tree))

    first = key()
    (tmp_path / "cats/two.jpg").rename(tmp_path / "dogs/two.jpg")
    moved = key()
    (tmp_path / "dogs/two.jpg").rename(tmp_path / "cats/two.jpg")
    assert moved != first == key()


def test_a_model_of_no_tokens_needs_no_sizes_and_one_of_tokens_does() -> None:
    from scans import scans_tree

    spec = make_spec(scans_tree(["x"], model={"architecture": "resnet"}))
    assert (spec.model.hidden_size, spec.row_tokens) == (None, 16)
    with pytest.raises(UserError, match=r"model: `hidden_size` is needed with `architecture`"):
        make_spec(
            {"name": "x", "data": {"train": "x"}, "model": {"architecture": "bert"}}
            | {"duration": {"steps": 1}}
        )
    with pytest.raises(UserError, match=r"model.vocab_size = 9: scans reads image, label, no text"):
        make_spec(scans_tree(["x"], model={"architecture": "vit", "vocab_size": 9}))
