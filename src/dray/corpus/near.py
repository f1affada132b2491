"""Which documents are nearly equal: MinHash signatures in bands, candidates from equal bands,
verified by the exact Jaccard similarity of their shingles, and gathered into components.

Broder 1997; Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, ch. 3. Works on what exact
deduplication has left. Of a component the first document is kept: those of validation first, then
by source, file and offset. Nothing holds more than the bands of one partition, or the shingles of
some megabytes of pairs; only the last step holds something of all, the links of near-duplicates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pyarrow import fs as pafs

from dray.corpus.duplicates import DROP, kept_documents
from dray.corpus.examples import CHARS, EACH, IS_LIKE, Examples
from dray.corpus.packing import Ints
from dray.corpus.parts import Preparation, read_batch, save_record, staged, write_arrays
from dray.corpus.sections import Records, read_section, write_sections
from dray.corpus.shingles import Counts, Hashes, Shingles, mixed, similarities
from dray.corpus.stages import Progress, run_stage
from dray.corpus.tokenizing import Decoder
from dray.spec import Near
from dray.storage.filesystem import child

REASONS = ("near_duplicate", "near_in_validation")
BAND = np.dtype([("key", np.uint64), ("chunk", np.int32), ("document", np.int32)])
"""A band of a document's signature."""
PAIR = np.dtype(
    [("chunk", np.int32), ("document", np.int32), ("chunk2", np.int32), ("document2", np.int32)]
)
"""Two documents in reading order."""
NAMES = tuple(name for name, *_ in PAIR.descr)
LINK = np.dtype([*PAIR.descr, ("class", np.uint64), ("class2", np.uint64), ("share", np.float32)])
"""Two near-duplicates with the hashes of their labels (0: none) and their similarity."""
PARTITION_BANDS = 1 << 22
"""Bands in one partition of candidates, about."""
MAX_BUNDLE_BANDS = 1 << 23
MAX_STARS = 32
"""Documents with an equal band that each later one is compared with."""
VERIFIED_BYTES = 64 << 20
"""Shingles that are held to verify candidates."""
SHOWN_TOKENS = 200
"""Of an example's beginning."""
MAX_OPEN = 64
SEED = 1


@dataclass(frozen=True)
class Cut:
    """How the work is cut; the result does not depend on it."""

    num_partitions: int
    bundle_chunks: int
    """Chunks whose bands, and whose candidates, travel together."""
    num_bundles: int

    def chunks(self, bundle: int, num_chunks: int) -> range:
        """Those of a bundle."""
        first = bundle * self.bundle_chunks
        return range(first, min(num_chunks, first + self.bundle_chunks))


