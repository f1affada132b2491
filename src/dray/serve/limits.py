"""What a request may be, before anything is done for it: bytes, seconds, depth, numbers.

A body is read under a limit of bytes and of time, and counted among all that are being read; then
it is JSON that every program reads the same: UTF-8, no NaN, no half of a surrogate pair, not deep,
no number beyond what a float holds. Everything else is refused by name.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field

from dray.serve.refusals import Refusal, too_many

_NESTING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[{\]}]', re.DOTALL)
"""A string, which may have no end, or a bracket outside of one: each character is read once."""

Count = Annotated[int, Field(ge=1, strict=True)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Limits(BaseModel):
    """What requests may be, and how many at once."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    body_bytes: Count = 1_000_000
    """Of a request."""
    bodies_bytes: Count = 64_000_000
    """Of all that are read or worked on at once, in a gateway."""
    body_seconds: Seconds = 15.0
    """Until a body is whole."""
    depth: Count = 32
    """Of JSON."""
    prompt_tokens: Count = 32_768
    """Of a prompt; fewer where the model's row is shorter."""
    row_tokens: Count | None = None
    """Of a prompt and its answer together, where that is to be less than the model takes; by itself
    the least of that and 4,096."""
    max_tokens: Count = 4_096
    """New ones of an answer."""
    choices: Count = 16
    """`n`: answers to a prompt."""
    prompts: Count = 64
    """Prompts, or texts, of a request."""
    records: Count = 1_000
    """Of a request to /predict."""
    stops: Count = 4
    stop_characters: Count = 256
    """Of one of them."""
    requests: Count = 1_024
    """That a gateway works on at once."""
    memory_share: Annotated[float, Field(gt=0, le=0.9)] = 0.4
    """Of the memory that is free when a replica has its model, for what its requests keep."""
    request_seconds: Seconds = 300.0
    """Until an answer is whole."""


class Bodies:
    """The bodies that are read or worked on now, in a process."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.num_requests = 0
        self.num_bytes = 0
        self._closed = False

    async def drain(self, seconds: float) -> int:
        """Take in nothing more, and wait for what is under way; how many are left after so many
        seconds."""
        self._closed = True
        end = time.monotonic() + seconds
        while self.num_requests and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return self.num_requests

    @contextmanager
    def counted(self) -> Iterator[Body]:
        """A request for the time of the block. Raises Refusal 429 where there are too many, and 503
        where no more are taken in."""
        if self._closed:
            raise Refusal(503, "the service is being shut down", code="closed", retry_after=5)
        if self.num_requests >= self.limits.requests:
            raise too_many("too many requests at once; come again later", 1)
        body = Body(self)
        self.num_requests += 1
        try:
            yield body
        finally:
            self.num_requests -= 1
            self.num_bytes -= body.num_bytes


class Body:
    """The body of one request."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies, self.num_bytes = bodies, 0

    async def read(self, parts: AsyncIterator[bytes]) -> bytes:
        """All of it. Raises Refusal as soon as it is too long, too slow, or one too many."""
        limits = self._bodies.limits
        whole = bytearray()
        try:
            async with asyncio.timeout(limits.body_seconds):
                async for part in parts:
                    self.count(len(part))
                    whole += part
        except TimeoutError:
            raise Refusal(
                408,
                f"the body did not arrive in {limits.body_seconds:g} seconds",
                code="slow_body",
            ) from None
        return bytes(whole)

    def count(self, num_bytes: int) -> None:
        """So many more bytes of it are here. Raises Refusal where they are too many."""
        bodies, limits = self._bodies, self._bodies.limits
        if self.num_bytes + num_bytes > limits.body_bytes:
            raise body_too_long(limits)
        if bodies.num_bytes + num_bytes > limits.bodies_bytes:
            raise too_many("too many bytes in requests at once; come again later", 1)
        self.num_bytes += num_bytes
        bodies.num_bytes += num_bytes


def body_too_long(limits: Limits) -> Refusal:
    """413."""
    return Refusal(413, f"a body has at most {limits.body_bytes:,} bytes", code="body_too_long")


def check_declared(length: str | None, limits: Limits) -> None:
    """Raise Refusal for a Content-Length that is too long or none, before a byte is read."""
    if length is None:
        return
    if not (length.isascii() and length.isdigit()):
        raise Refusal(400, "Content-Length is no number", code="bad_header")
    if len(length) > 18 or int(length) > limits.body_bytes:
        raise body_too_long(limits)


def read_json(body: bytes, limits: Limits) -> dict[str, Any]:
    """The object in a body. Raises Refusal 400 for everything else."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise _bad(f"the body is no UTF-8 (at byte {error.start})") from None
    _check_depth(text, limits.depth)
    try:
        found = json.loads(text, parse_constant=_refuse_constant, parse_int=_read_int)
    except Refusal:
        raise
    except (ValueError, RecursionError) as error:
        raise _bad(f"the body is no JSON ({error})") from None
    if not isinstance(found, dict):
        raise _bad("the body is a JSON object")
    check_values(found)
    return found


def check_values(value: Any) -> None:
    """Raise Refusal 400 for a half of a surrogate pair in a text, which no UTF-8 can hold, and for
    a number that no float holds."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            try:
                one.encode()
            except UnicodeEncodeError:
                raise _bad("a text holds half of a surrogate pair (\\ud800 to \\udfff)") from None
        elif isinstance(one, dict):
            waiting += [*one, *one.values()]
        elif isinstance(one, list):
            waiting += one
        elif isinstance(one, float) and not math.isfinite(one):
            raise _bad("a number is beyond what a float holds")


def _check_depth(text: str, limit: int) -> None:
    """Refuse nesting before a parser recurses into it. Brackets in strings do not count."""
    depth = 0
    for found in _NESTING.finditer(text):
        sign = found[0]
        if sign in "[{":
            depth += 1
            if depth > limit:
                raise _bad(f"the body is nested deeper than {limit}")
        elif sign in "]}":
            depth -= 1


def _refuse_constant(name: str) -> NoReturn:
    raise _bad(f"{name} is no JSON")


def _read_int(digits: str) -> int:
    if len(digits) > 20:
        raise _bad("a whole number has at most 19 digits")
    return int(digits)


def _bad(what: str) -> Refusal:
    return Refusal(400, what, code="bad_body")
