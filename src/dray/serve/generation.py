"""The engine of text: requests join and leave a running batch between any two steps.

A thread of its own computes: each round it takes in what waits, computes a piece of the new
prompts, and a token for everyone who writes. What waits is bounded by number and by tokens; who
comes when it is full is told when to come again. Who leaves frees the place in the next round.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dray.serve.refusals import Refusal, too_many
from dray.serve.sampling import Drawn, Sampler, Sampling
from dray.serve.slots import CHUNK_TOKENS, Alone, Piece, Slots, Steps, bytes_per_token, check
from dray.serve.texts import Decode, TextStream

_log = logging.getLogger(__name__)

Finish = Literal["stop", "length", "time", "gone", "failed"]
"""Why an answer ends; the last three are no reasons that a client is told of."""
MOST_SLOTS = 32
PREFILLED_AT_ONCE = 8
"""New prompts that are computed in one pass at most."""
WAITING_PER_SLOT = 4
ROW_TOKENS = 4_096
"""Of a prompt and its answer, where the model takes more and nobody says how many."""


@dataclass(frozen=True)
class Ask:
    """One answer that is wanted."""

    ids: Sequence[int]
    """Of the prompt; at least one."""
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    place: int = 0
    """Its number among the answers to the prompt."""
    stops: Sequence[str] = ()
    ends: Collection[int] = ()
    """Tokens that end it."""
    deadline: float | None = None
    """By time.monotonic."""


@dataclass(frozen=True)
class Said:
    """What an answer has more since the last time: text that can be given out, and its token."""

    text: str
    drawn: Drawn | None
    finish: Finish | None = None


Sink = Callable[[Said], None]
"""Is called by the engine's thread, and returns at once."""


class Writing:
    """An answer that is being written."""

    def __init__(self, ask: Ask, sink: Sink, decode: Decode) -> None:
        self.ask, self.sink = ask, sink
        self.sampler = Sampler(ask.sampling, ask.place)
        self.stream = TextStream(decode, ask.stops)
        self.num_prefilled = 0
        self.num_written = 0
        self.last = -1
        self.gone = False
        """Whether nobody waits for it any more."""

    @property
    def num_tokens(self) -> int:
        """In its slot, before the token that was drawn last."""
        return self.num_prefilled + max(0, self.num_written - 1)

    @property
    def num_kept(self) -> int:
        """What of its slot counts: in a step, too, whose token it has not taken yet."""
        return self.num_tokens + 1

    @property
    def most_tokens(self) -> int:
        return len(self.ask.ids) + self.ask.max_tokens

    def take(self, drawn: Drawn) -> Finish | None:
        """The next token. Returns why the answer ends, where it does."""
        self.num_written += 1
        self.last = drawn.token
        if drawn.token in self.ask.ends:
            self.sink(Said(self.stream.finish(), drawn, "stop"))
            return "stop"
        text = self.stream.push(drawn.token)
        finish: Finish | None = "stop" if self.stream.stopped else None
        if finish is None and self.num_written >= self.ask.max_tokens:
            finish, text = "length", text + self.stream.finish()
            finish = "stop" if self.stream.stopped else "length"
        self.sink(Said(text, drawn, finish))
        return finish

    def end(self, finish: Finish) -> None:
        self.sink(Said(self.stream.finish(), None, finish))


@dataclass(frozen=True)
class Load:
    """How busy an engine is."""

    num_writing: int
    num_waiting: int
    num_slots: int
    tokens_per_second: float


