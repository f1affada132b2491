"""The ledger: a run killed anywhere, at any number of ranks, has used the rows that it would have
used anyway."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from dray.cli import main
from dray.corpus import stream as stream_module
from dray.corpus.prepare import Corpus
from dray.corpus.stream import RowStream, check_rows
from dray.errors import CorpusError, StoreError
from dray.ledger import verify_ledger
from dray.order import NO_STEPS, LeftOut, chain_digest, format_digest, row_digest
from dray.runs import (
    CheckpointInfo,
    CheckpointWriter,
    Run,
    apply_retention,
    create_run,
    fork_run,
    make_fragment_key,
)
from dray.spec import make_spec
from random_corpus import build_random_corpus
from tiny import tiny_tree

GLOBAL_ROWS = 12
SEED = 7


class Killed(Exception):
    """Stands for the end of all processes of an attempt."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return build_random_corpus(tmp_path_factory.mktemp("corpus"), [173, 90])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few steps, so that a cut falls inside and between them."""
    monkeypatch.setattr(stream_module, "BLOCK_BYTES", 2048)


def begin(storage: Path, corpus: Corpus, name: str = "tiny", **fields: Any) -> Run:
    spec = make_spec(
        tiny_tree(
            Path("texts"), batch={"global_rows": GLOBAL_ROWS, "micro_rows": 1}, seed=SEED, **fields
        )
    )
    return create_run(
        storage,
        name,
        spec,
        {"num_steps": 100},
        corpus=corpus.folder,
        corpus_key=corpus.manifest.key,
    )


