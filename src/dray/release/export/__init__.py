"""A trained model as a folder for others: `export` writes one, whole or not at all, `manifest.py`
proves that it is still what was written.

`exporting.py` is the way that all exports go, `staging.py` makes the folder appear at once,
`folder.py`, `onnx.py` and `gguf.py` are its forms (`forms.py` is what a form is; `texts.py`
is what they are compared on, `loading.py` how they are loaded), `card.py` the README beside it,
`manifest.py` and `signing.py` what it is known by. Checking a folder needs no
torch, so what writes one is imported when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dray.release.export.exporting import export, write_export
    from dray.release.export.forms import Options

__all__ = ["Options", "export", "write_export"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from dray.release.export import exporting

        return getattr(exporting, name)
    raise AttributeError(name)
