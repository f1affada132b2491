"""The tables of docs/scale.md: what grows with the number of ranks, and failures simulated.

python -m bench.scale_page
"""

from __future__ import annotations

import pickle
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from bench.report import ROOT, write_section
from bench.scale import make_large_corpus
from bench.scale_failures import CASES, Case, make_table
from bench.scale_records import make_record

PAGE = ROOT / "docs" / "scale.md"
TOKENS, STEPS = 4096, 10**6
ROWS = {8: 128, 64: 512, 512: 2048, 10_000: 10_000}
"""Of the global batch: some million tokens, forty at 10,000 ranks."""
PUTS_A_SECOND = 3500
"""Of a prefix of S3, as AWS documents it."""
MESHES = 2
"""Groups of gloo: the ranks' agreements, and those of the threads that save."""


def measure(case: Case) -> dict[str, Any]:
    """Figures of a run at a size: what Ray Data is given at a time, what a step's records and a
    checkpoint are."""
    from ray import cloudpickle

    from dray.corpus.stream import RowStream, build_datasource
    from dray.plan.demands import COMMIT_PUTS, count_puts
    from dray.plan.speed import CALLS_A_SECOND
    from dray.train.mailbox import pace
    from dray.train.posting import BEAT_EVERY_SECONDS

    ranks = case.num_ranks
    with tempfile.TemporaryDirectory() as place:
        manifest = make_large_corpus(Path(place) / "corpus", 256, 10_000, TOKENS)
        stream = RowStream(
            folder=str(Path(place) / "corpus"),
            key=manifest.key,
            seed=0,
            global_rows=ROWS[ranks],
            num_ranks=ranks,
            rows_per_rank=-(-ROWS[ranks] // ranks),
            micro_rows=1,
            start_step=0,
            num_steps=STEPS,
        )
        build_datasource(stream).get_read_tasks(1, data_context=object())  # imports, the manifest
        begun = time.process_time()
        tasks = build_datasource(stream).get_read_tasks(1, data_context=object())
        planned = time.process_time() - begun
        task_bytes = len(cloudpickle.dumps(tasks[0]))
        loads = islice(stream.loads(), 64)
        steps = [sum(part.last - part.first + 1 for part in load) for load in loads]
        tasks_a_step = ranks * len(steps) / sum(steps)
    records = len(pickle.dumps([make_record(1, rank, ranks) for rank in range(ranks)], protocol=5))
    file_bytes = int(case.checkpoint_bytes / ranks)
    puts = ranks * (count_puts(file_bytes) + 1) + COMMIT_PUTS
    return {
        "ranks": ranks,
        "beat_seconds": pace(BEAT_EVERY_SECONDS, ranks),
        "flush_seconds": ranks / CALLS_A_SECOND,
        "records_bytes": records,
        "window_tasks": len(tasks),
        "window_bytes": len(tasks) * task_bytes,
        "window_cpu_seconds": planned,
        "tasks_a_step": tasks_a_step,
        "file_bytes": file_bytes,
        "puts": puts,
        "put_seconds": puts / PUTS_A_SECOND,
        "sockets": MESHES * (ranks - 1),
    }


def make_sizes(found: list[dict[str, Any]]) -> str:
    """Markdown: a line a figure, a column a size."""
    lines = [
        "| ranks | " + " | ".join(f"{item['ranks']:,}" for item in found) + " |",
        "|---" + "|--:" * len(found) + "|",
    ]
    for name, key, form in (
        ("a rank's heart beats every, s", "beat_seconds", ".2g"),
        ("all ranks hand records in before a save, s", "flush_seconds", ".2g"),
        ("records of a step, kB", "records_bytes", "kB"),
        ("read tasks that Ray Data plans at a time", "window_tasks", ",d"),
        ("… MB of them", "window_bytes", "MB"),
        ("… CPU seconds to make them", "window_cpu_seconds", ".2g"),
        ("read tasks a step", "tasks_a_step", ",.4g"),
        ("a rank's file, MB", "file_bytes", "MB"),
        ("PUTs and LISTs of a checkpoint on S3", "puts", ",d"),
        ("… seconds at 3,500 a second", "put_seconds", ".3g"),
        ("sockets of a process, two gloo groups", "sockets", ",d"),
    ):
        scale = {"kB": 1e3, "MB": 1e6}.get(form)
        values = [f"{item[key] / scale:,.1f}" if scale else f"{item[key]:{form}}" for item in found]
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure and simulate; leave the tables in docs/scale.md, the figures in bench/results."""
    found = [measure(case) for case in CASES]
    write_section("sizes", make_sizes(found), found, PAGE)
    write_section("failures", *make_table(), PAGE)


if __name__ == "__main__":
    main()
