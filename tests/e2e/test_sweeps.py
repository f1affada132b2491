"""Sweeps on a real Ray: trials side by side, stopped, taken up again, and looked at."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.util.placement_group import placement_group_table

from dray.cli import main
from dray.errors import PlanError, StoreError
from dray.ledger import verify_ledger
from dray.runs import Run, verify_checkpoint
from dray.spec import load_spec, make_spec
from dray.sweep.driver import tune
from dray.sweep.events import Begun, Reported
from dray.sweep.page import make_sweep_page
from dray.sweep.record import Sweep
from dray.sweep.space import SPACES, load_space, make_space
from dray.sweep.summary import summarize
from tiny import tiny_tree

pytestmark = pytest.mark.usefixtures("local_ray")
ALONE = {"resources": {"workers": 1}, "zero": {"stage": 0}}
"""Three trials of a worker and a reader fit into the tests' Ray."""
RAYS_OWN = frozenset(
    {
        "DashboardAgent",
        "RuntimeEnvAgent",
        "IDLE",
        "PlacementGroupCleaner",
        "_StatsActor",
        "_AutoscalingCoordinatorActor",
        "TrainStateActor",
    }
)
FREE_SECONDS = 10.0
"""Within which all that a sweep had must be free again."""


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("runs"))


def make_tree(corpus: Path, **sections: Any) -> dict[str, Any]:
    return tiny_tree(corpus, **{"duration": {"steps": 9}, **ALONE, **sections})


RATES = {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-1]}}


@pytest.fixture(scope="module")
def before(local_ray: None) -> tuple[int, int, int]:
    """What other tests have left in the Ray that they share."""
    return left_over()


@pytest.fixture(scope="module")
def swept(storage: str, tiny_corpus: Path, before: tuple[int, int, int]) -> Sweep:
    """Twelve trials, most of them stopped at the first or second rung."""
    space = make_space(
        {
            "parameters": {**RATES, "batch.global_rows": {"choice": [4, 8]}},
            "scheduler": {"name": "asha", "grace_steps": 1, "reduction_factor": 3},
            "budget": {"trials": 12},
        }
    )
    return tune(make_tree(tiny_corpus), space, storage=storage, name="swept")


def left_over() -> tuple[int, int, int]:
    """Placement groups, actors and processes that somebody has and nobody ended, but for those that
    Ray itself and Ray Data keep for as long as a job lives."""
    groups = [item for item in placement_group_table().values() if item["state"] != "REMOVED"]
    actors = [
        actor
        for actor in ray._private.state.actors().values()
        if actor["State"] != "DEAD" and actor["ActorClassName"] not in RAYS_OWN
    ]
    workers = [
        process
        for process in psutil.Process().children(recursive=True)
        if process.name().startswith("ray::")
        and process.name().removeprefix("ray::") not in RAYS_OWN
    ]
    return len(groups), len(actors), len(workers)


def assert_nothing_more(before: tuple[int, int, int]) -> None:
    deadline = time.monotonic() + FREE_SECONDS
    while _is_more(before) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _is_more(before), (left_over(), before)


def _is_more(before: tuple[int, int, int]) -> bool:
    return any(now > then for now, then in zip(left_over(), before, strict=True))


def test_what_is_stopped_leaves_nothing_behind(swept: Sweep, before: tuple[int, int, int]) -> None:
    summary = summarize(swept)
    statuses = [trial["status"] for trial in summary["trials"]]
    assert summary["status"] == "completed"
    assert len(statuses) == 12
    assert statuses.count("pruned") >= 3
    assert set(statuses) == {"pruned", "completed"}
    assert_nothing_more(before)


@pytest.mark.slow
def test_twenty_stopped_trials_leave_nothing_behind(
    storage: str, tiny_corpus: Path, before: tuple[int, int, int]
) -> None:
    """The first one is good; those after it stop at the first rung."""
    rates = [3e-2, *(1e-6 * (30 - number) for number in range(20))]
    space = make_space(
        {
            "parameters": {"optimizer.learning_rate": {"grid": rates}},
            "search": "grid",
            "scheduler": {"name": "asha", "grace_steps": 2},
        }
    )
    sweep = tune(make_tree(tiny_corpus), space, storage=storage, name="twenty")
    statuses = [trial["status"] for trial in summarize(sweep)["trials"]]
    assert statuses.count("pruned") >= 18  # two more begin beside the first
    assert_nothing_more(before)


