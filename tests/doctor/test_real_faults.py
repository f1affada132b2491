"""Faults in real processes, threads and files: what they really raise is classified by what it
is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from broken_runs import CULPRIT, FAULT_STEP, Group, fail
from pyarrow import fs as pafs

from dray.corpus.manifest import load_manifest
from dray.doctor import classify, diagnose
from dray.errors import Cause, CorpusError, PlanError, StoreError
from dray.runs import Run, check_storage
from dray.runs.evidence import make_rank_failure, unwrap

# ---- a group of ranks, one of which meets a fault -----------------------------------------------


def test_a_killed_rank_is_told_from_those_that_lost_their_connection_to_it(
    run: Run, groups: dict[str, Group]
) -> None:
    group = groups["kill"]
    survivors = [record for record in group.ranks if record["rank"] != CULPRIT]
    assert all("gloo/transport" in record["message"] for record in survivors)
    fail(run, group.ranks, detected_by="worker_exit")
    found = diagnose(run)
    assert (found.fault, found.rank, found.node) == (Cause.KILLED, CULPRIT, "10.0.0.7")
    assert "SIGKILL" in found.cause
    assert len(found.others) == 2


def test_a_killed_rank_on_a_full_host_ran_out_of_memory(run: Run, groups: dict[str, Group]) -> None:
    ranks = [rank | {"memory_share": 0.981} for rank in groups["kill"].ranks]
    fail(run, ranks, detected_by="worker_exit")
    found = diagnose(run)
    assert (found.fault, found.rank) == (Cause.HOST_MEMORY, CULPRIT)
    assert "98%" in found.cause


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"nodes_lost": ["10.0.0.7"]}, Cause.NODE_LOSS),
        ({"preempted": True, "nodes_lost": ["10.0.0.7"]}, Cause.PREEMPTION),
        ({"detected_by": "hang"}, Cause.HANG),
    ],
)
def test_what_the_driver_knows_of_the_node_tells_a_death(
    run: Run, groups: dict[str, Group], fields: dict[str, Any], fault: Cause
) -> None:
    fail(run, groups["kill"].ranks, **fields)
    found = diagnose(run)
    assert (found.fault, found.rank, found.node) == (fault, CULPRIT, "10.0.0.7")


def test_survivors_alone_tell_who_is_missing(run: Run, groups: dict[str, Group]) -> None:
    """The dead rank left no record, as when its whole node is silent."""
    fail(run, [record for record in groups["kill"].ranks if record["rank"] != CULPRIT])
    found = diagnose(run)
    assert (found.fault, found.rank) == (Cause.KILLED, CULPRIT)
    assert "went away without a word" in found.cause


def test_an_error_is_told_from_the_connections_that_it_broke(
    run: Run, groups: dict[str, Group]
) -> None:
    fail(run, list(reversed(groups["raise"].ranks)))
    found = diagnose(run)
    assert (found.fault, found.rank, found.step) == (Cause.CODE, CULPRIT, FAULT_STEP)
    assert (found.error_type, found.message) == ("builtins.ValueError", "a label that is none")
    assert any(
        "meet_fault" in line
        for exhibit in found.exhibits
        if exhibit.kind == "traceback"
        for line in exhibit.lines
    )


def test_a_stopped_rank_hangs_the_others(run: Run, groups: dict[str, Group]) -> None:
    group = groups["stop"]
    assert all("Timed out waiting" in group.ranks[rank]["message"] for rank in (0, 2))
    assert set(group.stacks) == {0, 2}
    fail(run, [group.ranks[0], group.ranks[2]], stacks=group.stacks)
    found = diagnose(run)
    assert (found.fault, found.rank) == (Cause.HANG, CULPRIT)
    assert "it left no stack" in found.cause
    assert found.others[0].startswith("rank 0: RuntimeError: [gloo/transport/tcp/unbound_buffer.cc")


def test_a_rank_that_waits_elsewhere_hangs_the_others(run: Run, groups: dict[str, Group]) -> None:
    group = groups["stuck"]
    fail(run, [group.ranks[0], group.ranks[2]], stacks=group.stacks, detected_by="hang")
    found = diagnose(run)
    assert (found.fault, found.rank) == (Cause.HANG, CULPRIT)
    assert [(past.fault, past.rank) for past in found.history] == [(Cause.HANG, CULPRIT)]
    assert "outside of the collective" in found.cause
    assert "read_slowly (" in found.cause
    assert "gloo_groups.py" in found.way_out


def test_the_watchdog_names_the_rank_that_the_driver_then_ended(
    run: Run, groups: dict[str, Group]
) -> None:
    group = groups["stuck"]
    run.log_event("hang", attempt=1, ranks=[CULPRIT], reason="no rank has moved for 120 s")
    fail(run, group.ranks, stacks=group.stacks, detected_by="hang")
    found = diagnose(run)
    assert (found.fault, found.rank) == (Cause.HANG, CULPRIT)
    assert "read_slowly" in found.cause
    assert "no rank has moved for 120 s" in found.cause


# ---- one process -------------------------------------------------------------------------------


def full_disk() -> None:
    with open("/dev/full", "wb", buffering=0) as stream:
        stream.write(b"x")


def full_disk_through_arrow() -> None:
    with pafs.LocalFileSystem().open_output_stream("/dev/full") as stream:
        stream.write(b"x" * 10_000_000)


def unwritable() -> None:
    check_storage("/proc/none")


def torn_corpus() -> None:
    load_manifest(pafs.LocalFileSystem(), "/nowhere")


def huge_tensor() -> None:
    torch.empty(10**15)


def huge_buffer() -> None:
    pa.allocate_buffer(1 << 58)


def huge_list() -> None:
    bytearray(1 << 60)


def wild_token() -> None:
    torch.nn.Embedding(4, 4)(torch.tensor([9]))


def wild_label() -> None:
    torch.nn.functional.cross_entropy(torch.zeros(1, 3), torch.tensor([9]))


def bad_gradient() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.tensor([float("nan")])
    torch.nn.utils.clip_grad_norm_([parameter], 1.0, error_if_nonfinite=True)


def bad_number() -> None:
    if not torch.isfinite(torch.tensor(1.0) / 0):
        raise FloatingPointError("the loss is not finite at step 3")


def loss_scale_at_its_end() -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    DynamicLossScaler(
        init_scale=1,
        scale_window=1000,
        min_scale=1,
        delayed_shift=1,
        consecutive_hysteresis=False,
        raise_error_at_min_scale=True,
        dtype=torch.half,
    ).update_scale(True)


def wrong_shapes() -> None:
    torch.ones(2, 3) @ torch.ones(2, 3)


def missing_library() -> None:
    __import__("a_library_that_nobody_has")


def plan_error() -> None:
    raise PlanError("resources.workers = 9", "3 fit", "a worker needs a GPU", "resources.workers=3")


REAL: dict[Callable[[], None], Cause] = {
    full_disk: Cause.STORAGE,
    full_disk_through_arrow: Cause.STORAGE,
    unwritable: Cause.STORAGE,
    torn_corpus: Cause.DATA,
    huge_tensor: Cause.HOST_MEMORY,
    huge_buffer: Cause.HOST_MEMORY,
    huge_list: Cause.HOST_MEMORY,
    wild_token: Cause.DATA,
    wild_label: Cause.DATA,
    bad_gradient: Cause.NUMERICS,
    bad_number: Cause.NUMERICS,
    loss_scale_at_its_end: Cause.NUMERICS,
    wrong_shapes: Cause.CODE,
    missing_library: Cause.CONFIGURATION,
    plan_error: Cause.CONFIGURATION,
}


@pytest.mark.parametrize("raises", REAL, ids=lambda function: function.__name__)
def test_real_errors(run: Run, raises: Callable[[], None]) -> None:
    with pytest.raises((Exception, CorpusError, StoreError)) as caught:
        raises()
    fail(run, [make_rank_failure(2, caught.value, step=3, node="10.0.0.2")])
    found = diagnose(run)
    assert (found.fault, found.rank, found.node, found.step) == (REAL[raises], 2, "10.0.0.2", 3)
    assert found.way_out


def test_a_crash_in_native_code(run: Run) -> None:
    code = "import faulthandler, ctypes; faulthandler.enable(); ctypes.string_at(0)"
    died = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    record = make_rank_failure(0, exit=died.returncode)
    fail(run, [record])
    found = diagnose(run)
    assert found.fault is Cause.CODE
    assert "SIGSEGV" in found.cause
    Path(run.path, "logs").mkdir()
    Path(run.path, "logs", "a0001-r00000.log").write_text(died.stderr)
    fail(run, [replace(record, exit=None, error_type="ray.exceptions.WorkerCrashedError")])
    found = diagnose(run)
    assert found.fault is Cause.CODE
    assert "Segmentation fault" in found.cause


def test_a_process_that_ends_itself(run: Run) -> None:
    died = subprocess.run([sys.executable, "-c", "raise SystemExit(7)"], check=False)
    fail(run, [make_rank_failure(0, exit=died.returncode)])
    assert (diagnose(run).fault, diagnose(run).rank) == (Cause.CODE, 0)


# ---- Ray ---------------------------------------------------------------------------------------


def test_a_killed_actor_is_not_out_of_memory_though_ray_guesses_so(
    run: Run, local_ray: None
) -> None:
    import ray

    @ray.remote(num_cpus=0.1)  # type: ignore[untyped-decorator]
    class Worker:
        def train(self) -> None:
            os.kill(os.getpid(), 9)

        def meet(self) -> None:
            raise FloatingPointError("the loss is not finite")

    worker = Worker.remote()
    with pytest.raises(ray.exceptions.ActorDiedError, match="OOM killer") as died:
        ray.get(worker.train.remote())
    fail(run, [make_rank_failure(1, died.value)])
    found = diagnose(run)
    assert (found.fault, found.rank) == (Cause.KILLED, 1)
    assert found.node  # from Ray's own text
    assert "OOM killer" not in found.message  # Ray's guess, of every dead worker
    with pytest.raises(FloatingPointError) as raised:
        ray.get(Worker.remote().meet.remote())
    assert type(unwrap(raised.value)) is FloatingPointError
    fail(run, [make_rank_failure(1, raised.value)])
    assert diagnose(run).error_type == "builtins.FloatingPointError"
    assert diagnose(run).fault is Cause.NUMERICS
    plain = {
        "rank": 1,
        "error_type": f"ray.exceptions.{type(raised.value).__name__}",
        "message": str(raised.value),
    }
    assert classify({"attempt": 1, "ranks": [plain]}) is Cause.NUMERICS


OUT_OF_MEMORY = """
import json, sys, time, ray
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
         _system_config={"memory_usage_threshold": 0.01, "memory_monitor_refresh_ms": 100})
