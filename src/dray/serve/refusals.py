"""Every answer of the service that is no success, in OpenAI's form:
`{"error": {message, type, param, code}}`.

A refusal is a value, too (`told`, `read`): it crosses from a replica to the gateway without being
raised there, and without being taken for a failure of the replica.
"""

from __future__ import annotations

from typing import Any

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""What OpenAI's `type` is by status; every other 4xx is an invalid_request_error."""


class Refusal(Exception):
    """A request that is not answered as it wanted. `message` says what is wrong, the rule and the
    way out; `param` which field it is of; `code` is a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return _read_refusal, (self.told(),)

    @property
    def kind(self) -> str:
        """OpenAI's `type`."""
        return TYPES.get(self.status, "invalid_request_error")

    @property
    def word(self) -> str:
        """By which refusals are counted and logged: one of a few."""
        return self.code or self.kind

    def body(self) -> dict[str, Any]:
        """The document of the answer."""
        told = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": told}

    def headers(self) -> dict[str, str]:
        """Of the answer."""
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    def told(self) -> dict[str, Any]:
        """As plain values."""
        names = ("status", "message", "param", "code", "retry_after")
        return {name: getattr(self, name) for name in names}

    @staticmethod
    def read(told: dict[str, Any]) -> Refusal:
        """What `told` gave."""
        return _read_refusal(told)


def _read_refusal(told: dict[str, Any]) -> Refusal:
    return Refusal(
        told["status"],
        told["message"],
        param=told["param"],
        code=told["code"],
        retry_after=told["retry_after"],
    )


def too_many(message: str, seconds: float) -> Refusal:
    """429, with when to come again."""
    return Refusal(429, message, code="overloaded", retry_after=max(1, round(seconds)))
