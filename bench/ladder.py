"""A model's loss foretold by smaller ones for a twentieth of its compute, and what it came to:
`python -m bench.ladder [--budgets 5% 25%] [--storage DIR]`.

The model is 0.9 M parameters on one epoch of ../shared/data/corpus_en in short tokens (9.8 M of
them), some twenty minutes of a core. Both commands go on where they were stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.report import write_section
from bench.sweeps import TREE as BASE

TREE: dict[str, Any] = {
    "name": "small",
    "task": "causal_lm",
    "data": BASE["data"],
    "tokenizer": {**BASE["tokenizer"], "vocab_size": 512},
    "model": {
        "architecture": "llama",
        "hidden_size": 128,
        "num_layers": 4,
        "num_heads": 4,
        "tie_embeddings": False,
    },
    "batch": {"global_rows": 32},
    "optimizer": {"learning_rate": 4e-3, "weight_decay": 0.1},
    "schedule": {"name": "cosine", "warmup_steps": 60},
    "duration": {"epochs": 1},
    "precision": "fp32",
    "checkpoint": {"keep_last": 1},
    "resources": {"workers": 1},
}


def run(words: list[str]) -> dict[str, Any]:
    """What a command of dray prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "dray.cli", *words, "--json"], check=True, stdout=subprocess.PIPE
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--budgets", nargs="+", default=["5%", "25%"])
    parser.add_argument("--storage", help="a folder to keep (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-ladder-") as place:
        spec = Path(place, "small.yaml")
        spec.write_text(json.dumps(TREE))
        storage = arguments.storage or place
        ladders = [
            run(
                [
                    *("ladder", str(spec), "--budget", budget, "--storage", storage),
                    *("--run", f"small-ladder-{budget.rstrip('%')}"),
                ]
            )
            for budget in arguments.budgets
        ]
        whole = run(["train", str(spec), "--storage", storage])
    write_figures([ladder["forecast"] for ladder in ladders], whole["validation"]["loss"])


def write_figures(forecasts: list[dict[str, Any]], loss: float) -> None:
    """Both ladders beside what the model came to, into the docs."""
    tables = "\n\n".join(_table(forecast, loss) for forecast in forecasts)
    write_section("ladder", tables, {"forecasts": forecasts, "loss": loss})


def _table(forecast: dict[str, Any], loss: float) -> str:
    foretold = forecast["loss"]
    law, target = forecast["law"], forecast["target"]
    lines = [
        "| parameters | layers × width | tokens | compute, of the target's | loss | by the law |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {rung['num_parameters']:,} | {rung['num_layers']} × {rung['hidden_size']} | "
        f"{rung['num_tokens']:,} | {rung['flops'] / target['flops']:.2%} | {rung['loss']:.4f} "
        f"| {rung['fitted'] / rung['loss'] - 1:+.2%} |"
        for rung in forecast["rungs"]
    ]
    lines.append(
        f"| **{target['num_parameters']:,}** | {target['num_layers']} × {target['hidden_size']} | "
        f"{target['num_tokens']:,} | 100% | **{loss:.4f}** | "
        f"**{foretold['value'] / loss - 1:+.2%}** |"
    )
    lines += [
        "",
        f"Foretold for {forecast['share']:.1%} of its compute: {foretold['value']:.4f} "
        f"({foretold['low']:.4f} to {foretold['high']:.4f}), by L = {law['irreducible']:.3g} + "
        f"{law['by_size']:.3g} / N^{law['alpha']:.3g} + {law['by_tokens']:.3g} / "
        f"D^{law['beta']:.3g}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
