"""A run's newest checkpoint is not what it was; the one before is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from harness import EVERY, causes, copy_storage, make_case

from dray.runs import Run
from dray.runs.layout import MARKER_FILE
from dray.spec import make_spec
from dray.train.driver import train


@pytest.fixture(scope="module")
def half_done(storage: str, tiny_corpus: Path, local_ray: None) -> str:
    """The name of a run that ended at its second checkpoint."""
    train(
        make_spec(make_case(tiny_corpus, duration={"steps": 2 * EVERY})),
        storage=storage,
        run_name="half",
    )
    return "half"


def truncate(folder: Path) -> None:
    file = rank_file(folder)
    with file.open("rb+") as stream:
        stream.truncate(file.stat().st_size // 2)


def remove(folder: Path) -> None:
    rank_file(folder).unlink()


def remove_marker(folder: Path) -> None:
    (folder / MARKER_FILE).unlink()


def flip_a_bit(folder: Path) -> None:
    file = rank_file(folder)
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(bytes(content))


def rank_file(folder: Path) -> Path:
    return next(folder.glob("rank-*.safetensors"))


@pytest.mark.parametrize(
    ("damage", "recorded"),
    [
        pytest.param(truncate, [], id="truncated", marks=pytest.mark.slow),
        pytest.param(remove, [], id="without-a-rank's-file", marks=pytest.mark.slow),
        pytest.param(remove_marker, [], id="without-its-marker", marks=pytest.mark.slow),
        pytest.param(flip_a_bit, ["checkpoint"], id="with-one-bit-flipped", marks=pytest.mark.slow),
    ],
)
def test_the_newest_checkpoint_is_damaged(
    damage: Callable[[Path], None],
    recorded: list[str],
    storage: str,
    half_done: str,
    tiny_corpus: Path,
    undisturbed: Run,
    measured,
    tmp_path: Path,
):
    """the newest checkpoint {id}"""
    copied = copy_storage(storage, tmp_path / "runs", half_done)
    damage(Path(Run.open(copied, half_done).latest_checkpoint().path))
    run = train(make_spec(make_case(tiny_corpus)), storage=copied, run_name=half_done).run
    measured(run, undisturbed)
    assert causes(run) == recorded
    # Only reading it shows a flipped bit: an attempt starts from it, and sets it aside.
    assert [attempt.start_step for attempt in run.attempts()] == [
        0,
        *([2 * EVERY] * len(recorded)),
        EVERY,
    ]
    aside = [event for event in run.events() if event["kind"] == "checkpoint_set_aside"]
    assert [event["step"] for event in aside] == [2 * EVERY] * len(recorded)
    assert all("checksum" in event["reason"] for event in aside)
