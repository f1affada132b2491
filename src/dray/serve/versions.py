"""Which versions a served name has, and which of them may answer.

`STORAGE/serving/models/NAME/000001.json` … are what was done to a name, one after the other: who,
when, what. Each is created once by exactly one writer and never changed; what holds now is what
they add up to. So nothing is half written, two who promote at once cannot both be the same number,
and the history is whole. Refuses a version whose weights are not those that were promoted.
"""

from __future__ import annotations

import getpass
import json
import re
import socket
import time
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from dray.errors import SpecError, StoreError
from dray.runs.layout import SERVING
from dray.serve.served import Served
from dray.spec.sections import RunName
from dray.storage.exclusive import create_exclusive
from dray.storage.filesystem import absolute, child, list_files, read_bytes, share_filesystem

Deed = Literal["promote", "canary", "shadow", "rollback"]
_FILE = re.compile(r"([0-9]{6})\.json")
TRIES = 20
"""Of writing a change, where others write, too."""


class Change(BaseModel):
    """What was done to a name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    at: float
    by: str
    deed: Deed
    version: Annotated[int, Field(ge=1)]
    served: Served | None = None
    """What the version is, where it is new."""
    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Of requests, for a canary."""


class State(BaseModel):
    """What holds of a name."""

    model_config = ConfigDict(frozen=True)

    versions: dict[int, Served] = {}
    stable: int = 0
    """The version that answers; 0 before there is one."""
    before: tuple[int, ...] = ()
    """What a rollback goes back to, the last one first."""
    canary: int | None = None
    share: float = 0.0
    shadow: int | None = None

    def may_answer(self) -> tuple[int, ...]:
        """The versions whose answers are given out unasked."""
        return (self.stable,) if self.canary is None else (self.stable, self.canary)

    def kept(self) -> frozenset[int]:
        """The versions that have replicas: those that work, and the one before, for a rollback."""
        some = {self.stable, self.canary, self.shadow, *self.before[:1]}
        return frozenset(version for version in some if version)

    def role(self, version: int) -> str:
        """What a version is now."""
        if version == self.stable:
            return "promoted"
        if version == self.canary:
            return f"canary of {self.share:.3g}"
        if version == self.shadow:
            return "shadow"
        return "before" if version in self.before[:1] else "retired"


def after(state: State, change: Change) -> State:
    """What holds after a change. Raises ValueError for one that cannot be."""
    versions = dict(state.versions)
    if change.served is not None:
        if change.version != len(versions) + 1:
            raise ValueError(f"version {change.version} is new, after {len(versions)}")
        versions[change.version] = change.served
    if change.version not in versions:
        raise ValueError(f"there is no version {change.version}")
    if change.deed == "rollback":
        return _rolled_back(state, change.version)
    if change.deed == "promote":
        old = (state.stable,) if state.stable and state.stable != change.version else ()
        rest = tuple(version for version in state.before if version != change.version)
        return State(versions=versions, stable=change.version, before=old + rest)
    if not state.stable or change.version == state.stable:
        raise ValueError(f"a {change.deed} stands beside another version, which is promoted")
    moved = state.model_copy(update={"versions": versions})
    if change.deed == "shadow":
        ended = {"canary": None, "share": 0.0} if state.canary == change.version else {}
        return moved.model_copy(update={"shadow": change.version, **ended})
    if change.share is None:
        raise ValueError("a canary has a share")
    ended = {"shadow": None} if state.shadow == change.version else {}
    return moved.model_copy(update={"canary": change.version, "share": change.share, **ended})


def _rolled_back(state: State, version: int) -> State:
    """A canary and a shadow end; where there is neither, the version before answers again."""
    if state.canary is not None or state.shadow is not None:
        if version != state.stable:
            raise ValueError(f"version {state.stable} stays")
        return state.model_copy(update={"canary": None, "share": 0.0, "shadow": None})
    if not state.before or state.before[0] != version:
        raise ValueError(f"version {version} is not the one before")
    return state.model_copy(update={"stable": version, "before": state.before[1:]})


