"""Which version of a model answers a request: the promoted one, a canary for its share, and a
shadow beside them that is asked, too, and never heard.

Nothing but the promoted version and the canary answers unasked; a request that names `NAME@VERSION`
gets that one, or a refusal. What a shadow does touches no request: it is asked once the answer is
there, and only while few others are being asked.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from dray.serve.asked import Asked, now_asked
from dray.serve.events import Event, joined
from dray.serve.refusals import Refusal
from dray.serve.routing import Lost, Target
from dray.serve.schemas import Card, VersionCard

SHADOWED_AT_ONCE = 8
"""Copies that a shadow works on; what comes beyond is not copied."""


@dataclass(frozen=True)
class Plan:
    """Which versions work. Of those in `targets`, only these are ever asked."""

    stable: int
    canary: int | None = None
    share: float = 0.0
    shadow: int | None = None

    def told(self) -> list[VersionCard]:
        """The versions that may be asked by their number."""
        some = [(self.stable, "promoted"), (self.canary, "canary"), (self.shadow, "shadow")]
        return [VersionCard(version=one, role=role) for one, role in some if one is not None]

    def draw(self, model: str, request: Asked, user: str | None) -> int:
        """The version of a request: the same for the same user, or else the same key; and whoever
        has the canary keeps it while its share grows. Raises Refusal 404 for one that it names."""
        if request.resumes is not None:
            return request.resumes
        if request.wanted is not None:
            if request.wanted not in (self.stable, self.canary, self.shadow):
                what = f"version {request.wanted} of {model} is none that answers"
                raise Refusal(404, what, param="model", code="model_not_found")
            return request.wanted
        if self.canary is None or self.canary in request.lost:
            return self.stable
        whose = f"user {user}" if user else f"key {request.key}" if request.key else request.id
        digest = hashlib.sha256(f"{model}:{self.canary}:{whose}".encode("utf-8", "replace"))
        drawn = int.from_bytes(digest.digest()[:8], "big") / 2**64
        return self.canary if drawn < self.share else self.stable


class Versioned:
    """A target of the router's that has versions. What `follow` says holds for every try from then
    on, also of requests that are under way."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.agreement: Counter[str] = Counter()
        """Answers of shadows: same, other, failed, left_out."""
        self._plan, self._targets = Plan(0), dict[int, Target]()
        self._copies: set[asyncio.Task[None]] = set()

    def follow(self, plan: Plan, targets: Mapping[int, Target]) -> None:
        """Other versions from now on; each of the plan has a target."""
        self._plan, self._targets = plan, dict(targets)

    async def card(self) -> Card:
        """Of the promoted version, with those that there are."""
        card = await self._targets[self._plan.stable].card()
        return card.model_copy(update={"versions": self._plan.told()})

    async def reference(self, version: int) -> list[dict[str, Any]]:
        """Of a version that is asked. Raises Lost where it is none any more."""
        if version not in self._targets:
            raise Lost
        return await self._targets[version].reference(version)

    async def write(self, kind: str, body: dict[str, Any]) -> Event:
        version, target = self._choose(body.get("user"))
        try:
            found = await target.write(kind, body)
        except Lost:
            self._lose(version)
            raise
        self._note(found, version)
        if "refusal" not in found:
            self._copy(version, lambda shadow: shadow.write(kind, body), found, _texts)
        return found

    async def stream(self, kind: str, body: dict[str, Any]) -> AsyncIterator[Event]:
        version, target = self._choose(body.get("user"))
        events: list[Event] = []
        keeps = self._plan.shadow is not None
        try:
            async with aclosing(target.stream(kind, body)) as given:  # type: ignore[type-var]
                async for event in given:
                    self._note(event, version)
                    if keeps:
                        events.append(event)
                    yield event
        except Lost:
            self._lose(version)
            raise
        found = joined(events)
        if keeps and "refusal" not in found:
            self._copy(version, lambda shadow: shadow.write(kind, body), found, _texts)

    async def predict(self, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        version, target = self._choose(now_asked().user)
        try:
            found = await target.predict(records)
        except Lost:
            self._lose(version)
            raise
        self._copy(version, lambda shadow: shadow.predict(records), found, _predictions)
        return found

    def _choose(self, user: str | None) -> tuple[int, Target]:
        request = now_asked()
        version = self._plan.draw(self.model, request, user)
        if version not in self._targets:
            raise Lost
        request.version = version
        return version, self._targets[version]

    @staticmethod
    def _lose(version: int) -> None:
        now_asked().lost.add(version)

    def _note(self, event: Event, version: int) -> None:
        if event.get("refusal", {}).get("code") in ("lost", "closed"):
            self._lose(version)

    def _copy(
        self,
        version: int,
        ask: Callable[[Target], Awaitable[Any]],
        found: Any,
        told: Callable[[Any], Any],
    ) -> None:
        """Ask the shadow, too, with nobody waiting."""
        shadow = self._plan.shadow
        if shadow is None or shadow == version or shadow not in self._targets:
            return
        if len(self._copies) >= SHADOWED_AT_ONCE:
            self.agreement["left_out"] += 1
            return
        task = asyncio.create_task(self._compare(self._targets[shadow], ask, told(found), told))
        self._copies.add(task)
        task.add_done_callback(self._copies.discard)

    async def _compare(
        self,
        target: Target,
        ask: Callable[[Target], Awaitable[Any]],
        expected: Any,
        told: Callable[[Any], Any],
    ) -> None:
        try:
            async with asyncio.timeout(60):
                same = told(await ask(target)) == expected
        except Exception:  # whatever a shadow raises is the shadow's
            self.agreement["failed"] += 1
        else:
            self.agreement["same" if same else "other"] += 1


def _texts(found: Event) -> Any:
    """Of a whole answer, what is compared."""
    return [choice["text"] for choice in found.get("choices", ())]


def _predictions(found: list[dict[str, Any]]) -> Any:
    return [item.get("prediction", item.get("error")) for item in found]


def split_version(model: str) -> tuple[str, int | None]:
    """`NAME@VERSION` as both. Raises Refusal 404 for a version that is no number."""
    name, sign, version = model.partition("@")
    if not sign:
        return model, None
    if not re.fullmatch("[1-9][0-9]{0,8}", version):
        what = f"{model[:100]!r}: a version is a number, as {name[:100]}@2"
        raise Refusal(404, what, param="model", code="model_not_found")
    return name, int(version)
