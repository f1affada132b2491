"""Following a job whose log cannot be read to its end. The server's client is a stand-in here: a
real one is in tests/cluster/test_submitting.py and test_supervision.py."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from dray.jobs import JobServer, server
from dray.storage.filesystem import child


class Client:
    """Gives what each reading of the log gives, the last one again and again, and a status a
    look."""

    def __init__(self, readings: list[list[str]], statuses: list[str]) -> None:
        self.readings, self.statuses, self.num_read = readings, statuses, 0

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        self.num_read += 1
        chunks = self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]
        for chunk in chunks:
            if chunk == "broken":
                raise RuntimeError("the connection is closed")
            yield chunk

    def get_job_info(self, name: str) -> Any:
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        return SimpleNamespace(
            submission_id=name,
            status=status,
            metadata={"dray_run": "r"},
            message="",
            start_time=1000,
            end_time=None,
        )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "LOOK_SECONDS", 0.0)


def follow(client: Client) -> tuple[str, list[str]]:
    connected = object.__new__(JobServer)
    connected.address, connected._client = "http://head", client
    told: list[str] = []
    job = connected.follow(connected.look("dray-r-0-1"), told.append)
    return job.status, told


def test_a_broken_connection_loses_and_repeats_no_line(quick: None):
    client = Client(
        [["a\nb", "\nc", "broken"], ["a\n", "broken"], ["a\nb\nc\nd\ne"]],
        ["RUNNING", "RUNNING", "RUNNING", "SUCCEEDED"],
    )
    assert follow(client) == ("SUCCEEDED", ["a", "b", "c", "d", "e"])


def test_a_log_that_is_gone_with_its_node_is_not_waited_for(quick: None):
    client = Client([["a\n", "broken"]], ["RUNNING", "FAILED"])
    assert follow(client) == ("FAILED", ["a"])
    assert client.num_read == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("/mnt/runs", "/mnt/runs/"),
        ("/mnt/runs", "/mnt/./x/../runs"),
        ("s3://bucket/runs?region=a", "s3://bucket/runs/?region=a"),
    ],
)
def test_a_storage_is_the_same_with_a_slash_at_its_end(one: str, other: str):
    assert child(one) == child(other)
    assert child(one) != child("/mnt/runs2")
