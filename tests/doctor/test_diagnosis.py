"""Diagnoses of whole run folders: sound, stopped, silent, slow, diverged, damaged; and what people
and programs get."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from broken_runs import FAULT_STEP, fail, make_row, write_failure

from dray.cli import main
from dray.doctor import classify, diagnose
from dray.errors import (
    BadNumbers,
    Cause,
    CheckpointDamaged,
    GroupDissolved,
    LossSpike,
    ReadsDiffer,
    SaveFailed,
)
from dray.runs import Run, create_run
from dray.runs.evidence import make_rank_failure, save_beat, save_log
from dray.show.report import format_diagnosis
from dray.spec import Spec

# These texts are literals: there is no GPU where the tests run. They follow torch, NCCL and users'
# reports.
CUDA_OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.34 GiB. GPU 3 has a total capacity of 79.11 GiB of "
    "which 1.02 GiB is free."
    " Including non-PyTorch memory, this process has 78.08 GiB memory in use."
)
NCCL_TIMEOUT = (
    "[Rank 2] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=812, "
    "OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=600000) ran for 600013 milliseconds "
    "before timing out."
)
NCCL_REMOTE = (
    "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network "
    "error, NCCL version 2.27\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting "
    "prematurely."
)


def cuda_error(**fields: object) -> dict[str, object]:
    return {
        "error_type": "torch.OutOfMemoryError",
        "message": CUDA_OUT_OF_MEMORY,
        "node": "gpu-3",
        "step": 4,
        **fields,
    }


def test_gpu_memory_and_what_nccl_says_of_it_elsewhere(run: Run) -> None:
    fail(
        run,
        [
            {
                "rank": 0,
                "error_type": "torch.distributed.DistBackendError",
                "message": NCCL_REMOTE,
                "time": 10.0,
            },
            {"rank": 3, "time": 11.0, **cuda_error()},
        ],
    )
    found = diagnose(run)
    assert (found.fault, found.rank, found.node) == (Cause.GPU_MEMORY, 3, "gpu-3")
    assert "asked for 2.34 GiB more" in found.cause
    assert "batch.micro_rows=4 (it was 8)" in found.way_out
    assert found.others == (
        "rank 0: torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3690, "
        "remote process exited or there was a network error, NCCL vers…",
    )


@pytest.mark.parametrize(
    ("changes", "way_out"),
    [
        ({"batch": {"micro_rows": 1}}, "engine.activation_checkpointing=true"),
        ({"batch": {"micro_rows": 1}, "activation_checkpointing": True}, "zero.stage=2 (it was 1)"),
        (
            {"batch": {"micro_rows": 1}, "activation_checkpointing": True, "zero_stage": 3},
            "zero.offload=optimizer",
        ),
        (
            {
                "batch": {"micro_rows": 1},
                "activation_checkpointing": True,
                "zero_stage": 3,
                "offload": "optimizer",
            },
            "more workers",
        ),
    ],
)
def test_the_way_out_of_gpu_memory_follows_the_plan(
    run: Run, changes: dict[str, object], way_out: str
) -> None:
    Path(run.path, "plan.json").write_text(json.dumps(run.plan() | changes))
    fail(run, [{"rank": 0, **cuda_error()}])
    assert way_out in diagnose(run).way_out


def test_nccl_timeout_and_the_rank_that_stands_elsewhere(run: Run) -> None:
    fail(
        run,
        [
            {
                "rank": rank,
                "error_type": "torch.distributed.DistBackendError",
                "message": NCCL_TIMEOUT,
                "step": 7,
            }
            for rank in (0, 2)
        ],
    )
    for rank, phase, step in ((0, "agree", 7), (1, "save", 6), (2, "agree", 7)):
        save_beat(
            run,
            1,
            rank,
            {"step": step, "phase": phase, "time": time.time(), "node": f"node-{rank}"},
        )
    found = diagnose(run)
    assert (found.fault, found.rank, found.step, found.node) == (Cause.HANG, 1, 6, "node-1")
    assert "in save" in found.cause


def test_when_all_wait_for_rows_the_reader_is_at_fault(run: Run) -> None:
    run.log_event("hang", attempt=1, ranks=[0], reason="no rank has moved for 1800 s")
    fail(run, [{"rank": rank, "exit": "SIGKILL"} for rank in (0,)], detected_by="hang")
    for rank in range(3):
        save_beat(run, 1, rank, {"step": 3, "phase": "data", "time": "2026-11-24T10:00:00+00:00"})
    found = diagnose(run)
    assert (found.fault, found.rank) == (Cause.DATA, None)
    assert "resources.reader_cpus" in found.way_out


@pytest.mark.parametrize(
    ("first", "second", "fault", "rank"),
    [
        (
            {"error_type": "builtins.ValueError", "message": "a", "time": 5.0},
            {"error_type": "builtins.KeyError", "message": "b", "time": 4.0},
            Cause.CODE,
            1,
        ),
        (
            {"error_type": "builtins.KeyError", "message": "b", "time": 4.0},
            {"exit": "SIGTERM"},
            Cause.CODE,
            0,
        ),
        (
            {"exit": 137, "time": 3.0},
            {"error_type": "builtins.KeyError", "message": "b", "time": 4.0},
            Cause.KILLED,
            0,
        ),
        ({}, {"exit": -9}, Cause.KILLED, 1),
        ({"error_type": "", "message": "gave no further sign of life"}, {}, Cause.KILLED, 0),
        (make_rank_failure(0, SaveFailed("x")).to_json(), {}, Cause.STORAGE, 0),
        (make_rank_failure(0, CheckpointDamaged("x")).to_json(), {}, Cause.CHECKPOINT, 0),
        (make_rank_failure(0, ReadsDiffer("x")).to_json(), {}, Cause.STORAGE, 0),
        (make_rank_failure(0, BadNumbers("x")).to_json(), {}, Cause.NUMERICS, 0),
        (make_rank_failure(0, LossSpike(7, "x")).to_json(), {}, Cause.SPIKE, 0),
        (make_rank_failure(0, GroupDissolved("x")).to_json(), {}, Cause.PREEMPTION, 0),
        (
            {"error_type": "builtins.KeyError", "message": "b", "time": 4.0},
            make_rank_failure(1, CheckpointDamaged("x"), time=5.0).to_json(),
            Cause.CHECKPOINT,
            1,
        ),
        ({"error_type": "builtins.KeyboardInterrupt", "message": ""}, {}, Cause.INTERRUPTED, 0),
        (
            {
                "error_type": "builtins.OSError",
                "message": "When uploading part for key 'a' in bucket 'b': AWS Error "
                "ACCESS_DENIED during UploadPart operation: Access Denied",
            },
            {},
            Cause.STORAGE,
            0,
        ),
        ({}, {}, Cause.UNKNOWN, 0),
    ],
)
def test_the_first_cause_of_two(
    run: Run, first: dict[str, object], second: dict[str, object], fault: Cause, rank: int
) -> None:
    failure = {"attempt": 1, "ranks": [{**first, "rank": 0}, {**second, "rank": 1}]}
    assert classify(failure) is fault
    fail(run, failure["ranks"])  # type: ignore[arg-type]
    assert (diagnose(run).fault, diagnose(run).rank) == (fault, rank)


def test_a_symptom_raised_while_the_first_error_was_handled(run: Run) -> None:
    gloo = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:31640."
    try:
        try:
            raise KeyError("no such column")
        finally:
            raise RuntimeError(gloo)
    except RuntimeError as error:
        fail(run, [make_rank_failure(0, error)])
    found = diagnose(run)
    assert (found.fault, found.error_type) == (Cause.CODE, "KeyError")


def test_without_ranks_the_document_and_then_the_record_tell(run: Run) -> None:
    assert classify({"attempt": 1, "ranks": [], "nodes_lost": ["a"]}) is Cause.NODE_LOSS
    assert classify({"attempt": 1, "preempted": True}) is Cause.PREEMPTION
    fail(
        run,
        [],
        detected_by="driver",
        error_type="builtins.OSError",
        message="[Errno 28] No space left on device",
    )
    found = diagnose(run)
    assert (found.fault, found.rank) == (Cause.STORAGE, None)
    assert "the driver" in found.cause
    Path(run.path, "failures", "a0001.json").unlink()
    run.set_status("failed", "the workers failed: FloatingPointError: the loss is not finite")
    assert diagnose(run).fault is Cause.NUMERICS
    run.set_status("failed", "")
    assert diagnose(run).fault is Cause.UNKNOWN


# ---- runs that did not fail --------------------------------------------------------------------


def test_sound_runs(run: Run, spec: Spec) -> None:
    assert (diagnose(run).fault, diagnose(run).step) == (Cause.HEALTHY, FAULT_STEP - 1)
    write_failure(run, {"attempt": 1, "step": 3, "ranks": [{"rank": 2, "exit": "SIGKILL"}]})
    run.begin_attempt(3, 0)
    found = diagnose(run)
    assert found.fault is Cause.HEALTHY
    assert [(past.attempt, past.fault, past.rank) for past in found.history] == [
        (1, Cause.KILLED, 2)
    ]
    run.set_status("completed")
    assert diagnose(run).fault is Cause.HEALTHY
    new = create_run(run.storage, "new", spec, {})
    assert (diagnose(new).fault, diagnose(new).cause) == (Cause.HEALTHY, "the run has not begun")


def test_stopped_runs(run: Run) -> None:
    write_failure(
        run, {"attempt": 1, "ranks": [{"rank": 0, "exit": "SIGKILL"}]}
    )  # stopped while it recovered
    run.set_status("interrupted", "KeyboardInterrupt")
    assert (diagnose(run).fault, diagnose(run).cause) == (
        Cause.INTERRUPTED,
        "a person stopped the run",
    )
    run.begin_attempt(3, 0)
    gone = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from dray.runs import Run; Run.open(sys.argv[1], "
            "'speeches').set_status('running')",
            run.storage,
        ],
        check=False,
    )
    assert gone.returncode == 0
    found = diagnose(run)
    assert found.fault is Cause.INTERRUPTED
    assert "the driver ended without a word" in found.cause


def test_a_run_that_is_silent_for_too_long_hangs(run: Run) -> None:
    for rank, phase in ((0, "agree"), (1, "restore"), (2, "agree")):
        save_beat(
            run, 1, rank, {"step": 3 if rank == 1 else 4, "phase": phase, "time": time.time()}
        )
    assert diagnose(run).fault is Cause.HEALTHY
    found = diagnose(run, now=time.time() + 3600)
    assert (found.fault, found.rank, found.step) == (Cause.HANG, 1, 3)
    assert "no step has been made for 3,6" in found.cause


def test_a_straggler(run: Run) -> None:
    # Rank 2 takes 3 s where the others take 1 s: mean 5/3, skew 0.8.
    rows = [
        make_row(
            step, forward_seconds_skew=0.8, forward_seconds_mean=5 / 3, forward_seconds_max=3.0
        )
        for step in range(FAULT_STEP, 20)
    ]
    run.log_metrics(rows)
    found = diagnose(run)
    assert (found.fault, found.rank) == (Cause.STRAGGLER, None)
    assert "3.0 times as long" in found.cause
    run.log_metrics([row | {"slowest_rank": 2} for row in rows])
    save_beat(run, 1, 2, {"step": 19, "node": "10.0.0.9"})
    found = diagnose(run)
    assert (found.rank, found.node) == (2, "10.0.0.9")
    run.set_status("completed")
    assert diagnose(run).fault is Cause.HEALTHY
    assert any("3.0 times as long" in note for note in diagnose(run).notes)


@pytest.mark.parametrize(
    "skews", [[0.8, *[0.1] * 15], [0.1] * 16, [0.8] * 4], ids=["hiccup", "even", "few"]
)
def test_no_straggler(run: Run, skews: list[float]) -> None:
    run.log_metrics(
        [make_row(FAULT_STEP + at, forward_seconds_skew=skew) for at, skew in enumerate(skews)]
    )
    assert diagnose(run).fault is Cause.HEALTHY


def test_a_loss_that_is_not_finite(run: Run) -> None:
    run.log_metrics(
        [make_row(step, loss=None if step > 5 else float("nan")) for step in range(5, 9)]
    )
    run.log_event("step_skipped", step=5, reason="the loss is not finite", rows=[1, 2])
    found = diagnose(run)
    assert (found.fault, found.step) == (Cause.NUMERICS, 5)
    assert "start it anew" in found.way_out  # there is no checkpoint to fork from
    assert "optimizer.learning_rate" in found.way_out


# ---- what is damaged, and what is told ---------------------------------------------------------


def test_damage_makes_a_diagnosis_poorer_not_impossible(run: Run) -> None:
    save_log(run, 1, 1, "last words")
    save_beat(run, 1, 1, {"step": 3, "phase": "data"})
    fail(run, [{"rank": 1, "exit": "SIGKILL"}])
    Path(run.path, "logs", "a0001-r00001.log").write_bytes(b"\xff\xfe last \x00 words")
    for name in ("beats/a0001-r00001.json", "plan.json", "spec.yaml"):
        Path(run.path, name).write_bytes(b"\xff{")
    found = diagnose(run)
    assert (found.fault, found.rank) == (Cause.KILLED, 1)
    assert any("spec" in note for note in found.notes)
    for name in ("failures/a0001.json", "attempts/0001.json", "metrics/a0001.jsonl"):
        Path(run.path, name).write_bytes(b"\xff{")
    assert diagnose(run).fault is Cause.UNKNOWN


def test_odd_documents_are_read_as_far_as_they_go(run: Run) -> None:
    for ranks in (
        None,
        [None, 3, "x"],
        [{"rank": "one", "time": "yesterday", "exit": "odd"}],
        [{}],
        [{"rank": 1, "step": "three", "pid": "x", "message": 5, "traceback": ["a"], "exit": -9}],
        [{"rank": 1, "exit": -9, "memory_share": "much"}],
    ):
        write_failure(
            run,
            {
                "attempt": 1,
                "ranks": ranks,
                "nodes_lost": None,
                "detected_by": "hang",
                "step": "x",
            },
        )
        save_beat(run, 1, 1, {"step": "three", "phase": 4, "time": []})
        run.set_status("failed", "")
        assert json.dumps(diagnose(run).to_json())


def test_people_and_programs_get_the_same(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_log(run, 1, 3, "step 4 begins\nW: allocator retries\n")
    fail(run, [{"rank": 3, "pid": 77, **cuda_error()}])
    monkeypatch.chdir(os.path.dirname(run.storage))
    assert main(["doctor", "speeches", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert (
        tree["run"],
        tree["status"],
        tree["class"],
        tree["rank"],
        tree["node"],
        tree["step"],
        tree["attempt"],
    ) == ("speeches", "failed", "gpu_memory", 3, "gpu-3", 4, 1)
    log = ["step 4 begins", "W: allocator retries"]
    assert tree["exhibits"][-1] == {"kind": "log", "source": "rank 3", "lines": log}
    assert tree["history"][0]["class"] == "gpu_memory"
    assert main(["doctor", f"{run.storage}/speeches"]) == 0
    text = capsys.readouterr().out
    first, *_, last = text.strip().splitlines()
    assert first == f"speeches  gpu_memory: {tree['cause']}"
    assert last == f"  way out      {tree['way_out']}"
    assert "attempt 1, rank 3, node gpu-3, process 77, step 4" in text
    assert "│ W: allocator retries" in text
    assert main(["doctor", "nobody"]) == 2


def test_a_diagnosis_needs_neither_torch_nor_ray(run: Run) -> None:
    fail(run, [{"rank": 0, **cuda_error()}])
    code = (
        "import sys; from dray.cli import main; code = main(['doctor', sys.argv[1]]); "
        "assert not {'torch', 'ray', 'deepspeed', 'transformers'} & set(sys.modules); "
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"{run.storage}/speeches"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "gpu_memory" in done.stdout


def test_many_ranks_are_told_in_few_lines(run: Run) -> None:
    fail(
        run,
        [
            {
                "rank": rank,
                "exit": "SIGKILL" if rank == 9 else None,
                "message": "" if rank == 9 else NCCL_REMOTE,
                "error_type": "" if rank == 9 else "x.DistBackendError",
            }
            for rank in range(64)
        ],
    )
    text = format_diagnosis(diagnose(run))
    assert "rank 9 was killed" in text
    assert "59 more ranks" in text
