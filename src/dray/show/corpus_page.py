"""A prepared corpus as one page: what was read, what was kept and why the rest was not, with
examples of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dray.corpus.examples import KEPT
from dray.corpus.languages import OF_LANGUAGE
from dray.corpus.manifest import Manifest, SourceFile, Split
from dray.corpus.prepare import Corpus
from dray.plan import format_bytes
from dray.show.html import Page
from dray.show.plots import draw_bars

MOST_FILES = 100
MOST_BARS = 20
MOST_EXAMPLES = 5
OTHER = "of other languages"


def make_corpus_page(corpus: Corpus) -> Page:
    """The page. Raises CorpusError for a corpus without an account of its files."""
    manifest, files = corpus.manifest, corpus.source_files()
    kept = manifest.train.num_documents + (
        manifest.validation.num_documents if manifest.validation else 0
    )
    page = Page(f"Corpus {manifest.key}")
    page.facts(
        {
            "files": f"{len(files):,}",
            "size": format_bytes(manifest.num_source_bytes),
            "records": f"{manifest.num_records:,}",
            "unreadable": f"{manifest.num_bad:,}",
            "documents kept": f"{kept:,}",
            "documents left out": f"{sum(manifest.dropped.values()):,}",
            "training rows": f"{manifest.train.num_rows:,}",
            "training tokens": f"{manifest.train.num_tokens:,}" if manifest.vocab_size else "",
        }
    )
    _add_fates(page, manifest, kept)
    _add_counts(page, manifest)
    _add_sources(page, manifest)
    _add_examples(page, corpus.examples())
    _add_files(page, files)
    page.section("All of it, in words")
    page.code("\n".join(corpus.describe()))
    return page


def _add_fates(page: Page, manifest: Manifest, kept: int) -> None:
    page.section(
        "What was kept and what was left out",
        "A document is counted for the first reason that it meets. Records that cannot be read are "
        "no documents; they are listed in quarantine.jsonl of the corpus.",
    )
    told = Counter[str]()
    for reason, count in manifest.dropped.items():
        told[OTHER if reason.startswith(OF_LANGUAGE) else reason] += count
    fates = {KEPT: kept, **dict(told.most_common())}
    total = max(1, sum(fates.values()))
    rows = [(fate, f"{count:,}", f"{count / total:.2%}") for fate, count in fates.items()]
    page.table(("documents", "number", "share"), rows, best=0)
    names = [*fates][:MOST_BARS]
    bars = draw_bars(names, [fates[name] for name in names], [0] * len(names), x_label="")
    page.plots([("documents", bars)])


def _add_counts(page: Page, manifest: Manifest) -> None:
    """What else was counted, where it was looked at."""
    other = {
        reason.removeprefix(OF_LANGUAGE): count
        for reason, count in manifest.dropped.items()
        if reason.startswith(OF_LANGUAGE)
    }
    if manifest.languages or other:
        page.section("Languages", "Before other rules and before deduplication.")
        both = Counter(manifest.languages) + Counter(other)
        page.table(
            ("language", "documents", "asked for"),
            [
                (name, f"{count:,}", "yes" if name in manifest.languages else "no")
                for name, count in both.most_common()
            ],
        )
    if manifest.removed:
        page.section("Taken out of documents that were kept")
        page.table(("what", "number"), [(name, f"{n:,}") for name, n in manifest.removed.items()])
    if manifest.redacted:
        page.section("Personal data that was replaced", f"In {manifest.num_redacted:,} documents.")
        page.table(("kind", "number"), [(name, f"{n:,}") for name, n in manifest.redacted.items()])
    if manifest.left_out:
        page.section("Files that were not read")
        page.table(
            ("reason", "files", "size", "such as"),
            [
                (one.reason, f"{one.num_files:,}", format_bytes(one.num_bytes), one.examples[0])
                for one in manifest.left_out
            ],
        )


def _add_sources(page: Page, manifest: Manifest) -> None:
    page.section(
        "The mix of sources",
        "Without weights every row is read once an epoch. With weights each source goes through "
        "epochs of its own, as fast as its weight beside the others says.",
    )
    rows: list[tuple[str, ...]] = []
    for split, found in (("training", manifest.train), ("validation", manifest.validation)):
        rows += _rows_of(split, found) if found is not None else []
    page.table(("split", "source", "weight", "documents", "rows", "tokens", "text"), rows)


def _rows_of(split: str, found: Split) -> list[tuple[str, ...]]:
    return [
        (
            split,
            source.name,
            "" if source.weight is None else f"{source.weight:g}",
            f"{source.num_documents:,}",
            f"{source.num_rows:,}",
            f"{source.num_tokens:,}",
            format_bytes(source.num_text_bytes),
        )
        for source in found.sources
    ]


def _add_examples(page: Page, examples: dict[str, list[str]]) -> None:
    page.section(
        "Examples",
        "Of each fate some documents by their beginnings, chosen by the hash of their texts (of "
        "near-duplicates by where they lie); none of exact duplicates, of documents that are to be "
        "forgotten, and of what is no plain text.",
    )
    told: dict[str, list[str]] = {}
    for fate, texts in sorted(examples.items(), key=lambda item: (item[0] != KEPT, item[0])):
        told.setdefault(OTHER if fate.startswith(OF_LANGUAGE) else fate, []).extend(texts)
    for fate, texts in told.items():
        page.note(fate)
        for text in texts[:MOST_EXAMPLES]:
            page.code(text)


def _add_files(page: Page, files: Sequence[SourceFile]) -> None:
    more = len(files) - MOST_FILES
    page.section("Files", f"The first {MOST_FILES} of {len(files):,}." if more > 0 else "")
    page.table(
        ("file", "form", "size", "documents", "no documents", "unreadable", "problem"),
        [
            (
                file.path,
                file.form,
                format_bytes(file.num_bytes),
                f"{file.num_documents:,}",
                f"{file.num_dropped:,}",
                f"{file.num_bad:,}",
                file.problem,
            )
            for file in files[:MOST_FILES]
        ],
    )
