"""(c) Raw text to token shards: MB a CPU-second beside `datasets.map`, and peak memory as the
corpus grows.

    python -m bench.corpus [--sizes 20,200,2000] [--speed-mb 200] [--rounds 3]

The text is ../shared/data/corpus_en over and over, every document made unique (rotated, every 40th
word replaced), as JSON lines. Both speed arms get the same files and the same tokeniser folder, one
after the other in each round; CPU seconds are those of every process an arm started, Ray's own
included. dray reads, cleans, deduplicates, tokenises, packs, shuffles and writes; `datasets`
tokenises and writes, and with grouping cuts rows of 512 as well.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.report import ROOT, write_section

CORPUS = ROOT.parent / "shared/data/corpus_en"
FILE_BYTES = 32 * 1024 * 1024
SEQUENCE_TOKENS = 512


# --- the corpus ---------------------------------------------------------------------------------


def make_documents(seed: int) -> Iterator[str]:
    """The shared texts, endlessly, no two alike."""
    files = sorted(CORPUS.glob("*.jsonl.gz"))
    texts = [
        json.loads(line)["text"]
        for path in files
        for line in gzip.decompress(path.read_bytes()).splitlines()
    ]
    rng = random.Random(seed)
    while True:
        for text in texts:
            words = text.split(" ")
            turn = rng.randrange(len(words))
            words = words[turn:] + words[:turn]
            for place in range(0, len(words), 40):
                words[place] = (
                    f"{rng.choice('bcdfglmnprst')}{rng.choice('aeiou')}{rng.getrandbits(24):x}"
                )
            yield " ".join(words)


def write_corpus(folder: Path, num_bytes: int) -> Path:
    """`num_bytes` of text as JSON lines in files of 32 MiB."""
    folder.mkdir()
    documents, written, number = make_documents(len(str(folder))), 0, 0
    while written < num_bytes:
        in_file = 0
        with (folder / f"part-{number:04d}.jsonl").open("w", encoding="utf-8") as file:
            while in_file < FILE_BYTES and written < num_bytes:
                text = next(documents)
                file.write(json.dumps({"id": f"{number}", "text": text}, ensure_ascii=False) + "\n")
                in_file += len(text.encode())
                written += len(text.encode())
        number += 1
    return folder


def train_tokenizer(folder: Path) -> Path:
    """A byte-level BPE tokeniser of 8192 tokens for both arms."""
    from pyarrow import fs as pafs

    from dray.corpus.tokenizing import save_trained, train_byte_bpe

    documents = make_documents(0)
    texts = [next(documents).encode() for _ in range(3000)]
    save_trained(pafs.LocalFileSystem(), str(folder), train_byte_bpe(texts, 8192))
    return folder


# --- the arms, each in a process of its own -----------------------------------------------------


def dray_arm(corpus: str, tokenizer: str, storage: str) -> dict[str, Any]:
    """Prepares the corpus on a fresh local Ray, as `dray prepare` does; what it took."""
    import psutil

    from dray.cluster.connection import connect
    from dray.corpus.prepare import prepare
    from dray.spec import make_spec

    spec = make_spec(
        {
            "name": "bench",
            "data": {"train": corpus, "sequence_tokens": SEQUENCE_TOKENS},
            "tokenizer": {"path": tokenizer},
            "duration": {"steps": 1},
            "model": {"architecture": "llama", "hidden_size": 64, "num_layers": 1, "num_heads": 1},
        }
    )
    root = psutil.Process()
    with connect(None, num_cpus=2):
        sampler = _Sampler(root)
        before, began = _cpu_seconds(root), time.perf_counter()
        sampler.start()
        manifest = prepare(spec, storage, lambda line: print(f"  {line}", file=sys.stderr)).manifest
        seconds = time.perf_counter() - began
        sampler.stopped.set()
        sampler.join()
        after = {**sampler.ended, **_cpu_seconds(root)}
    parts = dict.fromkeys(("driver", "workers", "ray"), 0.0)
    for pid, (role, cpu) in after.items():
        parts[role] += cpu - before.get(pid, (role, 0.0))[1]
    return {
        "seconds": seconds,
        "cpu_seconds": sum(parts.values()),
        "cpu_parts": parts,
        "text_bytes": manifest.train.num_text_bytes,
        "tokens": manifest.train.num_tokens,
        "encoder": manifest.encoder,
        "utilization": manifest.packing.utilization,
        "num_shards": len(manifest.train.sources[0].shards),
        "dropped": manifest.dropped,
        **sampler.peaks,
    }


def _role(process: Any, root: Any) -> str:
    if process.pid == root.pid:
        return "driver"
    name = " ".join(process.cmdline())
    return "workers" if name.startswith("ray::") or "dray.processes.forkserver" in name else "ray"


def _cpu_seconds(root: Any) -> dict[int, tuple[str, float]]:
    """Of the driver, Ray's workers and Ray's own processes, by process id."""
    import psutil

    found: dict[int, tuple[str, float]] = {}
    for process in [root, *root.children(recursive=True)]:
        try:
            times = process.cpu_times()
            found[process.pid] = (_role(process, root), times.user + times.system)
        except psutil.Error:
            continue
    return found


class _Sampler(threading.Thread):
    """Resident memory of the driver and Ray's workers, five times a second, and the CPU time of
    those that end."""

    def __init__(self, root: Any) -> None:
        super().__init__(daemon=True)
        self.root, self.stopped = root, threading.Event()
        self.ended: dict[int, tuple[str, float]] = {}
        self.peaks = {"peak_worker_bytes": 0, "peak_driver_bytes": 0, "peak_sum_bytes": 0}

    def run(self) -> None:
        import psutil

        while not self.stopped.wait(0.2):
            sizes: dict[str, list[int]] = {"driver": [0], "workers": [0], "ray": [0]}
            for process in [self.root, *self.root.children(recursive=True)]:
                try:
                    sizes[_role(process, self.root)].append(process.memory_info().rss)
                except psutil.Error:
                    continue
            self.ended.update(_cpu_seconds(self.root))
            now = {
                "peak_worker_bytes": max(sizes["workers"]),
                "peak_driver_bytes": max(sizes["driver"]),
                "peak_sum_bytes": sum(sizes["workers"]) + sum(sizes["driver"]),
            }
            self.peaks = {name: max(peak, now[name]) for name, peak in self.peaks.items()}


def datasets_arm(corpus: str, tokenizer: str, storage: str) -> dict[str, Any]:
    """The usual script: load, tokenise with `map`, write; then group into rows of 512 and write."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(tokenizer)

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        return {
            "input_ids": encode([text + encode.eos_token for text in batch["text"]])["input_ids"]
        }

    def group(batch: dict[str, list[list[int]]]) -> dict[str, Any]:
        ids = [token for document in batch["input_ids"] for token in document]
        whole = len(ids) // SEQUENCE_TOKENS * SEQUENCE_TOKENS
        return {
            "input_ids": [
                ids[start : start + SEQUENCE_TOKENS] for start in range(0, whole, SEQUENCE_TOKENS)
            ]
        }

    began, cpu = time.perf_counter(), _own_cpu_seconds()
    files = sorted(str(path) for path in Path(corpus).glob("*.jsonl"))
    data = load_dataset("json", data_files=files, split="train", cache_dir=f"{storage}/cache")
    tokenized = data.map(tokenize, batched=True, remove_columns=data.column_names)
    tokenized.save_to_disk(f"{storage}/tokenized")
    tokenize_cpu = _own_cpu_seconds() - cpu
    tokenized.map(group, batched=True).save_to_disk(f"{storage}/grouped")
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": tokenize_cpu,
        "grouped_cpu_seconds": _own_cpu_seconds() - cpu,
    }


