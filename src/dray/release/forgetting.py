"""Where a document went: which corpora hold rows of it, which runs have learnt from these and at
which steps, which checkpoints have seen it, and which runs began with the weights of such.

A corpus keeps no documents, so the document is encoded by each corpus' own tokeniser and looked for
in its rows; the steps are those of the ledger's history. A document is found as it is, with the
same normalised text: one that says nearly the same is another. Refuses documents without text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dray.corpus.cleaning import digest_of, normalize
from dray.corpus.documents import edited
from dray.corpus.examples import IS_LIKE
from dray.corpus.manifest import MANIFEST, Manifest, Split, load_examples, load_run_manifest
from dray.corpus.prepare import list_inputs
from dray.corpus.reading import Span, SpanReader
from dray.corpus.stream import read_rows
from dray.corpus.tools import Tools, tokenizer_of
from dray.errors import CorpusError, SpecError, StoreError, UserError, caught
from dray.ledger import find_steps
from dray.runs import Run, list_runs
from dray.runs.layout import CORPORA
from dray.spec import Spec
from dray.storage.filesystem import (
    absolute,
    child,
    exists,
    list_folders,
    open_filesystem,
    shown,
)

ANCHOR_TOKENS = 16
"""Of the pieces of a document that packed rows are searched for."""
LEAST_SHARE = 0.5
"""Of its tokens that must be found in packed rows: of what the ends of rows cut off a piece that is
shorter than an anchor is not."""
ROWS_AT_ONCE = 4096
LEAST_EXAMPLE = 200
"""Characters by which an example is taken for the beginning of a document."""
Tokens = npt.NDArray[np.uint64]
_BASE = np.uint64(1_099_511_628_211)


@dataclass
class Held:
    """Rows of a corpus that hold the document, or a part of it."""

    corpus: str
    """Its key."""
    train_rows: list[int] = field(default_factory=list)
    validation_rows: list[int] = field(default_factory=list)
    is_example: bool = False
    """Whether its beginning is among the examples of what was kept and left out."""

    @property
    def is_any(self) -> bool:
        return bool(self.train_rows or self.validation_rows or self.is_example)


@dataclass
class Learnt:
    """What a run has to do with the document."""

    run: str
    corpus: str
    rows: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    """That learnt from them, those of the history that leads to the newest sound checkpoint."""
    seen: list[int] = field(default_factory=list)
    """Steps of the checkpoints whose weights have seen it."""
    clean: list[int] = field(default_factory=list)
    """Steps of those that have not."""
    inherits: str = ""
    """The run, or its checkpoint, whose weights have seen it and which this one began with."""
    unknown: str = ""
    """Why nothing can be told of it."""

    @property
    def has_seen(self) -> bool:
        return bool(self.steps or self.inherits)


@dataclass
class Trail:
    """Where the document went."""

    digest: str
    corpora: list[Held] = field(default_factory=list)
    runs: list[Learnt] = field(default_factory=list)
    num_corpora: int = 0
    """That were looked through."""
    num_runs: int = 0
    other_corpora: list[str] = field(default_factory=list)
    """Keys of those that no run was trained on, which are not."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def find_document(storage: str, text: str) -> Trail:
    """Look for a document in the corpora of all runs of a storage, those of sweeps among them, and
    in what these have learnt. Raises SpecError for one without text, StoreError for a storage that
    is not there or cannot be read."""
    if not text.strip():
        raise SpecError("dray forget", "the document has no text", "it is found by its text")
    runs = _runs_of(storage)
    found: Trail | None = None
    known: dict[str, Held | str] = {}
    learnt: list[Learnt] = []
    for run in runs:
        one, held = _look_at(run, text, known)
        learnt.append(one)
        if held is not None and found is None:
            form = run.spec().data.cleaning.normalize
            found = Trail(digest_of(_normal(text, form)))
    found = found or Trail(digest_of(_normal(text, "NFC")))
    found.corpora = [held for held in known.values() if isinstance(held, Held) and held.is_any]
    found.num_runs = len(runs)
    found.num_corpora = sum(isinstance(held, Held) for held in known.values())
    filesystem, path = open_filesystem(storage)
    corpora = list_folders(filesystem, f"{path}/{CORPORA}")
    found.other_corpora = sorted(
        name
        for name in {*corpora} - {*known}
        if exists(filesystem, f"{path}/{CORPORA}/{name}/{MANIFEST}")
    )
    _inherit(storage, learnt)
    found.runs = [one for one in learnt if one.has_seen or one.rows or one.unknown]
    return found


