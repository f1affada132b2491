"""One rank's end as the rules see it: an error freed of wrappers and boilerplate, a signal, a log,
and its document.

Nothing is decided here but whether a rank died without a word, and whether it only saw another one
go.
"""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Any

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# Ray lists what may have happened, out-of-memory killers first, whatever did happen.
_GUESSES = re.compile(
    r"(?:Some common causes include|Possible reasons include|This can happen when)[^\n]*"
    r"(?:\n\t[^\n]*)*"
)
_ERROR_LINE = re.compile(
    r"^(?P<type>[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)|dray\.[\w.]+)"
    r"(?:: (?P<message>.*))?$",
    re.M,
)
_EMBEDDED_ERROR = re.compile(
    r"(?P<type>[A-Za-z_][\w.]*(?:Error|Exception|Interrupt)): (?P<message>.*)", re.S
)
_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+),? in (?P<function>.+)$', re.M)
_WRAPPERS = re.compile(
    r"(?:^|\.)(?:RayTaskError(?:\(.*\))?|TrainingFailedError|WorkerGroupError|ControllerError"
    r"|RunFailed|UserExceptionWithTraceback)$"
)

OWN_FILE = re.compile(r"(?:^|/)dray/(?:\w+/)?\w+\.py$")
"""A file of dray itself; a project that lies in a folder called dray has longer paths to what it
installed."""
LOOP_FILE, GROUP_FILE, DEVICE_FILE = (
    "dray/rank/loop.py",
    "dray/rank/group.py",
    "dray/rank/device.py",
)
CORPUS_FOLDER = "dray/corpus/"
"""Where stacks show the loop of a rank, its waits for others and for a GPU's queue, and the reading
of rows."""
LOST_TYPES = re.compile(
    r"(?:^|\.)(?:ActorDiedError|RayActorError|ActorUnavailableError|WorkerCrashedError"
    r"|NodeDiedError|LocalRayletDiedError|WorkerHealthCheck(?:Failed|Timeout)Error)$"
)
_LOST_TEXT = re.compile(
    r"The actor (?:died|is dead|is unavailable)|[Ww]orker (?:died unexpectedly|unexpectedly exits)"
    r"|no (?:further )?sign of life"
)

CONNECTION_LOST = re.compile(
    r"gloo/transport.*(?:Connection closed by peer|Read error|Write error|Connection reset|Broken "
    r"pipe)"
    r"|Application timeout caused pair closure|Gloo connectFullMesh failed"
    r"|Connection was likely closed\. Did the remote server shutdown or crash"
    r"|ncclRemoteError|NCCL communicator (?:was aborted|encountered error)|remote process has "
    r"terminated"
    r"|ncclSystemError.*(?:closed|reset|refused)",
    re.S,
)
COLLECTIVE_TIMEOUT = re.compile(
    r"gloo/transport.*Timed out waiting \d+ms|Rank (?P<missing>\d+) failed to pass monitoredBarrier"
    r"|successfully reached monitoredBarrier|Watchdog caught collective operation timeout|wait "
    r"timeout after \d+ms"
    r"|The collective operation timed out.*have not joined the collective operation: "
    r"\[(?P<missing_list>[\d, ]+)\]"
    r"|The client socket has timed out",
    re.S,
)


@dataclass(frozen=True)
class Case:
    """How one rank ended. `rank` is none for the driver; `exit` is a signal's name or `exit code
    N`."""

    rank: int | None = None
    node: str = ""
    pid: int | None = None
    step: int | None = None
    time: float | None = None
    phase: str = ""
    error_type: str = ""
    message: str = ""
    traceback: str = ""
    exit: str = ""
    memory_share: float | None = None
    """Of its node's memory, in use when it was last heard of."""
    on_purpose: bool = False
    """Whether it was one of dray's errors that end an attempt, whatever else fails beside it."""
    log: str = ""
    failure: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def text(self) -> str:
        """What is searched: the message and every error of the traceback's chain, without Ray's
        guesses."""
        chain = "\n".join(match[0] for match in _ERROR_LINE.finditer(self.traceback))
        return "\n".join(part for part in (self.message, chain) if part)

    @cached_property
    def frames(self) -> tuple[tuple[str, int, str], ...]:
        """(file, line, function) of the traceback, innermost last."""
        return parse_frames(self.traceback)

    @cached_property
    def lost(self) -> bool:
        """Whether the rank died, or fell silent, without an error of its own."""
        own = bool(self.error_type) and not LOST_TYPES.search(self.error_type)
        return not own and (
            bool(self.exit)
            or bool(LOST_TYPES.search(self.error_type))
            or bool(_LOST_TEXT.search(self.message))
        )

    @cached_property
    def symptom(self) -> bool:
        """Whether the rank only saw others go, or waited for them."""
        return not self.lost and bool(
            CONNECTION_LOST.search(self.text) or COLLECTIVE_TIMEOUT.search(self.text)
        )

    @property
    def error(self) -> str:
        """The error in a line: its type's name and the beginning of its message."""
        name = self.error_type.removeprefix("builtins.")
        lines = [line.strip() for line in self.message.splitlines() if line.strip()]
        said = shorten(lines[0]) if lines else ""
        return f"{name}: {said}" if name and said else name or said


