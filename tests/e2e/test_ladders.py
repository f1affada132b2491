"""A ladder on a real Ray: its rungs are runs, it goes on, and it foretells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dray.cli import main
from dray.runs import Run
from dray.sweep.record import Sweep
from dray.sweep.summary import summarize
from tiny import tiny_tree

pytestmark = pytest.mark.usefixtures("local_ray")


def make_tree(corpus: Path) -> dict[str, Any]:
    return tiny_tree(
        corpus,
        name="whole",
        data={"sequence_tokens": 32},
        model={"num_layers": 3, "tie_embeddings": False},
        duration={"steps": None, "tokens": 60_000},
        schedule={"name": "cosine", "warmup_steps": 10},
        resources={"workers": 1},
        zero={"stage": 0},
    )


@pytest.fixture(scope="module")
def climbed(
    local_ray: None, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], Path]:
    """The words of a ladder's command, and its storage."""
    folder = tmp_path_factory.mktemp("ladder")
    spec = folder / "whole.yaml"
    spec.write_text(yaml.safe_dump(make_tree(tiny_corpus)))
    words = [str(spec), "--budget", "40%", "--storage", str(folder / "runs")]
    assert main(["ladder", *words]) == 0
    return words, folder / "runs"


def test_each_rung_is_a_run_and_together_they_foretell(
    climbed: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, storage = climbed
    capsys.readouterr()
    assert main(["show", "whole-ladder", "--storage", str(storage), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    forecast = shown["forecast"]
    assert len(shown["trials"]) == len(forecast["rungs"]) >= 9
    assert 0.2 < forecast["share"] <= 0.4
    for trial, rung in zip(shown["trials"], forecast["rungs"], strict=True):
        run = Run.open(str(storage), trial["name"])
        assert run.summary()["status"] == "completed"
        assert trial["tokens"] == rung["num_tokens"]
        assert run.validations()[-1]["loss"] == pytest.approx(rung["loss"])
    loss = forecast["loss"]
    assert loss["low"] <= loss["high"]
    assert loss["value"] < min(rung["loss"] for rung in forecast["rungs"][:3])
    best = forecast["best"]
    assert best["flops"] == pytest.approx(forecast["target"]["flops"], rel=0.01)
    assert best["loss"]["value"] <= loss["value"]


@pytest.mark.slow
def test_it_goes_on_and_says_what_it_tells(
    climbed: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is trained again; another budget of the real run is answered from the same rungs."""
    words, storage = climbed
    before = len(Sweep.open(str(storage), "whole-ladder").events())
    capsys.readouterr()
    assert main(["ladder", *words, "--for", "share=20", "--json"]) == 0
    forecast = json.loads(capsys.readouterr().out)["forecast"]
    assert forecast["budget_flops"] == pytest.approx(20 * forecast["target"]["flops"])
    assert forecast["best"]["flops"] == pytest.approx(forecast["budget_flops"], rel=0.01)
    assert main(["show", "whole-ladder", "--storage", str(storage)]) == 0
    assert "forecast  loss" in capsys.readouterr().out
    assert len(Sweep.open(str(storage), "whole-ladder").events()) == before
    assert summarize(Sweep.open(str(storage), "whole-ladder"))["status"] == "completed"


@pytest.mark.slow
def test_its_page(climbed: tuple[list[str], Path], tmp_path: Path) -> None:
    _, storage = climbed
    page = tmp_path / "page.html"
    words = ["report", "whole-ladder", "--storage", str(storage), "--out", str(page)]
    assert main(words) == 0
    text = page.read_text()
    assert "The forecast" in text
    assert "<svg" in text


def test_a_ladder_is_no_run(
    climbed: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, storage = climbed
    assert not (storage / "whole-ladder" / "best.yaml").exists(), "of rungs none has won"
    capsys.readouterr()
    assert main(["doctor", "whole-ladder", "--storage", str(storage)]) == 2
    assert "is a sweep, whose trials are runs" in capsys.readouterr().err
    assert main(["doctor", "whole-ladder/0001", "--storage", str(storage)]) == 0


def test_what_pays_for_no_ladder_is_refused_before_anything_is_written(
    tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "s.yaml"
    spec.write_text(yaml.safe_dump(make_tree(tiny_corpus)))
    words = [str(spec), "--storage", str(tmp_path / "runs")]
    assert main(["ladder", *words, "--budget", "flops=5"]) == 2
    assert "pay for no ladder" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", "1e9"], "is no amount"),
        (["--budget", "flops=5"], "was begun with"),
        (["--for", "money=5"], "--price-per-hour"),
        (["--price-per-hour", "-1"], "is no price"),
        (["--budget", "30%"], "was begun with --budget share=0.4"),
        (["--for", ""], "is no amount"),
        (["--run", "a/b"], "not a name for a run"),
        (["--run", "whole-ladder/0001"], "a run has that name"),
        (["task=regression"], "label"),
    ],
)
def test_what_is_refused(
    climbed: tuple[list[str], Path],
    words: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given, _ = climbed
    capsys.readouterr()
    assert main(["ladder", *given, *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1]
