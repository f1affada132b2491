"""Predictions explained: the tokens or patches that each hangs on, and the training rows that are
like it, with the files that they came from and the steps that learnt them.

Refuses tasks whose predictions are not one output of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from dray.corpus.stream import read_rows
from dray.errors import PlanError, SpecError
from dray.release.explaining.attention import roll_out
from dray.release.explaining.attribution import Attribution, attribute_patches, attribute_tokens
from dray.release.explaining.neighbours import (
    By,
    LastLayer,
    Neighbour,
    Search,
    rows_to_search,
    search_rows,
)
from dray.release.explaining.reading import read_first
from dray.release.explaining.tracing import Traced, trace
from dray.release.measuring import rows_at_once
from dray.release.predict import Counts, Predictor
from dray.release.trained import Trained
from dray.tasks import Batch
from dray.tasks.rows import IGNORED

Method = Literal["gradients", "rollout", "occlusion", "none"]
_TAKEN: Sequence[str] = ("input_ids", "attention_mask", "token_type_ids")
"""What of a batch of texts a model is given."""


@dataclass(frozen=True)
class Wanted:
    """What is asked."""

    method: Method | None = None
    """None: gradients of texts, occlusion of images."""
    num_records: int = 10
    """The first so many."""
    num_neighbours: int = 5
    """Training rows told of each; 0: none are looked for."""
    by: By = "cosine"
    most_rows: int | None = None
    """Training rows that are looked at, evenly spread; None: all."""
    traces: bool = True
    """Whether raw files and the history are looked at for where and when these rows were learnt."""

    def check(self) -> None:
        """Raises PlanError."""
        for key, value, least in (
            ("--rows", self.num_records, 1),
            ("--neighbours", self.num_neighbours, 0),
            ("--search", 1 if self.most_rows is None else self.most_rows, 1),
        ):
            if value < least:
                raise PlanError(key, f"is {value}", f"at least {least}")


@dataclass
class Explained:
    """One record: its fields, what is predicted and why."""

    given: dict[str, Any]
    told: dict[str, Any]
    of: str = ""
    """The output that is explained, by name."""
    attribution: Attribution | None = None
    tokens: list[str] = field(default_factory=list)
    shares: npt.NDArray[np.float64] | None = None
    """By rollout, of each token."""
    nearest: list[Neighbour] = field(default_factory=list)
    opposed: list[Neighbour] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {**self.given, **self.told}
        if self.of:
            found["explained"] = self.of
        if self.attribution is not None:
            found |= self.attribution.told()
            values = self.attribution.values.tolist()
            if self.tokens:
                pairs = zip(self.tokens, values, strict=True)
                found["attributions"] = [{"token": token, "value": one} for token, one in pairs]
            else:
                found["patches"] = values
        if self.shares is not None:
            pairs = zip(self.tokens, self.shares.tolist(), strict=True)
            found["rollout"] = [{"token": token, "share": one} for token, one in pairs]
        return found


@dataclass
class Explanation:
    """All of it."""

    run: str
    step: int
    method: str
    records: list[Explained]
    by: str = ""
    num_rows_searched: int = 0
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Training rows that are named, by id: `text`, `label`, `places`, `steps`."""

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"run": self.run, "step": self.step, "method": self.method}
        if self.by:
            found |= {"neighbours_by": self.by, "num_rows_searched": self.num_rows_searched}
        found["records"] = [
            {
                **one.to_json(),
                **{
                    kind: [{"similarity": near.similarity, **self.rows[near.row]} for near in rows]
                    for kind, rows in (("nearest", one.nearest), ("opposed", one.opposed))
                    if rows
                },
            }
            for one in self.records
        ]
        return found


