"""What goes with a submitted command: what it names, where it lies, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dray.errors import SpecError
from dray.jobs import make_package, staged
from dray.jobs.arrival import compare, versions_here
from dray.jobs.package import local_names


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A project beside a folder of data, with what nobody wants to send."""
    for place, text in {
        "shared/data/a.txt": "a" * 100,
        "shared/data/.env": "KEY=secret",
        "shared/data/.git/config": "x",
        "shared/other.txt": "not named",
        "project/spec.yaml": "name: x",
        "project/.venv/big": "x" * 1000,
        "project/texts/deep/b.txt": "b",
    }.items():
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def listed(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_paths_stay_what_they_are(home: Path):
    package = make_package(["spec.yaml", "../shared/data", "texts"], 10**6, home / "project")
    assert package.root == home
    assert str(package.here) == "project"
    assert package.num_left_out == 1  # .env; what is under a hidden folder is not looked at
    with staged(package) as folder:
        files = listed(folder)
        assert files - {"project/.here"} == {
            "project/spec.yaml",
            "project/texts/deep/b.txt",
            "shared/data/a.txt",
        }
        there = os.path.normpath(folder / package.here / "../shared/data/a.txt")
        assert Path(there).read_text() == "a" * 100
    assert not folder.exists()


def test_nothing_named_is_an_empty_folder(home: Path):
    package = make_package([], 0, home / "project")
    assert (package.files, str(package.here), package.num_bytes) == ((), ".", 0)
    with staged(package) as folder:
        assert listed(folder) == {".here"}


def test_too_much_is_refused_with_the_largest_file_named(home: Path):
    with pytest.raises(SpecError, match=r"\.\./shared/data/a.txt: the package would have 2 files"):
        make_package(["../shared/data", "spec.yaml"], 100, home / "project")


def test_what_is_not_there_is_refused(home: Path):
    with pytest.raises(SpecError, match=r"missing\.txt: is not there"):
        make_package(["missing.txt"], 10**6, home)


@pytest.mark.parametrize("target", ["../../../etc/passwd", "../other.txt", "nowhere"])
def test_a_link_out_of_its_folder_is_refused(home: Path, target: str):
    (home / "shared/data/link.txt").symlink_to(target)
    with pytest.raises(SpecError, match=r"link.txt: is a symbolic link that leads out"):
        make_package(["shared/data"], 10**6, home)


def test_a_link_within_its_folder_is_sent_as_what_it_leads_to(home: Path):
    (home / "shared/data/link.txt").symlink_to("a.txt")
    package = make_package(["shared/data"], 10**6, home)
    with staged(package) as folder:
        assert (folder / "shared/data/link.txt").read_text() == "a" * 100
        assert not (folder / "shared/data/link.txt").is_symlink()


def test_what_is_the_clusters_own_stays_there():
    names = ["texts", "../a.txt", "/mnt/corpus", "s3://bucket/x", "python:stdlib"]
    assert local_names(names) == ["texts", "../a.txt"]


def test_versions_are_compared():
    here = versions_here()
    assert set(here) == {"dray", "ray", "torch", "python"}
    assert compare(here, here) == ""
    assert compare({**here, "ray": "2.9.3"}, here) == (
        f"ray {here['ray']} on the cluster and 2.9.3 here"
    )
