"""Runs the pages of docs/applications from top to bottom, and writes into them what was printed:

    python -m bench.applications [digit_reading …]

A page's `sh` and `python` blocks are run in their order, from the checkout, as a reader would; the
`text` block behind one is what it printed (its standard output). The first command that fails ends
the run and leaves the page as it was. Trained runs are found again in ./runs, so that a page which
was stopped goes on.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

from bench.report import ROOT, machine

PAGES = ROOT / "docs" / "applications"
BLOCK = re.compile(r"```(sh|python)\n(.*?)```\n(\n```text\n.*?```\n)?", re.S)
RUN_ON = re.compile(r"Run on .*")
MAX_LINES = 40


def run_page(page: Path) -> None:
    """Run a page, and write what it prints. Raises SystemExit where a command fails."""

    def run(found: re.Match[str]) -> str:
        language, commands, _ = found.groups()
        print(f"── {page.stem}\n{commands}", file=sys.stderr, flush=True)
        shell = ["bash", "-euo", "pipefail", "-c"] if language == "sh" else [sys.executable, "-c"]
        done = subprocess.run(
            [*shell, commands],
            check=False,
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{page}: exit {done.returncode} of\n{commands}\n{done.stdout}")
        told = done.stdout.replace(f"{ROOT}/", "").replace(f"{ROOT.parent}/", "../")
        lines = [line.rstrip() for line in told.strip("\n").splitlines()]
        if len(lines) > MAX_LINES:
            lines = [*lines[:MAX_LINES], f"… and {len(lines) - MAX_LINES} lines more"]
        printed = "\n".join(lines)
        print(printed, flush=True)
        block = f"```{language}\n{commands}```\n"
        return f"{block}\n```text\n{printed}\n```\n" if printed else block

    text = BLOCK.sub(run, page.read_text(encoding="utf-8"))
    when = f"Run on {date.today().isoformat()}, {machine()}: `make applications PAGE={page.stem}`."
    page.write_text(RUN_ON.sub(lambda _: when, text, count=1), encoding="utf-8")


def environment() -> dict[str, str]:
    """That of a shell whose virtual environment is this one; progress bars need no room in logs."""
    return os.environ | {"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}


def main() -> None:
    names = sorted(page.stem for page in PAGES.glob("*.md") if page.stem != "README")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", default=names, choices=names)
    for name in parser.parse_args().pages:
        run_page(PAGES / f"{name}.md")


if __name__ == "__main__":
    main()
