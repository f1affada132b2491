"""What a rank is fed ahead of its steps, and what travels to and from its device."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import torch

from dray.corpus.manifest import MANIFEST, dump_manifest
from dray.corpus.stream import RowStream
from dray.rank.device import Clock, HostCopy, Reading, pin, send
from dray.rank.feeding import StepRows, ValidationRows, feed
from dray.rank.group import Ranks
from dray.tasks.causal_lm import CausalLM
from random_corpus import build_random_corpus

CPU = torch.device("cpu")


def feeders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "feeder"]


def wait_until_ended() -> None:
    deadline = time.monotonic() + 10
    while feeders() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert feeders() == []


def test_a_rank_is_fed_what_the_order_asks_for(tmp_path: Path) -> None:
    corpus = build_random_corpus(tmp_path, [50])
    manifest = corpus.manifest.model_copy(update={"validation": corpus.manifest.train})
    (tmp_path / MANIFEST).write_bytes(dump_manifest(manifest))
    stream = RowStream(
        folder=corpus.folder,
        key=manifest.key,
        seed=3,
        global_rows=7,
        num_ranks=2,
        rows_per_rank=4,
        micro_rows=2,
        start_step=0,
        num_steps=5,
        validate_every=2,
        max_validation_rows=9,
    )
    for rank in (0, 1):
        ranks = Ranks(rank, 2, CPU, None)
        steps, passes = [], []
        for work in feed(stream, stream.blocks(rank), CausalLM(), ranks):
            if isinstance(work, StepRows):
                real = int((work.row_ids >= 0).sum())
                assert [len(batch["input_ids"]) for batch in work.batches] == [2, 2]
                assert (work.num_targets, work.num_tokens) == (15 * real, 16 * real)
                steps.append(work.step)
            else:
                assert isinstance(work, ValidationRows)
                passes.append(
                    (work.step, sum(len(batch["labels"]) for batch in work.batches), work.is_last)
                )
        assert steps == [1, 2, 3, 4, 5]
        assert {step for step, _, is_last in passes if is_last} == {2, 4, 5}
        assert sum(rows for _, rows, _ in passes) >= 9
    wait_until_ended()


def test_on_a_cpu_each_thing_is_the_plain_one() -> None:
    batch = {"labels": torch.arange(3)}
    assert send(pin(batch, CPU), CPU)["labels"] is batch["labels"]
    assert Reading(torch.tensor([0.1, 2.0], dtype=torch.float64)).read() == [0.1, 2.0]
    clock = Clock(CPU)
    begun = clock.mark()
    time.sleep(0.02)
    assert 0.02 <= clock.seconds(begun, clock.mark()) < 5
    original = torch.ones(3)
    copy = HostCopy({"w": original})
    copy.hold_back()
    original.zero_()
    assert torch.equal(copy.finish()["w"], torch.ones(3))
