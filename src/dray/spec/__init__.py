"""The frozen spec.

`spec.py` has its sections, loading, overrides and identity; `yaml_reading.py` reads the YAML that people write.
"""

from dray.spec.spec import (
    MAX_SPEC_BYTES,
    NAME_RULE,
    RUN_NAME,
    Cleaning,
    Duration,
    HeldOut,
    Numerics,
    Optimizer,
    Resources,
    Schedule,
    Source,
    Spec,
    Tokenizer,
    Watchdog,
    differing_paths,
    dump_spec,
    load_spec,
    load_text,
    make_spec,
    recipe_names,
    without_places,
)
from dray.spec.yaml_reading import BadYaml, read_yaml

__all__ = [
    "MAX_SPEC_BYTES",
    "NAME_RULE",
    "RUN_NAME",
    "BadYaml",
    "Cleaning",
    "Duration",
    "HeldOut",
    "Numerics",
    "Optimizer",
    "Resources",
    "Schedule",
    "Source",
    "Spec",
    "Tokenizer",
    "Watchdog",
    "differing_paths",
    "dump_spec",
    "load_spec",
    "load_text",
    "make_spec",
    "read_yaml",
    "recipe_names",
    "without_places",
]
