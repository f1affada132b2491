"""Training rows as augmentation has them: some are encoded anew from other words, of some the
tokens to hide are named.

It is done where rows are read, in Ray Data's tasks, and goes by the seed, the epoch and the row
alone: whoever reads a row, on however many workers and after however many restarts, reads the same.
"""

from __future__ import annotations

import copy
import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs as pafs

from dray.corpus.augmenting import Augmenter, Draw
from dray.corpus.encoded import (
    GIVEN_TARGET,
    GIVEN_TEXT,
    NOT_ENCODED,
    PARAPHRASE,
    check_encoded,
)
from dray.corpus.manifest import Manifest
from dray.corpus.tables import make_table, take_rows
from dray.corpus.thesaurus import Synonyms
from dray.corpus.tools import Tools, tokenizer_of
from dray.errors import CorpusError
from dray.order import Ints
from dray.spec import TEXT_CHANGES, TEXT_KINDS, Augmentation, Spec
from dray.storage.filesystem import (
    child,
    open_filesystem,
    read_bytes,
    share_filesystem,
    shown,
    write_bytes,
)
from dray.tasks import Task
from dray.tasks.rows import HIDDEN, SEPARATOR

THESAURUS = "thesaurus.tsv"
"""The file of a corpus that has its synonyms."""
KEPT = (GIVEN_TEXT.name, GIVEN_TARGET.name, PARAPHRASE.name)
"""Columns of rows that no batch has."""


def keeping_texts(task: Task, settings: Augmentation | None) -> Task:
    """The task as its corpus is prepared for augmentation: with the columns that it goes by, and a
    mask token where tokens are hidden."""
    if settings is None:
        return task
    kept = copy.copy(task)
    more = [GIVEN_TEXT, GIVEN_TARGET] if settings.changes_texts else []
    more += [PARAPHRASE] if settings.back_translation else []
    kept.columns = (*task.columns, *more)
    kept.masks = task.masks or settings.hides_tokens
    return kept


def kept_settings(spec: Spec, translators: Any) -> dict[str, Any]:
    """What of augmentation decides over a corpus: a part of its key. How often rows are changed,
    and how much, is none of it."""
    settings = spec.augmentation
    if settings is None:
        return {}
    found: dict[str, Any] = {"texts": settings.changes_texts, "masks": settings.hides_tokens}
    if settings.thesaurus is not None:
        content = read_thesaurus(settings.thesaurus)
        found["thesaurus"] = hashlib.sha256(content).hexdigest()
    if translators is not None:
        found["translators"] = translators.digest
    return found


def read_thesaurus(place: str) -> bytes:
    """The file of a thesaurus. Raises CorpusError, StoreError."""
    filesystem, path = open_filesystem(place)
    try:
        return read_bytes(filesystem, path)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise CorpusError(
            "augmentation.thesaurus",
            f"{shown(place)} is no file",
            "synonyms are read from one",
            "Debian's mythes-en-us installs /usr/share/mythes/th_en_US_v2.dat",
        ) from error


def write_thesaurus(spec: Spec, filesystem: pafs.FileSystem, folder: str) -> None:
    """Put the synonyms that a spec names into its corpus, where it names some. Raises CorpusError
    for a file that has none."""
    place = spec.augmentation and spec.augmentation.thesaurus
    if place:
        content = Synonyms.read(place, read_thesaurus(place)).dump()
        write_bytes(filesystem, f"{folder}/{THESAURUS}", content)


@dataclass(frozen=True)
class Change:
    """What becomes of one row."""

    place: int
    kind: str
    draw: Draw


