"""Raw corpus → token shards, through Ray Data: the same inputs and settings once, by any number of processes.

The folder's name is a hash of the inputs and settings. On a local disk a second process waits for the first; elsewhere it
does the same work over, byte for byte. What a killed process finished is found and used. Refuses inputs that give no
documents, and more unreadable records than `data.max_bad_share`; then it leaves nothing behind.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pyarrow import fs as pafs

from dray.corpus.manifest import (
    MANIFEST,
    VERSION,
    Manifest,
    Packing,
    Shard,
    SourceFile,
    SourceRows,
    Split,
    dump_manifest,
    load_manifest,
)
from dray.corpus.parts import (
    DROP_REASONS,
    SPLITS,
    STAGING,
    Chunk,
    CorpusSource,
    Job,
    Part,
    ShardPlan,
    find_duplicates,
    load_record,
    merge_rows,
    open_folder,
    pack_chunk,
    read_part,
    record_name,
    staged,
)
from dray.corpus.planning import make_parts, make_shard_plans
from dray.corpus.sampling import make_tokenizer
from dray.corpus.sources import InputFile, find_files
from dray.corpus.tokenizing import TokenizerInfo, read_tokenizer_files
from dray.errors import CorpusError, StoreError, UserError
from dray.spec import HeldOut, Spec
from dray.store.filesystem import (
    absolute,
    child,
    delete_folder,
    exists,
    is_local,
    is_uri,
    list_files,
    make_folder,
    open_filesystem,
    open_whole,
    read_bytes,
    require_writable,
    write_bytes,
)

GROUP_ROWS = 256
LABELLED_GROUP_ROWS = 64
MAX_LABELS = 10_000
PARTITION_BYTES = 512 * 1024 * 1024
MIN_CHUNK_BYTES = 48 * 1024 * 1024
QUARANTINE = "quarantine.jsonl"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus: its folder (absolute path or URI) and manifest."""

    folder: str
    manifest: Manifest


@dataclass(frozen=True)
class _Inputs:
    """The sources of a spec with the files that they name now."""

    sources: tuple[CorpusSource, ...]
    files: tuple[tuple[InputFile, ...], ...]


def find_inputs(spec: Spec) -> _Inputs:
    """List the files of every source. Raises CorpusError for a path that is missing or matches nothing."""
    data = spec.data
    named = [("train", f"data.train.{i}", source) for i, source in enumerate(data.train)]
    if isinstance(data.validation, tuple):
        named += [("validation", f"data.validation.{i}", source) for i, source in enumerate(data.validation)]
    sources: list[CorpusSource] = []
    files: list[tuple[InputFile, ...]] = []
    taken: Counter[str] = Counter()
    for split, where, source in named:
        found = tuple(find_files(source, where))
        if not any(file.num_bytes for file in found):
            raise CorpusError(f"{where}.path", f"{source.paths[0]} holds only empty files", "a corpus has text", "check the path")
        name = _source_name(source.paths[0])
        taken[name] += 1
        sources.append(CorpusSource(name if taken[name] == 1 else f"{name}-{taken[name]}", split, source, where))
        files.append(found)
    return _Inputs(tuple(sources), tuple(files))


def _source_name(path: str) -> str:
    names = [name for name in path.split("?")[0].rstrip("/").split("/") if name and not any(c in name for c in "*[")]
    return names[-1] if names else path


