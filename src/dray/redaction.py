"""Secrets are taken out of a text before it is written to storage, sent to a tracker or shown, and
credentials out of a URI as soon as it is taken in.

What counts as one: user names and passwords in a URI, its parameters and any other assignment whose
name says so, bearer headers, the token formats of well-known services, private keys, and the values
of this process' own environment variables whose names say so. A secret without name or form cannot
be told from other text.

The credentials of URIs live in this process' memory alone; a worker on Ray asks the driver's job
for them. They are never part of an object that is stored.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"
"""What stands where a secret was."""
_SHORTEST_VALUE = 6
"""A value of the environment that is shorter occurs in texts by chance."""

_SECRET_NAME = (
    r"(?:[A-Za-z0-9]{1,32}[-_.]){0,6}?(?:pass(?:word|wd|phrase)|secret|credentials?|api[-_]?key|apikey"
    r"|(?:access|secret|private|account|signing|encryption|shared|storage|subscription)[-_]?(?:access[-_]?)?key"
    r"(?:[-_]?id)?|(?:access|auth|api|session|security|sas|oauth|bearer|refresh|id|hf|hub|github|gitlab|wandb)"
    r"[-_]?token|connection[-_]?string|signature|x-amz-[a-z-]+|x-goog-[a-z-]+)"
)
# `token` alone is a word of this trade (pad_token, token=17): only what looks like a secret counts
# after it.
_NAMED = re.compile(
    rf"(?<![A-Za-z0-9]){_SECRET_NAME}(?:[-_](?:key|value|data))?[\"']?\s*(?:=|:|=>)\s*[\"']?"
    r"(?P<value>(?:(?<=[\"'])[^\"'\n]+|[^\s\"'&;,)}\]]+))",
    re.I,
)
_NAMED_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:[A-Za-z0-9]{1,32}[-_.]){0,6}(?:token|sig)[\"']?\s*[=:]\s*[\"']?"
    r"(?P<value>(?=[^\s\"'&;,]{0,99}\d)[A-Za-z0-9_\-.~+/%]{16,}=*)",
    re.I,
)
_USER_INFO = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]{1,30}://(?P<value>[^\s/@?#\"'<>]+)@")
_HEADER = re.compile(r"\b(?:bearer|basic)\s+(?P<value>[A-Za-z0-9_\-.~+/]{8,}=*)", re.I)
TOKEN_FORMATS = re.compile(
    r"(?<![A-Za-z0-9_])(?:hf_[A-Za-z0-9]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|glpat-[\w-]{16,}|sk-[A-Za-z0-9_-]{20,}|xox[abeprs]-[A-Za-z0-9-]{10,}|AIza[\w-]{30,}|ya29\.[\w-]{20,}"
    r"|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{30,})"
)
PRIVATE_KEY = re.compile(
    r"-----BEGIN (?P<kind>[A-Z ]*PRIVATE KEY)-----.*?(?:-----END (?P=kind)-----|\Z)", re.S
)
_IS_SECRET_NAME = re.compile(
    rf"{_SECRET_NAME}|(?:\w+[-_])?(?:token|pwd|pat)|\w*_(?:key|auth)", re.I
)


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text with HIDDEN where secrets were. `environment`: whose secret values are looked for
    (default: this process')."""
    # Every kind is looked for in the text as it came: what one kind hides could be the name that
    # another needs.
    spans = [
        match.span() for pattern in (PRIVATE_KEY, TOKEN_FORMATS) for match in pattern.finditer(text)
    ]
    spans += [
        match.span("value")
        for pattern in (_USER_INFO, _HEADER, _NAMED, _NAMED_TOKEN)
        for match in pattern.finditer(text)
    ]
    for value in (
        *_held_values(),
        *_secret_values(os.environ if environment is None else environment),
    ):
        spans += [match.span() for match in re.finditer(re.escape(value), text)]
    parts, end = [], 0
    for begin, until in sorted(spans):
        if begin >= end:
            parts += [text[end:begin], HIDDEN]
        end = max(end, until)
    return "".join((*parts, text[end:]))


def redact_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A record of plain values with `redact` applied to every text in it; texts under keys that
    name a secret are hidden whatever they are."""
    return {
        key: HIDDEN
        if isinstance(value, str) and value and names_secret(key)
        else _redact_value(value)
        for key, value in fields.items()
    }


def _redact_value(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return redact_fields(value)
    return [_redact_value(item) for item in value] if isinstance(value, (list, tuple)) else value


def redact_error(error: BaseException) -> None:
    """Apply `redact` to the texts of an error, and of those that led to it, in place: for an error
    that others will write down."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        one.args = tuple(_redact_value(value) for value in one.args)
        if isinstance(one, OSError):  # which says these in place of its arguments
            for name in ("strerror", "filename", "filename2"):
                if isinstance(text := getattr(one, name), str):
                    setattr(one, name, redact(text))
        left += [one.__cause__, one.__context__]


