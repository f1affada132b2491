"""Folders that are served: an export is what its manifest lists, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dray.errors import SpecError, StoreError
from dray.release.export.manifest import write_manifest
from dray.serve.loading import load_served
from dray.serve.served import Served
from small_writer import save_small_writer


def test_an_export_that_was_changed_is_not_served(tmp_path: Path) -> None:
    folder = save_small_writer(tmp_path / "writer")
    write_manifest(folder, {"format": "folder", "run": "writer", "step": 1}, None)
    assert load_served(Served(folder=str(folder))).routes == ("completions", "chat")
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(StoreError, match=r"tokenizer_config\.json: not what was exported"):
        load_served(Served(folder=str(folder)))


def test_a_folder_without_a_model_that_writes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    with pytest.raises(SpecError, match="is a BertModel"):
        load_served(Served(folder=str(tmp_path)))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(StoreError, match="holds no model"):
        load_served(Served(folder=str(tmp_path)))
