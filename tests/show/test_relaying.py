"""Lines of a run elsewhere, shown as if it were here."""

from __future__ import annotations

import os
import pty
from pathlib import Path

from dray.show.progress import Display

LINES = [
    "training the tokeniser",
    "step 3/40  loss 6.2481  99 tokens/s  474 MB a rank",
    "step 20  validation  loss 5.1",
    "step 23/40  loss 5.1  99 tokens/s  474 MB a rank",
]


def relay(display: Display) -> None:
    with display.relaying() as show:
        for line in LINES:
            show(line)


def test_in_a_log_every_line_is_a_line(tmp_path: Path):
    path = tmp_path / "log"
    with path.open("w", encoding="utf-8") as stream:
        relay(Display(stream))
    assert path.read_text(encoding="utf-8").splitlines() == LINES


def test_on_a_terminal_steps_move_a_live_line():
    master, slave = pty.openpty()
    with os.fdopen(slave, "w", encoding="utf-8") as stream:
        relay(Display(stream))
        stream.flush()
        shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert LINES[0] in shown
    assert "step 20  validation" in shown
    assert "\x1b[?25l" in shown, "no live line: the cursor was not hidden"
    assert "━" in shown
    assert "step 23/40" in shown
