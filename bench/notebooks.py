"""Runs the notebooks of docs/notebooks from top to bottom, from the checkout, and keeps what they
print:

    python -m bench.notebooks [from_reviews_to_service …]

The first cell that fails ends it, and leaves the notebook as it was. Runs that are in ./runs are
found again.
"""

from __future__ import annotations

import argparse
import sys
from datetime import date
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from bench.report import ROOT, machine

NOTEBOOKS = ROOT / "docs" / "notebooks"
MINUTES = 60


def run_notebook(path: Path) -> None:
    """Raises CellExecutionError where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=60 * MINUTES,
        kernel_name="python3",
        resources={"metadata": {"path": str(ROOT)}},
        on_cell_start=lambda cell, cell_index: print(
            f"── {path.stem} [{cell_index}]", file=sys.stderr, flush=True
        ),
    )
    client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, which differ each time
        for output in cell.get("outputs", ()):
            texts = output if "text" in output else output.get("data", {})
            for key in {"text", "text/plain", "text/html"} & texts.keys():
                said = texts[key].replace(f"{ROOT}/", "")
                texts[key] = said.replace(f"{ROOT.parent}/", "../")
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
        "run_on": f"{date.today().isoformat()}, {machine()}",
    }
    nbformat.write(notebook, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="of notebooks (default: all)")
    names = parser.parse_args().names or sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    for name in names:
        run_notebook(NOTEBOOKS / f"{name}.ipynb")


if __name__ == "__main__":
    main()
