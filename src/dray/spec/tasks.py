"""Tasks by name: what a spec, a plan and a model must know of what is learnt.

A task is a class that an entry point of the group `dray.tasks` names, dray's own like those of
other packages: a team adds one by installing a package. What a task does with rows and models is
declared where tasks live; here is what is asked of it before there are any.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, Literal, Protocol

from pydantic import BeforeValidator, PlainSerializer, ValidationError

from dray.errors import SpecError, caught, one_line, translated
from dray.spec.sections import Section
from dray.spec.sources import Source

GROUP = "dray.tasks"
OWN_PACKAGE = "dray"
MOST_IN_FP32 = (2 - 2**-23) * 2.0**127
TEXT_KINDS = ("text", "words", "bytes", "record", "name", "names")
"""Kinds of fields that make a document; a field of another kind is its target."""
WHOLE = "*"
"""In a column's place: all columns of a record."""
Direction = Literal["lower", "higher"]
"""Which values of a metric are better."""


@dataclass(frozen=True)
class Field:
    """Something that a task reads of every record; a source says in which column it is."""

    kind: Literal[
        "text", "words", "bytes", "record", "name", "names",
        "label", "labels", "number", "tags", "answer",
    ]  # fmt: skip
    """Texts are cleaned, hashed and encoded: one, or a list of `words`. `bytes` are a file's, of an
    image or a sound: parquet's binary, or base64, as which they travel. A `record` is whatever
    values a column has, or all columns, as JSON: the task finds out what it is. A `name` is of
    something that is no text, such as an item's id: a text or a number, like a label; `names` are a
    list of such, or what is gathered of several records (`gather` of a source). A `label` names the
    class of a document, `labels` those that it has, a `number` measures it, `tags` are those of its
    words, an `answer` is a text that is to be written."""
    wanted: bool = True
    """Whether every source must have it."""
    column: str | None = None
    """Where it is, unless a source says otherwise."""
    place: int | None = None
    """Which column of lines of words it is, unless a source says otherwise."""
    asked: bool = True
    """Whether a prediction needs it, too; not of targets, which none does."""
    most: float = MOST_IN_FP32
    """The greatest size of a `number`; a record with a greater one is a bad record. By itself it is
    what fp32 holds, since a greater number would become infinite there."""

    def column_in(self, source: Source, name: str, form: str = "") -> str | None:
        """The column of a source that holds the field of that name; None: there is none."""
        given: str | None = source.columns.get(name) or getattr(source, name, None)
        if given is None and form == "conll" and self.place is not None:
            return str(self.place)
        given = given or COLUMNS_OF_FORMS.get(form, {}).get(self.kind) or self.column
        return given or (WHOLE if self.kind == "record" else None)


COLUMNS_OF_FORMS: Mapping[str, Mapping[str, str]] = {
    "files": {"bytes": "content", "label": "folder"},
    "idx": {"bytes": "image", "label": "label"},
}
"""Where forms without columns of their own have fields of a kind."""


@dataclass(frozen=True)
class Head:
    """What a task has a model put out: what makes its class, its size and its work."""

    auto_class: str
    """transformers' class that builds the model, by name."""
    over: Literal["vocabulary", "labels", "hidden"]
    """What the logits are of; `hidden`: there are none, a model puts out its hidden states."""
    each: Literal["token", "row"]
    """What has logits of its own."""
    looks_ahead: bool = True
    """Whether an encoder may attend to later tokens."""
    share: float = 1.0
    """Of the tokens that have logits."""
    sequences: int = 1
    """How many sequences the model is given of a row, each as long as it."""
    behind_encoder: bool = False
    """Whether its decoder goes by what an encoder of its own has read."""
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
    apart: bool
    """Whether documents packed into a row see nothing of each other."""
    tokenizes: bool
    """Whether documents are texts, which a tokeniser makes tokens of."""
    whole_words: bool
    """Whether its tokens are whole words or names, never pieces of text."""
    fixed_tokens: int | None
    """Tokens of every row, where rows have as many whatever `data.sequence_tokens` says."""
    needed_tokens: int
    """Tokens that a row must have room for beside a document's first one."""
    smooths: bool
    """Whether its loss has classes that `regularization.label_smoothing` smooths."""
    rows_together: int
    """Rows of a step that must be computed at once: each so many, from the first."""

    @property
    def model_options(self) -> Mapping[str, Any]:
        """Fields of the model's configuration that follow from the task, where it has them."""

    adds: bool
    """Whether what it trains is a part that it adds to a model, which stays as it is."""

    def add_part(self, model: Any) -> None:
        """Add it. Raises SpecError."""

    generates: bool
    """Whether its models write text."""
    head: Head
    settings: Any

    def __init__(self, settings: Any = None) -> None: ...


