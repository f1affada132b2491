"""What a run takes besides memory and time: disk, requests to an object store, and the time that
failures and saves cost it. Pure functions of the spec and its plan.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from dray.plan.intervals import expected_goodput
from dray.plan.plan import Plan
from dray.spec import Spec

PART_BYTES = 10 * 2**20
"""Of a file that goes to an object store in several parts."""
GROUP_ROWS, LABELLED_GROUP_ROWS = 256, 64
"""Rows that are read together from a token shard: packed ones, and those of documents."""
LEAST_SHARD_BYTES, MOST_SHARD_BYTES, MANY_SHARDS = 32 * 2**20, 256 * 2**20, 256
OPEN_SHARDS = 32
"""Shards that a reader keeps open; the groups of more cost three requests besides."""
BLOCK_BYTES, SEGMENT_BYTES = 4 * 2**20, 64 * 2**20
"""Of rows that are read at once for one rank, and for all."""
ROW_BYTES = 12
"""Of a step in the metrics, once they are compacted: 10^7 steps were 0.12 GB."""
RECORDS_BYTES = 16 * 2**20
"""Of the metrics that are not compacted yet, events, plan and records."""
COMMIT_PUTS, COMMIT_GETS = 17, 16
"""Requests of a commit and of the retention after it, whatever the number of ranks: manifest,
marker and listings; two kept checkpoints, measured. A rank's file comes on top."""


class Requests(BaseModel):
    """Requests to an object store, as they are billed: `puts` are writes and listings, `gets` reads
    and looks; what is tried again is not counted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    corpus_puts: int | None
    """Writing the token shards, without what lies between them and the raw files; None: the
    corpus' size is not known."""
    stream_gets: int | None
    """Reading rows, at most: ranks whose rows one process reads share what it has."""
    checkpoint_puts: int
    """Of one checkpoint."""
    checkpoint_gets: int
    metrics_puts: int | None
    """At most one a second."""
    total_puts: int | None
    total_gets: int | None


class Demands(BaseModel):
    """What a run takes of its storage, and of its time for what goes wrong."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_checkpoints: int | None
    """That the run commits; None: not known yet."""
    kept_checkpoints: int
    """There at once, at most: those that are kept, and the one that is being written."""
    checkpoints_bytes: int
    """Of all of those."""
    shard_bytes: int | None
    """Of the token shards."""
    records_bytes: int
    total_bytes: int | None
    """None: the corpus' size is not known."""
    free_bytes: int | None = None
    """On the storage's disk; None: it is none, or was not looked at."""
    requests: Requests | None
    """None: the storage is no object store."""
    save_seconds: float | None
    """Between two saves; None: there is one at the end, or that is not known."""
    goodput: float | None
    """Share of the time that counts, with failures as often as is published; None: not known."""
    seconds_with_failures: float | None
    """Of the whole run."""


def make_demands(spec: Spec, plan: Plan, *, with_requests: bool = False) -> Demands:
    """What a run takes by its plan. `with_requests`: of a storage that bills them."""
    between, count = _seconds_between(spec, plan), _num_checkpoints(spec, plan)
    kept = spec.checkpoint.keep_last + spec.checkpoint.keep_best
    there = count if count is not None and count <= kept else kept + 1
    checkpoints = there * plan.checkpoint_bytes
    records = RECORDS_BYTES + ROW_BYTES * (plan.num_steps or 0)
    goodput = _goodput(plan, between)
    return Demands(
        num_checkpoints=count,
        kept_checkpoints=there,
        checkpoints_bytes=checkpoints,
        shard_bytes=plan.shard_bytes,
        records_bytes=records,
        total_bytes=None if plan.shard_bytes is None else plan.shard_bytes + checkpoints + records,
        requests=_make_requests(spec, plan, count) if with_requests else None,
        save_seconds=between,
        goodput=goodput,
        seconds_with_failures=plan.est_seconds / goodput if plan.est_seconds and goodput else None,
    )


def _seconds_between(spec: Spec, plan: Plan) -> float | None:
    """Seconds between two saves; none where that is not known, or nothing but the end is saved."""
    rule, found = spec.checkpoint, []
    if rule.every_steps is not None and plan.step_seconds is not None:
        found.append(rule.every_steps * plan.step_seconds)
    if rule.every_minutes:
        found.append(60 * rule.every_minutes)
    elif rule.every_minutes is not None and plan.save_interval is not None:
        found.append(plan.save_interval.seconds)
    return min(found, default=None)


