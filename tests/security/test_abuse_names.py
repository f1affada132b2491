"""Names that would become paths: each is checked before a path is made of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dray.errors import SpecError, StoreError
from dray.runs import Run
from dray.runs.layout import check_run_name
from dray.spec import make_spec
from dray.storage.packages import in_package
from tiny import tiny_tree

Refused = Callable[..., str]

BAD_NAMES = [
    "..",
    "../x",
    "x/../../y",
    "/tmp/x",
    "./x",
    ".hidden",
    "x\n",
    "x\ny",
    "x\r\x1b[2J",
    "x y",
    "\uff41bc",  # letters that look like others
    "tin\u0443",
    "tiny\u202e",
    "x" * 101,
    "x;rm -rf y",
    "$(touch y)",
    "%2e%2e",
    "..\\x",
]
RESERVED = ["corpora", "corpora/0001"]


@pytest.mark.parametrize("name", [*BAD_NAMES, *RESERVED])
@pytest.mark.parametrize("option", ["--run", "--fork"])
def test_the_name_of_a_run_or_fork(refused: Refused, spec_file: str, option: str, name: str):
    line = refused("train", spec_file, "--storage", "runs", option, name)
    assert "not a name" in line or "is taken by dray itself" in line


@pytest.mark.parametrize("name", [*BAD_NAMES, "corpora"])
def test_the_name_of_a_sweep_or_ladder(refused: Refused, spec_file: str, name: str):
    tune = ("tune", spec_file, "--space", "learning_rate")
    for words in (tune, ("ladder", spec_file)):
        line = refused(*words, "--storage", "runs", "--run", name)
        assert "not a name" in line or "is taken by dray itself" in line


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("key", ["name", "model.run", "tokenizer.run"])
def test_a_name_in_a_spec(key: str, name: str):
    tree = tiny_tree(Path("texts"))
    section, _, last = key.rpartition(".")
    if section == "model":
        tree["model"] = {last: name}
    elif section:
        tree[section] = {last: name}
    else:
        tree[last] = name
    with pytest.raises(SpecError, match="up to 100 letters") as caught:
        make_spec(tree)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", BAD_NAMES)
def test_the_name_of_a_new_spec(refused: Refused, name: str):
    assert "not a name" in refused("init", name)


def test_arguments_that_no_file_can_be_called_by(refused: Refused, spec_file: str):
    for name in ("x\0y", "x\udcff"):
        assert "is not UTF-8" in refused("train", spec_file, "--run", name)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "/proc/self/environ"])
def test_a_file_that_is_no_spec_recipe_or_space(
    refused: Refused, spec_file: str, name: str, monkeypatch: pytest.MonkeyPatch
):
    """What lies there is not told."""
    monkeypatch.setenv("WORD_OF_THE_ENVIRONMENT", "canary")
    for words in (("plan", name), ("tune", spec_file, "--space", name)):
        line = refused(*words)
        assert "root:" not in line
        assert "canary" not in line
    assert "did you mean" in refused("init", "mine", "--recipe", "quickstrat")


@pytest.mark.parametrize(
    "name", ["sweep/\u0661\u0662\u0663\u0664", "sweep/../0001", "../0001", "a/b/0001", "sweep/1"]
)
def test_the_name_of_a_trial(refused: Refused, name: str, tmp_path: Path):
    with pytest.raises(StoreError, match="not a name"):
        check_run_name(name)
    with pytest.raises(StoreError):
        Run.open(str(tmp_path), name)
    refused("show", name, "--storage", "runs")
    refused("train", "quickstart", "--storage", "runs", "--from-trial", name)


@pytest.mark.parametrize("step", ["../../x", "/etc", "\u0663", "1e3", "best/..", "-1", "", "4\n"])
def test_the_step_of_a_checkpoint(hostile: Path, refused: Refused, step: str):
    for words in (
        ["evaluate", "tiny"],
        ["generate", "tiny", "--prompt", "x"],
        ["export", "tiny", "out"],
    ):
        refused(*words, "--storage", str(hostile), f"--step={step}")
    assert not (hostile.parent / "out").exists()


@pytest.mark.parametrize("name", ["..", "../runs", "tiny/..", "tiny/../..", "tiny\n", ""])
def test_a_run_that_is_looked_at(hostile: Path, refused: Refused, name: str):
    for command in ("show", "doctor", "verify", "report", "evaluate"):
        refused(command, name, "--storage", str(hostile))


def test_results_overwrite_nothing_that_they_did_not_make(hostile: Path, refused: Refused):
    precious = hostile.parent / "precious"
    precious.mkdir()
    (precious / "model.safetensors").write_text("mine")
    (hostile.parent / "texts.jsonl").write_text('{"text": "some words"}\n')
    refused("export", "tiny", "precious", "--storage", str(hostile))
    refused("export", "tiny", str(hostile / "tiny" / "x"), "--storage", str(hostile))
    assert (precious / "model.safetensors").read_text() == "mine"


@pytest.mark.parametrize("place", ["python:dray/../../x", "python:os", "python:../x", "python:"])
def test_a_folder_in_a_package(place: str):
    with pytest.raises(StoreError, match=r"leads out of the package|is installed"):
        in_package(place)
