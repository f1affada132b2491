"""The loop of a rank, run in this process on a corpus of random tokens: what it saves, draws and
does without."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dray.corpus.prepare import Corpus
from dray.corpus.stream import RowStream, remember_manifest
from dray.doctor import diagnose
from dray.errors import BadNumbers, CheckpointDamaged, StoreError
from dray.rank.group import Ranks, choose_interface
from dray.release.evaluate import evaluate
from dray.release.trained import load_trained
from dray.runs import CheckpointReader, Run, choose_checkpoint, verify_checkpoint
from dray.show.report import format_summary
from dray.spec import make_spec
from dray.storage.filesystem import RangeReader
from dray.tasks.regression import Regression
from dray.tasks.sequence_classification import SequenceClassification
from dray.train.driver import train_locally
from failing_proxy import FailingProxy, failing_proxy
from random_corpus import build_random_corpus
from rank_host import RankHost, rank_host
from remarks import Remarks
from tiny import tiny_tree

SEED = 2**32 - 1  # the greatest that a spec allows


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return build_random_corpus(tmp_path_factory.mktemp("corpus"), [50], tokens=64)


@pytest.fixture(scope="module")
def host() -> Iterator[RankHost]:
    with rank_host() as host:
        yield host


def go(storage: Path | str, corpus: Corpus, **sections: Any) -> Run:
    tree = tiny_tree(
        Path("texts"), **{"duration": {"steps": 4}, "validation": {}, "seed": SEED, **sections}
    )
    return train_locally(make_spec(tree), storage=str(storage), corpus=corpus).run


def steps_of(run: Run) -> list[int]:
    return [info.step for info in run.checkpoints()]


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["kind"] == kind]


def test_without_validation_rows_every_checkpoint_is_saved_at_its_step(
    tmp_path: Path, corpus: Corpus
) -> None:
    run = go(
        tmp_path,
        corpus,
        validation={"every_steps": 2},
        checkpoint={"every_steps": 2, "keep_last": 9},
        duration={"steps": 7},
        regularization={"dropout": 0.1},
    )
    assert steps_of(run) == [2, 4, 6, 7]


def test_a_validated_step_is_saved_after_its_validation(tmp_path: Path, corpus: Corpus) -> None:
    held_out = corpus.manifest.model_copy(update={"validation": corpus.manifest.train})
    run = go(
        tmp_path,
        Corpus(corpus.folder, held_out),
        validation={"every_steps": 2, "max_rows": 9},
        checkpoint={"every_steps": 2, "keep_last": 9},
        duration={"steps": 5},
    )
    assert [(info.step, bool(info.metrics)) for info in run.checkpoints()] == [
        (2, True),
        (4, True),
        (5, True),
    ]
    stream = RowStream(corpus.folder, corpus.manifest.key, 0, 8, 1, 8, 2, 0, 5, validate_every=2)
    assert [step for step in range(1, 6) if stream.validates_after(step)] == [2, 4, 5]
    remember_manifest(corpus.folder, corpus.manifest)
    assert not replace(stream).validates_after(2)


def test_a_run_that_finds_its_own_interval_says_so_and_goes_by_what_it_measured(
    tmp_path: Path, corpus: Corpus
) -> None:
    often = {"every_minutes": "auto", "every_steps": 2, "keep_last": 9}
    run = go(tmp_path, corpus, checkpoint=often, duration={"steps": 6})
    first, second, *_ = events(run, "save_interval")
    assert (first["measured"], second["measured"]) == (False, True)
    saves = events(run, "checkpoint")
    assert second["held_seconds"] == saves[0]["blocked_seconds"]
    assert second["commit_seconds"] == saves[0]["seconds"]
    assert "saves        every " in format_summary(run)
    again = go(tmp_path, corpus, checkpoint=often, duration={"steps": 8})
    told = [event for event in events(again, "save_interval") if event["attempt"] == 2]
    assert not told or told[0]["measured"]  # what the first attempt measured is kept
    go(tmp_path, corpus, checkpoint={"every_minutes": 7}, duration={"steps": 9})
    assert "saves   " not in format_summary(run)


def labelled_rows(folder: Path, held_out: list[int]) -> Corpus:
    """Rows of two classes to train on, and held-out ones of the classes that are given."""
    parts = [
        build_random_corpus(
            folder / name,
            [32],
            tokens=64,
            task=SequenceClassification(),
            values={"label": np.array(classes, np.int32)},
            labels=("0", "1"),
        )
        for name, classes in (("train", [0, 1]), ("held", held_out))
    ]
    (source,) = parts[1].manifest.train.sources
    shutil.copytree(folder / "held", folder / "train" / "held")
    shards = tuple(
        shard.model_copy(update={"file": f"held/{shard.file}"}) for shard in source.shards
    )
    held = parts[1].manifest.train.model_copy(
        update={"sources": (source.model_copy(update={"shards": shards}),)}
    )
    return Corpus(parts[0].folder, parts[0].manifest.model_copy(update={"validation": held}))


def train_labelled(storage: Path, corpus: Corpus, display: Remarks, **sections: Any) -> Run:
    tree = tiny_tree(
        Path("texts"),
        **{
            "task": "sequence_classification",
            "data": {"train": [{"path": "texts", "label": "label"}]},
            "checkpoint": {"every_steps": 1, "keep_last": 9},
            **sections,
        },
    )
    return train_locally(make_spec(tree), storage=str(storage), corpus=corpus, display=display).run


def test_an_undefined_metric_neither_stops_a_run_nor_ranks_its_checkpoints(tmp_path: Path) -> None:
    corpus, display = labelled_rows(tmp_path, [0]), Remarks()
    rule = {"metric": "auc", "every_steps": 1, "patience": 1, "max_rows": 8}
    run = train_labelled(tmp_path / "runs", corpus, display, validation=rule)
    assert [row["auc"] for row in run.validations()] == [None] * 6
    assert all(row["loss"] > 0 and row["recall"] is None for row in run.validations())
    assert [event["step"] for event in events(run, "metric_undefined")] == [1]
    assert sum("auc is undefined at step 1" in line for line in display.lines) == 1
    assert "auc undefined" in "\n".join(display.lines)
    assert "auc was undefined at step 1" in "\n".join(diagnose(run).notes)
    assert "auc undefined" in format_summary(run)
    with pytest.raises(StoreError, match="no sound checkpoint best"):
        choose_checkpoint(run, "best")
    assert evaluate(str(tmp_path / "runs"), run.name)["auc"] is None


def test_a_run_that_was_stopped_early_is_complete_until_it_gets_more_patience(
    tmp_path: Path,
) -> None:
    corpus, storage = labelled_rows(tmp_path, [0, 1]), tmp_path / "runs"

    def again(patience: int, display: Remarks) -> Run:
        rule = {"every_steps": 1, "patience": patience, "max_rows": 8}
        return train_labelled(
            storage,
            corpus,
            display,
            optimizer={"learning_rate": 1.0},
            duration={"steps": 40},
            validation=rule,
        )

    run = again(1, Remarks())
    stopped, remarks = run.latest_checkpoint(), Remarks()
    assert stopped is not None
    assert (stopped.step < 40, stopped.without_better) == (True, 1)
    assert again(1, remarks).latest_checkpoint() == stopped
    assert [line for line in remarks.lines if "is complete at step" in line] == [
        f"tiny is complete at step {stopped.step}: 1 validations in a row were no better; a larger "
        "validation.patience would go on"
    ]
    assert (len(run.attempts()), run.status) == (1, "completed")
    further = again(2, Remarks()).latest_checkpoint()
    assert further is not None
    assert further.step > stopped.step


def test_a_loss_that_is_not_finite_ends_a_run_by_its_numbers_and_not_in_its_metrics(
    tmp_path: Path,
) -> None:
    task, display = Regression(), Remarks()
    values = {"label": np.array([3e38], np.float32)}
    corpus = build_random_corpus(tmp_path / "rows", [32], tokens=64, task=task, values=values)
    held_out = corpus.manifest.model_copy(update={"validation": corpus.manifest.train})
    with pytest.raises(BadNumbers, match="the loss is not finite"):
        train_labelled(
            tmp_path / "runs",
            Corpus(corpus.folder, held_out),
            display,
            task="regression",
            numerics={"max_skipped_steps": 4},
            validation={"every_steps": 1, "patience": 1, "max_rows": 8},
        )
    run = Run.open(tmp_path / "runs", "tiny")
    assert [row["loss"] for row in run.validations()] == [None] * 3
    assert all(row["mae"] > 1e38 for row in run.validations())
    assert [event["reason"] for event in events(run, "metric_undefined")] == ["it is not finite"]
    assert sum("loss is undefined at step 1" in line for line in display.lines) == 1


def test_dropout_draws_anew_at_every_place_under_any_seed() -> None:
    from dray.rank.loop import make_dropout_seed

    places = [
        (seed, step, rank, micro)
        for seed in (0, 1, SEED)
        for step in (1, 2, 10**9)
        for rank in (0, 1, 4095)
        for micro in (0, 1, 2000)
    ]
    drawn = {make_dropout_seed(*place) for place in places}
    assert len(drawn) == len(places)
    assert len({value % 2**32 for value in drawn}) == len(
        places
    )  # all that a generator on the CPU takes of it
    assert all(0 <= value < 2**64 for value in drawn)


def test_a_storage_where_nothing_can_be_deleted_takes_checkpoints_all_the_same(
    s3_endpoint: str, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dray.storage.filesystem.SDK_ATTEMPTS", 1)

    def forbid_deletion(method: str, path: str) -> tuple[int, str] | None:
        deletes = method == "DELETE" or (method == "POST" and "delete" in path)
        return (403, "AccessDenied") if deletes and "checkpoints" in path else None

    target = s3_endpoint.partition("endpoint_override=")[2].partition("&")[0]
    with failing_proxy(target) as proxy:
        assert isinstance(proxy, FailingProxy)
        storage = f"s3://bucket/undeletable?endpoint_override={proxy.endpoint}&scheme=http&region=us-east-1"
        proxy.decide = forbid_deletion
        run = go(storage, corpus, checkpoint={"every_steps": 1, "keep_last": 1})
        assert run.latest_checkpoint().step == 4
        assert events(run, "checkpoint_failed") == []
        assert [event["step"] for event in events(run, "checkpoint")] == [1, 2, 3, 4]
        assert [event["step"] for event in events(run, "retention_failed")] == [2, 3, 4]


def test_a_step_that_is_read_one_step_later_gives_the_same_run(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, whose numbers are read once the next step has been queued."""
    sections: dict[str, Any] = {
        "checkpoint": {"every_steps": 3, "keep_last": 9},
        "duration": {"steps": 7},
    }
    at_once = go(tmp_path / "once", corpus, **sections)
    monkeypatch.setattr("dray.rank.loop.is_queued", lambda device: True)
    later = go(tmp_path / "later", corpus, **sections)
    assert steps_of(later) == steps_of(at_once) == [3, 6, 7]
    same = ("step", "loss", "grad_norm", "applied", "tokens", "rows_digest", "learning_rate")
    rows = [[{key: row[key] for key in same} for row in run.metrics()] for run in (at_once, later)]
    assert rows[0] == rows[1]
    ours, theirs = (verify_checkpoint(run, run.checkpoints()[-1]) for run in (later, at_once))
    assert (ours.weights_sha256, ours.optimizer_sha256) == (
        theirs.weights_sha256,
        theirs.optimizer_sha256,
    )