def explain(
    trained: Trained,
    data: Sequence[str],
    wanted: Wanted,
    say: Callable[[str], None] = lambda line: None,
) -> Explanation:
    """The first records of some data, explained. `data`: as for `predict`. Raises SpecError for a
    task that cannot be explained, PlanError for numbers that make no sense."""
    wanted.check()
    predictor = Predictor(trained, Counts())
    explainer = _Explainer(trained, predictor, wanted)
    texts = read_first(trained, predictor, data, wanted.num_records, say)
    records, table = explainer.explain(texts)
    found = Explanation(trained.run.name, trained.checkpoint.step, explainer.method, records)
    if wanted.num_neighbours:
        _add_neighbours(found, explainer, table, wanted, say)
    return found


class _Explainer:
    """A model whose predictions are explained, one row at a time."""

    def __init__(self, trained: Trained, predictor: Predictor, wanted: Wanted) -> None:
        self.trained, self.predictor, self.wanted = trained, predictor, wanted
        self.task = predictor.task
        task, where = self.task, trained.where
        self.is_text = task.tokenizes
        one_output = task.head.each == "row" and task.head.over == "labels"
        if not one_output or task.head.sequences > 1 or not self._has_logits():
            raise SpecError(
                where,
                f"its task is {task.name}, whose predictions are not one logit of a row each",
                "explained are classes of texts and images, and numbers of texts",
                "`dray predict` tells what it predicts",
            )
        self.method: Method = wanted.method or ("gradients" if self.is_text else "occlusion")
        fits = ("gradients", "rollout", "none") if self.is_text else ("occlusion", "none")
        if self.method not in fits:
            raise PlanError(
                f"--method {self.method}",
                f"{task.name} reads {'texts' if self.is_text else 'images'}",
                f"for these there are {', '.join(fits)}",
            )
        self.model: Any = predictor.objective.model

    def _has_logits(self) -> bool:
        """Whether a model's own outputs are what is predicted by: an ordinal link's are not."""
        return not getattr(self.predictor.objective, "links", False)

    def explain(self, texts: pa.Array) -> tuple[list[Explained], pa.Table]:
        """Records of texts, and the rows that they became, in their order. Those that become none,
        or several, are told and not explained."""
        found: list[Explained] = []
        tables: list[pa.Table] = []
        for text in texts:
            one = pa.array([text.as_py()], pa.large_string())
            ((given, told),) = [
                (given, predicted.told) for given, predicted in self.predictor.told(one)
            ]
            rows = self.predictor.rows_of(one)
            record = Explained(given, told)
            if rows.num_rows == 1 and "error" not in told:
                self._explain_row(record, rows)
                tables.append(rows)
            found.append(record)
        return found, pa.concat_tables(tables) if tables else pa.table({})

    def batch_of(self, rows: pa.Table) -> dict[str, torch.Tensor]:
        """Rows as a batch whose labels nobody knows."""
        batch = self.task.collate(rows)
        unknown = torch.full_like(batch["labels"], IGNORED)
        if batch["labels"].dtype == torch.int64:
            batch = {**batch, "labels": unknown}
        return {key: value.to(self.predictor.device) for key, value in batch.items()}

    def _explain_row(self, record: Explained, rows: pa.Table) -> None:
        batch = self.batch_of(rows)
        place, record.of = self._place(record.told)
        if not self.is_text:
            if self.method == "occlusion":

                def output(images: torch.Tensor) -> torch.Tensor:
                    logits: torch.Tensor = self.model(
                        pixel_values=images.to(self.model.dtype)
                    ).logits
                    return logits[:, place].float()

                record.attribution = attribute_patches(output, batch["pixel_values"])
            return
        size = int(rows.column("num_tokens")[0].as_py())
        inputs: Batch = {name: batch[name][:, :size] for name in _TAKEN if name in batch}
        ids = inputs["input_ids"][0].tolist()
        record.tokens = [self.trained.decode_token(token) for token in ids]
        if self.method == "gradients":
            hidden = self._hidden_id()
            spared = torch.tensor([token in self._around for token in ids])
            record.attribution = attribute_tokens(
                self.model, inputs, place, hidden=hidden, spared=spared.to(self.predictor.device)
            )
        elif self.method == "rollout":
            record.shares = roll_out(self.model, inputs, self.trained.where)

    def _place(self, told: dict[str, Any]) -> tuple[int, str]:
        """Which logit is explained: that of the prediction; of several labels the likeliest."""
        scores = told.get("scores")
        if not isinstance(scores, dict):
            return 0, "the number"
        best = max(scores, key=lambda label: scores[label])
        return list(self.task.labels).index(best), str(best)

    @property
    def _around(self) -> set[int]:
        info = self.predictor.info
        return {*info.prefix, *info.middle, *info.suffix}

    def _hidden_id(self) -> int:
        """What stands for no token: the mask, or what fills rows."""
        info = self.predictor.info
        return info.filler if info.mask_token_id is None else info.mask_token_id


