"""The server of jobs of a Ray cluster, over HTTP: submit, follow, stop and list dray's jobs.

A job is known by its run: a second submit of the same command for the same run and storage finds
the first one, which is still at work, and follows it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import re
import shlex
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

from dray.cluster.local_ray import TOKEN_RULE, check_open, token_header
from dray.errors import JobLost, PlanError, RunFailed, ServerGone, one_line
from dray.jobs.arrival import versions_here
from dray.jobs.package import Package, staged
from dray.storage.filesystem import child

STOP_SECONDS = 300
"""How long a job that is told to stop may take to save its state before it is killed. Ray's usual
3 s are too short for any."""
LOOK_SECONDS = 1.0
ANSWER_SECONDS = 10.0
"""So long its first answer may take."""
AWAY_SECONDS = 60.0
"""How long a server that was there may be away, as it is where its head is started again."""
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
"""Loggers of what is none of the user's business."""
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Job:
    """A job of dray's as the server tells of it."""

    id: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    command: str
    run: str
    storage: str
    exit_code: int | None
    message: str
    began: float | None
    """Seconds since 1970; none: not yet."""
    ended: float | None

    @property
    def is_over(self) -> bool:
        return self.status in _ENDED


class JobServer:
    """A connected server of jobs. Raises PlanError where none answers, where it wants another
    token, and where its Ray is another one."""

    def __init__(self, address: str) -> None:
        self.address = _checked(address)
        self._client = self._connect()

    def _connect(self) -> Any:
        try:
            import_module("aiohttp")
        except ImportError as error:
            raise PlanError(
                "dray submit",
                f"needs {error.name}, which is not installed",
                way_out="pip install 'dray[cluster]'",
            ) from error
        import requests
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.ERROR)
        headers = _wanted_token(self.address)
        try:
            client = JobSubmissionClient(self.address, headers=headers)
        except AuthenticationError as error:
            which = "another token than the one that is here" if headers else "a token"
            raise PlanError(
                "--address",
                f"the cluster at {self.address} wants {which}",
                *TOKEN_RULE,
            ) from error
        except (ConnectionError, requests.exceptions.RequestException, RuntimeError) as error:
            raise _no_answer(self.address) from error
        there, here = client._server_ray_version, versions_here()["ray"]
        if there != here:
            raise PlanError(
                "--address",
                f"the cluster has ray {there} and here is {here}",
                "both sides have the same Ray",
                f"pip install 'ray=={there}' here, or change the cluster",
            )
        return client

    def jobs(self) -> list[Job]:
        """All jobs of dray's, the newest last. Raises ServerGone."""
        with self._answering():
            found = [_read(details) for details in self._client.list_jobs()]
        return sorted((job for job in found if job), key=lambda job: job.began or 0.0)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Raise ServerGone where it breaks off, or says nothing but that it cannot."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # an OSError is what requests raises, too
            raise ServerGone(
                "--address",
                f"the server of jobs at {self.address} broke off ({one_line(error)[:200]})",
                "a head ends where its disk is full or its memory is gone",
                "make room there, start the head again, and give the same command",
            ) from error

    def find(self, run: str) -> list[Job]:
        """The jobs of a run that have not ended, one a storage; if there are none, its newest
        one."""
        jobs = [job for job in self.jobs() if job.run == run]
        return [job for job in jobs if not job.is_over] or jobs[-1:]

    def look(self, name: str, patience: float = AWAY_SECONDS) -> Job:
        """A job as it is now. Raises JobLost if it is not there any more, or if the server has not
        answered for so many seconds."""
        deadline = time.monotonic() + patience
        while True:
            try:
                found = _read(self._client.get_job_info(name))
                if found is not None:
                    return found
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise JobLost(
                        f"{self.address} has not answered for {patience:.0f} s "
                        f"({one_line(error)[:200]}); whether {name} goes on is not known",
                        "the same command follows it once the cluster answers again, or begins "
                        "it anew, and the run goes on from its newest checkpoint",
                    ) from error
            except RuntimeError as error:  # what the server says
                if "does not exist" in str(error) or "status code 404" in str(error):
                    break
                if time.monotonic() > deadline:
                    raise RunFailed(f"{self.address}: {one_line(error)[:300]}") from error
            time.sleep(LOOK_SECONDS)
        raise JobLost(
            f"{self.address} knows the job {name} no more: its head was started anew",
            "the same command begins it anew, and the run goes on from its newest checkpoint",
        )

    def submit(
        self, words: Sequence[str], package: Package, run: str, storage: str
    ) -> tuple[Job, bool]:
        """Have the cluster run a command of dray; the job, and whether it is a new one. A storage
        is the same with and without a slash at its end. Raises ServerGone, and RunFailed for a job
        that the server does not take."""
        storage = child(storage)
        before = self._of(run, storage)
        if at_work := _still_at_work(before, words):
            return at_work, False
        # Two that submit at once choose the same name, and Ray takes it once.
        place = hashlib.sha256(f"{storage}\0{run}".encode()).hexdigest()[:8]
        number = max((int(job.id.rpartition("-")[2]) for job in before), default=0) + 1
        name = f"dray-{run.replace('/', '-')}-{place}-{number}"
        begin = ["python", "-m", "dray.cli", "arrive", json.dumps(versions_here()), "--", *words]
        command = f"cd {shlex.quote(str(package.here))} && exec {shlex.join(begin)}"
        # What goes there was chosen by then: Ray would drop folders called venv without a word.
        os.environ["RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES"] = ""
        with staged(package) as folder:
            try:
                self._client.submit_job(
                    entrypoint=command,
                    submission_id=name,
                    runtime_env={
                        "working_dir": str(folder),
                        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
                    },
                    metadata={
                        "dray_run": run,
                        "dray_storage": storage,
                        "dray_command": shlex.join(words),
                    },
                )
            except (RuntimeError, ValueError, OSError) as error:
                if at_work := _still_at_work(self._of(run, storage), words):
                    return at_work, False
                if "No available agent" in str(error):
                    raise PlanError(
                        "--address",
                        f"the agent on the head of {self.address} that starts jobs is gone",
                        "it ends where its log finds no room: the head's disk is full, or its port "
                        "is another Ray's",
                        "make room there, and start the head again",
                    ) from error
                raise RunFailed(f"the cluster did not take the job: {one_line(error)}") from error
        return self.look(name), True

    def answers(self) -> bool:
        """Whether the server is there."""
        try:
            with self._answering():
                self._client.get_version()
        except ServerGone:
            return False
        return True

    def _of(self, run: str, storage: str) -> list[Job]:
        return [job for job in self.jobs() if (job.run, job.storage) == (run, storage)]

    def follow(self, job: Job, tell: Callable[[str], object]) -> Job:
        """Tell what a job writes, line by line, from its beginning to its end. A connection that
        breaks is made anew; once the job has ended, only once: its log may have gone with its node.
        Raises JobLost."""
        import aiohttp

        lines, was_over = _Lines(tell), False
        while True:
            try:
                asyncio.run(lines.take(self._client.tail_job_logs(job.id)))
                return self.wait(job)
            except (RuntimeError, OSError, aiohttp.ClientError):
                job = self.look(job.id)
                if was_over:
                    return job
                was_over = job.is_over
                time.sleep(LOOK_SECONDS)

    def wait(self, job: Job) -> Job:
        """The job once it has ended."""
        while not (now := self.look(job.id)).is_over:
            time.sleep(LOOK_SECONDS)
        return now

    def stop(self, job: Job) -> Job:
        """Have a job save its state and end; it is killed after STOP_SECONDS."""
        with self._answering():
            self._client.stop_job(job.id)
        return self.wait(job)


