"""What cleaning a corpus finds and costs, for docs/corpora.md.

    python -m bench.corpora near      near-duplicates beside the exact answer and datatrove, memory
    python -m bench.corpora filters   the published rules beside datatrove's, languages
    python -m bench.corpora pages     what is taken of the pages of a crawl

`near`: the documents of ../shared/data/corpus_en and 600 copies with some words changed. The truth
is the Jaccard similarity of all pairs. A pair is found where not both of its documents are kept.
Both arms work on one core, in turn, and CPU time is what they are compared by. `filters`: the pages
of ../shared/data/web_messy that are English. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
from scipy import sparse

from bench.report import ROOT, write_section
from dray.cluster.connection import connect
from dray.corpus import near, prepare
from dray.corpus.filters import judge
from dray.corpus.languages import language_of
from dray.corpus.parts import read_batch, staged
from dray.corpus.prepare import Corpus
from dray.corpus.reading import Span, SpanReader
from dray.corpus.shingles import shingle
from dray.corpus.sources import find_files
from dray.spec import Filters, Source, make_spec

DATA = ROOT / "../shared/data"
PAGE = ROOT / "docs" / "corpora.md"
COPIES = 600
SIMILARITY = 0.8
WORDS = 5
BANDS, ROWS = 16, 8
ROUNDS = 3
Pairs = set[tuple[int, int]]


# --- near-duplicates -----------------------------------------------------------------------------


def documents(seed: int = 0) -> list[str]:
    """The documents of corpus_en, each once, and copies of some with 0.5 to 5 % of their words
    changed."""
    texts: dict[str, None] = {}
    for path in sorted((DATA / "corpus_en").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            texts.update(dict.fromkeys(json.loads(line)["text"].strip() for line in file))
    found = [text for text in texts if text]
    rng = random.Random(seed)
    words = " ".join(found[:200]).split()
    for text in rng.sample(found, COPIES):
        parts = re.split(r"(\s+)", text)
        share = rng.uniform(0.005, 0.05)
        changed = [rng.choice(words) if p.strip() and rng.random() < share else p for p in parts]
        found.append("".join(changed))
    found = list(dict.fromkeys(found))
    rng.shuffle(found)
    return found


def true_pairs(texts: Sequence[str]) -> Pairs:
    """All pairs whose sets of runs of words have a Jaccard similarity of 0.8 or more, by the
    definition: words are letters and digits in lower case, and every pair is looked at."""
    ids: dict[tuple[str, ...], int] = {}
    columns: list[int] = []
    bounds = [0]
    for text in texts:
        words = re.findall(r"[^\W_]+", text.lower())
        runs = {tuple(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))}
        columns += [ids.setdefault(run, len(ids)) for run in runs if run]
        bounds.append(len(columns))
    shape = len(texts), len(ids)
    rows = sparse.csr_array((np.ones(len(columns), np.int32), columns, bounds), shape)
    sizes = np.diff(rows.indptr)
    transposed = rows.T.tocsc()
    found: Pairs = set()
    for first in range(0, len(texts), 500):
        common = (rows[first : first + 500] @ transposed).tocoo()
        left, right = common.coords[0] + first, common.coords[1]
        shares = common.data / (sizes[left] + sizes[right] - common.data)
        alike = (shares >= SIMILARITY) & (left < right)
        found |= set(zip(left[alike].tolist(), right[alike].tolist(), strict=True))
    return found


@dataclass(frozen=True)
class Answer:
    """Which documents an arm keeps, and the CPU seconds that it took."""

    kept: set[int]
    seconds: float


def run_dray(texts: Sequence[str], folder: Path) -> Answer:
    """By `dray prepare`, its steps for near-duplicates in this process."""
    began = time.process_time()
    for start in range(0, len(texts), 1000):
        shingle(pa.array(texts[start : start + 1000], pa.large_string()), WORDS)
    seconds = [time.process_time() - began]

    def run_near(job: Any, num_documents: int, say: Any) -> list[dict[str, Any]]:
        started = time.process_time()
        records = run_steps(job, num_documents, lambda name, step: step())
        seconds.append(time.process_time() - started)
        # Chunks are in reading order, and no document is dropped before.
        for chunk, one in enumerate(job.chunks):
            columns = read_batch(*staged(job, "read", f"{one.name}.documents"))
            keeps.append(near.near_kept(job, chunk, columns.num_rows))
        return records

    keeps: list[Any] = []
    corpus = make_corpus(texts, folder, run_near)
    kept = set(np.flatnonzero(np.concatenate(keeps)).tolist())
    if len(kept) != corpus.manifest.train.num_documents:
        raise SystemExit("the rows have other documents than the steps have kept")
    return Answer(kept, sum(seconds))


def run_steps(
    job: Any, num_documents: int, each: Callable[[str, Callable[[], Any]], Any]
) -> list[dict[str, Any]]:
    """All the steps for near-duplicates, one piece of work after the other."""
    cut = near.plan_near(job, num_documents)
    for bundle in range(cut.num_bundles):
        each("signatures and bands", lambda b=bundle: near.find_bands(job, (b, cut)))
    for partition in range(cut.num_partitions):
        each("candidates", lambda p=partition: near.find_candidates(job, (p, cut)))
    for bundle in range(cut.num_bundles):
        each("verifying", lambda b=bundle: near.verify(job, (b, cut)))
    return [each("components", lambda: near.drop_near(job, cut))]


def make_corpus(texts: Sequence[str], folder: Path, run_near: Any) -> Corpus:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tree = {
        "name": "near",
        "task": "causal_lm",
        "data": {
            "train": str(path),
            "sequence_tokens": 256,
            "cleaning": {"normalize": "none", "deduplicate": "near"},
        },
        "tokenizer": {"train": "byte_bpe", "vocab_size": 300, "sample_bytes": 100_000},
        "model": {"architecture": "llama", "hidden_size": 64, "num_layers": 1, "num_heads": 2},
        "duration": {"steps": 1},
    }
    with mock.patch.object(prepare, "run_near", run_near):
        return prepare.prepare(make_spec(tree), str(folder / "storage"))


def run_datatrove(texts: Sequence[str], folder: Path, tokenizer: Any) -> Answer:
    """By datatrove's four steps, with as many bands and rows."""
    import xxhash
    from datatrove.data import Document
    from datatrove.pipeline.dedup import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )

    shutil.rmtree(folder, ignore_errors=True)
    config = MinhashConfig(n_grams=WORDS, num_buckets=BANDS, hashes_per_bucket=ROWS)
    places = [str(folder / name) for name in ("signatures", "buckets", "clusters")]
    given = [Document(text=text, id=str(number)) for number, text in enumerate(texts)]
    began = time.process_time()
    signatures = MinhashDedupSignature(places[0], config=config, language=tokenizer)
    # It hands texts to xxhash, which takes bytes alone since version 4.
    signatures._hash_func = lambda text: xxhash.xxh64_intdigest(text.encode())
    list(signatures.run(iter(given), 0, 1) or ())
    buckets = MinhashDedupBuckets(places[0], places[1], config=config)
    for rank in range(BANDS):
        buckets.run(None, rank, BANDS)
    MinhashDedupCluster(places[1], places[2], config=config).run(None, 0, 1)
    kept = {int(one.id) for one in MinhashDedupFilter(places[2]).run(iter(given), 0, 1)}
    return Answer(kept, time.process_time() - began)


