"""A model that answers, in the process that holds it: what a replica does, without Ray.

A request that writes is a series of events (`events.py`); one that predicts is a list of records.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from dray.serve.checking import make_asks
from dray.serve.drift import REFERENCE, look_at_prediction
from dray.serve.events import Event
from dray.serve.generation import Engine, Said, Sink, make_steps
from dray.serve.limits import Limits
from dray.serve.loading import Loaded
from dray.serve.refusals import Refusal
from dray.serve.sampling import Drawn
from dray.serve.schemas import ChatRequest, CompletionRequest, Sampled

REFERENCE_SECONDS = 10.0
"""In which held-out rows are predicted, beside requests, for a version's drift."""
KINDS: dict[str, type[Sampled]] = {"completions": CompletionRequest, "chat": ChatRequest}


class Answerer:
    """A loaded model with what answers by it."""

    def __init__(self, loaded: Loaded, limits: Limits, *, free_bytes: int) -> None:
        self.loaded, self.limits = loaded, limits
        self.created = int(time.time())
        self.engine: Engine | None = None
        if writer := loaded.writer:
            steps = make_steps(
                writer.model,
                writer.vocab_size,
                free_bytes=int(limits.memory_share * free_bytes),
                longest=writer.longest,
                row_tokens=limits.row_tokens,
            )
            self.engine = Engine(steps, writer.decode)

    def card(self) -> dict[str, Any]:
        """What `/v1/models` says of it."""
        told = self.loaded.told
        predictor = self.loaded.predictor
        return {
            "id": self.loaded.served.called,
            "created": self.created,
            "routes": list(self.loaded.routes),
            "fields": [] if predictor is None else list(predictor.fields),
            "row_tokens": None if self.engine is None else self.engine.steps.row_tokens,
            "run": told.get("run"),
            "step": told.get("step"),
        }

    def check(self) -> None:
        """Raise RuntimeError where it can answer no more."""
        if self.engine is not None and self.engine.error is not None:
            raise RuntimeError("the engine has ended") from self.engine.error

    def predict(self, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """A prediction of each record, in its order, or its error; `size` besides: its tokens, and
        the unknown ones among them."""
        if self.loaded.predictor is None:
            raise Refusal(404, "this model predicts nothing", code="no_such_route")
        found = self.loaded.predictor.predict(records)
        return [{**one.told, "size": [one.num_tokens, one.num_unknown]} for one in found]

    def reference(self) -> list[dict[str, Any]]:
        """What its drift is measured from: looks at held-out rows (`drift.py`), where it has any.
        Raises what reading or computing them raises."""
        if self.loaded.predictor is None:
            return []
        found = self.loaded.predictor.predict_held_out(REFERENCE, REFERENCE_SECONDS)
        return [
            dict(look_at_prediction(one.told, [one.num_tokens, one.num_unknown])) for one in found
        ]

    async def write(self, kind: str, body: dict[str, Any]) -> AsyncIterator[Event]:
        """The events of a request, of `completions` or `chat`."""
        try:
            async for event in self._write(kind, body):
                yield event
        except Refusal as refusal:
            yield {"refusal": refusal.told()}

    async def _write(self, kind: str, body: dict[str, Any]) -> AsyncIterator[Event]:
        engine, writer = self.engine, self.loaded.writer
        if engine is None or writer is None or kind not in self.loaded.routes:
            raise Refusal(
                404, f"this model does not answer to {kind}", param="model", code="no_such_route"
            )
        request = KINDS[kind].model_validate(body)
        asks = await asyncio.to_thread(
            make_asks, writer, request, self.limits, engine.steps.row_tokens
        )
        queue: asyncio.Queue[tuple[int, Said]] = asyncio.Queue()
        writings = engine.submit(asks, _sinks(queue, len(asks)))
        prompts = [
            [len(ask.ids), ask.ids.count(writer.unknown) if writer.unknown is not None else 0]
            for ask in asks[:: request.n or 1]
        ]
        num_prompt = sum(size[0] for size in prompts)
        num_open, num_written = len(asks), 0
        try:
            yield {"begin": num_prompt, "prompts": prompts}
            while num_open:
                pieces = []
                for place, said in await _all_there(queue):
                    if said.finish in ("time", "failed", "gone"):
                        raise _ended(said.finish, self.limits)
                    num_open -= said.finish is not None
                    num_written += said.drawn is not None
                    pieces.append([place, said.text, self._token(said.drawn), said.finish])
                yield {"pieces": pieces}
        finally:
            engine.leave(writings)
        yield {"usage": [num_prompt, num_written]}

    def _token(self, drawn: Drawn | None) -> list[Any] | None:
        """A token with its log-probability and the likeliest ones, where they are told."""
        if drawn is None or drawn.logprob is None or self.loaded.writer is None:
            return None
        decode = self.loaded.writer.decode
        top = [[decode([token]), logprob] for token, logprob in drawn.top]
        return [decode([drawn.token]), drawn.logprob, top]


def _sinks(queue: asyncio.Queue[tuple[int, Said]], number: int) -> list[Sink]:
    """What an engine's thread tells of each answer, as a queue of this event loop."""
    loop = asyncio.get_running_loop()

    def sink(place: int) -> Sink:
        def tell(said: Said) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, (place, said))

        return tell

    return [sink(place) for place in range(number)]


async def _all_there(queue: asyncio.Queue[tuple[int, Said]]) -> list[tuple[int, Said]]:
    """What a queue holds, at least one."""
    found = [await queue.get()]
    while not queue.empty():
        found.append(queue.get_nowait())
    return found


def _ended(finish: str, limits: Limits) -> Refusal:
    if finish == "time":
        seconds = f"{limits.request_seconds:g} seconds"
        return Refusal(504, f"the answer was not whole in {seconds}", code="too_slow")
    return Refusal(503, "the model has ended while it wrote", code="lost", retry_after=1)
