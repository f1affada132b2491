"""One compute thread: the matrices are small, and on a busy machine a second thread mostly waits
for the first."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """What a test draws does not depend on those that ran before it in its process."""
    torch.manual_seed(0)
