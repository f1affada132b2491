"""What an hour costs, by the table that comes with dray and by a person's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dray.cli import main
from dray.errors import PlanError, SpecError
from dray.plan import (
    ACCELERATORS,
    find_instance,
    load_prices,
    make_shape,
    parse_shape,
    price_workers,
)
from dray.plan.prices import check_instance, price_instances
from dray.spec import Resources

OWN = """
as_of: "2027-01"
currency: EUR
instances:
  two: {price_per_hour: 3, accelerator: H100, accelerators: 2, cpus: 8, memory_gib: 64}
  none: {price_per_hour: 0.5, cpus: 4, memory_gib: 16}
"""


def test_the_table_that_comes_with_dray() -> None:
    prices = load_prices()
    assert (prices.currency, prices.approximate, prices.as_of) == ("USD", True, "2026-08")
    for name, instance in prices.instances.items():
        shape = make_shape(name, instance, Resources(gpus_per_worker=min(1, instance.accelerators)))
        card = shape.accelerator
        assert (card is None) == (instance.accelerators == 0), name
        assert card is None or card.name.lower() in ACCELERATORS, name
        # Half a dollar to fifteen an hour and GPU: what lies outside is a slip of the pen.
        assert 0.4 < instance.price_per_hour / max(1, instance.accelerators) < 15, name


def test_as_many_instances_as_the_workers_need() -> None:
    prices = load_prices()
    p5 = find_instance(prices, "p5.48xlarge")
    for workers, nodes in ((1, 1), (8, 1), (9, 2), ((2, 64), 8)):
        shape = make_shape("p5.48xlarge", p5, Resources(workers=workers, gpus_per_worker=1))
        assert (shape.num_nodes, shape.num_accelerators) == (nodes, 8 * nodes)
    cpu = find_instance(prices, "m7i.48xlarge")
    for cpus, nodes in ((190, 2), (192, 3)):  # somebody must read
        group = Resources(workers=2, cpus_per_worker=cpus)
        assert make_shape("m7i.48xlarge", cpu, group).num_nodes == nodes
    with pytest.raises(
        PlanError, match="has 8 GPUs and 192 CPUs; a worker takes 1 GPU and 200 CPUs"
    ):
        make_shape("p5.48xlarge", p5, Resources(gpus_per_worker=1, cpus_per_worker=200))


def test_what_is_rented_is_paid_whole() -> None:
    prices = load_prices()
    cost = price_instances(prices, "p5.48xlarge", 2, 1800.0)
    assert (cost.price_per_hour, cost.hours, cost.money) == (110.08, 0.5, 55.04)
    assert cost.approximate
    own = price_workers(2.5, 4, 7200.0)
    assert (own.price_per_hour, own.money, own.currency) == (10.0, 20.0, "")
    assert price_workers(2.5, 4, None).money is None


@pytest.mark.parametrize("price", [0.0, -1.0, float("inf"), float("nan")])
def test_what_is_no_price(price: float) -> None:
    with pytest.raises(SpecError, match="is no price; it is above 0"):
        price_workers(price, 1, None)


def test_a_type_that_is_not_there() -> None:
    with pytest.raises(PlanError, match=r"did you mean p5\.48xlarge\?"):
        find_instance(load_prices(), "p5.24xlarge")


def test_an_instance_with_other_gpus_than_the_shape() -> None:
    p5 = find_instance(load_prices(), "p5.48xlarge")
    check_instance("p5.48xlarge", p5, parse_shape("3x8xH100"))
    for shape, has in (("1x8xA100", "8 × A100"), ("1x4xH100", "4 × H100")):
        with pytest.raises(PlanError, match=f"the nodes of {shape} have {has}"):
            check_instance("p5.48xlarge", p5, parse_shape(shape))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("as_of: x\ninstances: {a: {price_per_hour: 0, cpus: 1, memory_gib: 1}}", "greater than 0"),
        ("as_of: x\ninstances: {a: {cpus: 1, memory_gib: 1}}", "price_per_hour is missing"),
        ("instances: {}", "as_of is missing"),
        (
            "as_of: x\ninstances:\n"
            "  a: {price_per_hour: 1, accelerator: H111, cpus: 1, memory_gib: 1}",
            "no accelerator that --shape knows",
        ),
    ],
)
def test_a_table_with_a_mistake(text: str, what: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(SpecError, match=what):
        load_prices(str(file))


def test_a_persons_own_table_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(OWN)
    words = ["plan", "quickstart", "--prices", "mine.yaml", "--instance"]
    gpus = ["resources.gpus_per_worker=1", "resources.workers=4", "batch.global_rows=16"]
    assert main([*words, "two", *gpus, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["shape"]["num_nodes"], found["shape"]["accelerator"]["name"]) == (2, "H100")
    cost, demands = found["cost"], found["demands"]
    assert (cost["price_per_hour"], cost["currency"], cost["as_of"]) == (6.0, "EUR", "2027-01")
    assert cost["money"] == pytest.approx(6 * demands["seconds_with_failures"] / 3600)
    assert demands["free_bytes"] > 0
    assert main([*words, "p5.48xlarge"]) == 2
    assert "there are none, two" in capsys.readouterr().err
    for card, code in (("H100", 0), ("A100", 2)):
        assert main([*words, "two", *gpus, f"resources.accelerator={card}"]) == code
    assert "accelerator = A100: 2 × two has H100; " in capsys.readouterr().err
    at_home = ["plan", "quickstart", "resources.labels={zone: b}"]
    assert main(at_home) == 0  # which nodes there will be nobody knows


def test_options_that_contradict_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words, what in (
        (["--price", "2", "--instance", "p5.48xlarge"], "has a price of its own"),
        (["--prices", "mine.yaml"], "prices nothing; --instance says"),
        (["--shape", "1x8xH100", "--address", "x:1"], "has a shape of its own"),
        (["--measure", "--instance", "p5.48xlarge"], "is not this machine"),
        (["space.budget.trials=3"], "there is no space"),
    ):
        assert main(["plan", "quickstart", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert what in line
    assert list(tmp_path.iterdir()) == []


def test_what_is_said_of_money_and_of_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "quickstart", "--price-per-hour", "2.5", "--storage", "s3://b/x"]) == 0
    out = capsys.readouterr().out
    assert "2 workers at 2.5" in out
    assert "an hour                          5.00" in out
    assert "PUT, LIST" in out
    assert "a checkpoint" in out
    assert "sweep" not in out
