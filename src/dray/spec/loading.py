"""From a file, a recipe or a tree of values to a spec, with overrides by dotted path."""

from __future__ import annotations

import difflib
import os
import re
import stat
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Packaged:
    """The YAML files of one kind that come with dray."""

    package: str
    kind: str
    """What one of them is called."""
    rule: str
    """What a file is that somebody names instead."""

    def names(self) -> list[str]:
        """Without their ending, sorted."""
        items = resources.files(self.package).iterdir()
        return sorted(
            item.name.removesuffix(".yaml") for item in items if item.name.endswith(".yaml")
        )

    def load(self, name: str) -> str:
        """The text of the one of that name. Raises SpecError."""
        names = self.names()
        if name in names:
            path = resources.files(self.package) / f"{name}.yaml"
            return path.read_text(encoding="utf-8")
        near = difflib.get_close_matches(name, names, n=1)
        some = textwrap.shorten(", ".join(names), 200, placeholder=" …")
        hint = f"did you mean {near[0]}?" if near else f"{len(names)} {self.kind}s: {some}"
        raise SpecError(
            shown_words(name), f"no such file, and no {self.kind} of that name", way_out=hint
        )


RECIPES = Packaged("dray.recipes", "recipe", "a spec is a UTF-8 text file")


def recipe_names() -> list[str]:
    """Names of the packaged specs."""
    return RECIPES.names()


def load_text(spec: str, packaged: Packaged = RECIPES) -> str:
    """The YAML text of a file (or pipe), or of a packaged one by its name. Raises SpecError if
    there is neither."""
    try:
        mode = os.stat(spec).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return packaged.load(spec)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte
        raise SpecError(
            shown_words(spec), f"cannot be read ({_reason(error)})", packaged.rule
        ) from error
    if stat.S_ISDIR(mode):
        raise SpecError(spec, "is a folder", packaged.rule, "name the file in it")
    try:
        with open(spec, "rb") as file:
            content = file.read(MAX_SPEC_BYTES + 1)
        if len(content) > MAX_SPEC_BYTES:
            raise SpecError(spec, f"holds more than {MAX_SPEC_BYTES // 2**20} MiB", packaged.rule)
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError(spec, f"is not UTF-8 (byte {error.start})", packaged.rule) from error
    except OSError as error:
        raise SpecError(spec, f"cannot be read ({_reason(error)})", packaged.rule) from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def load_tree(
    where: str, overrides: Sequence[str] = (), packaged: Packaged = RECIPES
) -> dict[str, Any]:
    """The plain values of a YAML file or of a packaged one, with `key=value` overrides of dotted
    paths. Raises SpecError."""
    try:
        tree = read_yaml(load_text(where, packaged))
    except BadYaml as error:
        raise SpecError(where, str(error), "it is a YAML mapping") from error
    if not isinstance(tree, dict):
        raise SpecError(
            where,
            f"holds a {type(tree).__name__}" if tree is not None else "is empty",
            "it is a YAML mapping of sections",
            "`dray init NAME` writes a spec to start from",
        )
    return apply_overrides(tree, overrides)


def load_spec(spec: str | Path, overrides: Sequence[str] = ()) -> Spec:
    """Load a spec file or recipe and apply `key=value` overrides of dotted paths. Raises
    SpecError."""
    return make_spec(load_tree(str(spec), overrides), str(spec), overrides)


def make_spec(
    tree: Any, where: str = "spec", overrides: Sequence[str] = (), *, kept: bool = False
) -> Spec:
    """Validate a tree of plain values. Raises SpecError that names the first offending dotted path,
    and `where` it was given: there, or in one of the `overrides` that the tree has taken in
    already. `kept`: a run has it, and nothing in it is refused only for being without effect."""
    if not isinstance(tree, Mapping):
        raise SpecError(
            where,
            f"holds a {type(tree).__name__}" if tree is not None else "is empty",
            "a spec is a YAML mapping of sections",
            "`dray init NAME` writes one to start from",
        )
    try:
        return Spec.model_validate(dict(tree), context={"kept": kept})
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
    "privacy": ("noise_multiplier", "epsilon"),
    "tokenizer": ("path", "run", "train"),
}
"""Keys of which a section has one: an override replaces the one that is there."""
_SHORT = {"task": "name", "checkpoint": "every_minutes", "train": "path", "validation": "path"}
"""Sections that may be given by one word, and the key that it stands for."""
_NAMED = {"filters"}
"""Sections that may be given as a list of the names of their own sections."""


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
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
        tree = with_value(tree, key, value)
    return tree


def with_value(tree: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The tree with a value at a dotted path; one that is an alternative to others takes their
    place."""
    *parents, last = path.split(".")
    changed = dict(tree)
    node: Any = changed
    section = ""  # the last name on the way: a list's items have its name
    for parent in parents:
        key = _key_in(node, parent, path)
        child = node[key] if isinstance(node, list) else node.get(key)
        section = section if isinstance(node, list) else parent
        if isinstance(child, str) and section in _SHORT:
            child = {_SHORT[section]: child}
        if section in _NAMED and isinstance(child, str | list):
            child = {str(name): {} for name in ([child] if isinstance(child, str) else child)}
        if isinstance(child, list):
            node[key] = list(child)
        else:
            node[key] = dict(child) if isinstance(child, Mapping) else {}
        node = node[key]
    last_key = _key_in(node, last, path)
    alternatives = _ALTERNATIVES.get(parents[-1], ()) if parents else ()
    if last in alternatives and value is not None:
        for other in alternatives:
            node.pop(other, None)
    node[last_key] = value
    return changed


def _key_in(node: dict[str, Any] | list[Any], part: str, path: str) -> Any:
    """A part of a dotted path as what it names in a mapping, or the number of a list's item. Raises
    SpecError for an item that there is not."""
    if not isinstance(node, list):
        return part
    if not part.isdigit() or int(part) >= len(node):
        items = f"0 to {len(node) - 1}" if node else "none"
        raise SpecError(
            "the command line",
            f"{path}: the list has no item {part}",
            f"items are counted from 0: {items}",
            "give the whole list, e.g. key='[…]'",
        )
    return int(part)
