"""`python -m bench.memory`: the measured peak memory of ranks against the plan, for four models
under ZeRO 0 to 3.

Two ranks are plain processes on the CPU (gloo, fp32, one thread each), running dray's own engine,
models, tasks and saver without Ray; a checkpoint is being written during the last steps. The table
goes into docs/plan.md. `--only NAME:STAGE` measures one case and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from dray.plan import MemoryPlan, Plan, local_shape, make_plan
from dray.plan.memory import MEMORY_TERMS
from dray.runs import Run, create_run
from dray.spec import Spec, make_spec

DOCUMENT = Path(__file__).parents[1] / "docs" / "plan.md"
BEGIN, END = "<!-- bench.memory: begin -->", "<!-- bench.memory: end -->"
NUM_RANKS, NUM_STEPS, SAVED_STEP = 2, 4, 2
TOLERANCE = 0.15

# name: architecture, hidden size, layers, heads, tokens a row, vocabulary, rows a micro batch
MODELS: dict[str, tuple[str, int, int, int, int, int, int]] = {
    "llama-6m": ("llama", 256, 6, 4, 256, 8192, 8),
    "gpt2-23m": ("gpt2", 384, 6, 6, 256, 32000, 4),
    "llama-30m": ("llama", 512, 8, 8, 512, 8192, 2),
    "llama-67m": ("llama", 768, 6, 12, 256, 32000, 2),
    "llama-9m": ("llama", 384, 4, 6, 512, 8192, 4),
    "gpt2-27m": ("gpt2", 512, 6, 8, 128, 16000, 8),
}
HELD_OUT = {"llama-9m": (1,), "gpt2-27m": (3,)}
"""Stages of the models on which no constant was fitted."""


def make_case(name: str, stage: int) -> Spec:
    """The spec of one case. It is planned and built, but reads no data."""
    architecture, hidden, layers, heads, width, vocab, rows = MODELS[name]
    return make_spec(
        {
            "name": name,
            "data": {"train": "none", "sequence_tokens": width},
            "tokenizer": {"train": "byte_bpe", "vocab_size": vocab},
            "model": {
                "architecture": architecture,
                "hidden_size": hidden,
                "num_layers": layers,
                "num_heads": heads,
            },
            "batch": {"global_rows": rows * NUM_RANKS, "micro_rows": rows},
            "duration": {"steps": NUM_STEPS},
            "precision": "fp32",
            "resources": {"workers": NUM_RANKS},
            "zero": {"stage": stage},
            "engine": {"compile": False},
        }
    )


def plan_case(spec: Spec) -> Plan:
    return make_plan(spec, local_shape(), with_ray=False)


def run_rank(rank: int, spec: Spec, folder: str) -> None:
    """Build the model and train a few steps; leave this process' peak memory in a file."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(NUM_RANKS),
        DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
    )
    import torch.distributed as dist

    from dray.processes.heap import prepare_process

    prepare_process(1)
    store = dist.FileStore(f"{folder}/store", NUM_RANKS)
    dist.init_process_group("gloo", rank=rank, world_size=NUM_RANKS, store=store)
    resident = train(spec, Run.open(folder, spec.name)) | {"peak": read_status("VmHWM")}
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(resident), encoding="utf-8")
    dist.barrier()
    # torch 2.13: a gloo thread that drops its last tensor while Python finalises aborts the
    # process.
    os._exit(0)


def train(spec: Spec, run: Run) -> dict[str, int]:
    """A few steps, one of them saved. Returns resident bytes once the engine is built."""
    import torch

    from bench.engines import build, train_steps
    from dray.rank.group import build_ranks
    from dray.rank.saving import Saver

    plan, ranks = plan_case(spec), build_ranks(torch.device("cpu"), timeout_seconds=300)
    engine = build(spec, plan, ranks)
    built = read_status("VmRSS")
    saver = Saver(run, 1, spec, engine=engine, ranks=ranks, wait_stored=lambda: None)
    for step in train_steps(engine, spec, plan, ranks, NUM_STEPS):
        if step == SAVED_STEP:
            shapes = {name: list(shape) for name, shape in engine.parameter_shapes.items()}
            shapes |= {name: list(buffer.shape) for name, buffer in engine.buffers().items()}
            saver.begin(step, {"shapes": shapes})
    saver.finish(last=True)
    return {"built": built}


