"""The frozen spec: load, override by dotted path, dump, fingerprint, JSON schema.

A spec says everything that changes the result of a run (its identity) and where it runs (its place). The fingerprint
covers the identity alone. Nothing here reads the environment, and secrets have no field to go into.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dray.errors import SpecError
from dray.redaction import redact, take_in_all
from dray.spec.yaml_reading import BadYaml, read_yaml

METRICS = {
    "causal_lm": ("loss", "perplexity", "accuracy", "bits_per_byte"),
    "sequence_classification": ("loss", "accuracy", "precision", "recall", "f1", "auc"),
}
"""What a validation measures, by task."""
MAX_SPEC_BYTES = 4 * 2**20
"""What is larger is no spec, but data given in its place."""
_SPEC_FILE = "a spec is a UTF-8 text file"
RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
NAME_RULE = "up to 100 letters, digits, `.`, `_` and `-`, the first a letter or digit"


def _reject_boolean(value: Any) -> Any:
    """YAML reads `yes` and `no` as booleans, and pydantic would read those as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("a number is wanted, not true or false")
    return value


Int = Annotated[int, BeforeValidator(_reject_boolean)]
Float = Annotated[float, BeforeValidator(_reject_boolean)]


class Section(BaseModel):
    """What all sections share: frozen, unknown keys refused, URIs without their credentials."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False,
                              defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def _without_credentials(cls, given: Any) -> Any:
        """Credentials in URIs never become part of a spec, which is written down and sent to trackers."""
        return take_in_all(given)


class Source(Section):
    """One source of documents: files of one form, with the columns to read."""

    path: str | tuple[str, ...]
    """Files, folders, globs or URIs (`s3://…`, `gs://…`, `hdfs://…`, any fsspec scheme); `python:stdlib` is the
    standard library's own sources. Relative paths start at the working directory."""
    format: Literal["auto", "jsonl", "csv", "tsv", "parquet", "text", "lines"] = "auto"
    """The form of the files; `auto` goes by the suffix before `.gz`, `.zst`, `.bz2`, `.xz` or `.zip`. `text`: a file is
    a document; `lines`: a line is."""
    text: str = "text"
    """The column that holds the text (a 0-based number for files without a header)."""
    label: str | None = None
    """The column that holds the label; tasks with labels need it. A label is a text, a number, or true or false; 1, "1"
    and 1.0 are one label in every format."""
    header: bool = True
    """Whether the first line of csv and tsv files names the columns."""
    quoting: Literal["rfc4180", "none"] = "rfc4180"
    """csv and tsv: a field that begins with a quote goes on to its closing quote, over delimiters and newlines
    (`rfc4180`), or quotes are characters like others and a line is a record (`none`)."""
    weight: Annotated[Float, Field(gt=0)] | None = None
    """Share of the rows drawn from this source, relative to the other weights; none: in proportion to its rows."""
    exclude: tuple[str, ...] = ()
    """Globs of paths to leave out."""

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path


class Cleaning(Section):
    """What happens to a document's text before it is tokenised."""

    normalize: Literal["NFC", "NFKC", "none"] = "NFC"
    """Unicode normalisation form."""
    min_chars: Annotated[Int, Field(ge=0)] = 1
    """Documents shorter than this are dropped."""
    max_chars: Annotated[Int, Field(ge=1)] | None = None
    """Documents longer than this are dropped."""
    min_alphanumeric_share: Annotated[Float, Field(ge=0, le=1)] = 0.0
    """Least share of letters and digits (of any script) among the characters that are not white space."""
    max_repeated_line_share: Annotated[Float, Field(ge=0, le=1)] = 1.0
    """Greatest share of characters that lie in lines already seen in the same document."""
    deduplicate: Literal["exact", "none"] = "exact"
    """`exact` keeps the first of documents whose normalised text is equal."""


def _as_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _as_sources(value: Any) -> Any:
    """A path, a mapping, or a list of either; a list of plain paths is one source."""
    if isinstance(value, (str, Mapping, Source)):
        return (_as_source(value),)
    if isinstance(value, Sequence) and value and all(isinstance(item, str) for item in value):
        return ({"path": tuple(value)},)
    if isinstance(value, Sequence):
        return tuple(_as_source(item) for item in value)
    return value


