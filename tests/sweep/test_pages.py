"""The pages of runs and sweeps: one file, whole, without network, and rendered by a browser."""

from __future__ import annotations

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dray.runs import Run, create_run
from dray.show.html import Page
from dray.show.plots import Line, draw_bars, draw_lines, draw_parallel, draw_points, draw_spans
from dray.show.run_page import POINTS, make_run_page, read_curves
from dray.sweep.events import Begun, Ended, Reported
from dray.sweep.importance import measure_importance
from dray.sweep.page import make_sweep_page
from dray.sweep.record import Sweep
from dray.sweep.search import Known
from dray.sweep.space import make_space
from sharded_model import PLAN, make_test_spec
from tiny import tiny_tree

VOID = {"meta", "link", "br"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Checked(HTMLParser):
    """Raises for tags that do not close, and keeps what would be fetched from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.fetched += [
            value
            for name, value in attrs
            if name in ("src", "href", "xlink:href")
            and value
            and not value.startswith(("#", "data:"))
        ]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check(html: str) -> Checked:
    checked = Checked()
    checked.feed(html)
    assert not checked.open
    assert not checked.fetched
    assert "script" not in checked.tags
    return checked


@pytest.fixture
def swept(tmp_path: Path) -> Sweep:
    """A sweep as its driver would have recorded it: twelve trials, some stopped, one failed."""
    tree = tiny_tree(Path("corpus"))
    space = make_space(
        {
            "parameters": {
                "optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]},
                "batch.global_rows": {"choice": [8, 16]},
                "schedule.name": {"choice": ["cosine", "<b>linear</b>"]},
            },
            "budget": {"trials": 12},
        }
    )
    sweep = Sweep.begin(str(tmp_path / "runs"), "swept", tree, space)
    scale = {"mode": "min", "total_steps": 9, "global_rows": 8, "seed": 0, "gpus": 1, "workers": 1}
    sweep.update(scale=scale, metric="loss", mode="min", status="completed", hours=0.5)
    for number in range(1, 13):
        rate = 1e-4 * 1.4**number
        drawn = {
            "optimizer.learning_rate": rate,
            "batch.global_rows": 8 * (1 + number % 2),
            "schedule.name": "cosine",
        }
        sweep.log(Begun(number, number - 1, 0, 1, drawn, drawn))
        if number == 5:
            sweep.log(Ended(number, "failed", cause="code", reason="raised <ValueError>"))
            continue
        last = 3 if number % 3 else 9
        for step in range(3, last + 1, 3):
            loss = 2.0 + abs(number - 8) / 4 + 1 / step
            sweep.log(
                Reported(number, step, float(step), loss, step * 512, step * 1.0, {"loss": loss})
            )
        sweep.log(
            Ended(number, "completed" if last == 9 else "pruned", last, last * 512, last * 1.0)
        )
    return sweep


@pytest.fixture
def trained(tmp_path: Path) -> Run:
    """A run of two attempts, with a metrics row that is not finite."""
    run = create_run(str(tmp_path / "runs"), "trained", make_test_spec(), PLAN)
    for attempt, (first, last) in enumerate(((1, 6), (5, 12)), 1):
        run.begin_attempt(2, first - 1)
        run.log_metrics(
            [
                {
                    "step": step,
                    "attempt": attempt,
                    "loss": None if step == 3 else 5 / step,
                    "learning_rate": 1e-3,
                    "grad_norm": float("nan") if step == 4 else 1.0,
                    "tokens": step * 100,
                    "tokens_per_second": 1000.0,
                    "seconds": 0.1,
                    "data_wait_seconds_max": 0.01,
                    "step_seconds_max": 0.1,
                    "memory_bytes_max": 1e8,
                }
                for step in range(first, last + 1)
            ]
        )
        run.log_event("attempt_failed", attempt=attempt, cause="killed")
    run.log_metrics(
        [{"kind": "validation", "step": 12, "attempt": 2, "loss": 0.5, "accuracy": 0.7}]
    )
    return run


def test_the_page_of_a_sweep_holds_what_was_found(swept: Sweep) -> None:
    html = make_sweep_page(swept).render()
    checked = check(html)
    words = " ".join(checked.text)
    for wanted in ("swept/0009", "Parallel coordinates", "Importance", "steps saved", "GPU hours"):
        assert wanted in words
    assert "raised <ValueError>" in words
    assert "<b>linear" not in html
    assert checked.tags.count("svg") >= 6


def test_the_page_of_a_run_holds_its_curves_and_attempts(trained: Run) -> None:
    checked = check(make_run_page(trained).render())
    words = " ".join(checked.text)
    for wanted in (
        "Gradient norm",
        "Waiting for data",
        "attempt 2, 2 ranks",
        "accuracy",
    ):
        assert wanted in words, wanted


def test_a_run_that_has_done_nothing_yet_has_a_page(tmp_path: Path) -> None:
    run = create_run(str(tmp_path / "runs"), "new", make_test_spec(), PLAN)
    assert "No step is done yet" in " ".join(check(make_run_page(run).render()).text)


def test_a_long_run_has_as_many_points_as_a_page_can_show(tmp_path: Path) -> None:
    run = create_run(str(tmp_path / "runs"), "long", make_test_spec(), PLAN)
    run.begin_attempt(1, 0)
    steps = 20 * POINTS
    for begin in range(0, steps, 1000):
        run.log_metrics(
            [
                {"step": step, "attempt": 1, "loss": float(step), "tokens": step, "seconds": 1.0}
                for step in range(begin + 1, begin + 1001)
            ]
        )
    curves = read_curves(run, steps, ("loss",))
    assert len(curves.steps) == POINTS
    assert curves.values["loss"][0] == pytest.approx(10.5)
    assert (curves.seconds, curves.tokens) == (steps, steps)


def test_nothing_to_draw_is_an_empty_text() -> None:
    assert draw_lines([Line("x", [1.0], [None])], x_label="", y_label="") == ""
    assert draw_bars([], [], [], x_label="") == ""
    assert draw_spans([], [], x_label="") == ""
    assert draw_parallel(["one"], [("0", "1")], [([0.5], 0.0)]) == ""
    assert draw_points({"a": []}, x_label="", y_label="", log_x=False) == ""


def test_what_a_page_says_is_escaped_and_has_no_secrets() -> None:
    page = Page("<i>")
    page.facts({"place": "s3://key:secret@bucket/x", "empty": ""})
    page.table(["a&b"], [["<td>"]])
    page.code("</pre>")
    html = page.render()
    assert "secret" not in html
    assert "<i>" not in html
    assert "a&amp;b" in html
    check(html)


def test_what_mattered_is_found_with_its_uncertainty() -> None:
    """A loss that one of three parameters decides."""
    space = make_space(
        {
            "parameters": {name: {"uniform": [0, 1]} for name in ("a", "b", "c")},
            "budget": {"trials": 1},
        }
    )
    values: list[dict[str, Any]] = [
        {"a": (n * 0.618) % 1, "b": (n * 0.414) % 1, "c": (n * 0.732) % 1} for n in range(40)
    ]
    found = measure_importance(space, [Known(v, (v["b"] - 0.3) ** 2, True) for v in values], "min")
    assert found[0].path == "b"
    assert found[0].share > 0.6
    assert 0 < found[0].deviation < 0.5
    assert measure_importance(space, [Known(values[0], 1.0, True)] * 3, "min") == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt install chromium")
def test_a_browser_renders_both_without_a_word(swept: Sweep, trained: Run, tmp_path: Path) -> None:
    from PIL import Image

    for name, page in (("sweep", make_sweep_page(swept)), ("run", make_run_page(trained))):
        file, picture = tmp_path / f"{name}.html", tmp_path / f"{name}.png"
        file.write_text(page.render())
        done = subprocess.run(
            [
                str(CHROMIUM),
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--enable-logging=stderr",
                "--window-size=1180,2000",
                f"--user-data-dir={tmp_path / 'profile'}",
                f"--screenshot={picture}",
                file.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert "CONSOLE" not in done.stderr
        with Image.open(picture) as image:
            colors = image.convert("RGB").getcolors(maxcolors=2**20)
        assert colors is not None
        assert len(colors) > 50, "the page is blank"