def read_status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(spec: Spec) -> dict[str, int]:
    """Resident bytes of the rank with the greatest peak."""
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as folder:
        create_run(folder, spec.name, spec, plan_case(spec).model_dump(mode="json")).begin_attempt(
            NUM_RANKS, 0
        )
        mp.spawn(run_rank, args=(spec, folder), nprocs=NUM_RANKS)
        ranks = [
            json.loads(path.read_text(encoding="utf-8"))
            for path in Path(folder).glob("rank-*.json")
        ]
    return max(ranks, key=lambda rank: rank["peak"])  # type: ignore[no-any-return]


def make_table(rows: list[dict[str, Any]]) -> str:
    """The generated block of docs/plan.md."""
    lines = [
        "| model | ZeRO | parameters | gradients | optimizer | activations | logits | buffers | "
        "checkpoint | framework | allocator | plan, MB | measured, MB | plan/measured |",
        "|---|---" + "|--:" * 12 + "|",
    ]
    for row in rows:
        memory: MemoryPlan = row["memory"]
        terms = [getattr(memory, term) for term in (*MEMORY_TERMS, "total")]
        cells = [f"{value / 1e6:,.0f}" for value in (*terms, row["measured"])]
        cells.append(f"{memory.total / row['measured']:.2f}")
        lines.append(f"| {row['model']} | {row['stage']} | {' | '.join(cells)} |")
    worst = max(abs(row["memory"].total / row["measured"] - 1) for row in rows)
    models = "; ".join(
        f"{name}: {a}, hidden {h}, {n} layers, {w} tokens × {r} rows, vocabulary {v}"
        for name, (a, h, n, _, w, v, r) in MODELS.items()
    )
    return "\n".join(
        [
            *lines,
            "",
            f"Models: {models}. No constant was fitted to {' and '.join(HELD_OUT)}.",
            "",
            f"Greatest deviation: {worst:.0%}. {NUM_RANKS} ranks, CPU, fp32, {NUM_STEPS} steps, "
            "one thread a rank. Measured: the highest resident set of the process' life (VmHWM).",
        ]
    )


def write_block(document: Path, block: str) -> None:
    """Replace what lies between the markers."""
    text = document.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{document} lacks the markers {BEGIN} and {END}")
    document.write_text(f"{head}{BEGIN}\n\n{block}\n\n{END}{tail}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="NAME:STAGE", help="one case; nothing is written")
    only = parser.parse_args().only
    cases = [(name, stage) for name in MODELS for stage in HELD_OUT.get(name, range(4))]
    if only:
        cases = [(only.partition(":")[0], int(only.partition(":")[2]))]
    rows = []
    for name, stage in cases:
        spec = make_case(name, stage)
        memory, found = plan_case(spec).memory, measure(spec)
        rows.append({"model": name, "stage": stage, "memory": memory, "measured": found["peak"]})
        print(
            f"{name} ZeRO-{stage}: plan {memory.total / 1e6:,.0f} MB, measured "
            f"{found['peak'] / 1e6:,.0f} MB ({memory.total / found['peak']:.2f}); built "
            f"{found['built'] / 1e6:,.0f} MB, peak at {memory.peak}",
            file=sys.stderr,
            flush=True,
        )
    if not only:
        write_block(DOCUMENT, make_table(rows))
    return int(any(abs(row["memory"].total / row["measured"] - 1) > TOLERANCE for row in rows))


if __name__ == "__main__":
    sys.exit(main())
