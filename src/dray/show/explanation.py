"""An explanation for people: in a terminal, and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dray.show.html import Page
from dray.show.plots import draw_grid

MOST_TOLD = 8
"""Tokens of a record that a terminal names."""
MOST_LETTERS = 160


def format_explanation(found: Mapping[str, Any]) -> str:
    """Records with what they hang on, and the training rows that are like them."""
    lines = []
    for number, record in enumerate(found["records"], 1):
        lines += ["", f"{number}. {_head(record)}", f"   {_shorten(_given(record))}"]
        if "error" in record:
            continue
        pairs = _pairs(record)
        if pairs:
            lines.append(f"   {found['method']}: {_strongest(pairs)}")
        if "completeness_error" in record:
            lines.append(f"   {_completeness(record)}")
        for kind in ("nearest", "opposed"):
            for near in record.get(kind, ()):
                lines.append(f"   {kind} {near['similarity']:+.3f}  {_row(near)}")
    return "\n".join(lines[1:])


def _head(record: Mapping[str, Any]) -> str:
    if "error" in record:
        return f"not predicted: {record['error']}"
    score = _score(record)
    return f"{record['prediction']}{'' if score is None else f' ({score:.3f})'}"


def _score(record: Mapping[str, Any]) -> float | None:
    scores, name = record.get("scores"), record.get("explained")
    return scores.get(name) if isinstance(scores, dict) else None


def _given(record: Mapping[str, Any]) -> str:
    own = {"prediction", "scores", "explained", "output", "baseline", "completeness_error", "steps",
           "attributions", "rollout", "patches", "nearest", "opposed", "error"}  # fmt: skip
    return "  ⏐  ".join(str(value) for name, value in record.items() if name not in own)


def _shorten(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= MOST_LETTERS else f"{plain[:MOST_LETTERS]} …"


def _pairs(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    found = record.get("attributions") or record.get("rollout") or ()
    return [(one["token"], one.get("value", one.get("share"))) for one in found]


def _strongest(pairs: Sequence[tuple[str, float]]) -> str:
    told = sorted(pairs, key=lambda pair: -abs(pair[1]))[:MOST_TOLD]
    return "  ".join(f"{token.strip() or repr(token)} {value:+.3f}" for token, value in told)


def _completeness(record: Mapping[str, Any]) -> str:
    distance = record["output"] - record["baseline"]
    return (
        f"all tokens together {distance + record['completeness_error']:+.4f}; the output is "
        f"{distance:+.4f} from that of nothing ({record['steps']} steps)"
    )


def _row(near: Mapping[str, Any]) -> str:
    label = f"[{near['label']}] " if "label" in near else ""
    return f"row {near['row']} {label}{_shorten(near.get('text', ''))}{_origin(near)}"


def _origin(near: Mapping[str, Any]) -> str:
    """Where a training row came from, and when it was learnt."""
    if "places" not in near:
        return ""
    if not near["places"]:
        came = "in no raw file that is there now"
    else:
        first = near["places"][0]
        at = "" if first["offset"] is None else f", byte {first['offset']:,}"
        more = f" (and {len(near['places']) - 1} more)" if len(near["places"]) > 1 else ""
        came = f"{first['file']}, document {first['document']:,}{at}{more}"
    steps = near["steps"]
    learnt = ", ".join(map(str, steps[:6])) + (", …" if len(steps) > 6 else "")
    return f"\n              {came}; learnt at {f'step {learnt}' if steps else 'no step yet'}"


def make_explanation_page(found: Mapping[str, Any]) -> Page:
    """All of it as a page."""
    page = Page(f"Why {found['run']} predicts it")
    page.facts(
        {
            "run": found["run"],
            "step": found["step"],
            "method": found["method"],
            "neighbours by": found.get("neighbours_by"),
            "training rows looked at": found.get("num_rows_searched"),
        }
    )
    for number, record in enumerate(found["records"], 1):
        page.section(f"{number}. {_head(record)}", _shorten(_given(record)))
        pairs = _pairs(record)
        if pairs:
            page.tokens([token for token, _ in pairs], [value for _, value in pairs])
        if "completeness_error" in record:
            page.note(_completeness(record))
        if "patches" in record:
            page.plots([("What the prediction hangs on", draw_grid(record["patches"]))])
        for kind, title in (
            ("nearest", "Training rows that are most like it"),
            ("opposed", "Training rows that taught against it"),
        ):
            if record.get(kind):
                page.note(title)
                page.table(*_neighbour_table(record[kind]))
    return page


def _neighbour_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[object]]]:
    titles = ["similarity", "row", "label", "text", "from", "learnt at"]
    return titles, [
        [
            f"{near['similarity']:+.3f}",
            near["row"],
            near.get("label"),
            near.get("text"),
            "; ".join(
                f"{place['file']}, document {place['document']}"
                + ("" if place["offset"] is None else f", byte {place['offset']}")
                for place in near.get("places", ())
            ),
            ", ".join(map(str, near.get("steps", ()))),
        ]
        for near in rows
    ]
