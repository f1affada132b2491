"""What was asked and answered lately, for those who say something of an answer: kept in memory, by
the request's id, for a while.

Only who asked may say something, once for each answer. What is forgotten by then, or was never
asked, is refused alike, so that nobody learns which requests there were. Refuses labels that the
model does not have.
"""

from __future__ import annotations

import json
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dray.errors import SpecError, StoreError
from dray.feedback import Dataset, Entry
from dray.serve.asked import Asked
from dray.serve.keys import Caller
from dray.serve.refusals import Refusal
from dray.serve.schemas import FeedbackRequest

ROUTES = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/classify": "classify",
    "/extract": "extract",
    "/predict": "predict",
}
"""Of whose answers something may be said."""
KEPT_SECONDS, KEPT_BYTES = 24 * 3600.0, 64_000_000
"""For how long, and how much of all requests together, a gateway keeps."""
_KINDS: dict[Any, str] = {
    bool: "true or false",
    (int, float): "a number",
    str: "a class, which is a text",
    list: "a list",
}


@dataclass(frozen=True)
class _Kept:
    """A request that was answered."""

    route: str
    model: str
    version: int | None
    key: str | None
    caller: str
    records: list[dict[str, Any]]
    answers: dict[int, Any]
    classes: frozenset[str] | None
    num_bytes: int
    at: float


class Recall:
    """The requests of a gateway."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        seconds: float = KEPT_SECONDS,
        num_bytes: int = KEPT_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.dataset, self._clock = dataset, clock
        self._seconds, self._most_bytes = seconds, num_bytes
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._num_bytes = 0
        self.counts: Counter[tuple[str, str, str]] = Counter()
        """What was said, by model, version, and `right` or `wrong`."""

    def keep(self, request: Asked, route: str) -> None:
        """A request has ended; one that was answered is kept."""
        if route not in ROUTES or request.records is None or request.model is None:
            return
        if request.status != 200 or not request.is_whole or request.refusal is not None:
            return
        told = [request.records, [*request.answers.values()]]
        size = len(json.dumps(told, ensure_ascii=False, default=str).encode())
        if size > self._most_bytes or not request.answers:
            return
        self._kept[request.id] = _Kept(
            ROUTES[route],
            request.model,
            request.version,
            request.key,
            request.caller,
            request.records,
            request.answers,
            request.classes,
            size,
            self._clock(),
        )
        self._num_bytes += size
        while self._num_bytes > self._most_bytes or self._is_over():
            _, gone = self._kept.popitem(last=False)
            self._num_bytes -= gone.num_bytes

    def _is_over(self) -> bool:
        """Whether the oldest one's time is over."""
        first = next(iter(self._kept.values()), None)
        return first is not None and self._clock() - first.at > self._seconds

    def take(self, said: FeedbackRequest, caller: Caller) -> Entry:
        """Put what somebody says into the dataset. Raises Refusal 404 for an answer that is not
        known, or that somebody else got, 400 for what cannot be said of it, 409 for what was said
        already, 503 where the storage does not take it."""
        entry = self._entry(said, caller)
        if not self._add(entry):
            what = f"of answer {said.index} of {said.id} something was said already"
            raise Refusal(409, what, param="id", code="already_said")
        verdict = "right" if entry.is_right else "wrong"
        self.counts[entry.model, str(entry.version), verdict] += 1
        return entry

    def _entry(self, said: FeedbackRequest, caller: Caller) -> Entry:
        kept = self._kept.get(said.id)
        over = kept is not None and self._clock() - kept.at > self._seconds
        if kept is None or over or kept.caller != caller.name or said.index not in kept.answers:
            what = "there is no such answer of yours, or it was given too long ago"
            raise Refusal(404, what, param="id", code="no_such_answer")
        answered = kept.answers[said.index]
        if said.label is not None:
            _check_label(said.label, answered, kept.classes)
        try:
            return Entry(
                id=f"{said.id}-{said.index}",
                at=time.time(),
                model=kept.model,
                version=kept.version,
                key=kept.key,
                route=kept.route,
                asked=kept.records[said.index],
                answered=answered,
                rating=said.rating,
                label=said.label,
                text=said.text,
                comment=said.comment,
            )
        except ValueError as error:
            first = error.errors()[0]["msg"] if hasattr(error, "errors") else str(error)
            what = first.removeprefix("Value error, ")
            raise Refusal(400, what, code="invalid") from None

    def _add(self, entry: Entry) -> bool:
        try:
            return self.dataset.add(entry)
        except (StoreError, SpecError, OSError) as error:
            raise Refusal(
                503,
                f"the storage does not take it ({type(error).__name__})",
                code="not_kept",
                retry_after=5,
            ) from error


def _check_label(label: Any, answered: Any, classes: frozenset[str] | None) -> None:
    """Raise Refusal for a label that is no prediction of that kind."""
    for kind, name in _KINDS.items():
        if isinstance(answered, kind):
            is_it = isinstance(label, kind) and isinstance(label, bool) == (kind is bool)
            if not is_it:
                raise Refusal(400, f"label: the prediction is {name}", param="label")
            break
    given = label if isinstance(label, list) else [label]
    if classes is not None and (other := sorted({*map(str, given)} - classes)):
        some = ", ".join(sorted(classes)[:20])
        raise Refusal(400, f"label: {other[0][:100]!r} is no class; they are {some}", param="label")
    if isinstance(answered, list) and classes is None and len(label) != len(answered):
        what = f"label: {len(label)} are given for {len(answered)} words"
        raise Refusal(400, what, param="label")