def _add_neighbours(
    found: Explanation,
    explainer: _Explainer,
    table: pa.Table,
    wanted: Wanted,
    say: Callable[[str], None],
) -> None:
    """Find the training rows that are like each record, and say what is known of them."""
    trained, predictor = explainer.trained, explainer.predictor
    layer = LastLayer(predictor.task, predictor.objective, trained.where)
    explained = [one for one in found.records if one.of]
    if not explained:
        return
    pieces = [
        layer.of(explainer.batch_of(table.slice(place, 1))) for place in range(table.num_rows)
    ]
    vectors = torch.cat([vector for vector, _ in pieces])
    slopes = None
    if wanted.by == "gradient":
        if any(slope is None for _, slope in pieces):
            raise SpecError(
                trained.where,
                f"its task is {predictor.task.name}, which tells no probabilities",
                "gradients of the loss go by these",
                "give --by cosine",
            )
        slopes = torch.cat([slope for _, slope in pieces if slope is not None])
    search = Search(vectors, slopes, wanted.num_neighbours)
    manifest = trained.manifest
    ids = rows_to_search(manifest.train, wanted.most_rows)
    say(f"looking at {len(ids):,} of {manifest.train.num_rows:,} training rows")
    search_rows(layer, search, trained.corpus, manifest, ids, rows_at_once(trained, predictor.task))
    found.by, found.num_rows_searched = wanted.by, search.num_rows
    for place, record in enumerate(explained):
        record.nearest, record.opposed = search.nearest(place), search.opposed(place)
    named = sorted(
        {near.row for record in explained for near in (*record.nearest, *record.opposed)}
    )
    rows = read_rows(trained.corpus, manifest, manifest.train, np.array(named, np.int64))
    traced: dict[int, Traced] = {}
    if wanted.traces:
        say(f"looking for {len(named):,} of them in the raw files and in the run's history")
        traced = trace(trained, trained.run, rows)
    found.rows = {told["row"]: told for told in _tell(explainer, rows, traced)}


def _tell(
    explainer: _Explainer, rows: pa.Table, traced: dict[int, Traced]
) -> Iterator[dict[str, Any]]:
    """What is known of training rows."""
    trained = explainer.trained
    for place, row in enumerate(rows.column("row_id").to_pylist()):
        told: dict[str, Any] = {"row": row}
        if explainer.is_text:
            size = rows.column("num_tokens")[place].as_py()
            told["text"] = trained.decode(rows.column("input_ids")[place].as_py()[:size])
        if "label" in rows.column_names:
            label = rows.column("label")[place].as_py()
            told["label"] = _label(explainer.task.labels, label)
        if row in traced:
            told |= {
                "places": traced[row].to_json()["places"],
                "steps": traced[row].steps,
            }
        yield told


def _label(labels: Sequence[str], value: Any) -> Any:
    """A label by its name; several as a list; a number as it is."""
    if isinstance(value, list):
        return [name for name, has in zip(labels, value, strict=True) if has]
    if isinstance(value, float) or not labels:
        return value
    return labels[value] if 0 <= value < len(labels) else None
