"""Every name inside a run folder, and the checks that names pass before they become paths.

<storage>/<sweep>/  sweep.json  space.yaml  spec.yaml  log/*.jsonl  drivers/  0001/ (a run), 0002/ …
<storage>/<run>/  spec.yaml  plan.json  run.json  model.json  metrics.parquet
    noise.json                            of a private run: its noise, a secret
    compression.json                      of a compressed run: the table, before and after
    evaluations/<digest>.json             what a release measured of a checkpoint
    corpus/manifest.json, tokenizer/      what a model must know of its corpus, without the rows
    attempts/0001.json, 0001-end.json     metrics/*.jsonl  validation/*.jsonl  events/*.jsonl
    checkpoints/step-00000020-a0001/      rank-*-of-*.safetensors, manifest.json, COMMITTED
    pins/<fork>.json, _hold-….json        trackers/
    drivers/0001.json, 0001-beat.json, 0001-end.json
    failures/a0001.json                   what is known of a failed attempt
    logs/a0001-r00000.log  stacks/a0001-r00000.txt  beats/a0001-r00000.json
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple, Protocol

from dray.errors import StoreError
from dray.spec import NAME_RULE, RUN_NAME

SPEC_FILE = "spec.yaml"
PLAN_FILE = "plan.json"
MODEL_FILE = "model.json"
CORPUS = "corpus"
RUN_FILE = "run.json"
NOISE_FILE = "noise.json"
COMPRESSION_FILE = "compression.json"
PARQUET_FILE = "metrics.parquet"
ATTEMPTS, METRICS, VALIDATION, EVENTS = "attempts", "metrics", "validation", "events"
CHECKPOINTS, PINS, TRACKERS = "checkpoints", "pins", "trackers"
EVALUATIONS = "evaluations"
FAILURES, LOGS, STACKS, BEATS = "failures", "logs", "stacks", "beats"
DRIVERS = "drivers"
MANIFEST_FILE = "manifest.json"
MARKER_FILE = "COMMITTED"
REJECTED_FILE = "REJECTED"
DELETING_FILE = "DELETING"
CORPORA = "corpora"
"""Folder in a storage, beside its runs, that holds their corpora."""
SERVING = "serving"
"""Folder in a storage, beside its runs, that holds what services keep: keys, versions, feedback."""
RESERVED_NAMES = frozenset({CORPORA, SERVING})
SWEEP_FILE = "sweep.json"
"""What makes a folder in a storage a sweep, whose trials are runs in it."""

_CHECKPOINT_FOLDER = re.compile(r"step-([0-9]{8,})-a([0-9]{4,})")
_RANK_FILE = re.compile(r"rank-[0-9]{5,}-of-[0-9]{5,}\.safetensors")
_ATTEMPT_FILE = re.compile(r"([0-9]{4,})\.json")
_FAILURE_FILE = re.compile(r"a([0-9]{4,})\.json")
_RANK_EVIDENCE = re.compile(r"a([0-9]{4,})-r([0-9]{5,})\.(?:log|txt|json)")
_TRIAL_NAME = re.compile(r"([^/]+)/([0-9]{4,})")
_DRIVER_FILE = re.compile(r"([0-9]{4,})\.json")


class RunFolder(Protocol):
    """What the checkpoint code needs to know of a run."""

    filesystem: Any
    path: str


class Fragment(NamedTuple):
    """A 1-D piece of a flattened tensor: `length` elements of a parameter's state from element
    `start` on."""

    parameter: str
    state: str
    start: int
    length: int


def make_trial_name(sweep: str, trial: int) -> str:
    """Name of the run that is a trial of a sweep."""
    return f"{sweep}/{trial:04d}"


def parse_trial_name(name: str) -> tuple[str, int] | None:
    """(sweep, trial) of a run's name; none for a run that is no trial."""
    match = _TRIAL_NAME.fullmatch(name)
    return (match[1], int(match[2])) if match else None


def parse_checkpoint_owner(path: str) -> str:
    """Name of the run that a checkpoint is of, from its path below the storage."""
    return path.rpartition(f"/{CHECKPOINTS}/")[0]


