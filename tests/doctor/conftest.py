"""What tests of the doctor share: a run of three ranks, and how real gloo groups ended."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from broken_runs import FAULT_STEP, NUM_RANKS, PLAN, Group, make_row

from dray.runs import Run, create_run
from dray.runs.evidence import make_rank_failure
from dray.spec import Spec, make_spec

FAULTS = ("kill", "raise", "stop", "stuck")


@pytest.fixture(scope="session")
def groups(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Group]:
    """Cause → the group that met it: SIGKILL, ValueError, SIGSTOP, and a wait outside of the
    collective."""
    folder = tmp_path_factory.mktemp("groups")
    subprocess.run(
        [sys.executable, str(Path(__file__).parent / "gloo_groups.py"), str(folder), *FAULTS],
        check=True,
        timeout=120,
    )
    return {fault: load_group(folder / fault) for fault in FAULTS}


def load_group(folder: Path) -> Group:
    """What the ranks said, and the exits of those that said nothing."""
    ranks = []
    for rank in range(NUM_RANKS):
        said = folder / f"error-{rank}.json"
        ranks.append(
            json.loads(said.read_text())
            if said.exists()
            else make_rank_failure(
                rank, exit=int((folder / f"exit-{rank}").read_text()), node="10.0.0.7"
            ).to_json()
        )
    stacks = {rank: (folder / f"stacks-{rank}.txt").read_text() for rank in range(NUM_RANKS)}
    return Group(ranks, {rank: text for rank, text in stacks.items() if text})


@pytest.fixture
def spec() -> Spec:
    return make_spec(
        {
            "name": "speeches",
            "data": {"train": "texts/*.jsonl"},
            "duration": {"steps": 50},
            "model": {"architecture": "llama", "hidden_size": 64, "num_layers": 2, "num_heads": 4},
        }
    )


@pytest.fixture
def run(tmp_path: Path, spec: Spec) -> Run:
    """A run with one attempt of three ranks that made three steps."""
    run = create_run(tmp_path / "runs", "speeches", spec, PLAN)
    run.set_status("running")
    run.begin_attempt(NUM_RANKS, 0)
    run.log_metrics([make_row(step) for step in range(1, FAULT_STEP)])
    return run
