"""Who may ask. A service asks for a key everywhere but on loopback, where it may be open.

The gateway calls `admit` with the headers of each request before it reads its body. A key is the
one of the environment, which may ask for all, or one of the storage's (`held_keys.py`), with scopes
and a rate. Once a storage has had a key, its service is never open.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dray.errors import SpecError
from dray.serve.refusals import Refusal

if TYPE_CHECKING:
    from dray.serve.held_keys import Ring

KEY, OPEN = "DRAY_SERVE_KEY", "DRAY_OPEN_SERVICE"
WRITES = ("/v1/completions", "/v1/chat/completions")
PREDICTS = ("/v1/embeddings", "/classify", "/extract", "/predict")
METRICS_PATH = "/metrics"


@dataclass(frozen=True)
class Caller:
    """Who asks."""

    name: str = "anyone"
    key: str | None = None
    """The name of its key, where it is one of the storage's."""


def read_key(held: bool = False) -> bytes:
    """What requests must have; nothing where all may ask, or where there are `held` keys. Raises
    SpecError if neither is said."""
    key = os.environ.get(KEY, "").strip()
    if not key and not held and os.environ.get(OPEN) != "1":
        raise SpecError(
            KEY,
            "is not set",
            "a service asks for a key",
            f"set it in the environment of the cluster's nodes, or {OPEN}=1 to let all ask",
        )
    return key.encode()


class OneKey:
    """The one key of the environment, or none; and keys of the storage where it has any."""

    def __init__(self, key: bytes, ring: Ring | None = None) -> None:
        self._key, self._ring = key, ring

    def admit(self, headers: Mapping[str, str], route: str) -> Caller:
        """Raises Refusal 401 for whoever has no key, 403 for a key that is not for this route, 429
        beyond its rate."""
        if not self._key and self._ring is None:
            return Caller()
        scheme, _, given = headers.get("authorization", "").partition(" ")
        token = given.strip() if scheme.lower() == "bearer" else ""
        is_it = hmac.compare_digest(token.encode("utf-8", "surrogateescape"), self._key)
        if self._key and is_it:
            return Caller("the key")
        held = self._ring.find(token) if self._ring is not None and token else None
        if held is None or self._ring is None:
            raise Refusal(
                401,
                "this service asks for its key: Authorization: Bearer KEY",
                code="invalid_api_key",
            )
        self._ring.count(held)
        if (scope := find_scope(route)) not in held.scopes:
            what = f"this key is for {', '.join(held.scopes)}, not for {scope}"
            raise Refusal(403, what, code="missing_scope")
        return Caller(held.name, held.name)


def find_scope(route: str) -> str:
    """What a key must be for, to ask for a route."""
    if route in WRITES:
        return "write"
    if route in PREDICTS:
        return "predict"
    return "metrics" if route == METRICS_PATH else "models"
