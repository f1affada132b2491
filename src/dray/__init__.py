"""dray: from raw, sharded text to a trained transformer on Ray and DeepSpeed, from one spec file.

    import dray
    from dray.train import train                # train_locally: in this process alone, without Ray
    spec = dray.load_spec("speeches.yaml", ["batch.global_rows=32"])
    print(dray.format_plan(dray.make_plan(spec, dray.local_shape())))
    rows = train(spec).run.metrics_table()      # a pyarrow table: step, loss, tokens_per_second, …

Names are imported when they are first used, so that `import dray` costs nothing. What takes a run
further lies in rooms of its own: `dray.train`, `dray.release.evaluate`, `dray.release.generate`,
`dray.release.export`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "load_spec": "dray.spec",
    "make_spec": "dray.spec",
    "local_shape": "dray.plan",
    "parse_shape": "dray.plan",
    "make_plan": "dray.plan",
    "format_plan": "dray.plan",
    "Run": "dray.runs",
    "list_runs": "dray.runs",
    "verify_checkpoint": "dray.runs",
}

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604  (the names are strings)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dray' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
