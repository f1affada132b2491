"""Real faults on a real local Ray: a worker killed, stopped, out of memory; numbers gone bad; a
checkpoint damaged.

Each run must end with the weights of the run that nothing happened to.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from harness import (
    STEPS,
    causes,
    copy_storage,
    disturbed,
    kill,
    make_case,
    random_rank,
    slowed,
    steps_of,
)

from dray.errors import RunFailed, StoreError
from dray.ledger import verify_ledger
from dray.runs import Run, verify_checkpoint
from dray.show.progress import Display
from dray.spec import make_spec
from dray.train.driver import train
from waiting import wait_for

pytestmark = pytest.mark.usefixtures("local_ray")


def kill_one() -> None:
    kill(random_rank())


def test_a_killed_worker_costs_at_most_an_interval(
    storage: str, tiny_corpus: Path, undisturbed: Run, measured
):
    """a random worker killed (SIGKILL) in a step, twice"""
    run = disturbed(storage, tiny_corpus, "killed", {8: kill_one, 16: kill_one})
    measured(run, undisturbed)
    events = run.events()
    assert [event["retry"] for event in events if event["kind"] == "attempt_failed"] == [True, True]
    assert all(event["seconds"] < 120 for event in events if event["kind"] == "recovered")


def test_a_stopped_worker_is_found_and_ended(
    storage: str, tiny_corpus: Path, undisturbed: Run, measured, name_fault
):
    """a worker stopped (SIGSTOP): no sign of life"""
    happened = name_fault("dray.rank.loop:_Loop._checkpoint_due:before 8", "stop")
    run = disturbed(storage, tiny_corpus, "stopped", {})
    assert happened.exists()
    measured(run, undisturbed)
    hang = next(event for event in run.events() if event["kind"] == "hang")
    assert "no sign of life" in hang["reason"]
    assert causes(run) == ["hang"]
    other = next(rank for rank in (0, 1) if rank not in hang["ranks"])
    stacks = Path(run.uri, "stacks", f"a0001-r{other:05d}.txt").read_text()
    assert "_train_step" in stacks  # the one that waited shows where


@pytest.mark.slow
def test_a_deadlock_that_holds_the_interpreters_lock(
    storage: str, tiny_corpus: Path, undisturbed: Run, measured, name_fault
):
    """a deadlock in one rank that holds Python's lock: no thread of it runs"""
    happened = name_fault("dray.rank.loop:_Loop._checkpoint_due:before 8", "deadlock")
    run = disturbed(storage, tiny_corpus, "deadlocked", {})
    assert happened.exists()
    measured(run, undisturbed)
    assert causes(run) == ["hang"]
    hang = next(event for event in run.events() if event["kind"] == "hang")
    assert "no sign of life" in hang["reason"]
    stacks = Path(run.uri, "stacks", f"a0001-r{hang['ranks'][0]:05d}.txt").read_text()
    assert "_train_step" in stacks  # even so it shows where it stands


@pytest.mark.slow
def test_a_slow_rank_is_reported_and_left_alone(
    storage: str, tiny_corpus: Path, undisturbed: Run, measured
):
    """one rank gets a fifth of its time (SIGSTOP and SIGCONT in turns)"""
    said: list[str] = []

    class Listening(Display):
        def say(self, text: str) -> None:
            said.append(text)

    with ExitStack() as ended:

        def brake() -> None:
            wait_for(lambda: steps_of(storage, "slowed") >= 1, "step 1")
            ended.enter_context(slowed(random_rank(), 0.2))

        thread = threading.Thread(target=brake, daemon=True)
        thread.start()
        spec = make_spec(make_case(tiny_corpus))
        run = train(spec, storage=storage, run_name="slowed", display=Listening()).run
        thread.join(timeout=5)
    measured(run, undisturbed)
    assert (causes(run), len(run.attempts())) == ([], 1)
    slow = [event for event in run.events() if event["kind"] == "straggler"]
    assert len(slow) == 1
    assert slow[0]["ratio"] > 2
    assert sum("is slow" in text for text in said) == 1


