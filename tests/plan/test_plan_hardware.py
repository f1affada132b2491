"""Shapes: the grammar, the table of accelerators, and this machine."""

from __future__ import annotations

import os

import pytest

from dray.errors import PlanError
from dray.plan import ACCELERATORS, Shape, check_accelerator, local_shape, parse_shape


def test_named_shapes() -> None:
    shape = parse_shape("2x8xH100")
    assert (shape.num_nodes, shape.accelerators_per_node, shape.num_accelerators) == (2, 8, 16)
    assert shape.accelerator is not None
    assert shape.accelerator.name == "H100"
    assert shape.accelerator.memory_bytes == 80 * 2**30
    assert not shape.oversubscribe
    assert parse_shape("4xa100-80g").accelerator == ACCELERATORS["a100-80g"]
    assert parse_shape("4xA100-80G").num_nodes == 4


def test_unknown_accelerators_take_numbers() -> None:
    shape = parse_shape("1x4x(memory=48GB,tflops=180)")
    assert shape.accelerator is not None
    assert shape.accelerator.memory_bytes == 48 * 10**9
    assert shape.accelerator.half_flops == 180e12
    named = parse_shape("1x4xNewCard(memory=48GiB, tflops=180, fp32_tflops=90, bf16=0)").accelerator
    assert named is not None
    assert (named.name, named.memory_bytes, named.fp32_flops, named.has_bf16) == (
        "NewCard",
        48 * 2**30,
        90e12,
        False,
    )


def test_settings_override_what_is_known() -> None:
    shape = parse_shape("2x8xH100(cpus=64,host_memory=1TB)")
    assert shape.cpus_per_node == 64
    assert shape.memory_bytes_per_node == 10**12


def test_cpu_shapes() -> None:
    shape = parse_shape("4xCPU(cpus=16,memory=64GB)")
    assert (shape.num_nodes, shape.accelerator, shape.num_cpus) == (4, None, 64)
    assert not shape.cpu_bf16
    assert parse_shape("4xCPU(cpus=16,memory=64GB,bf16=1)").cpu_bf16


def test_a_cluster_with_an_unknown_card_can_be_described() -> None:
    shape = parse_shape("2x4xunknown")
    assert shape.accelerator is not None
    assert shape.accelerator.memory_bytes is None


@pytest.mark.parametrize(("text", "says"), [
    ("H100", "not a shape"), ("", "not a shape"), ("2x8", "not a shape"),
    ("axbxH100", "not a shape"),
    ("0x8xH100", "no machine"), ("2x0xH100", "no machine"), ("2x8xH10O", "did you mean H100"),
    ("2x8xZZZ", "known: GB300"), ("1x4x(memory=48GB)", "lacks memory or tflops"),
    ("1x4x(memory=48,tflops=180)", "unit"), ("1x4x(memory=48GB,tflops=180PF)", "unit"),
    ("1x4x(memory=48GB,flops=180)", "not a setting"), ("4xCPU(cpus=16)", "lacks memory"),
    ("1x4x(memory=0GB,tflops=1)", "above zero"),
])  # fmt: skip
def test_bad_shapes_are_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(PlanError) as caught:
        parse_shape(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_this_machine() -> None:
    shape = local_shape()
    assert 1 <= shape.cpus_per_node <= (os.cpu_count() or 1)
    assert (
        2**28
        < shape.memory_bytes_per_node
        <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
    assert shape.oversubscribe
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        words = file.read().split()
    assert shape.cpu_bf16 == ("amx_bf16" in words or "avx512_bf16" in words)


def test_shapes_survive_json() -> None:
    for shape in (local_shape(), parse_shape("2x8xH100")):
        assert Shape.model_validate_json(shape.model_dump_json()) == shape


def test_the_table_is_sane() -> None:
    for card in ACCELERATORS.values():
        assert card.memory_bytes is not None
        assert card.half_flops is not None
        assert card.fp32_flops is not None
        assert card.half_flops > card.fp32_flops
        assert 16 * 2**30 <= card.memory_bytes <= 512 * 2**30


@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        (None, "1x8xA100"),
        ("H100", "1x8xH100"),
        ("H100", "2x8xh100-pcie"),
        ("A100", "1x8xA100-80G"),
        ("AMD-Instinct-MI300X-OAM", "1x8xMI300X"),
        ("RTX-PRO-6000", "1x4xRTX-PRO-6000(memory=96GB,tflops=500)"),
        ("H100", "1x8xunknown"),
        ("H100", "1x8x(memory=96GB,tflops=500)"),
        ("H100", "4xCPU(cpus=16,memory=64GB)"),
    ],
)
def test_a_shape_of_the_card_that_is_asked_for(asked: str | None, shape: str) -> None:
    check_accelerator(asked, parse_shape(shape))


@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        ("H100", "1x8xA100"),
        ("L40", "1x8xL40S"),
        ("A100-80G", "1x8xA100"),
        ("Intel-GPU-Max-1550", "1x8xMine(memory=96GB,tflops=500)"),
    ],
)
def test_a_shape_of_another_card_is_refused(asked: str, shape: str) -> None:
    with pytest.raises(PlanError) as refused:
        check_accelerator(asked, parse_shape(shape))
    card = parse_shape(shape).accelerator
    assert card is not None
    assert f"resources.accelerator = {asked}: {shape} has {card.name};" in str(refused.value)
