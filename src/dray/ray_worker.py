"""A rank on Ray: the loop of `worker.py` fed by Ray Data and reporting through an actor on the head node.

Ray imports this file in its controller and data processes too: torch is imported by the ranks alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from dray.corpus.stream import build_dataset
from dray.job import Attempt, Job, begin_attempt, make_stream
from dray.store import Run

SEND_EVERY_SECONDS = 0.2
PREFETCH_BLOCKS = 2


def build_mailbox() -> Any:
    """The actor that carries records to the driver and a wish to stop to the ranks."""
    import ray

    class Mailbox:
        def __init__(self) -> None:
            self._records: list[dict[str, Any]] = []
            self._stop = False

        def put(self, records: list[dict[str, Any]]) -> bool:
            self._records += records
            return self._stop

        def take(self) -> list[dict[str, Any]]:
            records, self._records = self._records, []
            return records

        def request_stop(self) -> None:
            self._stop = True

    return ray.remote(num_cpus=0)(Mailbox).remote()


class _Posting:
    """Sends records in batches without waiting, and learns of a wish to stop from the replies."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox
        self._waiting: list[dict[str, Any]] = []
        self._reply: Any = None
        self._sent_at = 0.0
        self._stop = False

    def send(self, record: dict[str, Any]) -> None:
        self._waiting.append(record)
        if time.monotonic() - self._sent_at >= SEND_EVERY_SECONDS:
            self._post()

    def stop_requested(self) -> bool:
        import ray

        if self._reply is not None and ray.wait([self._reply], timeout=0)[0]:
            self._stop |= ray.get(self._reply)
            self._reply = None
        return self._stop

    def flush(self) -> None:
        import ray

        self._post()
        ray.get(self._reply)

    def _post(self) -> None:
        self._reply = self._mailbox.put.remote(self._waiting)
        self._waiting, self._sent_at = [], time.monotonic()


def build_data_config() -> Any:
    """Ray Train's data configuration: the stream for the world size that came to be, from the attempt's own start."""
    import ray.data
    import ray.train

    class StreamConfig(ray.train.DataConfig):  # type: ignore[misc]
        def configure(self, datasets: dict[str, Job], world_size: int, worker_handles: Any, worker_node_ids: Any,
                      **kwargs: Any) -> list[dict[str, Any]]:
            name, job = next(iter(datasets.items()))
            attempt = Run.open(job.storage, job.run_name).attempts()[-1]
            # One process that reads is enough on a laptop; each costs two seconds of CPU to start.
            dataset = build_dataset(make_stream(job, world_size, attempt["start_step"]),
                                    num_cpus=min(1.0, job.spec.resources.reader_cpus))
            options = ray.data.ExecutionOptions(preserve_order=True)
            dataset.context.execution_options = options
            dataset.context.enable_progress_bars = False
            return [{name: split} for split in dataset.streaming_split(world_size, equal=True)]

    return StreamConfig()


def run_rank(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    import ray
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    job: Job = config["job"]
    context = ray.train.get_context()
    rank, num_ranks = context.get_world_rank(), context.get_world_size()
    attempt: Attempt = broadcast_from_rank_zero(begin_attempt(job, num_ranks) if rank == 0 else None)
    stream = make_stream(job, num_ranks, attempt.start_step)
    blocks = _open_stream()  # rows travel while torch is imported and the model is built

    import torch

    from dray import ranks as group
    from dray.worker import prepare_process, train_rank

    prepare_process(job.spec.resources.cpus_per_worker)
    place = group.Place(rank, num_ranks, context.get_local_rank())
    device = torch.device("cuda", place.local_rank) if job.plan.on_gpu else torch.device("cpu")
    if job.plan.on_gpu:
        torch.cuda.set_device(device)
    ranks = group.join(place, device, 1800, broadcast_from_rank_zero, ray.util.get_node_ip_address())
    reporter = _Posting(config["mailbox"])
    how = train_rank(job, ranks, attempt, reporter, stream=stream, blocks=blocks)
    if rank == 0:
        reporter.send({"kind": "ended", "how": how})
        reporter.flush()
    group.leave()


def _open_stream() -> Iterator[pa.Table]:
    """This rank's blocks. Ray Data starts at once, in the background."""
    import ray.train

    def first_and_rest() -> tuple[pa.Table | None, Iterator[pa.Table]]:
        shard = ray.train.get_dataset_shard("rows")
        batches: Iterator[pa.Table] = iter(shard.iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=PREFETCH_BLOCKS))
        return next(batches, None), batches

    def blocks() -> Iterator[pa.Table]:
        first, rest = begun.result()
        if first is not None:
            yield first
            yield from rest

    pool = ThreadPoolExecutor(max_workers=1)
    begun = pool.submit(first_and_rest)
    pool.shutdown(wait=False)
    return blocks()
