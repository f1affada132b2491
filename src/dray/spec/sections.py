"""The sections of a spec: frozen, unknown keys refused, URIs without their credentials.

A class is a section, a field with its sentence is a key. What is wrong in a section by itself is
said here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    model_validator,
)

from dray.redaction import take_in_all


def _reject_boolean(value: Any) -> Any:
    """YAML reads `yes` and `no` as booleans, and pydantic would read those as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("a number is wanted, not true or false")
    return value


def _read_number(value: Any) -> Any:
    return str(value) if type(value) is int else value


Word = Annotated[str, BeforeValidator(_read_number)]
"""A text that may be a number, and be written as one: a column's, or a label."""
Int = Annotated[int, BeforeValidator(_reject_boolean)]
Float = Annotated[float, BeforeValidator(_reject_boolean)]
Share = Annotated[Float, Field(ge=0, le=1)]


def _read_auto(value: Any) -> Any:
    """`auto` is kept as 0, which no such number can be."""
    if value == "auto":
        return 0
    if type(value) in (int, float) and value <= 0:
        raise ValueError("a number above 0, or auto, is wanted")
    return value


class _OrAuto:
    """The JSON schema of a number, or of `auto`."""

    @staticmethod
    def __get_pydantic_json_schema__(core: Any, handler: Any) -> dict[str, Any]:
        number = {**handler(core)}
        number.pop("ge", None)
        return {"anyOf": [{**number, "exclusiveMinimum": 0}, {"const": "auto"}]}


AUTO = BeforeValidator(_read_auto), PlainSerializer(lambda number: number or "auto"), _OrAuto
"""Of a number that a law may give: `auto` is 0 until then (`plan.laws`)."""


AutoMinutes = Annotated[Float, Field(ge=0), *AUTO]


def _or_the_word_auto(schema: dict[str, Any]) -> None:
    """The JSON schema of a section that may be given as `auto`."""
    whole = {**schema}
    schema.clear()
    schema |= {"anyOf": [whole, {"const": "auto"}]}


RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
NAME_RULE = "up to 100 letters, digits, `.`, `_` and `-`, the first a letter or digit"
RunName = Annotated[str, Field(pattern=RUN_NAME)]
ORIGIN_NAME = RUN_NAME.removesuffix("$") + r"(/[0-9]{4,})?$"
"""A run's name, or that of a trial of a sweep: `SWEEP/0007`."""
OriginName = Annotated[str, Field(pattern=ORIGIN_NAME)]


def chosen_by_name(kinds: Mapping[str, type], default: str, section: str) -> Discriminator:
    """What tells which of several classes a section's values are of: their `name`, without one
    `default`. The classes' tags are their own names."""

    def choose(given: Any) -> str | None:
        if isinstance(given, tuple(kinds.values())):
            return type(given).__name__
        name = given.get("name", default) if isinstance(given, Mapping) else None
        kind = kinds.get(name) if isinstance(name, str) else None
        return kind.__name__ if kind else None

    message = f"its name is one of {', '.join(kinds)}"
    return Discriminator(choose, custom_error_type=section, custom_error_message=message)


