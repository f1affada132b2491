"""What a gateway keeps of requests, as its service is told before anything of it is imported."""

from __future__ import annotations

from dataclasses import dataclass

from dray.corpus.redacting import Redactor
from dray.serve.request_log import Logged


@dataclass(frozen=True)
class Keeping:
    """What a gateway keeps of requests."""

    logged: Logged | None = None
    """Where they are logged; None: nowhere."""
    feedback: str | None = None
    """The dataset of what people say of answers; None: nobody is asked."""
    redactor: Redactor | None = None
    """What takes personal data out of them first."""


NOTHING_KEPT = Keeping()
