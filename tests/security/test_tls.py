"""A cluster whose processes speak TLS with each other and with whoever connects: certificates as
docs/security.md makes them."""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from heads import Head, dray, started_head

PAGE = Path(__file__).parents[2] / "docs" / "security.md"


def make_certificates(folder: Path) -> dict[str, str]:
    """By the very commands of the page, for this machine; the variables that name them."""
    (script,) = re.findall(r"```\n(# certificates\n.*?)```", PAGE.read_text(), re.S)
    places = [
        place.address
        for some in psutil.net_if_addrs().values()
        for place in some
        if place.family == socket.AF_INET
    ]
    names = ",".join(["DNS:localhost", *(f"IP:{place}" for place in places)])
    folder.mkdir()
    subprocess.run(
        ["bash", "-euc", script],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "NAMES": names},
        check=True,
        capture_output=True,
    )
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_CA_CERT": str(folder / "ca.crt"),
        "RAY_TLS_SERVER_CERT": str(folder / "node.crt"),
        "RAY_TLS_SERVER_KEY": str(folder / "node.key"),
    }


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_certificates(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def head(certificates: dict[str, str]) -> Iterator[Head]:
    with started_head(num_cpus=3, variables=certificates) as found:
        yield found


@pytest.mark.slow
def test_a_run_over_tls(home: Path, head: Head, certificates: dict[str, str], tmp_path: Path):
    words = ["train", "spec.yaml", "--storage", str(tmp_path / "runs")]
    done = dray(home, head.token, *words, "--address", head.address, **certificates)
    assert done.returncode == 0, done.stderr
    assert "step 6/6" in done.stderr
    words = ["submit", *words, "--run", "submitted", "--address", head.jobs]
    done = dray(home, head.token, *words)  # the server of jobs speaks plain HTTP
    assert done.returncode == 0, done.stderr

    host, _, port = head.address.rpartition(":")
    context = ssl.create_default_context(cafile=certificates["RAY_TLS_CA_CERT"])
    context.load_cert_chain(certificates["RAY_TLS_SERVER_CERT"], certificates["RAY_TLS_SERVER_KEY"])
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, int(port)), 10) as plain,
        context.wrap_socket(plain, server_hostname=host) as secured,
    ):
        assert secured.version() in ("TLSv1.2", "TLSv1.3")


@pytest.mark.slow
def test_who_has_no_certificate_of_the_cluster(
    home: Path, head: Head, certificates: dict[str, str], tmp_path: Path
):
    """Told at once: Ray would try for minutes."""
    others = make_certificates(tmp_path / "others")
    words = ["train", "spec.yaml", "--storage", str(tmp_path / "runs"), "--address", head.address]
    for variables, said in (
        ({}, "speaks TLS, and this process does not"),
        ({"RAY_USE_TLS": "1"}, "is set without RAY_TLS_CA_CERT"),
        (certificates | {"RAY_TLS_CA_CERT": "/none"}, "its files cannot be used"),
        (others, "do not agree on TLS"),
        (certificates | {"RAY_TLS_CA_CERT": others["RAY_TLS_CA_CERT"]}, "do not agree on TLS"),
        (others | {"RAY_TLS_CA_CERT": certificates["RAY_TLS_CA_CERT"]}, "do not agree on TLS"),
    ):
        done = dray(home, head.token, *words, **variables)
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert said in done.stderr
        assert not (tmp_path / "runs").exists()
