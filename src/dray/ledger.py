"""The ledger: which rows the committed history of a run has used, proven from what lies in its
folder.

The history is what leads to the newest sound checkpoint. Three witnesses are compared: the order,
which says what each step must read; the metrics rows, each with the digest of what its step did
read; and the chained digest that the checkpoint carries. Finds instead of raising: what does not
fit becomes a problem of the report. Nothing is written.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dray.corpus.manifest import Manifest, load_run_manifest
from dray.corpus.stream import make_order
from dray.errors import StoreError
from dray.order import (
    NO_STEPS,
    Ints,
    LeftOut,
    Order,
    Words,
    batch_positions,
    chain_digest,
    row_digests,
)
from dray.runs import CheckpointInfo, CheckpointReader, Run, find_checkpoint, make_limits
from dray.runs.layout import parse_checkpoint_owner
from dray.runs.records import AttemptRecord
from dray.spec import Spec, differing_paths, without_places

CHUNK_POSITIONS = 2**17
"""Positions looked at together: some tens of megabytes, however long the run."""

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class LedgerReport:
    """What `verify_ledger` found. Rows are counted over the committed steps, start_step + 1 to
    committed_step."""

    run: str
    ok: bool
    start_step: int
    """0, or the step of another run from which this one was forked: what led there is in that run's
    ledger."""
    committed_step: int
    """Step of the checkpoint that the ledger goes up to; start_step if there is none."""
    steps: int
    """Committed steps."""
    uncommitted_steps: int
    """Steps done past that checkpoint: a restart does them again. Their digests are checked,
    nothing else."""
    rows_used: int
    epochs: int
    """Epochs completed; of weighted sources, the fewest that any has."""
    epochs_by_source: dict[str, int]
    repeated: int
    """Uses of a row beyond the first in the same epoch."""
    skipped: int
    """Rows that were due and are not proven to have been used, epoch by epoch."""
    left_out: int
    """Rows that were due and left out on purpose."""
    left_out_batches: list[int]
    redone_steps: int
    """Executions of a step that were undone and done again: the price of all failures."""
    unlogged_steps: int
    """Committed steps whose metrics row was lost with a process, but whose rows the checkpoint's
    chain proves."""
    attempts: int
    digest: str
    """Chained digest of all committed steps: equal for runs that used the same rows step by step.
    Empty unless ok."""
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def verify_ledger(run: Run, step: int | None = None) -> LedgerReport:
    """Prove that the committed history of a run used each row of each epoch exactly once, as its
    order has it.

    `step`: of the checkpoint up to which the history counts; by default the newest sound one. Time
    grows with the rows that were used, memory by a byte a row of the corpus and 16 bytes a logged
    step. Raises StoreError if the run has no corpus on record or no checkpoint of that step,
    CorpusError if the corpus is gone.
    """
    if (made := run.compressed()) is not None:
        raise StoreError(
            f"run {run.name!r}",
            f"was compressed from {made['run']}, and used no rows by steps of its own",
            "a ledger is of steps",
            f"`dray verify {made['run']} --ledger`",
        )
    # The checkpoint first: in a run that goes on, rows written meanwhile are only more of the tail.
    info = run.latest_checkpoint() if step is None else find_checkpoint(run, step)
    base = int((run.origin() or {}).get("step", 0))
    attempts, spec, manifest = run.attempts(), run.spec(), load_run_manifest(run)
    spans = _make_spans(attempts)
    log = _read_log(run, spans)
    committed = info.step if info else base
    last = max([committed, *log.steps[-1:].tolist()])
    walk = _Walk(
        make_order(manifest, spec.seed),
        spec.batch.global_rows,
        log,
        base,
        _load_chain(run, info, base),
        origin_left_out=_load_origin_left_out(run, base),
    )
    for span in spans:
        walk.follow(span, span.first, min(span.last, committed))
    walk.end()
    for span in spans:
        walk.follow_tail(span, max(span.first, committed + 1), min(span.last, last))
    problems = [
        *_check_identity(run, spec, manifest),
        *(
            [f"the checkpoint of step {info.step} is unsound: {info.problem}"]
            if info and not info.verified
            else []
        ),
        *_check_attempts(attempts, log, base, walk.proven_after, committed),
        *log.problems(),
        *walk.problems(committed),
    ]
    return _make_report(
        run, walk, log, manifest, committed=committed, attempts=len(attempts), problems=problems
    )


def find_steps(run: Run, rows: Sequence[int]) -> dict[int, list[int]]:
    """The steps that have learnt each of some rows, by row id: those of the history that leads to
    the run's newest sound checkpoint, ascending. Nothing is proven by it (`verify_ledger` does).
    Time grows with the rows that were used. Raises StoreError, CorpusError."""
    info = run.latest_checkpoint()
    spec, manifest = run.spec(), load_run_manifest(run)
    order, size = make_order(manifest, spec.seed), spec.batch.global_rows
    wanted = np.array(sorted(set(rows)), np.int64)
    found: dict[int, list[int]] = {row: [] for row in wanted.tolist()}
    for span in _make_spans(run.attempts()):
        last = min(span.last, info.step if info else 0)
        for first in range(span.first, int(last) + 1, max(1, CHUNK_POSITIONS // size)):
            steps = np.arange(first, min(first + max(1, CHUNK_POSITIONS // size), int(last) + 1))
            read = order.rows_at(batch_positions(span.left_out.batches_at(steps), size))
            for place in np.flatnonzero(np.isin(read, wanted)).tolist():
                found[int(read[place])].append(int(steps[place // size]))
    return found


def _make_report(
    run: Run,
    walk: _Walk,
    log: _Log,
    manifest: Manifest,
    *,
    committed: int,
    attempts: int,
    problems: list[str],
) -> LedgerReport:
    epochs, rows, base = walk.epochs, walk.global_rows, walk.base
    unproven = len(walk.unproven)
    pools = (
        [0] * len(manifest.train.sources)
        if len(epochs.completed) == 1
        else range(len(epochs.completed))
    )
    repeated = epochs.repeated + rows * len(walk.doubled) + rows * len(walk.read_again)
    skipped = epochs.skipped + rows * unproven
    if (repeated or skipped) and not problems:
        problems = [f"the order itself repeats {repeated} and skips {skipped} rows"]
    return LedgerReport(
        run=run.name,
        ok=not problems,
        start_step=base,
        committed_step=committed,
        steps=committed - base,
        uncommitted_steps=int(np.count_nonzero(np.unique(log.steps) > committed)),
        rows_used=rows * (committed - base - unproven),
        epochs=min(epochs.completed),
        epochs_by_source={
            source.name: epochs.completed[pool]
            for source, pool in zip(manifest.train.sources, pools, strict=True)
        },
        repeated=repeated,
        skipped=skipped,
        left_out=rows * len(walk.left_out),
        left_out_batches=walk.left_out,
        redone_steps=log.num_redone,
        unlogged_steps=walk.num_unlogged,
        attempts=attempts,
        digest="" if problems else walk.digest,
        problems=problems,
    )


# ---- what the folder says ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Span:
    """The steps [first, last] of the history that one attempt did, and the batches that it left
    out."""

    attempt: int
    first: int
    last: float
    left_out: LeftOut


def _make_spans(attempts: Sequence[AttemptRecord]) -> list[_Span]:
    """Every attempt's span, in order; those of undone attempts are empty, the others follow without
    a gap."""
    limits = make_limits({attempt.number: attempt.start_step for attempt in attempts})
    spans = []
    for attempt in attempts:
        try:
            left_out = LeftOut(attempt.left_out)
        except (ValueError, TypeError) as error:
            raise StoreError(
                f"attempt {attempt.number}", f"its left_out cannot be used ({error})"
            ) from error
        spans.append(
            _Span(attempt.number, attempt.start_step + 1, limits[attempt.number], left_out)
        )
    return spans


@dataclass(frozen=True)
class _Log:
    """The metrics rows of the history by step, and what else was logged."""

    steps: Ints
    digests: Words
    last_steps: dict[int, int]
    """Attempt → the last step that it logged, undone or not."""
    num_redone: int
    before_start: dict[int, list[int]]
    """Attempt → steps that it logged though they lie before its start."""
    unrecorded: dict[int, list[int]]
    """Attempt without a record → the steps it logged."""

    def problems(self) -> list[str]:
        return [
            *(
                f"attempt {number} logged {_listed(steps)}, which it did not do: it started later"
                for number, steps in sorted(self.before_start.items())
            ),
            *(
                f"attempt {number} has no record, but logged {_listed(steps)}"
                for number, steps in sorted(self.unrecorded.items())
            ),
        ]


def _read_log(run: Run, spans: Sequence[_Span]) -> _Log:
    by_attempt = {span.attempt: span for span in spans}
    steps, digests, undone = array("q"), array("Q"), array("q")
    last_steps: dict[int, int] = {}
    before_start: dict[int, list[int]] = {}
    unrecorded: dict[int, list[int]] = {}
    for row in run.iterate_metrics(("step", "attempt", "rows_digest")):
        try:
            step, attempt = int(row["step"]), int(row["attempt"])
        except (KeyError, ValueError, TypeError):
            continue  # whose row it was cannot be known: its step will be missing
        span = by_attempt.get(attempt)
        last_steps[attempt] = max(step, last_steps.get(attempt, 0))
        if span is None:
            unrecorded.setdefault(attempt, []).append(step)
        elif step < span.first:
            before_start.setdefault(attempt, []).append(step)
        elif step > span.last:
            undone.append(step)
        else:
            steps.append(step)
            digests.append(_parse_digest(row.get("rows_digest")))
    found = np.asarray(steps, dtype=np.int64)
    by_step = np.argsort(found, kind="stable")
    num_redone = int(np.isin(np.asarray(undone, dtype=np.int64), found).sum())
    return _Log(
        found[by_step],
        np.asarray(digests, dtype=np.uint64)[by_step],
        last_steps,
        num_redone,
        before_start,
        unrecorded,
    )


def _parse_digest(text: Any) -> int:
    """The digest of a metrics row; what cannot be read is one that no batch has, but for a chance
    of 2^-64."""
    try:
        return int(text, 16) % 2**64
    except (ValueError, TypeError):
        return 0


@dataclass(frozen=True)
class _Chain:
    """The chained digest that a checkpoint carries, of the steps after step `after`."""

    after: int
    digest: str


def _load_chain(run: Run, info: CheckpointInfo | None, base: int) -> _Chain | None:
    """The chain of a sound checkpoint of this run; none where it was written without one."""
    if info is None or not info.verified or info.step <= base:
        return None
    with CheckpointReader(run, info) as reader:
        found = reader.metadata.get("rows_chain")
    return _Chain(int(found["after"]), str(found["digest"])) if found else None


def _load_origin_left_out(run: Run, base: int) -> LeftOut | None:
    """What the run that a fork started from had left out by then, where both read the same order;
    none where that run is gone, or reads another one."""
    origin = run.origin()
    source = (
        Run.find(run.storage, parse_checkpoint_owner(str(origin["checkpoint"])))
        if origin and base
        else None
    )
    if origin is None or source is None:
        return None
    ours, theirs = run.record(), source.record()
    changed = {"seed", "batch.global_rows"} & set(
        differing_paths(theirs["identity"], ours["identity"])
    )
    if changed or ours["corpus_key"] != theirs["corpus_key"]:
        return None
    found = [attempt for attempt in source.attempts() if attempt.number == origin["attempt"]]
    return LeftOut(found[0].left_out) if found else None


# ---- what is compared --------------------------------------------------------------------------


def _check_identity(run: Run, spec: Spec, manifest: Manifest) -> list[str]:
    record, problems = run.record(), []
    differing = differing_paths(without_places(record["identity"]), without_places(spec.identity()))
    if differing:
        problems.append(
            f"the spec is not the one that the run began with: it differs in {', '.join(differing)}"
        )
    if record["corpus_key"] and record["corpus_key"] != manifest.key:
        problems.append(f"the corpus was {record['corpus_key']} and is {manifest.key} now")
    return problems


def _check_attempts(
    attempts: Sequence[AttemptRecord], log: _Log, base: int, proven_after: float, committed: int
) -> list[str]:
    """Each attempt went on from a step that those before it had come to, so that none was skipped.

    Starts in (proven_after, committed] need no other proof than the checkpoint's chain.
    """
    numbers = [attempt.number for attempt in attempts]
    absent = set(range(1, max(numbers, default=0))) - set(numbers)
    problems = [f"there is no record of {_listed(absent, 'attempt', 'attempts')}"] if absent else []
    reached = base
    for attempt in attempts:
        number, start = attempt.number, attempt.start_step
        if start < base:
            problems.append(
                f"attempt {number} started at step {start}, before the run's first, {base}"
            )
        if start > reached and not proven_after < start <= committed:
            problems.append(
                f"attempt {number} started at step {start}, which no attempt before it had come "
                f"to: the last was step {reached}"
            )
        reached = max(start, log.last_steps.get(number, start), attempt.end_step or 0)
    return problems


class _Walk:
    """Goes through the history step by step, and compares what was logged with what the order
    gives."""

    def __init__(
        self,
        order: Order,
        global_rows: int,
        log: _Log,
        base: int,
        chain: _Chain | None,
        *,
        origin_left_out: LeftOut | None = None,
    ) -> None:
        self.global_rows, self.base = global_rows, base
        self.epochs = _Epochs(order)
        self.doubled: list[int] = []
        self.read_again: list[int] = []
        self.left_out: list[int] = []
        self.num_unlogged = 0
        self.digest = NO_STEPS
        self.proven_after = float("inf")
        """The checkpoint's chain proves the steps after this one."""
        self._order, self._log, self._claim, self._origin_left_out = (
            order,
            log,
            chain,
            origin_left_out,
        )
        self._claimed = NO_STEPS  # the digest that the claim should have
        self._next_batch = -1
        self._missing: list[int] = []
        self._wrong: list[int] = []
        self._unmatched: list[int] = []
        self._passed_over: list[int] = []

    def follow(self, span: _Span, first: int, last: float) -> None:
        """Compare and count the committed steps [first, last] of a span. Called span by span, in
        order."""
        for steps in self._chunks(first, last):
            self._compare(steps, self._count(span, steps))

    def follow_tail(self, span: _Span, first: int, last: float) -> None:
        """Compare the digests of what was done past the checkpoint: the steps [first, last] of a
        span."""
        for steps in self._chunks(first, last):
            rows = self._order.rows_at(
                batch_positions(span.left_out.batches_at(steps), self.global_rows)
            )
            self._compare_digests(steps, row_digests(rows.reshape(-1, self.global_rows)))

    def _chunks(self, first: int, last: float) -> Iterator[Ints]:
        size = max(1, CHUNK_POSITIONS // self.global_rows)
        for start in range(first, int(last) + 1, size):
            yield np.arange(start, min(start + size, int(last) + 1), dtype=np.int64)

    def end(self) -> None:
        """The committed history ends here."""
        self.epochs.end()
        if self._claim and self._claim.digest == self._claimed:
            self.proven_after = self._claim.after
        self.num_unlogged = sum(step > self.proven_after for step in self._missing)
        self._missing = [step for step in self._missing if step <= self.proven_after]

    @property
    def unproven(self) -> list[int]:
        """Committed steps that neither a metrics row nor the checkpoint proves to have used their
        rows."""
        return [step for step in self._unmatched if step <= self.proven_after]

    def problems(self, committed: int) -> list[str]:
        """What does not fit, in words."""
        told = [
            (self._missing, "no metrics row of {}"),
            (self.doubled, "more than one metrics row of {}"),
            (self._wrong, "the rows_digest of {} is not that of the rows that the order gives"),
        ]
        problems = [text.format(_listed(steps)) for steps, text in told if steps]
        if self.read_again:
            problems.append(f"{_listed(self.read_again)} read batches that had been read before")
        if self._passed_over:
            problems.append(
                f"{_listed(self._passed_over, 'batch', 'batches')} were neither read nor left out"
            )
        if self._claim and self.proven_after == float("inf"):
            problems.append(
                f"the checkpoint of step {committed} carries the digest of other rows than the "
                f"order gives after step {self._claim.after}"
            )
        return problems

    def _count(self, span: _Span, steps: Ints) -> Words:
        """Count the rows of some steps, and of what was left out before and between them. Returns
        their digests."""
        batches = span.left_out.batches_at(steps)
        if self._next_batch < 0:  # a fork goes on where its origin stood
            stood = self._origin_left_out or span.left_out
            self._next_batch = (
                int(stood.batches_at(np.asarray([self.base]))[0]) + 1 if self.base else 0
            )
        again = batches < self._next_batch
        self.read_again += steps[again].tolist()
        due = np.union1d(batches, np.arange(self._next_batch, batches[-1] + 1))
        rows = self._order.rows_at(batch_positions(due, self.global_rows)).reshape(
            -1, self.global_rows
        )
        digests = row_digests(rows[np.searchsorted(due, batches)])
        left_out = np.isin(due, span.left_out.batches) & (due >= self._next_batch)
        passed_over = ~left_out & ~np.isin(due, batches)
        self.left_out += due[left_out].tolist()
        self._passed_over += due[passed_over].tolist()
        new = due >= self._next_batch
        self.epochs.take(
            batch_positions(due[new], self.global_rows),
            rows[new].reshape(-1),
            np.repeat(~passed_over[new], self.global_rows),
        )
        self._next_batch = max(self._next_batch, int(batches[-1]) + 1)
        return digests

    def _compare(self, steps: Ints, expected: Words) -> None:
        """Compare committed steps with their metrics rows, and lengthen the chains."""
        counts, matches = self._compare_digests(steps, expected)
        self._missing += steps[counts == 0].tolist()
        self._unmatched += steps[matches == 0].tolist()
        self.doubled += np.repeat(steps, np.maximum(0, counts - 1)).tolist()
        for step, digest in zip(steps.tolist(), expected.tolist(), strict=True):
            self.digest = chain_digest(self.digest, digest)
            if self._claim and step > self._claim.after:
                self._claimed = chain_digest(self._claimed, digest)

    def _compare_digests(self, steps: Ints, expected: Words) -> tuple[Ints, Ints]:
        """How many metrics rows each step has, and how many of them with the digest that is
        expected."""
        start, stop = np.searchsorted(self._log.steps, (steps[0], steps[-1] + 1))
        nth = self._log.steps[start:stop] - steps[0]
        same = self._log.digests[start:stop] == expected[nth]
        counts = np.bincount(nth, minlength=len(steps))
        matches = np.bincount(nth[same], minlength=len(steps))
        self._wrong += steps[matches < counts].tolist()
        return counts, matches


class _Epochs:
    """Counts the rows of the epoch that each pool is in: one byte a row, however many epochs there
    are."""

    def __init__(self, order: Order) -> None:
        self.repeated = self.skipped = 0
        self.completed = [0] * len(order.pools)
        self._order = order
        self._seen: Flags = np.zeros(order.num_rows, dtype=np.bool_)
        self._epoch = [-1] * len(order.pools)
        self._due = [0] * len(order.pools)
        self._used = [0] * len(order.pools)

    def take(self, positions: Ints, rows: Ints, accounted: Flags) -> None:
        """Positions that were due, ascending, with their row ids, and whether they were read or
        left out on purpose."""
        pools, epochs = self._order.epochs_at(positions)
        for pool in range(len(self.completed)):
            mine = np.flatnonzero(pools == pool)
            for part in np.split(mine, np.flatnonzero(np.diff(epochs[mine])) + 1):
                if len(part):
                    self._take_part(pool, int(epochs[part[0]]), rows[part], accounted[part])

    def end(self) -> None:
        """Close the epochs that were begun."""
        for pool in range(len(self.completed)):
            self._close(pool)

    def _take_part(self, pool: int, epoch: int, rows: Ints, accounted: Flags) -> None:
        if epoch != self._epoch[pool]:
            self._close(pool)
            self._epoch[pool] = epoch
        distinct = np.unique(rows[accounted])
        new = int(np.count_nonzero(~self._seen[distinct]))
        self._seen[distinct] = True
        self._due[pool] += len(rows)
        self._used[pool] += new
        self.repeated += int(np.count_nonzero(accounted)) - new

    def _close(self, pool: int) -> None:
        """The rows of an epoch are distinct, so as many are skipped as were due and not used."""
        rows = self._order.pools[pool]
        self.completed[pool] += self._due[pool] == len(rows)
        self.skipped += self._due[pool] - self._used[pool]
        self._seen[rows.start : rows.stop] = False
        self._due[pool] = self._used[pool] = 0


def _listed(steps: Iterable[int], one: str = "step", many: str = "steps", most: int = 8) -> str:
    """Numbers as text: `step 7`, `steps 3–5, 9`; of long lists the beginning, and how many more
    there are."""
    numbers = np.unique(np.fromiter(steps, dtype=np.int64))
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs[:most]]
    rest = sum(len(run) for run in runs[most:])
    return f"{one if len(numbers) == 1 else many} {', '.join(parts)}" + (
        f" and {rest} more" if rest else ""
    )
