"""A spec that trains in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dray.spec.tasks import make_task

SUMMARY_KEYS = {
    "name",
    "status",
    "fingerprint",
    "step",
    "num_steps",
    "attempts",
    "train_loss",
    "validation",
    "tokens_per_second",
    "checkpoints",
}
"""What `dray show --json` has at least: scripts outside the project depend on it."""


def tiny_tree(corpus: Path, **sections: Any) -> dict[str, Any]:
    """A spec, as plain values, that trains in seconds; sections override it."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "data": {
            "train": [f"{corpus}/*.jsonl"],
            "validation": {"share": 0.1},
            "sequence_tokens": 64,
        },
        "tokenizer": {"train": "byte_bpe", "vocab_size": 512},
        "model": {"architecture": "llama", "hidden_size": 64, "num_layers": 2, "num_heads": 4},
        "batch": {"global_rows": 8, "micro_rows": 2},
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"name": "constant", "warmup_steps": 2},
        "duration": {"steps": 6},
        "precision": "fp32",
        "validation": {"max_rows": 16},
        "resources": {"workers": 2},
        "zero": {"stage": 1},
        "engine": {"compile": False},
    }
    for name, values in sections.items():
        merges = isinstance(values, dict) and isinstance(tree.get(name), dict)
        tree[name] = {**tree[name], **values} if merges else values
    return tree


def source_for(task: Any, path: str = "none") -> dict[str, Any]:
    """A source of what a task reads, of columns called like its fields."""
    return {"path": path, **({"label": "label"} if "label" in make_task(task).fields else {})}


def assert_close(found: Mapping[str, Any], expected: Mapping[str, Any], rel: float = 1e-6) -> None:
    """That two evaluations say the same, numbers nearly so."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        is_number = isinstance(value, float)
        assert found[key] == (pytest.approx(value, rel=rel, abs=1e-9) if is_number else value), key
