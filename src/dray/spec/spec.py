"""The whole spec, and what of it makes a run what it is.

A spec says everything that changes the result of a run (its identity) and where it runs (its
place). The fingerprint covers the identity alone. Nothing here reads the environment, and secrets
have no field to go into.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from dray.spec.adapting import AdaptersChoice, Freezing
from dray.spec.augmenting import KEEPS_PLACES, TEXT_CHANGES, Augmentation
from dray.spec.data import Data
from dray.spec.optimizers import AdamW, OptimizerChoice
from dray.spec.private import Privacy
from dray.spec.releasing import STAGES, Compress, Evaluate, Export, Serve
from dray.spec.sections import (
    ORIGIN_NAME,
    BatchSize,
    Checkpoint,
    Distil,
    Duration,
    Execution,
    Int,
    Model,
    Numerics,
    OneOrMore,
    Regularization,
    Resources,
    RunName,
    Schedule,
    Section,
    Tokenizer,
    Tracking,
    Validation,
    Watchdog,
    Zero,
    as_several,
)
from dray.spec.tasks import TaskChoice, check_fields

LATER_SECTIONS = ("adapters", "freezing", "augmentation", "distil", "privacy")
"""What is a part of an identity where it is given."""
_LEFT_OUT = Field(exclude_if=lambda given: given is None)
"""Of a section that a spec need not have: one that is not given stands nowhere."""


def _tokenizer_of(model: Model) -> Tokenizer | None:
    """That of the run which a model starts from."""
    return None if model.run is None else Tokenizer(run=model.run)


class Spec(Section):
    """One run, whole."""

    name: RunName
    """Default name of the run: letters, digits, `.`, `_` and `-`."""
    task: Annotated[TaskChoice, Field(default=None, validate_default=True)]
    """What is learnt: the name of a task, or a mapping with its `name` and its settings."""
    data: Data
    """The corpus."""
    tokenizer: Tokenizer = Tokenizer(train="byte_bpe")
    """The tokeniser."""
    model: Model
    """The model."""
    adapters: Annotated[AdaptersChoice | None, _LEFT_OUT] = None
    """Small trained parts in a model that stays as it is. None: the model itself is trained."""
    freezing: Annotated[Freezing | None, _LEFT_OUT] = None
    """Layers that are not trained. None: all are."""
    batch: BatchSize = BatchSize()
    """The batch."""
    optimizer: OptimizerChoice = AdamW()
    """The optimiser."""
    schedule: Schedule = Schedule()
    """The learning rate over the steps."""
    regularization: Regularization = Regularization()
    """Regularisation."""
    augmentation: Annotated[Augmentation | None, _LEFT_OUT] = None
    """Training rows in other words each time. None: as they were prepared."""
    distil: Annotated[Distil | None, _LEFT_OUT] = None
    """A teacher. None: the task's own loss alone."""
    privacy: Annotated[Privacy | None, _LEFT_OUT] = None
    """Differential privacy. None: there is none."""
    duration: Duration
    """How long to train."""
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "auto"
    """Compute precision; `auto`: bf16 where the hardware computes in it, else fp32."""
    validation: Validation = Validation()
    """When to validate."""
    checkpoint: Checkpoint = Checkpoint()
    """When to commit checkpoints."""
    numerics: Numerics = Numerics()
    """Bad numbers."""
    watchdog: Watchdog = Watchdog()
    """Hangs."""
    resources: Resources = Resources()
    """Workers."""
    zero: Zero = Zero()
    """ZeRO."""
    engine: Execution = Execution()
    """Compilation and activation checkpointing."""
    tracking: Tracking = Tracking()
    """Trackers."""
    seed: Annotated[Int, Field(ge=0, lt=2**32)] = 0
    """Seed of the initial weights, the order of the rows and dropout."""
    evaluate: Annotated[Evaluate | None, _LEFT_OUT] = None
    """The gate of `dray release`. None: it measures nothing anew."""
    compress: Annotated[Compress | None, _LEFT_OUT] = None
    """How `dray release` makes the model smaller. None: not at all."""
    export: Annotated[
        tuple[Export, ...],
        BeforeValidator(as_several),
        OneOrMore,
        Field(exclude_if=lambda given: not given),
    ] = ()
    """What `dray release` writes for others: one, or a list."""
    serve: Annotated[Serve | None, _LEFT_OUT] = None
    """Where `dray release` lets the model answer. None: nowhere."""

    @model_validator(mode="before")
    @classmethod
    def _with_its_tokenizer(cls, given: Any) -> Any:
        """What a run has trained means something under that run's tokeniser alone."""
        model = given.get("model") if isinstance(given, Mapping) else None
        name = model.get("run") if isinstance(model, Mapping) else None
        if given.get("tokenizer") is not None or not re.fullmatch(ORIGIN_NAME, str(name or "")):
            return given  # what is wrong with a name is said of the key that somebody typed
        return {**given, "tokenizer": {"run": name}}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_fields(self.task)
        validation = self.data.validation if isinstance(self.data.validation, tuple) else ()
        for source in (*self.data.train, *validation):
            for name in source.columns:
                if name not in self.task.fields:
                    raise ValueError(
                        f"data: columns.{name}: {self.task.name} reads "
                        f"{', '.join(self.task.fields)}"
                    )
            for name, field in self.task.fields.items():
                if field.wanted and field.column_in(source, name, source.format) is None:
                    raise ValueError(
                        f"data: task {self.task.name} needs a `{name}` column in every source"
                    )
        self._check_tokens()
        self._check_words()
        if self.task.num_outputs is not None and self.model.num_labels not in (
            None,
            self.task.num_outputs,
        ):
            raise ValueError(
                f"model.num_labels = {self.model.num_labels}: {self.task.name} has "
                f"{self.task.num_outputs}"
            )
        if self.validation.metric not in self.task.metrics:
            raise ValueError(
                f"validation.metric = {self.validation.metric}: {self.task.name} has "
                f"{', '.join(self.task.metrics)}"
            )
        weighted = [source.weight is not None for source in self.data.train]
        if any(weighted) and not all(weighted):
            raise ValueError("data.train: give every source a weight, or none")
        for key, value in (("stage", self.zero.stage), ("offload", self.zero.offload)):
            if not self.optimizer.elementwise and value not in (0, "auto", "none"):
                raise ValueError(
                    f"zero.{key} = {value}: {self.optimizer.name} goes by "
                    f"{self.optimizer.unit}, which ZeRO 1 to 3 cut up; give zero.stage=0 "
                    "zero.offload=none, or another optimizer"
                )
        if self.duration.steps is not None:
            self.schedule.check_length(self.duration.steps)
        return self

    def _check_words(self) -> None:
        """Raise ValueError for a tokeniser of another kind than the task's tokens, and for
        documents gathered of what is no name."""
        train = self.tokenizer.train
        if (
            train is not None
            and self.task.tokenizes
            and (train == "words") != self.task.whole_words
        ):
            wanted = "words" if self.task.whole_words else "byte_bpe"
            raise ValueError(
                f"tokenizer.train = {train}: the tokens of {self.task.name} are "
                f"{'whole names' if self.task.whole_words else 'pieces of text'}; give {wanted}"
            )
        validation = self.data.validation if isinstance(self.data.validation, tuple) else ()
        kinds = [field.kind for field in self.task.fields.values()]
        if self.data.balance and "label" not in kinds:
            raise ValueError(
                f"data.balance = {self.data.balance:g}: documents of {self.task.name} have not one "
                "label each; leave it out"
            )
        if kinds != ["names"] and any(source.gather for source in (*self.data.train, *validation)):
            raise ValueError(
                f"data: gather: {self.task.name} reads {', '.join(self.task.fields)}; documents "
                "are gathered of names alone; leave it out"
            )

    def _check_tokens(self) -> None:
        """Raise ValueError for what a model of tokens lacks, or one of something else cannot
        have."""
        task, model = self.task, self.model
        if self.row_tokens <= task.needed_tokens:
            raise ValueError(
                f"data.sequence_tokens = {self.row_tokens}: {task.name} needs room for "
                f"{task.needed_tokens} tokens beside a document's first; give "
                f"{task.needed_tokens + 1} or more"
            )
        if task.tokenizes:
            for name in ("hidden_size", "num_layers", "num_heads"):
                if model.architecture is not None and getattr(model, name) is None:
                    raise ValueError(f"model: `{name}` is needed with `architecture`")
            return
        reads = f"{task.name} reads {', '.join(task.fields)}, no text; leave"
        if self.tokenizer not in (Tokenizer(train="byte_bpe"), _tokenizer_of(model)):
            raise ValueError(f"tokenizer: {reads} the section out")
        for name in ("vocab_size", "max_positions"):
            if getattr(model, name) is not None:
                raise ValueError(f"model.{name} = {getattr(model, name)}: {reads} it out")

    @model_validator(mode="after")
    def _releases(self) -> Self:
        named = {
            "evaluate.gate": self.evaluate and self.evaluate.gate,
            "compress.max_drop": self.compress and self.compress.max_drop,
        }
        for section, metrics in named.items():
            for metric in metrics or ():
                if metric not in self.task.metrics:
                    raise ValueError(
                        f"{section}.{metric}: {self.task.name} has {', '.join(self.task.metrics)}"
                    )
        folders = [one.folder for one in self.export]
        if twice := next((one for one in folders if folders.count(one) > 1), ""):
            raise ValueError(f"export: two are written to {twice}; give each a folder of its own")
        for section, of in (("serve", self.serve), *(("export", one) for one in self.export)):
            if of is not None and of.of == "compressed" and self.compress is None:
                raise ValueError(
                    f"{section}.of = compressed: nothing is compressed; give compress.methods, or "
                    "of: trained"
                )
        return self

    @property
    def stages(self) -> tuple[str, ...]:
        """What `dray release` does with it, in order."""
        given = {
            "evaluate": self.evaluate,
            "compress": self.compress,
            "export": self.export,
            "promote": self.serve,
            "serve": self.serve,
        }
        return tuple(stage for stage in STAGES if given.get(stage, True))

    @model_validator(mode="after")
    def _lawful(self) -> Self:
        if self.is_auto and (why := self.why_no_law):
            key = "optimizer.learning_rate" if self.batch.global_rows else "batch.global_rows"
            raise ValueError(f"{key} = auto: {why}; give a number")
        return self

    @model_validator(mode="after")
    def _wide(self) -> Self:
        if self.optimizer.base_hidden_size is None:
            return self
        why = ""
        if self.model.hidden_size is None:
            why = f"the model starts from {self.model.origin}, whose weights are what they are"
        elif self.model.tie_embeddings and self.task.head.over == "vocabulary":
            why = "a tied head cannot have another rate than the embedding; give "
            why += "model.tie_embeddings=false"
        if why:
            raise ValueError(f"optimizer.width_transfer: {why}")
        return self

    @model_validator(mode="after")
    def _taught(self) -> Self:
        if self.distil is not None and self.zero.stage == 3:
            raise ValueError(
                "zero.stage = 3: a teacher's and a student's outputs are compared outside of their "
                "modules, where ZeRO 3 has no weights; give zero.stage=2"
            )
        return self

    @model_validator(mode="after")
    def _passes_again(self) -> Self:
        given, wanted = self.regularization, list[str]()
        if given.r_drop:
            wanted.append("regularization.r_drop")
        if given.adversarial is not None:
            wanted.append("regularization.adversarial")
        if self.distil is not None and wanted:
            wanted.append("distil")
        if len(wanted) > 1:
            raise ValueError(f"{' and '.join(wanted)}: each makes a loss of its own; give one")
        compares = given.r_drop or (given.adversarial and given.adversarial.name == "smart")
        if compares and self.zero.stage == 3 and self.task.head.over == "vocabulary":
            raise ValueError(
                f"{wanted[0]}: zero.stage = 3: outputs are compared outside of their modules, "
                "where ZeRO 3 has no weights of a head over a vocabulary; give zero.stage=2"
            )
        if wanted and self.task.pools:
            raise ValueError(
                f"{wanted[0]}: {self.task.name} has a loss of all rows together, which has one "
                "pass of each; leave it out"
            )
        if given.r_drop and not (given.dropout or given.dropouts):
            raise ValueError(
                "regularization.r_drop: two passes without dropout are the same; give "
                "regularization.dropout=0.1"
            )
        return self

    @model_validator(mode="after")
    def _hides_rows(self) -> Self:
        if self.privacy is None:
            return self
        task, given, why = self.task, self.regularization, ""
        if self.zero.stage != 0:
            why = f"zero.stage = {self.zero.stage}: a row's gradient is whole at stage 0 alone"
            why += "; give zero.stage=0"
        elif self.precision == "fp16":
            why = "precision = fp16: its scaled gradients are no rows' own; give bf16 or fp32"
        elif given.r_drop or given.adversarial is not None or self.distil is not None:
            why = "r_drop, adversarial and distil make losses of their own; leave them out"
        elif task.packs or task.pools or task.explores or task.rows_together > 1:
            why = (
                f"a row of {task.name} is no document by itself; a task with a document a row is "
                "wanted, such as sequence_classification or instruction"
            )
        elif self.numerics.spike == "rewind":
            why = "numerics.spike = rewind: what is left out depends on the rows; give spike=warn"
        elif self.engine.activation_checkpointing is True or self.engine.compile is True:
            why = (
                "engine.compile and activation_checkpointing are for whole batches; leave them out"
            )
        if why:
            raise ValueError(f"privacy: {why}")
        return self

    @model_validator(mode="after")
    def _augmented(self) -> Self:
        if self.augmentation is None:
            return self
        task, kinds = self.task, self.augmentation.kinds
        why = ""
        texts = [kind for kind in kinds if kind in TEXT_CHANGES]
        if not task.tokenizes:
            why = f"documents of {task.name} are no texts"
        elif texts and (task.packs or task.whole_words or task.converses):
            what = "whole names" if task.whole_words else "packed or in several parts"
            why = f"{texts[0]}: texts of {task.name} are {what}"
        elif not texts and (task.masks or task.explores or task.head.sequences > 1):
            why = f"{kinds[0]}: {task.name} hides or writes tokens itself, or compares texts"
        moved = [kind for kind in kinds if kind not in KEEPS_PLACES]
        if moved and any(field.kind == "words" for field in task.fields.values()):
            why = f"{moved[0]}: a tag belongs to each word of {task.name}, in its place"
        if why:
            raise ValueError(f"augmentation.kinds: {why}; leave it out")
        return self

    @model_validator(mode="after")
    def _keeps_zeros(self) -> Self:
        if not self.regularization.keep_zeros:
            return self
        rule = "regularization.keep_zeros"
        if self.optimizer.parts_hidden:
            raise ValueError(
                f"{rule}: {self.optimizer.name} updates a matrix as a whole, its zeros too; give "
                "optimizer.name=adamw"
            )
        if self.adapters is not None:
            raise ValueError(f"{rule}: adapters begin as zeros; leave one of them out")
        return self

    @model_validator(mode="after")
    def _adapted(self) -> Self:
        adapters, rate = self.adapters, self.optimizer.block_rate
        if self.freezing is not None and adapters is not None:
            raise ValueError(
                "freezing beside adapters: adapters leave the whole model as it is; leave freezing "
                "out"
            )
        if self.optimizer.base_hidden_size is not None and (adapters or rate):
            what = "adapters" if adapters else "optimizer.block_rate"
            raise ValueError(
                f"optimizer.width_transfer beside {what}: it scales the rates of a model that is "
                "trained whole; leave one of them out"
            )
        if adapters is None:
            return self
        if adapters.quantized and (self.zero.stage == 3 or self.zero.offload == "parameters"):
            key = "zero.stage = 3" if self.zero.stage == 3 else "zero.offload = parameters"
            raise ValueError(
                f"{key}: adapters.base = nf4 packs matrices, which ZeRO 3 cannot cut up; give "
                "zero.stage=2, or adapters.base=as_is"
            )
        if adapters.name == "prefix" and self.engine.activation_checkpointing:
            raise ValueError(
                "engine.activation_checkpointing beside adapters.name = prefix: a block that is "
                "computed again has lost the prefix; leave it out, or give adapters.name=prompt"
            )
        return self

    @model_validator(mode="after")
    def _adds(self) -> Self:
        if not self.task.adds:
            return self
        given = self.regularization
        without = {
            "adapters": self.adapters,
            "freezing": self.freezing,
            "distil": self.distil,
            "optimizer.block_rate": self.optimizer.block_rate,
            "optimizer.width_transfer": self.optimizer.base_hidden_size,
            "regularization.dropout": given.dropout,
            "regularization.dropouts": given.dropouts,
            "regularization.stochastic_depth": given.stochastic_depth,
            "regularization.r_drop": given.r_drop,
            "regularization.adversarial": given.adversarial,
        }
        if wrong := next((key for key, value in without.items() if value), None):
            raise ValueError(
                f"{wrong}: the model of {self.task.name} stays as it is, and is asked as it is; "
                "leave it out"
            )
        return self

    @model_validator(mode="after")
    def _means_something(self, info: ValidationInfo) -> Self:
        """Refuse what would be silently without effect, except in a spec that a run has kept: it
        was let through when the run began, and the run stays what it is."""
        if info.context and info.context.get("kept"):
            return self
        if self.validation.patience is not None and self.data.validation is None:
            raise ValueError(
                f"validation.patience = {self.validation.patience}: without data.validation there "
                "is nothing to validate on; give it, or leave patience out"
            )
        smoothing = self.regularization.label_smoothing
        if smoothing and not self.task.smooths:
            raise ValueError(
                f"regularization.label_smoothing = {smoothing:g}: {self.task.name} has no classes "
                "to smooth; leave it out"
            )
        return self

    @property
    def keeps_base(self) -> bool:
        """Whether a part of the model is never trained: it is made again from where it came, and
        stands in no checkpoint."""
        freezes = self.freezing is not None and self.freezing.freezes
        return self.task.adds or self.adapters is not None or freezes

    @property
    def trains_part(self) -> bool:
        """Whether a model is changed before it is trained, or trained in part."""
        return self.task.adds or self.adapters is not None or self.freezing is not None

    @property
    def row_tokens(self) -> int:
        """Tokens that a row has at most."""
        return self.task.fixed_tokens or self.data.sequence_tokens

    @property
    def is_auto(self) -> bool:
        """Whether a law is to give the rate or the batch."""
        return not self.optimizer.learning_rate or not self.batch.global_rows

    @property
    def why_no_law(self) -> str:
        """Why the Step Law says nothing of it; empty: it does."""
        if self.optimizer.name not in ("adamw", "adamw_8bit"):
            return f"the Step Law is AdamW's, and the optimizer is {self.optimizer.name}"
        if self.model.origin:
            return (
                f"the Step Law is of drawn weights, and the model starts from {self.model.origin}"
            )
        if self.adapters is not None or self.freezing is not None:
            return "the Step Law is of models that are trained whole"
        if self.task.head.over != "vocabulary":
            return f"the Step Law is of language models, and {self.task.name} learns another"
        return ""

    @property
    def metric_sign(self) -> int:
        """1 where a lower value of the metric that ranks checkpoints is better, else -1."""
        return 1 if self.task.metrics[self.validation.metric] == "lower" else -1

    @property
    def may_go_on_when_complete(self) -> bool:
        """Whether a longer duration leaves the learning rate of all steps done as it was, the last
        ones' too."""
        return self.schedule.name == "constant" or (
            self.schedule.name in ("cosine", "linear") and not self.duration_is_identity
        )

    @property
    def duration_is_identity(self) -> bool:
        """Whether the learning rate at a given step depends on the run's duration."""
        falls = self.schedule.name in ("cosine", "linear") and self.schedule.decay_steps is None
        return falls and self.schedule.cycle_steps is None

    def identity(self) -> dict[str, Any]:
        """The part of the spec that changes the result."""
        dump = self.model_dump(mode="json")
        keys = (
            "task",
            "data",
            "tokenizer",
            "model",
            "optimizer",
            "schedule",
            "regularization",
            "precision",
            "seed",
        )
        identity = {key: dump[key] for key in keys} | {
            "batch": {"global_rows": self.batch.global_rows}
        }
        identity |= {key: dump[key] for key in LATER_SECTIONS if key in dump}
        if self.duration_is_identity:
            identity["duration"] = dump["duration"]
        return identity

    def fingerprint(self) -> str:
        """SHA-256 of the identity, as hexadecimal."""
        canonical = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()
