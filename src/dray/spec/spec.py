"""The whole spec, and what of it makes a run what it is.

A spec says everything that changes the result of a run (its identity) and where it runs (its
place). The fingerprint covers the identity alone. Nothing here reads the environment, and secrets
have no field to go into.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dray.spec.sections import (
    BatchSize,
    Checkpoint,
    Data,
    Duration,
    Execution,
    Int,
    Model,
    Numerics,
    Optimizer,
    Regularization,
    Resources,
    Schedule,
    Section,
    Tokenizer,
    Tracking,
    Validation,
    Watchdog,
    Zero,
)

METRICS = {
    "causal_lm": ("loss", "perplexity", "accuracy", "bits_per_byte"),
    "sequence_classification": ("loss", "accuracy", "precision", "recall", "f1", "auc"),
}
"""What a validation measures, by task."""
RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
NAME_RULE = "up to 100 letters, digits, `.`, `_` and `-`, the first a letter or digit"


class Spec(Section):
    """One run, whole."""

    name: Annotated[str, Field(pattern=RUN_NAME)]
    """Default name of the run: letters, digits, `.`, `_` and `-`."""
    task: Literal["causal_lm", "sequence_classification"] = "causal_lm"
    """What is learnt."""
    data: Data
    """The corpus."""
    tokenizer: Tokenizer = Tokenizer(train="byte_bpe")
    """The tokeniser."""
    model: Model
    """The model."""
    batch: BatchSize = BatchSize()
    """The batch."""
    optimizer: Optimizer = Optimizer()
    """The optimiser."""
    schedule: Schedule = Schedule()
    """The learning rate over the steps."""
    regularization: Regularization = Regularization()
    """Regularisation."""
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

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.task == "sequence_classification":
            validation = self.data.validation if isinstance(self.data.validation, tuple) else ()
            for source in (*self.data.train, *validation):
                if source.label is None:
                    raise ValueError(
                        "data: task sequence_classification needs a `label` column in every source"
                    )
        if self.validation.metric not in METRICS[self.task]:
            raise ValueError(
                f"validation.metric = {self.validation.metric}: {self.task} has "
                f"{', '.join(METRICS[self.task])}"
            )
        weighted = [source.weight is not None for source in self.data.train]
        if any(weighted) and not all(weighted):
            raise ValueError("data.train: give every source a weight, or none")
        if self.duration.steps is not None:
            self.schedule.check_length(self.duration.steps)
        return self

    @property
    def packs_rows(self) -> bool:
        """Whether documents are packed into full rows (language modelling) or kept one a row
        (labels)."""
        return self.task == "causal_lm"

    @property
    def may_go_on_when_complete(self) -> bool:
        """Whether a longer duration leaves the learning rate of all steps done as it was, the last
        ones' too."""
        return self.schedule.name == "constant" or (
            self.schedule.name in ("cosine", "linear") and self.schedule.decay_steps is not None
        )

    @property
    def duration_is_identity(self) -> bool:
        """Whether the learning rate at a given step depends on the run's duration."""
        return self.schedule.name in ("cosine", "linear") and self.schedule.decay_steps is None

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
        if self.duration_is_identity:
            identity["duration"] = dump["duration"]
        return identity

    def fingerprint(self) -> str:
        """SHA-256 of the identity, as hexadecimal."""
        canonical = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()
