"""A private run hides its rows by the same noise wherever it goes on, tells what that proves, and
keeps its secret to itself."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest

from dray.cli import main
from dray.corpus.manifest import load_run_manifest
from dray.corpus.prepare import prepare
from dray.errors import SpecError, StoreError
from dray.plan.privacy import epsilon_of, mu_of
from dray.privacy import most_uses, privacy_of
from dray.release.export import export
from dray.runs import Run
from dray.spec import make_spec
from dray.train import train, train_locally
from resuming import assert_same_steps, killed_and_resumed
from tiny import tiny_tree

pytestmark = pytest.mark.usefixtures("local_ray")
STEPS, ROWS = 18, 8


def tree_of(home: Path, **sections: Any) -> dict[str, Any]:
    label = {"text": "text", "label": "label"}
    tree = tiny_tree(
        home,
        task="sequence_classification",
        data={"train": [{"path": f"{home}/*.jsonl", **label}], "validation": {"share": 0.2}},
        batch={"global_rows": ROWS, "micro_rows": 4},
        duration={"steps": STEPS},
        resources={"workers": 1},
        zero={"stage": 0},
        checkpoint={"every_steps": 5},
        regularization={"dropout": 0.1},
    )
    tree["model"] = {"architecture": "bert", "hidden_size": 32, "num_layers": 2, "num_heads": 2}
    tree["privacy"] = {"max_grad_norm": 0.5, "noise_multiplier": 0.8, "noise_seed": 7}
    return tree | sections


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("private")
    drawn = random.Random(0)
    lines = [
        {"text": f"{drawn.choice(['good', 'bad'])} thing {number}", "label": number % 2}
        for number in range(60)
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def trained(tree: dict[str, Any], storage: str, name: str) -> Run:
    spec = make_spec(tree)
    prepare(spec, storage)
    return train_locally(spec, storage=storage, run_name=name).run


@pytest.fixture(scope="module")
def straight(home: Path) -> Run:
    return trained(tree_of(home), str(home / "runs"), "straight")


def test_killed_twice_it_goes_on_with_the_same_noise_on_other_workers(
    home: Path, straight: Run
) -> None:
    def elsewhere(**others: Any) -> Any:
        return make_spec(tree_of(home) | others)

    places = ((2, 0), (1, 0), (2, 0))
    killed = killed_and_resumed(elsewhere, str(home / "runs"), "killed", places=places)
    assert_same_steps(killed, straight)


def test_what_it_proves_follows_from_how_often_its_order_used_a_row(
    home: Path, straight: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    told = privacy_of(straight)
    assert told is not None
    manifest = load_run_manifest(straight)
    uses = -(-STEPS * ROWS // manifest.train.num_rows)  # a row once an epoch
    assert told["uses"] == most_uses(straight.spec(), manifest, STEPS) == uses
    assert told["epsilon"] == pytest.approx(epsilon_of(1e-5, mu_of(uses, 0.8)))
    assert told["public"] is True
    assert main(["show", "straight", "--storage", straight.storage]) == 0
    assert "privacy      none: its noise follows from privacy.noise_seed" in capsys.readouterr().out
    assert main(["show", "straight", "--storage", straight.storage, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["privacy"] == told


def test_a_secret_is_a_runs_own_and_leaves_it_nowhere(
    home: Path, straight: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    privacy = {"epsilon": 4.0, "delta": 1e-3}
    runs = [
        trained(tree_of(home, privacy=privacy), straight.storage, name) for name in ("one", "two")
    ]
    keys = [run.noise()["key"] for run in runs]
    assert keys[0] != keys[1]
    told = privacy_of(runs[0])
    assert told is not None
    assert told["epsilon"] == pytest.approx(4.0, rel=1e-6)
    losses = [[row["loss"] for row in run.metrics()] for run in runs]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)  # before the first noise
    assert losses[0][-1] != pytest.approx(losses[1][-1], rel=1e-5)
    place = f"{runs[0].path}/noise.json"
    assert os.stat(place).st_mode & 0o777 == 0o600
    export(straight.storage, "one", str(tmp_path / "out"))
    assert "Differential privacy: ε = 4 at δ = 0.001" in (tmp_path / "out/README.md").read_text()
    assert main(["show", "one", "--storage", straight.storage]) == 0
    shown = capsys.readouterr().out
    assert "privacy      ε = 4 at δ = 0.001" in shown
    holders = [
        path
        for path in (*tmp_path.rglob("*"), *Path(runs[0].path).rglob("*"))
        if path.is_file() and keys[0].encode() in path.read_bytes()
    ]
    assert holders == [Path(place)]
    assert keys[0] not in shown


def test_a_fork_counts_what_its_origin_has_spent(home: Path) -> None:
    """By the squares of what each span of steps says of a row, with noise of its own."""
    storage, half = str(home / "forks"), {"duration": {"steps": 9}}
    loud = {"privacy": {"epsilon": 3.0, "delta": 1e-3}}
    origin = trained(tree_of(home, **loud, **half), storage, "origin")
    num_rows = load_run_manifest(origin).train.num_rows
    uses = -(-9 * ROWS // num_rows)
    wider = {"privacy": {"epsilon": 5.0, "delta": 1e-3}}
    fork = train(
        make_spec(tree_of(home, **wider)), storage=storage, run_name="origin", fork="fork"
    ).run
    kept, told = fork.noise(), privacy_of(fork)
    assert told is not None
    (before,) = kept["spent"]
    assert before == {
        "last_step": 9, "uses": uses, "noise_multiplier": origin.noise()["noise_multiplier"]
    }  # fmt: skip
    assert kept["key"] != origin.noise()["key"]
    later = told["uses"] - uses
    assert later == -(-STEPS * ROWS // num_rows) - (
        uses - 1
    )  # the epoch that it began in counts again
    squared = uses / before["noise_multiplier"] ** 2 + later / kept["noise_multiplier"] ** 2
    assert told["epsilon"] == pytest.approx(epsilon_of(1e-3, math.sqrt(squared)))
    assert told["epsilon"] == pytest.approx(5.0, rel=1e-6)

    def forked(name: str, **sections: Any) -> None:
        spec = make_spec(tree_of(home, **sections))
        train(spec, storage=storage, run_name="origin", fork=name)

    with pytest.raises(SpecError, match="ε is 3 after the 9 steps that the fork goes on from"):
        forked("less", privacy={"epsilon": 2.0, "delta": 1e-3})
    tree = tree_of(home, **half)
    del tree["privacy"]
    trained(tree, storage, "plain")
    with pytest.raises(SpecError, match="the 9 steps of plain that the fork goes on from had no"):
        train(make_spec(tree_of(home)), storage=storage, run_name="plain", fork="late")
    trained(tree_of(home, **half), storage, "public")
    with pytest.raises(SpecError, match="goes on from had noise that is no secret"):
        train(make_spec(tree_of(home, **wider)), storage=storage, run_name="public", fork="hid")
    assert sorted(os.listdir(storage)) == ["corpora", "fork", "origin", "plain", "public"]
    place = Path(fork.path, "noise.json")  # as forks had it that did not count their origin
    place.write_text(json.dumps({key: kept[key] for key in ("key", "noise_multiplier")}))
    assert privacy_of(fork) == told


def test_a_run_keeps_to_its_epsilon_and_its_noise(home: Path) -> None:
    storage, sections = str(home / "kept"), {"privacy": {"epsilon": 3.0, "delta": 1e-3}}
    run = trained(tree_of(home, **sections, duration={"steps": 6}), storage, "run")
    longer = make_spec(tree_of(home, **sections, duration={"steps": 60}))
    with pytest.raises(SpecError, match=r"ε would be .* after 60 steps"):
        train_locally(longer, storage=storage, run_name="run")
    with pytest.raises(SpecError, match="of 49 rows one may be given away whole by chance"):
        trained(tree_of(home, privacy={"epsilon": 3.0, "delta": 0.03}), storage, "careless")
    os.rename(f"{run.path}/noise.json", home / "noise.json")
    for work in (
        lambda: train_locally(run.spec(), storage=storage, run_name="run"),
        lambda: privacy_of(run),
        lambda: export(storage, "run", str(home / "out")),
    ):
        with pytest.raises(StoreError, match="has lost its noise"):
            work()
    assert not (home / "out").exists()
    assert not Path(f"{run.path}/noise.json").exists()
    os.rename(home / "noise.json", f"{run.path}/noise.json")
    assert train_locally(run.spec(), storage=storage, run_name="run").status == "completed"


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"privacy": {}}, "give one of noise_multiplier and epsilon"),
        ({"privacy": {"noise_multiplier": 1.0, "epsilon": 1.0}}, "give one of"),
        ({"zero": {"stage": 1}}, "whole at stage 0 alone"),
        ({"zero": {}}, "zero.stage = auto"),
        ({"precision": "fp16"}, "precision = fp16"),
        ({"regularization": {"dropout": 0.1, "r_drop": 1.0}}, "r_drop, adversarial and distil"),
        ({"numerics": {"spike": "rewind"}}, "spike = rewind"),
        ({"task": "causal_lm", "model": {"architecture": "llama", "hidden_size": 32,
          "num_layers": 1, "num_heads": 2}}, "is no document by itself"),
    ],
)  # fmt: skip
def test_what_cannot_be_private_is_refused(home: Path, sections: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        make_spec(tree_of(home) | sections)
