"""`python -m bench.parity`: the same steps under ZeRO 0 to 3, with 1, 2 and 4 workers, and resumed
elsewhere.

A Llama of 13 M parameters on ../shared/data/corpus_en in fp32. Every run is compared with the first
one step by step: the greatest difference of the losses, and whether all row digests are equal. On a
local Ray; writes docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.report import write_section
from dray.cluster.connection import connect
from dray.runs import Run, verify_checkpoint
from dray.spec import make_spec
from dray.train.driver import train

CORPUS = Path(__file__).parents[1] / "../shared/data/corpus_en"


def go(
    storage: str, name: str, steps: int, *, stage: int, workers: int = 2, every: int | None = None
) -> Run:
    """Train, or go on, in one place."""
    spec = make_spec(
        {
            "name": "parity",
            "data": {"train": f"{CORPUS.resolve()}/*.jsonl.gz", "sequence_tokens": 128},
            "tokenizer": {"train": "byte_bpe", "vocab_size": 8192},
            "model": {"architecture": "llama", "hidden_size": 384, "num_layers": 6, "num_heads": 6},
            "batch": {"global_rows": 8, "micro_rows": 2},
            "optimizer": {"learning_rate": 1e-3},
            "schedule": {"name": "constant", "warmup_steps": 10},
            "duration": {"steps": steps},
            "precision": "fp32",
            "checkpoint": {"every_steps": every, "keep_last": 3},
            "resources": {"workers": workers},
            "zero": {"stage": stage},
            "engine": {"compile": False},
        }
    )
    return train(spec, storage=storage, run_name=name).run


def compare(run: Run, straight: Run) -> dict[str, Any]:
    rows, expected = run.metrics(), straight.metrics()
    pairs = list(zip(rows, expected, strict=False))
    return {
        "steps": len(pairs),
        "loss_difference": max(abs(a["loss"] - b["loss"]) for a, b in pairs),
        "digests_equal": all(a["rows_digest"] == b["rows_digest"] for a, b in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    third = steps // 3
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="dray-parity-") as storage, connect(None, num_cpus=6):
        straight = go(storage, "straight", steps, stage=1, every=third)
        for stage in (0, 2, 3):
            found[f"ZeRO {stage}, 2 workers"] = compare(
                go(storage, f"z{stage}", 50, stage=stage), straight
            )
        for workers in (1, 4):
            run = go(storage, f"w{workers}", 50, stage=1, workers=workers)
            found[f"ZeRO 1, {workers} worker{'s' * (workers > 1)}"] = compare(run, straight)
        for until, stage, workers in ((third, 1, 2), (2 * third, 3, 4), (3 * third, 2, 1)):
            moved = go(storage, "moved", until, stage=stage, workers=workers)
        found["2 workers ZeRO 1 → 4 workers ZeRO 3 → 1 worker ZeRO 2"] = compare(moved, straight)
        go(storage, "stopped", third, stage=1)
        again = go(storage, "stopped", steps, stage=1)
        found["stopped and resumed in its own place"] = compare(again, straight)
        ours, theirs = (verify_checkpoint(run, run.checkpoints()[-1]) for run in (again, straight))
        equal = (ours.weights_sha256, ours.optimizer_sha256) == (
            theirs.weights_sha256,
            theirs.optimizer_sha256,
        )
        first_loss = straight.metrics()[0]["loss"]
    lines = [
        f"First loss {first_loss:.4f} (ln 8192 = 9.0109). Stopped and resumed in its own place, "
        f"the hashes of weights and optimiser states are {'equal' if equal else 'DIFFERENT'}.\n",
        "| run, against ZeRO 1 with 2 workers in one go | steps | greatest difference of a loss | "
        "row digests |",
        "|---|---|---|---|",
    ]
    words = {True: "equal", False: "DIFFERENT"}
    lines += [
        f"| {name} | {row['steps']} | {row['loss_difference']:.1e} | "
        f"{words[row['digests_equal']]} |"
        for name, row in found.items()
    ]
    write_section("parity", "\n".join(lines), {**found, "hashes_equal": equal})
    sound = equal and all(
        row["digests_equal"] and row["loss_difference"] < 1e-4 for row in found.values()
    )
    sys.exit(0 if sound else 1)


if __name__ == "__main__":
    main()
