"""How the preparation of a corpus is cut into parts and its rows dealt to shards: arithmetic on sizes and counts.

Both depend on the inputs alone, never on the cluster, so that the result is the same on any. Nothing is read but the
first bytes of large files of lines and the footers of large parquet files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dray.corpus.bytes_in import DamagedFile, read_head
from dray.corpus.containers import is_array
from dray.corpus.parsing import LINE_FORMS, QUOTED_FORMS
from dray.corpus.parts import SPLITS, Job, Part, ShardPlan
from dray.corpus.reading import Span
from dray.corpus.sources import InputFile
from dray.spec import Source
from dray.store.retrying import StorageFailed, is_transient, retry

MIN_PART_BYTES, PART_BYTES, MAX_PART_BYTES = 4 << 20, 32 << 20, 256 << 20
SHARD_BYTES, MAX_SHARD_BYTES = 32 << 20, 256 << 20
MAX_ROWS_DEALT = 10**9 - 1
"""numpy draws from at most so many rows at once."""


def choose_part_bytes(files: Sequence[Sequence[InputFile]]) -> int:
    """The size that parts aim at.

    Small corpora are cut finer so that all CPUs have work; beyond some gigabytes parts grow, so that there are never
    more than some thousands.
    """
    total = sum(file.estimated_bytes for group in files for file in group)
    return max(MIN_PART_BYTES, min(PART_BYTES, total // 8), min(MAX_PART_BYTES, total // 256))


def find_quoted(files: Sequence[Sequence[InputFile]], sources: Sequence[Source],
                size: int) -> list[tuple[InputFile, Source]]:
    """The files too large for one part whose records may hold newlines: only reading them tells where to cut."""
    found: dict[str, tuple[InputFile, Source]] = {}
    for source, group in zip(sources, files, strict=True):
        if source.quoting != "none":
            found.update({file.path: (file, source) for file in group
                          if file.form in QUOTED_FORMS and file.num_bytes > size * 3 // 2 and _is_divisible(file)})
    return list(found.values())


def make_parts(files: Sequence[Sequence[InputFile]], size: int, bounds: Mapping[str, Sequence[int]]) -> list[Part]:
    """Parts of about `size` bytes, in order of source, file and offset. `bounds`: where the quoted files are cut."""
    parts: list[Part] = []
    for source, group in enumerate(files):
        spans: list[Span] = []
        filled = 0
        for span, num_bytes in (item for file in group for item in _cut(file, size, bounds.get(file.path))):
            if spans and filled + num_bytes > size * 5 // 4:
                parts.append(Part(len(parts), source, tuple(spans)))
                spans, filled = [], 0
            spans.append(span)
            filled += num_bytes
        parts.append(Part(len(parts), source, tuple(spans)))
    return parts


def _cut(file: InputFile, size: int, bounds: Sequence[int] | None) -> Iterator[tuple[Span, int]]:
    """Spans of a file with their estimated bytes. Compressed files and whole-file documents stay in one piece."""
    if file.num_bytes > size * 3 // 2 and file.form in LINE_FORMS and (bounds is not None or _is_divisible(file)):
        count = -(-file.num_bytes // size)
        starts = [file.num_bytes * index // count for index in range(count)] if bounds is None else [0, *bounds]
        for start, stop in zip(starts, [*starts[1:], None], strict=True):
            yield Span(file, start, stop), (stop or file.num_bytes) - start
    elif file.num_bytes > size * 3 // 2 and file.form == "parquet":
        yield from _cut_parquet(file, size)
    else:
        yield Span(file), file.estimated_bytes


def _is_divisible(file: InputFile) -> bool:
    """Whether any line may begin a range: not in what is compressed, by its name or not, in an array, in no text."""
    if file.compression:
        return False
    try:
        content = retry(lambda: read_head(file), file.name)
    except StorageFailed as error:
        if is_transient(error.__cause__ or error):  # cut otherwise, the same files would make other rows
            raise
        return False
    except (FileNotFoundError, DamagedFile):  # reading it will say what is wrong
        return False
    return not content.note and not (file.form == "jsonl" and is_array(content.head))


def _cut_parquet(file: InputFile, size: int) -> Iterator[tuple[Span, int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def read() -> Any:
        with file.open().open_input_file(file.path) as stream:
            return pq.read_metadata(stream)

    try:
        metadata = retry(read, file.name)
    except StorageFailed as error:
        if is_transient(error.__cause__ or error):  # cut otherwise, the same files would make other rows
            raise
        yield Span(file), file.num_bytes
        return
    except (OSError, pa.ArrowException):  # reading it will say what is wrong
        yield Span(file), file.num_bytes
        return
    start, filled = 0, 0
    for group in range(metadata.num_row_groups):
        filled += metadata.row_group(group).total_byte_size
        if filled >= size or group == metadata.num_row_groups - 1:
            last = group == metadata.num_row_groups - 1
            yield Span(file, start, None if last else group + 1), filled
            start, filled = group + 1, 0


def make_shard_plans(job: Job, packed: Sequence[dict[str, Any]]) -> list[ShardPlan]:
    """Which rows of which chunks each shard holds: a uniformly random deal with exact shard sizes.

    The rows of a chunk lie in random order, so a shard takes a run of them; how many is drawn without replacement from
    the places left in the shards (multivariate hypergeometric).
    """
    row_bytes = job.sequence_tokens * np.dtype(job.info.dtype).itemsize
    plans: list[ShardPlan] = []
    for split in SPLITS:
        for source in range(len(job.sources)):
            counts = {index: record[split]["num_rows"] for index, record in enumerate(packed)
                      if split in record and job.chunks[index].source == source}
            if counts:
                plans += _deal(job, split, source, counts, row_bytes)
    return plans


def _deal(job: Job, split: str, source: int, counts: dict[int, int], row_bytes: int) -> list[ShardPlan]:
    total = sum(counts.values())
    target = max(SHARD_BYTES, min(MAX_SHARD_BYTES, total * row_bytes // 256))
    shard_rows = max(1, target // (row_bytes * job.group_rows)) * job.group_rows
    left = np.full(-(-total // shard_rows), shard_rows, np.int64)
    left[-1] = total - shard_rows * (len(left) - 1)
    rng = job.rng(3, SPLITS.index(split), source)
    slices: list[list[tuple[int, int, int, int]]] = [[] for _ in left]
    for chunk, count in counts.items():
        start = 0
        for shard, taken in enumerate(_draw(rng, left, count).tolist()):
            if taken:
                slices[shard].append((chunk, start, taken, count))
            start += taken
    return [ShardPlan(split, source, index, tuple(taken)) for index, taken in enumerate(slices)]


def _draw(rng: np.random.Generator, left: np.ndarray[Any, np.dtype[np.int64]], count: int) -> np.ndarray[Any, Any]:
    """How many of `count` rows go to each shard; takes them off `left`."""
    if left.sum() <= MAX_ROWS_DEALT:
        taken = rng.multivariate_hypergeometric(left, count, method="marginals")
    else:
        # Too many for numpy: halves of the shards share them by their places, the rest is drawn.
        middle = len(left) // 2
        head = min(int(left[:middle].sum()), max(count - int(left[middle:].sum()),
                                                 round(count * float(left[:middle].sum() / left.sum()))))
        return np.concatenate([_draw(rng, left[:middle], head), _draw(rng, left[middle:], count - head)])
    left -= taken
    return taken
