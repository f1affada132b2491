"""Raw corpus → token shards, through Ray Data: the same inputs and settings once, by any number of
processes.

The folder's name is a hash of the settings and of what the inputs hold, wherever they lie and
whenever they were written. On a local disk a second process waits for the first; elsewhere it does
the same work over, byte for byte. What a killed process finished is found and used. Refuses inputs
that give no documents, and more unreadable records than `data.max_bad_share`; then it takes away
what it has made, and nothing else.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from pyarrow import fs as pafs

from dray.cluster.needs import Needs
from dray.cluster.nodes import find_nodes_without, require_connected
from dray.cluster.placement import Placement, wait_for_cpu
from dray.corpus.account import describe
from dray.corpus.checking import (
    Work,
    check_bad_share,
    check_packed,
    check_reads,
    check_width,
    make_labels,
    make_manifest,
)
from dray.corpus.chunks import cut_quoted, read_part
from dray.corpus.compression import measure_compressors
from dray.corpus.contamination import evaluation_files, write_ngrams
from dray.corpus.contents import changed_meanwhile, with_digests
from dray.corpus.duplicates import find_duplicates, gather_hashes, spread_drops
from dray.corpus.encoded import check_columns
from dray.corpus.extras import check_extras, check_source_extras
from dray.corpus.fitting import Fitted, digest_of, find_fitted, with_fitted
from dray.corpus.gathering import plan_gathering
from dray.corpus.languages import language_version
from dray.corpus.listing import Leavings
from dray.corpus.manifest import (
    EXAMPLES,
    MANIFEST,
    ROWS_VERSION,
    SOURCE_FILES,
    LeftOut,
    Manifest,
    Shard,
    SourceFile,
    dump_examples,
    dump_manifest,
    dump_source_files,
    load_examples,
    load_manifest,
    load_source_files,
)
from dray.corpus.near import run_near
from dray.corpus.pages import PAGE_FORMS, extraction
from dray.corpus.parts import SPLITS, STAGING, Chunk, CorpusSource, Part, Preparation, staged
from dray.corpus.planning import (
    Deal,
    Plans,
    choose_part_bytes,
    find_quoted,
    make_deals,
    make_parts,
    plan_bundles,
)
from dray.corpus.redacting import make_redactor
from dray.corpus.rewriting import keeping_texts, kept_settings, write_thesaurus
from dray.corpus.rows import merge_rows, mix_rows, pack_chunk
from dray.corpus.sampling import make_tokenizer
from dray.corpus.scattering import scatter_part
from dray.corpus.sources import InputFile, list_source
from dray.corpus.stages import Progress, run_stage, run_task
from dray.corpus.telling import Teller, find_teller, tell_shard, telling_options
from dray.corpus.tokenizing import NO_TOKENIZER, TokenizerInfo, read_tokenizer_files
from dray.corpus.tools import keep_files
from dray.corpus.translating import Translators, find_origins, find_translators, translate_shard
from dray.errors import CorpusError, SpecError, StoreError
from dray.origin import Origin
from dray.runs import Run
from dray.runs.layout import CORPORA
from dray.spec import HeldOut, Source, Spec, Tokenizer
from dray.storage.digests import recall_digests
from dray.storage.filesystem import (
    absolute,
    child,
    delete_file,
    delete_folder,
    exists,
    is_local,
    list_files,
    list_folders,
    make_folder,
    open_filesystem,
    read_bytes,
    require_writable,
    share_filesystem,
    shown,
    write_bytes,
    write_whole,
)
from dray.storage.packages import in_package
from dray.tasks import Task

GROUP_ROWS = 256
LABELLED_GROUP_ROWS = 64
PARTITION_BYTES = 512 * 1024 * 1024
"""Estimated text in one hash partition of deduplication."""
MIN_CHUNK_BYTES = 48 * 1024 * 1024
LOOK_BYTES = 64 * 1024 * 1024
QUARANTINE = "quarantine.jsonl"
_NO_SETTINGS: Mapping[str, Any] = dict.fromkeys(
    ("train", "validation", "max_bad_share", "redaction"), True
)
"""Of `data`: what changes no row, or goes into a corpus' key in another form."""
CLAIMS = "claims"
WORK_VERSION = 4
"""Raised when intermediate files have another form: what an older dray left half done is not used
then."""


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus: its folder (absolute path or URI) and manifest."""

    folder: str
    manifest: Manifest
    is_new: bool = field(default=False, compare=False)
    """Whether this very call has made it."""

    def source_files(self) -> tuple[SourceFile, ...]:
        """What each input file gave, in reading order. Raises CorpusError for a corpus without that
        account."""
        return load_source_files(*open_filesystem(self.folder))

    def examples(self) -> dict[str, list[str]]:
        """Some documents that were kept, and of those that were left out, by reason; nothing of a
        corpus without that account."""
        return load_examples(*open_filesystem(self.folder))

    def describe(self) -> list[str]:
        """What became of the raw data, in some lines for people."""
        return describe(self.manifest, self.source_files())


@dataclass(frozen=True)
class _Inputs:
    """The sources of a spec with the files that they name now."""

    sources: tuple[CorpusSource, ...]
    files: tuple[tuple[InputFile, ...], ...]
    labels: tuple[str, ...] = ()
    """The classes of a trained model that they are to measure; empty: those that the training
    documents have."""
    left_out: tuple[LeftOut, ...] = ()
    teller: Teller | None = None
    """The model that tells columns of their rows, where the task has such."""
    translators: Translators | None = None
    """The models that write their texts in other words, where augmentation asks for it."""
    task_files: Mapping[str, bytes] | None = None
    """What the files of the task hold, once they are read."""
    fitted: Fitted = ()
    """What their task encodes them by, where a model was trained by it; empty: it is taken from a
    sample of them."""
    task_options: Mapping[str, Any] = field(default_factory=dict)
    """Ray's options of the tasks that make a corpus of them."""
    evaluation: tuple[tuple[Source, tuple[InputFile, ...]], ...] = ()
    """The sets that no training document may share text with."""


