"""Runs and checkpoints from anybody: what is not as it was committed is not used, what only
pretends to be a path below the storage is none, and nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs as pafs

from dray.cli import main
from dray.errors import StoreError, UserError
from dray.runs import Run
from dray.storage.filesystem import delete_folder

Refused = Callable[..., str]


class Touches:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


def checkpoint(hostile: Path) -> Path:
    (found,) = (hostile / "tiny" / "checkpoints").glob("step-*")
    return found


def commit_anew(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest of a checkpoint, and its marker with it: as somebody would who wrote all
    of it."""
    tree = json.loads((folder / "manifest.json").read_bytes())
    change(tree)
    content = json.dumps(tree).encode()
    (folder / "manifest.json").write_bytes(content)
    marker = json.loads((folder / "COMMITTED").read_bytes())
    marker["manifest_sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "COMMITTED").write_text(json.dumps(marker))


def put_file(folder: Path, content: bytes) -> None:
    """Put a rank's file in place of the one there is, and its digest into the manifest."""
    (path,) = folder.glob("rank-*.safetensors")
    path.write_bytes(content)
    commit_anew(
        folder,
        lambda tree: tree["files"][0].update(
            bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
        ),
    )


@pytest.mark.parametrize(
    "file",
    [
        "../../../../../etc/passwd",
        "/etc/passwd",
        "rank-00000-of-00001.safetensors/../../x",
        "rank-\u0660\u0660\u0660\u0660\u0660-of-00001.safetensors",
        "rank-00000-of-00001.safetensors\n",
        "manifest.json",
        "",
        7,
        None,
    ],
)
def test_a_manifest_of_files_elsewhere(hostile: Path, refused: Refused, file: object):
    commit_anew(checkpoint(hostile), lambda tree: tree["files"][0].update(file=file))
    line = refused("evaluate", "tiny", "--storage", str(hostile))
    assert "no sound checkpoint" in line


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree["metadata"].update(shapes={}),
        lambda tree: tree["metadata"].update(shapes=3),
        lambda tree: tree["metadata"]["shapes"].update({"evil": [2**62, 2**62]}),
        lambda tree: tree["metadata"]["shapes"].update({"evil": [-1]}),
        lambda tree: tree["metadata"]["shapes"].update({"evil": ["a"]}),
        lambda tree: tree.update(partitions=[["evil", 0, ["param"]]], others=[]),
        lambda tree: tree.update(partitions=[["evil", 10**30, ["param"]]], others=[]),
        lambda tree: tree.update(partitions=7),
        lambda tree: tree.update(others=[["evil", "param", [99], [0], [1]]]),
        lambda tree: tree.update(others=[["evil", "param", [0], [10**30], [1]]]),
        lambda tree: tree.update(version=99),
        lambda tree: tree.update(step="x"),
        lambda tree: tree.clear(),
    ],
)
def test_a_manifest_that_lies(
    hostile: Path, refused: Refused, change: Callable[[dict[str, Any]], object]
):
    """All digests are right: it is the content that is not."""
    commit_anew(checkpoint(hostile), change)
    refused("evaluate", "tiny", "--storage", str(hostile))
    assert main(["verify", "tiny", "--storage", str(hostile)]) in (2, 3)


@pytest.mark.parametrize("name", ["manifest.json", "COMMITTED"])
@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"{", b"[]", b"\0", b"9" * 10_000, pickle.dumps(Touches())]
)
def test_a_manifest_or_marker_that_is_none(
    hostile: Path, refused: Refused, name: str, content: bytes
):
    (checkpoint(hostile) / name).write_bytes(content)
    refused("evaluate", "tiny", "--storage", str(hostile))
    assert not (hostile.parent / "pwned").exists()


def test_a_pickle_in_place_of_weights(hostile: Path, refused: Refused):
    put_file(checkpoint(hostile), pickle.dumps(Touches()))
    assert "not a safetensors file" in refused("evaluate", "tiny", "--storage", str(hostile))
    assert not (hostile.parent / "pwned").exists()


def header(tree: Any, length: int | None = None, rest: bytes = b"\0" * 64) -> bytes:
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + rest


def entry(**changes: object) -> dict[str, object]:
    return {"w|param|0": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes}


@pytest.mark.parametrize(
    "content",
    [
        header({}, length=2**63),
        header({}, length=2**64 - 1),
        header({}, length=50_000_000),
        header(b"[" * 100_000),
        header(b"\xff\xfe"),
        header(entry(data_offsets=[0, 2**62], shape=[2**60])),
        header(entry(data_offsets=[-16, 0])),
        header(entry(data_offsets=[16, 0])),
        header(entry(data_offsets=[0.0, 16.0])),
        header(entry(data_offsets=[0])),
        header(entry(shape=[-1, -4])),
        header(entry(shape=[1e30])),
        header(entry(dtype="OBJECT")),
        header({"w|param|0": 3}),
        header([]),
        b"",
        b"\x01",
    ],
)
def test_a_rank_file_whose_header_lies(hostile: Path, refused: Refused, content: bytes):
    put_file(checkpoint(hostile), content)
    refused("evaluate", "tiny", "--storage", str(hostile))


