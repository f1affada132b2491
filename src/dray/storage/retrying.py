"""Storage operations tried again while the storage fails for the moment, and one clear error when
it fails for good.

What passes (HTTP 5xx, throttling, timeouts, broken connections, a network mount's EIO and ESTALE)
is waited for, about two minutes in all; what stays (missing, forbidden, full, read-only) is never
tried again.
"""

from __future__ import annotations

import errno
import logging
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_before_delay,
    wait_random_exponential,
)

from dray.errors import DrayError, StorageFailed, StoreError
from dray.redaction import redact

RETRY_SECONDS = 120.0
"""How long an operation is tried again: a store that is down for a minute is survived."""
OUTAGE_SECONDS = 60.0
"""How long a run goes on while its storage takes nothing, not even late: a disk that is full may be
freed."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 15.0
"""Pauses are drawn between 0 and a bound that doubles from the first to the longest: ranks do not
come back at once."""

T = TypeVar("T")
_seconds: ContextVar[float | None] = ContextVar("retry_seconds", default=None)
_log = logging.getLogger("dray.runs")

_TRANSIENT = frozenset(
    {
        errno.EIO,
        errno.ESTALE,
        errno.EAGAIN,
        errno.EINTR,
        errno.EBUSY,
        errno.ETIMEDOUT,
        errno.ECONNRESET,
        errno.ECONNREFUSED,
        errno.ECONNABORTED,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENETRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EPIPE,
        errno.ENOTCONN,
        errno.ESHUTDOWN,
        errno.EREMOTEIO,
        errno.ENOLINK,
        errno.ECOMM,
        errno.EPROTO,
        errno.ENOBUFS,
        255,  # what libhdfs says of every Java exception that it has no number for
    }
)
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_UNCHANGED = (FileNotFoundError, FileExistsError)
"""Answers rather than failures: callers ask for them."""
_LIBRARIES = frozenset(
    {
        "obstore",
        "fsspec",
        "aiohttp",
        "botocore",
        "s3fs",
        "gcsfs",
        "adlfs",
        "azure",
        "google",
        "requests",
        "urllib3",
        "httpx",
        "paramiko",
    }
)
"""Whose exceptions mean that the storage failed without being OSErrors."""

_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|https?://\S+|for path \S+|at location \S+")
"""Names inside a message: a run called `timeout-503` must not look like an outage."""
_STATUS = re.compile(
    r"(?:HTTP status|status code|status|HTTP/1\.1|HTTP)[ :=(]{1,3}(\d{3})\b", re.IGNORECASE
)
_PERMANENT_WORDS = re.compile(
    r"access.?denied|permission|forbidden|unauthori[sz]ed|unauthenticated|invalid.?(access|argument|request|token|range)"
    r"|signature|expired.?token|no.?such|not.?found|does not exist|no "
    r"space|storage.?full|quota.?exceeded|read-only"
    r"|certificate|not.?implemented|method.?not.?allowed|credential",
    re.IGNORECASE,
)
_TRANSIENT_WORDS = re.compile(
    r"slow.?down|throttl|too.?many.?requests|rate.?(limit|exceeded)|(service.?|temporarily.?)?unavailable|internal.?"
    r"(server.?)?(error|failure)|server.?busy|timed?.?out|deadline|connection|network|could(n.t| "
    r"not) (connect|resolve)"
    r"|name resolution|curl.?(code|error)|error sending request|reset by peer|broken "
    r"pipe|disconnected|unexpected eof"
    r"|incomplete|try "
    r"again|conditional.?request.?conflict|operation.?aborted|resource.?exhausted|bad gateway"
    r"|input/output error|stale file",
    re.IGNORECASE,
)


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Inside, operations are tried again for `seconds` only: where a person waits and nothing is at
    stake yet."""
    token = _seconds.set(seconds)
    try:
        yield
    finally:
        _seconds.reset(token)


def retry(call: Callable[[], T], where: str) -> T:
    """What `call` returns, called again after a pause for as long as the storage fails with what
    may pass.

    `call` must be able to start over. FileNotFoundError, FileExistsError and what is no failure of
    the storage come through as they are; every other failure is raised as StorageFailed, for the
    place `where`.
    """
    seconds = _seconds.get()
    seconds = RETRY_SECONDS if seconds is None else seconds
    retrying = Retrying(
        retry=retry_if_exception(is_transient),
        stop=stop_before_delay(seconds),
        reraise=True,
        wait=wait_random_exponential(FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS),
        before_sleep=_warner(where),
    )
    begun = time.monotonic()
    try:
        return retrying(call)
    except Exception as error:
        if isinstance(error, (DrayError, *_UNCHANGED)) or not _is_storage_error(error):
            raise
        raise _explain(error, where, time.monotonic() - begun, seconds) from error


