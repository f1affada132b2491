"""`dray plan --measure` beside the run that it plans, for six models from 1 M to 135 M: `python -m
bench.planned`.

Each is trained for some steps through `dray train` with 2 workers of one thread; SmolLM2 and MiniLM
start from real weights (bench/real_models.py). Compared are the seconds of a step (the mean after
the second: MiniLM's rows, and so its steps, differ in length) and the peak memory of the greatest
rank. Wanted: within 15 % in time, 8 % in memory. `--only NAME` runs some and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import real_models
from bench.finetuning import TRAIN
from bench.report import write_section
from bench.training import CORPUS, run

TIME_TOLERANCE, MEMORY_TOLERANCE = 0.15, 0.08
SKIPPED_STEPS = 2

# architecture, hidden size, layers, heads, vocabulary, tokens a row, rows a micro batch, rows a
# step, stage, steps
SHAPES = {
    "llama-1m": ("llama", 128, 4, 4, 4096, 128, 8, 32, 1, 24),
    "llama-6m": ("llama", 256, 6, 4, 8192, 256, 8, 16, 0, 12),
    "gpt2-23m": ("gpt2", 384, 6, 6, 32000, 256, 4, 16, 2, 10),
    "llama-67m": ("llama", 768, 6, 12, 32000, 256, 2, 4, 3, 8),
}


def cases(folder: Path) -> dict[str, list[str]]:
    """What follows `dray train` and `dray plan` for each model: a spec and its overrides."""
    text = [
        f"data={{train: ['{CORPUS}/*.jsonl.gz'], sequence_tokens: 128}}",
        "resources={workers: 2, cpus_per_worker: 1}",
        "schedule={name: constant}",
        "checkpoint={every_steps: 100000}",
        "engine.compile=false",
    ]
    found = {}
    for name, (
        kind,
        hidden,
        layers,
        heads,
        vocab,
        width,
        micro,
        rows,
        stage,
        steps,
    ) in SHAPES.items():
        found[name] = [
            *text,
            f"data.sequence_tokens={width}",
            f"tokenizer={{train: byte_bpe, vocab_size: {vocab}}}",
            f"model={{architecture: {kind}, hidden_size: {hidden}, num_layers: {layers}, "
            f"num_heads: {heads}}}",
            f"batch={{global_rows: {rows}, micro_rows: {micro}}}",
            f"duration={{steps: {steps}}}",
            f"zero={{stage: {stage}}}",
        ]
    model = real_models.smollm2(folder / "smollm2")
    found["smollm2-135m"] = [
        *text,
        "data.sequence_tokens=256",
        f"model={{path: {model}}}",
        f"tokenizer={{path: {model}}}",
        "batch={global_rows: 4, micro_rows: 2}",
        "duration={steps: 6}",
        "zero={stage: 3}",
    ]
    model = real_models.minilm()
    found["minilm-23m"] = [
        "task=sequence_classification",
        f"data.train={{path: {TRAIN}, format: tsv, quoting: none, header: false, "
        "text: '0', label: '1'}",
        "data.sequence_tokens=64",
        f"model={{path: {model}}}",
        f"tokenizer={{path: {model}}}",
        "batch={global_rows: 64, micro_rows: 32}",
        "duration={steps: 40}",
        "zero={stage: 1}",
        *text[1:],
    ]
    return found


def measure(name: str, overrides: list[str], folder: Path) -> dict[str, Any]:
    """Plan, then run."""
    from dray import Run

    spec, storage = folder / f"{name}.yaml", str(folder / "runs")
    spec.write_text(f"name: {name}\ndata: {{train: none}}\nduration: {{steps: 1}}\n")
    dray = f"{sys.prefix}/bin/dray"
    run([dray, "prepare", str(spec), *overrides, "--storage", storage])
    plan = json.loads(
        run([dray, "plan", str(spec), *overrides, "--storage", storage, "--measure", "--json"])[0]
    )
    run([dray, "train", str(spec), *overrides, "--storage", storage, "--json"])
    rows = Run.open(storage, name).metrics()
    return {
        "parameters": plan["num_parameters"],
        "stage": plan["zero_stage"],
        "precision": plan["precision"],
        "planned_seconds": plan["step_seconds"],
        "planned_bytes": plan["memory"]["total"],
        "seconds": statistics.fmean(row["seconds"] for row in rows[SKIPPED_STEPS:]),
        "bytes": max(row["memory_bytes_max"] for row in rows),
        "terms": {key: value for key, value in plan["memory"].items() if isinstance(value, int)},
    }


def table(figures: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = [
        "| model | parameters | ZeRO | a step planned, s | run, s | planned ÷ run | memory "
        "planned, MB | run, MB | planned ÷ run |",
        "|---|" + "--:|" * 8,
    ]
    for name, row in figures.items():
        lines.append(
            f"| {name} | {row['parameters'] / 1e6:,.1f} M | {row['stage']} | "
            f"{row['planned_seconds']:.2f} | {row['seconds']:.2f} | "
            f"{row['planned_seconds'] / row['seconds']:.2f} | {row['planned_bytes'] / 1e6:,.0f} | "
            f"{row['bytes'] / 1e6:,.0f} | {row['planned_bytes'] / row['bytes']:.2f} |"
        )
    worst_time, worst_memory = (
        max(abs(row[f"planned_{what}"] / row[what] - 1) for row in figures.values())
        for what in ("seconds", "bytes")
    )
    precision = next(iter(figures.values()))["precision"]
    return "\n".join(
        [
            *lines,
            "",
            f"{precision}. Greatest deviation: {worst_time:.0%} in time (wanted "
            f"{TIME_TOLERANCE:.0%}), {worst_memory:.0%} in memory (wanted {MEMORY_TOLERANCE:.0%}).",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="NAME", nargs="+")
    arguments = parser.parse_args()
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="dray-bench-") as name:
        os.environ["XDG_CACHE_HOME"] = name  # what is kept may be of a day with another speed
        for model, overrides in cases(Path(name)).items():
            if not arguments.only or model in arguments.only:
                figures[model] = measure(model, overrides, Path(name))
                print(model, json.dumps(figures[model]), file=sys.stderr, flush=True)
    if arguments.only:
        print(table(figures))
    else:
        write_section("planned", table(figures), figures)


if __name__ == "__main__":
    main()
