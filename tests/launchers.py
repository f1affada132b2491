"""The files for Ray's cluster launcher, read as Ray reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

CLUSTER = Path(__file__).parents[1] / "cluster"


def load_launcher(name: str) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config: dict[str, Any] = prepare_config(yaml.safe_load((CLUSTER / name).read_text()))
    validate_config(config)
    return config
