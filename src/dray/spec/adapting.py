"""Which part of a model is trained: adapters beside a model that stays as it is, and layers that
are frozen for good or for a while.

A class is a kind of adapter, a field with its sentence is a key. What they do to a model is
`models/adapters.py` and `models/freezing.py`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, Tag, model_validator

from dray.errors import SpecError
from dray.spec.sections import Float, Int, Section, chosen_by_name


def _read_targets(given: Any) -> Any:
    """One name, or a list of them."""
    return (given,) if isinstance(given, str) else given


Targets = Annotated[
    Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)],
    BeforeValidator(_read_targets),
]


class Adapters(Section):
    """What all kinds of adapters share. The model that they are put into stays as it is; a head
    that a task has anew is trained beside them."""

    merges: ClassVar[bool] = True
    """Whether they can be made a part of the weights that they change."""
    virtual_tokens: ClassVar[bool] = False
    """Whether they are tokens before each row."""
    packages: ClassVar[tuple[str, ...]] = ("peft",)
    """What they need besides dray's own packages: the names that are imported."""

    name: str
    """The kind of adapter."""

    @property
    def num_virtual_tokens(self) -> int:
        """Tokens that they put before each row."""
        return 0

    @property
    def quantized(self) -> bool:
        """Whether the model that stays as it is is held in fewer bits."""
        return False

    @property
    def needed_packages(self) -> tuple[str, ...]:
        """The packages that these settings need."""
        return self.packages

    def check_packages(self) -> None:
        """Raise SpecError where a package that they need is not installed. Imports nothing."""
        for package in self.needed_packages:
            if find_spec(package) is None:
                raise SpecError(
                    f"adapters.name = {self.name}",
                    f"{package} is not installed",
                    "its layers are that package's",
                    "pip install 'dray[adapters]' wherever ranks run",
                )


class _LowRank(Adapters):
    """What LoRA and its variants share."""

    rank: Annotated[Int, Field(ge=1, le=4096)] = 8
    """Rank r of the update B·A of a matrix."""
    alpha: Annotated[Float, Field(gt=0)] | None = None
    """The update is scaled by alpha / rank (rslora: alpha / √rank); none: twice the rank."""
    dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability of what goes into A."""
    targets: Targets | None = None
    """Modules that get one, by the ends of their names (`q_proj`); none: every matrix of the
    model's blocks."""
    base: Literal["as_is", "nf4"] = "as_is"
    """How the matrices that get one are held: `nf4`: in 4 bits (QLoRA), below ZeRO 3."""

    @property
    def quantized(self) -> bool:
        return self.base != "as_is"

    @property
    def needed_packages(self) -> tuple[str, ...]:
        return (*self.packages, "bitsandbytes") if self.quantized else self.packages

    @property
    def scale_numerator(self) -> float:
        """`alpha`, whoever chose it."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


class Lora(_LowRank):
    """LoRA: a low-rank update beside each matrix (Hu et al. 2021, arXiv 2106.09685)."""

    name: Literal["lora"] = "lora"
    """The kind of adapter."""


class Dora(_LowRank):
    """DoRA: LoRA on directions, and a magnitude for each output (Liu et al. 2024, arXiv
    2402.09353)."""

    name: Literal["dora"] = "dora"
    """The kind of adapter."""


class Rslora(_LowRank):
    """rsLoRA: LoRA scaled by 1/√rank, so that high ranks learn as fast (Kalajdzievski 2023, arXiv
    2312.03732)."""

    name: Literal["rslora"] = "rslora"
    """The kind of adapter."""


class Ia3(Adapters):
    """IA3: a factor for each output of keys and values, and for each input of a feed-forward (Liu
    et al. 2022, arXiv 2205.05638)."""

    name: Literal["ia3"] = "ia3"
    """The kind of adapter."""
    targets: Targets | None = None
    """Modules that get factors, by the ends of their names; none: peft's own choice for the
    architecture."""
    inputs: Targets | None = None
    """Those of the targets whose inputs are scaled instead of their outputs; none: peft's own
    choice, or with `targets` no one's."""

    @model_validator(mode="after")
    def _inputs_are_targets(self) -> Self:
        if self.inputs and not set(self.inputs) <= set(self.targets or ()):
            raise ValueError("inputs: each of them is one of `targets`, too; give it there")
        return self


