"""Predictions for the records of files, in their order, beside what was read of them.

Records are read as the run's own source of their form is, targets aside; a text is normalised and
encoded as in training, and none is filtered or left out as a duplicate. What cannot be read has a
line of its own that says why.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from dray.corpus.cleaning import normalize
from dray.corpus.parts import CorpusSource
from dray.corpus.prepare import list_inputs
from dray.corpus.reading import Bad, Span, SpanReader
from dray.corpus.records import BadRecord, Wanted
from dray.corpus.scattering import gather_here
from dray.corpus.sources import InputFile
from dray.corpus.stream import read_rows
from dray.corpus.tables import make_table
from dray.corpus.tokenizing import token_names
from dray.errors import SpecError
from dray.release.evaluate import make_evaluation_spec, said_of_data
from dray.release.measuring import rows_at_once
from dray.release.opened import Opened
from dray.release.trained import Chosen, Weights, load_trained
from dray.spec import WHOLE
from dray.tasks.rows import SEPARATOR, Encoded


@dataclass
class Counts:
    """What became of the records."""

    num_predicted: int = 0
    num_bad: int = 0
    num_cut: int = 0
    """Whose end a row had no room for."""
    num_short: int = 0
    """Gathered ones with too few records (`gather.least`), of which nothing is told."""

    def add(self, record: Mapping[str, Any]) -> None:
        """Count what was told of a record."""
        is_bad = "prediction" not in record and "error" in record
        self.num_bad += is_bad
        self.num_predicted += not is_bad


@dataclass(frozen=True)
class Predicted:
    """What was predicted of a record."""

    told: dict[str, Any]
    """`prediction` with what goes with it, or `error`."""
    num_tokens: int = 0
    num_unknown: int = 0
    """Of its tokens: those that stand for what the vocabulary lacks."""


def predict(
    storage: str,
    name: str,
    data: Sequence[str],
    *,
    step: str | int | None = None,
    weights: Weights = "trained",
    chosen: Chosen = Chosen(),  # noqa: B008 - frozen
    counts: Counts | None = None,
) -> Iterator[dict[str, Any]]:
    """A mapping for each record: its fields, and `prediction` with what goes with it (`scores`);
    or `file`, `offset` and `error` for one that cannot be read.

    `data`: paths, or YAML mappings like a spec's data source. Raises StoreError as `load_trained`
    does, SpecError for a task without predictions, CorpusError for data that is not there.
    """
    counts = counts or Counts()
    trained = load_trained(storage, name, step, weights, chosen)
    predictor = Predictor(trained, counts)
    with said_of_data():
        spec = make_evaluation_spec(trained.spec, data, trained.tokenizer_folder)
        inputs = list_inputs(spec)
    for source, files in zip(inputs.sources, inputs.files, strict=True):
        if source.source.gather is not None:
            yield from _predict_gathered(predictor, source, files, spec.data.max_record_bytes)
            continue
        for file in files:
            reader = SpanReader(
                Span(file), source.source, spec.data.max_record_bytes, predictor.fields
            )
            for documents in reader.read():
                told = {"file": file.name} if file.form in ("files", "html") else {}
                for record in predictor.records(documents.texts):
                    counts.add(record)
                    yield told | record
                for bad in documents.bad:
                    yield _told_bad(bad, counts)


def _predict_gathered(
    predictor: Predictor, source: CorpusSource, files: Sequence[InputFile], limit: int
) -> Iterator[dict[str, Any]]:
    """Predictions for documents that are gathered of records, each with its key first."""
    by = source.source.gather.by if source.source.gather is not None else ""
    counts = predictor.counts
    for keys, texts, bad, num_short in gather_here(source, files, predictor.fields, limit):
        counts.num_short += num_short
        for key, record in zip(keys.to_pylist(), predictor.records(texts), strict=True):
            counts.add(record)
            yield {by: key, **record}
        for one in bad:
            yield _told_bad(one, counts)


def _told_bad(bad: Bad, counts: Counts) -> dict[str, Any]:
    counts.num_bad += 1
    return {"file": bad.file, "offset": bad.offset, "error": bad.reason}


class Predictor:
    """A model that predicts records, many at a time. Raises SpecError for a task without
    predictions."""

    def __init__(self, trained: Opened, counts: Counts | None = None) -> None:
        task = trained.task
        if not task.predicts:
            way = "`dray generate` writes text" if task.generates else "`dray evaluate` measures it"
            raise SpecError(trained.where, f"its task is {task.name}", "it predicts nothing", way)
        self.trained, self.counts = trained, counts or Counts()
        self.task = task.predicting()
        self.fields = self.task.asked
        """What a record consists of, targets aside."""
        self._wanted = Wanted(
            tuple(
                (name, name if field.column or field.kind != "record" else WHOLE, field.kind)
                for name, field in self.fields.items()
            )
        )
        self.device = trained.move_to_device()
        self.objective = self.task.objective(trained.model).eval()
        self.info, self.tools = trained.tokenizer, trained.tools
        self._unknown = self.tools.unknown if task.tokenizes else None
        if self.task.tells_tokens:
            self.task.token_names = token_names(trained.tokenizer_folder)

    def predict(self, records: Sequence[Mapping[str, Any]]) -> list[Predicted]:
        """Predictions of values by field, in their order, without the fields; `error` in the place
        of one that is no such record."""
        found = [Predicted({}) for _ in records]
        texts: dict[int, str] = {}
        for place, record in enumerate(records):
            try:
                texts[place] = self._wanted.read(record)[0]
            except KeyError as error:
                found[place] = Predicted({"error": f"no {error}"})
            except BadRecord as error:
                found[place] = Predicted({"error": str(error)})
        told = self.told(pa.array(texts.values(), pa.large_string()))
        for place, (_, predicted) in zip(texts, told, strict=True):
            found[place] = predicted
        return found

    def predict_held_out(self, num_rows: int, seconds: float) -> list[Predicted]:
        """Predictions of at most so many rows that were held out of training, spread evenly over
        them, as far as they come in so many seconds; none where a held-out row is not what a record
        becomes."""
        manifest, task = self.trained.manifest, self.trained.task
        split = manifest.validation
        if split is None or self.task is not task or task.packs or task.head.sequences != 1:
            return []
        ids = np.unique(np.linspace(0, split.num_rows - 1, num_rows).astype(np.int64))
        end, found = time.monotonic() + seconds, list[Predicted]()
        # In an order of their own: rows of a class may lie side by side, and time may end.
        ids = np.random.default_rng(0).permutation(ids)
        size = rows_at_once(self.trained, self.task)
        for start in range(0, len(ids), size):
            if time.monotonic() > end:
                break
            rows = read_rows(self.trained.corpus, manifest, split, ids[start : start + size])
            sizes = self._sizes(rows)
            for place, value in self._predict(rows):
                joined = self.task.join_predictions([value], {})
                found.append(Predicted(joined, *sizes[place].tolist()))
        return found

    def records(self, texts: pa.Array) -> Iterator[dict[str, Any]]:
        """Predictions of a block of texts, in their order."""
        for given, predicted in self.told(texts):
            yield {**given, **predicted.told}

    def told(self, texts: pa.Array) -> Iterator[tuple[dict[str, Any], Predicted]]:
        """The fields of each text and what is told of it, in their order."""
        if not len(texts):
            return
        encoded = self._encode(texts)
        records = np.arange(len(texts)) if encoded.records is None else encoded.records
        found: list[list[Any]] = [[] for _ in range(len(texts))]
        rows = self._rows(encoded)
        sizes = np.zeros((len(texts), 2), np.int64)
        np.add.at(sizes, records, self._sizes(rows))
        for place, prediction in self._predict(rows):
            found[int(records[place])].append((place, prediction))
        for place, (text, pieces) in enumerate(zip(texts.to_pylist(), found, strict=True)):
            values = [prediction for _, prediction in sorted(pieces, key=lambda item: item[0])]
            given = _given(text, self.fields)
            if place in encoded.refused:
                yield given, Predicted({"error": encoded.refused[place]})
                continue
            untold = {"untold": encoded.untold[place]} if place in encoded.untold else {}
            told = self.task.join_predictions(values, given, **untold)
            yield given, Predicted(told, *sizes[place].tolist())

    def _encode(self, texts: pa.Array) -> Encoded:
        normal = normalize(texts, self.trained.spec.data.cleaning.normalize)
        return self.task.encode(normal, None, self.tools)

    def rows_of(self, texts: pa.Array) -> pa.Table:
        """The rows that texts become."""
        return self._rows(self._encode(texts))

    @torch.no_grad()
    def _predict(self, table: pa.Table) -> Iterator[tuple[int, Any]]:
        """The place and the prediction of each row, those of like length together."""
        size = rows_at_once(self.trained, self.task)
        order = np.argsort(table.column("num_tokens").to_numpy(), kind="stable")
        for start in range(0, len(order), size):
            places = order[start : start + size]
            batch = self.task.collate(table.take(pa.array(places)))
            on_device = {key: tensor.to(self.device) for key, tensor in batch.items()}
            _, output = self.objective(on_device)
            yield from zip(places.tolist(), self.task.predictions(batch, output), strict=True)

    def _sizes(self, table: pa.Table) -> npt.NDArray[np.int64]:
        """Tokens of each row, and the unknown ones among them, [rows, 2]."""
        lengths = table.column("num_tokens").to_numpy().astype(np.int64)
        if self._unknown is None or "input_ids" not in table.column_names:
            return np.stack([lengths, np.zeros_like(lengths)], axis=1)
        ids = table.column("input_ids").combine_chunks().flatten().to_numpy()
        ids = ids.reshape(len(lengths), ids.size // max(1, len(lengths)))
        inside = np.arange(ids.shape[1]) < lengths[:, None]
        return np.stack([lengths, ((ids == self._unknown) & inside).sum(axis=1)], axis=1)

    def _rows(self, encoded: Encoded) -> pa.Table:
        manifest = self.trained.manifest
        table, rows = make_table(
            self.task, self.info, manifest.sequence_tokens, len(manifest.labels), encoded
        )
        lost = np.zeros(1) if encoded.num_lost is None else encoded.num_lost
        self.counts.num_cut += rows.num_truncated_documents + int((lost > 0).sum())
        return table


def _given(text: str, fields: Any) -> dict[str, Any]:
    """The fields of a record as they were read, without the bytes of files."""
    names = list(fields)
    if fields[names[0]].kind == "record" and len(names) == 1:
        record = json.loads(text)
        return record if isinstance(record, dict) else {names[0]: record}
    if fields[names[0]].kind in ("words", "names"):
        return {names[0]: text.split(SEPARATOR)}
    parts = text.split(SEPARATOR) if len(names) > 1 else [text]
    return {
        name: json.loads(part) if fields[name].kind == "record" else part
        for name, part in zip(names, parts, strict=True)
        if fields[name].kind != "bytes"
    }