def quality(kept: set[int], truth: Pairs, count: int) -> tuple[float, int]:
    """The share of true pairs of which not both documents are kept, and how many documents are
    left out that are in no true pair."""
    found = sum(not {left, right} <= kept for left, right in truth)
    alike = {number for pair in truth for number in pair}
    return found / len(truth), len(set(range(count)) - kept - alike)


@contextmanager
def small_pieces() -> Iterator[None]:
    """Pieces of work so small that a corpus of this size is many."""
    with (
        mock.patch.object(near, "PARTITION_BANDS", 1 << 13),
        mock.patch.object(near, "MAX_BUNDLE_BANDS", 1 << 14),
        mock.patch.object(near, "VERIFIED_BYTES", 1 << 20),
        mock.patch.object(prepare, "MIN_CHUNK_BYTES", 1 << 20),
    ):
        yield


def peaks(texts: Sequence[str], folder: Path) -> dict[str, float]:
    """Megabytes that a piece of work of each step holds at most."""
    found: Counter[str] = Counter()

    def each(name: str, step: Callable[[], Any]) -> Any:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        record = step()
        _, peak = tracemalloc.get_traced_memory()
        found[name] = max(found[name], (peak - before) / 2**20)
        return record

    tracemalloc.start()
    with small_pieces():
        make_corpus(texts, folder, lambda job, count, say: run_steps(job, count, each))
    tracemalloc.stop()
    return dict(found)