class Record:
    """The history of a served name in a storage."""

    def __init__(self, storage: str, name: str) -> None:
        try:
            TypeAdapter(RunName).validate_python(name)
        except ValidationError:
            rule = "letters, digits, dots, - and _, at most 100"
            raise SpecError(f"model {name!r}", "is no name", rule) from None
        self.name = name
        self._storage = absolute(storage)
        self._filesystem, self._folder = share_filesystem(child(storage, SERVING, "models", name))
        self._changes: list[Change] = []

    def read(self) -> State:
        """What holds now. Raises StoreError for a history that is damaged."""
        files = list_files(self._filesystem, self._folder)
        numbers = sorted(int(found[1]) for name in files if (found := _FILE.fullmatch(name)))
        if numbers != list(range(1, len(numbers) + 1)):
            raise StoreError(self._folder, "a change is missing", "changes are 000001.json and on")
        for number in numbers[len(self._changes) :]:
            path = self._path(number)
            try:
                content = json.loads(read_bytes(self._filesystem, path))
                self._changes.append(self._here(Change.model_validate(content)))
            except ValueError as error:
                raise StoreError(path, "is no change of a model's versions") from error
        try:
            return fold(self._changes)
        except ValueError as error:
            raise StoreError(self._folder, f"is damaged ({error})") from error

    def _here(self, change: Change) -> Change:
        if change.served is None:
            return change
        return change.model_copy(update={"served": self._located(change.served)})

    def _located(self, served: Served) -> Served:
        """Versions are runs of the storage that the record lies in, also when all of it was
        moved."""
        if served.run is None:
            return served
        return served.model_copy(update={"storage": self._storage})

    def history(self) -> tuple[Change, ...]:
        """All changes, the first one first."""
        self.read()
        return tuple(self._changes)

    def begin(self, served: Served) -> State:
        """Make it version 1 where there is none. Raises SpecError where the name has versions, and
        this is none of them."""
        state, served = self.read(), self._located(served)
        if not state.stable:
            return self.promote(served)
        if _find(state, served) is None:
            what = f"is version {state.stable}, {told(state.versions[state.stable])}"
            raise SpecError(
                f"model {self.name!r}",
                what,
                "what answers is what was promoted",
                f"`dray serve promote {self.name} {told(served)}`, or another --name",
            )
        return state

    def promote(self, served: Served, share: float | None = None, shadow: bool = False) -> State:
        """Let it answer: all requests, a share of them, or copies of them. Raises SpecError where
        that cannot be."""
        served = self._located(served)
        deed: Deed = "shadow" if shadow else "promote" if share is None else "canary"
        if share is not None and not 0 < share < 1:
            raise SpecError(f"--share {share:g}", "is no share", "more than 0 and less than 1")

        def make(state: State) -> Change:
            number = _find(state, served)
            new = served if number is None else None
            return self._change(deed, number or len(state.versions) + 1, new, share)

        return self._write(make)

    def rollback(self) -> State:
        """End a canary and a shadow, or go back to the version before. Raises SpecError where there
        is none."""

        def make(state: State) -> Change:
            if not state.stable:
                raise SpecError(
                    f"model {self.name!r}",
                    "has no versions in this storage",
                    "`dray serve` begins it",
                    "name its storage with --storage",
                )
            beside = state.canary is not None or state.shadow is not None
            version = state.stable if beside else next(iter(state.before), 0)
            if not version:
                raise SpecError(f"model {self.name!r}", "has no version before this one")
            return self._change("rollback", version)

        return self._write(make)

    def _write(self, make: object) -> State:
        for _ in range(TRIES):
            state = self.read()
            change: Change = make(state)  # type: ignore[operator]
            try:
                found = after(state, change)
            except ValueError as error:
                raise SpecError(f"model {self.name!r}", str(error)) from error
            path = self._path(len(self._changes) + 1)
            if create_exclusive(self._filesystem, path, change.model_dump_json().encode()):
                return found
        raise StoreError(self._folder, "others write at the same time", "", "try again")

    @staticmethod
    def _change(
        deed: Deed, version: int, served: Served | None = None, share: float | None = None
    ) -> Change:
        by = f"{getpass.getuser()}@{socket.gethostname()}"
        # The time makes the content unlike any other's, as exclusive creation asks.
        return Change(at=time.time(), by=by, deed=deed, version=version, served=served, share=share)

    def _path(self, number: int) -> str:
        return f"{self._folder}/{number:06}.json"


def fold(changes: Iterable[Change]) -> State:
    """What changes add up to. Raises ValueError."""
    state = State()
    for change in changes:
        state = after(state, change)
    return state


def told(served: Served) -> str:
    """As on the command line."""
    step = "" if served.step is None else f"@{served.step}"
    return served.folder or f"{served.run}{step}"


def _find(state: State, served: Served) -> int | None:
    """The number of a version, if it is one: the same thing with the same weights."""
    for number, known in state.versions.items():
        if known.bare == served.bare:
            return number
    return None
