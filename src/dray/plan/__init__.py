"""The plan of a run: batch arithmetic, memory by term, time, the ZeRO stage and the DeepSpeed
configuration.

Pure, but for `machine`, which looks at this machine; it imports neither torch nor ray and writes
nothing.
"""

from dray.plan.batch import BatchPlan, make_batch, num_steps_of
from dray.plan.demands import Demands, Requests, make_demands
from dray.plan.hardware import (
    ACCELERATORS,
    Accelerator,
    Precision,
    Shape,
    check_accelerator,
    match_accelerator,
    parse_shape,
)
from dray.plan.intervals import (
    FIRST_SECONDS,
    FailureRate,
    SaveInterval,
    choose_interval,
    daly_interval,
    expected_goodput,
)
from dray.plan.laws import LAWFUL, Law, describe_law, with_numbers
from dray.plan.machine import (
    Card,
    find_cards,
    free_disk_bytes,
    local_shape,
    make_accelerator,
    used_memory_share,
)
from dray.plan.memory import MemoryPlan
from dray.plan.parameters import (
    Counted,
    Dimensions,
    ParameterCount,
    count_parameters,
    load_config,
    load_dimensions,
)
from dray.plan.plan import Plan, make_plan, with_measured_step
from dray.plan.prices import (
    Cost,
    Prices,
    check_instance,
    find_instance,
    load_prices,
    make_shape,
    price_instances,
    price_workers,
)
from dray.plan.rows import RowCost
from dray.plan.stages import Stage, make_stages
from dray.plan.table import (
    format_bytes,
    format_money,
    format_plan,
    format_seconds,
    format_stages,
)
from dray.plan.zero_config import Buckets, make_buckets, make_deepspeed_config

__all__ = [
    "ACCELERATORS",
    "FIRST_SECONDS",
    "LAWFUL",
    "Accelerator",
    "BatchPlan",
    "Buckets",
    "Card",
    "Cost",
    "Counted",
    "Demands",
    "Dimensions",
    "FailureRate",
    "Law",
    "MemoryPlan",
    "ParameterCount",
    "Plan",
    "Precision",
    "Prices",
    "Requests",
    "RowCost",
    "SaveInterval",
    "Shape",
    "Stage",
    "check_accelerator",
    "check_instance",
    "choose_interval",
    "count_parameters",
    "daly_interval",
    "describe_law",
    "expected_goodput",
    "find_cards",
    "find_instance",
    "format_bytes",
    "format_money",
    "format_plan",
    "format_seconds",
    "format_stages",
    "free_disk_bytes",
    "load_config",
    "load_dimensions",
    "load_prices",
    "local_shape",
    "make_accelerator",
    "make_batch",
    "make_buckets",
    "make_deepspeed_config",
    "make_demands",
    "make_plan",
    "make_shape",
    "make_stages",
    "match_accelerator",
    "num_steps_of",
    "parse_shape",
    "price_instances",
    "price_workers",
    "used_memory_share",
    "with_measured_step",
    "with_numbers",
]
