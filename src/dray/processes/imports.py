"""Heavy libraries, imported without the packages that they would drag along and dray never uses
through them.

A rank's start is mostly imports: transformers reaches for scipy's solvers, DeepSpeed for mlflow's
tracking, and each costs every rank of every attempt up to a second. Both do without them where they
are not installed.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from dray.errors import SpecError

_importing = threading.RLock()
"""Held by the thread that imports a library that puts another module into its own place."""


def whole(library: str) -> Any:
    """The library, once it has been imported whole: for those like transformers, whose package
    exchanges itself at the end of its import. A thread that meets another one's import waits for
    it, but is then given the half that was exchanged."""
    with _importing:
        return import_module(library)


def require_package(name: str, extra: str, what: str) -> None:
    """Raise SpecError where a package of one of dray's extras is not installed, which `what` needs.
    Imports nothing."""
    if find_spec(name) is None:
        raise SpecError(
            what,
            f"{name} is not installed",
            f"it comes with dray[{extra}]",
            f"pip install 'dray[{extra}]'",
        )


@contextmanager
def first_import(library: str, *, without: tuple[str, ...]) -> Iterator[None]:
    """If the block is the first to import the library, the packages `without` look as if they were
    not installed.

    A library that is loaded has asked already what there is, and would trip over an answer that
    changes.
    """
    with _importing:
        loaded = library in sys.modules
        hidden = [] if loaded else [name for name in without if name not in sys.modules]
        sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: what Python calls absent
        try:
            yield
        finally:
            for name in hidden:
                if sys.modules.get(name) is None:
                    sys.modules.pop(name, None)
