"""Which packages of the extra `web` a spec's corpus needs. Refuses a spec whose packages are not
there, before anything is read or written."""

from __future__ import annotations

from dray.processes.imports import require_package
from dray.spec import Cleaning


def check_extras(cleaning: Cleaning) -> None:
    """Raise UserError for a package that is not installed."""
    if cleaning.deduplicate == "near":
        require_package("rensa", "web", "data.cleaning.deduplicate = near")