def names_secret(name: str) -> bool:
    """Whether a variable or key of that name holds a secret: AWS_SECRET_ACCESS_KEY and
    WANDB_API_KEY do, pad_token_id and num_tokens do not."""
    return bool(re.fullmatch(_SECRET_NAME, name, re.I))


def _secret_values(environment: Mapping[str, str]) -> list[str]:
    """Longest first: one may be a part of another."""
    found = {
        value.strip() for name, value in environment.items() if _IS_SECRET_NAME.fullmatch(name)
    }
    return sorted(
        (value for value in found if len(value) >= _SHORTEST_VALUE and not _is_place(value)),
        key=len,
        reverse=True,
    )


def _is_place(value: str) -> bool:
    """Whether it is a path, a number or a switch: some variables name where a secret lies, or how
    it is asked for."""
    return (
        value.startswith(("/", "~", "./"))
        or value.isdigit()
        or value.lower() in ("disabled", "enabled")
    )


# ---- credentials of URIs -----------------------------------------------------------------------

_URI = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?:(?P<user>[^/?#]*|[^/?#:]+:[^0-9@?#][^?#]*)@)?"
    r"(?P<host>[^/?#]*)(?P<path>[^?#]*)(?:\?(?P<query>.*))?",
    re.S,
)
"""A user is what stands before the @; a password may hold slashes that should have been escaped."""
_SIGNED = ("sig", "signature", "x-amz-signature", "x-goog-signature")
"""A query with one of these is a signed address: all of its parts that belong to the signature go
together."""
_OF_SIGNATURE = frozenset(
    (
        *(
            f"x-{who}-{what}"
            for who in ("amz", "goog")
            for what in ("algorithm", "date", "expires", "signedheaders")
        ),
        "sv",
        "ss",
        "srt",
        "sp",
        "se",
        "st",
        "spr",
        "sr",
        "sip",
        "sdd",
        "ske",
        "skoid",
        "sktid",
        "skt",
        "sks",
        "skv",
        "saoid",
        "suoid",
        "scid",
        "ses",
        "rscc",
        "rscd",
        "rsce",
        "rscl",
        "rsct",
        "expires",
        "policy",
        "key-pair-id",
        "googleaccessid",
        "awsaccesskeyid",
    )
)
"""What goes with a signature of Amazon, Google, Azure or CloudFront, and is no secret by itself."""
_NAMES_WITHOUT_PASSWORD = frozenset({"http", "https", "s3", "s3a", "s3n", "ftp", "ftps"})
"""Where a user's name alone may be a token. Elsewhere it is a container (abfs), a user (hdfs, sftp)
or `anonymous`."""
_NO_CREDENTIALS = frozenset({"github"})
"""Where what stands before the @ is part of the place."""
_LONG_NAME = 14
"""A user's name so long is a key's."""
_ASK_EVERY_SECONDS = 1.0
_SHARED_NAMESPACE = b"dray"


@dataclass(frozen=True)
class _Credentials:
    """What was split off a URI. The representation tells nothing."""

    user: str = ""
    query: tuple[str, ...] = ()
    """`name=value`, as they stood there."""

    def __repr__(self) -> str:
        return f"_Credentials({HIDDEN})"

    def values(self) -> Iterable[str]:
        """What must not show up in a text by itself: keys, passwords and signatures, not a user's
        name or a date."""
        user, colon, password = self.user.partition(":")
        for part in (
            password if colon else user,
            user if len(user) >= _LONG_NAME else "",
            *(item.partition("=")[2] for item in self.query if _name_of(item) not in _OF_SIGNATURE),
        ):
            yield from {part, unquote(part)}


_held: dict[str, _Credentials] = {}
"""Clean place without its query → its credentials. They hold for everything below the place."""
_held_lock = Lock()
_hidden: set[str] = set()
_asked = {"at": -_ASK_EVERY_SECONDS}


def take_in(place: str) -> str:
    """The place without credentials, fit for records. Those that a URI carries (user and password,
    keys, signatures) are remembered by this process, for it and all places below it. Any other text
    comes back as it is."""
    match = _URI.fullmatch(place) if "://" in place else None
    if match is None:
        return place
    scheme, query = (
        match["scheme"].lower(),
        [part for part in (match["query"] or "").split("&") if part],
    )
    user = match["user"] or ""
    secret = scheme not in _NO_CREDENTIALS and (
        ":" in user or (bool(user) and scheme in _NAMES_WITHOUT_PASSWORD)
    )
    signed = any(_name_of(part) in _SIGNED for part in query)
    kept = [part for part in query if not _is_secret_parameter(_name_of(part), signed)]
    if not secret and len(kept) == len(query):
        return place
    at = "" if secret or not user else f"{user}@"
    clean = f"{match['scheme']}://{at}{match['host']}{match['path']}"
    credentials = _Credentials(
        user if secret else "", tuple(part for part in query if part not in kept)
    )
    with _held_lock:
        known, _held[_scope(clean)] = _held.get(_scope(clean)), credentials
    if known != credentials:
        share_credentials()
    return clean + (f"?{'&'.join(kept)}" if kept else "")


def take_in_all(value: Any) -> Any:
    """`take_in` of every text in a tree of mappings, lists and tuples; what else is in it stays."""
    if isinstance(value, str):
        return take_in(value)
    if isinstance(value, Mapping):
        return {key: take_in_all(item) for key, item in value.items()}
    return type(value)(map(take_in_all, value)) if type(value) in (list, tuple) else value


def restored(place: str) -> str:
    """The URI with the credentials that were taken in with it or with a place above it, for opening
    it and nothing else. Unchanged if there are none."""
    match = _URI.fullmatch(place) if "://" in place else None
    if match is None:
        return place
    credentials = _find(_scope(place.partition("?")[0])) or _ask_and_find(
        _scope(place.partition("?")[0])
    )
    if credentials is None:
        return place
    at = credentials.user or match["user"] or ""
    query = "&".join(part for part in (match["query"], *credentials.query) if part)
    return f"{match['scheme']}://{f'{at}@' if at else ''}{match['host']}{match['path']}" + (
        f"?{query}" if query else ""
    )


def share_credentials() -> None:
    """Let the workers of this process' Ray job ask for what it has taken in. Does nothing outside
    of a driver.

    They go into the memory of Ray's head under the job's number, since environment variables and
    arguments of workers are written to logs; who can read them there can run code in the job
    anyway.
    """
    ray, store = _ray_of_job(driver=True)
    with _held_lock:
        content = json.dumps(
            {place: [found.user, list(found.query)] for place, found in _held.items()}
        )
    if ray is not None and content != "{}":
        store._internal_kv_put(
            _shared_key(ray), content.encode(), overwrite=True, namespace=_SHARED_NAMESPACE
        )


def forget_shared_credentials() -> None:
    """Take back what `share_credentials` has put there, at the end of a job."""
    ray, store = _ray_of_job(driver=True)
    if ray is not None and _held:
        store._internal_kv_del(_shared_key(ray), namespace=_SHARED_NAMESPACE)


def _ask_and_find(scope: str) -> _Credentials | None:
    """Ask the driver's job, once in a while, if this is a worker that has no credentials for a
    place."""
    ray, store = _ray_of_job(driver=False)
    if ray is None or time.monotonic() - _asked["at"] < _ASK_EVERY_SECONDS:
        return None
    _asked["at"] = time.monotonic()
    content = store._internal_kv_get(_shared_key(ray), namespace=_SHARED_NAMESPACE)
    with _held_lock:
        for place, (user, query) in json.loads(content or b"{}").items():
            _held.setdefault(place, _Credentials(user, tuple(query)))
    return _find(scope)


def _ray_of_job(*, driver: bool) -> tuple[Any, Any]:
    """Ray and its store of small values, where this process is a driver (or a worker) of a job;
    else none. Ray is not imported for it."""
    ray = sys.modules.get("ray")
    if ray is None or not getattr(ray, "is_initialized", bool)():
        return None, None
    if (ray.get_runtime_context().worker.mode == ray.SCRIPT_MODE) is not driver:
        return None, None
    from ray.experimental import internal_kv

    return ray, internal_kv


def _shared_key(ray: Any) -> bytes:
    return f"credentials:{ray.get_runtime_context().get_job_id()}".encode()


def _find(scope: str) -> _Credentials | None:
    """The credentials of the nearest place at or above one."""
    with _held_lock:
        while _held and "://" in scope:
            if scope in _held:
                return _held[scope]
            scope = scope.rpartition("/")[0]
    return None


def _scope(clean: str) -> str:
    """The place up to a pattern, if it has one, without slashes at its end."""
    scheme, _, rest = clean.partition("://")
    magic = re.search(r"[*\[]", rest)
    if magic:
        rest = rest[: magic.start()].rpartition("/")[0]
    return f"{scheme.lower()}://{rest}".rstrip("/")


def _name_of(parameter: str) -> str:
    return unquote(parameter.partition("=")[0]).lower()


def _is_secret_parameter(name: str, signed: bool) -> bool:
    return (
        names_secret(name)
        or name in ("token", "pwd", "key", "auth", *_SIGNED)
        or (signed and name in _OF_SIGNATURE)
    )


def hide(secret: str) -> None:
    """Have `redact` hide a secret that this process has read from elsewhere, such as a file."""
    _hidden.add(secret)


def _held_values() -> list[str]:
    """Every credential that this process holds, longest first."""
    with _held_lock:
        held = [value for item in _held.values() for value in item.values()]
    found = {value for value in (*held, *_hidden) if len(value) >= _SHORTEST_VALUE}
    return sorted(found, key=len, reverse=True)