class Simulated:
    """A worker group without a model: reads its rows as all ranks do, logs its steps and commits as
    the worker does."""

    def __init__(
        self, run: Run, corpus: Corpus, *, seed: int = SEED, chained: bool = True, every: int = 3
    ) -> None:
        self.run, self.corpus, self.seed, self.chained, self.every = (
            run,
            corpus,
            seed,
            chained,
            every,
        )
        self.read: dict[int, list[int]] = {}
        """Step → the row ids that all ranks together last read for it."""
        self.moments = 10**9

    def attempt(
        self,
        num_ranks: int,
        num_steps: int,
        *,
        micro_rows: int = 1,
        left_out: Sequence[int] = (),
        cut: Random | None = None,
        losing: Random | None = None,
    ) -> None:
        """Go on from the newest checkpoint to `num_steps`. `cut`: killed at a random moment, within
        some six steps; `losing`: a kill takes the rows with it that the driver has not yet
        logged."""
        newest = self.run.latest_checkpoint()
        start = newest.step if newest else 0
        fields = {"left_out": list(left_out)} if left_out else {}
        number = self.run.begin_attempt(num_ranks, start, **fields)
        chain = self._load_chain(newest)
        self.moments = cut.randrange((num_ranks + 3) * 6) if cut else 10**9
        unlogged: list[dict[str, Any]] = []
        try:
            for step, shares in self._steps(
                num_ranks, micro_rows, start, num_steps, tuple(left_out)
            ):
                digest = sum(row_digest(share) for share in shares) % 2**64
                chain = chain_digest(chain, digest)
                self.read[step] = [int(row) for share in shares for row in share if row >= 0]
                unlogged.append(
                    {
                        "step": step,
                        "attempt": number,
                        "num_ranks": num_ranks,
                        "rows_digest": format_digest(digest),
                    }
                )
                if losing is None or losing.random() < 0.5:
                    self.run.log_metrics(unlogged)
                    unlogged = []
                self._moment()
                if step % self.every == 0 or step == num_steps:
                    self._commit(step, number, chain)
                self._moment()
            self.run.log_metrics(unlogged)
        except Killed:
            pass

    def _moment(self) -> None:
        """Something was done: a rank's part of a step read, a step logged, a file written, a
        checkpoint committed."""
        self.moments -= 1
        if self.moments < 0:
            raise Killed

    def _steps(
        self, num_ranks: int, micro_rows: int, start: int, num_steps: int, left_out: tuple[int, ...]
    ) -> Iterator[tuple[int, list[Any]]]:
        rows_per_rank = -(-GLOBAL_ROWS // (num_ranks * micro_rows)) * micro_rows
        stream = RowStream(
            folder=self.corpus.folder,
            key=self.corpus.manifest.key,
            seed=self.seed,
            global_rows=GLOBAL_ROWS,
            num_ranks=num_ranks,
            rows_per_rank=rows_per_rank,
            micro_rows=micro_rows,
            start_step=start,
            num_steps=num_steps,
            left_out=left_out,
        )
        for blocks in zip(
            *(check_rows(stream, stream.blocks(rank), rank) for rank in range(num_ranks)),
            strict=True,
        ):
            segment = blocks[0][0]
            ids = [
                block.column("row_id").to_numpy().reshape(-1, rows_per_rank) for _, block in blocks
            ]
            for nth, step in enumerate(range(segment.first, segment.last + 1)):
                shares = []
                for of_rank in ids:
                    shares.append(of_rank[nth])
                    self._moment()
                yield step, shares

    def _load_chain(self, newest: CheckpointInfo | None) -> str:
        if not newest or not self.chained:
            return NO_STEPS
        return str(
            json.loads(Path(newest.path, "manifest.json").read_bytes())["metadata"]["rows_chain"][
                "digest"
            ]
        )

    def _commit(self, step: int, attempt: int, chain: str) -> None:
        writer = CheckpointWriter(self.run, step, attempt)
        file = writer.write_rank(
            0, 1, {make_fragment_key("w", "param", 0): torch.full((4,), float(step))}
        )
        self._moment()  # killed before the marker: there is no checkpoint
        metadata: dict[str, Any] = {"shapes": {"w": [4]}, "step": step}
        if self.chained:
            metadata["rows_chain"] = {"after": 0, "digest": chain}
        writer.commit([file], metadata)
        apply_retention(self.run, keep_last=2)


def digests(run: Run) -> dict[int, str]:
    return {row["step"]: row["rows_digest"] for row in run.metrics()}


def uninterrupted(storage: Path, corpus: Corpus, num_steps: int) -> Run:
    run = begin(storage, corpus, "whole")
    Simulated(run, corpus, every=10**9).attempt(1, num_steps)
    return run


def test_200_kills_at_any_number_of_ranks_lose_and_repeat_nothing(tmp_path: Path, corpus: Corpus):
    run, random, num_steps = begin(tmp_path, corpus), Random(11), 900
    group = Simulated(run, corpus, chained=False)
    for _ in range(200):
        group.attempt(random.randint(1, 16), num_steps, micro_rows=random.randint(1, 3), cut=random)
    reached = verify_ledger(run)
    assert reached.ok, reached.problems
    assert reached.attempts == 200
    assert 150 < reached.committed_step < num_steps
    assert reached.redone_steps > 100
    num_steps = reached.committed_step + 30
    group.attempt(5, num_steps)
    report, whole = verify_ledger(run), uninterrupted(tmp_path, corpus, num_steps)
    assert report.ok, report.problems
    assert (report.steps, report.rows_used) == (num_steps, num_steps * GLOBAL_ROWS)
    assert (report.repeated, report.skipped, report.left_out, report.unlogged_steps) == (0, 0, 0, 0)
    # The killed run has read what the other one did, at every step, and its ledger is the same.
    assert digests(run) == digests(whole)
    assert report.digest == verify_ledger(whole).digest != ""
    # Counted once more without the ledger: each row of each epoch once.
    num_rows = corpus.manifest.train.num_rows
    read = [row for step in range(1, num_steps + 1) for row in sorted(group.read[step])]
    assert report.epochs == len(read) // num_rows > 5
    counts = Counter(read)
    assert set(counts) == set(range(num_rows))
    assert set(counts.values()) <= {report.epochs, report.epochs + 1}


def test_rows_of_steps_whose_metrics_were_lost_are_proven_by_the_checkpoint(
    tmp_path: Path, corpus: Corpus
):
    run, random = begin(tmp_path, corpus), Random(3)
    group = Simulated(run, corpus)
    for _ in range(30):
        group.attempt(random.randint(1, 16), 900, cut=random, losing=random)
    report = verify_ledger(run)
    assert report.ok, report.problems
    assert report.unlogged_steps > 3
    assert report.unlogged_steps == report.steps - sum(
        row["step"] <= report.committed_step for row in run.metrics()
    )
    assert (report.rows_used, report.repeated, report.skipped) == (report.steps * GLOBAL_ROWS, 0, 0)
    assert report.digest == verify_ledger(uninterrupted(tmp_path, corpus, report.steps)).digest


def test_batches_left_out_after_a_rewind(tmp_path: Path, corpus: Corpus):
    """Twice the run goes back and leaves out the batches of the next steps, at other numbers of
    ranks."""
    run = begin(tmp_path, corpus)
    group = Simulated(run, corpus, every=10)
    group.attempt(4, 20)
    hurt = LeftOut().with_steps(22, 24)
    group.attempt(3, 60, left_out=hurt.batches)
    hurt = hurt.with_steps(61, 61)
    group.attempt(7, 90, left_out=hurt.batches)
    report = verify_ledger(run)
    assert report.ok, report.problems
    assert hurt.batches == (21, 22, 23, 63)
    assert report.left_out_batches == [21, 22, 23, 63]
    assert (report.left_out, report.repeated, report.skipped) == (4 * GLOBAL_ROWS, 0, 0)
    assert (report.rows_used, report.epochs) == (90 * GLOBAL_ROWS, 94 * GLOBAL_ROWS // 263)
    left_out = {row for batch in hurt.batches for row in stream_rows(group, batch)}
    counts = Counter(row for rows in group.read.values() for row in rows)
    assert all(counts[row] < 5 for row in left_out)
    assert sum(counts.values()) == 90 * GLOBAL_ROWS


def stream_rows(group: Simulated, batch: int) -> list[int]:
    order = stream_module.make_order(group.corpus.manifest, SEED)
    return [int(row) for row in order.rows(batch * GLOBAL_ROWS, (batch + 1) * GLOBAL_ROWS)]


@pytest.mark.parametrize(
    ("left_out", "told"),
    [
        ([3], "batch 20 were neither read nor left out"),
        ([], "steps 21–23 read batches that had been read before"),
    ],
)
def test_batches_that_cannot_be_left_out_any_more(
    tmp_path: Path, corpus: Corpus, left_out: list[int], told: str
):
    run = begin(tmp_path, corpus)
    group = Simulated(run, corpus, every=10)
    group.attempt(2, 20, left_out=[] if left_out else [15, 16, 17])
    group.attempt(2, 50, left_out=left_out)
    report = verify_ledger(run)
    assert not report.ok
    assert any(told in problem for problem in report.problems), report.problems
    assert (report.repeated, report.skipped) == ((0, 12) if left_out else (36, 0))


def test_weighted_sources_have_epochs_of_their_own(tmp_path: Path):
    corpus = build_random_corpus(tmp_path / "corpus", [100, 40], weights=[1.0, 3.0])
    run = begin(tmp_path / "runs", corpus)
    Simulated(run, corpus, every=40).attempt(3, 80)
    report = verify_ledger(run)
    assert report.ok, report.problems
    assert report.epochs_by_source == {
        "source-0": 80 * 12 // 4 // 100,
        "source-1": 80 * 12 * 3 // 4 // 40,
    }
    assert report.epochs == 2


def test_a_new_run_and_one_without_a_corpus(tmp_path: Path, corpus: Corpus):
    run = begin(tmp_path, corpus)
    assert (verify_ledger(run).ok, verify_ledger(run).steps, verify_ledger(run).attempts) == (
        True,
        0,
        0,
    )
    Simulated(run, corpus, every=10**9).attempt(2, 9, cut=Random(1))
    report = verify_ledger(run)
    assert (report.ok, report.steps) == (True, 0)
    assert report.uncommitted_steps == len(run.metrics()) > 0
    with pytest.raises(StoreError, match="has no checkpoint of step 4"):
        verify_ledger(run, 4)
    run.update(corpus=str(tmp_path / "gone"))
    with pytest.raises(CorpusError, match="holds no prepared corpus"):
        verify_ledger(run)
    run.update(corpus="")
    with pytest.raises(StoreError, match="no corpus on record"):
        verify_ledger(run)


def test_a_fork_goes_on_where_its_origin_stood(tmp_path: Path, corpus: Corpus):
    run = begin(tmp_path, corpus)
    Simulated(run, corpus, every=10).attempt(2, 30)
    spec = make_spec(
        tiny_tree(Path("texts"), batch={"global_rows": GLOBAL_ROWS, "micro_rows": 1}, seed=8)
    )
    fork = fork_run(
        tmp_path,
        "tiny",
        "fork",
        spec,
        {"num_steps": 100},
        corpus=corpus.folder,
        corpus_key=corpus.manifest.key,
    )
    assert (verify_ledger(fork).ok, verify_ledger(fork).steps) == (True, 0)
    Simulated(fork, corpus, seed=8, chained=False, every=10).attempt(3, 95)
    report = verify_ledger(fork)
    assert report.ok, report.problems
    # Steps 31 to 95 are positions 360 to 1139 of its own order: epochs of 263 rows end at 526, 789
    # and 1052.
    assert (report.start_step, report.steps, report.rows_used, report.epochs) == (
        30,
        65,
        65 * 12,
        2,
    )
    assert verify_ledger(run).ok


def test_a_fork_leaves_out_what_its_origin_did(tmp_path: Path, corpus: Corpus):
    run = begin(tmp_path, corpus)
    left_out = LeftOut((4, 9)).batches
    run.update(left_out=list(left_out))
    Simulated(run, corpus, every=10).attempt(2, 30, left_out=left_out)
    assert verify_ledger(run).ok

    def fork(name: str, **fields: Any) -> Run:
        tree = tiny_tree(
            Path("texts"),
            batch={"global_rows": GLOBAL_ROWS, "micro_rows": 1},
            **{"seed": SEED, **fields},
        )
        return fork_run(
            tmp_path,
            "tiny",
            name,
            make_spec(tree),
            {"num_steps": 100},
            corpus=corpus.folder,
            corpus_key=corpus.manifest.key,
        )

    same = fork("same", optimizer={"learning_rate": 1e-4})
    assert same.record()["left_out"] == [4, 9]
    Simulated(same, corpus, chained=False, every=10).attempt(
        3, 60, left_out=same.record()["left_out"]
    )
    assert verify_ledger(same).problems == []
    forgetful = fork("forgetful")
    Simulated(forgetful, corpus, chained=False, every=10).attempt(3, 60)
    assert "steps 31–32 read batches that had been read before" in verify_ledger(forgetful).problems
    assert (
        "left_out" not in fork("reordered", seed=8).record()
    )  # in another order they are other rows


def test_a_real_run_carries_its_chain_through_restarts_and_forks(tmp_path: Path):
    from dray.train.driver import train_locally

    corpus = build_random_corpus(tmp_path / "corpus", [50], tokens=64)

    def train(steps: int, **fields: Any) -> Run:
        tree = tiny_tree(
            Path("texts"), duration={"steps": steps}, checkpoint={"every_steps": 4}, seed=SEED
        )
        return train_locally(
            make_spec(tree | fields), storage=str(tmp_path / "runs"), corpus=corpus
        ).run

    train(6)
    run = train(15)
    report = verify_ledger(run)
    assert report.ok, report.problems
    assert (report.steps, report.attempts, report.epochs) == (15, 2, 15 * 8 // 50)
    whole = train(15, name="whole")
    assert verify_ledger(whole).digest == report.digest
    edit_log(run, 2, lambda rows: rows[2:])
    assert (verify_ledger(run).ok, verify_ledger(run).unlogged_steps) == (True, 2)
    tree = tiny_tree(
        Path("texts"), name="fork", duration={"steps": 20}, checkpoint={"every_steps": 4}, seed=8
    )
    fork = fork_run(
        run.storage,
        run.name,
        "fork",
        make_spec(tree),
        {},
        corpus=corpus.folder,
        corpus_key=corpus.manifest.key,
    )
    train_locally(make_spec(tree), storage=run.storage, corpus=corpus)
    edit_log(fork, 1, lambda rows: rows[1:])
    report = verify_ledger(fork)
    assert report.ok, report.problems
    assert (report.start_step, report.steps, report.unlogged_steps) == (15, 5, 1)


# ---- damage ------------------------------------------------------------------------------------


@pytest.fixture
def three_attempts(tmp_path: Path, corpus: Corpus) -> Run:
    """Attempts from steps 0, 12 and 24; the last ended at step 60. Nothing is chained, so every row
    counts."""
    run = begin(tmp_path, corpus)
    group = Simulated(run, corpus, chained=False, every=12)
    group.attempt(4, 12)
    group.attempt(2, 24)
    group.attempt(3, 60)
    assert verify_ledger(run).ok
    return run


def edit_log(run: Run, attempt: int, change: Any) -> None:
    path = Path(run.path, "metrics", f"a{attempt:04d}.jsonl")
    rows = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit_attempt(run: Run, attempt: int, **fields: Any) -> None:
    path = Path(run.path, "attempts", f"{attempt:04d}.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def expect(run: Run, told: str, **counts: int) -> None:
    report = verify_ledger(run)
    assert not report.ok
    assert report.digest == ""
    assert any(told in problem for problem in report.problems), report.problems
    assert {name: getattr(report, name) for name in counts} == counts


def test_a_missing_row_is_found(three_attempts: Run):
    edit_log(
        three_attempts, 2, lambda rows: [row for row in rows if row["step"] not in (15, 17, 18)]
    )
    expect(
        three_attempts,
        "no metrics row of steps 15, 17–18",
        skipped=36,
        repeated=0,
        rows_used=57 * 12,
    )


def test_a_torn_row_is_a_missing_row(three_attempts: Run):
    path = Path(three_attempts.path, "metrics", "a0003.jsonl")
    path.write_bytes(path.read_bytes()[:-20])
    expect(three_attempts, "no metrics row of step 60", skipped=12)


def test_a_duplicated_row_is_found(three_attempts: Run):
    edit_log(three_attempts, 2, lambda rows: [*rows, rows[3]])
    expect(
        three_attempts,
        "more than one metrics row of step 16",
        skipped=0,
        repeated=12,
        rows_used=60 * 12,
    )


@pytest.mark.parametrize("digest", ["0123456789abcdef", "no digest", None])
def test_a_wrong_digest_is_found(three_attempts: Run, digest: str | None):
    edit_log(
        three_attempts,
        3,
        lambda rows: [row | ({"rows_digest": digest} if row["step"] == 30 else {}) for row in rows],
    )
    expect(three_attempts, "the rows_digest of step 30 is not", skipped=12, repeated=0)


def test_swapped_digests_are_found(three_attempts: Run):
    def swap(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows[4]["rows_digest"], rows[9]["rows_digest"] = (
            rows[9]["rows_digest"],
            rows[4]["rows_digest"],
        )
        return rows

    edit_log(three_attempts, 1, swap)
    expect(three_attempts, "the rows_digest of steps 5, 10 is not", skipped=24)


def test_a_gap_in_the_chain_of_attempts_is_found(three_attempts: Run):
    edit_attempt(three_attempts, 3, start_step=27)
    expect(
        three_attempts,
        "attempt 3 started at step 27, which no attempt before it had come to: the last was step "
        "24",
        skipped=36,
    )
    expect(three_attempts, "attempt 3 logged steps 25–27, which it did not do")


def test_a_missing_record_of_an_attempt_is_found(three_attempts: Run):
    Path(three_attempts.path, "attempts", "0002.json").unlink()
    expect(three_attempts, "there is no record of attempt 2")
    expect(three_attempts, "attempt 2 has no record, but logged steps 13–24")


def test_a_changed_seed_is_found(three_attempts: Run):
    path = Path(three_attempts.path, "spec.yaml")
    text = path.read_text()
    assert f"seed: {SEED}" in text
    path.write_text(text.replace(f"seed: {SEED}", "seed: 8"))
    expect(three_attempts, "it differs in seed", skipped=60 * 12, rows_used=0)
    expect(three_attempts, "the rows_digest of steps 1–60 is not")


def test_a_run_trained_under_another_seed_is_found(tmp_path: Path, corpus: Corpus):
    run = begin(tmp_path, corpus)
    Simulated(run, corpus, seed=SEED + 1, every=10).attempt(2, 20)
    expect(run, "the rows_digest of steps 1–20 is not", skipped=240)
    expect(
        run,
        "the checkpoint of step 20 carries the digest of other rows than the order gives after "
        "step 0",
    )


def test_another_corpus_is_found(three_attempts: Run, tmp_path: Path):
    other = build_random_corpus(tmp_path / "other", [173, 91], key="other")
    three_attempts.update(corpus=other.folder)
    expect(three_attempts, "the corpus was random and is other now")


def test_metrics_cannot_be_forged_against_the_chain(tmp_path: Path, corpus: Corpus):
    """A worker that read other rows than its metrics say: the checkpoint carries what it read."""
    run = begin(tmp_path, corpus)
    Simulated(run, corpus, seed=SEED + 1, every=10).attempt(2, 20)
    honest = digests(uninterrupted(tmp_path, corpus, 20))
    edit_log(run, 1, lambda rows: [row | {"rows_digest": honest[row["step"]]} for row in rows])
    expect(run, "the checkpoint of step 20 carries the digest of other rows", skipped=0)


def test_a_left_out_list_that_is_none(three_attempts: Run):
    edit_attempt(three_attempts, 3, left_out=[5, 2])
    with pytest.raises(StoreError, match="attempt 3: its left_out cannot be used"):
        verify_ledger(three_attempts)


# ---- the command -------------------------------------------------------------------------------


def test_the_command(three_attempts: Run, capsys: pytest.CaptureFixture[str]):
    place = ["tiny", "--storage", three_attempts.storage]
    assert main(["verify", *place, "--ledger", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {
        "ok",
        "steps",
        "rows_used",
        "epochs",
        "repeated",
        "skipped",
        "left_out",
        "redone_steps",
        "attempts",
        "problems",
    } <= found.keys()
    assert (found["ok"], found["steps"], found["rows_used"], found["epochs"]) == (True, 60, 720, 2)
    assert main(["verify", *place, "--ledger", "--step", "48"]) == 0
    text = capsys.readouterr().out
    assert "tiny  ledger sound up to step 48" in text
    assert "48 committed, 12 past the checkpoint" in text
    assert main(["verify", *place]) == 0
    assert "step 60  sound" in capsys.readouterr().out
    edit_log(three_attempts, 1, lambda rows: rows[:4] + rows[5:])
    assert main(["verify", *place, "--ledger"]) == 3
    assert "ledger BROKEN up to step 60" in (text := capsys.readouterr().out)
    assert "no metrics row of step 5" in text
    assert main(["verify", *place, "--ledger", "--step", "5"]) == 2
