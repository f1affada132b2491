"""Names of persons in a text, as a spaCy pipeline tells them: the one kind of personal data that
has no form.

The pipeline is a folder on this machine; nothing is downloaded, and its package is not run. What a
model takes for a name depends on what stands around it: it misses names, and finds some that are
none.
"""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from typing import Any

from dray.corpus.identifiers import Find
from dray.errors import SpecError, one_line, translated

_PERSON = frozenset(("PERSON", "PER"))
"""As pipelines of English, and those of most other languages, call a person."""
_UNNEEDED = ("tagger", "parser", "lemmatizer", "attribute_ruler", "morphologizer", "senter")
_MOST = 100_000
"""Characters that a pipeline is given at once; its memory grows with them."""


def find_names(folder: str, text: str) -> list[Find]:
    """The persons that the pipeline of a folder names. Raises SpecError for one that cannot be
    loaded."""
    if not text.strip():
        return []
    pipeline = _load(folder)
    return [
        Find(first + entity.start_char, first + entity.end_char, "name", entity.text.casefold())
        for first in range(0, len(text), _MOST)
        for entity in pipeline(text[first : first + _MOST]).ents
        if entity.label_ in _PERSON
    ]


@lru_cache(maxsize=2)
def _load(folder: str) -> Any:
    def explain(error: Exception) -> SpecError:
        return SpecError(
            f"names: {folder}",
            f"cannot be loaded ({one_line(error)[:200]})",
            "it is a spaCy pipeline of the installed version",
            "`python -m spacy validate` says which fit",
        )

    with translated(explain):
        import spacy

        pipeline = spacy.load(folder, exclude=[*_UNNEEDED])
    if not {"ner", "entity_ruler"} & {*pipeline.pipe_names}:
        raise SpecError(
            f"names: {folder}", "tells no names", "a pipeline with `ner` does", "name another one"
        )
    return pipeline


def digest_folder(folder: str) -> str:
    """SHA-256 of what a folder holds, by the names of its files."""
    whole = hashlib.sha256()
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(files):
            path = os.path.join(place, name)
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            whole.update(f"{os.path.relpath(path, folder)} {content}\n".encode())
    return whole.hexdigest()