def corpus_key(spec: Spec, inputs: _Inputs | None = None) -> str:
    """16 hexadecimal digits of a hash over the inputs (path, size, stamp) and every setting that changes the result."""
    inputs = inputs or find_inputs(spec)
    tokenizer: Any = {"train": spec.tokenizer.train, "vocab_size": spec.tokenizer.vocab_size,
                      "sample_bytes": spec.tokenizer.sample_bytes}
    if spec.tokenizer.path is not None:
        tokenizer = {name: hashlib.sha256(content).hexdigest()
                     for name, content in read_tokenizer_files(spec.tokenizer.path).items()}
    settings = {
        "version": VERSION,
        "packs_rows": spec.packs_rows,
        "data": spec.data.model_dump(mode="json", exclude={"train", "validation", "max_bad_share"}),
        "share": _share(spec),
        "tokenizer": tokenizer,
        "sources": [
            {"name": source.name, "split": source.split, "weight": source.source.weight, "text": source.source.text,
             "label": _label(spec, source), "header": source.source.header,
             "files": [(file.name, file.num_bytes, file.stamp, file.form) for file in files]}
            for source, files in zip(inputs.sources, inputs.files, strict=True)
        ],
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _share(spec: Spec) -> float:
    return spec.data.validation.share if isinstance(spec.data.validation, HeldOut) else 0.0


def _label(spec: Spec, source: CorpusSource) -> str | None:
    return None if spec.packs_rows else source.source.label


def find(spec: Spec, storage: str) -> Corpus | None:
    """The corpus of this spec if it is prepared already; needs no Ray. Raises CorpusError as `prepare` does."""
    return _find(spec, storage, find_inputs(spec))


def _find(spec: Spec, storage: str, inputs: _Inputs) -> Corpus | None:
    folder = child(storage, "corpora", corpus_key(spec, inputs))
    filesystem, path = open_filesystem(folder)
    if not exists(filesystem, f"{path}/{MANIFEST}"):
        return None
    corpus = Corpus(folder, load_manifest(filesystem, path))
    _check_bad_share(spec, corpus.manifest.num_bad, corpus.manifest.num_records, _worst_file(corpus.manifest.source_files))
    return corpus


def prepare(spec: Spec, storage: str, progress: Progress | None = None) -> Corpus:
    """Prepare the corpus of a spec below `<storage>/corpora/`, or find it prepared. Needs a connected Ray if it is not.

    `progress` gets a line now and then. Raises CorpusError for inputs that cannot become a corpus, StoreError for a storage
    that cannot be written.
    """
    say = progress or (lambda line: None)
    inputs = find_inputs(spec)
    found = _find(spec, storage, inputs)
    if found:
        return found
    place = child(storage, "corpora")
    filesystem, root = open_filesystem(place)
    require_writable(filesystem, root, place)
    key = corpus_key(spec, inputs)
    made = [folder for folder in (root, absolute(storage)) if is_local(filesystem) and not os.path.exists(folder)]
    try:
        with _lock(root, key, say) if is_local(filesystem) else nullcontext():
            return _find(spec, storage, inputs) or _prepare(spec, child(place, key), key, inputs, say)
    finally:
        for folder in made:  # for nothing, if it is still empty
            with suppress(OSError):
                os.rmdir(folder)


def _prepare(spec: Spec, folder: str, key: str, inputs: _Inputs, say: Progress) -> Corpus:
    filesystem, path = open_filesystem(folder)
    try:
        manifest = _build(spec, folder, key, inputs, say)
        with open_whole(filesystem, f"{path}/{MANIFEST}") as stream:
            stream.write(dump_manifest(manifest))
    except UserError:
        if not exists(filesystem, f"{path}/{MANIFEST}"):
            delete_folder(filesystem, path)
            raise
    except Exception:
        # Another process, on a store without locks, may have finished first and cleared the intermediate files.
        if not exists(filesystem, f"{path}/{MANIFEST}"):
            raise
    delete_folder(filesystem, f"{path}/{STAGING}")
    return Corpus(folder, load_manifest(filesystem, path))


def _build(spec: Spec, folder: str, key: str, inputs: _Inputs, say: Progress) -> Manifest:
    job, parts = _plan(spec, folder, inputs)
    job = replace(job, tokenizer=_make_tokenizer(spec, job, parts, say))
    reads = run_stage(job, "read", read_part, parts, say)
    _check_reads(spec, job, parts, reads)
    chunks = [Chunk(name, part.source) for part, read in zip(parts, reads, strict=True) for name in read["chunks"]]
    job = replace(job, chunks=tuple(chunks), labels=_make_labels(spec, reads))
    drops = run_stage(job, "duplicates", find_duplicates, list(range(job.num_partitions)), say)
    packed = run_stage(job, "packed", pack_chunk, list(range(len(chunks))), say)
    _check_packed(job, packed)
    plans = make_shard_plans(job, packed)
    shards = [Shard.model_validate(record) for record in run_stage(job, "shards", _merge, list(enumerate(plans)), say)]
    _write_quarantine(job, parts)
    return _make_manifest(spec, key, job, reads, drops, packed, plans, shards, inputs)


def _merge(job: Job, item: tuple[int, ShardPlan]) -> dict[str, Any]:
    return merge_rows(job, item[1], item[0])


def _plan(spec: Spec, folder: str, inputs: _Inputs) -> tuple[Job, list[Part]]:
    data = spec.data
    sources = tuple(replace(source, source=source.source.model_copy(update={"label": _label(spec, source)}))
                    for source in inputs.sources)
    parts, part_bytes = make_parts(inputs.files)
    total = sum(file.estimated_bytes for files in inputs.files for file in files)
    job = Job(
        folder=folder, sources=sources, cleaning=data.cleaning, max_record_bytes=data.max_record_bytes,
        sequence_tokens=data.sequence_tokens, group_rows=GROUP_ROWS if spec.packs_rows else LABELLED_GROUP_ROWS,
        shuffle_seed=data.shuffle_seed, packs_rows=spec.packs_rows, share=_share(spec),
        chunk_bytes=max(MIN_CHUNK_BYTES, part_bytes * 3 // 2),
        num_partitions=-(-total // PARTITION_BYTES) if data.cleaning.deduplicate == "exact" else 0,
    )
    return job, parts


def _make_tokenizer(spec: Spec, job: Job, parts: Sequence[Part], say: Progress) -> TokenizerInfo:
    """The tokeniser in its folder and what is known of it, made in a Ray task."""
    path = staged(job, "tokenizer.json")
    if not exists(*path):
        import ray

        say("training the tokeniser" if spec.tokenizer.train else "checking the tokeniser")
        task = ray.remote(num_cpus=1)(_answer)
        _, answer = ray.get(task.remote(make_tokenizer, job, 0, (spec.tokenizer, tuple(parts))))
        write_bytes(*path, json.dumps(_unwrap(answer)).encode(), durable=False)
    tree = json.loads(read_bytes(*path))
    return TokenizerInfo(**{**tree, "prefix": tuple(tree["prefix"]), "suffix": tuple(tree["suffix"])})


# --- running a stage ---------------------------------------------------------------------------------------------------


def _answer(function: Callable[[Job, Any], Any], job: Job, index: int, item: Any) -> tuple[int, bytes]:
    """A task's result or its UserError, pickled: an expected error crosses Ray without its wrapping."""
    try:
        return index, pickle.dumps(function(job, item))
    except UserError as error:
        return index, pickle.dumps(error)


def _unwrap(answer: bytes) -> Any:
    result = pickle.loads(answer)
    if isinstance(result, UserError):
        raise result
    return result


def run_stage(job: Job, stage: str, function: Callable[[Job, Any], dict[str, Any]], items: Sequence[Any],
              say: Progress) -> list[dict[str, Any]]:
    """The records of `function(job, item)` for all items, in their order: those there are already, the rest by Ray Data."""
    filesystem, path = staged(job, stage)
    there = list_files(filesystem, path)
    records = {index: load_record(job, stage, index) for index in range(len(items)) if record_name(index) in there}
    missing = [index for index in range(len(items)) if records.get(index) is None]
    began = time.monotonic()
    for done, (index, answer) in enumerate(_run_tasks(job, function, [(index, items[index]) for index in missing]), 1):
        records[index] = _unwrap(answer)
        if done == len(missing) or time.monotonic() - began > 2:
            began = time.monotonic()
            say(f"{stage}: {len(items) - len(missing) + done} of {len(items)}")
    return [record for _, record in sorted(records.items()) if record is not None]


def _run_tasks(job: Job, function: Callable[[Job, Any], dict[str, Any]],
               tasks: Sequence[tuple[int, Any]]) -> Iterator[tuple[int, bytes]]:
    if not tasks:
        return
    import ray.data

    def work(row: dict[str, Any]) -> dict[str, Any]:
        index, answer = _answer(function, job, row["index"], pickle.loads(row["item"]))
        return {"index": index, "answer": answer}

    with _quiet_ray_data():
        rows = [{"index": index, "item": pickle.dumps(item)} for index, item in tasks]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(work, num_cpus=1)
        for row in dataset.iter_rows():
            yield row["index"], row["answer"]


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Warnings still show; plans, progress bars and statistics do not."""
    from ray.data import DataContext
    from ray.util.debug import log_once

    logger = logging.getLogger("ray.data")
    level, context = logger.level, DataContext.get_current()
    bars = context.enable_progress_bars
    context.enable_progress_bars = False
    logger.setLevel(logging.WARNING)
    log_once("ray_data_progress_manager_disabled")  # says so itself otherwise
    try:
        yield
    finally:
        context.enable_progress_bars = bars
        logger.setLevel(level)


# --- checks ------------------------------------------------------------------------------------------------------------


def _check_reads(spec: Spec, job: Job, parts: Sequence[Part], reads: Sequence[dict[str, Any]]) -> None:
    num_bad, num_records = (sum(read[key] for read in reads) for key in ("num_bad", "num_records"))
    worst = max(_source_files(reads, {}), key=lambda file: file.num_bad, default=None)
    first = next((read["first_bad"] for read in reads
                  if worst and read["first_bad"] and read["first_bad"]["file"] == worst.path), None)
    example = f"; first there: {first['reason']} at offset {first['offset']}" if first else ""
    _check_bad_share(spec, num_bad, num_records, worst, example)
    for index, source in enumerate(job.sources):
        mine = [read for part, read in zip(parts, reads, strict=True) if part.source == index]
        if not any(read["chunks"] for read in mine):
            dropped = sum((Counter(read["dropped"]) for read in mine), Counter[str]())
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
            raise CorpusError(f"{source.where}.path", f"no document of {source.source.paths[0]} is left" if dropped
                              else f"{source.source.paths[0]} holds no documents",
                              f"dropped: {reasons}" if reasons else "a source has at least one document",
                              "loosen data.cleaning" if dropped else "check the path and the format")


def _check_bad_share(spec: Spec, num_bad: int, num_records: int, worst: SourceFile | None, example: str = "") -> None:
    if worst is None or not num_bad or num_bad <= spec.data.max_bad_share * num_records:
        return
    raise CorpusError(
        worst.path, f"{worst.num_bad} of its {worst.num_bad + worst.num_documents} records are unreadable{example}",
        f"{num_bad} of all {num_records} records are bad, more than data.max_bad_share = {spec.data.max_bad_share}",
        "mend the file, check data.train.format, or raise data.max_bad_share")


def _worst_file(files: Iterable[SourceFile]) -> SourceFile | None:
    return max(files, key=lambda file: file.num_bad, default=None)


def _make_labels(spec: Spec, reads: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    labels = {label for read in reads for label in read["labels"]}
    if len(labels) > MAX_LABELS:
        raise CorpusError("data.train.label", f"{len(labels)} different labels", f"at most {MAX_LABELS}", "is it a column of text?")
    if not spec.packs_rows and len(labels) < 2:
        raise CorpusError("data.train.label", f"only the label {next(iter(labels), '')!r}", "a classification has two or more")
    if all(label.removeprefix("-").isdecimal() and label.isascii() for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))


def _check_packed(job: Job, packed: Sequence[dict[str, Any]]) -> None:
    for index, source in enumerate(job.sources):
        if not any(source.split in record for chunk, record in zip(job.chunks, packed, strict=True) if chunk.source == index):
            raise CorpusError(f"{source.where}.path", f"no document of {source.source.paths[0]} is left",
                              "all of them are duplicates or held out for validation", "check data.validation and the sources")
    if job.share and not any("validation" in record for record in packed):
        num_documents = sum(record["train"]["num_documents"] for record in packed)
        raise CorpusError("data.validation.share", f"{job.share} of {num_documents} documents holds out none of them",
                          "the validation needs a document", f"raise it above {1 / num_documents:.2g}")


# --- the result --------------------------------------------------------------------------------------------------------


def _make_manifest(spec: Spec, key: str, job: Job, reads: Sequence[dict[str, Any]], drops: Sequence[dict[str, Any]],
                   packed: Sequence[dict[str, Any]], plans: Sequence[ShardPlan], shards: Sequence[Shard],
                   inputs: _Inputs) -> Manifest:
    dropped = sum((Counter(read["dropped"]) for read in reads), Counter[str]())
    for record in drops:
        dropped.update({reason: record[reason] for reason in DROP_REASONS if record[reason]})
    splits = {split: _make_split(split, job, packed, plans, shards) for split in SPLITS}
    train = [record["train"] for record in packed if "train" in record]
    counts = {name: sum(record[name] for record in train)
              for name in ("num_cut_documents", "num_truncated_documents", "num_truncated_tokens")}
    slots = splits["train"].num_rows * job.sequence_tokens
    sizes = {file.name: file.num_bytes for files in inputs.files for file in files}
    return Manifest(
        version=VERSION, key=key, sequence_tokens=job.sequence_tokens, group_rows=job.group_rows,
        vocab_size=job.info.vocab_size, pad_token_id=job.info.pad_token_id, eos_token_id=job.info.eos_token_id,
        encoder=job.info.encoder, labels=job.labels, train=splits["train"],
        validation=splits["validation"] if splits["validation"].num_rows else None,
        source_files=tuple(_source_files(reads, sizes)), dropped=dict(sorted(dropped.items())),
        num_records=sum(read["num_records"] for read in reads), num_bad=sum(read["num_bad"] for read in reads),
        packing=Packing(utilization=round(splits["train"].num_tokens / slots, 6), **counts),
        shuffle_seed=spec.data.shuffle_seed,
    )


def _make_split(split: str, job: Job, packed: Sequence[dict[str, Any]], plans: Sequence[ShardPlan],
                shards: Sequence[Shard]) -> Split:
    rows: list[SourceRows] = []
    for index, source in enumerate(job.sources):
        mine = [record[split] for chunk, record in zip(job.chunks, packed, strict=True)
                if chunk.source == index and split in record]
        if mine:
            counts = {name: sum(record[name] for record in mine)
                      for name in ("num_rows", "num_documents", "num_tokens", "num_text_bytes")}
            rows.append(SourceRows(
                name=source.name, weight=source.source.weight if split == "train" else None, **counts,
                shards=tuple(shard for plan, shard in zip(plans, shards, strict=True)
                             if (plan.split, plan.source) == (split, index))))
    return Split(sources=tuple(rows))


def _source_files(reads: Sequence[dict[str, Any]], sizes: dict[str, int]) -> list[SourceFile]:
    """Files over all parts that read them, in reading order."""
    merged: dict[str, dict[str, Any]] = {}
    for read in reads:
        for name, entry in read["files"].items():
            whole = merged.setdefault(name, {"num_documents": 0, "num_bad": 0, "sha256": ""})
            for count in ("num_documents", "num_bad"):
                whole[count] += entry[count]
            whole["sha256"] = whole["sha256"] or entry["sha256"]
    return [SourceFile(path=name, num_bytes=sizes.get(name, 0), **entry) for name, entry in merged.items()]


def _write_quarantine(job: Job, parts: Sequence[Part]) -> None:
    filesystem, path = open_folder(job.folder)
    there = list_files(*staged(job, "read"))
    with open_whole(filesystem, f"{path}/{QUARANTINE}", durable=False) as stream:
        for part in parts:
            name = f"{part.index:06d}.quarantine.jsonl"
            if name in there:
                stream.write(read_bytes(*staged(job, "read", name)))


# --- one process at a time ---------------------------------------------------------------------------------------------


@contextmanager
def _lock(root: str, key: str, say: Progress) -> Iterator[None]:
    """Held by one process of all that share a local folder; released when it ends, however it ends."""
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