def grown(texts: Sequence[str], times: int) -> list[str]:
    """Several times as many documents, the further ones with words of their own."""
    more = [
        re.sub(r"\w+", lambda match, n=n: f"{match.group()[:3]}{n}", text)
        for n in range(1, times)
        for text in texts
    ]
    return [*texts, *more]


def measure_near() -> None:
    from datatrove.utils.word_tokenizers import WhitespaceTokenizer, load_word_tokenizer

    texts = documents()
    truth = true_pairs(texts)
    print(f"{len(texts):,} documents, {len(truth):,} pairs", file=sys.stderr, flush=True)
    folder = Path(tempfile.mkdtemp(prefix="corpora-"))
    arms: dict[str, Callable[[], Answer]] = {
        "dray": lambda: run_dray(texts, folder / "dray"),
        "datatrove, words by white space": lambda: run_datatrove(
            texts, folder / "white", WhitespaceTokenizer()
        ),
        "datatrove as it comes (spaCy)": lambda: run_datatrove(
            texts, folder / "spacy", load_word_tokenizer("eng")
        ),
    }
    answers: dict[str, list[Answer]] = {name: [] for name in arms}
    for turn in range(ROUNDS):
        for name, run in arms.items():
            print(f"{turn}: {name}", file=sys.stderr, flush=True)
            answers[name].append(run())
    lines = [
        f"{len(texts):,} documents, of which {COPIES} are copies with 0.5 to 5 % of their words "
        f"changed; {len(truth):,} pairs of a Jaccard similarity of {SIMILARITY} or more; {BANDS} "
        f"bands of {ROWS} rows; median of {ROUNDS} rounds in turn, CPU time of one core.",
        "",
        "| arm | recall of pairs | left out that are in no pair | documents a second |",
        "|---|--:|--:|--:|",
    ]
    for name, found in answers.items():
        recall, extra = quality(found[0].kept, truth, len(texts))
        pace = len(texts) / statistics.median(answer.seconds for answer in found)
        lines.append(f"| {name} | {recall:.3f} | {extra:,} | {pace:,.0f} |")
    sizes = {times: peaks(grown(texts[:2000], times), folder / "memory") for times in (1, 4)}
    lines += [
        "",
        "Memory of the largest piece of work by step, where pieces are a thousandth of their usual "
        "size: 2,000 documents, and 8,000.",
        "",
        "| step | 2,000 | 8,000 |",
        "|---|--:|--:|",
        *(f"| {name} | {sizes[1][name]:.1f} MB | {sizes[4][name]:.1f} MB |" for name in sizes[1]),
    ]
    shutil.rmtree(folder)
    figures = {
        "pairs": len(truth),
        "seconds": {name: [one.seconds for one in found] for name, found in answers.items()},
        "peaks": sizes,
    }
    write_section("near", "\n".join(lines), figures, PAGE)


# --- filters and languages -----------------------------------------------------------------------


