"""Who may ask. A service asks for a key everywhere but on loopback, where it may be open.

This is the seam for keys with scopes and rates: the gateway calls `admit` with the headers of each
request before it reads its body, and gives what it returns to whatever counts requests.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass

from dray.errors import SpecError
from dray.serve.refusals import Refusal

KEY, OPEN = "DRAY_SERVE_KEY", "DRAY_OPEN_SERVICE"


@dataclass(frozen=True)
class Caller:
    """Who asks."""

    name: str = "anyone"


def read_key() -> bytes:
    """What requests must have; nothing where all may ask. Raises SpecError if neither is said."""
    key = os.environ.get(KEY, "").strip()
    if not key and os.environ.get(OPEN) != "1":
        raise SpecError(
            KEY,
            "is not set",
            "a service asks for a key",
            f"set it in the environment of the cluster's nodes, or {OPEN}=1 to let all ask",
        )
    return key.encode()


class OneKey:
    """The one key of the environment, or none."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def admit(self, headers: Mapping[str, str], route: str) -> Caller:
        """Raises Refusal 401 for whoever does not have the key."""
        if not self._key:
            return Caller()
        scheme, _, given = headers.get("authorization", "").partition(" ")
        is_it = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self._key)
        if not (scheme.lower() == "bearer" and is_it):
            raise Refusal(
                401,
                "this service asks for its key: Authorization: Bearer KEY",
                code="invalid_api_key",
            )
        return Caller("the key")