Sources = Annotated[tuple[Source, ...], BeforeValidator(_as_sources), Field(min_length=1)]


class HeldOut(Section):
    """A share of the training documents held out for validation, split by document."""

    share: Annotated[Float, Field(gt=0, lt=1)]
    """Share of the documents; a document's side depends on its text alone."""


def _as_validation_data(value: Any) -> Any:
    if isinstance(value, Mapping) and "share" in value:
        if "path" in value:
            raise ValueError("either a `share` of the training documents or the `path` of others")
        return HeldOut.model_validate(dict(value))
    return value if isinstance(value, HeldOut) or value is None else _as_sources(value)


class Data(Section):
    """The corpus: where documents come from and how they become rows."""

    train: Sources
    """The training documents: a path, a glob, a URI, a mapping with `path`, or a list of these."""
    validation: Annotated[HeldOut | tuple[Source, ...] | None, BeforeValidator(_as_validation_data)] = None
    """`{share: 0.02}` of the training documents, or sources of their own."""
    sequence_tokens: Annotated[Int, Field(ge=2, le=1_048_576)] = 512
    """Tokens in a row."""
    cleaning: Cleaning = Cleaning()
    """What happens to a document's text before it is tokenised."""
    max_bad_share: Annotated[Float, Field(ge=0, le=1)] = 0.01
    """Above this share of unreadable data, in records or in bytes, preparing stops and names the worst file. A file
    that is cut short counts whole."""
    max_record_bytes: Annotated[Int, Field(ge=1024)] = 16 * 1024 * 1024
    """A record (a line, or a file of format `text`) larger than this counts as unreadable."""
    shuffle_seed: Int = 0
    """Seed of the one shuffle of the rows on disk; another training seed reuses the token shards."""


