"""Sections of bench.scale: what a run writes down about itself, at a size that no test reaches.

Simulated on a local disk: no rank is started. CPU seconds are this process' own, so a busy machine
matters little.
"""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.report import Check
from dray.runs.records import Beat, StepReport

STEPS = 10**7


def make_record(step: int, rank: int, num_ranks: int) -> StepReport:
    """What a rank says of a step."""
    return StepReport(
        rank=rank,
        attempt=1,
        step=step,
        num_ranks=num_ranks,
        loss_sum=2.5 + rank,
        num_targets=1000,
        learning_rate=1e-3,
        grad_norm=1.25,
        applied=True,
        rows_digest=f"{step:016x}",
        tokens=step * 1000,
        step_tokens=1000,
        seconds=1.01,
        data_wait_seconds=0.001,
        forward_seconds=0.3 + rank * 1e-6,
        time=1.7e9 + step,
        memory_bytes=10**10 + rank,
    )


def make_beat(step: int, rank: int) -> Beat:
    """A rank's heartbeat."""
    return Beat(
        rank=rank,
        attempt=1,
        step=step,
        phase="backward",
        long=False,
        seconds=0.2,
        time=1.7e9,
        pid=1000,
        host="node",
        log_file="/tmp/ray/session/logs/worker-1234.out",
        stack_file="/tmp/stacks",
        node="10.0.0.1",
        node_id="f" * 56,
    )


def build_recorder(place: str) -> tuple[Any, Any]:
    """A run on the disk, and the driver's recorder for it."""
    from dray.plan import local_shape, make_plan
    from dray.runs import build_trackers, create_run
    from dray.show.progress import Display
    from dray.spec import make_spec
    from dray.train.recorder import Recorder

    spec = make_spec(
        {
            "name": "large",
            "data": {"train": "x.jsonl"},
            "duration": {"steps": STEPS},
            "model": {"architecture": "llama", "hidden_size": 64, "num_layers": 2, "num_heads": 4},
        }
    )
    plan = make_plan(spec, local_shape())
    run = create_run(place, "large", spec, plan.model_dump(mode="json"))
    run.begin_attempt(1, 0)

    class Silent(Display):
        def step(self, row: Any) -> None:
            pass

    return run, Recorder(run, plan, build_trackers(run, spec), Silent())


# --- metrics ------------------------------------------------------------------------------------


def write_metrics(run: Any, num_steps: int) -> int:
    """A run's metrics as they are after so many steps: files that were compacted, of real rows but
    for their steps."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dray.plan import local_shape, make_plan
    from dray.runs.compaction import make_parquet
    from dray.runs.row_log import LOCAL_PART_BYTES
    from dray.train.recorder import make_metrics_row

    plan = make_plan(run.spec(), local_shape())
    row = make_metrics_row([make_record(1, 0, 1)], plan)
    rows_a_file = LOCAL_PART_BYTES // len(json.dumps(row))
    first = [row | {"step": step, "loss": 10 / step} for step in range(1, rows_a_file + 1)]
    table = pq.read_table(pa.BufferReader(make_parquet(first, [0] * len(first))))
    summary = json.loads(table.schema.metadata[b"dray.summary"])
    folder, number = Path(run.path, "metrics"), 0
    folder.mkdir(exist_ok=True)
    for start in range(0, num_steps, rows_a_file):
        found = table.slice(0, min(rows_a_file, num_steps - start))
        steps = np.arange(start + 1, start + 1 + found.num_rows)
        found = found.set_column(found.schema.get_field_index("step"), "step", pa.array(steps))
        found = found.set_column(0, "_part", pa.array(np.full(found.num_rows, number, np.int32)))
        told = summary | {
            "rows": found.num_rows,
            "first_step": int(steps[0]),
            "last_step": int(steps[-1]),
        }
        metadata = {**table.schema.metadata, b"dray.summary": json.dumps(told).encode()}
        pq.write_table(
            found.replace_schema_metadata(metadata),
            folder / f"a0001-shared-{number:06d}-{number:06d}.parquet",
            compression="zstd",
        )
        number += 1
    return number


READ = """
import json, sys, time
from dray.runs import Run
def peak(): return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
run = Run.open(sys.argv[1], "large")
idle = peak()
begun = time.process_time()
summary, outline = run.summary(), run.outline()
shown = time.process_time() - begun
page = peak()
begun = time.process_time()
count = sum(1 for _ in run.iterate_history(("loss",)))
read = time.process_time() - begun
print(json.dumps({"idle": idle, "page": page, "peak": peak(),
                  "shown": shown, "read": read, "count": count, "step": summary["step"],
                  "steps": outline.num_steps}))
