"""A run whose workers are killed again and again ends as if nothing had happened."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
from harness import causes, kill, make_case, random_rank, steps_of

from dray.spec import make_spec
from dray.train.driver import train
from waiting import wait_for

NUM_KILLS = 10


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_kills(storage: str, tiny_corpus: Path, local_ray: None, measured):
    """ten times a random worker killed (SIGKILL) at a random moment"""
    spec = make_spec(make_case(tiny_corpus, duration={"steps": 30 * NUM_KILLS}))
    undisturbed = train(spec, storage=storage, run_name="never-killed").run
    moments: list[int] = []

    def kill_again_and_again() -> None:
        for _ in range(NUM_KILLS):
            moments.append(steps_of(storage, "killed-ten-times") + random.randint(5, 25))
            wait_for(
                lambda: steps_of(storage, "killed-ten-times") >= moments[-1],
                f"step {moments[-1]}",
                600,
            )
            kill(random_rank())

    thread = threading.Thread(target=kill_again_and_again, daemon=True)
    thread.start()
    run = train(spec, storage=storage, run_name="killed-ten-times").run
    thread.join(timeout=5)
    measured(run, undisturbed)
    assert causes(run) == ["killed"] * NUM_KILLS
