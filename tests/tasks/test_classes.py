"""Losses and metrics of classes that are more than names, beside plain arithmetic."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import cohen_kappa_score
from torch import nn

from dray.errors import SpecError
from dray.spec.tasks import make_task
from dray.tasks.parts.classes import (
    ClassLoss,
    OrdinalLoss,
    OrdinalMetrics,
    PathLoss,
    PathMetrics,
    balanced_weights,
    class_weights,
    path_groups,
)
from dray.tasks.rows import IGNORED


class Fixed(nn.Module):
    """A classifier that gives out what it holds."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.config = SimpleNamespace(type_vocab_size=1)

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        return SimpleNamespace(logits=self.logits)


def batch(labels: list[int]) -> dict[str, torch.Tensor]:
    ids = torch.ones(len(labels), 1, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": ids, "labels": torch.tensor(labels)}


LABELS = [2, 0, IGNORED, 1, 2]


def test_weights_and_the_focal_factor_multiply_each_documents_loss() -> None:
    logits = torch.randn(5, 3)
    weights = [0.5, 2.0, 4.0]
    terms, _ = ClassLoss(Fixed(logits), weights=weights, focal=2.0)(batch(LABELS))
    loss, count = terms["loss"]
    expected = 0.0
    for row, label in enumerate(LABELS):
        if label != IGNORED:
            p = logits[row].softmax(dim=0)[label]
            expected += float(weights[label] * (1 - p) ** 2 * -p.log())
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert int(count) == 4


def test_without_either_it_is_the_cross_entropy() -> None:
    logits = torch.randn(5, 3)
    loss, _ = ClassLoss(Fixed(logits))(batch(LABELS))[0]["loss"]
    expected = F.cross_entropy(logits, torch.tensor(LABELS), ignore_index=IGNORED, reduction="sum")
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-6)


def test_balanced_weights_are_scikit_learns() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    counts = [5, 1, 14]
    labels = [index for index, count in enumerate(counts) for _ in range(count)]
    expected = compute_class_weight("balanced", classes=torch.arange(3).numpy(), y=labels)
    assert balanced_weights(counts) == pytest.approx(expected.tolist())
    assert class_weights({"b": 3.0}, ("a", "b"), {}) == [1.0, 3.0]
    assert class_weights("none", ("a", "b"), {"a": 1, "b": 2}) is None
    with pytest.raises(ValueError, match="every class needs documents"):
        balanced_weights([1, 0])


def test_ranks_have_probabilities_that_never_contradict_each_other() -> None:
    ranks = [2, 0, 1, 3]  # of the classes by id
    logits = torch.randn(50, 4) * 3
    labels = torch.randint(0, 4, (50,)).tolist()
    model = OrdinalLoss(Fixed(logits), ranks=ranks).eval()
    with torch.no_grad():
        terms, output = model(batch(labels))
    scores = output["scores"]
    assert bool((scores >= 0).all())
    assert torch.allclose(scores.sum(dim=-1), torch.ones(50), atol=1e-6)
    by_rank = scores[:, torch.tensor(ranks).argsort()]
    expected = 0.0
    for row, label in enumerate(labels):
        for question in range(3):
            above = by_rank[row, question + 1 :].sum().clamp(1e-12, 1 - 1e-7)
            expected -= float((above if ranks[label] > question else 1 - above).log())
    assert float(terms["loss"][0]) == pytest.approx(expected, rel=1e-3)


def test_ranks_are_learnt() -> None:
    labels = [0, 1, 2, 3] * 4
    model = OrdinalLoss(Fixed(torch.zeros(16, 4)), ranks=[3, 1, 0, 2])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.3)
    for _ in range(80):
        optimizer.zero_grad()
        model(batch(labels))[0]["loss"][0].backward()
        optimizer.step()
    with torch.no_grad():
        _, output = model.eval()(batch(labels))
    metrics = OrdinalMetrics([3, 1, 0, 2])
    metrics.update(batch(labels), output)
    values = metrics.compute()
    assert (values["accuracy"], values["mae"], values["kappa"]) == (1.0, 0.0, 1.0)


