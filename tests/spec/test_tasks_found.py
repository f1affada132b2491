"""Tasks of other packages: what is broken in one matters to whoever names it, to nobody else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dray.errors import SpecError
from dray.spec import Direction, Field, make_spec
from dray.tasks import Task
from dray.tasks.rows import Column
from tiny import tiny_tree

GOOD = """
from dray.spec import Field, Head
from dray.tasks import Task


class Good(Task):
    name = "good"
    is_default = True
    fields = {"text": Field("text")}
    metrics = {"loss": "lower"}
    head = Head("AutoModelForCausalLM", "vocabulary", "token")
"""


def install(site: Path, package: str, code: str, points: Mapping[str, str]) -> None:
    """As pip would."""
    (site / f"{package}.py").parent.mkdir(exist_ok=True)
    (site / f"{package}.py").write_text(code)
    metadata = site / f"{package}-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\n")
    lines = "".join(f"{name} = {package}:{what}\n" for name, what in points.items())
    (metadata / "entry_points.txt").write_text(f"[dray.tasks]\n{lines}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    install(folder / "site", "team_broken", "import nothing_of_that_name", {"a_broken": "Broken"})
    install(folder / "site", "team_good", GOOD, {"good": "Good", "other": "Good", "none": "Field"})
    install(folder / "site", "team_one", GOOD, {"twice": "Good"})
    install(folder / "site", "team_two", GOOD, {"twice": "Good"})
    (folder / "spec.yaml").write_text(json.dumps(tiny_tree(folder)))
    return folder


def dray(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    paths = [str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-m", "dray.cli", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (None, ""),
        ("good", ""),
        ("goood", "there is no task 'goood', but a_broken, causal_lm"),
        (
            "a_broken",
            "task a_broken: team_broken:Broken of the package team_broken cannot be loaded "
            "(ModuleNotFoundError: No module named 'nothing_of_that_name')",
        ),
        ("other", "task other: team_good:Good of the package team_good is a task that is called"),
        ("none", "task none: team_good:Field of the package team_good is no task; an entry point"),
        ("twice", "task twice: is in several packages: team_one and team_two; names are unique"),
    ],
)
def test_a_package_matters_to_who_names_its_task(folder: Path, task: str | None, said: str) -> None:
    shape = "1xCPU(cpus=8,memory=16GB)"
    named = [] if task is None else [f"task={task}"]
    done = dray(folder, "plan", "spec.yaml", "--shape", shape, *named)
    assert done.returncode == (2 if said else 0), done.stderr
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == (1 if said else 0)


def test_what_else_is_installed_changes_no_fingerprint(folder: Path) -> None:
    """A package whose class calls itself the default, under a name that comes first."""
    code = "from dray.spec import load_spec; print(load_spec('spec.yaml').fingerprint())"
    paths = [str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == make_spec(tiny_tree(folder)).fingerprint()


class Sums(Task):
    """Says nothing; its fields are what is asked about."""

    name = "sums"
    metrics: Mapping[str, Direction] = {"loss": "lower"}
    columns = (Column("label"),)
    num_outputs = 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"text": Field("text"), "label": Field("label"), "score": Field("number")},
            "task: sums reads label and score of a record, which has one target besides its texts",
        ),
        ({"label": Field("label")}, "task: sums reads no text of a record"),
    ],
)
def test_a_task_has_texts_and_at_most_one_target(fields: dict[str, Any], said: str) -> None:
    kind = type("Sums", (Sums,), {"fields": fields})
    source = {"path": "x", "label": "label", "columns": {"score": "score"}}
    with pytest.raises(SpecError, match=said):
        make_spec({**tiny_tree(Path("x")), "task": kind(), "data": {"train": source}})
