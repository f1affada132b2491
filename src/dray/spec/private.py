"""What a spec says of differential privacy: how long a row's gradient may be, and how much noise
hides it."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from dray.spec.sections import Float, Int, Section


class Privacy(Section):
    """Training that hides each row: its gradient is shortened, and noise is added to the sum of a
    batch (DP-SGD: Abadi et al. 2016). The report has ε and δ."""

    max_grad_norm: Annotated[Float, Field(gt=0)] = 1.0
    """The greatest length of a row's gradient; longer ones are shortened."""
    noise_multiplier: Annotated[Float, Field(gt=0)] | None = None
    """Standard deviation of the noise, in lengths of `max_grad_norm`. This or `epsilon`."""
    epsilon: Annotated[Float, Field(gt=0)] | None = None
    """The ε that the whole run is to have: the noise follows from it and from how often the plan
    uses a row."""
    delta: Annotated[Float, Field(gt=0, lt=1)] = 1e-5
    """δ; less than one in the number of rows."""
    noise_seed: Annotated[Int, Field(ge=0)] | None = None
    """For tests: the noise follows from it, and hides nothing from whoever knows it. None: a secret
    of the run's own."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.noise_multiplier is None) == (self.epsilon is None):
            raise ValueError("give one of noise_multiplier and epsilon")
        return self