def _own_cpu_seconds() -> float:
    return sum(os.times()[:4])


def run_arm(name: str, corpus: Path, tokenizer: Path) -> dict[str, Any]:
    """One arm in a fresh process, with a fresh storage that is deleted afterwards."""
    with tempfile.TemporaryDirectory(dir=corpus.parent) as storage:
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
        }
        command = [
            sys.executable,
            "-m",
            "bench.corpus",
            "--arm",
            name,
            str(corpus),
            str(tokenizer),
            storage,
        ]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


# --- the tables ---------------------------------------------------------------------------------


def measure_speed(folder: Path, tokenizer: Path, num_mb: int, rounds: int) -> dict[str, Any]:
    """Both arms in turn; medians of MB a CPU-second."""
    corpus = write_corpus(folder / "speed", num_mb * 10**6)
    runs: dict[str, list[dict[str, Any]]] = {"dray": [], "datasets": []}
    for number in range(rounds):
        for name in runs if number % 2 == 0 else reversed(list(runs)):
            runs[name].append(run_arm(name, corpus, tokenizer))
            print(f"{name}: {runs[name][-1]}", file=sys.stderr, flush=True)
    rates = {
        "dray": statistics.median(num_mb / run["cpu_seconds"] for run in runs["dray"]),
        "datasets.map": statistics.median(num_mb / run["cpu_seconds"] for run in runs["datasets"]),
        "datasets.map, grouped": statistics.median(
            num_mb / run["grouped_cpu_seconds"] for run in runs["datasets"]
        ),
    }
    return {"num_mb": num_mb, "rates": rates, "runs": runs}


