"""Specs from anybody: YAML that runs nothing, unfolds to nothing large, and is read in no time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Refused = Callable[..., str]
SECONDS = 5.0
"""More than any of these takes; without a bound they take minutes, or all of the memory."""


def plan(refused: Refused, folder: Path, text: str | bytes) -> str:
    """The line with which a spec of that content is refused, soon."""
    content = text.encode() if isinstance(text, str) else text
    (folder / "hostile.yaml").write_bytes(content)
    begun = time.monotonic()
    line = refused("plan", "hostile.yaml")
    assert time.monotonic() - begun < SECONDS
    assert len(line) < 1000
    return line


def chain(first: str, later: str, rounds: int) -> str:
    """Anchors each of which names the one before it ten times."""
    lines = [f"a0: &a0 {first}"]
    for number in range(rounds):
        many = ", ".join([f"*a{number}"] * 10)
        lines.append(f"a{number + 1}: &a{number + 1} {later.format(many)}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system [touch pwned]",
        "!!python/object/new:subprocess.Popen [[touch, pwned]]",
        "!!python/name:os.system",
        "!!python/module:antigravity",
        '!!python/object/apply:builtins.exec [\'open("pwned", "w")\']',
        "!include /etc/passwd",
        "!ENV HOME",
    ],
)
def test_tags_that_would_run_code(refused: Refused, tmp_path: Path, tag: str):
    line = plan(refused, tmp_path, f"name: x\nseed: {tag}\n")
    assert "could not determine a constructor" in line
    assert not (tmp_path / "pwned").exists()
    assert "could not determine" in refused("plan", "quickstart", f"seed={tag}")


def test_aliases_that_unfold_without_end(refused: Refused, tmp_path: Path):
    line = plan(refused, tmp_path, chain("[x, x]", "[{}]", 12))
    assert "holds more than 100,000 values, its aliases unfolded" in line
    assert "nested deeper" in plan(refused, tmp_path, "name: &a [*a, *a]\n")
    assert "nested deeper" in plan(refused, tmp_path, "name: &a {b: *a}\n")


def test_merges_that_unfold_without_end(refused: Refused, tmp_path: Path):
    first = "{" + ", ".join(f"k{number}: 1" for number in range(10)) + "}"
    line = plan(refused, tmp_path, chain(first, "{{<<: [{}]}}", 12))
    assert "holds more than 100,000 values, its merges unfolded" in line
    plan(refused, tmp_path, "name: &a {<<: *a, b: 1}\n")


def test_nesting_without_end(refused: Refused, tmp_path: Path):
    for text in ("[" * 100_000, "{a: " * 100_000, "- " * 100_000, "? " * 100_000):
        assert "nested deeper than 50 levels" in plan(refused, tmp_path, text)


@pytest.mark.parametrize(
    "number",
    [
        "9" * 101,
        "9" * 100_000,
        "0x" + "f" * 100_000,
        "0b" + "1" * 100_000,
        "1" + ":59" * 100_000,
        "1" + ":59" * 100_000 + ".5",
        "1." + "0" * 100_000,
    ],
)
def test_numbers_without_end(refused: Refused, tmp_path: Path, number: str):
    assert "a number of more than 100 signs" in plan(refused, tmp_path, f"seed: {number}")
    assert "a number of more than 100 signs" in refused("plan", "quickstart", f"seed={number}")


@pytest.mark.parametrize("number", ["1e999", ".inf", ".nan", "9" * 99, "-1", "1_000e3"])
def test_numbers_out_of_range(refused: Refused, number: str):
    for key in ("seed", "batch.global_rows", "optimizer.learning_rate", "model.hidden_size"):
        if (key, number) != ("optimizer.learning_rate", "9" * 99):  # a rate, if a foolish one
            refused("plan", "quickstart", f"{key}={number}")


def test_a_key_that_stands_twice(refused: Refused, tmp_path: Path):
    line = plan(refused, tmp_path, "name: x\nseed: 1\nseed: 2\n")
    assert "the key seed stands twice, in lines 2 and 3" in line
    assert "stands twice" in plan(refused, tmp_path, "base: &b {a: 1}\n<<: *b\n<<: *b\n")


def test_what_hides_behind_a_spec(refused: Refused, tmp_path: Path):
    for text, said in (
        (b"name: x\n---\nname: y\n", "another document"),
        (b"name: \xff\xfe", "is not UTF-8"),
        (b"name: x\0y\n", "special characters"),
        (b'name: "x\\0y"\n', "no file name can hold"),
        (b'name: "\\ud800"\n', "no file name can hold"),
        (b"%YAML 9.9\n---\nname: x\n", "not YAML"),
        (b"name: x\n" + b"#" * 5_000_000, "holds more than 4 MiB"),
        (b"[name, x]\n", "holds a list"),
        (b"", "is empty"),
    ):
        assert said in plan(refused, tmp_path, text)


@pytest.mark.timeout(60)
def test_files_that_never_end(refused: Refused, tmp_path: Path):
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    assert "holds more than 4 MiB" in refused("plan", "zero.yaml")
    (tmp_path / "folder.yaml").mkdir()
    assert "is a folder" in refused("plan", "folder.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    refused("plan", "loop.yaml")


@pytest.mark.parametrize(
    "override",
    [
        "task=os.system",
        "task={name: ../../x}",
        "task={name: causal_lm, __class__: x}",
        "model={architecture: __import__('os').system('touch pwned')}",
        "model={architecture: ../../evil}",
        "optimizer.name=builtins.eval",
        "schedule.name=os",
        "tracking={tensorboard: '$(touch pwned)'}",
        "__class__.__init__=1",
        "model.__dict__=1",
        "model={path: 'hf://../../x'}",
        "model={path: 'file:///etc'}",
        "tokenizer={path: 'python:../../etc'}",
    ],
)
def test_words_that_would_be_code_or_places(refused: Refused, tmp_path: Path, override: str):
    refused("plan", "quickstart", override)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "override",
    [
        "data.train=s3://AKIDEXAMPLEKEY:CANARY42secret@bucket/x.bad",
        "data.train=https://bucket/x.bad?X-Amz-Signature=CANARY42secret",
        "batch={password: CANARY42secret}",
        "name=postgresql://me:CANARY42secret@host/x",
        "seed=hf_CANARY42secretCANARY42secret",
        "token=hf_CANARY42secretCANARY42secret",
    ],
)
def test_secrets_in_a_spec_are_in_no_error(refused: Refused, tmp_path: Path, override: str):
    assert "CANARY42" not in refused("plan", "quickstart", override, "batch.global_rows=-1")
    key, _, value = override.partition("=")
    assert "CANARY42" not in plan(refused, tmp_path, f"{key}: {value}\nnonsense: 1\n")


def test_the_environment_stays_out_of_a_spec(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Nothing is put into a spec from the environment, whatever form it is asked for in."""
    monkeypatch.setenv("SOME_WORD", "canary42")
    for form in ("$SOME_WORD", "${SOME_WORD}", "{{ env.SOME_WORD }}", "%SOME_WORD%", "~$SOME_WORD"):
        assert "canary42" not in plan(refused, tmp_path, f"name: '{form}'\n")
        assert "canary42" not in refused("plan", "quickstart", f"model={{path: '{form}'}}")
    assert os.environ["SOME_WORD"] == "canary42"
