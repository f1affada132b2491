"""Soups: the mean of several runs' weights, as a run of the store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dray
from dray.cli import main
from dray.corpus.prepare import prepare
from dray.errors import SpecError, StoreError
from dray.ledger import verify_ledger
from dray.release.evaluate import evaluate
from dray.release.soup import Ingredient, soup
from dray.release.trained import load_trained
from dray.runs import Run, verify_checkpoint
from dray.train.driver import train_locally
from tiny import tiny_tree


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def runs(storage: str, tiny_corpus: Path, local_ray: None) -> list[Run]:
    """Two that go on from one another one's weights, and that one, of which two steps are kept."""
    tree = tiny_tree(
        tiny_corpus,
        name="first",
        duration={"steps": 20},
        validation={"max_rows": None, "every_steps": 10},
        checkpoint={"every_steps": 10, "keep_last": 2},
    )
    spec = dray.make_spec(tree)
    prepare(spec, storage)
    found = [train_locally(spec, storage=storage, run_name="first").run]
    for name, rate in (("gentle", 1e-3), ("wild", 0.3)):
        own = tree | {
            "name": name,
            "model": {"run": "first"},
            "tokenizer": {"run": "first"},
            "optimizer": {"learning_rate": rate},
            "duration": {"steps": 6},
        }
        spec = dray.make_spec(own)
        prepare(spec, storage)
        found.append(train_locally(spec, storage=storage, run_name=name).run)
    return found


def weights_of(storage: str, name: str, step: int | None = None) -> dict[str, torch.Tensor]:
    return dict(load_trained(storage, name, step).model.named_parameters())


def test_a_uniform_soup_is_the_mean_and_a_run_like_any_other(
    storage: str, runs: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["soup", "first@10", "first@20", "gentle", "--name", "mean", "--storage", storage]
    assert main([*words, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    parts = [weights_of(storage, name, step)
             for name, step in (("first", 10), ("first", 20), ("gentle", None))]  # fmt: skip
    found = weights_of(storage, "mean")
    for name, tensor in found.items():
        mean = torch.stack([part[name].double() for part in parts]).mean(dim=0).float()
        torch.testing.assert_close(tensor, mean, atol=1e-7, rtol=1e-6)
    run = Run.open(storage, "mean")
    (info,) = run.checkpoints()
    assert verify_checkpoint(run, info).ok
    parents = run.compressed()["parents"]  # type: ignore[index]
    assert [(one["run"], one["step"]) for one in parents] == [
        ("first", 10), ("first", 20), ("gentle", 6),
    ]  # fmt: skip
    assert all(len(one["manifest_sha256"]) == 64 for one in parents)
    assert all(one["in"] for one in table["soup"])
    own = evaluate(storage, "mean")
    assert own["loss"] == pytest.approx(table["metrics"]["loss"]["after"]["value"], rel=1e-6)
    assert main(["show", "mean", "--storage", storage]) == 0
    assert "uniform soup of 3 models, by loss" in capsys.readouterr().out
    with pytest.raises(StoreError, match="a ledger is of steps"):
        verify_ledger(run)


def test_a_greedy_soup_leaves_out_what_makes_it_worse(storage: str, runs: list[Run]) -> None:
    names = ("wild", "first", "gentle")
    alone = {name: evaluate(storage, name)["loss"] for name in names}
    assert alone["wild"] > alone["first"] + 0.5
    said: list[str] = []
    parts = [Ingredient(name) for name in names]
    table = soup(storage, parts, "chosen", how="greedy", say=said.append)
    taken = {one["model"].partition("@")[0] for one in table["soup"] if one["in"]}
    assert "wild" not in taken
    assert [one["model"].partition("@")[0] for one in table["soup"]] == sorted(names, key=alone.get)  # type: ignore[arg-type]
    assert evaluate(storage, "chosen")["loss"] <= min(alone.values()) + 1e-6
    assert any(line.startswith("with wild@6: loss ") for line in said)


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        (["first"], {}, "of two models or more"),
        (["first", "first@20"], {}, "first@20: is named twice"),
        (["first", "nobody"], {}, "nobody"),
        (["first", "gentle@7"], {}, "gentle"),
        (["first", "gentle"], {"metric": "f1"}, "--metric: f1 is none of causal_lm"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(
    storage: str, runs: list[Run], parts: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises((SpecError, StoreError), match=message):
        soup(storage, [Ingredient.read(words) for words in parts], "never", **options)
    assert Run.find(storage, "never") is None
    with pytest.raises(StoreError, match="exists already"):
        soup(storage, [Ingredient("first"), Ingredient("gentle")], "first")


def test_models_that_are_not_alike_have_no_mean(
    storage: str, runs: list[Run], tiny_corpus: Path, local_ray: None
) -> None:
    tree = tiny_tree(tiny_corpus, name="wide", duration={"steps": 3}, model={"hidden_size": 32})
    wide = dray.make_spec(tree)
    prepare(wide, storage)
    train_locally(wide, storage=storage, run_name="wide")
    with pytest.raises(SpecError, match="has another architecture or size than first"):
        soup(storage, [Ingredient("first"), Ingredient("wide")], "never")
    kept = {"name": "other", "model": {"run": "first"}, "tokenizer": {"run": "first"}}
    kept |= {"data": tree["data"] | {"validation": {"share": 0.3}}}
    other = dray.make_spec(tree | kept)
    prepare(other, storage)
    train_locally(other, storage=storage, run_name="other")
    with pytest.raises(SpecError, match="holds out other rows than first"):
        soup(storage, [Ingredient("first"), Ingredient("other")], "never")
