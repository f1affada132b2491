"""Checkpoints written beside training: a step waits for the copy out of the model, and for nothing
else.

Every rank copies what it owns to host memory (a GPU does so beside its next step, and only the
update after that waits) and writes it in a thread; the ranks' threads agree over a process group of
their own, and rank 0 commits. At most one save is in flight. A save that fails on any rank is given
up by all, with the reason; training goes on from the step it has reached, until too many in a row
have failed for too long.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from dray.doctor.hangs import agreement_seconds
from dray.errors import SaveFailed, caught
from dray.rank.device import HostCopy, build_copy_stream
from dray.rank.engine import Engine
from dray.rank.group import Ranks
from dray.runs import CheckpointWriter, Run, apply_retention, make_fragment_key
from dray.spec import Spec
from dray.storage.retrying import OUTAGE_SECONDS

T = TypeVar("T")

MAX_FAILED_IN_A_ROW = 3


@dataclass(frozen=True)
class Outcome:
    """How a save ended: `problem` is empty if it is committed."""

    step: int
    problem: str
    seconds: float
    """From its begin to the commit."""
    blocked_seconds: float
    """Training waited for so long."""
    kept_for: str = ""
    """Why older checkpoints could not be deleted, on rank 0: the save is as good as any other, the
    storage fills up."""


class Saver:
    """Saves one attempt's checkpoints. Every rank has one and calls it at the same steps."""

    def __init__(
        self,
        run: Run,
        attempt: int,
        spec: Spec,
        *,
        engine: Engine,
        ranks: Ranks,
        wait_stored: Callable[[], None],
    ) -> None:
        self._run, self._attempt, self._spec, self._engine = run, attempt, spec, engine
        self._ranks, self._wait_stored = ranks.apart(agreement_seconds(spec.watchdog)), wait_stored
        self._stream = build_copy_stream(ranks.device)
        self._copy: HostCopy | None = None
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        self._failed_in_a_row, self._failing_since = 0, 0.0

    def begin(
        self, step: int, metadata: dict[str, Any], waited_seconds: float = 0.0
    ) -> Outcome | None:
        """Copy the state of this step and write it in the background. Returns the outcome of the
        save before. `waited_seconds`: for which training has waited for this save already.

        Raises SaveFailed as `finish` does.
        """
        before = self.finish()
        begun = time.perf_counter()
        self._copy = HostCopy(self._owned(), self._stream)
        blocked = waited_seconds + time.perf_counter() - begun
        self._thread = threading.Thread(
            target=self._write,
            args=(step, metadata, self._copy, blocked),
            name="saver",
            daemon=True,
        )
        self._thread.start()
        return before

    def hold_back(self) -> None:
        """Let the update that is queued next wait until the save in flight has its copies."""
        if self._copy is not None:
            self._copy.hold_back()
            self._copy = None

    def finish(self, *, last: bool = False) -> Outcome | None:
        """Wait for the save in flight, if there is one, and return its outcome.

        Raises SaveFailed when MAX_FAILED_IN_A_ROW have failed in more than OUTAGE_SECONDS, or this
        one and it is the `last`.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread, outcome = None, self._outcome
        assert outcome is not None
        if not outcome.problem:
            self._failed_in_a_row = 0
            return outcome
        if not self._failed_in_a_row:
            self._failing_since = time.monotonic()
        self._failed_in_a_row += 1
        too_long = time.monotonic() - self._failing_since > OUTAGE_SECONDS
        if last or (too_long and self._failed_in_a_row >= MAX_FAILED_IN_A_ROW):
            count = (
                f"{self._failed_in_a_row} saves in a row"
                if self._failed_in_a_row > 1
                else "the save"
            )
            raise SaveFailed(
                f"{count} failed, the latest at step {outcome.step}: {outcome.problem}"
            )
        return outcome

    def _owned(self) -> dict[str, Tensor]:
        """What this rank owns, by fragment key: live, but for buffers, which a forward pass may
        change."""
        tensors = {
            make_fragment_key(name, state, start): view.detach().to(
                torch.float32 if state == "param" else view.dtype
            )
            for name, state, start, view in self._engine.fragments()
        }
        if self._ranks.rank == 0:
            for name, buffer in self._engine.buffers().items():
                tensors[make_fragment_key(name, "buffer", 0)] = buffer.detach().reshape(-1).clone()
        return tensors

    def _write(self, step: int, metadata: dict[str, Any], copy: HostCopy, blocked: float) -> None:
        begun, kept_for = time.perf_counter(), ""
        # The group may break: another rank is gone, and training will find out too.
        agreed, broken = _try(lambda: self._commit(step, metadata, copy.finish()))
        problem = broken or agreed or ""
        seconds = time.perf_counter() - begun + blocked
        if self._ranks.rank == 0 and not problem:
            kept_for = self._delete_old()
        self._outcome = Outcome(step, problem, seconds, blocked, kept_for)

    def _commit(self, step: int, metadata: dict[str, Any], tensors: dict[str, Tensor]) -> str:
        """Write, agree, commit. Returns what went wrong, the same on every rank."""
        ranks, writer = self._ranks, CheckpointWriter(self._run, step, self._attempt)
        mine, problem = _try(lambda: writer.write_rank(ranks.rank, ranks.num_ranks, tensors))
        tensors.clear()
        found = ranks.gather_to_first(f"rank {ranks.rank}: {problem}" if problem else mine)
        problem = "; ".join(item for item in found or () if isinstance(item, str))
        if found is not None and not problem:
            _, problem = _try(self._wait_stored)
            if not problem:
                _, problem = _try(lambda: writer.commit(found, metadata))
        agreed: str = ranks.broadcast(problem)
        return agreed

    def _delete_old(self) -> str:
        """Apply the retention. Returns why it failed, if it did: on a bucket that lets nobody
        delete it always does."""
        keep = self._spec.checkpoint
        _, problem = _try(
            lambda: apply_retention(
                self._run,
                keep.keep_last,
                keep.keep_best,
                self._spec.validation.metric,
                sign=self._spec.metric_sign,
            )
        )
        return problem


def _try(work: Callable[[], T]) -> tuple[T | None, str]:
    """What the work gives and nothing, or nothing and what went wrong: a save that fails must not
    end training, whatever it fails with."""
    value, error = caught(work)
    return value, "" if error is None else f"{type(error).__name__}: {error}"
