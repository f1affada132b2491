"""What a method of compression is: one file a method, whose class is listed in `methods.py`.

A method changes a candidate, a model that was read from a run, and refuses what the architecture
cannot have by asking its configuration and modules. Those that pack come last: codes cannot be
changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

from pydantic import Field as Limits

from dray.errors import SpecError
from dray.models.packed import Packed
from dray.spec import Spec
from dray.spec.sections import Float, Int, Section

if TYPE_CHECKING:
    from dray.release.trained import Trained

Say = Callable[[str], None]


class Train(Protocol):
    """How a method trains what is left (`recovering.Workshop`)."""

    def __call__(
        self, candidate: Candidate, steps: int, rate: float | None, **sections: Any
    ) -> Any:
        """The candidate's model after so many steps of the run's own training; `sections` of the
        spec are given."""


@dataclass
class Candidate:
    """A model on its way: in fp32, and what of it is stored in fewer bytes."""

    trained: Trained
    """The run's checkpoint that it is made from."""
    model: Any
    train: Train
    say: Say
    packed: dict[str, Packed] = field(default_factory=dict)
    """Weights by name as they will be stored; none: all in fp32."""
    keeps_zeros: bool = False
    """Whether zeros of its matrices are to stay when it is trained."""

    @property
    def where(self) -> str:
        """What an error is of."""
        return f"run {self.trained.run.name!r}"


class NoSettings(Section):
    """Nothing to set."""


class Recovering(Section):
    """How a model is trained after something was taken out of it."""

    recover: Annotated[Int, Limits(ge=0)] = 0
    """Steps of the run's own training on its own rows; 0: none."""
    rate: Annotated[Float, Limits(gt=0)] | None = None
    """Greatest learning rate of these; none: half of the run's own."""


class Method:
    """One way to make a model smaller or faster."""

    name: ClassVar[str]
    Settings: ClassVar[type[Section]] = NoSettings
    packs: ClassVar[bool] = False
    """Whether weights become codes, which no method after it can change."""

    def __init__(self, settings: Any = None) -> None:
        self.settings: Any = self.Settings() if settings is None else settings

    def suits(self, spec: Spec) -> None:
        """Raise SpecError for a spec whose model cannot have it, as far as the spec says what that
        is. Called before there is one."""

    def check(self, candidate: Candidate) -> None:
        """Raise SpecError for a model that cannot have it. Called before anything is measured."""

    def apply(self, candidate: Candidate) -> None:
        """Change the candidate. Raises SpecError."""
        raise NotImplementedError

    def told(self) -> dict[str, Any]:
        """The method with its settings, as a record keeps it."""
        return {"name": self.name, **self.settings.model_dump(mode="json")}

    def recover(self, candidate: Candidate) -> None:
        """Train the candidate as the settings say."""
        if self.settings.recover:
            candidate.model = candidate.train(candidate, self.settings.recover, self.settings.rate)

    def refused(self, candidate: Candidate, what: str, rule: str, way_out: str = "") -> SpecError:
        """An error that says why a model cannot have it."""
        kind = candidate.model.config.model_type
        return SpecError(f"--with {self.name}", f"{kind}: {what}", rule, way_out)