class Section(BaseModel):
    """What all sections share: frozen, unknown keys refused, URIs without their credentials."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        defer_build=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _without_credentials(cls, given: Any) -> Any:
        """Credentials in URIs never become part of a spec, which is written down and sent to
        trackers."""
        return take_in_all(given)


def as_several(value: Any) -> Any:
    """One is a list of one, none an empty one."""
    if value is None:
        return ()
    return (value,) if isinstance(value, (str, Mapping, Section)) else value


class OneOrMore:
    """The JSON schema of a list that may be given as its one item."""

    @staticmethod
    def __get_pydantic_json_schema__(core: Any, handler: Any) -> dict[str, Any]:
        whole = dict(handler(core))
        return {"anyOf": [whole, whole["items"]]} if "items" in whole else whole


class OrTrue:
    """The JSON schema of a section that may be given as true or false."""

    @staticmethod
    def __get_pydantic_json_schema__(core: Any, handler: Any) -> dict[str, Any]:
        return {"anyOf": [{**handler(core)}, {"type": "boolean"}]}


def _check_one_of(section: Section, first: str, *others: str) -> None:
    """Raise ValueError unless exactly one of these keys is given."""
    names = [f"`{name}`" for name in (first, *others)]
    given = [name for name in names if getattr(section, name.strip("`")) is not None]
    if len(given) != 1:
        raise ValueError(
            f"exactly one of {', '.join(names[:-1])} and {names[-1]} is needed; "
            f"{' and '.join(given) or 'none'} {'are' if given else 'is'} given"
        )


class Tokenizer(Section):
    """A tokeniser from a folder, or one trained on a sample of the corpus."""

    path: str | None = None
    """A Hugging Face tokeniser folder; `python:PACKAGE/PATH` is one in an installed package."""
    run: Annotated[OriginName | None, Field(exclude_if=lambda given: given is None)] = None
    """A run in the same storage whose tokeniser to use; with `model.run` its tokeniser is the
    default."""
    train: Literal["byte_bpe", "words"] | None = None
    """`byte_bpe`: train a byte-level BPE tokeniser on a sample of the training documents; `words`:
    the most frequent words or names of all of them, each a token, for tasks whose tokens are
    such."""
    vocab_size: Annotated[Int, Field(ge=258, le=1_000_000)] = 8192
    """Vocabulary of a trained tokeniser, special tokens included."""
    sample_bytes: Annotated[Int, Field(ge=10_000)] = 16_000_000
    """Bytes of text that a tokeniser is trained on."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        _check_one_of(self, "path", "run", "train")
        return self


Option = str | int | float | bool | None


