"""What a task takes from a sample of its training documents once, before any document is encoded:
the transforms of rows of numbers.

It is kept in the manifest, and a model that was trained by it takes it along: rows for another run
that starts from its weights, or that measure it, are never fitted anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from dray.corpus.manifest import EXPORTED_MANIFEST, Manifest, load_run_manifest
from dray.corpus.parts import Part, Preparation, staged
from dray.corpus.sampling import sample_texts
from dray.corpus.stages import Progress, run_task
from dray.errors import CorpusError, SpecError
from dray.models.source import find_folder
from dray.runs import Run
from dray.spec import Spec
from dray.storage.filesystem import exists, read_bytes, write_bytes

FIT_BYTES = 64 * 1024 * 1024
"""Documents that a task looks at."""
Fitted = Sequence[Mapping[str, Any]]


def find_fitted(spec: Spec, storage: str) -> Fitted:
    """What the model that a spec starts from was trained by; empty: nothing, or there is none.
    Raises SpecError, StoreError."""
    if not spec.task.fits or not spec.model.origin:
        return ()
    if spec.model.run is not None:
        return load_run_manifest(Run.open(storage, spec.model.run)).fitted
    path = Path(find_folder(str(spec.model.path))) / EXPORTED_MANIFEST
    if not path.exists():
        return ()
    try:
        return Manifest.model_validate_json(path.read_bytes()).fitted
    except ValueError as error:
        raise SpecError(
            "model.path", f"{path} is not what `dray export` writes", "rows are encoded by it"
        ) from error


def digest_of(fitted: Fitted) -> str:
    """A digest of what was fitted."""
    return hashlib.sha256(json.dumps(list(fitted), sort_keys=True).encode()).hexdigest()


def with_fitted(
    job: Preparation, parts: Sequence[Part], known: Fitted, say: Progress
) -> Preparation:
    """The work with a task that has what it is fitted by: what is known, or else what a Ray task
    takes from a sample."""
    if not job.task.fits:
        return job
    if not known:
        path = staged(job, "fitted.json")
        if not exists(*path):
            say("fitting transforms to a sample of the training documents")
            made = run_task(job, _fit_task, tuple(parts))
            write_bytes(*path, json.dumps(made).encode(), durable=False)
        known = json.loads(read_bytes(*path))
    return replace(job, task=job.task.fitted_by(tuple(known)))


def _fit_task(job: Preparation, parts: tuple[Part, ...]) -> list[Mapping[str, Any]]:
    texts = list(sample_texts(job, parts, FIT_BYTES))
    if not texts:
        raise CorpusError(
            job.sources[0].where,
            "has no training documents to look at",
            f"{job.task.name} fits transforms to some first",
            "give documents that are not gathered",
        )
    return list(job.task.fit(pa.array(texts, pa.large_string())))
