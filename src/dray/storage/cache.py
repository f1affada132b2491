"""The user's cache: what was found out once and is remembered for the next start.

It is never needed: what cannot be read is found out again, what cannot be written is not kept.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from typing import Any


def cache_folder(kind: str) -> str:
    """The folder for what is of a kind: below XDG_CACHE_HOME, or ~/.cache."""
    place = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(place, "dray", kind)


def recall(kind: str, key: Mapping[str, Any]) -> Any:
    """What was remembered under a key of plain values; None: nothing."""
    try:
        with open(_file(kind, key), encoding="utf-8") as stream:
            kept = json.load(stream)
        return kept["found"] if kept["key"] == json.loads(json.dumps(key)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(kind: str, key: Mapping[str, Any], found: Any) -> None:
    """Keep plain values under a key. The file appears whole or not at all."""
    place = _file(kind, key)
    with suppress(OSError):
        os.makedirs(os.path.dirname(place), mode=0o700, exist_ok=True)
        made = f"{place}.{uuid.uuid4().hex[:8]}"
        with open(made, "w", encoding="utf-8") as stream:
            json.dump({"key": key, "found": found}, stream)
        os.replace(made, place)


def _file(kind: str, key: Mapping[str, Any]) -> str:
    name = sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return os.path.join(cache_folder(kind), f"{name}.json")
