"""The ends of a command: what standard output and standard error get, whatever they are and
whatever went wrong."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dray import cli
from dray.cli import main
from dray.errors import Interrupted
from dray.processes.signals import Stopped, Wishes, stops
from dray.processes.streams import Forgiving, Results


def run(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line of shell in which `dray` is this one."""
    return subprocess.run(
        ["bash", "-c", f'dray() {{ "{sys.executable}" -m dray.cli "$@"; }}; {command}'],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_terminal_that_takes_ascii_alone_gets_other_signs(tmp_path: Path):
    done = run("dray --help && dray plan quickstart", tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "raw corpus -> token shards" in done.stdout
    assert done.stdout.isascii()


def test_numbers_that_json_has_no_words_for_are_null():
    document = {"a": [math.nan, 1.5, (math.inf,)], "b": {"c": -math.inf, "d": None}, "e": Path("x")}
    stream = io.StringIO()
    Results(stream).say_json(document)
    Results(stream).say_record(document)
    whole, _, record = stream.getvalue().rstrip().rpartition("\n")

    def refuse(word: str) -> None:
        raise AssertionError(word)

    for text in (whole, record):
        assert json.loads(text, parse_constant=refuse) == {
            "a": [None, 1.5, [None]],
            "b": {"c": None, "d": None},
            "e": "x",
        }


def test_json_stays_json_in_ascii(tmp_path: Path):
    done = run("dray plan quickstart name=x --json", tmp_path, PYTHONIOENCODING="ascii")
    assert json.loads(done.stdout)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (
            "dray plan quickstart >/dev/full",
            2,
            "dray: standard output: cannot be written (No space left on device)",
        ),
        (
            "dray --help >/dev/full",
            2,
            "dray: standard output: cannot be written (No space left on device)",
        ),
        ("dray plan quickstart >&-", 0, ""),
        ("dray plan quickstart >&- 2>&- <&-", 0, ""),
        ("dray plan nowhere 2>&-", 2, ""),
        ("dray plan nowhere 2>/dev/full", 2, ""),
        ("dray plan quickstart --json | true; exit ${PIPESTATUS[0]}", 0, ""),
        ("mkdir x; cd x; rmdir ../x; dray runs", 2, "dray: the working directory: cannot be used"),
        ("dray plan $(printf 'a\\xff')", 2, "dray: 'a\\udcff': is not UTF-8"),
    ],
)
def test_streams_and_folders_that_are_not_there(
    tmp_path: Path, command: str, code: int, message: str
):
    done = run(command, tmp_path)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == bool(message)


def test_without_a_home_nothing_is_missing(tmp_path: Path):
    done = run(
        "unset HOME; dray plan quickstart >/dev/null",
        tmp_path,
        LC_ALL="POSIX",
        PYTHONUTF8="0",
        PYTHONCOERCECLOCALE="0",
        TMPDIR="/nowhere",
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_libraries_print_is_no_result(tmp_path: Path):
    code = (
        "import os, sys; from dray import cli\n"
        "def noisy(arguments):\n"
        "    print('by Python'); os.write(1, b'by C\\n'); arguments.out.say_json({'a': 1}); "
        "return 0\n"
        "cli.parser.runs_command = noisy; sys.exit(cli.main(['runs', '--json']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert json.loads(done.stdout) == {"a": 1}
    assert sorted(done.stderr.splitlines()) == ["by C", "by Python"]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyError("x\ny"), 3, "KeyError: 'x\\ny'; this was not foreseen; the traceback is in "),
        (OSError(28, "No space left on device", "/tmp/x"), 2, "/tmp/x: No space left on device; "),
        (MemoryError(), 3, "out of memory; "),
        (KeyboardInterrupt(), 130, "interrupted by SIGINT"),
        (Stopped(signal.SIGTERM), 143, "interrupted by SIGTERM"),
        (Interrupted(0, signal.SIGHUP), 129, "interrupted by SIGHUP; nothing had been saved yet"),
        (
            ValueError("s3://me:hidden-word@bucket is bad"),
            3,
            "ValueError: s3://***@bucket is bad; ",
        ),
    ],
)
def test_an_error_that_nobody_foresaw_is_one_line(
    tmp_path: Path, monkeypatch: Any, capsys: Any, error: BaseException, code: int, message: str
):
    def fail(arguments: Any) -> int:
        raise error

    monkeypatch.setattr(cli.parser, "runs_command", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["runs"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"dray: {message}")
    assert len(err.splitlines()) == 1
    for log in tmp_path.glob("dray-error-*.log"):
        assert "Traceback" in log.read_text()
        assert "hidden-word" not in log.read_text()
        assert log.stat().st_mode & 0o077 == 0


def test_a_signal_ends_a_command_in_one_line(tmp_path: Path):
    """A named pipe that nobody writes to: the command waits for it."""
    fifo = tmp_path / "spec.yaml"
    os.mkfifo(fifo)
    process = subprocess.Popen(
        [sys.executable, "-m", "dray.cli", "plan", str(fifo)], stderr=subprocess.PIPE, text=True
    )
    writer, deadline = -1, time.monotonic() + 60
    while writer < 0 and time.monotonic() < deadline:
        try:
            writer = os.open(
                fifo, os.O_WRONLY | os.O_NONBLOCK
            )  # there is none before the command reads
        except OSError:
            time.sleep(0.05)
    process.terminate()
    _, err = process.communicate(timeout=60)
    os.close(writer)
    assert (process.returncode, err) == (143, "dray: interrupted by SIGTERM\n")


@pytest.fixture
def hangs_up() -> Iterator[None]:
    """SIGHUP ends this process, though it may have been started by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangs_up")
def test_the_first_wish_may_be_noted_and_the_second_raises():
    with stops() as outer:
        with stops(noted=True) as wishes:
            assert wishes is outer
            signal.raise_signal(signal.SIGTERM)
            assert wishes.numbers == [signal.SIGTERM]
            with pytest.raises(Stopped, match="SIGHUP"):
                signal.raise_signal(signal.SIGHUP)
        assert not outer.noting
    assert not isinstance(signal.getsignal(signal.SIGTERM), Wishes)


def test_nohup_is_heeded():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stops():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_gone_takes_words_all_the_same():
    with open("/dev/full", "wb", buffering=0) as raw:
        full = io.TextIOWrapper(io.BufferedWriter(raw, 1), write_through=True)
        with pytest.raises(OSError, match="No space"):
            full.write("word")
        Forgiving(full).write("word")
        Forgiving(full).flush()
        with suppress(OSError):
            full.close()