def measure_memory(folder: Path, tokenizer: Path, sizes: list[int]) -> list[dict[str, Any]]:
    """One preparation of each size; the corpus is deleted afterwards."""
    rows = []
    for num_mb in sizes:
        corpus = write_corpus(folder / f"memory-{num_mb}", num_mb * 10**6)
        rows.append({"num_mb": num_mb} | run_arm("dray", corpus, tokenizer))
        print(f"memory: {rows[-1]}", file=sys.stderr, flush=True)
        for path in corpus.iterdir():
            path.unlink()
    return rows


def make_tables(speed: dict[str, Any], memory: list[dict[str, Any]]) -> str:
    """Markdown for the page of benchmarks."""
    rates = speed["rates"]
    lines = [
        f"`python -m bench.corpus`: {speed['num_mb']} MB of text, medians of "
        f"{len(speed['runs']['dray'])} interleaved rounds; CPU of all processes, Ray's own "
        "included.",
        "",
        "| raw text to token shards | MB a CPU-second | dray against it |",
        "|---|---:|---:|",
    ]
    lines += [
        f"| {name} | {rate:.1f} | {rates['dray'] / rate:.1f}× |" for name, rate in rates.items()
    ]
    lines += [
        "",
        "| text | largest worker | driver | workers and driver | seconds | MB a CPU-second |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in memory:
        worker, driver, both = (
            f"{row[name] / 2**20:,.0f} MiB"
            for name in ("peak_worker_bytes", "peak_driver_bytes", "peak_sum_bytes")
        )
        rate = row["num_mb"] / row["cpu_seconds"]
        lines.append(
            f"| {row['num_mb']:,} MB | {worker} | {driver} | {both} | {row['seconds']:.1f} | "
            f"{rate:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print the tables, leave the figures in bench/results/corpus.json and
    docs/benchmarks.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="20,200,2000", help="MB of text to measure memory with")
    parser.add_argument(
        "--speed-mb", type=int, default=200, help="MB of text to measure speed with"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds of both speed arms")
    parser.add_argument(
        "--arm", nargs=4, metavar=("NAME", "CORPUS", "TOKENIZER", "STORAGE"), help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.arm:
        name, *places = arguments.arm
        print(json.dumps({"dray": dray_arm, "datasets": datasets_arm}[name](*places)))
        return
    if not CORPUS.is_dir():
        raise SystemExit(f"{CORPUS} is absent")
    with tempfile.TemporaryDirectory() as place:
        tokenizer = train_tokenizer(Path(place) / "tokenizer")
        speed = measure_speed(Path(place), tokenizer, arguments.speed_mb, arguments.rounds)
        memory = measure_memory(
            Path(place), tokenizer, [int(size) for size in arguments.sizes.split(",")]
        )
    write_section("corpus", make_tables(speed, memory), {"speed": speed, "memory": memory})


if __name__ == "__main__":
    main()
