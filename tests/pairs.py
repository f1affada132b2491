"""Prompts with a kind answer and a rude one, and a spec that learns from them in seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from dray.spec import Spec, make_spec
from tiny import tiny_tree

KIND, RUDE = ("thank you", "with pleasure", "gladly"), ("go away", "who cares", "never mind")
ASKED = ("open the door", "tell me the time", "carry the bag", "close the book")


def pairs(num: int = 160) -> list[dict[str, Any]]:
    drawn = random.Random(0)
    found = []
    for place in range(num):
        kind, rude = drawn.choice(KIND), drawn.choice(RUDE)
        prompt = f"please {drawn.choice(ASKED)} {place % 13} ."
        found.append({"prompt": prompt, "chosen": f" {kind} .", "rejected": f" {rude} ."})
    return found


def write(folder: Path, records: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(record) for record in records]
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def make_spec_of(folder: Path, task: Any, steps: int = 20, **sections: Any) -> Spec:
    """A spec that learns them in seconds; sections override it, of a model or tokeniser whole."""
    tree = {
        "name": "pairs",
        "task": task,
        "data": {
            "train": {"path": f"{folder}/*.jsonl"},
            "validation": {"share": 0.2},
            "sequence_tokens": 40,
            "cleaning": {"deduplicate": "none"},
        },
        "tokenizer": {"train": "byte_bpe", "vocab_size": 330},
        "model": {"architecture": "llama", "hidden_size": 32, "num_layers": 2, "num_heads": 2},
        "batch": {"global_rows": 16, "micro_rows": 4},
        "optimizer": {"learning_rate": 1e-3},
        "duration": {"steps": steps},
        "checkpoint": {"every_steps": 10},
        "resources": {"workers": 1},
    }
    made = tiny_tree(folder, **{**tree, **sections})
    whole = {name: sections[name] for name in ("model", "tokenizer") if name in sections}
    return make_spec({**made, **whole})