def make_cases(
    failure: Mapping[str, Any], logs: Mapping[int, Sequence[str]] | None = None
) -> list[Case]:
    """The ranks of a failure's document; a document without ranks tells of the driver."""
    records = [record for record in failure.get("ranks") or [] if isinstance(record, Mapping)]
    if not records and any(failure.get(key) for key in ("error_type", "message", "reason")):
        records = [
            {**failure, "rank": None, "message": failure.get("message") or failure.get("reason")}
        ]
    return [_make_case(record, failure, logs or {}) for record in records]


def _make_case(
    record: Mapping[str, Any], failure: Mapping[str, Any], logs: Mapping[int, Sequence[str]]
) -> Case:
    rank, message, traceback = (
        record.get("rank"),
        _clean(record.get("message")),
        _clean(record.get("traceback")),
    )
    kind = str(record.get("error_type") or "")
    if _WRAPPERS.search(kind) or not kind:
        kind, message = _unwrap(kind, message)
    ip = re.search(r"^\tip: (\S+)$|\(IP: ([^,]+),", message, re.M)
    case = Case(
        rank=rank if isinstance(rank, int) else None,
        pid=make_whole(record.get("pid")),
        step=make_whole(record.get("step")),
        phase=str(record.get("phase") or ""),
        node=str(
            record.get("node")
            or record.get("host")
            or (next(filter(None, ip.groups())) if ip else "")
        ),
        time=make_seconds(record.get("time")),
        error_type=kind,
        message=message,
        traceback=traceback,
        exit=make_exit(record.get("exit")),
        memory_share=_make_share(record.get("memory_share")),
        on_purpose=bool(record.get("cause")),
        failure=failure,
        log="\n".join(logs.get(rank, ())) if isinstance(rank, int) else "",
    )
    return _first_of_chain(case)


def _first_of_chain(case: Case) -> Case:
    """An error raised while another one was handled: where the outer one is a symptom, the first
    one counts."""
    if not case.symptom:
        return case
    for match in _ERROR_LINE.finditer(case.traceback):
        first = replace(
            case,
            error_type=match["type"],
            message=match["message"] or "",
            traceback=case.traceback[: match.end()],
        )
        if not first.symptom:
            return first
    return case


def _unwrap(kind: str, message: str) -> tuple[str, str]:
    """The innermost error that a wrapper's text ends with: (type, message)."""
    found = list(_ERROR_LINE.finditer(message))
    if found:
        return found[-1]["type"], message[found[-1].start("message") :] if found[-1][
            "message"
        ] else ""
    embedded = _EMBEDDED_ERROR.search(message)
    return (embedded["type"], embedded["message"]) if embedded else (kind, message)


def _clean(value: Any) -> str:
    return _GUESSES.sub("", _COLOURS.sub("", str(value or ""))).strip()


def parse_frames(text: str) -> tuple[tuple[str, int, str], ...]:
    """(file, line, function) of every frame in a traceback or a stack dump, in the order of the
    text."""
    return tuple(
        (match["file"], int(match["line"]), match["function"].strip())
        for match in _FRAME.finditer(text)
    )


def make_exit(value: Any) -> str:
    """How a process ended, as a signal's name or `exit code N`; from names, negative codes, and a
    shell's 128 + N."""
    if value is None or value == "":
        return ""
    number = re.search(r"-?\d+", str(value))
    named = re.search(r"SIG[A-Z]+", str(value))
    if named or not number:
        return named[0] if named else str(value)
    code = int(number[0])
    code = -code if "signal" in str(value).lower() else code
    known = -code if code < 0 else code - 128
    try:
        return signal.Signals(known).name
    except ValueError:
        return f"exit code {code}"


def make_whole(value: Any) -> int | None:
    """A whole number of a record; none for anything else."""
    return int(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _make_share(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and 0 <= value <= 1 else None


def make_seconds(value: Any) -> float | None:
    """A time of a record (seconds since 1970, or ISO 8601) as seconds since 1970."""
    if isinstance(value, (int, float)):
        return float(value)
    try:
        return datetime.fromisoformat(value).timestamp()
    except (TypeError, ValueError):
        return None


def shorten(text: str, width: int = 240) -> str:
    """The text on one line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