@dataclass(frozen=True)
class Rewriter:
    """How the training rows of a corpus are read."""

    settings: Augmentation
    task: Task
    """On the corpus."""
    seed: int

    @property
    def is_of_words(self) -> bool:
        """Whether a text is a list of words, of which each has its place."""
        return any(field.kind == "words" for field in self.task.fields.values())

    def rewrite(self, rows: pa.Table, epochs: Ints, folder: str, manifest: Manifest) -> pa.Table:
        """Rows as they are learnt from: the same columns without those that are kept for this, and
        HIDDEN where tokens are hidden. `epochs`: of each row."""
        changes = self.changes(rows.column("row_id").to_numpy(), epochs)
        reworded = {
            change.place: text
            for change in changes
            if change.kind in TEXT_CHANGES
            and (text := self.reword(change, rows, folder)) != own_text(rows, change.place)
        }
        found = _without_texts(rows)
        if reworded:
            found = self._encoded_anew(rows, found, reworded, folder, manifest)
        if self.settings.hides_tokens:
            hiding = [change for change in changes if change.kind not in TEXT_CHANGES]
            found = found.append_column(HIDDEN, self._hidden(found, hiding, manifest))
        return found

    def leave(self, rows: pa.Table) -> pa.Table:
        """Rows that are validated, with the columns that training rows have."""
        found = _without_texts(rows)
        if self.settings.hides_tokens:
            found = found.append_column(HIDDEN, _lists([[]] * rows.num_rows))
        return found

    def changes(self, row_ids: Ints, epochs: Ints) -> list[Change]:
        """Which rows are changed, and by which kind. Padding has a row id below 0, and is not."""
        kinds, found = self.settings.kinds, []
        for place, (row, epoch) in enumerate(zip(row_ids.tolist(), epochs.tolist(), strict=True)):
            if row < 0:
                continue
            draw = draw_for(self.seed, epoch, row)
            if draw.random() < self.settings.share:
                found.append(Change(place, kinds[draw.integers(len(kinds))], draw))
        return found

    def reword(self, change: Change, rows: pa.Table, folder: str) -> str:
        """The text of a row by one kind; as it was where that changes nothing."""
        text = own_text(rows, change.place)
        if change.kind == "back_translation":
            return text_at(rows, PARAPHRASE.name, change.place) or text
        synonyms = load_thesaurus(folder) if self.settings.thesaurus else Synonyms({})
        augmenter = Augmenter(self.settings.strength, synonyms)
        if self.is_of_words:
            return augmenter.change(change.kind, text, change.draw)
        parts = text.split(SEPARATOR)  # of a pair each by itself: no word goes from one to another
        return SEPARATOR.join(augmenter.change(change.kind, part, change.draw) for part in parts)

    def _encoded_anew(
        self,
        rows: pa.Table,
        found: pa.Table,
        reworded: Mapping[int, str],
        folder: str,
        manifest: Manifest,
    ) -> pa.Table:
        """The rows with those whose texts are given by place made of these; one that would become
        none, or several, stays."""
        targets = [text_at(rows, GIVEN_TARGET.name, place) for place in reworded]
        others, which = encode_again(self.task, folder, manifest, [*reworded.values()], targets)
        places = np.array([*reworded], np.int64)[which]
        own = found.take(pa.array(places))
        fresh = {"input_ids", "num_tokens", *_encoded_columns(self.task)}
        made = pa.table(
            {name: (others if name in fresh else own).column(name) for name in found.column_names}
        )
        taken = np.arange(found.num_rows)
        taken[places] = found.num_rows + np.arange(len(places))
        return take_rows(pa.concat_tables([found, made.cast(found.schema)]), taken)

    def _hidden(self, rows: pa.Table, changes: Sequence[Change], manifest: Manifest) -> pa.Array:
        """The places of the tokens to hide of each row: of none that stand around texts."""
        spared = {*(manifest.prefix or ()), *manifest.middle, *(manifest.suffix or ())}
        found: list[list[int]] = [[] for _ in range(rows.num_rows)]
        ids, sizes = rows.column("input_ids"), rows.column("num_tokens").to_numpy()
        for change in changes:
            own = ids[change.place].as_py()[: sizes[change.place]]
            open_to = [place for place, token in enumerate(own) if token not in spared]
            found[change.place] = places_to_hide(
                open_to, self.settings.strength, change.kind, change.draw
            )
        return _lists(found)


def _encoded_columns(task: Task) -> list[str]:
    """The columns that a task's `encode` gives."""
    return [
        column.name for column in task.columns if column.name not in NOT_ENCODED and not column.told
    ]


def places_to_hide(places: Sequence[int], share: float, kind: str, draw: Draw) -> list[int]:
    """A share of places, at least one if there are any: single ones (token cutoff: Shen et al.,
    2020), or as many in a row (a span)."""
    number = min(len(places), max(1, round(share * len(places))))
    if not number:
        return []
    if kind == "token_cutoff":
        chosen = np.sort(draw.choice(len(places), number, replace=False)).tolist()
    else:
        start = int(draw.integers(len(places) - number + 1))
        chosen = range(start, start + number)
    return [places[number] for number in chosen]


def draw_for(seed: int, epoch: int, row: int) -> Draw:
    """What a row's change is drawn by in an epoch."""
    digest = hashlib.blake2b(struct.pack("<3Q", seed, epoch, row), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def _lists(places: Sequence[Sequence[int]]) -> pa.Array:
    return pa.array(places, pa.large_list(pa.int32()))


def _without_texts(rows: pa.Table) -> pa.Table:
    """Rows without the columns that are kept for augmentation alone."""
    there = [name for name in KEPT if name in rows.column_names]
    return rows.drop_columns(there) if there else rows


def text_at(rows: pa.Table, name: str, place: int) -> str:
    """What a column of bytes has for a row, as text."""
    values = rows.column(name)[place].values
    return "" if values is None else bytes(values.to_numpy().tobytes()).decode()


def own_text(rows: pa.Table, place: int) -> str:
    """The text that a row was made of; empty where its document became several rows."""
    return text_at(rows, GIVEN_TEXT.name, place)


def encode_again(
    task: Task, folder: str, manifest: Manifest, texts: Sequence[str], targets: Sequence[str]
) -> tuple[pa.Table, Ints]:
    """Documents as rows of a corpus, by its tokeniser and classes; and the place among the texts of
    each row. One that becomes no row, or several, has none."""
    info = tokenizer_of(manifest)
    folder = child(folder, "tokenizer")
    tools = Tools(folder, info, manifest.sequence_tokens, manifest.labels)
    targeted = any(field.kind not in TEXT_KINDS for field in task.fields.values())
    encoded = task.encode(
        pa.array(texts, pa.large_string()),
        pa.array(targets, pa.string()) if targeted else None,
        tools,
    )
    checked = check_encoded(
        task, encoded, len(texts), vocab_size=info.vocab_size, num_names=len(manifest.labels)
    )
    table, _ = make_table(task, info, manifest.sequence_tokens, len(manifest.labels), checked)
    if checked.records is None:
        return table, np.arange(len(texts))
    alone = np.flatnonzero(np.bincount(checked.records)[checked.records] == 1)
    return take_rows(table, alone), checked.records[alone]


@lru_cache(maxsize=2)
def load_thesaurus(folder: str) -> Synonyms:
    """That of a corpus, once a process."""
    filesystem, path = share_filesystem(folder)
    return Synonyms.load(read_bytes(filesystem, f"{path}/{THESAURUS}"))