class Tokenizer(Section):
    """A tokeniser from a folder, or one trained on a sample of the corpus."""

    path: str | None = None
    """A Hugging Face tokeniser folder."""
    train: Literal["byte_bpe"] | None = None
    """Train a byte-level BPE tokeniser on a sample of the training documents."""
    vocab_size: Annotated[Int, Field(ge=258, le=1_000_000)] = 8192
    """Vocabulary of a trained tokeniser, special tokens included."""
    sample_bytes: Annotated[Int, Field(ge=10_000)] = 16_000_000
    """Bytes of text that a tokeniser is trained on."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.path is None) == (self.train is None):
            raise ValueError("exactly one of `path` and `train` is needed")
        return self


class Model(Section):
    """A transformers architecture by name and sizes, or a folder of weights."""

    architecture: str | None = None
    """A transformers model type: llama, gpt2, bert, modernbert, …"""
    path: str | None = None
    """A Hugging Face folder (config.json and safetensors) to start from, such as `dray export` writes."""
    hidden_size: Annotated[Int, Field(ge=8)] | None = None
    """Width of the residual stream."""
    num_layers: Annotated[Int, Field(ge=1)] | None = None
    """Number of transformer blocks."""
    num_heads: Annotated[Int, Field(ge=1)] | None = None
    """Number of attention heads."""
    num_kv_heads: Annotated[Int, Field(ge=1)] | None = None
    """Number of key and value heads; none: as many as heads."""
    intermediate_size: Annotated[Int, Field(ge=8)] | None = None
    """Width of the feed-forward block; none: 8/3 of the hidden size for gated blocks, 4 times it for the others."""
    vocab_size: Annotated[Int, Field(ge=2)] | None = None
    """Rows of the embedding; none: the tokeniser's vocabulary."""
    max_positions: Annotated[Int, Field(ge=2)] | None = None
    """Longest row the model can take; none: `data.sequence_tokens`."""
    tie_embeddings: bool = True
    """Whether the output head shares the input embedding."""
    num_labels: Annotated[Int, Field(ge=2)] | None = None
    """Number of classes; none: as many as the training documents have labels. Where these are numbers from 0 on, some
    of them may be absent; else the two must agree."""
    options: dict[str, str | int | float | bool | None] = {}
    """Further fields of the transformers configuration, by their own names."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.path is None) == (self.architecture is None):
            raise ValueError("exactly one of `architecture` and `path` is needed")
        if self.path is not None:
            return self
        for name in ("hidden_size", "num_layers", "num_heads"):
            if getattr(self, name) is None:
                raise ValueError(f"`{name}` is needed with `architecture`")
        if self.hidden_size % self.num_heads:  # type: ignore[operator]
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.num_heads % (self.num_kv_heads or self.num_heads):  # type: ignore[operator]
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        return self


class Batch(Section):
    """How many rows an optimiser update sees, and how they are cut."""

    global_rows: Annotated[Int, Field(ge=1, le=2**31)] = 16
    """Rows in one optimiser update, over all ranks."""
    micro_rows: Annotated[Int, Field(ge=1)] | Literal["auto"] = "auto"
    """Rows in one forward pass of one rank; `auto`: the most that fit."""


class Optimizer(Section):
    """The optimiser; weight decay spares norms, biases and embeddings."""

    name: Literal["adamw"] = "adamw"
    """The optimiser's name."""
    learning_rate: Annotated[Float, Field(gt=0, le=10)] = 1.0e-3
    """Peak learning rate."""
    weight_decay: Annotated[Float, Field(ge=0, le=10)] = 0.1
    """Decoupled weight decay."""
    beta1: Annotated[Float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[Float, Field(ge=0, lt=1)] = 0.95
    """Decay of the second moment."""
    epsilon: Annotated[Float, Field(gt=0, le=1)] = 1.0e-8
    """Term added to the denominator."""


class Schedule(Section):
    """The learning rate over the steps."""

    name: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """Shape after the warm-up; `wsd`: stable, then a linear decay over the last `decay_steps`."""
    warmup_steps: Annotated[Int, Field(ge=0)] = 0
    """Steps of linear warm-up from 0."""
    decay_steps: Annotated[Int, Field(ge=1)] | None = None
    """cosine, linear: the step at which the floor is reached (none: the last). wsd: length of the decay (none: a
    tenth)."""
    floor_share: Annotated[Float, Field(ge=0, le=1)] = 0.1
    """The final rate, as a share of the peak."""

    def check_length(self, num_steps: int) -> None:
        """Raise ValueError if a run of so many steps is too short for it."""
        if self.name == "wsd":
            if (self.decay_steps or 0) > num_steps:
                raise ValueError(f"schedule.decay_steps = {self.decay_steps}: the run has {num_steps} steps, and the "
                                 "decay lies within it")
        elif self.warmup_steps > (self.decay_steps or num_steps):
            raise ValueError(f"schedule.warmup_steps = {self.warmup_steps}: the schedule ends at step "
                             f"{self.decay_steps or num_steps}, before the warm-up")


class Regularization(Section):
    """What keeps the model from fitting too closely or diverging."""

    dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability, where the architecture has dropout."""
    label_smoothing: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """Probability mass spread over all classes in the training loss."""
    clip_grad_norm: Annotated[Float, Field(gt=0)] | None = 1.0
    """Greatest global gradient norm; none: no clipping."""


class Duration(Section):
    """How long to train: exactly one of the three."""

    steps: Annotated[Int, Field(ge=1, le=10**12)] | None = None
    """Optimiser updates."""
    epochs: Annotated[Float, Field(gt=0, le=10**6)] | None = None
    """Passes over the training rows; the last batch of a pass is filled up from the next one."""
    tokens: Annotated[Int, Field(ge=1, le=10**18)] | None = None
    """Training tokens."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if sum(value is not None for value in (self.steps, self.epochs, self.tokens)) != 1:
            raise ValueError("exactly one of `steps`, `epochs` and `tokens` is needed")
        return self


class Validation(Section):
    """When to validate, and when to stop early."""

    every_steps: Annotated[Int, Field(ge=1)] | None = None
    """Steps between validations; none: at the end only."""
    max_rows: Annotated[Int, Field(ge=1)] | None = None
    """Validate on the first so many rows; none: on all."""
    metric: str = "loss"
    """The metric that ranks checkpoints and stops early: `loss` or another of the task's."""
    patience: Annotated[Int, Field(ge=1)] | None = None
    """Stop after so many validations without a better metric; none: never."""


class Checkpoint(Section):
    """When checkpoints are committed and which are kept. One is always committed at the end."""

    every_steps: Annotated[Int, Field(ge=1)] | None = None
    """Steps between checkpoints."""
    every_minutes: Annotated[Float, Field(gt=0)] | None = None
    """Minutes between checkpoints."""
    keep_last: Annotated[Int, Field(ge=1)] = 2
    """How many of the newest are kept."""
    keep_best: Annotated[Int, Field(ge=0)] = 0
    """How many of the best by `validation.metric` are kept besides."""


class Numerics(Section):
    """What happens to bad numbers. Place, not identity: what was left out is part of the run's record."""

    max_skipped_steps: Annotated[Int, Field(ge=1)] = 8
    """Steps in a row without an update, because a loss or gradient was not finite, after which the run stops."""
    spike: Literal["off", "warn", "rewind"] = "warn"
    """A loss far above the recent ones: `warn` records it; `rewind` goes back to the checkpoint before and leaves the
    rows of that step out."""
    spike_sigmas: Annotated[Float, Field(gt=1)] = 10.0
    """How far is far: robust standard deviations above the median of the last 64 steps."""
    max_rewinds: Annotated[Int, Field(ge=0)] = 5
    """Rewinds of a run after which a spike stops it."""


class Watchdog(Section):
    """When a run counts as hung: stacks are dumped, the rank at fault is ended, and the run goes on."""

    silent_seconds: Annotated[Float, Field(ge=5)] = 15.0
    """A rank that gives no sign of life for so long is stopped or dead."""
    long_silence_seconds: Annotated[Float, Field(ge=5)] = 180.0
    """The same while it builds, restores, saves or takes its first step: libraries may hold the interpreter then."""
    stuck_seconds: Annotated[Float, Field(ge=5)] = 120.0
    """No rank moves within a step for so long …"""
    stuck_steps: Annotated[Float, Field(ge=2)] = 30.0
    """… and for so many times a usual step: they wait for each other."""
    patient_seconds: Annotated[Float, Field(ge=5)] = 1800.0
    """The same for what is no step: imports, compilation, waiting for rows, storage."""


def _as_pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class Resources(Section):
    """The workers and what each of them gets. Place, not identity."""

    workers: Annotated[
        Annotated[Int, Field(ge=1, le=1_000_000)]
        | tuple[Annotated[Int, Field(ge=1)], Annotated[Int, Field(ge=1, le=1_000_000)]],
        BeforeValidator(_as_pair),
    ] = 1
    """Number of workers (ranks), or `[fewest, most]` for an elastic group."""
    cpus_per_worker: Annotated[Float, Field(gt=0)] = 1
    """Logical CPUs of a worker; its compute threads."""
    gpus_per_worker: Annotated[Int, Field(ge=0, le=1)] = 0
    """GPUs of a worker: 0 or 1."""
    reader_cpus: Annotated[Float, Field(gt=0)] = 1
    """CPUs left to Ray Data for reading; without any, workers would wait for rows for ever."""
    max_failures: Annotated[Int, Field(ge=0)] = 3
    """Restarts of the worker group after a failure before the run is given up."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if isinstance(self.workers, tuple) and self.workers[0] > self.workers[1]:
            raise ValueError(f"workers {list(self.workers)}: the first must not exceed the second")
        return self

    @property
    def min_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class Zero(Section):
    """How model states are spread over the ranks. Place, not identity."""

    stage: Literal[0, 1, 2, 3, "auto"] = "auto"
    """ZeRO stage; `auto`: the fastest that fits, by the estimate of the plan."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What lies in host memory: the optimiser states (stages 1 to 3), or these and the parameters (stage 3)."""

    @model_validator(mode="after")
    def _offload_needs_stage(self) -> Self:
        least = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.stage != "auto" and self.stage < least:
            raise ValueError(f"offload {self.offload} needs stage {least} or higher, not {self.stage}")
        return self


class Engine(Section):
    """How the same arithmetic is carried out. Place, not identity."""

    compile: bool | Literal["auto"] = "auto"
    """torch.compile; `auto`: where the run is long enough to pay for the compilation."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""


class Tracking(Section):
    """Trackers beside the run's own metrics. A tracker that fails never stops training."""

    tensorboard: bool = False
    """Write TensorBoard event files into the run folder."""
    mlflow: str | bool = False
    """`true`: a local SQLite store; or a tracking URI."""
    wandb: str | bool = False
    """A Weights & Biases project; its key comes from the environment."""


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
    batch: Batch = Batch()
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
    engine: Engine = Engine()
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
                    raise ValueError("data: task sequence_classification needs a `label` column in every source")
        if self.validation.metric not in METRICS[self.task]:
            raise ValueError(f"validation.metric = {self.validation.metric}: {self.task} has "
                             f"{', '.join(METRICS[self.task])}")
        weighted = [source.weight is not None for source in self.data.train]
        if any(weighted) and not all(weighted):
            raise ValueError("data.train: give every source a weight, or none")
        if self.duration.steps is not None:
            self.schedule.check_length(self.duration.steps)
        return self

    @property
    def packs_rows(self) -> bool:
        """Whether documents are packed into full rows (language modelling) or kept one a row (labels)."""
        return self.task == "causal_lm"

    @property
    def may_go_on_when_complete(self) -> bool:
        """Whether a longer duration leaves the learning rate of all steps done as it was, the last ones' too."""
        return self.schedule.name == "constant" or (
            self.schedule.name in ("cosine", "linear") and self.schedule.decay_steps is not None)

    @property
    def duration_is_identity(self) -> bool:
        """Whether the learning rate at a given step depends on the run's duration."""
        return self.schedule.name in ("cosine", "linear") and self.schedule.decay_steps is None

    def identity(self) -> dict[str, Any]:
        """The part of the spec that changes the result."""
        dump = self.model_dump(mode="json")
        keys = ("task", "data", "tokenizer", "model", "optimizer", "schedule", "regularization", "precision", "seed")
        identity = {key: dump[key] for key in keys} | {"batch": {"global_rows": self.batch.global_rows}}
        if self.duration_is_identity:
            identity["duration"] = dump["duration"]
        return identity

    def fingerprint(self) -> str:
        """SHA-256 of the identity, as hexadecimal."""
        canonical = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def recipe_names() -> list[str]:
    """Names of the packaged specs."""
    folder = resources.files("dray.recipes")
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_text(spec: str) -> str:
    """The YAML text of a spec file (or pipe) or of a recipe, by path or name. Raises SpecError if there is neither."""
    try:
        mode = os.stat(spec).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return _load_recipe(spec)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte
        raise SpecError(_shown(spec), f"cannot be read ({_reason(error)})", _SPEC_FILE) from error
    if stat.S_ISDIR(mode):
        raise SpecError(spec, "is a folder", _SPEC_FILE, "name the file in it")
    try:
        with open(spec, "rb") as file:
            content = file.read(MAX_SPEC_BYTES + 1)
        if len(content) > MAX_SPEC_BYTES:
            raise SpecError(spec, f"holds more than {MAX_SPEC_BYTES // 2**20} MiB", _SPEC_FILE)
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError(spec, f"is not UTF-8 (byte {error.start})", _SPEC_FILE) from error
    except OSError as error:
        raise SpecError(spec, f"cannot be read ({_reason(error)})", _SPEC_FILE) from error


def _load_recipe(name: str) -> str:
    if name in recipe_names():
        return (resources.files("dray.recipes") / f"{name}.yaml").read_text(encoding="utf-8")
    near = difflib.get_close_matches(name, recipe_names(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"recipes: {', '.join(recipe_names())}"
    raise SpecError(_shown(name), "no such file, and no recipe of that name", way_out=hint)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _shown(text: str, width: int = 200) -> str:
    """A user's own words, without secrets, fit for a line."""
    text = redact(text)
    printable = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:width])
    return printable + ("…" if len(text) > width else "")


def load_spec(spec: str | Path, overrides: Sequence[str] = ()) -> Spec:
    """Load a spec file or recipe and apply `key=value` overrides of dotted paths. Raises SpecError."""
    where = str(spec)
    try:
        tree = read_yaml(load_text(where))
    except BadYaml as error:
        raise SpecError(where, str(error), "a spec is a YAML mapping") from error
    return make_spec(_overridden(tree, overrides) if isinstance(tree, dict) else tree, where, overrides)


def make_spec(tree: Any, where: str = "spec", overrides: Sequence[str] = ()) -> Spec:
    """Validate a tree of plain values. Raises SpecError that names the first offending dotted path, and `where` it was
    given: there, or in one of the `overrides` that the tree has taken in already."""
    if not isinstance(tree, Mapping):
        raise SpecError(where, f"holds a {type(tree).__name__}" if tree is not None else "is empty",
                        "a spec is a YAML mapping of sections", "`dray init NAME` writes one to start from")
    try:
        return Spec.model_validate(dict(tree))
    except ValidationError as error:
        raise _translated(error, where, overrides) from error


def dump_spec(spec: Spec) -> str:
    """The spec as YAML, every default written out."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def differing_paths(left: Mapping[str, Any], right: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted paths at which two trees differ, in sorted order."""
    found: list[str] = []
    for key in sorted(set(left) | set(right)):
        a, b = left.get(key), right.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differing_paths(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}")
    return found


def without_places(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity without the paths of its inputs. What lies there makes the run; where it lies does not."""
    data = dict(identity["data"])
    for split in ("train", "validation"):
        if isinstance(data.get(split), (list, tuple)):
            data[split] = [{key: value for key, value in source.items() if key != "path"} for source in data[split]]
    placed = {name: {**identity[name], "path": identity[name].get("path") is not None}
              for name in ("model", "tokenizer")}
    return {**identity, "data": data, **placed}


def _overridden(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"[a-z_0-9]+(\.[a-z_0-9]+)*", key):
            raise SpecError(_shown(override), "not an override", "overrides read key.path=value",
                            "e.g. batch.global_rows=64")
        try:
            value = read_yaml(text)
        except BadYaml as error:
            raise SpecError(_shown(override), f"the value cannot be used ({error})", "values are read as YAML",
                            "quote it") from error
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            child = node.get(parent)
            node[parent] = dict(child) if isinstance(child, Mapping) else {}
            node = node[parent]
        # The duration has one of three keys, model and tokenizer one of two: an override replaces its alternative.
        for group in (("steps", "epochs", "tokens"), ("path", "architecture"), ("path", "train")):
            if parents[-1:] in (["duration"], ["model"], ["tokenizer"]) and last in group and value is not None:
                for other in group:
                    node.pop(other, None)
        node[last] = value
    return tree


def _known_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _known_keys(kind, f"{prefix}{name}.")


def _translated(error: ValidationError, where: str, overrides: Sequence[str]) -> SpecError:
    """The first of pydantic's findings as one line; an unknown key gets its nearest known one."""
    details = error.errors(include_url=False)
    # Of a union's findings the deepest is about what the user wrote; unknown keys are clearest of all.
    first = next((item for item in details if item["type"] in ("extra_forbidden", "invalid_key")), details[0])
    parts = [str(part) for part in first["loc"]]
    path = ".".join(part for part in parts if "[" not in part and not part[:1].isupper())
    keys = [override.partition("=")[0] for override in overrides]
    if path and any(f"{path}.".startswith(f"{key}.") for key in keys):
        where = "the command line"
    if first["type"] == "extra_forbidden":
        known = list(_known_keys(Spec)) + [f"data.train.{name}" for name in Source.model_fields]
        bare = re.sub(r"\.\d+", "", path)
        siblings = [key for key in known if key.rpartition(".")[0] == bare.rpartition(".")[0]]
        near = difflib.get_close_matches(bare, siblings, n=1, cutoff=0.5) or difflib.get_close_matches(
            bare.rpartition(".")[2], [key.rpartition(".")[2] for key in siblings or known], n=1, cutoff=0.5
        ) or [key for key in known if key.rpartition(".")[2] == bare.rpartition(".")[2]][:1]
        names = ", ".join(key.rpartition(".")[2] for key in siblings)
        hint = f"did you mean {near[0]}?" if near else f"known here: {names}"
        return SpecError(where, f"unknown key {path}", way_out=hint)
    if first["type"] == "invalid_key":
        return SpecError(where, f"the key {path} is a {type(first['loc'][-1]).__name__}", "keys are words")
    if first["type"] == "missing":
        return SpecError(where, f"{path} is missing", "it has no default")
    given = "" if isinstance(first["input"], (Mapping, BaseModel)) else f" = {_shown(repr(first['input']))}"
    message = redact(str(first["msg"]).removeprefix("Value error, "))
    if first["type"] == "string_pattern_mismatch":  # the name's, the only pattern
        message = NAME_RULE
    if not path:
        return SpecError(where, message)
    return SpecError(where, f"{path}{given}: {message[:1].lower()}{message[1:]}")