def test_ordinal_metrics_go_by_the_median() -> None:
    wanted, scores = [0, 1, 2, 0], torch.rand(4, 3).softmax(dim=-1)
    scores[0] = torch.tensor([0.4, 0.35, 0.25])  # likeliest the lowest, in the middle the next
    metrics = OrdinalMetrics([0, 1, 2])
    metrics.update(batch(wanted), {"scores": scores, "loss_sum": torch.tensor(1.0)})
    guesses = [int((row.cumsum(0) < 0.5).sum()) for row in scores]
    assert guesses[0] == 1
    values = metrics.compute()
    assert values["mae"] == pytest.approx(
        sum(abs(a - b) for a, b in zip(wanted, guesses, strict=True)) / 4
    )
    expected = cohen_kappa_score(wanted, guesses, weights="quadratic")
    assert values["kappa"] == pytest.approx(expected)


PATHS = ("news/abc", "news/bbc", "play", "play/shakespeare/tragedy", "play/shakespeare/comedy")


def test_a_path_counts_on_each_of_its_levels() -> None:
    logits = torch.randn(4, 5)
    labels = [0, 3, 2, IGNORED]
    model = PathLoss(Fixed(logits), groups=path_groups(PATHS))
    loss, count = model(batch(labels))[0]["loss"]
    expected = 0.0
    for row, label in enumerate(labels[:3]):
        likely = logits[row].softmax(dim=0)
        for level in (1, 2, 3):
            way = PATHS[label].split("/")[:level]
            inside = [n for n, path in enumerate(PATHS) if path.split("/")[:level] == way]
            expected -= float(likely[inside].sum().log()) / 3
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert int(count) == 3
    loss.backward()  # finite, though most classes lie outside of each level
    assert bool(model.model.logits.grad.isfinite().all())


def test_path_metrics_forgive_what_is_near() -> None:
    wanted, guesses = [0, 3, 2, 1], [1, 4, 2, 2]
    scores = F.one_hot(torch.tensor(guesses), 5).float()
    metrics = PathMetrics(PATHS)
    metrics.update(batch(wanted), {"scores": scores, "loss_sum": torch.tensor(2.0)})
    shared = [1, 2, 1, 0]  # news; play, play/shakespeare; play; none
    sizes = [2 + 2, 3 + 3, 1 + 1, 2 + 1]
    values = metrics.compute()
    assert values["path_f1"] == pytest.approx(2 * sum(shared) / sum(sizes))
    assert values["accuracy"] == 0.25
    report = metrics.report()
    assert report["level 1"]["accuracy"] == 0.75
    assert report["level 3"] == {"accuracy": 0.25, "f1": report["level 3"]["f1"], "num": 5.0}


def test_settings_that_do_not_go_together_are_refused() -> None:
    name = "sequence_classification"
    for settings, message in (
        ({"order": ["a", "b"]}, "order is of ordinal labels"),
        ({"labels": "ordinal", "order": ["a", "a"]}, "names a label twice"),
        ({"labels": "ordinal", "focal": 2}, "focal = 2 is of one label"),
        ({"labels": "many", "class_weights": "balanced"}, "not many"),
        ({"class_weights": {"a": 0}}, "class_weights of a: a weight is above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make_task({"name": name, **settings})


def test_settings_that_do_not_go_with_the_labels_are_refused_before_a_run_begins() -> None:
    corpus = SimpleNamespace(labels=("bad", "good"))
    task = make_task(
        {"name": "sequence_classification", "labels": "ordinal", "order": ["bad", "fine"]}
    )
    with pytest.raises(SpecError, match=r"task\.order: fine, good"):
        task.check(corpus)
    weighted = make_task({"name": "sequence_classification", "class_weights": {"dull": 2.0}})
    with pytest.raises(SpecError, match="no training document has the label dull"):
        weighted.check(corpus)
    balanced = make_task({"name": "sequence_classification", "class_weights": "balanced"})
    counted = SimpleNamespace(labels=("bad", "good"), label_counts={"bad": 3, "good": 0})
    with pytest.raises(SpecError, match="balanced, and no training document has the label good"):
        balanced.check(counted)


def test_what_a_loss_makes_of_labels_changes_no_row() -> None:
    plain = make_task("sequence_classification").row_settings
    for settings in (
        {"labels": "ordinal", "order": ["a", "b"]},
        {"labels": "paths"},
        {"focal": 2.0, "class_weights": "balanced"},
    ):
        assert make_task({"name": "sequence_classification", **settings}).row_settings == plain
    assert plain == {"packs_rows": False}
    many = make_task({"name": "sequence_classification", "labels": "many", "pairs": True})
    assert many.row_settings == {"packs_rows": False, "labels": "many", "pairs": True}
