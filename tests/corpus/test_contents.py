"""Input files are known by what they hold, and must hold still; a failing disk is waited for."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dray.corpus import sources
from dray.corpus.contents import check_unchanged, with_digests
from dray.corpus.reading import InputOutage, Span, SpanReader
from dray.corpus.sources import InputFile, find_files
from dray.errors import CorpusError
from dray.spec import Source
from dray.storage.retrying import is_transient


def listed(path: Path) -> InputFile:
    return with_digests(find_files(Source(path=str(path)), "data.train.0"))[0]


def test_a_touched_or_replaced_file_is_unchanged_and_a_changed_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n')
    file = listed(path)
    os.utime(path, ns=(1, 1))
    check_unchanged([file])
    path.unlink()
    path.write_text('{"text": "one"}\n')
    check_unchanged([file])
    for change in (lambda: path.write_text('{"text": "two"}\n'), path.unlink):
        change()
        with pytest.raises(CorpusError, match="changed while the corpus was being prepared"):
            check_unchanged([file])


def test_a_pipe_of_the_same_name_or_a_missing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{}")
    file = listed(path)
    with pytest.raises(CorpusError, match="cannot be read"):
        with_digests([replace(file, path=str(tmp_path / "gone"))])


class Failing:
    """A filesystem whose files fail after some bytes, as a network mount does."""

    def __init__(self, inner: Any, number: int) -> None:
        self._inner, self._number = inner, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def open_input_stream(self, path: str, compression: Any = None) -> Any:
        raise OSError(self._number, os.strerror(self._number))


@pytest.mark.parametrize(
    ("number", "passes"), [(errno.EIO, True), (errno.ESTALE, True), (errno.EACCES, False)]
)
def test_a_source_that_fails_for_the_moment_is_no_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, passes: bool
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "one"}) + "\n")
    file = listed(path)
    real, root = sources.share_filesystem(file.place)
    monkeypatch.setattr(sources, "share_filesystem", lambda place: (Failing(real, number), root))
    with pytest.raises(
        InputOutage if passes else CorpusError, match=r"a\.jsonl.*cannot be read"
    ) as caught:
        list(SpanReader(Span(file), Source(path=str(path)), 10_000).read())
    assert is_transient(caught.value) == passes