class _Lines:
    """Tells each line of a log once, however often the log is read from its beginning."""

    def __init__(self, tell: Callable[[str], object]) -> None:
        self._tell, self._num_told = tell, 0

    async def take(self, chunks: AsyncIterator[str]) -> None:
        rest, number = "", 0
        async for chunk in chunks:
            *lines, rest = (rest + chunk).split("\n")
            for line in lines:
                number += 1
                self._hear(line, number)
        if rest:
            self._hear(rest, number + 1)

    def _hear(self, line: str, number: int) -> None:
        if number > self._num_told:
            self._num_told = number
            self._tell(line)


def _still_at_work(jobs: Sequence[Job], words: Sequence[str]) -> Job | None:
    """The newest of a run's jobs, if it has not ended. Raises PlanError if it does something
    else."""
    if not jobs or jobs[-1].is_over:
        return None
    if jobs[-1].command != shlex.join(words):
        raise PlanError(
            "dray submit",
            f"{jobs[-1].id} is at work on {jobs[-1].run} with another command: {jobs[-1].command}",
            "a run has one job at a time",
            f"wait for it, or `dray stop {jobs[-1].run} --address …`, or give --run another name",
        )
    return jobs[-1]


def exit_code(job: Job) -> int:
    """Of a job that has ended: its command's own, if it came so far."""
    if job.exit_code is not None:
        return job.exit_code
    return 0 if job.status == "SUCCEEDED" else 143 if job.status == "STOPPED" else 3


def _read(details: Any) -> Job | None:
    metadata = details.metadata or {}
    if "dray_run" not in metadata:
        return None
    return Job(
        details.submission_id,
        str(getattr(details.status, "value", details.status)),
        metadata.get("dray_command", ""),
        metadata["dray_run"],
        metadata.get("dray_storage", ""),
        getattr(details, "driver_exit_code", None),
        details.message or "",
        details.start_time / 1000 if details.start_time else None,
        details.end_time / 1000 if details.end_time else None,
    )


def _wanted_token(address: str) -> dict[str, str]:
    """The header with this machine's token, if it has one and the server wants one. Raises
    ServerGone for what does not answer in time, as Ray's own client would wait for ever, and
    PlanError for what is no server of jobs, and for one that wants no token though others can
    reach it."""
    import requests

    try:
        asked = requests.get(f"{address}/api/version", timeout=ANSWER_SECONDS)
    except (requests.exceptions.RequestException, ValueError) as error:
        raise _no_answer(address) from error
    if asked.status_code in (401, 403):
        return token_header()
    try:
        told = asked.json()
    except ValueError:
        told = None
    if not isinstance(told, dict) or "ray_version" not in told:
        raise PlanError(
            "--address", f"what answers at {address} is no server of jobs of Ray", _ADDRESS_RULE
        )
    check_open(address, urlsplit(address).hostname or "")
    return {}


_ADDRESS_RULE = "it is the address of the dashboard, http://HEAD:8265 if nothing else was said"


def _no_answer(address: str) -> ServerGone:
    return ServerGone(
        "--address",
        f"no server of jobs answers at {address}",
        _ADDRESS_RULE,
        "ray start --head there (a head ends where its disk is full), or open the port by "
        "`ssh -L 8265:localhost:8265 HEAD`",
    )


def _checked(address: str) -> str:
    if not re.match(r"https?://[^/]", address):
        raise PlanError(
            f"--address {address}",
            "is no address of a server of jobs",
            "it begins with http:// or https://; its port is the dashboard's, 8265 if nothing else "
            "was said",
            "give http://HEAD:8265",
        )
    return address.rstrip("/")
