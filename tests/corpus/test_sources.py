"""Which files a source names, in which order, and what is refused."""

from __future__ import annotations

import os
import re
import sysconfig
from pathlib import Path

import pytest

from dray.corpus.sources import current_stamp, find_files, list_source, translate_glob
from dray.errors import CorpusError
from dray.spec import Source


def names(root: Path, **source: object) -> list[str]:
    return [
        os.path.relpath(file.path, root) for file in find_files(Source(**source), "data.train.0")
    ]  # type: ignore[arg-type]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "b.jsonl",
        "a.jsonl.gz",
        "c.TXT",
        "image.png",
        ".hidden.txt",
        "_SUCCESS",
        "deep/d.jsonl.zst",
        "deep/er/e.py",
        "deep/__pycache__/f.py",
        ".git/g.txt",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x\n" if "json" in name else "x\n" * 50)  # the text outweighs the data
    return tmp_path


def test_a_folder_gives_its_known_files_in_order(tree: Path) -> None:
    assert names(tree, path=str(tree)) == [
        "a.jsonl.gz",
        "b.jsonl",
        "c.TXT",
        "deep/d.jsonl.zst",
        "deep/er/e.py",
    ]


def test_forms_and_compressions_come_from_suffixes(tree: Path) -> None:
    files = find_files(Source(path=str(tree)), "s")
    forms = {os.path.basename(file.path): (file.form, file.compression) for file in files}
    assert forms == {
        "a.jsonl.gz": ("jsonl", "gzip"),
        "b.jsonl": ("jsonl", ""),
        "c.TXT": ("text", ""),
        "d.jsonl.zst": ("jsonl", "zstd"),
        "e.py": ("text", ""),
    }


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.jsonl*", ["a.jsonl.gz", "b.jsonl"]),
        ("**/*.jsonl*", ["a.jsonl.gz", "b.jsonl", "deep/d.jsonl.zst"]),
        ("deep/**", ["deep/d.jsonl.zst", "deep/er/e.py"]),
        ("[ab].jsonl*", ["a.jsonl.gz", "b.jsonl"]),
        ("[!a].jsonl", ["b.jsonl"]),
        ("?.jsonl", ["b.jsonl"]),
    ],
)
def test_globs(tree: Path, pattern: str, found: list[str]) -> None:
    assert names(tree, path=f"{tree}/{pattern}") == found


def test_relative_paths_start_at_the_working_directory(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("{root}/missing", "does not exist"),
        ("{root}/none/*.jsonl", "does not exist"),
        ("{root}/*.parquet", "no matching file"),
        ("{root}/image.png", "cannot tell the form"),
        ("{root}/deep/__pycache__/*.md", "no matching file"),
    ],
)
def test_refusals_name_the_place(tree: Path, path: str, what: str) -> None:
    with pytest.raises(CorpusError, match=what) as caught:
        find_files(Source(path=path.format(root=tree)), "data.train.0")
    assert caught.value.where == "data.train.0.path"


def test_translated_globs_stay_within_a_name() -> None:
    assert translate_glob("a*b") == "a[^/]*b"
    assert translate_glob("**/x") == "(?:.*/)?x"
    assert re.compile(translate_glob("[[]a[]!]")).fullmatch("[a!")


# --- what is left out ---------------------------------------------------------------------------


def left_out(**source: object) -> dict[str, tuple[int, list[str]]]:
    """Reason → number of files and the first names, of what a source leaves out."""
    listing = list_source(Source(**source), "data.train.0")  # type: ignore[arg-type]
    return {
        item.reason: (
            item.num_files,
            [os.path.basename(path.rstrip("/")) for path in item.examples],
        )
        for item in listing.left_out
    }


def test_every_file_left_out_is_counted_by_reason(tree: Path) -> None:
    assert left_out(path=str(tree), exclude=("b.jsonl",)) == {
        "hidden or bookkeeping": (4, [".git", "__pycache__", ".hidden.txt", "_SUCCESS"]),
        "named by `exclude`": (1, ["b.jsonl"]),
        "of a form that their names do not tell": (1, ["image.png"]),
    }
    # What a pattern does not name is not left out: nobody asked for it.
    assert left_out(path=f"{tree}/*.jsonl") == {}


