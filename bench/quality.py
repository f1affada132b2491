"""What the recipes reach on real test sets, beside simple models on the same splits: `python -m
bench.quality [--only sst2_minilm …] [--seeds 0 1 2]`.

Each recipe runs as a person would run it, by `dray train`; what is done already is found. The
epoch is chosen by dev where there is one, and is the last where a part of the training file is held
out. Reads ../shared/data; what of it, or of the packages with pretrained weights, is absent ends
the run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from bench import baselines
from bench.report import ROOT, write_section
from dray.release.evaluate import evaluate

DATA = ROOT / "../shared/data"
SST2, HOTEL, WNUT = DATA / "sst2", DATA / "chnsenticorp_hotel", DATA / "wnut17"


@dataclass(frozen=True)
class Arm:
    """A recipe, what it is asked for, and the simple model it is measured beside."""

    recipe: str
    baseline: str
    metric: str
    test: str = ""
    """The test file; empty: the part that the recipe holds out."""
    overrides: tuple[str, ...] = ()
    name: str = ""
    starts_from: str = ""
    """The recipe whose run it starts from."""

    @property
    def run(self) -> str:
        return self.name or self.recipe


ARMS = (
    Arm("sst2", "sst2", "accuracy", str(SST2 / "test.tsv")),
    Arm("sst2_pretrained", "sst2", "accuracy", str(SST2 / "test.tsv"), starts_from="encoder_en"),
    Arm("sst2_minilm", "sst2", "accuracy", str(SST2 / "test.tsv")),
    Arm("wnut17", "wnut17", "f1", str(WNUT / "emerging.test.annotated")),
    Arm(
        "wnut17",
        "wnut17",
        "f1",
        str(WNUT / "emerging.test.annotated"),
        ("model={run: encoder_en}", "tokenizer={run: encoder_en}", "optimizer.learning_rate=1e-3"),
        name="wnut17-own",
        starts_from="encoder_en",
    ),
    Arm("hotel_zh", "hotel", "accuracy", starts_from="reviews_zh"),
)


def measure_baseline(name: str) -> Any:
    """Accuracy, or seqeval's report by type."""
    if name == "sst2":
        train, dev, test = (
            baselines.read_sst2(SST2 / file) for file in ("train.tsv.gz", "dev.tsv", "test.tsv")
        )
        return baselines.tfidf(train, dev, test, analyzer="word", longest=2)
    if name == "hotel":
        kept, held = baselines.read_hotel(HOTEL / "ChnSentiCorp_htl_all.csv.gz", 0.2)
        return baselines.tfidf(kept, None, held, analyzer="char", longest=3)
    files = ("wnut17train.conll", "emerging.dev.conll", "emerging.test.annotated")
    return baselines.crf(*(baselines.read_conll(WNUT / file) for file in files))


def dray(storage: Path, *arguments: str) -> dict[str, Any]:
    """One command of dray's, and the JSON that it prints."""
    command = [f"{sys.prefix}/bin/dray", *arguments, "--storage", str(storage), "--json"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(arm: Arm, seed: int, storage: Path) -> dict[str, Any]:
    """Train one recipe with one seed, or find it done, and evaluate it."""
    run = f"{arm.run}-{seed}"
    dray(storage, "train", arm.recipe, f"seed={seed}", *arm.overrides, "--run", run)
    attempts = dray(storage, "show", run)["attempts"]
    spans = (map(datetime.fromisoformat, (one["started"], one["ended"])) for one in attempts)
    seconds = sum((ended - started).total_seconds() for started, ended in spans)
    report: dict[str, dict[str, float]] = {}
    found = evaluate(
        str(storage),
        run,
        step="best" if arm.test else None,
        data=[arm.test] if arm.test else None,
        report=report,
    )
    return {
        "value": found[arm.metric],
        "seconds": seconds,
        "evaluation": found,
        "report": report,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[arm.run for arm in ARMS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--storage", type=Path, default=ROOT / "bench" / "results" / "quality")
    given = parser.parse_args()
    arms = [arm for arm in ARMS if arm.run in given.only]
    simple: dict[str, Any] = {}
    figures: dict[str, Any] = {}
    for origin in sorted({arm.starts_from for arm in arms} - {""}):
        dray(given.storage, "train", origin)  # or find it done
    lines = ["| recipe | metric | test | beside it | seconds |", "|---|---|---|---|---|"]
    for arm in arms:
        if arm.baseline not in simple:
            simple[arm.baseline] = measure_baseline(arm.baseline)
        found = [measure(arm, seed, given.storage) for seed in given.seeds]
        figures[arm.run] = {"runs": found, "baseline": simple[arm.baseline]}
        lines.append(_line(arm, found, simple[arm.baseline]))
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n\n" + "\n".join(_types(figures))
    if len(arms) == len(ARMS):
        write_section("quality", text, figures)
    else:
        print(json.dumps(figures, indent=1))


def _types(figures: dict[str, Any]) -> Iterator[str]:
    """Precision, recall and F1 by type of entity, of the first seed's taggers and the CRF."""
    taggers = {run: found for run, found in figures.items() if found["runs"][0]["report"]}
    if not taggers:
        return
    reports = {f"`{run}`": found["runs"][0]["report"] for run, found in taggers.items()}
    crf = next(iter(taggers.values()))["baseline"]
    reports["CRF"] = {
        kind: {**row, "f1": row["f1-score"], "num": row["support"]} for kind, row in crf.items()
    }
    yield f"| entities | number | {' | '.join(reports)} |"
    yield f"|---|--:|{'---|' * len(reports)}"
    for kind, row in reports["CRF"].items():
        cells = (
            " / ".join(f"{one[kind][name]:.0%}" for name in ("precision", "recall", "f1"))
            for one in reports.values()
        )
        yield f"| {kind} | {int(row['num'])} | {' | '.join(cells)} |"


def _line(arm: Arm, found: list[dict[str, Any]], simple: Any) -> str:
    values = [one["value"] for one in found]
    spread = f" ({min(values):.1%} to {max(values):.1%})" if len(values) > 1 else ""
    beside = simple if isinstance(simple, float) else simple["micro avg"]["f1-score"]
    kind = {"wnut17": "CRF"}.get(arm.baseline, "tf-idf, logistic regression")
    return (
        f"| `{arm.run}` | {arm.metric} | **{statistics.median(values):.1%}**{spread} | "
        f"{kind}: {beside:.1%} | {statistics.median(one['seconds'] for one in found):.0f} |"
    )


if __name__ == "__main__":
    main()
