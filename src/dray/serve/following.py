"""A running service that follows what is promoted: a version's replicas answer before a request
goes to them, and end after none does.

The records of the storage are looked at every half second. Versions are loaded by a thread of their
own, so that a rollback to what is loaded already waits for none of them. A version that cannot be
loaded changes nothing: what answers goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from dray.errors import DrayError
from dray.serve.served import Served
from dray.serve.versions import Record, State, told

POLL_SECONDS = 0.5
Version = tuple[str, int]


class Replicas(Protocol):
    """What runs versions."""

    def load(self, name: str, version: int, served: Served) -> None:
        """Start a version's replicas and wait until they answer. Raises DrayError."""

    def route(self, models: Mapping[str, Mapping[str, Any]]) -> None:
        """Tell the gateway who answers."""

    def drop(self, name: str, version: int) -> None:
        """Let a version's requests end, then its replicas."""


@dataclass
class _Name:
    record: Record
    wanted: State
    followed: State | None = None


class Follower:
    """The names of a service. `begin` first, then `look` every now and then."""

    def __init__(
        self, records: Sequence[Record], replicas: Replicas, say: Callable[[str], None]
    ) -> None:
        self._names = {record.name: _Name(record, record.read()) for record in records}
        self._replicas, self._say = replicas, say
        self._loading: dict[Version, Future[None]] = {}
        self._failed: set[Version] = set()
        self._loaded: set[Version] = set()
        self._pool = ThreadPoolExecutor(1, "versions")

    def begin(self) -> None:
        """Load what answers now; the gateway knows it. Raises DrayError where it does not load."""
        for name, one in self._names.items():
            for version in sorted(one.wanted.kept() - set(one.wanted.before[:1])):
                self._replicas.load(name, version, one.wanted.versions[version])
                self._loaded.add((name, version))
            one.followed = one.wanted.model_copy(update={"before": ()})
        self._route()

    def look(self) -> None:
        """One look at the records. Raises nothing: what cannot be read is as it was."""
        for name, one in self._names.items():
            try:
                state = one.record.read()
            except DrayError as error:
                self._say(f"{name}: its versions cannot be read ({error})")
                continue
            if state != one.wanted:
                one.wanted = state
                self._failed = {pair for pair in self._failed if pair[0] != name}
            self._note_loaded(name)
            self._load_missing(name, state)
            if state != one.followed and self._can_follow(name, state):
                before = one.followed
                try:
                    self._follow(name, one, state)
                except DrayError as error:
                    one.followed = before  # tried again at the next look
                    self._say(f"{name}: the gateway was not told, what answers goes on: {error}")

    def close(self) -> None:
        """Load nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def join(self) -> None:
        """Wait for what is being loaded or dropped: it ends of itself once Serve is gone."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _note_loaded(self, name: str) -> None:
        for pair in [pair for pair, future in self._loading.items() if future.done()]:
            if pair[0] != name:
                continue
            error = self._loading.pop(pair).exception()
            if error is None:
                self._loaded.add(pair)
            else:
                self._failed.add(pair)
                self._say(f"{name}@{pair[1]} was not loaded, nothing changes: {error}")

    def _load_missing(self, name: str, state: State) -> None:
        for version in sorted(state.kept(), reverse=True):
            pair = (name, version)
            if pair not in self._loaded | self._failed | self._loading.keys():
                served = state.versions[version]
                self._loading[pair] = self._pool.submit(self._replicas.load, name, version, served)

    def _can_follow(self, name: str, state: State) -> bool:
        """Whether all that work are loaded: not what is kept for a rollback alone."""
        work = {*state.may_answer()} | ({state.shadow} if state.shadow else set())
        return all((name, version) in self._loaded for version in work)

    def _follow(self, name: str, one: _Name, state: State) -> None:
        one.followed = state
        self._route()
        self._say(f"{name}: {state_told(state)}")
        idle = {version for other, version in self._loaded if other == name} - state.kept()
        for version in idle:
            self._loaded.discard((name, version))
            self._pool.submit(self._replicas.drop, name, version)

    def _route(self) -> None:
        self._replicas.route(
            {name: self._routed(name, one.followed) for name, one in self._names.items()
             if one.followed is not None}
        )  # fmt: skip

    def _routed(self, name: str, state: State) -> dict[str, Any]:
        return {
            "stable": state.stable,
            "canary": state.canary,
            "share": state.share,
            "shadow": state.shadow,
            "loaded": sorted(version for other, version in self._loaded if other == name),
        }


def state_told(state: State) -> str:
    """In a line."""
    some = [f"version {state.stable} ({told(state.versions[state.stable])}) answers"]
    if state.canary is not None:
        some.append(f"version {state.canary} answers {state.share:.3g} of requests")
    if state.shadow is not None:
        some.append(f"version {state.shadow} is a shadow")
    return ", ".join(some)
