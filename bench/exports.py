"""Real models in other forms: sizes, and what other runtimes compute otherwise. Writes the table of
docs/export.md:

    python -m bench.exports [--steps 20]

SmolLM2-135M-Instruct is instructed by LoRA for some steps, MiniLM learns SST-2; both are then
written in every form that there is for them, and each folder is verified. Trained runs are found
again in ./runs, so that a bench which was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.real_models import minilm, smollm2
from bench.report import ROOT, write_section
from dray.release.export import export
from dray.release.export.manifest import MANIFEST, verify_folder
from dray.runs import Run
from dray.spec import Spec, load_spec, make_spec
from dray.train import train

STORAGE = ROOT / "runs"
PAGE = ROOT / "docs" / "export.md"
FORMS = {
    "smollm2_lora": [
        ("folder", ""),
        ("gguf", "f32"),
        ("gguf", "f16"),
        ("gguf", "bf16"),
        ("gguf", "q8_0"),
        ("onnx", ""),
    ],
    "minilm_sst2": [("folder", ""), ("onnx", "")],
}


def smollm2_spec(steps: int) -> Spec:
    folder = STORAGE / "bases"
    if not (folder / "smollm2" / "config.json").exists():
        smollm2(folder)
    return make_spec(
        {
            "name": "smollm2_lora",
            "task": "instruction",
            "data": {
                "train": [{"path": str(ROOT / "../shared/data/dialogue/alpaca_en_demo.json.gz")}],
                "validation": {"share": 0.05},
                "sequence_tokens": 256,
            },
            "tokenizer": {"path": str(folder / "smollm2")},
            "model": {"path": str(folder / "smollm2")},
            "adapters": {"name": "lora", "rank": 8, "alpha": 16},
            "batch": {"global_rows": 4},
            "optimizer": {"learning_rate": 2e-4},
            "duration": {"steps": steps},
            "precision": "fp32",
            "validation": {"max_rows": 8},
            "resources": {"workers": 1},
            "engine": {"compile": False},
        }
    )


def minilm_spec(steps: int) -> Spec:
    minilm()
    return load_spec(
        "sst2_minilm",
        [
            "name=minilm_sst2",
            f"duration.steps={steps}",
            "duration.epochs=null",
            "schedule.warmup_steps=2",
            "resources.workers=1",
            "precision=fp32",
            "engine.compile=false",
        ],
    )


def trained(spec: Spec) -> None:
    """Train a run that is not done yet."""
    run = Run.find(str(STORAGE), spec.name)
    if run is not None and run.status == "completed":
        return
    train(spec, storage=str(STORAGE))


def measure(name: str, form: str, values: str, folder: Path) -> dict[str, Any]:
    begun = time.monotonic()
    export(str(STORAGE), name, str(folder), form=form, **({"values": values} if values else {}))
    seconds = time.monotonic() - begun
    report = verify_folder(str(folder))
    if not report.ok:
        raise SystemExit("; ".join(report.problems))
    tree = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    model = [item for item in tree["files"] if item["file"].startswith("model.")]
    shutil.rmtree(folder)
    return {
        "run": name,
        "form": form,
        "values": values,
        "bytes": sum(item["bytes"] for item in model),
        "checks": tree["checks"],
        "seconds": seconds,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| run | `dray export … --format` | model file | given the same weights, a logit differs "
        "by | as it is, a logit differs by | largest logit |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = [check for check in row["checks"] if "largest_difference" in check]
        exact = next((check for check in numbers if "allowed" in check), None)
        own = next((check for check in numbers if "allowed" not in check), None)
        how = row["form"] + (f" --values {row['values']}" if row["values"] else "")
        cells = [
            row["run"],
            f"`{how}`",
            f"{row['bytes'] / 1e6:,.1f} MB",
            f"{exact['largest_difference']:.2g}" if exact else "",
            f"{own['largest_difference']:.2g}" if own else "",
            f"{own['largest_logit']:.3g}" if own else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    rows = []
    for make in (minilm_spec, smollm2_spec):
        spec = make(steps)
        trained(spec)
        with tempfile.TemporaryDirectory(dir=STORAGE) as place:
            for form, values in FORMS[spec.name]:
                rows.append(measure(spec.name, form, values, Path(place, "model")))
                print(rows[-1], flush=True)
    write_section("exports", table(rows), rows, PAGE)


if __name__ == "__main__":
    main()