def find_inputs(spec: Spec) -> _Inputs:
    """The files of every source, with the digests of their content. Raises CorpusError for a path
    that is missing or matches nothing, and for files that cannot be read or change meanwhile."""
    inputs = list_inputs(spec)
    for own, files in zip(inputs.sources, inputs.files, strict=True):
        check_source_extras(own.source, files, own.where)
    return _regroup(inputs, with_digests([file for files in inputs.files for file in files]))


def _regroup(inputs: _Inputs, files: Iterable[InputFile]) -> _Inputs:
    """The inputs with other records of the same files, which come in the same order."""
    known = iter(files)
    return replace(inputs, files=tuple(tuple(next(known) for _ in group) for group in inputs.files))


def list_inputs(spec: Spec) -> _Inputs:
    """The files of every source, unread. Raises CorpusError for a path that is missing or matches
    nothing."""
    data = spec.data
    named = [("train", f"data.train.{i}", source) for i, source in enumerate(data.train)]
    if isinstance(data.validation, tuple):
        named += [
            ("validation", f"data.validation.{i}", source)
            for i, source in enumerate(data.validation)
        ]
    sources: list[CorpusSource] = []
    files: list[tuple[InputFile, ...]] = []
    leavings = Leavings()
    taken: Counter[str] = Counter()
    for split, where, source in named:
        listing = list_source(source, where)
        found = listing.files
        leavings.merge(listing.left_out)
        if not any(file.num_bytes for file in found):
            raise CorpusError(
                f"{where}.path",
                f"{source.paths[0]} holds only empty files",
                "a corpus has text",
                "check the path",
            )
        name = _source_name(source.paths[0])
        taken[name] += 1
        sources.append(
            CorpusSource(
                name if taken[name] == 1 else f"{name}-{taken[name]}",
                split,
                source,
                where,
                _names_files(source, where),
            )
        )
        files.append(found)
    return _Inputs(
        tuple(sources),
        tuple(files),
        left_out=leavings.to_records(),
        evaluation=tuple(evaluation_files(data.cleaning)),
    )


