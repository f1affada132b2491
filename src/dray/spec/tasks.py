"""Tasks by name: what a spec, a plan and a model must know of what is learnt.

A task is a class that an entry point of the group `dray.tasks` names, dray's own like those of
other packages: a team adds one by installing a package. What a task does with rows and models is
declared where tasks live; here is what is asked of it before there are any.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, Literal, Protocol

from pydantic import BeforeValidator, PlainSerializer, ValidationError

from dray.errors import SpecError
from dray.spec.sections import Section, Source

GROUP = "dray.tasks"
Direction = Literal["lower", "higher"]
"""Which values of a metric are better."""


@dataclass(frozen=True)
class Field:
    """Something that a task reads of every record; a source says in which column it is."""

    kind: Literal["text", "words", "bytes", "label", "labels", "number", "tags"]
    """Texts are cleaned, hashed and encoded: one, or a list of `words`. `bytes` are a file's, of an
    image or a sound: parquet's binary, or base64, as which they travel. A `label` names the class
    of a document, `labels` those that it has, a `number` measures it, `tags` are those of its
    words."""
    wanted: bool = True
    """Whether every source must have it."""
    column: str | None = None
    """Where it is, unless a source says otherwise."""
    place: int | None = None
    """Which column of lines of words it is, unless a source says otherwise."""

    def column_in(self, source: Source, name: str, form: str = "") -> str | None:
        """The column of a source that holds the field of that name; None: there is none."""
        given: str | None = source.columns.get(name) or getattr(source, name, None)
        if given is None and form == "conll" and self.place is not None:
            return str(self.place)
        return given or self.column


@dataclass(frozen=True)
class Head:
    """What a task has a model put out: what makes its class, its size and its work."""

    auto_class: str
    """transformers' class that builds the model, by name."""
    over: Literal["vocabulary", "labels"]
    """What the logits are of."""
    each: Literal["token", "row"]
    """What has logits of its own."""
    looks_ahead: bool = True
    """Whether an encoder may attend to later tokens."""
    share: float = 1.0
    """Of the tokens that have logits."""
    problem_type: str | None = None
    """What a classifier's configuration calls its loss."""


class NoSettings(Section):
    """Of a task that has none."""


class TaskKind(Protocol):
    """What a spec asks of a task."""

    name: str
    Settings: type[Section]
    """Its own keys in the spec, beside `name`."""
    fields: Mapping[str, Field]
    metrics: Mapping[str, Direction]
    """What a validation measures."""
    num_outputs: int | None
    is_default: bool
    packs: bool
    """Whether documents are packed into full rows, or kept one a row."""
    tokenizes: bool
    """Whether documents are texts, which a tokeniser makes tokens of."""
    generates: bool
    """Whether its models write text."""
    head: Head
    settings: Any

    def __init__(self, settings: Any = None) -> None: ...


@cache
def _known() -> dict[str, EntryPoint]:
    found = {point.name: point for point in entry_points(group=GROUP)}
    if not found:
        raise SpecError(
            "dray",
            "is on the path, but not installed",
            "tasks are found by the entry points of what is installed",
            "pip install dray, or -e its folder",
        )
    return found


def task_names() -> list[str]:
    """The tasks that are installed, by name."""
    return sorted(_known())


def find_task(name: str) -> type[TaskKind]:
    """The class of an installed task."""
    kind: type[TaskKind] = _known()[name].load()
    return kind


@cache
def default_task() -> str:
    """The name of the task that a spec means which names none."""
    return next(name for name in task_names() if find_task(name).is_default)


def make_task(value: Any) -> Any:
    """The task that a spec names: a name, or a mapping with `name` and the task's settings. Raises
    ValueError."""
    if isinstance(value, Mapping):
        settings = dict(value)
        name = settings.pop("name", None)
    elif value is None or isinstance(value, str):
        name, settings = value or default_task(), {}
    else:
        return value  # a task already
    if name not in _known():
        near = difflib.get_close_matches(str(name), task_names(), n=2, cutoff=0.4)
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"there is no task {name!r}, but {', '.join(task_names())}{meant}")
    kind = find_task(name)
    try:
        return kind(kind.Settings.model_validate(settings))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            known = ", ".join(kind.Settings.model_fields) or "none"
            raise ValueError(f"{name} has no setting {key}; its settings: {known}") from error
        raise ValueError(f"{key}: {first['msg'].removeprefix('Value error, ')}") from error


def dump_task(task: Any) -> Any:
    """The task as a spec has it: its name, and the settings that are not as they are by
    themselves."""
    settings = task.settings.model_dump(mode="json", exclude_defaults=True)
    return {"name": task.name, **settings} if settings else task.name


class _Schema:
    """The JSON schema of the tasks that are installed."""

    @staticmethod
    def __get_pydantic_json_schema__(core: Any, handler: Any) -> dict[str, Any]:
        kinds = [find_task(name) for name in task_names()]
        chosen = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": kind.name},
                    **kind.Settings.model_json_schema().get("properties", {}),
                },
                "required": ["name"],
                "additionalProperties": False,
            }
            for kind in kinds
        ]
        return {"anyOf": [{"type": "string", "enum": task_names()}, *chosen]}


TaskChoice = Annotated[Any, BeforeValidator(make_task), PlainSerializer(dump_task), _Schema]
