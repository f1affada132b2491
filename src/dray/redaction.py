"""Secrets are taken out of a text before it is written to storage, sent to a tracker or shown.

What counts as one: user names and passwords in a URI, its parameters and any other assignment whose name says so,
bearer headers, the token formats of well-known services, private keys, and the values of this process' own environment
variables whose names say so. A secret without name or form cannot be told from other text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
"""What stands where a secret was."""
_SHORTEST_VALUE = 6
"""A value of the environment that is shorter occurs in texts by chance."""

_SECRET_NAME = (r"(?:[A-Za-z0-9]{1,32}[-_.]){0,6}?(?:pass(?:word|wd|phrase)|secret|credentials?|api[-_]?key|apikey"
                r"|(?:access|secret|private|account|signing|encryption|shared|storage|subscription)[-_]?(?:access[-_]?)?key"
                r"(?:[-_]?id)?|(?:access|auth|api|session|security|sas|oauth|bearer|refresh|id|hf|hub|github|gitlab|wandb)"
                r"[-_]?token|connection[-_]?string|signature|x-amz-[a-z-]+|x-goog-[a-z-]+)")
# `token` alone is a word of this trade (pad_token, token=17): only what looks like a secret counts after it.
_NAMED = re.compile(
    rf"(?P<name>(?<![A-Za-z0-9]){_SECRET_NAME}(?:[-_](?:key|value|data))?)(?P<mark>[\"']?\s*(?:=|:|=>)\s*[\"']?)"
    r"(?P<value>(?:(?<=[\"'])[^\"'\n]+|[^\s\"'&;,)}\]]+))", re.I)
_NAMED_TOKEN = re.compile(
    r"(?P<name>(?<![A-Za-z0-9])(?:[A-Za-z0-9]{1,32}[-_.]){0,6}(?:token|sig))(?P<mark>[\"']?\s*[=:]\s*[\"']?)"
    r"(?P<value>(?=[^\s\"'&;,]{0,99}\d)[A-Za-z0-9_\-.~+/%]{16,}=*)", re.I)
_USER_INFO = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]{1,30}://)[^\s/@?#\"'<>]+@")
_HEADER = re.compile(r"(?P<name>\b(?:bearer|basic)\s+)[A-Za-z0-9_\-.~+/]{8,}=*", re.I)
_FORMATS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|glpat-[\w-]{16,}|sk-[A-Za-z0-9_-]{20,}|xox[abeprs]-[A-Za-z0-9-]{10,}|AIza[\w-]{30,}|ya29\.[\w-]{20,}"
    r"|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{30,})")
_PRIVATE_KEY = re.compile(r"-----BEGIN (?P<kind>[A-Z ]*PRIVATE KEY)-----.*?(?:-----END (?P=kind)-----|\Z)", re.S)
_IS_SECRET_NAME = re.compile(rf"{_SECRET_NAME}|(?:\w+[-_])?(?:token|pwd|pat)|\w*_(?:key|auth)", re.I)


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text with HIDDEN where secrets were. `environment`: whose secret values are looked for (default: this
    process')."""
    for value in _secret_values(os.environ if environment is None else environment):
        text = text.replace(value, HIDDEN)
    text = _PRIVATE_KEY.sub(HIDDEN, text)
    text = _USER_INFO.sub(rf"\g<scheme>{HIDDEN}@", text)
    text = _HEADER.sub(rf"\g<name>{HIDDEN}", text)
    for pattern in (_NAMED, _NAMED_TOKEN):
        text = pattern.sub(_hide_value, text)
    return _FORMATS.sub(HIDDEN, text)


def redact_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A record of plain values with `redact` applied to every text in it; texts under keys that name a secret are
    hidden whatever they are."""
    return {key: HIDDEN if isinstance(value, str) and value and names_secret(key) else _redact_value(value)
            for key, value in fields.items()}


def _redact_value(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return redact_fields(value)
    return [_redact_value(item) for item in value] if isinstance(value, (list, tuple)) else value


def names_secret(name: str) -> bool:
    """Whether a variable or key of that name holds a secret: AWS_SECRET_ACCESS_KEY and WANDB_API_KEY do, pad_token_id
    and num_tokens do not."""
    return bool(re.fullmatch(_SECRET_NAME, name, re.I))


def _secret_values(environment: Mapping[str, str]) -> list[str]:
    """Longest first: one may be a part of another."""
    found = {value.strip() for name, value in environment.items() if _IS_SECRET_NAME.fullmatch(name)}
    return sorted((value for value in found if len(value) >= _SHORTEST_VALUE and not _is_place(value)),
                  key=len, reverse=True)


def _is_place(value: str) -> bool:
    """Whether it is a path, a number or a switch: some variables name where a secret lies, or how it is asked for."""
    return value.startswith(("/", "~", "./")) or value.isdigit() or value.lower() in ("disabled", "enabled")


def _hide_value(match: re.Match[str]) -> str:
    return f"{match['name']}{match['mark']}{HIDDEN}"