class Model(Section):
    """A transformers architecture by name and sizes, or weights to start from."""

    architecture: str | None = None
    """A transformers model type: llama, gpt2, bert, modernbert, …"""
    path: str | None = None
    """A Hugging Face folder (config.json and safetensors) to start from, such as `dray export`
    writes; `python:PACKAGE/PATH` is one in an installed package, `hf://owner/name[@revision]` one
    on the hub."""
    run: Annotated[OriginName | None, Field(exclude_if=lambda given: given is None)] = None
    """A run in the same storage to start from; `SWEEP/0007` is a trial of a sweep. Weights that fit
    are taken, a head of another task is new, and what became of each is said."""
    step: Annotated[
        Annotated[Int, Field(ge=1)] | Literal["best", "newest"],
        Field(exclude_if=lambda given: given == "newest"),
    ] = "newest"
    """Of `run`: the step whose checkpoint it is, the `best` by its own `validation.metric`, or the
    `newest`. It is looked up once, when the run begins."""
    hidden_size: Annotated[Int, Field(ge=8)] | None = None
    """Width of the residual stream."""
    num_layers: Annotated[Int, Field(ge=1)] | None = None
    """Number of transformer blocks."""
    num_heads: Annotated[Int, Field(ge=1)] | None = None
    """Number of attention heads."""
    num_kv_heads: Annotated[Int, Field(ge=1)] | None = None
    """Number of key and value heads; none: as many as heads."""
    intermediate_size: Annotated[Int, Field(ge=8)] | None = None
    """Width of the feed-forward block; none: 8/3 of the hidden size for gated blocks, 4 times it
    for the others."""
    vocab_size: Annotated[Int, Field(ge=2)] | None = None
    """Rows of the embedding; none: the tokeniser's vocabulary."""
    max_positions: Annotated[Int, Field(ge=2)] | None = None
    """Longest row the model can take; none: `data.sequence_tokens`."""
    tie_embeddings: bool = True
    """Whether the output head shares the input embedding."""
    num_labels: Annotated[Int, Field(ge=2)] | None = None
    """Number of classes; none: as many as the training documents have labels. Where these are
    numbers from 0 on, some of them may be absent; else the two must agree."""
    options: dict[str, Option | tuple[Option, ...]] = {}
    """Further fields of the transformers configuration, by their own names; a list where the field
    is one."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        _check_one_of(self, "architecture", "path", "run")
        if self.step != "newest" and self.run is None:
            raise ValueError(f"step {self.step} is one of a `run`, and there is none")
        if self.architecture is None:
            return self
        if self.num_heads is None:
            return self
        if self.hidden_size is not None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        return self

    @property
    def origin(self) -> str:
        """The weights that it starts from, as a message names them; empty: they are drawn."""
        return self.path or (f"run {self.run}" if self.run else "")

    @property
    def origin_key(self) -> str:
        """The key that names them."""
        return "model.run" if self.run else "model.path"

    @property
    def own_tokenizer(self) -> str:
        """The setting by which a spec takes the tokeniser that they were trained with."""
        return f"tokenizer.run={self.run}" if self.run else f"tokenizer.path={self.path}"


class BatchSize(Section):
    """How many rows an optimiser update sees, and how they are cut."""

    global_rows: Annotated[Int, Field(ge=0, le=2**31), *AUTO] = 16
    """Rows in one optimiser update, over all ranks; `auto`: by the Step Law."""
    micro_rows: Annotated[Int, Field(ge=1)] | Literal["auto"] = "auto"
    """Rows in one forward pass of one rank; `auto`: the most that fit."""


class Schedule(Section):
    """The learning rate over the steps."""

    name: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """Shape after the warm-up; `wsd`: stable, then a linear decay over the last `decay_steps`."""
    warmup_steps: Annotated[Int, Field(ge=0)] = 0
    """Steps of linear warm-up from 0."""
    decay_steps: Annotated[Int, Field(ge=1)] | None = None
    """cosine, linear: the step at which the floor is reached (none: the last). wsd: length of the
    decay (none: a tenth)."""
    cycle_steps: Annotated[
        Annotated[Int, Field(ge=2)] | None, Field(exclude_if=lambda given: given is None)
    ] = None
    """cosine: steps of a fall from the peak to the floor, after which the next one begins (snapshot
    ensembles: a checkpoint at the end of each is a model of its own). None: one fall."""
    floor_share: Share = 0.1
    """The final rate, as a share of the peak."""

    @model_validator(mode="after")
    def _cycles(self) -> Self:
        if self.cycle_steps is not None and (self.name != "cosine" or self.decay_steps is not None):
            raise ValueError(
                f"schedule.cycle_steps = {self.cycle_steps}: it is of cosine, without decay_steps"
            )
        return self

    def check_length(self, num_steps: int) -> None:
        """Raise ValueError if a run of so many steps is too short for it."""
        if self.name == "wsd":
            if (self.decay_steps or 0) > num_steps:
                raise ValueError(
                    f"schedule.decay_steps = {self.decay_steps}: the run has {num_steps} steps, "
                    "and the decay lies within it"
                )
        elif self.warmup_steps > (self.decay_steps or num_steps):
            raise ValueError(
                f"schedule.warmup_steps = {self.warmup_steps}: the schedule ends at step "
                f"{self.decay_steps or num_steps}, before the warm-up"
            )


class Ema(Section):
    """An exponential moving average of the weights, beside those that are trained."""

    decay: Annotated[Float, Field(gt=0, lt=1)] = 0.999
    """Share that the average keeps of itself at an update; at update n no more than
    (1 + n) / (10 + n), so that a short run does not hold on to its initial weights."""


class Swa(Section):
    """The mean of the weights of the last part of a run, beside those that are trained."""

    first_step: Annotated[Int, Field(ge=1)]
    """The first update after which the weights are taken in; before it the mean is the weights."""
    every_steps: Annotated[Int, Field(ge=1)] = 1
    """Updates from one taking in to the next."""


class GradientNoise(Section):
    """Normal noise on the gradients, less of it with every step."""

    eta: Annotated[Float, Field(gt=0)] = 0.01
    """Its variance at the first step."""
    gamma: Annotated[Float, Field(ge=0)] = 0.55
    """It falls as eta / step^gamma."""


class Adversarial(Section):
    """Training on inputs that are made worse: the embeddings of a row are moved to where its loss
    is greater, within a small distance."""

    name: Literal["fgm", "pgd", "freelb", "smart"]
    """fgm: one step along the gradient. pgd: several, each back into the ball. freelb: several, and
    the loss is the mean of all of them. smart: where the outputs change most, and the loss is by
    how much."""
    epsilon: Annotated[Float, Field(gt=0)] | None = None
    """The greatest distance: of a row's embeddings together (2-norm; 1 for fgm, pgd and freelb), of
    smart of each number (1e-3)."""
    step_size: Annotated[Float, Field(gt=0)] | None = None
    """Of each step up: 0.3 for pgd, 0.1 for freelb, 1e-3 for smart; fgm goes epsilon far."""
    steps: Annotated[Int, Field(ge=1, le=20)] | None = None
    """Steps up: 3 for pgd and freelb, 1 for smart; fgm has one."""
    weight: Annotated[Float, Field(gt=0)] | None = None
    """fgm, pgd: the share of the loss that is of worse inputs (0.5); smart: what the divergence
    counts beside the loss (1); freelb has none."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name, method in (("steps", "fgm"), ("step_size", "fgm"), ("weight", "freelb")):
            if self.name == method and getattr(self, name) is not None:
                raise ValueError(f"{method} has no {name}")
        if self.name in ("fgm", "pgd") and self.weight is not None and self.weight > 1:
            raise ValueError(f"weight = {self.weight:g}: a share of the loss is at most 1")
        return self

    @property
    def num_steps(self) -> int:
        """Steps up."""
        return self.steps or {"fgm": 1, "pgd": 3, "freelb": 3, "smart": 1}[self.name]

    @property
    def num_kept(self) -> int:
        """Passes whose activations are kept at once."""
        return 2 if self.name == "smart" else 1


