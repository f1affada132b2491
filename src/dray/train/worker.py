"""A rank on Ray: the loop of `dray.rank.loop` fed by Ray Data and reporting through an actor on the
head node.

Ray imports this file in its controller and data processes too: torch is imported by the ranks
alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any
from unittest import mock

import pyarrow as pa

from dray.corpus.stream import RowStream, build_dataset, iterate_windows
from dray.doctor.hangs import agreement_seconds
from dray.rank.job import Attempt, Job, begin_attempt, check_shared, make_attempt, make_stream
from dray.rank.pulse import Pulse
from dray.redaction import redact_error
from dray.runs import Run
from dray.runs.records import Ended
from dray.train.posting import Posting

PREFETCH_BLOCKS = 2


def preload() -> None:
    """Import what Ray's own helpers of training use, for the fork server; no torch.

    Ray draws its ids from a generator that must not have been used before the fork, or all children
    draw the same ones; and it draws one for every class of actors that is imported.
    """
    import ray.actor

    class ActorClassID(ray.ActorClassID):  # type: ignore[misc]
        @classmethod
        def from_random(cls) -> Any:
            return ray.ActorClassID(os.urandom(ray.ActorClassID.size()))

    with mock.patch.object(ray.actor, "ActorClassID", ActorClassID):
        for name in (
            "ray.data",
            "ray.train.v2._internal.execution.controller",
            "pyarrow.dataset",
            "pyarrow.fs",
            "ray.train.v2.api.data_parallel_trainer",
            "pyarrow.parquet",
        ):
            import_module(name)


def build_data_config() -> Any:
    """Ray Train's data configuration: the stream for the world size that came to be, from the
    attempt's own start."""
    import ray.data
    import ray.train

    class StreamConfig(ray.train.DataConfig):  # type: ignore[misc]
        def configure(
            self,
            datasets: dict[str, tuple[Job, dict[str, Any]]],
            world_size: int,
            worker_handles: Any,
            worker_node_ids: Any,
            **kwargs: Any,
        ) -> list[dict[str, Any]]:
            name, (job, options) = next(iter(datasets.items()))
            attempt = make_attempt(job, Run.open(job.storage, job.run_name).attempts()[-1])
            dataset = build_dataset(make_stream(job, attempt), **options)
            dataset.context.enable_progress_bars = False
            dataset.set_name(job.flat_name)  # on the dashboard, and for Ray Data's log file
            return [{name: split} for split in dataset.streaming_split(world_size, equal=True)]

    return StreamConfig()


def run_rank(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs. Ray writes an error that ends it into its own logs, so that
    is freed of secrets."""
    try:
        _run(config["job"], config["mailbox"])
    except BaseException as error:
        redact_error(error)
        raise


def _run(job: Job, mailbox: Any) -> None:
    import ray
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    context = ray.train.get_context()
    rank, num_ranks = context.get_world_rank(), context.get_world_size()
    check_shared(job)
    record = broadcast_from_rank_zero(begin_attempt(job, num_ranks) if rank == 0 else None)
    attempt = make_attempt(job, record)
    pulse = Pulse(rank)
    pulse.attempt, pulse.step = attempt.number, attempt.start_step
    pulse.dump_stacks_on_signal()
    with Posting(mailbox, pulse, num_ranks) as reporter:
        _train(job, attempt, reporter, pulse, context.get_local_rank())


def _train(job: Job, attempt: Attempt, reporter: Posting, pulse: Pulse, local_rank: int) -> None:
    stream = make_stream(job, attempt)
    blocks = _open_stream(stream)  # rows travel while torch is imported and the model is built

    import ray
    import torch
    from ray.train.collective import broadcast_from_rank_zero

    from dray.processes.heap import prepare_process
    from dray.rank import group
    from dray.rank.loop import train_rank

    prepare_process(job.spec.resources.cpus_per_worker)
    device = torch.device("cuda", local_rank) if job.plan.on_gpu else torch.device("cpu")
    if job.plan.on_gpu:
        torch.cuda.set_device(device)
        if (share := job.spec.resources.gpus_per_worker) < 1:  # others are on that card, too
            torch.cuda.set_per_process_memory_fraction(share)
    ranks = group.join(
        device,
        rank=pulse.rank,
        num_ranks=attempt.num_ranks,
        local_rank=local_rank,
        host=ray.util.get_node_ip_address(),
        announce=broadcast_from_rank_zero,
        timeout_seconds=agreement_seconds(job.spec.watchdog),
    )
    how = train_rank(job, ranks, attempt, reporter, stream=stream, blocks=blocks, pulse=pulse)
    if pulse.rank == 0:
        reporter.send(Ended(how))
        reporter.flush()
    group.leave()


def _open_stream(stream: RowStream) -> Iterator[pa.Table]:
    """This rank's blocks. Ray Data starts at once, in the background."""
    import ray.train

    open_shard = cache(
        lambda: ray.train.get_dataset_shard("rows")
    )  # in the background too: it waits for the split
    return iterate_windows(
        stream,
        lambda: open_shard().iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=PREFETCH_BLOCKS
        ),
    )
