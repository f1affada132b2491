"""What needs no run: how other data is read, how many rows are computed at once, how a prompt is
fitted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dray.errors import UserError
from dray.release.evaluate import make_evaluation_spec
from dray.release.generate import fit_prompt
from dray.release.measuring import batch_rows
from dray.spec import Source, make_spec
from dray.spec.tasks import make_task
from dray.tasks.parts.metrics import ClassificationMetrics, EntityMetrics, TokenMetrics

LINES = {"path": "lines.txt", "format": "lines"}
CSV = {
    "path": ["a.csv", "b.csv"],
    "text": "review",
    "label": "stars",
    "header": False,
    "weight": 2.0,
    "exclude": ["c*"],
}


def read_as(data: str, *train: Any, validation: Any = None, task: str = "causal_lm") -> Source:
    """The source that a value of `--data` becomes, of a run with that spec."""
    tree = {
        "name": "x",
        "task": task,
        "data": {"train": list(train), "validation": validation},
        "model": {"architecture": "llama", "hidden_size": 8, "num_layers": 1, "num_heads": 1},
        "duration": {"steps": 1},
    }
    return make_evaluation_spec(make_spec(tree, kept=True), [data], "tok").data.train[0]


def test_what_a_run_began_with_without_effect_does_not_keep_it_from_being_evaluated() -> None:
    """Specs that would be refused now."""
    tree = {
        "name": "x",
        "task": "regression",
        "data": {"train": [{"path": "a.csv", "label": "stars"}]},
        "model": {"architecture": "llama", "hidden_size": 8, "num_layers": 1, "num_heads": 1},
        "duration": {"steps": 1},
        "validation": {"patience": 2},
        "regularization": {"label_smoothing": 0.1},
    }
    with pytest.raises(UserError, match=r"validation\.patience = 2"):
        make_spec(tree)
    spec = make_evaluation_spec(make_spec(tree, kept=True), ["b.csv"], "tok")
    assert spec.data.train[0].label == "stars"


@pytest.mark.parametrize(
    "data", ["lines.txt", "other.txt", "held_out", "folder/", "s3://bucket/x.txt?region=eu"]
)
def test_a_path_is_read_as_the_runs_own(data: str) -> None:
    assert read_as(data, LINES) == Source(path=data, format="lines")


def test_a_path_of_another_form_keeps_the_columns_alone() -> None:
    assert read_as("x.jsonl", LINES) == Source(path="x.jsonl")
    found = read_as("x.jsonl", CSV | {"format": "csv"})
    assert (found.format, found.text, found.label, found.weight, found.exclude) == (
        "auto",
        "review",
        "stars",
        None,
        (),
    )


def test_of_several_sources_the_one_of_its_form_or_name_tells() -> None:
    sources = [{"path": "a.jsonl", "text": "body", "weight": 1.0}, CSV]
    assert read_as("new.csv", *sources, validation=LINES).text == "review"
    assert read_as("new.jsonl.gz", *sources).text == "body"
    assert read_as("a.csv", *sources).header is False
    assert read_as("held.txt", *sources, validation=LINES | {"path": "held.txt"}).format == "lines"
    same = {"path": "a.jsonl", "text": "summary"}
    assert read_as("a.jsonl", {"path": "b.jsonl"}, validation=same).text == "summary"


def test_a_mapping_says_otherwise() -> None:
    found = read_as("{path: x.csv, text: title, header: true}", CSV)
    assert (found.text, found.label, found.header) == ("title", "stars", True)
    assert read_as("{path: [x.txt, y.txt], format: text}", LINES).format == "text"


@pytest.mark.parametrize(
    "data", ["[1, 2]", "{path: 3}", "{}", "{path: x, colour: red}", "{path: x"]
)
def test_data_that_is_none(data: str) -> None:
    with pytest.raises(UserError, match="data"):
        read_as(data, LINES)


def test_logits_of_a_batch_are_bounded() -> None:
    assert batch_rows(512, 512 * 8192) == 32
    assert batch_rows(2048, 2048 * 128_000) == 1
    assert batch_rows(64, 64 * 256) == 32
    assert batch_rows(8192, 1) == 4
    assert batch_rows(1_048_576, 1) == 1


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens", "longest", "kept", "room"),
    [
        (10, 40, None, 10, 40),
        (10, 20, 32, 10, 20),
        (12, 20, 32, 12, 20),
        (10, 40, 32, 10, 22),
        (900, 40, 32, 16, 16),
        (900, 4, 32, 28, 4),
        (20, 13, 32, 19, 13),
        (5, 9, 2, 1, 1),
    ],
)
def test_a_prompt_is_fitted(
    num_tokens: int, max_tokens: int, longest: int | None, kept: int, room: int
) -> None:
    assert fit_prompt(num_tokens, max_tokens, longest) == (kept, room)
    if longest is not None and num_tokens + max_tokens > longest:  # or each in a row of its own
        apart = fit_prompt(num_tokens, max_tokens, longest, apart=True)
        assert apart == (min(num_tokens, longest), min(max_tokens, longest))


def metrics_of(
    labels: list[int], guesses: list[int], num_labels: int
) -> tuple[dict[str, float], tuple[str, ...]]:
    metrics = ClassificationMetrics(num_labels)
    scores = torch.nn.functional.one_hot(torch.tensor(guesses), num_labels).float()
    metrics.update(
        {"labels": torch.tensor(labels)}, {"scores": scores, "loss_sum": torch.tensor(1.0)}
    )
    return metrics.compute(), metrics.undefined()


def test_metrics_of_a_slice_say_what_they_cannot_tell() -> None:
    values, undefined = metrics_of([0, 0], [0, 1], 2)
    assert (values["accuracy"], values["precision"], undefined) == (
        0.5,
        0.0,
        ("recall", "f1", "auc"),
    )
    assert metrics_of([1], [1], 2)[1] == ("auc",)
    assert metrics_of([0, 1], [1, 1], 2)[1] == ()
    # The mean is over what is there to see: a class that neither a document nor a guess shows is no
    # failure.
    values, undefined = metrics_of([2, 2], [2, 2], 5)
    assert (values["recall"], values["f1"], undefined) == (1.0, 1.0, ("auc",))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("task", "output"),
    [
        ("sequence_classification", "scores"),
        ({"name": "sequence_classification", "labels": "many"}, "scores"),
        ("regression", "numbers"),
    ],
)
def test_what_a_diverged_model_gives_has_no_metrics(task: Any, output: str, bad: float) -> None:
    made = make_task(task)
    metrics = made.new_metrics()
    labels = torch.tensor([[1, 0], [0, 1]]) if made.num_outputs is None else torch.ones(2)
    if made.head.problem_type == "single_label_classification":
        labels = torch.tensor([1, 0])
    found = torch.full((2, 2) if made.num_outputs is None else (2,), bad)
    metrics.update({"labels": labels}, {output: found, "loss_sum": torch.tensor(bad)})
    values = made.measured(metrics, None)
    assert values.pop("num_targets") == 2
    assert set(values) == set(made.metrics)
    assert set(values.values()) == {None}


def test_tags_and_tokens_of_a_diverged_model_are_no_guesses() -> None:
    labels, lost = torch.tensor([[0, 1, 1]]), torch.tensor(float("nan"))
    place = {"document": torch.zeros(1), "window": torch.zeros(1)}
    entities = EntityMetrics(("O", "B-X"))
    entities.update(
        {"labels": labels, **place}, {"scores": torch.full((1, 3, 2), torch.nan), "loss_sum": lost}
    )
    tokens = TokenMetrics()
    tokens.update({"labels": labels}, {"loss_sum": lost, "num_correct": torch.tensor(2)})
    for task, metrics in ((make_task("token_classification"), entities), (make_task(None), tokens)):
        values = task.measured(metrics, None)
        assert values.pop("num_targets") == 3
        assert set(values.values()) == {None}
