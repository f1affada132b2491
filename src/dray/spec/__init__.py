"""The frozen spec.

`sections.py` has its sections, `optimizers.py` the one of the optimiser, `augmenting.py` that of
augmentation, `adapting.py` those of
adapters and frozen layers, `releasing.py` those of what is done with a run afterwards, `spec.py`
the whole; `loading.py` reads and overrides it, `yaml_reading.py` reads the YAML that people write,
`mistakes.py` says in a line what is wrong; `identity.py` compares two.
"""

from dray.spec.adapting import ADAPTERS, Adapters, Freezing
from dray.spec.augmenting import TEXT_CHANGES, Augmentation, BackTranslation, Translator
from dray.spec.data import Cleaning, HeldOut, Near, Redaction, as_redaction
from dray.spec.filtering import (
    C4,
    Decontamination,
    Filters,
    FineWeb,
    GopherQuality,
    GopherRepetition,
    Languages,
)
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
from dray.spec.private import Privacy
from dray.spec.releasing import STAGES, Compress, Evaluate, Export, Serve
from dray.spec.sections import (
    NAME_RULE,
    RUN_NAME,
    Adversarial,
    Checkpoint,
    Distil,
    Duration,
    Ema,
    Float,
    GradientNoise,
    Int,
    Model,
    Numerics,
    Regularization,
    Resources,
    Schedule,
    Section,
    Swa,
    Tokenizer,
    Watchdog,
)
from dray.spec.sources import Gather, Names, Source
from dray.spec.spec import Spec
from dray.spec.tasks import (
    TEXT_KINDS,
    WHOLE,
    Direction,
    Field,
    Head,
    NoSettings,
    default_task,
    dump_task,
    find_task,
    task_names,
)
from dray.spec.yaml_reading import BadYaml, read_yaml

__all__ = [
    "ADAPTERS",
    "C4",
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
    "Decontamination",
    "Direction",
    "Distil",
    "Duration",
    "Ema",
    "Evaluate",
    "Export",
    "Field",
    "Filters",
    "FineWeb",
    "Float",
    "Freezing",
    "Gather",
    "GopherQuality",
    "GopherRepetition",
    "GradientNoise",
    "Head",
    "HeldOut",
    "Int",
    "Languages",
    "Model",
    "Names",
    "Near",
    "NoSettings",
    "Numerics",
    "Optimizer",
    "Packaged",
    "Privacy",
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
    "as_redaction",
    "default_task",
    "differing_paths",
    "dump_spec",
    "dump_task",
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