def _names_files(source: Source, where: str) -> tuple[InputFile, ...]:
    """The file with the names of what a source gathers, if it has one."""
    if source.gather is None or source.gather.names is None:
        return ()
    named = Source(path=source.gather.names.path)
    return list_source(named, f"{where}.gather.names").files


def _source_name(path: str) -> str:
    """The last part of its path that is no pattern."""
    names = [
        name
        for name in path.partition("?")[0].split("/")
        if name and not any(c in name for c in "*[")
    ]
    return names[-1] if names else path


def with_tokenizer_folder(spec: Spec, storage: str) -> Spec:
    """The spec with the place of its tokeniser, where that is a run's of the storage or in a
    package. Raises UserError if there is none."""
    name, path = spec.tokenizer.run, spec.tokenizer.path
    if not spec.task.tokenizes:  # of a run that the model starts from
        return spec.model_copy(update={"tokenizer": Tokenizer(train="byte_bpe")})
    if name is None:
        place = path and in_package(path)
        return spec if place == path else _with_tokenizer(spec, str(place))
    run = Run.find(storage, name)
    if run is None:
        raise SpecError(
            f"{'model' if spec.model.run == name else 'tokenizer'}.run = {name}",
            f"no such run in {shown(absolute(storage))}",
            "the tokeniser of another run is read from its folder",
            "name another storage with --storage, or a folder as path in its place",
        )
    return _with_tokenizer(spec, child(run.corpus_copy, "tokenizer"))


def _with_tokenizer(spec: Spec, folder: str) -> Spec:
    return spec.model_copy(update={"tokenizer": Tokenizer(path=folder)})


