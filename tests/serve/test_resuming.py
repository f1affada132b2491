"""Streams whose replica is lost: whoever asked gets one whole answer, or is told that it broke
off. Replicas are stood for by what they tell until they are lost; test_foreground kills real
ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from dray.serve import routing
from dray.serve.asked import Asked, asked
from dray.serve.events import Event, joined
from dray.serve.limits import Limits
from dray.serve.refusals import Refusal
from dray.serve.routing import Full, Lost, Router
from dray.serve.schemas import Card
from dray.serve.shares import Plan, Versioned

WORDS = ["one ", "two ", "three ", "four"]


class Breaks:
    """A version whose replicas tell so many pieces before they are lost; the last one tells all."""

    def __init__(self, tells: Sequence[int | Exception], words: Sequence[str] = WORDS) -> None:
        self.tells, self.words = list(tells), list(words)
        self.seeds: list[Any] = []

    async def stream(self, kind: str, body: dict[str, Any]) -> AsyncIterator[Event]:
        self.seeds.append(body["seed"])
        number = self.tells.pop(0) if self.tells else len(self.words)
        if isinstance(number, Exception):
            raise number
        yield {"begin": 3}
        for place, word in enumerate(self.words[:number]):
            end = "stop" if place + 1 == len(self.words) else None
            yield {"pieces": [[choice, word, None, end] for choice in (0, 1)]}
        if number < len(self.words):
            raise Lost
        yield {"usage": [3, 8]}


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "PAUSE_SECONDS", 0.0)


def ask(versioned: Versioned, **body: Any) -> list[Event]:
    """The events of a request."""
    router = Router({"chat": versioned}, Limits())

    async def events() -> list[Event]:
        asked.set(Asked())
        return [event async for event in router.stream("chat", "chat", body)]

    return asyncio.run(events())


def model(plan: Plan, **targets: Breaks) -> Versioned:
    versioned = Versioned("chat")
    versioned.follow(plan, {int(name[1:]): target for name, target in targets.items()})  # type: ignore[misc]
    return versioned


@pytest.mark.parametrize("tells", [[2], [0], [1, 3], [3, Full(), 1], [4 - 1, Lost(), 0]])
def test_a_stream_goes_on_behind_what_was_given_out(tells: list[int | Exception]) -> None:
    target = Breaks(tells)
    found = ask(model(Plan(1), v1=target))
    assert [choice["text"] for choice in joined(found)["choices"]] == ["".join(WORDS)] * 2
    assert [event for event in found if "begin" in event] == [{"begin": 3}]
    assert found[-1] == {"usage": [3, 8]}
    assert len(set(target.seeds)) == 1
    assert isinstance(target.seeds[0], int)


def test_a_seed_that_was_given_stays() -> None:
    target = Breaks([1])
    ask(model(Plan(1), v1=target), seed=11)
    assert target.seeds == [11, 11]


def test_no_other_version_goes_on_with_a_stream() -> None:
    canary, stable = Breaks([1]), Breaks([], ["other ", "words"])
    found = ask(model(Plan(1, canary=2, share=1 - 1e-9), v1=stable, v2=canary))
    assert joined(found)["choices"][0]["text"] == "".join(WORDS)
    assert len(canary.seeds) == 2
    assert not stable.seeds


@pytest.mark.parametrize("tells", [[2, 2, 2, 2], [2, Full(), Full(), Full()]])
def test_a_stream_that_nobody_goes_on_with_says_so(tells: list[int | Exception]) -> None:
    with pytest.raises(Refusal, match="no replica answers"):
        ask(model(Plan(1), v1=Breaks(tells)))


def test_another_answer_is_not_gone_on_with() -> None:
    target = Breaks([2, 4])
    seen: list[Event] = []
    router = Router({"chat": model(Plan(1), v1=target)}, Limits())

    async def read() -> None:
        asked.set(Asked())
        async for event in router.stream("chat", "chat", {}):
            seen.append(event)
            if len(seen) == 3:
                target.words = ["one ", "else ", "three ", "four"]

    with pytest.raises(Refusal, match="no replica answers"):
        asyncio.run(read())
    assert joined(seen)["choices"][0]["text"] == "one two "


class Told:
    """A version whose replicas say what they are, once they have failed so often."""

    def __init__(self, fails: Sequence[Exception]) -> None:
        self.fails = list(fails)

    async def card(self) -> Card:
        if self.fails:
            raise self.fails.pop(0)
        return Card(
            id="x", created=0, routes=["classify"], fields=["text"], row_tokens=8, run="r", step=1
        )


@pytest.mark.parametrize(
    ("fails", "status"),
    [([], None), ([Lost()] * 3, None), ([Lost()] * routing.TRIES, 503), ([Full()], 429)],
)
def test_what_a_model_is_is_asked_again_where_a_replica_is_lost(
    fails: list[Exception], status: int | None
) -> None:
    async def find() -> Card:
        other = Told([Lost()] * 9)  # of another model, which is nobody's business
        router = Router({"chat": Told(fails), "other": other}, Limits())  # type: ignore[dict-item]
        return await router.card_for("chat", "classify")

    if status is None:
        assert asyncio.run(find()).id == "chat"
        return
    with pytest.raises(Refusal) as caught:
        asyncio.run(find())
    assert caught.value.status == status