def test_a_rank_file_that_was_changed(hostile: Path, refused: Refused):
    (path,) = checkpoint(hostile).glob("rank-*.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    line = refused("evaluate", "tiny", "--storage", str(hostile))
    assert "has changed: its checksum is another" in line
    path.write_bytes(content[:-1])
    assert "no sound checkpoint" in refused("evaluate", "tiny", "--storage", str(hostile))


def test_a_rank_file_that_is_a_link(hostile: Path, refused: Refused):
    """It is read as what it leads to, which is not what was committed; a device is no file."""
    (path,) = checkpoint(hostile).glob("rank-*.safetensors")
    other = hostile.parent / "other"
    other.write_bytes(b"x" * path.stat().st_size)
    for target, said in ((other, "its checksum is another"), (Path("/dev/zero"), "no sound")):
        path.unlink()
        path.symlink_to(target)
        assert said in refused("evaluate", "tiny", "--storage", str(hostile))


def test_a_folder_that_is_a_link_is_not_deleted_through(tmp_path: Path):
    """Retention deletes folders: of a link it takes the link."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / "step-00000001-a0001").symlink_to("precious")
    (tmp_path / "step-00000002-a0001").mkdir()
    (tmp_path / "step-00000002-a0001" / "inner").symlink_to("../precious")
    for name in ("step-00000001-a0001", "step-00000002-a0001"):
        delete_folder(pafs.LocalFileSystem(), str(tmp_path / name))
        assert not os.path.lexists(tmp_path / name)
    assert (tmp_path / "precious" / "file").exists()


# ---- records -----------------------------------------------------------------------------------


def record(hostile: Path, **fields: object) -> None:
    path = hostile / "tiny" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"{", b"[]", b'"x"', b"\xff", b"null", b"9" * 10_000, b"{}"]
)
def test_a_record_of_a_run_that_is_none(hostile: Path, refused: Refused, content: bytes):
    (hostile / "tiny" / "run.json").write_bytes(content)
    for command in ("show", "report", "evaluate"):
        refused(command, "tiny", "--storage", str(hostile))
    assert main(["doctor", "tiny", "--storage", str(hostile)]) in (0, 2)  # it may know a cause


@pytest.mark.parametrize("corpus", ["../../x", "corpora/../../x", ".."])
def test_a_record_whose_corpus_leaves_the_storage(hostile: Path, refused: Refused, corpus: str):
    record(hostile, corpus=corpus)
    (hostile / "tiny" / "corpus" / "manifest.json").unlink()
    assert "leaves the storage" in refused("evaluate", "tiny", "--storage", str(hostile))


@pytest.mark.parametrize(
    "place",
    [
        "../elsewhere/checkpoints/step-00000004-a0001",
        "tiny/../../elsewhere/checkpoints/step-00000004-a0001",
        "/etc/checkpoints/step-00000004-a0001",
        "tiny/checkpoints/../../../x",
        "tiny/checkpoints/step-\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0664-a0001",
        "",
    ],
)
def test_a_record_whose_origin_leaves_the_storage(hostile: Path, place: str, refused: Refused):
    """Readers leave a pin beside the checkpoint that they read: it must not land elsewhere."""
    (hostile.parent / "elsewhere").mkdir()
    (checkpoint(hostile) / "COMMITTED").unlink()
    origin = {"run": "x", "step": 4, "attempt": 1, "checkpoint": place}
    record(hostile, origin=origin)
    line = refused("evaluate", "tiny", "--storage", str(hostile))
    assert "is no checkpoint of a run in this storage" in line or "not a name" in line
    assert not list((hostile.parent / "elsewhere").iterdir())
    with suppress(StoreError):  # one of an earlier version is looked for below the storage
        found = Run(str(hostile), "tiny").find_path(place)
        assert Path(os.path.normpath(found)).is_relative_to(hostile)


@pytest.mark.parametrize("name", ["attempts", "metrics", "events", "validation", "drivers"])
@pytest.mark.parametrize(
    "content", ["[" * 100_000, "{" * 1000, "null", '{"step": "x", "attempt": []}', "\0\n\0\n"]
)
def test_records_and_rows_that_are_none(
    hostile: Path, name: str, content: str, capsys: pytest.CaptureFixture[str]
):
    """Rows that are none are left out; a record that is none is a line."""
    for path in (hostile / "tiny" / name).iterdir():
        path.write_text(f"{content}\n")
    for command in ("show", "doctor", "report"):
        code = main([command, "tiny", "--storage", str(hostile), *OUT.get(command, ())])
        told = capsys.readouterr().err
        assert code in (0, 2), told
        assert "not foreseen" not in told


OUT = {"report": ("--out", os.devnull)}


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "evil"},
        {"model_type": None},
        {"hidden_size": "x"},
        {"num_attention_heads": 0},
        {"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "_attn_implementation": "evil/kernel"},
    ],
)
def test_the_model_of_a_run_that_brings_code(hostile: Path, change: dict[str, Any]):
    path = hostile / "tiny" / "model.json"
    tree = json.loads(path.read_text())
    tree["config"] |= change
    path.write_text(json.dumps(tree))
    from dray.release.trained import load_trained

    if "auto_map" in change:
        model = load_trained(str(hostile), "tiny").model
        assert type(model).__module__.startswith("transformers.")
        assert model.config._attn_implementation != "evil/kernel"
    else:
        with pytest.raises(UserError):
            load_trained(str(hostile), "tiny")


def test_the_spec_of_a_run_that_brings_code(hostile: Path, refused: Refused):
    path = hostile / "tiny" / "spec.yaml"
    path.write_text(f"{path.read_text()}\nevil: !!python/object/apply:os.system ['touch pwned']\n")
    assert "could not determine" in refused("evaluate", "tiny", "--storage", str(hostile))
    assert not (hostile.parent / "pwned").exists()
