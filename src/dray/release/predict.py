"""Predictions for the records of files, in their order, beside what was read of them.

Records are read as the run's own source of their form is, targets aside; a text is normalised and
encoded as in training, and none is filtered or left out as a duplicate. What cannot be read has a
line of its own that says why.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from dray.corpus.chunks import as_array
from dray.corpus.cleaning import normalize
from dray.corpus.packing import Aligned, Varying
from dray.corpus.parts import CorpusSource
from dray.corpus.prepare import list_inputs
from dray.corpus.reading import Bad, Span, SpanReader
from dray.corpus.records import BadRecord, Wanted
from dray.corpus.rows import pad_rows, row_values
from dray.corpus.scattering import gather_here
from dray.corpus.shards import make_batch, stored_columns
from dray.corpus.sources import InputFile
from dray.corpus.tokenizing import token_names
from dray.errors import SpecError, StoreError
from dray.processes.streams import make_json
from dray.release.evaluate import make_evaluation_spec, said_of_data
from dray.release.measuring import rows_at_once
from dray.release.trained import Chosen, Trained, Weights, load_trained
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
                told = {"file": file.name} if file.form == "files" else {}
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


def write_records(records: Iterator[dict[str, Any]], path: str) -> None:
    """Write records as lines of JSON into a new file; it is there once it is whole. Raises
    StoreError if it exists or cannot be written."""
    if os.path.lexists(path):
        raise StoreError(path, "is there already", "predictions go to a new file", "name another")
    partial = f"{path}.partial"
    try:
        with open(partial, "w", encoding="utf-8") as file:
            for record in records:
                file.write(make_json(record) + "\n")
        os.rename(partial, path)
    except OSError as error:
        raise StoreError(path, f"cannot be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):
            os.remove(partial)


class Predictor:
    """A model that predicts records, many at a time. Raises SpecError for a task without
    predictions."""

    def __init__(self, trained: Trained, counts: Counts | None = None) -> None:
        task = trained.task
        if not task.predicts:
            way = "`dray generate` writes text" if task.generates else "`dray evaluate` measures it"
            where = f"run {trained.run.name!r}"
            raise SpecError(where, f"its task is {task.name}", "it predicts nothing", way)
        self.trained, self.counts = trained, counts or Counts()
        self.task = task.predicting()
        self.fields = self.task.asked
        """What a record consists of, targets aside."""
        self._wanted = Wanted(
            tuple(
                (name, WHOLE if field.kind == "record" else name, field.kind)
                for name, field in self.fields.items()
            )
        )
        self.device = trained.move_to_device()
        self.objective = self.task.objective(trained.model).eval()
        self.info, self.tools = trained.tokenizer, trained.tools
        if self.task.tells_tokens:
            self.task.token_names = token_names(trained.tokenizer_folder)

    def predict(self, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Predictions of values by field, in their order, without the fields; `error` in the place
        of one that is no such record."""
        found: list[dict[str, Any]] = [{} for _ in records]
        texts: dict[int, str] = {}
        for place, record in enumerate(records):
            try:
                texts[place] = self._wanted.read(record)[0]
            except KeyError as error:
                found[place] = {"error": f"no {error}"}
            except BadRecord as error:
                found[place] = {"error": str(error)}
        told = self._told(pa.array(texts.values(), pa.large_string()))
        for place, (_, prediction) in zip(texts, told, strict=True):
            found[place] = prediction
        return found

    def records(self, texts: pa.Array) -> Iterator[dict[str, Any]]:
        """Predictions of a block of texts, in their order."""
        for given, prediction in self._told(texts):
            yield {**given, **prediction}

    def _told(self, texts: pa.Array) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """The fields of each text and what is told of it, in their order."""
        if not len(texts):
            return
        normal = normalize(texts, self.trained.spec.data.cleaning.normalize)
        encoded = self.task.encode(normal, None, self.tools)
        records = np.arange(len(texts)) if encoded.records is None else encoded.records
        found: list[list[Any]] = [[] for _ in range(len(texts))]
        for place, prediction in self._predict(encoded):
            found[int(records[place])].append((place, prediction))
        for place, (text, pieces) in enumerate(zip(texts.to_pylist(), found, strict=True)):
            values = [prediction for _, prediction in sorted(pieces, key=lambda item: item[0])]
            given = _given(text, self.fields)
            if place in encoded.refused:
                yield given, {"error": encoded.refused[place]}
                continue
            untold = {"untold": encoded.untold[place]} if place in encoded.untold else {}
            yield given, self.task.join_predictions(values, given, **untold)

    @torch.no_grad()
    def _predict(self, encoded: Encoded) -> Iterator[tuple[int, Any]]:
        """The place and the prediction of each document, those of like length together."""
        table = self._rows(encoded)
        size = rows_at_once(self.trained, self.task)
        order = np.argsort(table.column("num_tokens").to_numpy(), kind="stable")
        for start in range(0, len(order), size):
            places = order[start : start + size]
            batch = self.task.collate(table.take(pa.array(places)))
            on_device = {key: tensor.to(self.device) for key, tensor in batch.items()}
            _, output = self.objective(on_device)
            yield from zip(places.tolist(), self.task.predictions(batch, output), strict=True)

    def _rows(self, encoded: Encoded) -> pa.Table:
        manifest, task = self.trained.manifest, self.task
        aligned: Aligned = {
            column.name: (np.asarray(encoded.columns[column.name]), column.pad)
            for column in task.columns
            if column.each == "token"
        }
        width = manifest.sequence_tokens
        rows = pad_rows(task, self.info, width, encoded.tokens, encoded.lengths, aligned)
        lost = np.zeros(1) if encoded.num_lost is None else encoded.num_lost
        self.counts.num_cut += rows.num_truncated_documents + int((lost > 0).sum())
        columns = stored_columns(
            task, manifest.sequence_tokens, self.info.dtype, len(manifest.labels)
        )
        values: dict[str, Any] = {
            "input_ids": rows.tokens,
            "num_tokens": rows.num_tokens,
            **rows.aligned,
        }
        for column in task.columns:
            if column.each == "row" and column.name in encoded.columns:
                values[column.name] = row_values(column, as_array(encoded.columns[column.name]))
        for stored in columns:
            if stored.name in values:
                continue
            if stored.varies:  # a target of no length
                empty = np.zeros(0, stored.dtype), np.zeros(len(rows.tokens), np.int64)
                values[stored.name] = Varying(*empty)
            else:  # a target, or a place in a corpus
                values[stored.name] = np.zeros((len(rows.tokens), *stored.shape), stored.dtype)
        return pa.Table.from_batches([make_batch(columns, values)])


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