def find_text(storage: str, digest: str) -> str:
    """The document of a digest, from the raw files of the storage's runs. Raises CorpusError where
    none of those that are still there has it, StoreError for a storage that is not there."""
    looked: set[str] = set()
    for run in _runs_of(storage):
        inputs, _ = caught(partial(list_inputs, run.spec()))
        for source, files in zip(inputs.sources, inputs.files, strict=True) if inputs else ():
            for file in files:
                if file.name in looked or source.source.gather is not None:
                    continue
                looked.add(file.name)
                for text in _texts(run.spec(), source.source, Span(file)):
                    if digest_of(text) == digest:
                        return text
    raise CorpusError(
        f"digest {digest}",
        f"is of no document of {len(looked)} raw files",
        "a corpus keeps digests of no documents: it is looked for in the files",
        "give the document itself: --text FILE",
    )


def _runs_of(storage: str) -> list[Run]:
    """All of a storage. Raises StoreError where there is none: that nothing is found in it says
    nothing of a document."""
    runs = list_runs(storage, trials=True)
    filesystem, path = open_filesystem(storage)
    if not exists(filesystem, path):
        raise StoreError(
            shown(absolute(storage)),
            "is not there",
            "it is the folder of runs",
            "name it: --storage",
        )
    return runs


def _texts(spec: Spec, source: Any, span: Span) -> Iterator[str]:
    reader = SpanReader(span, source, spec.data.max_record_bytes, spec.task.fields)
    for documents in reader.read():
        yield from normalize(documents.texts, spec.data.cleaning.normalize).to_pylist()


def _normal(text: str, form: str) -> str:
    (found,) = normalize(pa.array([text], pa.large_string()), form).to_pylist()
    return str(found)


# --- a run ---------------------------------------------------------------------------------------


def _look_at(run: Run, text: str, known: dict[str, Held | str]) -> tuple[Learnt, Held | None]:
    """What a run has learnt of a document, and what of it its corpus holds."""
    one = Learnt(run.name, "")
    if run.compressed() is not None:
        return one, None
    try:
        manifest = load_run_manifest(run)
        one.corpus = manifest.key
        if manifest.key not in known:
            known[manifest.key] = _hold(run, manifest, text)
        held = known[manifest.key]
        if isinstance(held, str):
            one.unknown = held
            return one, None
        one.rows = held.train_rows
        if one.rows:
            steps = find_steps(run, one.rows)
            one.steps = sorted({step for own in steps.values() for step in own})
    except UserError as error:
        one.unknown = str(error)
        return one, None
    _part(one, run)
    return one, held if held.is_any else None


def _part(one: Learnt, run: Run) -> None:
    """Which checkpoints have seen it, and which have not."""
    first = one.steps[0] if one.steps else None
    one.seen, one.clean = [], []
    for info in run.checkpoints():
        saw = first is not None and info.step >= first
        (one.seen if saw or one.inherits else one.clean).append(info.step)


def _inherit(storage: str, learnt: Sequence[Learnt]) -> None:
    """Follow weights from run to run: whoever begins with those that have seen it, has."""
    by_name = {one.run: one for one in learnt}
    changed = True
    while changed:
        changed = False
        for one in learnt:
            if one.inherits:
                continue
            run = Run.open(storage, one.run)
            for parent, step in _parents(run):
                other = by_name.get(parent)
                if other is None or not other.has_seen:
                    continue
                before = other.inherits or (
                    other.steps and (step is None or step >= other.steps[0])
                )
                if before:
                    one.inherits = parent if step is None else f"{parent}@{step}"
                    _part(one, run)
                    changed = True
                    break


