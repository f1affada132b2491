"""Keys of a service: in the storage, and before real HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from dray.errors import SpecError
from dray.serve.held_keys import Ring, create_key, has_keys, list_keys, revoke_key
from dray.serve.keys import Caller, OneKey
from dray.serve.refusals import Refusal
from dray.serve.served import Served
from served_here import Address, served_here
from small_writer import save_small_writer
from waiting import wait_for


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, storage: Path) -> Iterator[Address]:
    folder = save_small_writer(tmp_path_factory.mktemp("served") / "writer")
    ring = Ring(str(storage), poll_seconds=0.1)
    with served_here([Served(folder=str(folder))], key=b"the-one", ring=ring) as address:
        yield address
    ring.close()


def ask(service: Address, token: str | None, route: str = "/v1/models") -> requests.Response:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    if route == "/v1/models":
        return requests.get(service.url + route, headers=headers, timeout=60)
    body = {"model": "writer", "prompt": "a", "max_tokens": 1}
    return requests.post(service.url + route, json=body, headers=headers, timeout=60)


def made(service: Address, storage: Path, name: str, **options: object) -> str:
    """A key that the gateway knows."""
    token = create_key(str(storage), name, **options)  # type: ignore[arg-type]
    wait_for(lambda: ask(service, token, "/nothing").status_code != 401, "the key", 30)
    return token


def test_a_token_is_kept_nowhere(storage: Path):
    token = create_key(str(storage), "secret")
    assert len(token) > 43
    files = [path for path in storage.rglob("*") if path.is_file()]
    assert files
    assert not any(token.encode() in path.read_bytes() for path in files)
    assert has_keys(str(storage))


def test_a_key_is_for_its_scopes_alone(service: Address, storage: Path):
    reads = made(service, storage, "reads", scopes=["models"])
    assert ask(service, reads).status_code == 200
    refused = ask(service, reads, "/v1/completions")
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "missing_scope"
    writes = made(service, storage, "writes", scopes=["write"])
    assert ask(service, writes, "/v1/completions").status_code == 200
    assert ask(service, writes).status_code == 403
    assert ask(service, writes, "/metrics").status_code == 403
    assert ask(service, "the-one").status_code == 200


@pytest.mark.parametrize("token", [None, "", "dray-", "wrong", "ü"])
def test_who_has_no_key_is_told_nothing(service: Address, token: str | None):
    headers = {} if token is None else {"Authorization": f"Bearer {token}".encode()}
    refused = requests.get(f"{service.url}/v1/models", headers=headers, timeout=60)
    assert refused.status_code == 401
    assert refused.json()["error"]["type"] == "authentication_error"


def test_a_revoked_key_ends_while_the_service_runs(service: Address, storage: Path):
    token = made(service, storage, "leaver")
    assert ask(service, token).status_code == 200
    assert revoke_key(str(storage), "leaver")
    assert not revoke_key(str(storage), "leaver")
    wait_for(lambda: ask(service, token).status_code == 401, "the end of the key", 30)
    with pytest.raises(SpecError, match="is there already, or was"):
        create_key(str(storage), "leaver")
    assert {held.name: state for held, state in list_keys(str(storage))}["leaver"] == "revoked"


def test_beyond_its_rate_a_key_is_told_when_to_come_again(service: Address, storage: Path):
    token = create_key(str(storage), "slow", rate="3/hour")
    wait_for(lambda: ask(service, token).status_code == 200, "the key", 30)
    assert [ask(service, token).status_code for _ in range(3)] == [200, 200, 429]
    refused = ask(service, token)
    assert 3000 < int(refused.headers["Retry-After"]) <= 3601
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert ask(service, "the-one").status_code == 200


def test_a_key_whose_time_is_over_is_none(storage: Path):
    token = create_key(str(storage), "short", days=1e-9)
    ring = Ring(str(storage))
    ring.close()
    assert ring.find(token) is None
    assert {held.name: state for held, state in list_keys(str(storage))}["short"] == "expired"


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "../up"},
        {"name": ""},
        {"rate": ""},
        {"rate": "0/minute"},
        {"rate": "often"},
        {"scopes": ["all"]},
        {"scopes": []},
        {"days": 0.0},
    ],
)
def test_a_key_that_would_limit_nothing_is_not_made(tmp_path: Path, wrong: dict[str, object]):
    given = {"name": "new", "scopes": ["write"], "rate": None, "days": None} | wrong
    with pytest.raises(SpecError):
        create_key(str(tmp_path), **given)  # type: ignore[arg-type]
    assert not has_keys(str(tmp_path))


@pytest.mark.parametrize(
    ("host", "may"),
    [
        ("localhost:8000", True),
        ("LOCALHOST", True),
        ("127.0.0.1:8000", True),
        ("127.9.9.9", True),
        ("[::1]:8000", True),
        ("evil.example:8000", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example:8000", False),
        ("10.0.0.7:8000", False),
        ("", False),
    ],
)
def test_an_open_service_on_loopback_answers_to_its_own_name_alone(host: str, may: bool):
    """A page of a place whose name was made to lead here asks by that place's name."""
    assert OneKey(b"", local=True).admit({"host": host}, "/v1/models") if may else True
    if not may:
        with pytest.raises(Refusal, match="localhost alone"):
            OneKey(b"", local=True).admit({"host": host}, "/v1/models")
    assert OneKey(b"").admit({"host": host}, "/v1/models") == Caller()
    with pytest.raises(Refusal):
        OneKey(b"secret", local=True).admit({"host": "localhost"}, "/v1/models")
