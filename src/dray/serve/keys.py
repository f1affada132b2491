"""Who may ask. A service asks for a key everywhere but on loopback, where it may be open.

The gateway calls `admit` with the headers of each request before it reads its body. A key is the
one of the environment, which may ask for all, or one of the storage's (`held_keys.py`), with scopes
and a rate. Once a storage has had a key, its service is never open.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dray.errors import SpecError
from dray.serve.refusals import Refusal

if TYPE_CHECKING:
    from dray.serve.held_keys import Ring

KEY, OPEN = "DRAY_SERVE_KEY", "DRAY_OPEN_SERVICE"
LOCAL = "loopback"
"""A value of the second: all on this machine may ask."""
WRITES = ("/v1/completions", "/v1/chat/completions")
PREDICTS = ("/v1/embeddings", "/classify", "/extract", "/predict")
METRICS_PATH = "/metrics"
FEEDBACK_PATH = "/v1/feedback"


@dataclass(frozen=True)
class Caller:
    """Who asks."""

    name: str = "anyone"
    key: str | None = None
    """The name of its key, where it is one of the storage's."""


def is_own_name(host: str) -> bool:
    """Whether a request's Host is this machine by a name that nobody else can have."""
    name = re.sub(r":[0-9]*$", "", host.strip().lower()).strip("[]")
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def read_key(held: bool = False) -> bytes:
    """What requests must have; nothing where all may ask, or where there are `held` keys. Raises
    SpecError if neither is said."""
    key = os.environ.get(KEY, "").strip()
    if not key and not held and os.environ.get(OPEN) not in ("1", LOCAL):
        raise SpecError(
            KEY,
            "is not set",
            "a service asks for a key",
            f"set it in the environment of the cluster's nodes, or {OPEN}=1 to let all ask",
        )
    return key.encode()


def is_local() -> bool:
    """Whether a service without a key is open to this machine alone."""
    return os.environ.get(OPEN) == LOCAL


class OneKey:
    """The one key of the environment, or none; and keys of the storage where it has any. Without
    either all may ask, or, where that is `local`, those who ask this machine by its own name: a
    page of a place whose name leads here asks by that place's."""

    def __init__(self, key: bytes, ring: Ring | None = None, *, local: bool = False) -> None:
        self._key, self._ring, self._local = key, ring, local

    def admit(self, headers: Mapping[str, str], route: str) -> Caller:
        """Raises Refusal 401 for whoever has no key, 403 for a key that is not for this route, 429
        beyond its rate."""
        if not self._key and self._ring is None:
            if self._local and not is_own_name(headers.get("host", "")):
                what = "without a key this service answers to localhost alone, by that name"
                raise Refusal(403, what, code="wrong_host")
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
        if route == FEEDBACK_PATH:  # whoever got an answer may say something of it
            return Caller(held.name, held.name)
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