def _parents(run: Run) -> Iterator[tuple[str, int | None]]:
    """The runs, each with its step where it is known, whose weights went into a run's: those that
    it began with, of which it is a fork, a compressed one or a mean, or that taught it."""
    spec = run.spec()
    kept = (run.model() or {}).get("pretrained") or {}
    if "run" in kept:
        yield str(kept["run"]), int(kept["step"])
    origin = run.origin()
    if origin is not None and "run" in origin:
        yield str(origin["run"]), int(origin["step"])
    made: Mapping[str, Any] = run.compressed() or {}
    if "run" in made:
        yield str(made["run"]), int(made["step"])
    for parent in made.get("parents", ()):
        yield str(parent["run"]), int(parent["step"])
    if spec.distil is not None:
        yield spec.distil.run, None


# --- a corpus ------------------------------------------------------------------------------------


def _hold(run: Run, manifest: Manifest, text: str) -> Held | str:
    """The rows of a run's corpus that hold the document; or why that cannot be told."""
    spec = run.spec()
    if not spec.task.tokenizes:
        return f"its rows are not texts ({spec.task.name})"
    filesystem, path = open_filesystem(run.corpus) if run.corpus else (None, "")
    if filesystem is None or not exists(filesystem, path):
        return "its corpus is gone"
    folder = child(run.corpus_copy, "tokenizer")
    info = tokenizer_of(manifest)
    tools = Tools(folder, info, manifest.sequence_tokens, manifest.labels)
    normal = _normal(text, spec.data.cleaning.normalize)
    forms = {
        edited(spec, source, pa.array([text], pa.large_string()))[0][0].as_py()
        for source in spec.data.train
    }
    held = Held(manifest.key, is_example=_is_example(filesystem, path, {normal, *forms}))
    for form in sorted(forms):
        _find_form(run, manifest, form, tools, held)
    return held


def _is_example(filesystem: Any, path: str, forms: Set[str]) -> bool:
    """Whether an example is one of some forms of a document, or its beginning."""
    shown = (text for texts in load_examples(filesystem, path).values() for text in texts)
    pieces = {piece for text in shown for piece in text.split(IS_LIKE)}
    return any(
        form == piece or (len(piece) >= LEAST_EXAMPLE and form.startswith(piece))
        for piece in pieces
        for form in forms
    )


def _find_form(run: Run, manifest: Manifest, text: str, tools: Tools, held: Held) -> None:
    """Add the rows with a document that reads so in the corpus."""
    ids, _ = tools.encode(pa.array([text], pa.large_string()))
    if not len(ids):
        return
    packed = bool(run.spec().task.packs)
    for split, rows in (
        (manifest.train, held.train_rows), (manifest.validation, held.validation_rows)
    ):  # fmt: skip
        if split is not None:
            found = _find_rows(run.corpus, manifest, split, ids, tools, packed=packed)
            rows[:] = sorted({*rows, *found})


