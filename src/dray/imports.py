"""Heavy libraries, imported without the packages that they would drag along and dray never uses through them.

A rank's start is mostly imports: transformers reaches for scipy's solvers, DeepSpeed for mlflow's tracking, and each
costs every rank of every attempt up to a second. Both do without them where they are not installed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

UNUSED = ("mlflow", "scipy", "sklearn")


@contextmanager
def without_unused() -> Iterator[None]:
    """Inside, an import of an unused package that is not loaded yet fails as if it were not installed."""
    hidden = [name for name in UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: what Python calls absent
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)
