"""This machine as a shape: its GPUs by what their driver reports. The reports are literals: there
is no GPU here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dray.errors import PlanError
from dray.plan import (
    Card,
    find_cards,
    local_shape,
    make_accelerator,
    make_plan,
    match_accelerator,
    used_memory_share,
)
from dray.plan.machine import _visible_handles
from dray.processes.heap import keep_compiled_code
from dray.spec import make_spec

GIB = 2**30


@pytest.mark.parametrize(("reported", "name"), [
    ("NVIDIA A100-SXM4-80GB", "A100"), ("A100-PCIE-40GB", "A100"), ("NVIDIA H100 80GB "
                                                                    "HBM3", "H100"),
    ("NVIDIA H100 PCIe", "H100-PCIe"), ("NVIDIA H100 NVL", "H100-NVL"), ("NVIDIA H200", "H200"),
    ("NVIDIA GB200", "GB200"), ("NVIDIA B300 SXM6 "
                                "AC", "B300"), ("RTX-A6000", "A6000"), ("NVIDIA RTX "
                                                                        "A6000", "A6000"),
    ("GeForce-RTX-4090", "RTX4090"), ("NVIDIA GeForce RTX "
                                      "5090", "RTX5090"), ("NVIDIA L40S", "L40S"),
    ("NVIDIA RTX 6000 Ada "
     "Generation", "RTX6000-Ada"), ("Tesla V100-SXM2-32GB", "V100"), ("NVIDIA A10G", "A10G"),
    ("AMD-Instinct-MI300X-OAM", "MI300X"), ("AMD-Instinct-MI250X-MI250", "MI250X"),
    ("NVIDIA RTX A4000", None), ("Quadro P5000", None), ("", None), ("unknown", None),
])  # fmt: skip
def test_a_reported_name_finds_its_card(reported: str, name: str | None) -> None:
    card = match_accelerator(reported)
    assert (card and card.name) == name


def test_a_known_card_keeps_its_speed_and_tells_its_own_memory() -> None:
    large = make_accelerator([Card("NVIDIA A100-SXM4-80GB", 81_920 * 2**20, (8, 0))] * 2)
    assert (large.name, large.memory_bytes, large.half_flops) == ("A100", 80 * GIB, 312e12)
    mixed = make_accelerator(
        [Card("NVIDIA L4", 24 * GIB, (8, 9)), Card("NVIDIA T4", 15 * GIB, (7, 5))]
    )
    assert (mixed.name, mixed.memory_bytes, mixed.has_bf16) == ("T4", 15 * GIB, False)


def test_an_unknown_card_is_taken_from_what_it_reports() -> None:
    # An A4000's figures: 6,144 cores at 1.56 GHz are 19.2 TFLOP/s by its data sheet, 448 GB/s.
    card = make_accelerator([Card("NVIDIA RTX A4000", 16 * GIB, (8, 6), 6144, 1.56e9, 448e9)])
    assert card.name == "NVIDIA RTX A4000"
    assert card.fp32_flops == pytest.approx(19.2e12, rel=0.01)
    assert card.half_flops == pytest.approx(38.3e12, rel=0.01)
    assert (card.has_bf16, card.memory_bytes_per_second) == (True, 448e9)
    silent = make_accelerator([Card("A card of 2031", 64 * GIB, (15, 0))])
    assert (silent.memory_bytes, silent.half_flops) == (64 * GIB, None)


def test_a_run_is_planned_on_an_unknown_card() -> None:
    card = make_accelerator([Card("NVIDIA RTX A4000", 16 * GIB, (8, 6), 6144, 1.56e9)])
    shape = local_shape().model_copy(update={"accelerators_per_node": 1, "accelerator": card})
    spec = make_spec(
        {
            "name": "x",
            "data": {"train": "x", "sequence_tokens": 128},
            "tokenizer": {"train": "byte_bpe", "vocab_size": 1000},
            "model": {"architecture": "llama", "hidden_size": 64, "num_layers": 2, "num_heads": 2},
            "duration": {"steps": 10},
            "resources": {"gpus_per_worker": 1},
        },
        "x",
    )
    plan = make_plan(spec, shape)
    assert plan.on_gpu
    assert plan.precision == "bf16"
    assert plan.memory_limit_bytes is not None
    assert plan.memory_limit_bytes < 16 * GIB
    assert plan.est_seconds is not None


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="this machine has a GPU")
def test_without_a_driver_there_are_no_cards() -> None:
    assert find_cards() == []
    assert local_shape().num_accelerators == 0


class _Driver:
    """Stands in for NVML, which does not load without a driver: four devices, known by index and
    UUID."""

    uuids = ("GPU-aa11", "GPU-aa22", "GPU-bb33", "GPU-cc44")
    api = SimpleNamespace(
        nvmlDeviceGetCount=lambda: 4,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=lambda handle: _Driver.uuids[handle],
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
    )


@pytest.mark.parametrize(("visible", "handles"), [
    (None, [0, 1, 2, 3]), ("", []), ("2,0", [2, 0]), (" 1 ", [1]), ("1,-1,2", [1]), ("7", []),
    ("0,9,1", [0]), ("GPU-bb", [2]), ("GPU-cc44,GPU-aa11", [3, 0]), ("GPU-none,GPU-aa11", []),
    ("MIG-1234", ["MIG-1234"]),
])  # fmt: skip
def test_visible_devices_are_those_that_cuda_would_show(
    visible: str | None, handles: list[Any]
) -> None:
    assert list(_visible_handles(_Driver.api, visible)) == handles


def test_gpus_of_a_cluster_that_nothing_knows_are_planned_for_without_a_memory_check() -> None:
    """Logical GPUs and a label of Ray's stand in for cards: the task that asks the drivers runs,
    and finds none."""
    code = (
        "import ray\n"
        "from dray.cluster.needs import Needs\n"
        "from dray.cluster.nodes import live_shape\n"
        "ray.init(address='local', num_cpus=4, num_gpus=2, include_dashboard=False, "
        "log_to_driver=False,\n"
        "         resources={'accelerator_type:B9000': 1})\n"
        "shape = live_shape(Needs({'CPU': 1, 'GPU': 1}))\n"
        "print('GPU', shape.num_accelerators, shape.accelerator.name, "
        "shape.accelerator.memory_bytes)\n"
        "print('CPU', live_shape(Needs({'CPU': 1})).accelerator.name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines()[-2:] == ["GPU 2 B9000 None", "CPU B9000"], (
        done.stdout + done.stderr
    )


def test_without_a_compiler_nothing_is_compiled_and_asking_for_it_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    shape = local_shape().model_copy(
        update={"cpu_bf16": True, "cpu_amx": True, "cpu_core_bf16_flops": 850e9}
    )
    assert not shape.has_compiler
    tree = {
        "name": "x",
        "data": {"train": "x", "sequence_tokens": 512},
        "tokenizer": {"train": "byte_bpe", "vocab_size": 8192},
        "model": {"architecture": "llama", "hidden_size": 384, "num_layers": 6, "num_heads": 6},
        "duration": {"steps": 100_000},
    }
    plan = make_plan(make_spec(tree, "x"), shape)
    assert not plan.compile
    assert any("no C++ compiler" in note for note in plan.notes)
    assert make_plan(make_spec(tree, "x"), shape.model_copy(update={"has_compiler": True})).compile
    with pytest.raises(PlanError, match=r"engine.compile = true: .* no C\+\+ compiler"):
        make_plan(make_spec(tree | {"engine": {"compile": True}}, "x"), shape)


def test_compiled_code_is_kept_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is put back afterwards
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "dray" / "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/mine"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_compiled_code()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_memory_in_use_is_that_of_the_cgroup_where_there_is_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files stand in for the kernel's: a test cannot set limits of its own everywhere."""
    assert 0.0 < used_memory_share() < 1.0
    limit = 64 * 1024 * 1024
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{limit * 7 // 8}\n")
    files = f"inactive_file {limit // 16}\nactive_file {limit // 16}\n"
    (tmp_path / "memory.stat").write_text(f"anon 5\n{files}")
    names = (str(tmp_path), "memory.max", "memory.current", "")
    monkeypatch.setattr("dray.plan.machine._CGROUPS", (names,))
    assert used_memory_share() == 0.75
    (tmp_path / "memory.stat").unlink()  # a kernel that says less
    assert 0.0 < used_memory_share() < 1.0