@pytest.mark.parametrize(
    ("name", "stage"),
    [("sgd", 2), ("lion", 1), ("adafactor", 0), ("muon", 0), ("adamw_8bit", 0), ("adamw", 3)],
)
def test_a_run_in_two_parts_is_the_whole_run_bit_for_bit(
    tmp_path: Path, corpus: Corpus, name: str, stage: int
) -> None:
    sections: dict[str, Any] = {
        "optimizer": {"name": name, "learning_rate": 1e-2},
        "zero": {"stage": stage},
        "regularization": {"ema": {"decay": 0.9}},
    }
    whole = go(tmp_path / "whole", corpus, **sections)
    go(tmp_path / "parts", corpus, duration={"steps": 2}, **sections)
    parts = go(tmp_path / "parts", corpus, **sections)
    assert [attempt.start_step for attempt in parts.attempts()] == [0, 2]
    ours, theirs = (verify_checkpoint(run, run.checkpoints()[-1]) for run in (parts, whole))
    assert ours.ok, ours.problems
    assert (ours.weights_sha256, ours.optimizer_sha256) == (
        theirs.weights_sha256,
        theirs.optimizer_sha256,
    )
    assert [row["loss"] for row in parts.metrics()] == [row["loss"] for row in whole.metrics()]


def test_an_average_is_evaluated_and_changes_nothing_else(tmp_path: Path, corpus: Corpus) -> None:
    held_out = corpus.manifest.model_copy(update={"validation": corpus.manifest.train})
    validated = Corpus(corpus.folder, held_out)
    sections: dict[str, Any] = {
        "optimizer": {"learning_rate": 1e-2},
        "duration": {"steps": 6},
        "validation": {"max_rows": None},
    }
    plain = go(tmp_path / "plain", validated, **sections)
    averaged = go(
        tmp_path / "averaged", validated, regularization={"ema": {"decay": 0.9}}, **sections
    )
    assert [row["loss"] for row in averaged.metrics()] == [row["loss"] for row in plain.metrics()]
    ours, theirs = (verify_checkpoint(run, run.checkpoints()[-1]) for run in (averaged, plain))
    assert ours.weights_sha256 == theirs.weights_sha256
    assert ours.optimizer_sha256 != theirs.optimizer_sha256
    storage = str(tmp_path / "averaged")
    trained, average = evaluate(storage, "tiny"), evaluate(storage, "tiny", weights="ema")
    assert trained["loss"] == pytest.approx(averaged.validations()[-1]["loss"], rel=1e-5)
    assert average["weights"] == "ema"
    assert abs(average["loss"] - trained["loss"]) > 1e-4
    model = load_trained(storage, "tiny", weights="ema").model
    with CheckpointReader(averaged, averaged.checkpoints()[-1]) as reader:
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.reshape(-1), reader.read(name, "ema"))
    with pytest.raises(StoreError, match=r"holds no average.*regularization\.ema.*--weights"):
        evaluate(str(tmp_path / "plain"), "tiny", weights="ema")