def test_each_trial_is_a_run_with_all_that_a_run_has(swept: Sweep) -> None:
    assert len({run.corpus for run in trials_of(swept)}) == 1
    for trial, run in zip(summarize(swept)["trials"], trials_of(swept), strict=True):
        # One that falls behind may come to its end before it hears of it.
        assert run.status in (
            {"completed", "stopped"} if trial["status"] == "pruned" else {"completed"}
        )
        newest = run.latest_checkpoint()
        assert newest is not None
        assert newest.step >= trial["best_step"]
        assert verify_checkpoint(run, newest).ok
        assert verify_ledger(run).ok
        values = run.spec().model_dump()
        assert (
            values["optimizer"]["learning_rate"] == trial["parameters"]["optimizer.learning_rate"]
        )
        assert values["batch"]["global_rows"] == trial["parameters"]["batch.global_rows"]


def trials_of(sweep: Sweep) -> list[Run]:
    names = [trial["name"] for trial in summarize(sweep)["trials"]]
    return [Run.open(sweep.storage, name) for name in names]


def test_the_best_is_the_best_and_has_a_spec(swept: Sweep, tiny_corpus: Path) -> None:
    summary = summarize(swept)
    complete = [trial for trial in summary["trials"] if trial["status"] == "completed"]
    best = min(complete, key=lambda trial: trial["metrics"]["loss"])
    assert summary["best"]["name"] == best["name"]
    spec = load_spec(f"{swept.path}/best.yaml")
    assert spec.optimizer.learning_rate == best["parameters"]["optimizer.learning_rate"]
    text = Path(swept.path, "best.yaml").read_text()
    assert best["name"] in text.splitlines()[0]


def test_again_it_does_nothing_anew(swept: Sweep, tiny_corpus: Path) -> None:
    events = swept.events()
    space = make_space({**swept.record()["space"]})
    tune(make_tree(tiny_corpus), space, storage=swept.storage, name="swept")
    assert swept.events() == events


def test_a_larger_budget_goes_on_where_it_was(swept: Sweep, tiny_corpus: Path) -> None:
    before = [event for _, event in swept.events()]
    tree = {**swept.record()["space"], "budget": {"trials": 13}}
    tune(make_tree(tiny_corpus), make_space(tree), storage=swept.storage, name="swept")
    after = [event for _, event in swept.events()]
    assert after[: len(before)] == before
    assert [event.trial for event in after if isinstance(event, Begun)].count(13) == 1


def test_another_spec_or_space_is_another_sweep(swept: Sweep, tiny_corpus: Path) -> None:
    space = make_space(swept.record()["space"])
    with pytest.raises(StoreError, match="the spec differs"):
        tune(make_tree(tiny_corpus, seed=3), space, storage=swept.storage, name="swept")
    other = make_space({**swept.record()["space"], "search": "random"})
    with pytest.raises(StoreError, match="the space's search differs"):
        tune(make_tree(tiny_corpus), other, storage=swept.storage, name="swept")


def test_the_command_line_shows_it(swept: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "swept", "--json", "--storage", swept.storage]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {"name", "status", "metric", "mode", "trials", "best"} <= shown.keys()
    assert {"name", "status", "step", "parameters", "metrics", "cause"} <= shown["trials"][0].keys()
    assert main(["show", "swept", "--storage", swept.storage]) == 0
    assert "swept/" in capsys.readouterr().out
    assert main(["runs", "--storage", swept.storage]) == 0
    assert "swept" in capsys.readouterr().out
    for name in ("swept/best", f"{swept.storage}/swept/0002", "swept/0002"):
        assert main(["show", name, "--json", "--storage", swept.storage]) == 0
        assert json.loads(capsys.readouterr().out)["name"].startswith("swept/")


