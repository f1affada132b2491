"""Keys of a service, kept in the storage: who may ask for what, how often, until when.

`STORAGE/serving/keys/NAME.json` is created once and never changed; `NAME.revoked` beside it ends
the key for good, so that no race brings one back, and a name is never used twice. Only the SHA-256
of a token is kept. That suffices: a token has 256 random bits, so there is nothing to guess that a
slow hash would have to protect. Refuses a key without a limit that was asked for.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dray.errors import SpecError, StoreError
from dray.processes.imports import require_package
from dray.runs.layout import SERVING
from dray.serve.refusals import Refusal
from dray.storage.exclusive import create_exclusive
from dray.storage.filesystem import child, list_files, read_bytes, share_filesystem

Scope = Literal["write", "predict", "models", "metrics"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
"""What a key may be for: texts, predictions, being told what is served, being told how it goes."""
PREFIX = "dray-"
POLL_SECONDS = 1.0
"""How often a gateway looks which keys there are."""
NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
_ENDING, _END = ".json", ".revoked"
_log = logging.getLogger("dray.serve")


class HeldKey(BaseModel):
    """A key as it is kept."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=NAME)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Of the token."""
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)]
    rate: Annotated[str, Field(min_length=1)] | None
    """As `60/minute`; none for a key without a limit."""
    made: float
    expires: float | None
    """Seconds since 1970."""

    def is_over(self, now: float) -> bool:
        """Whether its time is over."""
        return self.expires is not None and now >= self.expires


def create_key(
    storage: str,
    name: str,
    *,
    scopes: Sequence[str] = ("write", "predict", "models"),
    rate: str | None = None,
    days: float | None = None,
) -> str:
    """Make a key and return its token, which is kept nowhere. Raises SpecError for what is no name,
    scope, rate or time, and where there is or was a key of this name."""
    where = f"key {name!r}"
    if not re.fullmatch(NAME, name):
        raise SpecError(where, "is no name", "letters, digits, - and _, at most 64")
    if unknown := [scope for scope in scopes if scope not in SCOPES] or not scopes:
        raise SpecError(where, f"has no such scope: {unknown}", f"scopes are {', '.join(SCOPES)}")
    if rate is not None:
        check_rate(rate)
    if days is not None and not 0 < days < 36_500:
        raise SpecError(where, f"expires in {days:g} days", "0 to 36,500 days")
    token = PREFIX + secrets.token_urlsafe(32)
    now = time.time()
    held = HeldKey(
        name=name,
        sha256=_hashed(token),
        scopes=tuple(dict.fromkeys(scopes)),
        rate=rate,
        made=now,
        expires=None if days is None else now + days * 86_400,
    )
    filesystem, folder = _open(storage)
    if not create_exclusive(
        filesystem, f"{folder}/{name}{_ENDING}", held.model_dump_json().encode()
    ):
        rule = "a name is used once, so that logs are never of two keys"
        raise SpecError(where, "is there already, or was", rule, "take another name")
    return token


def revoke_key(storage: str, name: str) -> bool:
    """End a key for good; false where it had ended. Raises SpecError where there is none."""
    filesystem, folder = _open(storage)
    if not re.fullmatch(NAME, name) or f"{name}{_ENDING}" not in list_files(filesystem, folder):
        raise SpecError(f"key {name!r}", "is not there", "", "`dray serve key list` lists all")
    content = f"{time.time()} {secrets.token_hex(8)}".encode()
    return create_exclusive(filesystem, f"{folder}/{name}{_END}", content)


def list_keys(storage: str) -> list[tuple[HeldKey, str]]:
    """All keys by name, each with `valid`, `expired` or `revoked`. Raises StoreError for a file
    that is no key."""
    filesystem, folder = _open(storage)
    files, now = list_files(filesystem, folder), time.time()
    found = []
    for name in sorted(_names(files)):
        held = _read(read_bytes(filesystem, f"{folder}/{name}{_ENDING}"), f"{folder}/{name}")
        ended = f"{name}{_END}" in files
        state = "revoked" if ended else "expired" if held.is_over(now) else "valid"
        found.append((held, state))
    return found


def has_keys(storage: str) -> bool:
    """Whether a key was ever made: such a service never lets all ask, also when all have ended."""
    return bool(_names(list_files(*_open(storage))))


def check_rate(rate: str) -> None:
    """Raises SpecError for what is no rate, or one of nothing."""
    require_package("limits", "serve", f"--rate {rate}")
    from limits import parse

    try:
        if parse(rate).amount < 1:
            raise ValueError("it lets nobody ask")
    except ValueError as error:
        raise SpecError(f"--rate {rate}", str(error), "as 60/minute or 5 per second") from error


class Ring:
    """The keys of a storage in a gateway, read again every second by a thread of its own. While the
    storage does not answer, keys are as they were last known. Raises StoreError as it starts."""

    def __init__(self, storage: str, poll_seconds: float = POLL_SECONDS) -> None:
        from limits.storage import MemoryStorage
        from limits.strategies import MovingWindowRateLimiter

        self._place = _open(storage)
        self._known: dict[str, HeldKey] = {}
        self._valid: Mapping[str, HeldKey] = {}
        self._rates = MovingWindowRateLimiter(MemoryStorage())
        self._ended = threading.Event()
        self.refresh()
        self._thread = threading.Thread(target=self._watch, args=(poll_seconds,), daemon=True)
        self._thread.start()

    def refresh(self) -> None:
        """Look which keys there are."""
        filesystem, folder = self._place
        files = list_files(filesystem, folder)
        for name in _names(files) - self._known.keys():
            path = f"{folder}/{name}{_ENDING}"
            self._known[name] = _read(read_bytes(filesystem, path), path)
        self._valid = {
            name: held for name, held in self._known.items() if f"{name}{_END}" not in files
        }

    def find(self, token: str) -> HeldKey | None:
        """The key of a token that may ask now. Takes as long whichever it is, or none."""
        given, found = _hashed(token), None
        for held in self._valid.values():
            if hmac.compare_digest(given, held.sha256):
                found = held
        return None if found is None or found.is_over(time.time()) else found

    def count(self, held: HeldKey) -> None:
        """One request of a key. Raises Refusal 429 beyond its rate."""
        if held.rate is None:
            return
        from limits import parse

        rate = parse(held.rate)
        if not self._rates.hit(rate, "key", held.name):
            wait = self._rates.get_window_stats(rate, "key", held.name).reset_time - time.time()
            what = f"this key may ask {rate}; come again later"
            seconds = max(1, int(wait) + 1)
            raise Refusal(429, what, code="rate_limit_exceeded", retry_after=seconds)

    def close(self) -> None:
        """Look no more."""
        self._ended.set()

    def _watch(self, seconds: float) -> None:
        while not self._ended.wait(seconds):
            try:
                self.refresh()
            except (OSError, StoreError) as error:
                _log.warning("keys cannot be read (%s): they are as last known", error)


def _open(storage: str) -> tuple[object, str]:
    filesystem, path = share_filesystem(child(storage, SERVING, "keys"))
    return filesystem, path


def _names(files: Mapping[str, int]) -> set[str]:
    found = {name.removesuffix(_ENDING) for name in files if name.endswith(_ENDING)}
    return {name for name in found if re.fullmatch(NAME, name)}


def _read(content: bytes, path: str) -> HeldKey:
    try:
        held = HeldKey.model_validate(json.loads(content))
        if held.rate is not None:
            check_rate(held.rate)
    except (ValidationError, ValueError, SpecError) as error:
        raise StoreError(path, "is no key of a service") from error
    return held


def _hashed(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
