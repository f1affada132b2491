"""How the preparation of a corpus is cut into parts and its rows dealt to shards: arithmetic on
sizes and counts.

Both depend on the inputs alone, never on the cluster, so that the result is the same on any.
Nothing is read but the first bytes of large files of lines and the footers of large parquet files.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar, overload

import numpy as np

from dray.corpus.bytes_in import DamagedFile, read_head
from dray.corpus.containers import is_array
from dray.corpus.packing import Ints
from dray.corpus.parsing import LINE_FORMS, QUOTED_FORMS
from dray.corpus.parts import SPLITS, MixPlan, Part, Preparation, ShardPlan, Slice
from dray.corpus.reading import Span
from dray.corpus.sources import InputFile
from dray.errors import StorageFailed
from dray.spec import Source
from dray.storage.retrying import is_transient, retry

MIN_PART_BYTES, PART_BYTES, MAX_PART_BYTES = 4 << 20, 32 << 20, 256 << 20
SHARD_BYTES, MAX_SHARD_BYTES = 32 << 20, 256 << 20
DIRECT_READS = 1 << 15
"""Small reads from everything to everything that are taken as they are; more go in two steps."""
MAX_BUNDLE_DOCUMENTS = 1 << 23
T = TypeVar("T")
MAX_ROWS_DEALT = 10**9 - 1
"""numpy draws from at most so many rows at once."""


def choose_part_bytes(files: Sequence[Sequence[InputFile]]) -> int:
    """The size that parts aim at.

    Small corpora are cut finer so that all CPUs have work; beyond some gigabytes parts grow, so
    that there are never more than some thousands.
    """
    total = sum(file.estimated_bytes for group in files for file in group)
    return max(MIN_PART_BYTES, min(PART_BYTES, total // 8), min(MAX_PART_BYTES, total // 256))


def find_quoted(
    files: Sequence[Sequence[InputFile]], sources: Sequence[Source], size: int
) -> list[tuple[InputFile, Source]]:
    """The files too large for one part whose records may hold newlines: only reading them tells
    where to cut."""
    found: dict[str, tuple[InputFile, Source]] = {}
    for source, group in zip(sources, files, strict=True):
        if source.quoting != "none":
            found.update(
                {
                    file.path: (file, source)
                    for file in group
                    if file.form in QUOTED_FORMS
                    and file.num_bytes > size * 3 // 2
                    and is_divisible(file)
                }
            )
    return list(found.values())


def make_parts(
    files: Sequence[Sequence[InputFile]], size: int, bounds: Mapping[str, Sequence[int]]
) -> list[Part]:
    """Parts of about `size` bytes, in order of source, file and offset. `bounds`: where the quoted
    files are cut."""
    parts: list[Part] = []
    for source, group in enumerate(files):
        spans: list[Span] = []
        filled = 0
        for span, num_bytes in (
            item for file in group for item in _cut(file, size, bounds.get(file.path))
        ):
            if spans and filled + num_bytes > size * 5 // 4:
                parts.append(Part(len(parts), source, tuple(spans)))
                spans, filled = [], 0
            spans.append(span)
            filled += num_bytes
        parts.append(Part(len(parts), source, tuple(spans)))
    return parts


def _cut(file: InputFile, size: int, bounds: Sequence[int] | None) -> Iterator[tuple[Span, int]]:
    """Spans of a file with their estimated bytes. Compressed files and whole-file documents stay in
    one piece."""
    if (
        file.num_bytes > size * 3 // 2
        and file.form in LINE_FORMS
        and (bounds is not None or is_divisible(file))
    ):
        count = -(-file.num_bytes // size)
        starts = (
            [file.num_bytes * index // count for index in range(count)]
            if bounds is None
            else [0, *bounds]
        )
        for start, stop in zip(starts, [*starts[1:], None], strict=True):
            yield Span(file, start, stop), (stop or file.num_bytes) - start
    elif file.num_bytes > size * 3 // 2 and file.form == "parquet":
        yield from _cut_parquet(file, size)
    else:
        yield Span(file), file.estimated_bytes


def is_divisible(file: InputFile) -> bool:
    """Whether any line may begin a range: not in what is compressed, by its name or not, in an
    array, in no text."""
    if file.compression:
        return False
    try:
        content = retry(lambda: read_head(file), file.name)
    except StorageFailed as error:
        if is_transient(
            error.__cause__ or error
        ):  # cut otherwise, the same files would make other rows
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
        if is_transient(
            error.__cause__ or error
        ):  # cut otherwise, the same files would make other rows
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


@dataclass(frozen=True)
class Deal:
    """How the rows of one source and split are dealt from chunks to shards, and by which way they
    go there.

    A uniformly random deal with exact shard sizes: the rows of a chunk lie in random order, so a
    shard takes a run of them. Plans of single shards are made as they are asked for: the table is
    all that is held.
    """

    split: str
    source: int
    chunks: Ints
    """[chunks]: their numbers."""
    counts: Ints
    """[chunks, shards]: rows that go from one to the other."""
    bundle: int
    """Chunks whose rows travel together to a group of shards; 0: each shard takes its rows from the
    chunks."""
    group: int
    label: int | None = None
    """The class of all its rows, where those of a source lie apart by class."""
    firsts: Ints | None = None
    """[chunks]: where its rows begin in each; None: at 0."""
    totals: Ints | None = None
    """[chunks]: rows that each has, those of other deals included; None: there are none."""

    @property
    def num_shards(self) -> int:
        return int(self.counts.shape[1])

    @cached_property
    def _ends(self) -> Ints:
        """[chunks, shards]: where each run of rows ends in its chunk."""
        return np.cumsum(self.counts, axis=1)

    @property
    def num_mixes(self) -> int:
        """Files between chunks and shards; 0: none."""
        return self._num_bundles * -(-self.num_shards // self.group) if self.bundle else 0

    @property
    def _num_bundles(self) -> int:
        return -(-len(self.chunks) // self.bundle)

    def shard(self, index: int) -> ShardPlan:
        """The plan of one shard: from the chunks, or from the files between."""
        if not self.bundle:
            runs = self._runs(slice(None), slice(index, index + 1))
            return ShardPlan(self.split, self.source, index, runs, self.label)
        group, place = divmod(index, self.group)
        slices = []
        for bundle in range(self._num_bundles):
            counts = self._mix_counts(bundle, group).sum(axis=0)
            if counts[place]:
                slices.append(
                    Slice(
                        self._mix_file(bundle, group),
                        int(counts[:place].sum()),
                        int(counts[place]),
                        int(counts.sum()),
                    )
                )
        return ShardPlan(self.split, self.source, index, tuple(slices), self.label)

    def mix(self, index: int) -> MixPlan:
        """The plan of one file between: what a bundle of chunks sends to a group of shards."""
        group, bundle = divmod(index, self._num_bundles)
        counts = self._mix_counts(bundle, group)
        rows, columns = self._place(bundle, group)
        return MixPlan(
            self._mix_file(bundle, group), self._runs(rows, columns), counts[counts.sum(axis=1) > 0]
        )

    def _place(self, bundle: int, group: int) -> tuple[slice, slice]:
        return (
            slice(bundle * self.bundle, (bundle + 1) * self.bundle),
            slice(group * self.group, (group + 1) * self.group),
        )

    def _mix_counts(self, bundle: int, group: int) -> Ints:
        return self.counts[self._place(bundle, group)]

    def _mix_file(self, bundle: int, group: int) -> str:
        label = "" if self.label is None else f"-{self.label:05d}"
        return f"mixed/{self.split}-{self.source:03d}{label}-{group:05d}-{bundle:05d}"

    def _runs(self, rows: slice, columns: slice) -> tuple[Slice, ...]:
        """Of each of some chunks its rows for neighbouring shards, which lie together; none where
        it has none."""
        counts = self.counts[rows, columns].sum(axis=1)
        ends = self._ends[rows, columns][:, -1]
        stops = ends if self.firsts is None else self.firsts[rows] + ends
        totals = self._ends[:, -1] if self.totals is None else self.totals
        return tuple(
            Slice(f"packed/{chunk:06d}.{self.split}", stop - count, count, total)
            for chunk, count, stop, total in zip(
                self.chunks[rows].tolist(),
                counts.tolist(),
                stops.tolist(),
                totals[rows].tolist(),
                strict=True,
            )
            if count
        )


class Plans(Sequence[tuple[int, T]]):
    """The numbered plans of all deals, one deal after the other, each made when it is asked for.

    `count` of a deal says how many it has, `make` makes one of them by its number.
    """

    def __init__(
        self, deals: Sequence[Deal], count: Callable[[Deal], int], make: Callable[[Deal, int], T]
    ) -> None:
        self._deals, self._make = deals, make
        self._ends = list(accumulate(count(deal) for deal in deals))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> tuple[int, T]: ...

    @overload
    def __getitem__(self, index: slice) -> list[tuple[int, T]]: ...

    def __getitem__(self, index: int | slice) -> tuple[int, T] | list[tuple[int, T]]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        nth = bisect_right(self._ends, index)
        if not 0 <= index < len(self):
            raise IndexError(index)
        return index, self._make(self._deals[nth], index - (self._ends[nth - 1] if nth else 0))


def plan_bundles(num_chunks: int, num_partitions: int, num_documents: int) -> int:
    """How many chunks' hashes travel together (`Preparation.bundle_chunks`): √chunks where each by
    itself would be too many reads, but never more documents than fit in memory."""
    if num_chunks * num_partitions <= DIRECT_READS:
        return 1
    documents_per_chunk = max(1, num_documents // num_chunks)
    return max(1, min(math.isqrt(num_chunks - 1) + 1, MAX_BUNDLE_DOCUMENTS // documents_per_chunk))


def make_deals(job: Preparation, packed: Sequence[dict[str, Any]]) -> list[Deal]:
    """Which rows of which chunks each shard holds, for each split and source that has rows, and for
    each class where those lie apart."""
    row_bytes = _row_bytes(job, packed)
    deals: list[Deal] = []
    for split in SPLITS:
        for source in range(len(job.sources)):
            mine = {
                index: record[split]
                for index, record in enumerate(packed)
                if split in record and job.chunks[index].source == source
            }
            for label in range(len(job.labels)) if job.parts_labels(split) else (None,):
                runs = {index: _run(record, label) for index, record in mine.items()}
                runs = {index: run for index, run in runs.items() if run[1]}
                if runs:
                    totals = [mine[index]["num_rows"] for index in runs]
                    deals.append(_deal(job, split, source, label, runs, totals, row_bytes))
    return deals


def _run(record: Mapping[str, Any], label: int | None) -> tuple[int, int]:
    """Where the rows of a class begin in a chunk, and how many they are."""
    if label is None:
        return 0, int(record["num_rows"])
    counts = [own["num_rows"] for own in record["labels"]]
    return sum(counts[:label]), counts[label]


def _row_bytes(job: Preparation, packed: Sequence[dict[str, Any]]) -> int:
    """About what a row takes: its tokens, and the mean of the arrays that rows have besides."""
    tokens = job.sequence_tokens * np.dtype(job.info.dtype).itemsize if job.task.tokenizes else 0
    records = [found[split] for found in packed for split in SPLITS if split in found]
    arrays = int(sum(record.get("num_array_bytes", 0) for record in records))
    num_rows = int(sum(record["num_rows"] for record in records))
    return max(1, tokens + arrays // max(1, num_rows))


def _deal(  # noqa: PLR0917
    job: Preparation,
    split: str,
    source: int,
    label: int | None,
    runs: Mapping[int, tuple[int, int]],
    totals: Sequence[int],
    row_bytes: int,
) -> Deal:
    """How many rows of each chunk go to each shard is drawn without replacement from the places
    left in the shards (multivariate hypergeometric)."""
    counts = [count for _, count in runs.values()]
    total = sum(counts)
    target = max(SHARD_BYTES, min(MAX_SHARD_BYTES, total * row_bytes // 256))
    shard_rows = max(1, target // (row_bytes * job.group_rows)) * job.group_rows
    left = np.full(-(-total // shard_rows), shard_rows, np.int64)
    left[-1] = total - shard_rows * (len(left) - 1)
    rng = job.rng(3, SPLITS.index(split), source, *(() if label is None else (label,)))
    dealt = np.stack([_draw(rng, left, count) for count in counts])
    bundle, group = 0, 0
    if dealt.size > DIRECT_READS:
        bundle, group = (math.isqrt(size - 1) + 1 for size in dealt.shape)
    firsts = np.array([first for first, _ in runs.values()], np.int64)
    chunks, rows = np.array(list(runs), np.int64), np.array(totals, np.int64)
    return Deal(split, source, chunks, dealt, bundle, group, label, firsts, rows)


def _draw(
    rng: np.random.Generator, left: np.ndarray[Any, np.dtype[np.int64]], count: int
) -> np.ndarray[Any, Any]:
    """How many of `count` rows go to each shard; takes them off `left`."""
    if left.sum() <= MAX_ROWS_DEALT:
        taken = rng.multivariate_hypergeometric(left, count, method="marginals")
    else:
        # Too many for numpy: halves of the shards share them by their places, the rest is drawn.
        middle = len(left) // 2
        head = min(
            int(left[:middle].sum()),
            max(
                count - int(left[middle:].sum()),
                round(count * float(left[:middle].sum() / left.sum())),
            ),
        )
        return np.concatenate(
            [_draw(rng, left[:middle], head), _draw(rng, left[middle:], count - head)]
        )
    left -= taken
    return taken
