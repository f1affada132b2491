"""A trained model behind HTTP, by Ray Serve.

`dray.serve:application` is what Ray's own configurations name: `import_path` of `serve deploy` and
of KubeRay's RayService, with the fields of `Served` as its `args`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dray.serve.service import application as application


def __getattr__(name: str) -> Any:  # Ray Serve is slow to import
    if name == "application":
        from dray.serve.service import application

        return application
    raise AttributeError(name)
