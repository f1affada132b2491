"""Two specs beside each other: where they differ, and what of a spec is only a place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def differing_paths(
    left: Mapping[str, Any], right: Mapping[str, Any], prefix: str = ""
) -> list[str]:
    """Dotted paths at which two trees differ, in sorted order."""
    found: list[str] = []
    for key in sorted(set(left) | set(right)):
        a, b = left.get(key), right.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differing_paths(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}")
    return found


def without_places(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity without the paths of its inputs. What lies there makes the run; where it lies
    does not."""
    data = dict(identity["data"])
    for split in ("train", "validation"):
        if isinstance(data.get(split), (list, tuple)):
            data[split] = [_without_paths(source) for source in data[split]]
    if redaction := data.get("redaction"):
        named = redaction["names"] is not None
        data["redaction"] = {**redaction, "names": named, "pseudonym_key": None}
    placed = {
        name: {**identity[name], "path": identity[name].get("path") is not None}
        for name in ("model", "tokenizer")
    }
    placed["task"] = _without_path_keys(identity["task"])
    if augmentation := identity.get("augmentation"):
        placed["augmentation"] = _without_files(augmentation)
    return {**identity, "data": data, **placed}


def _without_path_keys(settings: Any) -> Any:
    """A task's settings without what is called `path` anywhere in them: the place of a file."""
    if isinstance(settings, Mapping):
        kept = {key: value for key, value in settings.items() if key != "path"}
        return {key: _without_path_keys(value) for key, value in kept.items()}
    if isinstance(settings, list | tuple):
        return [_without_path_keys(value) for value in settings]
    return settings


def _without_files(augmentation: Mapping[str, Any]) -> dict[str, Any]:
    """Without the places of a thesaurus and of translators."""
    found = {**augmentation, "thesaurus": augmentation["thesaurus"] is not None}
    if models := augmentation["back_translation"]:
        sides = {
            side: {**models[side], "path": models[side]["path"] is not None}
            for side in ("there", "back")
        }
        found["back_translation"] = {**models, **sides}
    return found


def _without_paths(source: Mapping[str, Any]) -> dict[str, Any]:
    """A source without the places of its files, and of the names of what it gathers."""
    found = {key: value for key, value in source.items() if key != "path"}
    if found.get("gather") and found["gather"].get("names"):
        names = {key: value for key, value in found["gather"]["names"].items() if key != "path"}
        found["gather"] = {**found["gather"], "names": names}
    return found