def pages() -> list[str]:
    """The pages of web_messy and of C4, those without text aside."""
    found: list[str] = []
    for path in sorted((DATA / "web_messy").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            found += [json.loads(line)["text"] for line in file]
    return [text for text in dict.fromkeys(found) if text.strip()]


def datatrove_filters() -> dict[str, Any]:
    from datatrove.pipeline import filters

    return {
        "gopher_repetition": filters.GopherRepetitionFilter(),
        "gopher_quality": filters.GopherQualityFilter(),
        "c4": filters.C4QualityFilter(),
        "fineweb": filters.FineWebQualityFilter(),
    }


def measure_filters() -> None:
    from datatrove.data import Document

    everything = pages()
    language_of("")
    began = time.process_time()
    told = [language_of(text) for text in everything]
    pace = len(everything) / (time.process_time() - began)
    texts = [
        text
        for text, (code, score) in zip(everything, told, strict=True)
        if code == "en" and score >= 0.65
    ]
    lines = [
        f"{len(texts):,} English pages of {len(everything):,}, each rule by itself; median of "
        f"{ROUNDS} rounds in turn, CPU time of one core.",
        "",
        "| rules | dray keeps | datatrove keeps | same answer | pages a second | times as fast |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    figures: dict[str, Any] = {"languages": pace}
    for name, other in datatrove_filters().items():
        rules = Filters.model_validate({name: {}})
        own: list[bool] = []
        beside: list[bool] = []
        seconds: dict[str, list[float]] = {"dray": [], "datatrove": []}
        for _ in range(ROUNDS):
            began = time.process_time()
            own = [judge(text, rules, Counter())[1] is None for text in texts]
            seconds["dray"].append(time.process_time() - began)
            began = time.process_time()
            found = [other.filter(Document(text=text, id="")) for text in texts]
            seconds["datatrove"].append(time.process_time() - began)
            beside = [one if isinstance(one, bool) else one[0] for one in found]
        same = sum(a == b for a, b in zip(own, beside, strict=True)) / len(texts)
        medians = {arm: statistics.median(values) for arm, values in seconds.items()}
        lines.append(
            f"| `{name}` | {sum(own):,} | {sum(beside):,} | {same:.1%} | "
            f"{len(texts) / medians['dray']:,.0f} | {medians['datatrove'] / medians['dray']:.1f} |"
        )
        figures[name] = {"seconds": seconds, "same": same}
    lines += ["", f"Languages of all {len(everything):,} pages: {pace:,.0f} a second."]
    write_section("filters", "\n".join(lines), figures, PAGE)


# --- pages ---------------------------------------------------------------------------------------


def measure_pages() -> None:
    source = Source(path=str(DATA / "web_messy" / "sample-0000.warc.gz"))
    (file,) = find_files(source, "data.train.0")
    ways = ("main", "all", "trafilatura")
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    lengths: dict[str, list[int]] = {}
    dropped: Counter[str] = Counter()
    for _ in range(ROUNDS):
        for way in ways:
            own = source.model_copy(update={"extract": way})
            began = time.process_time()
            found = list(SpanReader(Span(file), own, 1 << 24).read())
            seconds[way].append(time.process_time() - began)
            lengths[way] = [len(text) for one in found for text in one.texts.to_pylist()]
            dropped = sum((one.dropped for one in found), Counter())
    told = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
    lines = [
        f"{len(lengths['main'])} pages; of the other records {told}; median of {ROUNDS} rounds in "
        "turn, CPU time of one core, reading included.",
        "",
        "| `extract` | pages with text | characters of a page | pages a second |",
        "|---|--:|--:|--:|",
    ]
    for way in ways:
        pace = len(lengths[way]) / statistics.median(seconds[way])
        mean = statistics.mean(lengths[way])
        lines.append(f"| `{way}` | {len(lengths[way])} | {mean:,.0f} | {pace:,.0f} |")
    write_section("pages", "\n".join(lines), {"seconds": seconds, "lengths": lengths}, PAGE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", default=["near", "filters", "pages"])
    given = parser.parse_args()
    known = {"near": measure_near, "filters": measure_filters, "pages": measure_pages}
    with connect(None, num_cpus=1):
        for name in given.what:
            known[name]()


if __name__ == "__main__":
    main()
