"""Which files a source names, in which order, and what is refused."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import pytest

from dray.corpus.sources import current_stamp, find_files, translate_glob
from dray.errors import CorpusError
from dray.spec import Source


def names(root: Path, **source: object) -> list[str]:
    return [os.path.relpath(file.path, root) for file in find_files(Source(**source), "data.train.0")]  # type: ignore[arg-type]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a.jsonl.gz", "c.TXT", "image.png", ".hidden.txt", "_SUCCESS", "deep/d.jsonl.zst",
                 "deep/er/e.py", "deep/__pycache__/f.py", ".git/g.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x\n")
    return tmp_path


def test_a_folder_gives_its_known_files_in_order(tree: Path) -> None:
    assert names(tree, path=str(tree)) == ["a.jsonl.gz", "b.jsonl", "c.TXT", "deep/d.jsonl.zst", "deep/er/e.py"]


def test_forms_and_compressions_come_from_suffixes(tree: Path) -> None:
    files = find_files(Source(path=str(tree)), "s")
    forms = {os.path.basename(file.path): (file.form, file.compression) for file in files}
    assert forms == {"a.jsonl.gz": ("jsonl", "gzip"), "b.jsonl": ("jsonl", ""), "c.TXT": ("text", ""),
                     "d.jsonl.zst": ("jsonl", "zstd"), "e.py": ("text", "")}


@pytest.mark.parametrize(("pattern", "found"), [
    ("*.jsonl*", ["a.jsonl.gz", "b.jsonl"]),
    ("**/*.jsonl*", ["a.jsonl.gz", "b.jsonl", "deep/d.jsonl.zst"]),
    ("deep/**", ["deep/d.jsonl.zst", "deep/er/e.py"]),
    ("[ab].jsonl*", ["a.jsonl.gz", "b.jsonl"]),
    ("[!a].jsonl", ["b.jsonl"]),
    ("?.jsonl", ["b.jsonl"]),
])
def test_globs(tree: Path, pattern: str, found: list[str]) -> None:
    assert names(tree, path=f"{tree}/{pattern}") == found


def test_relative_paths_start_at_the_working_directory(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree / "deep")
    assert names(tree, path="../*.jsonl") == ["b.jsonl"]


def test_exclude_goes_by_name_relative_path_or_whole_path(tree: Path) -> None:
    excluded = ("b.jsonl", "deep/er/*", f"{tree}/c.*")
    assert names(tree, path=str(tree), exclude=excluded) == ["a.jsonl.gz", "deep/d.jsonl.zst"]


def test_a_file_that_two_paths_name_is_read_once(tree: Path) -> None:
    assert names(tree, path=(f"{tree}/b.jsonl", f"{tree}/*.jsonl")) == ["b.jsonl"]


def test_an_explicit_format_takes_any_suffix(tree: Path) -> None:
    assert "image.png" in names(tree, path=str(tree), format="lines")


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("x")
    assert names(tmp_path, path=f"{tmp_path}/a[1].txt") == ["a[1].txt"]


def test_fsspec_uris_and_globs_below_them(tree: Path) -> None:
    files = find_files(Source(path=f"local://{tree}/*.jsonl"), "s")
    assert [file.name for file in files] == [f"local://{tree}/b.jsonl"]
    assert files[0].stamp


def test_the_standard_library_without_site_packages() -> None:
    files = find_files(Source(path="python:stdlib"), "s")
    root = sysconfig.get_paths()["stdlib"]
    assert f"{root}/json/decoder.py" in [file.path for file in files]
    assert not any("site-packages" in file.path or "__pycache__" in file.path for file in files)
    assert files == find_files(Source(path="python:stdlib"), "s")


def test_a_stamp_changes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    file = find_files(Source(path=str(path)), "s")[0]
    assert current_stamp(file) == (file.num_bytes, file.stamp)
    path.write_text("two!")
    assert current_stamp(file) != (file.num_bytes, file.stamp)


@pytest.mark.parametrize(("path", "what"), [
    ("{root}/missing", "does not exist"),
    ("{root}/none/*.jsonl", "does not exist"),
    ("{root}/*.parquet", "no matching file"),
    ("{root}/image.png", "cannot tell the form"),
    ("{root}/deep/__pycache__/*.md", "no matching file"),
])
def test_refusals_name_the_place(tree: Path, path: str, what: str) -> None:
    with pytest.raises(CorpusError, match=what) as caught:
        find_files(Source(path=path.format(root=tree)), "data.train.0")
    assert caught.value.where == "data.train.0.path"


def test_translated_globs_stay_within_a_name() -> None:
    assert translate_glob("a*b") == "a[^/]*b"
    assert translate_glob("**/x") == "(?:.*/)?x"
