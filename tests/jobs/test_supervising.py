"""Which jobs are begun anew. tests/cluster/test_supervision.py does it for real."""

from __future__ import annotations

import pytest

from dray.jobs import Job, Restarts, lost_by
from dray.jobs.supervising import MOST_SOON, SOON_SECONDS


def ended(status: str, exit_code: int | None, message: str = "") -> Job:
    return Job("dray-r-0-1", status, "train r", "r", "/runs", exit_code, message, 1.0, 2.0)


@pytest.mark.parametrize(
    ("job", "why"),
    [
        (ended("SUCCEEDED", 0), ""),
        (ended("FAILED", 2), ""),
        (ended("FAILED", 3), ""),
        (ended("FAILED", 130), ""),
        (ended("STOPPED", None), ""),
        (ended("FAILED", -9), "its driver was ended by signal 9"),
        (ended("FAILED", 137), "its driver was ended by signal 9"),
        (ended("FAILED", 143), "its driver was ended by signal 15"),
        (ended("FAILED", None, "the supervisor died\nand more"), "the supervisor died"),
        (ended("FAILED", None), "nobody knows how it ended"),
    ],
)
def test_only_what_was_ended_from_outside_is_lost(job: Job, why: str):
    assert lost_by(job) == why


def test_what_is_lost_again_and_again_is_given_up():
    now = 0.0
    restarts = Restarts(lambda: now)
    for _ in range(MOST_SOON - 1):
        now += 1.0
        assert restarts.lost()
    now += SOON_SECONDS
    assert restarts.lost()  # this one had worked for a while
    for number in range(MOST_SOON):
        now += 1.0
        assert restarts.lost() == (number < MOST_SOON - 1)
