"""Texts from anybody, shown to a person: they neither steer the terminal, nor forge a line, nor
become a part of a page."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dray.cli import main
from dray.corpus.account import describe
from dray.corpus.manifest import LeftOut, SourceFile, load_manifest
from dray.errors import StoreError, visible
from dray.processes.streams import Results, warn
from dray.show.html import Page
from dray.show.plots import Line, draw_lines, draw_spans
from dray.show.progress import Display
from dray.storage.filesystem import open_filesystem

Refused = Callable[..., str]
STEERING = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202ereversed\u2066\r\x08\x7f\x85\u2028"
"""Sets a window's title, clears, colours, turns round, overwrites, ends lines."""
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
MARKUP = "</td></pre></svg><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"


def spoil(hostile: Path, text: str) -> None:
    """Put a text wherever a run keeps one."""
    run = hostile / "tiny"
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"status": "failed", "reason": text}))
    for folder in ("events", "attempts", "failures"):
        (run / folder).mkdir(exist_ok=True)
    for kind in ("attempt_failed", "loss_spike", text):
        row = {"time": "2026-01-01T00:00:00.000+00:00", "kind": kind, "cause": text, "error": text}
        with next((run / "events").glob("*.jsonl")).open("a") as file:
            file.write(json.dumps(row | {"attempt": 1, "step": 2, "message": text}) + "\n")
    failure = {"attempt": 1, "error": text, "message": text, "traceback": text, "cause": "code"}
    (run / "failures" / "a0001.json").write_text(json.dumps(failure))
    end = run / "attempts" / "0001-end.json"
    end.write_text(json.dumps(json.loads(end.read_text()) | {"status": text, "reason": text}))
    (run / "logs").mkdir(exist_ok=True)
    (run / "logs" / "a0001-r00000.log").write_text(f"Traceback\n{text}\nRuntimeError: {text}\n")
    for path in hostile.rglob("manifest.json"):
        tree = json.loads(path.read_text())
        if "train" in tree:
            tree["left_out"] = [
                {"reason": text, "num_files": 1, "num_bytes": 1, "examples": [text]}
            ]
            tree["dropped"] = {text: 3}
            tree["train"]["sources"][0]["name"] = text
            path.write_text(json.dumps(tree))
    for path in (run / "validation").glob("*.jsonl"):
        rows = [json.loads(line) | {f"$\\frac{text}$": 1.0} for line in path.open()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def check_page(html: str) -> None:
    found = _Tags()
    found.feed(html)
    assert not found.tags & {"script", "img", "iframe", "object", "embed", "form", "a", "base"}
    assert not {name for name in found.attributes if name.startswith("on")}
    assert "alert(1)" in html  # it is there, as text


def test_markup_in_a_report(hostile: Path):
    spoil(hostile, MARKUP)
    out = hostile / "report.html"
    assert main(["report", "tiny", "--storage", str(hostile), "--out", str(out)]) == 0
    check_page(out.read_text())


def test_markup_in_every_part_of_a_page():
    page = Page(MARKUP)
    page.facts({MARKUP: MARKUP})
    page.section(MARKUP, MARKUP)
    page.table([MARKUP], [[MARKUP]], best=0)
    page.code(MARKUP)
    line = [Line(MARKUP, [1, 2], [1, 2]), Line("b", [1, 2], [2, 1])]
    page.plots(
        [
            (MARKUP, draw_lines(line, x_label=MARKUP, y_label=f"$\\frac{MARKUP}$")),
            (
                MARKUP,
                draw_spans(
                    [(f"${MARKUP}$", 0, 1, "#000000")], [(0.5, MARKUP, "#000000")], x_label=MARKUP
                ),
            ),
        ]
    )
    check_page(page.render())


def test_signs_that_steer_a_terminal(hostile: Path, capsys: pytest.CaptureFixture[str]):
    spoil(hostile, STEERING)
    for command in ("show", "doctor", "runs"):
        words = [command, *(["tiny"] if command != "runs" else [])]
        assert main([*words, "--storage", str(hostile)]) == 0
        out, err = capsys.readouterr()
        assert not STEERS.search(out + err), (command, ascii(out))
        if command != "runs":
            assert "\\u001b[2J" in out
        assert main([*words, "--storage", str(hostile), "--json"]) == 0
        out = capsys.readouterr().out
        assert not STEERS.search(out)
        told = json.loads(out)
        if command == "show":
            assert told["reason"] == STEERING  # a program gets it as it is


def test_signs_that_steer_in_what_a_model_says(hostile: Path, capsys: pytest.CaptureFixture[str]):
    words = ["generate", "tiny", "--storage", str(hostile), "--prompt", f"a{STEERING}b"]
    assert main([*words, "--max-tokens", "2"]) == 0
    out, err = capsys.readouterr()
    assert not STEERS.search(out + err)
    assert "reversed" in out


def test_signs_that_steer_in_the_log_of_a_job(capsys: pytest.CaptureFixture[str]):
    """Of a cluster's job that somebody else may have written."""
    from dray.cli.submitting import _Listener

    out = io.StringIO()
    with Display().relaying() as show:
        listener = _Listener(Results(out), show, silent=False, leaves=False, arrived=True)
        listener.hear(f"from the cluster {STEERING}")
        listener.hear(f"dray-result: {STEERING}")
    told = capsys.readouterr().err + out.getvalue()
    assert not STEERS.search(told)
    assert told.count("reversed") == 2


def test_names_that_would_forge_a_line(
    refused: Refused, hostile: Path, capsys: pytest.CaptureFixture[str]
):
    name = "a\ndray: all is well\r\x1b[1A"
    assert "\\u001b" in refused("show", f"{name}/x", "--storage", "runs")
    error = StoreError(name, name, name, name)
    assert len(str(error).splitlines()) == 1
    assert error.where == name
    capsys.readouterr()
    warn(str(error))
    assert len(capsys.readouterr().err.splitlines()) == 1

    filesystem, path = open_filesystem(str(hostile / "tiny" / "corpus"))
    manifest = load_manifest(filesystem, path)
    left_out = LeftOut(reason=name, num_files=1, num_bytes=1, examples=(name,))
    file = SourceFile(path=name, num_bytes=0, sha256="", num_documents=0, num_bad=1, problem=name)
    for line in describe(manifest.model_copy(update={"left_out": (left_out,)}), [file]):
        Display().say(line)
    told = capsys.readouterr().err
    assert "all is well" in told
    assert not any(line.startswith("dray:") for line in told.splitlines())


@pytest.mark.parametrize(
    "text", ["tab\tand\nline", "e\u0301", "שלום עליכם", "می\u200cخواهم", "👩\u200d👧", "a\r\nb"]
)
def test_other_texts_stay_what_they_are(text: str):
    assert visible(text) == text


def test_results_for_programs_are_what_they_were():
    out = io.StringIO()
    tree: dict[str, Any] = {STEERING: [STEERING, MARKUP]}
    Results(out).say_json(tree)
    Results(out).say_record(tree)
    assert not STEERS.search(out.getvalue())
    first, _, second = out.getvalue().rstrip("\n").rpartition("\n")
    assert json.loads(first) == json.loads(second) == tree
