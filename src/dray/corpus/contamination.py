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
from dray.corpus.reading import Bad, Span, SpanReader
from dray.corpus.shingles import Hashes, hash_runs, hash_words
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
    found: list[Hashes] = []
    num_texts = num_short = 0
    for source, files in sets:
        for file in files:
            for given in _texts(file, source, job.max_record_bytes):
                texts = normalize(given, job.cleaning.normalize)
                found.append(np.unique(hash_runs(texts, settings.ngram_words)[0]))
                num_texts += len(texts)
                num_short += int((hash_words(texts)[1] < settings.ngram_words).sum())
    if not any(map(len, found)):
        raise CorpusError(
            "data.cleaning.decontaminate.against",
            f"{sets[0][0].paths[0]} holds no words" if len(sets) == 1 else "its sets hold no words",
            "training documents are compared with texts",
            "check the path and the column",
        )
    filesystem, path = staged(job, "ngrams", NGRAMS)
    make_folder(filesystem, path.rpartition("/")[0])
    write_arrays(filesystem, path, [np.unique(np.concatenate(found))])
    return save_record(job, "ngrams", 0, {"texts": num_texts, "short_texts": num_short})


def _texts(file: InputFile, source: Source, max_bytes: int) -> Iterator[pa.Array]:
    bad: list[Bad] = []
    for documents in SpanReader(Span(file), source, max_bytes).read():
        bad += documents.bad[:1]
        yield documents.texts
    if bad:  # after the last one, since a column that no record has is told there
        raise CorpusError(
            bad[0].file,
            f"{bad[0].reason} at {bad[0].offset}",
            "every text of an evaluation set is looked for",
            "mend the file",
        )


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
