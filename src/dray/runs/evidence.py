"""What a run keeps of its failures: one document a failed attempt, and each rank's last words,
stacks and heartbeat.

Ranks and the driver write, `dray.doctor` reads. Evidence is for people: what is damaged or missing
is left out, and never stands in the way of a run or of its diagnosis. Texts are freed of secrets
before they are kept: others may read the storage.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from dray.errors import RankError, StoreError
from dray.redaction import redact, redact_fields
from dray.runs.layout import (
    BEATS,
    FAILURES,
    LOGS,
    STACKS,
    RunFolder,
    make_failure_file,
    make_rank_evidence,
    parse_failure_file,
    parse_rank_evidence,
)
from dray.runs.records import Failure, RankFailure
from dray.runs.row_log import load_json, make_json
from dray.storage.filesystem import list_files, write_bytes

TAIL_BYTES = 64 * 1024
_INNER = ("health_check_failure", "controller_failure", "_base_exc", "cause")
"""Where Ray's wrappers keep the error that a person wants to read."""


def log_path(run: RunFolder, attempt: int, rank: int) -> str:
    """Where a rank's last lines are kept."""
    return f"{run.path}/{LOGS}/{make_rank_evidence(attempt, rank, 'log')}"


def stack_path(run: RunFolder, attempt: int, rank: int) -> str:
    """Where the stacks of a rank's threads are kept."""
    return f"{run.path}/{STACKS}/{make_rank_evidence(attempt, rank, 'txt')}"


def beat_path(run: RunFolder, attempt: int, rank: int) -> str:
    """Where a rank's last heartbeat is kept."""
    return f"{run.path}/{BEATS}/{make_rank_evidence(attempt, rank, 'json')}"


# ---- writing -----------------------------------------------------------------------------------


def save_failure(run: RunFolder, failure: Failure) -> None:
    """Keep what is known of a failed attempt, replacing what was known before."""
    path = f"{run.path}/{FAILURES}/{make_failure_file(failure.attempt)}"
    document = redact_fields(failure.to_json())
    write_bytes(run.filesystem, path, make_json(document, indent=1) + b"\n")


def make_rank_failure(
    rank: int | None, error: BaseException | None = None, **fields: Any
) -> RankFailure:
    """How one rank ended: its error, freed of Ray's wrappers, and other fields of the record."""
    if error is None:
        return RankFailure(rank, **fields)
    inner = unwrap(error)
    text = "".join(traceback.format_exception(inner))
    told = getattr(error, "traceback_str", None) or getattr(error, "_traceback_str", None)
    said = {
        "error_type": f"{type(inner).__module__}.{type(inner).__qualname__}",
        "message": str(inner),
        "traceback": str(told or text)[-TAIL_BYTES:],
        "cause": str(inner.cause) if isinstance(inner, RankError) else None,
    }
    return RankFailure(rank, **said | fields)


def unwrap(error: BaseException) -> BaseException:
    """The error inside Ray's wrappers: Train's around a worker's, and a task's around what its code
    raised."""
    for _ in range(8):
        inner = next(
            (
                found
                for name in _INNER
                if isinstance(found := getattr(error, name, None), BaseException)
            ),
            None,
        )
        if inner is None or inner is error:
            break
        error = inner
    return error


def save_log(run: RunFolder, attempt: int, rank: int, content: str) -> None:
    """Keep the last TAIL_BYTES of what a rank printed."""
    # A little more is redacted than is kept, so that no secret loses its name at the cut.
    tail = redact(content[-2 * TAIL_BYTES :]).encode(errors="replace")[-TAIL_BYTES:]
    write_bytes(run.filesystem, log_path(run, attempt, rank), tail, durable=False)


def save_stacks(run: RunFolder, attempt: int, rank: int, text: str) -> None:
    """Keep the stacks of all threads of a rank, as `faulthandler` writes them."""
    write_bytes(
        run.filesystem,
        stack_path(run, attempt, rank),
        redact(text).encode(errors="replace"),
        durable=False,
    )


