"""Which packages of the extra `web` a spec's corpus needs, and whether its rules for text fit what
the task reads. Refuses a spec that cannot be prepared, before anything is read or written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dray.corpus.languages import check_languages
from dray.corpus.pages import require_page_packages
from dray.corpus.records import Wanted
from dray.corpus.sources import InputFile
from dray.errors import SpecError
from dray.processes.imports import require_package
from dray.spec import Filters, HeldOut, Source, Spec


def check_extras(spec: Spec) -> None:
    """Raise SpecError for a package that is not installed, a language that cannot be told, and
    rules for text where documents are something else."""
    cleaning = spec.data.cleaning
    if cleaning.deduplicate == "near":
        require_package("rensa", "web", "data.cleaning.deduplicate = near")
    if cleaning.languages is not None:
        require_package("py3langid", "web", "data.cleaning.languages")
        check_languages(cleaning.languages)
        _check_texts(spec, "languages", ("text",))
    if cleaning.decontaminate is not None:
        _check_texts(spec, "decontaminate", ("text", "words"))
    if cleaning.filters != Filters():
        _check_texts(spec, "filters", ("text",), alone=True)


def _check_texts(spec: Spec, key: str, wanted: Sequence[str], *, alone: bool = False) -> None:
    """Raise SpecError where documents have fields of other kinds than those that are wanted, or,
    with `alone`, more than one."""
    held = spec.data.validation
    others = () if held is None or isinstance(held, HeldOut) else held
    for source in (*spec.data.train, *others):
        texts = Wanted.of(source, spec.task.fields, source.format).texts
        kinds = [kind for _, _, kind in texts]
        if other := [kind for kind in kinds if kind not in wanted]:
            told = f"a field of kind {other[0]}"
        elif alone and len(kinds) > 1:
            told = "several texts"
        else:
            continue
        raise SpecError(
            f"data.cleaning.{key}",
            f"a document of task {spec.task.name} has {told}",
            f"it looks at documents of {'one text' if alone else 'text'}",
            f"leave data.cleaning.{key} out",
        )


def check_source_extras(source: Source, files: Iterable[InputFile], where: str) -> None:
    """Raise UserError for a package that a source's files are read by and that is not installed."""
    require_page_packages(source, {file.form for file in files}, where)
