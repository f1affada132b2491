"""How much personal data is found, and how much of what is found is none: a block of
docs/privacy.md.

    python -m bench.redaction [--seed N]

On sentences that are drawn (`redaction_sentences.py`), and on pages of ../shared/data/web_messy
that were read and labelled by hand. `redaction_labels.json` has their places alone: page, kind,
start, end; nothing of what stands there. A label counts as found where one find of its kind covers
it whole; a find is right where it meets a label of its kind.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.redaction_sentences import MAKERS, make_sentences
from bench.report import ROOT, write_section
from dray.corpus.redacting import CALLED, Redactor, make_redactor
from dray.spec import Redaction

DATA = ROOT.parent / "shared" / "data" / "web_messy"
LABELS = Path(__file__).with_name("redaction_labels.json")
Span = tuple[str, int, int]


@dataclass
class Score:
    """Of one kind."""

    labelled: int = 0
    covered: int = 0
    found: int = 0
    right: int = 0
    missed: list[str] = field(default_factory=list, repr=False)

    def told(self) -> str:
        recall = f"{self.covered / self.labelled:.3f}" if self.labelled else "-"
        precision = f"{self.right / self.found:.3f}" if self.found else "-"
        return f"{self.labelled} | {recall} | {self.found} | {precision}"


def measure(redactor: Redactor, texts: Iterable[tuple[str, Sequence[Span]]]) -> dict[str, Score]:
    """Scores by kind over texts with their labels."""
    scores = {kind: Score() for kind in redactor.settings.kinds}
    for text, labels in texts:
        finds = redactor.find(text)
        for kind, start, end in labels:
            score = scores[kind]
            score.labelled += 1
            covers = (f.kind == kind and f.start <= start and end <= f.end for f in finds)
            if any(covers):
                score.covered += 1
            else:
                score.missed.append(text[start:end])
        for find in finds:
            score = scores[find.kind]
            score.found += 1
            score.right += any(
                kind == find.kind and find.start < end and start < find.end
                for kind, start, end in labels
            )
    return scores


def read_pages() -> dict[str, str]:
    """The pages of web_messy by their ids; those of C4 have none, and are numbered."""
    pages: dict[str, str] = {}
    for path in sorted(DATA.glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file):
                record = json.loads(line)
                if record["text"].strip():
                    pages.setdefault(record.get("id", f"c4:{number}"), record["text"])
    return pages


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--number", type=int, default=300)
    parser.add_argument("--show-missed", action="store_true")
    arguments = parser.parse_args()
    redactor = make_redactor(Redaction())
    assert redactor is not None
    sentences = make_sentences(arguments.seed, arguments.number)
    drawn = measure(redactor, [(one.text, one.finds) for one in sentences])
    labels = json.loads(LABELS.read_text())
    pages = read_pages()
    read = measure(
        redactor,
        [
            (pages[page["page"]][: labels["characters"]], [tuple(one) for one in page["finds"]])
            for page in labels["pages"]
        ],
    )
    speed = measure_speed(redactor, list(pages.values()))
    if arguments.show_missed:
        for kind, score in drawn.items():
            print(kind, score.missed[:20])
        return
    groups = [page["drawn"] for page in labels["pages"]]
    figures: dict[str, Any] = {
        "sentences": {kind: vars(score) for kind, score in drawn.items()},
        "pages": {kind: vars(score) for kind, score in read.items()},
        "speed": speed,
    }
    for scores in (figures["sentences"], figures["pages"]):
        for score in scores.values():
            del score["missed"]  # of pages it is somebody's
    lines = [
        "| kind | drawn | recall | found | precision | on pages | recall | found | precision |",
        "|---|---|---|---|---|---|---|---|---|",
        *(f"| {CALLED[kind][1]} | {drawn[kind].told()} | {read[kind].told()} |" for kind in MAKERS),
        "",
        f"Drawn: {len(sentences):,} sentences, seed {arguments.seed}, of which "
        f"{sum(not one.finds for one in sentences):,} have look-alikes alone. Pages: "
        f"{len(groups)}, {groups.count('random')} of them drawn from all. "
        f"{speed['documents_per_second']:,.0f} documents/s, "
        f"{speed['megabytes_per_second']:.2f} MB/s of UTF-8 on one core (time of the process), "
        f"over the {len(pages):,} pages; without phone numbers "
        f"{speed['without_phones']['megabytes_per_second']:.2f} MB/s.",
    ]
    write_section("redaction", "\n".join(lines), figures, ROOT / "docs" / "privacy.md")


def measure_speed(redactor: Redactor, texts: Sequence[str]) -> dict[str, Any]:
    """Documents and bytes a second, once the rules of countries are loaded."""
    kinds = tuple(kind for kind in redactor.settings.kinds if kind != "phone")
    other = make_redactor(Redaction(kinds=kinds))
    assert other is not None

    def timed(one: Redactor) -> dict[str, float]:
        for text in texts:
            one.find(text)
        began = time.process_time()
        for text in texts:
            one.find(text)
        seconds = time.process_time() - began
        num_bytes = sum(len(text.encode()) for text in texts)
        return {
            "documents_per_second": len(texts) / seconds,
            "megabytes_per_second": num_bytes / seconds / 1e6,
        }

    return {**timed(redactor), "without_phones": timed(other)}


if __name__ == "__main__":
    main()
