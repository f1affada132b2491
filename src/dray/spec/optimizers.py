"""The optimisers: what each takes in a spec, what it keeps for a parameter, and where it may run.

A class is an optimiser, a field with its sentence is a key. The engine makes the states that
`states` declares, checkpoints hold them by their names, and the plan counts their bytes.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field, Tag

from dray.errors import SpecError
from dray.spec.sections import AUTO, Float, Int, Section, chosen_by_name

Size = tuple[int, ...]
_DTYPE_BYTES = {"float32": 4, "uint8": 1}


class State(NamedTuple):
    """Something that is kept for a parameter: its name in checkpoints, its shape, and torch's name
    of its dtype."""

    name: str
    shape: Size
    dtype: str = "float32"

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _DTYPE_BYTES[self.dtype]


class WidthTransfer(Section):
    """Maximal update parametrisation: what is best for a narrow model stays best for a wide one."""

    base_hidden_size: Annotated[Int, Field(ge=8)]
    """Width of the model whose learning rate, decay and deviation of the initial weights are given.
    A wider one has more heads of attention, of the same size."""


class Optimizer(Section):
    """What all optimisers share."""

    elementwise: ClassVar[bool] = True
    """Whether each element is updated by itself: then ZeRO may cut parameters anywhere."""
    unit: ClassVar[str] = "whole matrices"
    """What is updated together, where elements are not updated by themselves."""
    working_copies: ClassVar[int] = 0
    """Copies in fp32 of what is updated at once that come and go in an update."""
    parts_hidden: ClassVar[bool] = False
    """Whether the matrices of the model's blocks are updated otherwise than the rest."""
    package: ClassVar[str | None] = None
    """What it needs besides dray's own packages: the name that is imported."""

    name: str
    """The optimiser's name."""
    learning_rate: Annotated[Float, Field(gt=0, le=10)]
    """Peak learning rate."""
    weight_decay: Annotated[Float, Field(ge=0, le=10)] = 0.1
    """Decoupled weight decay; it spares norms, biases and embeddings."""
    block_rate: Annotated[
        Annotated[Float, Field(gt=0, le=1)] | None, Field(exclude_if=lambda given: given is None)
    ] = None
    """Learning rate of the last block as a share of the head's, of each other block as a share of
    the one above it, and of the embeddings as a share of the first block's (Clark et al. 2020,
    ELECTRA). None: one rate for all."""

    @property
    def base_hidden_size(self) -> int | None:
        """Width of the model whose rate is given; none: this one's own."""
        return None

    def states(self, shape: Size, *, is_hidden: bool) -> tuple[State, ...]:
        """What is kept for a parameter of that shape, zeros before the first update. `is_hidden`:
        it is a matrix of one of the model's blocks."""
        raise NotImplementedError

    def keeps_as(self, other: Optimizer) -> bool:
        """Whether it can go on with what another one has kept."""
        kept, theirs = (chosen.states((2, 2), is_hidden=False) for chosen in (self, other))
        return self.name == other.name and kept == theirs

    def check_package(self) -> None:
        """Raise SpecError where a package that it needs is not installed. Imports nothing."""
        if self.package is not None and find_spec(self.package) is None:
            raise SpecError(
                f"optimizer.name = {self.name}",
                f"{self.package} is not installed",
                "its updates are that package's",
                "pip install 'dray[quantized]' wherever ranks run, or give another optimizer",
            )


