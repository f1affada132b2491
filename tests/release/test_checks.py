"""Checks of a file: each kind passes and fails as it says, and nothing hostile hangs or runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dray.errors import SpecError, StoreError
from dray.release import checks as module
from dray.release.checks import Check, grade, read_checks, run_checks, told_checks


def check(**expect: Any) -> Check:
    return Check.model_validate({"prompt": "p", "expect": expect})


@pytest.mark.parametrize(
    ("expect", "answer", "passes"),
    [
        ({"exact": "Paris"}, " Paris\n", True),
        ({"exact": "Paris"}, "paris", False),
        ({"regex": r"\d+ apples?"}, "12 apples", True),
        ({"regex": r"\d+ apples?"}, "I have 12 apples", False),
        ({"numeric": 12}, "3 + 9 = 12.0", True),
        ({"numeric": "1,200"}, "it is 1200", True),
        ({"numeric": 12}, "12, no, 13", False),
        ({"numeric": 3.14, "tolerance": 0.01}, "about 3.1416", True),
        ({"numeric": 3.14, "tolerance": 0.001}, "about 3.15", False),
        ({"numeric": 3.14, "tolerance": 1}, "no idea", False),
        ({"reward": "numeric", "value": "7"}, "7", True),
    ],
)
def test_an_answer_is_as_expected_or_not(expect: dict[str, Any], answer: str, passes: bool) -> None:
    assert grade(check(**expect), answer, None) == (passes, "")


def test_a_hostile_pattern_ends_in_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATTERN_SECONDS", 0.2)
    passed, note = grade(check(regex=r"(a|aa)+$b?c"), "a" * 200, None)
    assert not passed
    assert note == "the pattern took longer than 0.2 s"


PROGRAM = """
import os, time
print("a program may print")
def is_long(answer, wanted, prompt):
    return len(answer) > int(wanted)
def fails(answer, wanted, prompt):
    raise RuntimeError("no such thing")
def sleeps(answer, wanted, prompt):
    time.sleep(60)
def says(answer, wanted, prompt):
    return "yes"
def dies(answer, wanted, prompt):
    os._exit(3)
"""


def test_a_program_is_asked_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "p.py"
    program.write_text(PROGRAM, encoding="utf-8")
    asked = str(program)
    assert grade(check(program="is_long", value="3"), "four", asked) == (True, "")
    assert grade(check(program="is_long", value="4"), "four", asked) == (False, "")
    notes = {
        "fails": "fails failed: RuntimeError: no such thing",
        "dies": "dies failed: a program may print",
        "says": "says failed: ValueError: could not convert string to float: 'yes'",
    }
    for name, note in notes.items():
        assert grade(check(program=name), "x", asked) == (False, note)
    monkeypatch.setattr(module, "PROGRAM_SECONDS", 3.0)
    assert grade(check(program="sleeps"), "x", asked) == (False, "sleeps took longer than 3 s")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"checks.jsonl, line 2: is no JSON"),
        ('{"prompt": "p"}', r"line 2: expect: Field required"),
        ('{"expect": "x"}', r"line 2: .*a check has either prompt or messages"),
        ('{"prompt": "p", "expect": {}}', r"line 2: expect: .*one of exact, regex"),
        ('{"prompt": "p", "expect": {"exact": "a", "regex": "b"}}', r"one of exact, regex"),
        ('{"prompt": "p", "expect": {"regex": "("}}', r"line 2: its pattern is none"),
        ('{"prompt": "p", "expect": {"numeric": "x"}}', r"line 2: 'x' holds no number"),
        ('{"prompt": "p", "expect": {"reward": "none"}}', r"reward none: is not installed"),
        (
            '{"prompt": "p", "expect": {"program": "f"}}',
            r"code runs only from a file that you name",
        ),
        ('{"prompt": "p", "expect": {"program": "a.b"}}', r"is no name of a function"),
        ('{"prompt": "p", "expect": "x", "colour": 1}', r"colour: Extra inputs"),
        ('{"messages": [], "expect": "x"}', r"messages: List should have at least 1"),
        ("5", r"line 2: "),
    ],
)
def test_a_wrong_line_is_told_with_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "checks.jsonl"
    path.write_text('{"prompt": "p", "expect": "x"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(SpecError, match=message):
        read_checks(str(path), None)


def test_programs_are_looked_at_without_being_run(tmp_path: Path) -> None:
    path, program = tmp_path / "c.jsonl", tmp_path / "p.py"
    path.write_text('{"prompt": "p", "expect": {"program": "f"}}', encoding="utf-8")
    program.write_text("open('ran', 'w')\ndef g(a, w, p): return 1", encoding="utf-8")
    with pytest.raises(SpecError, match="has no function f"):
        read_checks(str(path), str(program))
    assert not (tmp_path / "ran").exists()
    program.write_text("def f(", encoding="utf-8")
    with pytest.raises(SpecError, match="is no Python"):
        read_checks(str(path), str(program))
    with pytest.raises(StoreError, match="cannot be read"):
        read_checks(str(path), str(tmp_path / "none.py"))
    with pytest.raises(StoreError, match="cannot be read"):
        read_checks(str(tmp_path / "none.jsonl"), None)
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(SpecError, match="holds no checks"):
        read_checks(str(path), None)


def test_outcomes_are_counted_by_kind_and_group(tmp_path: Path) -> None:
    path = tmp_path / "checks.jsonl"
    lines = [
        {"prompt": "1", "expect": "one", "group": "words"},
        {"prompt": "2", "expect": "two", "group": "words"},
        {"messages": [{"role": "user", "content": "3"}], "expect": {"numeric": 3}},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    asked: list[str] = []

    def write(prompts: Any) -> list[str]:
        asked.extend(prompts)
        return ["one", "three", "it is 3"]

    told = told_checks(run_checks(read_checks(str(path), None), write))
    assert asked == ["1", "2", '[{"role": "user", "content": "3"}]']
    assert (told["num"], told["passed"]) == (3, 2)
    assert told["groups"]["words"]["share"] == 0.5
    assert told["kinds"]["numeric"]["passed"] == 1
    assert [one["line"] for one in told["outcomes"] if not one["passed"]] == [2]
    assert 0.2 < told["low"] < told["share"] < told["high"] < 0.95  # Wilson: 0.208 to 0.939