class Dropouts(Section):
    """Dropout probabilities by what is dropped, where the architecture has it; each in the place of
    `dropout`."""

    attention: Annotated[Float, Field(ge=0, lt=1)] | None = None
    """Attention's probabilities."""
    hidden: Annotated[Float, Field(ge=0, lt=1)] | None = None
    """What blocks add to what goes through."""
    embedding: Annotated[Float, Field(ge=0, lt=1)] | None = None
    """What comes from the table."""
    activation: Annotated[Float, Field(ge=0, lt=1)] | None = None
    """Within feed-forwards."""
    head: Annotated[Float, Field(ge=0, lt=1)] | None = None
    """What goes into a classifier."""


class Regularization(Section):
    """What keeps the model from fitting too closely or diverging."""

    dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability, where the architecture has dropout."""
    dropouts: Annotated[Dropouts | None, Field(exclude_if=lambda given: given is None)] = None
    """Other probabilities for some of what is dropped."""
    stochastic_depth: Annotated[
        Float, Field(ge=0, lt=1), Field(exclude_if=lambda given: not given)
    ] = 0.0
    """Probability that a row passes by the last block; it grows evenly from the first one on."""
    l1: Annotated[Float, Field(ge=0), Field(exclude_if=lambda given: not given)] = 0.0
    """What Σ|w| costs, of what weight decay is for. It goes through the gradients, after clipping;
    reported losses do not have it."""
    l2: Annotated[Float, Field(ge=0), Field(exclude_if=lambda given: not given)] = 0.0
    """What Σw²/2 costs, in the same way: other than `optimizer.weight_decay`, which is apart from
    the gradients."""
    max_norm: Annotated[
        Float | None, Field(gt=0), Field(exclude_if=lambda given: given is None)
    ] = None
    """Greatest norm of the weights that lead to a unit; they are scaled down after each update."""
    gradient_noise: Annotated[
        GradientNoise | None, Field(exclude_if=lambda given: given is None)
    ] = None
    """Noise on the gradients, after clipping."""
    r_drop: Annotated[Float, Field(ge=0), Field(exclude_if=lambda given: not given)] = 0.0
    """What it costs that two passes of a row, under two masks of dropout, differ (R-Drop: Liang et
    al. 2021): the weight of the mean of both divergences beside the mean loss of both."""
    adversarial: Annotated[Adversarial | None, Field(exclude_if=lambda given: given is None)] = None
    """Training on worse inputs."""
    label_smoothing: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """Probability mass spread over all classes in the training loss."""
    clip_grad_norm: Annotated[Float, Field(gt=0)] | None = 1.0
    """Greatest global gradient norm; none: no clipping."""
    keep_zeros: Annotated[bool, Field(exclude_if=lambda given: not given)] = False
    """Weights of the blocks' matrices that are zero stay zero: a pruned model is trained without
    growing back."""
    ema: Annotated[Ema | None, Field(exclude_if=lambda given: given is None)] = None
    """Keep a moving average of the weights, to evaluate or export instead of them
    (`--weights ema`); validation measures the weights themselves. None: no average."""
    swa: Annotated[Swa | None, Field(exclude_if=lambda given: given is None)] = None
    """Keep an equal average of the weights from a step on, in the same way (`--weights swa`)."""

    @property
    def num_kept_passes(self) -> int:
        """Forward passes of a micro batch whose activations are kept at once."""
        if self.adversarial is not None:
            return self.adversarial.num_kept
        return 2 if self.r_drop else 1


class Distil(Section):
    """Learning from the outputs of another run of the same storage, beside the task's own loss."""

    run: OriginName
    """The teacher: a run that is complete, of the same task, tokeniser and classes, trained whole.
    Its newest checkpoint is read by each rank."""
    share: Share = 0.5
    """Share of the loss that is the divergence from the teacher's distribution; the rest is the
    task's own."""
    temperature: Annotated[Float, Field(gt=0)] = 2.0
    """Both sides' logits are divided by it."""
    hidden: Annotated[Float, Field(ge=0)] = 0.0
    """Weight of the mean squared error of the blocks' outputs, which are as wide as the
    teacher's."""
    attention: Annotated[Float, Field(ge=0)] = 0.0
    """Weight of the mean squared error of the attentions' probabilities, of as many heads."""


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
        _check_one_of(self, "steps", "epochs", "tokens")
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
    """When checkpoints are committed and which are kept. One is always committed at the end; `auto`
    is short for {every_minutes: auto}."""

    model_config = ConfigDict(json_schema_extra=_or_the_word_auto)

    every_steps: Annotated[Int, Field(ge=1)] | None = None
    """Steps between checkpoints."""
    every_minutes: AutoMinutes | None = None
    """Minutes between checkpoints; `auto`: as many as lose the least time to saves and to failures
    together (Daly 2006), by what the run's own saves take and how often it fails, 1 to 60."""
    keep_last: Annotated[Int, Field(ge=1)] = 2
    """How many of the newest are kept."""
    keep_best: Annotated[Int, Field(ge=0)] = 0
    """How many of the best by `validation.metric` are kept besides."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, given: Any) -> Any:
        """`checkpoint: auto`."""
        if isinstance(given, str) and given != "auto":
            raise ValueError("the word auto, or a mapping such as {every_steps: 100}, is wanted")
        return {"every_minutes": given} if given == "auto" else given


class Numerics(Section):
    """What happens to bad numbers. Place, not identity: what was left out is part of the run's
    record."""

    max_skipped_steps: Annotated[Int, Field(ge=1)] = 8
    """Steps in a row without an update, because a loss or gradient was not finite, after which the
    run stops."""
    spike: Literal["off", "warn", "rewind"] = "warn"
    """A loss far above the recent ones: `warn` records it; `rewind` goes back to the checkpoint
    before and leaves the rows of that step out."""
    spike_sigmas: Annotated[Float, Field(gt=1)] = 10.0
    """How far is far: robust standard deviations above the median of the last 64 steps."""
    max_rewinds: Annotated[Int, Field(ge=0)] = 5
    """Rewinds of a run after which a spike stops it."""


class Watchdog(Section):
    """When a run counts as hung: stacks are dumped, the rank at fault is ended, and the run goes
    on."""

    silent_seconds: Annotated[Float, Field(ge=5)] = 15.0
    """A rank that gives no sign of life for so long is stopped or dead."""
    long_silence_seconds: Annotated[Float, Field(ge=5)] = 180.0
    """The same while it builds, restores, saves or takes its first step: libraries may hold the
    interpreter then."""
    stuck_seconds: Annotated[Float, Field(ge=5)] = 120.0
    """No rank moves within a step for so long …"""
    stuck_steps: Annotated[Float, Field(ge=2)] = 30.0
    """… and for so many times a usual step: they wait for each other."""
    patient_seconds: Annotated[Float, Field(ge=5)] = 1800.0
    """The same for what is no step: imports, compilation, waiting for rows, storage."""


def as_pair(value: Any) -> Any:
    """A list as a tuple, which pydantic tells from a number."""
    return tuple(value) if isinstance(value, list) else value


_WORD = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_LABEL = re.compile(rf"(?:{_WORD}/)?{_WORD}")
_LABEL_VALUE = re.compile(rf"!?(?:{_WORD}|in\({_WORD}(?:, ?{_WORD})*\))")
"""Of Ray's label selectors, whose words are those of Kubernetes."""


