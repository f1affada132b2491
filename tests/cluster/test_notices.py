"""Notices of clouds, by servers that speak as theirs do. tests/cluster/test_machines.py has a run
that hears of one."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

import metadata
from dray.cluster import notices
from dray.cluster.notices import Aws, Azure, Gcp, find_metadata, watch
from metadata import metadata_server


@pytest.fixture(autouse=True)
def not_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests switch AWS' server off for their own S3."""
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED", raising=False)


CLOUDS = {"aws": Aws, "gcp": Gcp, "azure": Azure}


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_notice_is_heard_with_the_time_that_is_left(cloud: str, tmp_path: Path):
    notice = tmp_path / "notice"
    with metadata_server(cloud, notice) as address:
        for name, kind in CLOUDS.items():
            assert kind(address).is_here() == (name == cloud), name
        server = CLOUDS[cloud](address)
        assert server.is_here()
        assert server.look() is None
        notice.write_text("90")
        found = server.look()
    assert found is not None
    assert found.seconds == pytest.approx(30.0 if cloud == "gcp" else 90.0, abs=3)


def test_a_token_that_has_run_out_is_made_anew(tmp_path: Path):
    notice = tmp_path / "notice"
    notice.write_text("100")
    with metadata_server("aws", notice) as address:
        server = Aws(address)
        assert server.is_here()
        metadata.TOKENS.clear()
        assert server.look() is None
        assert server.look() is not None


def test_the_cloud_is_found_by_the_usual_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED", raising=False)
    monkeypatch.setattr(notices, "_LINK_LOCAL", "http://127.0.0.1:1")
    assert find_metadata() is None
    with metadata_server("aws", tmp_path / "notice") as address:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", address)
        assert isinstance(find_metadata(), Aws)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        assert find_metadata() is None
    with metadata_server("gcp", tmp_path / "notice") as address:
        monkeypatch.setenv("GCE_METADATA_HOST", address.removeprefix("http://"))
        assert isinstance(find_metadata(), Gcp)


def test_a_server_that_falls_silent_or_babbles_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(notices, "LOOK_SECONDS", 0.05)
    notice, found = tmp_path / "notice", list[notices.Notice]()
    with metadata_server("azure", notice) as address:
        server = Azure(address)
        thread = threading.Thread(target=lambda: found.append(watch(server)), daemon=True)
        server._base = "http://127.0.0.1:1"
        thread.start()
        server._base = address
        notice.write_text("no number")  # the server's handler fails, and closes the connection
        thread.join(0.5)
        assert thread.is_alive()
        notice.write_text("60")
        thread.join(20)
    assert [round(one.seconds / 10) for one in found] == [6]
