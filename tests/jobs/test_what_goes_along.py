"""What `dray submit` sends along with a spec: every file of this machine that the spec names."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from dray.cli.submitting import _find_names

FILES = (
    "rows.jsonl", "held.jsonl", "asked.jsonl", "words.dat", "there/config.json", "back/config.json",
    "people/meta.json",
)  # fmt: skip


def names_of(tree: dict[str, Any]) -> set[str]:
    Path("spec.yaml").write_text(json.dumps(tree))
    found, left_out = _find_names(argparse.Namespace(spec="spec.yaml", overrides=[], data=None))
    assert left_out == 0
    return set(found)


def test_every_file_that_a_spec_names_goes_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in FILES:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text('{"text": "a"}\n')
    tree: dict[str, Any] = {
        "name": "sent",
        "task": "sequence_classification",
        "data": {
            "train": {"path": "rows.jsonl", "label": "label"},
            "validation": {"path": "held.jsonl", "label": "label"},
            "cleaning": {"decontaminate": {"against": "asked.jsonl"}},
            "redaction": {"kinds": ["email", "name"], "names": "people"},
        },
        "augmentation": {
            "kinds": ["synonyms", "back_translation"],
            "thesaurus": "words.dat",
            "back_translation": {"there": {"path": "there"}, "back": {"path": "back"}},
        },
        "model": {"architecture": "bert", "hidden_size": 64, "num_layers": 1, "num_heads": 2},
        "duration": {"steps": 1},
    }
    assert names_of(tree) == {
        "spec.yaml", "rows.jsonl", "held.jsonl", "asked.jsonl", "words.dat", "there", "back",
        "people",
    }  # fmt: skip
    # What is the cluster's own, or in a package, stays there.
    tree["augmentation"] |= {"thesaurus": "/usr/share/words.dat"}
    tree["data"]["cleaning"]["decontaminate"]["against"] = "/data/asked.jsonl"
    tree["data"]["redaction"]["names"] = "python:people/pipeline"
    assert names_of(tree) == {"spec.yaml", "rows.jsonl", "held.jsonl", "there", "back"}
