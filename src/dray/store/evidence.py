"""placeholder until merge"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dray.store.records import save_json
from dray.store.run import Run


def save_failure(run: Run, failure: Mapping[str, Any]) -> None:
    save_json(run.filesystem, f"{run.path}/failures/a{int(failure['attempt']):04d}.json", failure)


def save_stacks(run: Run, attempt: int, rank: int, text: str) -> None:
    from dray.store.filesystem import write_bytes
    write_bytes(run.filesystem, f"{run.path}/stacks/a{attempt:04d}-r{rank:05d}.txt", text.encode())


def classify(failure: Mapping[str, Any]) -> str:
    for item in failure["ranks"]:
        if item["error_type"].startswith("dray."):
            return item["error_type"]
    return "code"