def test_a_run_is_trained_with_the_values_of_a_trial(
    swept: Sweep, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(json.dumps(make_tree(tiny_corpus)))
    words = ["train", str(spec), "--storage", swept.storage, "--run", "chosen", "--json"]
    assert main([*words, "--from-trial", "swept/0003"]) == 0
    capsys.readouterr()
    run, trial = Run.open(swept.storage, "chosen"), summarize(swept)["trials"][2]
    found = run.spec().optimizer.learning_rate
    assert found == trial["parameters"]["optimizer.learning_rate"]
    assert main([*words, "--from-trial", "swept/0099"]) == 2
    assert "has no trial '0099'" in capsys.readouterr().err


def test_trials_of_two_workers_and_of_other_numbers_of_them(
    storage: str, tiny_corpus: Path
) -> None:
    space = make_space(
        {
            "parameters": {**RATES, "resources.workers": {"grid": [1, 2]}},
            "scheduler": "none",
            "budget": {"trials": 2},
        }
    )
    sweep = tune(make_tree(tiny_corpus), space, storage=storage, name="workers")
    runs = trials_of(sweep)
    assert sorted(run.attempts()[0].num_ranks for run in runs) == [1, 2]


def test_what_can_never_start_is_refused_before_anything_is_written(
    storage: str, tiny_corpus: Path
) -> None:
    tree = make_tree(tiny_corpus, resources={"workers": 64}, batch={"global_rows": 128})
    with pytest.raises(PlanError, match="64 workers × 1 CPUs = 64 CPUs"):
        tune(tree, make_space({"parameters": RATES, "budget": {"trials": 2}}), storage=storage)
    assert Sweep.find(storage, "tiny-sweep") is None


@pytest.mark.slow
def test_a_population_takes_over_checkpoints_and_batches(storage: str, tiny_corpus: Path) -> None:
    space = make_space(
        {
            "parameters": {**RATES, "batch.global_rows": {"choice": [4, 8]}},
            "search": "random",
            "scheduler": {"name": "pbt", "population": 3, "every_steps": 3, "quantile": 0.34},
        }
    )
    sweep = tune(make_tree(tiny_corpus), space, storage=storage, name="bred")
    trials = summarize(sweep)["trials"]
    children = [trial for trial in trials if "parent" in trial]
    assert len(children) == 2
    for child in children:
        run, origin = Run.open(storage, child["name"]), Run.open(storage, child["name"]).origin()
        assert origin is not None
        assert (origin["run"], origin["step"]) == (child["parent"], child["parent_step"])
        report = verify_ledger(run)
        assert report.ok
        assert report.start_step == child["parent_step"]
        first = run.metrics()[0]
        before = next(
            row
            for row in Run.open(storage, child["parent"]).metrics()
            if row["step"] == child["parent_step"]
        )
        assert first["step"] == before["step"] + 1
    assert [trial["status"] for trial in trials].count("completed") == 3
    assert all(trial["step"] == 9 for trial in trials if trial["status"] == "completed")


TASKS: dict[str, dict[str, Any]] = {
    "masked_lm": {
        "task": "masked_lm",
        "model": {"architecture": "bert", "hidden_size": 64, "num_layers": 1, "num_heads": 4},
    },
    "tagging": {
        "task": "token_classification",
        "model": {"architecture": "bert", "hidden_size": 64, "num_layers": 1, "num_heads": 4},
    },
}


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words, of which capital ones are tagged."""
    path = tmp_path_factory.mktemp("tagged") / "part.conll"
    words = ("The", "river", "Thames", "runs", "through", "London", "and", "Oxford", "in")
    lines = []
    for number in range(160):
        chosen = [words[(number * 7 + k * 3) % len(words)] for k in range(6)]
        lines += [f"{word}\t{'B-place' if word[0] in 'TLO' else 'O'}" for word in chosen] + [""]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("name", SPACES.names())
def test_each_packaged_space_runs_two_trials(
    name: str, storage: str, tiny_corpus: Path, tagged: Path
) -> None:
    tree = make_tree(tiny_corpus, **TASKS.get(name, {}))
    tree["batch"] = {"global_rows": 16}
    tree["duration"] = {"steps": 4}
    if name == "tagging":
        tree["data"] = {**tree["data"], "train": [{"path": str(tagged), "format": "conll"}]}
    keys = ["budget.trials=2"]
    if load_space(name).scheduler.name == "pbt":
        keys = ["scheduler.population=2", "scheduler.every_steps=2", "scheduler.quantile=0.5"]
    sweep = tune(tree, load_space(name, keys), storage=storage, name=f"with-{name}")
    summary = summarize(sweep)
    assert summary["status"] == "completed"
    assert len(summary["trials"]) == (3 if "pbt" in name else 2)
    assert summary["best"] is not None
    assert {event.trial for _, event in sweep.events() if isinstance(event, Reported)} >= {1, 2}
    make_spec(tree)


def test_trackers_know_a_sweep_and_its_trials(storage: str, tiny_corpus: Path) -> None:
    """MLflow's own SQLite store in the sweep's folder: one parent, a child for each trial."""
    from mlflow.tracking import MlflowClient

    space = make_space({"parameters": RATES, "scheduler": "none", "budget": {"trials": 2}})
    tree = make_tree(tiny_corpus, tracking={"mlflow": True}, duration={"steps": 3})
    sweep = tune(tree, space, storage=storage, name="tracked")
    client = MlflowClient(f"sqlite:///{sweep.path}/trackers/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("dray")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == ["tracked", "tracked/0001", "tracked/0002"]
    parent = runs["tracked"].info.run_id
    for number in (1, 2):
        assert runs[f"tracked/000{number}"].data.tags["mlflow.parentRunId"] == parent
    best = summarize(sweep)["best"]
    assert runs["tracked"].data.metrics["best_loss"] == best["value"]
    assert runs["tracked"].info.status == "FINISHED"


def test_a_space_around_the_law(storage: str, tiny_corpus: Path) -> None:
    """Its numbers are factors of what the Step Law says of the spec."""
    parameters = {
        "optimizer.learning_rate": {"loguniform": [0.25, 4], "around": "law"},
        "batch.global_rows": {"choice": [1, 2], "around": "law"},
    }
    space = make_space({"parameters": parameters, "scheduler": "none", "budget": {"trials": 2}})
    tree = make_tree(tiny_corpus, optimizer={"learning_rate": "auto"}, duration={"steps": 6})
    tree["batch"] = {"global_rows": "auto"}
    sweep = tune(tree, space, storage=storage, name="lawful")
    law = sweep.record()["law"]
    for trial in summarize(sweep)["trials"]:
        factor = trial["parameters"]["optimizer.learning_rate"] / law["learning_rate"]
        assert 0.25 <= factor <= 4
        assert trial["parameters"]["batch.global_rows"] in (
            law["global_rows"],
            2 * law["global_rows"],
        )
    assert "the best:" in make_sweep_page(sweep).render()
    assert not load_spec(f"{sweep.path}/best.yaml").is_auto


def test_trials_that_share_a_cpu(tiny_corpus: Path, storage: str, capfd: Any) -> None:
    """Each holds half of what the spec says, and is what it would be alone."""
    space = make_space(
        {
            "parameters": {"optimizer.learning_rate": {"grid": [1e-3, 3e-3]}},
            "search": "grid",
            "scheduler": "none",
            "packing": 2,
        }
    )
    sweep = tune(make_tree(tiny_corpus), space, storage=storage, name="packed")
    assert "each takes 0.5 CPUs" in capfd.readouterr().err
    trials = summarize(sweep)["trials"]
    assert [trial["status"] for trial in trials] == ["completed"] * 2
    for trial in trials:
        spec = Run.open(storage, trial["name"]).spec()
        assert spec.resources.cpus_per_worker == 0.5
    assert load_spec(str(Path(storage, "packed", "best.yaml"))).resources.cpus_per_worker == 1