def test_many_files_left_out_keep_the_first_names(tmp_path: Path) -> None:
    for index in range(20):
        (tmp_path / f"part-{index:05d}").write_text("x")
    (tmp_path / "a.jsonl").write_text("{}")
    found = left_out(path=(str(tmp_path), str(tmp_path)))["of a form that their names do not tell"]
    assert found == (40, [f"part-{index:05d}" for index in range(5)])


def test_nothing_but_files_of_unknown_form_are_named(tmp_path: Path) -> None:
    (tmp_path / "part-00000").write_text("x")
    with pytest.raises(
        CorpusError, match=r"no matching file in .*left out: 1 of a form .*\(part-00000\)"
    ):
        find_files(Source(path=str(tmp_path)), "s")


@pytest.mark.parametrize(
    "name", ["README.md", "README", "LICENSE.txt", "licence.md", "SOURCE.md", "dataset_infos.json"]
)
def test_what_accompanies_data_is_no_document(tmp_path: Path, name: str) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / name).write_text("much longer than the data itself\n" * 100)
    assert names(tmp_path, path=str(tmp_path)) == ["train.jsonl"]
    assert sum(count for count, _ in left_out(path=str(tmp_path)).values()) == 1
    if name.endswith((".md", ".txt")):
        assert names(tmp_path, path=f"{tmp_path}/{name}") == [name]  # asked for by name it is read


def test_text_beside_data_follows_what_weighs_more(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text\n" + "a line\n" * 100)
    (tmp_path / "load.py").write_text("print()\n")
    assert names(tmp_path, path=str(tmp_path)) == ["train.csv"]
    (tmp_path / "book.txt").write_text("a line\n" * 1000)
    assert names(tmp_path, path=str(tmp_path)) == ["book.txt", "load.py", "train.csv"]


def test_links_neither_loop_nor_double(tmp_path: Path) -> None:
    data = tmp_path / "above" / "data"
    (data / "deep").mkdir(parents=True)
    (data / "deep" / "a.txt").write_text("a")
    (tmp_path / "above" / "not.txt").write_text("outside")
    (tmp_path / "aside").mkdir()
    (tmp_path / "aside" / "b.txt").write_text("b")
    links = {
        "deep/self": ".",
        "deep/up": "..",
        "above": "../../above",
        "again": "deep",
        "first": "../../aside",
        "second": "../../aside",
        "0.txt": "deep/a.txt",
        "dead.txt": "nowhere",
        "circle": "circle",
    }
    for link, target in links.items():
        (data / link).symlink_to(target)
    assert names(data, path=str(data)) == ["deep/a.txt", "first/b.txt"]
    assert {reason: count for reason, (count, _) in left_out(path=str(data)).items()} == {
        "links that lead nowhere": 2,
        "links to files that are read already": 1,
        "links to folders that are read already": 5,
    }


def test_links_into_a_hidden_store_are_read(tmp_path: Path) -> None:
    """As the cache of a hub lays its files out."""
    (tmp_path / ".blobs").mkdir()
    (tmp_path / ".blobs" / "1f2e").write_text("x")
    (tmp_path / "a.txt").symlink_to(".blobs/1f2e")
    assert names(tmp_path, path=str(tmp_path)) == ["a.txt"]


def test_pipes_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "a.txt").write_text("x")
    assert left_out(path=str(tmp_path)) == {"pipes, sockets and devices": (1, ["pipe.txt"])}
    with pytest.raises(CorpusError, match="is a pipe, socket or device"):
        find_files(Source(path=f"{tmp_path}/pipe.txt"), "s")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(CorpusError, match="cannot be listed"):
        find_files(Source(path=str(tmp_path)), "s")


@pytest.mark.parametrize("scheme", ["", "local://"])
def test_brackets_in_a_folder_that_is_there_are_no_pattern(tmp_path: Path, scheme: str) -> None:
    for folder in ("set[1]", "set1"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_text("{}")
    assert names(tmp_path, path=f"{scheme}{tmp_path}/set[1]/*.jsonl") == ["set[1]/a.jsonl"]
    assert names(tmp_path, path=f"{scheme}{tmp_path}/set[0-9]/*.jsonl") == ["set1/a.jsonl"]
    assert names(tmp_path, path=f"{scheme}{tmp_path}/set[[]1]/*.jsonl") == ["set[1]/a.jsonl"]