def test_out_of_memory_goes_on_with_half_the_micro_batch(
    storage: str, tiny_corpus: Path, local_ray: None, name_fault: Callable[..., Path]
):
    """A rank gets a real limit before its first step, which takes hundreds of megabytes more."""
    happened = name_fault("dray.rank.loop:_Loop._forward_backward:before", "starve")
    spec = make_case(
        tiny_corpus,
        duration={"steps": 3},
        batch={"global_rows": 64, "micro_rows": 32},
        data={"sequence_tokens": 256},
        tokenizer={"vocab_size": 4096},
        model={"hidden_size": 256, "num_layers": 2, "num_heads": 4},
    )
    run = train(make_spec(spec), storage=storage, run_name="starved").run
    assert happened.exists()
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]
    assert verify_ledger(run).ok
    assert run.record()["micro_rows"] == 16
    assert run.attempts()[-1].micro_rows == 16
    failed = next(event for event in run.events() if event["kind"] == "attempt_failed")
    assert failed["cause"] == "host_memory"


def test_bad_numbers_end_a_run_with_its_last_sound_checkpoint(storage: str, tiny_corpus: Path):
    """A rate that makes the weights overflow: steps without an update are recorded with their rows,
    then it ends."""
    spec = make_case(
        tiny_corpus,
        optimizer={"learning_rate": 10.0, "weight_decay": 10.0},
        regularization={"clip_grad_norm": None},
        numerics={"max_skipped_steps": 3},
        duration={"steps": 400},
    )
    with pytest.raises(RunFailed, match=r"numerics|not finite"):
        train(make_spec(spec), storage=storage, run_name="overflown")
    run = Run.open(storage, "overflown")
    skipped = [event for event in run.events() if event["kind"] == "step_skipped"]
    assert len(skipped) >= 3
    assert all(len(event["rows"]) == 48 for event in skipped)
    assert len(run.attempts()) == 1  # a restart would fail again
    assert run.latest_checkpoint() is None or verify_checkpoint(run, run.latest_checkpoint()).ok
    assert os.path.exists(Path(run.uri, "failures", "a0001.json"))


def test_a_second_driver_is_refused_while_the_first_lives(
    storage: str, tiny_corpus: Path, undisturbed: Run, tmp_path: Path
):
    copied = copy_storage(storage, tmp_path / "runs", undisturbed.name)
    run = Run.open(copied, undisturbed.name)
    first, spec = run.take_over(), make_spec(make_case(tiny_corpus, duration={"steps": STEPS + 2}))
    attempts = len(run.attempts())
    with pytest.raises(StoreError, match="undisturbed"):
        train(spec, storage=copied, run_name=run.name)
    assert len(run.attempts()) == attempts
    assert run.status == "completed"
    assert run.plan()["num_steps"] == STEPS  # and nothing was written
    run.release(first)
    train(spec, storage=copied, run_name=run.name)
    assert run.metrics()[-1]["step"] == STEPS + 2


def test_a_leap_of_the_loss_is_rewound_and_its_rows_are_left_out(
    storage: str, tiny_corpus: Path, undisturbed: Run
):
    """Batches of two rows, whose losses leap a little all the time: the run goes back twice, and
    then gives up."""
    spec = make_case(
        tiny_corpus,
        numerics={"spike": "rewind", "spike_sigmas": 1.5, "max_rewinds": 2},
        batch={"global_rows": 2, "micro_rows": 1},
        duration={"steps": 400},
        checkpoint={"every_steps": 5},
    )
    with pytest.raises(RunFailed, match=r"leapt|numerics"):
        train(make_spec(spec), storage=storage, run_name="leaping")
    run = Run.open(storage, "leaping")
    spikes = [event["step"] for event in run.events() if event["kind"] == "loss_spike"]
    assert len(spikes) == 3
    left_out = run.attempts()[-1].left_out
    assert left_out[0] == spikes[0] - 1  # batches count from 0, steps from 1
    assert len(left_out) == 2
    assert verify_ledger(run).left_out == 2 * 2
    assert verify_ledger(run).ok
