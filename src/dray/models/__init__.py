"""Models: transformers architectures by name and sizes or from a folder, the same weights under every ZeRO stage.

`config.py` turns the spec into a transformers configuration, `initialize.py` draws the weights, `folder.py` reads and
writes Hugging Face folders, `build.py` puts them together. Knows no DeepSpeed, reads no pickles, runs no remote code.
"""

from dray.models.build import (
    build_model,
    check_builds,
    enable_activation_checkpointing,
    import_transformers,
    num_parameters,
    parameter_groups,
)
from dray.models.config import longest_row, make_config, make_kept_config, read_config
from dray.models.folder import LoadReport, check_folder, save_pretrained_folder
from dray.models.initialize import initialize_weights, restore_rotary_buffers

__all__ = [
    "LoadReport",
    "build_model",
    "check_builds",
    "check_folder",
    "enable_activation_checkpointing",
    "import_transformers",
    "initialize_weights",
    "longest_row",
    "make_config",
    "make_kept_config",
    "num_parameters",
    "parameter_groups",
    "read_config",
    "restore_rotary_buffers",
    "save_pretrained_folder",
]