def is_transient(error: BaseException) -> bool:
    """Whether the same operation may succeed a little later. By errno where there is one, else by
    status and words."""
    if isinstance(error, (DrayError, *_UNCHANGED)) or not _is_storage_error(error):
        return False
    if isinstance(error, (TimeoutError, ConnectionError, socket.gaierror)):
        return True
    number = getattr(error, "errno", None)
    if isinstance(number, int):
        return number in _TRANSIENT
    if (status := http_status(error)) is not None:
        return status in (408, 425, 429) or (status >= 500 and status not in (501, 505, 507))
    text = _words(error)
    return not _PERMANENT_WORDS.search(text) and bool(_TRANSIENT_WORDS.search(text))


def make_damage(error: StoreError | OSError) -> str:
    """What an error says of the file that was to be read. An error that says nothing of the file,
    since the storage is out of reach or closed to us, is raised again: a sound checkpoint must not
    be taken for a damaged one."""
    if (
        isinstance(error, StorageFailed) and error.errno != errno.EIO
    ):  # EIO, after all waiting: a bad sector
        raise error
    return error.what if isinstance(error, StoreError) else str(error)


def first_safe_line(error: BaseException) -> str:
    """The beginning of an error's message, without secrets, fit to stand inside another one."""
    text = error.what if isinstance(error, StoreError) else str(error)
    return redact((text.strip() or type(error).__name__).splitlines()[0])[:200]


def _is_storage_error(error: BaseException) -> bool:
    return isinstance(error, OSError) or (
        isinstance(error, Exception)
        and not isinstance(error, (ValueError, TypeError))
        and type(error).__module__.partition(".")[0] in _LIBRARIES
    )


def http_status(error: BaseException) -> int | None:
    """The HTTP status that an error carries, as a field or in its text."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for found in (
        response,
        getattr(error, "status_code", None),
        getattr(error, "status", None),
        getattr(response, "status_code", None),
        getattr(error, "code", None),
    ):
        if isinstance(found, int) and 400 <= found < 600:
            return found
    match = _STATUS.search(_words(error))
    return int(match[1]) if match else None


def _words(error: BaseException) -> str:
    """An error's name and message without the names of files in it."""
    message = _QUOTED.sub("", str(error).partition("\nDebug source")[0])
    return f"{type(error).__name__}: {message}"


def _warner(where: str) -> Callable[[RetryCallState], None]:
    def warn(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        pause = state.next_action.sleep if state.next_action else 0.0
        _log.warning(
            "%s: the storage fails (%s); tried again in %.1f s",
            where,
            first_safe_line(error or OSError()),
            pause,
        )

    return warn


def _explain(error: Exception, where: str, spent: float, patience_seconds: float) -> StorageFailed:
    number = getattr(error, "errno", None)
    number = number if isinstance(number, int) else None
    what, text = first_safe_line(error), _words(error).lower()
    go_on = "start it again: a run goes on from its newest checkpoint"
    if is_transient(error):
        return StorageFailed(
            where,
            f"the storage failed for {spent:.0f} s ({what})",
            f"a failing storage is waited for, up to {patience_seconds:.0f} s",
            f"see that it is up and reachable, then {go_on}",
            number,
        )
    if number in _FULL or re.search(
        r"no space|storage.?full|quota.?exceeded|status.{1,3}507", text
    ):
        return StorageFailed(
            where,
            f"the storage is full ({what})",
            "nothing is written that does not fit",
            f"free space there or give another place with --storage, then {go_on}",
            number,
        )
    refused = r"denied|permission|forbidden|unauth|read-only|credential|signature|token"
    if number in _FORBIDDEN or re.search(refused, text):
        return StorageFailed(
            where,
            f"the storage refuses it ({what})",
            "the storage is a place that dray may use",
            "mend its permissions or the credentials, or give another place with --storage",
            number,
        )
    return StorageFailed(
        where,
        f"the storage fails ({what})",
        "this does not pass by waiting",
        "check the place, its address and its settings",
        number,
    )
