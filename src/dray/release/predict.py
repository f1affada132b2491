"""Predictions for the records of files, in their order, beside what was read of them.

Records are read as the run's own source of their form is, targets aside; a text is normalised and
encoded as in training, and none is filtered or left out as a duplicate. What cannot be read has a
line of its own that says why.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from dray.corpus.chunks import Tools, as_array
from dray.corpus.cleaning import normalize
from dray.corpus.manifest import Manifest
from dray.corpus.packing import Aligned, Varying
from dray.corpus.prepare import list_inputs
from dray.corpus.reading import Span, SpanReader
from dray.corpus.records import BadRecord, Wanted
from dray.corpus.rows import pad_rows, row_values
from dray.corpus.shards import make_batch, stored_columns
from dray.corpus.tokenizing import TokenizerInfo
from dray.errors import SpecError, StoreError
from dray.processes.streams import make_json
from dray.release.evaluate import make_evaluation_spec, said_of_data
from dray.release.measuring import batch_rows
from dray.release.trained import Trained, Weights, load_trained
from dray.spec import TEXT_KINDS
from dray.tasks.rows import SEPARATOR, Encoded


@dataclass
class Counts:
    """What became of the records."""

    num_predicted: int = 0
    num_bad: int = 0
    num_cut: int = 0
    """Whose end a row had no room for."""


def predict(
    storage: str,
    name: str,
    data: Sequence[str],
    *,
    step: str | int | None = None,
    weights: Weights = "trained",
    counts: Counts | None = None,
) -> Iterator[dict[str, Any]]:
    """A mapping for each record: its fields, and `prediction` with what goes with it (`scores`);
    or `file`, `offset` and `error` for one that cannot be read.

    `data`: paths, or YAML mappings like a spec's data source. Raises StoreError as `load_trained`
    does, SpecError for a task without predictions, CorpusError for data that is not there.
    """
    counts = counts or Counts()
    trained = load_trained(storage, name, step, weights)
    _check_predicts(trained)
    with said_of_data():
        spec = make_evaluation_spec(trained.spec, data, trained.tokenizer_folder)
        inputs = list_inputs(spec)
    predictor = Predictor(trained, counts)
    for source, files in zip(inputs.sources, inputs.files, strict=True):
        for file in files:
            reader = SpanReader(
                Span(file), source.source, spec.data.max_record_bytes, predictor.fields
            )
            for documents in reader.read():
                told = {"file": file.name} if file.form == "files" else {}
                for record in predictor.records(documents.texts):
                    is_bad = "prediction" not in record and "error" in record
                    counts.num_bad += is_bad
                    counts.num_predicted += not is_bad
                    yield told | record
                for bad in documents.bad:
                    counts.num_bad += 1
                    yield {"file": bad.file, "offset": bad.offset, "error": bad.reason}


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


def _check_predicts(trained: Trained) -> Any:
    """The task of a run that predicts. Raises SpecError for another one."""
    task = trained.spec.task.on(trained.manifest, trained.spec.model.num_labels)
    if not task.predicts:
        way = "`dray generate` writes text" if task.generates else "`dray evaluate` measures it"
        where = f"run {trained.run.name!r}"
        raise SpecError(where, f"its task is {task.name}", "it predicts nothing", way)
    return task


class Predictor:
    """A model that predicts records, many at a time. Raises SpecError for a task without
    predictions."""

    def __init__(self, trained: Trained, counts: Counts | None = None) -> None:
        self.trained, self.counts = trained, counts or Counts()
        self.task = _check_predicts(trained)
        self.fields = {
            name: field for name, field in self.task.fields.items() if field.kind in TEXT_KINDS
        }
        """What a record consists of, targets aside."""
        self._wanted = Wanted(tuple((name, name, f.kind) for name, f in self.fields.items()))
        self.device = trained.move_to_device()
        self.objective = self.task.objective(trained.model).eval()
        self.info = _tokenizer_info(trained)
        self.tools = Tools(trained.tokenizer_folder, self.info, trained.manifest.sequence_tokens)

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
        told = self.records(pa.array(texts.values(), pa.large_string()))
        for place, record in zip(texts, told, strict=True):
            found[place] = {key: record[key] for key in record if key not in self.fields}
        return found

    def records(self, texts: pa.Array) -> Iterator[dict[str, Any]]:
        """Predictions of a block of texts, in their order."""
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
                yield {**given, "error": encoded.refused[place]}
                continue
            untold = {"untold": encoded.untold[place]} if place in encoded.untold else {}
            yield {**given, **self.task.join_predictions(values, given, **untold)}

    @torch.no_grad()
    def _predict(self, encoded: Encoded) -> Iterator[tuple[int, Any]]:
        """The place and the prediction of each document, those of like length together."""
        manifest = self.trained.manifest
        table = self._rows(encoded)
        width = manifest.sequence_tokens
        outputs = self.task.num_labels * (width if self.task.head.each == "token" else 1)
        size = batch_rows(width, outputs)
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


def _tokenizer_info(trained: Trained) -> TokenizerInfo:
    manifest: Manifest = trained.manifest
    dress = trained.dress
    return TokenizerInfo(
        manifest.vocab_size,
        manifest.pad_token_id,
        manifest.eos_token_id,
        "transformers" if manifest.encoder == "transformers" else "tokenizers",
        dress.prefix,
        dress.suffix,
        manifest.middle,
        manifest.mask_token_id,
    )


def _given(text: str, fields: Any) -> dict[str, Any]:
    """The fields of a record as they were read, without the bytes of files."""
    names = list(fields)
    if fields[names[0]].kind == "words":
        return {names[0]: text.split(SEPARATOR)}
    parts = text.split(SEPARATOR) if len(names) > 1 else [text]
    given = zip(names, parts, strict=True)
    return {name: part for name, part in given if fields[name].kind != "bytes"}
