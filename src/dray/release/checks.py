"""What a model writes to prompts of a file, checked: against a text, a pattern, a number, an
installed reward, or a Python function of a file that the user names.

A file is data: it names functions of `--program FILE` alone, and code runs only from there, in a
process of its own with a time limit. A pattern that takes too long is a failed check, not a hang.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dray.errors import SpecError, StoreError, UserError, one_line
from dray.processes.imports import require_package
from dray.tasks.rewards import exact, find_reward, numeric, numeric_within

PATTERN_SECONDS = 1.0
PROGRAM_SECONDS = 10.0
MOST_CHECKS = 100_000
MOST_LINE_BYTES = 1_000_000
MOST_PROGRAM_BYTES = 64 * 1024
"""Of what a program prints that is kept, to say why it failed."""


class Expect(BaseModel):
    """What an answer is to be: one of these."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    exact: str | None = None
    """This text, white space around it aside."""
    regex: str | None = None
    """A pattern that matches the whole answer, white space around it aside."""
    numeric: float | str | None = None
    """The last number in the answer is this one."""
    tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """How far off that number may be."""
    reward: str | None = None
    """A reward of an installed package, by name, is above 0."""
    program: str | None = None
    """A function of `--program FILE`, given answer, value and prompt, gives True or a number above
    0."""
    value: str = ""
    """What the program or the reward is told was wanted."""

    @model_validator(mode="after")
    def _one(self) -> Expect:
        if len(self._given) != 1:
            raise ValueError("expect has one of exact, regex, numeric, reward, program")
        if self.tolerance and self.numeric is None:
            raise ValueError("tolerance is of numeric")
        if self.value and self.program is None and self.reward is None:
            raise ValueError("value is of program or reward")
        if self.program is not None and not self.program.isidentifier():
            raise ValueError(f"program = {self.program!r} is no name of a function")
        return self

    @property
    def _given(self) -> list[str]:
        names = ("exact", "regex", "numeric", "reward", "program")
        return [name for name in names if getattr(self, name) is not None]

    @property
    def kind(self) -> str:
        """Which of them it is."""
        return self._given[0]


class Check(BaseModel):
    """A line of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    """A conversation whose answer is asked for, in the place of `prompt`."""
    expect: Expect
    group: str = ""
    """Whose share of passed checks is told by itself."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("expect"), str):
            return {**given, "expect": {"exact": given["expect"]}}
        return given

    @model_validator(mode="after")
    def _asked(self) -> Check:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("a check has either prompt or messages")
        return self

    @property
    def text(self) -> str:
        """What the model is asked: a conversation as JSON."""
        return json.dumps(self.messages) if self.prompt is None else self.prompt


@dataclass(frozen=True)
class Outcome:
    """How a check ended: `note` says why, where an answer could not be judged."""

    line: int
    check: Check
    answer: str
    passed: bool
    note: str = ""

    def told(self) -> dict[str, Any]:
        """As JSON."""
        found = {"line": self.line, "kind": self.check.expect.kind, "passed": self.passed}
        found |= {"prompt": self.check.text, "answer": self.answer}
        return found | ({"note": self.note} if self.note else {})


def read_checks(path: str, program: str | None) -> list[tuple[int, Check]]:
    """The checks of a file with their lines' numbers; empty lines are none. All of them are looked
    at before a model is: patterns compile, rewards are installed, functions are in the program.
    Raises SpecError, StoreError for a file that cannot be read."""
    found: list[tuple[int, Check]] = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    found.append((number, _parse(f"{path}, line {number}", line)))
                if len(found) > MOST_CHECKS:
                    raise SpecError(path, f"holds more than {MOST_CHECKS:,} checks", "cut it")
    except OSError as error:
        raise StoreError(path, f"cannot be read ({error.strerror or error})") from error
    if not found:
        raise SpecError(path, "holds no checks", 'a line is {"prompt": …, "expect": …}')
    names = set() if program is None else _functions(program)
    for number, check in found:
        _look_at(f"{path}, line {number}", check.expect, program, names)
    return found


def _parse(where: str, line: bytes) -> Check:
    if len(line) > MOST_LINE_BYTES:
        raise SpecError(where, f"has {len(line):,} bytes", f"at most {MOST_LINE_BYTES:,}")
    try:
        return Check.model_validate(json.loads(line))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        what = f"{place}: {first['msg']}" if place else str(first["msg"])
        raise SpecError(where, what, "a check has prompt or messages, and expect") from error
    except (ValueError, RecursionError) as error:
        raise SpecError(where, f"is no JSON ({one_line(error)})", "a line is one object") from error


def _look_at(where: str, expect: Expect, program: str | None, names: set[str]) -> None:
    """Raises SpecError for what no answer could be checked by."""
    if expect.kind == "regex":
        regex = _regex()
        try:
            regex.compile(expect.regex)
        except regex.error as error:
            raise SpecError(where, f"its pattern is none ({error})") from error
    elif expect.kind == "numeric":
        try:
            numeric_within("", str(expect.numeric), 0.0)
        except ValueError as error:
            raise SpecError(where, str(error), "numeric is a number") from error
    elif expect.kind == "reward":
        find_reward(str(expect.reward))
    elif expect.kind == "program":
        if program is None:
            raise SpecError(
                where,
                f"asks for the function {expect.program}",
                "code runs only from a file that you name",
                "give --program FILE.py",
            )
        if expect.program not in names:
            raise SpecError(where, f"{program} has no function {expect.program}")


