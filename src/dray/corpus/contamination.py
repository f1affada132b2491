"""Which training documents hold a part of an evaluation set: runs of words that both have (Brown et
al. 2020, appendix C).

The runs of the evaluation sets are 64-bit hashes in one sorted file of the corpus' work, which
every task that reads documents holds whole: 8 bytes for each word of the evaluation sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dray.corpus.cleaning import normalize
from dray.corpus.parts import Preparation, save_record, staged, write_arrays
from dray.corpus.reading import Span, SpanReader
from dray.corpus.shingles import Hashes, hash_runs
from dray.corpus.sources import InputFile, list_source
from dray.errors import CorpusError
from dray.spec import Cleaning, Source
from dray.storage.filesystem import make_folder, read_bytes, share_filesystem

CONTAMINATED = "sharing text with an evaluation set"
NGRAMS = "000000.hashes"


def evaluation_files(cleaning: Cleaning) -> list[tuple[Source, tuple[InputFile, ...]]]:
    """The evaluation sets of a spec with their files. Raises CorpusError."""
    settings = cleaning.decontaminate
    if settings is None:
        return []
    where = "data.cleaning.decontaminate.against"
    return [
        (source, list_source(source, f"{where}.{place}").files)
        for place, source in enumerate(settings.against)
    ]


def write_ngrams(job: Preparation, sets: Sequence[tuple[Source, Sequence[InputFile]]]) -> Any:
    """Write the runs of the evaluation sets, sorted. Returns how many texts there are, and how
    many of them are shorter than a run. Raises CorpusError for a text that cannot be read."""
    settings = job.cleaning.decontaminate
    if settings is None:
        raise ValueError("nothing to decontaminate against")
    found = [np.empty(0, np.uint64)]
    num_texts = num_short = 0
    for source, files in sets:
        for file in files:
            for texts in _texts(file, source, job.max_record_bytes):
                runs, counts = hash_runs(
                    normalize(texts, job.cleaning.normalize), settings.ngram_words
                )
                found = [np.unique(np.concatenate([*found, runs]))]
                num_texts += len(texts)
                num_short += int((counts <= 1).sum())
    filesystem, path = staged(job, "ngrams", NGRAMS)
    make_folder(filesystem, path.rpartition("/")[0])
    write_arrays(filesystem, path, found)
    return save_record(job, "ngrams", 0, {"texts": num_texts, "short_texts": num_short})


def _texts(file: InputFile, source: Source, max_bytes: int) -> Iterator[pa.Array]:
    for documents in SpanReader(Span(file), source, max_bytes).read():
        for bad in documents.bad:
            raise CorpusError(
                bad.file,
                f"{bad.reason} at {bad.offset}",
                "every text of an evaluation set is looked for",
                "mend the file",
            )
        yield documents.texts


def contaminated(job: Preparation, texts: pa.Array) -> npt.NDArray[np.bool_]:
    """[documents]: which share more runs with the evaluation sets than they may."""
    settings = job.cleaning.decontaminate
    if settings is None or not len(texts):
        return np.zeros(len(texts), bool)
    known = _known(job)
    runs, counts = hash_runs(texts, settings.ngram_words)
    shared = np.zeros(len(runs), bool)
    if len(known) and len(runs):
        places = np.minimum(np.searchsorted(known, runs), len(known) - 1)
        shared = known[places] == runs
    owners = np.repeat(np.arange(len(counts)), counts)
    found = np.bincount(owners[shared], minlength=len(counts))
    return np.asarray(found > settings.max_ngrams)


def _known(job: Preparation) -> Hashes:
    return _read(job.folder, staged(job, "ngrams", NGRAMS)[1])


@lru_cache(maxsize=2)
def _read(folder: str, path: str) -> Hashes:
    return np.frombuffer(read_bytes(share_filesystem(folder)[0], path), np.uint64)
