"""What an hour costs: of a worker, as the person says, or of an instance, by a dated table.

The table that comes with dray (prices.yaml) holds public prices, which change faster than code: it
says of when they are, and a file of the same form takes its place.
"""

from __future__ import annotations

import difflib
import math
from typing import Annotated, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from dray.errors import PlanError, SpecError
from dray.plan.hardware import GB, GIB, Shape, find_accelerator
from dray.spec import Float, Int, Packaged, Resources, Section, load_tree, translate

TABLES = Packaged("dray.plan", "price table", "a price table is a UTF-8 text file of YAML")


class Instance(Section):
    """A kind of machine that is rented by the hour."""

    cloud: str = ""
    """Whose it is."""
    price_per_hour: Annotated[Float, Field(gt=0)]
    """Of the whole instance."""
    accelerator: str | None = None
    """Name of its GPUs, as `--shape` takes it."""
    accelerators: Annotated[Int, Field(ge=0)] = 0
    """How many it has."""
    cpus: Annotated[Float, Field(gt=0)]
    """Virtual ones."""
    memory_gib: Annotated[Float, Field(gt=0)]
    """Host memory."""
    network_gbit: Annotated[Float, Field(gt=0)] = 100.0
    """To other instances, one way."""
    bf16: bool = False
    """Whether its CPUs compute in it."""

    @model_validator(mode="after")
    def _named_and_counted(self) -> Self:
        if (self.accelerator is None) != (self.accelerators == 0):
            raise ValueError(
                "`accelerator` names the GPUs that `accelerators` counts: both or none"
            )
        return self

    @field_validator("accelerator")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and find_accelerator(name) is None:
            raise ValueError("no accelerator that --shape knows")
        return name


class Prices(Section):
    """Instances and what they cost."""

    as_of: str
    """When the prices were these."""
    currency: str = "USD"
    """Of all of them."""
    approximate: bool = False
    """Whether they are public ones, which nobody with a contract pays."""
    instances: dict[str, Instance]
    """By name."""


class Cost(BaseModel):
    """What something costs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    price_per_hour: float
    """Of all that is rented."""
    rented: str
    """What that is."""
    hours: float | None
    """None: not known yet."""
    money: float | None
    currency: str
    as_of: str = ""
    """Of the table; empty: the person gave the price."""
    approximate: bool = False


def load_prices(file: str | None = None) -> Prices:
    """The table in a file, or the one that comes with dray. Raises SpecError."""
    where = file or "prices"
    try:
        return Prices.model_validate(load_tree(where, (), TABLES))
    except ValidationError as error:
        raise translate(error, where, (), Prices) from error


def find_instance(prices: Prices, name: str) -> Instance:
    """The instance of that name. Raises PlanError."""
    found = prices.instances.get(name)
    if found is None:
        near = difflib.get_close_matches(name, prices.instances, n=1)
        raise PlanError(
            f"--instance {name}",
            f"is not among the prices of {prices.as_of}",
            f"there are {', '.join(sorted(prices.instances))}",
            f"did you mean {near[0]}?" if near else "--prices FILE brings others",
        )
    return found


def make_shape(name: str, instance: Instance, resources: Resources) -> Shape:
    """As many instances as the most workers of a spec need, as a shape. Raises PlanError where one
    cannot hold a worker."""
    gpus, cpus = resources.gpus_per_worker, resources.cpus_per_worker
    on_one = int((instance.cpus + 1e-9) // cpus)
    if gpus:
        on_one = min(on_one, int((instance.accelerators + 1e-9) // gpus))
    if on_one < 1:
        raise PlanError(
            f"--instance {name}",
            f"has {instance.accelerators} GPUs and {instance.cpus:g} CPUs",
            f"a worker takes {gpus:g} GPU and {cpus:g} CPUs",
            "name a larger one, or give workers less",
        )
    readers = 0.0 if gpus else resources.reader_cpus
    num_nodes = math.ceil(resources.max_workers / on_one)
    if num_nodes * instance.cpus < resources.max_workers * cpus + readers:
        num_nodes += 1
    return Shape(
        name=f"{num_nodes} × {name}",
        num_nodes=num_nodes,
        accelerators_per_node=instance.accelerators,
        accelerator=find_accelerator(instance.accelerator) if instance.accelerator else None,
        cpus_per_node=instance.cpus,
        memory_bytes_per_node=int(instance.memory_gib * GIB),
        cpu_bf16=instance.bf16,
        cpu_core_fp32_flops=115e9,
        cpu_core_bf16_flops=850e9 if instance.bf16 else None,
        network_bytes_per_second=instance.network_gbit * GB / 8,
    )


def check_instance(name: str, instance: Instance, shape: Shape) -> None:
    """Raise PlanError for a shape whose nodes have other GPUs than the instance."""
    card = shape.accelerator.name if shape.accelerator else None
    known = find_accelerator(instance.accelerator) if instance.accelerator else None
    has = f"{instance.accelerators} × {known.name}" if known else "no GPUs"
    if shape.accelerators_per_node != instance.accelerators or (
        known is not None and card is not None and card.lower() != known.name.lower()
    ):
        nodes = f"{shape.accelerators_per_node} × {card}" if card else "no GPUs"
        raise PlanError(
            f"--instance {name}",
            f"has {has}",
            f"the nodes of {shape.name or 'the cluster'} have {nodes}",
            "leave --shape out, or name the instance that it is made of",
        )


def price_workers(price_per_hour: float, num_workers: int, seconds: float | None) -> Cost:
    """What workers cost, at the person's price of an hour of one of them. Raises SpecError."""
    if not (price_per_hour > 0 and math.isfinite(price_per_hour)):
        raise SpecError(f"--price {price_per_hour:g}", "is no price", "it is above 0")
    rented = f"{num_workers} worker{'s' * (num_workers > 1)} at {price_per_hour:g}"
    return _make_cost(price_per_hour * num_workers, rented, seconds, currency="")


def price_instances(prices: Prices, name: str, num_instances: int, seconds: float | None) -> Cost:
    """What whole instances cost, used up or not."""
    price = find_instance(prices, name).price_per_hour
    return _make_cost(
        price * num_instances,
        f"{num_instances} × {name} at {price:g}",
        seconds,
        currency=prices.currency,
        as_of=prices.as_of,
        approximate=prices.approximate,
    )


def _make_cost(
    price_per_hour: float,
    rented: str,
    seconds: float | None,
    *,
    currency: str,
    as_of: str = "",
    approximate: bool = False,
) -> Cost:
    hours = None if seconds is None else seconds / 3600
    return Cost(
        price_per_hour=price_per_hour,
        rented=rented,
        hours=hours,
        money=None if hours is None else hours * price_per_hour,
        currency=currency,
        as_of=as_of,
        approximate=approximate,
    )
