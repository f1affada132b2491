"""A page as one file: headings, tables and plots in HTML that needs no network and no script."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from html import escape

from dray.errors import StoreError, visible
from dray.redaction import redact

_STYLE = """
:root { color-scheme: light; }
body { font: 14px/1.45 system-ui, sans-serif; color: #1f2328; margin: 2rem auto; max-width: 1120px;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem;
  border-bottom: 1px solid #d0d7de; padding-bottom: .25rem; }
p.note { color: #57606a; margin: .3rem 0 .6rem; max-width: 80ch; }
.facts { display: flex; flex-wrap: wrap; gap: .5rem 1.6rem; margin: .6rem 0; padding: 0; }
.facts div { min-width: 7rem; } .facts dt { color: #57606a; font-size: .8rem; }
.facts dd { margin: 0; font-variant-numeric: tabular-nums; }
.plots { display: flex; flex-wrap: wrap; gap: .8rem; align-items: flex-start; }
figure { margin: 0; } figcaption { font-weight: 600; font-size: .85rem; }
svg { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #eaeef2;
  vertical-align: top; } th { color: #57606a; font-weight: 600; }
tr.best td { font-weight: 600; } .bad { color: #d1242f; } .good { color: #1a7f37; }
.tokens span { padding: .05rem .1rem; border-radius: 2px; white-space: pre-wrap; }
pre { background: #f6f8fa; padding: .8rem; overflow-x: auto; font-size: .8rem; }
"""


@dataclass
class Page:
    """What a page holds, in order; every text is escaped and freed of secrets as it is added."""

    title: str
    _parts: list[str] = field(default_factory=list)

    def facts(self, values: Mapping[str, object]) -> None:
        """Names with their values, side by side; empty values are left out."""
        shown = [(name, str(value)) for name, value in values.items() if value not in (None, "")]
        inner = "".join(
            f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in shown
        )
        self._parts.append(f'<dl class="facts">{inner}</dl>')

    def section(self, title: str, note: str = "") -> None:
        self._parts.append(f"<h2>{_text(title)}</h2>")
        if note:
            self.note(note)

    def note(self, text: str) -> None:
        self._parts.append(f'<p class="note">{_text(text)}</p>')

    def plots(self, plots: Sequence[tuple[str, str]]) -> None:
        """Captions with SVG of `show.plots`; empty ones are left out."""
        inner = "".join(
            f"<figure><figcaption>{_text(caption)}</figcaption>{svg}</figure>"
            for caption, svg in plots
            if svg
        )
        if inner:
            self._parts.append(f'<div class="plots">{inner}</div>')

    def table(
        self, titles: Sequence[str], rows: Sequence[Sequence[object]], best: int | None = None
    ) -> None:
        """Rows of values; the row `best` stands out."""
        head = "".join(f"<th>{_text(title)}</th>" for title in titles)
        body = "".join(
            ('<tr class="best">' if index == best else "<tr>")
            + "".join(f"<td>{_text('' if cell is None else str(cell))}</td>" for cell in row)
            + "</tr>"
            for index, row in enumerate(rows)
        )
        self._parts.append(f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>')

    def tokens(self, tokens: Sequence[str], weights: Sequence[float]) -> None:
        """Tokens of a text one after the other, each as deep in colour as its weight is great:
        green for what is above 0, red for what is below. Its number is told when it is pointed
        at."""
        most = max((abs(weight) for weight in weights), default=0.0) or 1.0
        colors = {True: "26 127 55", False: "209 36 47"}
        inner = "".join(
            f'<span title="{weight:+.4f}" style="background: rgb({colors[weight >= 0]} / '
            f'{0.6 * abs(weight) / most:.2f})">{_text(token)}</span>'
            for token, weight in zip(tokens, weights, strict=True)
        )
        self._parts.append(f'<p class="tokens">{inner}</p>')

    def code(self, text: str) -> None:
        self._parts.append(f"<pre>{_text(text)}</pre>")

    def render(self) -> str:
        """The whole file."""
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<link rel="icon" href="data:,">'
            f"<title>{_text(self.title)}</title><style>{_STYLE}</style></head>\n<body>"
            f"<h1>{_text(self.title)}</h1>\n" + "\n".join(self._parts) + "\n</body></html>\n"
        )


def write_page(page: Page, path: str) -> None:
    """Write a page whole or not at all. Raises StoreError."""
    partial = f"{path}.partial"
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(page.render())
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            os.remove(partial)
        raise StoreError(path, f"cannot be written ({error.strerror or error})") from error


def _text(value: str) -> str:
    return escape(visible(redact(value)))