def corpus_key(spec: Spec, inputs: _Inputs | None = None, **models: Any) -> str:
    """16 hexadecimal digits of a hash over what the inputs hold, in their order, and every setting
    that changes the result, what `find_models` has found of the spec among them. Neither names nor
    times count: copied or moved files are the same corpus."""
    inputs = inputs or replace(find_inputs(spec), **models)
    files = spec.task.read_files() if inputs.task_files is None else inputs.task_files
    tokenizer: Any = spec.task.tokenizes and {
        "train": spec.tokenizer.train,
        "vocab_size": spec.tokenizer.vocab_size,
        "sample_bytes": spec.tokenizer.sample_bytes,
    }
    if spec.tokenizer.path is not None:
        tokenizer = {
            name: _digest(content)
            for name, content in read_tokenizer_files(spec.tokenizer.path).items()
        }
    redactor = make_redactor(spec.data.redaction)
    settings = {
        "version": ROWS_VERSION,
        **_row_settings(spec.task),
        "data": spec.data.model_dump(
            mode="json", exclude={**_NO_SETTINGS, "cleaning": {"decontaminate": {"against"}}}
        ),
        "share": _share(spec),
        "tokenizer": tokenizer,
        "labels": inputs.labels,
        "num_labels": None if spec.task.packs else spec.model.num_labels,
        "sources": [
            {
                "split": source.split,
                "weight": source.source.weight,
                "text": source.source.text,
                "label": _label(spec, source),
                "header": source.source.header,
                "quoting": source.source.quoting,
                **({"columns": source.source.columns} if source.source.columns else {}),
                **({"template": source.source.template} if source.source.template else {}),
                **_gathering(source),
                **({"records": source.source.records} if source.source.records else {}),
                **_extraction(source, files),
                "files": [
                    (file.digest, file.form, file.compression, *filter(None, file.folder_and_name))
                    for file in files
                ],
            }
            for source, files in zip(inputs.sources, inputs.files, strict=True)
        ],
        **({"files": {n: _digest(content) for n, content in files.items()}} if files else {}),
        **({"told_by": inputs.teller.digest} if inputs.teller else {}),
        **({"fitted": digest_of(inputs.fitted)} if inputs.fitted else {}),
        **({"redaction": redactor.digest()} if redactor else {}),
        **_judging(spec, inputs),
        **({"augmentation": kept} if (kept := kept_settings(spec, inputs.translators)) else {}),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _gathering(source: CorpusSource) -> dict[str, Any]:
    """What of a source's gathering changes its documents."""
    if source.source.gather is None:
        return {}
    settings = source.source.gather.model_dump(mode="json")
    if settings["names"]:
        settings["names"]["path"] = [file.digest for file in with_digests(source.names)]
    return {"gather": settings}


def _judging(spec: Spec, inputs: _Inputs) -> dict[str, Any]:
    """What else decides which documents are kept: the texts of evaluation sets, wherever they lie,
    and what tells languages."""
    found: dict[str, Any] = {}
    if inputs.evaluation:
        found["evaluation"] = [
            (
                source.model_dump(mode="json", exclude={"path", "exclude"}),
                [file.digest for file in with_digests(files)],
            )
            for source, files in inputs.evaluation
        ]
    if spec.data.cleaning.languages is not None:
        found["languages"] = language_version()
    return found


def _extraction(source: CorpusSource, files: Sequence[InputFile]) -> dict[str, Any]:
    """What decides over the text of a source's pages, if it has some."""
    has_pages = any(file.form in PAGE_FORMS for file in files)
    return {"pages": extraction(source.source)} if has_pages else {}


def _row_settings(task: Any) -> dict[str, Any]:
    """What of a task decides over its rows, by its class' own word: what another class says of its
    rows is nothing to one that is derived from it."""
    own = "row_settings" in vars(type(task))
    found: dict[str, Any] = (type(task) if own else Task).row_settings.__get__(task)
    return found


def _share(spec: Spec) -> float:
    return spec.data.validation.share if isinstance(spec.data.validation, HeldOut) else 0.0


def _label(spec: Spec, source: CorpusSource) -> str | None:
    return source.source.label if "label" in spec.task.fields else None


def find(spec: Spec, storage: str) -> Corpus | None:
    """The corpus of this spec if it is prepared already; needs no Ray. Raises CorpusError as
    `prepare` does."""
    spec = with_tokenizer_folder(spec, storage)
    key = corpus_key(spec, **find_models(spec, storage))
    return _find(spec, child(storage, CORPORA, key))


def recall(spec: Spec, storage: str) -> Corpus | None:
    """As `find`, where that can be told without reading the inputs: their digests must be
    remembered."""
    spec, inputs = with_tokenizer_folder(spec, storage), list_inputs(spec)
    files = [file for group in inputs.files for file in group]
    named = (source.names for source in inputs.sources)
    sets = (group for _, group in inputs.evaluation)
    read = [*files, *(file for group in (*named, *sets) for file in group)]
    digests = (
        recall_digests([file.path for file in read]) if all(file.is_local for file in read) else {}
    )
    if any(file.path not in digests for file in read):
        return None
    known = _regroup(inputs, (replace(file, digest=digests[file.path]) for file in files))
    known = replace(known, **find_models(spec, storage))
    return _find(spec, child(storage, CORPORA, corpus_key(spec, known)))


def find_models(
    spec: Spec, storage: str, origin: Origin | None = None, fitted: Fitted = ()
) -> dict[str, Any]:
    """The models that tell something of the spec's rows, and what the one that it starts from
    encodes them by."""
    return {
        "teller": find_teller(spec, storage, origin),
        "translators": find_translators(spec, storage),
        "fitted": fitted or find_fitted(spec, storage),
    }


def _find(spec: Spec, folder: str) -> Corpus | None:
    filesystem, path = open_filesystem(folder)
    if not exists(filesystem, f"{path}/{MANIFEST}"):
        return None
    corpus = Corpus(folder, load_manifest(filesystem, path))
    found = corpus.manifest
    share = (
        found.num_bad / max(1, found.num_records) if found.bad_share is None else found.bad_share
    )
    if share > spec.data.max_bad_share:
        check_bad_share(corpus.source_files(), spec.data.max_bad_share)
    return corpus


def describe_changes(spec: Spec, corpus: Corpus) -> str:
    """What a glance shows of the raw files that a corpus was made from: a few words if they are
    gone or not the same any more. Nothing larger than LOOK_BYTES in all is read, and no object
    store is asked."""
    try:
        named = [file for group in list_inputs(spec).files for file in group]
        files = list({file.name: file for file in named}.values())  # of two sources it is one
    except (CorpusError, StoreError):
        return "its raw files are not found any more"
    try:
        known = corpus.source_files()
    except CorpusError:
        return ""
    if not all(file.is_local for file in files):
        return ""
    changed = Counter(file.num_bytes for file in files) != Counter(file.num_bytes for file in known)
    if not changed:
        digests = {file.sha256 for file in known}
        looked = recall_digests([file.path for file in files], LOOK_BYTES)
        changed = any(digest not in digests for digest in looked.values())
    return "raw files were changed, added or removed since" if changed else ""


def check_inputs(spec: Spec, storage: str) -> None:
    """What `prepare` looks at before it reads anything, for those who have yet to start a Ray.
    Raises UserError for files that are not there, packages that are not installed, and rules that
    do not fit."""
    spec = with_tokenizer_folder(spec, storage)
    check_columns(spec.task)
    check_extras(spec)
    make_redactor(spec.data.redaction)
    inputs = list_inputs(spec)
    for own, files in zip(inputs.sources, inputs.files, strict=True):
        check_source_extras(own.source, files, own.where)
    spec.task.read_files()
    find_origins(spec, storage)


def prepare(
    spec: Spec,
    storage: str,
    progress: Progress | None = None,
    labels: Sequence[str] = (),
    *,
    placement: Placement | None = None,
    origin: Origin | None = None,
    fitted: Fitted = (),
) -> Corpus:
    """Prepare the corpus of a spec below `<storage>/corpora/`, or find it prepared; Ray must be
    connected if not.

    `progress` gets a line now and then. `labels`: the classes of a trained model that the corpus is
    to measure, in the order of their ids; it may lack some of them. `placement`: where the work is
    done, instead of wherever Ray has a free CPU. `origin`: the weights of the model that tells
    columns, as a run keeps them, instead of those that the spec names now. `fitted`: what documents
    are encoded by, of a trained model. Raises CorpusError for inputs that cannot become a corpus,
    StoreError for a storage that cannot be written, PlanError where no Ray is connected.
    """
    say = progress or (lambda line: None)
    spec = with_tokenizer_folder(spec, storage)
    options = placement.task_options() if placement is not None else {"num_cpus": 1}
    check_columns(spec.task)
    check_extras(spec)
    inputs = replace(
        find_inputs(spec),
        labels=tuple(labels),
        task_options=options,
        task_files=spec.task.read_files(),
        **find_models(spec, storage, origin, fitted),
    )
    key = corpus_key(spec, inputs)
    place = child(storage, CORPORA)
    folder = child(place, key)
    found = _find(spec, folder)
    if found:
        return found
    require_connected("prepare")
    if placement is None:
        wait_for_cpu(60 * spec.resources.wait_minutes, say)
    _check_seen(inputs, placement)
    filesystem, root = open_filesystem(place)
    require_writable(filesystem, root, place)
    made = [
        folder
        for folder in (root, absolute(storage))
        if is_local(filesystem) and not os.path.exists(folder)
    ]
    try:
        with _lock(root, key, say) if is_local(filesystem) else nullcontext():
            return _find(spec, folder) or _prepare(spec, folder, key, inputs, say)
    finally:
        for folder in made:  # for nothing, if it is still empty
            with suppress(OSError):
                os.rmdir(folder)


def _check_seen(inputs: _Inputs, placement: Placement | None) -> None:
    """Raise CorpusError if a node that may read sees other files on its disks than this process
    does. Of each folder the first and the last file are looked for."""
    folders: dict[str, list[tuple[str, int]]] = {}
    here = {
        place: is_local(open_filesystem(place)[0])
        for place in {file.place for group in inputs.files for file in group}
    }
    for file in (file for group in inputs.files for file in group if here[file.place]):
        folders.setdefault(os.path.dirname(file.path), []).append((file.path, file.num_bytes))
    wanted = [file for found in folders.values() for file in {found[0], found[-1]}]
    if not wanted:
        return
    among = None if placement is None else placement.node_ids()
    if blind := find_nodes_without(partial(_sees, wanted), Needs({"CPU": 1.0}), among):
        raise CorpusError(
            wanted[0][0],
            f"is not there, or another file, on {', '.join(blind)}",
            "the raw files are read by every node that has a free CPU",
            "name a shared file system or a bucket, or put a copy in the same place there",
        )


def _sees(files: Sequence[tuple[str, int]]) -> bool:
    """Whether the node that this runs on has these files, by their paths and bytes."""
    try:
        return all(os.path.getsize(path) == num_bytes for path, num_bytes in files)
    except OSError:
        return False


def _prepare(spec: Spec, folder: str, key: str, inputs: _Inputs, say: Progress) -> Corpus:
    filesystem, path = open_filesystem(folder)
    claim = _Claim(filesystem, path)
    try:
        manifest = _build(spec, folder, key, inputs, say)
        write_bytes(filesystem, f"{path}/{MANIFEST}", dump_manifest(manifest))
    except (CorpusError, SpecError):
        if not exists(filesystem, f"{path}/{MANIFEST}"):
            claim.withdraw(say)
            raise
    except Exception:  # a failing storage, Ray, a signal: what is done is found again
        # Another process, on a store without locks, may have finished first and cleared the
        # intermediate files.
        if not exists(filesystem, f"{path}/{MANIFEST}"):
            raise
    delete_folder(filesystem, f"{path}/{STAGING}")
    return Corpus(folder, load_manifest(filesystem, path), is_new=True)


class _Claim:
    """The mark of a process that works on a corpus folder, so that one whose inputs are refused
    takes away no work but its own: neither that of another process beside it nor what an earlier
    one had done when it ended."""

    def __init__(self, filesystem: pafs.FileSystem, path: str) -> None:
        self._filesystem, self._path, self._name = filesystem, path, uuid.uuid4().hex
        self._is_first = not list_files(filesystem, f"{path}/{STAGING}") and not list_folders(
            filesystem, path
        )
        write_bytes(filesystem, f"{path}/{STAGING}/{CLAIMS}/{self._name}", b"", durable=False)

    def withdraw(self, say: Progress) -> None:
        """Delete the folder if nobody else has worked in it."""
        others = set(list_files(self._filesystem, f"{self._path}/{STAGING}/{CLAIMS}")) - {
            self._name
        }
        if self._is_first and not others:
            delete_folder(self._filesystem, self._path)
        else:
            delete_file(self._filesystem, f"{self._path}/{STAGING}/{CLAIMS}/{self._name}")
            say(f"what another process has prepared stays in {shown(self._path)}")


def _build(spec: Spec, folder: str, key: str, inputs: _Inputs, say: Progress) -> Manifest:
    write_thesaurus(spec, *share_filesystem(folder))
    keep_files(inputs.task_files or {}, folder)
    job, work = _plan(spec, folder, inputs, say)
    pieces, work.parts = plan_gathering(work.parts, job.sources)
    work.scatters = run_stage(job, "scattered", scatter_part, pieces, say)
    sets = [inputs.evaluation] if inputs.evaluation else []
    work.evaluation = run_stage(job, "ngrams", write_ngrams, sets, say)
    job = replace(job, tokenizer=_make_tokenizer(spec, job, work.parts, say))
    job = with_fitted(job, work.parts, inputs.fitted, say)
    check_width(job)
    work.reads = run_stage(job, "read", read_part, work.parts, say)
    _check_unchanged(inputs, work)
    check_reads(job, work, spec.data.max_bad_share)
    chunks = [
        Chunk(name, part.source)
        for part, read in zip(work.parts, work.reads, strict=True)
        for name in read["chunks"]
    ]
    bundle = plan_bundles(len(chunks), job.num_partitions, work.total("num_chunk_documents"))
    job = replace(job, chunks=tuple(chunks), labels=make_labels(job, work), bundle_chunks=bundle)
    bundles = range(job.num_bundles) if bundle > 1 else ()
    run_stage(job, "hashes", gather_hashes, bundles, say)
    work.duplicates = run_stage(job, "duplicates", find_duplicates, range(job.num_partitions), say)
    run_stage(job, "drops", spread_drops, bundles, say)
    work.near = run_near(job, work.total("num_chunk_documents"), say)
    work.packed = run_stage(job, "packed", pack_chunk, range(len(chunks)), say)
    check_packed(job, work)
    work.deals = make_deals(job, work.packed)
    work.compressors = measure_compressors(_samples(job, len(chunks)))
    run_stage(job, "mixed", mix_rows, Plans(work.deals, lambda deal: deal.num_mixes, Deal.mix), say)
    shards = run_stage(
        job, "shards", merge_rows, Plans(work.deals, lambda deal: deal.num_shards, Deal.shard), say
    )
    if job.teller is not None:
        say("asking the model that the run begins with")
        told = replace(job, task_options=telling_options(job, job.teller))
        given = [(index, Shard.model_validate(record)) for index, record in enumerate(shards)]
        shards = run_stage(told, "told", tell_shard, given, say)
    if job.translators is not None:
        say("translating the training documents there and back")
        train = [
            (index, Shard.model_validate(record))
            for index, record in enumerate(shards)
            if record["file"].startswith(f"{SPLITS[0]}/")
        ]
        options = telling_options(job, job.translators)
        translated = run_stage(
            replace(job, task_options=options), "translated", translate_shard, train, say
        )
        work.num_untranslated = sum(record["num_untranslated"] for record in translated)
        for (index, _), record in zip(train, translated, strict=True):
            shards[index] = record["shard"]
    work.shards = [Shard.model_validate(record) for record in shards]
    _write_quarantine(job)
    filesystem, path = share_filesystem(folder)
    write_bytes(filesystem, f"{path}/{SOURCE_FILES}", dump_source_files(work.source_files()))
    write_bytes(filesystem, f"{path}/{EXAMPLES}", dump_examples(work.examples()))
    return make_manifest(key, job, work)


def _check_unchanged(inputs: _Inputs, work: Work) -> None:
    """Raises CorpusError if a file that was read whole is not the one whose digest went into the
    key."""
    known = {file.name: file.sha256 for files in inputs.files for file in files if file.sha256}
    for file in work.source_files():
        if file.sha256 != known.get(file.path, file.sha256):
            raise changed_meanwhile(file.path)


def _samples(job: Preparation, num_chunks: int) -> list[bytes]:
    """The held-out text that was put aside for measuring, chunk by chunk."""
    there = list_files(*staged(job, "packed"))
    names = (f"{index:06d}.text" for index in range(num_chunks))
    return [read_bytes(*staged(job, "packed", name)) for name in names if name in there]


def _plan(spec: Spec, folder: str, inputs: _Inputs, say: Progress) -> tuple[Preparation, Work]:
    data, sources = spec.data, inputs.sources
    part_bytes = choose_part_bytes(inputs.files)
    total = sum(file.estimated_bytes for files in inputs.files for file in files)
    # Contradicting labels are looked for whether or not duplicates are dropped.
    compares = data.cleaning.deduplicate != "none" or not (spec.task.packs or inputs.labels)
    job = Preparation(
        folder=folder,
        sources=sources,
        cleaning=data.cleaning,
        max_record_bytes=data.max_record_bytes,
        sequence_tokens=data.sequence_tokens,
        group_rows=GROUP_ROWS if spec.task.packs else LABELLED_GROUP_ROWS,
        shuffle_seed=data.shuffle_seed,
        task=keeping_texts(spec.task, spec.augmentation),
        share=_share(spec),
        chunk_bytes=max(MIN_CHUNK_BYTES, part_bytes * 3 // 2),
        num_partitions=-(-total // PARTITION_BYTES) if compares else 0,
        balance=data.balance,
        num_labels=spec.model.num_labels,
        known_labels=inputs.labels,
        work=_name_of_work(inputs),
        teller=inputs.teller,
        translators=inputs.translators,
        redactor=make_redactor(data.redaction),
        task_options=inputs.task_options,
    )
    quoted = find_quoted(inputs.files, [source.source for source in sources], part_bytes)
    items = [(index, file, source, part_bytes) for index, (file, source) in enumerate(quoted)]
    cuts = run_stage(job, "cuts", cut_quoted, items, say)
    bounds = {file.path: record["bounds"] for (file, _), record in zip(quoted, cuts, strict=True)}
    parts = make_parts(inputs.files, part_bytes, bounds)
    sizes = {file.name: file.num_bytes for files in inputs.files for file in files}
    return job, Work(parts, sizes=sizes, left_out=inputs.left_out)


def _name_of_work(inputs: _Inputs) -> str:
    """The same files under other names are another work: its records would tell of files that are
    not there."""
    names = json.dumps([WORK_VERSION, *(file.name for files in inputs.files for file in files)])
    return f"work-{hashlib.sha256(names.encode()).hexdigest()[:8]}"


def _make_tokenizer(
    spec: Spec, job: Preparation, parts: Sequence[Part], say: Progress
) -> TokenizerInfo:
    """The tokeniser in its folder and what is known of it, made in a Ray task."""
    if not spec.task.tokenizes:
        return NO_TOKENIZER
    path = staged(job, "tokenizer.json")
    if not exists(*path):
        say("training the tokeniser" if spec.tokenizer.train else "checking the tokeniser")
        settings = spec.tokenizer
        if settings.path is not None:  # a task has another working directory
            settings = settings.model_copy(update={"path": absolute(settings.path)})
        made = run_task(job, make_tokenizer, (settings, tuple(parts)))
        write_bytes(*path, json.dumps(made).encode(), durable=False)
    tree = json.loads(read_bytes(*path))
    around = {name: tuple(tree[name]) for name in ("prefix", "middle", "suffix")}
    info = TokenizerInfo(**{**tree, **around})
    if job.task.masks and info.mask_token_id is None:
        raise CorpusError(
            "tokenizer.path",
            "the tokeniser has no mask token",
            f"{spec.task.name} puts one where a token is to be guessed"
            if spec.task.masks
            else "augmentation puts one where it hides a token",
            "name it as mask_token in tokenizer_config.json, or train one: {train: byte_bpe}",
        )
    return info


def _write_quarantine(job: Preparation) -> None:
    """One file of all bad records, in reading order."""
    filesystem, path = share_filesystem(job.folder)
    there = {stage: list_files(*staged(job, stage)) for stage in ("scattered", "read")}

    def write(stream: Any) -> None:
        for stage, names in there.items():
            for name in sorted(name for name in names if name.endswith(".quarantine.jsonl")):
                stream.write(read_bytes(*staged(job, stage, name)))

    write_whole(filesystem, f"{path}/{QUARANTINE}", write, durable=False)


@contextmanager
def _lock(root: str, key: str, say: Progress) -> Iterator[None]:
    """Held by one process of all that share a local folder; released when it ends, however it
    ends."""
    make_folder(pafs.LocalFileSystem(), root)
    path = os.path.join(root, f".{key}.lock")
    waited = False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before us deletes the file: a lock on a deleted file locks nobody out.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                    break
            os.close(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            if not waited:
                say("waiting for another process that prepares the same corpus")
            waited = True
            time.sleep(0.5)
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)
        os.close(descriptor)
