"""The first records of the data that an explanation is of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa

from dray.corpus.prepare import list_inputs
from dray.corpus.reading import Span, SpanReader
from dray.errors import SpecError
from dray.release.evaluate import make_evaluation_spec, said_of_data
from dray.release.predict import Predictor
from dray.release.trained import Trained


def read_first(
    trained: Trained,
    predictor: Predictor,
    data: Sequence[str],
    number: int,
    say: Callable[[str], None],
) -> pa.Array:
    """The texts of the first so many records. Raises SpecError where there is none."""
    texts, problems = _read(trained, predictor, data, number)
    if problems:
        say(f"{problems} records cannot be read, and are left out")
    if not len(texts):
        raise SpecError("--data", "has no record that can be read", "an explanation is of one")
    return texts


def _read(
    trained: Trained, predictor: Predictor, data: Sequence[str], number: int
) -> tuple[pa.Array, int]:
    """The texts of the first records, and how many among them cannot be read."""
    with said_of_data():
        spec = make_evaluation_spec(trained.spec, data, trained.tokenizer_folder)
        inputs = list_inputs(spec)
    found: list[pa.Array] = []
    num_bad = 0
    for source, files in zip(inputs.sources, inputs.files, strict=True):
        if source.source.gather is not None:
            raise SpecError("gather of --data", "documents of several records are not explained")
        for file in files:
            limit = spec.data.max_record_bytes
            for documents in SpanReader(Span(file), source.source, limit, predictor.fields).read():
                found.append(documents.texts[: number - sum(map(len, found))])
                num_bad += len(documents.bad)
                if sum(map(len, found)) >= number:
                    return pa.concat_arrays(found), num_bad
    return pa.concat_arrays(found or [pa.array([], pa.large_string())]), num_bad
