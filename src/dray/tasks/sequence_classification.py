"""Classes of documents, or of pairs of texts: sentiment, topics, entailment. One of them each, or
any number; names alone, in an order, or on paths.

Rows are documents, padded to the longest of their batch. The corpus keeps rows of like length
together, so little of a batch is padding. The model pools as its architecture does: encoders their
own way, decoders at the last token that is not padding.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field as Limits
from pydantic import model_validator

from dray.errors import SpecError
from dray.spec import Direction, Field, Head
from dray.spec.sections import Float, Section
from dray.tasks.parts.constraints import Constraints, find_votes
from dray.tasks.parts.rules import ABSTAINS
from dray.tasks.rows import IGNORED, VOTES, Column
from dray.tasks.task import Batch, Corpus, Output, Task, TaskMetrics

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import nn

    from dray.tasks.rows import Encoded, Tools

METRICS: dict[str, Direction] = {
    "loss": "lower",
    "accuracy": "higher",
    "precision": "higher",
    "recall": "higher",
    "f1": "higher",
    "auc": "higher",
}
AUTO_CLASS = "AutoModelForSequenceClassification"


class SequenceClassification(Task):
    """Prediction of a document's label, or of its labels."""

    class Settings(Section):
        """What has labels, and how many."""

        labels: Literal["one", "many", "ordinal", "paths"] = "one"
        """`many`: a document has any number of them; the column holds a list, or a text with
        commas between. `ordinal`: it has one, and they are in an order, such as stars. `paths`: it
        has one, which lies on a path such as sport/ball/tennis."""
        order: tuple[str, ...] = ()
        """Of `ordinal` labels: from the lowest on; empty: by number, if all are whole numbers, else
        by name."""
        class_weights: Literal["none", "balanced"] | dict[str, Float] = "none"
        """What a document's loss counts by its label: given by label (others count 1), or
        `balanced`, so that in training all labels count the same together and a document 1 in the
        mean, as often as each is read (`data.balance`)."""
        focal: Annotated[Float, Limits(ge=0)] = 0.0
        """The focal loss' exponent: the greater, the less those documents count that the model is
        sure of; 0: the cross entropy."""
        pairs: bool = False
        """Whether a document is two texts: `text`, and the column that `columns.text_pair` of a
        source names."""

        constraints: Constraints | None = None
        """Rules that the model is to keep to, more or less. None: it learns from labels alone."""

        @model_validator(mode="after")
        def _fits(self) -> Self:
            if self.constraints is not None and self.labels != "one":
                raise ValueError(
                    f"constraints are of documents with one label, and labels = {self.labels}"
                )
            if self.order and self.labels != "ordinal":
                raise ValueError(f"order is of ordinal labels, and labels = {self.labels}")
            if len(set(self.order)) != len(self.order):
                raise ValueError(f"order names a label twice: {', '.join(self.order)}")
            if self.focal and self.labels != "one":
                raise ValueError(
                    f"focal = {self.focal:g} is of one label, and labels = {self.labels}"
                )
            if self.class_weights != "none" and self.labels == "many":
                raise ValueError("class_weights are of documents that have one label, not many")
            weights = {} if isinstance(self.class_weights, str) else self.class_weights
            if low := [label for label, weight in weights.items() if weight <= 0]:
                raise ValueError(f"class_weights of {', '.join(low)}: a weight is above 0")
            return self

    name = "sequence_classification"
    predicts = True
    serves = ("classify",)

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        pairs, many = self.settings.pairs, self.settings.labels == "many"
        self.fields = {
            "text": Field("text"),
            **({"text_pair": Field("text")} if pairs else {}),
            "label": Field("labels" if many else "label"),
        }
        segments = (Column("segment", "uint8", "token", extends=True),) if pairs else ()
        label = Column("label", "uint8", hot=True) if many else Column("label", names=True)
        rules = self.settings.constraints
        self.rules = tuple(rule.name for rule in rules.rules) if rules else ()
        votes = (Column(VOTES, "uint8", shape=(len(self.rules),)),) if rules else ()
        self.columns = (*segments, *votes, label)
        more: dict[str, dict[str, Direction]] = {
            "ordinal": {"mae": "lower", "kappa": "higher"},
            "paths": {"path_f1": "higher"},
        }
        if rules:
            more["one"] = {"rules_broken": "lower"}
        self.metrics: Mapping[str, Direction] = METRICS | more.get(self.settings.labels, {})
        kind = "multi_label_classification" if many else "single_label_classification"
        self.head = Head(AUTO_CLASS, over="labels", each="row", problem_type=kind)

    @property
    def row_settings(self) -> dict[str, Any]:
        """What the loss makes of labels changes no row."""
        own = self.settings.model_dump(include={"labels", "pairs"}, exclude_defaults=True)
        if own.get("labels") in ("ordinal", "paths"):
            del own["labels"]
        if (rules := self.settings.constraints) is not None:
            own["rules"] = rules.row_settings
        return {"packs_rows": self.packs, **own}

    @property
    def files(self) -> Mapping[str, str]:
        rules = self.settings.constraints
        return {} if rules is None else rules.files

    def reading(self, files: Mapping[str, str]) -> Self:
        rules = self.settings.constraints
        if rules is None:
            return self
        found = copy.copy(self)
        found.settings = self.settings.model_copy(update={"constraints": rules.reading(files)})
        return found

    def read_files(self) -> Mapping[str, bytes]:
        rules = self.settings.constraints
        return {} if rules is None else rules.read_files()

    @property
    def remarks(self) -> Sequence[str]:
        if self.settings.labels != "ordinal":
            return ()
        return (
            "Its outputs are a cumulative link over ordered classes, not their logits: the largest "
            "of them is no prediction, and a pipeline of transformers tells another class than "
            "`dray predict`.",
        )

    def check(self, corpus: Corpus) -> None:
        """Raises SpecError for labels that the settings do not know, or that there are not."""
        order, weights, labels = self.settings.order, self.settings.class_weights, corpus.labels
        rule = f"they are {', '.join(labels[:20])}"
        if order and (other := sorted({*order} ^ {*labels})):
            raise SpecError(
                "task.order",
                f"{', '.join(other[:8])}: not both in it and in the training documents",
                "it names each of their labels once",
                rule,
            )
        counts = getattr(corpus, "label_counts", {})
        if weights == "balanced" and (none := [label for label in labels if not counts.get(label)]):
            raise SpecError(
                "task.class_weights",
                f"balanced, and no training document has the label {', '.join(none[:8])}",
                "each class weighs by its documents",
                "give the weights by label, or give documents of each",
            )
        if isinstance(weights, dict) and (other := sorted({*weights} - {*labels})):
            raise SpecError(
                "task.class_weights",
                f"no training document has the label {', '.join(other[:8])}",
                "a weight is of a label",
                rule,
            )
        rules = self.settings.constraints
        if rules is not None and (other := [name for name in rules.labels if name not in labels]):
            raise SpecError(
                "task.constraints.labels",
                f"no training document has the label {', '.join(other[:8])}",
                "rules vote for labels that a model learns",
                rule,
            )

    @property
    def _voted_classes(self) -> list[int]:
        """The class of each label that rules vote for; any, where there are made-up labels alone,
        as in a rehearsal."""
        known = {label: number for number, label in enumerate(self.labels)}
        labels = self.settings.constraints.labels
        return [known.get(label, n % max(1, self.num_labels)) for n, label in enumerate(labels)]

    @property
    def ranks(self) -> tuple[int, ...] | None:
        return tuple(self._ranks) if self.settings.labels == "ordinal" else None

    @property
    def _ranks(self) -> list[int]:
        """The place in the order of each class by id."""
        if {*self.settings.order} != {*self.labels}:  # it is theirs, or there is no corpus
            return list(range(self.num_labels))
        places = {label: place for place, label in enumerate(self.settings.order)}
        return [places[label] for label in self.labels]

    def encode(self, texts: pa.Array, targets: pa.Array | None, tools: Tools) -> Encoded:
        from dray.tasks.parts.encoding import encode_texts_or_pairs, number_lists, with_columns

        encoded = encode_texts_or_pairs(texts, tools, pairs=self.settings.pairs)
        if targets is None:
            return encoded
        many = self.settings.labels == "many"
        numbers = number_lists(targets, tools) if many else tools.number(targets)
        rules = self.settings.constraints
        votes = {} if rules is None else {VOTES: find_votes(rules, texts, tools)}
        return with_columns(encoded, label=numbers, **votes)

    def collate(self, table: pa.Table, draw: int = 0) -> Batch:
        """`input_ids` and `attention_mask` [rows, width], `labels` [rows] or, 1 or 0 for each,
        [rows, classes], and with rules VOTES [rows, rules], all int64; padding rows are IGNORED."""
        from dray.tasks.parts.columns import integer_column, matrix, padded_tokens, real_rows

        real = real_rows(table)
        if self.settings.labels == "many":
            labels = matrix(table, "label").masked_fill(~real[:, None], IGNORED)
        else:
            labels = integer_column(table, "label").masked_fill(~real, IGNORED)
        votes = {VOTES: matrix(table, VOTES) + ABSTAINS} if self.rules else {}
        return {**padded_tokens(table, self.pad_token_id), **votes, "labels": labels}

    def num_targets(self, batch: Batch) -> int:
        labels = batch["labels"]
        return int((labels.reshape(len(labels), -1)[:, :1] != IGNORED).sum())

    def objective(self, model: Any, label_smoothing: float = 0.0) -> nn.Module:
        from dray.tasks.parts.classes import (
            ClassLoss,
            OrdinalLoss,
            PathLoss,
            class_weights,
            path_groups,
        )
        from dray.tasks.parts.objectives import LabelLoss, ManyLabelsLoss
        from dray.tasks.parts.rule_loss import RuleLoss

        settings = self.settings
        weights = class_weights(settings.class_weights, self.labels, self.label_counts)
        if settings.labels == "many":
            return ManyLabelsLoss(model, label_smoothing)
        if settings.labels == "ordinal":
            return OrdinalLoss(model, label_smoothing, ranks=self._ranks, weights=weights)
        if settings.labels == "paths":
            groups = path_groups(self.labels)
            return PathLoss(model, label_smoothing, groups=groups, weights=weights)
        if (rules := settings.constraints) is not None:
            return RuleLoss(
                model,
                label_smoothing,
                classes=self._voted_classes,
                rule_weights=[rule.weight for rule in rules.rules],
                share=rules.share,
                strength=rules.strength,
                weights=weights,
                focal=settings.focal,
            )
        if weights is None and not settings.focal:
            return LabelLoss(model, label_smoothing)
        return ClassLoss(model, label_smoothing, weights=weights, focal=settings.focal)

    def predictions(self, batch: Batch, output: Output) -> list[Any]:
        many, found = self.settings.labels == "many", []
        for row in output["scores"].tolist():
            scores = dict(zip(self.labels, row, strict=True))
            likely = [label for label, score in scores.items() if score > 0.5]
            best = max(scores, key=lambda label: scores[label])
            if self.settings.labels == "ordinal":
                best = self._median(scores)
            found.append({"prediction": likely if many else best, "scores": scores})
        return found

    def _median(self, scores: Mapping[str, float]) -> str:
        """The label above which less than half of the probability lies."""
        below = 0.0
        order = self.settings.order or self.labels
        for label in order:
            below += scores[label]
            if below >= 0.5:
                return label
        return order[-1]

    def new_metrics(self) -> TaskMetrics:
        from dray.tasks.parts.classes import OrdinalMetrics, PathMetrics
        from dray.tasks.parts.metrics import ClassificationMetrics, ManyLabelsMetrics

        if self.settings.labels == "many":
            return ManyLabelsMetrics()
        if self.settings.labels == "ordinal":
            return OrdinalMetrics(self._ranks)
        if self.settings.labels == "paths" and self.labels:
            return PathMetrics(self.labels)
        if self.rules:
            from dray.tasks.parts.rule_loss import RuleMetrics

            return RuleMetrics(self.num_labels, self.rules, self._voted_classes)
        return ClassificationMetrics(self.num_labels)
