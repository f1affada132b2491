"""What is to be served, in words: a run of a storage at a step, or an exported folder, and its
name."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dray.errors import SpecError
from dray.runs.checkpoint_choice import read_step
from dray.spec.sections import NAME_RULE, RUN_NAME, RunName


class Served(BaseModel):
    """One model of a service."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: RunName | None = None
    """By which requests name it; the run's or the folder's by itself."""
    storage: Annotated[str, Field(min_length=1)] | None = None
    run: RunName | None = None
    step: Annotated[int, Field(ge=0, strict=True)] | Literal["best"] | None = None
    """A number, `best`, or nothing for the newest."""
    weights: Literal["trained", "ema", "swa"] = "trained"
    folder: Annotated[str, Field(min_length=1)] | None = None
    """An exported folder, in place of a run."""
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """Of its weights (`pinning.py`): where it is given, nothing else is loaded."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.folder is None) == (self.run is None):
            raise ValueError("a run or a folder is served")
        if self.run is not None and self.storage is None:
            raise ValueError("a run lies in a storage")
        return self

    @property
    def bare(self) -> Served:
        """The same, by no name of its own."""
        return self.model_copy(update={"name": None})

    @property
    def called(self) -> str:
        """Its name."""
        return self.name or self.run or os.path.basename(os.path.realpath(str(self.folder)))


def read_words(words: str, storage: str, name: str | None = None) -> Served:
    """What `RUN`, `RUN@STEP` or a folder with a model in it means on the command line. Raises
    SpecError."""
    if name is not None and not re.fullmatch(RUN_NAME, name):
        raise SpecError(f"--name {name[:100]}", "is no name", NAME_RULE)
    if os.path.isfile(os.path.join(words, "config.json")):
        return Served(name=name, folder=os.path.abspath(words))
    run, _, step = words.partition("@")
    found = read_step(step, words) if step else None
    if os.path.isdir(words) and os.sep in words:
        raise SpecError(
            words, "holds no config.json", "a folder is one that `dray export` has written"
        )
    if not re.fullmatch(RUN_NAME, run):
        raise SpecError(
            words[:200],
            "is no folder with a model, and no name of a run",
            NAME_RULE,
            "another name for a run is given as --name NAME=RUN" if "=" in words else "",
        )
    return Served(name=name, storage=storage, run=run, step=found)


def check_names(models: Sequence[Served]) -> list[str]:
    """Names of models. Raises SpecError where two have the same, or there is none."""
    names = [model.called for model in models]
    if not names:
        raise SpecError("dray serve", "nothing to serve", "name a run or a folder")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        rule = "requests name a model by its name"
        raise SpecError("dray serve", f"two models are called {twice[0]}", rule, "--name NAME=RUN")
    return names
