"""What augmentation makes of training rows, by examples: the rows that a run reads first, as they
were prepared and as they are learnt from."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from dray.corpus.manifest import Manifest
from dray.corpus.rewriting import Rewriter, own_text
from dray.corpus.stream import make_order, read_rows
from dray.corpus.tokenizing import load_decoder
from dray.errors import SpecError
from dray.order import Ints
from dray.spec import TEXT_CHANGES, Spec
from dray.storage.filesystem import child
from dray.tasks.rows import HIDDEN, SEPARATOR

MOST_ROWS = 2048
"""Rows that are looked at."""
ROWS_AT_ONCE = 256
MOST_LETTERS = 400
"""Of a text that is shown."""


def find_examples(spec: Spec, folder: str, manifest: Manifest, number: int) -> dict[str, Any]:
    """Of the rows that are read first `num_rows`, and by kind how many it was drawn for (`num`),
    how many of these it changed (`num_changed`), and up to `number` `examples`: `row`, `before`,
    `after`. Raises SpecError where the spec has no augmentation."""
    settings = spec.augmentation
    if settings is None:
        raise SpecError(
            "augmentation",
            "is not given: rows are read as they were prepared",
            "examples are of what it changes",
            "give augmentation.kinds",
        )
    order = make_order(manifest, spec.seed)
    rewriter = Rewriter(settings, spec.task, spec.seed)
    kinds: dict[str, dict[str, Any]] = {
        kind: {"num": 0, "num_changed": 0, "examples": []} for kind in settings.kinds
    }
    num_rows = min(MOST_ROWS, order.num_rows)
    for start in range(0, num_rows, ROWS_AT_ONCE):
        ids = order.rows(start, min(start + ROWS_AT_ONCE, num_rows))
        rows = read_rows(folder, manifest, manifest.train, ids)
        _add(kinds, rewriter, rows, folder, manifest, ids, number)
    return {"num_rows": num_rows, "share": settings.share, "kinds": kinds}


def _add(  # noqa: PLR0917
    kinds: dict[str, dict[str, Any]],
    rewriter: Rewriter,
    rows: pa.Table,
    folder: str,
    manifest: Manifest,
    ids: Ints,
    number: int,
) -> None:
    """Count what becomes of some rows in their first epoch, and keep the first examples."""
    learnt = rewriter.rewrite(rows, ids * 0, folder, manifest)
    for change in rewriter.changes(ids, ids * 0):
        found, place = kinds[change.kind], change.place
        if change.kind in TEXT_CHANGES:
            before, after = own_text(rows, place), rewriter.reword(change, rows, folder)
        else:
            before = _decoded(rows, place, folder)
            after = _decoded(learnt, place, folder, manifest.mask_token_id)
        found["num"] += 1
        found["num_changed"] += before != after
        if before != after and len(found["examples"]) < number:
            between = " " if rewriter.is_of_words else " ⏐ "
            shown = {"before": _plain(before, between), "after": _plain(after, between)}
            found["examples"].append({"row": int(ids[place]), **shown})


def _decoded(rows: pa.Table, place: int, folder: str, mask: int | None = None) -> str:
    """The tokens of a row as text, special ones too; with a mask, those that are hidden are it."""
    size = rows.column("num_tokens")[place].as_py()
    tokens = rows.column("input_ids")[place].as_py()[:size]
    if mask is not None:
        for hidden in rows.column(HIDDEN)[place].as_py():
            tokens[hidden] = mask
    decoder = load_decoder(child(folder, "tokenizer"))
    return str(decoder.decode(tokens, skip_special_tokens=False))


def _plain(text: str, between: str) -> str:
    return between.join(" ".join(part.split()) for part in text.split(SEPARATOR))


def format_examples(found: Mapping[str, Any]) -> str:
    """What was found, for people: what a row was above what it is learnt as."""
    lines = [
        f"of {found['num_rows']:,} training rows a share of {found['share']:g} is read otherwise "
        "in each epoch; in the first:"
    ]
    for kind, own in found["kinds"].items():
        left = own["num"] - own["num_changed"]
        unchanged = f", {left:,} of them left as they were" if left else ""
        lines += ["", f"{kind}: {own['num']:,} rows{unchanged}"]
        for example in own["examples"]:
            lines += [
                f"  {mark} {textwrap.shorten(example[side], MOST_LETTERS, placeholder=' …')}"
                for mark, side in (("-", "before"), ("+", "after"))
            ]
    return "\n".join(lines)
