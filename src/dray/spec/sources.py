"""Where documents come from: files of one form, and how their columns and records become some."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from dray.spec.sections import Float, Int, Section, Word


class Names(Section):
    """A file of names: of each id in one of its columns the name in another."""

    path: str
    """A csv, tsv, jsonl or parquet file, whose columns have names."""
    id: str
    """The column of ids."""
    name: str
    """The column of names."""


class Gather(Section):
    """Documents gathered from several records each: what a person did one after the other, say."""

    by: str
    """The column whose value is the same in all records of a document."""
    order: str
    """The column of numbers, such as times, by which the records of a document are put in order;
    equal ones stay as they were read."""
    leave_out: Annotated[Int, Field(ge=0)] = 0
    """How many of the last records of each document are left out: 2 for training where validation
    has the last but one (1) and a test the last (0)."""
    least: Annotated[Int, Field(ge=1)] = 2
    """Documents of fewer records, without those left out, are dropped and counted."""
    names: Names | None = None
    """What the ids that are gathered are called; one without a name there stays as it is."""


class Source(Section):
    """One source of documents: files of one form, with the columns to read."""

    path: str | tuple[str, ...]
    """Files, folders, globs or URIs (`s3://…`, `gs://…`, `hdfs://…`, any fsspec scheme);
    `python:stdlib` is the standard library's own sources. Relative paths start at the working
    directory."""
    format: Literal[
        "auto", "jsonl", "csv", "tsv", "parquet", "text", "lines", "conll", "files", "idx",
        "html", "warc",
    ] = "auto"  # fmt: skip
    """The form of the files; `auto` goes by the suffix before `.gz`, `.zst`, `.bz2`, `.xz` or
    `.zip`. `text`: a file is a document; `lines`: a line is; `conll`: a line is a word with what
    belongs to it, between tabs or spaces, and blank lines stand between sentences; `files`: a file
    of whatever kind is a record of its `content`, the `folder` that it lies in, and its `name`
    without suffix; `idx`: images as MNIST has them, each with the `label` at its place in the file
    of labels beside; `warc`: a page that a crawl was answered with is a document, of its `text`,
    `url` and `date`; `html`: a file is a page, of its `text`, `folder` and `name` (as `text`, which
    its suffix tells, it keeps its tags)."""
    text: Word = "text"
    """The column that holds the text (a 0-based number for files without a header)."""
    template: Annotated[str | None, Field(exclude_if=lambda given: given is None)] = None
    """The text made of several columns in place of one: `{head} {relation} {tail}.`. A brace is
    written twice; a record without one of the columns is a bad record."""
    label: Word | None = None
    """The column that holds the label; tasks with labels need it. A label is a text, a number, or
    true or false; 1, "1" and 1.0 are one label in every format."""
    columns: Annotated[dict[str, Word], Field(exclude_if=lambda given: not given)] = {}  # noqa: RUF012  # pydantic copies it
    """The columns of the task's other fields by field: `{text_pair: hypothesis}`; of lines of
    words their numbers from 0, or from -1 back."""
    header: bool = True
    """Whether the first line of csv and tsv files names the columns."""
    quoting: Literal["rfc4180", "none"] = "rfc4180"
    """csv and tsv: a field that begins with a quote goes on to its closing quote, over delimiters
    and newlines (`rfc4180`), or quotes are characters like others and a line is a record
    (`none`)."""
    gather: Annotated[Gather | None, Field(exclude_if=lambda given: given is None)] = None
    """How documents are gathered from several records, for tasks that read `names`: a record holds
    one of them."""
    records: Annotated[
        tuple[Annotated[Int, Field(ge=0)], Annotated[Int, Field(ge=1)]] | None,
        Field(exclude_if=lambda given: given is None),
    ] = None
    """Of idx files: only their records from this number, counted from 0, to before that one. None:
    all."""
    extract: Annotated[
        Literal["main", "all", "trafilatura"], Field(exclude_if=lambda given: given == "main")
    ] = "main"
    """What is kept of the pages of `warc` and `html`: their `main` content by resiliparse, without
    menus, headers and footers; `all` that they show, by resiliparse; or what `trafilatura` takes
    for their content, less and in more time."""
    weight: Annotated[Float, Field(gt=0)] | None = None
    """Share of the rows drawn from this source, relative to the other weights; none: in proportion
    to its rows."""
    exclude: tuple[str, ...] = ()
    """Globs of paths to leave out."""

    @model_validator(mode="after")
    def _templated(self) -> Self:
        if self.template is None:
            return self
        try:
            parts = list(Formatter().parse(self.template))
        except ValueError as error:
            raise ValueError(f"template: {error}; a brace is written twice") from error
        names = [name for _, name, _, _ in parts if name is not None]
        if any(form or kind or not re.fullmatch(r"[^.\[\]]+", name or "")
               for _, name, form, kind in parts if name is not None):  # fmt: skip
            raise ValueError("template: a place is the name of a column alone, as {head}")
        if not names:
            raise ValueError("template: no column is named in it, as {head}")
        return self

    @property
    def template_columns(self) -> tuple[str, ...]:
        """Those that the template names; none without one."""
        parts = Formatter().parse(self.template or "")
        return tuple(dict.fromkeys(name for _, name, _, _ in parts if name is not None))

    @model_validator(mode="after")
    def _numbered(self) -> Self:
        if self.records is None:
            return self
        first, end = self.records
        if self.format != "idx":
            raise ValueError(
                f"records [{first}, {end}]: only those of idx files have numbers; give format: idx"
            )
        if first >= end:
            raise ValueError(f"records [{first}, {end}]: the second must be above the first")
        return self

    @model_validator(mode="after")
    def _extracted(self) -> Self:
        if self.extract != "main" and self.format not in ("auto", "warc", "html"):
            raise ValueError(
                f"extract {self.extract}: text is extracted from warc and html, not {self.format}"
            )
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path


def _as_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def as_sources(value: Any) -> Any:
    """A path, a mapping, or a list of either; a list of plain paths is one source."""
    if isinstance(value, (str, Mapping, Source)):
        return (_as_source(value),)
    if isinstance(value, Sequence) and value and all(isinstance(item, str) for item in value):
        return ({"path": tuple(value)},)
    if isinstance(value, Sequence):
        return tuple(_as_source(item) for item in value)
    return value


class ShortSources:
    """The JSON schema of sources as `as_sources` takes them, and of what else there may be."""

    @staticmethod
    def __get_pydantic_json_schema__(core: Any, handler: Any) -> dict[str, Any]:
        full = handler(core)
        forms = full.get("anyOf", [full])
        (several,) = [form for form in forms if form.get("type") == "array"]
        one = {"anyOf": [{"type": "string"}, several["items"]]}
        short = [*one["anyOf"], {**several, "items": one}]
        others = [form for form in forms if form is not several]
        kept = {key: value for key, value in full.items() if key in ("default", "description")}
        return {**kept, "anyOf": [*short, *others]}


Sources = Annotated[
    tuple[Source, ...], BeforeValidator(as_sources), Field(min_length=1), ShortSources
]
