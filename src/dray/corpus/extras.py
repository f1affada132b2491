"""Which packages of the extra `web` a spec's corpus needs. Refuses a spec whose packages are not
there, before anything is read or written."""

from __future__ import annotations

from collections.abc import Iterable

from dray.corpus.pages import require_page_packages
from dray.corpus.sources import InputFile
from dray.processes.imports import require_package
from dray.spec import Cleaning, Source


def check_extras(cleaning: Cleaning) -> None:
    """Raise UserError for a package that is not installed."""
    if cleaning.deduplicate == "near":
        require_package("rensa", "web", "data.cleaning.deduplicate = near")


def check_source_extras(source: Source, files: Iterable[InputFile], where: str) -> None:
    """Raise UserError for a package that a source's files are read by and that is not installed."""
    require_page_packages(source, {file.form for file in files}, where)
