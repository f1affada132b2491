"""Real token shards of random tokens, written without Ray in milliseconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pyarrow import fs as pafs

from dray.corpus.manifest import (
    MANIFEST,
    VERSION,
    Manifest,
    Packing,
    Shard,
    SourceRows,
    Split,
    dump_manifest,
)
from dray.corpus.prepare import Corpus
from dray.corpus.shards import Stored, make_batch, stored_columns, write_shard
from dray.tasks.causal_lm import CausalLM


def build_random_corpus(
    folder: Path,
    num_rows: Sequence[int],
    *,
    weights: Sequence[float] | None = None,
    tokens: int = 16,
    group_rows: int = 32,
    key: str = "random",
    task: Any = None,
    values: Mapping[str, npt.ArrayLike] | None = None,
    labels: Sequence[str] = (),
) -> Corpus:
    """One source for each of `num_rows`, in shards of at most three groups. `values`: what each
    row of a task's columns has, by column; by itself it is causal_lm's."""
    columns = stored_columns(task or CausalLM(), tokens, "uint16", len(labels))
    sources = []
    for number, count in enumerate(num_rows):
        sizes = [min(3 * group_rows, count - start) for start in range(0, count, 3 * group_rows)]
        shards = tuple(
            _write(folder, f"train/{number}-{nth}.arrow", size, tokens, group_rows, columns, values)
            for nth, size in enumerate(sizes)
        )
        sources.append(
            SourceRows(
                name=f"source-{number}",
                weight=weights[number] if weights else None,
                num_rows=count,
                num_documents=count,
                num_tokens=count * tokens,
                num_text_bytes=4 * count * tokens,
                shards=shards,
            )
        )
    packing = Packing(
        utilization=1.0, num_cut_documents=0, num_truncated_documents=0, num_truncated_tokens=0
    )
    manifest = Manifest(
        version=VERSION,
        key=key,
        sequence_tokens=tokens,
        group_rows=group_rows,
        vocab_size=512,
        pad_token_id=0,
        eos_token_id=0,
        encoder="tokenizers",
        labels=tuple(labels),
        train=Split(sources=tuple(sources)),
        validation=None,
        num_source_files=0,
        num_source_bytes=0,
        dropped={},
        num_records=sum(num_rows),
        num_bad=0,
        packing=packing,
        shuffle_seed=0,
    )
    (folder / MANIFEST).write_bytes(dump_manifest(manifest))
    return Corpus(str(folder), manifest)


def _write(
    folder: Path,
    file: str,
    num_rows: int,
    tokens: int,
    group_rows: int,
    columns: Sequence[Stored],
    given: Mapping[str, npt.ArrayLike] | None,
) -> Shard:
    ids = np.random.default_rng(num_rows).integers(0, 512, (num_rows, tokens)).astype("uint16")
    counts = np.full(num_rows, tokens, np.int32)
    others = {name: np.resize(np.asarray(value), num_rows) for name, value in (given or {}).items()}
    rows = make_batch(columns, {"input_ids": ids, "num_tokens": counts, **others})
    return write_shard(pafs.LocalFileSystem(), str(folder), file, rows, group_rows)
