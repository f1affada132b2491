"""Which entries of feedback a run has learnt from, and at which steps: from the rows of its corpus,
the files that they came from, and the steps of its ledger's history."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dray.corpus.stream import read_rows
from dray.feedback import Dataset
from dray.release.explaining.tracing import trace
from dray.release.trained import open_trained
from dray.runs import Run


def find_learnt(run: Run, dataset: Dataset) -> Mapping[str, list[int]]:
    """The steps that have learnt each entry that the run's corpus has a row of, by the entry's id;
    entries that its snapshots had and that became no row, such as duplicates, have none. Empty for
    a run that has read nothing of the dataset. Raises UserError where its corpus is gone."""
    trained = open_trained(run.storage, run.name)
    split, first = trained.manifest.train, 0
    known = {snapshot.train: snapshot.train_ids for snapshot in dataset.snapshots()}
    read = {
        path: ids
        for path, ids in known.items()
        if any(path in source.paths for source in run.spec().data.train)
    }
    found: dict[str, list[int]] = {one: [] for ids in read.values() for one in ids}
    names = {path.rpartition("/")[2]: path for path in read}
    for source in split.sources:
        rows = np.arange(first, first + source.num_rows, dtype=np.int64)
        first += source.num_rows
        if source.name in names and len(rows):
            table = read_rows(trained.corpus, trained.manifest, split, rows)
            for row in trace(trained, run, table).values():
                for place in row.places:
                    if place.file in read:
                        found[read[place.file][place.document - 1]] += row.steps
    return {one: sorted(set(steps)) for one, steps in found.items()}
