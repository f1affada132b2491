"""A model that was taught by rules and labels: what it learns of them, and that whoever uses it
needs no lexicon."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

import dray
from dray.cli import main
from dray.corpus.prepare import prepare
from dray.errors import SpecError, StoreError
from dray.release.evaluate import evaluate, measure_run
from dray.release.export import export
from dray.release.predict import predict
from dray.runs import Run
from dray.train import train_locally
from tiny import tiny_tree

NOUNS = ("film", "plot", "cast", "score", "scene")
PRAISED, SCORNED = ("fine", "lovely", "grand"), ("dull", "weak", "grim")


def write_records(path: Path, num: int, seed: int, *, noise: float) -> None:
    """A word of praise or scorn among others, and a label that is wrong as often as `noise`."""
    drawn, lines = random.Random(seed), []
    for _ in range(num):
        good = drawn.random() < 0.5
        words = [drawn.choice(NOUNS) for _ in range(5)]
        words.insert(drawn.randrange(6), drawn.choice(PRAISED if good else SCORNED))
        label = good if drawn.random() >= noise else not good
        record = {"text": " ".join(words), "label": "good" if label else "bad"}
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rules")
    write_records(folder / "a.jsonl", 400, 0, noise=0.35)
    write_records(folder / "test.jsonl", 60, 1, noise=0.0)
    lines = [f"{word},good" for word in PRAISED] + [f"{word},bad" for word in SCORNED]
    (folder / "words.csv").write_text("\n".join(["word,label", *lines]), encoding="utf-8")
    return folder


def spec_of(folder: Path, **constraints: Any) -> Any:
    rules = [{"name": "words", "lexicon": {"path": f"{folder}/words.csv"}, "weight": 2.0}]
    given = {"labels": ["bad", "good"], "rules": rules, "strength": 3.0, **constraints}
    tree = tiny_tree(
        folder,
        task={"name": "sequence_classification", "constraints": given},
        data={
            "train": [{"path": f"{folder}/a.jsonl", "label": "label"}],
            "sequence_tokens": 32,
            "cleaning": {"deduplicate": "none"},
        },
        tokenizer={"train": "byte_bpe", "vocab_size": 300},
        duration={"steps": 60},
        resources={"workers": 1},
        validation={"max_rows": None},
    )
    tree["model"] = {"architecture": "bert", "hidden_size": 32, "num_layers": 1, "num_heads": 2}
    return dray.make_spec(tree)


@pytest.fixture(scope="module")
def storage(folder: Path, local_ray: None) -> str:
    """Two runs: one learns by rules, one only measures them. Then the lexicon is gone."""
    storage = str(folder / "runs")
    for name, share in (("taught", 0.7), ("untaught", 0.0)):
        spec = spec_of(folder, share=share)
        prepare(spec, storage)
        train_locally(spec, storage=storage, run_name=name)
    (folder / "words.csv").rename(folder / "elsewhere.csv")
    return storage


def test_it_keeps_to_the_rules_more_than_a_model_that_only_measures_them(storage: str) -> None:
    broken = {name: evaluate(storage, name)["rules_broken"] for name in ("taught", "untaught")}
    assert broken["taught"] < broken["untaught"] - 0.05
    last = Run.open(storage, "taught").validations()[-1]
    assert last["rules_broken"] == pytest.approx(broken["taught"], rel=1e-5)


def test_it_is_measured_on_other_data_by_the_lexicon_that_it_learnt_by(
    storage: str, folder: Path
) -> None:
    report: dict[str, dict[str, float]] = {}
    found = evaluate(storage, "taught", data=[f"{folder}/test.jsonl"], report=report)
    assert found["num_rows"] == 60
    assert report["rule words"]["num"] == 60
    assert report["rule words"]["broken"] == pytest.approx(found["rules_broken"])
    measured = measure_run(storage, "taught", data=[f"{folder}/test.jsonl"])
    assert measured.corpus.manifest.votes == {"words": 60}


def test_it_predicts_and_is_exported_without_it(storage: str, folder: Path) -> None:
    told = list(predict(storage, "taught", [f"{folder}/test.jsonl"]))
    assert {one["prediction"] for one in told} <= {"bad", "good"}
    assert len(told) == 60
    out = folder / "exported"
    export(storage, "taught", str(out))
    kept = yaml.safe_load((out / "dray-spec.yaml").read_text(encoding="utf-8"))
    (rule,) = kept["task"]["constraints"]["rules"]
    assert rule["lexicon"]["path"] == "words.csv"  # a name, and no place
    assert str(folder) not in (out / "dray-spec.yaml").read_text(encoding="utf-8")


def test_a_run_goes_on_with_the_lexicon_in_another_place_and_with_no_other(
    storage: str, folder: Path
) -> None:
    moved = [{"name": "words", "lexicon": {"path": f"{folder}/elsewhere.csv"}, "weight": 2.0}]
    spec = spec_of(folder, share=0.7, rules=moved)
    more = spec.model_copy(update={"duration": spec.duration.model_copy(update={"steps": 62})})
    assert train_locally(more, storage=storage, run_name="taught").run.metrics()[-1]["step"] == 62
    (folder / "changed.csv").write_text("word,label\nfine,bad\n", encoding="utf-8")
    changed = [{"name": "words", "lexicon": {"path": f"{folder}/changed.csv"}, "weight": 2.0}]
    with pytest.raises(StoreError, match="what lies there is not what it began with"):
        train_locally(spec_of(folder, share=0.7, rules=changed), storage=storage, run_name="taught")
    with pytest.raises(StoreError, match=r"its spec differs in task\.constraints\.share"):
        train_locally(spec_of(folder, share=0.5), storage=storage, run_name="taught")


def test_a_label_that_no_document_has_is_said_before_a_run_begins(
    folder: Path, local_ray: None
) -> None:
    rules = [{"name": "lovely", "label": "nice", "words": ["lovely"]}]
    spec = spec_of(folder, labels=["bad", "nice"], rules=rules)
    storage = str(folder / "other")
    prepare(spec, storage)
    with pytest.raises(SpecError, match="no training document has the label nice"):
        train_locally(spec, storage=storage, run_name="other")
    assert not Run.find(storage, "other")


def test_what_rules_do_is_shown(storage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "taught", "--storage", storage]) == 0
    said = capsys.readouterr().out
    assert "rules        vote for training rows: 'words'" in said
    assert "rules broken" in said