def check_kept_checkpoint(path: str) -> str:
    """The path of a checkpoint below the storage, as a record keeps it, if it is one: a record may
    come from anybody. Raises StoreError."""
    owner, folder = parse_checkpoint_owner(path), path.rstrip("/").rpartition("/")[2]
    if not owner or parse_checkpoint_folder(folder) is None:
        raise StoreError(
            f"checkpoint {ascii(path)[:200]}",
            "is no checkpoint of a run in this storage",
            "records keep RUN/checkpoints/step-…",
        )
    check_run_name(owner)
    return path


def check_run_name(name: str) -> str:
    """The name, if it is safe as a folder's name, or that of a trial of a sweep. Raises
    StoreError."""
    trial = parse_trial_name(name)
    folder = trial[0] if trial else name
    if not re.fullmatch(RUN_NAME, folder):
        raise StoreError(f"run {ascii(name)[:200]}", "not a name for a run", NAME_RULE)
    if folder in RESERVED_NAMES:
        raise StoreError(
            f"run {name!r}", "the name is taken by dray itself", way_out="choose another with --run"
        )
    return name


def make_checkpoint_folder(step: int, attempt: int) -> str:
    """Folder of a checkpoint: unique to the attempt, so that a stale attempt never writes into a
    newer one's."""
    if step < 0 or attempt < 1:
        raise StoreError(
            f"checkpoint of step {step}, attempt {attempt}",
            "no such checkpoint can be",
            "steps start at 0 and attempts at 1",
        )
    return f"step-{step:08d}-a{attempt:04d}"


def parse_checkpoint_folder(name: str) -> tuple[int, int] | None:
    """(step, attempt) of a checkpoint folder's name; none for any other name."""
    match = _CHECKPOINT_FOLDER.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def make_rank_file(rank: int, num_ranks: int) -> str:
    """File name of one rank's fragments."""
    if not 0 <= rank < num_ranks:
        raise StoreError(f"rank {rank} of {num_ranks}", "no such rank", "ranks count from 0")
    return f"rank-{rank:05d}-of-{num_ranks:05d}.safetensors"


def is_rank_file(name: str) -> bool:
    """Whether a name read from a manifest is one that dray gives: it becomes a path."""
    return bool(_RANK_FILE.fullmatch(name))


def make_attempt_file(attempt: int) -> str:
    """File name of an attempt's record."""
    return f"{attempt:04d}.json"


def parse_attempt_file(name: str) -> int | None:
    """Number of the attempt that a file records; none for any other name."""
    match = _ATTEMPT_FILE.fullmatch(name)
    return int(match[1]) if match else None


def make_failure_file(attempt: int) -> str:
    """File name of what is known of a failed attempt; 0: nothing was started."""
    return f"a{attempt:04d}.json"


def parse_failure_file(name: str) -> int | None:
    """Number of the attempt whose failure a file describes; none for any other name."""
    match = _FAILURE_FILE.fullmatch(name)
    return int(match[1]) if match else None


def make_rank_evidence(attempt: int, rank: int, ending: str) -> str:
    """File name of one rank's log (`log`), stacks (`txt`) or heartbeat (`json`) in an attempt."""
    return f"a{attempt:04d}-r{rank:05d}.{ending}"


def parse_rank_evidence(name: str) -> tuple[int, int] | None:
    """(attempt, rank) of a rank's log, stacks or heartbeat; none for any other name."""
    match = _RANK_EVIDENCE.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def make_driver_file(driver: int, suffix: str = "") -> str:
    """File name of a driver's record; with `-beat` of its last sign of life, with `-end` of its
    end."""
    return f"{driver:04d}{suffix}.json"


def parse_driver_file(name: str) -> int | None:
    """Number of the driver that a file records; none for any other name."""
    match = _DRIVER_FILE.fullmatch(name)
    return int(match[1]) if match else None


def make_fragment_key(parameter: str, state: str, start: int) -> str:
    """Name of a fragment's tensor inside a rank file: `parameter|state|start`."""
    return f"{parameter}|{state}|{start}"


def parse_fragment_key(key: str) -> tuple[str, str, int]:
    """(parameter, state, start) of a tensor's name. Raises StoreError."""
    parts = key.rsplit("|", 2)
    if len(parts) != 3 or not parts[0] or not parts[1] or not parts[2].isdecimal():
        raise StoreError(
            f"tensor {key!r}", "not a fragment's name", "fragments are named parameter|state|start"
        )
    return parts[0], parts[1], int(parts[2])