"""


def measure_metrics(arguments: argparse.Namespace) -> Iterator[Check]:
    """Memory of whoever reads the metrics of 10^7 steps."""
    num_steps = getattr(arguments, "steps", STEPS)
    with tempfile.TemporaryDirectory() as place:
        run, recorder = build_recorder(place)
        files = write_metrics(run, num_steps)
        num_bytes = sum(file.stat().st_size for file in Path(run.path, "metrics").iterdir())
        recorder.take([make_record(num_steps + 1, 0, 1)])
        out = subprocess.run(
            [sys.executable, "-c", READ, place], capture_output=True, text=True, check=True
        ).stdout
    found = json.loads(out)
    if not found["step"] == found["steps"] == found["count"] == num_steps + 1:
        raise RuntimeError(f"the history is not what was written: {found}")
    rise = (found["peak"] - found["idle"]) / 1024
    yield Check(
        f"metrics of {num_steps:,} steps",
        "some hundred files",
        f"{files} files, {num_bytes / 1e9:.2f} GB",
        files < 2000,
    )
    yield Check(
        "summary and outline of them, as `dray show` reads them",
        "< 10 s of CPU, < 200 MB more than idle",
        f"{found['shown']:.1f} s, {(found['page'] - found['idle']) / 1024:.0f} MB",
        found["shown"] < 10 and found["page"] - found["idle"] < 200 * 1024,
    )
    yield Check(
        "one column of the whole history, row by row",
        "bounded memory: < 400 MB more than idle",
        f"{rise:.0f} MB, {found['read']:.0f} s",
        rise < 400,
    )


# --- manifests ----------------------------------------------------------------------------------


def measure_manifest(_: argparse.Namespace) -> Iterator[Check]:
    """A checkpoint of 1,000 ranks under ZeRO-3, from what they send to what is read at a
    restart."""
    import numpy as np

    from dray.runs.checkpoint_manifest import CheckpointManifest, Fragments, RankFile
    from dray.runs.layout import make_rank_file

    sizes = {
        "self_attn.q_proj": 4096**2,
        "self_attn.k_proj": 4096 * 1024,
        "self_attn.v_proj": 4096 * 1024,
        "self_attn.o_proj": 4096**2,
        "mlp.gate_proj": 4096 * 14336,
        "mlp.up_proj": 4096 * 14336,
        "mlp.down_proj": 4096 * 14336,
        "input_layernorm": 4096,
        "post_attention_layernorm": 4096,
    }
    shapes = {
        f"model.layers.{layer}.{name}.weight": [size]
        for layer in range(32)
        for name, size in sizes.items()
    }
    shapes |= {"model.embed_tokens.weight": [128_256, 4096], "lm_head.weight": [128_256, 4096]}
    num_ranks, states = 1000, ("param", "exp_avg", "exp_avg_sq")
    keys = tuple((name, state) for name in shapes for state in states)
    counts = np.repeat([int(np.prod(shape)) for shape in shapes.values()], len(states))
    shares = -(-counts // num_ranks)
    sent = []
    for rank in range(num_ranks):
        lengths = np.clip(counts - rank * shares, 0, shares)
        kept = np.flatnonzero(lengths)
        fragments = Fragments(tuple(keys[at] for at in kept), (rank * shares)[kept], lengths[kept])
        sent.append(
            pickle.dumps(
                RankFile(rank, make_rank_file(rank, num_ranks), 10**9, f"{rank:064x}", fragments)
            )
        )
    begun = time.process_time()
    files = [pickle.loads(content) for content in sent]
    content = CheckpointManifest.make(1, 1, files, {"shapes": shapes}, "here").to_bytes()
    written = time.process_time() - begun
    begun = time.process_time()
    places = CheckpointManifest.from_bytes(content, "here").places("here")
    read = time.process_time() - begun
    if len(places) != len(keys):
        raise RuntimeError("the manifest does not hold every tensor")
    yield Check(
        "a ZeRO-3 manifest of 1,000 ranks, 290 tensors: gathered, checked and written",
        "< 2 s of CPU with its reading",
        f"{written:.2f} s; {sum(map(len, sent)) / 1e6:.0f} MB sent",
        written + read < 2,
    )
    yield Check(
        "and read, with the proof that it covers every tensor",
        "< 0.1 s, < 1 MB",
        f"{read:.3f} s, {len(content) / 1e3:.0f} kB",
        read < 0.1 and len(content) < 10**6,
    )


# --- the driver ---------------------------------------------------------------------------------


def measure_driver(_: argparse.Namespace) -> Iterator[Check]:
    """What the records and heartbeats of 10,000 ranks at 1 Hz cost the head: the mailbox' own work,
    what travels to the driver, and the driver's."""
    from dray.doctor.hangs import find_hang
    from dray.spec import Watchdog
    from dray.train.mailbox import Mailbox, pace
    from dray.train.recorder import DRAIN_SECONDS

    num_ranks, seconds, mailbox_seconds, driver_seconds = 10_000, 10, 0.0, 0.0
    beats_every = pace(0.5, num_ranks)
    with tempfile.TemporaryDirectory() as place:
        run, recorder = build_recorder(place)
        mailbox, beating = Mailbox(), 0
        for second in range(1, seconds + 1):
            records = [make_record(second, rank, num_ranks) for rank in range(num_ranks)]
            due = int(num_ranks * second / beats_every) - beating
            beats = [make_beat(second, (beating + index) % num_ranks) for index in range(due)]
            beating += due
            begun = time.process_time()
            for record in records:
                mailbox.put([record])
            for beat in beats:
                mailbox.beat(beat)
            taken = []
            for at in range(round(1 / DRAIN_SECONDS)):
                if at == 0:
                    mailbox._looked_at = -10.0  # a second has passed
                taken.append(pickle.dumps(mailbox.take(0), protocol=5))
            mailbox_seconds += time.process_time() - begun
            begun = time.process_time()
            for content in taken:
                found, known = pickle.loads(content)
                recorder.take(found)
                if known:
                    find_hang(known, recorder.step_seconds, Watchdog())
            driver_seconds += time.process_time() - begun
        if len(run.metrics()) != seconds:
            raise RuntimeError("rows are missing")
    yield Check(
        "10,000 ranks at one step a second: the driver",
        "< 0.25 of a core",
        f"{driver_seconds / seconds:.3f}",
        driver_seconds < 0.25 * seconds,
    )
    yield Check(
        "and the mailbox' own work, without Ray's for the calls",
        "< 0.25 of a core",
        f"{mailbox_seconds / seconds:.3f}",
        mailbox_seconds < 0.25 * seconds,
    )