class Adam(Optimizer):
    """What all kinds of AdamW share: two moments."""

    learning_rate: Annotated[Float, Field(ge=0, le=10), *AUTO] = 1.0e-3
    """Peak learning rate; `auto`: by the Step Law."""
    beta1: Annotated[Float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[Float, Field(ge=0, lt=1)] = 0.95
    """Decay of the second moment."""
    epsilon: Annotated[Float, Field(gt=0, le=1)] = 1.0e-8
    """Term added to the denominator."""
    width_transfer: Annotated[
        WidthTransfer | None, Field(exclude_if=lambda given: given is None)
    ] = None
    """Scale rates and initial weights so that the best learning rate is that of a narrower model.
    None: no scaling."""

    @property
    def base_hidden_size(self) -> int | None:
        return None if self.width_transfer is None else self.width_transfer.base_hidden_size


class AdamW(Adam):
    """AdamW: two moments of each element."""

    name: Literal["adamw"] = "adamw"
    """The optimiser's name."""

    def states(self, shape: Size, *, is_hidden: bool) -> tuple[State, ...]:
        return State("exp_avg", shape), State("exp_avg_sq", shape)


class AdamW8bit(Adam):
    """AdamW whose two moments take a byte an element and a number for each 256 of them, in the
    matrices of the model's blocks; embeddings, heads, norms and biases keep theirs in fp32."""

    elementwise: ClassVar[bool] = False
    parts_hidden: ClassVar[bool] = True
    unit: ClassVar[str] = "blocks of whole tensors, with a scale each"
    package: ClassVar[str | None] = "bitsandbytes"
    block_elements: ClassVar[int] = 256
    """Elements of a matrix that share a scale: the package's own number."""

    name: Literal["adamw_8bit"] = "adamw_8bit"
    """The optimiser's name."""
    least_elements: Annotated[Int, Field(ge=1)] = 4096
    """Matrices with fewer elements keep their moments in fp32."""

    def states(self, shape: Size, *, is_hidden: bool) -> tuple[State, ...]:
        size = math.prod(shape)
        if not is_hidden or size < self.least_elements:
            return State("exp_avg", shape), State("exp_avg_sq", shape)
        scales = (-(-size // self.block_elements),)
        return (
            State("exp_avg", shape, "uint8"),
            State("exp_avg_sq", shape, "uint8"),
            State("exp_avg_scale", scales),
            State("exp_avg_sq_scale", scales),
        )

    def keeps_as(self, other: Optimizer) -> bool:
        return (
            isinstance(other, AdamW8bit)
            and super().keeps_as(other)
            and self.least_elements == other.least_elements
        )


class Sgd(Optimizer):
    """Stochastic gradient descent with momentum, as torch has it: the decay is part of the
    gradient."""

    name: Literal["sgd"] = "sgd"
    """The optimiser's name."""
    weight_decay: Annotated[Float, Field(ge=0, le=10)] = 0.0
    """Weight decay, added to the gradient before the momentum; it spares norms, biases and
    embeddings."""
    momentum: Annotated[Float, Field(ge=0, lt=1)] = 0.9
    """Share of the last update's direction that is kept; 0: none, and no state."""

    def states(self, shape: Size, *, is_hidden: bool) -> tuple[State, ...]:
        return (State("momentum_buffer", shape),) if self.momentum else ()


class Lion(Optimizer):
    """Lion: the sign of a moment of the gradients. Its rate wants to be some 3 to 10 times smaller
    than AdamW's, and its decay as much larger."""

    working_copies: ClassVar[int] = 1

    name: Literal["lion"] = "lion"
    """The optimiser's name."""
    beta1: Annotated[Float, Field(ge=0, lt=1)] = 0.9
    """Share of the moment in an update, the rest is the gradient's."""
    beta2: Annotated[Float, Field(ge=0, lt=1)] = 0.99
    """Decay of the moment."""

    def states(self, shape: Size, *, is_hidden: bool) -> tuple[State, ...]:
        return (State("exp_avg", shape),)


class Adafactor(Optimizer):
    """Adafactor, as torch has it: of a matrix' second moment only the means of its rows and columns
    are kept. Steps are relative to a parameter's own size."""

    elementwise: ClassVar[bool] = False
    working_copies: ClassVar[int] = 1

    name: Literal["adafactor"] = "adafactor"
    """The optimiser's name."""
    learning_rate: Annotated[Float, Field(gt=0, le=10)]
    """Peak learning rate: the greatest step, as a share of a parameter's root mean square. At
    update n a step is no more than 1/√n."""
    weight_decay: Annotated[Float, Field(ge=0, le=10)] = 0.0
    """Decoupled weight decay; it spares norms, biases and embeddings."""
    beta2_decay: Annotated[Float, Field(ge=-1, le=0)] = -0.8
    """At update n the second moment keeps 1 - n^beta2_decay of itself."""
    scale_floor: Annotated[Float, Field(gt=0)] = 1.0e-3
    """A parameter's root mean square counts as this at least."""
    clip_update: Annotated[Float, Field(ge=1)] = 1.0
    """Greatest root mean square of an update before it is scaled."""

    def states(self, shape: Size, *, is_hidden: bool) -> tuple[State, ...]:
        if len(shape) < 2:
            return (State("variance", shape),)
        rows, columns = (*shape[:-1], 1), (*shape[:-2], 1, shape[-1])
        return State("row_var", rows), State("col_var", columns)


class Muon(Optimizer):
    """Muon for the matrices of the model's blocks, whose moment is made orthogonal, and AdamW for
    embeddings, heads, norms and biases. Updates are scaled to the size of AdamW's, so that both go
    by one rate."""

    elementwise: ClassVar[bool] = False
    working_copies: ClassVar[int] = 4
    parts_hidden: ClassVar[bool] = True

    name: Literal["muon"] = "muon"
    """The optimiser's name."""
    momentum: Annotated[Float, Field(ge=0, lt=1)] = 0.95
    """Decay of the moment that is made orthogonal, in Nesterov's form."""
    beta1: Annotated[Float, Field(ge=0, lt=1)] = 0.9
    """AdamW's decay of the first moment."""
    beta2: Annotated[Float, Field(ge=0, lt=1)] = 0.95
    """AdamW's decay of the second moment."""
    epsilon: Annotated[Float, Field(gt=0, le=1)] = 1.0e-8
    """AdamW's term added to the denominator."""

    def states(self, shape: Size, *, is_hidden: bool) -> tuple[State, ...]:
        if is_hidden:
            return (State("momentum_buffer", shape),)
        return State("exp_avg", shape), State("exp_avg_sq", shape)


KINDS: tuple[type[Optimizer], ...] = (AdamW, AdamW8bit, Sgd, Lion, Adafactor, Muon)
OPTIMIZERS = {str(kind.model_fields["name"].default): kind for kind in KINDS}
"""The classes by the names that a spec gives them."""


OptimizerChoice = Annotated[
    Annotated[AdamW, Tag("AdamW")]
    | Annotated[AdamW8bit, Tag("AdamW8bit")]
    | Annotated[Sgd, Tag("Sgd")]
    | Annotated[Lion, Tag("Lion")]
    | Annotated[Adafactor, Tag("Adafactor")]
    | Annotated[Muon, Tag("Muon")],
    chosen_by_name(OPTIMIZERS, "adamw", "optimizer"),
]
