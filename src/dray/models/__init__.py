"""Models: transformers architectures by name and sizes or from a folder, the same weights under
every ZeRO stage.

`source.py` finds and pins the folder that a run starts from, `config.py` turns the spec into a
transformers configuration, `initialize.py` draws the weights, `weights.py` takes given ones,
`folder.py` reads and writes Hugging Face folders, `build.py` puts them together. Knows no
DeepSpeed, reads no pickles, runs no remote code. Names come from the modules themselves;
`source.py` and `config.py` do without torch.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """`build_model`, which needs torch, on first use."""
    if name != "build_model":
        raise AttributeError(f"module 'dray.models' has no attribute {name!r}")
    from dray.models.build import build_model

    return build_model