def test_a_step_without_an_update_is_found_out_one_step_later(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr("dray.rank.loop.is_queued", lambda device: True)
    with pytest.raises(BadNumbers, match="3 steps in a row"):
        go(
            tmp_path,
            corpus,
            optimizer={"learning_rate": 10.0, "weight_decay": 10.0},
            duration={"steps": 400},
            regularization={"clip_grad_norm": None},
            numerics={"max_skipped_steps": 3},
        )
    run = Run.open(tmp_path, "tiny")
    skipped = events(run, "step_skipped")
    assert len(skipped) == 3
    assert all(len(event["rows"]) == 8 for event in skipped)
    assert [row["step"] for row in run.metrics() if not row["applied"]] == [
        event["step"] for event in skipped
    ]


def damage(run: Run, step: int) -> Path:
    """Flip a bit in the rank's file of a checkpoint; its folder."""
    folder = next(Path(info.path) for info in run.checkpoints() if info.step == step)
    file = next(folder.glob("rank-*"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(bytes(content))
    return folder


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again(
    tmp_path: Path, corpus: Corpus
) -> None:

    run = go(tmp_path, corpus, checkpoint={"every_steps": 2})
    folders = [damage(run, step) for step in (2, 4)]
    longer: dict[str, Any] = {"duration": {"steps": 6}}
    for _ in folders:
        with pytest.raises(CheckpointDamaged):
            go(tmp_path, corpus, **longer)
    attempts = len(run.attempts())
    with pytest.raises(
        StoreError, match=r"none of its checkpoints can be used: step 2: set aside.*REJECTED.*--run"
    ):
        go(tmp_path, corpus, **longer)
    assert len(run.attempts()) == attempts
    assert all(folder.is_dir() for folder in folders)
    damage_undone = bytearray(next(folders[0].glob("rank-*")).read_bytes())
    damage_undone[-5] ^= 1
    next(folders[0].glob("rank-*")).write_bytes(bytes(damage_undone))
    Path(folders[0], "REJECTED").unlink()
    run = go(tmp_path, corpus, checkpoint={"every_steps": 1, "keep_last": 1}, **longer)
    assert run.attempts()[-1].start_step == 2
    assert steps_of(run) == [6]
    assert Path(folders[1], "REJECTED").exists(), "only a person deletes what was set aside"


def verify_badly(ranks: Ranks, storage: str, bad: list[int]) -> str:
    """How the check of a checkpoint ends where some ranks read a wrong bit."""
    from dray.rank.loop import verify_together
    from dray.runs import CheckpointReader

    run, read_at = Run.open(storage, "tiny"), RangeReader.read_at

    def misread(self: RangeReader, num_bytes: int, offset: int) -> bytes:
        content = read_at(self, num_bytes, offset)
        return bytes([content[0] ^ 1]) + content[1:] if content else content

    info = run.checkpoints()[-1]
    with CheckpointReader(run, info) as reader:
        if ranks.rank in bad:
            RangeReader.read_at = misread  # type: ignore[method-assign]
        try:
            verify_together(run, reader, ranks)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


def test_one_rank_that_reads_wrongly_condemns_no_checkpoint(
    tmp_path: Path, corpus: Corpus, host: RankHost
) -> None:
    run = go(tmp_path, corpus)
    assert host.run(verify_badly, 3, str(tmp_path), []) == [""] * 3
    said = host.run(verify_badly, 3, str(tmp_path), [0])
    assert all(text.startswith("ReadsDiffer") and "rank 0" in text for text in said)
    assert steps_of(run) == [4]
    said = host.run(verify_badly, 3, str(tmp_path), [0, 1, 2])
    assert all(text.startswith("CheckpointDamaged") for text in said)
    assert steps_of(run) == []
    assert [event["step"] for event in events(run, "checkpoint_set_aside")] == [4]


def wait_in_vain(ranks: Ranks) -> tuple[str, str]:
    """What a rank says that waits for another one in a collective of the model's, and in an
    agreement."""
    import time

    import torch
    import torch.distributed as dist

    gradients, aside = dist.new_group(), ranks.apart(1800)
    ranks.bound(compute_seconds=1, agree_seconds=1800)
    said = []
    for late, group in ((False, ranks.control), (False, aside.control), (True, gradients)):
        if ranks.rank == 1:
            time.sleep(4 if late else 2)
        try:
            dist.all_reduce(torch.ones(1), group=group)
            said.append("")
        except RuntimeError as error:
            said.append(str(error))
    time.sleep(0 if ranks.rank else 4)
    return said[0] + said[1], said[2]


def test_gradients_are_not_waited_for_as_long_as_rows(host: RankHost) -> None:
    (agreed, reduced), _ = host.run(wait_in_vain, 2)
    assert agreed == ""
    assert "imed out" in reduced


def test_gloo_takes_the_interface_of_the_nodes_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the one of the host's name, which on Debian is 127.0.1.1."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    choose_interface("192.0.2.99")  # nobody's
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    choose_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] in [name for _, name in socket.if_nameindex()]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "chosen")
    choose_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "chosen"