class Prefix(Adapters):
    """Prefix tuning: keys and values of virtual tokens in each block (Li and Liang 2021, arXiv
    2101.00190)."""

    merges: ClassVar[bool] = False
    virtual_tokens: ClassVar[bool] = True

    name: Literal["prefix"] = "prefix"
    """The kind of adapter."""
    num_tokens: Annotated[Int, Field(ge=1, le=4096)] = 20
    """Virtual tokens before each row."""

    @property
    def num_virtual_tokens(self) -> int:
        return self.num_tokens


class Prompt(Adapters):
    """Prompt tuning: embeddings of virtual tokens (Lester et al. 2021, arXiv 2104.08691)."""

    merges: ClassVar[bool] = False
    virtual_tokens: ClassVar[bool] = True

    name: Literal["prompt"] = "prompt"
    """The kind of adapter."""
    num_tokens: Annotated[Int, Field(ge=1, le=4096)] = 20
    """Virtual tokens before each row. They begin as embeddings of tokens that are drawn."""

    @property
    def num_virtual_tokens(self) -> int:
        return self.num_tokens


class Bottleneck(Adapters):
    """Bottleneck adapters: a narrow feed-forward behind what each attention and each feed-forward
    gives out, added to it (Houlsby et al. 2019, arXiv 1902.00751)."""

    merges: ClassVar[bool] = False
    packages: ClassVar[tuple[str, ...]] = ()

    name: Literal["bottleneck"] = "bottleneck"
    """The kind of adapter."""
    width: Annotated[Int, Field(ge=1, le=16384)] = 64
    """Width of the bottleneck."""
    targets: Targets | None = None
    """Modules behind which one is put, by the ends of their names; none: the output matrices of
    attention and feed-forward."""


KINDS: tuple[type[Adapters], ...] = (Lora, Dora, Rslora, Ia3, Prefix, Prompt, Bottleneck)
ADAPTERS = {str(kind.model_fields["name"].default): kind for kind in KINDS}
"""The classes by the names that a spec gives them."""


AdaptersChoice = Annotated[
    Annotated[Lora, Tag("Lora")]
    | Annotated[Dora, Tag("Dora")]
    | Annotated[Rslora, Tag("Rslora")]
    | Annotated[Ia3, Tag("Ia3")]
    | Annotated[Prefix, Tag("Prefix")]
    | Annotated[Prompt, Tag("Prompt")]
    | Annotated[Bottleneck, Tag("Bottleneck")],
    chosen_by_name(ADAPTERS, "lora", "adapters"),
]


class Freezing(Section):
    """Layers that are not trained. The head and what follows the last block always are, but for a
    head that is tied to embeddings which are not."""

    embeddings: bool = False
    """Never train what lies before the first block: the embeddings, and a head that is tied to
    them."""
    blocks: Annotated[Int, Field(ge=0)] = 0
    """Never train the first so many blocks."""
    body: bool = False
    """Never train anything but the head."""
    thaw_every_steps: Annotated[Int, Field(ge=1)] | None = None
    """Begin with the head alone, and after so many steps each with one more block, from the last
    one down, and at last with the embeddings; those that are never trained stay out. None: all that
    is trained is from the first step on."""

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if not (self.freezes or self.thaw_every_steps):
            raise ValueError("nothing is frozen; leave the section out")
        if self.body and self.thaw_every_steps:
            raise ValueError(
                "thaw_every_steps beside body: true: nothing of the body is ever trained; leave "
                "one of them out"
            )
        return self

    @property
    def freezes(self) -> bool:
        """Whether a part of the model is never trained."""
        return self.embeddings or self.blocks > 0 or self.body
