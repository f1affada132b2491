"""From a request to the replicas that answer it: which model, which of its targets, and once more
where a replica is lost.

A request is asked again where its replica is lost: whoever asked sees one answer. This file knows
no Ray: `service.py` makes targets of its handles. It is the seam for versions: `Router.choose` may
have several targets of a model to choose from.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, Protocol

from dray.serve.asked import Asked, now_asked
from dray.serve.events import Event
from dray.serve.limits import Limits
from dray.serve.refusals import Refusal, too_many
from dray.serve.resuming import Differs, Given, with_seed
from dray.serve.schemas import Card

TRIES = 4
"""Of a request, where replicas are lost under it."""
READY_SECONDS = 5.0
"""In which a model's replica says what it is, or the model is not ready."""
PAUSE_SECONDS = 0.2
"""Before the second try; twice as long before each further one."""


class Lost(Exception):
    """The replica that worked on a request is gone, or did not take it."""


class Full(Exception):
    """All replicas have as much as they take."""


class Target(Protocol):
    """Replicas that hold one version of a model."""

    async def card(self) -> Card:
        """Raises Lost where there is no replica."""

    async def write(self, kind: str, body: dict[str, Any]) -> Event:
        """The whole answer. Raises Lost and Full."""

    def stream(self, kind: str, body: dict[str, Any]) -> AsyncIterator[Event]:
        """The events of an answer. Raises Lost and Full."""

    async def predict(self, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Each with its `size` where that is known: tokens and unknown ones. Raises Lost and
        Full."""

    async def reference(self, version: int) -> list[dict[str, Any]]:
        """Looks at held-out rows of a version, for its drift; none where there are none."""


class Router:
    """The models of a service by name."""

    def __init__(self, targets: Mapping[str, Target], limits: Limits) -> None:
        self.targets, self.limits = dict(targets), limits
        self.queue: Counter[str] = Counter()
        """Requests of each model that are with its replicas: waiting, or worked on."""
        self._cards: dict[str, Card] = {}

    def set_targets(self, targets: Mapping[str, Target]) -> None:
        """Other models from now on; requests that are under way keep what they have."""
        self.targets, self._cards = dict(targets), {}

    async def cards(self) -> list[Card]:
        """What each model is; of those that have answered once, from memory."""
        return [await self._card(name, target) for name, target in tuple(self.targets.items())]

    async def _card(self, name: str, target: Target) -> Card:
        """Raises Refusal 503 where no replica says it, and 429 where all are full."""
        known = self._cards  # another mapping after a change of the versions
        async for place in self._tries():
            if name in known:
                return known[name]
            try:
                known[name] = (await target.card()).model_copy(update={"id": name})
                return known[name]
            except Lost:
                await self._pause(place)
            except Full:
                raise _full() from None
        raise _gone()

    async def is_ready(self) -> bool:
        """Whether every model has a replica that answers."""
        return all((await self.readiness()).values())

    async def readiness(self) -> dict[str, bool]:
        """Which models have a replica that answers, each asked now."""
        found = await asyncio.gather(*map(_answers, self.targets.values()))
        return dict(zip(self.targets, found, strict=True))

    async def reference(self, model: str, version: int) -> list[dict[str, Any]]:
        """What the drift of a version is measured from."""
        return await self.targets[model].reference(version)

    def choose(self, model: str) -> Target:
        """The replicas of a request. Raises Refusal 404."""
        if model not in self.targets:
            known = ", ".join(sorted(self.targets)[:20])
            raise Refusal(
                404,
                f"there is no model {model[:100]!r}; there are: {known}",
                param="model",
                code="model_not_found",
            )
        return self.targets[model]

    async def find_one(self, route: str) -> str:
        """The model of a request that names none. Raises Refusal 400 where several could."""
        some = [card.id for card in await self.cards() if route in card.routes]
        if len(some) != 1:
            names = ", ".join(some) or "none"
            what = f"name the model: of those here {names} answer to {route}"
            raise Refusal(400, what, param="model", code="model_not_found")
        return some[0]

    async def card_for(self, model: str, route: str) -> Card:
        """What a model is that answers to a route. Raises Refusal 404."""
        card = await self._card(model, self.choose(model))
        if route not in card.routes:
            what = f"{model} does not answer to {route}, but to {', '.join(card.routes)}"
            raise Refusal(404, what, param="model", code="no_such_route")
        return card

    async def write(self, model: str, kind: str, body: dict[str, Any]) -> Event:
        """A whole answer (`events.joined`). Raises Refusal."""
        target = self.choose(model)
        with self._given(model) as request:
            async for place in self._tries():
                try:
                    found = await target.write(kind, body)
                except Lost:
                    await self._pause(place)
                    continue
                except Full:
                    raise _full() from None
                if _is_lost(found) and place + 1 < TRIES:
                    await self._pause(place)
                    continue
                request.note_event(_answered(found))
                return found
        raise _gone()

    async def stream(self, model: str, kind: str, body: dict[str, Any]) -> AsyncIterator[Event]:
        """The events of an answer, from the first of its pieces. Where a replica is lost another
        one goes on (`resuming.py`). Raises Refusal."""
        target, body, given = self.choose(model), with_seed(body), Given()
        with self._given(model) as request:
            request.streams = True
            async for place in self._tries():
                given.begin()
                try:
                    async with aclosing(target.stream(kind, body)) as events:  # type: ignore[type-var]
                        async for event in events:
                            if _is_lost(event) and place + 1 < TRIES:
                                raise Lost
                            if (fresh := given.fresh(_answered(event))) is not None:
                                request.note_event(fresh)
                                yield fresh
                    return
                except Full:
                    if not given.is_any:
                        raise _full() from None
                except Differs:
                    raise _gone() from None
                except Lost:
                    pass
                if given.is_any:  # no other version would say the same
                    request.resumes = request.version
                await self._pause(place)
        raise _gone()

    async def predict(
        self, model: str, route: str, records: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        """A prediction of each record. Raises Refusal."""
        target = self.choose(model)
        await self.card_for(model, route)
        with self._given(model) as request:
            async for place in self._tries():
                try:
                    found = await target.predict(records)
                except Lost:
                    await self._pause(place)
                    continue
                except Full:
                    raise _full() from None
                sizes = [item.pop("size", (0, 0)) for item in found]
                request.note_predictions(found, sizes)
                return found
        raise _gone()

    @contextmanager
    def _given(self, model: str) -> Iterator[Asked]:
        """The request that is under way, with the replicas of a model for the time of the block."""
        request = now_asked()
        request.model = model
        self.queue[model] += 1
        try:
            yield request
        finally:
            self.queue[model] -= 1

    @staticmethod
    async def _tries() -> AsyncIterator[int]:
        for place in range(TRIES):
            yield place

    @staticmethod
    async def _pause(place: int) -> None:
        await asyncio.sleep(PAUSE_SECONDS * 2**place)


async def _answers(target: Target) -> bool:
    try:
        async with asyncio.timeout(READY_SECONDS):
            await target.card()
    except (Lost, Full, TimeoutError):
        return False
    return True


def _is_lost(event: Event) -> bool:
    """Whether a replica says that it has ended, not that the request is wrong."""
    return event.get("refusal", {}).get("code") in ("lost", "closed")


def _answered(event: Event) -> Event:
    if "refusal" in event:
        raise Refusal.read(event["refusal"])
    return event


def _full() -> Refusal:
    return too_many("all replicas have as much as they take; come again later", 1)


def _gone() -> Refusal:
    return Refusal(503, "no replica answers; come again later", code="lost", retry_after=5)
