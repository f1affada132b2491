"""`python -m bench.restore`: seconds to restore a checkpoint, against plain reading of the same
bytes.

A Llama of 13 M parameters (a checkpoint of some 160 MB), 1 and 2 ranks, ZeRO 1 and 3, on a local
disk whose pages are in memory, so that nothing hides behind the disk. In each round, one after the
other: read, read with SHA-256 (each rank its part of the bytes), and dray's restore: verify, copy
into the engine, and below ZeRO-3 exchange the weights. The slowest rank counts. CPU seconds are
given besides, since other work on the machine makes the rest wait.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench.engines import build
from bench.report import write_section
from dray.plan import make_plan, parse_shape
from dray.rank.group import Ranks, build_ranks
from dray.rank.saving import Saver
from dray.runs import CheckpointInfo, CheckpointReader, Run, create_run
from dray.spec import Spec, make_spec

VOCAB, CHUNK_BYTES = 8192, 8 * 1024 * 1024
ARMS = ("read", "read with SHA-256", "restore")


def make_bench_spec(stage: int, num_ranks: int) -> Spec:
    return make_spec(
        {
            "name": "restore",
            "data": {"train": "none/*.jsonl", "sequence_tokens": 128},
            "tokenizer": {"train": "byte_bpe", "vocab_size": VOCAB},
            "model": {"architecture": "llama", "hidden_size": 384, "num_layers": 6, "num_heads": 6},
            "batch": {"global_rows": 8, "micro_rows": 2},
            "duration": {"steps": 1},
            "precision": "fp32",
            "resources": {"workers": num_ranks},
            "zero": {"stage": stage},
            "engine": {"compile": False},
        }
    )


def read_plainly(ranks: Ranks, files: list[Path], *, with_checksum: bool) -> None:
    """This rank's equal part of the bytes, in large pieces into one buffer."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    for path in files:
        share = -(-path.stat().st_size // ranks.num_ranks)
        left, digest = min(share, path.stat().st_size - share * ranks.rank), hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            file.seek(share * ranks.rank)
            while left > 0 and (count := file.readinto(buffer[: min(left, CHUNK_BYTES)])):
                left -= count
                if with_checksum:
                    digest.update(buffer[:count])


def restore(ranks: Ranks, run: Run, info: CheckpointInfo, engine: Any) -> None:
    """As a rank of a run that resumes does it."""
    with CheckpointReader(run, info) as reader:
        mine = range(ranks.rank, reader.num_files, ranks.num_ranks)
        assert not any(ranks.gather(reader.verify_files(mine)))
        engine.restore(reader, 0, {})


def run_rank(rank: int, place: tuple[int, int], storage: str, rounds: int, results: Any) -> None:
    stage, num_ranks = place
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
    torch.set_num_threads(1)
    store = dist.FileStore(f"{storage}/rendezvous", num_ranks)
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks, store=store)
    ranks, spec = build_ranks(torch.device("cpu"), 600), make_bench_spec(stage, num_ranks)
    plan = make_plan(spec, parse_shape("1xCPU(cpus=8,memory=16GB)"), with_ray=False)
    engine = build(spec, plan, ranks)
    run = Run.open(storage, "restore")
    saver = Saver(run, 1, spec, engine=engine, ranks=ranks, wait_stored=lambda: None)
    saver.begin(
        0, {"shapes": {name: list(shape) for name, shape in engine.parameter_shapes.items()}}
    )
    saver.finish(last=True)
    info = run.latest_checkpoint()
    assert info is not None
    files = sorted(Path(info.path).glob("*.safetensors"))
    arms: tuple[Callable[[], None], ...] = (
        lambda: read_plainly(ranks, files, with_checksum=False),
        lambda: read_plainly(ranks, files, with_checksum=True),
        lambda: restore(ranks, run, info, engine),
    )
    for arm in arms:  # the files' pages, and the allocator's
        arm()
    seconds: list[list[tuple[float, float]]] = []
    for _ in range(rounds):
        row = []
        for arm in arms:
            ranks.barrier()
            begun, cpu = time.perf_counter(), time.process_time()
            arm()
            found = ranks.gather((time.perf_counter() - begun, time.process_time() - cpu))
            row.append((max(wall for wall, _ in found), max(cpu for _, cpu in found)))
        seconds.append(row)
    if rank == 0:
        results[place] = (info.num_bytes, seconds)
    dist.barrier()
    # torch 2.13: a gloo thread that drops its last tensor while Python finalises aborts the
    # process.
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    lines = [
        f"{rounds} rounds, medians of seconds; ratios are those of the rounds to `{ARMS[1]}`.\n",
        "| place | MB | " + " | ".join(ARMS) + " | ratio | ratio of CPU seconds |",
        "|---" * 7 + "|",
    ]
    figures = {}
    with mp.Manager() as manager:
        results = manager.dict()
        for stage, num_ranks in ((1, 1), (1, 2), (3, 1), (3, 2)):
            with tempfile.TemporaryDirectory(prefix="dray-restore-") as storage:
                spec = make_bench_spec(stage, num_ranks)
                run = create_run(storage, "restore", spec, {"num_steps": 1, "num_ranks": num_ranks})
                run.begin_attempt(num_ranks=num_ranks, start_step=0)
                mp.spawn(
                    run_rank, args=((stage, num_ranks), storage, rounds, results), nprocs=num_ranks
                )
            num_bytes, seconds = results[stage, num_ranks]
            medians = [
                statistics.median(wall for wall, _ in column)
                for column in zip(*seconds, strict=True)
            ]
            ratios = [
                statistics.median(row[2][part] / row[1][part] for row in seconds) for part in (0, 1)
            ]
            place = f"ZeRO {stage}, {num_ranks} rank{'s' * (num_ranks > 1)}"
            figures[place] = {"bytes": num_bytes, "seconds": seconds}
            cells = [
                place,
                f"{num_bytes / 1e6:.0f}",
                *(f"{value:.2f}" for value in (*medians, *ratios)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    write_section("restore", "\n".join(lines), figures)


if __name__ == "__main__":
    main()
