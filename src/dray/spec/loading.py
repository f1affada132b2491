"""From a file, a recipe or a tree of values to a spec, with overrides by dotted path."""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dray.errors import SpecError
from dray.spec.mistakes import shown_words, translate
from dray.spec.spec import Spec
from dray.spec.yaml_reading import BadYaml, read_yaml

MAX_SPEC_BYTES = 4 * 2**20
"""What is larger is no spec, but data given in its place."""
_SPEC_FILE = "a spec is a UTF-8 text file"


def recipe_names() -> list[str]:
    """Names of the packaged specs."""
    folder = resources.files("dray.recipes")
    return sorted(
        item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")
    )


def load_text(spec: str) -> str:
    """The YAML text of a spec file (or pipe) or of a recipe, by path or name. Raises SpecError if
    there is neither."""
    try:
        mode = os.stat(spec).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return _load_recipe(spec)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte
        raise SpecError(
            shown_words(spec), f"cannot be read ({_reason(error)})", _SPEC_FILE
        ) from error
    if stat.S_ISDIR(mode):
        raise SpecError(spec, "is a folder", _SPEC_FILE, "name the file in it")
    try:
        with open(spec, "rb") as file:
            content = file.read(MAX_SPEC_BYTES + 1)
        if len(content) > MAX_SPEC_BYTES:
            raise SpecError(spec, f"holds more than {MAX_SPEC_BYTES // 2**20} MiB", _SPEC_FILE)
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError(spec, f"is not UTF-8 (byte {error.start})", _SPEC_FILE) from error
    except OSError as error:
        raise SpecError(spec, f"cannot be read ({_reason(error)})", _SPEC_FILE) from error


def _load_recipe(name: str) -> str:
    if name in recipe_names():
        return (resources.files("dray.recipes") / f"{name}.yaml").read_text(encoding="utf-8")
    near = difflib.get_close_matches(name, recipe_names(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"recipes: {', '.join(recipe_names())}"
    raise SpecError(shown_words(name), "no such file, and no recipe of that name", way_out=hint)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def load_spec(spec: str | Path, overrides: Sequence[str] = ()) -> Spec:
    """Load a spec file or recipe and apply `key=value` overrides of dotted paths. Raises
    SpecError."""
    where = str(spec)
    try:
        tree = read_yaml(load_text(where))
    except BadYaml as error:
        raise SpecError(where, str(error), "a spec is a YAML mapping") from error
    return make_spec(
        _apply_overrides(tree, overrides) if isinstance(tree, dict) else tree, where, overrides
    )


def make_spec(tree: Any, where: str = "spec", overrides: Sequence[str] = ()) -> Spec:
    """Validate a tree of plain values. Raises SpecError that names the first offending dotted path,
    and `where` it was given: there, or in one of the `overrides` that the tree has taken in
    already."""
    if not isinstance(tree, Mapping):
        raise SpecError(
            where,
            f"holds a {type(tree).__name__}" if tree is not None else "is empty",
            "a spec is a YAML mapping of sections",
            "`dray init NAME` writes one to start from",
        )
    try:
        return Spec.model_validate(dict(tree))
    except ValidationError as error:
        raise translate(error, where, overrides) from error


def dump_spec(spec: Spec) -> str:
    """The spec as YAML, every default written out."""
    return yaml.safe_dump(
        spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120
    )


_ALTERNATIVES = {
    "duration": ("steps", "epochs", "tokens"),
    "model": ("architecture", "path", "run"),
    "tokenizer": ("path", "run", "train"),
}
"""Keys of which a section has one: an override replaces the one that is there."""


def _apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The tree with the overrides in it, the later ones last. Raises SpecError."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"[a-z_0-9]+(\.[a-z_0-9]+)*", key):
            raise SpecError(
                shown_words(override),
                "not an override",
                "overrides read key.path=value",
                "e.g. batch.global_rows=64",
            )
        try:
            value = read_yaml(text)
        except BadYaml as error:
            raise SpecError(
                shown_words(override),
                f"the value cannot be used ({error})",
                "values are read as YAML",
                "quote it",
            ) from error
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            child = node.get(parent)
            node[parent] = dict(child) if isinstance(child, Mapping) else {}
            node = node[parent]
        alternatives = _ALTERNATIVES.get(parents[-1], ()) if parents else ()
        if last in alternatives and value is not None:
            for other in alternatives:
                node.pop(other, None)
        node[last] = value
    return tree