def _read_labels(labels: Any) -> Any:
    if not isinstance(labels, dict):
        return {} if labels is None else labels
    for name, value in labels.items():
        if not isinstance(value, str):
            word = str(value).lower() if isinstance(value, bool) else value
            raise ValueError(f'{name}: {value!r} is no word; put it in quotes: "{word}"')
        if not _LABEL.fullmatch(str(name)) or not _LABEL_VALUE.fullmatch(value):
            raise ValueError(
                f"{name}: {value}: names and values are up to 63 letters, digits, `-`, `_` and "
                "`.`; a value may also be !value, in(a, b) or !in(a, b)"
            )
    # Ray takes a space behind a comma for a part of the value.
    return {name: value.replace(" ", "") for name, value in labels.items()}


class Resources(Section):
    """The workers and what each of them gets. Place, not identity."""

    workers: Annotated[
        Annotated[Int, Field(ge=1, le=1_000_000)]
        | tuple[Annotated[Int, Field(ge=1)], Annotated[Int, Field(ge=1, le=1_000_000)]],
        BeforeValidator(as_pair),
    ] = 1
    """Number of workers (ranks), or `[fewest, most]` for an elastic group."""
    cpus_per_worker: Annotated[Float, Field(gt=0)] = 1
    """Logical CPUs of a worker; its compute threads."""
    gpus_per_worker: Share = 0
    """GPUs of a worker: 0 or 1; of a run with one worker also a share of one, whose rest others may
    use."""
    accelerator: Annotated[
        str | None, Field(min_length=1, max_length=100, exclude_if=lambda given: given is None)
    ] = None
    """Ray's name of the GPU that each worker must have, e.g. `H100`."""
    labels: Annotated[
        dict[str, str],
        BeforeValidator(_read_labels),
        Field(exclude_if=lambda given: not given),
    ] = {}
    """Ray's labels of the nodes that workers may be on, e.g. `{zone: b}`; `!b`, `in(a, b)` and
    `!in(a, b)` are values, too. Not of an elastic group, whose nodes Ray counts without them."""
    reader_cpus: Annotated[Float, Field(gt=0)] = 1
    """CPUs left to Ray Data for reading; without any, workers would wait for rows for ever."""
    wait_minutes: Annotated[Float, Field(gt=0, le=10_000)] = 30
    """How long an autoscaler may take to add the nodes that the run needs, before it ends."""
    max_failures: Annotated[Int, Field(ge=0)] = 3
    """Restarts of the worker group after a failure before the run is given up."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if isinstance(self.workers, tuple) and self.workers[0] > self.workers[1]:
            raise ValueError(f"workers {list(self.workers)}: the first must not exceed the second")
        if 0 < self.gpus_per_worker < 1 and self.workers != 1:
            raise ValueError(
                f"gpus_per_worker = {self.gpus_per_worker:g}: only a run of one worker shares a "
                "GPU; two ranks of a run cannot talk on one; give workers=1"
            )
        return self

    @model_validator(mode="after")
    def _placed(self) -> Self:
        if self.accelerator is not None and not self.gpus_per_worker:
            raise ValueError(
                f"accelerator {self.accelerator} beside gpus_per_worker 0: it is the GPU of a "
                "worker; give gpus_per_worker=1, or accelerator=null"
            )
        if self.labels and isinstance(self.workers, tuple):
            raise ValueError(
                f"labels beside workers {list(self.workers)}: Ray counts the nodes of an elastic "
                f"group without their labels; give workers={self.workers[1]}, or labels={{}}"
            )
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
    """What lies in host memory: the optimiser states (stages 1 to 3), or these and the parameters
    (stage 3)."""

    @model_validator(mode="after")
    def _offload_needs_stage(self) -> Self:
        least = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.stage != "auto" and self.stage < least:
            raise ValueError(
                f"offload {self.offload} needs stage {least} or higher, not {self.stage}"
            )
        return self


class Execution(Section):
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
