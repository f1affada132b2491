"""Preferences: every loss learns, what a reference tells stands in the rows once, and a run that is
killed goes on exactly. Real engine, real corpora, real checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dray.corpus.prepare import Corpus, prepare
from dray.corpus.shards import read_groups
from dray.errors import SpecError
from dray.release.evaluate import evaluate
from dray.release.generate import generate
from dray.release.trained import load_trained
from dray.runs import Run
from dray.spec import Spec
from dray.storage.filesystem import open_filesystem
from dray.tasks.parts.answer_objectives import answer_log_probs
from dray.train import train_locally
from pairs import make_spec_of, pairs, write

pytestmark = pytest.mark.usefixtures("local_ray")


def judged(num: int = 160) -> list[dict[str, Any]]:
    return [
        {
            "prompt": pair["prompt"],
            "completion": pair["chosen" if place % 2 else "rejected"],
            "label": bool(place % 2),
        }
        for place, pair in enumerate(pairs(num))
    ]


def make(folder: Path, loss: str, steps: int = 20, **sections: Any) -> Spec:
    task = {"name": "preference", "loss": loss}
    validation = {"every_steps": 20, "metric": "margin", "max_rows": None}
    own = {"name": loss, "task": task, "validation": validation, **sections}
    return make_spec_of(folder, own.pop("task"), steps, **own)


def rows_of(corpus: Corpus, split: str = "train") -> Any:
    filesystem, folder = open_filesystem(corpus.folder)
    (source,) = getattr(corpus.manifest, split).sources
    groups = range(-(-source.num_rows // corpus.manifest.group_rows))
    return read_groups(filesystem, folder, source, list(groups), corpus.manifest.group_rows)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto", "orpo", "simpo"])
def test_every_loss_prefers_what_was_preferred(tmp_path: Path, loss: str) -> None:
    folder, storage = tmp_path / "in", str(tmp_path / "runs")
    write(folder, judged() if loss == "kto" else pairs())
    prepare(make(folder, loss), storage)
    train_locally(make(folder, loss), storage=storage)
    before, after = 0.0, Run.open(storage, loss).validations()[-1]
    assert after["accuracy"] > 0.95, after
    assert after["margin"] > before + 0.01, after
    assert ("kl" in after) == (loss in ("dpo", "ipo", "kto"))
    found = evaluate(storage, loss)
    for key, value in found.items():
        if key in after and isinstance(value, float):
            assert value == pytest.approx(after[key], rel=1e-5, abs=1e-6), key
    (text,) = generate(storage, loss, ["please open the door 3 ."], max_tokens=4, temperature=0)
    assert isinstance(text, str)


def test_the_reference_tells_its_log_probabilities_once_and_belongs_to_the_rows(
    tmp_path: Path,
) -> None:
    """The reference is the run that the preference run begins with, not what that has become."""
    folder, storage = write(tmp_path / "in", pairs(40)), str(tmp_path / "runs")
    texts = [{"text": pair["prompt"] + pair["chosen"]} for pair in pairs(40)]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text("\n".join(map(json.dumps, texts)))
    base = make(
        folder,
        "dpo",
        10,
        name="base",
        task="causal_lm",
        data={"train": [f"{tmp_path}/texts/*.jsonl"], "validation": None, "sequence_tokens": 40},
        validation={"metric": "loss"},
    )
    prepare(base, storage)
    train_locally(base, storage=storage)
    begun = {
        "model": {"run": "base"},
        "tokenizer": {"run": "base"},
        "optimizer": {"learning_rate": 0.01},
    }
    spec = make(folder, "dpo", 10, **begun)
    corpus = prepare(spec, storage)
    table = rows_of(corpus)
    task = spec.task.on(corpus.manifest)
    batch = task.collate(table)
    reference = load_trained(storage, "base").model
    with torch.no_grad():
        log_probs, _ = answer_log_probs(reference, batch)
    torch.testing.assert_close(batch["reference"], log_probs, rtol=1e-5, atol=1e-4)
    assert batch["reference"].abs().min() > 0.1
    run = train_locally(spec, storage=storage).run
    assert run.validations()[-1]["kl"] != 0.0
    assert prepare(make(folder, "ipo", 10, **begun), storage).folder == corpus.folder
    # Other weights tell other numbers: another corpus. A loss without a reference has its own, too.
    other = make(folder, "dpo", 10, **{**begun, "model": {"run": "base", "step": 10}})
    assert prepare(other, storage).folder == corpus.folder
    drawn = make(folder, "dpo", 10, tokenizer={"run": "base"})
    assert prepare(drawn, storage).manifest.key != corpus.manifest.key
    assert prepare(make(folder, "orpo", 10, **begun), storage).folder != corpus.folder
    # Other pairs are measured by the reference that the run has pinned, not by its own weights.
    write(tmp_path / "more", pairs(60)[40:])
    found = evaluate(storage, "dpo", data=[f"{tmp_path}/more/a.jsonl"])
    assert found["num_rows"] == 20
    assert found["kl"] == pytest.approx(run.validations()[-1]["kl"], rel=0.5)


def test_what_has_no_place_in_a_loss_is_refused(tmp_path: Path) -> None:
    for settings, message in {
        '{"loss": "ipo", "margin": 1.0}': "margin = 1: it is simpo's",
        '{"loss": "dpo", "bad_weight": 2.0}': "it is kto's",
        '{"loss": "best"}': "'dpo', 'ipo', 'kto', 'orpo' or 'simpo'",
    }.items():
        with pytest.raises(SpecError, match=message):
            make(tmp_path, "dpo", task={"name": "preference", **json.loads(settings)})


def test_records_without_an_answer_or_a_judgement_cost_themselves(tmp_path: Path) -> None:
    records = judged(30)
    records[3]["completion"], records[4]["label"] = "", "perhaps"
    corpus = prepare(make(write(tmp_path / "in", records), "kto"), str(tmp_path / "runs"))
    assert corpus.manifest.dropped == {
        "empty answer": 1,
        "label is neither true nor false": 1,
    }
