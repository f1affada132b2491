"""YAML as plain values. A key that stands twice is refused, where PyYAML keeps the last one in
silence.

Refuses besides what only looks like a text of a person: values that unfold to more than MAX_VALUES
by aliases or merges, nest deeper than MAX_DEPTH, are numbers of more than MAX_DIGITS, or hold
characters that no file name and no file of text can hold. It does so before it has cost more than
reading the text.
"""

from __future__ import annotations

from typing import Any

import yaml

from dray.errors import first_line

MAX_VALUES, MAX_DEPTH, MAX_DIGITS = 100_000, 50, 100
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class BadYaml(ValueError):
    """A text that is not YAML, or not such as a person writes. The message is one line, with the
    place."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which knows where a key stood before, and gives up early."""

    depth = -1

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise BadYaml(f"nested deeper than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        # A number to the base 60, as YAML has them, takes PyYAML the square of its length.
        if node.tag in _NUMBERS and len(node.value) > MAX_DIGITS:
            raise BadYaml(
                f"a number of more than {MAX_DIGITS} signs, in line {node.start_mark.line + 1}"
            )
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put what `<<` names into a mapping, unless that unfolds to too much: the same few lines
        may be merged by many, and those by others."""
        num_values = 0
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for inner in merged:
                    if isinstance(inner, yaml.MappingNode):
                        self.flatten_mapping(inner)
                        num_values += len(inner.value)
                    if num_values > MAX_VALUES:
                        raise BadYaml(f"holds more than {MAX_VALUES:,} values, its merges unfolded")
        super().flatten_mapping(node)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(
            anchor
        )  # before `<<` is resolved, which may bring keys that stand here too
        seen: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line, first = key.start_mark.line + 1, seen.get((key.tag, key.value))
                if first is not None:
                    lines = f"line {line}" if first == line else f"lines {first} and {line}"
                    raise BadYaml(f"the key {key.value} stands twice, in {lines}")
                seen[key.tag, key.value] = line
        return node


def read_yaml(text: str) -> Any:
    """The one document of the text as plain values. Raises BadYaml."""
    try:
        # A loader of one text; `get_single_data` refuses a second document.
        loader = _Loader(text)
        try:
            tree = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise BadYaml(f"not YAML: {_describe(error)}") from error
    except RecursionError as error:
        raise BadYaml(f"not YAML: nested deeper than {MAX_DEPTH} levels") from error
    except BadYaml:
        raise
    # 2026-13-45 looks like a date and is none; PyYAML leaves what its constructors stumble over as
    # it is.
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        raise BadYaml(
            f"not YAML: a value is not what its form says ({first_line(error)})"
        ) from error
    _check(tree, 0, [0])
    return tree


def _describe(error: yaml.YAMLError) -> str:
    """What PyYAML found and where, on one line."""
    mark = getattr(error, "problem_mark", None)
    place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
    position = getattr(error, "position", None)
    return " ".join(f"{problem}{place}".split()) + (
        f" at character {position}" if position is not None else ""
    )


def _check(value: Any, depth: int, count: list[int]) -> None:
    """Walk through all values, those that aliases repeat as often as they do."""
    count[0] += 1
    if count[0] > MAX_VALUES:
        raise BadYaml(f"holds more than {MAX_VALUES:,} values, its aliases unfolded")
    if depth > MAX_DEPTH:
        raise BadYaml(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        for key, inner in value.items():
            _check(key, depth + 1, count)
            _check(inner, depth + 1, count)
    elif isinstance(value, (list, tuple, set)):
        for inner in value:
            _check(inner, depth + 1, count)
    elif isinstance(value, str) and any(
        character == "\0" or "\ud800" <= character <= "\udfff" for character in value
    ):
        raise BadYaml(f"the text {value[:40]!r} holds a character that no file name can hold")