def _find_rows(
    folder: str, manifest: Manifest, split: Split, ids: Any, tools: Tools, *, packed: bool
) -> list[int]:
    """Rows of a split with the document: of one document each, those that are it or its beginning;
    of packed ones, those with pieces of it, where enough of it is in them together."""
    room = manifest.sequence_tokens - len(tools.prefix) - len(tools.suffix)
    whole = np.asarray(ids, np.uint64)[: None if packed else room]
    width = min(ANCHOR_TOKENS, len(whole)) if packed else len(whole)
    starts = np.unique(np.append(np.arange(0, len(whole) - width + 1, width), len(whole) - width))
    anchors = {
        int(_hashes(whole[start : start + width][None], width)[0, 0]): int(start)
        for start in starts
    }
    wanted = np.array(sorted(anchors), np.uint64)
    around = np.array(sorted({*tools.prefix, *tools.suffix}), np.uint64)
    found: set[int] = set()
    met = np.zeros(len(whole), bool)
    for first in range(0, split.num_rows, ROWS_AT_ONCE):
        rows = np.arange(first, min(first + ROWS_AT_ONCE, split.num_rows), dtype=np.int64)
        table = read_rows(folder, manifest, split, rows)
        sizes = table.column("num_tokens").to_numpy().astype(np.int64)
        flat = table.column("input_ids").combine_chunks().flatten().to_numpy()
        tokens = flat.reshape(len(rows), -1).astype(np.uint64)
        if tokens.shape[1] < width:
            continue
        for place, start, own in _matches(tokens, sizes, width, wanted):
            row = tokens[place, : sizes[place]]
            if packed:
                piece = _piece(row, whole, start, anchors[own], around)
            else:
                bare = row[len(tools.prefix) : len(row) - len(tools.suffix)]
                piece = slice(0, len(whole)) if np.array_equal(bare, whole) else None
            if piece is not None:
                met[piece] = True
                found.add(int(rows[place]))
    return sorted(found) if met.mean() >= LEAST_SHARE else []


def _piece(row: Tokens, whole: Tokens, start: int, begin: int, around: Tokens) -> slice | None:
    """What of a document is in a packed row, given where one of its tokens may be: from its begin,
    or that of the row, to its end, or that of the row. None where something else follows, or goes
    before: another document that shares some words."""
    shift = start - begin  # of the row's places against the document's
    first, last = max(0, -shift), min(len(whole), len(row) - shift)
    if not np.array_equal(row[first + shift : last + shift], whole[first:last]):
        return None
    for place in (first + shift - 1, last + shift):  # what stands beside it, where it is whole
        if 0 <= place < len(row) and len(around) and row[place] not in around:
            return None
    return slice(first, last)


def _matches(
    tokens: npt.NDArray[np.uint64], sizes: npt.NDArray[np.int64], width: int, wanted: Any
) -> Iterator[tuple[int, int, int]]:
    """Rows and places at which `width` tokens have one of the wanted hashes, with that."""
    hashes = _hashes(tokens, width)
    inside = np.arange(hashes.shape[1])[None, :] + width <= sizes[:, None]
    for place, start in np.argwhere(np.isin(hashes, wanted) & inside).tolist():
        yield place, start, int(hashes[place, start])


def _hashes(tokens: npt.NDArray[np.uint64], width: int) -> npt.NDArray[np.uint64]:
    """A polynomial hash modulo 2^64 of each `width` tokens that follow each other, [rows, places]:
    equal tokens have equal ones, others nearly never."""
    places = tokens.shape[1] - width + 1
    found = np.zeros((len(tokens), places), np.uint64)
    with np.errstate(over="ignore"):
        for offset in range(width):
            found = found * _BASE + tokens[:, offset : offset + places] + np.uint64(1)
    return found


def require_clean(trail: Trail, run: Run) -> None:
    """Raise StoreError for a run that is to be made again without the document, and that begins
    with weights which have seen it, or has nothing to do with it: what it were to be made without
    is another text."""
    name = run.name
    own = next((one for one in trail.runs if one.run == name), None)
    if own is None and load_run_manifest(run).key not in {held.corpus for held in trail.corpora}:
        raise StoreError(
            f"run {name!r}",
            "has no row of the document",
            "a run is made again without one that it has",
            "give the document as it was in the raw files",
        )
    if own is not None and own.inherits:
        raise StoreError(
            f"run {name!r}",
            f"begins with the weights of {own.inherits}, which have seen the document",
            "what it is made of must not have seen it",
            f"make {own.inherits.partition('@')[0]} again first, and name it as model.run",
        )