def _num_checkpoints(spec: Spec, plan: Plan) -> int | None:
    """Checkpoints that a run commits, the last one among them."""
    rule, steps = spec.checkpoint, plan.num_steps
    if rule.every_steps is None and rule.every_minutes is None:
        return 1
    if steps is None:
        return None
    by_steps = 0 if rule.every_steps is None else (steps - 1) // rule.every_steps
    if rule.every_minutes is None:
        return by_steps + 1
    interval = plan.save_interval
    every = 60 * rule.every_minutes or (interval.seconds if interval else 0.0)
    if plan.est_seconds is None or not every:
        return None
    return max(by_steps, int(plan.est_seconds // every)) + 1


def _goodput(plan: Plan, between: float | None) -> float | None:
    """Where nothing is saved but the end, a failure costs all that was done by then."""
    costs, seconds = plan.save_interval, between or plan.est_seconds
    if costs is None or not seconds or plan.est_seconds is None:
        return None
    return expected_goodput(
        min(seconds, plan.est_seconds),
        held_seconds=costs.held_seconds,
        failure_seconds=costs.failure_seconds,
        lost_seconds=costs.restart_seconds + costs.commit_seconds,
    )


def count_puts(num_bytes: int) -> int:
    """Writes of a file: one, or one a part and two more."""
    return 1 if num_bytes <= PART_BYTES else -(-num_bytes // PART_BYTES) + 2


def _make_requests(spec: Spec, plan: Plan, num_checkpoints: int | None) -> Requests:
    corpus = None if plan.shard_bytes is None else _shard_puts(plan.shard_bytes)
    stream = _stream_gets(spec, plan)
    # A rank looks whether its folder is committed already, lists it, and writes its file.
    puts = plan.num_ranks * (count_puts(plan.checkpoint_bytes // plan.num_ranks) + 1) + COMMIT_PUTS
    gets = plan.num_ranks + COMMIT_GETS
    rows = None
    if plan.num_steps is not None and plan.est_seconds is not None:
        rows = min(plan.num_steps, int(plan.est_seconds) + 1)
    known = corpus is not None and num_checkpoints is not None and rows is not None
    return Requests(
        corpus_puts=corpus,
        stream_gets=stream,
        checkpoint_puts=puts,
        checkpoint_gets=gets,
        metrics_puts=rows,
        total_puts=(corpus or 0) + (num_checkpoints or 0) * puts + (rows or 0) if known else None,
        total_gets=None
        if stream is None or num_checkpoints is None
        else stream + num_checkpoints * gets,
    )


def _num_shards(shard_bytes: int) -> int:
    return -(-shard_bytes // _bytes_of_a_shard(shard_bytes))


def _bytes_of_a_shard(shard_bytes: int) -> int:
    return max(LEAST_SHARD_BYTES, min(MOST_SHARD_BYTES, shard_bytes // MANY_SHARDS))


def _shard_puts(shard_bytes: int) -> int:
    return _num_shards(shard_bytes) * count_puts(min(shard_bytes, _bytes_of_a_shard(shard_bytes)))


def _stream_gets(spec: Spec, plan: Plan) -> int | None:
    """A block of a rank holds its rows of some steps; those of a step lie in as many groups as they
    fill, and in one more."""
    if plan.shard_bytes is None or plan.num_steps is None:
        return None
    rows, ranks = plan.batch.global_rows, plan.num_ranks
    row_bytes = max(1, 2 * spec.data.sequence_tokens)
    a_rank = -(-rows // ranks)
    steps = max(1, min(BLOCK_BYTES // row_bytes // a_rank, SEGMENT_BYTES // row_bytes // rows))
    group = GROUP_ROWS if spec.task.packs else LABELLED_GROUP_ROWS
    a_block = min(steps * (1 + a_rank // group), 1 + -(-steps * rows // group))
    a_group = 1 if _num_shards(plan.shard_bytes) <= OPEN_SHARDS else 4
    return -(-plan.num_steps // steps) * ranks * a_block * a_group