# --- attempts -----------------------------------------------------------------------------------


def measure_attempts(_: argparse.Namespace) -> Iterator[Check]:
    """A run that was started a thousand times."""
    with tempfile.TemporaryDirectory() as place:
        run, _recorder = build_recorder(place)
        folder = Path(run.path, "attempts")
        for number in range(2, 1001):
            (folder / f"{number:04d}.json").write_text(
                json.dumps(
                    {
                        "attempt": number,
                        "num_ranks": 8,
                        "start_step": number,
                        "started": "",
                        "driver": 0,
                        "nonce": "x",
                    }
                )
            )
            (folder / f"{number:04d}-end.json").write_text(
                json.dumps({"status": "failed", "end_step": number + 5})
            )
        begun = time.process_time()
        count = len(run.attempts())
        first = time.process_time() - begun
        begun = time.process_time()
        run.checkpoints(), run.last_metrics(50)
        again = time.process_time() - begun
    if count != 1000:
        raise RuntimeError(f"{count} attempts")
    yield Check(
        "1,000 attempts, read by a new process",
        "< 2 s of CPU, many at once",
        f"{first:.2f} s",
        first < 2,
    )
    yield Check(
        "and what a commit asks of them afterwards",
        "< 0.2 s, one listing",
        f"{again:.3f} s",
        again < 0.2,
    )


SECTIONS = {
    "metrics": measure_metrics,
    "manifest": measure_manifest,
    "driver": measure_driver,
    "attempts": measure_attempts,
}
