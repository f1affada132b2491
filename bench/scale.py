"""(g) What grows with the corpus, the run and the cluster, and what must not: mostly simulated,
minutes on two cores.

    python -m bench.scale [--sizes 20,200]
        [--only tasks,stream,trillions,opens,preparing,metrics,manifest,driver,attempts,failures]

Each section gives checks: what was looked at, what is wanted, what was found. The command fails if
one does not hold. `--sizes 20,200,2000` prepares 2 GB as well; text is made as in bench.corpus.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import scale_failures, scale_records
from bench.corpus import CORPUS, run_arm, train_tokenizer, write_corpus
from bench.report import Check, write_section

# --- the stream ----------------------------------------------------------------------------------


def make_large_corpus(folder: Path, num_shards: int, num_files: int, tokens: int = 2048) -> Any:
    """The manifest of a corpus that is not there, in its folder: shards of 256 MiB from so many raw
    files."""
    from dray.corpus.manifest import (
        MANIFEST,
        SOURCE_FILES,
        VERSION,
        Manifest,
        Packing,
        Shard,
        SourceFile,
        SourceRows,
        Split,
        dump_manifest,
        dump_source_files,
    )

    rows = 2**28 // (2 * tokens)
    shards = tuple(
        Shard(file=f"train/000-{n:06d}.arrow", num_rows=rows, num_bytes=2**28, sha256=f"{n:064x}")
        for n in range(num_shards)
    )
    source = SourceRows(
        name="text",
        weight=None,
        num_rows=rows * num_shards,
        num_documents=rows * num_shards,
        num_tokens=rows * tokens * num_shards,
        num_text_bytes=2**30 * num_shards,
        shards=shards,
    )
    files = [
        SourceFile(
            path=f"/data/part-{n:06d}.jsonl",
            num_bytes=2**27,
            sha256=f"{n:064x}",
            num_documents=1000,
            num_bad=0,
        )
        for n in range(num_files)
    ]
    packing = Packing(
        utilization=1.0, num_cut_documents=0, num_truncated_documents=0, num_truncated_tokens=0
    )
    manifest = Manifest.model_construct(
        version=VERSION,
        key=f"{num_shards:016x}",
        sequence_tokens=tokens,
        group_rows=256,
        vocab_size=50_000,
        pad_token_id=0,
        eos_token_id=0,
        encoder="tokenizers",
        labels=(),
        train=Split(sources=(source,)),
        validation=None,
        num_source_files=num_files,
        num_source_bytes=2**27 * num_files,
        dropped={},
        num_records=1,
        num_bad=0,
        packing=packing,
        shuffle_seed=0,
    )
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_bytes(dump_manifest(manifest))
    (folder / SOURCE_FILES).write_bytes(dump_source_files(files))
    return manifest


def make_stream(folder: Path, key: str, num_steps: int) -> Any:
    from dray.corpus.stream import RowStream

    return RowStream(
        folder=str(folder),
        key=key,
        seed=0,
        global_rows=1024,
        num_ranks=8,
        rows_per_rank=128,
        micro_rows=8,
        start_step=0,
        num_steps=num_steps,
        validate_every=1000,
    )


def measure_tasks(_: argparse.Namespace) -> Iterator[Check]:
    """What Ray Data is given when a run of 10^7 steps on 8 ranks starts."""
    from ray import cloudpickle

    from dray.corpus.stream import build_datasource

    sizes, totals, manifests = [], [], []
    for num_shards, num_files in ((1, 1), (256, 10_000), (2000, 100_000)):
        with tempfile.TemporaryDirectory() as place:
            manifest = make_large_corpus(Path(place) / "corpus", num_shards, num_files)
            stream = make_stream(Path(place) / "corpus", manifest.key, 10**7)
            tasks = build_datasource(stream).get_read_tasks(1, data_context=object())
            pickled = [len(cloudpickle.dumps(task)) for task in tasks[::64]]
            sizes.append(max(pickled))
            totals.append(len(tasks) * max(pickled))
            manifests.append((Path(place) / "corpus" / "manifest.json").stat().st_size)
    yield Check(
        "a read task: 1 shard, 1 raw file; 256 and 10,000; 2,000 and 100,000",
        "a few kB, all alike",
        ", ".join(f"{size:,} B" for size in sizes),
        max(sizes) < 4096 and max(sizes) - min(sizes) < 64,
    )
    yield Check(
        "all read tasks that Ray holds",
        "< 10 MB",
        f"{max(totals) / 1e6:.1f} MB",
        max(totals) < 10**7,
    )
    yield Check(
        "the manifest that each process reads once",
        "a kB a shard at most",
        ", ".join(f"{size / 1e3:,.0f} kB" for size in manifests),
        manifests[-1] < 2000 * 1000,
    )


def measure_stream(_: argparse.Namespace) -> Iterator[Check]:
    """Memory of whoever walks through the segments of a run, and the size of its blocks."""
    peaks = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "corpus"
        manifest = make_large_corpus(folder, 256, 10_000)
        for num_steps in (10**5, 10**7):
            stream = make_stream(folder, manifest.key, num_steps)
            next(stream.segments())  # the manifest is read
            tracemalloc.start()
            steps, largest = 0, 0
            for window in stream.windows():
                for load in window:
                    trained = [part for part in load if part.kind == "train"]
                    steps += sum(part.last - part.first + 1 for part in trained)
                    largest = max(largest, sum(map(stream.rows_of, load)))
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            if steps != num_steps:
                raise RuntimeError(f"the segments hold {steps} steps instead of {num_steps}")
    block = largest * (2 * manifest.sequence_tokens + 24)
    yield Check(
        "memory of the segments of 10^5 and of 10^7 steps",
        "flat",
        ", ".join(f"{peak / 1e6:.2f} MB" for peak in peaks),
        peaks[1] < 1.2 * peaks[0] + 10**5,
    )
    yield Check(
        "the largest block of 10^7 steps of 128 rows of 4 kB a rank",
        "4 MiB",
        f"{block / 2**20:.1f} MiB",
        block <= 4 * 2**20,
    )


def measure_trillions(_: argparse.Namespace) -> Iterator[Check]:
    """What each process must know of a corpus of 10^13 tokens: 20 TB of rows in 74,506 shards."""
    import numpy as np

    from dray.corpus.manifest import load_manifest
    from dray.corpus.stream import make_order
    from dray.storage.filesystem import open_filesystem

    num_tokens, tokens = 10**13, 2048
    num_shards = -(-num_tokens // (2**28 // 2))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "corpus"
        make_large_corpus(folder, num_shards, 100_000, tokens)
        size = (folder / "manifest.json").stat().st_size
        begun = time.process_time()
        tracemalloc.start()
        manifest = load_manifest(*open_filesystem(str(folder)))
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        loaded = time.process_time() - begun
    order = make_order(manifest, 0)
    begun = time.process_time()
    rows = order.rows_at(np.arange(4 * 10**9, 4 * 10**9 + 2**17))
    sought = time.process_time() - begun
    if not 0 <= int(rows.min()) <= int(rows.max()) < manifest.train.num_rows:
        raise RuntimeError("rows that the corpus does not have")
    yield Check(
        f"the manifest of 10^13 tokens, {num_shards:,} shards",
        "< 20 MB, read in < 5 s, < 200 MB held",
        f"{size / 1e6:.1f} MB, {loaded:.1f} s, {held / 1e6:.0f} MB",
        size < 20e6 and loaded < 5 and held < 200e6,
    )
    yield Check(
        f"131,072 positions of {manifest.train.num_rows:,} rows, from the 4·10^9th on",
        "> 10^5 a second",
        f"{len(rows) / sought:,.0f} a second",
        len(rows) / sought > 1e5,
    )


# --- preparing ----------------------------------------------------------------------------------


def count_opens(num_bytes: int) -> dict[str, int]:
    """Files that preparing so much text opens to read, by the plan alone; `one step` is what it
    would be without files in between."""
    import numpy as np

    from dray.corpus.parts import Chunk, CorpusSource, Preparation
    from dray.corpus.planning import Deal, Plans, choose_part_bytes, make_deals, plan_bundles
    from dray.corpus.prepare import PARTITION_BYTES
    from dray.corpus.sources import InputFile
    from dray.corpus.tokenizing import TokenizerInfo
    from dray.spec import Cleaning, Source
    from dray.tasks.causal_lm import CausalLM

    part_bytes = choose_part_bytes(
        [[InputFile("/data", "/data/all.jsonl", num_bytes, "", "jsonl", "")]]
    )
    num_chunks = -(-num_bytes // part_bytes)  # a chunk a part: no part is as large as two
    rows = num_bytes // num_chunks // 4 // 2048  # four bytes of text a token
    partitions = -(-num_bytes // PARTITION_BYTES)
    bundle = plan_bundles(num_chunks, partitions, num_bytes // 3000)
    job = Preparation(
        folder="/corpus",
        sources=(CorpusSource("text", "train", Source.model_validate({"path": "/data"}), ""),),
        cleaning=Cleaning(),
        max_record_bytes=2**24,
        sequence_tokens=2048,
        group_rows=256,
        shuffle_seed=0,
        task=CausalLM(),
        share=0.0,
        chunk_bytes=part_bytes * 3 // 2,
        num_partitions=partitions,
        bundle_chunks=bundle,
        tokenizer=TokenizerInfo(50_000, 0, 0, "gigatoken", (), ()),
        chunks=tuple(Chunk(f"{n:06d}-0000", 0) for n in range(num_chunks)),
    )
    deals = make_deals(job, [{"train": {"num_rows": rows}} for _ in range(num_chunks)])
    shards = Plans(deals, lambda deal: deal.num_shards, Deal.shard)
    mixes = Plans(deals, lambda deal: deal.num_mixes, Deal.mix)
    bundled = bundle > 1
    opens = {
        "read": num_chunks,
        "hashes": num_chunks if bundled else 0,
        "duplicates": partitions * job.num_bundles,
        "drops": partitions * job.num_bundles if bundled else 0,
        "packed": num_chunks * (2 + (1 if bundled else partitions)),
        "mixed": sum(len(mixes[index][1].slices) for index in range(len(mixes))),
        "shards": sum(len(shards[index][1].slices) for index in range(len(shards))),
    }
    one_step = num_chunks * (3 + 2 * partitions) + int(
        np.count_nonzero(np.concatenate([d.counts for d in deals]))
    )
    return opens | {"all": sum(opens.values()), "one step": one_step}


def measure_opens(_: argparse.Namespace) -> Iterator[Check]:
    """Opens to read for 10 GB, 100 GB and 1 TB."""
    counts = [count_opens(size * 10**9) for size in (10, 100, 1000)]
    yield Check(
        "files opened to read for 10 GB, 100 GB, 1 TB",
        "at most 10·√10 = 32 times as many for 10 times",
        ", ".join(f"{count['all']:,}" for count in counts),
        counts[2]["all"] <= 32 * counts[1]["all"],
    )
    yield Check(
        "and for 1 TB",
        "< 1 million",
        f"{counts[2]['all']:,} (in one step: {counts[2]['one step']:,})",
        counts[2]["all"] < 10**6,
    )


def measure_preparing(arguments: argparse.Namespace) -> Iterator[Check]:
    """CPU seconds of preparing more and more text."""
    if not CORPUS.is_dir():
        raise SystemExit(f"{CORPUS} is absent")
    sizes = [int(size) for size in arguments.sizes.split(",")]
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        tokenizer = train_tokenizer(Path(place) / "tokenizer")
        for num_mb in sizes:
            corpus = write_corpus(Path(place) / f"text-{num_mb}", num_mb * 10**6)
            runs.append(run_arm("dray", corpus, tokenizer))
            print(f"{num_mb} MB: {runs[-1]}", file=sys.stderr, flush=True)
            for path in corpus.iterdir():
                path.unlink()
    for before, after, small, large in zip(sizes, sizes[1:], runs, runs[1:], strict=False):
        ratio = large["cpu_seconds"] / small["cpu_seconds"]
        yield Check(
            f"CPU seconds of preparing {before} MB and {after} MB",
            f"at most {1.2 * after / before:.0f} times as many",
            f"{small['cpu_seconds']:.1f} and {large['cpu_seconds']:.1f}: {ratio:.1f} times",
            ratio <= 1.2 * after / before,
        )
        worker = max(run["peak_worker_bytes"] for run in (small, large))
        yield Check(
            "the largest worker then", "< 1 GiB", f"{worker / 2**20:,.0f} MiB", worker < 2**30
        )


SECTIONS: dict[str, Callable[[argparse.Namespace], Iterator[Check]]] = {
    "tasks": measure_tasks,
    "stream": measure_stream,
    "trillions": measure_trillions,
    "opens": measure_opens,
    "preparing": measure_preparing,
    **scale_records.SECTIONS,
    "failures": scale_failures.measure_failures,
}
"""A section measures one thing and yields its checks; another one is a line here."""


def make_table(checks: list[Check]) -> str:
    """Markdown for the page of benchmarks."""
    lines = ["| | wanted | found | |", "|---|---|---|---|"]
    lines += [
        f"| {check.what} | {check.wanted} | {check.found} | "
        f"{'holds' if check.holds else '**missed**'} |"
        for check in checks
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, leave the figures in bench/results/scale.json and
    docs/benchmarks.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default=",".join(SECTIONS), help="sections to measure; the page is left as it is"
    )
    parser.add_argument("--sizes", default="20,200", help="MB of text to prepare")
    parser.add_argument(
        "--steps", type=int, default=scale_records.STEPS, help="steps whose metrics are written"
    )
    arguments = parser.parse_args()
    checks: list[Check] = []
    for name in arguments.only.split(","):
        print(f"── {name}", file=sys.stderr, flush=True)
        checks += SECTIONS[name](arguments)
    if arguments.only == parser.get_default("only"):
        write_section("scale", make_table(checks), [asdict(check) for check in checks])
    else:
        print(make_table(checks))
    sys.exit(not all(check.holds for check in checks))


if __name__ == "__main__":
    main()