def save_beat(run: RunFolder, attempt: int, rank: int, beat: Mapping[str, Any]) -> None:
    """Keep a rank's last heartbeat: step, phase and time."""
    content = make_json(redact_fields({"rank": rank, **beat}))
    write_bytes(run.filesystem, beat_path(run, attempt, rank), content, durable=False)


def save_beats(run: RunFolder, attempt: int, beats: Mapping[int, Mapping[str, Any]]) -> None:
    """Keep the last heartbeats of an attempt's ranks in one file: thousands of ranks end
    together."""
    content = make_json(
        {str(rank): redact_fields({"rank": rank, **beat}) for rank, beat in beats.items()}
    )
    if beats:
        write_bytes(run.filesystem, _beats_path(run, attempt), content, durable=False)


def read_tail(log_file: str) -> str:
    """The end of a local log, with room for what redaction takes away. Raises OSError."""
    with open(log_file, "rb") as stream:
        stream.seek(max(0, stream.seek(0, 2) - 2 * TAIL_BYTES))
        return stream.read().decode("utf-8", errors="replace")


def _beats_path(run: RunFolder, attempt: int) -> str:
    return f"{run.path}/{BEATS}/{make_failure_file(attempt)}"


# ---- reading -----------------------------------------------------------------------------------


def load_failures(run: RunFolder) -> list[dict[str, Any]]:
    """What is known of the failed attempts, by attempt."""
    folder = f"{run.path}/{FAILURES}"
    numbers = (parse_failure_file(name) for name in list_files(run.filesystem, folder))
    found = []
    for number in sorted(number for number in numbers if number is not None):
        document = _read_json(run.filesystem, f"{folder}/{make_failure_file(number)}")
        if document is not None:
            found.append({"ranks": [], **document, "attempt": number})
    return found


def load_log(run: RunFolder, attempt: int, rank: int, max_lines: int = 40) -> list[str]:
    """The last lines of what a rank printed; none where nothing was kept."""
    text = _read_tail(run.filesystem, log_path(run, attempt, rank))
    return text.rstrip().splitlines()[-max_lines:]


def load_stacks(run: RunFolder, attempt: int) -> dict[int, str]:
    """Rank → the stacks that were kept of it."""
    return {
        rank: _read_tail(run.filesystem, stack_path(run, attempt, rank))
        for rank in _ranks(run, STACKS, attempt)
    }


def load_beats(run: RunFolder, attempt: int) -> dict[int, dict[str, Any]]:
    """Rank → its last heartbeat."""
    together = _read_json(run.filesystem, _beats_path(run, attempt)) or {}
    beats: dict[int, Any] = {
        int(rank): beat
        for rank, beat in together.items()
        if rank.isdecimal() and isinstance(beat, dict)
    }
    beats |= {
        rank: _read_json(run.filesystem, beat_path(run, attempt, rank))
        for rank in _ranks(run, BEATS, attempt)
    }
    return {rank: beats[rank] for rank in sorted(beats) if beats[rank] is not None}


def _ranks(run: RunFolder, folder: str, attempt: int) -> list[int]:
    names = list_files(run.filesystem, f"{run.path}/{folder}")
    parsed = [found for found in map(parse_rank_evidence, names) if found is not None]
    return sorted(rank for number, rank in parsed if number == attempt)


def _read_json(filesystem: pafs.FileSystem, path: str) -> dict[str, Any] | None:
    try:
        return load_json(filesystem, path)
    except (StoreError, OSError, pa.ArrowException):
        return None


def _read_tail(filesystem: pafs.FileSystem, path: str) -> str:
    """The file's last bytes as text; a rank may still be writing it."""
    try:
        with filesystem.open_input_file(path) as stream:
            stream.seek(max(0, stream.size() - TAIL_BYTES))
            content: bytes = stream.read()
    except (OSError, pa.ArrowException):
        return ""
    return content.decode("utf-8", errors="replace")