def _functions(path: str) -> set[str]:
    """Names of a program's own functions, without running it. Raises SpecError, StoreError."""
    import ast

    try:
        with open(path, "rb") as file:
            tree = ast.parse(file.read(), path)
    except OSError as error:
        raise StoreError(path, f"cannot be read ({error.strerror or error})") from error
    except (SyntaxError, ValueError) as error:
        raise SpecError(path, f"is no Python ({one_line(error)})") from error
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def run_checks(
    checks: Sequence[tuple[int, Check]],
    write: Callable[[Sequence[str]], Sequence[str]],
    program: str | None = None,
) -> list[Outcome]:
    """Ask a model by all prompts at once, and check what it writes. Raises what `write` does."""
    answers = write([check.text for _, check in checks])
    found = []
    for (line, check), answer in zip(checks, answers, strict=True):
        passed, note = grade(check, answer, program)
        found.append(Outcome(line, check, answer, passed, note))
    return found


def grade(check: Check, answer: str, program: str | None) -> tuple[bool, str]:
    """Whether an answer is as expected; and why it could not be judged, where that is so: then it
    counts as failed."""
    expect, prompt = check.expect, check.text
    if expect.kind == "exact":
        return exact(answer, str(expect.exact), prompt) > 0, ""
    if expect.kind == "numeric":
        if not expect.tolerance:
            return numeric(answer, str(expect.numeric), prompt) > 0, ""
        return numeric_within(answer, str(expect.numeric), expect.tolerance), ""
    if expect.kind == "regex":
        return _matches(str(expect.regex), answer)
    if expect.kind == "program":
        return run_program(str(program), str(expect.program), answer, expect.value, prompt)
    try:
        return find_reward(str(expect.reward))(answer, expect.value, prompt) > 0, ""
    except UserError:
        raise
    except Exception as error:  # another package's code
        return False, f"the reward failed: {type(error).__name__}: {one_line(error)}"


def _matches(pattern: str, answer: str) -> tuple[bool, str]:
    regex = _regex()
    try:
        found = regex.fullmatch(pattern, answer.strip(), timeout=PATTERN_SECONDS)
    except TimeoutError:
        return False, f"the pattern took longer than {PATTERN_SECONDS:g} s"
    return found is not None, ""


def _regex() -> Any:
    """The one matcher that stops when its time is over."""
    require_package("regex", "train", "a pattern with a time limit")
    import regex

    return regex


_RUNNER = """
import importlib.util, json, sys
path, name = sys.argv[1:]
given = json.load(sys.stdin)
kept, sys.stdout = sys.stdout, sys.stderr
spec = importlib.util.spec_from_file_location("checked_program", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
value = getattr(module, name)(given["answer"], given["wanted"], given["prompt"])
print(json.dumps(float(value)), file=kept)
"""


def run_program(path: str, name: str, answer: str, wanted: str, prompt: str) -> tuple[bool, str]:
    """A function of a file, called in a process of its own; whether it gave True or a number above
    0, and why it gave none."""
    process = subprocess.Popen(
        [sys.executable, "-c", _RUNNER, os.path.abspath(path), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # so that what it starts ends with it
    )
    given = json.dumps({"answer": answer, "wanted": wanted, "prompt": prompt}).encode()
    try:
        out, err = process.communicate(given, timeout=PROGRAM_SECONDS)
    except subprocess.TimeoutExpired:
        _end(process)
        return False, f"{name} took longer than {PROGRAM_SECONDS:g} s"
    except BaseException:
        _end(process)
        raise
    if process.returncode:
        said = err[-MOST_PROGRAM_BYTES:].decode(errors="replace").strip().splitlines()
        return False, f"{name} failed: {said[-1] if said else f'exit {process.returncode}'}"
    try:
        return float(json.loads(out)) > 0, ""
    except (ValueError, TypeError):
        return False, f"{name} gave no number"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and what it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.communicate()


def told_checks(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """`num`, `passed`, `share` with the 95 % Wilson interval of it, the same by kind and by group,
    and all outcomes."""
    kinds: dict[str, list[Outcome]] = {}
    groups: dict[str, list[Outcome]] = {}
    for one in outcomes:
        kinds.setdefault(one.check.expect.kind, []).append(one)
        if one.check.group:
            groups.setdefault(one.check.group, []).append(one)
    return {
        **_share(outcomes),
        "kinds": {name: _share(own) for name, own in sorted(kinds.items())},
        **({"groups": {name: _share(own) for name, own in sorted(groups.items())}} if groups
           else {}),
        "outcomes": [one.told() for one in outcomes],
    }  # fmt: skip


def _share(outcomes: Sequence[Outcome]) -> Mapping[str, Any]:
    from scipy.stats import binomtest

    num, passed = len(outcomes), sum(one.passed for one in outcomes)
    between = binomtest(passed, num).proportion_ci(0.95, method="wilson")
    interval = {"low": float(between.low), "high": float(between.high)}
    return {"num": num, "passed": passed, "share": passed / num, **interval}