def plan_near(job: Preparation, num_documents: int) -> Cut:
    """Partitions by the number of bands, bundles such that their bands fit into memory."""
    num_bands = num_documents * job.cleaning.near.bands
    num_partitions = max(1, -(-num_bands // PARTITION_BANDS))
    num_bundles = max(1, -(-num_bands // MAX_BUNDLE_BANDS))
    bundle = max(1, len(job.chunks) // num_bundles)
    return Cut(num_partitions, bundle, -(-len(job.chunks) // bundle))


def write_shingles(
    filesystem: pafs.FileSystem, path: str, shingles: Shingles, counts: Counts, classes: Hashes
) -> None:
    """What is kept of a chunk's documents until near-duplicates are found: their number, where the
    shingles of each begin, its label's hash, and the shingles."""
    bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    head = np.array([len(counts)], np.int64)
    write_arrays(filesystem, f"{path}.shingles", [head, bounds, classes, shingles])


class _ShingleFile:
    """The shingles of a chunk, read as they are asked for."""

    def __init__(self, job: Preparation, chunk: int) -> None:
        filesystem, path = staged(job, "read", f"{job.chunks[chunk].name}.shingles")
        self._file = filesystem.open_input_file(path)
        (self.num_documents,) = np.frombuffer(self._file.read_at(8, 0), np.int64).tolist()
        head = self._file.read_at(16 * self.num_documents + 8, 8)
        self.bounds = np.frombuffer(head, np.int64, self.num_documents + 1)
        self.classes = np.frombuffer(head, np.uint64, offset=self.bounds.nbytes)

    def read(self, first: int, stop: int) -> Shingles:
        """Those of the documents from `first` to before `stop`."""
        begin, end = int(self.bounds[first]), int(self.bounds[stop])
        at = 16 * self.num_documents + 16 + 4 * begin
        return np.frombuffer(self._file.read_at(4 * (end - begin), at), np.uint32)

    def close(self) -> None:
        self._file.close()


def find_bands(job: Preparation, item: tuple[int, Cut]) -> dict[str, Any]:
    """The bands of the documents of a bundle of chunks that exact deduplication has left, by
    partition."""
    bundle, cut = item
    found = [np.empty(0, BAND)]
    for chunk in cut.chunks(bundle, len(job.chunks)):
        with closing(_ShingleFile(job, chunk)) as file:
            keep = kept_documents(job, chunk, file.num_documents) & (np.diff(file.bounds) > 0)
            for first, stop in _slices(file.bounds):
                shingles = file.read(first, stop)
                bounds = file.bounds[first : stop + 1] - file.bounds[first]
                keys = band_keys(shingles, bounds, job.cleaning.near)
                chosen = np.flatnonzero(keep[first:stop])
                bands = np.empty((len(chosen), keys.shape[1]), BAND)
                bands["key"], bands["chunk"] = keys[chosen], chunk
                bands["document"] = (first + chosen)[:, None]
                found.append(bands.ravel())
    entries = np.concatenate(found)
    place = (entries["key"] % np.uint64(cut.num_partitions)).astype(np.int64)
    order = np.argsort(place, kind="stable")
    bounds = np.searchsorted(place[order], np.arange(1, cut.num_partitions))
    sections = np.split(entries[order], bounds.tolist())
    write_sections(*staged(job, "bands", f"{bundle:06d}.bands"), sections)
    return save_record(job, "bands", bundle, {"num_bands": len(entries)})


def _slices(bounds: Counts) -> Iterator[tuple[int, int]]:
    """Runs of documents whose shingles are some megabytes; one with more is a run."""
    first = 0
    while first < len(bounds) - 1:
        limit = bounds[first] + VERIFIED_BYTES // 16
        stop = max(first + 1, int(np.searchsorted(bounds, limit, "right")) - 1)
        yield first, stop
        first = stop


def band_keys(shingles: Shingles, bounds: Counts, near: Near) -> Hashes:
    """[documents, bands]: a hash of each band of each document's signature. Sets with the Jaccard
    similarity s agree in one of them with the probability 1 - (1 - sʳ)ᵇ, for b bands of r rows."""
    from rensa import RMinHash

    signatures = RMinHash.digest_matrix_from_flat_token_hashes(
        shingles.astype(np.uint64), bounds.astype(np.uint64), near.permutations, SEED
    )
    rows = near.permutations // near.bands
    values = np.array(signatures.to_rows(), np.uint64).reshape(len(bounds) - 1, near.bands, rows)
    keys = np.zeros(values.shape[:2], np.uint64)
    keys += np.arange(near.bands, dtype=np.uint64)  # equal rows of different bands are nothing
    for row in range(rows):
        keys = mixed(keys * np.uint64(0x9E3779B97F4A7C15) + values[:, :, row])
    return keys


def find_candidates(job: Preparation, item: tuple[int, Cut]) -> dict[str, Any]:
    """Pairs of documents with an equal band in one partition, by the bundle of the first.

    Of more than MAX_STARS documents with an equal band each is paired with the first of them alone:
    what would be a square stays a line.
    """
    partition, cut = item
    files = range(cut.num_bundles)
    bands = np.concatenate(
        [
            read_section(
                *staged(job, "bands", f"{bundle:06d}.bands"), partition, cut.num_partitions, BAND
            )
            for bundle in files
        ]
    )
    if (held := _held(job)).any():
        bands = bands[np.argsort(~held[bands["chunk"]], kind="stable")]
    bands = bands[np.argsort(bands["key"], kind="stable")]
    left, right = paired(bands["key"])
    pairs = np.empty(len(left), PAIR)
    for end, chosen in (("", left), ("2", right)):
        for name in ("chunk", "document"):
            pairs[name + end] = bands[name][chosen]
    pairs = np.unique(pairs)
    bounds = np.searchsorted(pairs["chunk"], np.arange(1, cut.num_bundles) * cut.bundle_chunks)
    sections = np.split(pairs, bounds.tolist())
    write_sections(*staged(job, "candidates", f"{partition:06d}.pairs"), sections)
    return save_record(job, "candidates", partition, {"num_pairs": len(pairs)})


def paired(keys: Hashes) -> tuple[Ints, Ints]:
    """Places of pairs with equal keys, which are sorted: each with the first MAX_STARS before."""
    firsts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)])
    nth = np.arange(len(keys)) - np.repeat(firsts, np.diff(firsts, append=len(keys)))
    lefts, rights = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for star in range(MAX_STARS):
        mine = np.flatnonzero(nth > star)
        if not len(mine):
            break
        lefts.append(mine - nth[mine] + star)
        rights.append(mine)
    return np.concatenate(lefts), np.concatenate(rights)


def verify(job: Preparation, item: tuple[int, Cut]) -> dict[str, Any]:
    """The candidates whose first document is of a bundle and that are near-duplicates."""
    bundle, cut = item
    partitions = [
        read_section(
            *staged(job, "candidates", f"{partition:06d}.pairs"), bundle, cut.num_bundles, PAIR
        )
        for partition in range(cut.num_partitions)
    ]
    # Found in several bands, a pair is looked at once; by its second, so that files are read once.
    pairs = np.unique(np.concatenate(partitions))
    pairs = pairs[np.lexsort((pairs["document2"], pairs["chunk2"]))]
    links = [np.empty(0, LINK), *_verified(job, pairs)]
    found = np.concatenate(links)
    write_sections(*staged(job, "links", f"{bundle:06d}.links"), [found])
    return save_record(
        job, "links", bundle, {"num_candidates": len(pairs), "num_links": len(found)}
    )


def _verified(job: Preparation, pairs: Records) -> Iterator[Records]:
    """The links among candidates, some megabytes of shingles at a time."""
    with ExitStack() as stack:
        files: dict[int, _ShingleFile] = {}

        def file_of(chunk: int) -> _ShingleFile:
            if chunk not in files:
                if len(files) == MAX_OPEN:
                    files.pop(next(iter(files))).close()
                files[chunk] = _ShingleFile(job, chunk)
                stack.callback(files[chunk].close)
            return files[chunk]

        begin = 0
        while begin < len(pairs):
            places: dict[tuple[int, int], int] = {}
            sets: list[Shingles] = []
            classes: list[int] = []
            size, stop = 0, begin
            while stop < len(pairs) and (size < VERIFIED_BYTES or stop == begin):
                for end in ("", "2"):
                    chunk, document = (int(pairs[name + end][stop]) for name in NAMES[:2])
                    if (chunk, document) not in places:
                        file = file_of(chunk)
                        places[chunk, document] = len(sets)
                        sets.append(file.read(document, document + 1))
                        classes.append(int(file.classes[document]))
                        size += sets[-1].nbytes
                stop += 1
            yield _links(job.cleaning.near, pairs[begin:stop], places, sets, classes)
            begin = stop


def _links(
    near: Near,
    pairs: Records,
    places: Mapping[tuple[int, int], int],
    sets: Sequence[Shingles],
    classes: Sequence[int],
) -> Records:
    """Those of some candidates that are alike enough."""
    ends = [
        np.array([places[key] for key in zip(*(pairs[n + end].tolist() for n in NAMES[:2]),
                                              strict=True)], np.int64)
        for end in ("", "2")
    ]  # fmt: skip
    bounds = np.cumsum([0, *map(len, sets)])
    shares = similarities(np.concatenate(sets), bounds, *ends)
    alike = shares >= near.similarity
    links = np.empty(int(alike.sum()), LINK)
    for name in NAMES:
        links[name] = pairs[name][alike]
    links["share"] = shares[alike]
    for name, end in (("class", ends[0]), ("class2", ends[1])):
        links[name] = np.array(classes, np.uint64)[end[alike]]
    return links


def drop_near(job: Preparation, item: Cut) -> dict[str, Any]:
    """What all links leave out, by chunk: of each component all but the first document. One task
    for all: it holds some 100 bytes for each link, and nothing of any other document."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    links = np.concatenate(
        [
            read_section(*staged(job, "links", f"{bundle:06d}.links"), 0, 1, LINK)
            for bundle in range(item.num_bundles)
        ]
    )
    held = _held(job)
    ends = np.concatenate([_places(links["chunk"], links["document"], held),
                           _places(links["chunk2"], links["document2"], held)])  # fmt: skip
    nodes, at, where = np.unique(ends, return_index=True, return_inverse=True)
    classes = np.concatenate([links["class"], links["class2"]])[at]
    left, right = np.split(where, 2)
    graph = coo_array((np.ones(len(left), np.int8), (left, right)), (len(nodes), len(nodes)))
    number, component = (
        connected_components(graph, directed=False) if len(nodes) else (0, np.empty(0, np.int64))
    )
    firsts = np.full(number, len(nodes))
    np.minimum.at(firsts, component, np.arange(len(nodes)))
    kept = firsts[component]
    lost = np.flatnonzero(kept != np.arange(len(nodes)))
    outside = nodes >> np.uint64(63)
    leaked = (outside[lost] > 0) & (outside[kept[lost]] == 0)
    drops = np.empty(len(lost), DROP)
    drops["chunk"] = (nodes[lost] >> np.uint64(32)) & np.uint64(0x7FFFFFFF)
    drops["document"] = nodes[lost] & np.uint64(0xFFFFFFFF)
    drops = drops[np.argsort(drops["chunk"], kind="stable")]
    bounds = np.searchsorted(drops["chunk"], np.arange(1, len(job.chunks)))
    write_sections(*staged(job, "near", "000000.drops"), np.split(drops, bounds.tolist()))
    return save_record(
        job,
        "near",
        0,
        {
            "near_duplicate": int((~leaked).sum()),
            "near_in_validation": int(leaked.sum()),
            "contradicting": int((classes[lost] != classes[kept[lost]]).sum()),
            "examples": _examples(job, nodes[lost], nodes[kept[lost]]),
        },
    )


def _examples(job: Preparation, lost: Hashes, kept: Hashes) -> Examples:
    """Some documents that are left out, each with the one that is kept in its place, as their
    tokens tell them."""
    if not len(lost) or not job.task.tokenizes:
        return {}
    chosen = np.argsort(mixed(lost.copy()), kind="stable")[:EACH]
    return {
        REASONS[0]: [
            (
                f"{int(lost[place]):016x}",
                IS_LIKE.join(_beginning(job, nodes[place]) for nodes in (lost, kept)),
            )
            for place in chosen.tolist()
        ]
    }


def _beginning(job: Preparation, node: np.uint64) -> str:
    """The first tokens of a document as text."""
    chunk, document = int(node >> np.uint64(32)) & 0x7FFFFFFF, int(node) & 0xFFFFFFFF
    filesystem, path = staged(job, "read", job.chunks[chunk].name)
    lengths = read_batch(filesystem, f"{path}.documents").column("num_tokens").to_numpy()
    kind = np.dtype(job.info.dtype)
    size = min(int(lengths[document]), SHOWN_TOKENS) * kind.itemsize
    with filesystem.open_input_file(f"{path}.tokens") as file:
        data = file.read_at(size, int(lengths[:document].sum()) * kind.itemsize)
    decoder = Decoder(child(job.folder, "tokenizer"))
    return decoder(np.frombuffer(data, kind).tolist())[: CHARS // 2]


def _held(job: Preparation) -> npt.NDArray[np.bool_]:
    """[chunks]: which are of validation sources."""
    return np.array([job.sources[chunk.source].split == "validation" for chunk in job.chunks], bool)


def _places(chunks: npt.NDArray[Any], documents: npt.NDArray[Any], held: Any) -> Hashes:
    """Numbers of documents in the order in which they are kept."""
    place = (chunks.astype(np.uint64) << np.uint64(32)) | documents.astype(np.uint64)
    found: Hashes = place | ((~held[chunks]).astype(np.uint64) << np.uint64(63))
    return found


def near_kept(job: Preparation, chunk: int, num_documents: int) -> npt.NDArray[np.bool_]:
    """The documents of a chunk that are near-duplicates of none before; all where none was looked
    for."""
    keep = np.ones(num_documents, bool)
    if job.finds_near:
        drops = read_section(*staged(job, "near", "000000.drops"), chunk, len(job.chunks), DROP)
        keep[drops["document"]] = False
    return keep


def run_near(job: Preparation, num_documents: int, say: Progress) -> list[dict[str, Any]]:
    """All the steps, one after the other; the record of the last, or nothing if the spec asks for
    none."""
    if not job.finds_near or not job.chunks:
        return []
    cut = plan_near(job, num_documents)
    bundles = [(bundle, cut) for bundle in range(cut.num_bundles)]
    run_stage(job, "bands", find_bands, bundles, say)
    partitions = [(partition, cut) for partition in range(cut.num_partitions)]
    run_stage(job, "candidates", find_candidates, partitions, say)
    run_stage(job, "links", verify, bundles, say)
    return run_stage(job, "near", drop_near, [cut], say)
