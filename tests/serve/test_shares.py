"""Which version answers a request, and that a shadow touches none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import pytest

from dray.serve.asked import Asked, asked
from dray.serve.events import Event
from dray.serve.refusals import Refusal
from dray.serve.routing import Lost
from dray.serve.schemas import Card
from dray.serve.shares import Plan, Versioned, split_version


class Says:
    """A target that says one thing, raises it, or never comes to it."""

    def __init__(self, answer: str | Exception | None) -> None:
        self.answer, self.times = answer, 0

    async def card(self) -> Card:
        return Card(id="x", created=0, routes=[], fields=[], row_tokens=None, run=None, step=None)

    async def write(self, kind: str, body: dict[str, Any]) -> Event:
        self.times += 1
        if self.answer is None:
            await asyncio.sleep(3600)
        if isinstance(self.answer, Exception):
            raise self.answer
        return {"choices": [{"text": self.answer}], "usage": [1, 1]}

    async def stream(self, kind: str, body: dict[str, Any]) -> AsyncIterator[Event]:
        await self.write(kind, body)
        yield {"pieces": [[0, self.answer, None, "stop"]]}
        yield {"usage": [1, 1]}

    async def predict(self, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        await self.write("", {})
        return [{"prediction": self.answer} for _ in records]


def test_a_share_is_that_share_and_who_has_the_canary_keeps_it():
    users = [f"user {number}" for number in range(4000)]
    had: set[str] = set()
    for share in (0.05, 0.2, 0.6):
        plan = Plan(1, canary=2, share=share)
        has = {user for user in users if plan.draw("chat", Asked(), user) == 2}
        assert abs(len(has) / len(users) - share) < 0.03
        assert had <= has
        had = has
    by_key = {Plan(1, 2, 0.5).draw("chat", Asked(key="team"), None) for _ in range(50)}
    assert len(by_key) == 1
    assert {Plan(1, 2, 0.5).draw("chat", Asked(), None) for _ in range(50)} == {1, 2}


def test_a_version_is_named_or_refused():
    plan = Plan(4, canary=5, share=0.1, shadow=6)
    assert [plan.draw("chat", Asked(wanted=wanted), None) for wanted in (4, 5, 6)] == [4, 5, 6]
    for wanted in (0, 3, 7):
        with pytest.raises(Refusal, match="none that answers"):
            plan.draw("chat", Asked(wanted=wanted), None)
    assert split_version("chat") == ("chat", None)
    assert split_version("chat@12") == ("chat", 12)
    for wrong in ("chat@", "chat@best", "chat@-1", "chat@1@2", "chat@01", "chat@²"):
        with pytest.raises(Refusal):
            split_version(wrong)


@pytest.mark.parametrize(
    ("shadow", "counted"),
    [("one", "same"), ("two", "other"), (ValueError("x"), "failed"), (Lost(), "failed")],
)
def test_a_shadow_is_compared_and_never_heard(shadow: str | Exception, counted: str):
    async def work() -> Versioned:
        model = Versioned("chat")
        model.follow(Plan(1, shadow=2), {1: Says("one"), 2: Says(shadow)})
        asked.set(Asked())
        assert (await model.write("chat", {}))["choices"][0]["text"] == "one"
        first, _ = [event async for event in model.stream("chat", {})]
        assert first["pieces"][0][1] == "one"
        assert await model.predict([{}]) == [{"prediction": "one"}]
        while model.agreement.total() < 3:
            await asyncio.sleep(0)
        assert asked.get().version == 1
        return model

    assert asyncio.run(work()).agreement == {counted: 3}


def test_a_shadow_that_hangs_holds_nothing_up():
    async def work() -> tuple[int, int]:
        model, hangs = Versioned("chat"), Says(None)
        model.follow(Plan(1, shadow=2), {1: Says("one"), 2: hangs})
        for _ in range(30):
            await model.write("chat", {})
            await asyncio.sleep(0)
        return hangs.times, model.agreement["left_out"]

    assert asyncio.run(work()) == (8, 22)


def test_where_a_canary_is_lost_the_promoted_version_answers():
    async def work() -> tuple[str, int | None]:
        model = Versioned("chat")
        model.follow(Plan(1, canary=2, share=0.999), {1: Says("one"), 2: Says(Lost())})
        request = Asked()
        asked.set(request)
        try:
            found = await model.write("chat", {})
        except Lost:  # the router asks again
            found = await model.write("chat", {})
        return found["choices"][0]["text"], request.version

    assert asyncio.run(work()) == ("one", 1)


def test_a_card_tells_the_versions_that_may_be_asked() -> None:
    versioned = Versioned("chat")
    versioned.follow(Plan(2, canary=3, share=0.1, shadow=4), {2: Says("a")})
    told = asyncio.run(versioned.card()).versions
    assert [(one.version, one.role) for one in told] == [
        (2, "promoted"),
        (3, "canary"),
        (4, "shadow"),
    ]


def test_predictions_go_by_the_user_too() -> None:
    versioned = Versioned("words")
    versioned.follow(Plan(1, canary=2, share=0.5), {1: Says("old"), 2: Says("new")})

    async def told(user: str | None) -> Any:
        asked.set(Asked(user=user))
        (found,) = await versioned.predict([{}])
        return found["prediction"]

    async def all_told() -> None:
        for number in range(8):
            user = f"user {number}"
            assert len({await told(user) for _ in range(12)}) == 1
        assert {await told(f"user {number}") for number in range(40)} == {"old", "new"}
        assert {await told(None) for _ in range(40)} == {"old", "new"}

    asyncio.run(all_told())
