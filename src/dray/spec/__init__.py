"""The frozen spec.

`sections.py` has its sections, `optimizers.py` the one of the optimiser, `augmenting.py` that of
augmentation, `redacting.py` that of personal data, `adapting.py` those of
adapters and frozen layers, `releasing.py` those of what is done with a run afterwards, `spec.py`
the whole; `loading.py` reads and overrides it, `yaml_reading.py` reads the YAML that people write,
`mistakes.py` says in a line what is wrong; `identity.py` compares two.
"""

from dray.spec.adapting import ADAPTERS, Adapters, Freezing
from dray.spec.augmenting import TEXT_CHANGES, Augmentation, BackTranslation, Translator
from dray.spec.identity import differing_paths, without_places
from dray.spec.loading import (
    MAX_SPEC_BYTES,
    Packaged,
    dump_spec,
    load_spec,
    load_text,
    load_tree,
    make_spec,
    recipe_names,
    with_value,
)
from dray.spec.mistakes import shown_words, translate
from dray.spec.optimizers import OPTIMIZERS, Optimizer, State
from dray.spec.redacting import Redaction
from dray.spec.releasing import STAGES, Compress, Evaluate, Export, Serve
from dray.spec.sections import (
    NAME_RULE,
    RUN_NAME,
    Adversarial,
    Checkpoint,
    Cleaning,
    Distil,
    Duration,
    Ema,
    Float,
    Gather,
    GradientNoise,
    HeldOut,
    Int,
    Model,
    Names,
    Numerics,
    Regularization,
    Resources,
    Schedule,
    Section,
    Source,
    Swa,
    Tokenizer,
    Watchdog,
)
from dray.spec.spec import Spec
from dray.spec.tasks import (
    TEXT_KINDS,
    WHOLE,
    Direction,
    Field,
    Head,
    NoSettings,
    default_task,
    find_task,
    task_names,
)
from dray.spec.yaml_reading import BadYaml, read_yaml

__all__ = [
    "ADAPTERS",
    "MAX_SPEC_BYTES",
    "NAME_RULE",
    "OPTIMIZERS",
    "RUN_NAME",
    "STAGES",
    "TEXT_CHANGES",
    "TEXT_KINDS",
    "WHOLE",
    "Adapters",
    "Adversarial",
    "Augmentation",
    "BackTranslation",
    "BadYaml",
    "Checkpoint",
    "Cleaning",
    "Compress",
    "Direction",
    "Distil",
    "Duration",
    "Ema",
    "Evaluate",
    "Export",
    "Field",
    "Float",
    "Freezing",
    "Gather",
    "GradientNoise",
    "Head",
    "HeldOut",
    "Int",
    "Model",
    "Names",
    "NoSettings",
    "Numerics",
    "Optimizer",
    "Packaged",
    "Redaction",
    "Regularization",
    "Resources",
    "Schedule",
    "Section",
    "Serve",
    "Source",
    "Spec",
    "State",
    "Swa",
    "Tokenizer",
    "Translator",
    "Watchdog",
    "default_task",
    "differing_paths",
    "dump_spec",
    "find_task",
    "load_spec",
    "load_text",
    "load_tree",
    "make_spec",
    "read_yaml",
    "recipe_names",
    "shown_words",
    "task_names",
    "translate",
    "with_value",
    "without_places",
]