class Engine:
    """Writes answers until it is closed."""

    def __init__(self, steps: Steps, decode: Decode, *, max_waiting: int | None = None) -> None:
        self.steps, self._decode = steps, decode
        self._max_waiting = max_waiting or max(4, WAITING_PER_SLOT * steps.num_slots)
        self._waiting: deque[Writing] = deque()
        self._ready: list[Writing] = []
        """Those who write, in the first slots."""
        self._begun: list[Writing] = []
        """Those whose prompts are computed, in the slots behind them."""
        self._changed = threading.Condition()
        self._closed = False
        self.error: BaseException | None = None
        """What ended its thread, where anything did."""
        self._rate = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, asks: Sequence[Ask], sinks: Sequence[Sink]) -> list[Writing]:
        """Take in all of a request's answers, or none. Raises Refusal 429 where too many wait, 400
        for a prompt that is longer than a row, and 503 where the engine has ended."""
        for ask in asks:
            self._check(ask)
        some = [Writing(ask, sink, self._decode) for ask, sink in zip(asks, sinks, strict=True)]
        with self._changed:
            if self._closed or self.error is not None:
                raise Refusal(503, "the model is being shut down", code="closed", retry_after=1)
            free = self.steps.num_slots - len(self._ready) - len(self._begun)
            if self._waiting and len(self._waiting) + len(some) > self._max_waiting + max(0, free):
                raise too_many(
                    f"{len(self._waiting)} answers wait already; come again later", self._wait()
                )
            self._waiting.extend(some)
            self._changed.notify()
        return some

    def leave(self, writings: Sequence[Writing]) -> None:
        """Nobody waits for these any more: their places are free in the next round."""
        for writing in writings:
            writing.gone = True

    def load(self) -> Load:
        num_writing = len(self._ready) + len(self._begun)
        return Load(num_writing, len(self._waiting), self.steps.num_slots, self._rate)

    def close(self) -> None:
        """End the thread; who still waits is told that it failed."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _check(self, ask: Ask) -> None:
        room = self.steps.row_tokens
        if len(ask.ids) + ask.max_tokens > room:
            raise Refusal(
                400,
                f"the prompt is {len(ask.ids):,} tokens and {ask.max_tokens:,} are asked for; "
                f"together they may be {room:,}",
                param="max_tokens",
                code="context_length_exceeded",
            )

    def _wait(self) -> float:
        """Seconds after which there may be a place, by what all who are here may still write."""
        tokens = sum(writing.ask.max_tokens for writing in self._waiting)
        return min(60.0, tokens / self._rate if self._rate else 1.0)

    # --- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._round():
                pass
        except BaseException as error:  # what a model raises: whoever waits must not wait for ever
            self.error = error
            _log.exception("the engine has ended")
        with self._changed:
            self._closed = True
            everyone = [*self._ready, *self._begun, *self._waiting]
        for writing in everyone:
            writing.end("failed")

    def _round(self) -> bool:
        """Returns whether there is another one."""
        with self._changed:
            while not (self._closed or self._ready or self._begun or self._waiting):
                self._changed.wait()
            if self._closed:
                return False
        self._drop()
        self._admit()
        if self._begun:
            self._prefill()
        if self._ready:
            self._decode_step()
        return True

    def _drop(self) -> None:
        """End those whom nobody waits for, and those whose time is over."""
        now = time.monotonic()

        def over(writing: Writing) -> Finish | None:
            if writing.gone:
                return "gone"
            deadline = writing.ask.deadline
            return "time" if deadline is not None and now > deadline else None

        for writing in [*self._ready, *self._begun]:
            if finish := over(writing):
                self._remove(writing)
                writing.end(finish)
        with self._changed:
            ended = [(writing, why) for writing in self._waiting if (why := over(writing))]
            for writing, _ in ended:
                self._waiting.remove(writing)
        for writing, why in ended:
            writing.end(why)

    def _admit(self) -> None:
        with self._changed:
            while (
                self._waiting
                and len(self._begun) < PREFILLED_AT_ONCE
                and len(self._ready) + len(self._begun) < self.steps.num_slots
            ):
                self._begun.append(self._waiting.popleft())

    def _prefill(self) -> None:
        """A piece of each new prompt whose piece is about as long as the first one's."""
        first = len(self._ready)
        pieces = []
        for place, writing in enumerate(self._begun):
            ids = writing.ask.ids[writing.num_prefilled :][:CHUNK_TOKENS]
            pieces.append((writing, Piece(first + place, writing.num_prefilled, ids)))
        size = _bucket(len(pieces[0][1].ids))
        some = [(writing, piece) for writing, piece in pieces if _bucket(len(piece.ids)) == size]
        logits = self.steps.prefill([piece for _, piece in some])
        for (writing, piece), row in zip(some, logits, strict=True):
            writing.num_prefilled += len(piece.ids)
            if writing.num_prefilled == len(writing.ask.ids):
                self._promote(writing)
                if writing.take(writing.sampler.draw(row)):
                    self._remove(writing)

    def _decode_step(self) -> None:
        began = time.perf_counter()
        some = list(self._ready)
        logits = self.steps.decode([w.last for w in some], [w.num_tokens for w in some])
        drawn = self._drawn(some, logits)
        for writing, token in zip(some, drawn, strict=True):
            if writing.take(token):
                self._remove(writing)
        seconds = time.perf_counter() - began
        self._rate += 0.1 * (len(some) / max(seconds, 1e-6) - self._rate)

    @staticmethod
    def _drawn(writings: Sequence[Writing], logits: Any) -> list[Drawn]:
        """The next token of each; the plain ones' together."""
        likeliest = logits.argmax(-1).tolist()
        return [
            Drawn(token) if writing.ask.sampling.is_plain else writing.sampler.draw(row)
            for writing, token, row in zip(writings, likeliest, logits, strict=True)
        ]

    def _promote(self, writing: Writing) -> None:
        """One more of those who write: its slot must be the one behind theirs."""
        place = self._begun.index(writing)
        if place:
            first = self._begun[0]
            width = max(writing.num_kept, first.num_kept)
            self.steps.swap(len(self._ready), len(self._ready) + place, width)
            self._begun[0], self._begun[place] = writing, first
        self._ready.append(self._begun.pop(0))

    def _remove(self, writing: Writing) -> None:
        """Free its slot: the last of its kind takes it, and the last of the others that one's."""
        if writing in self._ready:
            place, last = self._ready.index(writing), len(self._ready) - 1
            self.steps.swap(place, last, self._ready[last].num_kept)
            self._ready[place] = self._ready[last]
            self._ready.pop()
            if self._begun:
                end = last + len(self._begun)
                self.steps.swap(last, end, self._begun[-1].num_kept)
                self._begun.insert(0, self._begun.pop())
        else:
            place, last = self._begun.index(writing), len(self._begun) - 1
            first = len(self._ready)
            self.steps.swap(first + place, first + last, self._begun[last].num_kept)
            self._begun[place] = self._begun[last]
            self._begun.pop()


def _bucket(size: int) -> int:
    """Lengths within a factor of two are computed together."""
    return size.bit_length()


def make_steps(
    model: Any,
    vocab_size: int,
    *,
    free_bytes: int,
    longest: int | None,
    num_slots: int | None = None,
    row_tokens: int | None = None,
) -> Steps:
    """What computes a model's steps: in slots where it can, as many as `free_bytes` hold; one
    there is always."""
    row = min(row_tokens or ROW_TOKENS, longest or ROW_TOKENS)
    if not check(model, vocab_size):
        return Alone(model, row)
    room = free_bytes // ((row + CHUNK_TOKENS) * bytes_per_token(model))
    return Slots(model, max(1, min(num_slots or MOST_SLOTS, room)), row)
