"""Small specs, models and corpora's rows that the tests of models and tasks share."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from dray.models.build import build_model
from dray.spec import Spec, make_spec
from tiny import source_for

VOCAB = 512


def small_spec(
    architecture: str | None = None, task: str = "causal_lm", *, sections: Any = None, **model: Any
) -> Spec:
    """A spec of 64 wide, 2 layers, rows of 32 tokens; `sections` replaces whole sections, `model`
    adds model fields."""
    sizes = (
        {"architecture": architecture, "hidden_size": 64, "num_layers": 2, "num_heads": 4}
        if architecture
        else {}
    )
    tree: dict[str, Any] = {
        "name": "small",
        "task": task,
        "model": sizes | model,
        "duration": {"steps": 1},
        "seed": 7,
        "data": {"train": [source_for(task)], "sequence_tokens": 32},
    }
    if "path" in model:
        tree["tokenizer"] = {"path": model["path"]}
    return make_spec(tree | (sections or {}))


def small_model(spec: Spec, **arguments: Any) -> Any:
    """The spec's model without dropout, for a tokeniser of 512 tokens: 0 ends a text, 1 is
    padding."""
    given = {"vocab_size": VOCAB, "pad_token_id": 1, "eos_token_id": 0, "num_labels": 3} | arguments
    return build_model(spec, **given).eval()


def some_ids(num_rows: int = 4, num_tokens: int = 32) -> torch.Tensor:
    return torch.randint(
        2, VOCAB, (num_rows, num_tokens), generator=torch.Generator().manual_seed(0)
    )


def digest(named: Any) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(dict(named).items()):
        total.update(name.encode() + tensor.detach().float().contiguous().numpy().tobytes())
    return total.hexdigest()
