"""The plan of a run: batch arithmetic, memory by term, time, the ZeRO stage and the DeepSpeed
configuration.

Pure, but for `machine`, which looks at this machine; it imports neither torch nor ray and writes
nothing.
"""

from dray.plan.batch import BatchPlan, make_batch, num_steps_of
from dray.plan.hardware import (
    ACCELERATORS,
    Accelerator,
    Precision,
    Shape,
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
from dray.plan.table import format_bytes, format_plan, format_seconds
from dray.plan.zero_config import Buckets, make_buckets, make_deepspeed_config

__all__ = [
    "ACCELERATORS",
    "FIRST_SECONDS",
    "LAWFUL",
    "Accelerator",
    "BatchPlan",
    "Buckets",
    "Card",
    "Counted",
    "Dimensions",
    "FailureRate",
    "Law",
    "MemoryPlan",
    "ParameterCount",
    "Plan",
    "Precision",
    "SaveInterval",
    "Shape",
    "choose_interval",
    "count_parameters",
    "daly_interval",
    "describe_law",
    "expected_goodput",
    "find_cards",
    "format_bytes",
    "format_plan",
    "format_seconds",
    "load_config",
    "load_dimensions",
    "local_shape",
    "make_accelerator",
    "make_batch",
    "make_buckets",
    "make_deepspeed_config",
    "make_plan",
    "match_accelerator",
    "num_steps_of",
    "parse_shape",
    "used_memory_share",
    "with_measured_step",
    "with_numbers",
]
