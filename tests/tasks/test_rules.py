"""Rules in a classifier's loss: the loss beside plain arithmetic, what goes with it, what is
measured, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dray.errors import SpecError
from dray.rank.chance import Chance
from dray.rank.passes import TwoMasks
from dray.rank.rehearsal import make_rows
from dray.rank.teaching import TaughtLoss
from dray.spec import Distil, dump_task, make_spec
from dray.spec.tasks import make_task
from dray.tasks.parts.classes import ClassLoss
from dray.tasks.parts.rule_loss import RuleLoss, RuleMetrics
from dray.tasks.rows import IGNORED, VOTES
from tiny import source_for, tiny_tree

LABELS = [2, 0, IGNORED, 1, 2]
SAID = [[0, -1, 1], [-1, -1, -1], [1, 1, 1], [-1, 0, 0], [1, -1, -1]]
"""By row and rule: the first or the second of the labels that rules vote for, or -1."""
CLASSES = [2, 0]
"""Of these labels, of the model's three."""
RULE_WEIGHTS = [0.5, 1.0, 3.0]
SHARE, STRENGTH = 0.4, 1.3


class Fixed(nn.Module):
    """A classifier that gives out what it holds."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())
        self.config = SimpleNamespace(type_vocab_size=1, num_labels=logits.shape[1])

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        return SimpleNamespace(logits=self.logits)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.ones(len(LABELS), 1, dtype=torch.int64)
    votes = torch.tensor(SAID)
    labels = torch.tensor(LABELS)
    return {"input_ids": ids, "attention_mask": ids, "labels": labels, VOTES: votes}


def rule_loss(logits: torch.Tensor, share: float = SHARE, **others: Any) -> RuleLoss:
    return RuleLoss(
        Fixed(logits), classes=CLASSES, rule_weights=RULE_WEIGHTS, share=share, strength=STRENGTH,
        **others,
    )  # fmt: skip


def lost(objective: nn.Module) -> float:
    """The loss of the batch where gradients are wanted."""
    return float(objective(batch())[0]["loss"][0].detach())


def corrected(logits: Any) -> Any:
    """What a teacher that keeps to the rules gives, row by row and class by class."""
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    q = np.empty_like(p)
    for row, votes in enumerate(SAID):
        for y in range(p.shape[1]):
            broken = sum(
                weight
                for vote, weight in zip(votes, RULE_WEIGHTS, strict=True)
                if vote >= 0 and CLASSES[vote] != y
            )
            q[row, y] = p[row, y] * np.exp(-STRENGTH * broken)
    return p, q / q.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("share", [0.0, SHARE, 1.0])
def test_the_loss_is_the_label_s_and_the_imitation_s(share: float) -> None:
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    p, q = corrected(logits.double().numpy())
    expected = sum(
        (1 - share) * -np.log(p[row, label]) + share * -(q[row] * np.log(p[row])).sum()
        for row, label in enumerate(LABELS)
        if label != IGNORED
    )
    model = rule_loss(logits, share).train()
    loss, count = model(batch())[0]["loss"]
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert int(count) == 4
    own = lost(ClassLoss(Fixed(logits)))
    assert lost(model.eval()) == pytest.approx(own, rel=1e-6)


def test_gradients_go_through_what_the_model_gives_alone() -> None:
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    p, q = corrected(logits.double().numpy())
    model = rule_loss(logits).train()
    model(batch())[0]["loss"][0].backward()
    wanted = np.zeros_like(p)
    for row, label in enumerate(LABELS):
        if label != IGNORED:  # of a cross entropy against t the gradient is p - t
            label_alone = np.eye(3)[label]
            wanted[row] = (1 - SHARE) * (p[row] - label_alone) + SHARE * (p[row] - q[row])
    assert np.allclose(model.model.logits.grad.double().numpy(), wanted, atol=1e-6)
    assert np.allclose(wanted[1], (1 - SHARE) * (p[1] - np.eye(3)[0]))  # where no rule votes


def test_class_weights_the_focal_factor_and_smoothing_are_the_label_s_part() -> None:
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    others = {"weights": [0.5, 2.0, 4.0], "focal": 2.0, "label_smoothing": 0.1}
    p, q = corrected(logits.double().numpy())
    own = lost(ClassLoss(Fixed(logits), **others).train())
    imitated = sum(
        -(q[row] * np.log(p[row])).sum() for row, label in enumerate(LABELS) if label != IGNORED
    )
    loss = lost(rule_loss(logits, **others).train())
    expected = (1 - SHARE) * own + SHARE * imitated
    assert loss == pytest.approx(expected, rel=1e-5)


def test_two_passes_and_a_teacher_go_around_it() -> None:
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(3))
    own = lost(rule_loss(logits).train())
    pair = TwoMasks(1.0, Chance()).around(rule_loss(logits)).train()
    assert lost(pair) == pytest.approx(own, rel=1e-6)
    settings = Distil(run="teacher", share=0.5, temperature=1.0)
    taught = TaughtLoss(rule_loss(logits), Fixed(logits), settings).train()
    assert lost(taught) == pytest.approx(own / 2, rel=1e-5)


def test_metrics_tell_how_far_rules_are_broken_whoever_measures() -> None:
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(4))
    model = rule_loss(logits).eval()
    with torch.no_grad():
        terms, output = model(batch())
    p, _ = corrected(logits.double().numpy())
    by_rule: list[list[float]] = [[], [], []]
    for row, votes in enumerate(SAID):
        for rule, vote in enumerate(votes):
            if vote >= 0 and LABELS[row] != IGNORED:
                by_rule[rule].append(1 - p[row, CLASSES[vote]])
    whole = RuleMetrics(3, "abc", CLASSES)
    whole.update(batch(), output)
    found = whole.compute()
    every = [value for values in by_rule for value in values]
    assert found["rules_broken"] == pytest.approx(np.mean(every), rel=1e-6)
    assert found["loss"] == pytest.approx(float(terms["loss"][0]) / 4, rel=1e-6)
    assert whole.report()["rule b"] == {
        "broken": pytest.approx(np.mean(by_rule[1]), rel=1e-6), "num": 1.0,
    }  # fmt: skip
    apart = []
    for rows in (slice(0, 2), slice(2, 5)):
        part = RuleMetrics(3, "abc", CLASSES)
        own = {key: value[rows] for key, value in batch().items()}
        part.update(own, {"loss_sum": torch.zeros(()), "scores": output["scores"][rows]})
        apart.append(part.state())
    merged = RuleMetrics(3, "abc", CLASSES).merge(reversed(apart)).compute()
    assert merged["rules_broken"] == found["rules_broken"]
    assert "rules_broken" in RuleMetrics(3, "abc", CLASSES).undefined()


PRAISE = {"name": "praise", "label": "good", "words": ["fine"]}


def task_of(**settings: Any) -> Any:
    given = {"labels": ["bad", "good"], "rules": [PRAISE], **settings.pop("constraints", {})}
    return make_task({"name": "sequence_classification", "constraints": given, **settings})


def test_a_spec_has_them_in_it_and_its_share_is_an_ordinary_key() -> None:
    rules = [PRAISE, {"name": "words", "lexicon": {"path": "a.csv"}, "weight": 2.0}]
    task = task_of(constraints={"rules": rules})
    assert make_task(dump_task(task)).settings == task.settings
    assert task.rules == ("praise", "words")
    assert task.files == {"words.csv": "a.csv"}
    tree = tiny_tree("x", task=dump_task(task), model={"architecture": "bert"})  # type: ignore[arg-type]
    tree["data"]["train"] = [source_for("sequence_classification")]
    before = make_spec(tree)
    tree["task"]["constraints"]["share"] = 0.5
    after = make_spec(tree)
    assert after.task.settings.constraints.share == 0.5
    assert before.fingerprint != after.fingerprint
    assert before.task.row_settings == after.task.row_settings


def test_what_only_the_loss_goes_by_changes_no_row() -> None:
    rules = {"rules": [{"name": "words", "lexicon": {"path": "a.csv"}, "weight": 2.0}]}
    others = {"rules": [{"name": "words", "lexicon": {"path": "b.csv"}}], "strength": 3.0}
    one, other = task_of(constraints=rules), task_of(constraints=others)
    assert one.row_settings == other.row_settings
    assert one.row_settings != task_of().row_settings
    plain = make_task("sequence_classification")
    assert plain.row_settings == {"packs_rows": False}
    assert not plain.files
    assert not plain.rules


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"name": "a", "label": "good", "column": "stars", "at_least": 3}, "column, at_least is a"),
        (
            {"name": "a", "label": "good", "words": ["x"], "column": "title"},
            "matter of `dray label`",
        ),
        ({"name": "a", "program": "f"}, "no code runs that a spec names"),
        ({"name": "a", "label": "nice", "words": ["x"]}, "nice is none of the labels bad, good"),
        ({"name": "a", "label": "good"}, "exactly one of regex, words, lexicon is needed"),
        ({"name": "a", "words": ["x"]}, "`label` is needed"),
        ({"name": "a", "label": "good", "lexicon": {"path": "x"}}, "says the label itself"),
        ({"name": "a", "label": "good", "words": ["x"], "weight": 0}, "weight = 0"),
        (
            {"name": "a", "label": "good", "wordz": ["x"]},
            r"no setting constraints\.rules\.0\.wordz",
        ),
        ({"name": "../a", "label": "good", "words": ["x"]}, r"rules\.0\.name"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_of(constraints={"rules": [rule]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"constraints": {"labels": ["good"]}}, r"constraints\.labels"),
        ({"constraints": {"labels": ["good", "good"]}}, "names one twice"),
        ({"constraints": {"rules": []}}, r"constraints\.rules"),
        ({"constraints": {"rules": [PRAISE, PRAISE]}}, "two rules are called praise"),
        ({"constraints": {"share": 1.5}}, r"constraints\.share = 1\.5"),
        ({"constraints": {"strength": 0}}, r"constraints\.strength = 0"),
        ({"labels": "many"}, "documents with one label, and labels = many"),
        ({"labels": "ordinal"}, "documents with one label, and labels = ordinal"),
        ({"labels": "paths"}, "documents with one label, and labels = paths"),
    ],
)
def test_constraints_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_of(**settings)


@pytest.mark.parametrize("num_labels", [2, 12])
def test_a_rehearsal_has_votes_and_labels_of_its_own(num_labels: int) -> None:
    rows = make_rows(task_of(), num_rows=8, width=4, vocab_size=30, num_labels=num_labels)
    labels = tuple(map(str, range(num_labels)))
    corpus: Any = SimpleNamespace(
        labels=labels, label_counts={}, pad_token_id=0, mask_token_id=None, vocab_size=30
    )
    task = task_of().on(corpus)
    given = task.collate(rows)
    assert set(given[VOTES].flatten().tolist()) == {-1, 0, 1}
    objective = task.objective(Fixed(torch.zeros(8, num_labels))).train()
    loss, count = objective(given)[0]["loss"]
    assert int(count) == 8
    assert bool(loss.isfinite())


def test_labels_that_the_corpus_does_not_have_are_refused() -> None:
    corpus: Any = SimpleNamespace(labels=("bad", "ugly"), label_counts={})
    with pytest.raises(SpecError, match=r"task\.constraints\.labels: .*the label good"):
        task_of().check(corpus)
    task_of().check(SimpleNamespace(labels=("bad", "good", "ugly")))
