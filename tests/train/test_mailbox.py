"""What a driver learns of its ranks through the mailbox."""

from __future__ import annotations

from dray.rank.pulse import Pulse
from dray.train.mailbox import FEW_RANKS, Mailbox


def beat_all(mailbox: Mailbox, num_ranks: int) -> None:
    for rank in range(num_ranks):
        pulse = Pulse(rank)
        pulse.attempt = 1
        mailbox.beat(pulse.beat())


def test_no_news_of_a_large_group_is_not_the_news_that_there_is_none():
    """A driver that is to stop ends a group that has said nothing, and waits for one that has."""
    mailbox = Mailbox()
    assert mailbox.take(0) == ([], {})
    beat_all(mailbox, FEW_RANKS + 1)
    mailbox.take(0)
    assert mailbox.take(0) == ([], None)  # it was looked at a moment ago
    few = Mailbox()
    beat_all(few, 2)
    for _ in range(3):
        assert set(few.take(0)[1] or {}) == {0, 1}
