"""A service that follows what is promoted, where the gateway does not hear of it at once. What runs
versions is stood for by what it was told; test_promotion has real ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dray.errors import RunFailed
from dray.serve.following import Follower
from dray.serve.served import Served
from dray.serve.versions import Record
from waiting import wait_for


class Told:
    """What was loaded, dropped, and told to the gateway."""

    def __init__(self) -> None:
        self.routes: list[int] = []
        self.fails = False

    def load(self, name: str, version: int, served: Served) -> None:
        pass

    def drop(self, name: str, version: int) -> None:
        pass

    def route(self, models: Mapping[str, Mapping[str, Any]]) -> None:
        if self.fails:
            raise RunFailed("the service did not start")
        self.routes.append(models["chat"]["stable"])


def test_a_gateway_that_cannot_be_told_is_told_again(tmp_path: Path) -> None:
    record = Record(str(tmp_path), "chat")
    versions = [Served(storage="x", run="words", step=n, digest=f"{n:064x}") for n in (1, 2)]
    record.begin(versions[0])
    replicas, said = Told(), list[str]()
    follower = Follower([record], replicas, said.append)
    follower.begin()
    assert replicas.routes == [1]
    record.promote(versions[1])
    replicas.fails = True

    def look() -> bool:
        follower.look()
        return any("what answers goes on" in line for line in said)

    wait_for(look, "the failure", 30)
    assert replicas.routes == [1]
    replicas.fails = False
    follower.look()
    assert replicas.routes == [1, 2]
    follower.close()
    follower.join()
