"""(a) Tokens a second and (b) seconds to the first step: dray beside a hand-written DDP loop and
the stock arm.

    python -m bench.training [--steps 10] [--rounds 2] [--precision bf16]

All arms train one model (Llama, hidden 384, 6 layers, vocabulary 8192, rows of 512, micro batch 8)
with 2 workers of one thread, one after the other in each round, on the same machine; medians over
the steps after the third, then over the rounds. The precision is the one that the machine computes
in: where bf16 is emulated every arm runs fp32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from bench.report import write_section
from dray.plan import local_shape

ROOT = Path(__file__).parents[1]
CORPUS = ROOT / "../shared/data/corpus_en"
STOCK = ROOT / "../shared/stock/train.py"


def spec_overrides(steps: int, stage: int, precision: str, compiled: bool) -> list[str]:
    return [
        f"duration.steps={steps}",
        f"zero.stage={stage}",
        f"precision={precision}",
        f"engine.compile={str(compiled).lower()}",
        f"name=bench-z{stage}-{'compiled' if compiled else 'eager'}",
    ]


SPEC = f"""
name: bench
data: {{train: ["{CORPUS}/*.jsonl.gz"], sequence_tokens: 512}}
tokenizer: {{train: byte_bpe, vocab_size: 8192}}
model: {{architecture: llama, hidden_size: 384, num_layers: 6, num_heads: 6}}
batch: {{global_rows: 16, micro_rows: 8}}
schedule: {{name: constant}}
duration: {{steps: 12}}
resources: {{workers: 2, cpus_per_worker: 1}}
"""


def run(command: list[str], **environment: str) -> tuple[str, float]:
    """stdout and wall time of a command; its stderr is shown if it fails."""
    begun = time.time()
    everything = {**os.environ, **environment}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=everything
    )
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return done.stdout, begun


def dray_arm(
    folder: Path, steps: int, stage: int, precision: str, *, compiled: bool, number: int
) -> dict[str, float]:
    """Tokens a second as the run's own metrics have them, and the time of its first step."""
    overrides = spec_overrides(steps, stage, precision, compiled)
    out, begun = run(
        [
            f"{sys.prefix}/bin/dray",
            "train",
            str(folder / "spec.yaml"),
            *overrides,
            "--storage",
            str(folder / "runs"),
            "--run",
            f"r{number}-z{stage}-{compiled}",
            "--json",
        ]
    )
    from dray import Run

    rows = Run.open(str(folder / "runs"), json.loads(out)["name"]).metrics()
    body = [16 * 512 / row["seconds"] for row in rows[3:]]
    return {
        "tokens_per_second": statistics.median(body),
        "seconds_to_first_step": rows[0]["time"] - begun,
    }


def ddp_arm(steps: int, precision: str, compiled: bool) -> dict[str, float]:
    flags = ["--compile"] * compiled + ["--bf16"] * (precision == "bf16")
    return torchrun("bench/ddp_loop.py", "--steps", str(steps), *flags)


def engine_arm(steps: int, stage: int, precision: str) -> dict[str, float]:
    return torchrun(
        "-m",
        "bench.engines",
        "--steps",
        str(steps),
        "--stage",
        str(stage),
        "--precision",
        precision,
    )


def torchrun(*command: str) -> dict[str, float]:
    out, _ = run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            *command,
        ],
        OMP_NUM_THREADS="1",
    )
    return dict(json.loads(out.strip().splitlines()[-1]))


def stock_arm(folder: Path, steps: int, stage: int, precision: str) -> dict[str, float]:
    tokenizer = next((folder / "runs" / "corpora").glob("*/tokenizer/tokenizer.json"))
    flags = [] if precision == "bf16" else ["--fp32"]
    out, _ = run(
        [
            sys.executable,
            str(STOCK),
            "--corpus",
            str(CORPUS),
            "--tokenizer",
            str(tokenizer),
            "--steps",
            str(steps),
            "--zero",
            str(stage),
            "--checkpoint-every",
            "1000",
            "--storage",
            str(folder / "stock"),
            *flags,
        ],
        OMP_NUM_THREADS="1",
        RAY_ADDRESS="local",
    )  # a cluster that has been left somewhere is not for it
    return dict(json.loads(out.strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--precision",
        default="bf16" if local_shape().cpu_bf16 else "fp32",
        choices=["fp32", "bf16"],
    )
    arguments = parser.parse_args()
    figures: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="dray-bench-") as name:
        folder = Path(name)
        (folder / "spec.yaml").write_text(SPEC)
        run(
            [
                f"{sys.prefix}/bin/dray",
                "prepare",
                str(folder / "spec.yaml"),
                "--storage",
                str(folder / "runs"),
            ]
        )
        for number in range(arguments.rounds):
            steps, precision = arguments.steps, arguments.precision
            figures["DDP loop, eager"].append(ddp_arm(steps, precision, False))
            figures["dray's engine alone, ZeRO 1, eager"].append(engine_arm(steps, 1, precision))
            figures["dray, ZeRO 1, eager"].append(
                dray_arm(folder, steps, 1, precision, compiled=False, number=number)
            )
            figures["stock, ZeRO 1"].append(stock_arm(folder, steps, 1, precision))
            figures["DDP loop, compiled"].append(ddp_arm(steps, precision, True))
            figures["dray, ZeRO 1, compiled"].append(
                dray_arm(folder, steps, 1, precision, compiled=True, number=number)
            )
            figures["dray, ZeRO 3, eager"].append(
                dray_arm(folder, steps, 3, precision, compiled=False, number=number)
            )
            figures["stock, ZeRO 3"].append(stock_arm(folder, steps, 3, precision))
            for arm, values in figures.items():
                print(arm, values[-1], file=sys.stderr, flush=True)
    write_section("training", table(figures, arguments.precision), figures)


def table(figures: dict[str, list[dict[str, float]]], precision: str) -> str:
    """The figures as Markdown."""
    middle = {
        arm: {
            key: statistics.median(value[key] for value in values)
            for key in values[0]
            if isinstance(values[0][key], (int, float))
        }
        for arm, values in figures.items()
    }
    eager = middle["DDP loop, eager"]["tokens_per_second"]
    lines = [
        f"Precision {precision}; {len(figures['DDP loop, eager'])} round(s).\n",
        "| arm | tokens/s | ÷ eager DDP loop | seconds from the command to the first step |",
        "|---|---|---|---|",
    ]
    for arm, values in middle.items():
        first = values.get("seconds_to_first_step")
        lines.append(
            f"| {arm} | {values['tokens_per_second']:,.0f} | "
            f"{values['tokens_per_second'] / eager:.2f} "
            f"| {'–' if first is None else f'{first:.1f}'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
