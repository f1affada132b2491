"""Where benchmarks leave their figures: a generated block of docs/benchmarks.md, and JSON beside
it."""

from __future__ import annotations

import json
import platform
import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Check:
    """One line of a table of what was looked at, what is wanted, and what was found."""

    what: str
    wanted: str
    found: str
    holds: bool


def machine() -> str:
    """The machine in a few words."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"(?m)^model name\s*:\s*(.+)$", info.read_text()) if info.exists() else []
    return (
        f"{len(names)} × {names[0] if names else platform.processor()}, Python "
        f"{platform.python_version()}"
    )


def write_section(
    name: str, markdown: str, figures: Any, page: Path = ROOT / "docs" / "benchmarks.md"
) -> None:
    """Replace the block `name` of a page by new figures, with the day and the machine; the raw ones
    become JSON."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(figures, indent=1, default=str))
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    block = f"{begin}\n{date.today().isoformat()}, {machine()}.\n\n{markdown.strip()}\n{end}"
    text = (
        page.read_text(encoding="utf-8") if page.exists() else f"# Benchmarks\n\n{begin}\n{end}\n"
    )
    if begin not in text:
        text += f"\n{begin}\n{end}\n"
    before, _, rest = text.partition(begin)
    page.write_text(before + block + rest.partition(end)[2], encoding="utf-8")
    print(markdown)