@cache
def _known() -> dict[str, list[EntryPoint]]:
    """The entry points of each name: more than one where packages want the same."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        same = found.setdefault(point.name, [])
        if all(other.value != point.value for other in same):
            same.append(point)
    if not found:
        raise _not_installed()
    return found


def _not_installed() -> SpecError:
    return SpecError(
        "dray",
        "is on the path, but not installed",
        "tasks are found by the entry points of what is installed",
        "pip install dray, or -e its folder",
    )


def _package(point: EntryPoint) -> str:
    """Who declares an entry point."""
    return point.module.partition(".")[0] if point.dist is None else point.dist.name


def task_names() -> list[str]:
    """The tasks that are installed, by name."""
    return sorted(_known())


@cache
def find_task(name: str) -> type[TaskKind]:
    """The class of an installed task. Raises SpecError where its package is broken, names it
    otherwise than the class does, or is not the only one with a task of that name."""
    where, points = f"task {name}", _known()[name]
    if len(points) > 1:
        packages = " and ".join(sorted(map(_package, points)))
        raise SpecError(
            where, f"is in several packages: {packages}", "names are unique", "uninstall one"
        )
    (point,) = points
    place = f"{point.value} of the package {_package(point)}"
    with translated(
        lambda error: SpecError(
            where,
            f"{place} cannot be loaded ({type(error).__name__}: {one_line(error)})",
            "its entry point names a class on dray.tasks.Task",
            "mend that package, or uninstall it",
        )
    ):
        kind: type[TaskKind] = point.load()
    own = getattr(kind, "name", None)
    if not isinstance(kind, type) or own != name:
        # A run keeps the class' own name, by which nobody would find it again.
        raise SpecError(
            where,
            f"{place} is " + ("no task" if own is None else f"a task that is called {own!r}"),
            "an entry point and its class have one name",
            f"call the entry point {own}" if isinstance(own, str) else "name a class on Task",
        )
    return kind


@cache
def default_task() -> str:
    """The name of the task that a spec means which names none: one of dray's own, so that what else
    is installed changes no spec's meaning."""
    for points in _known().values():
        for point in points:
            if point.module.partition(".")[0] == OWN_PACKAGE and point.load().is_default:
                return point.name
    raise _not_installed()


def make_task(value: Any) -> Any:
    """The task that a spec names: a name, or a mapping with `name` and the task's settings; without
    a name, the default one. Raises ValueError, and SpecError as `find_task` does."""
    if isinstance(value, Mapping):
        settings = dict(value)
        name = settings.pop("name", None)
    elif value is None or isinstance(value, str):
        name, settings = value, {}
    elif all(hasattr(value, part) for part in ("name", "Settings", "fields", "settings")):
        return value  # a task already
    else:
        raise ValueError("the name of a task, or a mapping with its `name` and settings, is wanted")
    name = default_task() if name is None else name
    if not isinstance(name, str):
        raise ValueError(f"name = {_shown(name)}: the name of a task is a word")
    if name not in _known():
        near = difflib.get_close_matches(name, task_names(), n=2, cutoff=0.4)
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"there is no task {name!r}, but {', '.join(task_names())}{meant}")
    kind = find_task(name)
    try:
        return kind(kind.Settings.model_validate(settings))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden" and len(first["loc"]) > 1:
            raise ValueError(f"{name} has no setting {key}") from error
        if first["type"] == "extra_forbidden":
            known = ", ".join(kind.Settings.model_fields) or "none"
            raise ValueError(f"{name} has no setting {key}; its settings: {known}") from error
        if first["type"] == "missing":
            raise ValueError(f"{name}: {key} is missing; it has no default") from error
        message = first["msg"].removeprefix("Value error, ")
        whole = not key or isinstance(first["input"], Mapping)
        given = "" if whole else f" = {_shown(first['input'])}"
        raise ValueError(f"{key or name}{given}: {message[:1].lower()}{message[1:]}") from error


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def check_fields(task: Any) -> None:
    """Raises ValueError for a task whose records dray cannot read: a document is some texts, or
    files, and at most one target."""
    targets = [name for name, field in task.fields.items() if field.kind not in TEXT_KINDS]
    if len(targets) > 1:
        raise ValueError(
            f"task: {task.name} reads {' and '.join(targets)} of a record, which has one target "
            "besides its texts; make one field of them"
        )
    if len(targets) == len(task.fields):
        raise ValueError(
            f"task: {task.name} reads no text of a record; a document is one or more fields of the "
            f"kinds {', '.join(TEXT_KINDS)}"
        )


def dump_task(task: Any) -> Any:
    """The task as a spec has it: its name, and the settings that are not as they are by
    themselves."""
    settings = task.settings.model_dump(mode="json", exclude_defaults=True)
    return {"name": task.name, **settings} if settings else task.name


def _inlined(schema: Any, sections: Mapping[str, Any] | None = None) -> Any:
    """A JSON schema with the sections that it refers to in their places: it becomes a part of a
    spec's, which has sections of its own. Raises RecursionError for one that holds itself."""
    if isinstance(schema, list):
        return [_inlined(item, sections) for item in schema]
    if not isinstance(schema, dict):
        return schema
    sections = schema.get("$defs", sections)
    if "$ref" in schema and sections is not None:
        whole = sections[schema["$ref"].rpartition("/")[2]]
        others = {key: value for key, value in schema.items() if key != "$ref"}
        return _inlined({**whole, **others}, sections)
    return {key: _inlined(value, sections) for key, value in schema.items() if key != "$defs"}


class _Schema:
    """The JSON schema of the tasks that are installed."""

    @staticmethod
    def __get_pydantic_json_schema__(core: Any, handler: Any) -> dict[str, Any]:
        # A package that is broken matters to whoever names its task.
        kinds = [kind for name in task_names() if (kind := caught(partial(find_task, name))[0])]
        chosen = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": kind.name},
                    **_inlined(kind.Settings.model_json_schema()).get("properties", {}),
                },
                "required": ["name"],
                "additionalProperties": False,
            }
            for kind in kinds
        ]
        return {"anyOf": [{"type": "string", "enum": task_names()}, *chosen]}


TaskChoice = Annotated[Any, BeforeValidator(make_task), PlainSerializer(dump_task), _Schema]