@ray.remote(num_cpus=0.1, max_retries=0)
def fill():
    block = bytearray(200 << 20)
    time.sleep(60)
try:
    ray.get(fill.remote(), timeout=90)
except ray.exceptions.RayError as error:
    from dray.runs.evidence import make_rank_failure
    print("\\n" + json.dumps(make_rank_failure(1, error).to_json()))
"""


def test_a_worker_that_rays_memory_monitor_killed(run: Run) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, check=True
    )
    record = json.loads(done.stdout.strip().splitlines()[-1])
    assert record["error_type"] == "ray.exceptions.OutOfMemoryError"
    fail(run, [record])
    found = diagnose(run)
    assert (found.fault, found.rank) == (Cause.HOST_MEMORY, 1)
    assert found.node in found.cause
    assert "% of its memory" in found.cause


def test_rays_other_errors(run: Run) -> None:
    from ray import exceptions
    from ray.train.v2._internal.exceptions import (
        BroadcastCollectiveTimeoutError,
        WorkerGroupStartupTimeoutError,
    )
    from ray.train.v2.api.exceptions import WorkerGroupError

    known: list[tuple[BaseException, Cause]] = [
        (exceptions.NodeDiedError("the node is dead"), Cause.NODE_LOSS),
        (exceptions.ObjectStoreFullError("no room"), Cause.HOST_MEMORY),
        (exceptions.OutOfDiskError("no room"), Cause.STORAGE),
        (exceptions.WorkerCrashedError(), Cause.KILLED),
        (exceptions.RuntimeEnvSetupError("pip failed"), Cause.CONFIGURATION),
        (WorkerGroupStartupTimeoutError(4), Cause.CONFIGURATION),
        (BroadcastCollectiveTimeoutError(30.0, [2], 30.0), Cause.HANG),
        (WorkerGroupError("rank 1: ValueError: bad", {1: ValueError("bad")}), Cause.CODE),
    ]
    for error, fault in known:
        record = make_rank_failure(0, error).to_json()
        assert classify({"attempt": 1, "ranks": [record]}) is fault, error
    fail(run, [make_rank_failure(0, BroadcastCollectiveTimeoutError(30.0, [2], 30.0))])
    assert diagnose(run).rank == 2
