"""Fine-tuning a small pretrained encoder beside Hugging Face's Trainer: `python -m
bench.finetuning`.

MiniLM (22.7 M parameters) on SST-2's sentences, 2 ranks of one thread, 32 sentences a rank and
step, AdamW, batches of like length, no validation, one precision for both. dray keeps a checkpoint
at its end, which the other arm does not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from bench import real_models
from bench.report import write_section
from bench.training import ROOT, run, torchrun
from dray.plan import local_shape

TRAIN = ROOT / "../shared/data/sst2/train.tsv.gz"
ROWS, TOKENS = 32, 64


def dray_arm(
    folder: Path, model: Path, steps: int, precision: str, number: int
) -> dict[str, float]:
    out, begun = run(
        [
            f"{sys.prefix}/bin/dray",
            "train",
            "sst2",
            f"model={{path: {model}}}",
            f"tokenizer={{path: {model}}}",
            f"data.train.path={TRAIN}",
            "data.validation=null",
            "validation={}",
            f"batch.global_rows={2 * ROWS}",
            f"batch.micro_rows={ROWS}",
            f"duration={{steps: {steps}}}",
            "optimizer.learning_rate=5e-5",
            "schedule={name: constant}",
            "regularization.dropout=0.1",
            f"precision={precision}",
            "checkpoint={every_steps: 100000}",
            "--storage",
            str(folder / "runs"),
            "--run",
            f"r{number}",
            "--json",
        ]
    )
    wall = time.time() - begun
    from dray import Run

    rows = Run.open(str(folder / "runs"), json.loads(out)["name"]).metrics()
    return {
        "seconds_of_steps": sum(row["seconds"] for row in rows),
        "seconds_to_first_step": rows[0]["time"] - begun,
        "seconds": wall,
    }


def trainer_arm(model: Path, steps: int, precision: str) -> dict[str, float]:
    begun = time.time()
    found = torchrun(
        "bench/hf_trainer.py",
        "--model",
        str(model),
        "--train",
        str(TRAIN),
        "--steps",
        str(steps),
        "--rows",
        str(ROWS),
        "--tokens",
        str(TOKENS),
        *["--bf16"] * (precision == "bf16"),
    )
    return {**found, "seconds": time.time() - begun}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--precision",
        default="bf16" if local_shape().cpu_bf16 else "fp32",
        choices=["fp32", "bf16"],
    )
    arguments = parser.parse_args()
    model = real_models.minilm()
    figures: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="dray-bench-") as name:
        for number in range(arguments.rounds):
            figures["dray"].append(
                dray_arm(Path(name), model, arguments.steps, arguments.precision, number)
            )
            figures["Trainer"].append(trainer_arm(model, arguments.steps, arguments.precision))
            for arm, values in figures.items():
                print(arm, values[-1], file=sys.stderr, flush=True)
    write_section("finetuning", table(figures, arguments.steps, arguments.precision), figures)


def table(figures: dict[str, list[dict[str, float]]], steps: int, precision: str) -> str:
    """The figures as Markdown. dray's first round prepares the corpus, the others find it."""
    lines = [
        f"{steps} steps, {precision}, {len(figures['dray'])} round(s).\n",
        "| round | dray: steps, s | Trainer: steps, s | Trainer ÷ dray | dray: command, s | "
        "Trainer: command, s | Trainer ÷ dray |",
        "|---|" + "--:|" * 6,
    ]
    ratios = []
    for number, (ours, theirs) in enumerate(
        zip(figures["dray"], figures["Trainer"], strict=True), start=1
    ):
        ratio = [theirs[key] / ours[key] for key in ("seconds_of_steps", "seconds")]
        ratios.append(ratio)
        lines.append(
            f"| {number} | {ours['seconds_of_steps']:.1f} | {theirs['seconds_of_steps']:.1f} | "
            f"{ratio[0]:.2f} | {ours['seconds']:.1f} | {theirs['seconds']:.1f} | {ratio[1]:.2f} |"
        )
    steps_ratio, command_ratio = (statistics.median(ratio[at] for ratio in ratios) for at in (0, 1))
    return "\n".join(
        [
            *lines,
            "",
            f"Medians: {steps_ratio:.2f} in the steps, {command_ratio:.2f} in the command.",
        ]
    )


if __name__ == "__main__":
    main()
