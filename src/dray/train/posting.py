"""Between ranks and driver on Ray: the mailbox as an actor on the head node, and what a rank posts
to it."""

from __future__ import annotations

import threading
import time
from typing import Any

from dray.processes.signals import is_noted
from dray.rank.pulse import Pulse
from dray.runs.evidence import make_rank_failure
from dray.runs.records import Report
from dray.train.mailbox import Mailbox, pace

SEND_EVERY_SECONDS = 0.2
STORED_SECONDS = 180.0
"""How long a save waits for the driver to store the metrics: longer than a storage that fails is
waited for."""
BEAT_EVERY_SECONDS = 0.5


def build_mailbox(environment: dict[str, str]) -> Any:
    """The actor beside the driver that carries records and heartbeats to it, and a wish to stop to
    the ranks; with a runtime environment of its own."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here, runtime_env=environment)(
        Mailbox
    ).remote()


class Posting:
    """Sends records in batches without waiting, lets the heart beat, and learns of wishes from the
    replies."""

    def __init__(self, mailbox: Any, pulse: Pulse, num_ranks: int) -> None:
        import ray

        self._mailbox, self._pulse = mailbox, pulse
        self._send_every, self._beat_every = (
            pace(seconds, num_ranks) for seconds in (SEND_EVERY_SECONDS, BEAT_EVERY_SECONDS)
        )
        self._waiting: list[Report] = []
        self._reply: Any = None
        self._sent_at = 0.0
        self._stop = self._notice = False
        self._left = threading.Event()
        self._node_id, self._node = (
            ray.get_runtime_context().get_node_id(),
            ray.util.get_node_ip_address(),
        )
        pulse.announce = self._beat
        threading.Thread(target=self._keep_beating, name="heart", daemon=True).start()

    def send(self, report: Report) -> None:
        self._waiting.append(report)
        if time.monotonic() - self._sent_at >= self._send_every:
            self._post()

    def stop_requested(self) -> bool:
        self._read_reply()
        return self._stop

    def notice_given(self) -> bool:
        from ray.train.v2._internal.execution.context import get_train_context

        self._read_reply()
        # Not ray.train.get_preemption_info(): that goes through an actor at every step, and the
        # ranks agree anyway.
        return (
            self._notice
            or is_noted()
            or get_train_context().preemption_context.preemption_info is not None
        )

    def _read_reply(self) -> None:
        import ray

        if self._reply is not None and ray.wait([self._reply], timeout=0)[0]:
            self._stop, self._notice = ray.get(self._reply)
            self._reply = None

    def flush(self) -> None:
        import ray

        self._post()
        ray.get(self._reply)

    def wait_stored(self) -> None:
        """Wait until the driver has stored what the ranks have sent by now. Raises TimeoutError if
        it has not: no step is committed whose metrics could still be lost."""
        import ray

        since, deadline = None, time.monotonic() + STORED_SECONDS
        while time.monotonic() < deadline:
            since, stored = ray.get(self._mailbox.unstored.remote(since))
            if stored:
                return
            time.sleep(0.05)
        raise TimeoutError(f"the driver has not stored the metrics within {STORED_SECONDS:.0f} s")

    def __enter__(self) -> Posting:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Stop beating; with an error, say how this rank failed."""
        import ray

        self._left.set()
        self.flush()
        if error is None:
            ray.get(self._mailbox.leave.remote(self._pulse.rank))
            return
        beat = self._pulse.beat()
        ray.get(
            self._mailbox.fail.remote(
                make_rank_failure(
                    beat.rank,
                    error,
                    attempt=beat.attempt,
                    step=getattr(error, "step", beat.step),
                    phase=beat.phase,
                    pid=beat.pid,
                    node=self._node,
                    time=beat.time,
                )
            )
        )

    def _keep_beating(self) -> None:
        while not self._left.wait(self._beat_every):
            self._beat()

    def _beat(self) -> None:
        self._mailbox.beat.remote(self._pulse.beat(self._node_id, self._node))

    def _post(self) -> None:
        self._reply = self._mailbox.put.remote(self._waiting)
        self._waiting, self._sent_at = [], time.monotonic()
