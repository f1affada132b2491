"""Real faults on a real local Ray: a worker killed, stopped, out of memory; numbers gone bad; a checkpoint damaged.

Each run must end with the weights of the run that nothing happened to.
"""

from __future__ import annotations

import os
import random
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import EVERY, STEPS, kill, make_case, rank_processes, steps_of, stop, wait_for

from dray.errors import RunFailed, StoreError
from dray.ledger import verify_ledger
from dray.spec import make_spec
from dray.store import Run, verify_checkpoint
from dray.train import train

pytestmark = pytest.mark.usefixtures("local_ray")


def disturbed(storage: str, corpus: Path, name: str, faults: dict[int, Callable[[psutil.Process], None]],
              **sections: Any) -> Run:
    """Train while each fault befalls a random rank once its step has been reported."""

    def befall() -> None:
        for step, fault in faults.items():
            wait_for(lambda step=step: steps_of(storage, name) >= step, f"step {step}")
            fault(random.choice(rank_processes()))
            time.sleep(2)

    thread = threading.Thread(target=befall, daemon=True)
    thread.start()
    run = train(make_spec(make_case(corpus, **sections)), storage=storage, run_name=name).run
    thread.join(timeout=5)
    assert not thread.is_alive(), "a fault never happened"
    return run


def test_a_killed_worker_costs_at_most_an_interval(storage: str, tiny_corpus: Path, undisturbed: Run, measured):
    """a random worker killed (SIGKILL) in a step, twice"""
    run = disturbed(storage, tiny_corpus, "killed", {8: kill, 16: kill})
    measured(run, undisturbed)
    events = run.events()
    assert [event["retry"] for event in events if event["kind"] == "attempt_failed"] == [True, True]
    assert all(event["seconds"] < 120 for event in events if event["kind"] == "recovered")


def test_a_stopped_worker_is_found_and_ended(storage: str, tiny_corpus: Path, undisturbed: Run, measured):
    """a worker stopped (SIGSTOP): no sign of life"""
    run = disturbed(storage, tiny_corpus, "stopped", {8: stop})
    measured(run, undisturbed)
    hang = next(event for event in run.events() if event["kind"] == "hang")
    assert "no sign of life" in hang["reason"]
    assert [event["cause"] for event in run.events() if event["kind"] == "attempt_failed"] == ["hang"]
    other = next(rank for rank in (0, 1) if rank not in hang["ranks"])
    stacks = Path(run.uri, "stacks", f"a0001-r{other:05d}.txt").read_text()
    assert "_train_step" in stacks  # the one that waited shows where


def test_out_of_memory_goes_on_with_half_the_micro_batch(storage: str, tiny_corpus: Path, local_ray: None):
    """A rank that is ready gets a real limit, far below what its first step takes."""

    def starve() -> None:
        while not (run := Run.find(storage, "starved")) or not any(e["kind"] == "ready" for e in run.events()):
            time.sleep(0.05)
        process = rank_processes()[0]
        process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + 2**24, resource.RLIM_INFINITY))

    threading.Thread(target=starve, daemon=True).start()
    spec = make_case(tiny_corpus, duration={"steps": 4}, batch={"global_rows": 64, "micro_rows": 32},
                     data={"sequence_tokens": 256}, tokenizer={"vocab_size": 4096}, model={"hidden_size": 128})
    run = train(make_spec(spec), storage=storage, run_name="starved").run
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4]
    assert verify_ledger(run).ok
    assert run.record()["micro_rows"] == 16
    assert run.attempts()[-1]["micro_rows"] == 16
    failed = next(event for event in run.events() if event["kind"] == "attempt_failed")
    assert failed["cause"] == "host_memory"


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(storage: str, tiny_corpus: Path,
                                                                      undisturbed: Run, measured):
    """one bit of the newest checkpoint flipped"""
    spec = make_case(tiny_corpus, duration={"steps": 2 * EVERY})
    run = train(make_spec(spec), storage=storage, run_name="damaged").run
    file = next(Path(run.latest_checkpoint().path).glob("rank-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(bytes(content))
    run = train(make_spec(make_case(tiny_corpus)), storage=storage, run_name="damaged").run
    measured(run, undisturbed)
    assert [attempt["start_step"] for attempt in run.attempts()] == [0, 2 * EVERY, EVERY]
    aside = [event for event in run.events() if event["kind"] == "checkpoint_set_aside"]
    assert [event["step"] for event in aside] == [2 * EVERY]
    assert "checksum" in aside[0]["reason"]


def test_bad_numbers_end_a_run_with_its_last_sound_checkpoint(storage: str, tiny_corpus: Path):
    """A rate that makes the weights overflow: steps without an update are recorded with their rows, then it ends."""
    spec = make_case(tiny_corpus, optimizer={"learning_rate": 10.0, "weight_decay": 10.0},
                     regularization={"clip_grad_norm": None}, numerics={"max_skipped_steps": 3},
                     duration={"steps": 400})
    with pytest.raises(RunFailed, match=r"numerics|not finite"):
        train(make_spec(spec), storage=storage, run_name="overflown")
    run = Run.open(storage, "overflown")
    skipped = [event for event in run.events() if event["kind"] == "step_skipped"]
    assert len(skipped) >= 3
    assert all(len(event["rows"]) == 48 for event in skipped)
    assert len(run.attempts()) == 1  # a restart would fail again
    assert run.latest_checkpoint() is None or verify_checkpoint(run, run.latest_checkpoint()).ok
    assert os.path.exists(Path(run.uri, "failures", "a0001.json"))


def test_a_second_driver_is_refused_while_the_first_lives(storage: str, tiny_corpus: Path, undisturbed: Run):
    first, spec = undisturbed.take_over(), make_spec(make_case(tiny_corpus, duration={"steps": STEPS + 2}))
    attempts = len(undisturbed.attempts())
    with pytest.raises(StoreError, match="undisturbed"):
        train(spec, storage=storage, run_name="undisturbed")
    assert len(undisturbed.attempts()) == attempts
    assert undisturbed.status == "completed"
    assert undisturbed.plan()["num_steps"] == STEPS  # and nothing was written
    undisturbed.release(first)
    train(spec, storage=storage, run_name="undisturbed")
    assert undisturbed.metrics()[-1]["step"] == STEPS + 2


def test_a_leap_of_the_loss_is_rewound_and_its_rows_are_left_out(storage: str, tiny_corpus: Path, undisturbed: Run):
    """Batches of two rows, whose losses leap a little all the time: the run goes back twice, and then gives up."""
    spec = make_case(tiny_corpus, numerics={"spike": "rewind", "spike_sigmas": 1.5, "max_rewinds": 2},
                     batch={"global_rows": 2, "micro_rows": 1}, duration={"steps": 400}, checkpoint={"every_steps": 5})
    with pytest.raises(RunFailed, match=r"leapt|numerics"):
        train(make_spec(spec), storage=storage, run_name="leaping")
    run = Run.open(storage, "leaping")
    spikes = [event["step"] for event in run.events() if event["kind"] == "loss_spike"]
    assert len(spikes) == 3
    left_out = run.attempts()[-1]["left_out"]
    assert left_out[0] == spikes[0] - 1  # batches count from 0, steps from 1
    assert len(left_out) == 2
    assert verify_ledger(run).left_out == 2 * 2
    assert verify_ledger(run).ok
